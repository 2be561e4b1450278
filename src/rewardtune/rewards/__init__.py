"""Rewards: callables (images (B, 3, H, W) in [0, 1], prompts) -> scores (B,), higher is better.

    reward = rewards.CLIPScore() + 0.2 * rewards.Symmetry(detach_std=True)
    total, natives = reward.parts(images, prompts)     # natives: {"clipscore": (B,), "symmetry": (B,)}

Networks are loaded, and transformers imported, when a reward is made, not here.
"""

from rewardtune.rewards.base import Reward, from_callable
from rewardtune.rewards.check import check_reward
from rewardtune.rewards.clip import CLIPScore
from rewardtune.rewards.loading import BUILTIN, load
from rewardtune.rewards.pixels import Brightness, Colour, Compressibility, JPEGBytes, Symmetry

__all__ = [
    "BUILTIN",
    "Brightness",
    "CLIPScore",
    "Colour",
    "Compressibility",
    "JPEGBytes",
    "Reward",
    "Symmetry",
    "check_reward",
    "from_callable",
    "load",
]
