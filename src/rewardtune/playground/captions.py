"""Hard negatives: captions that differ from a scene's true one in a single attribute, and are false of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    PLACE_MARGIN,
    SHAPES,
    SIZE,
    SIZES,
    Description,
    Mention,
    Scene,
)

KINDS = ("colour", "shape", "size", "removed", "added", "place", "background", "binding")


def negative(
    scene: Scene, kind: str, rng: random.Random, *, split: str = "train", tries: int = 8
) -> Description | None:
    """A description false of `scene` by one attribute, of contents in `split`; None where none was found.

    `removed` leaves one of two objects out, `added` invents a second, `binding` swaps the two colours,
    `place` and `size` turn round what is named or, where the caption is silent, name what is wrong.
    """
    for _ in range(tries):
        changed = _EDITS[kind](scene, rng)
        if changed is not None and changed.split == split and _contents(changed) != _contents(scene.description):
            return changed
    return None


def place_of(x: float, y: float) -> set[str]:
    """The places that are true of an object centred at (x, y) pixels."""
    low, high = SIZE / 2 - PLACE_MARGIN, SIZE / 2 + PLACE_MARGIN
    true = {"left": x < low, "right": x > high, "top": y < low, "bottom": y > high}
    return {name for name, holds in true.items() if holds}


def _contents(description: Description) -> tuple[list[str], str]:
    return sorted(map(str, description.mentions)), description.background


def _with(scene: Scene, index: int, mention: Mention) -> Description:
    mentions = list(scene.description.mentions)
    mentions[index] = mention
    return replace(scene.description, mentions=tuple(mentions))


def _colour(scene: Scene, rng: random.Random) -> Description | None:
    i = rng.randrange(len(scene.objects))
    mention = scene.description.mentions[i]
    return _with(scene, i, replace(mention, colour=rng.choice([c for c in COLOURS if c != mention.colour])))


def _shape(scene: Scene, rng: random.Random) -> Description | None:
    i = rng.randrange(len(scene.objects))
    mention = scene.description.mentions[i]
    return _with(scene, i, replace(mention, shape=rng.choice([s for s in SHAPES if s != mention.shape])))


def _size(scene: Scene, rng: random.Random) -> Description | None:
    i = rng.randrange(len(scene.objects))
    mention, radius = scene.description.mentions[i], scene.objects[i].radius
    if mention.size:
        return _with(scene, i, replace(mention, size="small" if mention.size == "large" else "large"))
    (_, small), (large, _) = SIZES["small"], SIZES["large"]
    if small < radius < large:  # neither word would be false
        return None
    return _with(scene, i, replace(mention, size="large" if radius <= small else "small"))


def _removed(scene: Scene, rng: random.Random) -> Description | None:
    if len(scene.objects) < 2:
        return None
    return replace(scene.description, mentions=(rng.choice(scene.description.mentions),))


def _added(scene: Scene, rng: random.Random) -> Description | None:
    if len(scene.objects) > 1:
        return None
    first = scene.description.mentions[0]
    place = OPPOSITE[first.place] if first.place and rng.random() < 0.7 else None
    second = Mention(colour=rng.choice(list(COLOURS)), shape=rng.choice(SHAPES), place=place)
    mentions = [first, second] if first.place or rng.random() < 0.5 else [second, first]
    return replace(scene.description, mentions=tuple(mentions))


def _place(scene: Scene, rng: random.Random) -> Description | None:
    i = rng.randrange(len(scene.objects))
    mention, drawn = scene.description.mentions[i], scene.objects[i]
    wrong = [OPPOSITE[place] for place in sorted(place_of(drawn.x, drawn.y))]
    if mention.place:
        wrong = [OPPOSITE[mention.place]]
    return _with(scene, i, replace(mention, place=rng.choice(wrong))) if wrong else None


def _background(scene: Scene, rng: random.Random) -> Description | None:
    others = [name for name in BACKGROUNDS if name != scene.description.background]
    return replace(scene.description, background=rng.choice(others))


def _binding(scene: Scene, rng: random.Random) -> Description | None:
    if len(scene.objects) < 2:
        return None
    a, b = scene.description.mentions
    if a.colour == b.colour or a.shape == b.shape:  # the swapped caption would be true as well
        return None
    return replace(scene.description, mentions=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


_EDITS: dict[str, Callable[[Scene, random.Random], Description | None]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "removed": _removed,
    "added": _added,
    "place": _place,
    "background": _background,
    "binding": _binding,
}


def with_places(scene: Scene, rng: random.Random) -> Description:
    """The scene's description with one silent mention's true place named (unchanged where there is none)."""
    i = rng.randrange(len(scene.objects))
    mention, drawn = scene.description.mentions[i], scene.objects[i]
    true = sorted(place_of(drawn.x, drawn.y))
    return (
        _with(scene, i, replace(mention, place=rng.choice(true))) if true and not mention.place else scene.description
    )
