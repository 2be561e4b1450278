"""Sampling chains: the user's own ``pipe(...)`` under a plan, with the doors held open."""

import functools
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewardtune.engine import guidance
from rewardtune.engine.call import Call
from rewardtune.engine.doors import Doors, find_denoiser
from rewardtune.engine.tape import Tape
from rewardtune.errors import ConfigError, PreflightError, missing_package
from rewardtune.plan import Plan
from rewardtune.prediction import noised

log = logging.getLogger("rewardtune")

_unguided: "weakref.WeakSet[Any]" = weakref.WeakSet()
#: Whether a pipeline leaves output_type="pt" in [-1, 1], as IF and Kandinsky 2 and 3 do. `preflight` settles it, by
#: comparison with "np"; without it the first picture with a value below 0 does.
signed_range: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


@contextmanager
def rollout(
    pipe: Any, plan: Plan, *, denoiser: str | None = None, seed: int | None = None, recompute: bool = True, **call: Any
) -> Iterator[Tape]:
    """Sample ``pipe(**call)`` under ``plan`` and hand out its images as a leaf, ready for `backward`.

    Args:
        pipe: any diffusers text-to-image pipeline; it is not changed.
        plan: its ``T`` must be the number of scheduler steps of this call (`count_steps`).
        denoiser: component that is tuned; by default ``unet`` or ``transformer``.
        seed: seeds the global generators for the duration (some pipelines draw from them) and restores them.
        recompute: trained calls run without a graph and once more in the sweep, so memory is that of one of them. False
            keeps all their graphs instead: K forwards less, the memory of K graphs.
        call: arguments of ``pipe(...)``: prompt, num_inference_steps, guidance_scale, generator, height, width ...

    Raises:
        PreflightError: if the pipeline cannot be opened or takes another number of steps than ``plan.T``.
        ConfigError: if nothing is trainable, or the denoiser's weights move (offloading), so no graph can be kept.
    """
    name = find_denoiser(pipe, denoiser)
    network = pipe.components[name]
    if not recompute and getattr(network, "_hf_hook", None) is not None:
        raise ConfigError(f"recompute=False keeps graphs, which need pipe.{name} in its place: switch offloading off")
    if not any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"nothing to train: no parameter of pipe.{name} requires grad; add a LoRA first (add_lora)")
    with seeded(seed, pipe):
        graphs: list[Tensor] = []
        calls: list[Call] = []
        opened: Doors | None = None
        weights: Tensor | None = None
        if plan.start is None:
            begin = snapshot(pipe, call)
            opened = _chain(pipe, plan, name, call, graphs, calls, recompute=recompute, keep_outputs=bool(plan.stops))
            weights = _weigh(plan, opened)
            if plan.stops:
                _stopped_chains(pipe, plan, name, call, graphs, calls, begin, opened.outputs)
        else:
            graphs, calls = _renoised_chains(pipe, plan, name, call, recompute=recompute)
        with torch.enable_grad():
            graph = _as_unit_range(torch.cat(graphs), pipe)
    tape = Tape(plan, graph, calls, network, _prompts(call, len(graph) // plan.pictures) * plan.pictures, weights)
    del graph, graphs, calls, opened  # the tape alone holds the records, so that each is freed as soon as it is swept
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
    restore = snapshot(pipe, call)
    try:
        with refusals(pipe, call), doors.open():
            pipe(**fresh({**one_sample(call), "output_type": "latent"}))
    finally:
        restore()
    return doors.step


@contextmanager
def refusals(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
    """What ``pipe(**call)`` says of arguments that it cannot take, or of packages that it lacks, is a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (NameError, ImportError) as error:
        if (package := missing_package(error)) is None:
            raise
        raise ConfigError(
            f"{type(pipe).__name__} needs the package {package}, which is not installed: pip install {package}"
        ) from error
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} refuses this call "
            f"(num_inference_steps={call.get('num_inference_steps')}): {error}"
        ) from error


def _chain(
    pipe: Any, plan: Plan, denoiser: str, call: dict[str, Any], graphs: list[Tensor], calls: list[Call], **doors: Any
) -> Doors:
    opened = Doors(pipe, plan, denoiser=denoiser, **doors)
    with opened.open():
        result = pipe(**fresh({**call, "output_type": "pt", "return_dict": False}))
    _check_steps(pipe, plan, opened)
    if opened.guidance == {guidance.NONE} and pipe not in _unguided:
        _unguided.add(pipe)
        log.warning("conditional_only changes nothing: the trained steps have no unconditional branch")
    graphs.append(result[0])
    calls.extend(opened.calls)
    return opened


def _stopped_chains(
    pipe: Any,
    plan: Plan,
    denoiser: str,
    call: dict[str, Any],
    graphs: list[Tensor],
    calls: list[Call],
    begin: Callable[[], None],
    outputs: list[Any],
) -> None:
    """The same chain again for each of ``plan.stops``, from the outputs of its network calls: no call is repeated.

    What arrives at a trained call's output is gathered from all of them, so each is replayed once.
    """
    after = snapshot(pipe, call)
    for stop in sorted(plan.stops):
        begin()
        shorter = replace(plan, end=stop, stops=frozenset())
        _chain(pipe, shorter, denoiser, call, graphs, calls, given=outputs)
    after()


def _weigh(plan: Plan, opened: Doors) -> Tensor | None:
    """Put the plan's weights on the recorded calls; the weight of each picture (B,), if they differ.

    F, whose gradient is weighed, is what guidance makes of all calls of a step, so a second network's counts as well.
    """
    if plan.weight is None:
        return None
    assert opened.final is not None
    factors = plan.weight.factors(opened.spans, plan.executed)
    for call in opened.calls:
        if opened.is_kin(call.module):
            call.weight = factors[call.step]
    opened.carries.update(plan.weight.carries(opened.spans))
    return plan.weight.of_pictures(opened.spans, opened.states, opened.final.detach())


def _renoised_chains(
    pipe: Any, plan: Plan, denoiser: str, call: dict[str, Any], *, recompute: bool
) -> tuple[list[Tensor], list[Call]]:
    """DRaFT-LV: one chain to the end without gradient, then ``draws`` chains from its x_0, re-noised at ``start``.

    The restarted chains answer earlier network calls from the first one's record, so they cost ``T - start`` calls and
    multistep schedulers keep their true history. Noise comes from the call's generators, in the state in which the
    first chain left them (or from the global one), so it belongs to each sample as the rest of its randomness does.
    A plan with `known_noise` takes the noise that the first chain began with, where it began with noise alone.
    """
    begin = snapshot(pipe, call)
    first = Doors(pipe, None, denoiser=denoiser, keep_outputs=True)
    with first.open():
        pipe(**fresh({**call, "output_type": "latent", "return_dict": False}))
    _check_steps(pipe, plan, first)
    assert first.final is not None
    assert plan.start is not None
    x0, timestep = first.final.detach(), first.timesteps[plan.start]
    after = snapshot(pipe, call)
    graphs: list[Tensor] = []
    calls: list[Call] = []
    own = None
    if plan.known_noise and "strength" not in inspect.signature(type(pipe).__call__).parameters:  # image-to-image
        assert first.first is not None
        own = first.first / getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    for _ in range(plan.draws):
        after()
        noise = _noise_like(x0, call.get("generator")) if own is None else own
        after = snapshot(pipe, call)
        begin()
        restart = functools.partial(noised, x0=x0, noise=noise, timestep=timestep)
        known = noise if plan.known_noise else None
        again = {"given": first.outputs, "restart": restart, "known": known, "recompute": recompute}
        _chain(pipe, plan, denoiser, call, graphs, calls, **again)
    after()
    return graphs, calls


def _check_steps(pipe: Any, plan: Plan, opened: Doors) -> None:
    if opened.asked != plan.T:
        raise PreflightError(
            f"the plan is for T={plan.T} steps but {type(pipe).__name__} took {opened.asked} with these arguments: "
            "draw it for T = count_steps(pipe, ...) of the same call"
        )


def snapshot(pipe: Any, call: dict[str, Any]) -> Callable[[], None]:
    """Remember every generator that ``pipe(**call)`` may draw from; the result puts them back."""
    states: list[tuple[Callable[[Tensor], Any], Tensor]] = [(g.set_state, g.get_state()) for g in generators_of(call)]
    states.append((torch.set_rng_state, torch.get_rng_state()))
    device = execution_device(pipe)
    if device.type == "cuda":
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))

    def restore() -> None:
        for put_back, state in states:
            put_back(state)

    return restore


def execution_device(pipe: Any) -> torch.device:
    """Where the pipeline computes; with CPU offload that is not where its weights are."""
    return torch.device(getattr(pipe, "_execution_device", "cpu"))


def _noise_like(x: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def generators_of(call: dict[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def fresh(call: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in new lists and dicts: some pipelines write into those they get (Z-Image: the prompts)."""
    return pytree.tree_map(lambda x: x, call)


def few_steps(call: dict[str, Any], *, T: int, steps: int = 2) -> dict[str, Any]:
    """`call` with so few inference steps that about `steps` of its `T` scheduler steps are made.

    Image-to-image makes the last of the steps asked for alone; second-order samplers make more than are asked for.
    """
    asked = int(call["num_inference_steps"])
    return call | {"num_inference_steps": min(asked, math.ceil(steps * asked / max(1, min(T, asked))))}


def one_sample(call: dict[str, Any]) -> dict[str, Any]:
    """The same call for its first prompt alone, where prompts are lists and nothing else carries the batch."""
    prompt = call.get("prompt")
    batched = any(isinstance(v, Tensor) and v.ndim > 1 for v in pytree.tree_leaves(call))
    if not isinstance(prompt, list) or batched:
        return dict(call)
    small = {k: v[:1] if isinstance(v, list) and len(v) == len(prompt) else v for k, v in call.items()}
    if isinstance(call.get("generator"), torch.Generator | list):
        small["generator"] = torch.Generator(generators_of(call)[0].device).manual_seed(0)
    return small


def _prompts(call: dict[str, Any], images: int) -> list[str]:
    prompt = call.get("prompt")
    prompts = [""] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    return [p for p in prompts for _ in range(max(1, images // len(prompts)))]


def _as_unit_range(images: Tensor, pipe: Any) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise PreflightError(f"the pipeline returned {tuple(images.shape)}, but (B, 3, H, W) images are needed")
    below = float(images.detach().min()) < 0
    if below and pipe not in signed_range:
        signed_range[pipe] = True
    if signed_range.get(pipe, False):
        images, below = (images / 2 + 0.5).clamp(0, 1), False
    if below or float(images.detach().max()) > 1:
        raise PreflightError("the pipeline's images leave [0, 1]: its output_type='pt' is not post-processed")
    return images


@contextmanager
def seeded(seed: int | None, pipe: Any) -> Iterator[None]:
    """Global generators seeded for the block and restored after it; untouched without a seed."""
    if seed is None:
        yield
        return
    restore = snapshot(pipe, {})
    try:
        torch.manual_seed(seed)
        yield
    finally:
        restore()
