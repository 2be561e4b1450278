"""What a picture looks like that maximises a reward, and what else changes on the way: `python benchmarks/loopholes.py`

Two questions for each of the playground's rewards, without any model that makes pictures:
1. Pixels alone: Adam climbs the reward from drawn scenes. What happens to brightness, saturation, fine detail, the
   objects that the reader finds and the small CLIPScore says where the reward can be had without a better picture.
2. Edits by hand of the same scenes (an object removed, shrunk, centred; whitened, blurred): which of them the reward
   pays for, in units of its deviation over scenes.
And which of such edits the guards' panel notices.
Writes docs/results/loopholes.md and loopholes.png. Three minutes on one core.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardtune import edits as image_edits
from rewardtune import evaluate, playground, rewards
from rewardtune.config import Part
from rewardtune.diversity import Features
from rewardtune.launch import make_reward
from rewardtune.panel import Panel
from rewardtune.playground import Scene
from rewardtune.rewards import Reward

RESULTS = Path("docs/results")
SCENES, SHOWN = 32, 6
STEPS, LR = 150, 0.02
NAMES = (
    "aesthetic",
    "clipscore",
    "pickscore",
    "hpsv2",
    "objectness",
    "symmetry",
    "symmetry, std detached",
    "compressibility",
)


def load(name: str) -> Reward:
    """The playground's reward of that name."""
    if name.startswith("symmetry"):
        return rewards.Symmetry(detach_std="detached" in name)
    if name == "compressibility":
        return rewards.Compressibility()
    options = {"model": "playground"} | ({"target": "heart"} if name == "objectness" else {})
    return make_reward([Part(name=name, options=options)])


def climb(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Pixels in [0, 1] after STEPS of Adam on the reward."""
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (-reward(pixels, prompts).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return pixels.detach()


def side_effects(images: Tensor, prompts: list[str], clip: Reward) -> dict[str, float]:
    """Means over pictures of what a reward should not be paid for."""
    high = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    asked = [len(playground.parse(prompt).mentions) for prompt in prompts]
    counts = playground.count_objects(images).tolist()
    with torch.no_grad():
        faithful = clip(images, prompts).mean().item()
    return {
        "brightness": images.mean().item(),
        "saturation": (images.amax(1) - images.amin(1)).mean().item(),
        "fine detail": high.square().mean().sqrt().item(),
        "right number": sum(a == b for a, b in zip(asked, counts, strict=True)) / len(asked),
        "CLIPScore": faithful,
    }


def edits(scenes: list[Scene]) -> dict[str, Tensor]:
    """The same scenes, changed by hand."""

    def scaled(factor: float) -> Callable[[Scene], Scene]:
        return lambda s: replace(s, objects=tuple(replace(o, radius=o.radius * factor) for o in s.objects))

    def centred(s: Scene) -> Scene:
        heights = (32.0,) if len(s.objects) == 1 else (17.0, 47.0)
        return replace(s, objects=tuple(replace(o, x=32.0, y=y) for o, y in zip(s.objects, heights, strict=True)))

    plain = playground.render(scenes)
    return {
        "objects erased": erased(scenes),
        "second object removed": playground.render([replace(s, objects=s.objects[:1]) for s in scenes]),
        "objects shrunk to 0.7": playground.render([scaled(0.7)(s) for s in scenes]),
        "objects on the middle column": playground.render([centred(s) for s in scenes]),
        "whitened (0.5)": 0.5 + 0.5 * plain,
        "darkened (0.5)": 0.5 * plain,
        "blurred": blurred(plain),
        "grey": plain.mean(1, keepdim=True).expand_as(plain),
    }


def erased(scenes: list[Scene]) -> Tensor:
    """Only the backgrounds."""
    return playground.render([replace(s, objects=()) for s in scenes])


def blurred(images: Tensor) -> Tensor:
    for _ in range(3):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def noticed(scenes: list[Scene]) -> list[str]:
    """What the guards' panel measures of edits by hand, as a Markdown table: the drawn scenes are the base."""
    drawn = playground.render(scenes)
    grey = drawn.mean(1, keepdim=True)
    pictures = {
        "as drawn": drawn,
        "objects erased": erased(scenes),
        "grey": grey.expand_as(drawn),
        "one picture for all prompts": drawn[:1].expand_as(drawn),
        "blurred, 1/32 of the side": image_edits.blur(drawn, 1 / 32),
        "saturation x 1.5": (grey + 1.5 * (drawn - grey)).clamp(0, 1),
    }
    panel = Panel(
        prompts=[scene.caption for scene in scenes],
        rewards=rewards.CLIPScore(model=str(playground.clip_path())),
        features=Features("playground"),
    )
    measured = {name: panel(made, base=drawn, step=1).values for name, made in pictures.items()}
    metrics = [name for name in measured["as drawn"] if name not in ("black", "nan")]
    rows = [
        f"| {name} | " + " | ".join(f"{round(of[key], 6) + 0.0:.3g}" for key in metrics) + " |"
        for name, of in measured.items()
    ]
    return [f"| | {' | '.join(metrics)} |", "|-" * (len(metrics) + 1) + "|", *rows]


def report() -> str:
    scenes = playground.draw_scenes(SCENES, random.Random("loopholes"), split="eval", layout="free")
    images, prompts = playground.render(scenes), [scene.caption for scene in scenes]
    clip = load("clipscore")
    plain = side_effects(images, prompts, clip)
    changed = edits(scenes)
    pixel_rows = ["| | reward | " + " | ".join(plain) + " |", "|-" * (len(plain) + 2) + "|"]
    pixel_rows.append("| drawn scenes | | " + " | ".join(f"{value:.2f}" for value in plain.values()) + " |")
    edit_rows = ["| reward | " + " | ".join(changed) + " |", "|-" * (len(changed) + 1) + "|"]
    columns = {"drawn": images[:SHOWN]}
    for name in NAMES:
        reward = load(name)
        with torch.no_grad():
            before = reward(images, prompts)
            gains = {
                edit: (reward(pictures, prompts) - before).mean() / before.std() for edit, pictures in changed.items()
            }
        best = climb(reward, images, prompts)
        with torch.no_grad():
            after = reward(best, prompts)
        effects = side_effects(best, prompts, clip)
        cells = " | ".join(f"{value:.2f}" for value in effects.values())
        pixel_rows.append(f"| {name} | {before.mean():.4g} -> {after.mean():.4g} | {cells} |")
        edit_rows.append(f"| {name} | " + " | ".join(f"{gain:+.1f}" for gain in gains.values()) + " |")
        columns[name] = best[:SHOWN]
        print(pixel_rows[-1], flush=True)
    evaluate.save_grid(columns, prompts[:SHOWN], RESULTS / "loopholes.png", per_row=1)
    return "\n".join(
        [
            "# What each reward can be cheated with",
            "",
            f"`python benchmarks/loopholes.py`: {SCENES} drawn scenes of the eval split; scores with the sign that",
            "training maximises.",
            "",
            f"## Pixels alone: {STEPS} steps of Adam from the drawn scene",
            "",
            *pixel_rows,
            "",
            "![pictures](loopholes.png)",
            "",
            "## Edits by hand, in deviations of the reward over scenes (positive: the reward pays)",
            "",
            *edit_rows,
            "",
            "## What the guards' panel notices, of the drawn scenes changed by hand",
            "",
            *noticed(scenes),
            "",
        ]
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = report()
    (RESULTS / "loopholes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
