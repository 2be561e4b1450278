"""Opening a transformers `CLIPModel` exactly: every weight, the right config, float32, its image settings.

What can go wrong without a word is an error here, or a warning: weights at random values, an activation or a number of
heads that transformers fills in, a network left in the checkpoint's half precision.
"""

import html
import os
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.catalogue import Source
from rewardtune.rewards.convert import clip_from_open_clip
from rewardtune.rewards.weights import converted, found, load_strictly

Channels = tuple[float, float, float]

# What no weight's shape betrays: a wrong value loads without a word and shifts the score.
UNSEEN = {"hidden_act": "gelu", "num_attention_heads": 16, "layer_norm_eps": 1e-5}


def vit_h_from_open_clip(path: str | os.PathLike[str], *, who: str) -> Any:
    """The `CLIPModel` of an open_clip ViT-H/14 checkpoint, which LAION's and all of HPS are."""
    from transformers import CLIPModel

    state = converted(str(path), clip_from_open_clip, who=who)
    return load_strictly(lambda: CLIPModel(vit_h_config()), state, who=who, what=str(path))


def vit_h_config() -> Any:
    """The `CLIPConfig` of LAION's ViT-H/14, complete: transformers' defaults are those of another model."""
    from transformers import CLIPConfig

    common = {**UNSEEN, "projection_dim": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "max_position_embeddings": 77}
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    pixels = {"image_size": 224, "patch_size": 14}
    return CLIPConfig(text_config=common | text | tokens, vision_config=common | vision | pixels, projection_dim=1024)


def pretrained_clip(source: Source, *, who: str, needed: str, laion_vit_h: bool = False) -> Any:
    """A transformers `CLIPModel` in float32, whatever the checkpoint's dtype, complete and with a stated config.

    laion_vit_h: a ViT-H/14 must have the config of LAION's.
    """
    from transformers import CLIPModel

    def load() -> Any:
        return CLIPModel.from_pretrained(
            source.repo, revision=source.revision, dtype=torch.float32, output_loading_info=True
        )

    check_clip_config(source, who=who, needed=needed, laion_vit_h=laion_vit_h)
    model, info = found(load, source.repo, who=who, needed=needed)
    if info["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"{who}: {source.repo} is not a complete CLIPModel: {len(missing)} weights are missing, {missing[0]} "
            "first; legal is a transformers-format CLIPModel (open_clip weights must be converted)"
        )
    return model


def check_clip_config(
    source: Source, *, who: str, needed: str, types: tuple[str, ...] = ("clip",), laion_vit_h: bool = False
) -> str:
    """The model type in config.json. ConfigError where it is not among `types`, or where a LAION ViT-H/14 has values
    that are not its own; a warning for values of a CLIP that transformers would fill in without a word."""
    from transformers import CLIPConfig

    def load() -> dict[str, Any]:
        found = CLIPConfig.get_config_dict(source.repo, revision=source.revision)[0]
        if not isinstance(found, dict):
            raise TypeError(f"config.json holds a {type(found).__name__}, not an object")
        return found

    given = found(load, source.repo, who=who, needed=needed, any_of=("config.json",))
    kind = str(given.get("model_type"))
    if kind not in types:
        raise ConfigError(f"{who}: {source.repo} is a model of type '{kind}'; legal: {', '.join(types)}")
    if kind == "clip":
        towers = {key: given.get(f"{key}_dict") or given.get(key) or {} for key in ("text_config", "vision_config")}
    else:
        towers = {"config": given} if kind.startswith("clip") else {}
    for tower, values in towers.items():
        if silent := [key for key in ("hidden_act", "num_attention_heads") if key not in values]:
            warnings.warn(
                f"{who}: {tower} in config.json of {source.repo} does not state {', '.join(silent)}; transformers "
                "assumes those of OpenAI's ViT-B/32 (quick_gelu, 8 or 12), and the scores are wrong if they are not",
                stacklevel=2,
            )
    if laion_vit_h and [values.get("hidden_size") for values in towers.values()] == [1024, 1280]:
        config = CLIPConfig.from_dict(given)
        for tower, key in ((tower, key) for tower in towers for key in UNSEEN):
            if (value := getattr(getattr(config, tower), key)) != UNSEEN[key]:
                raise ConfigError(
                    f"{who}: config.json of {source.repo} has {key} {value!r} in {tower}, but LAION's ViT-H/14 was "
                    f"trained with {UNSEEN[key]!r}: correct the file; for another ViT-H/14 use CLIPSimilarity"
                )
    return kind


def image_settings(source: Source, *, who: str, crop: bool = True) -> tuple[int, Channels, Channels]:
    """(size, mean, std) of an image processor, read without its class, which would ask for torchvision.

    crop: as CLIP's, resize by the short side and crop the centre; else as SigLIP's, squash both sides.
    """
    from transformers import CLIPImageProcessorPil, ImageProcessingMixin

    def load() -> dict[str, Any]:
        return ImageProcessingMixin.get_image_processor_dict(source.repo, revision=source.revision)[0]

    files = ("preprocessor_config.json", "processor_config.json")
    settings = found(load, source.repo, who=who, needed=" (or ".join(files) + ")", any_of=files, setting="processor")
    size, cut = _side(settings.get("size", 224), short=crop), _side(settings.get("crop_size", 224))
    steps = ("do_resize", "do_normalize", *(("do_center_crop",) if crop else ()))
    if (
        size is None
        or (size != cut if crop else settings.get("do_center_crop", False))
        or not all(settings.get(step, True) for step in steps)
        or settings.get("resample", 3) != 3
    ):
        raise ConfigError(
            f"{who}: {source.repo} resizes to {settings.get('size')} by filter {settings.get('resample', 3)} and crops "
            f"to {settings.get('crop_size') if settings.get('do_center_crop', True) else None}; legal is resize by "
            f"filter 3 (bicubic), {'of the short side, centre crop to the same size' if crop else 'of both, no crop'}, "
            "normalise"
        )
    mean = settings.get("image_mean") or (CLIPImageProcessorPil.image_mean if crop else [0.5] * 3)
    std = settings.get("image_std") or (CLIPImageProcessorPil.image_std if crop else [0.5] * 3)
    return size, *channels(mean, std, who=who, repo=source.repo)


def channels(mean: Any, std: Any, *, who: str, repo: str) -> tuple[Channels, Channels]:
    """(mean, std) as tuples; ConfigError unless each is three numbers."""
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(x, Real) for x in values):
            raise ConfigError(f"{who}: {repo} has {name} {values!r}; legal are three numbers")
    return tuple(mean), tuple(std)


def check_end_token(tokenizer: Any, end: int | None, *, who: str, repo: str) -> None:
    """ConfigError unless a text ends with the one token at which the model reads it, else it would read another one.

    end: eos_token_id of the text config. 2, of old configs, stands for the highest id, as None does.
    """
    ids = list(tokenizer("book").input_ids)
    legal = max(ids) if end in (None, 2) else end
    if ids[-1] != legal or ids.count(legal) != 1:
        which = "the one highest id" if end in (None, 2) else f"the one id {end}, eos_token_id of its text config"
        raise ConfigError(
            f"{who}: the tokenizer of {repo} makes {ids} of 'book'; legal is a CLIP tokenizer, whose texts end with "
            f"{which}: the model reads a text there"
        )


def warn_of_inner_end(ids: Sequence[int], *, who: str) -> None:
    """A text is read at its first end token: one that a prompt spells out cuts the prompt there."""
    if (first := list(ids).index(ids[-1])) < len(ids) - 1:
        warnings.warn(
            f"{who}: a prompt itself holds the tokenizer's end token (<|endoftext|>), as token {first + 1} of "
            f"{len(ids)}; it is cut there",
            stacklevel=2,
        )


def embedding(output: Any) -> Tensor:
    """transformers 5 answers with an output object whose pooler_output is the projected embedding; 4 with a tensor."""
    return output if torch.is_tensor(output) else output.pooler_output


def clean_text(prompt: str, *, who: str) -> str:
    """What open_clip does to a prompt before it is tokenised, except the lower case, which the tokenizer sees to."""
    try:
        from ftfy import fix_text
    except ImportError:
        if not prompt.isascii():
            warnings.warn(
                f"{who}: for prompts beyond ASCII the official code mends the text by ftfy; `pip install ftfy` to get "
                "the same scores",
                stacklevel=2,
            )
    else:
        prompt = fix_text(prompt)
    return html.unescape(html.unescape(prompt)).strip()


def _side(size: object, *, short: bool = False) -> int | None:
    """n of n, of {"height": n, "width": n} and, if `short`, of {"shortest_edge": n} instead; None for anything else."""
    if isinstance(size, dict):
        sides = {size.get("shortest_edge")} if short else {size.get("height"), size.get("width")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) else None
