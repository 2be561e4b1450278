"""The regularisers, against plain autograd of the written formula."""

from __future__ import annotations

import contextlib
import copy
import inspect

import judge
import oracle
import pytest
import tiny
import torch

from rewardtune.engine import rollout
from rewardtune.engine.call import adapters_off
from rewardtune.errors import ConfigError, TrainingStopped
from rewardtune.plan import Plan

KL = 0.7

# KL to the base model -------------------------------------------------------------------------------------------------


def term(pipe, plan: Plan, call: tiny.Call, *, base) -> tuple[torch.Tensor, int]:
    """D = mean over trained calls of mean (F(x) - F_ref(x))^2, x detached: by plain autograd along the chain.

    The pipeline's denoiser is replaced by a function that adds up the formula; `base` is another network altogether,
    the pipeline's own without any adapter. The chain ends by itself or by an exception at the plan's early stop.
    """
    network = tiny.denoiser_of(pipe)
    forward, step = network.forward, pipe.scheduler.step
    terms, count = [], [0]

    def watched(*args, **kwargs):
        with torch.no_grad():
            output = forward(*args, **kwargs)
        if count[0] in plan.train:
            with torch.no_grad():
                reference = base(*args, **kwargs)[0]
            with torch.enable_grad():
                terms.append((forward(*args, **kwargs)[0] - reference).square().mean())
        return output

    class Stop(Exception):  # noqa: N818
        pass

    def counted(*args, **kwargs):
        if count[0] == plan.end:
            raise Stop
        count[0] += 1
        return step(*args, **kwargs)

    counted.__signature__ = inspect.signature(step)
    network.forward, pipe.scheduler.step = watched, counted
    torch.manual_seed(0)
    try:
        with contextlib.suppress(Stop):
            pipe(**tiny.fresh(call), output_type="latent")
    finally:
        del network.forward, pipe.scheduler.step
    return torch.stack(terms).mean(), len(terms)


def without_adapters(pipe):
    """The base network as an object of its own, made by peft's own removal of the adapter."""
    base = copy.deepcopy(tiny.denoiser_of(pipe))
    base.unload_lora()
    return base


def swept(pipe, plan, call, *, factor=1.0, **options):
    parameters = tiny.trainable(pipe)
    for p in parameters.values():
        p.grad = None
    with rollout(pipe, plan, seed=0, **tiny.fresh(call)) as tape:
        result = tape.backward(factor * oracle.generic_loss(tape.images), **options)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found, result


PLANS = {
    "drtune, early stop": Plan(T=4, train=frozenset({0, 2, 3}), end=2),
    "draft-3, nested": Plan(T=4, train=frozenset({1, 2, 3}), input_gradient=1.0),
    "half of the input gradient, early stop": Plan(T=4, train=frozenset({0, 1, 2}), input_gradient=0.5, end=2),
}


@pytest.mark.parametrize("name", ["sd-v", "sd3", "flux", "sd-controlnet"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_kl_is_the_gradient_of_the_written_formula(name: str, plan: Plan):
    """Guided calls hold both halves (sd, sd3) or come in twos (flux): every raw output of a trained call counts."""
    if name == "sd-controlnet" and plan.input_gradient != 1.0:
        pytest.skip("an auxiliary network is on the tape in nested plans only")
    pipe, call = tiny.BUILDERS[name]()
    with tiny.double(pipe, call):
        base = without_adapters(pipe)
        D, calls = term(pipe, plan, call, base=base)
        assert calls == (2 if name == "flux" else 1) * len(plan.executed)
        exact = oracle.gradients(tiny.trainable(pipe), D)
        plain, _ = swept(pipe, plan, call)
        both, result = swept(pipe, plan, call, kl=KL)
        assert result.kl == pytest.approx(float(D.detach()), rel=1e-9)
        added = {n: both[n] - plain[n] for n in both}
        assert oracle.difference(added, {n: KL * g for n, g in exact.items()}) < 1e-7
        # and together it is the whole objective, as the oracle writes it
        _, reward = judge.literal(pipe, plan, call)
        assert oracle.difference(both, {n: reward[n] + KL * exact[n] for n in both}) < 1e-7


def test_kl_counts_every_draw_of_draft_lv():
    pipe, call = tiny.stable_diffusion()
    plan = Plan(T=4, train=frozenset({3}), start=3, draws=2)
    one, two = swept(pipe, plan, call)[0], swept(pipe, plan, call, kl=KL)
    assert two[1].kl > 0
    assert oracle.difference(two[0], one) > 1e-3


def test_without_weight_nothing_changes():
    pipe, call = tiny.stable_diffusion()
    ran = []
    pipe.unet.register_forward_hook(lambda *_: ran.append(1))
    plan = PLANS["draft-3, nested"]
    plain, _ = swept(pipe, plan, call)
    forwards = len(ran)
    zero, result = swept(pipe, plan, call, kl=0.0)
    assert all(torch.equal(plain[n], zero[n]) for n in plain)
    assert len(ran) == 2 * forwards
    assert result.kl is None
    swept(pipe, plan, call, kl=KL)
    assert len(ran) == 3 * forwards + 3  # one more for each trained call


def test_kl_acts_where_the_reward_is_flat():
    pipe, call = tiny.stable_diffusion()
    plan = PLANS["drtune, early stop"]
    with_reward, _ = swept(pipe, plan, call)
    both, _ = swept(pipe, plan, call, kl=KL)
    alone, result = swept(pipe, plan, call, factor=0.0, allow_zero=True, kl=KL)
    assert result.kl > 0
    assert oracle.difference(alone, {n: both[n] - with_reward[n] for n in both}) < 1e-4
    with torch.no_grad():
        for p in tiny.trainable(pipe).values():
            p.zero_()  # the base model itself: distance and gradient are exactly zero, and that is no error
    flat, result = swept(pipe, plan, call, factor=0.0, allow_zero=True, kl=KL)
    assert result.kl == 0.0
    assert not any(g.any() for g in flat.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1e-9, 1.0])
def test_the_half_precision_scale_does_not_touch_the_kl_term(dtype: torch.dtype, factor: float):
    """A reward of 1e-9 asks for a scale of 2^30, in which float16 would overflow on the KL term's cotangent."""
    plan = Plan(T=1, train=frozenset({0}))

    def gradient(kind: torch.dtype, **options):
        pipe, call = tiny.stable_diffusion(steps=1, lora=False)
        tiny.liven(pipe.unet, seed=5, gain=0.5)
        for module in (pipe.unet, pipe.text_encoder):
            for p in module.parameters():
                p.data = p.data.to(torch.bfloat16).to(kind)
        tiny.add_lora(pipe.unet)
        for p in tiny.trainable(pipe).values():
            p.data = p.data.float()
        found, result = swept(pipe, plan, call, **options)
        return torch.cat([g.flatten() for g in found.values()]).double(), result

    exact, wide = gradient(torch.float32, factor=factor, kl=KL)
    found, half = gradient(dtype, factor=factor, kl=KL)
    assert half.kl == pytest.approx(wide.kl, rel=0.02)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.999
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def state(network):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    flags = {n: p.requires_grad for n, p in network.named_parameters()}
    return [(layer.disable_adapters, layer.active_adapter) for layer in layers], flags


def test_adapters_come_back_as_they_were():
    pipe, _ = tiny.stable_diffusion()
    frozen = next(iter(tiny.trainable(pipe).values())).requires_grad_(False)  # peft's own switch would thaw it
    before = state(pipe.unet)
    with adapters_off(pipe.unet):
        assert all(off for off, _ in state(pipe.unet)[0])
        with adapters_off(pipe.unet):
            pass
        assert all(off for off, _ in state(pipe.unet)[0])  # an inner block leaves what it found
    assert state(pipe.unet) == before
    assert not frozen.requires_grad


def test_adapters_come_back_after_an_error():
    pipe, call = tiny.stable_diffusion()
    before, grads = state(pipe.unet), {}
    calls = []

    def fails_without_adapters(*_):
        calls.append(state(pipe.unet)[0][0][0])
        if calls[-1]:
            raise RuntimeError("no memory")

    pipe.unet.register_forward_hook(fails_without_adapters)
    for n, p in tiny.trainable(pipe).items():
        p.grad = grads[n] = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no memory"), rollout(pipe, Plan(T=4, train=frozenset({3})), **call) as tape:
        tape.backward(oracle.generic_loss(tape.images), kl=KL)
    assert calls == [False] * 4 + [True]
    assert state(pipe.unet) == before
    assert all(p.grad is grads[n] for n, p in tiny.trainable(pipe).items())


def test_whole_weights_need_a_frozen_copy():
    pipe, call = tiny.stable_diffusion_full()
    plan = PLANS["drtune, early stop"]
    with tiny.double(pipe, call):
        base = copy.deepcopy(pipe.unet).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in pipe.unet.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        with pytest.raises(ConfigError, match="frozen copy"):
            swept(pipe, plan, call, kl=KL)
        D, _ = term(pipe, plan, call, base=base)
        exact = oracle.gradients(tiny.trainable(pipe), D)
        plain, _ = swept(pipe, plan, call)
        both, result = swept(pipe, plan, call, kl=KL, reference=base)
        assert result.kl == pytest.approx(float(D.detach()), rel=1e-9)
        assert oracle.difference({n: both[n] - plain[n] for n in both}, {n: KL * g for n, g in exact.items()}) < 1e-7


@pytest.mark.parametrize("kl", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(kl: float):
    pipe, call = tiny.stable_diffusion()
    with pytest.raises(ConfigError, match="KL term"):
        swept(pipe, Plan(T=4, train=frozenset({3})), call, kl=kl)


def test_an_underflowing_reward_is_still_an_error():
    pipe, call = tiny.stable_diffusion()
    with torch.no_grad():
        for p in tiny.trainable(pipe).values():
            p.zero_()  # both factors zero: no gradient arrives, whatever the loss
    with pytest.raises(TrainingStopped, match="zero everywhere"):
        swept(pipe, Plan(T=4, train=frozenset({3})), call, kl=KL)
