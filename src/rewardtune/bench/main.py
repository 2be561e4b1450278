"""`rewardtune bench`: from the name of an experiment to its page."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..runfolder import refuse_place, write_text
from ..spelling import nearest
from . import ablations, gradients, pictures, table1
from .setting import chosen_tasks, setting_of
from .work import Work

NAMES = ("table1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "spacing", "earlystop", "newer")
RESULTS = Path("docs/results/bench")


def bench(
    name: str,
    *,
    setting: str = "playground",
    results: Path = RESULTS,
    devices: Sequence[str] | None = None,
    rewards: Sequence[str] | None = None,
    seeds: int | None = None,
    budget: float | None = None,
    lrs: Sequence[float] | None = None,
    only_report: bool = False,
    plots: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Run what is missing of the experiment `name`, write its page and its plot; gives the page.

    devices: one process each; None: the cores of the CPU, or all GPUs. rewards: of Table 1, to be run; None: all.
    seeds: 0, 1, ... so many; budget, lrs: instead of the setting's.
    only_report: run nothing. Raises ConfigError.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown experiment {name!r}{nearest(name, NAMES)}; legal: {', '.join(NAMES)}")
    chosen = setting_of(setting)
    if plots and name not in pictures.REWARDS:
        from .plots import check_installed

        check_installed()
    asked = chosen_tasks(chosen, rewards)
    if rewards and name != "table1":
        raise ConfigError(f"--reward {' --reward '.join(rewards)}: only table1 takes rewards; leave it out for {name}")
    for option, value in (*(("--lr", lr) for lr in lrs or ()), *([] if budget is None else [("--budget", budget)])):
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} {value:g}: give a positive number")
    if only_report and not results.exists():
        raise ConfigError(f"no folder {results}: run it in a checkout of rewardtune, or give one by --results")
    if not only_report:
        refuse_place(results / setting, "--results")
    own = chosen
    if lrs:
        chosen = replace(chosen, lrs=tuple(sorted(set(lrs))))
    if budget is not None:
        chosen = replace(chosen, budget=budget)
    if seeds is not None:
        chosen = replace(chosen, seeds=tuple(range(seeds)))
    work = Work(
        setting=chosen,
        folder=results / setting,
        devices=_devices(setting, devices, run=not only_report),
        say=say,
        given="".join(
            [
                f" --seeds {seeds}" if chosen.seeds != own.seeds else "",
                f" --budget {budget!r}".removesuffix(".0") if chosen.budget != own.budget else "",
                *(f" --lr {lr!r}" for lr in chosen.lrs if chosen.lrs != own.lrs),
            ]
        ),
    )
    if not only_report and work.rows.path.exists() and not os.access(work.rows.path, os.W_OK):
        raise ConfigError(f"{work.rows.path} is not writable: mend that, or choose another --results")
    page = work.folder / f"{work.stem(name)}.md"
    write_text(page, _page(name, work, asked, run=not only_report, plots=plots))
    if work.failed:
        raise ConfigError(
            "\n".join([f"runs that failed: {len(work.failed)}; the others are kept and in {page}:", *work.failed])
        )
    return page


def _page(name: str, work: Work, rewards: Sequence[str], *, run: bool, plots: bool) -> str:
    if name == "table1":
        if run:
            table1.run(work, rewards)
        if plots:
            table1.picture(work)
        return table1.report(work)
    if name in pictures.REWARDS:
        if run:
            table1.run(work, [pictures.REWARDS[name]])
        if plots:
            pictures.picture(work, name)
        return pictures.report(work, name)
    if name == "fig7":
        if run:
            gradients.run(work)
        if plots:
            gradients.picture(work)
        return gradients.report(work)
    ablation = ablations.ABLATIONS[name].on(work.setting)
    if run:
        ablation.run(work)
    if plots:
        ablations.picture(ablation, work)
    return ablation.report(work)


def _devices(setting: str, given: Sequence[str] | None, *, run: bool) -> tuple[str, ...]:
    """Those given, once they are known to be there; else the default. Nothing is looked up where nothing is run."""
    if not run:
        return ("cpu",)
    for name in given or ():
        _check_device(name)
    return tuple(given or default_devices(setting))


def _check_device(name: str) -> None:
    """ConfigError for what is no device here; without a context on it, which would take its memory."""
    import torch

    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no device; legal: cpu, cuda:0, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"--device {name}: there are {gpus} GPUs here; legal: cpu" + ", cuda:0, ..." * (gpus > 0))


def default_devices(setting: str) -> list[str]:
    """The playground belongs on the CPU, one process a core; other settings take the GPUs that are there.

    Raises ConfigError where these need one and there is none.
    """
    if not setting.startswith("playground"):
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"--setting {setting} takes days without a GPU, and there is none: --report, or --device cpu"
            )
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["cpu"] * cores
