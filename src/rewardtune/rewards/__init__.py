"""Rewards: callables (images (B, 3, H, W) in [0, 1], prompts) -> scores (B,), higher is better.

    reward = rewards.CLIPScore() + 0.2 * rewards.Symmetry(detach_std=True)
    total, natives = reward.parts(images, prompts)     # natives: {"clipscore": (B,), "symmetry": (B,)}

Names are imported when they are first used, so that `rewardtune ls rewards` needs no torch; networks are loaded, and
transformers imported, when a reward is made.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewardtune.rewards.aesthetic import Aesthetic, AffineEmbedding
    from rewardtune.rewards.base import Reward, from_callable
    from rewardtune.rewards.check import check_reward
    from rewardtune.rewards.clip import CLIPScore, CLIPSimilarity, HPSv2, PickScore
    from rewardtune.rewards.compose import balance, hinge, mean_of, minimum_of, relative, standardise, target
    from rewardtune.rewards.imagereward import ImageReward
    from rewardtune.rewards.loading import BUILTIN, load
    from rewardtune.rewards.objectness import Objectness
    from rewardtune.rewards.pixels import Brightness, Colour, Compressibility, JPEGBytes, Symmetry

__all__ = [
    "BUILTIN",
    "Aesthetic",
    "AffineEmbedding",
    "Brightness",
    "CLIPScore",
    "CLIPSimilarity",
    "Colour",
    "Compressibility",
    "HPSv2",
    "ImageReward",
    "JPEGBytes",
    "Objectness",
    "PickScore",
    "Reward",
    "Symmetry",
    "balance",
    "check_reward",
    "from_callable",
    "hinge",
    "load",
    "mean_of",
    "minimum_of",
    "relative",
    "standardise",
    "target",
]

_HOME = {
    "BUILTIN": "loading",
    "Aesthetic": "aesthetic",
    "AffineEmbedding": "aesthetic",
    "Brightness": "pixels",
    "CLIPScore": "clip",
    "CLIPSimilarity": "clip",
    "Colour": "pixels",
    "Compressibility": "pixels",
    "HPSv2": "clip",
    "ImageReward": "imagereward",
    "JPEGBytes": "pixels",
    "Objectness": "objectness",
    "PickScore": "clip",
    "Reward": "base",
    "Symmetry": "pixels",
    "balance": "compose",
    "check_reward": "check",
    "from_callable": "base",
    "hinge": "compose",
    "load": "loading",
    "mean_of": "compose",
    "minimum_of": "compose",
    "relative": "compose",
    "standardise": "compose",
    "target": "compose",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewardtune.rewards' has no attribute {name!r}")
    return getattr(import_module(f"rewardtune.rewards.{_HOME[name]}"), name)
