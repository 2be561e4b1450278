"""What people compare, by name: the base model, a run, a LoRA file; with a weight, or mixed with the base model.

    base   runs/a   runs/a@0.7   runs/a@0.7:base_steps=8   runs/a:aig=2   runs/a/checkpoint-50   style.safetensors@0.5

The one place that opens a tuned model for sampling. The settings are those of the run: config.yaml beside the weights,
and run.json for a run that was started from Python.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Memory, Model, PromptSource, RunConfig, load_config
from .errors import ConfigError, first_line
from .prompts import is_picture, with_inputs
from .runfolder import DENOISER_FOLDER, LORA_FILE
from .spelling import nearest

if TYPE_CHECKING:
    from .mixing import Mix

BASE = "base"
ADAPTER = "candidate"
SYNTAX = "base, or RUN_OR_LORA[@WEIGHT][:base_steps=N] or [:aig=P], e.g. runs/a@0.7:base_steps=8"
OPTIONS = ("base_steps", "aig")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the run that lies in a folder samples. call: arguments of `pipe(...)` without prompts. facts: run.json."""

    model: Model
    scheduler: str | None
    call: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    config: RunConfig | None = None

    @property
    def prompts(self) -> PromptSource | None:
        """The prompts of the run's evaluations; None where no config.yaml tells them."""
        return None if self.config is None else self.config.looked_at

    @property
    def columns(self) -> list[str]:
        """What its prompts bring into the call with them (prompts.columns): pictures and texts, by argument."""
        return [] if self.prompts is None else self.prompts.columns


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that is ready to be opened.

    place: the LoRA file, or the folder of a whole denoiser (full fine-tuning); None: the base model. weight: factor on
    what was trained, 1 as trained; of a whole denoiser the step from the base weights to it. Where the spec names none
    it is the run's adapter.inference_weight.
    """

    spec: str
    label: str
    place: Path | None
    settings: Settings
    weight: float = 1.0
    mix: Mix | None = None

    @property
    def run(self) -> Path | None:
        """The folder of the run that it is of; None for the base model and for a file without a run."""
        return None if self.place is None else run_of(self.place.parent)

    @property
    def digest(self) -> str | None:
        """Of the weights' bytes: whether results still speak of the file that lies there."""
        if self.place is None:
            return None
        files = [self.place] if self.place.is_file() else sorted(self.place.glob("*.safetensors"))
        found = hashlib.blake2b(digest_size=16)
        for file in files:
            found.update(file.read_bytes())
        return found.hexdigest()


def run_of(folder: Path) -> Path | None:
    """The run to whose folder, checkpoint-N or export/FORMAT `folder` belongs; None where no run.json or config is."""
    places = [folder]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent)
    if folder.parent.name == "export":
        places.append(folder.parent.parent)
    return next((p for p in places if (p / "config.yaml").is_file() or (p / "run.json").is_file()), None)


def settings_of(folder: Path, *, model: str | None = None) -> Settings:
    """The settings of the run in `folder`; a given base `model` wins, loaded unquantised, as it is.

    ConfigError where nothing tells the base.
    """
    run = run_of(folder) or folder
    config = load_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    if config is None and model is None:
        raise ConfigError(
            f"{folder} has no config.yaml to tell the base model; add --model (a folder, a hub id, playground)"
        )
    facts = _facts(run)
    call = dict[str, Any]()
    if config is None:
        base, scheduler = Model(id=str(model)), _scheduler_of(facts)
    else:
        sampling = config.sampling
        base = config.model if model is None else _another(config.model, model)
        scheduler = sampling.scheduler
        call = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "height": sampling.height,
            "width": sampling.width,
            "negative_prompt": config.negative_prompt,
        } | sampling.call
    call = {key: value for key, value in (call | facts.get("call", {})).items() if value is not None}
    return Settings(
        model=base, scheduler=scheduler, call={"num_inference_steps": 50} | call, facts=facts, config=config
    )


def _scheduler_of(facts: Mapping[str, Any]) -> str | None:
    """The scheduler's class of a run from Python, whose pipeline may have had another than the base's own.

    None where run.json names none of diffusers', which is the base's own then. Its configuration is not kept.
    """
    if "scheduler" not in facts:
        return None
    import diffusers

    return facts["scheduler"] if facts["scheduler"] in dir(diffusers) else None


def _another(base: Model, id: str) -> Model:
    """`base` with the weights of `id` in full: what tells which weights of the old id they were does not go with it."""
    which: dict[str, Any] = {} if id == base.id else dict.fromkeys(("revision", "variant", "config"))
    return base.model_copy(update={"id": id, "quantize": None, **which})


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or move it away to go on without it") from error
    return facts if isinstance(facts, dict) else {}


# -- from words to candidates ----------------------------------------------------------------------------------------


def candidates(
    specs: Sequence[str],
    *,
    model: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
) -> list[Candidate]:
    """The candidates of `specs`, in their order; all of one base model.

    model: the base, where no config.yaml tells it. steps, guidance, scheduler: for all, instead of each run's own.
    `base` takes the settings of the first candidate that has some. Raises ConfigError for what cannot be opened.
    """
    if repeated := {spec for spec in specs if list(specs).count(spec) > 1}:
        raise ConfigError(f"the candidate {min(repeated)!r} is given twice; give each once")
    asked = call_of(steps, guidance)
    parts = [(spec, *_parse(spec)) for spec in specs]
    found: list[Candidate | None] = []
    for spec, place, weight, mix in parts:
        if place is None:
            found.append(None)
            continue
        settings = settings_of(place.parent, model=model)
        settings = replace(
            settings, call=settings.call | asked, scheduler=settings.scheduler if scheduler is None else scheduler
        )
        label = _label(spec, place)
        if weight is None:
            weight = _own_weight(place, settings)
            label = _with_weight(label, weight)
        found.append(Candidate(spec=spec, label=label, place=place, settings=settings, weight=weight, mix=mix))
    first = next((candidate.settings for candidate in found if candidate), None)
    if first is None:
        if model is None:
            raise ConfigError("only the base model is given; add --model (a folder, a hub id, playground)")
        first = Settings(model=Model(id=model), scheduler=scheduler, call={"num_inference_steps": 50} | asked)
    done = [c or Candidate(spec=BASE, label=BASE, place=None, settings=first) for c in found]
    _check_one_base(done)
    labels = [candidate.label for candidate in done]
    return [c if labels.count(c.label) == 1 else replace(c, label=c.spec) for c in done]


def call_of(steps: float | None, guidance: float | None) -> dict[str, Any]:
    """The arguments of the pipeline's call that were given. Raises ConfigError for what is none."""
    if steps is not None and not whole(steps, 1, 1000):
        raise ConfigError(f"steps {steps}: must be a whole number from 1 to 1000")
    if guidance is not None and not (isinstance(guidance, int | float) and 0 <= guidance < math.inf):
        raise ConfigError(f"guidance {guidance}: must be 0 or more")
    given = {
        "num_inference_steps": None if steps is None else int(steps),
        "guidance_scale": None if guidance is None else float(guidance),
    }
    return {name: value for name, value in given.items() if value is not None}


def whole(value: Any, least: int, most: int) -> bool:
    """Whether it is a whole number within the range (inf, NaN, None and text are not)."""
    return isinstance(value, int | float) and least <= value <= most and value == int(value)


def _check_one_base(found: Sequence[Candidate]) -> None:
    for candidate in found[1:]:
        one, other = found[0].settings.model, candidate.settings.model
        if (one.pipeline, one.controlnet) != (other.pipeline, other.controlnet):
            raise ConfigError(
                f"{found[0].spec} is sampled by {_kind(one)} and {candidate.spec} by {_kind(other)}; candidates of one "
                "comparison share model.pipeline and model.controlnet"
            )
        if (one.id, one.revision, one.dtype) != (other.id, other.revision, other.dtype):
            raise ConfigError(
                f"{found[0].spec} is a {one.id} ({one.dtype}) and {candidate.spec} a {other.id} ({other.dtype}); "
                "candidates of one comparison share their base model (--model names another for all)"
            )
        for name in ("variant", "config", "quantize"):
            a, b = getattr(one, name), getattr(other, name)
            if a != b:
                cure = f" (--model {one.id} takes it unquantised for all)" if name == "quantize" else ""
                raise ConfigError(
                    f"{found[0].spec} has model.{name}: {a} and {candidate.spec} model.{name}: {b}; candidates of one "
                    f"comparison share their base model{cure}"
                )


def _kind(model: Model) -> str:
    return (model.pipeline or "the model's own pipeline") + (f" with {model.controlnet}" if model.controlnet else "")


def _own_weight(place: Path, settings: Settings) -> float:
    """How strongly the run says that it is to be used; an exported file holds that weight already."""
    exported = place.parent.parent.name == "export" and run_of(place.parent) != place.parent
    return 1.0 if settings.config is None or exported else settings.config.adapter.inference_weight


def _with_weight(label: str, weight: float) -> str:
    """`a:aig=2` -> `a@0.7:aig=2`."""
    if weight == 1:
        return label
    name, colon, mix = label.partition(":")
    return f"{name}@{weight:g}{colon}{mix}"


def _parse(spec: str) -> tuple[Path | None, float | None, Mix | None]:
    """(the weights, or None for the base model; weight, None where none is named; mix)."""
    if spec == BASE:
        return None, None, None
    if Path(spec).exists():
        return _place(Path(spec)), None, None
    match = re.fullmatch(r"(?P<path>.+?)(@(?P<weight>[^@:/]*))?(:(?P<options>[A-Za-z_]+=[^:/]*))?", spec)
    if match is None:
        raise ConfigError(f"candidate {spec!r}: legal is {SYNTAX}")
    weight, mix = _weight(match["weight"], spec), _mix(match["options"], spec)
    if match["path"] == BASE:
        raise ConfigError(f"candidate {spec!r}: the base model has no weight and nothing to be mixed with")
    return _place(Path(match["path"])), weight, mix


def _weight(text: str | None, spec: str) -> float | None:
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"candidate {spec!r}: the weight {text!r} is no finite number; write for example @0.7")
    return weight


def _mix(text: str | None, spec: str) -> Mix | None:
    from .mixing import Mix

    given: dict[str, Any] = {}
    for option in text.split(",") if text else ():
        name, _, value = option.partition("=")
        if name not in OPTIONS:
            raise ConfigError(
                f"candidate {spec!r}: no option {name!r}{nearest(name, OPTIONS)}; legal: {', '.join(OPTIONS)}"
            )
        try:
            given[name] = int(value) if name == "base_steps" else float(value)
        except ValueError:
            what = "a number of steps" if name == "base_steps" else "a number"
            raise ConfigError(f"candidate {spec!r}: {name}={value!r} is not {what}") from None
    try:
        return Mix(**given) if given else None
    except ConfigError as error:
        raise ConfigError(f"candidate {spec!r}: {error}") from error


def _place(path: Path) -> Path:
    file = path / LORA_FILE if path.is_dir() else path
    if file.is_file() and file.suffix == ".safetensors":
        return file
    if (path / DENOISER_FOLDER).is_dir():
        return path / DENOISER_FOLDER
    raise ConfigError(f"no LoRA at {file}; give {SYNTAX}: a run folder with {LORA_FILE}, or a .safetensors file")


def _label(spec: str, place: Path) -> str:
    """The spec with the last name of its path; a checkpoint keeps the name of its run."""
    run = place.parent if place.name in (LORA_FILE, DENOISER_FOLDER) else None
    name = place.stem if run is None else run.resolve().name
    if name == BASE or (run is not None and name.startswith("checkpoint-")):  # it may be called like the base model
        name = f"{(run or place).resolve().parent.name}/{name}"
    if Path(spec).exists():
        return name
    return name + "".join(re.findall(r"@[^@:/]*(?=:|$)|:[A-Za-z_]+=[^:/]*$", spec))


def asked(candidate: Candidate, prompts: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """`prompts` with their `inputs` (`prompts.with_inputs`). ConfigError where a picture that the run needs is missing.

    Texts (negative_prompt) may be left out: the pipeline has its own for them.
    """
    missing = [name for name in candidate.settings.columns if is_picture(name) and name not in inputs]
    if missing:
        words = " ".join(f"--input {name}=PICTURE" for name in missing)
        raise ConfigError(
            f"{candidate.label} samples from a picture beside each prompt ({', '.join(missing)}): add {words}"
        )
    return with_inputs(prompts, inputs)


# -- opening ---------------------------------------------------------------------------------------------------------


def load_base(found: Sequence[Candidate]) -> Any:
    """The pipeline of the candidates' base model, on its device."""
    from . import launch

    settings = found[0].settings
    memory = Memory() if settings.config is None else Memory(vae_dtype=settings.config.memory.vae_dtype)
    return launch.load_pipeline(settings.model.model_copy(update={"compile": False}), memory=memory)


@contextmanager
def opened(pipe: Any, candidate: Candidate, *, prompts: Sequence[str] = ("a picture",)) -> Iterator[Any]:
    """`pipe` as the candidate: its weights in, its scheduler, its mix. The base model again afterwards.

    pipe: as `load_base` gives it. prompts: those that will be sampled; a mix counts the steps of the first, which may
    need the picture that it brings along. Raises ConfigError where the weights do not fit.
    """
    from . import evaluate
    from .adapters import unload_lora
    from .engine import count_steps, find_denoiser, quiet
    from .mixing import mixed
    from .models import make_scheduler

    name = find_denoiser(pipe)
    with ExitStack() as stack:
        if candidate.settings.scheduler is not None:
            stack.callback(setattr, pipe, "scheduler", pipe.scheduler)
            pipe.scheduler = make_scheduler(candidate.settings.scheduler, pipe.scheduler)
        untuned = None
        if candidate.place is not None and candidate.place.is_dir():
            untuned = getattr(pipe, name)
            stack.callback(setattr, pipe, name, untuned)
            setattr(pipe, name, _whole(untuned, candidate))
        elif candidate.place is not None:
            stack.callback(unload_lora, pipe)
            _load_lora(pipe, candidate)
        if candidate.mix is not None:
            with quiet(pipe):
                steps = count_steps(pipe, **evaluate.for_prompts(prompts[:1], candidate.settings.call))
            stack.enter_context(mixed(pipe, candidate.mix, steps=steps, base=untuned))
        yield pipe


def _load_lora(pipe: Any, candidate: Candidate) -> None:
    """ConfigError when the file does not load, or loads no key (diffusers says nothing then)."""
    from .adapters import load_lora, weigh_lora

    file, base = candidate.place, candidate.settings.model.id
    assert file is not None
    try:
        load_lora(pipe, file.parent, weight_name=file.name, adapter_name=ADAPTER)
    except Exception as error:
        raise ConfigError(f"{file} does not load into {base}: {first_line(error)}") from error
    if not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
        raise ConfigError(f"{file} changes nothing in {base}: none of its keys fits; is it made for another model?")
    if candidate.weight != 1:
        weigh_lora(pipe, ADAPTER, candidate.weight)


def _whole(base: Any, candidate: Candidate) -> Any:
    """The saved denoiser; with a weight w its tensors are base + w (tuned - base)."""
    import torch

    try:
        tuned = type(base).from_pretrained(candidate.place).to(base.device, base.dtype)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{candidate.place} does not load as a {type(base).__name__}: {first}") from error
    if candidate.weight != 1:
        with torch.no_grad():
            for new, old in zip(tuned.parameters(), base.parameters(), strict=True):
                new.copy_(old + candidate.weight * (new - old))
    return tuned
