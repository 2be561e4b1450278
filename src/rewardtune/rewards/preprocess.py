"""From images in [0, 1] to a network's input: torch only, differentiable, the numbers of the PIL processors.

On 8-bit images it agrees with `CLIPImageProcessor` to rounding: about 0.3/255 on average, 3/255 at most when
shrinking. Antialiasing is not optional: without it shrinking 512 -> 224 is off by 9/255 on average and a quarter of
the pixels get no gradient.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from rewardtune.rewards.contract import full


def crop_preprocess(images: Tensor, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """CLIP's preprocessing: short side to `size`, centre crop, normalise. (B, 3, H, W) -> (B, 3, size, size)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = resize(images, height=int(size * height / short), width=int(size * width / short))
    return normalise(centre_crop(resized, size), mean=mean, std=std)


def resize(images: Tensor, *, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing in float32, clamped to [0, 1] as 8-bit images are; the identity at equal size."""
    images = full(images)
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The middle (B, 3, size, size); an odd rest is floored, as transformers does."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)
