"""Rewards with a network inside: precision, memory, and the text side, which does not depend on the pixels.

Weights are bfloat16 on an accelerator and float32 on the CPU; resizing, normalising and dot products are float32
everywhere. Layers are recomputed in the backward pass, so that one layer's activations are alive at a time.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewardtune.errors import ConfigError
from rewardtune.rewards.base import Reward
from rewardtune.rewards.weights import check_finite

CACHED_PROMPTS = 10_000  # 1024 floats each at ViT-H: 40 MB
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

Module = TypeVar("Module", bound=nn.Module)


class NetworkReward(Reward):
    """Base of the rewards with a network. Subclasses `adopt` their networks and write `piece`.

    dtype: of the weights. "auto" is float32 on the CPU and bfloat16 from the first move to an accelerator on; rounded
    once, the weights stay so, also when `to("cpu")` sets them aside. float16 does not pay: gradients underflow.
    micro_batch: so many images at a time; in the backward pass each piece is computed again, so that one piece's
    activations are alive at a time. The scores and gradients stay the same, up to the order of sums.
    checkpointing: recompute the layers of the networks in the backward pass. Scores and gradients do not change.
    """

    def __init__(
        self, *, dtype: str | torch.dtype = "auto", micro_batch: int | None = None, checkpointing: bool = True
    ) -> None:
        if micro_batch is not None and (isinstance(micro_batch, bool) or not isinstance(micro_batch, int)):
            raise ConfigError(f"{self.name}: micro_batch is {micro_batch!r}; legal is a number of images, or none")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"{self.name}: micro_batch is {micro_batch}; legal is 1 or more images, or none")
        if not isinstance(checkpointing, bool):
            raise ConfigError(f"{self.name}: checkpointing is {checkpointing!r}; legal: true, false")
        self.dtype, self.micro_batch, self.checkpointing = _dtype(self.name, dtype), micro_batch, checkpointing

    def piece(self, images: Tensor, prompts: Sequence[str]) -> Tensor | tuple[Tensor, Tensor]:
        """The native values (b,) of a few images, or (scores to maximise (b,), native values (b,))."""
        raise NotImplementedError(f"{type(self).__name__} must define piece(self, images, prompts) -> (b,)")

    def adopt(self, module: Module) -> Module:
        """The network as rewards need it: frozen, in eval mode, in the asked dtype, its layers checkpointed.

        ConfigError for weights that are NaN or infinite.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        what = getattr(module, "name_or_path", "") or "the checkpoint"
        check_finite(module.named_parameters(), who=self.name, what=what)
        module.requires_grad_(False).eval().to(self.dtype or torch.float32)
        for layer in module.modules() if self.checkpointing else ():
            if isinstance(layer, GradientCheckpointingLayer):
                # A layer checkpoints in training mode only; its dropout, a child or an argument, stays in eval mode.
                layer.gradient_checkpointing = layer.training = True
                layer._gradient_checkpointing_func = _recomputed  # type: ignore[assignment]
        return module

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.evaluate(images, prompts)[1]

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(score to maximise (B,), native value to log (B,)), `micro_batch` images at a time."""
        step = self.micro_batch or max(len(images), 1)
        pieces = [self._one(images[i : i + step], prompts[i : i + step]) for i in range(0, len(images), step)]
        scores, natives = zip(*pieces, strict=True)
        return torch.cat(scores), torch.cat(natives)

    def _one(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.micro_batch and torch.is_grad_enabled() and images.requires_grad:
            found = checkpoint(self.piece, images, prompts, use_reentrant=False)  # with its random numbers
        else:
            found = self.piece(images, prompts)
        if isinstance(found, Tensor):
            return (-found if self.minimise else found), found
        return found

    def to(self, device: torch.device | str) -> Self:
        """Move the networks to `device`, in the dtype that the policy wants there; returns the reward itself."""
        device = torch.device(device)
        if self.dtype is None and device.type not in ("cpu", "meta"):
            for value in vars(self).values():
                if isinstance(value, nn.Module):
                    if next((p.dtype for p in value.parameters()), torch.bfloat16) != torch.bfloat16:
                        value.to(torch.bfloat16)
                elif isinstance(value, TextCache):
                    value.follow(torch.bfloat16)
        return super().to(device)


def _recomputed(layer: Callable[..., Any], *arguments: Any) -> Any:
    """layer(*arguments), computed again in the backward pass where there will be one."""
    if not torch.is_grad_enabled():
        return layer(*arguments)
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)


class TextCache:
    """What a network makes of a prompt, computed once and never part of a graph; the oldest prompts go first.

    encode: from token ids to a tensor without a batch dimension. Each prompt is encoded alone, so that its bits do
    not depend on its companions. length: the longest prompt in tokens; longer ones are cut, and that is said once.
    clean: from a prompt to the text that is tokenised.
    """

    def __init__(
        self,
        tokenizer: Any,
        encode: Callable[[list[int]], Tensor],
        *,
        length: int,
        name: str,
        clean: Callable[[str], str] = str,
        limit: int = CACHED_PROMPTS,
    ) -> None:
        self.tokenizer, self.encode, self.clean = tokenizer, encode, clean
        self.length, self.name, self.limit = length, name, limit
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._dtype: torch.dtype | None = None
        self._warned = False

    def __call__(self, prompt: str) -> Tensor:
        """The prompt's tensor, detached, on the device where it was made."""
        if prompt not in self._texts:
            with torch.no_grad():  # not inference_mode: autograd may not save an inference tensor for the backward
                text = self.encode(self.ids(prompt)).detach()
            while len(self._texts) >= self.limit:
                self._texts.popitem(last=False)
            self._texts[prompt] = text
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def __len__(self) -> int:
        return len(self._texts)

    def stack(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """The tensors of equal shape of several prompts, (B, ...), on `device`."""
        return torch.stack([self(prompt).to(device) for prompt in prompts])

    def ids(self, prompt: str) -> list[int]:
        """Token ids without padding, at most `length` of them; a cut prompt keeps its end token."""
        text = self.clean(prompt)
        ids = list(self.tokenizer(text, verbose=False).input_ids)
        if len(ids) <= self.length:
            return ids
        if not self._warned:
            warnings.warn(
                f"{self.name} reads the first {self.length} tokens of a prompt; this one has {len(ids)} and is cut, "
                f"as are others from now on without a word: {prompt[:80]!r}",
                stacklevel=2,
            )
            self._warned = True
        return list(self.tokenizer(text, truncation=True, max_length=self.length).input_ids)

    def follow(self, dtype: torch.dtype) -> None:
        """Forget what a network of another dtype has made."""
        if dtype != self._dtype:
            self._texts.clear()
            self._dtype = dtype


def _dtype(name: str, dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype, None for "auto"."""
    word = str(dtype).removeprefix("torch.")
    if word not in DTYPES:
        raise ConfigError(f"{name}: dtype is {dtype!r}; legal: {', '.join(DTYPES)}")
    return None if word == "auto" else getattr(torch, word)
