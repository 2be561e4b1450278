"""Every reward of the package, built small and offline: a row here enrols it in the contract and in the bad input.

The networks are those of the official code's fixtures (tests/golden): 32 pixels, random weights. The images are 40x56,
so that each is resized, and cropped, padded or squashed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from golden_rewards import BUILDERS, read
from torch import Tensor

from rewardtune import playground, rewards
from rewardtune.rewards import Reward, balance, hinge, mean_of, minimum_of, relative, standardise, target

HEIGHT, WIDTH = 40, 56
PROMPTS = ["a red cat", "two dogs", "a house"]
EVERYWHERE = (0, WIDTH)
WHOLE = ("hpsv2", "objectness")  # padded, squashed
CROPPED = (8, 48)  # a centre crop keeps 40 of 56 columns; the filter reaches over its edges by 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """columns: from and to, those that the preprocessing covers. rtol: of a batch of one against a batch of three."""

    make: Callable[[], Reward]
    columns: tuple[int, int] = EVERYWHERE
    differentiable: bool = True
    rtol: float = 1e-5


@cache
def network(name: str) -> Reward:
    with TemporaryDirectory() as folder:  # all weights are in memory afterwards
        return BUILDERS[name](read(name), Path(folder))


def images(count: int = len(PROMPTS)) -> Tensor:
    """(B, 3, 40, 56) in [0.25, 0.75]: no filter overshoots [0, 1] and no clamp closes."""
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(7)) / 2 + 0.25


def _playground(name: str, **settings: object) -> Reward:
    target = {"target": "heart"} if name == "objectness" else {}
    return rewards.load(name, {"model": "playground"} | target | settings)


def _redness(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[:, 0] - images[:, 1:].mean(dim=1)).square().mean(dim=(1, 2))


BUILT_IN = {
    "aesthetic": Row(make=lambda: network("aesthetic"), columns=CROPPED),
    "brightness": Row(make=rewards.Brightness),
    "clipscore": Row(make=lambda: network("clipscore"), columns=CROPPED),
    "colour": Row(make=lambda: rewards.Colour("teal")),
    "compressibility": Row(make=rewards.Compressibility),
    "hpsv2": Row(make=lambda: network("hpsv2")),
    "imagereward": Row(make=lambda: network("imagereward"), columns=CROPPED),
    "jpeg_bytes": Row(make=rewards.JPEGBytes, differentiable=False),
    "objectness": Row(make=lambda: network("objectness")),
    "pickscore": Row(make=lambda: network("pickscore"), columns=CROPPED),
    "symmetry": Row(make=rewards.Symmetry),
}

VARIANTS = {
    "compressibility, cubic": Row(make=lambda: rewards.Compressibility(mode="cubic", quality=20)),
    "symmetry, detach_std": Row(make=lambda: rewards.Symmetry(detach_std=True)),
    **{
        f"playground {name}": Row(make=partial(_playground, name), columns=EVERYWHERE if name in WHOLE else CROPPED)
        for name in playground.REWARDS
    },
    "micro-batches": Row(make=lambda: _playground("clipscore", micro_batch=2), columns=CROPPED),
    "no checkpointing": Row(make=lambda: _playground("clipscore", checkpointing=False, clamp="ste"), columns=CROPPED),
    "a function": Row(make=lambda: rewards.from_callable(_redness)),
}

COMPOSED = {
    "sum": Row(make=lambda: network("clipscore") - 0.2 * rewards.Symmetry() + 0 * rewards.JPEGBytes()),
    "hinge": Row(make=lambda: 1e-3 * hinge(network("imagereward"), 50.0), columns=CROPPED),
    "target": Row(make=lambda: target(rewards.Symmetry(), 0.3)),
    "standardise": Row(make=lambda: standardise(network("aesthetic"), mean=5.0, std=0.5), columns=CROPPED),
    "relative": Row(make=lambda: relative(network("clipscore"), "a {}", "no {}", k=0.5), columns=CROPPED),
    "mean_of": Row(make=lambda: mean_of(network("hpsv2"), network("clipscore"))),
    "minimum_of": Row(make=lambda: minimum_of(network("hpsv2"), hinge(network("objectness"), -9.0))),
    "balance": Row(make=lambda: balance(network("clipscore") + 0.2 * rewards.Symmetry() + 0 * rewards.JPEGBytes())),
}

ROWS = BUILT_IN | VARIANTS | COMPOSED
