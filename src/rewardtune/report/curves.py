"""What the page's charts show, as plain data: curves over steps, images and time, and bars over sampling steps.

A curve of more than POINTS updates is a mean over neighbours, and its name says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean, quantiles
from typing import Any

from ..guards import Evaluation, paired
from .read import RunData

POINTS = 400  # of a training curve at most
WINDOW = 15  # running means are over a fifteenth of the run on either side

Curve = dict[str, Any]


def charts(runs: Sequence[RunData]) -> dict[str, list[dict[str, Any]]]:
    """section -> charts, each `{id, title, note, curves | bars}`; a chart without a point is left out."""
    found = {
        "rewards": [_metric(runs, name) for name in _names(runs, ("trained", "held_out"))],
        "gradients": [
            _of_updates(runs, "grad_norm", "Gradient norm before clipping", "L2 norm over all trained parameters"),
            _clipped(runs),
            _step_norms(runs),
            _trained_steps(runs),
        ],
        "guards": [_metric(runs, name) for name in _names(runs, ("guard",))],
        "more": [
            _of_updates(runs, name, title, note)
            for name, title, note in (
                ("kl", "KL to the base model", "mean squared distance of the outputs, without its weight"),
                ("denoise", "Denoising loss", "without its weight"),
                ("clamped", "Clamped pixels", "share of pixel values at exactly 0 or 1; no gradient passes there"),
                ("lr", "Learning rate", ""),
                ("seconds", "Seconds per update", "without evaluations"),
                ("replay_error", "Replay error", "largest relative difference of a replayed network call"),
            )
        ],
    }
    kept = {section: [chart for chart in each if chart is not None] for section, each in found.items()}
    for section, each in kept.items():
        for number, chart in enumerate(each):
            chart["id"] = f"{section}-{number}"
    return kept


def x_axes(run: RunData) -> dict[str, list[float]]:
    """steps, images and seconds after each line of metrics.jsonl; evaluations and checkpoints are not in the time."""
    return {
        "steps": [line["step"] + 1 for line in run.metrics],
        "images": [line.get("images", math.nan) for line in run.metrics],
        "seconds": list(accumulate(line.get("seconds", math.nan) for line in run.metrics)),
    }


def _names(runs: Sequence[RunData], roles: Sequence[str]) -> list[str]:
    """Metrics of these roles in any run, those of the first run first; `reward` leads."""
    names = dict.fromkeys(
        name for role in roles for run in runs for name, m in run.measures.items() if m.role == role and run.looks
    )
    trained = [part for run in runs for line in run.metrics[:1] for part in line.get("parts", ())]
    if "trained" in roles:  # runs that were never looked at
        taken = {part for part in trained if f"trained_{part}" in names}
        names = dict.fromkeys(["reward", *names, *(part for part in trained if part not in taken)])
    return list(names)


def _metric(runs: Sequence[RunData], name: str) -> dict[str, Any] | None:
    curves: list[Curve] = []
    for index in range(len(runs)):
        part = name.removeprefix("trained_")
        curves += _batches(runs, index, lambda line, part=part: _of_batch(line, part))  # type: ignore[misc]
        curves += _of_looks(runs, index, name)
    measures = [run.measures[name] for run in runs if name in run.measures]
    better = {"more": "more is better", "less": "less is better"}.get(measures[0].better if measures else "more", "")
    roles = {measure.role for measure in measures}
    role = {"trained": "trained on", "held_out": "held out"}.get(min(roles, default="trained"), "")
    role = "trained on in some" if len(roles) > 1 and "trained" in roles else role
    title = "Trained reward" if name == "reward" else name
    what = measures[0].what if measures and measures[0].role == "guard" else ""
    lines = [
        {"y": bound, "name": f"rule: {rule.metric} {word} {bound:.4g}"}
        for run in runs
        for rule in run.rules
        if rule.metric == name
        for word, bound in _bounds(run, rule, name)
    ]
    note = ", ".join(filter(None, ("" if name == "reward" else role, what, better)))
    if name in ("black", "nan") and not any(y for curve in curves for y in curve["y"]):
        return None  # none in the whole run: the table says so
    return _chart(title, note, curves, lines=lines if len(runs) == 1 else [])


def _bounds(run: RunData, rule: Any, name: str) -> list[tuple[str, float]]:
    if rule.above is not None:
        return [("above", rule.above)]
    if rule.below is not None:
        return [("below", rule.below)]
    base = run.before.values.get(name) if run.before else None
    if base is None or not math.isfinite(base):
        return []
    if rule.falls_by is not None:
        return [("below", base - rule.falls_by * abs(base))]
    return [("above", base + rule.rises_by * abs(base))]


def _of_batch(line: Mapping[str, Any], name: str) -> float | None:
    if name == "reward":
        return line.get("reward")
    return (line.get("parts") or {}).get(name)


def _chart(title: str, note: str, curves: list[Curve], **more: Any) -> dict[str, Any] | None:
    return {"title": title, "note": note, "curves": curves, **more} if curves else None


def _of_updates(runs: Sequence[RunData], key: str, title: str, note: str) -> dict[str, Any] | None:
    curves = [curve for index in range(len(runs)) for curve in _batches(runs, index, lambda line: line.get(key))]
    values = [y for curve in curves for y in curve["y"] if y is not None and y > 0]
    return _chart(title, note, curves, log=bool(values) and key == "grad_norm" and max(values) > 30 * min(values))


def _label(runs: Sequence[RunData], index: int, what: str) -> str:
    return what if len(runs) == 1 else f"{runs[index].name}: {what}"


def _batches(runs: Sequence[RunData], index: int, read: Callable[[Mapping[str, Any]], Any]) -> list[Curve]:
    """The curve over updates, thinned, and its running mean where there is enough of it."""
    run = runs[index]
    values = [_number(read(line)) for line in run.metrics]
    if not any(map(math.isfinite, values)):
        return []
    axes = x_axes(run)
    size = math.ceil(len(values) / POINTS)
    name = "training batch" + (f", mean of {size} updates" if size > 1 else "")
    groups = [slice(start, start + size) for start in range(0, len(values), size)]
    thin = {key: [axis[group][-1] for group in groups] for key, axis in axes.items()}
    means = [_mean(values[group]) for group in groups]
    curve: Curve = {
        "name": _label(runs, index, name),
        "style": "raw",
        "colour": index,
        "x": thin,
        "y": means,
    }
    if len(values) < 2 * WINDOW:
        return [curve]
    mean = curve | {"name": _label(runs, index, "its running mean"), "style": "mean", "y": running_mean(means)}
    return [curve, mean]


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over each value's neighbours, fewer of them at the ends."""
    reach = max(1, len(values) // WINDOW)
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _of_looks(runs: Sequence[RunData], index: int, name: str) -> list[Curve]:
    """The eval pictures' values, with the 95 % interval of the paired change since step 0 around them."""
    run = runs[index]
    looks = [look for look in run.looks if name in look.values]
    if not looks or run.before is None or name not in run.before.values:
        return []
    y = [look.values[name] for look in looks]
    halves = [_half(name, look, run.before) for look in looks]
    return [
        {
            "name": _label(runs, index, "eval pictures"),
            "style": "eval",
            "colour": index,
            "x": _axes_at(run, [look.step for look in looks]),
            "y": y,
            "low": [value - half for value, half in zip(y, halves, strict=True)],
            "high": [value + half for value, half in zip(y, halves, strict=True)],
        }
    ]


def _half(name: str, look: Evaluation, first: Evaluation) -> float:
    if not look.pictures.get(name) or len(look.pictures[name]) != len(first.pictures.get(name, ())):
        return math.nan
    return paired(name, look, first)[1]


def _axes_at(run: RunData, steps: Sequence[int]) -> dict[str, list[float]]:
    """The axes after so many updates; 0 before the first one."""
    axes = x_axes(run)
    place = {int(step): number for number, step in enumerate(axes["steps"])}
    at = {key: [axis[place[step]] if step in place else math.nan for step in steps] for key, axis in axes.items()}
    at["steps"] = [float(step) for step in steps]
    for key in at:
        at[key] = [0.0 if step == 0 else x for step, x in zip(steps, at[key], strict=True)]
    return at


def _clipped(runs: Sequence[RunData]) -> dict[str, Any] | None:
    curves = []
    for index, run in enumerate(runs):
        flags = [float(line["clipped"]) for line in run.metrics if "clipped" in line]
        if not flags or len(flags) != len(run.metrics):
            continue
        label = f"{100 * fmean(flags):.0f} % of all updates"
        curves.append(
            {
                "name": _label(runs, index, label),
                "style": "mean",
                "colour": index,
                "x": x_axes(run),
                "y": running_mean(flags),
            }
        )
    return _chart(
        "Share of updates that were clipped",
        "running mean; the gradient was scaled down to optim.clip",
        curves,
        range=[0, 1],
    )


def _step_norms(runs: Sequence[RunData]) -> dict[str, Any] | None:
    bars = []
    for index, run in enumerate(runs):
        norms: dict[int, list[float]] = {}
        for line in run.metrics:
            for step, norm in (line.get("step_grad_norms") or {}).items():
                norms.setdefault(int(step), []).append(_number(norm))
        if norms:
            steps = range(_T(run, norms))
            ends = {step: _deciles(norms[step]) for step in norms}
            bars.append(
                {
                    "name": _label(runs, index, "mean; the stroke holds 80 % of the updates"),
                    "colour": index,
                    "y": [_mean(norms[step]) if step in norms else None for step in steps],
                    "low": [ends[step][0] if step in ends else None for step in steps],
                    "high": [ends[step][1] if step in ends else None for step in steps],
                    "count": [len(norms.get(step, ())) for step in steps],
                }
            )
    note = "share of each trained sampling step in the gradient; step 0 is the noisiest"
    return {"title": "Gradient norm per denoising step", "note": note, "bars": bars} if bars else None


def _trained_steps(runs: Sequence[RunData]) -> dict[str, Any] | None:
    bars = []
    for index, run in enumerate(runs):
        counts: dict[int, int] = {}
        for line in run.metrics:
            for step in line.get("trained") or ():
                counts[int(step)] = counts.get(int(step), 0) + 1
        if counts:
            bars.append(
                {
                    "name": _label(runs, index, "times trained"),
                    "colour": index,
                    "y": [counts.get(step, 0) for step in range(_T(run, counts))],
                }
            )
    note = "how often each sampling step was trained; step 0 is the noisiest"
    return {"title": "Trained sampling steps", "note": note, "bars": bars} if bars else None


def _T(run: RunData, found: Mapping[int, Any]) -> int:
    return max(int(run.facts.get("T") or 0), max(found) + 1)


def _deciles(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return math.nan, math.nan
    cuts = quantiles(finite, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _change(point: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return (point.get("to_base") or {}).get("difference", {}).get(name) or {}


def sweep_charts(sweep: Mapping[str, Any], *, run: int) -> list[dict[str, Any]]:
    """Every metric of sweep.json against the LoRA's weight, trained and held-out rewards first.

    Then the trained reward against what guards it (held-out rewards, diversity), along the weights. run: its number on
    the page, for the charts' ids.
    """
    measures, points = sweep.get("measures", {}), sweep.get("points", [])
    order = {"trained": 0, "held_out": 1, "guard": 2}
    names = sorted(measures, key=lambda name: order.get(measures[name].get("role"), 3))
    found: list[dict[str, Any]] = []
    for name in names:
        rows = [(point["weight"], point["scored"]["metrics"].get(name), _change(point, name)) for point in points]
        rows = [row for row in rows if row[1] and row[1].get("value") is not None]
        if rows:
            base = next((found["value"] for weight, found, _ in rows if weight == 0), None)
            curve = {
                "name": "pictures at this weight",
                "style": "eval",
                "colour": 0,
                "x": {"weight": [weight for weight, _, _ in rows]},
                "y": [found["value"] for _, found, _ in rows],
                **{  # as `sweep.draw` has it: the change's own, paired interval, laid around the value
                    end: [None if None in (base, change.get(end)) else base + change[end] for _, _, change in rows]
                    for end in ("low", "high")
                },
            }
            role = {"trained": "trained on", "held_out": "held out"}.get(measures[name].get("role"), "")
            better = {"more": "more is better", "less": "less is better"}.get(measures[name].get("better"), "")
            chart = {
                "title": name,
                "note": ", ".join(filter(None, (role, better))),
                "curves": [curve],
                "axis": "weight",
            }
            suggested = sweep.get("suggested")
            if isinstance(suggested, int | float):
                chart["mark"] = {"x": suggested, "name": f"suggested: {suggested:g}"}
            found.append(chart)
    found += [along for name in sweep.get("guarded", ()) if (along := _along(points, name)) is not None]
    for number, chart in enumerate(found):
        chart["id"] = f"sweep-{run}-{number}"
    return found


def _along(points: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """The trained reward against `name`, a point for each weight."""
    rows = [(point["weight"], *(_value(point, key) for key in (name, "reward"))) for point in points]
    rows = [row for row in rows if None not in row]
    if not rows:
        return None
    weights, xs, ys = zip(*rows, strict=True)
    curve = {
        "name": "trained reward",
        "style": "eval",
        "colour": 0,
        "x": {"along": xs},
        "y": ys,
        "labels": [f"{weight:g}" for weight in weights],
    }
    note = "trained on; each point is a LoRA weight"
    return {"title": f"reward against {name}", "note": note, "curves": [curve], "axis": "along", "along": name}


def _value(point: Mapping[str, Any], name: str) -> float | None:
    return (point["scored"]["metrics"].get(name) or {}).get("value")
