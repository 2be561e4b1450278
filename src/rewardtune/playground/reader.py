"""An independent reader of the playground's pictures: pixels to objects, without any network.

The background is the named pair of tones that explains most pixels; what it does not explain falls into connected
parts; a part's colour is the nearest palette colour of its inner pixels, its shape the outline that, drawn with the
part's area and centre of mass, overlaps best. It knows how scenes are drawn and nothing of any trained network, so
it can judge them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import place_of
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Description, Mention, Scene, coverage, parse, size_of

MIN_AREA = 30.0  # pixels; the smallest object of the world covers about 80
MIN_DISTANCE = 0.17  # RGB distance from the background, half of what the palette guarantees

BLURS = (0.0, 1.0, 1.8)  # pixels: outlines are compared under these, since decoders soften small shapes


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One object found: centre (x, y) and radius in pixels, box (left, top, right, bottom) in pixels with the
    right and lower ends excluded, `fit` the overlap (0 to 1) with an ideal drawing of that shape."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    box: tuple[int, int, int, int]
    area: float
    fit: float

    @property
    def places(self) -> set[str]:
        return place_of(self.x, self.y)

    @property
    def size(self) -> str:
        return size_of(self.radius)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The objects of a picture, largest first, and its background (None where no named one comes near)."""

    objects: tuple[Seen, ...]
    background: str | None


Kept = tuple[bool, bool, bool | None, bool | None]  # colour, shape, place, size


@dataclass(frozen=True, kw_only=True)
class Match:
    """What of a caption a picture keeps. `objects` holds (colour, shape, place, size) for each mention, given the best
    assignment of distinct objects to mentions; the flags say whether all mentions hold. `place` and `size` are None
    where the caption names none."""

    colour: bool
    number: bool
    place: bool | None
    shape: bool
    size: bool | None
    background: bool
    objects: tuple[Kept, ...]


def read(image: Tensor) -> Reading:
    """Read one picture, (3, 64, 64) with values in [0, 1]."""
    if image.shape != (3, SIZE, SIZE):
        raise ValueError(f"read takes one image of shape (3, {SIZE}, {SIZE}), got {tuple(image.shape)}")
    pixels = image.detach().float().cpu().permute(1, 2, 0)  # (H, W, 3)
    background, far = _background(pixels)
    seen = [_object(pixels, far, part, background) for part in _parts(pixels, far)]
    ordered = sorted((s for s in seen if s is not None), key=lambda s: -s.area)
    error = far.clamp(max=0.3).mean().item()
    return Reading(objects=tuple(ordered), background=background if error < 0.2 else None)


def count_objects(images: Tensor) -> Tensor:
    """The number of objects in each of `images` (B, 3, 64, 64) in [0, 1]; a LongTensor (B,)."""
    return torch.tensor([len(read(image).objects) for image in images], dtype=torch.long)


def matches(caption: str | Description | Scene, reading: Reading) -> Match:
    """Compare a caption (text, description or scene) with a reading; the order of mentions does not matter."""
    if isinstance(caption, Scene):
        caption = caption.description
    described = parse(caption) if isinstance(caption, str) else caption
    mentions = described.mentions
    slots = [*reading.objects[: len(mentions) + 3], *[None] * len(mentions)]
    choices = ([_compare(m, s) for m, s in zip(mentions, p, strict=True)] for p in permutations(slots, len(mentions)))
    best = max(choices, key=lambda rows: [sum(bool(row[i]) for row in rows) for i in range(4)])
    places = [place for _, _, place, _ in best if place is not None]
    sizes = [size for _, _, _, size in best if size is not None]
    return Match(
        colour=all(colour for colour, _, _, _ in best),
        number=len(reading.objects) == len(mentions),
        place=all(places) if places else None,
        shape=all(shape for _, shape, _, _ in best),
        size=all(sizes) if sizes else None,
        background=reading.background == described.background,
        objects=tuple(best),
    )


def _compare(mention: Mention, seen: Seen | None) -> Kept:
    if seen is None:
        return False, False, False if mention.place else None, False if mention.size else None
    place = mention.place in seen.places if mention.place else None
    size = mention.size == seen.size if mention.size else None
    return mention.colour == seen.colour, mention.shape == seen.shape, place, size


def _background(pixels: Tensor) -> tuple[str, Tensor]:
    """The best background and each pixel's distance (H, W) from the line between its two tones."""
    distances = {}
    for name, tones in BACKGROUNDS.items():
        upper, lower = torch.tensor(tones)
        along = ((pixels - upper) @ (lower - upper) / (lower - upper).square().sum()).clamp(0, 1)[..., None]
        distances[name] = (pixels - torch.lerp(upper, lower, along)).norm(dim=-1)
    best = min(distances, key=lambda name: distances[name].clamp(max=0.3).mean().item())
    return best, distances[best]


def components(mask: Tensor) -> list[Tensor]:
    """The connected parts (four neighbours) of a boolean mask (H, W), as masks of at least MIN_AREA pixels."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        wide = F.max_pool2d(labels[None, None], (1, 3), 1, (0, 1))
        tall = F.max_pool2d(labels[None, None], (3, 1), 1, (1, 0))
        spread = torch.maximum(wide, tall)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    numbers, counts = labels[mask].unique(return_counts=True)
    return [labels == number for number, count in zip(numbers, counts, strict=True) if count >= MIN_AREA]


def _eroded(mask: Tensor) -> Tensor:
    return F.max_pool2d(1 - mask.float()[None, None], 3, 1, 1)[0, 0] == 0


def _nearest_colour(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest palette colour of pixels (..., 3), and its distance."""
    gaps = (pixels[..., None, :] - torch.tensor(list(COLOURS.values()))).norm(dim=-1)
    distance, number = gaps.min(-1)
    return number, distance


def _parts(pixels: Tensor, far: Tensor) -> list[Tensor]:
    """Masks (H, W) of the objects: connected parts, split where two palette colours each fill a core of one."""
    parts = []
    for part in components(far > MIN_DISTANCE):
        number, distance = _nearest_colour(pixels[_eroded(part)])
        sizes = torch.bincount(number[distance < 0.2], minlength=len(COLOURS))
        colours = [i for i, size in enumerate(sizes.tolist()) if size >= 25 and size >= 0.15 * int(sizes.sum())]
        if len(colours) < 2:
            parts.append(part)
            continue
        palette = torch.tensor(list(COLOURS.values()))[colours]
        owner = (pixels[..., None, :] - palette).norm(dim=-1).argmin(-1)
        parts += [piece for i in range(len(colours)) for piece in components(part & (owner == i))]
    return parts


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area and vertical centre of mass of a shape of radius 1."""
    axis = (torch.arange(256) + 0.5) / 256 * 2.6 - 1.3
    inside = coverage(shape, axis[None, :], axis[:, None], 256 / 2.6)
    return (inside.mean() * 2.6**2).item(), ((inside * axis[:, None]).sum() / inside.sum()).item()


def _outline(shape: str, area: float, cx: float, cy: float) -> tuple[Tensor, float, float]:
    """A shape (H, W) drawn with this area and centre of mass, its radius and the y of its own centre."""
    unit, centre = _moments(shape)
    radius = (area / unit) ** 0.5
    axis, y = torch.arange(SIZE) + 0.5, cy - centre * radius
    return coverage(shape, (axis[None, :] - cx) / radius, (axis[:, None] - y) / radius, radius), radius, y


def _blurred(masks: Tensor, sigma: float) -> Tensor:
    """Masks (n, 1, H, W) under a Gaussian blur."""
    if not sigma:
        return masks
    kernel = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    return F.conv2d(F.conv2d(masks, kernel, padding=(0, 5)), kernel.transpose(-1, -2), padding=(5, 0))


def _overlap(ideal: Tensor, alpha: Tensor) -> Tensor:
    """Soft intersection over union of masks (n, H, W) with one mask (H, W)."""
    return torch.minimum(ideal, alpha).sum((-2, -1)) / torch.maximum(ideal, alpha).sum((-2, -1))


def _object(pixels: Tensor, far: Tensor, part: Tensor, background: str) -> Seen | None:
    """Colour, place and shape of one part; None where too little is left."""
    strong = part & (far >= far[part].median())
    colour = list(COLOURS)[int(_nearest_colour(pixels[strong].median(0).values)[0])]
    tones = torch.tensor(BACKGROUNDS[background])
    full = (torch.tensor(COLOURS[colour]) - tones).norm(dim=-1).min()
    grown = F.max_pool2d(part.float()[None, None], 3, 1, 1)[0, 0]
    alpha = ((far / full).clamp(0, 1) - 0.05).clamp_min(0) / 0.95 * grown  # share of each pixel that is object
    area = alpha.sum().item()
    if area < MIN_AREA:
        return None
    axis = torch.arange(SIZE) + 0.5
    cx, cy = (alpha.sum(0) @ axis).item() / area, (alpha.sum(1) @ axis).item() / area
    outlines = [_outline(shape, area, cx, cy) for shape in SHAPES]
    ideal = torch.stack([inside for inside, _, _ in outlines])[:, None]  # (shapes, 1, H, W)
    fits = torch.stack([_overlap(_blurred(ideal, sigma)[:, 0], alpha) for sigma in BLURS]).max(0).values
    winner = int(fits.argmax())
    _, radius, y = outlines[winner]
    shape, fit = SHAPES[winner], fits[winner].item()
    rows, columns = (part.any(1).nonzero(), part.any(0).nonzero())
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return Seen(colour=colour, shape=shape, x=cx, y=y, radius=radius, box=box, area=area, fit=fit)
