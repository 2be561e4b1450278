"""One training loop for all networks of the playground: seeded by step, resumable, with progress lines.

A step's data and noise derive from (seed, name, step) alone, so a resumed training sees what the uninterrupted
one would have seen and a checkpoint holds no generator. Left out: devices, mixed precision, several processes.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.errors import ConfigError

from . import scenes, words


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a network trains; the learning rate warms up and falls to 0 along a cosine."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float | None = None  # decay of the averaged weights, which are then the result
    shards: int = 1  # parts of a batch, each with its own draw, which several threads may share
    save_seconds: float = 120.0

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A training step and its random sources: `rng` for scenes, `noise` for tensors."""

    step: int
    rng: random.Random
    noise: torch.Generator


def draw_for(seed: int, name: str, step: int, shard: int = 0) -> Draw:
    """The random sources that (seed, name, step, shard) name."""
    rng = random.Random(f"{seed}/{name}/{step}/{shard}" if shard else f"{seed}/{name}/{step}")
    return Draw(step=step, rng=rng, noise=torch.Generator().manual_seed(rng.getrandbits(62)))


def fingerprint(*parts: nn.Module | Tensor) -> str:
    """Of the world, as its sources `scenes.py` and `words.py` describe it, and of networks and tensors."""
    digest = hashlib.sha256()
    for module in (scenes, words):
        digest.update(Path(str(module.__file__)).read_bytes())
    for part in parts:
        for name, tensor in part.state_dict().items() if isinstance(part, nn.Module) else [("", part)]:
            digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gradients(
    parameters: list[nn.Parameter],
    loss: Callable[[Draw], tuple[Tensor, dict[str, float]]],
    draws: list[Draw],
    pool: ThreadPoolExecutor,
) -> tuple[Tensor, dict[str, float]]:
    """Write the mean gradient over `draws` to `.grad`; each draw is a task of `pool`, summed in order, so that the
    result does not depend on the number of threads. Returns the first draw's loss and numbers."""

    def one(draw: Draw) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        value, numbers = loss(draw)
        return value.detach(), numbers, torch.autograd.grad(value, parameters, allow_unused=True)

    results = list(pool.map(one, draws))
    for i, parameter in enumerate(parameters):
        parts = [part for _, _, gradients in results if (part := gradients[i]) is not None]
        parameter.grad = torch.stack(parts).mean(0) if parts else None
    return results[0][0], results[0][1]


def fit(
    name: str,
    model: nn.Module,
    *,
    loss: Callable[[Draw], tuple[Tensor, dict[str, float]]],
    schedule: Schedule,
    checkpoint: Path,
    seed: int,
    stop_after: int | None = None,
    workers: int = 1,
    upstream: Sequence[nn.Module | Tensor] = (),
) -> nn.Module:
    """Train `model` on `loss(draw) -> (loss, numbers to print)`; returns it (averaged if `schedule.ema`).

    Continues from `checkpoint` where that exists; `stop_after` steps of this call it saves and raises
    KeyboardInterrupt, as Ctrl-C would; `workers` threads share a step's shards. upstream: what else the loss is made
    with. ConfigError for a checkpoint of another schedule, seed, world, beginning of `model` or `upstream`.
    """
    from diffusers.training_utils import EMAModel

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    average = EMAModel(parameters, decay=schedule.ema, use_ema_warmup=True, power=0.75) if schedule.ema else None
    identity = {"name": name, "seed": seed, "steps": schedule.steps, "batch": schedule.batch, "lr": schedule.lr}
    identity["made_from"] = fingerprint(model, *upstream)  # the model as it begins: often a trained one
    begin = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["identity"] != identity:
            raise ConfigError(
                f"{checkpoint} belongs to {state['identity']}, this build is {identity}: "
                "delete it and those made from it, or change --output"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        begin = state["step"]
        print(f"[{name}] continues at step {begin} of {schedule.steps}", flush=True)

    def save(step: int) -> None:
        state: dict[str, Any] = {"identity": identity, "step": step, "model": model.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "average": average.state_dict() if average is not None else None}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(".tmp")
        torch.save(state, part)
        os.replace(part, checkpoint)

    pool = ThreadPoolExecutor(workers)
    started = saved = printed = time.monotonic()
    for step in range(begin, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        value, numbers = _gradients(
            parameters, loss, [draw_for(seed, name, step, i) for i in range(schedule.shards)], pool
        )
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average is not None:
            average.step(parameters)
        now, done, last = time.monotonic(), step + 1 - begin, step + 1 == schedule.steps
        if now - printed > 10 or last:
            speed = done / (now - started)
            more = " ".join(f"{key} {number:.4f}" for key, number in numbers.items())
            eta = (schedule.steps - step - 1) / speed / 60
            at = f"[{name}] {step + 1}/{schedule.steps} loss {value.item():.4f}"
            print(f"{at} {more} {speed:.2f} it/s ETA {eta:.1f} min", flush=True)
            printed = now
        if now - saved > schedule.save_seconds or last or done == stop_after:
            save(step + 1)
            saved = now
        if done == stop_after and not last:
            raise KeyboardInterrupt(f"{name} stopped after {done} steps as asked; run again to continue")
    if average is not None:
        average.copy_to(parameters)
    return model.eval().requires_grad_(False)
