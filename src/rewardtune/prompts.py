"""Prompts from files, lists, the hub or the package; and which prompt each sample gets.

The prompt of a sample is a pure function of (seed, step, index in the batch), so a resumed run and every process of a
larger one see the same order without shared state. Imports nothing heavy; the list is read once, whole.
"""

import csv
import hashlib
import inspect
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import digest
from .errors import ConfigError, first_line
from .quietly import no_retry_lines
from .spelling import nearest

TABLES = (".jsonl", ".json", ".csv", ".parquet")
PLAYGROUND_COUNT = {"train": 2000, "eval": 2000}
LISTS = Path(__file__).parent / "promptlists"
COLUMNS = ("prompt", "text", "caption")  # the first of them that a table has
CATEGORY = "category"
BESIDE = "prompts:"  # of a column of the prompt file, where a folder of pictures may stand too
OURS = {"prompt", "generator", "num_images_per_prompt", "output_type", "return_dict"}  # set at every call of a pipeline
SOURCES = (
    "a .txt, .jsonl, .json, .csv or .parquet file, hf:DATASET:SPLIT:COLUMN, hf:DATASET:FILE, builtin:NAME, "
    "playground:train, or a list"
)


class Row(NamedTuple):
    """A line of a prompt file; more: the wanted columns."""

    prompt: str
    category: str = ""
    more: Mapping[str, str] = {}


class Conditioned(str):
    """A prompt with what goes into the pipeline's call beside it: `arguments` by name, texts and paths of pictures."""

    arguments: Mapping[str, str | Path]

    def __new__(cls, prompt: str, arguments: Mapping[str, str | Path]) -> "Conditioned":
        made = super().__new__(cls, prompt)
        made.arguments = arguments
        return made

    def __getnewargs__(self) -> tuple[str, Mapping[str, str | Path]]:  # type: ignore[override]
        return str(self), self.arguments


def load_prompts(
    source: str | Path | Sequence[str], *, template: str | None = None, seed: int = 0, columns: Sequence[str] = ()
) -> list[str]:
    """The prompts of `source`, in their order, equal ones kept; blank lines and rows are left out.

    source:
        a list of str;
        `NAME.txt`, one a line; `NAME.jsonl`, a str or an object a line; `NAME.json`, a list of either; `NAME.csv`,
        `NAME.parquet`, a table: of objects and tables the column prompt, else text, else caption counts;
        `hf:DATASET:SPLIT:COLUMN`, a dataset of the hub or a local folder, read by `datasets`;
        `hf:DATASET:FILE,FILE[:100],...`, files of such a dataset, read as above, whole or their first prompts;
        `builtin:NAME`, a list of the package (`builtin_lists()`);
        `playground:train`, `playground:eval` (`:free` appended: only layouts without positions).
    template: put around each, e.g. "a photo of {}". seed: of the playground's captions.
    columns: columns of a .jsonl, .json, .csv or .parquet file that are arguments of the pipeline's call, one for each
        sample: texts where "prompt" is in the name, else paths of pictures, beginning at the file. The prompts are then
        `Conditioned`.

    Raises ConfigError naming the file and its line for what is missing, empty or cannot be read.
    """
    return [prompt for prompt, _ in with_categories(source, template=template, seed=seed, columns=columns)]


def with_categories(
    source: str | Path | Sequence[str], *, template: str | None = None, seed: int = 0, columns: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """The same prompts, each with its category, "" where there is none.

    That is the column `category` of objects and tables, the name of the file where `hf:DATASET:FILE,FILE` names
    several, and on the playground the number of objects.
    """
    rows = _load(source, seed, columns)
    if template is not None:
        check_template(template)
        rows = [row._replace(prompt=template.replace("{}", row.prompt)) for row in rows]
    if not columns:
        return [(row.prompt, row.category) for row in rows]
    file = Path(str(source))
    prompts = _conditioned(
        rows, file.parent, f"prompt file {file}", hint="; paths begin at the folder of the prompt file"
    )
    return [(prompt, row.category) for prompt, row in zip(prompts, rows, strict=True)]


def without_text(prompt: str) -> str:
    """The empty prompt, with what `prompt` brings along."""
    return Conditioned("", prompt.arguments) if isinstance(prompt, Conditioned) else ""


def pictures_beside(prompt: str) -> list[str]:
    """The names of the pictures that `prompt` brings along."""
    return [name for name in getattr(prompt, "arguments", ()) if is_picture(name)]


def wrong_images(images: str | Path | None, beside: Sequence[str]) -> str:
    """What is wrong with `denoise.images` where the prompts bring the pictures `beside` along; "" if nothing."""
    own = [f"{BESIDE}{name}" for name in beside]
    if images is None or (str(images) in own if own else not str(images).startswith(BESIDE)):
        return ""
    if not own:
        return f"{images}: no prompt brings pictures along; name their column in prompts.columns"
    return f"{images}: each prompt brings its {' and '.join(beside)} along; legal is {' or '.join(own)}, or null"


def with_inputs(prompts: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """`prompts` with what the caller gives beside them: `Conditioned`, as those of a file with `columns` are.

    inputs: for each argument of the pipeline's call one value for all prompts, or one for each: a text where "prompt"
        is in the name, else the path of a picture. Without inputs the prompts come back as they are.

    Raises ConfigError for another number of values, and for pictures that are missing, damaged or of unequal size.
    """
    if not inputs:
        return list(prompts)
    for name, values in inputs.items():
        if len(values) not in (1, len(prompts)):
            each = f" or {len(prompts)}, one for each" if len(prompts) > 1 else ""
            raise ConfigError(
                f"input {name}: {len(values)} values for {len(prompts)} prompt{'s' * (len(prompts) > 1)}; legal is one "
                f"for all prompts{each}"
            )
    rows = [
        Row(prompt, more={name: values[index if len(values) > 1 else 0] for name, values in inputs.items()})
        for index, prompt in enumerate(prompts)
    ]
    hint = "; an input is the path of a picture, or a text where its name has `prompt` in it"
    return _conditioned(rows, Path(), "input", hint=hint)


def check_argument(pipe: Any, name: str, what: str) -> None:
    """ConfigError, beginning with `what`, where `pipe(...)` has no argument `name` that a prompt may bring along."""
    legal = [key for key in inspect.signature(pipe.__call__).parameters if key not in ("args", "kwargs", *OURS)]
    if name not in legal:
        likely = ", ".join(key for key in legal if "image" in key or "prompt" in key)
        raise ConfigError(f"{what}: {type(pipe).__name__} has no such argument{nearest(name, legal)}; it has {likely}")


def is_picture(argument: str) -> bool:
    """Whether a column, or an input by its name, is a picture; the others are texts (negative_prompt, prompt_2)."""
    return "prompt" not in argument


def _load(source: str | Path | Sequence[str], seed: int, columns: Sequence[str]) -> list[Row]:
    if not isinstance(source, str | Path):
        if columns:
            raise ConfigError(f"columns={list(columns)}: a list of prompts has none; give a {', '.join(TABLES)} file")
        return [Row(prompt) for prompt in _checked_list(source)]
    kind, colon, rest = str(source).partition(":")
    if colon and kind in ("playground", "builtin", "hf"):
        if columns:
            raise ConfigError(f"columns={list(columns)}: prompts {source!r} have none; give a {', '.join(TABLES)} file")
        return {"playground": _playground, "builtin": _builtin, "hf": _hub}[kind](rest, seed)
    return _read(Path(source), columns)


def _conditioned(rows: Sequence[Row], folder: Path, source: str, *, hint: str = "") -> list[str]:
    """The prompts with their arguments. ConfigError for a picture that is not there, or of another size than others.

    folder: where relative paths begin; source, hint: where the rows are from, and what to say of a missing file.
    """
    made, sizes = list[str](), dict[str, tuple[Path, tuple[int, int]]]()
    for row in rows:
        arguments: dict[str, str | Path] = dict(row.more)
        for name, value in row.more.items():
            if not is_picture(name):
                continue
            path = folder / value
            size = _size_of(path, f"{source}, prompt {len(made) + 1} ({_short(row.prompt)}), {name}", hint)
            first, wanted = sizes.setdefault(name, (path, size))
            if size != wanted:
                raise ConfigError(
                    f"{source}, {name}: {path} is {size[0]} x {size[1]}, but {first} is {wanted[0]} x {wanted[1]}; the "
                    "pictures of one argument need one size, for they are sampled in batches: resize them"
                )
            arguments[name] = path
        made.append(Conditioned(row.prompt, arguments))
    return made


def _size_of(path: Path, place: str, hint: str) -> tuple[int, int]:
    """(width, height) as `own_arguments` gives it, by the header alone."""
    from PIL import ExifTags, Image, UnidentifiedImageError

    if not path.is_file():
        raise ConfigError(f"{place}: the picture {path} does not exist{hint}")
    try:
        with Image.open(path) as opened:
            lying = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # turned by a quarter
            return opened.size[::-1] if lying else opened.size
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{place}: {path} is no picture that can be opened: {error}") from error


def own_arguments(prompts: Sequence[str]) -> dict[str, list[Any]]:
    """What `Conditioned` prompts bring into the pipeline's call: for each name a list of texts, or of opened pictures.

    All prompts have the same names, as those of one file do. The camera's rotation (EXIF) is applied to pictures, as
    diffusers' `load_image` does.
    """
    from PIL import Image, ImageOps

    def value(given: str | Path) -> Any:
        if not isinstance(given, Path):
            return given
        with Image.open(given) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")

    names = prompts[0].arguments if prompts and isinstance(prompts[0], Conditioned) else ()
    return {name: [value(getattr(prompt, "arguments", {})[name]) for prompt in prompts] for name in names}


def identity(prompts: Sequence[str]) -> list[Any]:
    """The prompts as JSON, with what they bring along: pictures by the sha256 of their files, wherever these lie."""

    @cache
    def content(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def told(prompt: str) -> Any:
        if not isinstance(prompt, Conditioned):
            return prompt
        return [str(prompt), {k: content(v) if isinstance(v, Path) else v for k, v in sorted(prompt.arguments.items())}]

    return [told(prompt) for prompt in prompts]


def digests(prompts: Sequence[str], eval_prompts: Sequence[str]) -> dict[str, str]:
    """What a resume compares: the prompts themselves, whose file may have changed under its name."""
    return {
        "prompts_digest": digest(identity(prompts)),
        "eval_prompts_digest": digest(identity(eval_prompts)),
    }


def check_template(template: str) -> str:
    """`template` itself. ConfigError unless it holds {} exactly once and no other brace."""
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise ConfigError(
            f"template {template!r} must hold {{}} exactly once and no other brace, for example 'a photo of {{}}'"
        )
    return template


def builtin_lists() -> dict[str, Path]:
    """The prompt lists shipped with the package, by name."""
    return {path.stem: path for path in sorted(LISTS.glob("*.txt"))}


# -- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        begin = "" if path.is_absolute() else f"; relative paths begin at the current folder, {Path.cwd()}"
        raise ConfigError(f"prompt file {path} {what}; give a .txt file with one prompt a line, or {SOURCES}{begin}")
    readers: dict[str, Any] = {".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ConfigError(
            f"prompt file {path}: {path.suffix or 'no suffix'} cannot be read; legal: {', '.join(readers)}"
        )
    if columns and path.suffix.lower() not in TABLES:
        raise ConfigError(
            f"prompt file {path} has no columns {', '.join(columns)}; legal is a {', '.join(TABLES)} file"
        )
    read = readers[path.suffix.lower()](path, columns)
    found = [Row(row.prompt.strip(), row.category.strip(), row.more) for row in read]
    prompts = [row for row in found if row.prompt]
    if not prompts:
        what = f"has only blank lines ({len(found)})" if found else "is empty"
        raise ConfigError(f"prompt file {path} {what}; write one prompt a line")
    return prompts


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"prompt file {path} cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")  # editors on Windows put a byte-order mark in front
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"prompt file {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            f"convert the file, for example: iconv -f latin1 -t utf-8 {path.name} > utf8.txt"
        ) from error


def _txt(path: Path, columns: Sequence[str]) -> list[Row]:
    text = _decode(path).replace("\r\n", "\n").replace("\r", "\n")
    return [Row(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _jsonl(path: Path, columns: Sequence[str]) -> list[Row]:
    prompts = []
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            prompts.append(_entry(_parse_json(line, path, number), f"prompt file {path}, line {number}", columns))
    return prompts


def _json(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = _parse_json(_decode(path), path, 1)
    if not isinstance(rows, list):
        raise ConfigError(f"prompt file {path} holds no list; legal is a list of strings or of objects with a prompt")
    return [_entry(row, f"prompt file {path}, entry {number}", columns) for number, row in enumerate(rows)]


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"prompt file {path}, line {line + error.lineno - 1}: not valid JSON, {error.msg} (column {error.colno})"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"prompt file {path}, line {line}: not valid JSON: {error}") from error


def _entry(row: Any, place: str, columns: Sequence[str]) -> Row:
    """One row of a JSON file: a str, or an object with one."""
    category, more = "", dict[str, str]()
    if isinstance(row, dict):
        named = _category(list(row))
        category = "" if named is None or row[named] is None else str(row[named])
        more = _wanted(row, columns, place)
        row = row[_column(list(row), place)]
    elif columns:
        raise ConfigError(f"{place}: a string has no {', '.join(columns)}; write an object, {{'prompt': ..., ...}}")
    if not isinstance(row, str):
        raise ConfigError(f"{place}: {_short(row)} is no prompt; legal is a string, or an object with one under prompt")
    return _row(row, category, more, place)


def _row(prompt: str, category: str, more: Mapping[str, str], place: str) -> Row:
    """ConfigError for an empty prompt with something beside it: without a word its picture would not be trained on."""
    if more and not prompt.strip():
        raise ConfigError(f"{place}: the prompt is empty beside {_short(dict(more))}; write one, or leave the row out")
    return Row(prompt, category, more)


def _wanted(row: Mapping[str, Any], columns: Sequence[str], place: str) -> dict[str, str]:
    for name in columns:
        if name not in row:
            there = _cut(", ".join(map(str, row)))
            raise ConfigError(f"{place}: no column {name!r}{nearest(name, [*row])}; its columns are {there}")
        if not isinstance(row[name], str) or not row[name].strip():
            raise ConfigError(f"{place}, column {name}: {_short(row[name])}; legal is text (of a picture: its path)")
    return {name: row[name] for name in columns}


def _csv(path: Path, columns: Sequence[str]) -> list[Row]:
    place = f"prompt file {path}"
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    prompts, column, named, heads = list[Row](), None, None, list[str]()
    try:
        for row in reader:
            if not any(row):
                continue
            if column is None:
                column, heads = row.index(_column(row, f"{place}, line {reader.line_num}")), row
                kind = _category(row)
                named = None if kind is None else row.index(kind)
            elif len(row) != len(heads):
                raise ConfigError(
                    f"{place}, line {reader.line_num}: {len(row)} columns, but the first line has {len(heads)}; "
                    'put prompts with commas in quotes: "a cat, sitting"'
                )
            else:
                where = f"{place}, line {reader.line_num}"
                more = _wanted(dict(zip(heads, row, strict=True)), columns, where)
                prompts.append(_row(row[column], "" if named is None else row[named], more, where))
    except csv.Error as error:
        raise ConfigError(f"{place}, line {reader.line_num}: not valid CSV: {error}") from error
    return prompts


def _parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"prompt file {path}: .parquet needs the extra data: pip install 'rewardtune[data]'"
        ) from error
    place = f"prompt file {path}"
    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = _column(file.schema_arrow.names, place)
        named = _category(file.schema_arrow.names)
        values = file.read(columns=[column])[column].to_pylist()
        categories = file.read(columns=[named])[named].to_pylist() if named else [""] * len(values)
        there = [name for name in columns if name in file.schema_arrow.names]
        others = file.read(columns=there).to_pylist() if columns else [{}] * len(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{place} is no parquet file that can be read: {first_line(error)}") from error
    prompts = _strings(values, f"{place}, column {column}")
    rows = list[Row]()
    for number, (prompt, kind, row) in enumerate(zip(prompts, categories, others, strict=True)):
        where = f"{place}, row {number}"
        rows.append(_row(prompt, "" if kind is None else str(kind), _wanted(row, columns, where), where))
    return rows


def _column(names: Sequence[str], place: str) -> str:
    """The column of the prompts. ConfigError naming all columns when none of COLUMNS is there."""
    found = [name for wanted in COLUMNS for name in names if name.strip().lower() == wanted]
    if not found:
        columns = ", ".join(name or "''" for name in names) or "none"
        raise ConfigError(f"{place}: no column {', '.join(COLUMNS)}; its columns are {_cut(columns)}: rename one")
    return found[0]


def _category(names: Sequence[str]) -> str | None:
    return next((name for name in names if name.strip().lower() == CATEGORY), None)


def _strings(values: Sequence[Any], place: str) -> list[str]:
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{place}, row {number}: {_short(value)} is no prompt; legal is text")
    return [value or "" for value in values]


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


# -- other sources ---------------------------------------------------------------------------------------------------


def _checked_list(source: Sequence[str]) -> list[str]:
    prompts = list(source)
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"prompt {number} of the list is {prompt!r}; every prompt must be a non-empty str")
    if not prompts:
        raise ConfigError("the list of prompts is empty; give at least one prompt")
    return prompts


def _builtin(name: str, seed: int) -> list[Row]:
    lists = builtin_lists()
    if name not in lists:
        raise ConfigError(f"prompts 'builtin:{name}': no such list{nearest(name, lists)}; legal: {', '.join(lists)}")
    return _read(lists[name])


def _playground(rest: str, seed: int) -> list[Row]:
    from . import playground

    split, _, layout = rest.partition(":")
    if split not in PLAYGROUND_COUNT or layout not in ("", "free", "any"):
        raise ConfigError(
            f"prompts 'playground:{rest}': legal are playground:train, playground:eval, each with :free appended"
        )
    found = playground.prompts(PLAYGROUND_COUNT[split], split=split, seed=seed, layout=layout or "any")
    return [Row(caption, "two objects" if " and " in caption else "one object") for caption in found]


def _hub(rest: str, seed: int) -> list[Row]:
    """`DATASET:SPLIT:COLUMN` by the library datasets, or `DATASET:FILE,FILE,...` by our own readers."""
    pieces = [re.fullmatch(r"\s*(.*?)(?:\[:(\d+)\])?\s*", piece) for piece in rest.partition(":")[2].split(",")]
    files = [piece[1] for piece in pieces if piece]
    counts = [int(piece[2]) if piece[2] else None for piece in pieces if piece]
    parts = rest.split(":")
    if len(parts) == 3 and all(parts) and counts == [None]:
        return [Row(prompt) for prompt in _dataset(*parts)]
    if not parts[0] or any(":" in file for file in files) or not all(Path(file).suffix for file in files):
        raise ConfigError(
            f"prompts 'hf:{rest}': write hf:DATASET:SPLIT:COLUMN, for example hf:me/my-prompts:train:prompt, "
            "or hf:DATASET:FILE,FILE[:100], for example hf:ymhao/HPDv2:train.json"
        )
    prompts = list[Row]()
    for file, count in zip(files, counts, strict=True):
        by_file = Path(file).stem if len(files) > 1 else ""
        prompts += [row._replace(category=row.category or by_file) for row in _read(_hub_file(parts[0], file))[:count]]
    return prompts


def _hub_file(dataset: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    if Path(dataset).is_dir():
        return Path(dataset) / file
    try:
        with no_retry_lines():
            return Path(hf_hub_download(dataset, file, repo_type="dataset"))
    except Exception as error:  # its errors have no common base: offline, unknown, gated, disk full
        raise ConfigError(
            f"{file} of the dataset {dataset!r} cannot be had: {first_line(error)}. On a machine with network: "
            f"hf download {dataset} {file} --repo-type dataset --local-dir prompts, then name the file"
        ) from error


def _dataset(name: str, split: str, column: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"prompts 'hf:{name}:{split}:{column}' need the extra data: pip install 'rewardtune[data]'"
        ) from error
    try:
        with no_retry_lines():
            table = datasets.load_dataset(name, split=split)
    except Exception as error:  # its errors have no common base: offline, unknown, gated, no such split, a script
        raise ConfigError(f"dataset {name!r}, split {split!r}, cannot be read: {first_line(error)}") from error
    if column not in table.column_names:
        columns = ", ".join(table.column_names)
        hint = nearest(column, table.column_names)
        raise ConfigError(f"dataset {name!r} has no column {column!r}{hint}; its columns are {_cut(columns)}")
    values = _strings(list(table[column]), f"dataset {name!r}, column {column!r}")
    prompts = [value.strip() for value in values if value.strip()]
    if not prompts:
        raise ConfigError(f"dataset {name!r}, split {split!r}, column {column!r} holds no prompt")
    return prompts


# -- the order -------------------------------------------------------------------------------------------------------


def batch_prompts(prompts: Sequence[str], *, seed: int, step: int, size: int) -> list[str]:
    """The `size` prompts of update `step`: every epoch is a fresh shuffle of all, drawn from (seed, epoch) alone."""
    count = len(prompts)
    positions = range(step * size, (step + 1) * size)
    return [prompts[_order(count, seed, position // count)[position % count]] for position in positions]


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"prompts {seed} {epoch}").sample(range(count), count))
