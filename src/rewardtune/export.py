"""`rewardtune export` and `push`: a run's LoRA as files that other programs read, each loaded back and compared.

The trained pipeline that every file is held against is the base with the adapter put in by peft, tensor by tensor and
without diffusers' loader, which says nothing about keys that it does not know.
Left out: LDM (`input_blocks`) names for kohya, text-encoder adapters, single-file checkpoints of merged models.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, evaluate, launch, modelcard
from .adapters import loads_lora, weigh_state
from .candidates import settings_of
from .config import Model, RunConfig
from .engine import count_steps, find_denoiser
from .engine.chain import few_steps
from .errors import ConfigError, RewardTuneError
from .prompts import load_prompts
from .quietly import no_loading_bars
from .runfolder import DENOISER_FOLDER, EXPORT, LORA_FILE, RECEIPT, cannot_write, write_text
from .spelling import nearest

FORMATS = {
    "diffusers": "the LoRA for diffusers; ComfyUI reads it too where the denoiser is a transformer (SD3, FLUX ...)",
    "kohya": "the LoRA under kohya's names, for ComfyUI and A1111; Stable Diffusion 1, 2 and XL only",
    "merged": "the whole pipeline with the LoRA in its weights, or with the weights of a full fine-tuning",
}
ADAPTER = "export"
METADATA = "lora_adapter_metadata"  # diffusers' key of the adapter's settings in the safetensors header
DROPPED = {"checkpoint": "ckpt", "optimizer": "optim", "scheduler": "sched"}  # diffusers ignores files named so


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, opened again.

    facts: run.json. call: sampling arguments of `pipe(...)`. checkpoint: "best", or the number of a checkpoint.
    """

    folder: Path
    file: Path
    model: Model
    scheduler: str | None
    prompts: tuple[str, ...]
    call: dict[str, Any]
    facts: dict[str, Any]
    config: RunConfig | None
    checkpoint: str = "best"
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def inference_weight(self) -> float:
        """How strongly the run file says that the LoRA is to be used."""
        return 1.0 if self.config is None else self.config.adapter.inference_weight


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One verified export. `difference`: of pixels in [0, 1] to the trained pipeline's, the largest (mean: in half
    precision); `effect`: the same between trained and base pictures; `path`: a file, or the folder of `merged`."""

    format: str
    path: Path
    difference: float
    effect: float
    measure: str
    tensors: int
    notes: tuple[str, ...] = ()
    what: str = "LoRA"

    def __str__(self) -> str:
        return (
            f"{self.format}: {self.path}, verified: {self.measure} difference {self.difference:.1e} "
            f"(the {self.what} itself: {self.effect:.1e}; {self.tensors} tensors compared)"
        )


def export_run(
    run: str | Path,
    formats: Sequence[str] = ("diffusers",),
    *,
    output: str | Path | None = None,
    weight: float | None = None,
    checkpoint: str | int = "best",
    model: str | None = None,
) -> list[Exported]:
    """Write the LoRA of the run folder in each of `formats` (keys of FORMATS) to `output`/FORMAT/; give what was made.

    output: default RUN/export. weight: multiplies the LoRA in every file; None: the run's adapter.inference_weight.
    checkpoint: "best" (the file in the run
    folder), "latest", or the number of a checkpoint. model: the base, where the run has no config.yaml.

    Raises ConfigError for what cannot be exported, before anything is written; RewardTuneError when a file loads
    back differently (it is kept under a name ending in .unverified) or cannot be written.
    """
    formats = _known(formats)
    if weight is not None and not weight > 0:
        raise ConfigError(f"weight {weight}: must be greater than 0; 1 is the LoRA as trained")
    opened = open_run(run, checkpoint=checkpoint, model=model)
    if weight is None:
        weight = opened.inference_weight
        opened = replace(opened, notes=(*opened.notes, *_own_weight_note(weight)))
    trained = _Trained(opened, weight=weight)
    for name in formats:  # all refusals first
        trained.refuse(name)
    folder = opened.folder / EXPORT if output is None else Path(output)
    for name in formats:
        _check_target(folder / name)
    trained.take_pictures()
    return [_export(trained, name, folder / name) for name in formats]


def _own_weight_note(weight: float) -> tuple[str, ...]:
    if weight == 1:
        return ()
    return (f"the LoRA is multiplied by {weight:g}, the run's adapter.inference_weight; --weight 1: as trained",)


def _known(formats: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(formats))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"unknown export format {name!r}{nearest(name, FORMATS)}; legal: {', '.join(FORMATS)}")
    if not names:
        raise ConfigError(f"no export format given; legal: {', '.join(FORMATS)}")
    return names


# The run --------------------------------------------------------------------------------------------------------------


def open_run(
    run: str | Path, *, checkpoint: str | int = "best", model: str | None = None, prompts: Sequence[str] | None = None
) -> Run:
    """What an export needs of a run folder: its `file` is the LoRA, or the denoiser's folder.

    prompts: the eval prompts, where they are known; None: those of run.json, or read again.

    ConfigError when the LoRA file or the name of the base model is missing.
    """
    folder = Path(run)
    file = _lora_file(folder, checkpoint)
    settings = settings_of(folder, model=model)
    texts, notes = _prompts(settings.config, settings.facts) if prompts is None else (tuple(prompts), ())
    return Run(
        folder=folder,
        file=file,
        model=settings.model,
        scheduler=settings.scheduler,
        prompts=texts,
        call=settings.call,
        facts=settings.facts,
        config=settings.config,
        checkpoint="best" if file.parent == folder else file.parent.name.removeprefix("checkpoint-"),
        notes=notes,
    )


def _lora_file(folder: Path, checkpoint: str | int) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"no run folder {folder}; give the output_dir of a run")
    if checkpoint == "best":
        file = folder / LORA_FILE
        if not file.is_file():
            whole = folder / DENOISER_FOLDER
            if whole.is_dir():
                return whole
            unverified = file.with_suffix(".unverified").is_file()
            why = f" (only {file.stem}.unverified, which failed its check)" if unverified else ""
            raise ConfigError(f"{folder} holds no {LORA_FILE}{why}; export works on a run that has saved its LoRA")
        return file
    found = {
        int(path.parent.name.removeprefix("checkpoint-")): path
        for path in folder.glob(f"checkpoint-*/{LORA_FILE}")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
    }
    number = int(checkpoint) if str(checkpoint).isdigit() else -1
    if checkpoint == "latest":
        number = max(found, default=-1)
    if number not in found:
        there = ", ".join(map(str, sorted(found))) or "none with a LoRA file"
        raise ConfigError(f"{folder} has no checkpoint {checkpoint!r}; legal: best, latest, or a number of: {there}")
    return found[number]


def _prompts(config: RunConfig | None, facts: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The run's eval prompts, and a note where nothing tells them any more.

    They are those of run.json, whatever became of their file; with pictures beside them they are read again
    (ConfigError where they cannot be: the pipeline needs its pictures).
    """
    columns = [] if config is None else config.looked_at.columns
    if not columns and (told := facts.get("eval_prompts")):
        return tuple(map(str, told)), ()
    if config is None:
        return (), ()
    try:
        source = config.looked_at
        found = load_prompts(source.source, template=source.template, columns=columns)
        return tuple(found[: config.eval.count]), ()
    except ConfigError as error:
        if columns:
            raise
        return (), (f"compared on a stand-in prompt, because the run's cannot be read: {error}",)


# What was trained -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Reference:
    base: Tensor
    trained: Tensor
    noise: float  # between two runs of the same pipeline: 0 unless the machine does not repeat


class _Trained:
    """The trained pipeline: adapter tensors (alpha and weight in lora_B), and its pictures to compare with.

    whole: a full fine-tuning, whose `state` is the denoiser's own.
    """

    def __init__(self, run: Run, *, weight: float):
        self.run, self.weight = run, weight
        pipe = self.base()
        self.component = find_denoiser(pipe)
        self.whole = run.file.is_dir()
        if self.whole and weight != 1:
            raise ConfigError(f"{run.folder} is a full fine-tuning, which has no LoRA to weaken: leave --weight out")
        if self.whole:
            self.state = read_denoiser(run.file)
        else:
            self.state = weigh_state(getattr(pipe, self.component), read_lora(run.file, self.component), weight)
        self.dora = any("lora_magnitude_vector" in key for key in self.state)
        self.pipe: Any = pipe
        self.pictures: _Reference | None = None

    def base(self) -> Any:
        return launch.load_pipeline(self.run.model.model_copy(update={"compile": False}), scheduler=self.run.scheduler)

    def refuse(self, form: str) -> None:
        """ConfigError for a pair of format and model that cannot work, naming the format that does."""
        denoiser = getattr(self.pipe, self.component)
        kind = type(self.pipe).__name__
        if form != "merged" and self.whole:
            raise ConfigError(
                f"{self.run.folder} is a full fine-tuning, which has no LoRA to export: use --format merged (its "
                f"denoiser in {self.run.file} is a diffusers folder as it is)"
            )
        if form == "kohya" and self.component != "unet":
            raise ConfigError(
                f"kohya names are for UNets, and {kind} has a {self.component}: use --format diffusers, "
                "whose keys ComfyUI reads for such models"
            )
        if form == "kohya" and self.dora:
            raise ConfigError(
                "this adapter is a DoRA, and DoRA under kohya's names is broken in diffusers "
                "(its magnitudes are dropped without a word): use --format diffusers, or merged"
            )
        if form == "merged" and getattr(denoiser, "hf_quantizer", None) is not None:
            raise ConfigError(
                "a quantised base cannot take the LoRA into its weights: export diffusers, or merge into the "
                "unquantised model with --model"
            )
        if form != "merged" and not loads_lora(self.pipe):
            raise ConfigError(
                f"{kind} has no load_lora_weights of its own in diffusers: use --format merged, or load the run's own "
                f"file by rewardtune.adapters.load_lora(pipe, {str(self.run.folder)!r})"
            )

    def take_pictures(self) -> None:
        """Base and trained pictures of the first prompts, a few steps; the pipeline is given up afterwards."""
        before = self.sample(self.pipe)
        denoiser = getattr(self.pipe, self.component)
        put_weights(denoiser, self.state) if self.whole else attach(denoiser, self.state)
        after = self.sample(self.pipe)
        again = self.sample(self.pipe)
        self.pictures = _Reference(base=before, trained=after, noise=float((after - again).abs().max()))
        self.pipe = None

    def sample(self, pipe: Any) -> Tensor:
        prompts = list(self.run.prompts[:2]) or ["a red heart"]
        T = count_steps(pipe, **evaluate.for_prompts(prompts[:1], self.run.call))
        call = few_steps(self.run.call, T=T, steps=4)
        return evaluate.sample(pipe, prompts, seeds=range(len(prompts)), call=call)

    def compare(self, pipe: Any, what: str) -> tuple[float, float, str]:
        """Difference and effect of the loaded pipeline's pictures. RewardTuneError when they are not the trained ones.

        Allowed: 1e-4 at the worst pixel in float32; in half precision, where single pixels round far apart, a mean of
        1e-2; and in any case nearer to the trained pictures than these are to the base's.
        """
        assert self.pictures is not None
        exact = getattr(pipe, self.component).dtype == torch.float32
        loaded, gaps = self.sample(pipe), []
        for pictures in (loaded, self.pictures.base):
            gap = (pictures - self.pictures.trained).abs()
            gaps.append(float(gap.max() if exact else gap.mean()))
        difference, effect = gaps
        allowed = (1e-4 if exact else 1e-2) + 10 * self.pictures.noise
        if effect > 1e-5 + 10 * self.pictures.noise:
            allowed = min(allowed, effect / 2)
        if not difference <= allowed:
            raise RewardTuneError(
                f"{what} gives other pictures than the trained pipeline when it is loaded "
                f"(difference {difference:.1e}, allowed {allowed:.1e})"
            )
        return difference, effect, "max" if exact else "mean"


def read_lora(file: Path, component: str) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names, with alpha / rank multiplied into lora_B.

    component: the denoiser's name in the pipeline, which every key of the file must start with (ConfigError).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    prefix = f"{component}."
    foreign = [key for key in state if not key.startswith(prefix) or ".lora_" not in key]
    if foreign or not state:
        what = f"keys that belong to no LoRA of the {component}, first: {foreign[0]}" if foreign else "no tensor"
        raise ConfigError(f"{file} holds {what}; is it made for another model?")
    if any(settings.get(f"{prefix}{key}") for key in ("alpha_pattern", "rank_pattern", "use_rslora")):
        raise ConfigError(f"{file} has a scale of its own for some layers, or rsLoRA; save it by rewardtune first")
    scale = settings.get(f"{prefix}lora_alpha", 1) / settings.get(f"{prefix}r", 1)
    return {
        key.removeprefix(prefix): value * scale if ".lora_B." in key else value for key, value in sorted(state.items())
    }


def read_denoiser(folder: Path) -> dict[str, Tensor]:
    """The weights of a full fine-tuning. ConfigError when they cannot be read."""
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error


def put_weights(denoiser: Any, state: Mapping[str, Tensor]) -> None:
    """Replace all weights. ConfigError when names or shapes are not the denoiser's."""
    try:
        denoiser.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ConfigError(f"the weights do not fit this denoiser: {' '.join(str(error).split())[:200]}") from error


def attach(denoiser: Any, state: Mapping[str, Tensor], *, name: str = ADAPTER) -> None:
    """Put the adapter into `denoiser` by peft alone, in float32. ConfigError when one tensor finds no place."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    ranks = _ranks(state)
    legal = {key for key, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if unknown := sorted(ranks.keys() - legal):
        raise ConfigError(
            f"the LoRA does not fit this {type(denoiser).__name__}: {len(unknown)} of its {len(ranks)} layers are not "
            f"there, first: {unknown[0]}"
        )
    most = max(ranks.values())
    others = {key: rank for key, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=f"({'|'.join(map(re.escape, ranks))})",
        rank_pattern=others,
        alpha_pattern=others,
        use_dora=any("lora_magnitude_vector" in key for key in state),
    )
    try:
        with _silent():
            denoiser.add_adapter(config, adapter_name=name)
            for key, parameter in denoiser.named_parameters():
                if f".{name}" in key and ".lora_" in key:
                    parameter.data = parameter.data.float()
            set_peft_model_state_dict(denoiser, dict(state), adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the LoRA does not fit this denoiser: {' '.join(str(error).split())[:200]}") from error
    if wrong := differing(denoiser, state, name=name):
        raise ConfigError(f"the LoRA does not fit this denoiser: {len(wrong)} tensors find no place, first {wrong[0]}")


def _ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    return {key.partition(".lora_A.")[0]: len(value) for key, value in state.items() if ".lora_A." in key}


def differing(denoiser: Any, state: Mapping[str, Tensor], *, name: str = ADAPTER) -> list[str]:
    """Keys that the loaded adapter lacks, has beyond `state`, or holds other values under.

    Compared in the adapter's dtype. A scale other than 1 counts as a difference of every key.
    """
    from peft.utils import get_peft_model_state_dict

    if name not in getattr(denoiser, "peft_config", {}):
        return sorted(state)
    loaded = get_peft_model_state_dict(denoiser, adapter_name=name)
    scales = {module.scaling[name] for module in denoiser.modules() if name in getattr(module, "scaling", {})}
    if scales != {1.0}:
        return sorted(state)
    return sorted(key for key in state.keys() | loaded.keys() if not _same(state.get(key), loaded.get(key)))


def _same(expected: Tensor | None, loaded: Tensor | None) -> bool:
    if expected is None or loaded is None or loaded.is_meta or expected.shape != loaded.shape:
        return False  # meta: diffusers made the layer, but the file held no weight for it
    return torch.equal(expected.to(loaded.dtype), loaded.detach().cpu())


# Writing --------------------------------------------------------------------------------------------------------------


def _export(trained: _Trained, form: str, target: Path) -> Exported:
    """Write beside `target`, load back, compare, and only then give it its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{form}.", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with _writing(target):
            if form == "merged":
                write = write_whole if trained.whole else write_merged
                made = write(trained.base(), trained.component, trained.state, staging)
            else:
                made = _write_lora(trained, form, staging)
        try:
            result = _verify(trained, form, staging, made)
        except RewardTuneError as error:
            kept = _keep_unverified(staging, target)
            raise RewardTuneError(f"{error}. It is kept as {kept}: do not use it, and please report this") from error
        with _writing(target):
            receipt = {
                "format": form,
                "weight": trained.weight,
                "checkpoint": trained.run.checkpoint,
                "max_difference" if result.measure == "max" else "mean_difference": result.difference,
                "rewardtune": __version__,
            }
            write_text(staging / RECEIPT, json.dumps(receipt, indent=2) + "\n")
            staging.chmod(0o777 & ~_umask())
            _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    place = target / made.relative_to(staging)
    return replace(result, path=place, notes=trained.run.notes + result.notes)


def _write_lora(trained: _Trained, form: str, folder: Path) -> Path:
    state, pipe = trained.state, trained.base()
    name = LORA_FILE if form == "diffusers" else f"{file_stem(trained.run.name)}.safetensors"
    header = modelcard.header(trained.run, pipe, ranks=_ranks(state), weight=trained.weight)
    if form == "kohya":
        path = folder / name
        save_tensors(to_kohya(state), path, {"format": "pt"} | header)
    else:
        path = write_diffusers(pipe, trained.component, state, folder, header=header)
    return path


def write_diffusers(
    pipe: Any, component: str, state: Mapping[str, Tensor], folder: Path, *, header: Mapping[str, str] | None = None
) -> Path:
    """`folder`/pytorch_lora_weights.safetensors by the pipeline's own writer, its header joined by `header`."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    given: dict[str, Any] = {f"{component}_lora_layers": dict(state)}
    legal = inspect.signature(pipe.save_lora_weights).parameters
    if f"{component}_lora_adapter_metadata" in legal:
        given[f"{component}_lora_adapter_metadata"] = _adapter_metadata(state)
    pipe.save_lora_weights(save_directory=folder, weight_name=LORA_FILE, **given)
    path = folder / LORA_FILE
    with safe_open(path, framework="pt") as opened:
        written = opened.metadata() or {}
    save_tensors(load_file(path), path, written | dict(header or {}))
    return path


def _adapter_metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The few settings of peft's LoraConfig that every version knows; diffusers builds its own config from them."""
    ranks = _ranks(state)
    most = max(ranks.values())
    others = {key: rank for key, rank in ranks.items() if rank != most}
    return {
        "r": most,
        "lora_alpha": most,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": any("lora_magnitude_vector" in key for key in state),
    }


def to_kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's names for a UNet's LoRA (`lora_unet_down_blocks_0_...`), with alpha = rank in every layer.

    The layer names are diffusers', as in kohya's own files for SD 1; ComfyUI knows them for SD XL as well. One pair of
    layers has kohya's XL names (`label_emb_0_0`): diffusers reads them back under no other.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    named = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    renamed = {}
    for key, value in named.items():
        key = key.replace("add_embedding_linear_1", "label_emb_0_0").replace("add_embedding_linear_2", "label_emb_0_2")
        renamed[key] = value.float() if key.endswith(".alpha") else value
    return renamed


def write_merged(pipe: Any, component: str, state: Mapping[str, Tensor], folder: Path) -> Path:
    """`pipe` with the LoRA in its weights, by `save_pretrained` in its own dtype. It is used up: give a fresh one."""
    denoiser = getattr(pipe, component)
    attach(denoiser, state)
    try:
        denoiser.fuse_lora(safe_fusing=True)
    except ValueError as error:  # peft's word for a NaN
        raise RewardTuneError(f"merging gives weights that are not finite: {error}") from error
    denoiser.unload_lora()
    with no_loading_bars():
        pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def write_whole(pipe: Any, component: str, state: Mapping[str, Tensor], folder: Path) -> Path:
    """`pipe` with other weights in its denoiser, by `save_pretrained` in its own dtype."""
    put_weights(getattr(pipe, component), state)
    with no_loading_bars():
        pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def save_tensors(state: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """A safetensors file with this header, and in it the hashes of the tensors' bytes that model managers look for."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata=dict(header))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    hashes = {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}
    save_file(tensors, path, metadata=dict(header) | hashes)


def file_stem(name: str) -> str:
    """A file name that every loader takes: diffusers skips files whose name holds checkpoint, optimizer, scheduler."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "lora"
    for word, short in DROPPED.items():
        stem = re.sub(word, short, stem, flags=re.IGNORECASE)
    return stem


# Verifying ------------------------------------------------------------------------------------------------------------


def _verify(trained: _Trained, form: str, folder: Path, made: Path) -> Exported:
    notes: tuple[str, ...] = ()
    if form == "merged":
        saved = Model(id=str(folder), dtype=trained.run.model.dtype, device=trained.run.model.device)
        pipe = launch.load_pipeline(saved)
        merged = getattr(pipe, trained.component)
        if trained.whole:
            loaded = merged.state_dict()
            both = sorted(loaded.keys() | trained.state.keys())
            wrong = [key for key in both if not _same(trained.state.get(key), loaded.get(key))]
            if wrong:
                raise RewardTuneError(f"{len(wrong)} of the saved weights are not the trained ones, first: {wrong[0]}")
            lost = 0.0
        else:
            lost = check_merged(getattr(trained.base(), trained.component), merged, trained.state)
        if lost > 0.1:
            dtype = str(getattr(pipe, trained.component).dtype).removeprefix("torch.")
            notes += (f"{dtype} rounds away {lost:.0%} of the LoRA (by norm): the diffusers format keeps all of it",)
        tensors = len(getattr(pipe, trained.component).state_dict())
    else:
        pipe = trained.base()
        load_back(pipe, trained.component, made, trained.state)
        tensors = len(trained.state)
    what = "fine-tuning" if trained.whole else "LoRA"
    difference, effect, measure = trained.compare(pipe, f"the {form} export")
    if effect == 0:
        notes += (f"the {what} changes nothing in the compared pictures: is it trained?",)
    return Exported(
        format=form,
        path=made,
        difference=difference,
        effect=effect,
        measure=measure,
        tensors=tensors,
        notes=notes,
        what=what,
    )


def load_back(pipe: Any, component: str, file: Path, state: Mapping[str, Tensor]) -> None:
    """`pipe.load_lora_weights(file)`; RewardTuneError unless exactly the tensors of `state` are in place afterwards."""
    try:
        with _silent():
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    except Exception as error:
        raise RewardTuneError(f"{file.name} does not load: {(str(error).splitlines() or [repr(error)])[0]}") from error
    wrong = differing(getattr(pipe, component), state)
    if wrong:
        raise RewardTuneError(
            f"{file.name} loads {'no tensor' if len(wrong) >= len(state) else 'only a part'} of the LoRA: "
            f"{len(wrong)} of {len(state)} tensors differ from the trained ones, first: {wrong[0]}"
        )


@torch.no_grad()
def check_merged(base: nn.Module, merged: nn.Module, state: Mapping[str, Tensor]) -> float:
    """W + B A in every adapted layer (of a DoRA m (W + B A) / ||W + B A|| by outputs), the base elsewhere:
    RewardTuneError where not. Gives the share of the change (by norm, 0 to 1) that the dtype rounded away."""
    before, after = base.state_dict(), merged.state_dict()
    adapted = {f"{layer}.weight" for layer in _ranks(state)}
    wrong = [key for key in before.keys() | after.keys() if key not in before or key not in after]
    wrong += [key for key in before.keys() & after.keys() if key not in adapted and not _same(before[key], after[key])]
    magnitudes = {
        key.partition(".lora_magnitude_vector")[0]: value for key, value in state.items() if "magnitude" in key
    }
    lost = total = 0.0
    for key in () if wrong else sorted(adapted):
        layer = key.removesuffix(".weight")
        old, new = before[key].cpu().double(), after[key].cpu().double()
        down, up = state[f"{layer}.lora_A.weight"].double(), state[f"{layer}.lora_B.weight"].double()
        change = (up.flatten(1) @ down.flatten(1)).reshape(old.shape)
        if layer in magnitudes:
            tuned = (old + change).flatten(1)
            length = magnitudes[layer].double().reshape(-1, 1)
            change = (length * tuned / tuned.norm(dim=1, keepdim=True)).reshape(old.shape) - old
        error = new - (old + change)
        if error.abs().max() > 4 * torch.finfo(after[key].dtype).eps * (old.abs() + change.abs()).max():
            wrong.append(key)
        lost, total = lost + float(error.square().sum()), total + float(change.square().sum())
    if wrong:
        raise RewardTuneError(f"{len(wrong)} merged weights are not the base plus the LoRA, first: {min(wrong)}")
    return (lost / total) ** 0.5 if total else 0.0


# Files ----------------------------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """A folder that holds something and was not written here is not touched."""
    if target.exists() and not (target / RECEIPT).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is no earlier export; choose another --output")


def _replace(staging: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=".old.", dir=target.parent))
    try:
        if target.exists():
            os.replace(target, aside / target.name)
        os.replace(staging, target)
    except OSError:
        if (aside / target.name).exists() and not target.exists():
            os.replace(aside / target.name, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _keep_unverified(staging: Path, target: Path) -> Path:
    """Under names that no loader takes; gives the folder."""
    kept = target.with_name(target.name + ".unverified")
    for path in list(staging.rglob("*.safetensors")):  # of merged, in the folders of its parts too
        path.rename(path.with_suffix(".unverified"))
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(staging, kept)
    return kept


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Loaders warn of text encoders without keys and of much else; here every key is compared afterwards."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)


# Push -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """`url`: of the repository, none after a dry run; `folder`: what was (or would be) uploaded."""

    folder: Path
    url: str | None
    exported: list[Exported] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def push_run(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    formats: Sequence[str] = ("diffusers",),
    weight: float | None = None,
    checkpoint: str | int = "best",
    model: str | None = None,
    dry_run: bool = False,
    api: Any = None,
) -> Pushed:
    """Export, write the model card, and upload RUN/export/hub/ to the hub's `repo` ("user/name").

    formats: diffusers, and kohya if asked. dry_run: write the folder only; needs no token and no network.
    api: a huggingface_hub.HfApi (default: one with the token of HF_TOKEN or `hf auth login`). Never asks for a login.

    Raises ConfigError for a bad name, without a token, or when --private meets a public repository;
    RewardTuneError when the upload fails (the folder stays).
    """
    formats = _known(["diffusers", *formats])
    if "merged" in formats:
        raise ConfigError("push uploads LoRA files (diffusers, kohya); export merged and upload it by `hf upload`")
    _check_repo(repo)
    if api is None and not dry_run:
        api = _api()
    opened = open_run(run, checkpoint=checkpoint, model=model)
    made = export_run(run, formats, weight=weight, checkpoint=checkpoint, model=model)
    weight = opened.inference_weight if weight is None else weight
    folder = opened.folder / EXPORT / "hub"
    licence = modelcard.base_licence(opened.model.id, api=api)
    with _writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for export in made:
            place = folder / export.path.name if export.format == "diffusers" else folder / "kohya" / export.path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(export.path, place)
    options: dict[str, Any] = {"licence": licence, "licence_later": api is None, "weight": weight}
    notes = modelcard.write_card(opened, folder, repo=repo, exported=made, **options)
    notes = tuple(dict.fromkeys([*(note for export in made for note in export.notes), *notes]))
    url = None if dry_run else _upload(api, folder, repo, private=private, stale=_stale(opened, folder))
    return Pushed(folder=folder, url=url, exported=made, notes=notes)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo {repo!r}: {error}; write user/name") from error
    if repo.count("/") != 1:
        raise ConfigError(f"--repo {repo!r}: write user/name, for example ann/symmetry-lora")


def _api() -> Any:
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise ConfigError(
            "no Hugging Face token: make one with write access at https://huggingface.co/settings/tokens, then "
            "`export HF_TOKEN=hf_...` or `hf auth login`; --dry-run writes the folder without one"
        )
    return HfApi(token=token, library_name="rewardtune", library_version=__version__)


def _stale(run: Run, folder: Path) -> list[str]:
    """What an earlier push of this run may have left in the repository and this one has not, by its exact names."""
    pictures = [f"images/{index:03d}.png" for index in range(modelcard.PICTURES)]
    ours = [f"kohya/{file_stem(run.name)}.safetensors", "before_after.png", *pictures]
    return [name for name in ours if not (folder / name).exists()]


def _upload(api: Any, folder: Path, repo: str, *, private: bool, stale: Sequence[str]) -> str:
    """stale: files that are removed from the repository in the same commit."""
    try:
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"{repo} exists and is public: make it private in its settings, or push without --private"
            )
        api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=str(folder),
            commit_message="LoRA and card from rewardtune",
            delete_patterns=list(stale),
        )
    except RewardTuneError:
        raise
    except Exception as error:  # huggingface_hub raises errors of three libraries
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardTuneError(
            f"upload to {repo} failed: {first}. What was to be uploaded is in {folder}: push again, or "
            f"`hf upload {repo} {folder}`"
        ) from error
    return str(url)
