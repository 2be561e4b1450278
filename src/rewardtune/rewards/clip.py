"""CLIPScore, PickScore, HPS v2 and v2.1: one cosine between a CLIP's image and text embeddings, three loaders.

All three are LAION's ViT-H/14, two of them tuned on people's choices. Any other transformers `CLIPModel` goes as well.
Left out: CLIPScore's usual factor (2.5 or 100) and its clipping at 0, which removes the gradient exactly where it is
needed.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.errors import ConfigError
from rewardtune.rewards.catalogue import HPS, HPS_FILES, LAION, LAION_PROCESSOR, PICKSCORE, Source
from rewardtune.rewards.clipmodel import (
    check_end_token,
    clean_text,
    embedding,
    image_settings,
    pretrained_clip,
    vit_h_from_open_clip,
    warn_of_inner_end,
)
from rewardtune.rewards.contract import full
from rewardtune.rewards.network import NetworkReward, TextCache
from rewardtune.rewards.preprocess import Preprocess
from rewardtune.rewards.weights import digest_of, hub_file, load_tokenizer, source_of
from rewardtune.spelling import nearest


class CLIPSimilarity(NetworkReward):
    """cos(image, prompt), -1 to 1, more is better, by any transformers `CLIPModel`.

    model: hub id or folder; "playground" for the playground's own. processor: hub id or folder for the tokenizer and
    the image settings (size, mean, std), where they live elsewhere. revision: a branch or commit of the model's hub
    repository.
    scale: "cosine", or "logit" for exp(logit_scale) * cosine, about 100 times as much.
    clean: repair prompts as open_clip does before its tokenizer: `ftfy.fix_text`, where ftfy is installed, and
    `html.unescape`. Only curly quotes, ligatures, HTML entities and the like are changed.
    antialias, clamp, random_shift: see `Preprocess`. dtype, micro_batch, checkpointing: see `NetworkReward`.
    """

    name = "clip"
    source: Source = LAION
    spare_processor: Source | None = None  # for a model without a tokenizer of its own
    laion_vit_h: bool = False  # a ViT-H/14 in this class is LAION's, whose config is known
    fit = "crop"
    round_rest = False  # see `Preprocess`
    needed = "config.json and model.safetensors (or pytorch_model.bin)"

    def __init__(
        self,
        model: str | None = None,
        *,
        processor: str | None = None,
        revision: str | None = None,
        scale: str = "cosine",
        clean: bool = False,
        antialias: bool = True,
        clamp: str = "hard",
        random_shift: bool = False,
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
    ) -> None:
        super().__init__(dtype=dtype, micro_batch=micro_batch, checkpointing=checkpointing)
        if scale not in ("cosine", "logit"):
            hint = nearest(str(scale), ["cosine", "logit"])
            raise ConfigError(f"{self.name}: scale is {scale!r}{hint}; legal: cosine, logit")
        if not isinstance(clean, bool):
            raise ConfigError(f"{self.name}: clean is {clean!r}; legal: true, false")
        source = source_of(model, self.source, revision=revision, who=self.name)
        tokens = self._processor(source, processor)
        network = self._open(source)
        config = network.config
        tokenizer = load_tokenizer(
            tokens.repo, revision=tokens.revision, vocabulary=config.text_config.vocab_size, who=self.name
        )
        check_end_token(tokenizer, config.text_config.eos_token_id, who=self.name, repo=tokens.repo)
        size, mean, std = image_settings(tokens, who=self.name)
        if size != config.vision_config.image_size:
            raise ConfigError(
                f"{self.name}: {tokens.repo} resizes to {size} pixels but {source.repo} reads "
                f"{config.vision_config.image_size}; give the processor that belongs to the model"
            )
        self.factor = math.exp(network.logit_scale.item()) if scale == "logit" else 1.0  # before weights are rounded
        self.model = self.adopt(network)
        self.preprocess = Preprocess(
            size=size, mean=mean, std=std, fit=self.fit, antialias=antialias, clamp=clamp, random_shift=random_shift,
            round_rest=self.round_rest,
        )  # fmt: skip
        self.texts = TextCache(
            tokenizer,
            self._encode,
            length=config.text_config.max_position_embeddings,
            name=self.name,
            clean=partial(clean_text, who=self.name) if clean else str,
        )

    def piece(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One cosine per pair: image b against prompt b, and no other."""
        pixels = self.preprocess(images).to(self.model.dtype)
        features = embedding(self.model.get_image_features(pixel_values=pixels))
        return self.factor * (F.normalize(full(features), dim=-1) * self.texts.stack(prompts, images.device)).sum(-1)

    def _encode(self, ids: list[int]) -> Tensor:
        """The normalised text embedding (D,), float32 or wider."""
        warn_of_inner_end(ids, who=self.name)
        output = self.model.get_text_features(input_ids=torch.tensor([ids], device=self.model.device))
        return F.normalize(full(embedding(output)), dim=-1)[0]

    def _processor(self, model: Source, processor: str | None) -> Source:
        if processor is not None:
            return LAION_PROCESSOR if processor == LAION.repo else Source(repo=str(processor))
        own = any(os.path.isfile(os.path.join(model.repo, file)) for file in ("tokenizer.json", "vocab.json"))
        return model if own or self.spare_processor is None else self.spare_processor

    def _open(self, source: Source) -> Any:
        return pretrained_clip(source, who=self.name, needed=self.needed, laion_vit_h=self.laion_vit_h)


class CLIPScore(CLIPSimilarity):
    """cos(image, prompt) by OpenCLIP's ViT-H/14; 0.2-0.4 (DRTune, table 1)."""

    name = "clipscore"
    laion_vit_h = True
    round_rest = True


class PickScore(CLIPSimilarity):
    """PickScore v1, a ViT-H/14 tuned on Pick-a-Pic; 0.18-0.25 as the DRTune paper prints it, x 100 with "logit".

    The official example divides by no factor and takes `[0]`, which in a batch scores every image against prompt 0.
    """

    name = "pickscore"
    source = PICKSCORE
    spare_processor = LAION_PROCESSOR  # as the official example does
    laion_vit_h = True


class HPSv2(CLIPSimilarity):
    """HPS v2.0 or v2.1, a ViT-H/14 tuned on Human Preference Dataset v2; 0.1-0.4, printed x 100 in its tables.

    version: "2.1", by default, or "2.0", which hpsv2 itself takes by default. model: None for the official checkpoint,
    which is opened once and converted; the path of such a checkpoint, or a folder that holds it; or a transformers
    `CLIPModel`, which is its own version: none may be given beside it. As in hpsv2 an oblong image is padded with
    black, the overshoot of the bicubic filter is kept and prompts are cleaned.
    """

    name = "hpsv2"
    source = HPS
    spare_processor = LAION_PROCESSOR
    laion_vit_h = True
    fit = "letterbox"

    def __init__(
        self,
        version: str | None = None,
        *,
        model: str | None = None,
        processor: str | None = None,
        revision: str | None = None,
        scale: str = "cosine",
        clean: bool = True,
        antialias: bool = True,
        clamp: str = "none",
        random_shift: bool = False,
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
    ) -> None:
        self.version = "2.1" if version is None else str(version).removeprefix("v")
        self.version_given = version is not None
        if self.version not in HPS_FILES:
            raise ConfigError(f"{self.name}: version is {version!r}; legal: {', '.join(HPS_FILES)}")
        self.needed = f"{HPS_FILES[self.version]}, or a transformers model: {type(self).needed}"
        super().__init__(
            model,
            processor=processor,
            revision=revision,
            scale=scale,
            clean=clean,
            antialias=antialias,
            clamp=clamp,
            random_shift=random_shift,
            dtype=dtype,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
        )

    def _open(self, source: Source) -> Any:
        file = HPS_FILES[self.version]
        if os.path.isfile(source.repo):
            path = Path(source.repo)
            self._refuse_other_versions(path)
        elif source.repo == HPS.repo or os.path.isfile(os.path.join(source.repo, file)):
            path = hub_file(replace(HPS, repo=source.repo, revision=source.revision), file, who=self.name)
        elif self.version_given:
            raise ConfigError(
                f"{self.name}: version is {self.version} but the model {source.repo} is read as a transformers "
                f"CLIPModel, which is its own version; leave the version out, or give a folder that holds {file}"
            )
        else:
            return super()._open(source)
        return vit_h_from_open_clip(path, who=self.name)

    def _refuse_other_versions(self, path: Path) -> None:
        """ConfigError where the file is the published one of another version; its name says nothing."""
        digest = digest_of(path, "md5", HPS.md5.get(HPS_FILES[self.version], ""))
        for version, file in HPS_FILES.items():
            if version != self.version and digest == HPS.md5.get(file):
                raise ConfigError(
                    f"{self.name}: {path} is the published checkpoint of version {version} but version is "
                    f"{self.version}; give version='{version}'"
                )
