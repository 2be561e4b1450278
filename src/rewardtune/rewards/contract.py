"""The contract, checked at the entrance and the exit of every reward, at the price of one min and max."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.errors import RewardError


def full(x: Tensor) -> Tensor:
    """float32 or wider: rewards are never computed in half precision outside their network."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_inputs(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """RewardError unless images are (B, 3, H, W) float in [0, 1] and prompts are B strings."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(getattr(images, "shape", ()))
        raise RewardError(
            f"reward '{name}': images are a {type(images).__name__} {shape}; legal is a tensor (B, 3, H, W)"
        )
    if not images.is_floating_point():
        raise RewardError(f"reward '{name}': images are {images.dtype}; legal is float in [0, 1]: images.float() / 255")
    low, high = images.detach().aminmax()
    if low < -0.01 or high > 1.01:  # slack for finite differences; NaN passes, it is not the range that is wrong then
        hint = "(images + 1) / 2" if low >= -1.01 and high <= 1.01 else "images.clamp(0, 1) or a division by 255"
        raise RewardError(f"reward '{name}': images run from {low:.2f} to {high:.2f}; legal is [0, 1]: try {hint}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(f"reward '{name}': {given} for {len(images)} images; legal is a list with one for each image")


def check_scores(who: str, scores: Tensor, *, batch: int) -> None:
    """RewardError unless `who` answered with one float per image."""
    if not isinstance(scores, Tensor):
        raise RewardError(f"{who} returned {type(scores).__name__}; legal is a tensor of shape ({batch},)")
    if scores.shape != (batch,):
        hints = {1: "drop the .mean() over the batch", batch: "add .squeeze(-1)"}
        hint = hints.get(scores.numel(), "reduce each image to one number")
        raise RewardError(
            f"{who} returned the shape {tuple(scores.shape)} for {batch} images; legal is ({batch},): {hint}"
        )
    if not scores.is_floating_point():
        raise RewardError(f"{who} returned {scores.dtype}; legal is a float tensor, which can have a gradient")


def check_size(name: str, images: Tensor, *, height: int, width: int) -> None:
    """RewardError for images too small for what the reward measures."""
    if images.shape[-2] < height or images.shape[-1] < width:
        raise RewardError(
            f"reward '{name}': images are {images.shape[-2]}x{images.shape[-1]} (height x width); legal is "
            f"{height}x{width} or larger: ask the pipeline for a larger height and width"
        )
