"""rewardtune: fine-tune any diffusers text-to-image pipeline to maximise a differentiable reward.

    from rewardtune import RewardTuner, methods, rewards

    tuner = RewardTuner(pipe, reward=rewards.Symmetry() + rewards.CLIPScore(), method=methods.drtune(K=5, m=20),
                        prompts="prompts.txt", output_dir="runs/symmetry")
    tuner.train(steps=1000, lr=2e-5)

Names are imported when they are first used, so that `import rewardtune` and `rewardtune --help` answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewardtune import methods, playground, rewards
    from rewardtune.adapters import add_lora, save_lora
    from rewardtune.engine import Sweep, Tape, count_steps, preflight, rollout
    from rewardtune.plan import Plan
    from rewardtune.trainer import RewardTuner

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "RewardTuner",
    "Sweep",
    "Tape",
    "add_lora",
    "count_steps",
    "methods",
    "playground",
    "preflight",
    "rewards",
    "rollout",
    "save_lora",
]

_HOME = {
    "Plan": "plan",
    "RewardTuner": "trainer",
    "Sweep": "engine",
    "Tape": "engine",
    "add_lora": "adapters",
    "count_steps": "engine",
    "preflight": "engine",
    "rollout": "engine",
    "save_lora": "adapters",
}


def __getattr__(name: str) -> Any:
    if name in ("methods", "playground", "rewards"):
        return import_module(f"rewardtune.{name}")
    if name in _HOME:
        return getattr(import_module(f"rewardtune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rewardtune' has no attribute {name!r}")
