"""The newer methods against their published formulas, written out here and differentiated by plain autograd.

The chain is sampled once by the pipeline itself, without a gradient; `Chain.F(i, x)` asks the network again, with the
arguments of step i and guidance, for any latent x that carries a graph. Nothing of the engine is used for the formula.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch
import yaml
import zoo

from rewardtune import evaluate, methods, rewards
from rewardtune.bench.cost import Cost
from rewardtune.bench.setting import NEWER, method_of
from rewardtune.config import MethodChoice, load_config
from rewardtune.engine import preflight, rollout
from rewardtune.errors import ConfigError, PreflightError, RewardError, RewardTuneError
from rewardtune.gradient import Gradient, derive_seed
from rewardtune.launch import make_method, make_reward
from rewardtune.plan import Plan
from rewardtune.prediction import Span, span
from rewardtune.processes import join
from rewardtune.prompts import batch_prompts
from rewardtune.rewards.base import as_reward
from rewardtune.stretches import Leap, Leaps, Rescaled

T = 6
GUIDANCE = 3.0
Tensor = torch.Tensor


# The chain, and the network as a function of the latent ---------------------------------------------------------------


@dataclass
class Chain:
    """x[0..T] and the timesteps of a sampled chain; constants."""

    pipe: Any
    call: dict
    x: list[Tensor]
    calls: list[tuple[tuple, dict]]
    timesteps: list[Tensor]

    def F(self, i: int, x: Tensor) -> Tensor:
        """The raw output at step i, guided, for the latent x."""
        args, kwargs = self.calls[i]
        both = torch.cat([x, x])
        if "hidden_states" in kwargs:
            args, kwargs = (), {**kwargs, "hidden_states": both}
        else:
            args = (both, *args[1:])
        unconditional, conditional = tiny.denoiser_of(self.pipe)(*args, **kwargs)[0].chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    @property
    def sigmas(self) -> list[float]:
        return [float(s) for s in self.pipe.scheduler.sigmas]

    def pictures(self, x0: Tensor) -> Tensor:
        return oracle.decode(self.pipe, x0, self.call)


def sampled(pipe: Any, call: dict) -> Chain:
    network, scheduler = tiny.denoiser_of(pipe), pipe.scheduler
    forward, step = network.forward, scheduler.step
    chain = Chain(pipe, tiny.fresh(call), [], [], [])

    def watched(*args: Any, **kwargs: Any) -> Any:
        chain.calls.append((args, kwargs))
        return forward(*args, **kwargs)

    def stepped(*args: Any, **kwargs: Any) -> Any:
        chain.timesteps.append(args[1])
        chain.x.append(args[2])
        return step(*args, **kwargs)

    stepped.__wrapped__ = step  # pipelines look into the signature
    network.forward, scheduler.step = watched, stepped
    torch.manual_seed(0)
    try:
        chain.x.append(pipe(**tiny.fresh(call), output_type="latent")[0])
    finally:
        del network.forward, scheduler.step
    if tuple(chain.x[-1].shape) != tuple(chain.x[0].shape):
        raise AssertionError("not the layout of the sampler")
    return chain


def gradient(chain: Chain, x0: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    pictures = chain.pictures(x0)
    loss = torch.stack([oracle.generic_loss(picture[None]) for picture in pictures])
    loss = (loss if weights is None else loss * weights.detach()).mean()
    return oracle.gradients(tiny.trainable(chain.pipe), loss)


def sg(x: Tensor) -> Tensor:
    return x.detach()


def through(real: Tensor, surrogate: Tensor) -> Tensor:
    """The value of the real chain, the gradient of the surrogate."""
    return surrogate + sg(real - surrogate)


def eased(x: Tensor, alpha: float) -> Tensor:
    return alpha * x + (1 - alpha) * sg(x)


@pytest.fixture(params=["sd3, flow", pytest.param("sd, epsilon", marks=pytest.mark.slow), "sd, v"])
def case(request):
    makes = {
        "sd3, flow": (tiny.stable_diffusion_3, Flow),
        "sd, epsilon": (tiny.stable_diffusion, Epsilon),
        "sd, v": (tiny.stable_diffusion_v, V),
    }
    make, level = makes[request.param]
    with tiny.double(*make(steps=T)) as (pipe, call):
        yield pipe, call, level(pipe)


class Flow:
    """u_i = sigma, in which F is the velocity of x."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def u(self, chain: Chain, i: int) -> float:
        return chain.sigmas[i]

    def moved(self, chain: Chain, x: Tensor, i: int, j: int, F: Tensor) -> Tensor:
        """x_i carried to level j by one call of the network: an Euler step of that length; DDIM where that samples."""
        return x + (self.u(chain, j) - self.u(chain, i)) * F

    def landed(self, chain: Chain, x: Tensor, i: int, j: int, moved: Tensor) -> Tensor:
        """x_i moved by an integral of F over u from i to j."""
        return x + moved


class Epsilon(Flow):
    """u_i = sigma / alpha, in which F is the velocity of x / alpha."""

    def u(self, chain: Chain, i: int) -> float:
        return math.sqrt(1 - self.alpha(chain, i) ** 2) / self.alpha(chain, i)

    def moved(self, chain: Chain, x: Tensor, i: int, j: int, F: Tensor) -> Tensor:
        clean, noise = self.seen(chain, x, i, F)
        alpha = self.alpha(chain, j)
        return alpha * clean + math.sqrt(1 - alpha**2) * noise

    def seen(self, chain: Chain, x: Tensor, i: int, F: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that F tells of."""
        alpha = self.alpha(chain, i)
        return (x - math.sqrt(1 - alpha**2) * F) / alpha, F

    def landed(self, chain: Chain, x: Tensor, i: int, j: int, moved: Tensor) -> Tensor:
        return (x / self.alpha(chain, i) + moved) * self.alpha(chain, j)

    def alpha(self, chain: Chain, i: int) -> float:
        scheduler = self.pipe.scheduler
        if i == len(chain.timesteps):
            return float(scheduler.final_alpha_cumprod) ** 0.5
        return float(scheduler.alphas_cumprod[int(chain.timesteps[i])]) ** 0.5


class V(Epsilon):
    """u_i = the angle, alpha = cos u, in which F is the velocity of x."""

    def u(self, chain: Chain, i: int) -> float:
        return math.acos(self.alpha(chain, i))

    def seen(self, chain: Chain, x: Tensor, i: int, F: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha(chain, i)
        sigma = math.sqrt(1 - alpha**2)
        return alpha * x - sigma * F, alpha * F + sigma * x

    def landed(self, chain: Chain, x: Tensor, i: int, j: int, moved: Tensor) -> Tensor:
        return x + moved


# Oracles --------------------------------------------------------------------------------------------------------------


def check(pipe: Any, call: dict, plan: Plan, exact: dict[str, Tensor], *, bound: float = 1e-8) -> None:
    pictures, found, result = judge.engine_gradient(pipe, plan, call)
    assert torch.equal(pictures, judge.plain_images(pipe, call)) or plan.known_noise  # the reward sees the real x_0
    assert oracle.difference(found, exact) < bound, plan.draw()
    assert set(result.grad_norms) == set(plan.executed)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_flowbp_sparse(case, rho: float):
    pipe, call, level = case
    plan = methods.flowbp_sparse(3, rho=rho)(T, Random(2))
    chain = sampled(pipe, call)
    u = [level.u(chain, i) for i in range(T + 1)]
    g = 1 + rho * (sum(abs(u[i + 1] - u[i]) for i in range(T)) / sum(abs(u[i + 1] - u[i]) for i in plan.train) - 1)
    x = chain.x[0]
    for i in range(T):
        velocity = chain.F(i, sg(chain.x[i]))
        velocity = sg(velocity) + g * (velocity - sg(velocity)) if i in plan.train else sg(velocity)
        x = level.moved(chain, x, i, i + 1, velocity)
    check(pipe, call, plan, gradient(chain, through(chain.x[T], x)))


def test_flowbp_sparse_without_rescaling_is_drtune_without_early_stop(case):
    """rho = 0: the same gradient as the paper's with these steps, input detached and no stop."""
    pipe, call, _ = case
    plan = methods.flowbp_sparse(3, rho=0.0)(T, Random(5))
    one = judge.engine_gradient(pipe, plan, call)[1]
    two = judge.engine_gradient(pipe, Plan(T=T, train=plan.train), call)[1]
    assert oracle.difference(one, two) < 1e-12


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_flowbp_bridge(case, rho: float):
    pipe, call, level = case
    plan = methods.flowbp_bridge(4, alpha=0.5, rho=rho)(T, Random(4))
    (j,) = plan.linked
    assert min(plan.train) < j < T
    chain = sampled(pipe, call)
    u = [level.u(chain, i) for i in range(T + 1)]
    g = 1 + rho * (sum(abs(u[i + 1] - u[i]) for i in range(T)) / sum(abs(u[i + 1] - u[i]) for i in plan.train) - 1)

    def composed(x: Tensor, begin: int, end: int, at_j: Tensor | None) -> Tensor:
        for i in range(begin, end):
            velocity = chain.F(i, sg(chain.x[i]) if at_j is None or i != j else at_j)
            velocity = sg(velocity) + g * (velocity - sg(velocity)) if i in plan.train else sg(velocity)
            x = level.moved(chain, x, i, i + 1, velocity)
        return x

    x_j = through(chain.x[j], composed(chain.x[0], 0, j, None))
    x_0 = through(chain.x[T], composed(x_j, j, T, eased(x_j, 0.5)))
    check(pipe, call, plan, gradient(chain, x_0))


@pytest.mark.parametrize(("seed", "tau"), [(0, 0.1), (1, 0.1), (1, None), (3, 0.5), (4, 0.1)])
def test_leapalign(case, seed: int, tau: float | None):
    pipe, call, level = case
    plan = methods.leapalign(tau=tau)(T, Random(seed))
    k, j = sorted(plan.train)
    chain = sampled(pipe, call)
    leapt = level.moved(chain, chain.x[k], k, j, chain.F(k, chain.x[k]))
    x_j = through(chain.x[j], leapt)
    end = level.moved(chain, x_j, j, T, chain.F(j, eased(x_j, 0.3)))
    d_j, d_0 = ((a - b).abs().mean(dim=(1, 2, 3)) for a, b in ((leapt, chain.x[j]), (end, chain.x[T])))
    weights = None if tau is None else 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))
    if seed == 4:
        assert float(d_0.detach().min()) > tau  # in the others tau stands for it
    check(pipe, call, plan, gradient(chain, through(chain.x[T], end), weights))


def test_the_leaps_of_these_tests_are_long_and_miss():
    """Otherwise a factor of 1 and a weight of 1 / (2 tau) would pass."""
    with tiny.double(*tiny.stable_diffusion_3(steps=T)) as (pipe, call):
        plan = methods.leapalign()(T, Random(1))
        k, j = sorted(plan.train)
        assert j - k > 1 or T - j > 1
        plain = judge.engine_gradient(pipe, Plan(T=T, train=plan.train, input_gradient=0.3), call)[1]
        leapt = judge.engine_gradient(pipe, methods.leapalign(tau=None)(T, Random(1)), call)[1]
        weighed = judge.engine_gradient(pipe, plan, call)[1]
        assert oracle.difference(leapt, plain) > 0.1
        assert oracle.difference(weighed, leapt) > 0.01
        assert oracle.difference(weighed, {name: g / (2 * 0.1) for name, g in leapt.items()}) > 0.1


@pytest.mark.parametrize("seed", [1, 3])
def test_leapalign_with_a_second_network_in_the_guidance(seed: int):
    """Ideogram 4: the leap's factor is that of the guided F, so the call of the other network is weighed as well.

    Written into the chain itself: the step before j hands on the leap from k, the last one the leap from j.
    """
    pipe, call = zoo.PIPELINES["Ideogram4Pipeline"]()
    plan = methods.leapalign(alpha=0.3, tau=None)(4, Random(seed))
    k, j = sorted(plan.train)
    assert j - k > 1 or plan.T - j > 1
    scheduler, kind = pipe.scheduler, type(tiny.denoiser_of(pipe))
    networks = [part for part in pipe.components.values() if type(part) is kind]
    assert len(networks) == 2
    step, seen = scheduler.step, list[tuple[Tensor, Tensor]]()

    def linked(forward: Any) -> Any:
        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            i = len(seen)
            given = oracle.each_tensor((args, kwargs), lambda x: oracle.pass_gradient(x, 0.3 if i == j else 0.0))
            out = forward(*given[0], **given[1])
            return out if i in (k, j) else oracle.each_tensor(out, sg)

        return called

    @functools.wraps(step)
    def leaping(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(step).bind(*args, **kwargs).arguments
        seen.append((given["sample"], given["model_output"]))
        plain = sg(step(*args, **kwargs)[0])
        begin = {j: k, plan.T: j}.get(len(seen))
        if begin is None:
            return (plain,)
        x, F = seen[begin]
        x = sg(x) if begin == k else x
        return (through(plain, x + (scheduler.sigmas[len(seen)] - scheduler.sigmas[begin]) * F),)

    scheduler.step = leaping
    for network in networks:
        network.forward = linked(network.forward)
    torch.manual_seed(0)
    try:
        with oracle.without_no_grad():
            pictures = pipe(**tiny.fresh(call), output_type="pt", return_dict=False)[0]
    finally:
        del scheduler.step
        for network in networks:
            del network.forward
    exact = oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))
    assert oracle.difference(judge.engine_gradient(pipe, plan, call)[1], exact) < 1e-5


@pytest.mark.parametrize("seed", [0, 2])
def test_flowbp_lagrange(case, seed: int):
    pipe, call, level = case
    plan = methods.flowbp_lagrange(latest=0.6, tau=0.3)(T, Random(seed))
    (j,) = plan.linked
    k = min(plan.train)
    chain = sampled(pipe, call)

    def leap(x: Tensor, begin: int, end: int, first: Tensor) -> Tensor:
        count = min(3, end - begin)
        nodes = sorted({begin + round(n * (end - 1 - begin) / max(1, count - 1)) for n in range(count)})
        if nodes == [begin]:
            return level.moved(chain, x, begin, end, first)
        u = torch.tensor([level.u(chain, i) for i in nodes], dtype=torch.float64)
        # the polynomial through the points, by its Vandermonde system, and its integral
        powers = torch.arange(len(nodes), dtype=torch.float64)
        a, b = level.u(chain, begin), level.u(chain, end)
        integral = (b ** (powers + 1) - a ** (powers + 1)) / (powers + 1)
        h = torch.linalg.solve(torch.stack([u**p for p in powers]), integral)
        total = torch.zeros_like(x)
        for place, i in enumerate(nodes):
            velocity = first if i == begin else chain.F(i, sg(chain.x[i]))
            if place == 1:
                velocity = sg(velocity) + 0.25 * (velocity - sg(velocity))
            total = total + h[place] * (velocity if place < 2 else sg(velocity))
        return level.landed(chain, x, begin, end, total)

    leapt = leap(chain.x[k], k, j, chain.F(k, chain.x[k]))
    x_j = through(chain.x[j], leapt)
    end = leap(x_j, j, T, chain.F(j, eased(x_j, 0.1)))
    d_j, d_0 = ((a - b).abs().mean(dim=(1, 2, 3)) for a, b in ((leapt, chain.x[j]), (end, chain.x[T])))
    weights = 1 / (d_j.clamp(min=0.3) + d_0.clamp(min=0.3))
    check(pipe, call, plan, gradient(chain, through(chain.x[T], end), weights))


@pytest.mark.parametrize(
    ("make", "spacing"),
    [
        (tiny.stable_diffusion_3, None),
        (tiny.stable_diffusion, "leading"),
        (tiny.stable_diffusion_v, "leading"),
        (tiny.stable_diffusion, "linspace"),  # steps end between the timesteps
    ],
)
@pytest.mark.parametrize("seed", [2, 5])
def test_srpo(make, spacing: str | None, seed: int):
    """x_s from the chain's own noise and x_0; one step; the rest of the noise taken off in closed form."""
    with tiny.double(*make(steps=T)) as (pipe, call):
        if spacing == "linspace":
            tiny.set_scheduler(pipe, "DDIMScheduler", timestep_spacing="linspace", set_alpha_to_one=True)
        plan = methods.srpo()(T, Random(seed))
        s = plan.start
        chain = sampled(pipe, call)
        noise, x_0 = chain.x[0], chain.x[T]
        if make is tiny.stable_diffusion_3:
            sigma, after = chain.sigmas[s], chain.sigmas[s + 1]
            x = sg(sigma * noise + (1 - sigma) * x_0)
            x = x + (after - sigma) * chain.F(s, x)
            recovered = (x - after * noise) / (1 - after)
        else:
            abars = pipe.scheduler.alphas_cumprod
            t = int(chain.timesteps[s])
            a, after = float(abars[t]), t - 1000 // T
            b = float(abars[after] if after >= 0 else pipe.scheduler.final_alpha_cumprod)
            x = sg(a**0.5 * x_0 + (1 - a) ** 0.5 * noise)
            F = chain.F(s, x)
            if make is tiny.stable_diffusion_v:
                clean, eps = a**0.5 * x - (1 - a) ** 0.5 * F, a**0.5 * F + (1 - a) ** 0.5 * x
            else:
                clean, eps = (x - (1 - a) ** 0.5 * F) / a**0.5, F
            x = b**0.5 * clean + (1 - b) ** 0.5 * eps
            recovered = x if s + 1 == T else (x - (1 - b) ** 0.5 * noise) / b**0.5
        pictures, found, _ = judge.engine_gradient(pipe, plan, call)
        assert torch.allclose(pictures, chain.pictures(recovered).detach(), atol=1e-9)
        assert oracle.difference(found, gradient(chain, recovered)) < 1e-8


def test_v_prediction_weighs_by_the_angle():
    """Where the level is the angle, dx/du = F: the levels of a step are atan(sigma / alpha) before and after it."""
    pipe, call = tiny.stable_diffusion_v(steps=T)
    chain, level = sampled(pipe, call), V(pipe)
    for i in range(T):
        found = span(pipe.scheduler, chain.timesteps[i])
        assert found.kind == "v"
        assert (found.start, found.end) == pytest.approx([level.u(chain, n) for n in (i, i + 1)])


def test_euler_has_the_levels_of_its_own_sigmas():
    pipe, call = tiny.stable_diffusion_xl(steps=T)
    plan = methods.leapalign(tau=None)(T, Random(1))
    k, j = sorted(plan.train)
    judge.engine_gradient(pipe, plan, call)
    s = [float(x) for x in pipe.scheduler.sigmas]
    spans = []
    pipe.scheduler.set_timesteps(T)
    for i, t in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler._step_index = i
        spans.append(span(pipe.scheduler, t))
    expected = {k: (s[j] - s[k]) / (s[k + 1] - s[k]), j: (s[T] - s[j]) / (s[j + 1] - s[j])}
    assert plan.weight.factors(spans, plan.executed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scheduler", "config", "words"),
    [
        ("DPMSolverMultistepScheduler", {}, "DDIMScheduler"),
        ("DDIMScheduler", {"clip_sample": True}, "DDIMScheduler with clip_sample"),
        ("DDIMScheduler", {"timestep_spacing": "linspace", "set_alpha_to_one": False}, "stands for nothing"),
    ],
)
def test_samplers_in_which_a_call_stands_for_no_stretch_are_refused(scheduler: str, config: dict, words: str):
    pipe, call = tiny.stable_diffusion(steps=T)
    tiny.set_scheduler(pipe, scheduler, **config)
    with pytest.raises(PreflightError, match=words):
        judge.engine_gradient(pipe, methods.flowbp_sparse()(T, Random(0)), call)
    with pytest.raises(PreflightError, match=words):
        preflight(pipe, levels=True, **tiny.fresh(call))


# What methods add to the gradient of an update ------------------------------------------------------------------------


def curved(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward whose gradient differs from picture to picture and from place to place."""
    weight = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).view_as(images[0])
    return (weight * images).mean((1, 2, 3)) + (weight.flip(-1) * torch.sin(5 * images)).mean((1, 2, 3))


def update(pipe: Any, method: methods.Method, *, batch: int = 2, micro_batch: int = 2) -> Gradient:
    return Gradient(
        pipe=pipe,
        reward=as_reward(curved),
        method=method,
        prompts=tiny.PROMPTS,
        parameters=list(tiny.trainable(pipe).values()),
        T=4,
        seed=0,
        batch=batch,
        micro_batch=micro_batch,
        call={"num_inference_steps": 4, "guidance_scale": GUIDANCE},
    )


def computed(pipe: Any, gradient: Gradient) -> dict[str, Tensor]:
    for p in gradient.parameters:
        p.grad = None
    gradient.compute(0, join())
    found = {name: p.grad.clone() for name, p in tiny.trainable(pipe).items()}
    for p in gradient.parameters:
        p.grad = None
    return found


def call_of(gradient: Gradient) -> dict:
    """The call of update 0, as `pipe(**call)`."""
    prompts = batch_prompts(gradient.prompts, seed=0, step=0, size=gradient.batch)
    seeds = [derive_seed(0, 0, index) for index in range(gradient.batch)]
    return evaluate.for_prompts(prompts, gradient.call) | {"generator": evaluate.generators(seeds)}


@pytest.mark.parametrize(("image", "weights"), [(0.3, 0.0), (0.0, 0.5), (0.3, 0.5)])
def test_rsa_ft(image: float, weights: float):
    """The gradient at theta + rho G / |G| of -r(I - rho g / |g|), by autograd through the whole chain."""
    pipe, call = tiny.stable_diffusion(steps=4)
    with tiny.double(pipe, call):
        base = methods.draft(2)
        gradient = update(pipe, methods.rsa_ft(base, image=image, weights=weights), micro_batch=1)
        parameters = tiny.trainable(pipe)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        found = computed(pipe, gradient)
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())  # put back to the bit

        def literal() -> dict[str, Tensor]:
            pictures = oracle.images(pipe, train={2, 3}, input_gradient=1.0, call=call_of(gradient))
            leaf = pictures.detach().requires_grad_()
            (g,) = torch.autograd.grad(curved(leaf, []).sum(), leaf)
            offset = image * torch.stack([each / each.norm() for each in g])
            moved = (sg(pictures) - offset).clamp(0, 1)
            return oracle.gradients(parameters, -curved(pictures + sg(moved - pictures), []).mean())

        exact = literal()
        if weights:
            norm = torch.cat([g.flatten() for g in exact.values()]).norm()
            with torch.no_grad():
                for name, p in parameters.items():
                    p += weights * exact[name] / norm
            exact = literal()
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(before[name])
        assert oracle.difference(found, exact) < 1e-7
        assert oracle.difference(computed(pipe, update(pipe, base)), exact) > 1e-2  # the worst case is another gradient


def test_draft_plus():
    """DRaFT-1 + kl * mean((F - F_ref)^2) at the trained call."""
    pipe, call = tiny.stable_diffusion(steps=4)
    with tiny.double(pipe, call):
        gradient = update(pipe, methods.draft_plus(1, kl=0.3))
        chain = sampled(pipe, call_of(gradient))
        args, kwargs = chain.calls[3]
        pipe.unet.disable_adapters()
        reference = pipe.unet(*args, **kwargs)[0].detach()
        pipe.unet.enable_adapters()
        D = (pipe.unet(*args, **kwargs)[0] - reference).square().mean()
        x_0 = Epsilon(pipe).moved(chain, chain.x[3], 3, 4, chain.F(3, chain.x[3]))
        reward = curved(chain.pictures(x_0), []).mean()
        exact = oracle.gradients(tiny.trainable(pipe), -reward + 0.3 * D)
        assert oracle.difference(computed(pipe, gradient), exact) < 1e-7
        assert oracle.difference(computed(pipe, update(pipe, methods.draft(1))), exact) > 1e-2


def test_the_kl_term_counts_a_micro_batch_by_its_size():
    """Three samples as two and one: KL's mean is over the batch, and the method's weight joins the run's."""
    pipe, call = tiny.stable_diffusion(steps=4)
    with tiny.double(pipe, call):
        of_three = replace(update(pipe, methods.draft_plus(1, kl=0.3), batch=3, micro_batch=3), kl=0.2)
        whole = computed(pipe, of_three)
        assert oracle.difference(computed(pipe, replace(of_three, micro_batch=2)), whole) < 1e-7
        assert oracle.difference(computed(pipe, replace(of_three, kl=0.0)), whole) > 1e-2


def test_the_weights_come_back_when_the_pass_at_the_worst_ones_fails():
    pipe, _ = tiny.stable_diffusion(steps=4)
    before = [p.detach().clone() for p in tiny.trainable(pipe).values()]
    seen: list[bool] = []

    def fails_second(images: Tensor, prompts: Sequence[str]) -> Tensor:
        moved = zip(before, tiny.trainable(pipe).values(), strict=True)
        seen.append(all(torch.equal(one, other) for one, other in moved))
        if len(seen) == 2:
            raise RuntimeError("no more")
        return curved(images, prompts)

    gradient = update(pipe, methods.rsa_ft(methods.draft(1), image=0.0, weights=0.5))
    with pytest.raises(RewardTuneError, match="no more"):
        computed(pipe, replace(gradient, reward=as_reward(fails_second)))
    assert seen == [True, False]  # the second pass met other weights
    assert all(torch.equal(one, p) for one, p in zip(before, tiny.trainable(pipe).values(), strict=True))


def test_the_relative_reward_is_that_of_the_combined_text():
    """SRPO: f_image . ((1 + k) f_positive - f_negative), for a reward that is a similarity of features."""

    def features(prompts: Sequence[str]) -> Tensor:
        rows = [torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts]
        return torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1)

    def similarity(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return (torch.nn.functional.normalize(pooled, dim=-1) * features(prompts)).sum(-1)

    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = rewards.relative(similarity, "Real. {}", "Oily. {}", k=0.5)
    f = torch.nn.functional.normalize(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), dim=-1)
    text = 1.5 * features(["Real. a", "Real. b"]) - features(["Oily. a", "Oily. b"])
    score, natives = reward.parts(images, ["a", "b"])
    assert torch.allclose(score, (f * text).sum(-1))
    found, exact = (torch.autograd.grad(s.sum(), images, retain_graph=True)[0] for s in (score, (f * text).sum(-1)))
    assert torch.allclose(found, exact)
    assert torch.allclose(natives["relative(similarity)"], score)
    both = reward + as_reward(similarity)  # the prompt's own value is not that of other words
    assert torch.allclose(both.parts(images, ["a", "b"])[1]["similarity"], similarity(images, ["a", "b"]))


def test_a_reward_that_does_not_read_the_prompt_is_not_relative():
    blind = rewards.relative(lambda images, prompts: images.mean(dim=(1, 2, 3)), "Real. {}", "Oily. {}")
    with pytest.raises(RewardError, match=r"does not read the prompt.*words behind \{\} are cut off"):
        blind(torch.rand(2, 3, 8, 8), ["a", "b"])
    with pytest.raises(ConfigError, match="says nothing"):
        rewards.relative(lambda images, prompts: images.mean(dim=(1, 2, 3)), "{}", "{}")


@pytest.mark.parametrize("weighed", [{"weight": Rescaled(1.0)}, {"start": 2, "end": 2, "known_noise": True}])
def test_fresh_noise_at_a_step_is_refused(weighed: dict):
    """Direct-Align's picture of the noisiest step lay 0.23 off the real one with ancestral steps, 0.015 without."""
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    plan = Plan(T=4, train=frozenset({2}), **weighed)
    pipe, call = tiny.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    call = call | {"num_inference_steps": 4}
    with rollout(pipe, plan, seed=0, **call):
        pass
    with pytest.raises(PreflightError, match="adds fresh noise"), rollout(pipe, plan, seed=0, eta=1.0, **call):
        pass
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PreflightError, match="EulerAncestral"), rollout(pipe, plan, seed=0, **call):
        pass
    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    stochastic.set_timesteps(4)
    with pytest.raises(PreflightError, match="stochastic_sampling"):
        span(stochastic, stochastic.timesteps[0])


# Where they are named -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NEWER, "DRaFT-10 + RSA-FT"])
def test_the_bench_names_them_and_counts_what_they_cost(name: str):
    choice = method_of(name, 20)
    law = make_method(MethodChoice(**choice))
    plan = law(20, Random(0))
    cost = Cost(replay=3.0, nested=4.0, evaluation=1.0, head=0.0)
    expected = {
        "DRaFT+": 20 + 4 * 4 + 4 * 3,  # K = 4, and F_ref with a second product
        "LeapAlign": 20 + 3 + 4,
        "FlowBP-Sparse": 20 + 4 * 3,
        "FlowBP-Bridge": 20 + 4 * 3 + 4,
        "SRPO": 20 + 1 + 3,
        "DRaFT-10 + RSA-FT": 2 * (20 + 4 * 4),
        "FlowBP-Lagrange": 20 + 3 * len(plan.executed) + 1,
        "DRTune, 2 stops": plan.last + 1 + 3 * 2,  # K = 2 calls, replayed once for both
        "DRTune + RSA-FT": 2 * (plan.steps_run + 3 * len(plan.executed)),
    }
    assert cost.of_update(law, plan) == expected[name]


def test_a_run_file_names_them(tmp_path: Path):
    run = {
        "model": "playground",
        "output_dir": str(tmp_path / "out"),
        "prompts": ["a"],
        "reward": [{"name": "brightness", "relative": {"positive": "Real. {}", "negative": "Oily. {}"}, "hinge": 2.0}],
        "method": {"name": "leapalign", "options": {"tau": None}, "rsa_ft": {"weights": 0.0}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    config = load_config(path)
    law = make_method(config.method)
    assert (law.name, law.robust_image, law.robust_weights, law.passes) == ("leapalign", 0.01, 0.0, 1)
    assert make_reward(config.reward).name == "hinge(relative(brightness), 2)"
    run["reward"][0]["relative"]["positive"] = "Real."
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(ConfigError, match="where the prompt goes"):
        load_config(path)


# Laws -----------------------------------------------------------------------------------------------------------------


def draws(method: methods.Method, T: int, n: int = 300) -> list[Plan]:
    return [method(T, Random(seed)) for seed in range(n)]


def test_sparse_draws_K_steps_late_ones_more_often():
    seen = Counter(i for plan in draws(methods.flowbp_sparse(1, late_bias=2.0), 4, 6000) for i in plan.train)
    for i in range(4):
        p = (i + 1) ** 2 / 30
        assert abs(seen[i] - 6000 * p) < 4 * math.sqrt(6000 * p * (1 - p))
    assert {len(plan.train) for plan in draws(methods.flowbp_sparse(4), 10)} == {4}


@pytest.mark.parametrize(("T", "K"), [(2, 2), (3, 2), (5, 5), (12, 4), (25, 5)])
def test_bridge_has_a_call_on_both_sides_and_j_itself(T: int, K: int):
    for plan in draws(methods.flowbp_bridge(K), T):
        (j,) = plan.linked
        assert len(plan.train) == K
        assert j in plan.train
        assert min(plan.train) < j
        assert plan.gradient_into(j) == 0.5
        assert all(plan.gradient_into(i) == 0 for i in plan.train - {j})


def test_leapalign_draws_every_pair():
    seen = Counter(tuple(sorted(plan.train)) for plan in draws(methods.leapalign(), 5, 4000))
    assert len(seen) == 10
    assert all(abs(count - 400) < 4 * math.sqrt(4000 * 0.09) for count in seen.values())


@pytest.mark.parametrize("T", [2, 3, 6, 25])
def test_lagrange_keeps_j_near_the_end(T: int):
    for plan in draws(methods.flowbp_lagrange(), T):
        first, second = plan.weight.leaps
        assert T - second.supports[0] <= max(1, round(0.4 * T))
        assert (first.target, second.target) == (second.supports[0], T)
        for leap in (first, second):
            assert leap.supports[-1] == leap.target - 1
            assert len(leap.supports) == min(3, leap.target - leap.supports[0])


def test_srpo_reaches_every_step_but_the_first():
    assert {plan.start for plan in draws(methods.srpo(), 6)} == {1, 2, 3, 4, 5}


def test_one_support_is_an_euler_step_and_three_integrate_a_parabola():
    levels = [1.0, 0.8, 0.55, 0.3, 0.0]
    spans = [Span(a, b) for a, b in pairwise(levels)]
    assert Leap(4, (0,)).landing(spans) == (1.0, pytest.approx({0: -1.0}))
    _, weights = Leap(4, (0, 1, 3)).landing(spans)
    assert sum(h * levels[i] ** 2 for i, h in weights.items()) == pytest.approx(-1 / 3)
    assert Leaps((Leap(4, (0, 1, 3)),), other=0.25).factors(spans, [1]) == pytest.approx({1: 0.25 * weights[1] / -0.25})
    assert Rescaled(1.0).factors(spans, [0, 3]) == pytest.approx({0: 2.0, 3: 2.0})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: methods.flowbp_sparse(9)(4, Random(0)), "K=9 does not fit into the T=4"),
        (lambda: methods.flowbp_sparse(rho=-1.0), "rho=-1"),
        (lambda: methods.flowbp_sparse(None), "K=None: legal"),
        (lambda: methods.flowbp_lagrange(order=None), "order=None: legal"),
        (lambda: methods.draft_lv(None), "n=None: legal"),
        (lambda: methods.refl(None), "m=None: legal"),
        (lambda: methods.drtune(None), "K=None: legal"),
        (lambda: methods.drtune(stops=None), "stops=None: legal"),
        (lambda: methods.flowbp_bridge(1), "K >= 2"),
        (lambda: methods.leapalign()(1, Random(0)), "T=1"),
        (lambda: methods.leapalign(1.5), "alpha=1.5"),
        (lambda: methods.flowbp_sparse(late_bias="high"), "late_bias='high'"),
        (lambda: methods.flowbp_lagrange(latest=2.0), "latest=2.0"),
        (lambda: methods.rsa_ft(methods.refl(), image=0, weights=0), "leave nothing"),
        (lambda: methods.leapalign(tau=0), "tau=0"),
        (lambda: methods.srpo()(1, Random(0)), "T=1"),
        (lambda: methods.draft_plus(kl=-1.0), "kl=-1"),
        (lambda: methods.rsa_ft(methods.refl(), image=-1.0), "image=-1"),
        (lambda: Plan(T=4, train=frozenset({1}), linked=frozenset({2})), "linked"),
        (lambda: Plan(T=4, train=frozenset({1}), weight=Rescaled(1.0), end=2), "whole chain"),
        (lambda: Plan(T=4, train=frozenset({1}), known_noise=True), "known_noise"),
    ],
)
def test_bad_settings_say_what_is_legal(make, words: str):
    with pytest.raises(ConfigError, match=words):
        make()
