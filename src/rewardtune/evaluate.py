"""Fixed prompts and seeds in, pictures and scores out; the before | after grid as a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import quiet
from .engine.chain import refusals
from .prompts import own_arguments
from .runfolder import atomic

if TYPE_CHECKING:
    from .rewards import Reward


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a sample (diffusers moves the noise to the device), so a sample never depends on its batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def for_prompts(prompts: Sequence[str], call: dict[str, Any]) -> dict[str, Any]:
    """`call` with these prompts, and what they bring along (`prompts.Conditioned`).

    A negative prompt given once is repeated for each, as the pipelines want it.
    """
    repeated = {
        name: [value] * len(prompts)
        for name, value in call.items()
        if name.startswith("negative_prompt") and isinstance(value, str)
    }
    return {"prompt": [str(prompt) for prompt in prompts]} | call | repeated | own_arguments(prompts)


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    call: dict[str, Any],
    batch: int = 8,
    checkers: bool = False,
) -> Tensor:
    """Pictures (N, 3, H, W), float32 in [0, 1], on the CPU; `call`: the other arguments of `pipe(...)`.

    checkers: keep the pipeline's safety checker and watermark, as pictures for people should.

    Raises ConfigError for a call that the pipeline refuses.
    """
    images = []
    with quiet(pipe, checkers=checkers), torch.random.fork_rng():
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            torch.manual_seed(seeds[first])  # some pipelines draw from the global generator
            given = for_prompts(prompts[part], call)
            with refusals(pipe, call):
                arrays = pipe(**given, generator=generators(seeds[part]), output_type="np")[0]
            images.append(torch.as_tensor(arrays).float().permute(0, 3, 1, 2)[:, :3])
    return torch.cat(images)


@torch.no_grad()
def score(
    reward: "Reward", images: Tensor, prompts: Sequence[str], *, batch: int = 8, device: Any = "cpu"
) -> dict[str, Tensor]:
    """`{name of a part: (N,) in its own units, "reward": (N,)}`."""
    rows: list[dict[str, Tensor]] = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        total, parts = reward.parts(images[part].to(device), list(prompts[part]))
        rows.append({name: value.float().cpu() for name, value in (parts | {"reward": total}).items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def save_images(images: Tensor, folder: Path, *, first: int = 0) -> list[Path]:
    """`folder`/000.png ... (from `first` on), each written whole or not at all; gives the paths."""
    paths = [folder / f"{first + index:03d}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        with atomic(path) as temporary:
            to_pil(image).save(temporary)
    return paths


def save_grid(columns: dict[str, Tensor], prompts: Sequence[str], path: Path, *, per_row: int = 3) -> None:
    """Write the PNG `path`: for every prompt one picture of each column side by side, the caption under them.

    columns: {"before": (N, 3, H, W) in [0, 1], "after": ...}, headings included. per_row: prompts in a row of the
    sheet. Small pictures are enlarged to 160 pixels, large ones reduced to 384.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(columns.values()))
    width = max(160, min(first.shape[-1], 384))
    height = round(width * first.shape[-2] / first.shape[-1])
    font, gap, line = ImageFont.load_default(13), 6, 17
    cell = len(columns) * (width + gap) - gap
    captions = [_wrap(text, font, cell)[:4] for text in prompts]
    pitch_x, pitch_y = cell + 4 * gap, height + line * max(map(len, captions)) + 4 * gap
    rows = math.ceil(len(prompts) / per_row)
    canvas = Image.new("RGB", (min(per_row, len(prompts)) * pitch_x + 2 * gap, rows * pitch_y + line + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for index, caption in enumerate(captions):
        x, y = 3 * gap + index % per_row * pitch_x, line + gap + index // per_row * pitch_y
        for place, (heading, images) in enumerate(columns.items()):
            left = x + place * (width + gap)
            if index < per_row:
                pen.text((left, gap // 2), heading, fill="dimgray", font=font)
            canvas.paste(to_pil(images[index]).resize((width, height), Image.Resampling.LANCZOS), (left, y))
        for row, text in enumerate(caption):
            pen.text((x, y + height + gap + row * line), text, fill="black", font=font)
    with atomic(path) as temporary:
        canvas.save(temporary)


def to_pil(image: Tensor) -> Any:
    """(3, H, W) in [0, 1] -> an 8-bit PIL image."""
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
