"""Several stops of one chain: pictures and gradients are those of as many chains, for the network calls of one."""

from __future__ import annotations

import json
from collections import Counter
from random import Random
from typing import Any

import oracle
import pytest
import tiny
import torch
from tiny_runs import redness

from rewardtune import methods
from rewardtune.engine import rollout
from rewardtune.errors import ConfigError
from rewardtune.evaluate import generators
from rewardtune.gradient import derive_seed
from rewardtune.plan import Plan
from rewardtune.prompts import batch_prompts
from rewardtune.trainer import RewardTuner

T = 5
PLANS = {
    "drtune": {"train": {0, 2}, "end": 4, "stops": {1, 3}},
    "trained after a stop": {"train": {0, 3}, "end": 4, "stops": {1}},
    "a trained stop": {"train": {1, 3}, "end": 3, "stops": {1}},
    "to the end of the chain": {"train": {0, 2}, "end": None, "stops": {2}},
    "nested": {"train": {0, 1, 3}, "end": 4, "stops": {2}, "input_gradient": 1.0},
}
FAMILIES = {
    "sd": tiny.stable_diffusion,
    "sd-v": tiny.stable_diffusion_v,
    "controlnet": tiny.stable_diffusion_controlnet,
    "flux": tiny.flux,
}


def weights(pictures: int) -> torch.Tensor:
    """A loss that tells pictures, channels and places apart."""
    return torch.linspace(-1, 2, pictures * 3 * 4, dtype=torch.float64).view(pictures, 3, 2, 2)


def loss(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    half = images.shape[-1] // 2
    return (torch.nn.functional.avg_pool2d(images, half) * factors).sum()


def engine(pipe: Any, call: tiny.Call, plan: Plan, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parameters = list(tiny.trainable(pipe).values())
    for p in parameters:
        p.grad = None
    with rollout(pipe, plan, seed=0, **tiny.fresh(call), **options) as tape:
        tape.backward(loss(tape.images, weights(len(tape.images))))
        assert tape.prompts == tiny.PROMPTS * plan.pictures
    return tape.images.detach(), [p.grad.clone() for p in parameters]


def judged(pipe: Any, call: tiny.Call, plan: Plan) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same by the oracle: one graph for each stop."""
    parameters = list(tiny.trainable(pipe).values())
    factors = weights(len(tiny.PROMPTS) * plan.pictures).split(len(tiny.PROMPTS))
    images, total = [], [torch.zeros_like(p) for p in parameters]
    for end, factor in zip([plan.end, *sorted(plan.stops)], factors, strict=True):
        fields = {"train": plan.train, "end": end, "input_gradient": plan.input_gradient}
        made = oracle.images(pipe, **fields, call=tiny.fresh(call))
        grads = torch.autograd.grad(loss(made, factor), parameters, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        images.append(made.detach())
    return torch.cat(images), total


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    ours, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (ours, theirs))
    assert float(theirs.norm()) > 0
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_the_sum_over_the_stops(name, recompute):
    plan = Plan(T=T, **{key: frozenset(v) if isinstance(v, set) else v for key, v in PLANS[name].items()})
    with tiny.double(*tiny.stable_diffusion(steps=T)) as (pipe, call):
        images, ours = engine(pipe, call, plan, recompute=recompute)
        pictures, theirs = judged(pipe, call, plan)
    assert torch.allclose(images, pictures, atol=1e-12)
    assert close(ours, theirs) < 1e-9


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd"])
def test_families(family):
    name = "nested" if family == "controlnet" else "drtune"
    plan = Plan(T=T, **{key: frozenset(v) if isinstance(v, set) else v for key, v in PLANS[name].items()})
    with tiny.double(*FAMILIES[family](steps=T)) as (pipe, call):
        images, ours = engine(pipe, call, plan)
        pictures, theirs = judged(pipe, call, plan)
    assert torch.allclose(images, pictures, atol=1e-9)
    assert close(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    "scheduler", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"]
)
def test_noise_and_history_are_those_of_single_chains(scheduler):
    """Each picture equals that of a chain with this stop alone, bit for bit, and the generators end as after one."""
    pipe, call = tiny.stable_diffusion(steps=T)
    tiny.set_scheduler(pipe, scheduler)
    plan = Plan(T=T, train=frozenset({0, 2}), end=4, stops=frozenset({1, 3}))
    ends = []

    def made(plan: Plan) -> torch.Tensor:
        own = tiny.fresh(call)
        with rollout(pipe, plan, seed=0, **own) as tape:
            ends.append([g.get_state() for g in own["generator"]])
            return tape.images.detach()

    together = made(plan)
    single = [made(Plan(T=T, train=frozenset({0, 2}), end=end)) for end in (4, 1, 3)]
    assert torch.equal(together, torch.cat(single))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    first, second, third = together.chunk(3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_network_is_called_for_one_chain():
    pipe, call = tiny.stable_diffusion(steps=T)
    counted = Counter()
    handle = pipe.unet.register_forward_hook(lambda *_: counted.update(["unet"]))
    text = pipe.text_encoder.register_forward_hook(lambda *_: counted.update(["text"]))
    engine(pipe, call, Plan(T=T, train=frozenset({0, 2}), end=3, stops=frozenset({1, 2})))
    handle.remove()
    text.remove()
    assert counted["unet"] == 4 + 2  # steps, and a replay of each trained one
    alone = Counter()
    text = pipe.text_encoder.register_forward_hook(lambda *_: alone.update(["text"]))
    engine(pipe, call, Plan(T=T, train=frozenset({0, 2}), end=3))
    text.remove()
    assert counted["text"] == alone["text"]


def test_conditional_only_goes_with_it():
    """The sum over chains with one stop each, all with the gradient of the conditional branch alone."""
    fields = {"T": T, "train": frozenset({0, 2}), "conditional_only": True}
    with tiny.double(*tiny.stable_diffusion(steps=T)) as (pipe, call):
        _, ours = engine(pipe, call, Plan(**fields, end=4, stops=frozenset({1})))
        factors = weights(4).split(2)
        total: list[torch.Tensor] = []
        for end, factor in zip((4, 1), factors, strict=True):
            for p in tiny.trainable(pipe).values():
                p.grad = None
            with rollout(pipe, Plan(**fields, end=end), seed=0, **tiny.fresh(call)) as tape:
                tape.backward(loss(tape.images, factor))
            grads = [p.grad.clone() for p in tiny.trainable(pipe).values()]
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    assert close(ours, total) < 1e-9


def test_the_law_is_that_of_one_stop_for_each():
    """Each of the stops is uniform on 1..m; all are distinct; the trained steps are those of Algorithm 1."""
    method, rng, seen = methods.drtune(K=2, m=4, stops=2), Random(0), Counter()
    for _ in range(4000):
        plan = method(10, rng)
        (stop,) = plan.stops
        assert stop < plan.end
        assert plan.pictures == 2
        seen.update({10 - stop, 10 - plan.end})
    assert set(seen) == {1, 2, 3, 4}
    assert all(abs(count - 2000) < 5 * (4000 * 0.25) ** 0.5 for count in seen.values())
    within = methods.drtune(K=4, m=8, spacing="executed", stops=2)  # none of the four is cut off by either stop
    assert all(
        len(plan.train) == 4 and max(plan.train) <= min(plan.stops) for plan in (within(20, rng) for _ in range(200))
    )
    assert methods.drtune(K=2, m=4)(10, Random(3)) == methods.drtune(K=2, m=4, stops=1)(10, Random(3))
    late = methods.drtune(K=1, m=9, stops=3)  # the one trained step may lie after a stop: that stop is trained then
    for seed in range(200):
        plan = late(10, Random(seed))
        assert min(plan.train) <= min(plan.stops)


def test_a_plan_says_what_is_wrong_with_its_stops():
    fields = {"T": T, "train": frozenset({1, 3}), "end": 3}
    for stops in ({0}, {3}, {4}):
        with pytest.raises(ConfigError, match=rf"stops \[{min(stops)}\] are no stops"):
            Plan(**fields, stops=frozenset(stops))
    with pytest.raises(ConfigError, match="from noise"):
        Plan(T=T, train=frozenset({1, 3}), start=2, end=4, stops=frozenset({3}))
    with pytest.raises(ConfigError, match=r"stops=3 distinct stops need m >= 3, got m=2"):
        methods.drtune(K=2, m=2, stops=3)
    with pytest.raises(ConfigError, match=r"stops=2 .* got m=None"):
        methods.drtune(K=2, m=None, stops=2)
    assert Plan(**fields, stops=frozenset({1})).draw() == "|.#>.#>-|"


def test_an_update_has_the_mean_over_its_pictures(tmp_path):
    pipe, _ = tiny.stable_diffusion(lora=False)
    sampling = {"num_inference_steps": T, "guidance_scale": 3.0, "height": 16, "width": 16}
    prompts = ["red heart", "blue star"]
    tuner = RewardTuner(
        pipe,
        reward=redness,
        method=methods.drtune(K=2, m=2, stops=2),
        prompts=prompts,
        output_dir=tmp_path,
        rank=2,
        batch=2,
        eval_count=1,
        show_progress=False,
        **sampling,
    )
    tuner.train(1, lr=1e-12)  # the weights stay where they are
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    plan = methods.drtune(K=2, m=2, stops=2)(T, Random("plan 0 0"))
    seeds = [derive_seed(0, 0, index) for index in range(2)]
    drawn = batch_prompts(prompts, seed=0, step=0, size=2)
    for p in tuner.parameters:
        p.grad = None
    noise = {"seed": seeds[0], "generator": generators(seeds)}
    with rollout(pipe, plan, prompt=drawn, **sampling, **noise) as tape:
        scores = redness(tape.images, tape.prompts)
        tape.backward(-scores.mean())
    assert len(scores) == 4
    assert record["reward"] == pytest.approx(float(scores.detach().mean()), rel=1e-4)
    norm = float(torch.stack([p.grad.norm() for p in tuner.parameters]).norm())
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)
