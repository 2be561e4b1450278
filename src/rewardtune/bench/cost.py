"""What an update costs, in denoiser evaluations: one is the network's call for one picture at one step, with guidance.

A replayed call with its backward counts as measured on this machine and for this setting; decoding and the reward are
not counted (their share is measured beside it). Plans are functions of (seed, step), so the number of updates that fit
into a budget is known before anything runs, and is the same on every machine with the same costs.
"""

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..methods import Method
from ..plan import Plan

if TYPE_CHECKING:
    from ..trainer import RewardTuner


@dataclass(frozen=True, kw_only=True)
class Cost:
    """In units of one evaluation: a replay with backward to the parameters, and to the inputs as well (nested plans).

    evaluation: seconds of one; head: decoding, reward and both backwards of one picture, in evaluations (for the
    reader, not counted).
    """

    replay: float
    nested: float
    evaluation: float
    head: float

    def of(self, plan: Plan) -> float:
        """Evaluations of one picture under `plan`."""
        replays = sum(self.nested if plan.gradient_into(i) > 0 else self.replay for i in plan.executed)
        return plan.steps_run + replays * plan.draws

    def of_update(self, method: Method, plan: Plan) -> float:
        """The same with what the method adds: a distance to the base model, a second pass.

        The distance takes a forward of the base model for each trained call, and where the input carries gradient a
        second vector-Jacobian product, as dear as the backward of a call.
        """
        extra = 0.0
        if method.kl:
            extra = sum(self.replay if plan.gradient_into(i) > 0 else 1.0 for i in plan.executed) * plan.draws
        return method.passes * (self.of(plan) + extra)


def spent(method: Method, T: int, *, seed: int, batch: int, cost: Cost, updates: int) -> list[float]:
    """Evaluations used up after 0, 1, ... `updates` updates; the plans are those that training draws."""
    total = [0.0]
    for step in range(updates):
        total.append(total[-1] + batch * cost.of_update(method, method(T, random.Random(f"plan {seed} {step}"))))
    return total


def updates_within(budget: float, method: Method, T: int, *, seed: int, batch: int, cost: Cost) -> int:
    """The most updates that cost at most `budget` evaluations, and at least one."""
    step, used = 0, 0.0
    while True:
        used += batch * cost.of_update(method, method(T, random.Random(f"plan {seed} {step}")))
        if used > budget:
            return max(step, 1)
        step += 1


def measure(tuner: "RewardTuner", *, repeats: int = 3) -> Cost:
    """Costs of this pipeline, reward and batch on this device: chains with 1 and with all steps trained, and without.

    Process time on the CPU (other programs disturb it less), wall time on a GPU; medians of `repeats`.
    """
    from .. import adapters, evaluate, methods
    from ..engine import count_steps, quiet, rollout

    parameters = adapters.attach(tuner.denoiser, seed=tuner.seed, **tuner.adapter)
    n = tuner.micro_batch
    prompts, seeds = (tuner.prompts * n)[:n], list(range(n))
    call = evaluate.for_prompts(prompts, tuner.call)
    T = count_steps(tuner.pipe, **evaluate.for_prompts(prompts[:1], tuner.call))

    def update(K: int, input_gradient: float) -> None:
        plan = methods.draft(K=K, input_gradient=input_gradient)(T, random.Random(0))
        with rollout(tuner.pipe, plan, seed=0, generator=evaluate.generators(seeds), **call) as tape:
            tape.backward(-tuner.reward(tape.images, tape.prompts).mean(), allow_zero=True)
        for parameter in parameters:
            parameter.grad = None

    def sample() -> None:
        with quiet(tuner.pipe):
            tuner.pipe(**call, generator=evaluate.generators(seeds), output_type="latent")

    def timed(what: Any, *given: Any) -> float:
        what(*given)  # once to warm up
        return statistics.median(_seconds(tuner.device, what, *given) for _ in range(repeats))

    many = min(T, 6)
    chain, one, all_, nested = timed(sample), timed(update, 1, 0.0), timed(update, many, 0.0), timed(update, many, 1.0)
    evaluation = chain / T
    replay = (all_ - one) / (many - 1) / evaluation
    return Cost(
        replay=round(replay, 2),
        nested=round((nested - one) / (many - 1) / evaluation, 2),
        evaluation=evaluation / n,
        head=round(one / evaluation - T - replay, 2),
    )


def _seconds(device: Any, what: Any, *given: Any) -> float:
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    started = now()
    what(*given)
    return now() - started
