"""The frozen weights of a large denoiser, a share in each process (FSDP2); what is trained stays whole in all of them.

`fully_shard` gathers a block's weights for the moment of its call, in sampling, in replay and for the reference alike,
so the engine's doors see an ordinary network. The adapter is left out of it: its gradients are summed as ever
(`processes.py`), and checkpoints, averages and LoRA files know nothing of shards.
Left out: full fine-tuning (its optimiser's state would have to be sharded too), DoRA (a file that is loaded back reads
norms of whole weights, which no process has), quantised and compiled denoisers.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .errors import ConfigError


def home(pipe: Any, denoiser: nn.Module) -> torch.device:
    """The device that the pipeline works on: that of its other networks, since the denoiser may wait on the CPU."""
    others = (part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not denoiser)
    return next(
        (first.device for part in others if (first := next(part.parameters(), None)) is not None), _at(denoiser)
    )


def _at(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def sharers(among: bool | Literal["node"], world: int) -> int:
    """How many processes share one copy of the weights: all of them (True), or those of a machine ("node").

    Raises ConfigError where the launcher did not say how many a machine has, or not all have as many.
    """
    if among != "node":
        return world
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    local = int(told) if told.isdigit() else 0
    if local < 1 or world % local:
        raise ConfigError(
            f"memory.shard=node: {world} processes, LOCAL_WORLD_SIZE={told or 'not set'}: machines must run equally "
            "many, and the launcher say how many: use torchrun or accelerate launch, or memory.shard=true"
        )
    return local


def shard(
    denoiser: Any, trained: Sequence[nn.Parameter], device: torch.device, *, world: int, group: int | None = None
) -> None:
    """Leave 1 / `group` of every frozen weight of `denoiser` in this process, on `device`; all processes call it.

    group: processes that follow each other share one copy, e.g. those of a machine; a divisor of `world`, None: all.
    Block by block, so a denoiser that waits on the CPU never is on the device as a whole. `trained` goes there whole.
    From here on every process has to call the denoiser equally often. It cannot be undone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    group = group or world
    mesh = init_device_mesh(device.type, (world // group, group), mesh_dim_names=("copies", "shares"))["shares"]
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    ours = set(trained)
    names = {
        *(getattr(denoiser, "_repeated_blocks", None) or ()),
        *(getattr(denoiser, "_no_split_modules", None) or ()),
    }
    blocks = [part for part in denoiser.modules() if type(part).__name__ in names and part is not denoiser]
    for block in reversed(blocks):  # inner blocks before those that hold them
        fully_shard(block, mesh=mesh, ignored_params=ours)
    # by default what lies around the blocks stays gathered after a call, until one process alone saves (state_dict lets
    # go of it): then that process would gather again, and the others would not
    fully_shard(denoiser, mesh=mesh, ignored_params=ours, reshard_after_forward=True)


def held(denoiser: nn.Module) -> int:
    """How many weights lie in this process between two calls."""
    return sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in denoiser.parameters())


def check_even(batch: int, micro_batch: int, world: int) -> None:
    """ConfigError where the processes would call the denoiser unequally often: they would wait for ever."""
    chunks = -(-batch // micro_batch)
    if chunks % world:
        raise ConfigError(
            f"memory.shard: optim.batch={batch} in micro-batches of {micro_batch} makes {chunks}, which {world} "
            f"processes cannot share evenly; legal are multiples of {world}, e.g. optim.batch={world * micro_batch} "
            f"with optim.micro_batch={micro_batch}"
        )
