"""The small CLIP: tokenizer, configuration and contrastive training with hard negatives.

An ordinary `transformers.CLIPModel`; its text half also conditions the UNet. Beside the contrastive loss the
patch tokens learn which shape and colour they lie on, and the pooled image which objects are there: a plain
vision transformer learns very slowly from captions alone at this size. These heads are thrown away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import KINDS, negative, place_of, with_places
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZE,
    SIZES,
    Description,
    Mention,
    Object,
    Scene,
    coverage,
    draw_description,
    draw_scenes,
    render,
)
from .training import Draw, Schedule, fit

TEXT_SCHEDULE = Schedule(steps=1500, batch=96, lr=2e-3, warmup=60)  # the text tower alone
SCHEDULE = Schedule(steps=2000, batch=96, lr=1e-3, warmup=60, weight_decay=0.02)  # then the vision tower
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
    pairs: Any = merges  # as tuples, which `tokenizers` wants and the annotation there does not say
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=LENGTH)
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
    how: Any = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **how).input_ids


def cut(ids: Tensor, tokenizer: Any) -> Tensor:
    """Token numbers without the padding that no row needs; the towers are causal, so it changes nothing."""
    return ids[:, : int((ids != tokenizer.eos_token_id).sum(1).max()) + 1]


def small_clip(tokenizer: Any) -> Any:
    """An untrained `CLIPModel` of about 0.9 M parameters."""
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
    """A quarter of the pictures as a denoiser stopped early shows them: blurred by up to 3 pixels, slightly noisy."""
    out = images.clone()
    soft = len(images) // 4
    for part in range(4):  # four strengths a batch, each a Gaussian blur
        rows = slice(part * soft // 4, (part + 1) * soft // 4)
        sigma = 0.4 + 2.6 * draw.rng.random() ** 2
        reach = torch.arange(-6.0, 7.0)
        kernel = torch.exp(-reach.square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        blurred = F.conv2d(F.pad(out[rows], (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
        out[rows] = F.conv2d(blurred, kernel.transpose(-1, -2), groups=3)
    out[:soft] += 0.03 * torch.randn(out[:soft].shape, generator=draw.noise)
    return out.clamp(0, 1)


def patch_targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each patch lies on: object masks (n, patches, 64), numbers of shape and colour (n, patches; -100 where
    no object is) and (dx, dy, radius) of the object in patches (n, patches, 3)."""
    fine, coarse = torch.arange(SIZE) + 0.5, PATCH * (torch.arange(SIZE // PATCH) + 0.5)
    masks = torch.zeros(len(scenes), SIZE, SIZE)
    kinds = torch.full((2, len(scenes), len(coarse), len(coarse)), -100)
    geometry = torch.zeros(len(scenes), len(coarse), len(coarse), 3)
    for shape in SHAPES:
        drawn = [(i, o) for i, scene in enumerate(scenes) for o in scene.objects if o.shape == shape]
        if not drawn:
            continue
        x, y, r = (torch.tensor([getattr(o, name) for _, o in drawn])[:, None, None] for name in ("x", "y", "radius"))
        inside = coverage(shape, (fine[None, None, :] - x) / r, (fine[None, :, None] - y) / r, r)
        dx, dy = torch.broadcast_tensors(x - coarse[None, None, :], y - coarse[None, :, None])
        near = dx.square() + dy.square() < r.square()
        where = torch.stack([dx, dy, r.expand_as(dx)], -1) / PATCH
        for (i, o), mask, here, there in zip(drawn, inside, near, where, strict=True):
            masks[i] += mask
            kinds[0, i][here], kinds[1, i][here] = SHAPES.index(shape), list(COLOURS).index(o.colour)
            geometry[i][here] = there[here]
    tiles = F.unfold(masks[:, None], PATCH, stride=PATCH).transpose(1, 2)
    return tiles.clamp(0, 1), kinds[0].flatten(1), kinds[1].flatten(1), geometry.flatten(1, 2)


class Heads(nn.Module):
    """The CLIP and the heads of its auxiliary losses, which are thrown away."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        colours, shapes, places = len(COLOURS), len(SHAPES), len(PLACES)
        self.clip = clip
        self.present = nn.Linear(WIDTH, colours * shapes)  # both towers: which objects
        self.named = nn.Linear(WIDTH, (colours + shapes) * (places + len(SIZES)) + len(BACKGROUNDS))  # text
        self.where = nn.Linear(WIDTH, (colours + shapes) * places)  # vision
        self.mask = nn.Linear(WIDTH, PATCH * PATCH)
        self.geometry = nn.Linear(WIDTH, 3)
        self.shape = nn.Linear(WIDTH, shapes)
        self.colour = nn.Linear(WIDTH, colours)

    def of_texts(self, pooled: Tensor, descriptions: Sequence[Description]) -> Tensor:
        """The loss of reading captions: which objects, and which places, sizes and background are named for them."""
        attributes = [*PLACES, *SIZES]
        named = [
            {(word, given) for m in d.mentions for word in (m.colour, m.shape) for given in (m.place, m.size) if given}
            for d in descriptions
        ]
        pairs = [(word, attribute) for word in (*COLOURS, *SHAPES) for attribute in attributes]
        target = [[pair in row for pair in pairs] for row in named]
        grounds = [[d.background == name for name in BACKGROUNDS] for d in descriptions]
        wanted = torch.cat([torch.tensor(target), torch.tensor(grounds)], 1).float()
        objects = presence([d.mentions for d in descriptions])
        return 10 * (_bce(self.present(pooled), objects) + _bce(self.named(pooled), wanted))

    def of_pictures(self, scenes: Sequence[Scene], vision: Any) -> tuple[Tensor, Tensor]:
        """The loss of looking, from inner layers to the last and the pooled picture; and the share of object
        patches that know their shape."""
        masks, shapes, colours, geometry = patch_targets(scenes)
        _, first, second, *_ = vision.hidden_states
        patches, on = vision.last_hidden_state[:, 1:], shapes >= 0
        places = [[place_of(o.x, o.y) for o in scene.objects] for scene in scenes]
        where = [
            [
                any(place in there and word in (o.colour, o.shape) for o, there in zip(s.objects, row, strict=True))
                for word in (*COLOURS, *SHAPES)
                for place in PLACES
            ]
            for s, row in zip(scenes, places, strict=True)
        ]
        guess = self.shape(patches)[on]
        loss = (
            2 * _bce(self.mask(first[:, 1:]), masks)
            + F.smooth_l1_loss(self.geometry(second[:, 1:])[on], geometry[on])
            + F.cross_entropy(guess, shapes[on])
            + 0.3 * F.cross_entropy(self.colour(patches)[on], colours[on])
            + 10 * _bce(self.present(vision.pooler_output), presence([s.objects for s in scenes]))
            + 3 * _bce(self.where(vision.pooler_output), torch.tensor(where).float())
        )
        return loss, (guess.argmax(-1) == shapes[on]).float().mean()


_bce = F.binary_cross_entropy_with_logits


def presence(rows: Sequence[Sequence[Mention | Object]]) -> Tensor:
    """Which of the 42 colour-shape pairs are there (n, 42)."""
    target = torch.zeros(len(rows), len(SHAPES) * len(COLOURS))
    for row, objects in zip(target, rows, strict=True):
        for o in objects:
            row[SHAPES.index(o.shape) * len(COLOURS) + list(COLOURS).index(o.colour)] = 1
    return target


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
    seed: int = 0,
    stop_after: int | None = None,
) -> Any:
    """Train the vision tower and both projections contrastively against the text tower, which stays as it is;
    returns the `CLIPModel`."""
    clip, batch = heads.requires_grad_(True).clip, schedule.batch
    clip.text_model.requires_grad_(False)

    def loss(draw: Draw) -> tuple[Tensor, dict[str, float]]:
        scenes = draw_scenes(batch, draw.rng)
        true, false = draw_captions(scenes, draw.rng)
        text = embed_texts(clip, cut(tokens(tokenizer, true + false), tokenizer))
        images = normalise(soften(render(scenes), draw))
        vision = clip.vision_model(pixel_values=images, output_hidden_states=True)
        image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        scale = clip.logit_scale.exp().clamp(max=50)
        value, beaten = contrast(image, text[:batch], text[batch:].view(batch, NEGATIVES, -1), scale)
        looking, shape = heads.of_pictures(scenes, vision)
        numbers = {"contrast": value, "looking": looking, "shape": shape, "beaten": beaten}
        return value + 0.7 * looking, {name: number.item() for name, number in numbers.items()}

    fit("clip", heads.train(), loss=loss, schedule=schedule, checkpoint=checkpoint, seed=seed, stop_after=stop_after)
    return clip
