"""Controlled edits for `audit`: the same picture with one thing changed, by pixels or by drawing its scene again.

Pixel edits keep size and content and need no prompt; they are mild, a reader would still call the picture the same.
Scene edits are the playground's: background, colour, shape, size and number change in the picture and in its caption
together, so that a reward that only wants the caption kept has no reason to prefer one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .rewards.jpeg import jpeg

if TYPE_CHECKING:
    from .playground import Scene

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """images (B, 3, H, W) in [0, 1] -> the same, edited. words: what a reward that likes it prefers."""

    words: str
    what: str
    apply: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images).clamp(0, 1)


def luma(images: Tensor) -> Tensor:
    """(B, 1, H, W): the brightness that eyes see (Rec. 601)."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Away from the picture's mean brightness, or towards it."""
    middle = luma(images).mean(dim=(2, 3), keepdim=True)
    return middle + factor * (images - middle)


def saturation(images: Tensor, factor: float) -> Tensor:
    """Away from grey, or towards it (0); the brightness stays."""
    grey = luma(images)
    return grey + factor * (images - grey)


def blur(images: Tensor, share: float) -> Tensor:
    """Gaussian, its standard deviation `share` of the short side."""
    sigma = share * min(images.shape[-2:])
    radius = max(1, min(round(3 * sigma), min(images.shape[-2:]) - 1))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=3)
    return F.conv2d(rows, kernel[:, :, :, None], groups=3)


def noise(images: Tensor, std: float) -> Tensor:
    """The same Gaussian noise on every picture of a size."""
    drawn = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    return images + std * drawn.to(images)


def hue(images: Tensor, degrees: float) -> Tensor:
    """Colours turned round the grey axis, the brightness kept (YIQ)."""
    to_yiq = images.new_tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    angle = torch.deg2rad(images.new_tensor(degrees))
    turn = torch.eye(3).to(images)
    turn[1, 1] = turn[2, 2] = angle.cos()
    turn[1, 2], turn[2, 1] = -angle.sin(), angle.sin()
    return torch.einsum("ij,bjhw->bihw", to_yiq.inverse() @ turn @ to_yiq, images)


def cast(images: Tensor, red: float, green: float, blue: float) -> Tensor:
    """One colour added everywhere."""
    return images + images.new_tensor([red, green, blue]).view(3, 1, 1)


def shift(images: Tensor, share: float) -> Tensor:
    """To the right by `share` of the width; the left edge is repeated."""
    pixels = max(1, round(share * images.shape[-1]))
    return F.pad(images, (pixels, 0, 0, 0), mode="replicate")[..., : images.shape[-1]]


def border(images: Tensor, share: float, value: float) -> Tensor:
    """A frame in front of the picture, `share` of the short side wide."""
    width = max(1, round(share * min(images.shape[-2:])))
    framed = torch.full_like(images, value)
    inner = (..., slice(width, -width), slice(width, -width))
    framed[inner] = images[inner]
    return framed


PIXEL_EDITS: tuple[Edit, ...] = (
    Edit(words="brighter pictures", what="x 1.25", apply=lambda x: 1.25 * x),
    Edit(words="darker pictures", what="x 0.8", apply=lambda x: 0.8 * x),
    Edit(words="more contrast", what="x 1.4 about the mean", apply=lambda x: contrast(x, 1.4)),
    Edit(words="less contrast", what="x 0.7 about the mean", apply=lambda x: contrast(x, 0.7)),
    Edit(words="more saturation", what="x 1.5 about grey", apply=lambda x: saturation(x, 1.5)),
    Edit(words="less saturation", what="x 0.5 about grey", apply=lambda x: saturation(x, 0.5)),
    Edit(words="grey pictures", what="saturation 0", apply=lambda x: saturation(x, 0)),
    Edit(words="blurred pictures", what="Gaussian, 1/64 of the side", apply=lambda x: blur(x, 1 / 64)),
    Edit(words="sharpened pictures", what="unsharp mask, 1/64 of the side", apply=lambda x: 2 * x - blur(x, 1 / 64)),
    Edit(words="noisy pictures", what="Gaussian, std 0.05", apply=lambda x: noise(x, 0.05)),
    Edit(words="other hues", what="turned by 120 degrees", apply=lambda x: hue(x, 120)),
    Edit(words="a red cast", what="red + 0.1", apply=lambda x: cast(x, 0.1, 0, 0)),
    Edit(words="a green cast", what="green + 0.1", apply=lambda x: cast(x, 0, 0.1, 0)),
    Edit(words="a blue cast", what="blue + 0.1", apply=lambda x: cast(x, 0, 0, 0.1)),
    Edit(words="JPEG artefacts", what="quality 20", apply=lambda x: jpeg(x, 20)),
    Edit(words="mirrored pictures", what="left-right", apply=lambda x: x.flip(-1)),
    Edit(words="pictures upside down", what="top-bottom", apply=lambda x: x.flip(-2)),
    Edit(words="shifted pictures", what="right by 1/8", apply=lambda x: shift(x, 1 / 8)),
    Edit(words="a white border", what="1/16 of the side", apply=lambda x: border(x, 1 / 16, 1)),
    Edit(words="a black border", what="1/16 of the side", apply=lambda x: border(x, 1 / 16, 0)),
)


def base_scenes(n: int, rng: Random) -> list[Scene]:
    """Scenes of two objects that differ in colour and in shape, whose captions name neither size nor place."""
    from .playground import draw_scenes

    found: list[Scene] = []
    while len(found) < n:
        (scene,) = draw_scenes(1, rng, layout="free")
        mentions = tuple(replace(mention, size=None) for mention in scene.description.mentions)
        if len({m.colour for m in mentions}) == len({m.shape for m in mentions}) == 2:
            found.append(replace(scene, description=replace(scene.description, mentions=mentions)))
    return found


def first_object(scene: Scene, *, colour: str | None = None, shape: str | None = None) -> Scene:
    """Another colour or shape of the first object, in the picture and in the caption."""
    mentions, objects = list(scene.description.mentions), list(scene.objects)
    colour, shape = colour or objects[0].colour, shape or objects[0].shape
    mentions[0] = replace(mentions[0], colour=colour, shape=shape)
    objects[0] = replace(objects[0], colour=colour, shape=shape)
    return replace(scene, description=replace(scene.description, mentions=tuple(mentions)), objects=tuple(objects))


def on_background(scene: Scene, *, name: str) -> Scene:
    return replace(scene, description=replace(scene.description, background=name))


def alone(scene: Scene) -> Scene:
    """The first object alone, in the picture and in the caption."""
    mentions = scene.description.mentions[:1]
    return replace(scene, description=replace(scene.description, mentions=mentions), objects=scene.objects[:1])


def resized(scene: Scene, factor: float) -> Scene:
    """Every object larger or smaller where it stands; the caption is silent on sizes."""
    return replace(scene, objects=tuple(replace(o, radius=factor * o.radius) for o in scene.objects))


SCENE_EDITS: Mapping[str, Callable[[Scene], Scene]] = {
    "larger objects": lambda scene: resized(scene, 1.15),
    "smaller objects": lambda scene: resized(scene, 0.85),
    "one object instead of two": alone,
}


def scene_factors() -> dict[str, dict[str, Callable[[Scene], Scene]]]:
    """{factor: {level: edit}}: every scene at every level, so that levels compare on the same scenes."""
    from .playground.scenes import BACKGROUNDS, COLOURS, SHAPES

    return {
        "background": {name: partial(on_background, name=name) for name in BACKGROUNDS},
        "colour": {name: partial(first_object, colour=name) for name in COLOURS},
        "shape": {name: partial(first_object, shape=name) for name in SHAPES},
    }


FALSE_CAPTIONS = {  # kinds of playground.captions.negative
    "colour": "a wrong colour",
    "shape": "a wrong shape",
    "removed": "an object that the caption leaves out",
    "place": "a wrong place",
    "background": "a wrong background",
    "binding": "the two colours exchanged",
}


def false_captions(scenes: Sequence[Scene], kind: str, rng: Random) -> list[str | None]:
    """For each scene a caption false by one attribute, of the same split; None where none was found."""
    from .playground.captions import negative

    found = (negative(scene, kind, rng, split=scene.description.split, tries=64) for scene in scenes)
    return [None if description is None else str(description) for description in found]
