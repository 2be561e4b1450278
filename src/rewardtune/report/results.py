"""What a run did to its eval pictures, in numbers and in words: paired changes, the verdict, the worst pictures.

Everything is paired: same prompt, same seed, before and after. Intervals are over prompts (`stats.py`); they know
nothing of other training seeds, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..guards import ACROSS, METRICS, WITHIN, Evaluation, Measure, Metric
from ..progress import digits
from ..stats import FEW, Interval, paired_difference, win_rate
from .read import RunData

WORST = 6  # pictures shown for each metric
FALL = 0.05  # of the Vendi score, which has no interval: from here on the verdict names it
SHIFT = 0.1  # of a picture statistic, beyond its interval: from here on the verdict tells it
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
    looks: int = 1  # among which the weights were chosen by this metric: its interval holds for all of them at once

    @property
    def lost(self) -> bool:
        """Whether it was a number before and is none after."""
        return math.isfinite(self.before) and not math.isfinite(self.after)

    @property
    def sign(self) -> int:
        """1: certainly better, -1: certainly worse or lost, 0: cannot be told (or neither is better)."""
        if self.better and self.lost:
            return -1
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
    looks = _chosen_among(run, measure, metric)
    if a and len(a) == len(b) == len(prompts):
        confidence = 1 - 0.05 / looks  # Bonferroni: the best of several looks at noise would rise too often else
        difference = paired_difference(a, b, prompts, confidence=confidence)
        sided = measure.better and not METRICS.get(metric, _ANY).zero  # untuned pictures have 0: none is nearer
        won = win_rate(a, b, prompts, less=measure.better == "less", confidence=confidence) if sided else None
    return Change(
        metric=metric,
        better=measure.better,
        role=measure.role,
        before=before.values[metric],
        after=after.values[metric],
        difference=difference,
        won=won,
        prompts=len(set(after.prompts)),
        looks=looks,
    )


def _chosen_among(run: RunData, measure: Measure, metric: str) -> int:
    """How many looks among which the kept weights were chosen by this metric, or by the total that it is part of."""
    by = run.chosen_by
    whole = by in run.measures and run.measures[str(by)].role == measure.role == "trained"
    return sum(look.step > 0 for look in run.looks) if metric == by or whole else 1


def value(number: float) -> str:
    """A number for people; a dash where there is none."""
    if not math.isfinite(number):
        return "–"
    return digits(0.0 if abs(number) < 1e-12 else number).replace("-", "−")  # 1e-17 is a rounded 0


def signed(number: float) -> str:
    """A change, in three significant digits."""
    rounded = float(f"{number:.3g}") if math.isfinite(number) else number
    return f"+{value(rounded)}" if rounded > 1e-12 else value(rounded)


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
    parts = [one for one in found.values() if one.role == "trained" and one is not reward and not _same(one, reward)]
    lost = [*_held_words(one for one in held if one.sign < 0), *_cost_words(found, parts)]
    if reward.sign == 0:
        mood = "mixed" if lost else "unclear"
        told = [f"No change of the reward can be told from the noise over {_prompts(reward)}", *lost]
    elif reward.sign < 0:
        mood, told = "bad", [f"The trained reward {'can no longer be measured' if reward.lost else 'fell'}", *lost]
    elif not held:
        mood, told = "mixed", ["The reward rose; nothing that was not trained on was scored beside it", *lost]
    else:
        mood, first = "good" if any(one.sign for one in held) and not lost else "mixed", _held_words(held)
        told = [f"The reward rose, and {first[0]}", *first[1:], *_cost_words(found, parts)]
    sentences = [_sentence(one, first=one is reward) for one in (reward, *held, *parts)]
    sentences += [_set_sentence(found[name]) for name in ACROSS[:1] if name in found]
    sentences += _shifts(found)
    caveats = _caveats(run, reward, held)
    return Verdict(mood=mood, headline="; ".join(told) + ".", sentences=(*sentences, *caveats))


def _held_words(held: Iterable[Change]) -> list[str]:
    """What became of held-out rewards, those that got worse first; the first clause says what they are."""
    by_sign: dict[int, list[str]] = {-2: [], -1: [], 1: [], 0: []}
    for one in held:
        by_sign[-2 if one.lost else one.sign].append(one.metric)
    words = {-1: "{} got worse", 1: "{} got better", 0: "no change of {} can be told"}
    words |= {-2: "{} can no longer be measured"}
    named = [(words[sign], joined(names)) for sign, names in by_sign.items() if names]
    apart = ", never trained on,"
    return [text.format(names + (apart if place == 0 else "")) for place, (text, names) in enumerate(named)]


def _cost_words(found: Mapping[str, Change], parts: Iterable[Change]) -> list[str]:
    """What the total hides: parts of the reward that certainly got worse, and diversity where it fell."""
    worse = [one.metric for one in parts if one.sign < 0]
    words = [f"{joined(worse)}, {'a part' if len(worse) == 1 else 'parts'} of the reward, got worse"] if worse else []
    vendi = found.get("vendi")
    if vendi is not None and vendi.lost:
        words.append("diversity can no longer be measured")
    elif vendi is not None and vendi.share <= -FALL:
        words.append(f"diversity fell by {-100 * vendi.share:.2g}\u00a0%")
    worse = [name for name in WITHIN if name in found and found[name].sign < 0]
    return words + (["pictures of one prompt became more alike"] if worse else [])


def _shifts(found: Mapping[str, Change]) -> list[str]:
    """Picture statistics that certainly moved far; neither way is better, but a jump can be what the reward liked."""
    moved = [
        f"{one.metric} {signed(100 * one.share)}\u00a0%"
        for one in found.values()
        if one.role == "guard" and not one.better and one.difference.excludes(0) and abs(one.share) >= SHIFT
    ]
    return [f"The look changed: {joined(moved)}."] if moved else []


def _unclear(run: RunData, headline: str) -> Verdict:
    return Verdict(mood="unclear", headline=headline, sentences=tuple(_caveats(run, None, [])))


def _same(part: Change, reward: Change) -> bool:
    return part.before == reward.before and part.after == reward.after


def _prompts(one: Change) -> str:
    return f"{one.prompts} prompt{'s' if one.prompts != 1 else ''}"


def joined(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(one: Change, *, first: bool = False) -> str:
    d = one.difference
    if one.lost:
        name = "The trained reward" if one.metric == "reward" else f"{one.metric} ({_ROLE[one.role]})"
        return f"{name} was {value(one.before)} and can no longer be measured (NaN or infinite)."
    certain = one.better and d.excludes(0)
    verb = ("rose" if d.value > 0 else "fell") if certain else "went" if d.value else "stayed"
    name = {"reward": "The trained reward"}.get(one.metric, f"{one.metric} ({_ROLE[one.role]})")
    text = f"{name} {verb} from {value(one.before)} to {value(one.after)}: {signed(d.value)}"
    if math.isfinite(d.low):
        paired = f", paired over {_prompts(one)}" if first else ""
        wider = f" for the best of {one.looks} looks" if one.looks > 1 else ""
        text += f", 95 % interval{wider} {signed(d.low)} to {signed(d.high)}{paired}"
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
    looks = sum(look.step > 0 for look in run.looks)
    if reward is not None and run.chosen_by:
        said.append(
            f"The weights kept were chosen among {looks} looks at these very pictures by {run.chosen_by}. The "
            "intervals of what was chosen by are widened for that, all others are not and may flatter: rewardtune "
            "eval with --seed or --prompts takes fresh pictures."
        )
    if reward is not None and reward.prompts < FEW:
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
    shows that everything else (model, sampling) is the same too. Of rewards: `same_measure`.
    """
    if a.before is None or b.before is None or list(a.prompts) != list(b.prompts) or not a.prompts:
        return False
    if a.facts.get("seed") != b.facts.get("seed"):
        return False
    mine, theirs = a.before.pictures.get("brightness"), b.before.pictures.get("brightness")
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    return all(abs(x - y) < 1e-3 for x, y in zip(mine, theirs, strict=True))


def same_measure(a: RunData, b: RunData, metric: str) -> bool:
    """Whether the untuned pictures, the same for both runs, measure the same: one name may stand for two rewards.

    Up to a twentieth of their range, for the rounding of another machine.
    """
    mine, theirs = (run.before.pictures.get(metric, []) if run.before else [] for run in (a, b))
    known = [x for x in mine if math.isfinite(x)]
    near = max(0.05 * (max(known) - min(known)), 1e-6 * max(map(abs, known))) if known else 0.0
    pairs = zip(mine, theirs, strict=False)
    same = (abs(x - y) <= near or (not math.isfinite(x) and not math.isfinite(y)) for x, y in pairs)
    return len(mine) == len(theirs) and all(same)


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
        if len(mine) == len(theirs) and name not in ("base_distance", "base_pixels") and same_measure(a, b, name):
            prompts = first.prompts
            rate = win_rate(mine, theirs, prompts, less=measure.better == "less")
            found[name] = (paired_difference(mine, theirs, prompts), rate)
    return found
