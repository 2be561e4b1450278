"""Makes the pictures beside it: `python tests/pictures/make.py`. Drawn from seeds, so they are ours to publish.

Four kinds of content that a JPEG treats differently: grain and edges, smooth shading, saturated colours (chroma is
stored at half size), and clipped highlights on black. The tests read the PNGs, never this file, so that a new version
of torch cannot move what they measure.
"""

from pathlib import Path

import torch
from torch import Tensor


def cloud(height: int, width: int, *, power: float, generator: torch.Generator) -> Tensor:
    """(H, W) noise of spectrum 1/f^power, mean 0, std 1; photographs have about 1.5 here."""
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    noise = torch.fft.rfft2(torch.randn(height, width, generator=generator))
    field = torch.fft.irfft2(noise * frequency.clamp_min(1 / max(height, width)) ** -power, s=(height, width))
    return field / field.std()


def disc(height: int, width: int, *, y: float, x: float, radius: float) -> Tensor:
    """(H, W), 1 inside, 0 outside; y, x and radius in units of the height and width."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (((rows - y * height) ** 2 + (columns - x * width) ** 2) < (radius * height) ** 2).float()


def grain() -> Tensor:
    """Texture on all scales, little colour, one hard edge."""
    height, width, generator = 160, 160, torch.Generator().manual_seed(0)
    luma = 0.5 + 0.18 * cloud(height, width, power=1.5, generator=generator)
    rgb = torch.stack([luma + 0.04 * cloud(height, width, power=1.5, generator=generator) for _ in range(3)])
    inside = disc(height, width, y=0.6, x=0.4, radius=0.2)
    return rgb * (1 - 0.4 * inside) + torch.tensor([0.3, 0.05, 0.0]).view(3, 1, 1) * inside


def sky() -> Tensor:
    """Smooth shading: a gradient, soft clouds, a ground in shadow, a sensor's noise. Sides are no multiples of 8."""
    height, width, generator = 150, 173, torch.Generator().manual_seed(1)
    fall = torch.linspace(0, 1, height)[:, None].expand(height, width)
    blue = torch.stack([0.25 + 0.5 * fall, 0.45 + 0.35 * fall, 0.9 - 0.2 * fall])
    white = (0.35 * cloud(height, width, power=2.2, generator=generator) - 0.1).clamp(0, 1)
    ground = torch.sigmoid(60 * (fall - 0.75)) * (0.7 + 0.1 * cloud(height, width, power=1.2, generator=generator))
    noise = 0.004 * torch.randn(3, height, width, generator=generator)
    return (blue + white) * (1 - ground) + torch.tensor([0.2, 0.16, 0.1]).view(3, 1, 1) * ground + noise


def market() -> Tensor:
    """Saturated colours against each other, shaded and textured as cloth is."""
    height, width, generator = 160, 160, torch.Generator().manual_seed(2)
    rgb = torch.full((3, height, width), 0.6)
    for _ in range(24):
        y, x, radius = torch.rand(3, generator=generator).tolist()
        colour = torch.rand(3, generator=generator).view(3, 1, 1)
        inside = disc(height, width, y=y, x=x, radius=0.08 + 0.15 * radius)
        rgb = rgb * (1 - inside) + colour * inside
    return rgb * (1 + 0.12 * cloud(height, width, power=1.3, generator=generator))


def night() -> Tensor:
    """Lamps on black: most of it is at 0 or at 255, where decoders clip what rings."""
    height, width, generator = 160, 160, torch.Generator().manual_seed(3)
    light = 0.05 * cloud(height, width, power=1.6, generator=generator).expand(3, height, width)
    for _ in range(12):
        y, x, radius = torch.rand(3, generator=generator).tolist()
        colour = (0.6 + torch.rand(3, generator=generator)).view(3, 1, 1)
        light = light + colour * disc(height, width, y=y, x=x, radius=0.02 + 0.05 * radius)
    return light


def main() -> None:
    from PIL import Image

    for draw in (grain, sky, market, night):
        pixels = draw().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(Path(__file__).parent / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
