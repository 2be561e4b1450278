"""The small denoiser: a `UNet2DConditionModel` of 2.9 M parameters on 16x16x4 latents.

Stable Diffusion 2's recipe at a small size: v-prediction, its betas, 10% dropped captions, averaged weights, the
small CLIP's text encoder as it is; and a loss that sees the layout, see `weight`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import encode
from .heads import WIDTH
from .scenes import draw_scenes, render
from .training import Draw, Schedule, draw_for, fingerprint, fit
from .words import tokens

SCHEDULE = Schedule(steps=10000, batch=32, lr=1e-3, ema=0.999, shards=2)
FINISH = replace(SCHEDULE, steps=5000, lr=5e-4)  # a second course: the first ends with too many third objects
SCENES = 32_000  # cached latents
DROPPED = 0.1  # share of captions replaced by the empty one
GAMMA = 5.0
PLACED = 0.25  # share of the draws that are taken from captions with a named place


def unet() -> Any:
    """An untrained `UNet2DConditionModel`; captions are attended to on the two inner levels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",  # the time step scales what it used to add to: steps share less
        norm_num_groups=8,
    )


def scheduler() -> Any:
    """Stable Diffusion's noise schedule as a DDIM scheduler that clips nothing."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def cached_latents(vae: Any, file: Path, *, scenes: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents (scenes, 4, 16, 16) in float16 and their captions, from `file` where it was made of the same."""
    identity = {"scenes": scenes, "seed": seed, "made_from": fingerprint(vae)}
    if not file.exists() or torch.load(file, weights_only=True).get("identity") != identity:
        latents, captions = [], []
        with torch.no_grad():
            for start in range(0, scenes, 250):
                drawn = draw_scenes(min(250, scenes - start), draw_for(seed, "latents", start).rng)
                latents.append(encode(vae, render(drawn)).half())
                captions += [scene.caption for scene in drawn]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".tmp")
        torch.save({"identity": identity, "latents": torch.cat(latents), "captions": captions}, part)
        os.replace(part, file)
    stored = torch.load(file, weights_only=True)
    return stored["latents"], stored["captions"]


def weight(snr: Tensor) -> Tensor:
    """The weight of v's squared error at a signal-to-noise ratio: x0's error weighs min(snr, gamma) (Hang et al. 2023)
    times snr^-1/2 where noise prevails. Where an object goes is decided at ratios near 0.01, and there a wrong place
    costs hardly any error in epsilon. (v's squared error is 1 + snr times x0's.)"""
    return snr.clamp(max=GAMMA) * snr.clamp(max=1) ** -0.5 / (1 + snr)


def train_unet(
    vae: Any,
    clip: Any,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    finish: Schedule = FINISH,
    scenes: int = SCENES,
    seed: int = 0,
    stop_after: int | None = None,
    workers: int = 1,
) -> Any:
    """Train the denoiser on latents of `vae` and texts of `clip`, in two courses; returns the averaged UNet.

    The second course starts from the averaged weights of the first; its checkpoint lies beside the first's.
    """
    latents, captions = cached_latents(vae, checkpoint.parent / "latents.pt", scenes=scenes, seed=seed)
    ids = torch.cat([tokens(tokenizer, captions), tokens(tokenizer, [""])]).to(torch.int32)
    torch.manual_seed(seed)
    model, alphas = unet(), scheduler().alphas_cumprod
    n = schedule.batch // schedule.shards
    placed = torch.tensor([i for i, caption in enumerate(captions) if " on the " in caption or " at the " in caption])

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(latents), (n,), generator=draw.noise)
        if len(placed):
            chosen = placed[torch.randint(len(placed), (n,), generator=draw.noise)]
            rows = torch.where(torch.rand(n, generator=draw.noise) < PLACED, chosen, rows)
        dropped = torch.rand(n, generator=draw.noise) < DROPPED
        with torch.no_grad():
            text = clip.text_model(input_ids=ids[torch.where(dropped, len(latents), rows)].long()).last_hidden_state
        x0 = latents[rows].float()
        epsilon = torch.randn(x0.shape, generator=draw.noise)
        t = torch.randint(len(alphas), (n,), generator=draw.noise)
        a = alphas[t].view(-1, 1, 1, 1)
        signal, noise = a.sqrt(), (1 - a).sqrt()
        predicted = model(signal * x0 + noise * epsilon, t, text).sample
        error = F.mse_loss(predicted, signal * epsilon - noise * x0, reduction="none").mean((1, 2, 3))
        return (error * weight((a / (1 - a)).view(-1))).mean(), {"mse": error.mean().item()}

    settings: dict[str, Any] = {"loss": loss, "seed": seed, "stop_after": stop_after, "workers": workers}
    settings["upstream"] = (clip.text_model, latents)
    model = fit("unet", model, schedule=schedule, checkpoint=checkpoint, **settings)
    model = model.requires_grad_(True).train()
    return fit("finish", model, schedule=finish, checkpoint=checkpoint.with_stem("finish"), **settings)
