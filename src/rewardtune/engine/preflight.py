"""Preflight: does this pipeline open exactly? A few small calls that find out before any training.

Checked: the pipeline repeats itself, the doors change no picture, one chain of steps with the denoiser between them,
network calls are functions of their arguments, gradients flow and are finite (plain and with early stop), the sweep's
gradient is that of one autograd graph, and the pipeline is as before afterwards.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.engine import guidance
from rewardtune.engine.chain import (
    count_steps,
    few_steps,
    fresh,
    one_sample,
    rollout,
    seeded,
    signed_range,
    snapshot,
)
from rewardtune.engine.doors import Doors, find_denoiser, quiet
from rewardtune.engine.literal import literal_gradient
from rewardtune.engine.tape import Tape
from rewardtune.errors import PreflightError, TrainingStopped, out_of_memory
from rewardtune.plan import Plan
from rewardtune.prediction import NoPredictionError
from rewardtune.stretches import Rescaled

#: How far a nested gradient may be from one autograd graph's: half precision rounds every product on the way.
LEGAL = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.2}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the preflight found.

    Attributes:
        T: scheduler steps of one chain of the user's call.
        denoiser: name of the tuned component.
        calls_per_step: denoiser calls between two scheduler steps (2 with true classifier-free guidance).
        early_stop: whether this scheduler has an x0-hat.
        guidance: how the call is guided: "none", "embedded", "one call", "two calls" or "two networks".
        notes: what is worth telling the user, in plain words.
    """

    T: int
    denoiser: str
    calls_per_step: int
    early_stop: bool
    guidance: str
    notes: list[str] = field(default_factory=list)


def asked_of(plans: Iterable[Plan]) -> dict[str, Any]:
    """What these plans ask of a pipeline, as arguments of `preflight`."""
    plans = list(plans)
    return {
        "early_stop": any(plan.needs_prediction for plan in plans),
        "levels": any(plan.needs_levels for plan in plans),
        "restarts": any(plan.start is not None for plan in plans),
        "conditional": any(plan.conditional_only for plan in plans),
    }


def preflight(
    pipe: Any,
    *,
    denoiser: str | None = None,
    early_stop: bool = True,
    levels: bool = False,
    restarts: bool = False,
    conditional: bool = False,
    steps: int = 4,
    **call: Any,
) -> Facts:
    """Run the checks on ``pipe(**call)`` with one prompt and few steps.

    Args:
        early_stop: whether an early stop will be used; without it a scheduler that has no x0-hat is only noted.
        levels: whether plans work with the noise levels of single steps, which a few samplers allow.
        restarts: whether chains will begin again from a noised x_0 (DRaFT-LV), which needs a law of noising.
        conditional: whether plans will be `conditional_only`, which needs a branch to leave out.
        steps: inference steps of the small calls.
        call: arguments of ``pipe(...)`` as the rollouts will use them.

    Raises:
        PreflightError: with the reason, if the pipeline cannot be opened exactly.
        ConfigError: if nothing is trainable, or the scheduler cannot do the number of steps.
    """
    name = find_denoiser(pipe, denoiser)
    T = count_steps(pipe, denoiser=name, **call)
    small = one_sample(call)
    small = few_steps({"num_inference_steps": steps} | small, T=T, steps=steps)
    notes: list[str] = []
    _plain(pipe, small)  # leaves what every call leaves
    there = _attributes(pipe)

    first = _plain(pipe, small)
    _check_range(pipe, small, first)
    second = _plain(pipe, small)
    noise = float((first - second).abs().max())
    if noise > 1e-3:
        raise PreflightError(
            f"{type(pipe).__name__} does not repeat itself with equal seeds (pictures differ by {noise:.1e}): pass a "
            "generator, and switch off what is random or stateful in the pipeline"
        )

    doors = Doors(pipe, None, denoiser=name)
    opened = _plain(pipe, small, doors)
    if float((opened - first).abs().max()) > noise:
        raise PreflightError(f"{type(pipe).__name__} renders other pictures with the doors open: please report this")
    small_T = doors.step
    calls = set(doors.calls_per_step.values())
    if small_T == 0 or not calls or set(doors.calls_per_step) - set(range(small_T)):
        raise PreflightError(
            f"{type(pipe).__name__}: pipe.{name} is not called between scheduler steps (several stages, or another "
            "denoiser): pass denoiser=<name of the network that is>"
        )

    try:
        found = _check_gradient(pipe, name, Plan(T=small_T, train=frozenset({small_T - 1})), small)
    except TrainingStopped:
        found = _check_gradient(pipe, name, Plan(T=small_T, train=frozenset(range(small_T))), small)
        notes.append(
            f"{type(pipe.scheduler).__name__} multiplies the last output of pipe.{name} by 0 with these arguments: "
            "a plan that trains the last step alone (draft K=1, draft_lv) has no gradient"
        )
    dead = sum(1 for g in found if g is None)
    if dead:
        notes.append(f"{dead} of {len(found)} trained tensors get no gradient (normal for the last blocks of MMDiT)")
    try:
        stop = max(0, small_T - 2)
        _check_gradient(pipe, name, Plan(T=small_T, train=frozenset({stop}), end=stop), small)
        can_stop = True
    except NoPredictionError as error:
        if early_stop:
            raise
        can_stop = False
        notes.append(f"no early stop: {error}")
    if levels:
        weighed = Plan(T=small_T, train=frozenset({small_T - 1}), weight=Rescaled(1.0))
        _check_gradient(pipe, name, weighed, small)
    if restarts and small_T > 1:
        _check_gradient(pipe, name, Plan(T=small_T, train=frozenset({small_T - 2}), start=small_T - 2), small)

    notes += _check_exactness(pipe, name, small_T, small)
    guided = _guidance(pipe, name, small_T, small, asked=conditional)

    if moved := sorted(set(_attributes(pipe).items()) ^ set(there.items())):
        raise PreflightError(f"{type(pipe).__name__}: {moved[0][0]} is not what it was; please report this")
    if float((_plain(pipe, small) - first).abs().max()) > noise:
        raise PreflightError(f"{type(pipe).__name__} renders other pictures after a rollout: please report this")
    return Facts(T=T, denoiser=name, calls_per_step=max(calls), early_stop=can_stop, guidance=guided, notes=notes)


def _plain(pipe: Any, call: dict[str, Any], doors: Doors | None = None, output_type: str = "pt") -> Any:
    """Images of the plain pipeline (as in a rollout: quiet), or with the given doors open and nothing trained."""
    restore = snapshot(pipe, call)
    try:
        with seeded(0, pipe), torch.no_grad(), doors.open() if doors else quiet(pipe):
            return pipe(**fresh({**call, "output_type": output_type, "return_dict": False}))[0]
    finally:
        restore()


def _check_range(pipe: Any, call: dict[str, Any], pt: Any) -> None:
    """`output_type="pt"` must be the picture itself: equal to "np", or to it before the usual post-processing.

    Which of them it is, is settled here for all rollouts of this pipeline: a batch of light pictures does not tell.
    """
    if not isinstance(pt, Tensor) or pt.ndim != 4 or pt.shape[1] != 3:
        shape = tuple(pt.shape) if isinstance(pt, Tensor) else type(pt).__name__
        raise PreflightError(f"{type(pipe).__name__} returns {shape} for output_type='pt'; (B, 3, H, W) is needed")
    np_images = torch.from_numpy(_plain(pipe, call, output_type="np")).permute(0, 3, 1, 2)
    pt = pt.detach().cpu().float()
    apart = {
        signed: float((p - np_images).abs().max()) for signed, p in ((False, pt), (True, (pt / 2 + 0.5).clamp(0, 1)))
    }
    if min(apart.values()) > 1e-2:
        raise PreflightError(f"{type(pipe).__name__}: output_type='pt' and 'np' are different pictures")
    signed_range[pipe] = apart[True] < apart[False]


def _guidance(pipe: Any, denoiser: str, T: int, call: dict[str, Any], *, asked: bool) -> str:
    """How the call is guided; PreflightError if it was asked for the conditional branch alone and there is no other."""
    plan = Plan(T=T, train=frozenset(range(T)), conditional_only=True, guidance_factor=1.0)
    doors = Doors(pipe, plan, denoiser=denoiser)
    try:
        _plain(pipe, call, doors)
    except guidance.AlikeError:
        if asked:
            raise
        return guidance.BATCH
    found = doors.guidance - {guidance.NONE}
    if found:
        return found.pop()
    config = getattr(pipe.components[denoiser], "config", {})
    inside = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
    if asked:
        why = "guidance is embedded in the denoiser" if inside else "guidance is off"
        raise PreflightError(
            f"conditional_only: {type(pipe).__name__} has no unconditional branch with these arguments ({why}): set "
            "method.conditional_only to null, or sample with guidance above 1 and a negative prompt"
        )
    return guidance.EMBEDDED if inside else guidance.NONE


def _attributes(pipe: Any) -> dict[str, int]:
    """Which object stands in each public attribute of the networks, and in those that the doors take."""
    found = {}
    for name, part in pipe.components.items():
        for key, value in vars(part).items() if isinstance(part, nn.Module) else ():
            if not key.startswith("_") or key == "_compiled_call_impl":
                found[f"pipe.{name}.{key}"] = id(value)
    for key in ("step", "set_timesteps"):
        if key in vars(pipe.scheduler):
            found[f"pipe.scheduler.{key}"] = id(vars(pipe.scheduler)[key])
    return found


def _check_exactness(pipe: Any, denoiser: str, T: int, call: dict[str, Any]) -> list[str]:
    """The sweep's gradient of the last two steps, nested, against one autograd graph; at the latents, without decoder.

    A note where the graphs do not fit into the memory: they are more than training needs.
    """
    train = frozenset(range(max(0, T - 2), T))
    network = pipe.components[denoiser]
    decodes = any(isinstance(part, nn.Module) and hasattr(part, "decode") for part in pipe.components.values())
    call = {**call, "output_type": "latent" if decodes else "pt"}  # those without a decoder turn latents into numpy
    parameters = [p for p in network.parameters() if p.requires_grad]
    if any(hasattr(p, "device_mesh") for p in network.parameters()):
        return ["the gradient was not compared with one autograd graph: the denoiser is shared out over the processes"]

    def loss(latent: Tensor) -> Tensor:
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return (latent * torch.linspace(-1, 1, latent.numel()).view_as(latent).to(latent)).sum()

    restore = snapshot(pipe, call)
    try:
        with seeded(0, pipe):
            expected, exact = literal_gradient(pipe, denoiser, train, fresh(call), loss)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return ["the gradient was not compared with one autograd graph, which takes more memory than training"]
    finally:
        restore()
    plan = Plan(T=T, train=train, input_gradient=1.0)
    with _gradients_aside(parameters, pipe, call), seeded(0, pipe):
        doors = Doors(pipe, plan, denoiser=denoiser)
        with doors.open():
            pipe(**fresh({**call, "return_dict": False}))
        assert doors.final is not None
        tape = Tape(plan, doors.final, doors.calls, network, [])
        tape.backward(loss(tape.images), allow_zero=True)
        found = [p.grad for p in parameters]
    legal = LEGAL.get(expected.dtype, 1e-3)
    apart = max(_apart(found, exact), _apart([doors.final.detach()], [expected]))
    if not apart <= legal:
        raise PreflightError(
            f"{type(pipe).__name__}: the gradient of the last two steps (or their latent) differs from that of one "
            f"autograd graph by {apart:.1e} (relative; legal is {legal:.0e}). Switch off what changes the networks "
            "during the call, and please report this pipeline"
        )
    return []


def _apart(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """Norm of the difference over the norm of the second, all tensors together."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a is not None or b is not None]
    filled = [(torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b) for a, b in pairs]  # type: ignore[arg-type]
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in filled)
    size = sum(float(b.double().square().sum()) for _, b in filled)
    return math.sqrt(off / size) if size else math.sqrt(off)


def _check_gradient(pipe: Any, denoiser: str, plan: Plan, call: dict[str, Any]) -> list[Tensor | None]:
    parameters = [p for p in pipe.components[denoiser].parameters() if p.requires_grad]
    with _gradients_aside(parameters, pipe, call):
        with rollout(pipe, plan, denoiser=denoiser, seed=0, **call) as tape:
            weights = torch.linspace(-1, 1, tape.images.numel(), dtype=tape.images.dtype, device=tape.images.device)
            tape.backward((tape.images * weights.view_as(tape.images)).mean())
        return [p.grad for p in parameters]


@contextmanager
def _gradients_aside(parameters: Sequence[nn.Parameter], pipe: Any, call: dict[str, Any]) -> Iterator[None]:
    """The parameters without gradients for the block; theirs, and the states of generators, come back."""
    before = [p.grad for p in parameters]
    restore = snapshot(pipe, call)
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        restore()
