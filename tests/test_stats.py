"""Intervals on synthetic data with known answers: coverage, paired win rates, where the plain bootstrap is blind."""

import math
import random
from statistics import NormalDist, fmean

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rewardtune.stats import (
    Interval,
    bootstrap_mean,
    by_prompt,
    jackknife,
    mean_interval,
    paired_difference,
    share_interval,
    wilson,
    win_rate,
)

SETS = 600


def covered(draw, truth, n):
    """How many of SETS intervals of n values hold the truth, and how often they lie above and below it."""
    found = [bootstrap_mean(draw(n), resamples=1000) for _ in range(SETS)]
    inside = [interval.low <= truth <= interval.high for interval in found]
    above, below = (
        sum(interval.low > truth for interval in found) / SETS,
        sum(interval.high < truth for interval in found) / SETS,
    )
    return sum(inside) / SETS, above, below


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10, 30])  # Student's interval for the first three
def test_the_bootstrap_covers_a_normal_mean_95_times_in_100(n):
    rng = random.Random(n)
    share, above, below = covered(lambda n: [rng.gauss(3, 2) for _ in range(n)], 3, n)
    assert share == pytest.approx(0.95, abs=0.022)  # two and a half standard errors of 600 sets
    assert above == pytest.approx(0.025, abs=0.017)
    assert below == pytest.approx(0.025, abs=0.017)


@pytest.mark.parametrize(("n", "least"), [(8, 0.87), (16, 0.90), (64, 0.92)])
def test_the_bootstrap_covers_a_skewed_mean_nearly_as_often(n, least):
    """Exponential scores; and at least as often as Student's symmetric interval, which is what a ± would be."""
    rng, hits, student_hits = random.Random(n), 0, 0
    for _ in range(SETS):
        values = [rng.expovariate(1) for _ in range(n)]
        hits += not bootstrap_mean(values, resamples=1000).excludes(1)
        mean, half = mean_interval(values)
        student_hits += abs(mean - 1) <= half
    assert least <= hits / SETS <= 0.97
    assert hits >= student_hits


def test_intervals_of_a_difference_over_prompts_with_seeds_cover_it():
    """Three seeds of a prompt share its effect: 95 % holds only if whole prompts are drawn again."""
    rng, hits, naive = random.Random(5), 0, 0
    prompts = [p for p in range(16) for _ in range(3)]
    for _ in range(SETS):
        effect = [rng.gauss(0.5, 1) for _ in range(16)]  # how much a gains on each prompt
        hard = [rng.gauss(0, 5) for _ in range(16)]  # which both share, and pairing takes out
        b = [hard[p] + rng.gauss(0, 0.2) for p in prompts]
        a = [hard[p] + effect[p] + rng.gauss(0, 0.2) for p in prompts]
        hits += not paired_difference(a, b, prompts, resamples=1000).excludes(0.5)
        naive += not paired_difference(a, b, resamples=1000).excludes(0.5)
    assert hits / SETS == pytest.approx(0.95, abs=0.022)
    assert naive / SETS < 0.80


def test_a_paired_win_rate_with_a_known_truth():
    """a - b = 0.5 + noise of deviation 1, so a wins with probability Phi(0.5); ties count half.

    Rounded to whole numbers there are ties: a wins if the difference is above 0.5, and wins half if it is above -0.5.
    """
    truth, rng, hits, ties = NormalDist().cdf(0.5), random.Random(6), 0, 0
    with_ties = (NormalDist().cdf(0.0) + NormalDist().cdf(1.0)) / 2
    for _ in range(SETS):
        b = [rng.gauss(0, 3) for _ in range(40)]
        a = [value + rng.gauss(0.5, 1) for value in b]
        found = win_rate(a, b, resamples=1000)
        hits += not found.excludes(truth)
        assert 0 <= found.low <= found.value <= found.high <= 1
        whole = [float(round(x - y)) for x, y in zip(a, b, strict=True)]
        ties += not win_rate(whole, [0.0] * 40, resamples=1000).excludes(with_ties)
    assert hits / SETS == pytest.approx(0.95, abs=0.022)
    assert ties / SETS == pytest.approx(0.95, abs=0.03)
    a, b = [1, 2, 3, 4], [1, 1, 4, 4]
    assert win_rate(a, b).value == 0.5  # tie, win, loss, tie
    assert win_rate(a, b, less=True).value == 0.5
    assert win_rate([1, 2], [1, 1]).value == 0.75
    assert win_rate([1, 2], [1, 1], less=True).value == 0.25


def test_seeds_of_a_prompt_are_one_vote():
    found = win_rate([2, 2, 2, 0, 1], [1, 1, 1, 1, 1], ["p", "p", "p", "q", "r"])
    assert found.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert by_prompt([1, 3, 5], ["a", "b", "a"]) == [3, 3]


def test_a_clean_sweep_is_no_certainty():
    """n of n won: Wilson's interval instead of a bootstrap that cannot lose. A tie among them is no plain share."""
    found = win_rate([1.0] * 12, [0.0] * 12)
    theirs = scipy_stats.binomtest(12, 12).proportion_ci(0.95, "wilson")
    assert (found.value, found.low, found.high) == (1, pytest.approx(theirs.low), 1)
    lost = win_rate([0.0] * 12, [1.0] * 12)
    assert (lost.value, lost.low, lost.high) == (0, 0, pytest.approx(1 - theirs.low))
    mixed = win_rate([1.0] * 11 + [0.0], [0.0] * 12)  # 11 wins, a tie
    assert mixed == bootstrap_mean([1.0] * 11 + [0.5])


def test_equal_shares_are_no_certainty():
    """Two of three votes on each of n prompts: as wide as Wilson's interval of as many prompts won."""
    for n in (2, 4, 9):
        found, theirs = share_interval([2 / 3] * n), wilson(2 * n / 3, n)
        assert (found.value, found.low, found.high) == (pytest.approx(2 / 3), theirs.low, theirs.high)
    assert not share_interval([2 / 3] * 2).excludes(0.5)
    nine = scipy_stats.binomtest(6, 9).proportion_ci(0.95, "wilson")
    assert share_interval([2 / 3] * 9).low == pytest.approx(nine.low)
    assert share_interval([0.5] * 3) == wilson(1.5, 3)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 8])
@pytest.mark.parametrize(("a", "b"), [(None, None), (2, 2), (0.9, 0.6)])
def test_few_shares_cover(n, a, b):
    """Three votes on each of n prompts, independent ones of a coin, or with a prompt's own leaning (a beta law)."""
    rng, held, blind = random.Random(n), 0, 0
    truth = 0.5 if a is None else a / (a + b)
    for _ in range(SETS):
        leanings = [0.5 if a is None else rng.betavariate(a, b) for _ in range(n)]
        means = sorted(fmean(rng.random() < p for _ in range(3)) for p in leanings)
        held += not share_interval(means, resamples=1000).excludes(truth)
        blind += means[0] > truth or means[-1] < truth
    assert held / SETS >= (0.95 if n < 6 else 0.88)
    assert n >= 6 or blind / SETS > 0.05  # what no resample can cover


def test_against_scipys_bca():
    """The interval before the widening by Student's t: equal to scipy's to the noise of the draws, at many values."""
    values = np.random.default_rng(2).gamma(2, size=400)
    found = bootstrap_mean(values.tolist(), resamples=9999)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=0).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.05 * found.half)
    assert found.high == pytest.approx(theirs.high, abs=0.05 * found.half)


def test_the_same_arguments_give_the_same_numbers_and_another_seed_others():
    rng = random.Random(1)
    values = [*(rng.random() for _ in range(9)), 3.0]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)
    scaled = bootstrap_mean([100 + 7 * value for value in values])
    plain = bootstrap_mean(values)
    for scaled_end, end in zip(
        (scaled.value, scaled.low, scaled.high), (plain.value, plain.low, plain.high), strict=True
    ):
        assert scaled_end == pytest.approx(100 + 7 * end)
    wide = bootstrap_mean(values, confidence=0.99)
    assert wide.low < plain.low < plain.high < wide.high


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0], [2.0]])
def test_what_has_no_interval(values):
    found = bootstrap_mean(values)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.excludes(0)
    assert math.isnan(mean_interval(values)[1])
    assert math.isnan(win_rate([math.nan, 1], [0, 0]).value)


def test_equal_values_have_no_width():
    assert bootstrap_mean([0.1] * 7) == Interval(value=pytest.approx(0.1), low=pytest.approx(0.1), high=0.1)


def test_the_jackknife_of_a_mean_is_students_interval():
    rng = random.Random(3)
    values = [rng.random() for _ in range(12)]
    without = [fmean(values[:i] + values[i + 1 :]) for i in range(12)]
    mean, half = mean_interval(values)
    found = jackknife(mean, without)
    assert (found.low, found.high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert math.isnan(jackknife(1.0, [1.0]).low)
    assert math.isnan(jackknife(1.0, [1.0, math.nan]).low)


def test_the_jackknife_covers_the_expected_vendi_score():
    """Sets of 24 pictures in 6 noisy clusters: the mean Vendi score of such sets lies within 95 % of the intervals."""
    import torch

    from rewardtune.diversity import vendi

    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:6]

    def draw():
        rows = torch.randint(6, (24,), generator=generator)
        return centres[rows] + 0.2 * torch.randn(24, 8, generator=generator)

    truth = fmean(vendi(draw()) for _ in range(300))
    hits = 0
    for _ in range(80):
        features = draw()
        without = [vendi(torch.cat([features[:i], features[i + 1 :]])) for i in range(24)]
        hits += not jackknife(vendi(features), without).excludes(truth)
    assert hits / 80 >= 0.9


def test_wilson_of_nothing_and_of_all():
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)
    theirs = scipy_stats.binomtest(9, 10).proportion_ci(0.95, "wilson")
    assert (wilson(9, 10).low, wilson(9, 10).high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
