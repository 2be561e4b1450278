"""Guards: the rules that stop a run which hacks its reward, and what they may watch.

A `Panel` (panel.py) measures the fixed eval pictures and gives an `Evaluation`. `judge` holds a history of them against
`Rule`s and says in plain words what happened; `best_of` names the step worth keeping. Nothing here needs torch, so the
command line can read rules early.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from .errors import ConfigError
from .spelling import nearest
from .stats import by_prompt, mean_interval

Then = Literal["warn", "rollback", "stop"]  # in order of severity
BOUNDS = ("falls_by", "rises_by", "below", "above")
# Settings of the shipped rewards that leave alone what is judged: they change the gradient, the speed or the unit.
NOT_JUDGED = ("detach_std", "random_shift", "dtype", "micro_batch", "checkpointing", "scale")


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


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric as a panel measured it. better: as in `Metric`.

    role: trained (by a run), held_out, guard, or unknown: a reward on which a candidate may have been trained.
    """

    what: str
    better: str
    role: str


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
        values = self.pictures.get(metric, ())
        return by_prompt(values, self.prompts[: len(values)])

    def interval(self, metric: str) -> tuple[float, float]:
        """(value, half the width of its 95 % interval over prompts); the half is NaN for a metric of the whole set."""
        values = self.by_prompt(metric)
        return self.values[metric], mean_interval(values)[1]


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
    history: Sequence[Evaluation], rules: Sequence[Rule], *, best: int | None = None, since: int = 0, last: bool = False
) -> list[Verdict]:
    """A verdict for every rule whose bound the latest evaluation crosses; act on those that are `due`.

    history: evaluations in order, the first of them the reference (step 0). best: the step of the best checkpoint, for
    the words. since: crossings at this step and before, that led to an earlier rollback, do not count for patience.
    last: the run was rolled back as often as it may be, so a rollback stops it: `then` of those verdicts is stop.
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
            rule=replace(rule, then="stop") if last and rule.then == "rollback" else rule,
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
        verdict = _with_words(verdict, first, latest, best)
        if verdict.rule is not rule and verdict.due:
            again = "training was rolled back before and stops now"
            verdict = replace(verdict, words=verdict.words.replace("training stops", again, 1))
        verdicts.append(verdict)
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


def chosen_by(facts: Mapping[str, Any], best: str | None, steps: Iterable[int]) -> str | None:
    """The metric by which the weights of a finished run were chosen among several looks; None where they were not.

    facts: run.json. best: checkpoints.best. steps: of the looks; the one at the untuned model is no chance to win.
    """
    ended = "kept_step" in facts or facts.get("status") in ("done", "out of time")
    return best if ended and len({step for step in steps if step > 0}) > 1 else None


def paired(metric: str, latest: Evaluation, first: Evaluation) -> tuple[float, float]:
    """(mean change since `first`, half the width of its 95 % interval) over prompts; NaN where there are no pairs."""
    pairs = zip(latest.by_prompt(metric), first.by_prompt(metric), strict=True)
    changes = [after - before for after, before in pairs]
    return mean_interval(changes)


def _noise(rule: Rule, latest: Evaluation, first: Evaluation) -> tuple[float, bool | None]:
    change, half = paired(rule.metric, latest, first)
    if math.isnan(change) or math.isnan(half):
        return math.nan, None
    return half, (-change if rule.downwards else change) > half


def _both_signs(values: Sequence[float]) -> bool:
    return min(values) < 0 < max(values)


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
    """ConfigError where a reward of `guards.rewards` is trained on. Both: a run file's parts."""
    known = [judged(*reward) for reward in named_parts(trained)]
    for reward in named_parts(held_out):
        if judged(*reward) in known:
            raise ConfigError(
                f"guards.rewards: {reward[0]} is trained on, so it cannot guard; name another reward, or the same one "
                "with another model (options.model)"
            )


def bare(metric: str) -> str:
    """The reward that a metric is of: trained_clipscore and clipscore_2 are of clipscore."""
    return re.sub(r"_\d+$", "", metric.removeprefix("heldout_").removeprefix("trained_"))


def judged(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, the options by which rewards of one name differ in what they judge). An own reward's all count."""
    return name, {key: value for key, value in options.items() if ":" in name or key not in NOT_JUDGED}


def named_parts(parts: Iterable[Any], weight: float = 1.0) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, options) of every named reward in a run file's parts, groups gone through; those of weight 0 left out."""
    for part in parts:
        own = weight * part.weight
        if part.name is not None and own != 0:
            yield part.name.lower(), part.options
        for group in (part.mean_of, part.minimum_of, part.balance):
            yield from named_parts(group or (), own)
