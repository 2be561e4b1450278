"""Algorithm 1 of DRTune (Wu et al. 2024), literally: the judge of the engine.

The pipeline's own `__call__` runs with `no_grad` made inert, so that autograd builds one graph through the whole chain.
Two functions are replaced for its duration: the denoiser's `forward` (lines 13 to 18: which gradients pass) and the
scheduler's `step` (lines 19 to 22: counting, and the early stop). No tape, no replay, no memory saved, nothing imported
from the package under test; what a plan says arrives as plain values.

Index law: `i` counts calls of `scheduler.step` from 0, the noisiest; the paper's `t` is `T - i`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


class _EarlyStopError(Exception):
    """Line 21, `break`: leaves the pipeline's loop with the predicted clean latent."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0


@dataclass
class _Count:
    i: int = 0  # steps of the scheduler done so far = index of the step that the next network call belongs to


def images(
    pipe: Any,
    *,
    train: Collection[int],
    end: int | None = None,
    input_gradient: float = 0.0,
    seed: int = 0,
    call: dict,
    own_decoding: bool = False,
) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] with the graph of Algorithm 1 behind them, float32 or float64.

    `train` are the steps of `t_train`; `end` is the step of `t_min`, or None for the whole chain; `input_gradient` is 0
    for sg(x_t), 1 for x_t, and the share of the gradient that passes in between. `own_decoding`: after the stop the
    pipeline's loop goes on with x0-hat for its latent, and decodes that, instead of the lines written in `decode`.
    """
    torch.manual_seed(seed)
    fields = {"train": train, "end": end, "input_gradient": input_gradient, "leave": not own_decoding}
    try:
        with algorithm_1(pipe, **fields), without_no_grad():
            pictures = pipe(**call, output_type="pt", return_dict=False)[0]
    except _EarlyStopError as stop:
        pictures = decode(pipe, stop.x0, call)
    if own_decoding and float(pictures.detach().min()) < 0:
        pictures = (pictures / 2 + 0.5).clamp(0, 1)  # a few pipelines leave the last line to their output as "np"
    return pictures.to(torch.promote_types(pictures.dtype, torch.float32))


@contextlib.contextmanager
def without_no_grad() -> Iterator[None]:
    """`torch.no_grad` does nothing, neither around a pipeline's `__call__` nor within it."""
    kind = torch.no_grad
    kept = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = lambda self: None, lambda self, *error: None
    try:
        with torch.enable_grad():
            yield
    finally:
        kind.__enter__, kind.__exit__ = kept


@contextlib.contextmanager
def algorithm_1(
    pipe: Any, *, train: Collection[int], end: int | None, input_gradient: float, leave: bool = True
) -> Iterator[_Count]:
    """Lines 12 to 22 laid around the pipeline's own loop."""
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    halves = [part for part in pipe.components.values() if type(part) is type(denoiser)]  # of Ideogram 4's guidance
    scheduler = pipe.scheduler
    step = scheduler.step
    count = _Count()
    ended: list[Answer] = []

    def stopping(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def network(*args: Any, **kwargs: Any) -> Any:
            # Lines 13-16. The input of the network is everything that reaches it, a ControlNet's answer included.
            stopped = each_tensor((args, kwargs), lambda x: pass_gradient(x, input_gradient))
            output = forward(*stopped[0], **stopped[1])
            if count.i not in train or ended:
                output = each_tensor(output, torch.Tensor.detach)  # lines 17-18
            return output

        return network

    @functools.wraps(step)
    def counted_step(*args: Any, **kwargs: Any) -> Any:
        if ended:
            return ended[0]
        if count.i == end:
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            x0 = intermediate_prediction(scheduler, step, count.i, given)  # lines 19-21
            if leave:
                raise _EarlyStopError(x0)
            ended.append(Answer(x0))
            return ended[0]
        result = step(*args, **kwargs)  # line 22
        count.i += 1
        return result

    scheduler.step = counted_step
    for half in halves:
        half.forward = stopping(half.forward)
    try:
        yield count
    finally:
        del scheduler.step
        for half in halves:
            del half.forward


class Answer(tuple):
    """What a scheduler's step returns, as a tuple and by name, with x0-hat in every place."""

    def __new__(cls, x0: Tensor) -> Answer:
        return super().__new__(cls, (x0, x0))

    prev_sample = pred_original_sample = denoised = property(lambda self: self[0])


def pass_gradient(x: Tensor, share: float) -> Tensor:
    """sg(x) for 0, x for 1, and a tensor with the same bits and `share` of the gradient in between."""
    if not x.is_floating_point() or share == 1:
        return x
    return x.detach() if share == 0 else x.detach() + share * (x - x.detach())


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, dict):
        return type(value)(**{key: each_tensor(item, change) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(item, change) for item in value)
    return value


# Line 20: the clean latent predicted from (x_t, F_t) ------------------------------------------------------------------


def intermediate_prediction(scheduler: Any, step: Callable, i: int, given: dict) -> Tensor:
    """The scheduler's own prediction where `step` returns one, else the formula of its parametrisation."""
    if own_prediction(scheduler):
        result = step(**{**given, "return_dict": True})
        return result["denoised"] if "denoised" in result else result["pred_original_sample"]
    return x0_formula(scheduler, i, given["timestep"], given["sample"], given["model_output"])


def own_prediction(scheduler: Any) -> bool:
    """Does `step` return x0-hat? PNDM, TCD, DPM++, UniPC, DEIS, LMS-less multistep and flow schedulers do not."""
    none = ("PNDM", "TCD", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPC", "DEIS", "SASolver", "FlowMatch")
    return not type(scheduler).__name__.startswith(none)


def x0_formula(scheduler: Any, i: int, timestep: Tensor, x: Tensor, F: Tensor) -> Tensor:
    """x = alpha x0 + sigma noise, solved for x0 by what the network predicts.

    The schedulers that carry `sigmas` count in sigma / alpha when they preserve variance; a flow has alpha = 1 - sigma.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if hasattr(scheduler, "sigmas"):
        first = getattr(scheduler, "begin_index", None) or 0  # image-to-image begins there
        sigma = scheduler.sigmas[first + i].to(x.device)  # in the precision of the scheduler's own tables
        if kind == "flow_prediction":
            return x - sigma * F
        alpha = 1 / (1 + sigma**2) ** 0.5
        sigma = sigma * alpha
    else:
        alpha = scheduler.alphas_cumprod[int(timestep)].to(x.device) ** 0.5
        sigma = (1 - alpha**2) ** 0.5
    return {
        "epsilon": lambda: (x - sigma * F) / alpha,
        "v_prediction": lambda: alpha * x - sigma * F,
        "sample": lambda: F,
    }[kind]()


# The last lines of the pipelines --------------------------------------------------------------------------------------


def decode(pipe: Any, x0: Tensor, call: dict) -> Tensor:
    """Clean latent to images in [0, 1], as the pipelines under test do after their loop."""
    with torch.enable_grad():
        if "Flux" in type(pipe).__name__:
            x0 = pipe._unpack_latents(x0, call["height"], call["width"], pipe.vae_scale_factor)
        latent = x0 / pipe.vae.config.scaling_factor
        if pipe.vae.config.shift_factor is not None:
            latent = latent + pipe.vae.config.shift_factor
        return pipe.image_processor.postprocess(pipe.vae.decode(latent, return_dict=False)[0], output_type="pt")


# DRaFT-LV -------------------------------------------------------------------------------------------------------------


def draft_lv_images(
    pipe: Any,
    *,
    T: int,
    start: int,
    draws: int,
    train: Collection[int],
    end: int | None,
    input_gradient: float,
    seed: int,
    call: Callable[[], dict],
) -> Tensor:
    """DRaFT-LV (Clark et al. 2023): the chain again from `start`, from the finished x_0 noised afresh, `draws` times.

    Images `(draws * B, 3, H, W)`, draw by draw. `call` makes the call's arguments anew. The fresh noise comes from the
    call's own generators, one per sample, where the finished chain left them; every repetition of the chain begins with
    the same generators as the first and repeats its earlier steps, so that a multistep scheduler has its true memory.
    """
    torch.manual_seed(seed)
    first = call()
    with restarted(pipe, T, at=start, latent=None) as finished, torch.no_grad():
        pipe(**first, output_type="latent")
    x0 = finished[0]
    pictures = []
    for _ in range(draws):
        noise = torch.cat([fresh_noise(x0, generator) for generator in first["generator"]])
        with restarted(pipe, T, at=start, latent=add_noise(pipe.scheduler, start, x0, noise)):
            chain = images(pipe, train=train, end=end, input_gradient=input_gradient, seed=seed, call=call())
        pictures.append(chain)
    return torch.cat(pictures)


def fresh_noise(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for one sample of the batch, drawn where its generator lives."""
    return torch.randn((1, *x0.shape[1:]), generator=generator, device=generator.device, dtype=x0.dtype).to(x0)


@contextlib.contextmanager
def restarted(pipe: Any, T: int, *, at: int, latent: Tensor | None) -> Iterator[list[Tensor]]:
    """Step `at` begins from this latent, if one is given; the list receives what the last step returns."""
    scheduler, results = pipe.scheduler, []
    step = scheduler.step

    @functools.wraps(step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        results.append(result[0])
        if len(results) == T:
            finished.append(results[-1].detach())
        if len(results) == at and latent is not None:
            return (latent,)
        return result

    finished: list[Tensor] = []
    scheduler.step = watched_step
    try:
        yield finished
    finally:
        if "step" in vars(scheduler):
            del scheduler.step


def add_noise(scheduler: Any, i: int, x0: Tensor, noise: Tensor) -> Tensor:
    """x_t at step `i` from a clean latent. The schedulers' own `add_noise` depends on where their loop stands."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[i].long()]
        return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise
    sigma = scheduler.sigmas[i]
    if "FlowMatch" in name:
        return (1 - sigma) * x0 + sigma * noise
    scale = (1 + sigma**2) ** -0.5 if "MultistepScheduler" in name or "Singlestep" in name else 1.0
    return scale * (x0 + sigma * noise)


# Loss and gradients ---------------------------------------------------------------------------------------------------


def generic_loss(pictures: Tensor) -> Tensor:
    """A fixed random projection plus a curved term: no symmetry that could hide an error."""
    weight = torch.randn(pictures.shape[1:], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    weight = weight.to(pictures)
    return (weight * pictures).mean() + 0.5 * (weight.flip(-1) * torch.sin(4 * pictures)).mean()


def gradients(parameters: dict[str, torch.nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    """The gradient per parameter, zero where the loss does not reach it; leaves `.grad` alone."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second, all parameters together, in float64."""
    assert one.keys() == two.keys()

    def flat(gradient: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradient[name].detach().double().cpu().flatten() for name in gradient])

    norm = flat(two).norm()
    assert norm > 0, "the reference gradient is zero: this comparison could not fail"
    return float((flat(one) - flat(two)).norm() / norm)


def cosine(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of the angle between two gradients, all parameters together, in float64."""
    flat = [torch.cat([g.double().flatten().cpu() for g in gradient.values()]) for gradient in (one, two)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def directional_derivative(
    loss: Callable[[], float], parameters: dict[str, torch.nn.Parameter], direction: dict[str, Tensor], *, h: float
) -> float:
    """d loss(theta + s direction) / ds at s = 0 by the five-point central difference, error O(h^4)."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def at(s: float) -> float:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name] + s * direction[name])
        return loss()

    try:
        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])


def random_direction(parameters: dict[str, torch.nn.Parameter], *, seed: int) -> dict[str, Tensor]:
    """A direction of norm one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in parameters.items()}
    norm = torch.cat([d.flatten() for d in drawn.values()]).norm()
    return {name: (d / norm).to(parameters[name]) for name, d in drawn.items()}


def inner(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return float(sum((one[name] * two[name]).sum() for name in one))


def count_steps(pipe: Any, call: dict) -> int:
    """How many times the plain pipeline calls `scheduler.step`."""
    with torch.no_grad(), algorithm_1(pipe, train=(), end=None, input_gradient=0.0) as count:
        pipe(**call, output_type="latent")
    return count.i
