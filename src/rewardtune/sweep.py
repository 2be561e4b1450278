"""`rewardtune sweep RUN`: how strongly to use a LoRA. The same prompts and seeds at several weights, one suggestion.

The rule: weights are walked upwards from 0 and the walk ends before the first one at which a held-out reward or a
measure of diversity is worse than the base model's by more than `tolerance` of it; of the weights walked, the one with
the highest trained reward is suggested. Left out: weights of single layers, several LoRAs at once.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .candidates import candidates, load_base
from .compare import (
    Contrast,
    Measured,
    Scored,
    Setup,
    contrast,
    measure,
    prepare,
    save_grid,
    scored,
    shown,
    titled,
    to_json,
    with_base,
    write_result,
)
from .config import Part
from .errors import ConfigError
from .guards import ACROSS, WITHIN, Measure
from .runfolder import refuse_place
from .tables import text_table

if TYPE_CHECKING:
    from .rewards import Reward

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One weight. to_base: the paired change from weight 0. worse: metrics that are beyond the tolerance there."""

    weight: float
    scored: Scored
    to_base: Contrast
    worse: list[str]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep found. guarded: the metrics of the rule; suggested: a weight, or None where nothing guards."""

    settings: dict[str, Any]
    measures: dict[str, Measure]
    points: list[Point]
    tolerance: float
    guarded: list[str]
    suggested: float | None
    reason: str
    notes: tuple[str, ...] = ()
    time: str = ""

    @property
    def names(self) -> list[str]:
        """What is shown: the trained reward, its parts where it has several, and what guards."""
        trained = [name for name, what in self.measures.items() if what.role == "trained" and name != "reward"]
        return ["reward", *(trained if len(trained) > 1 else []), *self.guarded]

    def as_json(self) -> str:
        """docs/evaluation.md lists the keys."""
        return to_json({"rewardtune": __version__, "kind": "sweep", **asdict(self)})

    def as_text(self) -> str:
        """The table for a terminal, and the suggestion."""
        names = self.names
        rows = [
            [f"{point.weight:g}", *(shown(point.scored.metrics[name]) for name in names), ", ".join(point.worse)]
            for point in self.points
        ]
        headings = ["weight", *(titled(name, self.measures) for name in names), "beyond the tolerance"]
        table = text_table(headings, rows, flexible=len(headings) - 1, numbers=[0])
        return "\n".join([table, self.reason, *(f"note: {note}" for note in self.notes)])


def sweep(
    run: str | Path,
    *,
    weights: Sequence[float] = WEIGHTS,
    tolerance: float = 0.05,
    rewards: Sequence[Part] | Reward | None = None,
    prompts: str | Sequence[str] | None = None,
    count: int | None = None,
    seeds: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    features: str | None = None,
    output: str | Path | None = None,
    batch: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Sample and score the run at each weight; writes sweep.json, sweep.png (the curves) and sweep/ (pictures, grid).

    weights: factors on what was trained; 0, the base model, is always among them. tolerance: of the rule, a share of
    the base model's value. rewards: held-out ones instead of the run's. output: None: the run's folder.
    prompts, count, seeds, seed, steps, guidance, features: as in `compare.compare_candidates`. Raises ConfigError.
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance={tolerance}: must be a share between 0 and 1; 0.05 is 5 %")
    if not weights or not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights={list(weights)}: give finite numbers, e.g. 0,0.25,0.5,0.75,1,1.25")
    if not Path(run).is_dir():
        raise ConfigError(f"no run folder {run}; give the output_dir of a run")
    wanted = sorted({float(weight) for weight in weights} - {0.0})
    if not wanted:
        raise ConfigError("the only weight is 0, the base model; give others, e.g. 0.5,1")
    found = with_base(candidates([f"{run}@{weight:.12g}" for weight in wanted], steps=steps, guidance=guidance))
    if found[0].settings.config is None:
        raise ConfigError(f"{run} has no config.yaml to tell what was trained; sweep works on runs of a run file")
    folder = Path(run) if output is None else Path(output)
    refuse_place(folder, "--output")
    options: dict[str, Any] = {"prompts": prompts, "count": count, "seeds": seeds, "seed": seed, "features": features}
    setup = prepare(found, rewards=rewards, trained_too=True, batch=batch, **options)
    measured = measure(load_base(found), found, setup, folder / "sweep", batch=batch, say=say)
    result = judge(measured, setup, [0.0, *wanted], tolerance=tolerance)
    write_result(folder / "sweep.json", result.as_json())
    save_grid(measured, setup, folder / "sweep" / "grid.png")
    draw(result, folder / "sweep.png")
    say(f"written: {folder / 'sweep.json'}, sweep.png, and the pictures in {folder / 'sweep'}")
    return result


def judge(measured: Sequence[Measured], setup: Setup, weights: Sequence[float], *, tolerance: float) -> Sweep:
    """The points in the order of their weights, and the suggestion. measured[0] is the base model, weight 0."""
    base = measured[0]
    everything = range(len(setup.texts))
    guarded, notes = _guarded(base, setup)
    points = []
    for weight, one in zip(weights, measured, strict=True):
        apart = contrast(one, base, setup, everything)
        points.append(
            Point(
                weight=weight,
                scored=scored(one, setup, folder=f"sweep/{one.folder}"),
                to_base=apart,
                worse=[name for name in guarded if _worse(name, one, base, setup.measures[name], tolerance)],
            )
        )
    points.sort(key=lambda point: point.weight)
    suggested, reason = suggest(points, guarded, tolerance=tolerance)
    return Sweep(
        settings=setup.facts | {"model": base.candidate.settings.model.id},
        measures=setup.measures,
        points=points,
        tolerance=tolerance,
        guarded=guarded,
        suggested=suggested,
        reason=reason,
        notes=(*setup.notes, *notes),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _guarded(base: Measured, setup: Setup) -> tuple[list[str], list[str]]:
    """(held-out rewards and measures of diversity of which a share means something, notes on the others)."""
    names, notes = [], []
    for name, what in setup.measures.items():
        if what.role != "held_out" and name not in (*ACROSS, *WITHIN):
            continue
        found, each = base.interval(name), base.evaluation.by_prompt(name)
        unsure = bool(each) and min(each) < 0 < max(each) and not found.excludes(0)  # as guards.check_start has it
        if not math.isfinite(found.value) or found.value == 0 or unsure:
            notes.append(f"{name} cannot be told from 0 on the base model, so no share of it counts for the suggestion")
        else:
            names.append(name)
    return names, notes


def _worse(name: str, one: Measured, base: Measured, what: Measure, tolerance: float) -> bool:
    before, after = base.evaluation.values[name], one.evaluation.values[name]
    change = after - before if what.better == "more" else before - after
    return not change >= -tolerance * abs(before)  # a NaN is worse


def suggest(points: Sequence[Point], guarded: Sequence[str], *, tolerance: float) -> tuple[float | None, str]:
    """(weight, the rule and what it met, in words). points: by rising weight."""
    if not guarded:
        return None, (
            "no weight is suggested: there is no held-out reward and no measure of diversity to hold it back; add "
            "--reward (not trained on) or --features"
        )
    walked, stop = list[Point](), None
    for point in points:
        if point.weight < 0:
            continue
        if point.worse:
            stop = point
            break
        walked.append(point)
    best = max(walked, key=lambda point: _finite(point.scored.metrics["reward"].value))
    held = ("one of " if len(guarded) > 1 else "") + ", ".join(guarded)
    rule = (
        f"suggested weight {best.weight:g}: the highest trained reward among the weights before the first at which "
        f"{held} is worse than the base model's by more than {100 * tolerance:g} % "
    )
    where = f"(weight {stop.weight:g}: {', '.join(stop.worse)})" if stop else "(which none was)"
    return best.weight, rule + where


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


# -- the picture -----------------------------------------------------------------------------------------------------

INK, PALE, BAD = "#333333", "#dddddd", "#b3261e"


def draw(result: Sweep, path: Path) -> None:
    """A panel for each metric against the weight, with its intervals; and the trained reward against the guarded ones.

    Drawn with Pillow, which everybody has.
    """
    from PIL import Image, ImageDraw, ImageFont

    from .runfolder import atomic

    names = result.names
    wide, high, gap = 380, 250, 26
    columns = min(3, len(names))
    rows = [(name, "weight") for name in names] + [("reward", name) for name in result.guarded]
    lines = -(-len(rows) // columns)
    scale = 2  # drawn twice as large: sharp on dense screens
    legend = (
        f"bars: 95 % intervals of the change from weight 0, over {result.settings['count']} prompts; large dot: "
        f"suggested weight; red: a held-out reward or diversity is worse by more than {100 * result.tolerance:g} %"
    )
    told = textwrap.wrap(legend, wide * columns // 7, break_on_hyphens=False)
    size = (wide * columns + gap, high * lines + gap + 18 * len(told) + 8)
    canvas = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    pen = ImageDraw.Draw(canvas)
    font: Any = ImageFont.load_default(12 * scale)
    for index, (up, along) in enumerate(rows):
        left, top = (index % columns) * wide + gap, (index // columns) * high + gap
        _panel(pen, font, result, up, along, (left + 44, top + 22, left + wide - gap, top + high - 56), scale)
    pen.text((gap * scale, (high * lines + gap) * scale), "\n".join(told), fill=INK, font=font)
    with atomic(path) as temporary:
        canvas.save(temporary)


def _panel(pen: Any, font: Any, result: Sweep, up: str, along: str, box: tuple[int, int, int, int], scale: int) -> None:
    left, top, right, bottom = (edge * scale for edge in box)
    found = [(point, point.scored.metrics) for point in result.points]
    rows = [(p, p.weight if along == "weight" else metrics[along].value, metrics[up].value) for p, metrics in found]
    rows = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not rows:
        pen.text((left, top), f"{up}: no finite values", fill=INK, font=font)
        return
    points, xs, ys = zip(*rows, strict=True)
    bars = [_bar(point, result.points, up) for point in points]
    ends = [end for y, bar in zip(ys, bars, strict=True) for end in (y, *bar) if math.isfinite(end)]
    low, high = _room(ends)
    first, last = _room(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / (last - first) * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    for tick in _ticks(low, high):
        pen.line([at(first, tick), at(last, tick)], fill=PALE, width=scale)
        pen.text((left - 6 * scale, at(first, tick)[1]), f"{tick:.4g}", fill=INK, font=font, anchor="rm")
    for tick in _ticks(first, last):
        pen.text((at(tick, low)[0], bottom + 5 * scale), f"{tick:.4g}", fill=INK, font=font, anchor="mt")
    pen.line([(left, bottom), (right, bottom)], fill=INK, width=scale)
    better = {"more": "more is better", "less": "less is better"}
    # above the highest tick's number, which may stand at the very top
    pen.text((left - 40 * scale, top - 24 * scale), _axis(up, result, better), fill=INK, font=font)
    below = "LoRA weight" if along == "weight" else _axis(along, result, better)
    pen.text(((left + right) / 2, bottom + 22 * scale), below, fill=INK, font=font, anchor="mt")
    places = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    pen.line(places, fill=INK, width=2 * scale)
    for point, x, bar, (px, py) in zip(points, xs, bars, places, strict=True):
        colour = BAD if point.worse else INK
        if all(map(math.isfinite, bar)):
            pen.line([at(x, bar[0]), at(x, bar[1])], fill=colour, width=scale)
        size = (6 if point.weight == result.suggested else 3) * scale
        pen.ellipse([px - size, py - size, px + size, py + size], fill=colour, outline=colour)
        if along != "weight":
            pen.text((px + 7 * scale, py - 4 * scale), f"{point.weight:g}", fill=colour, font=font, anchor="lb")


def _bar(point: Point, points: Sequence[Point], name: str) -> tuple[float, float]:
    """The interval of the paired change from the base model, laid around the value."""
    base = next(other.scored.metrics[name].value for other in points if other.weight == 0)
    change = point.to_base.difference[name]
    return base + change.low, base + change.high


def _axis(name: str, result: Sweep, better: dict[str, str]) -> str:
    words = better.get(result.measures[name].better, "")
    role = "trained " if name == "reward" else "held-out " if result.measures[name].role == "held_out" else ""
    return f"{role}{name}" + (f", {words}" if words else "")


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, three and more: the fewest of them."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    steps = (unit * factor for factor in (1, 0.5, 0.25, 0.2, 0.1))
    counts = ((step, math.ceil(low / step), math.floor(high / step)) for step in steps)
    step, first, last = next(found for found in counts if found[2] - found[1] >= 2)
    return [n * step for n in range(first, last + 1)]
