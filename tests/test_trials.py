"""The parts of benchmarks/trials.py that a gain rests on: its gradients by the engine, its variances by simulation."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
import trials
from step import prepare

from rewardtune import Plan, methods, playground, rewards, rollout


@pytest.fixture(scope="module")
def networks() -> dict[str, trials.Network]:
    return {network.name: network for network in trials.networks()}


@pytest.mark.parametrize("name", ["playground's UNet", "SD3-like transformer", "FLUX-like transformer"])
def test_one_replay_has_the_gradient_of_replays_in_turn(networks, name):
    network = networks[name]
    calls = [network.arguments(2) for _ in range(2)]
    cotangents = [torch.randn_like(trials.forward(network, [call])) for call in calls]
    in_turn = trials.gradient(network, calls, cotangents)
    one = trials.gradient(network, [trials.as_one(calls)], [torch.cat(cotangents)])
    assert trials.apart(in_turn, one) < 1e-5
    assert trials.apart(in_turn, trials.gradient(network, calls[:1], cotangents[:1])) > 0.1


@pytest.mark.slow
def test_the_gradients_at_the_stops_are_those_of_the_engine():
    pipe = prepare(playground.pipeline(), "cpu")
    judge, prompt, s, T = rewards.Symmetry(detach_std=True), "a red heart", 3, trials.T
    found = trials.stop_gradients(pipe, prompt, 5, {"symmetry": judge}, s=s)
    spaced = {T - (s + k * trials.GAP) for k in range(trials.K)}
    parameters = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    for stop, method, train in [(T - 1, "ReFL", {T - 1}), (T - 6, "ReFL", {T - 6}), (T - 2, "DRTune", spaced)]:
        plan = Plan(T=T, train=frozenset(train), end=stop)
        call = {"prompt": [prompt], "num_inference_steps": T, "guidance_scale": trials.GUIDANCE}
        with rollout(pipe, plan, generator=torch.Generator().manual_seed(5), **call) as tape:
            tape.backward(judge(tape.images, tape.prompts).sum())
        assert not any(p.grad.any() for name, p in parameters.items() if "lora_A" in name)
        ours = torch.cat([p.grad.flatten() for name, p in parameters.items() if "lora_B" in name])
        theirs = found[method, "symmetry"][stop - (T - trials.M)]
        assert torch.linalg.vector_norm(ours - theirs) < 1e-4 * torch.linalg.vector_norm(ours)
        for p in parameters.values():
            p.grad = None


def test_the_calls_of_one_stop_are_those_of_the_methods():
    rng = random.Random(0)
    for name, method in (
        ("ReFL", methods.refl(m=trials.M)),
        ("DRTune", methods.drtune(K=trials.K, m=trials.M)),
    ):
        plans = [method(trials.T, rng) for _ in range(4000)]
        evaluations, replays = trials.expected_calls(name, 1)
        assert statistics.mean(plan.steps_run for plan in plans) == pytest.approx(evaluations, abs=0.15)
        assert statistics.mean(len(plan.executed) for plan in plans) == pytest.approx(replays, abs=0.06)


def test_the_calls_of_all_stops_by_hand():
    assert trials.expected_calls("ReFL", trials.M) == (trials.T, trials.M)
    # t_min = 1 is among them, so all three calls run; t_min above the highest of them, s + 2 GAP >= 13, there is none
    assert trials.expected_calls("DRTune", trials.M) == (trials.T, trials.K)


class World:
    """Gradients in which each part of the variance is known: 2 + plan + stop + picture + rest, P = 4."""

    G, P = 3, 4

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.draw = lambda *shape: torch.randn(*shape, self.P, generator=rng, dtype=torch.float64)
        self.plan = self._centred(self.draw(self.G), 0)
        self.stop = self._centred(1.5 * self.draw(self.G, trials.M), 1)

    @staticmethod
    def _centred(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x - x.mean(dim, keepdim=True)

    def pictures(self, n: int) -> torch.Tensor:
        """(G, n, M, P)"""
        own = 2 * self.draw(self.G, n, 1)
        rest = self._centred(self.draw(self.G, n, trials.M), 2)
        return 2 + self.plan[:, None, None] + self.stop[:, None] + own + rest

    @property
    def known(self) -> trials.Noise:
        return trials.Noise(
            mean=4.0 * self.P,
            plans=float(self.plan.square().sum(-1).mean()),
            stops=float(self.stop.square().sum(-1).mean()),
            pictures=4.0 * self.P,
            rest=self.P * (1 - 1 / trials.M),
        )


def test_the_parts_of_the_variance_are_found_without_bias():
    world = World()
    found = [trials.noise(trials.inner_products(world.pictures(4))) for _ in range(1500)]
    for name in ("mean", "plans", "stops", "pictures", "rest"):
        values = [getattr(one, name) for one in found]
        error = statistics.stdev(values) / len(values) ** 0.5
        assert abs(statistics.mean(values) - getattr(world.known, name)) < 4 * error, name


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("one_plan", [True, False])
def test_the_variance_of_an_update_is_that_of_simulated_ones(d, one_plan):
    world, rng, batch = World(), random.Random(0), 3
    each = world.pictures(batch * 4000).unflatten(1, (4000, batch))  # (G, updates, batch, M, P)
    updates = []
    for k in range(4000):
        plans = [(rng.randrange(world.G), rng.sample(range(trials.M), d)) for _ in range(batch)]
        plans = plans[:1] * batch if one_plan else plans
        updates.append(torch.stack([each[g, k, i, stops].mean(0) for i, (g, stops) in enumerate(plans)]).mean(0))
    simulated = float(torch.stack(updates).var(0).sum())
    assert simulated == pytest.approx(world.known.of_update(d, batch, one_plan=one_plan), rel=0.06)
