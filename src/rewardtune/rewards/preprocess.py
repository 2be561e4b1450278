"""From images in [0, 1] to a network's input: torch only, differentiable, the numbers of the official processors.

On 8-bit images it agrees with the PIL processors of transformers to rounding: 0.3/255 on average and 3/255 at most
when shrinking (`tests/test_preprocess.py`). Everything is float32 or wider, whatever the network's own precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.contract import full
from rewardtune.spelling import nearest

FITS = ("crop", "letterbox", "squash")
CLAMPS = ("hard", "ste", "none")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize (bicubic), fit, clamp, normalise: (B, 3, H, W) in [0, 1] -> (B, 3, size, size), float32 or wider.

    size: side of the network's input. mean, std: per channel.
    fit: "crop" brings the short side to `size` and cuts the middle out (CLIP); "letterbox" brings the long side to
    `size` and pads with black (hpsv2); "squash" gives up the aspect ratio (OWL-ViT). One and the same for squares.
    round_rest: half of what "crop" cuts off, where it is no whole pixel, is rounded to even, as torchvision does for
    open_clip, OpenAI's CLIP and ImageReward; else down, as transformers does. Oblong images differ by a pixel.
    antialias: False resizes as torchvision did for tensors before 0.17 and so, probably, as HPS was trained. Shrinking
    512 to 224 the two differ by 9/255 on average, and without it a part of the pixels gets no gradient.
    clamp: bicubic filters overshoot; 8-bit images cannot. "hard" clamps, and kills the gradient where it does; "ste"
    clamps and passes the gradient on as if it had not; "none" leaves the overshoot, as hpsv2 does.
    random_shift: before shrinking by the factor f, shift each image by 0..ceil(f) pixels down and right, the seam
    filled with its own border; by torch's global CPU generator, and only while a gradient is asked for (DRTune,
    section 4.3, for 1024 pixels). Without it a network that sees every f-th pixel always sees the same ones.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: str = "crop"
    antialias: bool = True
    clamp: str = "hard"
    random_shift: bool = False
    round_rest: bool = False

    def __post_init__(self) -> None:
        for field, legal in (("fit", FITS), ("clamp", CLAMPS)):
            given = getattr(self, field)
            if given not in legal:
                raise ConfigError(f"{field} is {given!r}{nearest(str(given), list(legal))}; legal: {', '.join(legal)}")
        for field in ("antialias", "random_shift", "round_rest"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} is {getattr(self, field)!r}; legal: true, false")

    def __call__(self, images: Tensor) -> Tensor:
        height, width = self._resized(*images.shape[-2:])
        if self.random_shift and torch.is_grad_enabled() and images.requires_grad:
            down, right = _shifts(images.shape[-2] / height), _shifts(images.shape[-1] / width)
            images = shift(images, down=down, right=right) if down or right else images
        images = resize(images, height=height, width=width, antialias=self.antialias, clamp=self.clamp)
        if self.fit == "letterbox":
            images = letterbox(images, self.size)
        else:
            images = centre_crop(images, self.size, round_rest=self.round_rest)
        return normalise(images, mean=self.mean, std=self.std)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width between the resize and the fit, rounded as the originals do."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "letterbox":  # hpsv2 rounds, transformers truncates
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)


def resize(images: Tensor, *, height: int, width: int, antialias: bool = True, clamp: str = "hard") -> Tensor:
    """Bicubic, in float32 or wider; the identity at equal size. `antialias`, `clamp`: see Preprocess."""
    images = full(images)
    if images.shape[-2:] == (height, width):
        return images
    images = F.interpolate(images, (height, width), mode="bicubic", antialias=antialias, align_corners=False)
    if clamp == "none":
        return images
    inside = images.clamp(0, 1)
    return inside if clamp == "hard" else images + (inside - images).detach()


def shift(images: Tensor, *, down: int, right: int) -> Tensor:
    """Each image moved by its own 0..down and 0..right pixels, drawn uniformly; the border is repeated.

    The two numbers of an image are drawn one after the other, so that they do not depend on how a batch is cut.
    """
    padded = F.pad(full(images), (right, 0, down, 0), mode="replicate")
    height, width = images.shape[-2:]
    offsets = (torch.rand(len(images), 2, dtype=torch.float64) * torch.tensor([down + 1, right + 1])).long().tolist()
    moved = zip(padded, offsets, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in moved])


def letterbox(images: Tensor, size: int) -> Tensor:
    """Black around (B, 3, <=size, <=size); an odd rest goes to the right and the bottom, as in hpsv2."""
    high, wide = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def centre_crop(images: Tensor, size: int, *, round_rest: bool = False) -> Tensor:
    """The middle (B, 3, size, size). `round_rest`: see Preprocess."""
    rests = images.shape[-2] - size, images.shape[-1] - size
    top, left = (round(rest / 2) if round_rest else rest // 2 for rest in rests)
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def _shifts(factor: float) -> int:
    """ceil(r_out / r_in) where that shrinks, else 0."""
    return math.ceil(factor) if factor > 1 else 0
