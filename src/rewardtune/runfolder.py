"""The folder of one run: refuse a used one, write every file beside its place and rename it.

A reader of the folder (or a later run) therefore sees either the old file or the whole new one, never half of it.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import CannotWrite, ConfigError

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' `load_lora_weights` looks for
DENOISER_FOLDER = "denoiser"  # of full fine-tuning
DENOISING_FILE = "denoising.safetensors"  # the clean latents of the denoising loss
UNVERIFIED = "pytorch_lora_weights.unverified"
EVALS = ("eval", "sweep")  # folders of `rewardtune eval`, `compare` and `sweep`
KNOWN = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "eval.jsonl",
    "train.log",
    "before_after.png",
    "report.html",
    "sweep.json",
    "sweep.png",
)
LOGS = ("metrics.jsonl", "eval.jsonl")  # one JSON line each time; a resume cuts them to the checkpoint's length
CUT = "cut"  # what a resume set aside
TRACKERS = "logs"  # what the trackers keep
EXPORT, RECEIPT = "export", "export.json"  # where `export` writes, and what lies in every folder that it has written
# removed by --overwrite; run.json last: a folder that still has it can be overwritten again after a kill
REPLACED = (*(name for name in (*KNOWN, LORA_FILE, UNVERIFIED, DENOISING_FILE) if name != "run.json"), "run.json")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path in a new folder beside `path`; on success move it to `path`, on failure leave nothing.

    The temporary file carries the final name (some writers choose the format by the suffix).
    Raises CannotWrite when the system refuses to write (disk full, no permission): the old file stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield folder / path.name
        os.chmod(folder / path.name, 0o666 & ~umask())  # some writers (safetensors) keep theirs to the owner
        os.replace(folder / path.name, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_place(folder: Path, option: str = "output_dir") -> None:
    """ConfigError where the folder is not there and cannot be made, or may not be written to; before the work."""
    above = next((p for p in (folder, *folder.absolute().parents) if os.path.lexists(p)), folder)
    begin = f"output folder {folder}" + ("" if above == folder else f" cannot be made: {above}")
    if not above.is_dir():
        raise ConfigError(f"{begin} is a file, not a folder; choose another {option}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{begin} is not writable; choose another {option}")


def refuse_other(path: Path, mark: str, what: str) -> None:
    """ConfigError where something is at `path` that does not hold `mark`: none of ours, so writing would lose it."""
    if not os.path.lexists(path) or os.path.isdir(path):  # a folder is refused when it is written
        return
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else None
    except OSError as error:
        raise ConfigError(f"{path} exists and cannot be read ({error}); give another name") from error
    if text is None or (text and mark not in text):
        raise ConfigError(f"{path} exists and is no {what} of rewardtune; give another name, or remove it")


def append(path: Path, text: str) -> None:
    """Add `text` to a file; CannotWrite where the system refuses, and then nothing of it is left there."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # a full disk may have taken half a line: cut it off again
        with suppress(OSError):
            os.truncate(path, size)
        raise cannot_write(path, error) from error


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def storable(value: Any) -> bool:
    """Whether JSON gives it back: numbers, texts, and lists and mappings of them."""
    if isinstance(value, list | tuple):
        return all(map(storable, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(storable, value.values()))
    return isinstance(value, int | float | str)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl or eval.jsonl; none where it is missing. A half-written line is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            record = json.loads(line)
            found += [record] if isinstance(record, dict) else []
    return found


def checkpoint_folders(run: Path) -> dict[int, Path]:
    """step -> folder checkpoint-N of `run`; other names (checkpoint-abc, checkpoint-007) are not looked at."""
    if not run.is_dir():
        return {}
    found = ((re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name), path) for path in run.iterdir())
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def remove_leftovers(run: Path, prefix: str = "") -> None:
    """Remove the hidden temporary folders that a killed process left. Only for the process that writes the run."""
    for path in list(run.rglob(f".{prefix}*.tmp")):
        if _is_leftover(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp") and path.is_dir()


class RunFolder:
    """`runs/NAME`: config.yaml, run.json, metrics.jsonl, eval.jsonl, train.log, samples, logs, checkpoint-N, LoRA."""

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False, writes: bool = True):
        """Refuse a folder that holds something, unless `overwrite` or `resume`. Writes nothing: `open()` does.

        resume: continue the run that is there, with everything it has written.
        writes: False in all processes but the first; theirs is a folder that nobody writes.
        """
        self.path, self.overwrite, self.started, self.writes = Path(path), overwrite, resume, writes
        self.status: dict[str, Any] = {}
        if overwrite and resume:
            raise ConfigError("--overwrite and --resume contradict each other: give one of them")
        if resume:
            self.status = self._resumed()
        elif writes:
            refuse_place(self.path)
            self._refuse_used()

    def _refuse_used(self) -> None:
        """ConfigError where the folder holds something, unless it is a run that is overwritten."""
        there = self.path.iterdir() if self.path.is_dir() else ()
        used = any(not _is_leftover(path) for path in there)
        if self.overwrite and used and not (self.path / "run.json").is_file():
            raise ConfigError(f"output folder {self.path} holds no run to overwrite; choose another output_dir")
        if not self.overwrite and used:
            raise self._is_used()

    def _is_used(self) -> ConfigError:
        run = (self.path / "run.json").is_file()
        cures = ", go on with its run by --resume latest, or replace it by --overwrite (overwrite=True)" if run else ""
        return ConfigError(f"output folder {self.path} exists and is not empty; choose another output_dir{cures}")

    def _resumed(self) -> dict[str, Any]:
        """run.json of the run to be continued; empty when only its checkpoints are there."""
        path = self.path / "run.json"
        if not path.is_file() and not checkpoint_folders(self.path):
            raise ConfigError(f"output folder {self.path} holds no run to resume; start it without --resume")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); move it away, the checkpoints suffice") from error

    def open(self) -> None:
        """Make the folder; with `overwrite`, remove what an earlier run left there (and nothing else).

        Another run may have begun here since this one was made: the folder is looked at again, and the run whose
        run.json is first has it. Raises ConfigError as `RunFolder`.
        """
        if self.started or not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_used()
            if self.overwrite:
                self._remove_run()
            self._claim()
            remove_leftovers(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.started = True

    def _claim(self) -> None:
        """Make run.json, which one process alone can do."""
        path = self.path / "run.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write('{"status": "running"}\n')
        except FileExistsError as error:
            raise self._is_used() from error
        except OSError:  # a full disk: what was made blocks no later start
            path.unlink(missing_ok=True)
            raise

    def _remove_run(self) -> None:
        checkpoints = checkpoint_folders(self.path).values()
        folders = (self.path / name for name in (CUT, "samples", TRACKERS, DENOISER_FOLDER, *EVALS))
        exports = [receipt.parent for receipt in self.path.glob(f"{EXPORT}/*/{RECEIPT}")]
        unverified = self.path.glob(f"{EXPORT}/*.unverified")
        for folder in (*checkpoints, *folders, *exports, *unverified, self.path / EXPORT / "hub"):
            shutil.rmtree(folder, ignore_errors=True)
        for name in REPLACED:
            (self.path / name).unlink(missing_ok=True)

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
        append(self.path / name, text)


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """The error that says what could not be written, why, and what helps against this reason (an OSError names it)."""
    # os.path, since Path.exists raises for a name that is too long
    file = next((above for above in path.parents if os.path.exists(above) and not os.path.isdir(above)), None)
    why, number = getattr(error, "strerror", None) or str(error), getattr(error, "errno", None)
    cure = "Free some space or choose another place"
    if file is not None:
        why, cure = f"{file} is a file, not a folder", "Choose another place"
    elif number == errno.EISDIR:
        why, cure = "it is a folder", "Give a file"
    elif number == errno.ENAMETOOLONG:
        cure = "Choose a shorter name"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure = "Choose a place that you may write to"
    return CannotWrite(
        f"cannot write {path}: {why}; nothing half-written was left and what was there is intact. {cure} and run again"
    )
