"""What `rewardtune ls` and `rewardtune env` print. Imports nothing heavy for the lists."""

import inspect
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata

from . import __version__, methods
from .config import recipes


def _rewards() -> list[tuple[str, str]]:
    from .rewards.loading import BUILTIN

    return [(name, path) for name, path in BUILTIN.items()]


def _methods() -> list[tuple[str, str]]:
    return [
        (f"{name}{inspect.signature(factory)}".partition(" ->")[0], (factory.__doc__ or "").strip().splitlines()[0])
        for name, factory in methods.ALL.items()
    ]


def _recipes() -> list[tuple[str, str]]:
    return [(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for name, path in recipes().items()]


def _models() -> list[tuple[str, str]]:
    return [
        ("playground", "the small world that ships with the package; runs on a CPU"),
        ("FOLDER or HUB/ID", "any diffusers text-to-image pipeline; a preflight says whether it opens exactly"),
    ]


SECTIONS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "rewards": _rewards,
    "methods": _methods,
    "recipes": _recipes,
    "models": _models,
}


def listing(names: Sequence[str]) -> str:
    """The sections as text, a heading and two columns each."""
    blocks = []
    for name in names:
        rows = SECTIONS[name]()
        width = max(len(left) for left, _ in rows)
        blocks.append("\n".join([name, *(f"  {left:<{width}}  {right}" for left, right in rows)]))
    return "\n\n".join(blocks)


def environment() -> str:
    """Versions, threads and devices; no paths, no host names."""
    import torch

    lines = [
        f"rewardtune {__version__}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy"):
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} missing")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines.append(f"cpu cores {cores}, torch threads {torch.get_num_threads()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append("devices " + ", ".join(["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]))
    return "\n".join(lines)
