"""Runs of the command on a tiny pipeline saved on disk: what the tests of trainer, command and bad input share."""

from __future__ import annotations

import errno
import json
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


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What each update logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict[str, Any]:
    """The facts of the run."""
    return json.loads((folder / "run.json").read_text())


def full_disk(tensors: Any, filename: str | Path, metadata: Any = None) -> None:
    """safetensors' `save_file` where the space ends half-way."""
    Path(filename).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def made_run(folder: Path, path: Path, *, seed: int = 0, kind: str = "lora", **changes: Any) -> Path:
    """`folder` as training leaves it, as far as evaluation reads it: config.yaml, and weights drawn instead of trained.

    Seconds quicker than a run of the command. path: of the tiny model.
    """
    from diffusers import StableDiffusionPipeline

    from rewardtune import adapters
    from rewardtune.config import dump_config, load_config

    folder.mkdir(parents=True)
    adapter = {"kind": kind} | ({} if kind == "full" else {"rank": 4})
    run = write_run(folder, path, output_dir=str(folder), adapter=adapter, **changes)
    (folder / "config.yaml").write_text(dump_config(load_config(run)))
    run.unlink()
    pipe = StableDiffusionPipeline.from_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.attach(pipe.unet, kind=kind, rank=4, seed=seed):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapters.save(pipe, folder)
    return folder
