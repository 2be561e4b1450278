"""What a run did to its eval pictures, in numbers and in words: paired changes, the verdict, the worst pictures.

Everything is paired: same prompt, same seed, before and after. Intervals are over prompts (`stats.py`); they know
nothing of other training seeds, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..guards import ACROSS, METRICS, Evaluation, Metric
from ..progress import digits
from ..stats import Interval, paired_difference, win_rate
from .read import RunData

WORST = 6  # pictures shown for each metric
_ANY = Metric(what="")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One metric before and after. difference: after - before; won: the share of pictures that are better after.

    Both are NaN for metrics of the whole set (Vendi score), which have no value for a picture.
    """

    metric: str
    better: str
    role: str
    before: float
    after: float
    difference: Interval
    won: Interval | None
    prompts: int

    @property
    def sign(self) -> int:
        """1: certainly better, -1: certainly worse, 0: cannot be told (or neither is better)."""
        if not self.better or not self.difference.excludes(0) or METRICS.get(self.metric, _ANY).zero:
            return 0  # training moves the pictures away from the base's: that alone is no loss
        return 1 if (self.difference.value > 0) == (self.better == "more") else -1

    @property
    def share(self) -> float:
        """The change as a share of the value before; NaN where that is 0."""
        return (self.after - self.before) / abs(self.before) if self.before else math.nan


def changes(run: RunData) -> dict[str, Change]:
    """Every metric that was measured before and after: trained ones first, then held out, then the guards'."""
    if run.before is None or run.after is None:
        return {}
    order = ("trained", "held_out", "guard")
    names = [name for name in run.after.values if name in run.before.values and name in run.measures]
    names.sort(key=lambda name: (order.index(run.measures[name].role), name != "reward"))
    return {name: change(run, name, run.before, run.after) for name in names}


def change(run: RunData, metric: str, before: Evaluation, after: Evaluation) -> Change:
    """The paired change of one metric between two looks of a run."""
    measure = run.measures[metric]
    a, b = after.pictures.get(metric, []), before.pictures.get(metric, [])
    difference = Interval(value=after.values[metric] - before.values[metric], low=math.nan, high=math.nan)
    won = None
    prompts = after.prompts[: len(a)]
    if a and len(a) == len(b) == len(prompts):
        difference = paired_difference(a, b, prompts)
        won = win_rate(a, b, prompts, less=measure.better == "less") if measure.better else None
    return Change(
        metric=metric,
        better=measure.better,
        role=measure.role,
        before=before.values[metric],
        after=after.values[metric],
        difference=difference,
        won=won,
        prompts=len(set(after.prompts)),
    )


def value(number: float) -> str:
    """A number for people; a dash where there is none."""
    if not math.isfinite(number):
        return "–"
    return digits(0.0 if abs(number) < 1e-12 else number).replace("-", "−")  # 1e-17 is a rounded 0


def signed(number: float) -> str:
    """A change, in three significant digits."""
    rounded = float(f"{number:.3g}") if math.isfinite(number) else number
    return f"+{digits(rounded)}" if rounded > 1e-12 else value(rounded)


def with_ends(found: Interval) -> str:
    """`+0.12 (0.05 to 0.19)`; the value alone where there is no interval."""
    if not math.isfinite(found.low):
        return signed(found.value)
    return f"{signed(found.value)} ({signed(found.low)} to {signed(found.high)})"


def percent(found: Interval) -> str:
    """`88 % (53 to 98 %)`."""
    if not math.isfinite(found.value):
        return "–"
    ends = f" ({100 * found.low:.0f} to {100 * found.high:.0f}\u00a0%)" if math.isfinite(found.low) else ""
    return f"{100 * found.value:.0f}\u00a0%{ends}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """mood: good, mixed, bad, unclear (nothing can be told yet); a headline and the sentences that bear it out."""

    mood: str
    headline: str
    sentences: tuple[str, ...]


def verdict(run: RunData, found: dict[str, Change]) -> Verdict:
    """What happened to this run's pictures, with intervals, and what must not be concluded."""
    if run.before is None:
        return _unclear(run, "Nothing has been looked at yet.")
    if "reward" not in found or run.after is None:
        return _unclear(run, "Only the untuned model has been looked at so far.")
    if run.after.step == 0:
        return _unclear(run, "The untuned model is kept: no look at the tuned one was better.")
    reward = found["reward"]
    held = [one for one in found.values() if one.role == "held_out"]
    worse = [one.metric for one in held if one.sign < 0]
    if reward.sign == 0:
        mood, headline = "unclear", f"No change of the reward can be told from the noise over {_prompts(reward)}."
    elif reward.sign < 0:
        mood, headline = "bad", "The trained reward fell."
    elif worse:
        mood, headline = "mixed", f"The reward rose, and {_and(worse)}, never trained on, got worse."
    elif held:
        tail = "got worse" if any(one.sign == 0 for one in held) else "followed it or got better"
        mood = "good"
        headline = "The reward rose, and no held-out reward " + (
            "certainly got worse." if tail == "got worse" else "got worse: all improved."
        )
    else:
        mood, headline = "mixed", "The reward rose; nothing that was not trained on was scored beside it."
    sentences = [_sentence(one, first=one is reward) for one in (reward, *held)]
    parts = [one for one in found.values() if one.role == "trained" and one is not reward and not _same(one, reward)]
    sentences += [_sentence(one) for one in parts]
    sentences += [_set_sentence(found[name]) for name in ACROSS[:1] if name in found]
    return Verdict(mood=mood, headline=headline, sentences=(*sentences, *_caveats(run, reward, held)))


def _unclear(run: RunData, headline: str) -> Verdict:
    return Verdict(mood="unclear", headline=headline, sentences=tuple(_caveats(run, None, [])))


def _same(part: Change, reward: Change) -> bool:
    return part.before == reward.before and part.after == reward.after


def _prompts(one: Change) -> str:
    return f"{one.prompts} prompt{'s' if one.prompts != 1 else ''}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(one: Change, *, first: bool = False) -> str:
    d = one.difference
    certain = one.better and d.excludes(0)
    verb = ("rose" if d.value > 0 else "fell") if certain else "went" if d.value else "stayed"
    name = {"reward": "The trained reward"}.get(one.metric, f"{one.metric} ({_ROLE[one.role]})")
    text = f"{name} {verb} from {value(one.before)} to {value(one.after)}: {signed(d.value)}"
    if math.isfinite(d.low):
        paired = f", paired over {_prompts(one)}" if first else ""
        text += f", 95 % interval {signed(d.low)} to {signed(d.high)}{paired}"
        if not d.excludes(0):
            text += ", which holds 0"
    if one.won is not None and math.isfinite(one.won.value):
        text += f"; better in {percent(one.won)} of the pairs"
    return text + (", less is better." if one.better == "less" else ".")


_ROLE = {"trained": "trained on", "held_out": "held out", "guard": "guard"}


def _set_sentence(one: Change) -> str:
    return (
        f"Diversity ({one.metric}) went from {value(one.before)} to {value(one.after)}, {signed(100 * one.share)} %; "
        "it is a number of the whole set and has no interval here."
    )


def _caveats(run: RunData, reward: Change | None, held: Sequence[Change]) -> list[str]:
    said = []
    if run.running:
        said.append("The run is under way: all this may change.")
    if reward is not None and not held:
        said.append(
            "No held-out reward was measured, so this shows that the optimisation worked and not that the pictures "
            "are better: look at them, and set guards.rewards."
        )
    if reward is not None and reward.prompts < 16:
        said.append(f"{_prompts(reward)[:1].upper()}{_prompts(reward)[1:]} are few: the intervals are rough.")
    if reward is not None:
        said.append("Intervals are over prompts; other training seeds could give another result.")
    return said


def falls(run: RunData, metric: str) -> list[tuple[int, float]]:
    """(picture, how much worse it is after, > 0), the worst first; empty for metrics without a direction."""
    before, after = run.before, run.after
    better = run.measures[metric].better if metric in run.measures else ""
    if before is None or after is None or not better:
        return []
    sign = -1 if better == "more" else 1
    pairs = zip(after.pictures.get(metric, ()), before.pictures.get(metric, ()), strict=False)
    losses = [(index, sign * (now - was)) for index, (now, was) in enumerate(pairs)]
    return sorted((pair for pair in losses if pair[1] > 0), key=lambda pair: -pair[1])


def agree(a: RunData, b: RunData) -> bool:
    """Whether the eval pictures of two runs have the same prompts and seeds, and the same base model.

    The seeds derive from the run's seed and the picture's index; that the untuned pictures measure the same
    shows that everything else (model, sampling) is the same too.
    """
    if a.before is None or b.before is None or list(a.prompts) != list(b.prompts) or not a.prompts:
        return False
    if a.facts.get("seed") != b.facts.get("seed"):
        return False
    mine, theirs = a.before.pictures.get("brightness"), b.before.pictures.get("brightness")
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    return all(abs(x - y) < 1e-3 for x, y in zip(mine, theirs, strict=True))


def duel(a: RunData, b: RunData) -> dict[str, tuple[Interval, Interval]]:
    """metric -> (a - b, share of pictures by which a is better), of what both measured the same way."""
    first, second = a.after, b.after
    if first is None or second is None:
        return {}
    found = {}
    for name, measure in a.measures.items():
        other = b.measures.get(name)
        mine, theirs = first.pictures.get(name), second.pictures.get(name)
        if name == "reward" and a.facts.get("reward") != b.facts.get("reward"):
            continue  # totals of different rewards
        if not measure.better or other is None or other.better != measure.better or not mine or not theirs:
            continue
        if len(mine) == len(theirs) and name not in ("base_distance", "base_pixels"):
            prompts = first.prompts
            rate = win_rate(mine, theirs, prompts, less=measure.better == "less")
            found[name] = (paired_difference(mine, theirs, prompts), rate)
    return found
