"""Figures 4 and 5: the same prompts and noise, untuned and tuned by every method, for symmetry and for PickScore."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import digits
from ..runfolder import atomic
from ..tables import markdown_table
from .cells import BASE, SHOWN, final_prompts
from .claims import claims_table
from .rows import Cell, made_by
from .setting import METHODS
from .table1 import base_cell, claims, found
from .work import Work

REWARDS = {"fig4": "symmetry", "fig5": "pickscore"}
CAPTIONS = {
    "fig4": "DRTune alone learns symmetry, the others fail (section 4.1)",
    "fig5": "DRTune shows better global layout and a more natural appearance (section 4.1)",
}


def report(work: Work, name: str) -> str:
    """The page; `picture` draws its sheet."""
    reward, rows = REWARDS[name], work.rows
    cells = _cells(work, name)
    native, table = work.setting.tasks[reward].native, found(work, rows, reward)
    ran = {m: row for m, cell in cells.items() if (row := rows.get(cell)) is not None}
    strips = _strips(work, name)
    lines = [
        f"# Pictures for {reward} (Fig. {name[-1]})",
        "",
        f"`{work.command(name)}`: seed {work.setting.seeds[0]} of Table 1, the first {SHOWN} held-out",
        "prompts, the same noise in every row. The paper's claim, for people to judge: " + CAPTIONS[name] + ".",
        "",
        *(f"{k}. {prompt}" for k, prompt in enumerate(final_prompts(work.setting, cells[BASE])[:SHOWN], start=1)),
        "",
        "Not run: " + (", ".join(m for m in (BASE, *METHODS) if m not in ran) or "nothing") + ".",
        *(_lost(m, row, work.picture(cells[m])) for m, row in ran.items() if m not in strips),
    ]
    if strips:
        values = {m: digits(ran[m]["scores"][native][0]) for m in strips}
        lines += [
            "",
            markdown_table(
                ["method", f"{native} of all its held-out prompts", "learning rate"],
                [[m, value, f"{cells[m].lr:g}" if cells[m].lr else ""] for m, value in values.items()],
            ),
        ]
    png = f"{work.stem(name)}.png"
    if strips and (work.folder / png).exists():
        lines += ["", f"![pictures, numbered as the prompts]({png})"]
    lines += ["", "In numbers, over all seeds of Table 1:", "", *claims_table(claims(work.setting, reward, table))]
    return "\n".join([*lines, *made_by(ran.values())]) + "\n"


def picture(work: Work, name: str) -> Path | None:
    """The sheet of `name`; None without pictures."""
    cells, strips = _cells(work, name), _strips(work, name)
    if not strips:
        return None
    native, rows = work.setting.tasks[REWARDS[name]].native, work.rows
    values = {m: digits(row["scores"][native][0]) for m in strips if (row := rows.get(cells[m])) is not None}
    rows_of = {f"{m} {value}": strips[m] for m, value in values.items()}
    path, prompts = work.folder / f"{work.stem(name)}.png", final_prompts(work.setting, cells[BASE])
    return sheet(rows_of, path, count=min(SHOWN, len(prompts)), heading=f"{native} of all {len(prompts)}")


def _cells(work: Work, name: str) -> dict[str, Cell]:
    """Of the untuned model and of each method whose learning rate is known: the first seed of Table 1."""
    reward = REWARDS[name]
    rates = {method: work.lr(method, reward) for method in METHODS}
    seed = work.setting.seeds[0]
    tuned = {m: work.cell(m, reward, seed, lr=lr) for m, lr in rates.items() if lr is not None}
    return {BASE: base_cell(work, reward), **tuned}


def _strips(work: Work, name: str) -> dict[str, Path]:
    """The picture of each of these that ran, where it is there."""
    ran = {m: work.picture(cell) for m, cell in _cells(work, name).items() if work.rows.get(cell) is not None}
    return {m: path for m, path in ran.items() if path.exists()}


def _lost(method: str, row: dict[str, Any], picture: Path) -> str:
    if "broke" in row:
        return f"{method} broke down, so there are no pictures of it: {row['broke']}."
    return f"{method}: the picture {picture.name} is missing; remove its row to run it again."


def sheet(strips: dict[str, Path], path: Path, *, count: int, heading: str, height: int = 96) -> Path:
    """Rows of `count` pictures each with their names, under each other; numbered, `heading` over the names."""
    from PIL import Image, ImageDraw, ImageFont

    font, left, top, gap = ImageFont.load_default(15), 150, 24, 6
    rows = {}
    for name, file in strips.items():
        with Image.open(file) as opened:
            strip = opened.convert("RGB")
        wide, rest = divmod(strip.width, count)
        if rest:
            raise ConfigError(f"{file} does not hold {count} pictures side by side; remove its row to run it again")
        crops = [strip.crop((k * wide, 0, (k + 1) * wide, strip.height)) for k in range(count)]
        size = (round(wide * height / strip.height), height)
        rows[name] = [crop.resize(size, Image.Resampling.LANCZOS) for crop in crops]
    across = max(row[0].width for row in rows.values()) + gap
    canvas = Image.new("RGB", (left + count * across, top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((6, 4), heading, fill="black", font=font)
    for k in range(count):
        pen.text((left + k * across + (across - gap) // 2, 4), str(k + 1), fill="black", font=font, anchor="ma")
    for r, (name, row) in enumerate(rows.items()):
        y = top + r * (height + gap)
        pen.text((6, y + height // 2 - 8), name, fill="black", font=font)
        for k, picture in enumerate(row):
            canvas.paste(picture, (left + k * across, y))
    with atomic(path) as temporary:
        canvas.save(temporary, optimize=True)
    return path
