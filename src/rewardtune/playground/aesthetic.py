"""An aesthetic predictor: an affine head on the frozen small CLIP, fitted to ratings, as LAION's on a large one.

Scenes are rated from 1 to 10 by `taste.beauty`, each rating with an error of its own; the head minimises the squared
error over the normalised image embeddings, as LAION's. A small ridge keeps it off directions in which embeddings hardly
differ: without it |w| is 440 instead of 10, for 0.002 of correlation. Left out: LAION's hidden layers, which without
activations are an affine map as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clip import embed_images, soften, write_processor
from .scenes import Scene, draw_scenes, render
from .taste import beauty
from .training import draw_for

SCENES = 8_000
ERROR = 0.7  # deviation of a rating from the rule
RIDGE = 1e-4  # against a mean square of the embeddings' directions of about 1e-2
BATCH = 100


def ratings(scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """What somebody says of scenes (n,), 1 to 10, in float64."""
    return torch.tensor([min(10.0, max(1.0, beauty(s) + rng.gauss(0, ERROR))) for s in scenes], dtype=torch.float64)


@torch.no_grad()
def fit_head(clip: Any, *, scenes: int = SCENES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight (1, 96) and bias (1,) that foretell the ratings; a third of the pictures is softened as a denoiser's
    early predictions are."""
    rng = random.Random(f"{seed}/ratings")
    drawn = draw_scenes(scenes, rng)
    features = []
    for start in range(0, scenes, BATCH):
        images = render(drawn[start : start + BATCH])
        features.append(embed_images(clip, soften(images, draw_for(seed, "ratings", start))))
    known, told = torch.cat(features).double(), ratings(drawn, rng)
    mean, middle = known.mean(0), told.mean()
    away = known - mean
    squares = away.T @ away / scenes + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(squares, away.T @ (told - middle) / scenes)
    return weight[None].float(), (middle - weight @ mean)[None].float()


def write_aesthetic(folder: Path, clip: Any, head: tuple[Tensor, Tensor]) -> None:
    """Write the folder that `rewards.Aesthetic` opens: the CLIP's vision half, float16, and `head.safetensors`."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(clip.config.vision_config)
    for half in ("vision_model", "visual_projection"):
        getattr(model, half).load_state_dict(getattr(clip, half).state_dict())
    write_processor(folder)
    model.half().save_pretrained(folder)
    save_file({"weight": head[0].contiguous(), "bias": head[1].contiguous()}, folder / "head.safetensors")
