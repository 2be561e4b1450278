"""The small autoencoder: 64x64 pixels to 16x16x4 latents and back, 0.13 M parameters.

`AutoencoderTiny`, because `AutoencoderKL` of that size is five times slower on a CPU. Two terms beside the
reconstruction make its latents good to diffuse: each channel is pulled to mean 0 and deviation 1 (Stable
Diffusion's pipeline knows a scale and no shift), and the decoder sees slightly noisy latents.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .scenes import draw_scenes, render
from .training import Draw, Schedule, fit

SCHEDULE = Schedule(steps=3500, batch=16, lr=2e-3, shards=2)
LATENT_NOISE = 0.05  # deviation of the noise on the latents in training, in units of theirs


def autoencoder() -> Any:
    """An untrained `AutoencoderTiny`: little at full size, where a block costs most."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(24, 24, 24),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )


def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents (n, 4, 16, 16) of deviation about 1 of `images` (n, 3, 64, 64) in [0, 1]."""
    return vae.encode(images * 2 - 1).latents * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (n, 3, 64, 64) in [0, 1] of latents as `encode` gives them."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def train_autoencoder(
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    stop_after: int | None = None,
    workers: int = 1,
) -> Any:
    """Train, measure the latents' deviation on fresh scenes and write it into the config."""
    torch.manual_seed(seed)
    vae = autoencoder().to(memory_format=torch.channels_last)  # 1.6 times faster here

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        images = render(draw_scenes(schedule.batch // schedule.shards, draw.rng)) * 2 - 1
        latents = vae.encode(images).latents
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        spread = (deviation - 1).square().mean() + mean.square().mean()
        noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=draw.noise)
        error = vae.decode(noisy).sample - images
        mse = error.square().mean()
        return mse + 0.05 * error.abs().mean() + 0.003 * spread, {"psnr": psnr_of(mse.item() / 4)}

    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    fit("vae", vae, loss=loss, workers=workers, **settings)
    with torch.no_grad():
        images = render(draw_scenes(128, draw_fresh(seed)))
        vae.register_to_config(scaling_factor=round(1 / vae.encode(images * 2 - 1).latents.std().item(), 4))
    return vae


def draw_fresh(seed: int) -> random.Random:
    """A generator of scenes that no training step uses."""
    return random.Random(f"{seed}/fresh")


def psnr_of(mse: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error of images in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-10))
