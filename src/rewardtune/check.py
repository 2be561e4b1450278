"""`rewardtune check`: all that a run needs is opened, resolved and tried, and nothing is written.

Checks that do not depend on each other are all made: one that fails is one line, and the others go on with a
stand-in where they can. In the order of cost: the files and names, the rewards, the pipeline, pictures and gradients.
Left out: several processes, and what only time shows (a reward that is hacked, a learning rate that is too high).
"""

import os
import random
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from . import adapters, dryrun, evaluate, guards, launch, models
from .config import Checkpoints, Guards, Log, Part, PromptSource, RunConfig, named_parts
from .diversity import Features
from .engine import count_steps, find_denoiser, preflight, quiet
from .engine.call import check_reference
from .engine.chain import few_steps
from .engine.preflight import asked_of
from .errors import ConfigError, PreflightError, RewardError, RewardTuneError, first_line
from .methods import Method
from .optimizers import make_optimizer
from .prompts import BESIDE, batch_prompts, load_prompts
from .regularize import Denoising, read_captions
from .rewards.base import Reward, leaves, unique_names
from .rewards.catalogue import CATALOGUE, OPENAI
from .rewards.check import check_reward
from .rewards.weights import cache_folder
from .runfolder import RunFolder
from .trackers import check_installed

if TYPE_CHECKING:
    from .trainer import RewardTuner

T = TypeVar("T")
Level = Literal["ok", "warning", "error"]
HALF = (
    "float16 on a CPU is slow, and not every operation exists there; for this machine set model.dtype: float32 (or "
    "bfloat16), for a GPU model.device: cuda"
)
SECONDS = 10  # most time that the hub gets for an answer


class Unchecked(Exception):  # noqa: N818 - it is no error
    """What could not be checked, which is a warning."""


class Unreachable(Unchecked):
    """What the run needs and no network answered for."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    level: Level
    what: str
    words: str
    exit_code: int = 0
    unreachable: bool = False  # the run cannot start before it can be reached

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what}: {'; '.join(self.words.splitlines())}"


@dataclass
class Findings:
    """Collects the lines, and says each as soon as it is found."""

    say: Callable[[str], None]
    found: list[Finding] = field(default_factory=list)

    def add(self, level: Level, what: str, words: str, exit_code: int = 0, *, unreachable: bool = False) -> None:
        self.found.append(Finding(level, what, words, exit_code, unreachable))
        self.say(str(self.found[-1]))

    def attempt(self, what: str, work: Callable[[], tuple[T, str]], *, phase: str = "", config: Any = None) -> T | None:
        """work() gives a value and the words of its line; None where it does not. phase, config: for memory advice."""
        try:
            value, words = work()
        except Unchecked as unchecked:
            self.add("warning", what, str(unchecked), unreachable=isinstance(unchecked, Unreachable))
            return None
        except Exception as error:
            if dryrun.out_of_memory(error):
                advice = dryrun.advice(phase, config) if config is not None else []
                self.add("error", what, "\n".join(["out of memory", *(line.strip() for line in advice)]), 3)
            elif isinstance(error, RewardTuneError):
                self.add("error", what, str(error), 2 if error.exit_code == 2 else 3)
            else:
                raise
            return None
        self.add("ok", what, words)
        return value

    @property
    def exit_code(self) -> int:
        """2 where a setting is wrong, else 3 where the pipeline, a reward or the memory does not do, else 0."""
        codes = {finding.exit_code for finding in self.found} - {0}
        return min(codes, default=0)

    def summary(self) -> str:
        errors, warnings = (sum(finding.level == level for finding in self.found) for level in ("error", "warning"))
        if not errors + warnings:
            return "all checks passed"
        counts = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
        missing = ", ".join(dict.fromkeys(finding.what for finding in self.found if finding.unreachable))
        start = f": the run can start once these are reachable: {missing}" if missing else ": the run can start"
        return ", ".join(counts) + ("" if errors else start)


def check(config: RunConfig, *, dry_run: bool = False, say: Callable[[str], None] = print) -> int:
    """Try everything that the run will need; one line for each check through `say`. Gives the exit code: 0, 2 or 3.

    dry_run: then make one update in memory and say what the run will cost (see dryrun.py).
    Writes nothing but what the hub client keeps of its downloads.
    """
    findings = Findings(say)
    attempt = findings.attempt
    attempt("output_dir", lambda: _output(Path(config.output_dir)))
    if config.log.trackers:
        attempt("log.trackers", lambda: _trackers(config))
    prompts = attempt("prompts", lambda: _prompts(config.prompts))
    held = config.eval.prompts
    eval_prompts = prompts if held is None else attempt("eval.prompts", lambda: _prompts(held))
    method = attempt("method", lambda: _named(launch.make_method(config.method)))
    scheduler = config.sampling.scheduler
    if scheduler is not None and not attempt("sampling.scheduler", lambda: _scheduler(str(scheduler))):
        scheduler = None
    device = attempt("model.device", lambda: _device(config))
    if device is not None:
        attempt("optim.optimizer", lambda: _optimizer(config, device))
        if device.type == "cpu" and config.model.dtype == "float16":
            findings.add("warning", "model.dtype", HALF)
    folder = str(config.regularize.denoise.images or BESIDE)  # pictures of the prompt file are opened with it
    images = folder.startswith(BESIDE) or attempt("regularize.denoise.images", lambda: _images(config))
    trained, held_out, features = _rewards(config, findings)
    pipe = None
    if attempt("model", lambda: _model(config)) and device is not None:
        load = lambda: _load(config, scheduler)  # noqa: E731
        pipe = attempt("pipeline", load, phase=dryrun.SAMPLING, config=config)
    run = None
    if pipe is not None and prompts is None and config.prompts.columns:
        findings.add("warning", "sampling", "not tried: the pipeline's pictures come with the prompts")
    elif pipe is not None:
        known = _Known(prompts, eval_prompts, method, trained, held_out, features, bool(images))
        run = _pipeline(config, pipe, known, findings)
    if pipe is None or (prompts is None and config.prompts.columns):
        _without_pictures(config, trained, held_out, prompts, findings)
    if dry_run and not findings.exit_code and run is not None:
        _dry_run(run, config, findings)
    elif dry_run:
        findings.add("warning", "dry run", "not made, because of what stands above")
    say(findings.summary())
    return findings.exit_code


# -- files and names -------------------------------------------------------------------------------------------------


def _output(path: Path) -> tuple[bool, str]:
    if (path / "run.json").is_file():
        raise Unchecked(f"{path} holds a run already: train needs --resume latest, or --overwrite to replace it")
    RunFolder(path)
    return True, f"{path} is free"


def _prompts(source: PromptSource) -> tuple[list[str], str]:
    try:
        found = load_prompts(source.source, template=source.template, columns=source.columns)
    except ConfigError as error:
        if _unreachable(error) and not _offline():
            raise Unreachable(f"{error}") from error
        raise
    different = len(set(found))
    words = f"{len(found)} prompts" + (f", {different} different" if different < len(found) else "")
    return found, words + (f", each with its {', '.join(source.columns)}" if source.columns else "")


def _named(thing: Any) -> tuple[Any, str]:
    return thing, str(thing)


def _scheduler(name: str) -> tuple[Any, str]:
    return models.make_scheduler(name, SimpleNamespace(config={})), name


def _trackers(config: RunConfig) -> tuple[bool, str]:
    check_installed(config.log.trackers)
    return True, ", ".join(config.log.trackers)


def _device(config: RunConfig) -> tuple[torch.device, str]:
    device = models._device(config.model.device)
    models.check_device(config.model.device, lambda: torch.zeros(1, device=device))
    return device, str(device)


def _optimizer(config: RunConfig, device: torch.device) -> tuple[Any, str]:
    """With one parameter, which finds a missing extra and a device that does not do."""
    optim = config.optim
    one = [nn.Parameter(torch.zeros(1, device=device))]
    made = make_optimizer(optim.optimizer, one, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    return made, f"{optim.optimizer}, lr={optim.lr:g}"


def _images(config: RunConfig) -> tuple[Any, str]:
    from PIL import Image

    denoise = config.regularize.denoise
    pairs = read_captions(str(denoise.images))[: denoise.count]
    broken = []
    for path, _ in pairs:
        try:
            with Image.open(path) as opened:
                opened.verify()
        except Exception as error:  # Pillow's formats have no common base
            broken.append(f"{path.name} ({type(error).__name__})")
    if broken:
        raise ConfigError(f"{len(broken)} of {len(pairs)} pictures cannot be opened: {', '.join(broken[:5])}")
    return pairs, f"{len(pairs)} pictures with captions"


# -- the hub ---------------------------------------------------------------------------------------------------------


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _unreachable(error: BaseException | None) -> bool:
    """Whether the network, and not what was asked, is the reason, also behind an error that tells of it."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"TransportError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError"}:
            return not isinstance(error, urllib.error.HTTPError)
        error = error.__cause__ or error.__context__
    return False


def _resolve(repo: str, *, revision: str | None, files: Sequence[str], variant: str | None = None) -> str:
    """Words on a hub repository: in the cache, or on the hub with these files.

    Raises ConfigError where it is not, or where it is not in the cache and HF_HUB_OFFLINE is set; Unchecked without
    network.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    at = f"{repo}@{revision}" if revision not in (None, "main") else repo
    try:
        if files and all(isinstance(try_to_load_from_cache(repo, file, revision=revision), str) for file in files):
            return f"{at} is in the cache"
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is neither a folder nor a hub id: {error}") from error
    by_hand = f"hf download {repo}" + ("" if revision in (None, "main") else f" --revision {revision}")
    if _offline():
        raise ConfigError(
            f"{at} is not in the cache and HF_HUB_OFFLINE is set; on a machine with network: {by_hand}, or unset it"
        )
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=SECONDS)
    except GatedRepoError as error:
        raise ConfigError(
            f"{at} is gated: accept its licence at https://huggingface.co/{repo}, then hf auth login"
        ) from error
    except HfHubHTTPError as error:
        first = first_line(error)
        raise ConfigError(
            f"{at} is not on the hub, or not for you ({first}); check the spelling, or hf auth login"
        ) from error
    except Exception as error:  # the client's own network errors changed their family between versions
        if not _unreachable(error):
            raise
        raise Unreachable(
            f"{at} could not be checked: the hub cannot be reached ({error}) and it is not in the cache; {by_hand} "
            "on a machine with network"
        ) from error
    there = {sibling.rfilename for sibling in info.siblings or []}
    missing = [file for file in files if file not in there]
    if missing:
        raise ConfigError(f"{at} is on the hub, but holds no {', '.join(missing)}; is it another kind of model?")
    if variant is not None and not any(f".{variant}." in file for file in there):
        raise ConfigError(f"{at} has no files of the variant {variant!r}; leave model.variant out")
    return f"{at} is on the hub"


def _resolve_url(url: str) -> str:
    file = cache_folder() / url.rsplit("/", 1)[-1]
    if file.is_file():
        return f"{file.name} is in the cache"
    if _offline():
        raise ConfigError(f"{url} is not in the cache and HF_HUB_OFFLINE is set; download it to {file}")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS):
            return f"{file.name} can be downloaded"
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} cannot be had ({error})") from error
    except OSError as error:
        raise Unreachable(f"{url} could not be checked: it cannot be reached ({error})") from error


def _model(config: RunConfig) -> tuple[bool, str]:
    model = config.model
    models._refuse_misfits(
        model.id, revision=model.revision, variant=model.variant, config=model.config, quantize=model.quantize
    )
    if model.quantize is not None:
        models._refuse_quantize(model.quantize, models._device(model.device).type)
    for name, file in ((model.config, "model_index.json"), (model.controlnet, "config.json")):
        if name is not None and not Path(name).exists():
            _resolve(name, revision=None, files=[file])
    if model.id == "playground" or Path(model.id).exists():
        return True, f"{model.id} is on this machine"
    return True, _resolve(model.id, revision=model.revision, files=["model_index.json"], variant=model.variant)


# -- rewards ---------------------------------------------------------------------------------------------------------


def _rewards(config: RunConfig, findings: Findings) -> tuple[Reward | None, Reward | None, Features | None]:
    """The trained reward, the held-out one and the features, each loaded; None where that failed, or there is none."""
    made: list[Reward | None] = []
    for key, parts, weight in (
        ("reward", config.reward, config.reward_weight),
        ("guards.rewards", config.guards.rewards, 1.0),
    ):
        loaded: dict[str, Reward] = {}
        whole = bool(parts)
        seen: list[Any] = []
        for part in named_parts(parts):
            if (part.name, part.options) not in seen:
                seen.append((part.name, part.options))
                one = findings.attempt(f"{key} {part.name}", partial(_reward, part, loaded))
                whole &= one is not None
        total = findings.attempt(key, partial(_total, parts, loaded, weight)) if whole else None
        made.append(total)
    if config.guards.rewards:
        findings.attempt("guards.rewards", lambda: _held_out(config))
    model = config.guards.features
    features = findings.attempt("guards.features", lambda: _features(str(model))) if model is not None else None
    return made[0], made[1], features


def _reward(part: Part, loaded: dict[str, Reward]) -> tuple[Reward, str]:
    name, words = str(part.name), []
    entry = CATALOGUE.get(name.lower())
    for source in entry.weights if entry is not None else ():
        given = part.options.get(source.setting)
        revision = part.options.get("revision") if source.setting == "model" else None
        if given == "playground" or (given is None and "model" in part.options):
            continue  # comes with the model
        if given is not None and (not isinstance(given, str) or os.path.exists(given) or given[:1] in "./~"):
            continue  # loading it says what is wrong
        repo = given or source.repo
        if "://" in repo:
            words += [_resolve_url(source.url(file)) for file in source.files]
        else:
            files = source.files if given is None and "version" not in part.options else ("config.json",)
            words.append(_resolve(repo, revision=revision or (None if given else source.revision), files=files))
    return launch._named(name, part.options, loaded), ", ".join(["loaded", *words])


def _total(parts: list[Part], loaded: dict[str, Reward], weight: float) -> tuple[Reward, str]:
    total = launch._total(parts, loaded)
    total = total if weight == 1 else weight * total
    return total, total.name


def _held_out(config: RunConfig) -> tuple[bool, str]:
    guards.check_held_out(config.reward, config.guards.rewards)
    return True, "none of them is trained on"


def _features(model: str) -> tuple[Features, str]:
    where = "" if model == "playground" or os.path.exists(model) or model[:1] in "./~" else model
    revision = OPENAI.revision if model == OPENAI.repo else None
    words = [_resolve(where, revision=revision, files=("config.json",))] if where else []
    return Features(model), ", ".join(["loaded", *words])


# -- the pipeline ----------------------------------------------------------------------------------------------------


def _load(config: RunConfig, scheduler: str | None) -> tuple[Any, str]:
    pipe = launch.load_pipeline(config.model, memory=config.memory, scheduler=scheduler)
    network = getattr(pipe, find_denoiser(pipe))
    count = sum(parameter.numel() for parameter in network.parameters())
    words = f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}, {type(network).__name__}"
    return pipe, f"{words} of {count / 1e6:,.1f} M weights in {config.model.dtype} on {network.device}"


@dataclass(frozen=True)
class _Known:
    """What the earlier checks found; None is what failed, or what the run does not have."""

    prompts: list[str] | None
    eval_prompts: list[str] | None
    method: Method | None
    trained: Reward | None
    held_out: Reward | None
    features: Features | None
    images: bool


def _pipeline(config: RunConfig, pipe: Any, known: _Known, findings: Findings) -> "RewardTuner | None":
    """The checks that need the pipeline; gives the tuner, ready for an update, or None."""
    attempt = findings.attempt
    nowhere = Path(tempfile.gettempdir()) / f"rewardtune-check-{os.getpid()}"  # never made
    bare = config.model_copy(
        update={
            "guards": Guards(),
            "checkpoints": Checkpoints(best=None),
            "log": Log(report=False),
            "output_dir": str(nowhere),
        }
    )
    prompts = known.prompts or ["a picture"]

    def assemble() -> tuple["RewardTuner", str]:
        tuner = launch.assemble(
            bare,
            pipe,
            reward=known.trained or _stand_in(),
            method=known.method or launch.methods.refl(m=1),
            prompts=prompts,
            eval_prompts=known.eval_prompts or prompts,
            show_progress=False,
        )
        guidance = tuner.call.get("guidance_scale", "the pipeline's default")
        return tuner, f"{tuner.call['num_inference_steps']} steps, guidance {guidance}"

    tuner = attempt("sampling", assemble)
    if tuner is None:
        _without_pictures(config, known.trained, known.held_out, known.prompts, findings)
        return None
    guarded = (known.held_out is not None or not config.guards.rewards) and (
        known.features is not None or config.guards.features is None
    )
    if known.trained is not None and guarded:
        attempt("guards", lambda: _guards(tuner, config, known))
    attached = attempt("adapter", lambda: _adapter(tuner, config))
    call = evaluate.for_prompts(tuner.prompts[:1], tuner.call)
    counted = attempt("steps", lambda: _steps(tuner, call))
    plans = attempt("plan", lambda: _plans(tuner)) if counted is not None and known.method is not None else None
    if attached is not None and counted is not None:
        attempt("preflight", lambda: _preflight(tuner, call, plans or []), phase=f"{dryrun.STEP} 0", config=config)
    if attached is not None and counted is not None and config.adapter.kind != "full":
        attempt("adapter file", lambda: _round_trip(tuner, call))
    if config.regularize.denoise.weight and known.images and attached is not None and counted is not None:
        attempt("regularize.denoise", lambda: _denoising(tuner, config))
    pictures = None
    if counted is not None:
        pictures = attempt("batch", lambda: _batch(tuner), phase=dryrun.SAMPLING, config=config)
    if pictures is None:
        _without_pictures(config, known.trained, known.held_out, known.prompts, findings)
    else:
        shown = batch_prompts(tuner.prompts, seed=tuner.seed, step=0, size=tuner.batch)[: len(pictures)]
        _gradients(known.trained, known.held_out, pictures, shown, tuner.device, findings, config=config)
    return tuner


def _stand_in() -> Reward:
    from .rewards import Brightness

    return Brightness()


def _guards(tuner: "RewardTuner", config: RunConfig, known: _Known) -> tuple[bool, str]:
    """The watch as the trainer makes it, of what is loaded already."""
    watch = tuner._watch({} if known.held_out is None else {"rewards": known.held_out})
    watch.panel = replace(watch.panel, features=known.features)
    watch.rules = guards.make_rules([rule.model_dump() for rule in config.guards.rules])
    watch.best = config.checkpoints.best
    watch.check()
    tuner.watch = watch
    return True, f"{len(watch.rules)} rules; measured: {', '.join(watch.panel.metrics())}"


def _adapter(tuner: "RewardTuner", config: RunConfig) -> tuple[bool, str]:
    tuner.parameters = adapters.attach(tuner.denoiser, seed=tuner.seed, **tuner.adapter)
    if config.regularize.kl or tuner.method.kl:
        check_reference(tuner.denoiser)
    count = sum(parameter.numel() for parameter in tuner.parameters)
    return True, f"{config.adapter.kind} with {count / 1e6:,.2f} M trained weights"


def _steps(tuner: "RewardTuner", call: dict[str, Any]) -> tuple[int, str]:
    with quiet(tuner.pipe):
        tuner.T = count_steps(tuner.pipe, **call)
    return tuner.T, f"T = {tuner.T} calls of scheduler.step in {call['num_inference_steps']} inference steps"


def _plans(tuner: "RewardTuner") -> tuple[list[Any], str]:
    plans = [tuner.method(tuner.T, random.Random(draw)) for draw in range(8)]
    first = tuner.gradient().plan(0)
    return plans, f"{first.draw()} is the first update's: {first.steps_run} steps run, {len(first.executed)} trained"


def _preflight(tuner: "RewardTuner", call: dict[str, Any], plans: list[Any]) -> tuple[Any, str]:
    facts = preflight(tuner.pipe, **asked_of(plans), **call)
    return facts, "; ".join(["the pipeline opens exactly", f"guidance: {facts.guidance}", *facts.notes])


def _round_trip(tuner: "RewardTuner", call: dict[str, Any]) -> tuple[float, str]:
    """The adapter with numbers in place of its zeros, saved, loaded back and compared; a temporary folder holds it."""
    zeros = [p for p in tuner.parameters if not p.any()]
    generator = torch.Generator().manual_seed(0)
    short = few_steps(call, T=tuner.T)
    try:
        with torch.no_grad():
            for p in zeros:
                p.copy_(0.01 * torch.randn(p.shape, generator=generator))
        with tempfile.TemporaryDirectory() as folder:
            adapters.save(tuner.pipe, folder)
            difference = adapters.verify(tuner.pipe, folder, call=short)
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
    return difference, f"saved, loaded back and compared: pictures differ by {difference:.0e}"


def _denoising(tuner: "RewardTuner", config: RunConfig) -> tuple[bool, str]:
    loss = Denoising(**config.regularize.denoise.model_dump() | {"count": 1})
    made = loss.prepare(tuner.pipe, tuner.prompts, call=tuner.call, seed=tuner.seed, batch=1)
    return True, f"trains steps {made.steps[0]} to {made.steps[-1]} of {tuner.T}"


def _batch(tuner: "RewardTuner") -> tuple[Any, str]:
    """Two pictures of the first update's prompts, or one where a micro-batch is one."""
    count = min(2, tuner.micro_batch)
    prompts = batch_prompts(tuner.prompts, seed=tuner.seed, step=0, size=tuner.batch)[:count]
    pictures = evaluate.sample(tuner.pipe, prompts, seeds=list(range(count)), call=tuner.call, batch=count)
    height, width = pictures.shape[-2:]
    if not torch.isfinite(pictures).all():
        raise PreflightError("the pictures hold NaN; run the VAE in float32 or bfloat16 (memory.vae_dtype)")
    if float(pictures.amax()) < 1 / 255:
        raise PreflightError("all pictures are black; an fp16 VAE does that: memory.vae_dtype=float32")
    return pictures, f"pictures of {width} x {height}"


def _gradients(
    trained: Reward | None,
    held_out: Reward | None,
    pictures: torch.Tensor,
    prompts: Sequence[str],
    device: torch.device,
    findings: Findings,
    *,
    config: RunConfig | None = None,
    on: str = "pictures of this run",
) -> None:
    """Every part by itself, on random images of the pictures' size, and its value on the pictures themselves."""
    for reward, held in ((trained, False), (held_out, True)):
        if reward is None:
            continue
        parts = leaves(reward)
        for name, (part, wanted) in zip(unique_names(part for part, _ in parts), parts, strict=True):
            what = f"{'held-out' if held else 'gradient of'} {name}"
            findings.attempt(
                what,
                partial(_gradient, part, wanted and not held, pictures, prompts, device, on),
                phase=dryrun.REWARD,
                config=config,
            )
            part.to("cpu")


def _without_pictures(
    config: RunConfig, trained: Reward | None, held_out: Reward | None, prompts: list[str] | None, findings: Findings
) -> None:
    """Where there is no pipeline that samples: the rewards on noise, on the CPU."""
    noise = torch.rand(1, 3, config.sampling.height or 512, config.sampling.width or 512)
    _gradients(trained, held_out, noise, (prompts or ["a picture"])[:1], torch.device("cpu"), findings, on="noise")


def _gradient(
    part: Reward, must: bool, pictures: torch.Tensor, prompts: Sequence[str], device: torch.device, on: str
) -> tuple[bool, str]:
    height, width = pictures.shape[-2:]
    words = "reaches the pictures"
    try:
        check_reward(part, size=(height, width), prompts=list(prompts), device=device)
    except RewardError:
        if must:
            raise
        # held out, or of weight 0: it is scored alone
        check_reward(_stand_in() + 0.0 * part, size=(height, width), prompts=list(prompts), device=device)
        words = "it has no gradient, and needs none"
    values = evaluate.score(part, pictures, list(prompts), batch=len(pictures), device=device)
    native = next(value for name, value in values.items() if name != "reward")
    if not torch.isfinite(native).all():
        raise RewardError(f"reward '{part.name}' is {native.tolist()} on {on}; legal are finite numbers")
    return True, f"{words}; {float(native.mean()):.4g} on {on}"


# -- one update ------------------------------------------------------------------------------------------------------


def _dry_run(tuner: "RewardTuner", config: RunConfig, findings: Findings) -> None:
    meter = dryrun.Meter(torch.device(tuner.device))
    try:
        measured = dryrun.measure(tuner, config, meter)
    except Exception as error:
        phase = meter.current
        if dryrun.out_of_memory(error):
            lines = [f"out of memory in: {phase}", *(line.strip() for line in dryrun.advice(phase, config))]
            findings.add("error", "dry run", "\n".join(lines), 3)
        elif isinstance(error, RewardTuneError):
            findings.add("error", "dry run", f"{phase}: {error}", 2 if error.exit_code == 2 else 3)
        else:
            raise
        return
    name, peak = measured.peak
    close = peak > dryrun.CLOSE * measured.total
    findings.add("warning" if close else "ok", "dry run", f"one update made; {name} needs most, {dryrun.size(peak)}")
    findings.say("\n" + dryrun.report(measured, config, len(set(tuner.prompts))) + "\n")
