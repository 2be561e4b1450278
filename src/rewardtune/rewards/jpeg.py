"""JPEG as a function of tensors: I -> d(c(I)), baseline, 4:2:0, without the lossless entropy coding.

Integer quantisation tables by libjpeg's formula, the JFIF colour matrix, samples of 8 bits on both ways, chroma
averaged over 2x2 pixels and brought back bilinearly (libjpeg's "fancy" up-sampling). Left out: its integer arithmetic
in the two transforms and in the up-sampling, which rounds now and then to the other side.
"""

import io
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.contract import full

# ITU-T T.81, tables K.1 and K.2 (luma, chroma).
LUMA = [
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
]  # fmt: skip
CHROMA = [
    [17, 18, 24, 47, 99, 99, 99, 99], [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99], [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]  # fmt: skip
# JFIF: RGB in [0, 255] -> Y, Cb - 128, Cr - 128.
YCC = [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]]


Rounding = Callable[[Tensor], Tensor]


def jpeg(images: Tensor, quality: int, *, rounding: Rounding = torch.round, samples: Rounding = torch.round) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [0, 1]; any H and W.

    rounding: of the coefficients. samples: of Y, Cb, Cr and RGB to 8 bits; `torch.positive` leaves them as they are.
    """
    height, width = images.shape[-2:]
    pixels = F.pad(images * 255, (0, -width % 16, 0, -height % 16), mode="replicate")  # whole blocks of chroma
    to_ycc = pixels.new_tensor(YCC)
    ycc = samples(torch.einsum("kc,bchw->bkhw", to_ycc, pixels))
    half = F.avg_pool2d(ycc[:, 1:], 2)
    half = half if samples is torch.positive else samples(half + _ties(ycc))
    luma = samples(_quantise(ycc[:, :1] - 128, _table(LUMA, quality).to(ycc), rounding)) + 128
    chroma = samples(_quantise(half, _table(CHROMA, quality).to(ycc), rounding))
    chroma = samples(F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False))
    rgb = samples(torch.einsum("ck,bkhw->bchw", torch.linalg.inv(to_ycc), torch.cat([luma, chroma], dim=1)))
    return (rgb / 255).clamp(0, 1)[..., :height, :width]


def cubic_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3: near rounding, with a derivative that is not zero almost everywhere."""
    nearest = x.round()
    return nearest + (x - nearest) ** 3


def jpeg_bytes(images: Tensor, quality: int) -> Tensor:
    """The real file sizes (B,) in bytes, written by Pillow with 4:2:0; no gradient."""
    from PIL import Image

    sizes = []
    for image in full(images.detach()).clamp(0, 1).mul(255).round().to("cpu", torch.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        sizes.append(float(buffer.tell()))
    return torch.tensor(sizes, device=images.device)


def check_quality(quality: int) -> int:
    """libjpeg's quality, 1 to 100; ConfigError otherwise."""
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ConfigError(f"JPEG quality is {quality!r}; legal is a whole number from 1 (small file) to 100")
    return quality


def _ties(ycc: Tensor) -> Tensor:
    """(W/2,): -1/8, 1/8, -1/8, ... libjpeg rounds averages of four at .5 down and up by turns along a row; a quarter of
    them are. Of .0, .25 and .75 none changes sides."""
    return ycc.new_tensor([-0.125, 0.125]).repeat(ycc.shape[-1] // 4)


def _table(base: list[list[int]], quality: int) -> Tensor:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.tensor(base).mul(scale).add(50).div(100, rounding_mode="floor").clamp(1, 255)


def _quantise(planes: Tensor, table: Tensor, rounding: Rounding) -> Tensor:
    """8x8 DCT-II, round(c / q) * q, inverse DCT; planes (B, C, H, W) centred on 0, H and W multiples of 8."""
    n = torch.arange(8, dtype=planes.dtype, device=planes.device)
    dct = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)  # orthonormal: the inverse is the transpose
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)  # (B, C, H/8, W/8, 8, 8)
    blocks = dct.T @ (rounding(dct @ blocks @ dct.T / table) * table) @ dct
    return blocks.transpose(-2, -3).flatten(-4, -3).flatten(-2).clamp(-128, 127)  # as decoders clip, before colour
