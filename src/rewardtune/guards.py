"""Guards: a panel of measures that are never trained on, and the rules that stop a run which hacks its reward.

A `Panel` measures the fixed eval pictures, always against the pictures of step 0 (same prompts, same seeds), and gives
an `Evaluation`. `judge` holds a history of them against `Rule`s and says in plain words what happened; `best_of` names
the step worth keeping. Rules and verdicts need no torch, so the command line can read them early.
Left out: LPIPS (its weights belong to no package that we depend on) and FID (a panel has too few pictures for it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import ConfigError
from .intervals import mean_interval
from .spelling import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from .diversity import Features
    from .rewards import Reward

Then = Literal["warn", "rollback", "stop"]  # in order of severity
BOUNDS = ("falls_by", "rises_by", "below", "above")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a rule may watch. better: of which there should be more, or less; empty: neither.

    paired: has a value for every picture, so a change can be compared with its noise over prompts.
    zero: 0 at step 0 by definition, so a relative bound means nothing.
    """

    what: str
    better: Literal["more", "less", ""] = ""
    paired: bool = True
    zero: bool = False


METRICS = {
    "vendi": Metric(what="Vendi score over prompts, 1 to their number", better="more", paired=False),
    "pairwise_distance": Metric(what="mean 1 - cosine of two prompts' pictures", better="more", paired=False),
    "prompt_vendi": Metric(what="Vendi score of a prompt's pictures, mean over prompts", better="more"),
    "prompt_pairwise_distance": Metric(what="mean 1 - cosine of two pictures of a prompt", better="more"),
    "sharpness": Metric(what="standard deviation of the luma's Laplacian"),
    "saturation": Metric(what="mean of the largest minus the smallest channel, 0 to 1"),
    "brightness": Metric(what="mean of all pixels, 0 to 1"),
    "base_distance": Metric(what="1 - cosine to the picture of step 0", better="less", zero=True),
    "base_pixels": Metric(what="mean absolute difference to the picture of step 0, 0 to 1", better="less", zero=True),
    "black": Metric(what="number of black pictures", better="less", paired=False),
    "nan": Metric(what="number of pictures with NaN or infinite pixels", better="less", paired=False),
}
ACROSS = ("vendi", "pairwise_distance")
WITHIN = ("prompt_vendi", "prompt_pairwise_distance")
BY_FEATURES = (*ACROSS, *WITHIN, "base_distance")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a panel found at one step; plain numbers, so `asdict` and `Evaluation(**record)` carry it through JSON.

    values: metric -> mean over prompts (of the mean over a prompt's pictures), or a value of the whole set.
    pictures: paired metric -> one value for each picture. prompts: the index of each picture's prompt.
    """

    step: int
    values: dict[str, float]
    pictures: dict[str, list[float]] = field(default_factory=dict)
    prompts: list[int] = field(default_factory=list)

    def by_prompt(self, metric: str) -> list[float]:
        """One value for each prompt, the mean over its pictures; empty for a metric of the whole set."""
        groups: dict[int, list[float]] = {}
        for prompt, value in zip(self.prompts, self.pictures.get(metric, ()), strict=False):
            groups.setdefault(prompt, []).append(value)
        return [fmean(values) for values in groups.values()]

    def interval(self, metric: str) -> tuple[float, float]:
        """(value, half the width of its 95 % interval over prompts); the half is NaN for a metric of the whole set."""
        values = self.by_prompt(metric)
        return self.values[metric], _interval(values)[1]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A bound on one metric, and what to do when it is crossed.

    Exactly one of: falls_by, rises_by (shares of the value at step 0: 0.10 is 10 % of |value|), below, above (values).
    patience: so many evaluations in a row must cross it. then: stop the run, roll back to the best checkpoint, or warn.
    certain: the change since step 0 must also lie beyond its paired 95 % interval over prompts.
    A metric that is NaN crosses every bound. Raises ConfigError.
    """

    metric: str
    falls_by: float | None = None
    rises_by: float | None = None
    below: float | None = None
    above: float | None = None
    patience: int = 1
    then: Then = "stop"
    certain: bool = False

    def __post_init__(self) -> None:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"metric is {self.metric!r}; legal is the name of a metric, such as clipscore or vendi")
        if len(given) != 1:
            raise ConfigError(
                f"the rule on {self.metric} has {' and '.join(given) or 'no bound'}; legal is exactly one of "
                f"{', '.join(BOUNDS)}"
            )
        bound = getattr(self, given[0])
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise ConfigError(f"{given[0]} is {bound!r}; legal is a finite number")
        if given[0] == "falls_by" and not 0 < bound <= 1:
            raise ConfigError(
                f"falls_by is {bound!r}; legal is a share of the value at step 0, above 0 and at most 1: 0.10 is 10 % "
                "(for a value use below)"
            )
        if given[0] == "rises_by" and not bound > 0:
            raise ConfigError(f"rises_by is {bound!r}; legal is a share of the value at step 0 above 0: 0.10 is 10 %")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(f"patience is {self.patience!r}; legal is a number of evaluations in a row, 1 or more")
        if self.then not in get_args(Then):
            hint = nearest(str(self.then), get_args(Then))
            raise ConfigError(f"then is {self.then!r}{hint}; legal: {', '.join(get_args(Then))}")
        if not isinstance(self.certain, bool):
            raise ConfigError(f"certain is {self.certain!r}; legal: true, false")

    @property
    def bound(self) -> str:
        """Which of the four was given."""
        return next(name for name in BOUNDS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        """Its number."""
        return float(getattr(self, self.bound))

    @property
    def relative(self) -> bool:
        return self.bound in ("falls_by", "rises_by")

    @property
    def downwards(self) -> bool:
        """Whether a smaller value is what the rule is against."""
        return self.bound in ("falls_by", "below")

    def crossed(self, value: float, base: float) -> bool:
        """Whether `value` lies beyond the bound; base: the value at step 0. A NaN of either does."""
        if math.isnan(value) or (self.relative and math.isnan(base)):
            return True
        sign = -1.0 if self.downwards else 1.0
        if self.relative:
            return sign * (value - base) > self.limit * abs(base)
        return sign * (value - self.limit) > 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A bound that the latest evaluation crossed.

    change: value - base. half: half the width of its paired 95 % interval over prompts, NaN where there is none.
    certain: whether the change, in the direction that the rule is against, is larger than `half`; None where that
    cannot be said. row: crossings in a row. due: whether the rule acts now. words: all of it, for the log.
    """

    rule: Rule
    index: int
    step: int
    base: float
    value: float
    change: float
    half: float
    certain: bool | None
    row: int
    due: bool
    words: str


def make_rules(rows: Iterable[Mapping[str, Any] | Rule]) -> list[Rule]:
    """The rules of a run file's `guards.rules`. ConfigError listing every problem with its place."""
    rules, problems, legal = [], [], [f.name for f in fields(Rule)]
    for index, row in enumerate(rows):
        try:
            if not isinstance(row, Rule):
                unknown = [key for key in row if key not in legal] if isinstance(row, Mapping) else [str(row)]
                if unknown:
                    hint = nearest(str(unknown[0]), legal)
                    raise ConfigError(f"unknown key {unknown[0]!r}{hint}; legal here: {', '.join(legal)}")
                if "metric" not in row:
                    raise ConfigError("'metric' is missing; give the name of a metric, such as clipscore or vendi")
                row = Rule(**row)
            rules.append(row)
        except ConfigError as error:
            problems.append(f"guards.rules[{index}]: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return rules


def check_rules(rules: Sequence[Rule], metrics: Mapping[str, Metric]) -> None:
    """Before anything is sampled: ConfigError for rules on metrics that are not measured, or that cannot mean anything.

    metrics: those of `Panel.metrics()`.
    """
    problems = []
    for index, rule in enumerate(rules):
        if problem := _problem(rule, metrics):
            problems.append(f"guards.rules[{index}]: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))


def _problem(rule: Rule, metrics: Mapping[str, Metric]) -> str:
    name, metric = rule.metric, metrics.get(rule.metric)
    if metric is None:
        if name in WITHIN:
            why = "it needs guards.features (a CLIP) and at least two pictures of every eval prompt"
        elif name in METRICS:
            why = "it needs guards.features (a CLIP: hub id, folder or `playground`)"
        else:
            why = f"legal: {', '.join(metrics)}; a held-out reward is named in guards.rewards"
        return f"metric {name!r} is not measured{nearest(name, metrics)}; {why}"
    if metric.zero and rule.relative:
        return f"{name} is 0 at step 0, so {rule.bound} means nothing; use above"
    if {"more": "rises_by", "less": "falls_by"}.get(metric.better) == rule.bound:
        other = "rises_by" if rule.downwards else "falls_by"
        return f"{rule.bound} on {name}, of which {metric.better} is better, would act on an improvement; use {other}"
    if rule.certain and not metric.paired:
        return f"{name} has no value for each picture, so no change of it is certain; leave certain out"
    return ""


def check_start(rules: Sequence[Rule], first: Evaluation) -> None:
    """After step 0 and before the first update: ConfigError for rules that would act at once or at random.

    That is a metric that is NaN or already beyond its bound, and a relative bound on a value that is 0 or cannot be
    told from 0 (prompts of both signs, and a 95 % interval over prompts that holds 0), a share of which is noise.
    """
    problems = []
    for index, rule in enumerate(rules):
        value, half = first.interval(rule.metric)
        if math.isnan(value):
            problem = f"{rule.metric} is NaN at step 0{_broken(first)}: mend that before training"
        elif rule.relative and (value == 0 or (abs(value) <= half and _both_signs(first.by_prompt(rule.metric)))):
            noise = "" if math.isnan(half) else f" ± {half:.2g}"
            problem = (
                f"{rule.metric} is {value:.4g}{noise} at step 0, which cannot be told from 0, so {rule.bound} means "
                "nothing; use below or above, or more eval prompts"
            )
        elif rule.crossed(value, value):
            problem = (
                f"{rule.metric} is {value:.4g} at step 0, already {rule.bound} {rule.limit:g}; choose another bound"
            )
        else:
            continue
        problems.append(f"guards.rules[{index}]: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))


def judge(
    history: Sequence[Evaluation], rules: Sequence[Rule], *, best: int | None = None, since: int = 0
) -> list[Verdict]:
    """A verdict for every rule whose bound the latest evaluation crosses; act on those that are `due`.

    history: evaluations in order, the first of them the reference (step 0). best: the step of the best checkpoint, for
    the words. since: crossings at this step and before, that led to an earlier rollback, do not count for patience.
    """
    first, latest = history[0], history[-1]
    verdicts = []
    for index, rule in enumerate(rules):
        if latest is first or not rule.crossed(latest.values[rule.metric], first.values[rule.metric]):
            continue
        row = 0
        for evaluation in reversed([past for past in history[1:] if past.step > since]):
            if not violates(rule, evaluation, first):
                break
            row += 1
        base, value = first.values[rule.metric], latest.values[rule.metric]
        half, certain = _noise(rule, latest, first)
        verdict = Verdict(
            rule=rule,
            index=index,
            step=latest.step,
            base=base,
            value=value,
            change=value - base,
            half=half,
            certain=certain,
            row=row,
            due=row >= rule.patience,
            words="",
        )
        verdicts.append(_with_words(verdict, first, latest, best))
    return verdicts


def action(verdicts: Sequence[Verdict]) -> Then | None:
    """What to do now: the most severe `then` of the rules that are due, or None."""
    order = get_args(Then)
    return max((v.rule.then for v in verdicts if v.due), key=order.index, default=None)


def violates(rule: Rule, evaluation: Evaluation, first: Evaluation) -> bool:
    """Whether this evaluation alone crosses the bound, beyond the noise where the rule asks for that."""
    value = evaluation.values[rule.metric]
    if not rule.crossed(value, first.values[rule.metric]):
        return False
    return not rule.certain or math.isnan(value) or _noise(rule, evaluation, first)[1] is not False


def best_of(history: Sequence[Evaluation], metric: str, rules: Sequence[Rule] = (), *, less: bool = False) -> int:
    """The step of the largest `metric` (of the smallest, with `less`) among the evaluations that violate no rule.

    Of equals the earliest. Where none is left, the step of the first evaluation: the untuned model.
    Raises ConfigError for a metric that was not measured.
    """
    first = history[0]
    if metric not in first.values:
        hint = nearest(metric, first.values)
        raise ConfigError(
            f"checkpoints.best: metric {metric!r} is not measured{hint}; legal: {', '.join(first.values)}"
        )
    sign = -1.0 if less else 1.0
    fit = [
        evaluation
        for evaluation in history
        if not math.isnan(evaluation.values[metric])
        and not any(violates(rule, evaluation, first) for rule in rules if evaluation is not first)
    ]
    return max(fit, key=lambda evaluation: sign * evaluation.values[metric], default=first).step


def paired(metric: str, latest: Evaluation, first: Evaluation) -> tuple[float, float]:
    """(mean change since `first`, half the width of its 95 % interval) over prompts; NaN where there are no pairs."""
    pairs = zip(latest.by_prompt(metric), first.by_prompt(metric), strict=True)
    changes = [after - before for after, before in pairs]
    return _interval(changes)


def _noise(rule: Rule, latest: Evaluation, first: Evaluation) -> tuple[float, bool | None]:
    change, half = paired(rule.metric, latest, first)
    if math.isnan(change) or math.isnan(half):
        return math.nan, None
    return half, (-change if rule.downwards else change) > half


def _both_signs(values: Sequence[float]) -> bool:
    return min(values) < 0 < max(values)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """mean_interval, and NaN where there is nothing or something that is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return mean_interval(values)


def _broken(evaluation: Evaluation) -> str:
    count = evaluation.values.get("nan", 0)
    return f" ({count:g} of {len(evaluation.prompts)} pictures hold NaN)" if count else ""


def _with_words(verdict: Verdict, first: Evaluation, latest: Evaluation, best: int | None) -> Verdict:
    """Such as: clipscore fell from 0.781 (step 0) to 0.64 (step 40), 18.1 %: more than the 10 % of guards.rules[0];
    training stops, best checkpoint is step 30."""
    rule, name, where = verdict.rule, verdict.rule.metric, f"guards.rules[{verdict.index}]"
    if math.isnan(verdict.value):
        what = f"{name} is NaN at step {latest.step}{_broken(latest)}, which violates {where}"
    elif rule.relative:
        moved = "fell" if rule.downwards else "rose"
        share = 100 * abs(verdict.change) / abs(verdict.base) if verdict.base else math.inf
        what = (
            f"{name} {moved} from {verdict.base:.4g} (step {first.step}) to {verdict.value:.4g} (step {latest.step}), "
            f"{share:.3g} %: more than the {100 * rule.limit:g} % of {where}"
        )
    else:
        what = (
            f"{name} is {verdict.value:.4g} at step {latest.step} ({verdict.base:.4g} at step {first.step}): "
            f"{rule.bound} the {rule.limit:g} of {where}"
        )
    kept = "" if best is None else f", best checkpoint is step {best}"
    back = "the best checkpoint" if best is None else f"step {best}, the best checkpoint"
    acts = {"stop": f"training stops{kept}", "rollback": f"training goes back to {back}", "warn": "a warning"}
    if verdict.due:
        then = acts[rule.then]
    elif verdict.row:
        then = f"{verdict.row} of {rule.patience} in a row, training goes on"
    else:
        then = "training goes on, since the rule asks for a certain change"
    noise = ""
    if verdict.certain is not None:
        beyond = "beyond" if verdict.certain else "within"
        count = len(latest.by_prompt(name))
        noise = (
            f" (change {verdict.change:+.3g}, {beyond} its 95 % interval of ± {verdict.half:.2g} over {count} prompts)"
        )
    return replace(verdict, words=f"{what}; {then}{noise}")


def check_held_out(trained: Sequence[Any], held_out: Sequence[Any]) -> None:
    """ConfigError where a reward of `guards.rewards` is trained on with the same options. Both: a run file's parts."""

    def named(parts: Iterable[Any], weight: float = 1.0) -> Iterable[tuple[str, dict[str, Any]]]:
        for part in parts:
            own = weight * part.weight
            if part.name is not None and own != 0:
                yield part.name.lower(), part.options
            for group in (part.mean_of, part.minimum_of, part.balance):
                yield from named(group or (), own)

    known = list(named(trained))
    for reward in named(held_out):
        if reward in known:
            raise ConfigError(
                f"guards.rewards: {reward[0]} is trained on, so it cannot guard; name another reward, or the same one "
                "with another model (options.model)"
            )


def luma(images: Tensor) -> Tensor:
    """(N, H, W): Rec. 601."""
    from .edits import luma

    return luma(images)[:, 0]


def sharpness(images: Tensor) -> Tensor:
    """(N,): standard deviation over pixels of the luma's 4-neighbour Laplacian, 0 to 4.

    The square root of Pech-Pacheco et al. 2000, whose variance one picture of a brick wall can lead alone. Blur and
    fading lower it, noise and ringing raise it. It depends on the size: compare pictures of one size.
    """
    y = luma(images)
    centre = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * centre
    return laplacian.flatten(1).std(dim=1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """(N,): mean over pixels of the largest minus the smallest channel (HSV's chroma), 0 for grey to 1."""
    return (images.amax(1) - images.amin(1)).mean(dim=(1, 2))


def brightness(images: Tensor) -> Tensor:
    """(N,): mean of all pixels, as the reward of that name."""
    return images.mean(dim=(1, 2, 3))


def as_saved(images: Tensor) -> Tensor:
    """float32 pictures rounded to 8 bits, as a PNG keeps them; one with NaN or infinite pixels is NaN all over."""
    import torch

    rounded = (images.detach().cpu().float().clamp(0, 1) * 255).round() / 255
    finite = torch.isfinite(images.detach().cpu()).flatten(1).all(dim=1)
    return torch.where(finite.view(-1, 1, 1, 1), rounded, torch.nan)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Measures the eval pictures of a step against those of step 0.

    Pictures are measured as they are saved, in 8 bits: the files in samples/ give the same numbers after a resume.

    prompts: of the pictures, in their order; a prompt with several seeds stands there several times.
    rewards: held out, one reward or a sum of them; each of its parts is a metric of its own, in its native value.
    trained: the reward that is trained on, measured too, so that rules and `best_of` can name it.
    features: for diversity and the distance to the base pictures; None: neither is measured.
    Names that are taken get a prefix: a held-out `clipscore` beside a trained one is `heldout_clipscore`.
    """

    prompts: Sequence[str]
    rewards: Reward | None = None
    trained: Reward | None = None
    features: Features | None = None
    batch: int = 8
    device: Any = "cpu"

    def metrics(self) -> dict[str, Metric]:
        """Every metric that an evaluation will hold, by name."""
        trained, held_out = self._names()
        found = {} if self.trained is None else {"reward": Metric(what="the trained reward, total", better="more")}
        for reward, names, what in ((self.trained, trained, "trained"), (self.rewards, held_out, "held out")):
            for name, less in _natives(reward).items():
                found[names[name]] = Metric(what=f"{name}, {what}", better="less" if less else "more")
        repeats = min(map(len, self._groups()[1]))
        for name, metric in METRICS.items():
            if name in BY_FEATURES and self.features is None:
                continue
            if (name in WITHIN and repeats < 2) or (name in ACROSS and len(set(self.prompts)) < 2):
                continue
            found[name] = metric
        return found

    def __call__(
        self, images: Tensor, *, base: Tensor, step: int, scores: Mapping[str, Tensor] | None = None
    ) -> Evaluation:
        """images, base: (N, 3, H, W) in [0, 1], of this step and of step 0, in the order of `prompts`.

        scores: of the trained reward where they are there already, as `evaluate.score` gives them; else measured here.
        A picture with NaN has NaN for a value, and so has every metric that it takes part in.
        """
        import torch

        if images.shape != base.shape or len(images) != len(self.prompts):
            raise ConfigError(
                f"a panel of {len(self.prompts)} prompts was given pictures {tuple(images.shape)} and base pictures "
                f"{tuple(base.shape)}; legal are two equal shapes (N, 3, H, W), one picture for each prompt"
            )
        images, base = as_saved(images), as_saved(base)
        broken = images.isnan().flatten(1).any(dim=1)
        trained, held_out = self._names()
        pictures: dict[str, Tensor] = {}
        if self.trained is not None:
            found = self._score(self.trained, images, ~broken) if scores is None else scores
            pictures |= {trained.get(name, name): value for name, value in found.items()}
        if self.rewards is not None:
            found = self._score(self.rewards, images, ~broken)
            pictures |= {held_out[name]: value for name, value in found.items() if name != "reward"}
            self.rewards.to("cpu")  # evaluations are rare, the device belongs to the training
        for measure in (sharpness, saturation, brightness):
            pictures[measure.__name__] = measure(images)
        pictures["base_pixels"] = (images - base).abs().mean(dim=(1, 2, 3))
        values: dict[str, float] = {}
        if self.features is not None:
            values, more = self._by_features(self.features, images, base)
            pictures |= more
        index = {prompt: place for place, prompt in enumerate(dict.fromkeys(self.prompts))}
        measured = Evaluation(
            step=step,
            values={},
            pictures={name: [float(x) for x in value] for name, value in pictures.items()},
            prompts=[index[prompt] for prompt in self.prompts],
        )
        values |= {name: fmean(measured.by_prompt(name)) for name in measured.pictures}
        values |= {"black": float((images.amax(dim=(1, 2, 3)) < 1.5 / 255).sum()), "nan": float(torch.sum(broken))}
        return Evaluation(
            step=step,
            values={name: values[name] for name in self.metrics() if name in values},
            pictures=measured.pictures,
            prompts=measured.prompts,
        )

    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        """native name -> metric, of the trained reward (with its total) and of the held-out ones."""
        taken = {*METRICS, "reward"}
        trained = {name: f"trained_{name}" if name in taken else name for name in _natives(self.trained)}
        taken |= set(trained.values())
        held_out = {name: f"heldout_{name}" if name in taken else name for name in _natives(self.rewards)}
        return trained, held_out

    def _groups(self) -> tuple[list[list[int]], list[list[int]]]:
        from .diversity import across, within

        return across(self.prompts), within(self.prompts)

    def _score(self, reward: Reward, images: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """evaluate.score on the pictures without NaN; NaN for the others."""
        import torch

        from . import evaluate

        rows = whole.nonzero().flatten().tolist()
        found = {name: torch.empty(0) for name in ("reward", *_natives(reward))}
        if rows:
            prompts = [self.prompts[row] for row in rows]
            found = evaluate.score(reward, images[rows], prompts, batch=self.batch, device=self.device)
        spread = {name: torch.full((len(images),), torch.nan) for name in found}
        for name, value in found.items():
            spread[name][rows] = value
        return spread

    def _by_features(
        self, network: Features, images: Tensor, base: Tensor
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """(values of the whole set, values of each picture) that need features."""
        import torch
        import torch.nn.functional as F

        from .diversity import mean_over, pairwise_distance, vendi

        network.to(self.device)
        found, reference = (_finite_features(network, pictures, self.batch) for pictures in (images, base))
        network.to("cpu")
        measures: tuple[Callable[[Tensor], float], ...] = (vendi, pairwise_distance)
        across, within = self._groups()
        metrics = self.metrics()
        values = {
            name: mean_over(across, found, measure)
            for name, measure in zip(ACROSS, measures, strict=True)
            if name in metrics
        }
        pictures = {"base_distance": 1 - F.cosine_similarity(found.double(), reference.double(), dim=1)}
        for name, measure in zip(WITHIN, measures, strict=True):
            if name in metrics:
                pictures[name] = torch.empty(len(images), dtype=torch.float64)
                for group in within:
                    pictures[name][group] = measure(found[group])
        return values, pictures


def _finite_features(network: Features, images: Tensor, batch: int) -> Tensor:
    """(N, D); NaN for a picture with NaN, which would else reach its whole batch in some networks."""
    import torch

    whole = ~images.isnan().flatten(1).any(dim=1)
    found = network(torch.where(whole.view(-1, 1, 1, 1), images, 0.0), batch=batch)
    return torch.where(whole[:, None], found, torch.nan)


def _natives(reward: Reward | None) -> dict[str, bool]:
    """The native values that a reward logs, by name -> whether less of it is better."""
    from .rewards.base import leaves, unique_names

    if reward is None:
        return {}
    found: dict[int, tuple[Reward, bool]] = {}
    for weight, part in reward.terms:
        for leaf, _ in leaves(part):
            found.setdefault(id(leaf), (leaf, leaf.minimise != (weight < 0)))
    names = unique_names(leaf for leaf, _ in found.values())
    return dict(zip(names, (less for _, less in found.values()), strict=True))
