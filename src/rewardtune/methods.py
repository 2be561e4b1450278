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
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from rewardtune.errors import ConfigError, RewardTuneError
from rewardtune.plan import Plan, check_guidance
from rewardtune.stretches import Leap, Leaps, Rescaled


@dataclass(frozen=True)
class Answers:
    """A draw of a method that answers more than which calls are trained: ``t_train``, and fields of the plan."""

    times: Iterable[int]
    fields: Mapping[str, Any]


TrainedTimes = Callable[[int, Random, int], Iterable[int] | Answers]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A law of plans. Call it: ``method(T, rng) -> Plan``.

    Attributes:
        name: as users type it.
        times: ``(T, rng, t_min) -> t_train`` in the paper's time, or `Answers`.
        input_gradient: see `Plan`.
        m: range of the early stop, t_min ~ U{1..m}; None runs every chain to its end.
        stops: how many distinct values of t_min one chain is judged at; the smallest is its end.
        renoise: chains restarted from the re-noised x_0 (DRaFT-LV's n); None starts from noise.
        kl: weight of the distance to the base model that belongs to the method (DRaFT+), added to that of the run.
        conditional_only, guidance_factor: see `Plan`.
        robust_image, robust_weights: radius of RSA-FT's worst case at the image and at the weights; 0 is none.
        settings: what the user chose, for logs.
    """

    name: str
    times: TrainedTimes = field(repr=False)
    input_gradient: float
    m: int | None
    stops: int = 1
    renoise: int | None = None
    kl: float = 0.0
    conditional_only: bool = False
    guidance_factor: float | None = None
    robust_image: float = 0.0
    robust_weights: float = 0.0
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one("m", self.m)
        _at_least_one("stops", self.stops, none=False)
        if self.stops > (self.m or 1):
            raise ConfigError(f"stops={self.stops} distinct stops need m >= {self.stops}, got m={self.m}")
        if not 0.0 <= self.input_gradient <= 1.0:
            raise ConfigError(f"{self.name}: input_gradient={self.input_gradient} is outside 0 .. 1")
        for name in ("kl", "robust_image", "robust_weights"):
            _not_negative(name, getattr(self, name))
        check_guidance(self.conditional_only, self.guidance_factor)

    @property
    def passes(self) -> int:
        """How often an update's gradient is computed: RSA-FT's worst case at the weights takes a second one."""
        return 2 if self.robust_weights else 1

    def __call__(self, T: int, rng: Random) -> Plan:
        """Draw a plan for a chain of ``T`` steps (Algorithm 1, lines 2-10).

        Raises:
            ConfigError: if K or m does not fit into T, and for whatever the law raises.
        """
        if T < 1:
            raise ConfigError(f"T={T}: a chain has at least 1 step")
        _fits(self.name, "m", self.m, T if self.renoise is None else T - 1, T)
        stops = [1] if self.m is None else [rng.randint(1, self.m)]
        if self.m is not None and self.stops > 1:
            stops = sorted(rng.sample(range(1, self.m + 1), self.stops))
        t_min, *others = stops
        try:
            drawn = self.times(T, rng, stops[-1])
            times = drawn.times if isinstance(drawn, Answers) else drawn
            trained = {t for t in times if t >= t_min} or {t_min}  # erratum 3
        except RewardTuneError:
            raise
        except Exception as error:  # whatever a user's law raises
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"method {self.name}: no steps can be drawn for T={T} ({why})") from error
        trained |= {stops[-1]} if max(trained) < stops[-1] else set()  # the same for the first of several stops
        fields: dict[str, Any] = {
            "input_gradient": self.input_gradient,
            "end": T - t_min if self.m is not None else None,
            "stops": frozenset(T - t for t in others),
            "start": T - t_min if self.renoise is not None else None,
            "draws": self.renoise or 1,
            "conditional_only": self.conditional_only,
            "guidance_factor": self.guidance_factor,
        }
        more = drawn.fields if isinstance(drawn, Answers) else {}
        return Plan(T=T, train=frozenset(T - t for t in trained), **{**fields, **more})

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.settings.items())})"


def refl(m: int = 10) -> Method:
    """ReFL (Xu et al. 2023): stop at t_min ~ U{1..m}, train that call alone, judge x0-hat.

    ReFL-10 of the DRTune paper is ``m=10`` with T=50, ReFL-20 is ``m=20``.
    """
    _at_least_one("m", m, none=False)
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
    _at_least_one("n", n, none=False)

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


def drtune(
    K: int = 5, m: int | None = 20, *, spacing: str = "chain", input_gradient: float = 0.0, stops: int = 1
) -> Method:
    """DRTune (Wu et al. 2024): K equally spaced calls with detached input, early stop at t_min ~ U{1..m}.

    Good values are K = 0.1 T and m = 0.4 T (section 4.2); ``m=None`` switches the early stop off.
    ``spacing="chain"``: Algorithm 1, equally spaced in 1..T. ``"executed"``: equally spaced in t_min..T, so that
    none of them is cut off. ``"random"``: K distinct steps of 1..T (the paper's comparison).
    ``stops``: x0-hats of one chain that are judged, at distinct t_min of 1..m, their gradients averaged (ours, not the
    paper's): the expectation of one stop with less noise, for the price of decoding and judging them. Not quite, where
    no drawn call lies before the earliest of the stops and the one there is trained instead (erratum 3; K or T is small
    then): that one counts for the later stops too. With ``"executed"`` the calls are spaced before the earliest of the
    stops, and so lie earlier than those of one stop.
    """
    _at_least_one("K", K, none=False)

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
    made = _method("drtune", times, input_gradient, m, K=K, spacing=spacing)
    return made if stops == 1 else replace(made, stops=stops, settings={**made.settings, "stops": stops})


# Newer methods, in steps i = T - t, as a plan counts ------------------------------------------------------------------


def draft_plus(K: int | None = 1, *, kl: float = 0.1, input_gradient: float = 1.0, m: int | None = None) -> Method:
    """DRaFT+ (NVIDIA NeMo-Aligner, 2024): DRaFT-K + kl * mean((F - F_ref)^2) at the trained calls.

    The distance to the base model is the one of ``regularize.kl`` (docs/regularize.md) and adds to it. NeMo puts the
    term on the steps that are trained, as we do; its weight there depends on the reward's scale, so choose your own.
    """
    base = draft(K, input_gradient=input_gradient, m=m)
    return replace(base, name="draft_plus", kl=kl, settings={**base.settings, "kl": kl})


def flowbp_sparse(K: int = 4, *, late_bias: float = 1.0, rho: float = 0.5) -> Method:
    """FlowBP-Sparse (Wang et al. 2026): K calls drawn near the image, input detached, the reward sees the real x_0.

    K distinct steps, drawn one after the other with p_i proportional to (i + 1)^late_bias. Their gradient is multiplied
    by g = 1 + rho (sum_all |dsigma| / sum_trained |dsigma| - 1): rho = 1 makes up for the steps that are not trained.
    Defaults: the authors' settings for SD3.5-M with 25 steps. Other schedules than flow matching: `stretches.py`.
    """
    _at_least_one("K", K, none=False)
    _within("late_bias", late_bias, 0, 50)
    _not_negative("rho", rho)

    def times(T: int, rng: Random, t_min: int) -> Answers:
        _fits("flowbp_sparse", "K", K, T, T)
        steps = _late_biased(range(T), K, late_bias, rng)
        return _in_steps(T, steps, weight=Rescaled(rho))

    settings = {"K": K, "late_bias": late_bias, "rho": rho}
    return Method(name="flowbp_sparse", times=times, input_gradient=0.0, m=None, settings=settings)


def flowbp_bridge(K: int = 5, *, alpha: float = 0.5, late_bias: float = 4.0, rho: float = 0.0) -> Method:
    """FlowBP-Bridge (Wang et al. 2026): Sparse on both sides of a call j that hands alpha of the gradient on.

    j is the later of two distinct steps drawn uniformly. Of the K calls a share j / T lies before j, at least one; the
    others after it, j itself among them. All inputs are detached but j's: alpha x_j + (1 - alpha) sg(x_j).
    Defaults: the authors' settings for SD3.5-M with 25 steps.
    """
    if not isinstance(K, int) or K < 2:
        raise ConfigError(f"K={K!r}: legal are whole numbers K >= 2, one call on each side of the bridge")
    _within("alpha", alpha, 0, 1)
    _within("late_bias", late_bias, 0, 50)
    _not_negative("rho", rho)

    def times(T: int, rng: Random, t_min: int) -> Answers:
        _fits("flowbp_bridge", "K", K, T, T)
        j = max(rng.sample(range(T), 2))
        before = min(max(round(K * j / T), 1, K - (T - j)), j, K - 1)
        steps = [
            *_late_biased(range(j), before, late_bias, rng),
            j,
            *_late_biased(range(j + 1, T), K - before - 1, late_bias, rng, origin=j + 1),
        ]
        return _in_steps(T, steps, weight=Rescaled(rho), linked=frozenset({j}))

    settings = {"K": K, "alpha": alpha, "late_bias": late_bias, "rho": rho}
    return Method(name="flowbp_bridge", times=times, input_gradient=alpha, m=None, settings=settings)


def leapalign(alpha: float = 0.3, *, tau: float | None = 0.1) -> Method:
    """LeapAlign (Liang et al., CVPR 2026): two calls k and j, the gradient leaps from k to j and from j to the image.

        x^_j = x_k + (s_j - s_k) F(x_k),  x_j' = x^_j + sg(x_j - x^_j)
        x^_0 = x_j' - s_j F(alpha x_j' + (1 - alpha) sg(x_j')),  the reward sees x^_0 + sg(x_0 - x^_0)

    s is sigma; k < j are two distinct steps, uniform. Pictures weigh 1 / (max(d_j, tau) + max(d_0, tau)), d being the
    mean absolute error of each leap; ``tau=None`` weighs them alike. Schedules beyond flow matching: `stretches.py`.
    """
    _within("alpha", alpha, 0, 1)
    _positive_or_none("tau", tau)

    def times(T: int, rng: Random, t_min: int) -> Answers:
        k, j = sorted(rng.sample(range(_two("leapalign", T)), 2))
        leaps = Leaps((Leap(j, (k,)), Leap(T, (j,))), tau=tau)
        return _in_steps(T, (k, j), weight=leaps, linked=frozenset({j}))

    settings = {"alpha": alpha, "tau": tau}
    return Method(name="leapalign", times=times, input_gradient=alpha, m=None, settings=settings)


def flowbp_lagrange(
    alpha: float = 0.1, *, order: int = 3, other: float = 0.25, tau: float | None = 0.2, latest: float = 0.4
) -> Method:
    """FlowBP-Lagrange (Wang et al. 2026): LeapAlign whose leaps integrate the velocities of several steps.

    Each leap is the integral of the Lagrange polynomial through F at `order` steps of it, evenly spaced, its first and
    last step included (fewer where it is shorter). Trained are its first step and the second support, whose gradient is
    scaled by `other`; only j's input hands a gradient on, scaled by alpha. The chain's T steps are cut into
    [k's past, k to j, j to the end] by Dirichlet(2, 6, 2.5), the last two at least 1 step each, and j is at
    most latest * T steps before the end. Pictures weigh as in LeapAlign. Defaults: the authors' for SD3.5-M, 25 steps.
    """
    _within("alpha", alpha, 0, 1)
    _within("latest", latest, 0, 1)
    _at_least_one("order", order, none=False)
    _not_negative("other", other)
    _positive_or_none("tau", tau)

    def times(T: int, rng: Random, t_min: int) -> Answers:
        k, j = _cut_by_dirichlet(_two("flowbp_lagrange", T), latest, rng)
        leaps = Leaps((Leap(j, _spread(k, j, order)), Leap(T, _spread(j, T, order))), other=other, tau=tau)
        steps = [i for leap in leaps.leaps for i in leap.supports[:2]]
        return _in_steps(T, steps, weight=leaps, linked=frozenset({j}))

    settings = {"alpha": alpha, "order": order, "other": other, "tau": tau, "latest": latest}
    return Method(name="flowbp_lagrange", times=times, input_gradient=alpha, m=None, settings=settings)


def srpo() -> Method:
    """SRPO's Direct-Align (Shen et al. 2025): one call anywhere in the chain, x_0 recovered with the known noise.

    The finished, detached x_0 is noised to a step s ~ U{1..T-1} with the chain's own first noise; the sampler takes
    that step with a trained call; the noise that is left is known and taken off: x_0 = (x_{s+1} - sigma noise) / alpha.
    So the picture stays close to the real one at any s. Samplers that add noise or take several calls a step are
    refused: what they leave is not that noise.
    SRPO's reward, (1 + k) r(image, positive prompt) - r(image, negative prompt), is `rewards.relative`.
    Not taken over: jumps over more than a step, the discount by s, the inverted branch.
    """

    def times(T: int, rng: Random, t_min: int) -> Answers:
        s = rng.randint(1, _two("srpo", T) - 1)
        return _in_steps(T, (s,), start=s, end=s, known_noise=True)

    return Method(name="srpo", times=times, input_gradient=0.0, m=None)


def rsa_ft(method: Method, *, image: float = 1e-2, weights: float = 1e-2) -> Method:
    """RSA-FT (CVPR 2026): any method, with the gradient taken at the worst case nearby, for the image and the weights.

    The reward is asked at I - image * g / ||g||, g = dr/dI, the norm over each picture. The update's gradient is taken
    at theta + weights * G / ||G||, G being the gradient of the loss over all trained weights: a second pass over the
    same plan and noise, so an update costs twice as much. 0 switches either off.
    """
    for name, value in (("image", image), ("weights", weights)):
        _not_negative(name, value)
    if image == weights == 0:
        raise ConfigError("rsa_ft: image=0 and weights=0 leave nothing of it: set one of them above 0, or leave it out")
    settings = {**method.settings, "rsa_image": image, "rsa_weights": weights}
    return replace(method, robust_image=image, robust_weights=weights, settings=settings)


def conditional_only(method: Method, *, factor: float | None = None) -> Method:
    """Any method, with the gradient through the conditional branch of guidance alone; the same pictures.

    Under F = F_u + w (F_c - F_u) the gradient through F_c is w times that of F_c, and `factor` multiplies it. None
    compensates: 1 / w, as if F moved as F_c does. With 1 it is the plain partial derivative, w times as large.
    """
    settings = {**method.settings, "conditional_only": "compensated" if factor is None else factor}
    return replace(method, conditional_only=True, guidance_factor=factor, settings=settings)


ALL: dict[str, Callable[..., Method]] = {
    "refl": refl,
    "draft": draft,
    "draft_lv": draft_lv,
    "alignprop": alignprop,
    "drtune": drtune,
    "draft_plus": draft_plus,
    "flowbp_sparse": flowbp_sparse,
    "flowbp_bridge": flowbp_bridge,
    "flowbp_lagrange": flowbp_lagrange,
    "leapalign": leapalign,
    "srpo": srpo,
}


def _method(name: str, times: TrainedTimes, input_gradient: float, m: int | None, **settings: object) -> Method:
    shown = {**settings, "m": m, "input_gradient": input_gradient}
    return Method(name=name, times=times, input_gradient=input_gradient, m=m, settings=shown)


def _in_steps(T: int, steps: Iterable[int], **fields: Any) -> Answers:
    """Trained steps i, and fields of the plan."""
    return Answers([T - i for i in steps], fields)


def _late_biased(steps: range, count: int, bias: float, rng: Random, *, origin: int = 0) -> list[int]:
    """`count` distinct steps, each drawn among those left with probability proportional to (i - origin + 1)^bias."""
    left = list(steps)
    drawn: list[int] = []
    for _ in range(count):
        drawn.append(rng.choices(left, [(i - origin + 1) ** bias for i in left])[0])
        left.remove(drawn[-1])
    return sorted(drawn)


def _spread(start: int, target: int, count: int) -> tuple[int, ...]:
    """At most `count` steps of start .. target - 1, evenly spaced, both ends included, `start` first."""
    last = target - 1 - start
    if last + 1 <= count:
        return tuple(range(start, target))
    return tuple(dict.fromkeys(start + round(n * last / (count - 1)) for n in range(count))) if count > 1 else (start,)


def _cut_by_dirichlet(T: int, latest: float, rng: Random) -> tuple[int, int]:
    """k < j of FlowBP-Lagrange: T - j, j - k and k are the parts of a Dirichlet draw, rounded."""
    drawn = [rng.gammavariate(a, 1.0) for a in (2.5, 6.0, 2.0)]
    end, gap, _ = (max(1, round(T * x / sum(drawn))) for x in drawn)
    end = min(end, max(1, round(latest * T)), T - 1)
    return max(0, T - end - gap), T - end


def _two(method: str, T: int) -> int:
    if T < 2:
        raise ConfigError(f"{method}: T={T}, but a chain of at least 2 steps is needed")
    return T


def _not_negative(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={value!r}: legal are numbers of 0 or more")


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: legal are numbers from {low} to {high}")


def _positive_or_none(name: str, value: float | None) -> None:
    if value is not None:
        _not_negative(name, value)
        if value == 0:
            raise ConfigError(f"{name}=0: legal are numbers above 0, and null for none")


def _choose(what: str, given: str, legal: Mapping[str, TrainedTimes]) -> TrainedTimes:
    if given not in legal:
        raise ConfigError(f"{what}={given!r} is unknown: legal are {', '.join(legal)}")
    return legal[given]


def _at_least_one(name: str, value: int | None, *, none: bool = True) -> None:
    if value is None and none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: legal are whole numbers {name} >= 1")


def _fits(method: str, name: str, value: int | None, limit: int, T: int) -> None:
    if value is not None and value > limit:
        raise ConfigError(
            f"{method}: {name}={value} does not fit into the T={T} steps of this sampler: legal is 1 .. {limit}; "
            f"lower {name} or raise the number of sampling steps"
        )
