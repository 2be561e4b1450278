"""The methods' laws, against the paper's text: ranges exhaustively for small T, K, m; marginals; every erratum."""

import math
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from itertools import product
from random import Random

import pytest

from rewardtune import methods
from rewardtune.config import MethodChoice
from rewardtune.errors import ConfigError
from rewardtune.launch import make_method
from rewardtune.plan import Plan

DRAWS = 400


def times(plan: Plan) -> set[int]:
    """Trained steps in the paper's time t = T - i."""
    return {plan.T - i for i in plan.train}


def draws(method, T: int, n: int = DRAWS) -> list[Plan]:
    return [method(T, Random(seed)) for seed in range(n)]


# Ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "K"), [(T, K) for T in range(1, 9) for K in range(1, T + 1)])
def test_drtune_reaches_every_start_and_nothing_else(T: int, K: int):
    gap = T // K
    legal = {frozenset(s + i * gap for i in range(K)) for s in range(1, T - (K - 1) * gap + 1)}
    assert all(max(chain) <= T for chain in legal)
    assert {frozenset(times(p)) for p in draws(methods.drtune(K, None), T)} == legal


@pytest.mark.parametrize(("T", "K", "m"), [t for t in product(range(1, 8), repeat=3) if t[1] <= t[0] and t[2] <= t[0]])
@pytest.mark.parametrize("spacing", ["chain", "executed", "random"])
def test_drtune_with_early_stop_trains_only_what_runs(T: int, K: int, m: int, spacing: str):
    seen = set()
    for plan in draws(methods.drtune(K, m, spacing=spacing), T, 150):
        t_min = T - plan.end
        seen.add(t_min)
        assert 1 <= len(plan.executed) <= K
        assert min(times(plan)) >= t_min
        assert plan.input_gradient == 0
        if spacing == "executed":
            assert len(plan.executed) == min(K, T - t_min + 1)
            assert len(set(map(int.__sub__, plan.executed[1:], plan.executed))) <= 1  # equally spaced
    assert seen == set(range(1, m + 1))


@pytest.mark.parametrize(("T", "m"), [(T, m) for T in range(1, 9) for m in range(1, T + 1)])
def test_refl_trains_the_step_it_stops_at(T: int, m: int):
    plans = draws(methods.refl(m), T, 150)
    assert {p.end for p in plans} == set(range(T - m, T))
    assert all(p.train == {p.end} and p.executed == (p.end,) and p.steps_run == p.end + 1 for p in plans)


@pytest.mark.parametrize(("T", "K"), [(T, K) for T in range(1, 9) for K in range(1, T + 1)])
def test_draft_trains_the_last_K_with_full_backpropagation(T: int, K: int):
    plan = methods.draft(K)(T, Random(0))
    assert times(plan) == set(range(1, K + 1))
    assert (plan.end, plan.input_gradient, plan.steps_run) == (None, 1.0, T)


def test_draft_T_trains_all():
    assert methods.draft(None)(7, Random(0)).train == frozenset(range(7))


def test_draft_lv_restarts_at_the_last_step():
    plan = methods.draft_lv(n=3)(10, Random(0))
    assert (plan.start, plan.draws, plan.train, plan.end) == (9, 3, {9}, None)
    assert plan.steps_run == 10 + 3


@pytest.mark.parametrize("T", range(1, 8))
@pytest.mark.parametrize("law", ["per_step", "per_chain"])
def test_alignprop_ranges(T: int, law: str):
    plans = draws(methods.alignprop(law), T)
    assert set().union(*map(times, plans)) == set(range(1, T + 1))
    assert all(p.input_gradient == 1.0 and p.end is None for p in plans)
    if law == "per_chain":
        assert {frozenset(times(p)) for p in plans} == {frozenset(range(1, k + 1)) for k in range(1, T + 1)}


# Marginals --------------------------------------------------------------------------------------------------------


def within(count: int, n: int, p: float) -> bool:
    """Four standard deviations of a binomial: seeds are fixed, so this never flickers."""
    return abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p)) + 1


def test_alignprop_per_step_marginals():
    T, n = 10, 4000
    seen = Counter(i for p in draws(methods.alignprop("per_step"), T, n) for i in p.train)
    assert all(within(seen[i], n, (i + 1) / (T + 1)) for i in range(T))


def test_alignprop_trains_half_of_the_chain_on_average():
    for law in ("per_step", "per_chain"):
        mean = sum(len(p.train) for p in draws(methods.alignprop(law), 50, 2000)) / 2000
        assert mean == pytest.approx(25.3, abs=1.5)


def test_early_stop_is_uniform():
    n = 3000
    seen = Counter(50 - p.end for p in draws(methods.drtune(5, 20), 50, n))
    assert all(within(seen[t], n, 1 / 20) for t in range(1, 21))


def test_a_plan_depends_on_its_seed_alone():
    assert draws(methods.drtune(), 50, 20) == draws(methods.drtune(), 50, 20)
    assert len(set(draws(methods.drtune(), 50, 20))) > 10


# The paper's errata ------------------------------------------------------------------------------------------------


def test_erratum_1_the_start_covers_the_papers_own_settings():
    """As printed, s = randint(1, T - K*floor(T/K)) is randint(1, 0) for T=50, K=5 and always 1 for T=25, K=3."""
    starts = {min(times(p)) for p in draws(methods.drtune(5, None), 50)}
    assert starts == set(range(1, 11))
    trained = set().union(*(times(p) for p in draws(methods.drtune(3, None), 25)))
    assert trained == set(range(1, 26))


def test_erratum_2_K_steps_are_trained_not_K_plus_one():
    assert {len(p.train) for p in draws(methods.drtune(5, None), 50)} == {5}


def test_erratum_3_four_of_five_steps_run_in_the_papers_setting():
    plans = draws(methods.drtune(5, 20), 50, 4000)
    assert sum(len(p.executed) for p in plans) / len(plans) == pytest.approx(4.05, abs=0.03)
    executed = draws(methods.drtune(5, 20, spacing="executed"), 50)
    assert {len(p.executed) for p in executed} == {5}


def test_erratum_3_a_plan_never_trains_nothing():
    """T=10, K=2, m=8: in 7.5 % of draws both steps fall behind the stop; then t_min itself is trained."""
    fallbacks = 0
    for seed in range(4000):
        plan, rng = methods.drtune(2, 8)(10, Random(seed)), Random(seed)
        t_min, s = rng.randint(1, 8), rng.randint(1, 5)
        fallbacks += s + 5 < t_min
        assert plan.executed
        assert plan.executed == (plan.end,) or s + 5 >= t_min
    assert within(fallbacks, 4000, 0.075)


def test_erratum_5_alignprop_trains_the_end_near_the_image():
    for law in ("per_step", "per_chain"):
        seen = Counter(t for p in draws(methods.alignprop(law), 10) for t in times(p))
        assert seen[1] > 3 * seen[10]


def test_erratum_7_the_early_stop_is_a_switch():
    assert methods.drtune(5, None)(50, Random(0)).end is None
    assert methods.drtune()(50, Random(0)).end is not None


def test_figure_6_any_method_takes_the_stop_gradient_and_the_early_stop():
    for factory in (methods.draft, methods.alignprop):
        plan = factory(None if factory is methods.draft else "per_chain", input_gradient=0.0, m=8)(20, Random(1))
        assert plan.input_gradient == 0
        assert 12 <= plan.end < 20
    for name in ("refl", "draft", "draft_lv", "alignprop", "drtune", "draft_plus"):
        factory = methods.ALL[name]
        method = replace(factory(), input_gradient=0.5, m=4)
        plan = method(50, Random(3))
        assert (plan.input_gradient, name) == (0.5, name)
        assert plan.end >= 46


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: methods.drtune(0), "K=0"),
        (lambda: methods.draft(-1), "K=-1"),
        (lambda: methods.refl(0), "m=0"),
        (lambda: methods.draft_lv(0), "n=0"),
        (lambda: methods.drtune(6, None)(5, Random(0)), "K=6 does not fit into the T=5"),
        (lambda: methods.drtune(2, 6)(5, Random(0)), "m=6 does not fit into the T=5"),
        (lambda: methods.draft(6)(5, Random(0)), "K=6"),
        (lambda: methods.draft_lv()(1, Random(0)), "T=1"),
        (lambda: methods.drtune(spacing="even"), "legal are chain, executed, random"),
        (lambda: methods.alignprop("both"), "legal are per_step, per_chain"),
        (lambda: methods.drtune(input_gradient=1.5), "0 .. 1"),
        (lambda: Plan(T=3, train=frozenset({3})), r"\[3\]"),
        (lambda: Plan(T=3, train=frozenset({2}), end=1), "no trained step would run"),
        (lambda: Plan(T=3, train=frozenset({2}), end=5), "end=5"),
        (lambda: Plan(T=3, train=frozenset({2}), draws=2), "draws=2"),
        (lambda: Plan(T=3, train=frozenset({2}), start=0), "start=0"),
        (lambda: Plan(T=0, train=frozenset()), "T=0"),
    ],
)
def test_bad_settings_say_what_is_legal(make, words: str):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Plan(T=3, train=frozenset({2})).T = 4


def test_a_plan_draws_itself():
    assert Plan(T=6, train=frozenset({1, 3, 5}), end=4).draw() == "|.#.#.>-|"
    assert methods.draft_lv(2)(4, Random(0)).draw() == "|~~~#| x2"
    assert methods.draft(None)(3, Random(0)).draw() == "|###|"


# Of one's own -----------------------------------------------------------------------------------------------------

OWN = """
from rewardtune.methods import Method

def some(T, rng, t_min):
    return range(1, T + 1, 3)

ready = Method(name="ready", times=some, input_gradient=0.0, m=None)

def made(m=4):
    return Method(name="made", times=some, input_gradient=1.0, m=m)

def wrong():
    return some

def odd(K):
    raise ValueError("K must be odd")

def free(**options):
    return made(**options)

late = Method(name="late", times=lambda T, rng, t_min: [1 // (T - 10)], input_gradient=0.0, m=None)
"""


def test_a_method_by_import_path(tmp_path, monkeypatch):
    """Found in the current folder, as a reward of one's own is."""
    (tmp_path / "own_methods.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ready = make_method(MethodChoice(name="own_methods:ready"))
    assert times(ready(10, Random(0))) == {1, 4, 7, 10}
    assert make_method(MethodChoice(name="own_methods:made", options={"m": 2})).m == 2
    assert make_method(MethodChoice(name="own_methods:free", options={"m": 2})).m == 2
    late = make_method(MethodChoice(name="own_methods:late"))
    with pytest.raises(ConfigError, match=r"method late: no steps can be drawn for T=10 \(ZeroDivisionError"):
        late(10, Random(0))
    robust = make_method(MethodChoice(name="own_methods:made", rsa_ft={}))
    assert (robust.m, robust.robust_image) == (4, 0.01)
    for choice, said in (
        (
            {"name": "own_methods:raedy"},
            r"method 'own_methods:raedy': own_methods has no 'raedy' \(did you mean 'ready'",
        ),
        ({"name": "no_such_module:x"}, "importing no_such_module failed"),
        ({"name": "own_methods:made", "options": {"n": 1}}, "has no option 'n'"),
        ({"name": "own_methods:ready", "options": {"m": 1}}, "has no option 'm'; legal: none"),
        ({"name": "own_methods:wrong"}, "is a function; legal is a rewardtune.methods.Method"),
        ({"name": "own_methods:some"}, "do not fit"),
        ({"name": "own_methods:odd", "options": {"K": 2}}, r"'K': 2} do not fit \(ValueError: K must be odd\)"),
        ({"name": "builtins:dict", "options": {"m": 2}}, "builtins:dict is a dict; legal is a"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_method(MethodChoice(**choice))
