"""Several processes of one training: data parallel, one all-reduce of the trained parameters' gradients a step.

Every process holds the whole pipeline and the same parameters. The batch of an update is cut into micro-batches that
are dealt out in turn; what a sample sees depends on its index in the whole batch alone, so the number of processes
changes the time and, up to the order of a sum, nothing else. accelerate finds the devices and opens the process group.
`launch` starts the processes of one machine itself: torchrun, which accelerate uses, answers a Ctrl-C with a second one
to every process, and an error with its own traceback. See docs/processes.md.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from .errors import (
    BrokenPictures,
    ConfigError,
    PreflightError,
    ReplayError,
    RewardError,
    RewardTuneError,
    TrainingStopped,
    out_of_memory,
)

T = TypeVar("T")
FIRST_SAVES, OTHERS_END = 30.0, 3.0  # seconds left to the first process, and to the others, when one has failed


class ProcessLostError(RewardTuneError):
    """Another process has ended (exit code 6): the reason is what that one said."""

    exit_code = 6


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are; (0, 1) without a launcher.

    sharded: each holds a share of the denoiser's weights, so all have to call it equally often (sharding.py).
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes the folder of the run and speaks."""
        return self.rank == 0

    def mine(self, chunks: Sequence[T]) -> list[T]:
        """This process's share of the micro-batches."""
        return list(chunks[self.rank :: self.world])

    def padded(self, own: Sequence[T], chunks: Sequence[T]) -> list[T]:
        """`own`, this process's share of `chunks`; if sharded, filled up to the length of the largest share."""
        most = -(-len(chunks) // self.world) if self.sharded else 0
        return [*own, *[chunks[0]] * max(0, most - len(own))]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their numbers."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values: list[Any] = [value]
        with _together():
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
            with _together():
                dist.all_reduce(flat)
            for grad, summed in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads), strict=True):
                grad.copy_(summed)

    def raise_together(self, error: BaseException | None) -> None:
        """All processes raise if one of them met an error: the others would wait for it for ever."""
        for rank, met in enumerate(self.gather(None if error is None else _portable(error))):
            if met is not None:
                raise error if error is not None else _told(rank, met)


@contextmanager
def _together() -> Iterator[None]:
    """The library's words for a lost connection mean that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProcessLostError(f"another process of this run has ended ({said})") from error


def _portable(error: BaseException) -> tuple[str, str, list[str]]:
    kind = "OutOfMemoryError" if out_of_memory(error) else type(error).__name__
    return kind, str(error), getattr(error, "__notes__", [])


def _told(rank: int, met: tuple[str, str, list[str]]) -> Exception:
    """What another process met: of the same kind where the kind decides what follows."""
    import torch

    own = (TrainingStopped, BrokenPictures, ConfigError, PreflightError, RewardError, ReplayError)
    kinds: dict[str, type[Exception]] = {kind.__name__: kind for kind in (*own, torch.OutOfMemoryError)}
    kind, words, notes = met
    unnamed = "" if kind in kinds or kind == "RewardTuneError" else f"{kind}: "
    error = kinds.get(kind, RewardTuneError)(f"process {rank}: {unnamed}{words or kind}")
    for note in notes:
        error.add_note(note)
    return error


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

    On one machine by `start`. With `extra` (--num_machines, --machine_rank, --main_process_ip ...: `count` is the
    number over all machines then) through `accelerate launch`; on the CPU through torch.distributed.run with gloo,
    since accelerate launches CPU processes by MPI alone.
    """
    if not extra:
        return start(count, ["-m", "rewardtune", *arguments], cpu=cpu)
    environment = _environment(cpu)
    if cpu:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *extra, "-m", "rewardtune"]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        command += [*extra, "--module", "rewardtune"]
    return subprocess.call([*command, *arguments], env=environment)


def _environment(cpu: bool) -> dict[str, str]:
    if not cpu:
        return dict(os.environ)
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # as torchrun has it: the processes share the cores
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": threads}


def start(count: int, arguments: Sequence[str], *, cpu: bool) -> int:
    """`python ARGUMENTS` in `count` processes of this machine; gives the exit code, 128 + N for signal N.

    The first process speaks. The others are quiet, unless one of them failed alone: then its last words are printed.
    Ctrl-C, SIGTERM and the terminal's end are passed on, once each time. When a process fails the others have a moment
    to save, and end.
    """
    place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(_free_port())
    environment = _environment(cpu) | place
    with tempfile.TemporaryFile() as quiet:
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else quiet,
                start_new_session=True,  # the terminal's Ctrl-C comes to this process alone, which passes it on
            )
            for rank in range(count)
        ]
        with _passed_on(processes):
            failed = _failed(processes)
        if not failed:
            return 0
        rank = next((rank for rank, code in failed.items() if code != ProcessLostError.exit_code), 0)
        code = failed.get(rank, 1)
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; was the main memory full?" if name == "SIGKILL" else ""
            print(f"rewardtune: process {rank} of {count} was ended by {name}{hint}", file=sys.stderr)
            return 128 - code
        if failed.get(0, ProcessLostError.exit_code) != ProcessLostError.exit_code:  # the first process has said it
            return failed[0] if failed[0] > 0 else code
        print(f"rewardtune: process {rank} of {count} failed; its last words:", file=sys.stderr)
        print(_last_words(quiet), file=sys.stderr)
        return code


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _passed_on(processes: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    """Ctrl-C and SIGTERM go to all processes, which know what to do; no process outlives the block.

    So does the end of the terminal, as SIGTERM: they are in sessions of their own and would not hear of it.
    """
    hangup = getattr(signal, "SIGHUP", None)

    def send(number: int, _frame: object) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if number == hangup else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(hangup)
    before: Mapping[int, Any] = {number: signal.signal(number, send) for number in numbers}
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _failed(processes: "Sequence[subprocess.Popen[bytes]]") -> dict[int, int]:
    """Wait for all; rank -> exit code of those that failed by themselves, in the order in which they did.

    After the first failure the others get a moment: the first process to save what it has, the rest to end.
    """
    failed: dict[int, int] = {}
    limits = [float("inf")] * len(processes)
    running = set(range(len(processes)))
    while running:
        for rank in sorted(running):
            code = processes[rank].poll()
            if code is not None:
                running.discard(rank)
                if code:
                    failed[rank] = code
                    moment = FIRST_SAVES if 0 in running else OTHERS_END
                    limits = [min(limit, time.monotonic() + moment) for limit in limits]
        for rank in [rank for rank in running if time.monotonic() > limits[rank]]:
            processes[rank].kill()
            processes[rank].wait()
            running.discard(rank)
        time.sleep(0.02)
    return failed


def _last_words(file: BinaryIO, *, lines: int = 12) -> str:
    file.seek(0)
    said = file.read().decode("utf-8", "replace").strip().splitlines()
    return "\n".join(said[-lines:])
