"""How much each trained call weighs: by the stretch of the noise level that it stands for.

An Euler step adds ``(u_{i+1} - u_i) F_i`` to the latent, u being the level in which the network's output is the
velocity: sigma for flow matching, sigma / alpha for epsilon, the angle atan(sigma / alpha) for v-prediction. A
surrogate path that lets F_i stand for another stretch h_i (a leap over many steps, a point of a quadrature) has the
chain's own gradient with that call's times ``h_i / (u_{i+1} - u_i)``: pictures stay those of the real chain, only this
factor changes. For flow matching and epsilon that is the gradient of the written surrogate, exactly. For v-prediction
the latent crosses untrained steps by the sampler's own arithmetic, whose factors are near 1 and not 1.

The rules below are frozen data that a plan carries; the engine asks them when the chain has told its levels.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Leap:
    """From step `start` to `target` (T is the end of the chain) at once, by the velocities of the steps `supports`.

    The integral is that of the Lagrange polynomial through the supports; one support is an Euler step. The first is
    `start` itself.
    """

    target: int
    supports: tuple[int, ...]

    def weights(self, spans: Sequence[Span]) -> dict[int, float]:
        """h_i of each support."""
        levels = [span.start for span in spans] + [spans[-1].end]
        points = [levels[i] for i in self.supports]
        bounds = levels[self.supports[0]], levels[self.target]
        return dict(zip(self.supports, _lagrange(points, *bounds), strict=True))

    def error(self, spans: Sequence[Span], states: Sequence[State], final: Tensor) -> Tensor:
        """Mean absolute difference (B,) between where the leap lands and the chain's own latent there."""
        x, start = states[self.supports[0]][0].double(), self.supports[0]
        landed = x * spans[start].start_scale
        for i, h in self.weights(spans).items():
            landed = landed + h * states[i][1].double()
        at_end = self.target == len(spans)
        scale = spans[-1].end_scale if at_end else spans[self.target].start_scale
        real = final if at_end else states[self.target][0]
        return (landed / scale - real.double()).abs().flatten(1).mean(1)


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
            for i, h in leap.weights(spans).items():
                share = 1.0 if i == leap.supports[0] else self.other
                found[i] = share * h / spans[i].length
        return {i: found[i] for i in train}

    def of_pictures(self, spans: Sequence[Span], states: Sequence[State], final: Tensor) -> Tensor | None:
        """Weight of each picture (B,): those whose leaps land near the real chain count for more. None is 1."""
        if self.tau is None:
            return None
        import torch  # here: methods can be listed without it

        errors = torch.stack([leap.error(spans, states, final) for leap in self.leaps])
        return errors.clamp_min(self.tau).sum(0).reciprocal()


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
