"""Intervals and paired comparisons: Student's t for a mean, the bootstrap over prompts, the jackknife. Without scipy.

Prompts are the independent draws, seeds are not: several pictures of a prompt are averaged first, and whole prompts are
drawn again. An interval speaks of other prompts of the same kind; it knows nothing of other training seeds.
numpy is imported where it is used: rules are read without it.

Sources: Efron 1987, "Better bootstrap confidence intervals" (BCa); Hesterberg 2015, "What teachers should know about
the bootstrap", section 4.3 (percentiles widened by Student's t: without that a dozen prompts cover 90 % for 95 %).
Left out: corrections for many comparisons (the pages that show many say so; a family takes a higher `confidence`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Any

RESAMPLES = 4000
LEAST = 6  # values: of fewer, all lie on one side of the truth more than 5 times in 100, and no resample leaves them
FEW = 12  # prompts: below, tests/test_stats.py finds less than 93 % coverage for skewed scores


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value between the ends of its interval; the ends are NaN where there is none (a single prompt, a NaN)."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside; never without an interval."""
        return self.low > value or self.high < value


def student(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence for `freedom` degrees of freedom.

    Exact for 1 and 2; above that the Cornish-Fisher series, which is too small: at 95 % by at most 0.2 %; at 99 % by
    0.8 % for 3 and below 0.3 % from 4 on; at 99.9 % by 4 % for 3 and below 0.3 % from 6 on.
    """
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    if freedom == 2:
        return math.sqrt(2 / (1 / confidence**2 - 1))
    z, v = NormalDist().inv_cdf(0.5 + confidence / 2), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half the width of its Student's interval) of independent values.

    The half is NaN for a single value; both are for none, and where one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), student(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def wilson(hits: float, n: int, *, confidence: float = 0.95) -> Interval:
    """The share hits / n of independent outcomes with its Wilson score interval; of none: NaN, from 0 to 1.

    Where outcomes are themselves shares from 0 to 1 (hits: their sum) it is too wide: they vary less than 0 and 1 do.
    """
    if n == 0:
        return Interval(value=math.nan, low=0.0, high=1.0)
    p, z = hits / n, NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    denominator = 1 + z * z / n
    low, high = (centre - half) / denominator, (centre + half) / denominator
    return Interval(value=p, low=min(max(0.0, low), p), high=max(min(1.0, high), p))  # to rounding at 0 and 1


def by_prompt(values: Sequence[float], prompts: Sequence[Hashable]) -> list[float]:
    """One value for each prompt, the mean over its pictures, prompts in the order in which they first occur."""
    groups: dict[Hashable, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        groups.setdefault(prompt, []).append(value)
    return [fmean(group) for group in groups.values()]


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of independent values (one for each prompt) with its BCa interval, widened for few values.

    Student's interval for fewer than LEAST of them. Equal arguments give equal numbers. Values that are all equal give
    an interval of no width.
    """
    import numpy as np

    if not values or not all(map(math.isfinite, values)):
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    n, mean = len(values), fmean(values)
    if n < 2:
        return Interval(value=mean, low=math.nan, high=math.nan)
    x = np.asarray(values, dtype=np.float64)
    apart = x - mean
    spread = float((apart**2).sum())
    if spread <= 1e-24 * n * max(1.0, mean**2):
        return Interval(value=mean, low=mean, high=mean)
    if n < LEAST:
        half = mean_interval(values, confidence=confidence)[1]
        return Interval(value=mean, low=mean - half, high=mean + half)
    drawn = np.sort(_draws(n, resamples, seed) @ apart) / n  # means of the resamples, less the mean
    below = float((drawn < 0).mean() + (drawn == 0).mean() / 2)
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    skew = float((apart**3).sum()) / (6 * spread**1.5)  # the acceleration of a mean, by the jackknife
    wide = math.sqrt(n / (n - 1)) * student(confidence, n - 1)
    ends = []
    for z in (-wide, wide):
        tilt = 1 - skew * (bias + z)
        level = normal.cdf(bias + (bias + z) / tilt) if tilt > 0 else float(z > 0)
        ends.append(mean + float(np.quantile(drawn, level)))
    return Interval(value=mean, low=ends[0], high=ends[1])


@lru_cache(maxsize=8)
def _draws(n: int, resamples: int, seed: int) -> Any:
    """(resamples, n): how often each of n values is in each resample. The same draws serve every metric of a set."""
    import numpy as np

    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of a - b, picture by picture (same prompt, same seed), with its bootstrap interval over prompts."""
    apart = [first - second for first, second in zip(a, b, strict=True)]
    means = by_prompt(apart, range(len(apart)) if prompts is None else prompts)
    return bootstrap_mean(means, confidence=confidence, resamples=resamples, seed=seed)


def win_rate(
    a: Sequence[float],
    b: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    *,
    less: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The share of pairs in which a's picture has more than b's (less of it, with `less`), a tie counting half.

    With the interval of `share_interval` over prompts, within [0, 1].
    """
    sign = -1 if less else 1
    wins = [_win(sign * first, sign * second) for first, second in zip(a, b, strict=True)]
    means = by_prompt(wins, range(len(wins)) if prompts is None else prompts)
    return share_interval(means, confidence=confidence, resamples=resamples, seed=seed)


def share_interval(
    means: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of shares won from 0 to 1, one for each prompt: the bootstrap, or Wilson's where that is blind.

    It is for fewer than LEAST prompts and where all shares are equal: no resample could give another. Wilson's serves
    as well where every prompt is won or lost. It is wide for few shares that are neither (`wilson`).
    """
    blind = len(means) < LEAST or len(set(means)) == 1 or set(means) <= {0.0, 1.0}
    if len(means) > 1 and blind and all(map(math.isfinite, means)):
        return wilson(math.fsum(means), len(means), confidence=confidence)
    return bootstrap_mean(means, confidence=confidence, resamples=resamples, seed=seed)


def _win(first: float, second: float) -> float:
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return 0.5 if first == second else float(first > second)


def jackknife(value: float, without: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """A number of the whole set (a Vendi score) with the interval of its leave-one-group-out values.

    without: the number without each of the groups of prompts, of about equal size. The bootstrap would not do here: a
    prompt that is drawn twice is no second picture, so every resample is less diverse than the set.
    """
    g = len(without)
    if g < 2 or not all(map(math.isfinite, (value, *without))):
        return Interval(value=value, low=math.nan, high=math.nan)
    middle = fmean(without)
    error = math.sqrt((g - 1) / g * sum((one - middle) ** 2 for one in without))
    half = student(confidence, g - 1) * error
    return Interval(value=value, low=value - half, high=value + half)
