"""CLIPScore: the cosine between a CLIP's image and text embeddings, differentiable in the pixels.

One class for every transformers `CLIPModel`, from the hub or from a local folder. The text side does not depend on
the pixels: it is computed once per prompt and never part of a graph. Left out: CLIPScore's usual factor (2.5 or 100)
and its clipping at 0, which removes the gradient exactly where it is needed.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.base import Reward
from rewardtune.rewards.contract import full
from rewardtune.rewards.preprocess import crop_preprocess

CACHED_PROMPTS = 10_000  # 1024 floats each at ViT-H: 40 MB


class CLIPScore(Reward):
    """cos(image, prompt), -1 to 1, more is better; 0.2-0.4 for the default model (DRTune, table 1).

    model: hub id or folder of a transformers `CLIPModel`. processor: the same for the tokenizer and the image settings
    (size, mean, std), where they live elsewhere. dtype: of the network; "bfloat16" halves the memory on a GPU,
    "float16" does not pay: its gradients underflow. Resizing, normalising and the
    dot product are float32. revision: a branch or commit of the hub repository, to pin it.
    """

    def __init__(
        self,
        model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        processor: str | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str = "main",
    ) -> None:
        model, processor = str(model), str(processor or model)
        self.model = _load_model(model, dtype=_dtype(dtype), revision=revision)
        revision = revision if processor == model else "main"
        self.tokenizer = _load_tokenizer(
            processor, revision=revision, vocabulary=self.model.config.text_config.vocab_size
        )
        self.size, self.mean, self.std = _load_image_settings(processor, revision=revision)
        wanted = self.model.config.vision_config.image_size
        if self.size != wanted:
            raise ConfigError(
                f"clipscore: {processor} crops to {self.size} pixels but {model} reads {wanted}; "
                "give the processor that belongs to the model"
            )
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One cosine per pair: image b against prompt b, and no other."""
        pixels = crop_preprocess(images, size=self.size, mean=self.mean, std=self.std)
        features = _embedding(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))
        texts = torch.stack([self.text(prompt).to(images.device) for prompt in prompts])
        return (F.normalize(full(features), dim=-1) * texts).sum(-1)

    def text(self, prompt: str) -> Tensor:
        """The normalised text embedding (D,), cached; the oldest prompts are forgotten first."""
        if prompt not in self._texts:
            while len(self._texts) >= CACHED_PROMPTS:
                self._texts.popitem(last=False)
            self._texts[prompt] = self._encode(prompt)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    @torch.no_grad()  # not inference_mode: autograd may not save an inference tensor for the images' backward
    def _encode(self, prompt: str) -> Tensor:
        # Each prompt alone and so without padding: its bits then do not depend on its companions in the batch.
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            warnings.warn(f"CLIP reads the first {length} tokens; a prompt is cut: {prompt!r}", stacklevel=2)
            ids = self.tokenizer(prompt, truncation=True, max_length=length).input_ids  # keeps the end token
        output = self.model.get_text_features(input_ids=torch.tensor([ids], device=self.model.device))
        return F.normalize(full(_embedding(output)), dim=-1)[0]


def _embedding(output: Any) -> Tensor:
    """transformers 5 answers with an output object whose pooler_output is the projected embedding; 4 with a tensor."""
    return output if torch.is_tensor(output) else output.pooler_output


def _load_model(source: str, *, dtype: torch.dtype, revision: str) -> Any:
    from transformers import CLIPModel

    def load() -> Any:
        return CLIPModel.from_pretrained(source, dtype=dtype, revision=revision, output_loading_info=True)

    needed = "config.json and model.safetensors (or pytorch_model.bin)"
    model, info = _found(load, source, needed=needed, any_of=["config.json"])
    if info["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"clipscore: {source} is not a complete CLIPModel: {len(missing)} weights are missing, {missing[0]} first; "
            "legal is a transformers-format CLIPModel (open_clip weights must be converted)"
        )
    return model.requires_grad_(False).eval()


def _load_tokenizer(source: str, *, revision: str, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(source, revision=revision)

    needed = "tokenizer.json (or vocab.json and merges.txt) and tokenizer_config.json"
    tokenizer = _found(load, source, needed=needed, any_of=["tokenizer.json", "vocab.json"])
    if not vocabulary / 2 <= len(tokenizer) <= vocabulary:  # without files transformers may make an empty tokenizer
        raise ConfigError(
            f"clipscore: the tokenizer of {source} has {len(tokenizer)} tokens but the model reads {vocabulary}; "
            "give the processor that belongs to the model"
        )
    return tokenizer


def _load_image_settings(source: str, *, revision: str) -> tuple[int, list[float], list[float]]:
    """(size, mean, std) of the folder's processor, read without its class, which would ask for torchvision."""
    from transformers import CLIPImageProcessorPil, ImageProcessingMixin

    def load() -> Any:
        return ImageProcessingMixin.get_image_processor_dict(source, revision=revision)

    needed = "preprocessor_config.json (or processor_config.json)"
    found, _ = _found(load, source, needed=needed, any_of=["preprocessor_config.json", "processor_config.json"])
    short, crop = _side(found.get("size", 224)), _side(found.get("crop_size", 224))
    if short != crop or not all(found.get(step, True) for step in ("do_resize", "do_center_crop", "do_normalize")):
        raise ConfigError(
            f"clipscore: {source} resizes to {found.get('size')} and crops to {found.get('crop_size')}; "
            "legal is resize, centre crop to the same size, normalise, as CLIP does"
        )
    mean = found.get("image_mean") or CLIPImageProcessorPil.image_mean
    std = found.get("image_std") or CLIPImageProcessorPil.image_std
    return short, list(mean), list(std)


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


def _found(load: Callable[[], Any], source: str, *, needed: str, any_of: list[str]) -> Any:
    """load(), or the ConfigError that says which files are missing and how to place them by hand.

    any_of: files of which a folder must hold one. Without them transformers loads defaults, and says nothing.
    """
    try:
        if os.path.isdir(source) and not any(os.path.isfile(os.path.join(source, file)) for file in any_of):
            raise FileNotFoundError(f"no {' or '.join(any_of)}")
        return load()
    except (OSError, ValueError) as error:  # transformers' and huggingface_hub's words for "not there", "unreadable"
        reason = " ".join(str(error).split())[:200]
        if os.path.isdir(source):
            cure = f"put {needed} into that folder"
        elif source.startswith((".", "/", "~")):
            cure = "there is no such folder; give an existing one or a hub id such as 'openai/clip-vit-base-patch32'"
        else:
            cure = (
                f"it needs {needed} from https://huggingface.co/{source}; without network download it elsewhere by "
                f"`hf download {source} --local-dir clip`, copy the folder here and give its path as the model"
            )
        raise ConfigError(f"clipscore: cannot load '{source}': {cure} ({type(error).__name__}: {reason})") from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"clipscore: dtype is {dtype!r}; legal: float32, bfloat16, float16, float64")
    return found
