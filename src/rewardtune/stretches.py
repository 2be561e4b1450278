"""How much each trained call weighs: by the stretch of the noise level that it stands for.

An Euler step adds ``(u_{i+1} - u_i) F_i`` to the latent, u being the level in which the network's output is the
velocity: sigma for flow matching, sigma / alpha for epsilon, the angle atan(sigma / alpha) for v-prediction. A
surrogate path that lets F_i stand for another stretch h_i (a leap over many steps, a point of a quadrature) has the
chain's own gradient with that call's times what the surrogate adds over what the chain adds: pictures stay those of
the real chain, only this factor changes. Where the surrogate also keeps another share of the latent than the chain
does (v-prediction: a leap turns it), the gradient on the latent's own way is multiplied once in each leap.

The rules below are frozen data that a plan carries; the engine asks them when the chain has told its levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rewardtune.prediction import Span

    #: Latent x and raw network output F of a step (after guidance), constants.
    State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rescaled:
    """FlowBP's ``g = 1 + rho (sum over all steps |du| / sum over trained steps |du| - 1)``, the same for each call.

    rho = 0 leaves the calls as they are, 1 makes up for all that is not trained.
    """

    rho: float

    def factors(self, spans: Sequence[Span], train: Sequence[int]) -> dict[int, float]:
        """The factor of each trained step."""
        lengths = [abs(span.length) for span in spans]
        g = 1 + self.rho * (sum(lengths) / sum(lengths[i] for i in train) - 1)
        return dict.fromkeys(train, g)

    def of_pictures(self, spans: Sequence[Span], states: Sequence[State], final: Tensor) -> Tensor | None:
        """Weight of each picture (B,); None is 1."""
        return None

    def carries(self, spans: Sequence[Span]) -> dict[int, float]:
        """Factors on the gradient of the latent as it enters a step, beside the network's; here none."""
        return {}


@dataclass(frozen=True)
class Leap:
    """From step `start` to `target` (T is the end of the chain) at once, by the velocities of the steps `supports`.

    The integral is that of the Lagrange polynomial through the supports; one support is a step of the sampler as long
    as the leap. The first is `start` itself.
    """

    target: int
    supports: tuple[int, ...]

    @property
    def start(self) -> int:
        """The step at which it begins."""
        return self.supports[0]

    def landing(self, spans: Sequence[Span]) -> tuple[float, dict[int, float]]:
        """It lands on ``a x + sum of b_i F_i``, x being the latent at `start`: (a, {support: b})."""
        first, last = spans[self.start], spans[self.target - 1]
        if len(self.supports) == 1:
            a, b = first.across(last.end, last.end_scale)
            return a, {self.start: b}
        stretches = _lagrange([spans[i].start for i in self.supports], first.start, last.end)
        moves = {i: h / last.end_scale for i, h in zip(self.supports, stretches, strict=True)}
        return first.start_scale / last.end_scale, moves

    def error(self, spans: Sequence[Span], states: Sequence[State], final: Tensor) -> Tensor:
        """Mean absolute difference (B,) between where the leap lands and the chain's own latent there."""
        keeps, moves = self.landing(spans)
        landed = keeps * states[self.start][0].double()
        for i, b in moves.items():
            landed = landed + b * states[i][1].double()
        real = final if self.target == len(spans) else states[self.target][0]
        return (landed - real.double()).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Leaps:
    """A path of leaps, each beginning where the one before lands; straight-through: the values are the real chain's.

    Attributes:
        leaps: in sampling order.
        other: factor on the gradient of supports that are not the start of their leap.
        tau: pictures weigh ``1 / sum of max(error of each leap, tau)``; None weighs them alike.
    """

    leaps: tuple[Leap, ...]
    other: float = 1.0
    tau: float | None = None

    def factors(self, spans: Sequence[Span], train: Sequence[int]) -> dict[int, float]:
        """The factor of each trained step."""
        found: dict[int, float] = {}
        for leap in self.leaps:
            for i, b in leap.landing(spans)[1].items():
                share = 1.0 if i == leap.start else self.other
                found[i] = share * b / (spans[i].step[1] * _kept(spans[i + 1 : leap.target]))
        return {i: found[i] for i in train}

    def carries(self, spans: Sequence[Span]) -> dict[int, float]:
        """Factors on the gradient of the latent as it enters the first step of a leap, beside the network's."""
        return {leap.start: leap.landing(spans)[0] / _kept(spans[leap.start : leap.target]) for leap in self.leaps}

    def of_pictures(self, spans: Sequence[Span], states: Sequence[State], final: Tensor) -> Tensor | None:
        """Weight of each picture (B,): those whose leaps land near the real chain count for more. None is 1."""
        if self.tau is None:
            return None
        import torch  # here: methods can be listed without it

        errors = torch.stack([leap.error(spans, states, final) for leap in self.leaps])
        return errors.clamp_min(self.tau).sum(0).reciprocal()


def _kept(spans: Sequence[Span]) -> float:
    """What the sampler keeps of the latent over these steps."""
    return math.prod(span.step[0] for span in spans)


def _lagrange(points: Sequence[float], start: float, target: float) -> list[float]:
    """Integrals from `start` to `target` of the Lagrange basis polynomials of `points`."""
    found = []
    for i, p in enumerate(points):
        coefficients = [1.0]  # of the powers 0, 1, ...
        for j, q in enumerate(points):
            if j != i:
                raised, lowered = [0.0, *coefficients], [-q * c for c in coefficients] + [0.0]
                coefficients = [(a + b) / (p - q) for a, b in zip(raised, lowered, strict=True)]
        powers = enumerate(coefficients, start=1)
        found.append(sum(c / n * (target**n - start**n) for n, c in powers))
    return found
