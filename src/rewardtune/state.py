"""What an update changes: the trained weights, the optimiser, the schedule, the average; saved and put back as one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .checkpoint import Checkpoint
from .optimizers import Ema, make_optimizer, make_schedule


class TrainingState:
    """The trained parameters of `denoiser` and everything that moves them.

    optimizer, schedule, warmup, ema: as in run files (`optim.*`); see optimizers.py.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        steps: int,
        lr: float,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup: int = 0,
        ema: float | None = None,
    ):
        self.named = {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(optimizer, self.parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self.schedule = make_schedule(schedule, self.optimizer, warmup=warmup, steps=steps)
        self.ema = Ema(self.parameters, decay=ema) if ema is not None else None

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self) -> None:
        """One step of the optimiser by what stands in `.grad`, and of all that follows it."""
        self.optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are evaluated and saved: the averages, where there are any."""
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            yield

    def settle(self) -> None:
        """The pipeline is left with the weights that were saved: the averages, where there are any."""
        if self.ema is not None:
            self.ema.take()

    def save(
        self, run: Path, step: int, facts: Mapping[str, Any], *, keep: int, best: int | None, also: Any = None
    ) -> Path:
        """checkpoint-`step` in `run`; `facts` are kept beside the state. See `checkpoint.save`."""
        tensors, plain = checkpoint.flatten_optimizer(self.optimizer, self.named.items())
        groups: dict[str, Mapping[str, torch.Tensor]] = {"adapter": self.named, "optimizer": tensors}
        if self.ema is not None:
            groups["ema"] = self.ema.state()
        state = {"optimizer": plain, "schedule": self.schedule.state_dict()} | dict(facts)
        return checkpoint.save(run, step, tensors=groups, state=state, keep=keep, best=best, also=also)

    def load(self, found: Checkpoint) -> None:
        """Everything as it was when `found` was saved.

        CheckpointError, and nothing changed, for another optimiser, other parameters or other shapes.
        """
        tensors = found.tensors("optimizer")
        checkpoint.unflatten_optimizer(self.optimizer, self.named.items(), tensors, found.state["optimizer"])
        self.load_weights(found)
        self.schedule.load_state_dict(found.state["schedule"])

    def load_weights(self, found: Checkpoint) -> None:
        """The trained weights and their averages alone."""
        averages = found.tensors("ema") if self.ema is not None else None
        checkpoint.restore(self.named, found.tensors("adapter"))
        if self.ema is not None and averages is not None:
            self.ema.load_state(averages)

    def slower(self, factor: float) -> None:
        """From here on the learning rate is `factor` times what the schedule says."""
        self.schedule.base_lrs = [factor * lr for lr in self.schedule.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
