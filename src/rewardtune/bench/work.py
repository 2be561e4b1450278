"""The missing cells of an experiment, dealt out to processes and devices; the learning rate chosen for each method."""

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..errors import CannotWrite
from ..progress import clock
from ..runfolder import write_text
from .cost import Cost
from .rows import Cell, Rows, timed_by
from .setting import Setting, method_of, setting_of


@dataclass(kw_only=True)
class Work:
    """Where results are, and who works.

    folder: of the setting's results; its rows.jsonl, cost.json and pictures are shared by all experiments.
    devices: one process each, e.g. ["cuda:0", "cuda:1"] or ["cpu", "cpu"]. given: in which the setting is not
    the one of its name, as options of the command. failed: the runs that an error ended, with the error.
    """

    setting: Setting
    folder: Path
    devices: tuple[str, ...] = ("cpu",)
    say: Callable[[str], None] = print
    given: str = ""
    rows: Rows = field(init=False)
    failed: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.rows = Rows(self.folder / "rows.jsonl")

    def picture(self, cell: Cell) -> Path:
        own = setting_of(cell.setting).budget
        budget = "" if cell.budget == own else f"_budget{cell.budget:g}"
        name = (
            f"{cell.reward}_{cell.method}_lr{cell.lr:g}_{cell.seed}{budget}".lower()
            .replace(" ", "-")
            .replace(",", "")
            .replace("+", "and")
        )
        return self.folder / "pictures" / f"{name}.png"

    def run_folder(self, cell: Cell) -> Path | None:
        """Where a long run is until its row is written; None: runs of this setting are not kept."""
        digest = hashlib.blake2b(cell.key.encode(), digest_size=8).hexdigest()
        return self.folder / "runs" / digest if self.setting.saves else None

    def stem(self, name: str) -> str:
        """Of the files of `name`: other seeds, another budget or grid than the setting's have a page of their own."""
        return name + self.given.replace(" --", "_").replace(" ", "-")

    def command(self, name: str) -> str:
        """What makes the page of `name` again."""
        return f"rewardtune bench {name} --setting {self.setting.name}{self.given}"

    def cost(self) -> Cost:
        """The setting's, so that a budget buys the same updates everywhere; else what is stored, or measured now."""
        if self.setting.cost is not None:
            return self.setting.cost
        path = self.folder / "cost.json"
        if not path.exists():
            self.say("measuring what a replay costs on this machine ...")
            with self._pool(self.devices[:1]) as pool:
                cost = pool.submit(_measure, self.setting.name, next(iter(self.setting.tasks))).result()
            write_text(path, json.dumps(asdict(cost), indent=2) + "\n")
        return Cost(**json.loads(path.read_text(encoding="utf-8")))

    def do(self, cells: Sequence[Cell]) -> None:
        """Run what is missing; every row is on disk as soon as it is there. One that an error ends is in `failed`.

        Raises CannotWrite, after what was running, where a row cannot be kept.
        """
        missing = self.rows.missing(cells)
        if not missing:
            return
        cost = self.cost()
        self._all([(cell, _run, (cell, cost, self._shown(cell), self.run_folder(cell))) for cell in missing])

    def each(self, cells: Sequence[Cell], measure: Callable[[Cell, str], dict[str, Any]]) -> None:
        """The same for rows that another function (cell, device) makes; it must be importable."""
        self._all([(cell, _call, (measure, cell)) for cell in self.rows.missing(cells)])

    def _all(self, asked: Sequence[tuple[Cell, Callable[..., dict[str, Any]], tuple[Any, ...]]]) -> None:
        try:
            self._deal(asked)
        except KeyboardInterrupt:
            self.say("interrupted: every row that was printed is kept, and the same command goes on from there")
            raise

    def _deal(self, asked: Sequence[tuple[Cell, Callable[..., dict[str, Any]], tuple[Any, ...]]]) -> None:
        if not asked:
            return
        self.say(f"runs that are missing: {len(asked)}; {len(self.devices)} at a time")
        waiting, failed = list(asked), list[str]()
        lost: CannotWrite | None = None
        running: dict[Future, Cell] = {}
        start = time.monotonic()
        with self._pool(self.devices) as pool:
            while waiting or running:
                while waiting and len(running) < len(self.devices):
                    cell, function, given = waiting[0]
                    try:
                        running[pool.submit(function, *given)] = cell
                    except BrokenProcessPool:  # a process died; that run says so itself
                        failed += [f"{cell}: not started" for cell, *_ in waiting]
                        waiting.clear()
                        break
                    self.say(f"started: {cell}")
                    del waiting[0]
                for job in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(job)
                    done = len(asked) - len(waiting) - len(running)
                    error = job.exception()
                    if error is None:
                        try:
                            self.rows.add(job.result())
                        except CannotWrite as refused:
                            error = refused
                    if error is not None:
                        failed.append(f"{cell}: {error}")
                        self.say(f"failed: {failed[-1]}")
                        if isinstance(error, CannotWrite):  # the next would be lost as well
                            lost = error
                            failed += [f"{other}: not started" for other, *_ in waiting]
                            waiting.clear()
                        continue
                    row = job.result()
                    if (folder := self.run_folder(cell)) is not None:
                        shutil.rmtree(folder, ignore_errors=True)
                        folder.with_suffix(".lock").unlink(missing_ok=True)
                    left = (time.monotonic() - start) / done * (len(asked) - done)
                    more = f"; about {clock(left)} to go" if left else ""
                    self.say(f"{done}/{len(asked)} {cell}: {self._told(cell, row)}{more}")
        self.failed += failed
        if lost is not None:
            raise CannotWrite(f"{lost}; {len(failed)} runs are missing, those before are kept")

    def _told(self, cell: Cell, row: dict[str, Any]) -> str:
        if "scores" not in row:
            return "done"
        if "broke" in row:
            return f"broke down after {row['updates']} updates: {row['broke']}"
        native = self.setting.tasks[cell.reward].native
        seconds = row.get(timed_by(row), 0.0)
        return f"{native} {row['scores'][native][0]:.4g} after {row['updates']} updates, {seconds:.0f} seconds"

    def choose(self, methods: Sequence[str], reward: str) -> None:
        """Run the searches for learning rates, until there is nothing more to look at."""
        tried = set[Cell]()
        while missing := set(self.rows.missing([c for m in methods for c in self.search(m, reward)])) - tried:
            tried |= missing
            self.do(sorted(missing, key=lambda cell: (methods.index(cell.method), cell.lr)))

    def search(self, method: str, reward: str) -> list[Cell]:
        """The runs that choose the learning rate of a method, as far as can be told now; none for a single rate.

        The middle two of the grid; then its next rate, as long as the best so far lies at the edge of what was tried.
        """
        cells = self._grid(method, reward)
        low, high = max(0, (len(cells) - 1) // 2), min(len(cells), len(cells) // 2 + 1)
        while all(self.rows.get(cell) is not None for cell in cells[low:high]):
            best = max(range(low, high), key=lambda k: self._reward(cells[k]), default=0)
            if best == low > 0:
                low -= 1
            elif best == high - 1 < len(cells) - 1:
                high += 1
            else:
                break
        return cells[low:high]

    def _reward(self, cell: Cell) -> float:
        """The trained reward on the search prompts; a run that broke down counts as the worst."""
        row = self.rows.get(cell)
        reward = math.nan if row is None else float(row["scores"]["reward"][0])
        return reward if math.isfinite(reward) else -math.inf

    def searched(self, method: str, reward: str) -> dict[float, float]:
        """Learning rate -> trained reward on the search prompts, of the runs that are there."""
        return {cell.lr: self._reward(cell) for cell in self._grid(method, reward) if self.rows.get(cell) is not None}

    def _grid(self, method: str, reward: str) -> list[Cell]:
        s = self.setting
        if len(s.lrs) < 2:
            return []
        base = Cell(
            setting=s.name, reward=reward, method=method, lr=0.0, seed=s.search_seed, T=s.T, budget=s.search_budget,
            judged="search", count=s.searched,
        )  # fmt: skip
        return [replace(base, lr=lr) for lr in s.lrs]

    def lr(self, method: str, reward: str) -> float | None:
        """The rate with the highest trained reward on the search prompts; None while runs of the search are missing."""
        cells = self.search(method, reward)
        if not cells:
            return self.setting.lrs[0]
        if self.rows.missing(cells):
            return None
        return max(cells, key=lambda cell: (self._reward(cell), cell.lr)).lr

    def cell(self, method: str, reward: str, seed: int, *, lr: float, T: int | None = None, **given: Any) -> Cell:
        """A final run. Options equal to the method's own are left out: one run has one row, whoever asks for it."""
        s = self.setting
        settings = {"T": T or s.T, "budget": s.budget, "count": s.count} | given
        cell = Cell(setting=s.name, reward=reward, method=method, lr=lr, seed=seed, **settings)
        own = cell.options and dict(cell.options) == method_of(method, cell.T)["options"]
        return replace(cell, options=()) if own else cell

    def _shown(self, cell: Cell) -> Path | None:
        s = self.setting
        table1 = cell == self.cell(cell.method, cell.reward, s.seeds[0], lr=cell.lr) and cell.judged == "final"
        return self.picture(cell) if table1 else None

    def _pool(self, devices: Sequence[str]) -> ProcessPoolExecutor:
        """One process a device; one BLAS thread each where several share a CPU."""
        context = get_context("spawn")
        queue = context.Queue()
        for device in devices:
            queue.put(device)
        if all(device == "cpu" for device in devices):
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ.setdefault(name, "1")
        return ProcessPoolExecutor(len(devices), mp_context=context, initializer=_start, initargs=(queue,))


_DEVICE = "cpu"  # of this worker process


def _start(queue: Any) -> None:
    global _DEVICE
    _DEVICE = queue.get()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    if _DEVICE == "cpu":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.stdout = open(os.devnull, "w")  # the runs' own words  # noqa: SIM115


def _leave_with(parent: int) -> None:
    """A worker whose command was killed ends as well, instead of finishing its run for nobody."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(cell: Cell, cost: Cost, pictures: Path | None, folder: Path | None) -> dict[str, Any]:
    from .cells import run_cell

    return run_cell(cell, cost, device=_DEVICE, pictures=pictures, folder=folder)


def _call(measure: Callable[[Cell, str], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    return measure(cell, _DEVICE)


def _measure(setting: str, reward: str) -> Cost:
    import tempfile

    from .cells import open_cell
    from .cost import measure
    from .setting import setting_of

    s = setting_of(setting)
    cell = Cell(setting=setting, reward=reward, method="DRTune", lr=1e-4, seed=0, T=s.T, budget=s.budget)
    with tempfile.TemporaryDirectory() as folder:
        _, tuner = open_cell(cell, folder=f"{folder}/run", device=_DEVICE)
        return measure(tuner)
