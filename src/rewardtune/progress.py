"""The run on the screen: a bar in a terminal, one plain line an interval otherwise."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, Self


def clock(seconds: float) -> str:
    """h:mm:ss, without hours that are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def digits(value: float) -> str:
    """Four significant digits, and no exponent for large numbers."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_interval(mean: float, half: float) -> str:
    """`0.25 ± 0.01`; the mean alone where a single value has no interval."""
    return digits(mean) if math.isnan(half) else f"{digits(mean)} ± {digits(half)}"


class Progress:
    """Shows reward, its parts, gradient norm, seconds per step and the time left.

    total: the run's updates; done: how many of them an earlier part of the run made; max_seconds: the time budget of
    this part, if any; every: seconds between plain lines; log: takes these lines too, on the screen or not.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        max_seconds: float | None = None,
        every: float = 10.0,
        enabled: bool = True,
        log: Callable[[str], None] | None = None,
    ):
        self.total, self.max_seconds, self.every, self.enabled, self.log = total, max_seconds, every, enabled, log
        self.begun, self.done, self.started, self.smooth = done, done, time.monotonic(), 0.0
        self.spoken, self.pending = -every, ""  # when the latest plain line was given; what came after it
        self.bar: Any = None
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            whole = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # narrow terminals lose the end of the line
            self.bar = Bar(BarColumn(12), TextColumn("{task.description}", table_column=whole), expand=True)
            self.task = self.bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._plain(self.pending)  # the last update before a stop
        if self.bar:
            self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self.done += 1
        self.smooth = record["seconds"] if self.done == self.begun + 1 else 0.9 * self.smooth + 0.1 * record["seconds"]
        reward = digits(record["reward"])
        natives = {name: digits(value) for name, value in record["parts"].items()}
        shown = natives if list(natives.values()) != [reward] else {}  # a single part that is the reward itself
        shown |= {name: digits(record[name]) for name in ("kl", "denoise") if name in record}
        parts = "".join(f", {name} {value}" for name, value in shown.items())
        elapsed = time.monotonic() - self.started
        step = str(self.done) if self.max_seconds else f"{self.done}/{self.total}"
        text = f"step {step}, {clock(self.left())} left, {self.smooth:.2f} s/step"
        text += f" | reward {reward}{parts} | grad {record['grad_norm']:.3g}"
        if self.bar:
            share = max(self.done / self.total, elapsed / self.max_seconds if self.max_seconds else 0.0)
            self.bar.update(self.task, completed=min(share, 1.0), description=text)
        self.pending = text
        if elapsed - self.spoken >= self.every or self.done == self.total:
            self.spoken = elapsed
            self._plain(text)

    def _plain(self, text: str) -> None:
        """`text` as a line of the log, and of the screen where there is no bar."""
        if text and self.log:
            self.log(text)
        if text and self.enabled and not self.bar:
            print(text, flush=True)
        self.pending = ""

    def left(self) -> float:
        """Seconds to the end: the remaining updates at the present pace, or the rest of the budget if that is less."""
        by_steps = (self.total - self.done) * self.smooth
        if self.max_seconds is None:
            return by_steps
        return max(0.0, min(by_steps, self.max_seconds - (time.monotonic() - self.started)))

    def message(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)
