"""Preference models: the small CLIP fine-tuned on choices between pictures, as PickScore and HPS v2 are of a large one.

For each caption a few pictures, and of every two of them which one a taste prefers (`taste.py`), a tenth of the answers
wrong. The loss is PickScore's (Kirstain et al. 2023, section 4): cross-entropy between the answer and the softmax of
both scores exp(logit_scale) cos(image, text), half and half where the taste has no preference. A linear head on the
pooled picture must also say how it is saturated, lit, blurred and laid out; it is thrown away. A large CLIP sees such
things already, the small one has never been asked.
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
from .taste import TASTES, Picture, apart, balance, bigness, draw_choices, prefer, show
from .training import Draw, Schedule, fit
from .words import cut, tokens, write_tokenizer

SCHEDULE = Schedule(steps=600, batch=96, lr=1e-3, warmup=30, weight_decay=0.02)
EACH = 4  # pictures of a caption, six pairs
WRONG = 0.1  # share of the answers that are the opposite of the taste's
SCALE = 10.0  # of the cosines, at first: with the CLIP's 33 it must begin by unlearning its certainty


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


def train_preference(
    name: str,
    clip: Any,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    stop_after: int | None = None,
) -> Any:
    """A copy of `clip`, fine-tuned to the taste of `name` ("pickscore" or "hpsv2"); a batch is so many pictures. Those
    of a third of the captions are softened as a denoiser's early predictions are, which changes no answer."""
    torch.manual_seed(seed)
    looking, taste = Looking(copy.deepcopy(clip).float().requires_grad_(True)).train(), TASTES[name]
    model, pairs = looking.clip, torch.tensor(list(combinations(range(EACH), 2)))
    model.logit_scale.data.fill_(math.log(SCALE))

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        choices = draw_choices(schedule.batch // EACH, draw.rng, each=EACH)
        pictures = [picture for _, row in choices for picture in row]
        likings = [[taste(asked, picture) for picture in row] for asked, row in choices]
        truth = torch.tensor([[prefer(row[i], row[j]) for i, j in pairs] for row in likings])  # (captions, pairs)
        wrong = torch.rand(truth.shape, generator=draw.noise) < WRONG
        pooled = model.vision_model(pixel_values=normalise(soften(show(pictures), draw))).pooler_output
        image = F.normalize(model.visual_projection(pooled), dim=-1).view(len(choices), EACH, -1)
        text = embed_texts(model, cut(tokens(tokenizer, [str(asked) for asked, _ in choices]), tokenizer))
        scores = model.logit_scale.exp() * (image * text[:, None]).sum(-1)  # (captions, EACH)
        first, second = scores[:, pairs[:, 0]], scores[:, pairs[:, 1]]
        chosen = preference_loss(first, second, torch.where(wrong, 1 - truth, truth))
        seen = F.mse_loss(looking.traits(pooled), traits(pictures))
        agreed = ((first > second) == (truth == 1))[truth != 0.5].float().mean()
        return chosen + seen, {"choice": chosen.item(), "seen": seen.item(), "agreement": agreed.item()}

    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    fit(name, looking, loss=loss, **settings)
    return model


def write_preference(folder: Path, model: Any) -> None:
    """Write the folder that `rewards.PickScore` and `rewards.HPSv2` open, float16 on disk."""
    write_tokenizer(folder)
    write_processor(folder)
    copy.deepcopy(model).half().save_pretrained(folder)
