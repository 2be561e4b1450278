"""ImageReward (Xu et al., 2023): a BLIP that reads the prompt while it looks at the image, trained on human rankings.

A ViT-L/16 sees 224 pixels, a BERT-base reads 35 tokens and attends to the image in every layer, and one affine map
turns its first token into the score. The official MLP head has no activations, so it, and the standardisation after
it, are collapsed into that one map, in float64. Agreement with the official package: docs/results/parity.md.
"""

import json
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.catalogue import BERT, IMAGEREWARD, Source
from rewardtune.rewards.contract import full
from rewardtune.rewards.convert import State, imagereward_from_official
from rewardtune.rewards.network import NetworkReward, TextCache
from rewardtune.rewards.preprocess import Preprocess
from rewardtune.rewards.weights import check_finite, converted, hub_file, load_strictly, source_of

TOKENS = 35  # of a prompt, with [CLS] and [SEP]; also the length of the padding, as the official code has it
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
VISION_EPS, TEXT_EPS = 1e-6, 1e-12  # of the layer norms; transformers' BLIP has 1e-5 for the first
HEADS = {768: 12, 1024: 16}  # of a tower by its width, as BERT-base and ViT-L were trained; transformers' BLIP has 8
VOCABULARIES = ("vocab.txt", "tokenizer.json")  # either holds BERT's tokens
VISION_HEADS = "vision_num_attention_heads"


class ImageReward(NetworkReward):
    """(mlp(h_CLS) - 0.167) / 1.033: about -2.5 to 2.5, mean 0, more is better.

    model: hub id or folder with `ImageReward.pt` and `med_config.json`. tokenizer: hub id or folder of
    bert-base-uncased; by default the model's folder where that holds one. A checkpoint of other sizes works too; if a
    tower is as wide as neither ViT-L nor BERT-base, `med_config.json` must say its number of heads, that of the
    vision tower as `vision_num_attention_heads`.
    dtype, micro_batch, checkpointing: see NetworkReward. antialias, clamp, random_shift: see Preprocess.
    revision: a branch or commit of the hub repository, to pin it.

    ReFL's loss `relu(2 - r) * 1e-3` is a composition of it: `1e-3 * hinge(ImageReward(), 2)`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
        antialias: bool = True,
        clamp: str = "hard",
        random_shift: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__(dtype=dtype, micro_batch=micro_batch, checkpointing=checkpointing)
        source = source_of(model, IMAGEREWARD, revision=revision, who=self.name)
        settings = _settings(hub_file(source, "med_config.json", who=self.name))
        path = hub_file(source, "ImageReward.pt", who=self.name)
        state = converted(path, imagereward_from_official, who=self.name)
        vision = vision_config(state, settings)
        text = text_config(settings, width=vision["hidden_size"])
        self.vision = self.adopt(_tower("vision", vision, state, what=str(path)))
        self.text = self.adopt(_tower("text", text, state, what=str(path)))
        self.weight, self.bias = (state[f"head.{part}"].float() for part in ("weight", "bias"))  # float32 everywhere
        check_finite([("head.weight", self.weight), ("head.bias", self.bias)], who=self.name, what=str(path))
        self.preprocess = Preprocess(
            size=vision["image_size"], mean=MEAN, std=STD, antialias=antialias, clamp=clamp, random_shift=random_shift,
            round_rest=True,
        )  # fmt: skip
        bert = _tokenizer(_tokens(source, tokenizer), vocabulary=text["vocab_size"])
        self.tokens = TextCache(bert, _padded, length=TOKENS, name=self.name)

    def piece(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score per pair. The text tower attends to the image, so of the text only the token ids are cached."""
        ids, mask = self.tokens.stack(prompts, images.device).unbind(1)
        seen = self.vision(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
        return (full(read) * self.weight).sum(-1) + self.bias


def vision_config(state: State, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the `BlipVisionModel` that holds `state`: its sizes read off the tensors, its heads by its width."""
    sized = ("embeddings.position_embedding", "embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
    if missing := [key for key in sized if f"vision.{key}" not in state]:
        raise ConfigError(
            f"imagereward: the checkpoint lacks {missing[0]} of the vision tower; it is cut or another kind"
        )
    position, patch_weight, fc1 = (state[f"vision.{key}"] for key in sized)
    patches, width = position.shape[1:]
    patch = patch_weight.shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": fc1.shape[0],
        "num_hidden_layers": sum(key.endswith(".mlp.fc1.weight") for key in state),
        "num_attention_heads": _heads("vision tower", VISION_HEADS, width, settings.get(VISION_HEADS)),
        "image_size": patch * isqrt(patches - 1),  # one more for the class token
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": VISION_EPS,
    }


def text_config(settings: dict[str, Any], *, width: int) -> dict[str, Any]:
    """Settings of the `BlipTextModel`: those of med_config.json, which must not be other ones than it was trained with.

    width: of the vision tower, to which every layer attends.
    """
    for key, legal in (("hidden_act", "gelu"), ("layer_norm_eps", TEXT_EPS)):
        if settings[key] != legal:
            raise ConfigError(f"imagereward: med_config.json has {key} {settings[key]!r}; legal is {legal!r}")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    heads = _heads("text tower", "num_attention_heads", settings["hidden_size"], settings["num_attention_heads"])
    return {key: settings[key] for key in sizes} | {
        "num_attention_heads": heads,
        "encoder_hidden_size": width,
        "hidden_act": "gelu",
        "layer_norm_eps": TEXT_EPS,
        "is_decoder": True,  # gives the layers their cross-attention; the self-attention stays bidirectional
        "bos_token_id": None,
        "sep_token_id": None,
    }


def _heads(tower: str, key: str, width: int, given: int | None) -> int:
    heads = HEADS.get(width, given)
    if heads is None or given not in (None, heads) or width % heads:
        legal = f"is {heads}, with which a tower of {width} channels was trained" if width in HEADS else "divides it"
        raise ConfigError(
            f"imagereward: the {tower} has {width} channels and med_config.json gives {given} heads as {key}; "
            f"legal is a number that {legal}"
        )
    return heads


def _settings(path: Path) -> dict[str, Any]:
    needed = ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
              "num_attention_heads", "num_hidden_layers", "vocab_size")  # fmt: skip
    try:
        settings = json.loads(path.read_text())
        missing = [key for key in needed if key not in settings]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"imagereward: {path} is no JSON object ({error}); download it again") from error
    if missing:
        raise ConfigError(f"imagereward: {path} lacks {', '.join(missing)}; legal is ImageReward's med_config.json")
    sizes = {key: settings[key] for key in needed if key not in ("hidden_act", "layer_norm_eps")}
    sizes |= {VISION_HEADS: settings[VISION_HEADS]} if settings.get(VISION_HEADS) is not None else {}
    if odd := [f"{key} {size!r}" for key, size in sizes.items() if not isinstance(size, int) or size < 1]:
        raise ConfigError(f"imagereward: {path} has {odd[0]}; legal is a whole number from 1 on")
    return settings


def _tower(name: str, config: dict[str, Any], state: State, *, what: str) -> Any:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def make() -> Any:
        if name == "vision":
            return BlipVisionModel(BlipVisionConfig(**config))
        return BlipTextModel(BlipTextConfig(**config), add_pooling_layer=False)

    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    return load_strictly(make, own, who="imagereward", what=what)


def _tokens(model: Source, tokenizer: str | None) -> Source:
    """Where the tokenizer is: where it was said to be, else in the model's folder, else on the hub."""
    if tokenizer is not None:
        return BERT if tokenizer == BERT.repo else Source(repo=str(tokenizer))
    return model if any((Path(model.repo) / file).is_file() for file in VOCABULARIES) else BERT


def _tokenizer(source: Source, *, vocabulary: int) -> Any:
    """BERT's. The official code adds [DEC] and [ENC], which ImageReward does not use, to its 30,522 tokens."""
    from transformers import BertTokenizer

    file = next((file for file in VOCABULARIES if (Path(source.repo) / file).is_file()), VOCABULARIES[0])
    path = hub_file(source, file, who="imagereward", setting="tokenizer")  # without a file it would be made empty
    tokenizer = BertTokenizer.from_pretrained(str(path.parent))
    if len(tokenizer) not in (vocabulary - 2, vocabulary):
        raise ConfigError(
            f"imagereward: the tokenizer of {source.repo} has {len(tokenizer)} tokens, the model {vocabulary} with two "
            "of its own; legal is bert-base-uncased: give its hub id or folder as tokenizer"
        )
    return tokenizer


def _padded(ids: list[int]) -> Tensor:
    """(2, 35): the ids, padded with 0, and their mask."""
    rest = [0] * (TOKENS - len(ids))
    return torch.tensor([ids + rest, [1] * len(ids) + rest])
