"""The gradient of one update: plan -> rollout -> reward -> reverse sweep, a micro-batch at a time.

Everything random is a pure function of (seed, step, index in the batch), so a micro-batch can be computed by any of
several processes with the same pictures.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .engine import Sweep, Tape, rollout
from .errors import BrokenPictures, RewardError, RewardTuneError, TrainingStopped, out_of_memory
from .evaluate import for_prompts, generators
from .methods import Method
from .plan import Plan
from .processes import Processes
from .prompts import batch_prompts

if TYPE_CHECKING:
    from .regularize import DenoisingLoss
    from .rewards import Reward


def derive_seed(*keys: object) -> int:
    """A 63-bit seed from (seed, step, index ...): equal keys, equal seed, on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one micro-batch gave: scores by name ("reward" the total, then native parts), and its sweep."""

    size: int
    scores: dict[str, Tensor]
    natives: list[str]
    sweep: Sweep
    denoise: float | None = None  # the denoising loss, without its weight


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Adds the mean gradient over a batch of `batch` samples to the parameters, `micro_batch` samples at a time.

    offload_reward: the reward's networks wait on the CPU while the denoiser samples and is replayed.
    recompute: see `rollout`.
    kl: weight of the distance to the base model, besides the method's own; denoising: the denoising loss, if asked for.
    """

    pipe: Any
    reward: "Reward"
    method: Method
    prompts: Sequence[str]
    parameters: Sequence[nn.Parameter]
    T: int
    seed: int
    batch: int
    micro_batch: int
    call: dict[str, Any]
    offload_reward: bool = False
    recompute: bool = True
    kl: float = 0.0
    denoising: "DenoisingLoss | None" = None

    def plan(self, step: int) -> Plan:
        """Drawn from (seed, step) alone: all micro-batches and all processes share it."""
        return self.method(self.T, random.Random(f"plan {self.seed} {step}"))

    def chunks(self) -> list[int]:
        """The index of the first sample of every micro-batch."""
        return list(range(0, self.batch, self.micro_batch))

    def compute(self, step: int, processes: Processes) -> list[Part]:
        """All micro-batches of update `step`, dealt out to the processes: the gradient of the whole batch stands in
        `.grad` everywhere, the parts come in the order of the batch. An error of one process is raised in all.

        With RSA-FT's worst case at the weights it is the gradient there; the parts are of the weights as they are.
        """
        parts = self._compute(step, processes)
        if self.method.robust_weights:
            with self._worst_weights(), doing(f"step {step}, the pass at the worst weights"):
                self._compute(step, processes)
        return parts

    @contextmanager
    def _worst_weights(self) -> Iterator[None]:
        """RSA-FT: the weights moved up the loss by `robust_weights` along the gradient; `.grad` is cleared."""
        grads = [p.grad for p in self.parameters]
        norm = torch.stack([g.double().norm() for g in grads if g is not None] or [torch.zeros(())]).norm()
        kept = [p.detach().clone() for p in self.parameters]
        step = self.method.robust_weights / float(norm) if float(norm) > 0 else 0.0
        try:
            with torch.no_grad():
                for p, g in zip(self.parameters, grads, strict=True):
                    if g is not None:
                        p.add_(g, alpha=step)
                    p.grad = None
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, kept, strict=True):
                    p.copy_(value)

    def _worst_images(self, tape: Tape) -> Tensor:
        """RSA-FT: the pictures moved down the reward by `robust_image` (L2 norm of each); a constant offset."""
        leaf = tape.images.detach().requires_grad_()
        score = self.reward(leaf, tape.prompts)
        if not score.requires_grad:
            return tape.images
        (up,) = torch.autograd.grad(score.sum(), leaf)
        norm = up.flatten(1).norm(dim=1).clamp_min(torch.finfo(up.dtype).tiny).view(-1, 1, 1, 1)
        return _Moved.apply(tape.images, (leaf.detach() - self.method.robust_image * up / norm).clamp(0, 1))

    def prompts_of(self, step: int, processes: Processes) -> list[str]:
        """Of update `step`, the prompts that this process samples."""
        prompts = batch_prompts(self.prompts, seed=self.seed, step=step, size=self.batch)
        return [prompt for first in processes.mine(self.chunks()) for prompt in prompts[first:][: self.micro_batch]]

    def _compute(self, step: int, processes: Processes) -> list[Part]:
        chunks = self.chunks()
        own: list[Part] = []
        error: Exception | None = None
        try:
            own = [self.add(step, first, processes) for first in processes.mine(chunks)]
        except Exception as met:
            if processes.sharded:  # told to all already, or met alone in the denoiser: the others cannot listen there
                raise
            error = met
        processes.raise_together(error)
        processes.sum_gradients(self.parameters)
        shares = processes.gather(own)
        return [shares[i % processes.world][i // processes.world] for i in range(len(chunks))]

    def add(self, step: int, first: int, processes: Processes | None = None) -> Part:
        """Micro-batch `first` of update `step`: its share of the gradient is added to `.grad`.

        processes: those that do the same at this moment, if they share the denoiser; an error of the pictures or of
        the reward is raised in all of them before they meet in the denoiser again.
        Raises TrainingStopped for NaN or black pictures, NaN scores, and a gradient that vanishes or is not finite.
        """
        plan = self.plan(step)
        prompts = batch_prompts(self.prompts, seed=self.seed, step=step, size=self.batch)
        part = prompts[first : first + self.micro_batch]
        seeds = [derive_seed(self.seed, step, index) for index in range(first, first + len(part))]
        given = for_prompts(part, self.call)
        if self.offload_reward:
            self.reward.to("cpu")  # an evaluation may have left it beside the denoiser
        with ExitStack() as stack:
            with doing(f"step {step}, sampling"):
                rng: dict[str, Any] = {"seed": seeds[0], "generator": generators(seeds)}
                made = rollout(self.pipe, plan, recompute=self.recompute, **rng, **given)
                tape = stack.enter_context(made)
            with _met_together(processes):
                check_images(tape.images, step)
                with asking(step):
                    with torch.random.fork_rng(devices=[]):  # a reward may shift its images at random, by this one
                        torch.default_generator.manual_seed(derive_seed(self.seed, "reward", step, first))
                        if self.method.robust_image:
                            images = self._worst_images(tape)
                            torch.default_generator.manual_seed(derive_seed(self.seed, "reward", step, first))
                        else:
                            images = tape.images
                        total, natives = self.reward.parts(images, tape.prompts)
                    check_scores({"the reward": total} | natives, step)
                    if total.requires_grad:
                        (-total.sum() / (self.batch * plan.pictures)).backward(inputs=[tape.images])
            if self.offload_reward:
                self.reward.to("cpu")
            with _at(step), doing(f"step {step}, the replay of the trained steps"):
                sweep = tape.backward(allow_zero=True, kl=(self.kl + self.method.kl) * len(part) / self.batch)
        denoise = None
        if self.denoising is not None:
            with _at(step), doing(f"step {step}, the denoising loss"):
                denoise = self.denoising.add(step, first=first, size=len(part), batch=self.batch)
        scores = {name: value.detach().float().cpu() for name, value in (natives | {"reward": total}).items()}
        return Part(size=len(part), scores=scores, natives=list(natives), sweep=sweep, denoise=denoise)


class _Moved(torch.autograd.Function):
    """Other values, the gradient of the first argument."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def _met_together(processes: Processes | None) -> Iterator[None]:
    """An error of one process is raised in all of them at the end of the block, where they share the denoiser."""
    if processes is None or not processes.sharded:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as met:
        error = met
    processes.raise_together(error)


@contextmanager
def _at(step: int) -> Iterator[None]:
    """The reward passed its check at start-up, so a missing gradient now is a training that went wrong.

    One micro-batch may be flat (a hinge that is satisfied); the trainer makes no update where all of them are.
    """
    try:
        yield
    except (RewardError, TrainingStopped) as error:
        raise TrainingStopped(f"step {step}: {error}") from error


@contextmanager
def doing(what: str) -> Iterator[None]:
    """An error that passes is told where it happened, in a note."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


@contextmanager
def asking(step: int) -> Iterator[None]:
    """A reward that fails now, after it passed its check at start-up, is an error of the run (exit code 1)."""
    try:
        with doing(f"step {step}, the reward"):
            yield
    except RewardError as error:
        if out_of_memory(error):
            raise
        raise RewardTuneError(f"step {step}: {error}") from error


def check_images(images: Tensor, step: int) -> None:
    if not torch.isfinite(images).all():
        raise BrokenPictures(f"step {step}: the pictures hold NaN; lower the lr, or run the VAE in float32 or bfloat16")
    if float(images.detach().amax()) < 1 / 255:
        raise BrokenPictures(f"step {step}: all pictures are black; an fp16 VAE does that: use float32 or bfloat16")


def check_scores(scores: dict[str, Tensor], step: int) -> None:
    for name, value in scores.items():
        if not torch.isfinite(value).all():
            raise TrainingStopped(f"step {step}: {name} is {value.detach().tolist()}: not finite; no update was made")
