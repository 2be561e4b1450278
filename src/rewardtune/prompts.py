"""Prompts: a text file (one a line), a list, or the playground's own; and which prompt each sample gets.

Only .txt so far. The prompt of a sample is a pure function of (seed, step, index in the batch), so a resumed run and
every process of a larger one see the same order without shared state.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .errors import ConfigError

PLAYGROUND_COUNT = {"train": 2000, "eval": 64}


def load_prompts(source: str | Path | Sequence[str], *, seed: int = 0) -> list[str]:
    """The prompts of `source`: a .txt path (one prompt a line, blank lines skipped), a list of str,
    `playground:train` or `playground:eval` (`:free` appended: only layouts without positions).

    Raises ConfigError naming file and line for a missing, empty or not-UTF-8 file.
    """
    if not isinstance(source, str | Path):
        return _checked_list(source)
    if str(source).startswith("playground:"):
        return _playground(str(source), seed)
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"prompt file {path} {what}; give a .txt file with one prompt a line, or playground:train")
    if path.suffix != ".txt":
        raise ConfigError(f"prompt file {path}: only .txt files (one prompt a line, UTF-8) can be read")
    lines = _decode(path).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        what = f"has only blank lines ({len(lines)})" if lines else "is empty"
        raise ConfigError(f"prompt file {path} {what}; write one prompt a line")
    return prompts


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # editors on Windows put a byte-order mark in front
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"prompt file {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            f"convert the file, for example: iconv -f latin1 -t utf-8 {path.name} > utf8.txt"
        ) from error


def _checked_list(source: Sequence[str]) -> list[str]:
    prompts = list(source)
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"prompt {number} of the list is {prompt!r}; every prompt must be a non-empty str")
    if not prompts:
        raise ConfigError("the list of prompts is empty; give at least one prompt")
    return prompts


def _playground(source: str, seed: int) -> list[str]:
    from . import playground

    split, _, layout = source.removeprefix("playground:").partition(":")
    if split not in PLAYGROUND_COUNT or layout not in ("", "free", "any"):
        raise ConfigError(f"prompts {source!r}: legal are playground:train, playground:eval, each with :free appended")
    return playground.prompts(PLAYGROUND_COUNT[split], split=split, seed=seed, layout=layout or "any")


def batch_prompts(prompts: Sequence[str], *, seed: int, step: int, size: int) -> list[str]:
    """The `size` prompts of update `step`: every epoch is a fresh shuffle of all, drawn from (seed, epoch) alone."""
    count = len(prompts)
    positions = range(step * size, (step + 1) * size)
    return [prompts[_order(count, seed, position // count)[position % count]] for position in positions]


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"prompts {seed} {epoch}").sample(range(count), count))
