"""The small detector: an ordinary `OwlViTForObjectDetection` that finds "red heart" or "heart" in the playground.

OWL-ViT's recipe (Minderer et al. 2022) at a small size: both towers begin as the small CLIP's, every patch token says
one box and how well each query fits it, one box is matched to each object, focal loss for the queries, L1 and
generalised IoU for the boxes. With at most two objects the best matching is found by trying all. Left out: mosaics,
crops, negative queries drawn at random (each picture is asked for all 48).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip import MEAN, STD, normalise, soften
from .heads import WIDTH
from .scenes import COLOURS, SHAPES, SIZE, Object, Scene, coverage, draw_scenes, render
from .training import Draw, Schedule, fit
from .words import cut, tokens, write_tokenizer

SCHEDULE = Schedule(steps=1000, batch=48, lr=1e-3, warmup=60, weight_decay=0.02)
QUERIES = (*(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS), *SHAPES)
PAIRS = len(SHAPES) * len(COLOURS)  # so many of them name a colour


def small_owlvit(clip: Any) -> Any:
    """An `OwlViTForObjectDetection` (64 pixels, 64 boxes) with the towers of the small CLIP and fresh heads."""
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    text, vision = clip.config.text_config, clip.config.vision_config
    ids = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = OwlViTConfig(
        text_config={key: getattr(text, key) for key in (*kept, *ids)},
        vision_config={key: getattr(vision, key) for key in (*kept, "image_size", "patch_size")},
        projection_dim=WIDTH,
    )
    model = OwlViTForObjectDetection(config)
    towers = {key.replace("pre_layrnorm", "pre_layernorm"): value for key, value in clip.state_dict().items()}
    model.owlvit.load_state_dict(towers, strict=True)
    heads = model.class_head, model.box_head
    for layer in (layer for head in heads for layer in head.modules() if isinstance(layer, nn.Linear)):
        layer.reset_parameters()  # transformers' own start has deviation 1
    for layer, bias in ((heads[0].logit_scale, 10.0), (heads[0].logit_shift, -0.4), (heads[1].dense2, 0.0)):
        nn.init.zeros_(layer.weight)  # at first: logits 10 (cosine - 0.4), rarely a "yes", and boxes on their patches
        nn.init.constant_(layer.bias, bias)
    return model


@cache
def _extent(shape: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape of radius 1 at the origin."""
    axis = (torch.arange(512) + 0.5) / 512 * 2.6 - 1.3
    inside = coverage(shape, axis[None, :], axis[:, None], 512 / 2.6) > 0.5
    x, y = axis[inside.any(0)], axis[inside.any(1)]
    return x[0].item(), y[0].item(), x[-1].item(), y[-1].item()


def box_of(drawn: Object) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an object, as shares of the picture."""
    left, top, right, bottom = (drawn.radius * edge / SIZE for edge in _extent(drawn.shape))
    x, y = drawn.x / SIZE, drawn.y / SIZE
    return x + left, y + top, x + right, y + bottom


def fitting(drawn: Object) -> list[bool]:
    """Which of QUERIES name an object."""
    return [query in (drawn.shape, f"{drawn.colour} {drawn.shape}") for query in QUERIES]


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as centre, width and height to left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalised form (Rezatofighi et al. 2019, -1 to 1), of boxes (..., 4) given by
    their corners."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)) - inner
    return inner / union, inner / union - (outer - union) / outer


def detect(model: Any, images: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, 64, q) and boxes (n, 64, 4), corners as shares of the picture, of images (n, 3, 64, 64) in [0, 1] and
    query features (q, 96)."""
    grid, _ = model.image_embedder(pixel_values=normalise(images))
    features = grid.flatten(1, 2)
    logits, _ = model.class_predictor(features, queries.expand(len(images), -1, -1))
    return logits, corners(model.box_predictor(features, grid))


def query_features(model: Any, ids: Tensor) -> Tensor:
    """Features (q, 96) of queries' token numbers (q, length)."""
    return model.owlvit.get_text_features(input_ids=ids).pooler_output


def match(cost: Tensor) -> Tensor:
    """The boxes (n, 2) that cost two objects least together, never the same; cost is (n, boxes, 2)."""
    both = cost[:, :, None, 0] + cost[:, None, :, 1]  # (n, boxes, boxes)
    both = both + torch.diag(both.new_full((both.shape[-1],), float("inf"))).nan_to_num(0.0, posinf=1e9)
    best = both.flatten(1).argmin(1)
    return torch.stack([best // cost.shape[1], best % cost.shape[1]], 1)


def detection_loss(logits: Tensor, boxes: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch and its parts; see the head of this file."""
    here = torch.tensor([[j < len(s.objects) for j in range(2)] for s in scenes])  # (n, 2)
    drawn = [s.objects[min(j, len(s.objects) - 1)] for s in scenes for j in range(2)]  # an absent second: the first
    true = torch.tensor([box_of(o) for o in drawn]).view(len(scenes), 2, 4)
    fits = torch.tensor([fitting(o) for o in drawn]).view(len(scenes), 2, -1).float()
    with torch.no_grad():
        each, wanted = boxes[:, :, None], true[:, None]  # (n, 64, 1, 4), (n, 1, 2, 4)
        said = torch.einsum("npq,njq->npj", logits.sigmoid(), fits) / fits.sum(-1)[:, None]
        cost = 5 * (each - wanted).abs().mean(-1) - 2 * overlap(each, wanted)[1] - 2 * said
        chosen = match(cost * here[:, None])  # what is not there costs nothing anywhere
    rows = torch.arange(len(scenes))[:, None].expand(-1, 2)
    found, aims = boxes[rows, chosen][here], true[here]
    answers = torch.zeros_like(logits)
    answers[rows[here], chosen[here]] = fits[here]
    named = focal_loss(logits, answers).sum() / here.sum()
    iou, generalised = overlap(found, aims)
    distance = (found - aims).abs().mean()
    numbers = {"named": named.item(), "iou": iou.mean().item()}
    return named + 5 * distance + (1 - generalised).mean(), numbers


def focal_loss(logits: Tensor, answers: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), element by element: what is answered well already weighs little."""
    plain = F.binary_cross_entropy_with_logits(logits, answers, reduction="none")
    weight = alpha * answers + (1 - alpha) * (1 - answers)
    return weight * (logits.sigmoid() - answers).abs() ** gamma * plain


def train_detector(
    clip: Any,
    tokenizer: Any,
    checkpoint: Path,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    stop_after: int | None = None,
) -> Any:
    """Train the detector from `clip`, which stays as it is; half of the queries carry an article, a third of the
    pictures is softened as a denoiser's early predictions are."""
    torch.manual_seed(seed)
    model = small_owlvit(clip).train()

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        scenes = draw_scenes(schedule.batch, draw.rng)
        asked = [f"a {query}" if draw.rng.random() < 0.5 else query for query in QUERIES]
        queries = query_features(model, cut(tokens(tokenizer, asked), tokenizer))
        return detection_loss(*detect(model, soften(render(scenes), draw), queries), scenes)

    unused = (model.owlvit.visual_projection, model.owlvit.logit_scale)  # of the CLIP that it began as
    for part in unused:
        part.requires_grad_(False)
    settings: dict[str, Any] = {"schedule": schedule, "checkpoint": checkpoint, "seed": seed, "stop_after": stop_after}
    return fit("objectness", model, loss=loss, **settings)


def write_detector(folder: Path, model: Any) -> None:
    """Write the folder that `rewards.Objectness` opens, float16 on disk."""
    from transformers import OwlViTImageProcessor

    write_tokenizer(folder)
    size = {"height": SIZE, "width": SIZE}
    how: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD), "do_center_crop": False}
    OwlViTImageProcessor(size=size, crop_size=size, **how).save_pretrained(folder)
    copy.deepcopy(model).half().save_pretrained(folder)
