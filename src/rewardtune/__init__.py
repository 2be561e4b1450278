"""rewardtune: fine-tune any diffusers text-to-image pipeline to maximise a differentiable reward."""

__version__ = "0.1.0"
