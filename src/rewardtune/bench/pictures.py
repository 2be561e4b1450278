"""Figures 4 and 5: the same prompts and noise, untuned and tuned by every method, for symmetry and for PickScore."""

from pathlib import Path

from ..errors import ConfigError
from ..progress import digits
from ..runfolder import atomic
from ..tables import markdown_table
from .cells import SHOWN, final_prompts
from .setting import METHODS
from .table1 import BASE, base_cell
from .work import Work

REWARDS = {"fig4": "symmetry", "fig5": "pickscore"}
CAPTIONS = {
    "fig4": "DRTune alone learns symmetry, the others fail (section 4.1)",
    "fig5": "DRTune shows better global layout and a more natural appearance (section 4.1)",
}


def report(work: Work, name: str) -> str:
    """The sheet, and its page."""
    reward, seed = REWARDS[name], work.setting.seeds[0]
    cells = {BASE: base_cell(work, reward)}
    for method in METHODS:
        lr = work.lr(method, reward)
        if lr is not None:
            cells[method] = work.cell(method, reward, seed, lr=lr)
    native = work.setting.tasks[reward].native
    found = {m: row["scores"][native][0] for m, cell in cells.items() if (row := work.rows.get(cell)) is not None}
    strips = {m: path for m in found if (path := work.picture(cells[m])).exists()}
    prompts = final_prompts(work.setting, cells[BASE])[:SHOWN]
    lines = [
        f"# Pictures for {reward} (Fig. {name[-1]})",
        "",
        f"`{work.command(name)}`: seed {seed} of Table 1, the first {SHOWN} held-out",
        "prompts, the same noise in every row. The paper's claim, for people to judge: " + CAPTIONS[name] + ".",
        "",
        *(f"{k}. {prompt}" for k, prompt in enumerate(prompts, start=1)),
        "",
        "Not run: " + (", ".join(m for m in (BASE, *METHODS) if m not in strips) or "nothing") + ".",
    ]
    if strips:
        sheet({f"{m} {digits(found[m])}": path for m, path in strips.items()}, work.folder / f"{name}.png")
        lines += [
            "",
            markdown_table(
                ["method", f"{native} of all its held-out prompts", "learning rate"],
                [[m, digits(found[m]), f"{cells[m].lr:g}" if cells[m].lr else ""] for m in strips],
            ),
            "",
            f"![pictures, numbered from the left]({name}.png)",
        ]
    return "\n".join(lines) + "\n"


def sheet(strips: dict[str, Path], path: Path, *, height: int = 96) -> None:
    """Rows of pictures with their names, under each other."""
    from PIL import Image, ImageDraw, ImageFont

    if not strips:
        raise ConfigError("no pictures to show")
    font, left, gap = ImageFont.load_default(15), 150, 6
    rows = {}
    for name, file in strips.items():
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        rows[name] = picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)
    width = left + max(row.width for row in rows.values())
    canvas = Image.new("RGB", (width, len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (name, row) in enumerate(rows.items()):
        top = k * (height + gap)
        pen.text((6, top + height // 2 - 8), name, fill="black", font=font)
        canvas.paste(row, (left, top))
    with atomic(path) as temporary:
        canvas.save(temporary, optimize=True)
