"""The engine against literal Algorithm 1: every pipeline of `tiny` under every method.

Images are equal bit for bit to plain `pipe(...)`, and under an early stop to the oracle's; gradients agree to 1e-5 of
their norm in float32 and to 1e-9 in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch

from rewardtune.engine import count_steps
from rewardtune.plan import Plan

T = 4
FLOAT32, FLOAT64 = 1e-5, 1e-9
Case = tuple[Any, tiny.Call]


@pytest.fixture(scope="module", params=tiny.BUILDERS)
def case(request: pytest.FixtureRequest) -> Case:
    return tiny.BUILDERS[request.param](steps=T)


def check(case: Case, plan: Plan, *, bound: float) -> judge.Verdict:
    pipe, call = case
    verdict = judge.compare(pipe, plan, call)
    assert verdict.images_equal, f"images differ by up to {verdict.image_difference:.1e} under {plan.draw()}"
    assert verdict.gradient_difference < bound, plan.draw()
    assert verdict.result.trained == plan.executed
    assert set(verdict.result.grad_norms) == set(plan.executed)
    assert verdict.result.steps_run == plan.steps_run
    assert verdict.result.replay_error == 0
    return verdict


QUICK = (
    "refl",
    "draft-3",
    "alignprop per step",
    "draft-LV, early stop",
    "restarted, two nested steps",
    "drtune",
    "drtune, 0.3 of the input gradient",
    "nested, early stop",
)


@pytest.mark.parametrize(
    "method",
    [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in judge.PLANS],
)
def test_engine_is_algorithm_1(case: Case, method: str) -> None:
    check(case, judge.PLANS[method](T), bound=FLOAT32)


@pytest.mark.parametrize("seed", [1, 5])
def test_other_seeds_draw_other_plans(case: Case, seed: int) -> None:
    """DRTune's start and early stop move with the draw; the bound does not."""
    plan = judge.drawn(judge.methods.drtune(K=2, m=3), seed=seed)(T)
    check(case, plan, bound=FLOAT32)


def test_the_pipeline_is_left_as_it_was(case: Case) -> None:
    pipe, call = case
    before, parts = judge.plain_images(pipe, call), {name: dict(vars(part)) for name, part in parts_of(pipe)}
    flags = {name: p.requires_grad for name, p in tiny.denoiser_of(pipe).named_parameters()}
    judge.engine_gradient(pipe, judge.PLANS["drtune"](T), call)
    assert torch.equal(judge.plain_images(pipe, call), before)
    assert flags == {name: p.requires_grad for name, p in tiny.denoiser_of(pipe).named_parameters()}
    for name, part in parts_of(pipe):
        assert vars(part).keys() == parts[name].keys(), f"{name} carries another attribute than before"


def parts_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    return ((name, part) for name, part in pipe.components.items() if hasattr(part, "__dict__") and name != "scheduler")


def test_steps_are_counted_as_the_pipeline_takes_them(case: Case) -> None:
    pipe, call = case
    assert count_steps(pipe, **tiny.fresh(call)) == oracle.count_steps(pipe, tiny.fresh(call)) == T


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("refl", "draft-T", "drtune, 0.3 of the input gradient")]


@pytest.mark.parametrize("method", ["draft-LV", "drtune", *SLOW])
@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_engine_is_algorithm_1_in_float64(family: str, method: str) -> None:
    with tiny.double(*tiny.BUILDERS[family](steps=T)) as case:
        check(case, judge.PLANS[method](T), bound=FLOAT64)


# Calls with other arguments -------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no guidance": ("sd", {"guidance_scale": 1.0}),
    "rescaled guidance": ("sd", {"guidance_rescale": 0.7}),
    "two images per prompt": ("sd", {"num_images_per_prompt": 2, "generator": tiny.generators(4)}),
    "one generator for the batch": ("sd", {"generator": torch.Generator().manual_seed(5)}),
    "no generator": ("sd", {"generator": None}),
    "stochastic": ("sd", {"eta": 1.0}),
    "given latents": ("sd", {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))}),
    "weaker LoRA": ("sd", {"cross_attention_kwargs": {"scale": 0.5}}),
    "adaptive PAG": ("sd-pag", {"pag_adaptive_scale": 0.3}),
    "PAG alone": ("sd-pag", {"guidance_scale": 1.0}),
    "ControlNet for the prompt only": ("sd-controlnet", {"guess_mode": True}),
    "ControlNet for the first half": ("sd-controlnet", {"control_guidance_end": 0.5}),
    "denoising ends early": ("sdxl", {"denoising_end": 0.6, "num_inference_steps": 8}),
    "a skipped layer": ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8}),
    "no true guidance": ("flux", {"true_cfg_scale": 1.0}),
}


@pytest.mark.parametrize(
    "method", ["drtune", "nested, early stop", pytest.param("alignprop per step", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_call_arguments(variant: str, method: str) -> None:
    family, extra = VARIANTS[variant]
    pipe, call = tiny.BUILDERS[family](steps=T)
    call = {**call, **extra}
    steps = count_steps(pipe, **tiny.fresh(call))
    assert steps == oracle.count_steps(pipe, tiny.fresh(call))
    check((pipe, call), judge.PLANS[method](steps), bound=FLOAT32)


def test_gradients_accumulate() -> None:
    """Two rollouts without clearing `.grad` give the sum, as `backward` does everywhere in torch."""
    pipe, call = tiny.stable_diffusion(steps=T)
    plan, other = judge.PLANS["drtune"](T), {**call, "prompt": ["cat", "dog"]}
    _, one, _ = judge.engine_gradient(pipe, plan, call)
    _, two, _ = judge.engine_gradient(pipe, plan, other)
    for arguments in (call, other):
        with judge.rollout(pipe, plan, seed=0, **tiny.fresh(arguments)) as tape:
            tape.backward(oracle.generic_loss(tape.images))
    total = {name: parameter.grad for name, parameter in tiny.trainable(pipe).items()}
    assert oracle.difference(total, {name: one[name] + two[name] for name in one}) < 1e-6


def test_gradient_norms_per_step_are_those_of_the_oracle_step_by_step() -> None:
    """With the input stopped the gradient is a sum over trained steps: each summand is a plan of its own."""
    pipe, call = tiny.stable_diffusion(steps=T)
    _, _, result = judge.engine_gradient(pipe, Plan(T=T, train=frozenset({0, 2, 3})), call)
    for i, norm in result.grad_norms.items():
        pictures = oracle.images(pipe, train={i}, call=tiny.fresh(call))
        single = oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in single.values()]).norm()), rel=1e-4)
