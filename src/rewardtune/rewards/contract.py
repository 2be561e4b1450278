"""The contract, checked at the entrance and the exit of every reward, at the price of one min and max."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.errors import RewardError


def full(x: Tensor) -> Tensor:
    """float32 or wider: rewards are never computed in half precision outside their network."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_inputs(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """RewardError unless images are (B, 3, H, W), float, finite and in [0, 1], and prompts are B strings.

    A NaN or infinite pixel is refused here, by the index of its image, for every reward: a resize or an attention
    spreads it over all others, and a clamp hides it.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise RewardError(
            f"reward '{name}': images are {_given(images)}; legal is a tensor (B, 3, H, W){_cure(images)}"
        )
    if not images.is_floating_point():
        raise RewardError(f"reward '{name}': images are {images.dtype}; legal is float in [0, 1]: images.float() / 255")
    low, high = images.detach().aminmax()
    if not (low.isfinite() and high.isfinite()):
        broken = (~images.detach().isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise RewardError(
            f"reward '{name}': NaN or infinite pixels in image {', '.join(map(str, broken))} of {len(images)}; "
            "legal are finite ones in [0, 1]: an fp16 decoder overflows (use float32 or bfloat16), or training diverged"
        )
    if low < -0.01 or high > 1.01:  # slack for finite differences
        hint = "(images + 1) / 2" if low >= -1.01 and high <= 1.01 else "images.clamp(0, 1) or a division by 255"
        raise RewardError(f"reward '{name}': images run from {low:.2f} to {high:.2f}; legal is [0, 1]: try {hint}")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        given = "one string" if isinstance(prompts, str) else f"prompts are a {type(prompts).__name__}"
    elif len(prompts) != len(images):
        given = f"{len(prompts)} prompts"
    else:
        strange = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        if not strange:
            return
        given = f"prompt {strange[0]} is a {type(prompts[strange[0]]).__name__}"
    raise RewardError(
        f"reward '{name}': {given} for {len(images)} images; legal is a list of strings, one for each image"
    )


def _given(images: object) -> str:
    """Of what kind they are, in a few words."""
    kind = type(images).__name__
    if isinstance(images, list | tuple):
        return f"a {kind} of {len(images)}" + (f" ({type(images[0]).__name__} first)" if images else "")
    shape = getattr(images, "shape", None)
    return f"a {kind}" + (f" {tuple(shape)}" if shape is not None else "")


def _cure(images: object) -> str:
    """What to write where these were meant as images."""
    if isinstance(images, list | tuple) and images and all(isinstance(image, Tensor) for image in images):
        return ": torch.stack(images)" if images[0].ndim == 3 else ": torch.cat(images)"
    if not isinstance(images, Tensor):  # what pipelines give by default, or by output_type="np"
        return ': of a pipeline pipe(..., output_type="pt").images' if images is not None else ""
    shape = tuple(images.shape)
    if 0 in shape:
        return "; this one is empty"
    if len(shape) == 3 and shape[0] == 3:
        return ": one image is images[None]"
    if len(shape) == 4 and shape[1] == 1:
        return ": grey images are images.expand(-1, 3, -1, -1)"
    if len(shape) == 4 and shape[1] == 4:
        return ": leave the transparency out, images[:, :3]"
    if len(shape) == 4 and shape[3] in (3, 4):
        return ": channels last are images[..., :3].permute(0, 3, 1, 2)"
    return ""


def check_scores(who: str, scores: Tensor, *, batch: int) -> None:
    """RewardError unless `who` answered with one float per image."""
    if not isinstance(scores, Tensor):
        raise RewardError(f"{who} returned {type(scores).__name__}; legal is a tensor of shape ({batch},)")
    if scores.shape != (batch,):
        if scores.ndim == 0 or scores.numel() == 1 != batch:
            hint = "drop the .mean() over the batch"
        elif scores.numel() == batch:
            hint = "add .squeeze(-1)" if scores.shape == (batch, 1) else "add .flatten()"
        else:
            hint = "reduce each image to one number"
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
