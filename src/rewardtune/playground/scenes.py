"""The playground's world: captions, scenes and how a scene becomes 64x64 pixels.

One or two coloured shapes on a two-tone background with a horizon. Everything known of a picture is known
exactly: each scene has a caption, each caption parses back, and every random choice comes from the
`random.Random` that the caller passes. Most captions leave the layout free, so a picture may be re-arranged
without contradicting its caption; the rest name places. Left out on purpose: rotation, texture, occlusion.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels a side
OVERSAMPLING = 2  # scenes are drawn at twice the resolution and averaged down
GAP = 4.0  # pixels between two objects, and half as many to the frame
EVAL_SHARE = 8  # one in so many contents belongs to the eval split

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.08, 0.10),
    "yellow": (1.00, 0.90, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.10, 0.25, 0.95),
    "purple": (0.58, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.80),
    "white": (1.00, 1.00, 1.00),
}
# name: (tone above the horizon, tone below it); each at least 0.35 (RGB distance) from every object's colour
BACKGROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "night": ((0.07, 0.08, 0.22), (0.15, 0.12, 0.16)),
    "sea": ((0.45, 0.74, 0.88), (0.17, 0.50, 0.60)),
    "sand": ((0.86, 0.79, 0.58), (0.68, 0.55, 0.36)),
    "forest": ((0.08, 0.28, 0.18), (0.28, 0.22, 0.12)),
    "fog": ((0.64, 0.66, 0.69), (0.46, 0.47, 0.50)),
    "brick": ((0.52, 0.27, 0.20), (0.36, 0.18, 0.15)),
}
SIZES = {"small": (8.5, 10.5), "large": (13.5, 16.0)}
ANY_SIZE = (8.5, 16.0)  # radius in pixels where the caption names no size
MIDDLE_SIZE = 12.0  # pixels; a picture's object is small below it and large above
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
PLACE_MARGIN = 4.0  # an object is "on the left" when its centre is so many pixels left of the middle
HORIZON = (0.50, 0.66)  # share of the height
SIZED = 0.4  # share of the mentions that name a size


@dataclass(frozen=True, kw_only=True)
class Mention:
    """One object as a caption speaks of it; `size` and `place` are None where the caption is silent."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        words = ["a", self.size, self.colour, self.shape, self.place and PLACES[self.place]]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of a caption. `str()` is the caption, `parse` its inverse."""

    mentions: tuple[Mention, ...]
    background: str

    def __str__(self) -> str:
        return " and ".join(map(str, self.mentions)) + f", {self.background} background"

    @property
    def split(self) -> str:
        """`"train"` or `"eval"`, by the content (colours, shapes, background) and never by the wording:
        no order, size or place can carry a content from one split into the other."""
        content = [*sorted(f"{m.colour} {m.shape}" for m in self.mentions), self.background]
        return "train" if hashlib.sha256("|".join(content).encode()).digest()[0] % EVAL_SHARE else "eval"


@dataclass(frozen=True, kw_only=True)
class Object:
    """One drawn object: centre (x, y) and radius in pixels, y downwards."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A caption's description and one layout of it; `horizon` in pixels from the top."""

    description: Description
    objects: tuple[Object, ...]
    horizon: float

    @property
    def caption(self) -> str:
        return str(self.description)


_MENTION = re.compile(
    rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: ({'|'.join(PLACES.values())}))?"
)
_NAMES = {words: name for name, words in PLACES.items()}


def parse(caption: str) -> Description:
    """The description of a caption of this world; ValueError for any other text."""
    body, comma, tail = caption.partition(", ")
    background = tail.removesuffix(" background")
    found = [_MENTION.fullmatch(part) for part in body.split(" and ")]
    if not comma or background not in BACKGROUNDS or tail == background or not all(found):
        raise ValueError(f"{caption!r} is no caption of the playground, e.g. 'a red heart, night background'")
    mentions = (
        Mention(size=m[1], colour=m[2], shape=m[3], place=_NAMES[m[4]] if m[4] else None)
        for m in found
        if m is not None
    )
    return Description(mentions=tuple(mentions), background=background)


def draw_description(rng: random.Random, *, split: str = "train", layout: str = "any") -> Description:
    """A random description of one split. `layout`: `"free"` names no place, `"named"` names one or two,
    `"any"` is free in 65% of the cases."""
    if split not in ("train", "eval") or layout not in ("any", "free", "named"):
        raise ValueError(f"split {split!r} must be train or eval, layout {layout!r} must be any, free or named")
    named = layout == "named" or (layout == "any" and rng.random() >= 0.65)
    while True:
        kinds = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(rng.choice((1, 2, 2)))]
        if len(set(kinds)) < len(kinds):
            continue
        places: list[str | None] = [None, None]
        if named:
            first = rng.choice(list(PLACES))
            places = [first, OPPOSITE[first] if rng.random() < 0.7 else None]
        sizes = [rng.choice(list(SIZES)) if rng.random() < SIZED else None for _ in kinds]
        mentions = tuple(
            Mention(colour=colour, shape=shape, size=size, place=place)
            for (colour, shape), size, place in zip(kinds, sizes, places, strict=False)
        )
        description = Description(mentions=mentions, background=rng.choice(list(BACKGROUNDS)))
        if description.split == split:
            return description


def arrange(description: Description, rng: random.Random) -> Scene:
    """A random layout of a description: objects apart from each other, named places and sizes kept."""
    while True:
        objects: list[Object] = []
        for mention in description.mentions:
            r = rng.uniform(*(SIZES[mention.size] if mention.size else ANY_SIZE))
            low, high, middle = r + GAP / 2, SIZE - r - GAP / 2, SIZE / 2
            near, far = middle - 2 * PLACE_MARGIN, middle + 2 * PLACE_MARGIN
            x = rng.uniform(far if mention.place == "right" else low, near if mention.place == "left" else high)
            y = rng.uniform(far if mention.place == "bottom" else low, near if mention.place == "top" else high)
            objects.append(Object(colour=mention.colour, shape=mention.shape, x=x, y=y, radius=r))
        apart = all(
            (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (1.1 * (a.radius + b.radius) + GAP) ** 2
            for i, a in enumerate(objects)
            for b in objects[:i]
        )
        if apart:
            return Scene(description=description, objects=tuple(objects), horizon=SIZE * rng.uniform(*HORIZON))


def draw_scenes(n: int, rng: random.Random, *, split: str = "train", layout: str = "any") -> list[Scene]:
    """`n` random scenes with captions of one split."""
    return [arrange(draw_description(rng, split=split, layout=layout), rng) for _ in range(n)]


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of radius 1 at the origin (y downwards), negative inside."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1
    if shape == "ring":
        return ((x * x + y * y).sqrt() - 0.77).abs() - 0.25
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86
    if shape == "triangle":  # three half planes
        return torch.maximum(y - 0.15, 0.866 * x.abs() - 0.5 * (y - 0.15)) - 0.58
    if shape == "star":  # after Inigo Quilez, "sdStar5"
        return _star(x, y, radius=1.16, inner=0.46)
    if shape == "heart":  # after Inigo Quilez, "sdHeart"
        return _heart(x, y)
    raise ValueError(f"shape {shape!r} must be one of {SHAPES}")


def _star(x: Tensor, y: Tensor, *, radius: float, inner: float) -> Tensor:
    c1, s1, c2, s2 = 0.809016994375, -0.587785252292, -0.809016994375, -0.587785252292
    x, y = x.abs(), -y + 0.0
    d = 2 * (c1 * x + s1 * y).clamp_min(0)
    x, y = x - d * c1, y - d * s1
    d = 2 * (c2 * x + s2 * y).clamp_min(0)
    x, y = (x - d * c2).abs(), y - d * s2 - radius
    bx, by = -inner * s1, inner * c1 - 1
    h = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0, radius)
    return ((x - bx * h) ** 2 + (y - by * h) ** 2).sqrt() * torch.sign(y * bx - x * by)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.72
    x, y = x.abs() / scale, (0.92 - y) / scale
    lobe = ((x - 0.25) ** 2 + (y - 0.75) ** 2).sqrt() - 0.35355339
    m = 0.5 * (x + y).clamp_min(0)
    body = torch.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2).sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, body) * scale


def render(scenes: Sequence[Scene]) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1] of `n` scenes."""
    n, side = len(scenes), SIZE * OVERSAMPLING
    axis = (torch.arange(side) + 0.5) / OVERSAMPLING
    tones = torch.tensor([BACKGROUNDS[s.description.background] for s in scenes])  # (n, 2, 3)
    horizon = torch.tensor([s.horizon for s in scenes])[:, None]
    below = (axis - horizon).mul(OVERSAMPLING).add(0.5).clamp(0, 1)[:, None, :, None]  # (n, 1, side, 1)
    picture = (tones[:, 0, :, None, None] * (1 - below) + tones[:, 1, :, None, None] * below).expand(n, 3, side, side)
    picture = picture.contiguous()
    for slot in range(max(len(s.objects) for s in scenes)):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if len(s.objects) > slot and s.objects[slot].shape == shape]
            if not rows:
                continue
            drawn = [scenes[i].objects[slot] for i in rows]
            x, y, r = (torch.tensor([getattr(o, name) for o in drawn])[:, None, None] for name in ("x", "y", "radius"))
            inside = coverage(shape, (axis[None, None, :] - x) / r, (axis[None, :, None] - y) / r, r * OVERSAMPLING)
            colour = torch.tensor([COLOURS[o.colour] for o in drawn])[:, :, None, None]
            picture[rows] = torch.lerp(picture[rows], colour.expand(-1, 3, side, side), inside[:, None])
    return torch.nn.functional.avg_pool2d(picture, OVERSAMPLING)


def blurred(images: Tensor, sigma: float, *, reach: int) -> Tensor:
    """Images (n, 3, H, W) under a Gaussian of deviation `sigma` pixels, cut at `reach` pixels, the border repeated."""
    axis = torch.arange(-float(reach), reach + 1)
    kernel = torch.exp(-axis.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    wide = torch.nn.functional.conv2d(torch.nn.functional.pad(images, (reach,) * 4, mode="replicate"), kernel, groups=3)
    return torch.nn.functional.conv2d(wide, kernel.transpose(-1, -2), groups=3)


def size_of(radius: float) -> str:
    """The word for an object's radius in pixels."""
    return "small" if radius < MIDDLE_SIZE else "large"


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Share of each sample that a shape covers; x, y in units of its radius, `radius` in samples."""
    x, y = torch.broadcast_tensors(x, y)
    return (0.5 - distance(shape, x, y) * radius).clamp(0, 1)
