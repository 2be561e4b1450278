"""The run on the screen: a bar in a terminal, one plain line an interval otherwise."""

import sys
import time
from typing import Any, Self


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows reward, its parts, gradient norm, seconds per step and the time left.

    total: updates asked for; max_seconds: the time budget, if any; every: seconds between plain lines.
    """

    def __init__(self, total: int, *, max_seconds: float | None = None, every: float = 10.0, enabled: bool = True):
        self.total, self.max_seconds, self.every, self.enabled = total, max_seconds, every, enabled
        self.done, self.started, self.shown, self.smooth = 0, time.monotonic(), -every, 0.0
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
        if self.bar:
            self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self.done += 1
        self.smooth = record["seconds"] if self.done == 1 else 0.9 * self.smooth + 0.1 * record["seconds"]
        several = record["parts"].items() if len(record["parts"]) > 1 else ()
        parts = "".join(f", {name} {value:.3f}" for name, value in several)
        elapsed = time.monotonic() - self.started
        step = str(self.done) if self.max_seconds else f"{self.done}/{self.total}"
        text = f"step {step}, {_clock(self.left())} left, {self.smooth:.2f} s/step"
        text += f" | reward {record['reward']:.3f}{parts} | grad {record['grad_norm']:.3g}"
        if self.bar:
            share = max(self.done / self.total, elapsed / self.max_seconds if self.max_seconds else 0.0)
            self.bar.update(self.task, completed=min(share, 1.0), description=text)
        elif self.enabled and (elapsed - self.shown >= self.every or self.done == self.total):
            self.shown = elapsed
            print(text, flush=True)

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
