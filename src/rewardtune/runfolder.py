"""The folder of one run: refuse a used one, write every file beside its place and rename it.

A reader of the folder (or a later run) therefore sees either the old file or the whole new one, never half of it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import ConfigError, RewardTuneError

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' `load_lora_weights` looks for
UNVERIFIED = "pytorch_lora_weights.unverified"
KNOWN = ("config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "train.log", "before_after.png")
REPLACED = (*KNOWN, LORA_FILE, UNVERIFIED)  # by --overwrite


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path in a new folder beside `path`; on success move it to `path`, on failure leave nothing.

    The temporary file carries the final name (some writers choose the format by the suffix).
    Raises RewardTuneError when the system refuses to write (disk full, no permission): the old file stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield folder / path.name
        os.chmod(folder / path.name, 0o666 & ~_umask())  # some writers (safetensors) keep theirs to the owner
        os.replace(folder / path.name, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunFolder:
    """`runs/NAME/`: config.yaml, run.json, metrics.jsonl, eval.jsonl, train.log, samples/, the LoRA file."""

    def __init__(self, path: str | Path, *, overwrite: bool = False, writes: bool = True):
        """Refuse a folder that holds something, unless `overwrite`. Writes nothing: `open()` does.

        writes: False in all processes but the first; their folder is a folder that nobody writes.
        """
        self.path, self.overwrite, self.started, self.writes = Path(path), overwrite, False, writes
        self.status: dict[str, Any] = {}
        if not writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output folder {self.path} is a file; choose another output_dir")
        used = self.path.is_dir() and any(self.path.iterdir())
        if overwrite and used and not (self.path / "run.json").is_file():
            raise ConfigError(f"output folder {self.path} holds no run to overwrite; choose another output_dir")
        if not overwrite and used:
            raise ConfigError(
                f"output folder {self.path} exists and is not empty; "
                "choose another output_dir, or pass --overwrite (overwrite=True) to replace its run"
            )

    def open(self) -> None:
        """Make the folder; with `overwrite`, remove what an earlier run left there (and nothing else)."""
        if self.started or not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in REPLACED:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "samples", ignore_errors=True)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.started = True

    def set_status(self, status: str, **facts: Any) -> None:
        """Replace run.json: `status` is running, done, stopped, interrupted or failed; `facts` add up."""
        self.status |= {"status": status, "time": datetime.now(UTC).isoformat(timespec="seconds")} | facts
        if not self.writes:
            return
        write_text(self.path / "run.json", json.dumps(self.status, indent=2) + "\n")

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one JSON line to `name` (metrics.jsonl, eval.jsonl)."""
        self._add(name, json.dumps(record, allow_nan=True) + "\n")

    def log(self, line: str) -> None:
        self._add("train.log", f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")

    def _add(self, name: str, text: str) -> None:
        if not self.writes:
            return
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:  # a full disk may have taken half a line: cut it off again
            with suppress(OSError):
                os.truncate(path, size)
            raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RewardTuneError:
    return RewardTuneError(
        f"cannot write {path}: {error.strerror or error}; nothing half-written was left and what was there is intact. "
        "Free some space (or choose another output_dir) and run again"
    )
