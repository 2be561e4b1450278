"""Aesthetic scores: an affine map of a normalised image embedding; prompts are ignored.

LAION's predictor is an MLP without activations, so in eval mode one affine map w.e + b. It is folded in float64 once,
which removes its rounding in half precision and its dropout. Scores are nominally 1 to 10, but
nothing bounds them there.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.catalogue import AESTHETIC_HEAD, OPENAI, Source
from rewardtune.rewards.clipmodel import check_clip_config, image_settings
from rewardtune.rewards.contract import full
from rewardtune.rewards.convert import collapse
from rewardtune.rewards.network import NetworkReward
from rewardtune.rewards.preprocess import Preprocess
from rewardtune.rewards.weights import check_finite, check_folder, download, found, open_checkpoint, source_of

HEAD = AESTHETIC_HEAD.url(AESTHETIC_HEAD.files[0])
HEAD_SHA256 = AESTHETIC_HEAD.sha256[AESTHETIC_HEAD.files[0]]
# The embedding that LAION's head was fitted to; LAION's own ViT-L/14 has the same shapes and another activation.
OPENAI_VIT_L = {"hidden_act": "quick_gelu", "num_attention_heads": 16, "layer_norm_eps": 1e-5, "patch_size": 14}

# How a model type's image embedding is found: the class, the output that holds it, and how its images are fitted.
VISION = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds", "crop"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds", "crop"),
    "siglip": ("SiglipVisionModel", "pooler_output", "squash"),
    "siglip_vision_model": ("SiglipVisionModel", "pooler_output", "squash"),
}


class AffineEmbedding(NetworkReward):
    """w.e/|e| + b for the image embedding e of a CLIP or SigLIP; more is better.

    model: hub id or folder of a transformers CLIP or SigLIP. head: a file of a linear layer (`weight`, `bias`) or of
    an MLP without activations (`layers.0.weight`, ...). What activations it had is not in the file, only, for LAION's,
    in its name: `ava+logos-l14-reluMSE.pth` is refused. revision: of the model's hub repository.
    antialias, clamp, random_shift: see `Preprocess`. dtype, micro_batch, checkpointing: see `NetworkReward`.
    """

    name = "affine_embedding"
    round_rest = False  # see `Preprocess`

    def __init__(
        self,
        model: str,
        head: str,
        *,
        revision: str | None = None,
        antialias: bool = True,
        clamp: str = "hard",
        random_shift: bool = False,
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
    ) -> None:
        super().__init__(dtype=dtype, micro_batch=micro_batch, checkpointing=checkpointing)
        source = source_of(str(model), OPENAI, revision=revision, who=self.name)
        if "relu" in os.path.basename(head).lower():
            raise ConfigError(
                f"{self.name}: {head} is by its name an MLP with ReLUs, and no affine map; legal is one without "
                "activations, as sac+logos+ava1-l14-linearMSE.pth"
            )
        weight, bias = affine(open_checkpoint(head, who=self.name), what=str(head), who=self.name)
        check_finite([("weight", weight), ("bias", bias)], who=self.name, what=str(head))
        network, self.output, fit = _vision(source, who=self.name)
        config = network.config
        width = getattr(config, "projection_dim" if self.output == "image_embeds" else "hidden_size")
        if len(weight) != width:
            raise ConfigError(
                f"{self.name}: the head {head} reads embeddings of {len(weight)} numbers, {source.repo} gives {width}; "
                "give the model that the head was fitted to"
            )
        size, mean, std = image_settings(source, who=self.name, crop=fit == "crop")
        if size != config.image_size:
            raise ConfigError(f"{self.name}: {source.repo} resizes to {size} pixels but reads {config.image_size}")
        self.weight, self.bias = weight.float(), bias.float()
        self.model = self.adopt(network)
        self.preprocess = Preprocess(
            size=size, mean=mean, std=std, fit=fit, antialias=antialias, clamp=clamp, random_shift=random_shift,
            round_rest=self.round_rest,
        )  # fmt: skip

    def piece(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.preprocess(images).to(self.model.dtype)
        features = F.normalize(full(self.model(pixel_values=pixels)[self.output]), dim=-1)
        return (features * self.weight).sum(-1) + self.bias


class Aesthetic(AffineEmbedding):
    """LAION's improved aesthetic predictor ("v2") on OpenAI's CLIP ViT-L/14; nominally 1 to 10, more is better.

    head: None for the `head.safetensors` in the model's folder where there is one, else for the published file, which
    is downloaded from GitHub and verified; or a path, such as the older `sa_0_4_vit_l_14_linear.pth`.
    Training code elsewhere resizes bilinearly and runs the MLP in half precision; this is the original's preprocessing.
    """

    name = "aesthetic"
    round_rest = True

    def __init__(
        self,
        model: str | None = None,
        *,
        head: str | None = None,
        revision: str | None = None,
        antialias: bool = True,
        clamp: str = "hard",
        random_shift: bool = False,
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
    ) -> None:
        model = source_of(model or None, OPENAI, who=self.name).repo
        check_folder(model, who=self.name)  # before a head is downloaded for it
        beside = os.path.join(model, "head.safetensors")
        official = head is None and not os.path.isfile(beside)
        if official:
            head = str(download(HEAD, sha256=HEAD_SHA256, who=self.name, setting="head"))
        super().__init__(
            model,
            str(head or beside),
            revision=revision,
            antialias=antialias,
            clamp=clamp,
            random_shift=random_shift,
            dtype=dtype,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
        )
        wrong = {key: right for key, right in OPENAI_VIT_L.items() if getattr(self.model.config, key) != right}
        if official and wrong:
            key, right = next(iter(wrong.items()))
            raise ConfigError(
                f"{self.name}: LAION's head was fitted to OpenAI's CLIP ViT-L/14 with {key} {right!r}, {model} has "
                f"{getattr(self.model.config, key)!r}; give the head of this model, or the model '{OPENAI.repo}'"
            )


def affine(state: dict[str, Tensor], *, what: str, who: str) -> tuple[Tensor, Tensor]:
    """(w (D,), b ()) in float64 of linear layers applied one after the other, w.x + b.

    state: `weight` and `bias`, or `....{i}.weight` and `....{i}.bias`, in the order of i. Raises ConfigError for other
    keys, for layers that do not fit each other, and for a last one of more than one number.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:(?:.*\.)?(\d+)\.)?(weight|bias)", key)
        if match is None:
            raise ConfigError(f"{who}: {what} has '{key}'; legal are weight and bias, or layers.0.weight and so on")
        layer = layers.setdefault(int(match[1] or 0), {})
        if match[2] in layer:
            raise ConfigError(f"{who}: {what} has the {match[2]} of layer {match[1] or 0} twice; legal is one head")
        layer[match[2]] = value
    chain: list[tuple[Tensor, Tensor]] = []
    for index in sorted(layers):
        weight = layers[index].get("weight")
        if weight is None or weight.ndim != 2 or (chain and weight.shape[1] != len(chain[-1][0])):
            shape = None if weight is None else tuple(weight.shape)
            raise ConfigError(
                f"{who}: {what}: the weight of layer {index} is {shape}; legal are linear layers in a row"
            )
        bias = layers[index].get("bias", weight.new_zeros(len(weight)))
        if bias.shape != (len(weight),):
            raise ConfigError(
                f"{who}: {what}: the bias of layer {index} is {tuple(bias.shape)}; legal is ({len(weight)},)"
            )
        chain.append((weight, bias))
    if len(chain[-1][0]) != 1:
        raise ConfigError(f"{who}: {what} gives {len(chain[-1][0])} numbers; legal is one, the score")
    w, b = collapse(chain)
    return w[0], b[0]


def _vision(source: Source, *, who: str) -> tuple[Any, str, str]:
    """(the vision half in float32, the output with its embedding, how its images are fitted)."""
    import transformers

    needed = "config.json and model.safetensors (or pytorch_model.bin)"
    kind = check_clip_config(source, who=who, needed=needed, types=tuple(VISION))
    cls, output, fit = VISION[kind]

    def load() -> Any:
        return getattr(transformers, cls).from_pretrained(
            source.repo, revision=source.revision, dtype=torch.float32, output_loading_info=True
        )

    network, info = found(load, source.repo, who=who, needed=needed)
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ConfigError(f"{who}: {source.repo} is incomplete: {len(missing)} weights are missing, {missing[0]} first")
    return network, output, fit
