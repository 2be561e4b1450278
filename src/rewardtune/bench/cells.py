"""One run of an experiment: tune until the budget is used up, judge on held-out prompts, give a row.

It is the run that `rewardtune train` makes of the setting's preset, only that the number of updates follows from the
budget. Left out of the row: the weights (the run folder does not stay) and the values of single prompts.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint, launch
from ..config import MethodChoice, Part, RunConfig, load_config
from ..errors import ConfigError, RewardTuneError, TrainingStopped, out_of_memory
from ..methods import Method
from ..panel import natives
from .cost import Cost, spent, updates_within
from .rows import Cell
from .setting import Setting, method_of, setting_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..trainer import RewardTuner

SHOWN = 8  # pictures that are kept of a final run
BASE = "untuned"  # the method of a cell that trains nothing


def law_of(cell: Cell) -> Method:
    return launch.make_method(MethodChoice(**_choice(cell)))


def _choice(cell: Cell) -> dict[str, Any]:
    """`method` of the cell's run file."""
    choice = method_of(cell.method, cell.T)
    return {**choice, "options": dict(cell.options) or choice["options"]}


def config_of(
    cell: Cell, setting: Setting, *, prompts: dict[str, list[str]], folder: str, device: str, updates: int
) -> RunConfig:
    """The run file of a cell."""
    held_out = prompts[cell.judged][: setting.looked if cell.judged == "final" else 1]
    every = max(1, -(-updates // setting.looks)) if cell.judged == "final" else None
    changes: dict[str, Any] = {
        "method": _choice(cell),
        "reward": setting.tasks[cell.reward].parts,
        "prompts": {"source": prompts["train"]},
        "sampling.steps": cell.T,
        "optim.lr": cell.lr,
        "optim.batch": setting.batch,
        "optim.steps": updates,
        "eval": {"prompts": {"source": held_out}, "count": len(held_out), "every": every},
        "checkpoints.every": -(-updates // setting.saves) if setting.saves else None,
        "checkpoints.best": None,  # the last weights are what is judged
        "output_dir": folder,
        "model.device": device,
        "seed": cell.seed,
    }
    return load_config(setting.preset, [*setting.changes, *(f"{k}={json.dumps(v)}" for k, v in changes.items())])


def open_cell(
    cell: Cell, *, folder: str, device: str = "cpu", updates: int = 1, cut_off: bool = False
) -> "tuple[RunConfig, RewardTuner]":
    """The run file of a cell, and what it says, loaded.

    cut_off: go on from the last checkpoint of the run in `folder`; one that was cut off before its first is replaced.
    """
    setting = setting_of(cell.setting)
    prompts = setting.tasks[cell.reward].prompts(search=setting.searched, final=cell.count)
    config = config_of(cell, setting, prompts=prompts, folder=folder, device=device, updates=updates)
    resume = "latest" if cut_off and checkpoint.steps(Path(folder)) else None
    overwrite = cut_off and resume is None
    try:
        return config, launch.tuner_from(config, resume=resume, overwrite=overwrite, show_progress=False)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{error}. To begin this run anew, remove {folder}") from error


def run_cell(
    cell: Cell, cost: Cost, *, device: str = "cpu", pictures: Path | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """The row: how far the budget reached, the trace of the looks, the final scores. pictures: a PNG of the first.

    folder: of the run, which goes on from its checkpoint there; None: a temporary one. Raises ConfigError where another
    process is at it.
    """
    setting = setting_of(cell.setting)
    updates, used = 0, [0.0]
    with _held(folder), tempfile.TemporaryDirectory() as temporary:
        if cell.method != BASE:
            method = law_of(cell)
            given: dict[str, Any] = {"seed": cell.seed, "batch": setting.batch, "cost": cost}
            updates = cell.updates or updates_within(cell.budget, method, cell.T, **given)
            used = spent(method, cell.T, updates=updates, **given)
        opened = cell if cell.method != BASE else replace(cell, method="DRTune", lr=1.0)  # not trained
        place = folder or Path(temporary) / "run"
        given = {"folder": str(place), "device": device, "updates": max(updates, 1)}
        config, tuner = open_cell(opened, **given, cut_off=place.exists())
        trace: dict[str, Any] = {}
        if updates:
            broke = _train(config, tuner)
            trace = _trace(place, used, whole=not broke)
            trace["cost"] = {"replay": cost.replay, "nested": cost.nested}
            if broke:
                return {
                    "cell": json.loads(cell.key),
                    "updates": tuner.step,
                    "evaluations": round(used[tuner.step]),
                    **trace,
                    **_none(tuner, setting, cell),
                    "broke": broke,
                    "on": where(tuner),
                }
    images = sample(tuner, setting, cell)
    if pictures is not None:
        save_strip(images[:SHOWN], pictures)
    return {
        "cell": json.loads(cell.key),
        "updates": updates,
        "evaluations": round(used[-1]),
        **trace,
        **judge(tuner, setting, cell, images),
        "moved": moved(tuner) if updates and cell.judged == "final" and setting.features == "playground" else None,
        "on": where(tuner),
    }


@contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """No other process works in `folder` meanwhile; it is free again when this one ends, however it ends."""
    if folder is None or sys.platform == "win32":  # where nothing is kept, and where files have no such locks
        yield
        return
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError("another command is at this run; its row will be there when that is done") from error
        yield


def _train(config: RunConfig, tuner: "RewardTuner") -> str:
    """Why the run broke down (NaN, black pictures, a gradient that vanished): a result; "" if it did not."""
    try:
        launch.train_as(config, tuner)
    except TrainingStopped as stopped:
        if out_of_memory(stopped) or not tuner.watch.history:  # the untuned model's pictures broke: no result of a run
            raise
        return str(stopped)
    return ""


def _none(tuner: "RewardTuner", setting: Setting, cell: Cell) -> dict[str, Any]:
    """What `judge` gives, NaN all over: there are no pictures to judge."""
    extra = launch.make_reward([Part(**{**part, "weight": 1.0}) for part in setting.extra])
    names = ["reward", *natives(extra), *natives(tuner.reward)]
    names += ["pairwise_distance"] if setting.features is not None else []
    scores = {name: [math.nan, math.nan] for name in names}
    longer = cell.judged == "final" and cell.count > setting.counted
    return {"scores": scores, **({"first": {str(setting.counted): scores}} if longer else {})}


def final_prompts(setting: Setting, cell: Cell) -> list[str]:
    return setting.tasks[cell.reward].prompts(search=setting.searched, final=cell.count)[cell.judged][: cell.count]


def sample(tuner: "RewardTuner", setting: Setting, cell: Cell) -> "Tensor":
    """Pictures (N, 3, H, W) of the prompts that judge, with the same noise for every method and seed."""
    import torch

    from .. import evaluate
    from ..gradient import derive_seed

    prompts = final_prompts(setting, cell)
    if tuner.parameters and tuner.denoiser.dtype == torch.float32:
        tuner.denoiser.fuse_lora()  # the same pictures to rounding, in less time
    seeds = [derive_seed("bench", cell.judged, index) for index in range(len(prompts))]
    return evaluate.sample(tuner.pipe, prompts, seeds=seeds, call=tuner.call, batch=min(16, 4 * tuner.micro_batch))


def judge(tuner: "RewardTuner", setting: Setting, cell: Cell, images: "Tensor") -> dict[str, Any]:
    """{"scores": {name: [mean, half of its 95 % interval over prompts]}}: the trained reward, its parts, those besides.

    A final run judged on more prompts than ablations are keeps "first" as well, {count: scores on so many}: it need not
    run again for them.
    """
    from .. import evaluate
    from ..diversity import Features, pairwise_distance
    from ..stats import mean_interval

    prompts = final_prompts(setting, cell)
    extra = launch.make_reward([Part(**{**part, "weight": 1.0}) for part in setting.extra])
    found = evaluate.score(extra, images, prompts, batch=16, device=tuner.device)
    found |= evaluate.score(tuner.reward, images, prompts, batch=16, device=tuner.device)  # also its total
    features = Features(setting.features).to(tuner.device)(images, batch=16) if setting.features is not None else None

    def of_first(count: int) -> dict[str, list[float]]:
        scores = {name: list(mean_interval(values[:count].tolist())) for name, values in found.items()}
        if features is not None:
            scores["pairwise_distance"] = [pairwise_distance(features[:count]), 0.0]
        return scores

    fewer = setting.counted if cell.judged == "final" and len(prompts) > setting.counted else None
    return {"scores": of_first(len(prompts)), **({"first": {str(fewer): of_first(fewer)}} if fewer else {})}


def moved(tuner: "RewardTuner", *, steps: int = 20, count: int = 32) -> dict[str, float]:
    """How far the tuned network moves x0-hat at steps of the chain: RMS change over the deviation of x0.

    On fixed noisy latents of drawn scenes, without guidance; the tuned network against a fresh one.
    """
    from .. import playground
    from ..playground.world import Predictions, looked_at

    base = Predictions(playground.pipeline(), steps=steps, count=count)
    tuned = Predictions(tuner.pipe, steps=steps, count=count)
    deviation = float(base.x0.std())
    found = looked_at(steps)
    return {str(j): round(float((tuned(j) - base(j)).square().mean().sqrt()) / deviation, 5) for j in found}


def save_strip(images: "Tensor", path: Path) -> None:
    """Pictures side by side in one PNG."""
    import torch

    from ..evaluate import to_pil
    from ..runfolder import atomic

    with atomic(path) as temporary:
        to_pil(torch.cat(list(images), dim=2)).save(temporary, optimize=True)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def _trace(folder: Path, used: list[float], *, whole: bool = True) -> dict[str, Any]:
    """Looks with what had been used up by then, and means over the updates.

    whole: all updates must be there; of a run that broke down the last look, where it did, is NaN.
    """
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    if not whole:
        lost = {name: [math.nan, math.nan] for name in looks[0]["scores"]}
        looks.append({"step": len(records), "scores": lost})
    elif len(records) != len(used) - 1:
        raise RewardTuneError(f"the run ended after {len(records)} of {len(used) - 1} updates: no row is made of it")
    seconds, cpu = (list(accumulate((r[name] for r in records), initial=0.0)) for name in ("seconds", "cpu_seconds"))
    norms: dict[str, list[float]] = {}
    for record in records:
        for step, norm in record["step_grad_norms"].items():
            norms.setdefault(str(step), []).append(norm)
    return {
        "seconds": round(seconds[-1], 1),
        "cpu_seconds": round(cpu[-1], 1),
        "grad_norm": _mean([r["grad_norm"] for r in records]),
        "clipped": _mean([r["clipped"] for r in records]),
        "step_grad_norms": {s: sum(v) / len(v) for s, v in sorted(norms.items(), key=lambda item: int(item[0]))},
        "trained": _mean([len(r["trained"]) for r in records]),
        "trace": [
            {
                "updates": look["step"],
                "evaluations": round(used[look["step"]]),
                "seconds": round(seconds[look["step"]], 1),
                "cpu_seconds": round(cpu[look["step"]], 1),
                "scores": {name: mean for name, (mean, _) in look["scores"].items()},
            }
            for look in looks
        ],
    }


def _model() -> str:
    """Of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name and f" ({name})"


def where(tuner: "RewardTuner") -> dict[str, Any]:
    """Versions and the kind of machine, without names of hosts and paths."""
    import platform
    from importlib import metadata

    import torch

    device = tuner.device
    cpu = f"{platform.machine()} CPU{_model()}" if device.type == "cpu" else device.type
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {package: metadata.version(package) for package in ("torch", "diffusers", "peft", "rewardtune")}
    return {"device": name, "threads": torch.get_num_threads(), **versions}
