"""A claim of the paper, our figure, the spread over seeds, and the verdict: holds, fails, or cannot be told here.

Runs are paired by seed (the same prompts and noise in training and in the final pictures), so the interval is
Student's over the differences of seeds, at 95 %. Written before the results were seen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from ..progress import digits
from ..stats import mean_interval
from ..tables import markdown_table

Verdict = Literal["holds", "fails", "cannot be told here", "not run"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    says: str
    figure: str = ""
    spread: str = ""
    verdict: Verdict = "not run"

    def cells(self) -> list[str]:
        return [self.says, self.figure, self.spread, self.verdict]


HEADINGS = ["claim", "here", "95 % interval over seeds", "verdict"]
JUDGED = (
    "Each claim is judged by itself at 95 %: of twenty about nothing, one would get a verdict. To be the best *holds*",
    "where it is above every rival at 95 %, and *fails* where it is below one at 95 % for the whole family; the",
    "interval shown is that of the best rival alone, so it may exclude 0 beside *cannot be told here*.",
)


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """The lines of a page: the table of the claims, and how they are judged."""
    return [markdown_table(HEADINGS, [claim.cells() for claim in claims]), "", *JUDGED]


def better(says: str, ours: Sequence[float], theirs: Sequence[float], *, less: bool, names: tuple[str, str]) -> Claim:
    """`ours` is better than `theirs`, both by seed in one order; less: smaller is better.

    No seed: not run; one seed: told as what it is, and no verdict.
    """
    n = min(len(ours), len(theirs))
    if n == 0:
        return Claim(says=says)
    gains = [(b - a if less else a - b) for a, b in zip(ours, theirs, strict=False)]
    mean, half = mean_interval(gains)
    figure = f"{names[0]} {digits(sum(ours[:n]) / n)}, {names[1]} {digits(sum(theirs[:n]) / n)}"
    if n < 2:
        return Claim(says=says, figure=figure, spread="one seed", verdict="cannot be told here")
    verdict: Verdict = "holds" if mean - half > 0 else "fails" if mean + half < 0 else "cannot be told here"
    return Claim(says=says, figure=figure, spread=f"gain {digits(mean)} ± {digits(half)} ({n} seeds)", verdict=verdict)


def best(
    says: str, ours: Mapping[int, float], rivals: Mapping[str, Mapping[int, float]], *, less: bool, name: str
) -> Claim:
    """`ours` is better than each rival; values by seed. One rival that was not run leaves the claim "not run".

    holds: above every rival at 95 % (all have to be beaten, so no correction is due). fails: below one of them, at
    95 % for the whole family (Bonferroni). Shown: the best of the rivals.
    """
    if not ours or not rivals or not all(ours.keys() & values.keys() for values in rivals.values()):
        return Claim(says=says)
    gains = {
        rival: [(values[seed] - ours[seed]) * (1 if less else -1) for seed in sorted(ours.keys() & values.keys())]
        for rival, values in rivals.items()
    }
    strongest = min(gains, key=lambda rival: (math.isnan(mean := fmean(gains[rival])), mean))
    common = sorted(ours.keys() & rivals[strongest].keys())
    told = better(
        says,
        [ours[seed] for seed in common],
        [rivals[strongest][seed] for seed in common],
        less=less,
        names=(name, f"the best other, {strongest},"),
    )
    if min(map(len, gains.values())) < 2:
        return replace(told, verdict="cannot be told here")
    intervals = [mean_interval(values) for values in gains.values()]
    family = [mean_interval(values, confidence=1 - 0.05 / len(rivals)) for values in gains.values()]
    verdict: Verdict = (
        "holds" if all(mean - half > 0 for mean, half in intervals)
        else "fails" if any(mean + half < 0 for mean, half in family)
        else "cannot be told here"
    )  # fmt: skip
    return replace(told, verdict=verdict)
