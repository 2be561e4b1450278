"""The published methods: each draws a `Plan` from ``(T, rng)``, as Algorithm 1 of the paper.

Below, the paper's time is used: t = T is the noisiest step, t = 1 the last; ``U{a..b}`` is uniform on integers, both
ends included. Every published method is one function from ``(T, rng, t_min)`` to ``t_train``; `Method` adds
what they share: the early stop, the gradient at the input, the translation to step indices.

Errata of the DRTune paper that this file settles (each has its test):

1. Algorithm 1, line 5 prints ``s = randint(1, T - K*floor(T/K))``: empty for the paper's own T=50, K=5 and always 1
   for T=25, K=3. We draw ``s ~ U{1 .. T-(K-1)*floor(T/K)}``, all starts for which the K steps fit.
2. Section 3.2 lists K+1 trained steps, Algorithm 1 has K: K.
3. Trained steps below t_min never run (T=50, K=5, m=20: 4.05 of 5 on average). ``spacing="executed"`` places the K
   steps inside t_min..T instead. If none would run, t_min itself is trained.
4. Equation 5 holds between differentials. The gradient goes the other way, dL/dx_t = (prod_{s<=t} a_s) dL/dx_0:
   early steps are amplified by 1/a-products for VP schedules and untouched for flow matching.
5. Line 2 as printed trains AlignProp's noisy end; the text and both public codes train the end near the image.
6. Lines 23-24 descend the reward. Here higher is better for every reward; symmetry and its like are negated.
7. Section 4.1 says DRTune runs "without early termination"; Algorithm 1 and section 3.2 stop early. Early stop is the
   default here and ``m=None`` switches it off.
8. The stop gradient depends on what the network predicts: we detach the input of the network's raw output F, not of a
   converted epsilon (same images, other gradients for v-prediction and flow models).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random

from rewardtune.errors import ConfigError
from rewardtune.plan import Plan

TrainedTimes = Callable[[int, Random, int], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A law of plans. Call it: ``method(T, rng) -> Plan``.

    Attributes:
        name: as users type it.
        times: ``(T, rng, t_min) -> t_train`` in the paper's time.
        input_gradient: see `Plan`.
        m: range of the early stop, t_min ~ U{1..m}; None runs every chain to its end.
        renoise: chains restarted from the re-noised x_0 (DRaFT-LV's n); None starts from noise.
        settings: what the user chose, for logs.
    """

    name: str
    times: TrainedTimes = field(repr=False)
    input_gradient: float
    m: int | None
    renoise: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one("m", self.m)
        if not 0.0 <= self.input_gradient <= 1.0:
            raise ConfigError(f"{self.name}: input_gradient={self.input_gradient} is outside 0 .. 1")

    def __call__(self, T: int, rng: Random) -> Plan:
        """Draw a plan for a chain of ``T`` steps (Algorithm 1, lines 2-10).

        Raises:
            ConfigError: if K or m does not fit into T.
        """
        if T < 1:
            raise ConfigError(f"T={T}: a chain has at least 1 step")
        _fits(self.name, "m", self.m, T if self.renoise is None else T - 1, T)
        t_min = rng.randint(1, self.m) if self.m is not None else 1
        trained = {t for t in self.times(T, rng, t_min) if t >= t_min} or {t_min}  # erratum 3
        return Plan(
            T=T,
            train=frozenset(T - t for t in trained),
            input_gradient=self.input_gradient,
            end=T - t_min if self.m is not None else None,
            start=T - t_min if self.renoise is not None else None,
            draws=self.renoise or 1,
        )

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.settings.items())})"


def refl(m: int = 10) -> Method:
    """ReFL (Xu et al. 2023): stop at t_min ~ U{1..m}, train that call alone, judge x0-hat.

    ReFL-10 of the DRTune paper is ``m=10`` with T=50, ReFL-20 is ``m=20``.
    """
    return Method(name="refl", times=lambda T, rng, t_min: {t_min}, input_gradient=0.0, m=m, settings={"m": m})


def draft(K: int | None = 1, *, input_gradient: float = 1.0, m: int | None = None) -> Method:
    """DRaFT-K (Clark et al. 2023): train the last K calls with full back-propagation. ``K=None`` is DRaFT-T."""
    _at_least_one("K", K)

    def times(T: int, rng: Random, t_min: int) -> Iterable[int]:
        _fits("draft", "K", K, T, T)
        return range(1, (K or T) + 1)

    return _method("draft", times, input_gradient, m, K="T" if K is None else K)


def draft_lv(n: int = 2, *, m: int | None = None) -> Method:
    """DRaFT-LV (Clark et al. 2023): the last call, from the finished x_0 re-noised n times; gradients averaged.

    With ``m`` the chains restart at t_min ~ U{1..m} instead of the last step and are judged by x0-hat.
    """
    _at_least_one("n", n)

    def times(T: int, rng: Random, t_min: int) -> Iterable[int]:
        if T < 2:
            raise ConfigError(f"draft_lv: T={T}, but a chain of at least 2 steps is needed to re-noise x_0")
        return {t_min}

    settings: dict[str, object] = {"n": n} if m is None else {"n": n, "m": m}
    return Method(name="draft_lv", times=times, input_gradient=0.0, m=m, renoise=n, settings=settings)


def alignprop(law: str = "per_step", *, input_gradient: float = 1.0, m: int | None = None) -> Method:
    """AlignProp (Prabhudesai et al. 2023): a random half of the calls, those near the image more often.

    ``law="per_step"``: step i is trained with probability (i+1)/(T+1), independently (its first release and TRL).
    ``law="per_chain"``: one k ~ U{1..T} per batch, the last k calls (DRTune's Algorithm 1, erratum 5).
    """

    def per_step(T: int, rng: Random, t_min: int) -> Iterable[int]:
        return [T - i for i in range(T) if rng.random() < (i + 1) / (T + 1)]

    def per_chain(T: int, rng: Random, t_min: int) -> Iterable[int]:
        return range(1, rng.randint(1, T) + 1)

    times = _choose("law", law, {"per_step": per_step, "per_chain": per_chain})
    return _method("alignprop", times, input_gradient, m, law=law)


def drtune(K: int = 5, m: int | None = 20, *, spacing: str = "chain", input_gradient: float = 0.0) -> Method:
    """DRTune (Wu et al. 2024): K equally spaced calls with detached input, early stop at t_min ~ U{1..m}.

    Good values are K = 0.1 T and m = 0.4 T (section 4.2); ``m=None`` switches the early stop off.
    ``spacing="chain"``: Algorithm 1, equally spaced in 1..T. ``"executed"``: equally spaced in t_min..T, so that
    none of them is cut off. ``"random"``: K distinct steps of 1..T (the paper's comparison).
    """
    _at_least_one("K", K)

    def equally_spaced(first: int, last: int, k: int, rng: Random) -> Iterable[int]:
        gap = (last - first + 1) // k
        s = rng.randint(first, last - (k - 1) * gap)  # erratum 1
        return [s + i * gap for i in range(k)]

    def chain(T: int, rng: Random, t_min: int) -> Iterable[int]:
        _fits("drtune", "K", K, T, T)
        return equally_spaced(1, T, K, rng)

    def executed(T: int, rng: Random, t_min: int) -> Iterable[int]:
        _fits("drtune", "K", K, T, T)
        return equally_spaced(t_min, T, min(K, T - t_min + 1), rng)

    def random(T: int, rng: Random, t_min: int) -> Iterable[int]:
        _fits("drtune", "K", K, T, T)
        return rng.sample(range(1, T + 1), K)

    times = _choose("spacing", spacing, {"chain": chain, "executed": executed, "random": random})
    return _method("drtune", times, input_gradient, m, K=K, spacing=spacing)


ALL: dict[str, Callable[..., Method]] = {
    "refl": refl,
    "draft": draft,
    "draft_lv": draft_lv,
    "alignprop": alignprop,
    "drtune": drtune,
}


def _method(name: str, times: TrainedTimes, input_gradient: float, m: int | None, **settings: object) -> Method:
    shown = {**settings, "m": m, "input_gradient": input_gradient}
    return Method(name=name, times=times, input_gradient=input_gradient, m=m, settings=shown)


def _choose(what: str, given: str, legal: Mapping[str, TrainedTimes]) -> TrainedTimes:
    if given not in legal:
        raise ConfigError(f"{what}={given!r} is unknown: legal are {', '.join(legal)}")
    return legal[given]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name}={value!r}: legal are whole numbers {name} >= 1")


def _fits(method: str, name: str, value: int | None, limit: int, T: int) -> None:
    if value is not None and value > limit:
        raise ConfigError(
            f"{method}: {name}={value} does not fit into the T={T} steps of this sampler: legal is 1 .. {limit}; "
            f"lower {name} or raise the number of sampling steps"
        )
