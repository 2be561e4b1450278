"""Rows of results on disk are not made again; those of other settings must not pass for what is asked."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def refuse_other(row: Mapping[str, Any], **asked: Any) -> None:
    """SystemExit unless the row was made with what is asked."""
    if other := [f"{key} {row.get(key)} (asked: {value})" for key, value in asked.items() if row.get(key) != value]:
        which = ", ".join(str(row[key]) for key in ("reward", "setting", "run", "seed") if key in row)
        raise SystemExit(
            f"the stored row {which} was made with {', '.join(other)}: ask for the same, or remove the row from the "
            "JSON to make it anew"
        )


def completed(
    file: Path,
    tune: Callable[..., dict[str, Any]],
    *,
    key: str,
    names: Sequence[str],
    seeds: Sequence[int],
    made_with: Callable[[str], Mapping[str, Any]],
    processes: int | None = None,
    **given: Any,
) -> list[dict[str, Any]]:
    """The rows of `file`, with those that it lacks: `tune(name, seed, **given)`, one a core, written as they are made.

    key: where a row has its name. made_with: what a stored row of a name must have been made with; SystemExit if not.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run a core
    rows = json.loads(file.read_text()) if file.exists() else []
    for row in rows:
        refuse_other(row, **made_with(row[key]))
    done = {(row[key], row["seed"]) for row in rows}
    jobs = [(name, seed) for seed in seeds for name in names if (name, seed) not in done]
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for run in [pool.submit(tune, name, seed, **given) for name, seed in jobs]:
            rows.append(run.result())
            part = file.with_suffix(".tmp")
            part.write_text(json.dumps(rows, indent=1) + "\n")
            part.replace(file)
            print(rows[-1], flush=True)
    return rows
