"""The small CLIP: configuration and training of an ordinary `transformers.CLIPModel`.

The text tower learns alone to say what captions name, the vision tower then contrastively against it, with hard
negatives (captions wrong in one attribute) and the auxiliary tasks of `heads.py`. The text half conditions the UNet.
When that is trained, the vision tower learns on from the early stops it shows; the text half stays as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import KINDS, negative, with_places
from .heads import PATCH, WIDTH, Heads
from .quality import early_stops
from .scenes import SIZE, Scene, blurred, draw_description, draw_scenes, render
from .training import Draw, Schedule, fit
from .words import LENGTH, cut, tokens, write_tokenizer

TEXT_SCHEDULE = Schedule(steps=1500, batch=96, lr=2e-3, warmup=60)  # the text tower alone
SCHEDULE = Schedule(steps=2200, batch=96, lr=1e-3, warmup=60, weight_decay=0.02)  # then the vision tower
FINISH = replace(SCHEDULE, steps=900, lr=5e-4)  # and once more, on what the denoiser shows when it stops early
NEGATIVES = 3  # hard negatives per picture
MEAN, STD = (0.45, 0.40, 0.40), (0.30, 0.25, 0.27)


def write_processor(folder: Path) -> None:
    """Write the `CLIPImageProcessor` config."""
    from transformers import CLIPImageProcessor

    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


def small_clip(tokenizer: Any) -> Any:
    """An untrained `CLIPModel` of 0.78 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    shared: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    shared |= {"hidden_act": "gelu"}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id}
    text = shared | special | {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = shared | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def normalise(images: Tensor) -> Tensor:
    """Images (n, 3, 64, 64) in [0, 1] as the vision tower wants them."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def embed_images(clip: Any, images: Tensor) -> Tensor:
    """Unit vectors (n, 96) of images (n, 3, 64, 64) in [0, 1]."""
    pooled = clip.vision_model(pixel_values=normalise(images)).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=-1)


def embed_texts(clip: Any, ids: Tensor) -> Tensor:
    """Unit vectors (n, 96) of token numbers (n, length)."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)


def soften(images: Tensor, draw: Draw) -> Tensor:
    """A third of the pictures about as an early stop shows them: blurred by up to 3 pixels, slightly noisy."""
    out = images.clone()
    soft = len(images) // 3
    for part in range(4):  # four strengths a batch, each a Gaussian blur
        rows = slice(part * soft // 4, (part + 1) * soft // 4)
        sigma = 0.4 + 2.6 * draw.rng.random() ** 2
        out[rows] = blurred(out[rows], sigma, reach=6)
    out[:soft] += 0.03 * torch.randn(out[:soft].shape, generator=draw.noise)
    return out.clamp(0, 1)


def softened(scenes: list[Scene], draw: Draw) -> Tensor:
    """Pictures of scenes, a third of them under `soften`."""
    return soften(render(scenes), draw)


def stopped_early(pipe: Any) -> Callable[[list[Scene], Draw], Tensor]:
    """Pictures of scenes, half of them as `pipe` itself shows them when it stops early."""

    def look(scenes: list[Scene], draw: Draw) -> Tensor:
        half = len(scenes) // 2
        stopped = early_stops(pipe, scenes[:half], seed=draw.rng.getrandbits(32))
        return torch.cat([stopped, render(scenes[half:])])

    return look


def draw_captions(scenes: list[Scene], rng: random.Random) -> tuple[list[str], list[str]]:
    """True captions (n) and hard negatives (n x NEGATIVES, scene by scene), all of the train split."""
    true, false = [], []
    for scene in scenes:
        named = with_places(scene, rng) if rng.random() < 0.25 else scene.description
        true.append(str(named if named.split == "train" else scene.description))
        found: list[str] = []
        while len(found) < NEGATIVES:
            wrong = negative(scene, rng.choice(KINDS), rng)
            found += [str(wrong)] if wrong is not None else []
        false += found
    return true, false


def contrast(image: Tensor, true: Tensor, false: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric contrastive loss with extra negatives; also the share of hard negatives that are beaten.

    image, true: unit vectors (n, d); false: (n, k, d). Image to text competes with all true captions and the
    picture's own false ones; text to image with all pictures.
    """
    n = len(image)
    straight = image @ true.T * scale  # (n, n)
    hard = torch.einsum("nd,nkd->nk", image, false) * scale
    target = torch.arange(n)
    loss = F.cross_entropy(torch.cat([straight, hard], 1), target) + F.cross_entropy(straight.T, target)
    own = torch.cat([straight.diagonal()[:, None], hard], 1)
    loss = loss + F.cross_entropy(own, torch.zeros(n, dtype=torch.long))
    return loss / 3, (straight.diagonal()[:, None] > hard).float().mean()


def train_text(
    folder: Path, checkpoint: Path, *, schedule: Schedule = TEXT_SCHEDULE, seed: int = 0, stop_after: int | None = None
) -> Heads:
    """Train the text tower alone to say what a caption names; it conditions the UNet, which then need not wait for
    the vision tower. The tokenizer is written to `folder`."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder)
    heads = Heads(small_clip(tokenizer))

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        descriptions = [draw_description(draw.rng) for _ in range(schedule.batch)]
        ids = cut(tokens(tokenizer, list(map(str, descriptions))), tokenizer)
        return heads.of_texts(heads.clip.text_model(input_ids=ids).pooler_output, descriptions), {}

    fit("text", heads, loss=loss, schedule=schedule, checkpoint=checkpoint, seed=seed, stop_after=stop_after)
    return heads


def train_vision(
    heads: Heads,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    look: Callable[[list[Scene], Draw], Tensor] = softened,
    upstream: Sequence[nn.Module] = (),
    seed: int = 0,
    stop_after: int | None = None,
) -> Heads:
    """Train the vision tower and both projections contrastively against the text tower, which stays as it is;
    returns the heads with their `CLIPModel`. `look` gives the scenes' pictures (n, 3, 64, 64),
    by the networks `upstream`."""
    clip, batch = heads.requires_grad_(True).clip, schedule.batch
    clip.text_model.requires_grad_(False)

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        scenes = draw_scenes(batch, draw.rng)
        true, false = draw_captions(scenes, draw.rng)
        text = embed_texts(clip, cut(tokens(tokenizer, true + false), tokenizer))
        images = normalise(look(scenes, draw))
        vision = clip.vision_model(pixel_values=images, output_hidden_states=True)
        image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        scale = clip.logit_scale.exp().clamp(max=50)
        value, beaten = contrast(image, text[:batch], text[batch:].view(batch, NEGATIVES, -1), scale)
        looking, shape = heads.of_pictures(scenes, vision)
        numbers = {"contrast": value, "looking": looking, "shape": shape, "beaten": beaten}
        return value + 0.7 * looking, {name: number.item() for name, number in numbers.items()}

    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    fit(checkpoint.stem, heads.train(), loss=loss, upstream=upstream, **settings)
    return heads
