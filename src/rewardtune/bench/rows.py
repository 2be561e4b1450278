"""The rows on disk: one JSON line for every run, found again by what was asked of it.

Lines are appended whole, so several commands may write one file. What stands there when a command starts is not run
again; what another is only just running is, where the two ask for the same cells.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..runfolder import append


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one run is asked for; equal cells are one row.

    method: by name (`setting.method_of`). judged: "final" prompts, or those of the "search" for a learning rate.
    count: prompts judged on at the end. updates: a fixed number of them instead of the budget.
    """

    setting: str
    reward: str
    method: str
    lr: float
    seed: int
    T: int
    budget: float
    judged: str = "final"
    count: int = 400
    updates: int | None = None
    options: tuple[tuple[str, Any], ...] = ()  # of the method, in place of those that go by its name

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.reward}, {self.method}{options}, T={self.T}, lr {self.lr:g}, seed {self.seed}, {self.judged}"


class Rows:
    """The rows of one file, by cell. Raises ConfigError for a line that is none, and a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): restore it, or move it away") from error
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self._found[Cell(**row["cell"]).key] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number} is no row of results ({error}): restore or remove the line, or take the "
                    "rewardtune that wrote it"
                ) from error

    def add(self, row: dict[str, Any]) -> None:
        append(self.path, json.dumps(row) + "\n")
        self._found[_key(row["cell"])] = row

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell; of a run judged on more prompts, with its scores on the first `count` of them."""
        row = self._found.get(_key(asdict(cell)))
        if row is not None:
            return row
        longer = (row for row in self if str(cell.count) in row.get("first", {}) and _judged_alike(row["cell"], cell))
        return next(({**row, "scores": row["first"][str(cell.count)]} for row in longer), None)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        return list({cell.key: cell for cell in cells if self.get(cell) is None}.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._found.values())


def timed_by(row: dict[str, Any]) -> str:
    """Where a row's time stands: the processor's on a CPU, whose cores runs share; by the wall on a GPU."""
    return "cpu_seconds" if row.get("on", {}).get("device", "CPU").partition(" (")[0].endswith("CPU") else "seconds"


def made_by(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines for the foot of a page: the versions and machines that made its rows, each once; none without rows."""
    rows = list(rows)
    told = [", ".join(f"{k} {v}" for k, v in row["on"].items()) if "on" in row else "not recorded" for row in rows]
    costs = dict.fromkeys(json.dumps(row["cost"]) for row in rows if "cost" in row)
    mixed = [f"**Rows of different costs of a replay, so of different numbers of updates: {'; '.join(costs)}.**"]
    return (
        ["", f"Rows made with: {'; '.join(dict.fromkeys(told))}.", *(mixed if len(costs) > 1 else [])] if told else []
    )


def _judged_alike(found: dict[str, Any], cell: Cell) -> bool:
    """Equal but for the number of prompts."""
    return _key({**found, "count": cell.count}) == _key(asdict(cell))


def _key(cell: dict[str, Any]) -> str:
    """The same for a cell and for its JSON (tuples become lists there)."""
    return json.dumps(cell, sort_keys=True)
