"""Rows of results on disk are not made again; those of other settings must not pass for what is asked."""

from collections.abc import Mapping
from typing import Any


def refuse_other(row: Mapping[str, Any], **asked: Any) -> None:
    """SystemExit unless the row was made with what is asked."""
    if other := [f"{key} {row.get(key)} (asked: {value})" for key, value in asked.items() if row.get(key) != value]:
        which = ", ".join(str(row[key]) for key in ("reward", "setting", "run", "seed") if key in row)
        raise SystemExit(
            f"the stored row {which} was made with {', '.join(other)}: ask for the same, or remove the row from the "
            "JSON to make it anew"
        )
