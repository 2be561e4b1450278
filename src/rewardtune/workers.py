"""CPU helpers: forked copies of this process, each on one thread, that compute micro-batches of the same update.

Small networks gain little from BLAS threads: one process a core is faster. The trained parameters lie in shared memory,
so a helper sees every update; it answers with its gradients in shared memory too. Linux only (fork), CPU only, and for
one machine: training over several GPUs is another thing.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, RewardTuneError
from .gradient import Gradient, Part


class Workers:
    """`count` processes share the micro-batches, this one included. With count = 1 nothing is forked."""

    def __init__(self, gradient: Gradient, helpers: list[tuple[Connection, list[Tensor]]]):
        self.gradient, self.helpers = gradient, helpers

    def compute(self, step: int) -> list[Part]:
        """All micro-batches of update `step`: the gradient stands in `.grad`, the parts in the order of the batch."""
        chunks, count = self.gradient.chunks(), 1 + len(self.helpers)
        for number, (connection, _) in enumerate(self.helpers, start=1):
            try:
                connection.send((step, chunks[number::count]))
            except OSError as error:
                raise _ended(number) from error
        own = [self.gradient.add(step, first) for first in chunks[::count]]
        parts = dict(zip(chunks[::count], own, strict=True))
        for number, (connection, grads) in enumerate(self.helpers, start=1):
            try:
                answer = connection.recv()
            except EOFError as error:
                raise _ended(number) from error
            if isinstance(answer, RewardTuneError):
                raise answer
            if isinstance(answer, str):
                raise RuntimeError(f"helper process {number}: {answer}")
            parts |= zip(chunks[number::count], answer, strict=True)
            for parameter, grad in zip(self.gradient.parameters, grads, strict=True):
                parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad
        return [parts[first] for first in chunks]


@contextmanager
def open_workers(gradient: Gradient, count: int) -> Iterator[Workers]:
    """Fork count - 1 helpers for the time of the block, in which every process computes on one BLAS thread."""
    threads = torch.get_num_threads()
    if count > 1:
        torch.set_num_threads(1)  # before the fork: forks inherit no thread pool
    context, processes = multiprocessing.get_context("fork"), []
    helpers: list[tuple[Connection, list[Tensor]]] = []
    if count > 1:
        for parameter in gradient.parameters:
            parameter.data.share_memory_()
    for _ in range(count - 1):
        ours, theirs = context.Pipe()
        grads = [torch.zeros_like(parameter).share_memory_() for parameter in gradient.parameters]
        inherited = [connection for connection, _ in helpers] + [ours]
        process = context.Process(target=_serve, args=(gradient, theirs, grads, inherited), daemon=True)
        process.start()
        theirs.close()
        helpers.append((ours, grads))
        processes.append(process)
    try:
        yield Workers(gradient, helpers)
    finally:
        for connection, _ in helpers:
            connection.close()  # a helper ends when its pipe does
        for process in processes:
            process.join(timeout=10)
        torch.set_num_threads(threads)


def refuse_workers(count: int, device: str) -> None:
    """ConfigError where helpers cannot be forked."""
    if count > 1 and (sys.platform != "linux" or device != "cpu"):
        raise ConfigError(f"workers={count}: helper processes are for the CPU on Linux; use workers=1")


def _ended(number: int) -> RewardTuneError:
    return RewardTuneError(f"helper process {number} ended unexpectedly (out of memory?)")


def _serve(gradient: Gradient, connection: Connection, grads: list[Tensor], inherited: list[Connection]) -> None:
    """A helper's life: (step, micro-batches) in; gradients to shared memory, parts or the error out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    while True:
        try:
            step, chunks = connection.recv()
        except EOFError:
            os._exit(0)
        answer: Any
        try:
            for parameter in gradient.parameters:
                parameter.grad = None
            answer = [gradient.add(step, first) for first in chunks]
            for parameter, grad in zip(gradient.parameters, grads, strict=True):
                grad.zero_() if parameter.grad is None else grad.copy_(parameter.grad)
        except RewardTuneError as error:
            answer = error
        except Exception as error:  # an exception of another library may not survive the pipe: its text does
            answer = f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)  # the parent is gone, and has said why
