"""Means with Student's confidence intervals, without scipy."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def student(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence for `freedom` degrees of freedom.

    Exact for 1 and 2; above that the Cornish-Fisher series: at 95% within 0.2%, at 99.9% within 0.3% from 6 on.
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
    """(mean, half the width of its interval) of independent values; the half is NaN for a single one."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), student(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))
