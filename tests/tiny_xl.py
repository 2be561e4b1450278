"""A small SDXL with SDXL's own sampler settings, as a diffusers folder, and the FDXL recipe at its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_clip
from tiny import stable_diffusion_xl

# scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0
SDXL_SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SIDE = 40  # of the pictures; the reward's network sees 32 pixels, so the shift is 0..ceil(40 / 32) = 2


def save_tiny_xl(folder: Path, **options: Any) -> Path:
    """options: of `save_pretrained`, e.g. variant="fp16"."""
    from diffusers import EulerDiscreteScheduler

    pipe, _ = stable_diffusion_xl()
    pipe.unet.unload_lora()
    pipe.scheduler = EulerDiscreteScheduler.from_config(SDXL_SCHEDULER)
    pipe.save_pretrained(folder, **options)
    return folder


def save_tiny_hps(folder: Path) -> Path:
    """A complete small CLIP, which the reward hpsv2 opens as its own version."""
    folder.mkdir()
    return tiny_clip.save(folder)


def overrides(model: Path, hps: Path, output: Path, *more: str, side: int = SIDE) -> list[str]:
    """What turns the preset sdxl-fdxl into a run of seconds: sizes and places, and float32, which CPUs compute in."""
    return [
        f"model.id={model}",
        "model.dtype=float32",
        "model.variant=null",
        f"sampling.width={side}",
        f"sampling.height={side}",
        f"reward.0.options={{model: {hps}, random_shift: true}}",
        f"guards.rewards.0={{name: clipscore, options: {{model: {hps}}}}}",
        "prompts=[red heart, blue star, green moon, pink cat, grey dog]",
        "eval.prompts=[red heart, blue star]",
        "eval.count=2",
        f"output_dir={output}",
        *more,
    ]
