"""Runs of the command on a tiny pipeline saved on disk: what the tests of trainer, command and bad input share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import stable_diffusion

BASE = {
    "reward": "brightness",
    "method": {"name": "drtune", "options": {"K": 2, "m": 2}},
    "prompts": ["red heart", "blue star", "green moon"],
    "sampling": {"steps": 4, "guidance": 3.0, "width": 16, "height": 16},
    "adapter": {"rank": 4},
    "optim": {"steps": 2, "lr": 3e-3, "batch": 2},
    "eval": {"count": 2},
}


def save_tiny(folder: Path) -> Path:
    """A tiny random Stable Diffusion as an ordinary diffusers folder."""
    pipe, _ = stable_diffusion(lora=False)
    pipe.save_pretrained(folder)
    return folder


def write_run(folder: Path, path: Path, **changes: Any) -> Path:
    """`folder`/run.yaml for the model at `path`: BASE with whole sections replaced; None drops a section."""
    values = {"model": str(path), "output_dir": str(folder / "out"), **BASE, **changes}
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return run


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
