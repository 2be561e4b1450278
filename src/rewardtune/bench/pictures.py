"""Figures 4 and 5: the same prompts and noise, untuned and tuned by every method, for symmetry and for PickScore."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import digits
from ..runfolder import atomic
from ..tables import markdown_table
from .cells import BASE, SHOWN, final_prompts
from .claims import claims_table
from .rows import made_by
from .setting import METHODS
from .table1 import base_cell, claims, found
from .work import Work

REWARDS = {"fig4": "symmetry", "fig5": "pickscore"}
CAPTIONS = {
    "fig4": "DRTune alone learns symmetry, the others fail (section 4.1)",
    "fig5": "DRTune shows better global layout and a more natural appearance (section 4.1)",
}


def report(work: Work, name: str) -> str:
    """The sheet, and its page."""
    reward, seed, rows = REWARDS[name], work.setting.seeds[0], work.rows
    cells = {BASE: base_cell(work, reward)}
    for method in METHODS:
        lr = work.lr(method, reward)
        if lr is not None:
            cells[method] = work.cell(method, reward, seed, lr=lr)
    native, table = work.setting.tasks[reward].native, found(work, rows, reward)
    ran = {m: row for m, cell in cells.items() if (row := rows.get(cell)) is not None}
    strips = {m: path for m in ran if (path := work.picture(cells[m])).exists()}
    prompts = final_prompts(work.setting, cells[BASE])[:SHOWN]
    lines = [
        f"# Pictures for {reward} (Fig. {name[-1]})",
        "",
        f"`{work.command(name)}`: seed {seed} of Table 1, the first {SHOWN} held-out",
        "prompts, the same noise in every row. The paper's claim, for people to judge: " + CAPTIONS[name] + ".",
        "",
        *(f"{k}. {prompt}" for k, prompt in enumerate(prompts, start=1)),
        "",
        "Not run: " + (", ".join(m for m in (BASE, *METHODS) if m not in ran) or "nothing") + ".",
        *(_lost(m, row, work.picture(cells[m])) for m, row in ran.items() if m not in strips),
    ]
    if strips:
        values = {m: digits(ran[m]["scores"][native][0]) for m in strips}
        path = work.folder / f"{work.stem(name)}.png"
        rows_of = {f"{m} {value}": strips[m] for m, value in values.items()}
        sheet(rows_of, path, count=len(prompts), heading=f"{native} of all {cells[BASE].count}")
        lines += [
            "",
            markdown_table(
                ["method", f"{native} of all its held-out prompts", "learning rate"],
                [[m, value, f"{cells[m].lr:g}" if cells[m].lr else ""] for m, value in values.items()],
            ),
            "",
            f"![pictures, numbered as the prompts]({path.name})",
        ]
    lines += ["", "In numbers, over all seeds of Table 1:", "", *claims_table(claims(work.setting, reward, table))]
    return "\n".join([*lines, *made_by(ran.values())]) + "\n"


def _lost(method: str, row: dict[str, Any], picture: Path) -> str:
    if "broke" in row:
        return f"{method} broke down, so there are no pictures of it: {row['broke']}."
    return f"{method}: the picture {picture.name} is missing; remove its row to run it again."


def sheet(strips: dict[str, Path], path: Path, *, count: int, heading: str, height: int = 96) -> None:
    """Rows of `count` pictures each with their names, under each other; numbered, `heading` over the names."""
    from PIL import Image, ImageDraw, ImageFont

    if not strips:
        raise ConfigError("no pictures to show")
    font, left, top, gap = ImageFont.load_default(15), 150, 24, 6
    rows = {}
    for name, file in strips.items():
        with Image.open(file) as opened:
            strip = opened.convert("RGB")
        wide = strip.width / count
        crops = [strip.crop((round(k * wide), 0, round((k + 1) * wide), strip.height)) for k in range(count)]
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
