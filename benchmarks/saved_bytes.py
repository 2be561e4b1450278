"""Counts the bytes that autograd keeps for backward, inside one network and outside of it. Works on any device."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class SavedBytes:
    """Context manager; ``peak[True]`` is the peak inside ``network``, ``peak[False]`` outside, in bytes.

    Weights are saved by reference and cost nothing, so they are not counted.
    """

    def __init__(self, network: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.inside = False
        self.live, self.peak = {True: 0, False: 0}, {True: 0, False: 0}
        self.handles = [
            network.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            network.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _pack(self, x: Tensor) -> "_Box":
        box, where = _Box(x), self.inside
        size = 0 if x.untyped_storage().data_ptr() in self.weights else x.numel() * x.element_size()
        self.live[where] += size
        self.peak[where] = max(self.peak[where], self.live[where])
        weakref.finalize(box, self._free, where, size)
        return box

    def _free(self, where: bool, size: int) -> None:
        self.live[where] -= size


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
