"""The small CLIP: tokenizer, configuration and contrastive training with hard negatives.

An ordinary `transformers.CLIPModel`; its text half also conditions the UNet. Beside the contrastive loss the
patch tokens learn which shape and colour they lie on, and the pooled image which objects are there: a plain
vision transformer learns very slowly from captions alone at this size. These heads are thrown away.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import KINDS, negative, patch_labels, with_places
from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZE, SIZES, Scene, draw_scenes, render
from .training import Draw, Schedule, fit

SCHEDULE = Schedule(steps=1800, batch=96, lr=1e-3, weight_decay=0.02)
NEGATIVES = 3  # hard negatives per picture
LENGTH = 24  # tokens, begin and end included; the longest caption of the world has 20
PATCH = 8
WIDTH = 96
MEAN, STD = (0.45, 0.40, 0.40), (0.30, 0.25, 0.27)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: all bytes, so that any text tokenises, and one token per word of the world."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = ["a", "and", "background", "on", "the", "at", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES]
    words += [word for place in PLACES.values() for word in place.split()]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # what earlier words' merges make of it
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == merge:
                    parts[i : i + 2] = ["".join(merge)]
                i += 1
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> Any:
    """Write vocab.json, merges.txt and the tokenizer's configs to `folder`; returns the `CLIPTokenizer`."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return tokenizer


def write_processor(folder: Path) -> None:
    """Write the `CLIPImageProcessor` config."""
    from transformers import CLIPImageProcessor

    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token numbers (n, 24) of captions, padded and cut as the pipeline does it."""
    kwargs = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **kwargs).input_ids


def small_clip(tokenizer: Any) -> Any:
    """An untrained `CLIPModel` of about 0.9 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
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
    """Half of the pictures as a denoiser stopped early shows them: blurred by up to 3 pixels, slightly noisy."""
    out = images.clone()
    half = len(images) // 2
    for part in range(4):  # four strengths a batch, each a Gaussian blur
        rows = slice(part * half // 4, (part + 1) * half // 4)
        sigma = 0.4 + 2.6 * draw.rng.random() ** 2
        reach = torch.arange(-6.0, 7.0)
        kernel = torch.exp(-reach.square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        blurred = F.conv2d(F.pad(out[rows], (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
        out[rows] = F.conv2d(blurred, kernel.transpose(-1, -2), groups=3)
    out[:half] += 0.03 * torch.randn(out[:half].shape, generator=draw.noise)
    return out.clamp(0, 1)


class Heads(nn.Module):
    """The CLIP and the heads of its auxiliary losses."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.shape = nn.Linear(WIDTH, len(SHAPES) + 1)
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.present = nn.Linear(WIDTH, len(SHAPES) * len(COLOURS))

    def auxiliary(self, scenes: list[Scene], vision: Any) -> Tensor:
        labels = torch.tensor(patch_labels(scenes, PATCH))  # (n, patches, 2)
        patches = vision.last_hidden_state[:, 1:]
        present = torch.zeros(len(scenes), len(SHAPES) * len(COLOURS))
        for row, scene in zip(present, scenes, strict=True):
            for o in scene.objects:
                row[SHAPES.index(o.shape) * len(COLOURS) + list(COLOURS).index(o.colour)] = 1
        return (
            F.cross_entropy(self.shape(patches).flatten(0, 1), labels[..., 0].flatten())
            + F.cross_entropy(self.colour(patches).flatten(0, 1), labels[..., 1].flatten())
            + 10 * F.binary_cross_entropy_with_logits(self.present(vision.pooler_output), present)
        )


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


def train_clip(
    folder: Path, checkpoint: Path, *, schedule: Schedule = SCHEDULE, seed: int = 0, stop_after: int | None = None
) -> Any:
    """Train the small CLIP; the tokenizer is written to `folder`. Returns the `CLIPModel`."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder)
    clip = small_clip(tokenizer)
    heads = Heads(clip)

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        scenes = draw_scenes(schedule.batch, draw.rng)
        true, false = draw_captions(scenes, draw.rng)
        ids = tokens(tokenizer, true + false)
        ids = ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]  # causal: padding changes nothing
        vision = clip.vision_model(pixel_values=normalise(soften(render(scenes), draw)))
        image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        text = embed_texts(clip, ids)
        n = len(scenes)
        scale = clip.logit_scale.exp().clamp(max=50)
        value, beaten = contrast(image, text[:n], text[n:].view(n, NEGATIVES, -1), scale)
        auxiliary = heads.auxiliary(scenes, vision)
        return value + 0.5 * auxiliary, {
            "contrast": value.item(),
            "auxiliary": auxiliary.item(),
            "beaten": beaten.item(),
        }

    fit("clip", heads, loss=loss, schedule=schedule, checkpoint=checkpoint, seed=seed, stop_after=stop_after)
    return clip
