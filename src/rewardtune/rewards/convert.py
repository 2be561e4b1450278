"""Official checkpoints to transformers' names: pure functions state -> state, one table each.

Every source key matches exactly one row; a key without a row, with two, or written twice is a ConfigError. That no
target is missing is seen by `weights.load_strictly`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rewardtune.errors import ConfigError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """source: a regular expression for the whole key. targets: what it becomes, with \\1 for its groups; several
    split the tensor along its first dimension, none drops it. transpose: of a matrix (official code writes x @ W)."""

    source: str
    targets: tuple[str, ...]
    transpose: bool = False


def rename(state: State, rows: Sequence[Row], *, what: str) -> State:
    """The tensors of `state` under their new names."""
    result: State = {}
    for key, value in state.items():
        hits = [(row, match) for row in rows if (match := re.fullmatch(row.source, key))]
        if len(hits) != 1:
            raise ConfigError(
                f"the checkpoint has '{key}', which {what} does not know; it is of another kind or another version"
                if not hits
                else f"the table of {what} has {len(hits)} rows for '{key}'"
            )
        row, match = hits[0]
        value = value.T if row.transpose else value
        parts = value.tensor_split(len(row.targets)) if len(row.targets) > 1 else [value] * len(row.targets)
        for target, part in zip(row.targets, parts, strict=True):
            name = match.expand(target)
            if name in result:
                raise ConfigError(f"the checkpoint writes '{name}' twice, the second time by '{key}'")
            result[name] = part.clone() if len(row.targets) > 1 else part.contiguous()
    return result


def _tower(source: str, target: str) -> list[Row]:
    """open_clip's transformer blocks."""
    block, layer = rf"{source}\.resblocks\.(\d+)\.", rf"{target}.encoder.layers.\1."
    split = tuple(rf"{layer}self_attn.{part}_proj.\2" for part in "qkv")
    return [
        Row(block + r"attn\.in_proj_(weight|bias)", split),
        Row(block + r"attn\.out_proj\.(weight|bias)", (layer + r"self_attn.out_proj.\2",)),
        Row(block + r"ln_([12])\.(weight|bias)", (layer + r"layer_norm\2.\3",)),
        Row(block + r"mlp\.c_fc\.(weight|bias)", (layer + r"mlp.fc1.\2",)),
        Row(block + r"mlp\.c_proj\.(weight|bias)", (layer + r"mlp.fc2.\2",)),
    ]


OPEN_CLIP = [
    Row(r"visual\.conv1\.weight", ("vision_model.embeddings.patch_embedding.weight",)),
    Row(r"visual\.class_embedding", ("vision_model.embeddings.class_embedding",)),
    Row(r"visual\.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    Row(r"visual\.ln_pre\.(weight|bias)", (r"vision_model.pre_layrnorm.\1",)),  # transformers' own spelling
    Row(r"visual\.ln_post\.(weight|bias)", (r"vision_model.post_layernorm.\1",)),
    Row(r"visual\.proj", ("visual_projection.weight",), transpose=True),
    *_tower(r"visual\.transformer", "vision_model"),
    Row(r"token_embedding\.weight", ("text_model.embeddings.token_embedding.weight",)),
    Row(r"positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    Row(r"ln_final\.(weight|bias)", (r"text_model.final_layer_norm.\1",)),
    Row(r"text_projection", ("text_projection.weight",), transpose=True),
    *_tower("transformer", "text_model"),
    Row(r"logit_scale", ("logit_scale",)),
    # Not weights: sizes in OpenAI's archives, the causal mask in some of open_clip's.
    Row(r"input_resolution|context_length|vocab_size|attn_mask", ()),
]


def clip_from_open_clip(state: State) -> State:
    """OpenAI's or open_clip's CLIP with a vision transformer (also hpsv2's) -> transformers' `CLIPModel`."""
    return rename(state, OPEN_CLIP, what="open_clip's CLIP")


_VIT, _BLIP = r"blip\.visual_encoder\.", "vision."
_BLOCK, _LAYER = rf"{_VIT}blocks\.(\d+)\.", rf"{_BLIP}encoder.layers.\1."
IMAGE_REWARD = [
    Row(_VIT + r"cls_token", (_BLIP + "embeddings.class_embedding",)),
    Row(_VIT + r"pos_embed", (_BLIP + "embeddings.position_embedding",)),
    Row(_VIT + r"patch_embed\.proj\.(weight|bias)", (_BLIP + r"embeddings.patch_embedding.\1",)),
    Row(_BLOCK + r"norm([12])\.(weight|bias)", (_LAYER + r"layer_norm\2.\3",)),
    Row(_BLOCK + r"attn\.qkv\.(weight|bias)", (_LAYER + r"self_attn.qkv.\2",)),
    Row(_BLOCK + r"attn\.proj\.(weight|bias)", (_LAYER + r"self_attn.projection.\2",)),
    Row(_BLOCK + r"mlp\.fc([12])\.(weight|bias)", (_LAYER + r"mlp.fc\2.\3",)),
    Row(_VIT + r"norm\.(weight|bias)", (_BLIP + r"post_layernorm.\1",)),
    Row(r"blip\.text_encoder\.(embeddings\.(?!position_ids).+|encoder\..+)", (r"text.\1",)),
    Row(r"mlp\.layers\.([02467])\.(weight|bias)", (r"mlp.\1.\2",)),
    # Not weights, or BLIP's projections for contrastive training, which a score does not pass.
    Row(r"blip\.text_encoder\.embeddings\.position_ids|blip\.(vision|text)_proj\.(weight|bias)", ()),
]
IMAGE_REWARD_MEAN, IMAGE_REWARD_STD = 0.16717362830052426, 1.0333394966054072

# What is written into the name of a converted checkpoint that is kept. The tables are in it by themselves; raise the
# number when a function below or above makes other tensors of them.
_EDITION = (1, OPEN_CLIP, IMAGE_REWARD, IMAGE_REWARD_MEAN, IMAGE_REWARD_STD)
EDITION = hashlib.sha256(repr(_EDITION).encode()).hexdigest()[:16]


def imagereward_from_official(state: State) -> State:
    """`ImageReward.pt` -> "vision.*" of a `BlipVisionModel`, "text.*" of a `BlipTextModel`, and the head.

    head.weight (D,), head.bias (): the five linear layers, between which there are no activations, and the
    standardisation after them as one affine map, multiplied out in float64.
    """
    result = rename(state, IMAGE_REWARD, what="ImageReward.pt")
    layers = [[result.pop(f"mlp.{i}.{part}", None) for part in ("weight", "bias")] for i in (0, 2, 4, 6, 7)]
    if any(part is None for layer in layers for part in layer):
        raise ConfigError("the checkpoint lacks layers of the head, mlp.layers.{0,2,4,6,7}; it is cut or another kind")
    weight, bias = collapse([(weight, bias) for weight, bias in layers if weight is not None and bias is not None])
    result["head.weight"] = (weight[0] / IMAGE_REWARD_STD).float()
    result["head.bias"] = ((bias[0] - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD).float()
    return result


def collapse(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Linear layers without activations between them as one: weight (out, in) and bias (out,), in float64."""
    (weight, bias), *rest = [(weight.double(), bias.double()) for weight, bias in layers]
    for later, shift in rest:
        weight, bias = later @ weight, later @ bias + shift
    return weight, bias
