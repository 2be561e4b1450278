"""Does a reward keep the contract? One tiny forward and backward, before any training, or one clear line."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.errors import ConfigError, RewardError
from rewardtune.rewards.base import Reward, Scorer, as_reward, asked, leaves, unique_names
from rewardtune.rewards.contract import check_inputs


def check_reward(
    reward: Reward | Scorer, *, size: int | tuple[int, int], prompts: Sequence[str], device: torch.device | str = "cpu"
) -> None:
    """Try every part of a reward by itself on two random images in [0, 1] of `size` (a side, or height and width).

    Of a hinge, target, ensemble or balance it is the members that are tried: a hinge may well be satisfied by noise.

    Raises RewardError, naming the part and its sum, for a wrong shape, a NaN, a missing, zero or NaN gradient, and for
    samples that leak into each other. Parts of weight 0 are only logged and need no gradient.
    """
    reward = as_reward(reward)
    if not prompts or isinstance(prompts, str):
        raise ConfigError(f"check_reward: prompts is {prompts!r}; legal is a list with at least one prompt")
    parts = leaves(reward)
    if not any(trained for _, trained in parts):
        raise RewardError(f"reward '{reward.name}': every weight is 0; give at least one part a weight")
    sides = (size, size) if isinstance(size, int) else size
    two = isinstance(sides, tuple | list) and len(sides) == 2
    if not two or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"check_reward: size is {size!r}; legal is a side such as 512, or (height, width), in pixels")
    height, width = sides
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    pair = [prompts[0], prompts[-1]]
    check_inputs(reward.name, images, pair)
    for name, (part, trained) in zip(unique_names(part for part, _ in parts), parts, strict=True):
        who = f"reward '{name}'" + (f" (a part of '{reward.name}')" if part is not reward else "")
        leaf = images.clone().requires_grad_(trained)
        scores = _scores(who, part, leaf, pair)
        if trained:
            _check_gradients(who, scores, leaf)


def _scores(who: str, part: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    with torch.set_grad_enabled(images.requires_grad):
        scores, native = asked(part.to(images.device), images, prompts, who=who)
    for values in (scores, native):
        if not values.isfinite().all():
            raise RewardError(
                f"{who} scored random images {values.tolist()}; legal are finite numbers: "
                "look for a division by 0 or a log or root of a negative number"
            )
    return scores


def _check_gradients(who: str, scores: Tensor, images: Tensor) -> None:
    if not scores.requires_grad:
        raise RewardError(
            f"{who} has no gradient; legal is a score differentiable in the images: look for detach, "
            "no_grad, numpy, PIL or a rounding, or give it the weight 0 to log it only"
        )
    for own, other in ((0, 1), (1, 0)):
        try:
            (gradient,) = torch.autograd.grad(scores[own], images, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise RewardError(
                f"{who} raised {type(error).__name__} in its backward: {error}; legal is a score "
                "differentiable in the images: look for in-place operations"
            ) from error
        if gradient is None:
            raise RewardError(
                f"{who} has a gradient that does not reach the images; legal is a score differentiable "
                "in the images: look for detach, no_grad, numpy or PIL on the way from them"
            )
        if not gradient.isfinite().all():
            raise RewardError(
                f"{who} has a NaN or infinite gradient at random images; legal is a finite one: look for "
                "sqrt, norm or std at 0 (add 1e-8 inside), or for float16"
            )
        if gradient[other].any():
            raise RewardError(
                f"{who}: the score of image {own} changes with image {other}; legal is one score per "
                "image alone: look for batch norm in training mode or a mean over the batch"
            )
        if not gradient[own].any():
            raise RewardError(
                f"{who} has a gradient of exactly 0 at random images; legal "
                "is a slope: look for round, threshold, argmax, a relu or a saturated sigmoid"
            )
