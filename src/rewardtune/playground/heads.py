"""Auxiliary tasks for the small CLIP's towers; their heads are thrown away after the training.

From captions alone a vision transformer of this size learnt colours and places in 600 steps and no shape; asked
which pixels are object, where the object's centre is and which shape a patch lies on, it learns shapes as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import place_of
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZE,
    SIZES,
    Description,
    Mention,
    Object,
    Scene,
    coverage,
)

PATCH = 8  # pixels a side of a vision tower's patch
WIDTH = 96  # of both towers


def patch_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each patch lies on: object masks (n, patches, 64), numbers of shape and colour (n, patches; -100 where
    no object is) and (dx, dy, radius) of the object in patches (n, patches, 3)."""
    fine, coarse = torch.arange(SIZE) + 0.5, PATCH * (torch.arange(SIZE // PATCH) + 0.5)
    masks = torch.zeros(len(scenes), SIZE, SIZE)
    kinds = torch.full((2, len(scenes), len(coarse), len(coarse)), -100)
    geometry = torch.zeros(len(scenes), len(coarse), len(coarse), 3)
    for shape in SHAPES:
        drawn = [(i, o) for i, scene in enumerate(scenes) for o in scene.objects if o.shape == shape]
        if not drawn:
            continue
        x, y, r = (torch.tensor([getattr(o, name) for _, o in drawn])[:, None, None] for name in ("x", "y", "radius"))
        inside = coverage(shape, (fine[None, None, :] - x) / r, (fine[None, :, None] - y) / r, r)
        dx, dy = torch.broadcast_tensors(x - coarse[None, None, :], y - coarse[None, :, None])
        near = dx.square() + dy.square() < r.square()
        where = torch.stack([dx, dy, r.expand_as(dx)], -1) / PATCH
        for (i, o), mask, here, there in zip(drawn, inside, near, where, strict=True):
            masks[i] += mask
            kinds[0, i][here], kinds[1, i][here] = SHAPES.index(shape), list(COLOURS).index(o.colour)
            geometry[i][here] = there[here]
    tiles = F.unfold(masks[:, None], PATCH, stride=PATCH).transpose(1, 2)
    return tiles.clamp(0, 1), kinds[0].flatten(1), kinds[1].flatten(1), geometry.flatten(1, 2)


class Heads(nn.Module):
    """The CLIP and the heads of its auxiliary losses, which are thrown away."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        colours, shapes, places = len(COLOURS), len(SHAPES), len(PLACES)
        self.clip = clip
        self.present = nn.Linear(WIDTH, colours * shapes)  # both towers: which objects
        self.named = nn.Linear(WIDTH, (colours + shapes) * (places + len(SIZES)) + len(BACKGROUNDS))  # text
        self.where = nn.Linear(WIDTH, (colours + shapes) * places)  # vision
        self.mask = nn.Linear(WIDTH, PATCH * PATCH)
        self.geometry = nn.Linear(WIDTH, 3)
        self.shape = nn.Linear(WIDTH, shapes)
        self.colour = nn.Linear(WIDTH, colours)

    def of_texts(self, pooled: Tensor, descriptions: Sequence[Description]) -> Tensor:
        """The loss of reading captions: which objects, and which places, sizes and background are named for them."""
        attributes = [*PLACES, *SIZES]
        named = [
            {(word, given) for m in d.mentions for word in (m.colour, m.shape) for given in (m.place, m.size) if given}
            for d in descriptions
        ]
        pairs = [(word, attribute) for word in (*COLOURS, *SHAPES) for attribute in attributes]
        target = [[pair in row for pair in pairs] for row in named]
        grounds = [[d.background == name for name in BACKGROUNDS] for d in descriptions]
        wanted = torch.cat([torch.tensor(target), torch.tensor(grounds)], 1).float()
        objects = presence([d.mentions for d in descriptions])
        return 10 * (_bce(self.present(pooled), objects) + _bce(self.named(pooled), wanted))

    def of_pictures(self, scenes: Sequence[Scene], vision: Any) -> tuple[Tensor, Tensor]:
        """The loss of looking, from inner layers to the last and the pooled picture; and the share of object
        patches that know their shape."""
        masks, shapes, colours, geometry = patch_targets(scenes)
        _, first, second, *_ = vision.hidden_states
        patches, on = vision.last_hidden_state[:, 1:], shapes >= 0
        places = [[place_of(o.x, o.y) for o in scene.objects] for scene in scenes]
        where = [
            [
                any(place in there and word in (o.colour, o.shape) for o, there in zip(s.objects, row, strict=True))
                for word in (*COLOURS, *SHAPES)
                for place in PLACES
            ]
            for s, row in zip(scenes, places, strict=True)
        ]
        guess = self.shape(patches)[on]
        loss = (
            2 * _bce(self.mask(first[:, 1:]), masks)
            + F.smooth_l1_loss(self.geometry(second[:, 1:])[on], geometry[on])
            + F.cross_entropy(guess, shapes[on])
            + 0.3 * F.cross_entropy(self.colour(patches)[on], colours[on])
            + 10 * _bce(self.present(vision.pooler_output), presence([s.objects for s in scenes]))
            + 3 * _bce(self.where(vision.pooler_output), torch.tensor(where).float())
        )
        return loss, (guess.argmax(-1) == shapes[on]).float().mean()


_bce = F.binary_cross_entropy_with_logits


def presence(rows: Sequence[Sequence[Mention | Object]]) -> Tensor:
    """Which of the 42 colour-shape pairs are there (n, 42)."""
    target = torch.zeros(len(rows), len(SHAPES) * len(COLOURS))
    for row, objects in zip(target, rows, strict=True):
        for o in objects:
            row[SHAPES.index(o.shape) * len(COLOURS) + list(COLOURS).index(o.colour)] = 1
    return target
