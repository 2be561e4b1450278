"""Several processes of one training: data parallel, one all-reduce of the trained parameters' gradients a step.

Every process holds the whole pipeline and the same parameters. The batch of an update is cut into micro-batches that
are dealt out in turn; what a sample sees depends on its index in the whole batch alone, so the number of processes
changes the time and, up to the order of a sum, nothing else. accelerate finds the devices and opens the process group.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import ConfigError, RewardTuneError, TrainingStopped

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are; (0, 1) without a launcher."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the folder of the run and speaks."""
        return self.rank == 0

    def mine(self, chunks: Sequence[T]) -> list[T]:
        """This process's share of the micro-batches."""
        return list(chunks[self.rank :: self.world])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their numbers."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum_gradients(self, parameters: Sequence[Any]) -> None:
        """`.grad` becomes the sum over all processes, in one all-reduce for each dtype; none counts as zero."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        by_dtype: dict[Any, list[Any]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat)
            for grad, summed in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads), strict=True):
                grad.copy_(summed)

    def raise_together(self, error: BaseException | None) -> None:
        """All processes raise if one of them met an error: the others would wait for it for ever."""
        for rank, met in enumerate(self.gather(None if error is None else _portable(error))):
            if met is not None:
                raise error if error is not None else _told(rank, met)


def _portable(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _told(rank: int, met: tuple[str, str]) -> RewardTuneError:
    kinds = {kind.__name__: kind for kind in (TrainingStopped, ConfigError)}
    return kinds.get(met[0], RewardTuneError)(f"process {rank}: {met[1] or met[0]}")


def join() -> Processes:
    """The process group that the launcher prepared (its environment variables), or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
    return Processes(state.process_index, state.num_processes)


def on_cpu(device: str) -> bool:
    """Whether a run on `device` (as in run files) computes on the CPU."""
    if device != "auto":
        return device.startswith("cpu")
    import torch

    return not torch.cuda.is_available()


def launched() -> bool:
    """Whether a launcher (this one, accelerate, torchrun) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(count: int, arguments: Sequence[str], *, cpu: bool, extra: Sequence[str] = ()) -> int:
    """Run `rewardtune ARGUMENTS` in `count` processes and wait; gives the exit code.

    On GPUs through `accelerate launch`, to which `extra` is passed on (--num_machines, --machine_rank,
    --main_process_ip ...: `count` is the number over all machines then). On the CPU through torch.distributed.run with
    gloo, since accelerate launches CPU processes by MPI alone.
    """
    environment = dict(os.environ)
    if cpu:
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *extra, "-m", "rewardtune"]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        command += [*extra, "--module", "rewardtune"]
    return subprocess.call([*command, *arguments], env=environment)
