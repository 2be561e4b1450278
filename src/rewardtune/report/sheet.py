"""`rewardtune sheet A B`: a page on which people choose between two sets of pictures without knowing which is which.

The page holds the pictures, encoded anew (no file name, no metadata), in a random order and on random sides. Which side
is which stands in a second file, the key, that raters do not get. `tally.py` reads the votes with it.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..modelcard import plain
from ..pictures import Caption, captions, find_images
from ..runfolder import write_text
from .page import render
from .pictures import data_uri, forget

QUESTION = "Which picture is better?"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What was written: the page for the raters, the key to keep, and how many pairs."""

    page: Path
    key: Path
    pairs: int


def make_sheet(
    a: str | Path,
    b: str | Path,
    *,
    output: str | Path = "sheet.html",
    key: str | Path | None = None,
    prompts: str | Path | None = None,
    question: str = QUESTION,
    count: int | None = None,
    seed: int | None = None,
) -> Sheet:
    """Write the page and its key (default: the page's name with .key.json) for the pictures of two folders.

    a, b: folders with pictures of the same names; a run folder stands for its samples/final, and RUN/samples/... brings
    the run's prompts. prompts: as in `rewardtune score`, for the pictures of `a`; a column `category` is tallied too.
    count: so many pairs, drawn at random; None: all. seed: of sides, order and draw; None: one that nobody can guess.
    Raises ConfigError for folders that do not match, and for files that are there already.
    """
    page, first, second = Path(output), _folder(a), _folder(b)
    key = Path(key) if key is not None else page.with_suffix(".key.json")
    for path in (page, key):
        if path.exists():
            raise ConfigError(f"{path} exists, and votes may belong to it; choose another --output or remove it")
    names, ours, theirs = _matched(first, second)
    texts = _captions([ours[name] for name in names], first, Path(prompts) if prompts is not None else None)
    seed = secrets.randbits(48) if seed is None else seed
    draw = random.Random(f"sheet {seed}")
    order = list(range(len(names)))
    draw.shuffle(order)
    if count is not None and not 1 <= count <= len(order):
        raise ConfigError(f"--count {count}: there are {len(order)} pairs; legal: 1 to {len(order)}")
    shown, rows = [], []
    for number, index in enumerate(order[:count]):
        pair, left = f"p{number:04d}", draw.choice("AB")
        files = (ours[names[index]], theirs[names[index]])
        pictures = [data_uri(path, clean=True) for path in (files if left == "A" else files[::-1])]
        caption = texts[index]
        shown.append({"pair": pair, "prompt": plain(caption.prompt), "left": pictures[0], "right": pictures[1]})
        row = {"pair": pair, "left": left, "file": names[index], "prompt": caption.prompt, "category": caption.category}
        rows.append(row)
    forget()
    digest = hashlib.sha256(json.dumps([seed, rows, shown]).encode()).hexdigest()[:16]
    data = {"sheet": digest, "question": plain(question), "pairs": shown}
    facts: dict[str, Any] = {
        "kind": "sheet-key",
        "sheet": digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    facts |= {"a": str(a), "b": str(b), "question": question, "seed": seed}
    html = render("sheet", data=data, question=plain(question), count=len(shown))
    write_text(key, json.dumps(facts | {"pairs": rows}, indent=1, ensure_ascii=False) + "\n")
    write_text(page, html)
    return Sheet(page=page, key=key, pairs=len(shown))


def _folder(given: str | Path) -> Path:
    folder = Path(given)
    if (folder / "run.json").is_file():
        folder = folder / "samples" / "final"
        if not folder.is_dir():
            raise ConfigError(f"{given} has no samples/final yet; give a folder of pictures, e.g. {given}/samples/...")
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give two folders with pictures of the same names")
    return folder


def _matched(first: Path, second: Path) -> tuple[list[str], dict[str, Path], dict[str, Path]]:
    """(names without suffix, in order; name -> file of each folder). ConfigError where one has what the other lacks."""
    if first.resolve() == second.resolve():
        raise ConfigError(f"{first} is given twice; give two different folders")
    ours, theirs = (_by_name(folder) for folder in (first, second))
    for here, there, mine, other in ((first, second, ours, theirs), (second, first, theirs, ours)):
        if missing := sorted(mine.keys() - other.keys()):
            raise ConfigError(
                f"{len(missing)} of the {len(mine)} pictures in {here} have no partner of the same name in {there} "
                f"(the first: {missing[0]}); a pair is two pictures of one name, for one prompt and seed"
            )
    from PIL import Image

    for name in ours:
        with Image.open(ours[name]) as one, Image.open(theirs[name]) as two:
            if one.size != two.size:
                raise ConfigError(f"{ours[name]} has {one.size} pixels, {theirs[name]} {two.size}: sizes would tell")
    return list(ours), ours, theirs


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in find_images([str(folder)]):
        if path.stem in found:
            raise ConfigError(
                f"{found[path.stem]} and {path} have the same name; which of them is meant? Move one away"
            )
        found[path.stem] = path
    return found


def _captions(paths: Sequence[Path], folder: Path, prompts: Path | None) -> list[Caption]:
    """From a file, from text files beside the pictures, else from the run that the folder lies in; empty without."""
    found = captions(paths, prompts=prompts)
    if found is not None:
        return found
    from .read import read_run

    run = folder.resolve().parent.parent
    if folder.resolve().parent.name == "samples" and (run / "run.json").is_file():
        texts = read_run(run).prompts
        if len(texts) == len(paths):
            return [Caption(prompt=text) for text in texts]
    return [Caption(prompt="")] * len(paths)
