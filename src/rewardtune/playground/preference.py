"""Preference models: the small CLIP fine-tuned on choices between pictures, as PickScore and HPS v2 are of a large one.

For each caption a few pictures, and of every two of them which one a taste prefers (`taste.py`), a tenth of the answers
wrong. The loss is PickScore's (Kirstain et al. 2023, section 4): cross-entropy between the answer and the softmax of
both scores exp(logit_scale) cos(image, text), half and half where the taste has no preference.

Two things that a large CLIP does not need. First, once for both tastes, the vision tower learns to see how a picture is
saturated, lit, blurred and laid out, by a linear head on the pooled picture that is thrown away. And that, as well as
finding a picture's own caption among others, goes on beside the choices: without it they unlearn the captions sooner
than they teach a taste.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip import embed_texts, normalise, soften, write_processor
from .heads import WIDTH
from .taste import TASTES, Choice, Picture, apart, balance, bigness, draw_choices, prefer, show
from .training import Draw, Schedule, fit
from .words import cut, tokens, write_tokenizer

TRAITS_SCHEDULE = Schedule(steps=480, batch=96, lr=1e-3, warmup=30, weight_decay=0.02)
SCHEDULE = Schedule(steps=900, batch=96, lr=7e-4, warmup=30, weight_decay=0.02)
EACH = 4  # pictures of a caption, six pairs
WRONG = 0.1  # share of the answers that are the opposite of the taste's
SCALE = 16.0  # of the cosines, at first: with the CLIP's 33 it must begin by unlearning its certainty
NAMED, SEEN = 0.3, 1.0  # weights of captions and traits beside the choices


class Looking(nn.Module):
    """The CLIP and the head that says what its pictures are like."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.traits = nn.Linear(WIDTH, 6)


def traits(pictures: Sequence[Picture]) -> Tensor:
    """What pictures are like, whatever the taste (n, 6), each trait with mean 0 and deviation 1 over them."""
    rows = [(p.saturation, p.light, p.blur, bigness(p.scene), apart(p.scene), balance(p.scene)) for p in pictures]
    values = torch.tensor(rows)
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-3)


def preference_loss(first: Tensor, second: Tensor, answers: Tensor) -> Tensor:
    """Mean cross-entropy of answers (1 the first picture, 0 the second) under the softmax of the pairs' scores. Of two
    scores it is sigmoid(first - second), Bradley and Terry's model."""
    return F.binary_cross_entropy_with_logits(first - second, answers)


def caption_loss(image: Tensor, text: Tensor, captions: Sequence[str], scale: Tensor | float) -> Tensor:
    """CLIP's contrastive loss from image to text, of unit vectors (n, d) each; equal captions do not compete. The other
    direction is left out: it forbids that all captions find one picture better than another."""
    same = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(len(captions), dtype=torch.bool)
    logits = (image @ text.T * scale).masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(captions)))


def train_traits(
    clip: Any,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = TRAITS_SCHEDULE,
    seed: int = 0,
    stop_after: int | None = None,
) -> Looking:
    """A copy of `clip` whose pooled pictures also say what they are like; its text half stays as it is. A batch is so
    many pictures, a third of them softened as a denoiser's early predictions are."""
    torch.manual_seed(seed)
    looking = Looking(copy.deepcopy(clip).float().requires_grad_(True)).train()
    scale = looking.clip.logit_scale.exp().item()
    for part in (looking.clip.text_model, looking.clip.text_projection, looking.clip.logit_scale):
        part.requires_grad_(False)

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        choices = draw_choices(schedule.batch // EACH, draw.rng, each=EACH)
        _, named, seen = _look(looking, tokenizer, choices, draw, scale=scale)
        return named + 2 * seen, {"named": named.item(), "seen": seen.item()}

    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    fit("traits", looking, loss=loss, **settings)
    return looking


def train_preference(
    name: str,
    looking: Looking,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    stop_after: int | None = None,
) -> Any:
    """A `CLIPModel`, a copy of what `train_traits` gives, fine-tuned to the taste of `name` ("pickscore" or "hpsv2").
    The pictures of a third of the captions are softened, which changes no answer."""
    looking, taste = copy.deepcopy(looking).requires_grad_(True).train(), TASTES[name]
    certain, scale = looking.clip.logit_scale.exp().item(), looking.clip.logit_scale
    scale.data.fill_(math.log(SCALE))
    pairs = torch.tensor(list(combinations(range(EACH), 2)))

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        choices = draw_choices(schedule.batch // EACH, draw.rng, each=EACH)
        likings = [[taste(asked, picture) for picture in row] for asked, row in choices]
        truth = torch.tensor([[prefer(row[i], row[j]) for i, j in pairs] for row in likings])  # (captions, pairs)
        wrong = torch.rand(truth.shape, generator=draw.noise) < WRONG
        cosines, named, seen = _look(looking, tokenizer, choices, draw, scale=certain)
        first, second = (scale.exp() * cosines[:, side] for side in pairs.T)
        chosen = preference_loss(first, second, torch.where(wrong, 1 - truth, truth))
        agreed = ((first > second) == (truth == 1))[truth != 0.5].float().mean()
        numbers = {"choice": chosen, "named": named, "seen": seen, "agreement": agreed, "scale": scale.exp()}
        return chosen + NAMED * named + SEEN * seen, {key: number.item() for key, number in numbers.items()}

    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    fit(name, looking, loss=loss, **settings)
    return looking.clip


def _look(
    looking: Looking, tokenizer: Any, choices: Sequence[Choice], draw: Draw, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cosines of captions and their pictures (captions, EACH), and the losses of naming and of seeing them."""
    clip, pictures = looking.clip, [picture for _, row in choices for picture in row]
    pooled = clip.vision_model(pixel_values=normalise(soften(show(pictures), draw))).pooler_output
    image = F.normalize(clip.visual_projection(pooled), dim=-1)
    asked, true = [str(asked) for asked, _ in choices], [picture.scene.caption for picture in pictures]
    text = embed_texts(clip, cut(tokens(tokenizer, asked + true), tokenizer))
    cosines = (image.view(len(choices), EACH, -1) * text[: len(choices), None]).sum(-1)
    named = caption_loss(image, text[len(choices) :], true, scale)
    return cosines, named, F.mse_loss(looking.traits(pooled), traits(pictures))


def write_preference(folder: Path, model: Any) -> None:
    """Write the folder that `rewards.PickScore` and `rewards.HPSv2` open, float16 on disk."""
    write_tokenizer(folder)
    write_processor(folder)
    copy.deepcopy(model).half().save_pretrained(folder)
