"""`rewardtune sheet A B`: a page on which people choose between two sets of pictures without knowing which is which.

The page holds the pictures, encoded anew (no file name, no metadata), in a random order and on random sides. Which side
is which stands in a second file, the key, that raters do not get. `tally.py` reads the votes with it.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
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

    a, b: folders with pictures of the same names; a run folder stands for its samples/final. RUN/samples/... brings the
    run's prompts, a folder of `rewardtune eval` or `compare` those of its JSON, with their categories. prompts: instead
    of these, as in `rewardtune score`, for the pictures of `a`; a column `category` is tallied too.
    count: so many pairs, drawn at random; None: all. seed: of sides, order and draw; None: one that nobody can guess.
    Raises ConfigError for folders that do not match, or are known to be of other prompts or seeds, and for files that
    are there already, or one and the same.
    """
    page, first, second = Path(output), _folder(a), _folder(b)
    key = Path(key) if key is not None else page.with_suffix(".key.json")
    if page.resolve() == key.resolve():
        raise ConfigError(f"{page} is both the page and its key; give --key another name, or leave it out")
    for path in (page, key):
        if path.exists():
            raise ConfigError(f"{path} exists, and votes may belong to it; choose another --output or remove it")
    names, ours, theirs = _matched(first, second)
    known = _same_question(first, second)
    given = captions([ours[name] for name in names], prompts=Path(prompts) if prompts is not None else None)
    texts = given or [known[name].caption if name in known else Caption(prompt="") for name in names]
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


@dataclass(frozen=True)
class Asked:
    """What a picture was asked for; the seed of its noise, where that is known."""

    caption: Caption
    seed: int | None


def _same_question(first: Path, second: Path) -> dict[str, Asked]:
    """What `first` (else `second`) was asked, by name. ConfigError where a pair's pictures are known to differ."""
    ours, theirs = _asked(first), _asked(second)
    for name, one in ours.items():
        other = theirs.get(name, one)
        if one.caption.prompt != other.caption.prompt:
            apart = f"prompts: {one.caption.prompt!r} and {other.caption.prompt!r}"
        elif None not in (one.seed, other.seed) and one.seed != other.seed:
            apart = f"seeds: {one.seed} and {other.seed}"
        else:
            continue
        raise ConfigError(
            f"{name} of {first} and of {second} have different {apart}; a pair is two pictures of one prompt and seed "
            "(rewardtune compare samples two runs on the same)"
        )
    return ours or theirs


def _asked(folder: Path) -> dict[str, Asked]:
    """By name, from the run or from the file of `eval` or `compare` that the folder belongs to; empty without."""
    from ..gradient import derive_seed
    from .read import read_run

    here = folder.resolve()
    run, told = here.parent.parent, here.parent.parent / f"{here.parent.name}.json"
    if here.parent.name == "samples" and (run / "run.json").is_file():
        found = read_run(run)
        names, seed = list(_by_name(folder)), found.facts.get("seed")
        if len(found.prompts) != len(names):
            return {}
        seeds = [None if seed is None else derive_seed(seed, "eval", index) for index in range(len(names))]
        texts = [Caption(prompt=prompt) for prompt in found.prompts]
        return {name: Asked(text, noise) for name, text, noise in zip(names, texts, seeds, strict=True)}
    try:
        rows = json.loads(told.read_text(encoding="utf-8"))["pictures"]
        return {
            Path(row["file"]).stem: Asked(Caption(prompt=row["prompt"], category=row["category"]), row["seed"])
            for row in rows
        }
    except (OSError, ValueError, LookupError, TypeError):  # no such file, or one of something else
        return {}
