"""Rewards that read the pixels alone: no network, no download. Prompts are ignored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.base import Reward
from rewardtune.rewards.contract import check_size, full
from rewardtune.rewards.jpeg import check_quality, cubic_round, jpeg, jpeg_bytes
from rewardtune.spelling import nearest


class Symmetry(Reward):
    """||I - flip(I)||_1 / std(I), less is better (DRTune, eq. 6).

    The mirror is left-right, the L1 norm a mean over channels and pixels (only that fits the paper's 0.55-0.78), std
    one number per image over the same: 0 for a symmetric image, 2/sqrt(pi) = 1.128 for independent Gaussian pixels,
    unchanged by a scale or shift of the pixels.

    detach_std: a constant as the denominator's gradient. A large std lowers the quotient too, so with eq. 6 as
    printed a model can brighten the background instead of mirroring the scene (docs/log.md). True closes that.
    eps: added to the variance, which keeps flat images finite.
    """

    minimise = True

    def __init__(self, *, detach_std: bool = False, eps: float = 1e-8) -> None:
        if not isinstance(detach_std, bool):
            raise ConfigError(f"symmetry: detach_std is {detach_std!r}; legal: true, false")
        if not eps > 0:
            raise ConfigError(f"symmetry: eps is {eps!r}; legal is above 0 (1e-8), or a flat image gives NaN")
        self.detach_std, self.eps = detach_std, eps

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_size(self.name, images, height=1, width=2)
        images = full(images)
        std = (images.var(dim=(1, 2, 3), correction=0) + self.eps).sqrt()
        std = std.detach() if self.detach_std else std
        return (images - images.flip(-1)).abs().mean(dim=(1, 2, 3)) / std


class Compressibility(Reward):
    """mean (I - d(c(I)))^2 for JPEG, less is better (DRTune, eq. 7, on [0, 1]; about 0.001 for photographs).

    quality: libjpeg's, 1 to 100; the paper does not give its own.
    mode: "detach" takes d(c(I)) as a constant target, which is the exact gradient almost everywhere, since rounding
    has derivative 0. "cubic" differentiates through round(x) + (x - round(x))^3 of the coefficients, without the 8-bit
    samples: a surrogate that reads 7 to 22 percent lower. There is no straight-through mode: with rounding's
    derivative set to 1, d(c(I)) follows I and the gradient of the difference vanishes in luma.

    It pulls pixels onto the JPEG grid; files get smaller only as far as the generator follows. Log them beside it:
    `Compressibility() + 0 * JPEGBytes()`.
    """

    minimise = True

    def __init__(self, *, quality: int = 80, mode: str = "detach") -> None:
        if mode not in ("detach", "cubic"):
            raise ConfigError(
                f"compressibility: mode is {mode!r}{nearest(str(mode), ['detach', 'cubic'])}; "
                "legal: detach, cubic (straight-through would have no gradient)"
            )
        self.quality, self.mode = check_quality(quality), mode

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_size(self.name, images, height=16, width=16)
        images = full(images)
        if self.mode == "detach":
            target = jpeg(images.detach(), self.quality)
        else:
            target = jpeg(images, self.quality, rounding=cubic_round, samples=torch.positive)
        return (images - target).square().mean(dim=(1, 2, 3))


class JPEGBytes(Reward):
    """The real JPEG file size in bytes, by Pillow. Without a gradient, so for the log only: `0 * JPEGBytes()`."""

    name = "jpeg_bytes"
    minimise = True

    def __init__(self, *, quality: int = 80) -> None:
        self.quality = check_quality(quality)

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return jpeg_bytes(images, self.quality)


class Brightness(Reward):
    """The mean of all pixels, 0 to 1, more is better: the smallest reward there is."""

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return full(images).mean(dim=(1, 2, 3))


class Colour(Reward):
    """Mean squared distance to one colour, 0 to 1, less is better.

    colour: a name or hex code that Pillow knows ("teal", "#008080"), or (r, g, b) in [0, 1].
    """

    minimise = True

    def __init__(self, colour: str | Sequence[float]) -> None:
        self.rgb = torch.tensor(_rgb(colour)).view(3, 1, 1)

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (full(images) - self.rgb).square().mean(dim=(1, 2, 3))


def _rgb(colour: str | Sequence[float]) -> list[float]:
    from PIL import ImageColor

    if isinstance(colour, str):
        try:
            rgb = ImageColor.getrgb(colour)[:3]
        except ValueError:
            hint = nearest(colour.lower(), list(ImageColor.colormap))
            raise ConfigError(
                f"colour is '{colour}'{hint}; legal: a CSS name, #rrggbb or (r, g, b) in [0, 1]"
            ) from None
        if max(rgb) > 255:  # Pillow takes any number
            raise ConfigError(f"colour is '{colour}'; legal in rgb() is 0 to 255")
        return [value / 255 for value in rgb]
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ConfigError(f"colour is {tuple(colour)}; legal is (r, g, b) with each in [0, 1]: divide by 255")
    return [float(value) for value in colour]
