"""Puts the engine and the oracle side by side on one plan; the tests set the bounds, the table prints the numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import oracle
import tiny
import torch

from rewardtune import methods
from rewardtune.engine import rollout
from rewardtune.plan import Plan

Draw = Callable[[int], Plan]


def drawn(method: methods.Method, *, seed: int = 0) -> Draw:
    return lambda T: method(T, Random(seed))


# Every published method, the paper's ablations, and each field of a plan at an unusual value. For T >= 4.
PLANS: dict[str, Draw] = {
    "refl": drawn(methods.refl(m=3), seed=5),
    "draft-1": drawn(methods.draft(K=1)),
    "draft-3": drawn(methods.draft(K=3)),
    "draft-T": drawn(methods.draft(K=None)),
    "draft-T, stopped input": drawn(methods.draft(K=None, input_gradient=0.0)),
    "alignprop per step": drawn(methods.alignprop(law="per_step"), seed=1),
    "alignprop per chain": drawn(methods.alignprop(law="per_chain"), seed=1),
    "alignprop, stopped input, early stop": drawn(methods.alignprop(input_gradient=0.0, m=3), seed=3),
    "draft-LV": drawn(methods.draft_lv(n=2)),
    "draft-LV, early stop": drawn(methods.draft_lv(n=2, m=3), seed=0),
    "restarted, two nested steps": lambda T: Plan(
        T=T, train=frozenset({T - 2, T - 1}), start=T - 2, draws=2, input_gradient=1.0
    ),
    "drtune": drawn(methods.drtune(K=2, m=3)),
    "drtune executed": drawn(methods.drtune(K=2, m=3, spacing="executed"), seed=7),
    "drtune random": drawn(methods.drtune(K=2, m=3, spacing="random"), seed=7),
    "drtune, whole chain": drawn(methods.drtune(K=2, m=None)),
    "drtune, 0.3 of the input gradient": drawn(methods.drtune(K=4, m=2, input_gradient=0.3), seed=0),
    "nested, early stop": lambda T: Plan(T=T, train=frozenset(range(T)), input_gradient=1.0, end=T - 2),
    "end not trained": lambda T: Plan(T=T, train=frozenset({0, 1}), input_gradient=1.0, end=T - 2),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    images_equal: bool  # bit for bit: the plain pipeline's images, with an early stop the oracle's
    image_difference: float  # largest difference of a pixel
    gradient_difference: float  # relative, all parameters together
    result: Any


def plain_images(pipe: Any, call: tiny.Call, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return pipe(**tiny.fresh(call), output_type="pt")[0]


def engine_gradient(
    pipe: Any,
    plan: Plan,
    call: tiny.Call,
    *,
    seed: int = 0,
    loss_weight: float = 1.0,
    sampling: Any = None,
    recompute: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    """Images, gradient per trained parameter (zero where none arrived) and the sweep's report.

    `sampling` is a context for the sampling alone, autocast for example; loss and sweep run outside it.
    """
    parameters = tiny.trainable(pipe)
    for parameter in parameters.values():
        parameter.grad = None
    with ExitStack() as stack:
        with sampling or nullcontext():
            tape = stack.enter_context(rollout(pipe, plan, seed=seed, recompute=recompute, **tiny.fresh(call)))
        pictures = tape.images
        result = tape.backward(loss_weight * oracle.generic_loss(pictures))
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return pictures.detach(), found, result


def literal(pipe: Any, plan: Plan, call: tiny.Call, *, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images and gradient of the oracle."""
    fields: dict[str, Any] = {"train": plan.train, "end": plan.end, "input_gradient": plan.input_gradient, "seed": seed}
    if plan.start is None:
        pictures = oracle.images(pipe, **fields, call=tiny.fresh(call))
    else:
        chain = {"T": plan.T, "start": plan.start, "draws": plan.draws}
        pictures = oracle.draft_lv_images(pipe, **chain, **fields, call=lambda: tiny.fresh(call))
    return pictures.detach(), oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))


def compare(pipe: Any, plan: Plan, call: tiny.Call, *, seed: int = 0) -> Verdict:
    """One plan, both ways. The images of a whole chain are the plain pipeline's, else the oracle's."""
    pictures, gradient, result = engine_gradient(pipe, plan, call, seed=seed)
    expected, exact = literal(pipe, plan, call, seed=seed)
    if plan.end is None and plan.start is None:
        expected = plain_images(pipe, call, seed=seed)
    expected = expected.to(pictures)
    return Verdict(
        images_equal=torch.equal(pictures, expected),
        image_difference=float((pictures - expected).abs().max()),
        gradient_difference=oracle.difference(gradient, exact),
        result=result,
    )
