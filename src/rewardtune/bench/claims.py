"""A claim of the paper, our figure, the spread over seeds, and the verdict: holds, fails, or cannot be told here.

Runs are paired by seed (the same prompts and noise in training and in the final pictures), so the interval is
Student's over the differences of seeds, at 95 %. Written before the results were seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..progress import digits
from ..stats import mean_interval

Verdict = Literal["holds", "fails", "cannot be told here", "not run"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    says: str
    figure: str = ""
    spread: str = ""
    verdict: Verdict = "not run"

    def cells(self) -> list[str]:
        return [self.says, self.figure, self.spread, self.verdict]


HEADINGS = ["claim of the paper", "here", "95 % interval over seeds", "verdict"]


def better(
    says: str, ours: Sequence[float], theirs: Sequence[float], *, less: bool, names: tuple[str, str], needs: int = 2
) -> Claim:
    """`ours` is better than `theirs`, both by seed in one order; less: smaller is better.

    Fewer than `needs` seeds: not run, or told as what they are, and no verdict.
    """
    n = min(len(ours), len(theirs))
    if n == 0:
        return Claim(says=says)
    gains = [(b - a if less else a - b) for a, b in zip(ours, theirs, strict=False)]
    mean, half = mean_interval(gains)
    figure = f"{names[0]} {digits(sum(ours[:n]) / n)}, {names[1]} {digits(sum(theirs[:n]) / n)}"
    if n < needs:
        return Claim(says=says, figure=figure, spread="one seed", verdict="cannot be told here")
    verdict: Verdict = "holds" if mean - half > 0 else "fails" if mean + half < 0 else "cannot be told here"
    return Claim(says=says, figure=figure, spread=f"gain {digits(mean)} ± {digits(half)} ({n} seeds)", verdict=verdict)
