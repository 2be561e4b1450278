"""What `rewardtune ls` and `rewardtune env` print. Imports nothing heavy for the lists."""

import importlib
import inspect
import json
import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, methods
from .config import presets
from .errors import ConfigError
from .rewards.catalogue import REWARDS, Entry
from .spelling import nearest
from .tables import WIDTH, text_table

LISTED = 100  # columns of `rewardtune ls`


def _rewards() -> list[tuple[str, str]]:
    return [(entry.name, entry.meaning) for entry in REWARDS]


def _methods() -> list[tuple[str, str]]:
    def row(head: str, factory: Callable[..., Any]) -> tuple[str, str]:
        options = [p for p in inspect.signature(factory).parameters.values() if p.default is not p.empty]
        shown = ", ".join(f"{p.name}={'null' if p.default is None else p.default}" for p in options)
        return f"{head}({shown})", (factory.__doc__ or "").strip().splitlines()[0]

    wrappers: list[tuple[str, Callable[..., Any]]] = [
        ("method.rsa_ft", methods.rsa_ft),
        ("method.conditional_only", methods.conditional_only),
    ]
    return [row(name, factory) for name, factory in [*methods.ALL.items(), *wrappers]]


def _presets() -> list[tuple[str, str]]:
    return [(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for name, path in presets().items()]


def pipelines() -> list[dict[str, Any]]:
    """The pipeline classes of diffusers with what their contract gave: the rows of docs/results/pipelines.md."""
    return json.loads((Path(__file__).parent / "pipelines.json").read_text(encoding="utf-8"))


def _models() -> list[tuple[str, str]]:
    rows = [
        ("playground", "the small world that ships with the package; runs on a CPU"),
        ("FOLDER or HUB/ID", "any diffusers text-to-image pipeline; a preflight says whether it opens exactly"),
    ]
    for row in pipelines():
        if row["status"] == "exact":
            words = f"exact; guidance: {row['guidance']}; calls a step: {row['calls']}"
            words += (
                f"; schedulers: {', '.join(_plain(name) for name in (row['scheduler'], *(row['schedulers'] or ())))}"
            )
        else:
            words = f"{row['status']}: {row['reason']}"
        rows.append((row["pipeline"], words))
    return rows


def _plain(scheduler: str) -> str:
    return scheduler.removesuffix("Scheduler")


SECTIONS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "rewards": _rewards,
    "methods": _methods,
    "presets": _presets,
    "models": _models,
}


def listing(names: Sequence[str]) -> str:
    """The sections as text of at most LISTED columns: a heading, and two columns each, of which the second wraps.

    Where the first leaves it little room (a method with its options) it stands beneath, indented.
    """
    return "\n\n".join("\n".join([name, *_rows(SECTIONS[name]())]) for name in names)


def _rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    beneath = width > LISTED // 2
    indent = " " * (6 if beneath else width + 4)
    wrap = textwrap.TextWrapper(LISTED, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines: list[str] = []
    for left, right in rows:
        wrapped = wrap.wrap(right)
        if beneath:
            lines += [f"  {left}", *wrapped]
        else:
            lines += [f"  {left:<{width}}  {wrapped[0].lstrip()}", *wrapped[1:]]
    return lines


REWARD_HEADINGS = ("reward", "native value", "range", "better", "gradient", "weights", "licence", "status of proof")


def reward_rows() -> list[tuple[str, ...]]:
    """A row of text for each reward, under REWARD_HEADINGS."""
    return [
        (e.name, e.meaning, e.range, e.better, "yes" if e.differentiable else "no", e.size, e.licence, e.status)
        for e in REWARDS
    ]


def rewards_table() -> str:
    """All rewards, a row each."""
    return f"{text_table(REWARD_HEADINGS, reward_rows(), flexible=(1, 7))}\n\nAll about one: rewardtune ls rewards NAME"


def reward_page(name: str) -> str:
    """Everything about one reward, and how to place its weights by hand. ConfigError for an unknown name."""
    entry = next((entry for entry in REWARDS if entry.name == name.lower()), None)
    if entry is None:
        names = [entry.name for entry in REWARDS]
        raise ConfigError(f"unknown reward {name!r}{nearest(name.lower(), names)}; legal: {', '.join(names)}")
    facts = {
        "measures": entry.meaning,
        "range": f"{entry.range}; {entry.better} is better",
        **({"note": entry.note} if entry.note else {}),
        "reads": "image and prompt" if entry.reads_prompt else "the image alone",
        "gradient": "yes" if entry.differentiable else "no: log it with weight 0",
        "status": entry.status,
        **({"proved": entry.proof} if entry.oracle else {}),
        **({"not proved": "the published weights, which no test loads"} if entry.weights else {}),
        "class": entry.path,
        "settings": _settings(entry),
    }
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=18 * " ", break_on_hyphens=False)
    lines = [entry.name, *(wrap.fill(f"  {key:<14}  {value}") for key, value in facts.items())]
    if not entry.weights:
        return "\n".join([*lines, "  weights         none"])
    lines.append("  weights         downloaded on first use; without network, on a machine that has one:")
    for source in entry.weights:
        lines.append(f"    {source.size}, licence {source.licence}:")
        lines.append(f"      {source.by_hand()}")
    return "\n".join(lines)


def _settings(entry: Entry) -> str:
    module, _, attribute = entry.path.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters) or "none"


def rewards_json() -> str:
    """The catalogue as JSON, a list of objects."""
    rows = [
        {**asdict(entry), "size": entry.size, "licence": entry.licence, "status": entry.status} for entry in REWARDS
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False)


PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def versions(device: Any) -> dict[str, str]:
    """What a run was made with: its packages, and the device by its kind; no paths, no host names."""
    import torch

    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type
    found = {"rewardtune": __version__, "python": platform.python_version()}
    return found | {package: _version(package) for package in PACKAGES} | {"device": name}


def environment() -> str:
    """Versions, threads and devices; no paths, no host names."""
    import torch

    lines = [
        f"rewardtune {__version__}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    lines += [f"{package} {_version(package)}" for package in (*PACKAGES, "safetensors", "numpy")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines.append(f"cpu cores {cores}, torch threads {torch.get_num_threads()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append("devices " + ", ".join(["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]))
    return "\n".join(lines)
