"""The gradient through the conditional branch of guidance alone, against the formula written out.

Under F = F_u + w (F_c - F_u) the unconditional output is a constant and the gradient through the conditional one is
multiplied by `factor`; compensated, by one over its weight (w; with PAG's scale s beside it, w + s). Each family says
below which of its outputs is conditional: the engine is told nothing of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch
import yaml
import zoo

from rewardtune import launch, methods
from rewardtune.config import load_config, presets
from rewardtune.engine import call as engine_call
from rewardtune.engine import preflight
from rewardtune.errors import ConfigError, PreflightError
from rewardtune.plan import Plan

T = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """branches: of one step in their order, over the calls or within one batch; True: conditional. weight: w above."""

    build: Any
    branches: tuple[bool, ...]
    weight: float
    kind: str
    calls: int = 1


LAYOUTS: dict[str, Layout] = {
    "sd": Layout(tiny.stable_diffusion, (False, True), 3.0, "one call"),
    "sd-pag": Layout(tiny.stable_diffusion_pag, (False, True, False), 3.0 + 2.0, "one call"),
    "sd3": Layout(tiny.stable_diffusion_3, (False, True), 3.0, "one call"),
    "flux": Layout(tiny.flux, (True, False), 2.0, "two calls", calls=2),
}
PLANS = ["drtune", "refl", "draft-3", "nested, early stop"]


@contextmanager
def shared(pipe: Any, layout: Layout, factor: float) -> Iterator[None]:
    """The denoiser's output: what is not conditional is a constant, of what is the gradient counts `factor`."""
    denoiser = tiny.denoiser_of(pipe)
    forward, done = denoiser.forward, [0]

    def network(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)[0]
        if layout.calls > 1:
            branches = [layout.branches[done[0] % layout.calls]] * len(out)
        else:
            branches = [branch for branch in layout.branches for _ in range(len(out) // len(layout.branches))]
        done[0] += 1
        share = torch.tensor([factor * branch for branch in branches]).to(out).view(-1, *[1] * (out.ndim - 1))
        return (out.detach() + share * (out - out.detach()),)

    denoiser.forward = network
    try:
        yield
    finally:
        vars(denoiser).pop("forward", None)  # the oracle took it off already


def literal(pipe: Any, plan: Plan, call: tiny.Call, layout: Layout, factor: float) -> dict[str, torch.Tensor]:
    with shared(pipe, layout, factor):
        pictures = oracle.images(
            pipe, train=plan.train, end=plan.end, input_gradient=plan.input_gradient, call=tiny.fresh(call)
        )
        return oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))


def conditional(plan: Plan, factor: float | None) -> Plan:
    return dataclasses.replace(plan, conditional_only=True, guidance_factor=factor)


QUICK = [("sd", "drtune", None), ("flux", "drtune", None), ("sd", "draft-3", 1.0)]


@pytest.mark.parametrize(
    ("family", "method", "factor"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(LAYOUTS, PLANS, [None, 1.0, 0.4])
    ],
)
def test_the_gradient_is_that_of_the_conditional_branch(family: str, method: str, factor: float | None) -> None:
    layout = LAYOUTS[family]
    plan = judge.PLANS[method](T)
    with tiny.double(*layout.build(steps=T)) as (pipe, call):
        both, gradient, _ = judge.engine_gradient(pipe, plan, call)
        pictures, found, result = judge.engine_gradient(pipe, conditional(plan, factor), call)
        exact = literal(pipe, plan, call, layout, 1 / layout.weight if factor is None else factor)
    assert torch.equal(pictures, both)
    assert oracle.difference(found, exact) < 1e-9
    halved = family in ("sd", "sd3")  # its conditional rows are replayed alone, another size of batch
    assert result.replay_error < 1e-14 if halved else result.replay_error == 0
    assert oracle.difference(found, gradient) > 1e-3, "both branches give the same: this test could not fail"


@pytest.mark.parametrize(("family", "rows"), [("sd", {2}), ("sd-pag", {6})])
def test_only_rows_that_carry_gradient_are_replayed(family: str, rows: set[int]) -> None:
    """2 prompts: 4 rows with guidance, 6 with PAG, whose attention mixes the branches: those are replayed whole."""
    layout = LAYOUTS[family]
    pipe, call = layout.build(steps=T)
    assert replayed(pipe, conditional(judge.PLANS["drtune"](T), None), call)[1] == rows


def replayed(pipe: Any, plan: Plan, call: tiny.Call) -> tuple[dict[str, torch.Tensor], set[int]]:
    """The gradient, and how many rows the denoiser was given with a graph."""
    sizes: set[int] = set()

    def note(network: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            sizes.add(len(kwargs.get("hidden_states", args[0] if args else None)))

    handle = tiny.denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    try:
        return judge.engine_gradient(pipe, plan, call)[1], sizes
    finally:
        handle.remove()


def test_dropout_and_another_processor_are_replayed_whole() -> None:
    """Dropout draws other numbers for half of the rows; PAG on a network that was replayed by rows before."""
    pipe, call = tiny.stable_diffusion(steps=T)
    plan = conditional(judge.PLANS["drtune"](T), None)
    assert replayed(pipe, plan, call)[1] == {2}
    layout = LAYOUTS["sd-pag"]
    mixed = layout.build(steps=T)[0]  # with a network of its own, of the same weights
    pag = type(mixed)(
        **{**mixed.components, "unet": pipe.unet}, pag_applied_layers="mid", requires_safety_checker=False
    )
    with_pag = {**call, "pag_scale": 2.0}
    found, rows = replayed(tiny.quiet(pag), plan, with_pag)
    assert rows == {6}
    assert oracle.difference(found, literal(mixed, plan, with_pag, layout, 1 / layout.weight)) < 1e-5
    for module in pipe.unet.modules():
        for name in getattr(module, "lora_dropout", ()):
            module.lora_dropout[name] = torch.nn.Dropout(0.2)
    pipe.unet.train()
    engine_call._by_row.pop(pipe.unet)
    found, rows = replayed(pipe, plan, call)
    assert rows == {4}
    assert oracle.difference(found, literal(pipe, plan, call, LAYOUTS["sd"], 1 / LAYOUTS["sd"].weight)) < 1e-5


def test_graphs_that_are_kept_are_shared_too() -> None:
    plan = conditional(judge.PLANS["drtune"](T), None)
    with tiny.double(*tiny.stable_diffusion(steps=T)) as (pipe, call):
        _, swept, _ = judge.engine_gradient(pipe, plan, call)
        _, kept, _ = judge.engine_gradient(pipe, plan, call, recompute=False)
    assert oracle.difference(kept, swept) < 1e-9


def test_rescaled_true_guidance() -> None:
    """Qwen-Image scales the guided output back to the conditional one's norm, a constant in no branch: factor 1."""
    pipe, call = zoo.PIPELINES["QwenImagePipeline"]()
    layout = Layout(None, (True, False), 1.0, "two calls", calls=2)
    plan = judge.PLANS["drtune"](T)
    _, found, _ = judge.engine_gradient(pipe, conditional(plan, 1.0), call)
    with shared(pipe, layout, 1.0):
        fields: dict[str, Any] = {"train": plan.train, "end": plan.end, "input_gradient": 0.0}
        pictures = oracle.images(pipe, **fields, call=tiny.fresh(call), own_decoding=True)
        exact = oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))
    assert oracle.difference(found, exact) < 1e-5


# -- how a call is guided --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_preflight_says_how_a_call_is_guided(family: str) -> None:
    pipe, call = LAYOUTS[family].build(steps=T)
    assert preflight(pipe, conditional=True, **tiny.fresh(call)).guidance == LAYOUTS[family].kind


@pytest.mark.parametrize(
    ("name", "changes", "said", "guidance"),
    [
        ("sd", {"guidance_scale": 1.0}, "guidance is off", "none"),
        ("flux", {"true_cfg_scale": 1.0}, "guidance is off", "none"),
        pytest.param(
            *("LatentConsistencyModelPipeline", {}, "guidance is embedded in the denoiser", "embedded"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_branch_to_leave_out_is_refused(name: str, changes: dict[str, Any], said: str, guidance: str) -> None:
    pipe, call = tiny.BUILDERS[name](steps=T) if name in tiny.BUILDERS else zoo.PIPELINES[name]()
    call = {**call, **changes}
    assert preflight(pipe, **tiny.fresh(call)).guidance == guidance
    with pytest.raises(PreflightError, match=said):
        preflight(pipe, conditional=True, **tiny.fresh(call))


def test_without_a_preflight_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = tiny.stable_diffusion(steps=T)
    call = {**call, "guidance_scale": 1.0}
    plan = judge.PLANS["drtune"](T)
    for _ in range(2):
        _, found, _ = judge.engine_gradient(pipe, conditional(plan, 2.0), call)
    _, both, _ = judge.engine_gradient(pipe, plan, call)
    assert oracle.difference(found, both) < 1e-6
    assert [record.message for record in caplog.records].count(
        "conditional_only changes nothing: the trained steps have no unconditional branch"
    ) == 1


# -- methods and run files -------------------------------------------------------------------------------------------


def test_any_method_can_be_conditional_only() -> None:
    for method in (methods.refl(m=2), methods.draft(K=2), methods.drtune(K=2, m=2)):
        for factor in (None, 1.0):
            wrapped = methods.conditional_only(method, factor=factor)
            plan, plain = wrapped(T, Random(3)), method(T, Random(3))
            assert (plan.conditional_only, plan.guidance_factor) == (True, factor)
            assert dataclasses.replace(plan, conditional_only=False, guidance_factor=None) == plain
    assert "conditional_only=compensated" in str(methods.conditional_only(methods.refl(m=2)))


def run_file(tmp_path: Any, method: Any) -> Any:
    path = tmp_path / "run.yaml"
    given = {"model": "playground", "reward": "symmetry", "prompts": ["a heart"], "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**given, "method": method}))
    return load_config(path)


@pytest.mark.parametrize(("given", "factor"), [({}, None), ({"factor": None}, None), ({"factor": 1.0}, 1.0)])
def test_the_run_file(tmp_path: Any, given: dict[str, Any], factor: float | None) -> None:
    config = run_file(tmp_path, {"name": "drtune", "options": {"K": 2, "m": 2}, "conditional_only": given})
    method = launch.make_method(config.method)
    assert (method.conditional_only, method.guidance_factor) == (True, factor)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "drtune", "conditional_only": {"factor": 0.0}}, "greater than 0"),
        ({"name": "drtune", "conditional_only": {"fctor": 1.0}}, "did you mean 'factor'"),
        ({"name": "drtune", "conditional_only": True}, "conditional_only"),
    ],
)
def test_wrong_run_files(tmp_path: Any, method: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_file(tmp_path, method)


def test_it_is_no_method_of_its_own(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="it goes around a method, as method"):
        launch.make_method(run_file(tmp_path, "conditional_only").method)


def test_presets_train_through_both_branches() -> None:
    for path in presets().values():
        assert load_config(path).method.conditional_only is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"conditional_only": True, "guidance_factor": 0.0}, "numbers above 0"),
        ({"conditional_only": True, "guidance_factor": float("inf")}, "numbers above 0"),
        ({"guidance_factor": 1.0}, "belongs to conditional_only"),
    ],
)
def test_wrong_plans(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Plan(T=T, train=frozenset({1}), **fields)
