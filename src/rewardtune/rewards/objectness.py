"""Objectness (DRTune, section 4.1): how surely an open-vocabulary detector finds one named object, to remove it.

OWL-ViT has no objectness of its own: "objectness of class book" is the largest probability of the query "book" over
all boxes. A sigmoid saturates, and its gradient is exactly 0 in float32 from a logit of 17 on, just where an object
is clearest; so the logarithm of the probability is optimised, which does not saturate, and the probability logged.
Left out: Owlv2, whose own objectness is detached from the image in transformers, and whose pictures are padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from rewardtune.errors import ConfigError
from rewardtune.rewards.catalogue import OBJECT, OWLVIT, Source
from rewardtune.rewards.clipmodel import channels, check_end_token, warn_of_inner_end
from rewardtune.rewards.contract import full
from rewardtune.rewards.network import NetworkReward, TextCache
from rewardtune.rewards.preprocess import Preprocess
from rewardtune.rewards.weights import found, load_tokenizer, source_of
from rewardtune.spelling import nearest

NEEDED = "config.json and model.safetensors (or pytorch_model.bin)"


class Objectness(NetworkReward):
    """p = max over boxes of sigmoid(logit of the object), 0 to 1; less is better: the score is log(1 - p).

    target: the object, a word or a phrase; the paper removes "book" from pictures of "[concept name], and books".
    None: each image is searched for its own prompt. minimise: False to make the object appear instead; the score is
    then log(p). template: of the query, with {} for the object; detectors are often asked for "a photo of a {}".
    model: hub id or folder of a transformers `OwlViTForObjectDetection`, its tokenizer and its image settings; by
    default google/owlvit-base-patch32, larger are -base-patch16 and -large-patch14; or "playground", whose detector
    knows the objects of its world alone: a shape ("heart") or a coloured one ("red heart"). Images
    are squashed to its square, as in its training.
    dtype, micro_batch, checkpointing: see NetworkReward. antialias, clamp, random_shift: see Preprocess.
    revision: a branch or commit of the hub repository, to pin it.
    """

    minimise = True

    def __init__(
        self,
        target: str | None = OBJECT,
        *,
        model: str | None = None,
        minimise: bool = True,
        template: str = "{}",
        dtype: str | torch.dtype = "auto",
        micro_batch: int | None = None,
        checkpointing: bool = True,
        antialias: bool = True,
        clamp: str = "hard",
        random_shift: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__(dtype=dtype, micro_batch=micro_batch, checkpointing=checkpointing)
        if target is not None and (not isinstance(target, str) or not target.strip()):
            raise ConfigError(
                f"objectness: target is {target!r}; legal is the name of an object, such as 'book', or none"
            )
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(
                f"objectness: template is {template!r}; legal is a text with one {{}}, such as 'a photo of a {{}}'"
            )
        if not isinstance(minimise, bool):
            raise ConfigError(f"objectness: minimise is {minimise!r}; legal: true, false")
        if model == "playground":
            _check_query(target)
        self.target, self.template, self.minimise = target, template, minimise
        source = source_of(model, OWLVIT, revision=revision, who=self.name)
        self.model = self.adopt(_detector(source))
        config = self.model.config
        tokenizer = load_tokenizer(
            source.repo, revision=source.revision, vocabulary=config.text_config.vocab_size, who=self.name
        )
        check_end_token(tokenizer, None, who=self.name, repo=source.repo)  # OWL-ViT reads at the highest id, always
        mean, std = _image_settings(source)
        self.preprocess = Preprocess(
            size=config.vision_config.image_size, mean=mean, std=std, fit="squash",
            antialias=antialias, clamp=clamp, random_shift=random_shift,
        )  # fmt: skip
        length = config.text_config.max_position_embeddings
        self.queries = TextCache(tokenizer, self._encode, length=length, name=self.name)

    def piece(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log(1 - p), or log(p) to maximise it; p)."""
        logits = self.logits(images, prompts).amax(dim=1)
        return -F.softplus(logits if self.minimise else -logits), logits.sigmoid()

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, boxes): of each image's own query. The boxes lie row by row on the grid of patches."""
        features, _ = self.model.image_embedder(pixel_values=self.preprocess(images).to(self.model.dtype))
        texts = [self.template.replace("{}", prompt if self.target is None else self.target) for prompt in prompts]
        queries = self.queries.stack(texts, images.device)[:, None]
        # The head is a dot product of unit vectors, so it computes in float32, whatever its weights were rounded to.
        # Without a query mask: that of the full forward takes a query whose first token has the id 0 for padding.
        weights = {name: full(weight) for name, weight in self.model.class_head.named_parameters()}
        logits, _ = functional_call(self.model.class_head, weights, (full(features.flatten(1, 2)), queries, None))
        return logits[..., 0]

    def _encode(self, ids: list[int]) -> Tensor:
        """The query embedding (D,), of length 1, float32 or wider."""
        warn_of_inner_end(ids, who=self.name)
        output = self.model.owlvit.get_text_features(input_ids=torch.tensor([ids], device=self.model.device))
        return F.normalize(full(output.pooler_output), dim=-1)[0]


def _check_query(target: str | None) -> None:
    """ConfigError for what does not exist in the playground: any picture would score as if it were gone."""
    from rewardtune.playground.detector import PAIRS, QUERIES

    if target is not None and target not in QUERIES:
        shapes = ", ".join(QUERIES[PAIRS:])
        colours = ", ".join(query.split()[0] for query in QUERIES[: PAIRS // len(QUERIES[PAIRS:])])
        raise ConfigError(
            f"objectness: the playground has no {target!r}{nearest(target, QUERIES)}; legal targets there: a shape "
            f"({shapes}), one with its colour ({colours}), such as '{QUERIES[0]}', or none for each image's own prompt"
        )


def _detector(source: Source) -> Any:
    from transformers import AutoConfig, OwlViTForObjectDetection

    def load() -> Any:
        repo, revision = source.repo, source.revision
        if (kind := AutoConfig.from_pretrained(repo, revision=revision).model_type) != "owlvit":
            raise ConfigError(f"objectness: {repo} is a model of type '{kind}'; legal is 'owlvit' (not owlv2)")
        return OwlViTForObjectDetection.from_pretrained(
            repo, revision=revision, dtype=torch.float32, output_loading_info=True
        )

    model, info = found(load, source.repo, who="objectness", needed=NEEDED, any_of=("config.json",))
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ConfigError(
            f"objectness: {source.repo} is not a complete OwlViTForObjectDetection: {len(missing)} weights are "
            f"missing, {missing[0]} first"
        )
    return model


def _image_settings(source: Source) -> tuple[Any, Any]:
    """(mean, std) of the folder's image processor. Its sizes are not read: any is squashed to the network's own."""
    from transformers import ImageProcessingMixin, OwlViTImageProcessorPil

    files = ("preprocessor_config.json", "processor_config.json")

    def load() -> Any:
        return ImageProcessingMixin.get_image_processor_dict(source.repo, revision=source.revision)

    settings, _ = found(load, source.repo, who="objectness", needed=files[0], any_of=files)
    mean = settings.get("image_mean") or OwlViTImageProcessorPil.image_mean
    std = settings.get("image_std") or OwlViTImageProcessorPil.image_std
    return channels(mean, std, who="objectness", repo=source.repo)
