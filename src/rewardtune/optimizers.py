"""Optimisers, learning-rate schedules and the running average of the trained weights: all the libraries' own."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .spelling import nearest

OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW with 8-bit moments: 2 bytes a parameter in place of 8 (CUDA; extra `optim`)",
    "prodigy": "Prodigy: finds the step size itself, lr=1.0 (extra `optim`)",
}
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimiser of OPTIMIZERS by `name`; ConfigError for an unknown one and where its extra is missing.

    lr: the step size; for prodigy a factor on the step size it finds, so 1.0 there (Mishchenko and Defazio 2023).
    """
    settings: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if name == "adamw8bit":
        _need("bitsandbytes", name, extra="optim")
        if any(parameter.device.type == "cpu" for parameter in parameters):
            raise ConfigError("optim.optimizer=adamw8bit is for CUDA devices; use adamw on the CPU")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    if name == "prodigy":
        _need("prodigyopt", name, extra="optim")
        if lr < 0.1:
            raise ConfigError(
                f"optim.lr={lr} with prodigy: here it is a factor on the step size that prodigy finds; use lr=1.0"
            )
        from prodigyopt import Prodigy

        return Prodigy(parameters, **settings, decouple=True, safeguard_warmup=True, use_bias_correction=True)
    raise ConfigError(f"optim.optimizer={name!r}{nearest(name, OPTIMIZERS)}; legal are {', '.join(OPTIMIZERS)}")


def _need(module: str, name: str, *, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"optim.optimizer={name} needs {module}, which is not installed: pip install 'rewardtune[{extra}]'"
        )


def make_schedule(name: str, optimizer: torch.optim.Optimizer, *, warmup: int = 0, steps: int) -> Any:
    """The learning rate over `steps` updates: rising linearly over the first `warmup`, then as `name` says.

    It is diffusers' own schedule; call its `step()` once after each `optimizer.step()`. In constant, warmup included,
    update k (from 0) has lr * min(1, k / warmup); linear, cosine and polynomial go to (nearly) 0 at `steps`.
    Raises ConfigError for an unknown name, and for a warmup that fills the run.
    """
    from diffusers.optimization import get_scheduler

    if name not in SCHEDULES:
        raise ConfigError(f"optim.schedule={name!r}{nearest(name, SCHEDULES)}; legal are {', '.join(SCHEDULES)}")
    if not 0 <= warmup < steps:
        raise ConfigError(f"optim.warmup={warmup}: must be at least 0 and less than optim.steps={steps}")
    kind = "constant_with_warmup" if name == "constant" and warmup else name
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


class Ema:
    """Exponential moving average of `parameters`: after each update, average <- decay * average + (1 - decay) * now.

    It starts at the parameters as they are. diffusers' EMAModel does the work, with the ramp of its decay switched off:
    by itself it copies at the first update and uses (1 + t) / (10 + t) for the decay after that.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, decay: float):
        """ConfigError unless 0 < decay < 1."""
        from diffusers.training_utils import EMAModel

        if not 0 < decay < 1:
            raise ConfigError(f"optim.ema={decay}: must lie between 0 and 1, for example 0.999; null for none")
        self.parameters = list(parameters)
        self.decay = float(decay)
        self._model = EMAModel(self.parameters, decay=self.decay, min_decay=self.decay, update_after_step=-1)

    def update(self) -> None:
        """Once after each `optimizer.step()`."""
        self._model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages in the block, and their own values after it, also on an exception."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._model.copy_to(self.parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, own, strict=True):
                    parameter.copy_(value)

    def take(self) -> None:
        """The parameters become the averages."""
        self._model.copy_to(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """The averages by position, for a checkpoint: {"0": ..., "1": ...}; copies, on the CPU."""
        averages = self._model.shadow_params
        return {str(index): value.detach().cpu().clone() for index, value in enumerate(averages)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take `state()` of a checkpoint back; ConfigError when it belongs to other parameters."""
        shapes = {str(index): tuple(value.shape) for index, value in enumerate(self.parameters)}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if given != shapes:
            raise ConfigError(
                f"the saved averages ({len(given)} tensors) are not those of the trained parameters ({len(shapes)} "
                "tensors, or other shapes): resume with the adapter settings of the run"
            )
        for index, average in enumerate(self._model.shadow_params):
            average.copy_(state[str(index)])
