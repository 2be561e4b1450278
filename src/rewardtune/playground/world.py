"""Is this a world in which methods can differ? Tests that know no method, written before the world was chosen.

    python -m rewardtune.playground.world [--pipeline FOLDER] [--steps 20] [--output docs/results]

1. Layout is decided early. Finished pictures are noised to the level of step i and finished again. The share of objects
   that keep colour and place must be at least 0.95 in the last 40% of the steps and at most 0.5 at the first.
2. Late steps alone cannot re-arrange. A LoRA learns, on the noise level of one step alone, pictures whose objects stand
   on the middle column. What it changes at the other steps (RMS change of x0-hat over the deviation of x0) is the
   cross-step matrix; taught at the last step it must change the first step's x0-hat by less than half of what it does
   when taught there, and must leave objects in whole samples where they were (mean distance from the middle column at
   least 0.9 of the untouched).

Which pictures the rewards like best is the third question, in `benchmarks/loopholes.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import path, prompts
from .autoencoder import encode
from .quality import GUIDANCE, predict, sample, texts
from .reader import Reading, read
from .scenes import PLACE_MARGIN, SIZE, Scene, draw_scenes, render

KEPT_LATE, KEPT_FIRST = 0.95, 0.5  # the bounds of test 1
SHARED, STAY = 0.5, 0.9  # the bounds of test 2
LATE = 0.4  # share of the steps that count as late
UPDATES, BATCH, LR, RANK = 80, 16, 1e-3, 16  # of the lesson in test 2


def kept(before: Reading, after: Reading) -> list[bool]:
    """For each object before: is one of its colour still within PLACE_MARGIN pixels of its place?"""
    return [
        any(
            o.colour == n.colour and abs(o.x - n.x) < PLACE_MARGIN and abs(o.y - n.y) < PLACE_MARGIN
            for n in after.objects
        )
        for o in before.objects
    ]


def layout_kept(pipe: Any, captions: Sequence[str], *, steps: int) -> list[float]:
    """The share of objects that keep their place, by the step to which the picture was taken back."""
    from diffusers import StableDiffusionImg2ImgPipeline

    again: Any = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    pictures = sample(pipe, captions, steps=steps)
    before = [read(picture) for picture in pictures]
    with torch.no_grad():
        latents = encode(pipe.vae, pictures)
    shares = []
    for i in range(steps):
        settings = {"strength": (steps - i) / steps, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
        noise = [torch.Generator().manual_seed(77_777 + 1_000 * i + n) for n in range(len(captions))]
        finished = again(list(captions), image=latents, generator=noise, output_type="pt", **settings).images.float()
        rows = [kept(old, read(new)) for old, new in zip(before, finished, strict=True)]
        found = [share for row in rows for share in row]
        shares.append(sum(found) / len(found))
    return shares


def on_the_middle(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes with all objects on the middle column, above each other; those where they do not fit are left out."""
    moved = []
    for scene in scenes:
        objects = [replace(o, x=SIZE / 2) for o in scene.objects]
        if len(objects) == 2:
            top, bottom = objects
            free = SIZE - 2 * (top.radius + bottom.radius)
            if free < 6:
                continue
            objects = [replace(top, y=top.radius + free / 3), replace(bottom, y=SIZE - bottom.radius - free / 3)]
        moved.append(replace(scene, objects=tuple(objects)))
    return moved


class Predictions:
    """x0-hat of fixed noisy latents at each step of a chain, without guidance."""

    def __init__(self, pipe: Any, *, steps: int, count: int, seed: int = 3) -> None:
        scenes = draw_scenes(count, random.Random(f"{seed}/predictions"), split="eval", layout="free")
        pipe.scheduler.set_timesteps(steps)
        self.pipe, self.timesteps = pipe, pipe.scheduler.timesteps.tolist()
        with torch.no_grad():
            self.x0 = encode(pipe.vae, render(scenes))
            self.text = texts(pipe, scenes)
        self.noise = torch.randn(self.x0.shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def __call__(self, step: int) -> Tensor:
        return predict(self.pipe, self.x0, self.noise, self.timesteps[step], self.text)


def teach(pipe: Any, step: int, *, steps: int, seed: int = 0) -> None:
    """A LoRA on the UNet that learns middle-column pictures at one step's noise level, by the plain error of x0."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = r".*(to_[qkv]|to_out\.0|conv1|conv2|proj_in|proj_out|ff\.net\.(0\.proj|2))"
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0)
    pipe.scheduler.set_timesteps(steps)
    timestep = int(pipe.scheduler.timesteps[step])
    rng, noise = random.Random(f"{seed}/teach"), torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        scenes = on_the_middle(draw_scenes(BATCH, rng, layout="free"))
        with torch.no_grad():
            x0, text = encode(pipe.vae, render(scenes)), texts(pipe, scenes)
        predicted = predict(pipe, x0, torch.randn(x0.shape, generator=noise), timestep, text)
        loss = F.mse_loss(predicted, x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()


def off_middle(pictures: Tensor) -> float:
    """Mean distance in pixels of the objects' centres from the middle column."""
    return float(torch.tensor([abs(o.x - SIZE / 2) for picture in pictures for o in read(picture).objects]).mean())


def looked_at(steps: int) -> list[int]:
    """Six steps of the chain, the first and the last among them."""
    return sorted({0, *(round(share * (steps - 1)) for share in (0.2, 0.4, 0.6, 0.8, 1.0))})


def cross_steps(pipe: Any, captions: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Teach at single steps, look at all: the matrix of changes, and how far objects stand from the middle."""
    looked = looked_at(steps)
    see = Predictions(pipe, steps=steps, count=64)
    before = {j: see(j) for j in looked}
    deviation = float(see.x0.std())
    distances = {"untouched": off_middle(sample(pipe, captions, steps=steps))}
    matrix = {}
    for i in looked:
        teach(pipe, i, steps=steps)
        matrix[i] = {j: float((see(j) - before[j]).square().mean().sqrt()) / deviation for j in looked}
        distances[f"step {i}"] = off_middle(sample(pipe, captions, steps=steps))
        pipe.unet.unload_lora()
        pipe.unet.requires_grad_(False)
    return {"steps": looked, "matrix": matrix, "off_middle": distances}


def verdicts(shares: Sequence[float], cross: dict[str, Any], *, steps: int) -> dict[str, tuple[float, bool]]:
    """The four numbers that decide, and whether each passes."""
    late = min(shares[round((1 - LATE) * steps) :])
    matrix, distances = cross["matrix"], cross["off_middle"]
    shared = matrix[steps - 1][0] / matrix[0][0]
    stay = distances[f"step {steps - 1}"] / distances["untouched"]
    return {
        f"objects that keep their place, least over the last {LATE:.0%} of the steps (>= {KEPT_LATE})": (
            late,
            late >= KEPT_LATE,
        ),
        f"the same at the first step (<= {KEPT_FIRST})": (shares[0], shares[0] <= KEPT_FIRST),
        f"change of the first x0-hat, taught last over taught first (< {SHARED})": (shared, shared < SHARED),
        f"distance from the middle, taught last over untouched (>= {STAY})": (stay, stay >= STAY),
    }


def measure(pipeline: str | Path, *, steps: int, n: int) -> dict[str, Any]:
    """Both tests on one pipeline folder."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.requires_grad_(False)
    captions = prompts(n, split="eval", layout="free", seed=11)
    shares = layout_kept(pipe, captions, steps=steps)
    cross = cross_steps(pipe, captions, steps=steps)
    decided = {
        name: {"value": value, "passed": ok} for name, (value, ok) in verdicts(shares, cross, steps=steps).items()
    }
    return {"steps": steps, "prompts": n, "kept": shares, "cross": cross, "verdicts": decided}


def report(results: dict[str, Any]) -> str:
    """The results as markdown."""
    cross = results["cross"]
    lines = [
        "# The world, tested without any method",
        "",
        f"{results['prompts']} prompts with a free layout, {results['steps']} DDIM steps, guidance {GUIDANCE:g};",
        f"made by `python -m rewardtune.playground.world --prompts {results['prompts']}`, whose header says what is "
        "tested and why.",
        "",
        "| | value | |",
        "|---|---|---|",
        *(
            f"| {name} | {v['value']:.2f} | {'passed' if v['passed'] else '**missed**'} |"
            for name, v in results["verdicts"].items()
        ),
        "",
        "Objects that keep colour and place when the picture is taken back to a step and finished again:",
        "",
        "| step | " + " | ".join(map(str, range(results["steps"]))) + " |",
        "|---" * (results["steps"] + 1) + "|",
        "| share | " + " | ".join(f"{share:.2f}" for share in results["kept"]) + " |",
        "",
        "RMS change of x0-hat over the deviation of x0, when a LoRA is taught at one step's noise level (rows) and",
        "looked at others (columns); and the objects' mean distance from the middle column in samples (untouched:",
        f"{cross['off_middle']['untouched']:.1f} pixels):",
        "",
        "| taught at step | " + " | ".join(f"at {j}" for j in cross["steps"]) + " | pixels off the middle |",
        "|---" * (len(cross["steps"]) + 2) + "|",
    ]
    for i in cross["steps"]:
        row = " | ".join(f"{cross['matrix'][i][j]:.3f}" for j in cross["steps"])
        lines.append(f"| {i} | {row} | {cross['off_middle'][f'step {i}']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m rewardtune.playground.world", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=None, help="folder; default: the shipped one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    given = parser.parse_args(arguments)
    results = measure(given.pipeline or path(), steps=given.steps, n=given.prompts)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "playground_world.md").write_text(report(results))
    (given.output / "playground_world.json").write_text(json.dumps(results, indent=2) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
