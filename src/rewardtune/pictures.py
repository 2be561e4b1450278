"""Pictures on disk, for `score` and `audit`: found, opened as RGB, and each given its prompt."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .prompts import load_prompts
from .spelling import nearest

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COLUMNS = ("file", "prompt", "category")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a table says of one picture."""

    prompt: str
    category: str = ""


def by_number(path: Path) -> list[str | int]:
    """Sorts names as people do: 2.png, 10.png; 999.png, 1000.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def find_images(sources: Sequence[str], *, skip: bool = False) -> list[Path]:
    """The pictures that files, folders (by suffix, in the order of `by_number`) and globs name, each once.

    Raises ConfigError for a source without a picture and for a file that is none; with `skip` only if all are none.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            paths = sorted((p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), key=by_number)
            reason = f"the folder has no {', '.join(SUFFIXES)}; for sub-folders write '{source.rstrip('/')}/**/*.png'"
        else:
            matches = [source] if path.exists() else sorted(glob.glob(source, recursive=True))
            paths = [Path(match) for match in matches if Path(match).is_file()]
            reason = "there is no such file, and no file matches it; give files, folders or globs"
        if not paths:
            raise ConfigError(f"no image in '{source}': {reason}")
        found |= dict.fromkeys(paths)
    errors = []
    for path in found:
        try:
            _opened(path).close()  # the header alone: mistakes come before weights are loaded
        except ConfigError as error:
            errors.append(error)
    if errors and (not skip or len(errors) == len(found)):
        raise errors[0]
    return list(found)


def open_image(path: Path) -> tuple[Tensor, str]:
    """(image (3, H, W) in [0, 1], what was done to make it RGB, or nothing).

    The camera's rotation (EXIF) is applied; grey and palettes become RGB, transparency is laid on white, of an
    animation the first frame is taken. ConfigError where the file is damaged or has no known range.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    with _opened(path) as opened:
        notes = [] if opened.mode == "RGB" else [opened.mode]
        if getattr(opened, "n_frames", 1) > 1:
            notes.append("first frame")
        try:
            image = ImageOps.exif_transpose(opened)
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"cannot read the image {path}: {error}; save it again or leave it out") from error
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype("float32") / 65535
        return torch.from_numpy(grey).expand(3, -1, -1), "16-bit grey"
    if image.mode in ("I", "F"):
        raise ConfigError(f"the image {path} has pixels of mode {image.mode}, whose range is unknown; save it as 8-bit")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels.float() / 255, ", ".join(notes)


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"cannot read the image {path}: {error}; give an image file") from error


def captions(paths: Sequence[Path], *, prompts: Path | None = None, prompt: str | None = None) -> list[Caption] | None:
    """One caption for each picture, from the first of:

    prompt: one text for all. prompts: a .txt with one line for each picture in their order, or a table (.csv with
    headings, .jsonl) with `file`, `prompt` and, if wanted, `category`. Neither: the text file of the same name beside
    each picture (`cat.txt` for `cat.png`), or None where there is none beside any. Raises ConfigError.
    """
    if prompt is not None and prompts is not None:
        raise ConfigError("a prompt and a file of prompts are given; give one of them")
    if prompt is not None:
        return [Caption(prompt=prompt)] * len(paths)
    if prompts is None:
        return _beside(paths)
    if prompts.suffix in (".csv", ".jsonl"):
        return _matched(paths, prompts)
    if not str(prompts).startswith("playground:"):
        _check_prompt_file(prompts)
    lines = load_prompts(prompts)
    if len(lines) != len(paths):
        raise ConfigError(
            f"{prompts} has {len(lines)} prompts for {len(paths)} images; legal is one line for each image, in their "
            "order (folders by name), or a .csv or .jsonl with `file` and `prompt`"
        )
    return [Caption(prompt=line) for line in lines]


def _check_prompt_file(path: Path) -> None:
    if not path.is_file() or path.suffix not in (".txt", ".csv", ".jsonl"):
        what = "is a folder" if path.is_dir() else "is of another kind" if path.is_file() else "does not exist"
        raise ConfigError(
            f"prompt file {path} {what}; give a .txt with one prompt for each image, or a .csv (with headings) or "
            ".jsonl of file and prompt"
        )


def _beside(paths: Sequence[Path]) -> list[Caption] | None:
    files = [path.with_suffix(".txt") for path in paths]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise ConfigError(
            f"{len(files) - len(missing)} of {len(files)} images have a text file beside them, but {missing[0]} is "
            "missing; add it, or give the prompts as one file"
        )
    return [Caption(prompt=" ".join(load_prompts(file))) for file in files]


def _matched(paths: Sequence[Path], table: Path) -> list[Caption]:
    rows = read_table(table)
    found, by_name = [], dict[str, Path]()
    for path in paths:
        names = [path.name, path.as_posix()]
        if path.resolve().is_relative_to(table.parent.resolve()):
            names.append(path.resolve().relative_to(table.parent.resolve()).as_posix())
        name = next((name for name in reversed(names) if name in rows), None)
        if name is None:
            raise ConfigError(f"{table} has no row for the image {path}{nearest(path.name, rows)}; add one")
        if name == path.name and (other := by_name.setdefault(name, path)).resolve() != path.resolve():
            raise ConfigError(
                f"{table}: the row {name} fits {other} and {path}; write the folder too, as"
                f" {path.parent.name}/{name}, a row for each"
            )
        found.append(rows[name])
    return found


def read_table(path: Path) -> dict[str, Caption]:
    """{file: its caption} of a .csv with headings or a .jsonl. ConfigError with the line of what is wrong."""
    _check_prompt_file(path)
    rows: dict[str, Caption] = {}
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        unknown = [key for key in row if key not in COLUMNS]
        if unknown or any(not isinstance(row.get(key), str) for key in ("file", "prompt")):
            given = ", ".join(map(repr, row)) or "nothing"
            hint = nearest(str(unknown[0]), COLUMNS) if unknown else ""
            raise ConfigError(f"{where}: the columns are {given}{hint}; legal: file, prompt and, if wanted, category")
        if row["file"] in rows:
            raise ConfigError(f"{where}: {row['file']} occurs twice; keep one row")
        rows[row["file"]] = Caption(prompt=row["prompt"], category=str(row.get("category") or ""))
    return rows


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))  # keeps the line breaks inside a field
            return [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}; save it as UTF-8, a row for each image") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            where = f"{path}, line {number}, column {error.colno}"
            raise ConfigError(f'{where}: no JSON ({error.msg}); legal: {{"file": ..., "prompt": ...}}') from error
    if bad := [number for number, row in rows if not isinstance(row, dict)]:
        raise ConfigError(f'{path}, line {bad[0]}: no JSON object; legal: {{"file": ..., "prompt": ...}}')
    return rows
