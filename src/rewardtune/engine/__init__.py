"""Roll out a plan through the user's own pipeline and back-propagate a loss through it, exactly.

    with rollout(pipe, plan, prompt=prompts, num_inference_steps=50) as tape:
        loss = -reward(tape.images, tape.prompts).mean()
        tape.backward(loss)                      # trained parameters now hold .grad

Peak activation memory is that of the reward, of the decoder, or of one network call - whichever is largest - whatever
the number of trained steps, because each trained call is replayed, back-propagated and forgotten by itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.errors import ConfigError, PreflightError, RewardError, TrainingStopped
from rewardtune.plan import Plan
from rewardtune.engine.doors import Doors, find_denoiser
from rewardtune.engine.tape import Call

__all__ = ["Sweep", "Tape", "count_steps", "find_denoiser", "preflight", "rollout"]


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
    """

    grad_norms: dict[int, float]
    trained: tuple[int, ...]
    steps_run: int
    replay_error: float
    clamped: float
    scale: float


class Tape:
    """One rollout, ready for its reverse sweep.

    Attributes:
        images: ``(B * plan.draws, 3, H, W)`` in [0, 1], float32 (float64 if the pipeline is); a leaf, so any reward
            and any chunking of it works.
        prompts: the prompt of each image.
        plan: what was carried out.
    """

    def __init__(self, plan: Plan, graph: Tensor, calls: list[Call], denoiser: nn.Module, prompts: list[str]) -> None:
        self.plan, self.prompts = plan, prompts
        wide = graph.detach() if graph.dtype == torch.float64 else graph.detach().float()
        self.images = wide.requires_grad_()
        self._graph: Tensor | None = graph
        self._calls = calls
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

    def backward(self, loss: Tensor) -> Sweep:
        """Reverse sweep: adds the gradient of ``loss`` to ``.grad`` of the denoiser's trained parameters.

        The loss's gradient stops at :attr:`images`; from there each recorded call is replayed, last to first. A tape
        can be swept once. If anything fails, the parameters' ``.grad`` is as before.

        Args:
            loss: scalar, a function of :attr:`images`; it is descended, so negate a reward.

        Raises:
            RewardError: if the loss is not a finite scalar or has no gradient at the images.
            ReplayError: if a network call does not reproduce its record.
            TrainingStopped: if the parameter gradient is not finite or vanishes altogether.
        """
        if self._graph is None:
            raise ConfigError(
                "this tape has been swept, or its with-block has ended: sum the losses, or roll out again"
            )
        cotangent = self._image_gradient(loss)
        graph, self._graph = self._graph, None
        calls, self._calls = self._calls, []
        leaves = [leaf for c in calls for leaf in c.leaves if leaf is not None]
        scale = (
            _power_of_two(cotangent) if any(leaf.dtype in (torch.float16, torch.bfloat16) for leaf in leaves) else 1.0
        )
        before = [p.grad for p in self._parameters]
        try:
            total, norms, error = self._sweep(graph, calls, cotangent, scale)
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad
        self._commit(total, norms)
        return Sweep(
            grad_norms=norms,
            trained=self.plan.executed,
            steps_run=self.plan.steps_run,
            replay_error=error,
            clamped=float(((self.images <= 0) | (self.images >= 1)).float().mean()),
            scale=scale,
        )

    def _image_gradient(self, loss: Tensor) -> Tensor:
        if loss.numel() != 1 or not loss.requires_grad:
            raise RewardError(
                f"the loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}: a scalar that depends "
                "on tape.images through differentiable operations is needed (no .detach(), no torch.no_grad())"
            )
        self.images.grad = None
        loss.backward()
        grad = self.images.grad
        if grad is None:
            raise RewardError("the loss does not depend on tape.images: compute the reward from this tape's images")
        if not torch.isfinite(grad).all():
            raise RewardError("the gradient of the loss at the images is not finite: check the reward for NaN or inf")
        if not grad.any():
            raise RewardError(
                "the gradient of the loss at the images is zero: the reward is saturated, detached or constant there"
            )
        return grad

    def _sweep(
        self, graph: Tensor, calls: list[Call], cotangent: Tensor, scale: float
    ) -> tuple[list[Tensor | None], dict[int, float], float]:
        total: list[Tensor | None] = [None] * len(self._parameters)
        norms: dict[int, float] = {}
        for p in self._parameters:
            p.grad = None
        torch.autograd.backward([graph], [(cotangent * scale).to(graph.dtype)], retain_graph=True)
        error = 0.0
        while calls:
            call = calls.pop()  # popped: its record is freed as soon as it is swept
            error = max(error, call.replay(self._frozen[id(call.module)]))
            before = next((c for c in reversed(calls) if c.trained), None)
            if call.trained and (before is None or before.step != call.step):
                self._collect(total, norms, call.step, scale)
        return total, norms, error

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

    def _commit(self, total: list[Tensor | None], norms: dict[int, float]) -> None:
        if not all(math.isfinite(n) for n in norms.values()):
            steps = [i for i, n in norms.items() if not math.isfinite(n)]
            raise TrainingStopped(
                f"the parameter gradient is not finite at steps {steps}: lower the learning rate or the guidance, or "
                "use bfloat16 instead of float16"
            )
        if not any(norms.values()):
            raise TrainingStopped(
                "the parameter gradient is zero everywhere although the loss has one at the images: it underflows, or "
                "the trained parameters do not act on the trained calls"
            )
        for p, grad in zip(self._parameters, total, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad


@contextmanager
def rollout(
    pipe: Any, plan: Plan, *, denoiser: str | None = None, seed: int | None = None, **call: Any
) -> Iterator[Tape]:
    """Sample ``pipe(**call)`` under ``plan`` and hand out its images as a leaf, ready for :meth:`Tape.backward`.

    Args:
        pipe: any diffusers text-to-image pipeline; it is not changed.
        plan: its ``T`` must be the number of scheduler steps of this call (:func:`count_steps`).
        denoiser: component that is tuned; by default ``unet`` or ``transformer``.
        seed: seeds the global generators for the duration (some pipelines draw from them) and restores them.
        call: arguments of ``pipe(...)``: prompt, num_inference_steps, guidance_scale, generator, height, width ...

    Raises:
        PreflightError: if the pipeline cannot be opened or takes another number of steps than ``plan.T``.
        ConfigError: if nothing is trainable.
    """
    name = find_denoiser(pipe, denoiser)
    network = pipe.components[name]
    if not any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"nothing to train: no parameter of pipe.{name} requires grad; add a LoRA first (add_lora)")
    with _seeded(seed, network):
        graphs: list[Tensor] = []
        calls: list[Call] = []
        if plan.start is None:
            _chain(pipe, plan, name, call, graphs, calls)
        else:
            graphs, calls = _renoised_chains(pipe, plan, name, call)
    graph = _as_unit_range(torch.cat(graphs))
    tape = Tape(plan, graph, calls, network, _prompts(call, len(graph) // plan.draws) * plan.draws)
    try:
        yield tape
    finally:
        tape._graph, tape._calls = None, []


def count_steps(pipe: Any, *, denoiser: str | None = None, **call: Any) -> int:
    """T: the number of ``scheduler.step`` calls of ``pipe(**call)``, counted at the cost of one network call.

    Raises:
        ConfigError: if the scheduler cannot do this number of steps.
    """
    doors = Doors(pipe, None, denoiser=find_denoiser(pipe, denoiser), blank=True)
    with _seeded(0, doors.denoiser), doors.open():
        try:
            pipe(**{**_one_sample(call), "output_type": "latent"})
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} refuses this call "
                f"(num_inference_steps={call.get('num_inference_steps')}): {error}"
            ) from error
    return doors.step


def _chain(
    pipe: Any, plan: Plan, denoiser: str, call: dict[str, Any], graphs: list[Tensor], calls: list[Call], **doors: Any
) -> Doors:
    opened = Doors(pipe, plan, denoiser=denoiser, **doors)
    with opened.open():
        result = pipe(**{**call, "output_type": "pt", "return_dict": False})
    ran = opened.step
    if ran != plan.last + 1:
        raise PreflightError(
            f"the plan is for T={plan.T} steps but {type(pipe).__name__} took {ran} with these arguments: draw it for "
            "T = count_steps(pipe, ...) of the same call"
        )
    graphs.append(result[0])
    calls.extend(opened.calls)
    return opened


def _renoised_chains(pipe: Any, plan: Plan, denoiser: str, call: dict[str, Any]) -> tuple[list[Tensor], list[Call]]:
    """DRaFT-LV: one chain to the end without gradient, then ``draws`` chains from its x_0, re-noised at ``start``.

    The restarted chains answer earlier network calls from the first one's record, so they cost ``T - start`` calls and
    multistep schedulers keep their true history. Noise comes from the call's generators, in the state in which the
    first chain left them (or from the global one), so it belongs to each sample as the rest of its randomness does.
    """
    generators = _generators(call)
    initial = [g.get_state() for g in generators]
    first = Doors(pipe, None, denoiser=denoiser, keep_outputs=True)
    with first.open():
        pipe(**{**call, "output_type": "latent", "return_dict": False})
    if first.step != plan.T or first.final is None or plan.start is None:
        raise PreflightError(f"the plan is for T={plan.T} steps but {type(pipe).__name__} took {first.step}")
    x0, timestep = first.final.detach(), first.timesteps[plan.start]
    after = [g.get_state() for g in generators]
    graphs: list[Tensor] = []
    calls: list[Call] = []
    for _ in range(plan.draws):
        for g, state in zip(generators, after, strict=True):
            g.set_state(state)
        noise = _noise_like(x0, call.get("generator"))
        after = [g.get_state() for g in generators]
        for g, state in zip(generators, initial, strict=True):
            g.set_state(state)
        _chain(pipe, plan, denoiser, call, graphs, calls, given=first.outputs, restart=_renoise(x0, timestep, noise))
    for g, state in zip(generators, after, strict=True):
        g.set_state(state)
    return graphs, calls


def _renoise(x0: Tensor, timestep: Any, noise: Tensor) -> Any:
    def at(scheduler: Any) -> Tensor:
        times = torch.as_tensor(timestep, device=x0.device).reshape(-1).expand(len(x0))
        if hasattr(scheduler, "add_noise"):
            return scheduler.add_noise(x0, noise, times)
        return scheduler.scale_noise(x0, times, noise)  # flow matching

    return at


def _noise_like(x: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _generators(call: dict[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _one_sample(call: dict[str, Any]) -> dict[str, Any]:
    """The same call for its first prompt alone, where prompts are lists and nothing else carries the batch."""
    prompt = call.get("prompt")
    batched = any(isinstance(v, Tensor) and v.ndim > 1 for v in call.values())
    if not isinstance(prompt, list) or batched:
        return dict(call)
    small = {k: v[:1] if isinstance(v, list) and len(v) == len(prompt) else v for k, v in call.items()}
    if isinstance(call.get("generator"), torch.Generator | list):
        small["generator"] = torch.Generator(_generators(call)[0].device).manual_seed(0)
    return small


def _prompts(call: dict[str, Any], images: int) -> list[str]:
    prompt = call.get("prompt")
    prompts = [""] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    return [p for p in prompts for _ in range(max(1, images // len(prompts)))]


def _as_unit_range(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise PreflightError(f"the pipeline returned {tuple(images.shape)}, but (B, 3, H, W) images are needed")
    if float(images.detach().min()) < 0:  # a few pipelines (IF, Kandinsky 2, 3) leave 'pt' in [-1, 1]
        images = (images / 2 + 0.5).clamp(0, 1)
    if float(images.detach().max()) > 1:
        raise PreflightError("the pipeline's images leave [0, 1]: its output_type='pt' is not post-processed")
    return images


def _power_of_two(cotangent: Tensor) -> float:
    """Scale that brings the largest image cotangent near 1: a mean over many pixels underflows in half precision."""
    return 2.0 ** -math.floor(math.log2(float(cotangent.abs().max())))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def _seeded(seed: int | None, network: nn.Module) -> Iterator[None]:
    device = next(network.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


from rewardtune.engine.preflight import preflight  # noqa: E402
