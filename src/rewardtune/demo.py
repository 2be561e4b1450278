"""`rewardtune demo`: DRTune on the playground, on a CPU, in minutes.

Reward: symmetry (its standard deviation detached, so that whitening the background earns nothing) + CLIPScore. Judged
on held-out prompts with fixed seeds, the full number of sampling steps, and by a reader of objects that no reward uses.
The settings below are the best of those tried; all of them stand in docs/results/demo.md.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import playground
from .errors import ConfigError
from .methods import drtune
from .rewards import CLIPScore, Symmetry
from .trainer import Result, RewardTuner

HELD_OUT = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every number of the demo."""

    T: int = 20
    guidance: float = 4.0
    batch: int = 8
    K: int = 2
    m: int = 8
    rank: int = 16
    targets: str = "attention+conv"
    clip_weight: float = 1.0
    clip: float = 0.1
    lr: float = 2e-4
    threads: int | None = None


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
    settings: Settings | None = None,
) -> tuple[Figures, Figures]:
    """Tune for `seconds` (or `steps` updates), print the table, save the grid; gives the figures before and after."""
    if seconds <= 0 or (steps is not None and steps < 1):
        raise ConfigError(f"seconds={seconds}, steps={steps}: both must be greater than 0")
    chosen = settings or Settings()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    reward = Symmetry(detach_std=True) + chosen.clip_weight * CLIPScore(model=str(playground.clip_path()))
    held_out = playground.prompts(HELD_OUT, split="eval", layout="free")
    tuner = RewardTuner(
        playground.pipeline(),
        reward=reward,
        method=drtune(K=chosen.K, m=chosen.m),
        prompts=playground.prompts(2000, split="train", layout="free"),
        output_dir=output,
        num_inference_steps=chosen.T,
        guidance_scale=chosen.guidance,
        batch=chosen.batch,
        rank=chosen.rank,
        targets=chosen.targets,
        seed=seed,
        eval_prompts=held_out,
        eval_count=HELD_OUT,
        overwrite=overwrite,
    )
    result = tuner.train(steps or 100_000, lr=chosen.lr, clip=chosen.clip, max_seconds=seconds)
    before = figures(result.before, result.before_images, held_out)
    after = figures(result.after, result.after_images, held_out)
    print(table(before, after, result))
    return before, after


def figures(scores: dict[str, tuple[float, float]], images: Tensor, prompts: list[str]) -> Figures:
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
    lines = [f"{'':28}{'before':>8}{'after':>8}{'change':>9}"]
    lines += [f"{name:28}{old:8.3f}{new:8.3f}{new / old - 1:+9.0%}" for name, old, new in rows]
    return "\n".join(
        [
            "",
            f"DRTune, {result.steps} updates in {result.seconds:.0f} s, {HELD_OUT} held-out prompts, fixed seeds:",
            *lines,
            "",
            f"pictures: {result.folder / 'before_after.png'}",
            f'try next: rewardtune sample {result.folder} --model playground --prompt "a large red heart"',
            "          rewardtune train playground method.options.m=null output_dir=runs/full-chain",
            "          rewardtune plan drtune --steps 20 -o K=2 -o m=8",
        ]
    )
