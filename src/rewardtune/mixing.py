"""Base and tuned model mixed while a picture is sampled: the pipeline samples itself, its denoiser answers for both.

At each scheduler step i = 0 .. T-1 (0 = noisiest) the denoiser's output is w base + (1 - w) tuned, w the base's weight:
combined generation, w = 1 for the first n steps and 0 after them (the base model lays the picture out, the tuned one
finishes it), or annealed importance guidance (AIG), w = 1 - (i / T)^p. Like the engine's doors, this one sits on the
outermost call slot of the network, so no sampling loop is copied. Left out: text encoders (the tuned one serves both).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .engine import find_denoiser
from .engine.call import adapters_off
from .engine.doors import hold
from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The base model's weight at each step; exactly one of the two. Raises ConfigError.

    base_steps: combined generation, the first n steps are the base model's. 0: tuned alone; T and more: base alone.
    aig: the exponent p of w = 1 - (i / T)^p. 0: tuned alone; 1: the base's weight falls evenly; inf: base alone.
    """

    base_steps: int | None = None
    aig: float | None = None

    def __post_init__(self) -> None:
        if (self.base_steps is None) == (self.aig is None):
            given = "nothing" if self.aig is None else "both"
            raise ConfigError(f"a mix with the base model: {given} given; legal is one of base_steps and aig")
        if self.base_steps is not None and (isinstance(self.base_steps, bool) or self.base_steps < 0):
            raise ConfigError(f"base_steps={self.base_steps}: must be a number of steps, 0 or more")
        if self.aig is not None and not self.aig >= 0:
            raise ConfigError(f"aig={self.aig}: the exponent must be 0 or more (0: tuned alone, inf: base alone)")

    def base_weight(self, i: int, T: int) -> float:
        """w at step i of T."""
        if self.base_steps is not None:
            return float(i < self.base_steps)
        assert self.aig is not None
        return 1 - (i / T) ** self.aig  # 0^0 = 1: with p = 0 the first step is the tuned model's too


@contextmanager
def mixed(
    pipe: Any, mix: Mix, *, steps: int, denoiser: str | None = None, base: nn.Module | None = None
) -> Iterator[None]:
    """While this is open, `pipe(...)` samples with `mix`; everything is put back afterwards.

    steps: T, the scheduler's steps of one chain, as `engine.count_steps(pipe, ...)` gives it.
    base: the untuned network; None: the denoiser with its adapters off. Raises ConfigError where it has none.
    """
    name = find_denoiser(pipe, denoiser)
    network, scheduler = pipe.components[name], pipe.scheduler
    if base is None and not getattr(network, "peft_config", None):
        raise ConfigError(f"pipe.{name} carries no adapter, so there is no base model in it to mix with")
    inner = network._compiled_call_impl or network._call_impl
    step = 0

    def untuned(*args: Any, **kwargs: Any) -> Any:
        if base is not None:
            return base(*args, **kwargs)
        with adapters_off(network):
            return inner(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        weight = mix.base_weight(step, steps)
        if weight in (0, 1):
            return (untuned if weight else inner)(*args, **kwargs)
        own = inner(*args, **kwargs)
        return pytree.tree_map(lambda b, t: _blend(b, t, weight), untuned(*args, **kwargs), own)

    def counted(real: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        @functools.wraps(real)  # pipelines look for `eta`, `generator` and `timesteps` in the signature
        def stepped(*args: Any, **kwargs: Any) -> Any:
            nonlocal step
            step = 0 if first else step + 1
            return real(*args, **kwargs)

        return stepped

    with ExitStack() as stack:
        hold(stack, network, "_compiled_call_impl", call)
        hold(stack, scheduler, "set_timesteps", counted(scheduler.set_timesteps, first=True))
        hold(stack, scheduler, "step", counted(scheduler.step, first=False))
        yield


def _blend(base: Any, tuned: Any, weight: float) -> Any:
    if not isinstance(tuned, Tensor) or not tuned.is_floating_point():
        return tuned
    assert math.isfinite(weight)
    return weight * base + (1 - weight) * tuned
