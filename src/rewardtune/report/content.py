"""Everything that the report's template shows, gathered from the run folders. The template decides on looks alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from .. import __version__
from ..errors import RewardTuneError
from ..guards import bare, violates
from ..modelcard import _public, plain, public_name, settings, snippet
from ..stats import Interval
from .curves import charts, sweep_charts, x_axes
from .page import clean
from .pictures import data_uri
from .read import RunData
from .results import (
    WORST,
    Change,
    agree,
    changes,
    duel,
    falls,
    joined,
    percent,
    same_measure,
    signed,
    value,
    verdict,
    with_ends,
)

PAIRS = 48  # before/after pairs on a page, the worst ones among them
REFRESH = 20  # seconds between two readings of the page of a run that is under way
STATUS = {
    "running": "under way",
    "done": "done",
    "out of time": "done, out of time",
    "stopped": "stopped by a guard or an error",
    "interrupted": "interrupted",
    "failed": "failed",
}


def context(runs: Sequence[RunData], *, pairs: int = PAIRS, now: datetime | None = None) -> dict[str, Any]:
    """What the template and the script need. pairs: before/after pairs shown at most, of each set of prompts."""
    found = [changes(run) for run in runs]
    names = _names(runs)
    groups = _groups(runs)
    return {
        "title": plain(" · ".join(names)),
        "time": (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "refresh": REFRESH if any(run.running for run in runs) else 0,
        "runs": [_run(number, *each) for number, each in enumerate(zip(runs, names, found, strict=True))],
        "charts": charts(runs),
        "galleries": [
            _gallery(number, [(names[i], runs[i], found[i]) for i in group], pairs)
            for number, group in enumerate(groups, 1)
        ],
        "table": _table(runs, names, found) if len(runs) > 1 else None,
        "seeds": _seeds(runs, found),
        "imitations": _imitations(dict.fromkeys(name for run in runs for name in run.imitations)),
        "duels": _duels(runs, names, groups),
        "unlike": _unlike(runs, names, groups),
        "alone": [names[group[0]] for group in groups if len(group) == 1] if len(runs) > 1 else [],
    }


def data(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the script reads: the charts of the page, by their ids."""
    each = [chart for section in shown["charts"].values() for chart in section]
    each += [chart for run in shown["runs"] for chart in (run["sweep"] or {}).get("charts", ())]
    return {"charts": each, "refresh": shown["refresh"], "many": len(shown["runs"]) > 1}


def _names(runs: Sequence[RunData]) -> list[str]:
    """The folders' names; with their parents where two are the same, and numbered where that does not help."""
    names = [clean(run.name) for run in runs]
    if len(set(names)) < len(names):
        names = [clean("/".join(run.folder.parts[-2:])) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _groups(runs: Sequence[RunData]) -> list[list[int]]:
    """Runs whose eval pictures have the same prompts and seeds, together."""
    groups: list[list[int]] = []
    for index, run in enumerate(runs):
        group = next((group for group in groups if agree(runs[group[0]], run)), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


# One run --------------------------------------------------------------------------------------------------------------


def _run(number: int, run: RunData, name: str, found: dict[str, Change]) -> dict[str, Any]:
    said = verdict(run, found)
    return {
        "name": name,
        "status": str(run.facts.get("status", "unknown")),
        "status_words": STATUS.get(str(run.facts.get("status")), "unknown"),
        "mood": said.mood,
        "headline": said.headline,
        "sentences": said.sentences,
        "error": local(run, str(run.facts["error"])) if run.facts.get("error") else None,
        "facts": _facts(run),
        "imitations": _imitations(run.imitations),
        "changes": [_change_row(run, one) for one in found.values()],
        "rules": _rules(run),
        "no_rule": "No rule was set for this run."
        if run.config
        else "It is not known whether rules were set for this run: it has no run file.",
        "events": _events(run),
        "sweep": _sweep(number, run),
        "evals": [_eval_or_note(key, one) for key, one in run.evals.items()],
        "snippet": _snippet(run),
        "config": _config(run),
        "environment": _environment(run),
    }


def local(run: RunData, text: str) -> str:
    """Absolute paths cut to their last part, but for the folder that the user named: pages are mailed around."""
    mine = str(run.folder).rstrip("/")
    marked = clean(text).replace(mine, "\0") if run.folder.is_absolute() else clean(text)
    cut = re.sub(r"(?<![\w.:/\0])(?:/[^\s/'\":,;()]+)+/([^\s/'\":,;()]+)", r"\1", marked)
    return cut.replace("\0", mine)


def _facts(run: RunData) -> list[tuple[str, str]]:
    facts, axes = run.facts, x_axes(run)
    train = facts.get("train") or {}
    steps = len(run.metrics)
    wanted = f" of {train['steps']}" if train.get("steps") and train["steps"] != steps else ""
    rows = [
        ("Method", facts.get("method")),
        ("Reward", _reward(run)),
        ("Held out", ", ".join(_marked(run, name) for name in facts.get("held_out") or ()) or "nothing"),
        ("Base model", _model(run)),
        ("Updates", f"{steps}{wanted}"),
        ("Kept", _kept(run)),
        ("Images sampled for training", f"{axes['images'][-1]:,.0f}" if steps else "0"),
        ("Time of the updates", duration(axes["seconds"][-1]) if steps else "–"),
        ("Learning rate, batch", f"{train['lr']:g}, {train['batch']}" if {"lr", "batch"} <= train.keys() else None),
        ("Eval pictures", str(len(run.looks[0].prompts)) if run.looks else None),
    ]
    return [(name, clean(text)) for name, text in rows if text]


def _reward(run: RunData) -> str | None:
    """The reward as the run names it, with a word on parts that are minimised: 1*symmetry raises the total by less."""
    less = [name for name, measure in run.measures.items() if measure.role == "trained" and measure.better == "less"]
    remark = f" ({', '.join(less)}: less is better, counts negative)" if less else ""
    return f"{run.facts['reward']}{remark}" if run.facts.get("reward") else None


def _marked(run: RunData, metric: str) -> str:
    return f"{metric} (playground)" if bare(metric) in run.imitations else metric


def _imitations(names: Iterable[str]) -> str:
    """What a reader who does not know the playground would take for the published models; empty without them."""
    if not (listed := [clean(name) for name in names]):
        return ""
    return (
        f"From the playground, not the published models: {joined(listed)}. These are small imitations that ship with "
        "rewardtune and know only its drawn shapes."
    )


def _model(run: RunData) -> str | None:
    name = run.config.model.id if run.config else run.facts.get("model")
    return public_name(str(name)) if name else None


def _kept(run: RunData) -> str | None:
    if run.after is None or run.running:
        return None
    step = run.after.step
    return f"the weights of step {step}" if step else "the untuned model"


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `4.2 s`."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _change_row(run: RunData, one: Change) -> dict[str, Any]:
    words = {1: "better", -1: "lost: no number" if one.lost else "worse", 0: "cannot be told"}
    told = one.better and (one.won or one.lost) and not one.metric.startswith("base_")
    return {
        "name": _marked(run, one.metric),
        "role": _ROLE[one.role],
        "better": one.better or "–",
        "before": value(one.before),
        "before_sort": _sortable(one.before),
        "after": value(one.after),
        "after_sort": _sortable(one.after),
        "difference": with_ends(one.difference),
        "sort": _sortable(one.difference.value),
        "won": percent(one.won) if one.won else "–",
        "won_sort": one.won.value if one.won else math.nan,
        "sign": one.sign,
        "words": words[one.sign] if told else "–",
    }


def _sortable(number: float) -> float | str:
    """For data-sort: nothing where there is no number, which sorts last."""
    return number if math.isfinite(number) else ""


def _rules(run: RunData) -> list[dict[str, Any]]:
    found = []
    for rule in run.rules:
        first = run.before
        crossed = [
            look.step
            for look in run.looks
            if first is not None and look is not first and rule.metric in look.values and violates(rule, look, first)
        ]
        bound = next(
            f"{word.replace('_', ' ')} {_share(getattr(rule, word)) if word.endswith('by') else getattr(rule, word)}"
            for word in ("falls_by", "rises_by", "below", "above")
            if getattr(rule, word) is not None
        )
        extras = [f"{rule.patience} looks in a row"] if rule.patience > 1 else []
        extras += ["beyond the noise"] if rule.certain else []
        found.append(
            {
                "metric": rule.metric,
                "bound": ", ".join([bound, *extras]),
                "then": rule.then,
                "crossed": ", ".join(f"step {step}" for step in crossed) or "never",
                "bad": bool(crossed),
            }
        )
    return found


def _share(number: float) -> str:
    return f"{100 * number:g} %"


def _events(run: RunData) -> list[str]:
    """Lines of the log in which a rule, a rollback or the choice of the weights speaks."""
    words = (
        "guards.rules[",
        "rolled back",
        "the weights are those of",
        "the weights kept are those",
        "learning rate is",
    )
    return [local(run, line) for line in run.log if any(word in line for word in words)]


def _sweep(number: int, run: RunData) -> dict[str, Any] | None:
    if run.sweep is None:
        return None
    try:
        found = sweep_charts(run.sweep, run=number)
    except (KeyError, TypeError, AttributeError, ValueError):  # of another version
        return None
    return {"reason": clean(run.sweep.get("reason", "")), "suggested": run.sweep.get("suggested"), "charts": found}


def _eval_or_note(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return _eval(name, found)
    except (KeyError, TypeError, AttributeError, ValueError):  # of another version, or damaged
        note = f"eval/{name}.json cannot be read as an evaluation: made by another version, or damaged"
        return {"name": name, "candidates": None, "pairs": None, "notes": [note]}


def _eval(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of one eval/NAME.json: its candidates' values, and the pairs."""
    measures = found.get("measures", {})
    order = {"trained": 0, "held_out": 1, "unknown": 1, "guard": 2}
    names = sorted(measures, key=lambda key: order.get(measures[key].get("role"), 3))
    shown = [key for key in names if measures[key].get("role") != "guard"] or names
    candidates = [
        [_cell(str(one.get("label"))), *(_interval(one.get("metrics", {}).get(key)) for key in shown)]
        for one in found.get("candidates", ())
    ]
    pairs = []
    for pair in found.get("pairs", ()):
        blocks = {"all": pair.get("all", {}), **pair.get("categories", {})}
        for (kind, block), key in product(blocks.items(), shown):
            rate, apart = block.get("win_rate", {}).get(key), block.get("difference", {}).get(key)
            if rate or apart:
                of = _cell(f"{pair.get('a')} – {pair.get('b')}"), _cell(clean(kind)), _cell(key)
                pairs.append([*of, _interval(apart, with_ends), _interval(rate, percent)])
    facts = found.get("settings", {})
    return {
        "name": name,
        "what": f"{facts.get('count', '?')} prompts, {facts.get('seeds', '?')} picture(s) each",
        "candidates": candidates and {"headings": ["Candidate", *shown], "rows": candidates},
        "pairs": pairs
        and {
            "headings": ["A – B", "Prompts", "Metric", "Difference", "A better than B"],
            "rows": pairs,
        },
        "notes": [clean(note) for note in found.get("notes", ())],
    }


def _interval(found: Mapping[str, Any] | None, words: Callable[[Interval], str] | None = None) -> dict[str, Any]:
    """A cell of an interval as JSON has it."""
    if not found:
        return _cell("–")
    each = Interval(**{key: math.nan if found.get(key) is None else found[key] for key in ("value", "low", "high")})
    return _cell((words or _ends)(each), each.value)


def _ends(each: Interval) -> str:
    ends = f" ({value(each.low)} to {value(each.high)})" if math.isfinite(each.low) else ""
    return f"{value(each.value)}{ends}"


def _snippet(run: RunData) -> dict[str, Any]:
    """How to sample the result; the command always, Python where the LoRA is there."""
    from ..export import open_run

    command = f'rewardtune sample {shlex.quote(str(run.folder))} --prompt "..."'
    try:
        return {
            "command": command,
            "python": snippet(open_run(run.folder, prompts=run.prompts), repo=str(run.folder)),
            "note": "",
        }
    except RewardTuneError as error:
        return {"command": command, "python": None, "note": local(run, str(error))}


def _config(run: RunData) -> str:
    if run.config is not None:
        from ..export import Run

        holder = Run(
            folder=run.folder, file=run.folder, model=run.config.model, scheduler=None, prompts=(), call={},
            facts=dict(run.facts), config=run.config,
        )  # fmt: skip
        return clean(settings(holder))
    told = {key: run.facts[key] for key in ("method", "reward", "call", "lora", "train", "seed") if key in run.facts}
    return clean(yaml.safe_dump(_public(told), sort_keys=False, allow_unicode=True).strip())


def _environment(run: RunData) -> list[tuple[str, str]]:
    facts = run.facts
    rows = [
        ("Pipeline", facts.get("pipeline")),
        ("Scheduler", facts.get("scheduler")),
        ("Sampling", ", ".join(f"{key} {item}" for key, item in (facts.get("call") or {}).items())),
        ("Trained parameters", f"{(facts.get('lora') or {}).get('parameters', 0):,}"),
        ("Seed", str(facts["seed"]) if "seed" in facts else None),
        ("Processes", str(facts["processes"]) if "processes" in facts else None),
        *((name, str(number)) for name, number in (facts.get("versions") or {}).items()),
        ("run.json of", facts.get("time")),
    ]
    return [(name, clean(text)) for name, text in rows if text]


# Pictures -------------------------------------------------------------------------------------------------------------


def _gallery(number: int, group: Sequence[tuple[str, RunData, dict[str, Change]]], pairs: int) -> dict[str, Any]:
    """Before and after of runs that share prompts and seeds: the worst cases by metric, then all.

    A picture that is shown twice is in the page once: the second place names the first, and the script copies it.
    """
    shown = {name: _files(run) for name, run, _ in group}
    first = group[0][1]
    count = min((len(after) for _, after in shown.values() if after), default=0)
    worst = _worst(group, count)
    ranked = dict.fromkeys([card["index"] for section in worst for card in section["cards"]] + [*range(count)])
    metrics = [key for key, one in group[0][2].items() if one.better and one.role != "guard" and one.won is not None]
    placed: dict[Path, str] = {}

    def card(index: int, **more: Any) -> dict[str, Any]:
        return _card(number, index, group, shown, metrics, placed) | more

    lost = (
        "no picture was looked at after the first update yet" if first.running else "there are no pictures to compare"
    )
    return {
        "names": [name for name, _, _ in group],
        "worst": [
            section | {"cards": [card(one.pop("index"), **one) for one in section["cards"]]} for section in worst
        ],
        "cards": [card(index) for index in sorted([*ranked][:pairs])],
        "count": count,
        "metrics": metrics,
        "empty": None if count else lost,
        "prompts": bool(first.prompts),
    }


def _files(run: RunData) -> tuple[list[Path], list[Path]]:
    if run.before is None or run.after is None or run.after.step == 0:
        return [], []
    before, after = run.pictures(0), run.pictures(run.after.step)
    return (before, after) if len(before) == len(after) == len(run.before.prompts) else ([], [])


def _worst(group: Sequence[tuple[str, RunData, dict[str, Change]]], count: int) -> list[dict[str, Any]]:
    """The largest falls of the trained reward and of every held-out one; of several runs the worst of all."""
    names = dict.fromkeys(
        key for _, _, found in group for key, one in found.items() if one.role == "held_out" or key == "reward"
    )
    sections = []
    for metric in sorted(names, key=lambda key: key == "reward"):  # held out first: it is what was traded
        losses = [(loss, index, name) for name, run, _ in group for index, loss in falls(run, metric) if index < count]
        losses.sort(key=lambda row: -row[0])
        cards = [{"index": index, "loss": value(loss), "run": name} for loss, index, name in losses[:WORST]]
        unlike = len({index for _, index, _ in losses})
        apart = all(run.measures[metric].role == "held_out" for _, run, _ in group if metric in run.measures)
        title = "The trained reward" if metric == "reward" else metric + (", never trained on" if apart else "")
        sections.append({"metric": metric, "title": title, "cards": cards, "fell": unlike, "of": count})
    return sections


def _card(
    number: int,
    index: int,
    group: Sequence[tuple[str, RunData, dict[str, Change]]],
    shown: Mapping[str, tuple[list[Path], list[Path]]],
    metrics: Sequence[str],
    placed: dict[Path, str],
) -> dict[str, Any]:
    """One prompt and seed: the untuned picture, each run's, and by how much each score changed."""
    first = group[0][1]
    prompts = first.before.prompts if first.before else []
    same = [place for place, prompt in enumerate(prompts) if prompt == prompts[index]]
    prompt = plain(first.prompts[index]) if first.prompts else f"prompt {prompts[index]}"
    seed = f"seed {same.index(index) + 1} of {len(same)}" if len(same) > 1 else ""
    label = ", ".join(filter(None, (prompt, seed)))
    base = next(files for files, _ in shown.values() if files)
    pictures = [_shot("before", label, base[index], placed, f"shot-{number}-{index}-0")]
    scores, order = [], dict[str, float]()
    for place, (name, run, _) in enumerate(group, 1):
        if not shown[name][1]:
            continue
        after = "after" if len(group) == 1 else name
        pictures.append(_shot(after, label, shown[name][1][index], placed, f"shot-{number}-{index}-{place}"))
        for metric in metrics:
            delta = _delta(run, metric, index)
            if not math.isfinite(delta):
                continue
            gain = delta if run.measures[metric].better == "more" else -delta
            mood = "good" if gain > 0 else "bad" if gain < 0 else ""
            owner = name if len(group) > 1 else ""
            scores.append({"metric": metric, "run": owner, "delta": signed(delta), "mood": mood})
            order[metric] = min(order.get(metric, math.inf), gain)
    ranks = {f"m{metrics.index(metric)}": f"{gain:.6g}" for metric, gain in order.items()}
    return {"index": index, "prompt": prompt, "seed": seed, "pictures": pictures, "scores": scores, "order": ranks}


def _shot(name: str, label: str, path: Path, placed: dict[Path, str], place: str) -> dict[str, Any]:
    shot: dict[str, Any] = {"label": name, "alt": f"{name}: {label}", "id": place, "src": "", "again": ""}
    if path in placed:
        return shot | {"again": placed[path]}
    try:
        shot["src"] = data_uri(path)
    except OSError:  # gone or half-written while the run goes on
        return shot
    placed[path] = place
    return shot


def _delta(run: RunData, metric: str, index: int) -> float:
    """after - before of one picture; NaN where it was not measured."""
    if run.before is None or run.after is None or metric not in run.measures:
        return math.nan
    after, before = run.after.pictures.get(metric, ()), run.before.pictures.get(metric, ())
    return after[index] - before[index] if index < min(len(after), len(before)) else math.nan


# Several runs ---------------------------------------------------------------------------------------------------------


def _table(runs: Sequence[RunData], names: Sequence[str], found: Sequence[dict[str, Change]]) -> dict[str, Any]:
    """A row for every run: the paired change of what was scored, in which settings it differs, and what it cost.

    Settings that all runs share stand once, in `same`.
    """
    metrics = _compared(found)
    told = [_told(run) for run in runs]
    unlike = [key for key in told[0] if len({each[key] for each in told}) > 1]
    rows = []
    for run, name, each, own in zip(runs, names, found, told, strict=True):
        axes = x_axes(run)
        seconds = axes["seconds"][-1] if run.metrics else math.nan
        images = axes["images"][-1] if run.metrics else 0
        cells = [_cell(name)]
        for metric in metrics:
            one = each.get(metric)
            roles = {run.measures[metric].role for run in runs if metric in run.measures}
            role = _ROLE[one.role] if one and len(roles) > 1 else ""
            cells.append(_difference(one.difference, one.sign, role) if one else _cell("–"))
        cells += [_cell(own[key], wide=key in ("Method", "Reward")) for key in unlike]
        rows.append(
            [*cells, _cell(str(len(run.metrics)), len(run.metrics)), _cell(f"{images:,.0f}", images),
             _cell(duration(seconds), seconds), _cell(STATUS.get(str(run.facts.get("status")), "unknown"))]
        )  # fmt: skip
    headings = ["Run", *_deltas(runs, metrics), *unlike, "Updates", "Images", "Time", "Status"]
    same = [f"{key.lower()} {text}" for key, text in told[0].items() if key not in unlike and text != "–"]
    return {"headings": headings, "rows": rows, "same": same}


def _compared(found: Sequence[dict[str, Change]]) -> list[str]:
    """What tables of several runs show: rewards, and the Vendi score where it was measured."""
    rewards = dict.fromkeys(key for each in found for key, one in each.items() if one.role != "guard")
    return [*rewards, *(["vendi"] if any("vendi" in each for each in found) else [])]


def _told(run: RunData) -> dict[str, str]:
    """The settings by which runs are told apart, in words."""
    train = run.facts.get("train") or {}
    lr = f"{train['lr']:g}" if "lr" in train else "–"
    rows = {
        "lr": lr,
        "Batch": train.get("batch", "–"),
        "Seed": run.facts.get("seed", "–"),
        "Method": run.facts.get("method", "–"),
        "Reward": _reward(run) or "–",
    }
    return {key: clean(str(text)) for key, text in rows.items()}


def _cell(
    text: str, sort: float | None = None, mood: str = "", *, ends: str = "", word: str = "", wide: bool = False
) -> dict[str, Any]:
    """ends: an interval, word: what the colour of the mood says; each in a line of its own."""
    known = sort is not None and math.isfinite(sort)
    return {"text": text, "sort": sort if known else None, "mood": mood, "ends": ends, "word": word, "wide": wide}


def _difference(found: Interval, sign: int = 0, role: str = "") -> dict[str, Any]:
    """sign: 1 for better, -1 for worse."""
    ends = f"{signed(found.low)} to {signed(found.high)}" if math.isfinite(found.low) else ""
    word = ", ".join(filter(None, (_WORD[sign], role)))
    return _cell(signed(found.value), found.value, _MOOD[sign], ends=ends, word=word)


_MOOD, _WORD = {1: "good", -1: "bad", 0: ""}, {1: "better", -1: "worse", 0: ""}
_ROLE = {"trained": "trained on", "held_out": "held out", "guard": "guard"}


def _deltas(runs: Sequence[RunData], metrics: Iterable[str]) -> list[str]:
    """The headings of changes; with a word where less is better."""
    less = {name for run in runs for name, measure in run.measures.items() if measure.better == "less"}
    return [f"Δ {metric} (less is better)" if metric in less else f"Δ {metric}" for metric in metrics]


def _seeds(runs: Sequence[RunData], found: Sequence[dict[str, Change]]) -> dict[str, Any] | None:
    """Means over the runs that have all settings but the seed in common, with their range, where there are several."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_but_the_seed(run), []).append(index)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return None
    metrics = _compared(found)
    names, rows = _names(runs), []
    for group in several:
        cells = [_cell(", ".join(names[index] for index in group)), _cell(str(len(group)), len(group))]
        for metric in metrics:
            each = [found[index][metric] for index in group if metric in found[index]]
            deltas = [one.difference.value for one in each]
            signs = {one.sign for one in each}
            mean = fmean(deltas) if deltas else math.nan
            ends = Interval(value=mean, low=min(deltas, default=mean), high=max(deltas, default=mean))
            cells.append(_difference(ends, signs.pop() if len(signs) == 1 else 0))
        method = clean(str(runs[group[0]].facts.get("method", "–")))
        rows.append([*cells, _range([len(runs[index].metrics) for index in group]), _cell(method, wide=True)])
    return {"headings": ["Runs", "Count", *_deltas(runs, metrics), "Updates", "Method"], "rows": rows}


def _range(numbers: Sequence[int]) -> dict[str, Any]:
    low, high = min(numbers), max(numbers)
    return _cell(str(low) if low == high else f"{low} to {high}", low)


def _but_the_seed(run: RunData) -> str:
    """The same for runs that differ in their seed, their folder and what they log alone."""
    if run.config is not None:
        return run.config.model_dump_json(exclude={"seed", "output_dir", "log"})
    keys = ("model", "method", "reward", "held_out", "train", "call", "lora", "T", "eval_prompts")
    return json.dumps([run.facts.get(key) for key in keys], sort_keys=True)


def _duels(runs: Sequence[RunData], names: Sequence[str], groups: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    rows = []
    for group in groups:
        for i, j in combinations(group, 2):
            for metric, (apart, rate) in duel(runs[i], runs[j]).items():
                roles = [runs[k].measures[metric].role for k in (i, j)]
                role = "trained" if "trained" in roles else roles[0]
                mood = "good" if rate.low > 0.5 else "bad" if rate.high < 0.5 else ""
                better = {"good": "A is better", "bad": "B is better", "": ""}[mood]
                rows.append(
                    [_cell(names[i]), _cell(names[j]), _cell(metric), _cell(role.replace("_", " ")),
                     _difference(apart), _cell(percent(rate), rate.value, mood, word=better)]
                )  # fmt: skip
    headings = ["A", "B", "Metric", "Role", "A − B (95 %)", "A better than B (95 %)"]
    return {"headings": headings, "rows": rows} if rows else None


def _unlike(runs: Sequence[RunData], names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """Which metrics of one name are not compared, since they measure the same untuned pictures differently."""
    found = []
    for i, j in (pair for group in groups for pair in combinations(group, 2)):
        looks = [runs[k].looks[0].pictures for k in (i, j)]
        shared = [key for key, one in runs[i].measures.items() if one.role != "guard" and all(key in x for x in looks)]
        if metrics := [name for name in shared if not same_measure(runs[i], runs[j], name)]:
            found.append(
                f"{joined(metrics)} of {names[i]} and {names[j]} cannot be compared, here or in the tables above: the "
                "same untuned pictures have other values, so one name stands for different rewards or weights."
            )
    return found
