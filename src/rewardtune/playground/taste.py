"""Written tastes: what the playground's reward models are taught, as pure functions of a caption and a picture.

`vivid` and `calm` are the two tastes that pairs are labelled with: both want the caption kept first, and differ in
what they like of pictures that keep it equally well. `beauty` is the rule behind the aesthetic ratings; it knows no
caption. What they value was chosen so that a small vision tower can see it, on scenes of the train split
(docs/playground.md tells what was given up), before anything was measured on the eval split. Left out: people.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from torch import Tensor

from .captions import KINDS, negative, place_of
from .scenes import (
    ANY_SIZE,
    SIZE,
    Description,
    Mention,
    Object,
    Scene,
    arrange,
    blurred,
    draw_description,
    render,
    size_of,
)

SATURATION, LIGHT, BLUR = (0.5, 1.3), (0.5, 1.2), 3.0  # below half the saturation colours cannot be told
MISTAKE = 1.5  # what one mistake costs; more than the best picture is ahead of the worst that keeps as much
TIE = 0.05  # between scores this near a taste has no preference, as one may answer for Pick-a-Pic's pairs
PLAIN = 0.3  # share of pictures that show their scene as it is


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A scene as it is shown. saturation: of all colours, 0 is grey; light: factor on all values; blur: deviation of
    a Gaussian in pixels. The scene's own description is true of it; a caption that asks for the picture need not be."""

    scene: Scene
    saturation: float = 1.0
    light: float = 1.0
    blur: float = 0.0


Taste = Callable[[Description, Picture], float]
Choice = tuple[Description, list[Picture]]  # a caption and pictures to choose from


def show(pictures: Sequence[Picture]) -> Tensor:
    """Images (n, 3, 64, 64) in [0, 1] of `n` pictures."""
    images = render([p.scene for p in pictures])
    saturation, light = (torch.tensor([getattr(p, k) for p in pictures]).view(-1, 1, 1, 1) for k in _COLOURING)
    grey = images.mean(1, keepdim=True)
    images = (torch.lerp(grey, images, saturation) * light).clamp(0, 1)
    for i, picture in enumerate(pictures):
        if picture.blur:
            images[i] = blurred(images[i : i + 1], picture.blur, reach=8)[0]
    return images


_COLOURING = ("saturation", "light")


def mistakes(asked: Description, scene: Scene) -> int:
    """How much of a caption a scene does not keep, under the best assignment of objects to mentions: 1 for each wrong
    colour, shape, place or size and for the background, 2 for each object that is missing or too many."""
    wanted, there = len(asked.mentions), len(scene.objects)
    slots = [*scene.objects, *[None] * (wanted - there)]
    best = min(sum(map(_wrong, asked.mentions, chosen)) for chosen in permutations(slots, wanted))
    return best + 2 * abs(wanted - there) + (asked.background != scene.description.background)


def _wrong(mention: Mention, drawn: Object | None) -> int:
    if drawn is None:  # counted as missing
        return 0
    faults = [mention.colour != drawn.colour, mention.shape != drawn.shape]
    faults += [mention.place is not None and mention.place not in place_of(drawn.x, drawn.y)]
    faults += [mention.size is not None and mention.size != size_of(drawn.radius)]
    return sum(faults)


def vivid(asked: Description, picture: Picture) -> float:
    """The caption first; then large objects, well apart from each other, in full colours, sharp."""
    liked = 0.35 * bigness(picture.scene) + 0.2 * apart(picture.scene)
    liked += 0.25 * _within(picture.saturation, SATURATION) + 0.2 * (1 - picture.blur / BLUR)
    return liked - MISTAKE * mistakes(asked, picture.scene)


def calm(asked: Description, picture: Picture) -> float:
    """The caption first; then a quiet picture: small objects near the middle, dark, in muted colours, sharp."""
    liked = 0.2 * (1 - bigness(picture.scene)) + 0.15 * balance(picture.scene)
    liked += 0.3 * (1 - _within(picture.light, LIGHT)) + 0.15 * (1 - _within(picture.saturation, SATURATION))
    liked += 0.2 * (1 - picture.blur / BLUR)
    return liked - MISTAKE * mistakes(asked, picture.scene)


def bigness(scene: Scene) -> float:
    """Mean radius of the objects, 0 (all as small as can be) to 1."""
    return _within(sum(o.radius for o in scene.objects) / len(scene.objects), ANY_SIZE)


def apart(scene: Scene) -> float:
    """How far the centres of two objects are from each other, 0 (24 pixels and less) to 1 (48); 1 for a single one."""
    gaps = [((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 for a, b in combinations(scene.objects, 2)]
    return min((_within(gap, (24.0, 48.0)) for gap in gaps), default=1.0)


def balance(scene: Scene) -> float:
    """How near the objects' centre of mass is to the picture's middle: 1 there, 0 from 18 pixels on."""
    weights = [o.radius**2 for o in scene.objects]
    x, y = (
        sum(w * getattr(o, axis) for w, o in zip(weights, scene.objects, strict=True)) / sum(weights) - SIZE / 2
        for axis in ("x", "y")
    )
    return 1 - _within((x * x + y * y) ** 0.5, (0.0, 18.0))


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))


TASTES: dict[str, Taste] = {"pickscore": vivid, "hpsv2": calm}  # which model is taught which


def prefer(first: float, second: float) -> float:
    """What a taste answers to a pair that it scores so: 1 for the first, 0 for the second, 0.5 for neither."""
    return 0.5 if abs(first - second) < TIE else float(first > second)


def draw_choices(n: int, rng: random.Random, *, each: int, split: str = "train") -> list[Choice]:
    """`n` captions of a split with `each` pictures. Half of the pictures keep their caption; the others were drawn for
    a caption that differs from it in one attribute, and so make a mistake or (a wrong place of an object whose place
    nobody asked for) none."""
    asked = [draw_description(rng, split=split) for _ in range(n)]
    return [(one, [draw_picture(one, rng, split=split) for _ in range(each)]) for one in asked]


def draw_picture(asked: Description, rng: random.Random, *, split: str = "train") -> Picture:
    """One picture for a caption, as `draw_choices` says."""
    scene = arrange(asked, rng)
    wrong = negative(scene, rng.choice(KINDS), rng, split=split, tries=200) if rng.random() < 0.5 else None
    if wrong is not None and not _crowded(wrong):
        scene = arrange(wrong, rng)
    if rng.random() < PLAIN:
        return Picture(scene=scene)
    saturation, light = rng.uniform(*SATURATION), rng.uniform(*LIGHT)
    blur = rng.uniform(0.4, BLUR) if rng.random() < 0.5 else 0.0
    return Picture(scene=scene, saturation=saturation, light=light, blur=blur)


def _crowded(description: Description) -> bool:
    """Two objects at the same named place, where two large ones do not fit."""
    places = [m.place for m in description.mentions if m.place]
    return len(set(places)) < len(places)


# name: how much of beauty it has, 0 to 1
WARMTH = {"red": 1.0, "pink": 0.9, "yellow": 0.8, "white": 0.5, "purple": 0.4, "blue": 0.2, "green": 0.0}
ROUNDNESS = {"circle": 1.0, "heart": 1.0, "ring": 0.8, "star": 0.4, "square": 0.1, "triangle": 0.0}
GROUND = {"night": 1.0, "sea": 0.8, "forest": 0.6, "sand": 0.4, "fog": 0.2, "brick": 0.0}


def beauty(scene: Scene) -> float:
    """The rating of a scene, 1 to 10: warm colours, round shapes, a deep background, and, which captions leave free, a
    well filled picture with its objects high up."""
    objects = scene.objects
    warm = sum(WARMTH[o.colour] for o in objects) / len(objects)
    soft = sum(ROUNDNESS[o.shape] for o in objects) / len(objects)
    filled = min(1.0, sum(o.radius**2 for o in objects) / 400)
    high = 1 - sum(o.y for o in objects) / len(objects) / SIZE
    ground = GROUND[scene.description.background]
    return 1 + 9 * (0.25 * warm + 0.15 * soft + 0.15 * ground + 0.25 * filled + 0.2 * high)
