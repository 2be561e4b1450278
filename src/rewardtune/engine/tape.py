"""One rollout's tape and its reverse sweep: the gradient of a loss on the images, carried to the trained parameters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewardtune.engine.call import Call, check_reference
from rewardtune.errors import ConfigError, RewardError, TrainingStopped
from rewardtune.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a reverse sweep measured.

    Attributes:
        grad_norms: L2 norm of the parameter gradient that each trained step contributed, by step index.
        trained: trained steps that ran, in sampling order.
        steps_run: steps whose network was evaluated while sampling.
        replay_error: largest relative difference between a replayed call and its record (0 on most machines).
        clamped: share of image values at exactly 0 or 1, through which no gradient passes.
        scale: power of two by which cotangents were multiplied inside half-precision networks.
        kl: ``mean((F - F_ref)^2)`` over elements, batch and trained calls, without its weight; None when not asked.
    """

    grad_norms: dict[int, float]
    trained: tuple[int, ...]
    steps_run: int
    replay_error: float
    clamped: float
    scale: float
    kl: float | None = None


class Tape:
    """One rollout, ready for its reverse sweep.

    Attributes:
        images: ``(B * plan.pictures, 3, H, W)`` in [0, 1], float32 (float64 if the pipeline is); a leaf, so any reward
            and any chunking of it works.
        prompts: the prompt of each image.
        plan: what was carried out.
        weights: how much each image weighs ``(B,)``, None being 1: the loss's gradient at an image is multiplied by it.
    """

    def __init__(
        self,
        plan: Plan,
        graph: Tensor,
        calls: list[Call],
        denoiser: nn.Module,
        prompts: list[str],
        weights: Tensor | None = None,
    ) -> None:
        self.plan, self.prompts, self.weights = plan, prompts, weights
        wide = graph.detach() if graph.dtype == torch.float64 else graph.detach().float()
        self.images = wide.requires_grad_()
        self._graph: Tensor | None = graph
        self._calls = calls
        self._denoiser = denoiser
        self._parameters = [p for p in denoiser.parameters() if p.requires_grad]
        trained = {id(p) for p in self._parameters}
        # Auxiliary networks and decoders are replayed for their inputs alone.
        self._frozen = {
            id(c.module): [p for p in c.module.parameters() if p.requires_grad and id(p) not in trained] for c in calls
        }

    @property
    def recorded_bytes(self) -> int:
        """Bytes that the recorded inputs and outputs of trained calls keep alive (shared storage counted once)."""
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for c in self._calls for x in c.recorded
        }
        return sum(storages.values())

    def backward(
        self,
        loss: Tensor | None = None,
        *,
        allow_zero: bool = False,
        kl: float = 0.0,
        reference: nn.Module | None = None,
    ) -> Sweep:
        """Reverse sweep: adds the gradient of ``loss`` to ``.grad`` of the denoiser's trained parameters.

        The loss's gradient stops at `images`; from there each recorded call is replayed, last to first. A tape
        can be swept once. If anything fails, the parameters' ``.grad`` is as before.

        With ``kl`` the gradient is that of ``loss + kl * D``, D being the mean of ``(F(x) - F_ref(x))^2`` over the
        trained calls and over all elements of their raw outputs F, at their detached inputs x. That is the KL between
        the Gaussian steps of both models without the factor of each step (the KL of DPOK, Fan et al. 2023; the factor
        is dropped as in DDPM's simple loss; DRaFT+ has the same term). It costs one forward of each trained call more,
        and with ``input_gradient > 0`` a second vector-Jacobian product: D reaches parameters, never an earlier call.

        Args:
            loss: scalar, a function of `images`; it is descended, so negate a reward. None sweeps what the
                caller's own ``chunk_loss.backward()`` calls have gathered in ``images.grad``.
            allow_zero: accept a gradient that is zero at the images (a hinge that is satisfied); nothing but the KL
                term is replayed.
            kl: weight of D; 0 leaves everything as it is without the term.
            reference: the frozen network of F_ref, needed when whole weights are trained; None is the denoiser with its
                adapters (LoRA, DoRA) off.

        Raises:
            RewardError: if the loss is not a finite scalar or has no gradient at the images.
            ReplayError: if a network call does not reproduce its record.
            TrainingStopped: if the parameter gradient is not finite or vanishes altogether.
            ConfigError: if ``kl`` is negative or not finite, or there is no base model to compare with.
        """
        if self._graph is None:
            raise ConfigError(
                "this tape has been swept, or its with-block has ended: sum the losses, or roll out again"
            )
        if not 0 <= kl < math.inf:
            raise ConfigError(f"kl={kl}: the weight of the KL term is 0 (none) or more")
        if kl and reference is None:
            check_reference(self._denoiser)
        cotangent = self._image_gradient(loss, allow_zero)
        graph, self._graph = self._graph, None
        # By step, over all chains of a DRaFT-LV plan: chains share no leaf, so only the order within each matters.
        calls, self._calls = sorted(self._calls, key=lambda call: call.step), []
        dtypes = {leaf.dtype for c in calls for leaf in c.leaves if leaf is not None}
        half = not dtypes.isdisjoint((torch.float16, torch.bfloat16))
        pull = kl / sum(call.trained for call in calls) if kl else 0.0
        scale = _power_of_two(max(float(cotangent.abs().max()), _largest_pull(pull, calls))) if half else 1.0
        before = [p.grad for p in self._parameters]
        norms, error, distance = dict.fromkeys(self.plan.executed, 0.0), 0.0, 0.0
        if cotangent.any() or kl:
            try:
                total, norms, error, distance = self._sweep(graph, calls, cotangent, scale, pull, reference)
            finally:
                for p, grad in zip(self._parameters, before, strict=True):
                    p.grad = grad
            self._commit(total, norms, allow_zero=not cotangent.any())
        return Sweep(
            grad_norms=norms,
            trained=self.plan.executed,
            steps_run=self.plan.steps_run,
            replay_error=error,
            clamped=float(((self.images <= 0) | (self.images >= 1)).float().mean()),
            scale=scale,
            kl=distance if kl else None,
        )

    def _image_gradient(self, loss: Tensor | None, allow_zero: bool) -> Tensor:
        if loss is not None:
            if loss.numel() != 1 or not loss.requires_grad:
                raise RewardError(
                    f"the loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}: a scalar that "
                    "depends on tape.images through differentiable operations is needed (no detach, no torch.no_grad)"
                )
            loss.backward(inputs=[self.images])  # the images alone: a reward's own parameters are left in peace
        grad = self.images.grad
        if grad is None:
            raise RewardError("the loss does not depend on tape.images: compute the reward from this tape's images")
        if not torch.isfinite(grad).all():
            raise RewardError("the gradient of the loss at the images is not finite: check the reward for NaN or inf")
        if not grad.any() and not allow_zero:
            raise RewardError(
                "the gradient of the loss at the images is zero: the reward is saturated, detached or constant there"
            )
        return grad if self.weights is None else grad * self.weights.to(grad).view(-1, 1, 1, 1)

    def _sweep(
        self,
        graph: Tensor,
        calls: list[Call],
        cotangent: Tensor,
        scale: float,
        pull: float,
        reference: nn.Module | None,
    ) -> tuple[list[Tensor | None], dict[int, float], float, float]:
        total: list[Tensor | None] = [None] * len(self._parameters)
        norms: dict[int, float] = {}
        for p in self._parameters:
            p.grad = None
        if cotangent.any():
            torch.autograd.backward([graph], [(cotangent * scale).to(graph.dtype)], retain_graph=True)
        error, distance, trained = 0.0, 0.0, sum(call.trained for call in calls)
        while calls:
            call = calls.pop()  # popped: its record is freed as soon as it is swept
            off = call.replay(
                self._frozen[id(call.module)],
                pull=pull * scale if call.trained else 0.0,
                reference=reference if call.module is self._denoiser else None,
            )
            error, distance = max(error, off[0]), distance + off[1] / trained
            before = next((c for c in reversed(calls) if c.trained), None)
            if call.trained and (before is None or before.step != call.step):
                self._collect(total, norms, call.step, scale)
        return total, norms, error, distance

    def _collect(self, total: list[Tensor | None], norms: dict[int, float], step: int, scale: float) -> None:
        """Move the gradient of one step (all of its calls) out of ``.grad`` into ``total``; log its norm."""
        squares = [torch.zeros((), dtype=torch.float64)]
        for k, p in enumerate(self._parameters):
            if p.grad is None:
                continue
            grad = p.grad if scale == 1.0 else p.grad / scale
            squares.append(torch.linalg.vector_norm(grad, dtype=_wide(grad)).double().cpu() ** 2)
            so_far = total[k]
            total[k] = grad if so_far is None else so_far + grad
            p.grad = None
        norms[step] = float(torch.stack(squares).sum().sqrt())

    def _commit(self, total: list[Tensor | None], norms: dict[int, float], *, allow_zero: bool) -> None:
        if not all(math.isfinite(n) for n in norms.values()):
            steps = [i for i, n in norms.items() if not math.isfinite(n)]
            raise TrainingStopped(
                f"the parameter gradient is not finite at steps {steps}: lower the learning rate or the guidance, or "
                "use bfloat16 instead of float16"
            )
        if not any(norms.values()) and not allow_zero:
            raise TrainingStopped(
                "the parameter gradient is zero everywhere although the loss has one at the images: it underflows, or "
                "the sampler discards the outputs of the trained calls (a few do with the last one: train more steps)"
            )
        for p, grad in zip(self._parameters, total, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad


def _power_of_two(largest: float) -> float:
    """Scale that brings the largest cotangent near 1: a mean over many pixels underflows in half precision."""
    return 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0


def _largest_pull(pull: float, calls: list[Call]) -> float:
    """What the KL term's cotangent 2 pull (F - F_ref) / n would be for outputs one apart: it must not overflow."""
    sizes = [sum(leaf.numel() for leaf in call.leaves if leaf is not None) for call in calls if call.trained]
    return 2 * pull / min(sizes, default=1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
