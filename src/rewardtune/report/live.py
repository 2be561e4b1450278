"""report.html of a run that trains: at its looks and in between, for at most a small share of the time, and at its end.

A page that cannot be written is no reason to lose a training: it is a line in the log, and the run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..runfolder import RunFolder

SHARE = 0.005  # of the run's time that may go into the page while it trains
EVERY = 60.0  # seconds after which an update is shown without a look


class LiveReport:
    """Writes the page of one run. say: where a failure is told. clock: seconds, for tests."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        enabled: bool,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.folder, self.say, self.clock = folder, say, clock
        self.enabled = enabled and folder.writes
        self.spent, self.latest, self.started, self.told = 0.0, 0.0, clock(), False
        self.written = self.started

    def look(self) -> None:
        """After a look: write the page, unless that took more than SHARE of the time so far. The first is free."""
        if self.latest and self.spent + self.latest > SHARE * (self.clock() - self.started):
            return
        self._write()

    def update(self) -> None:
        """After an update: the same, but EVERY seconds apart."""
        if self.clock() - self.written >= EVERY:
            self.look()

    def finish(self) -> None:
        """The run has ended, however it did: the page says so, and refreshes no more."""
        from .pictures import forget

        self._write()
        forget()

    def _write(self) -> None:
        if not self.enabled or not (self.folder.path / "run.json").is_file():
            return
        from . import write_report

        started = self.clock()
        try:
            write_report([self.folder.path])
        except Exception as error:
            if not self.told:
                self.say(f"warning: report.html was not written ({type(error).__name__}: {error}); the run goes on")
            self.told = True
        self.written = self.clock()
        self.latest = self.written - started
        self.spent += self.latest
