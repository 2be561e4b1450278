"""`rewardtune demo`: the shipped preset `playground` (DRTune, symmetry + CLIPScore) on a CPU, in minutes.

Judged on held-out prompts with fixed seeds and the full number of sampling steps, by a preference model that is not
trained on (in the report) and by a reader of objects that no reward uses. What was tried before the preset was settled
stands in docs/log.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import playground
from .config import load_config
from .errors import ConfigError
from .launch import train
from .prompts import load_prompts
from .trainer import Result


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Means over the held-out prompts. `counted`: share of pictures with as many objects as the prompt asks for."""

    symmetry: float
    clipscore: float
    counted: float


def run(
    *,
    seconds: float = 240,
    steps: int | None = None,
    output: str | Path = "runs/demo",
    seed: int = 0,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
) -> tuple[Figures, Figures]:
    """Tune for the preset's updates (or `steps`; `seconds` at most), print the table, save the grid.

    Gives the figures before and after.

    overrides: other settings of the preset, as `key=value`.
    """
    if seconds <= 0 or (steps is not None and steps < 1):
        raise ConfigError(f"seconds={seconds}, steps={steps}: both must be greater than 0")
    judges = ["guards.rewards=[{name: hpsv2, options: {model: playground}}]", "guards.features=playground"]
    asked = [*judges, f"optim.max_seconds={seconds}", f"output_dir={output}", f"seed={seed}"]
    asked += [] if steps is None else [f"optim.steps={steps}"]
    config = load_config("playground", [*asked, *overrides])
    result = train(config, overwrite=overwrite)
    held_out = config.looked_at
    prompts = load_prompts(held_out.source, template=held_out.template)[: config.eval.count]
    before = figures(result.before, result.before_images, prompts)
    after = figures(result.after, result.after_images, prompts)
    print(table(before, after, result))
    return before, after


def figures(scores: dict[str, tuple[float, float]], images: Tensor, prompts: Sequence[str]) -> Figures:
    counts = playground.count_objects(images)
    asked = torch.tensor([len(playground.parse(prompt).mentions) for prompt in prompts])
    counted = (counts.cpu() == asked).float().mean().item()
    return Figures(symmetry=scores["symmetry"][0], clipscore=scores["clipscore"][0], counted=counted)


def table(before: Figures, after: Figures, result: Result) -> str:
    """The short table, where the pictures are, and what to try next."""
    rows = [
        ("symmetry (lower is better)", before.symmetry, after.symmetry),
        ("CLIPScore", before.clipscore, after.clipscore),
        ("right number of objects", before.counted, after.counted),
    ]
    count = len(result.after_images)
    return "\n".join(
        [
            "",
            f"DRTune, {result.steps} updates in {result.seconds:.0f} s, {count} held-out prompts, fixed seeds:",
            f"{'':28}{'before':>8}{'after':>8}{'change':>9}",
            *(f"{name:28}{old:8.3f}{new:8.3f}{new / max(old, 1e-9) - 1:+9.0%}" for name, old, new in rows),
            "",
            f"pictures: {result.folder / 'before_after.png'}",
            f'try next: rewardtune sample {result.folder} --prompt "a red heart and a blue star, night background"',
            "          rewardtune train playground method.options.m=null output_dir=runs/full-chain",
            "          rewardtune plan drtune --steps 20 -o K=2 -o m=8",
        ]
    )
