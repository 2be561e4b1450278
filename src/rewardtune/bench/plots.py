"""Curves as PNG: a faint line for every seed, the mean in full. Needs the extra `bench` (matplotlib)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import digits
from ..runfolder import atomic

# a palette that people with colour blindness tell apart (Okabe and Ito 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999933")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
Points = Sequence[tuple[float, float]]


def check_installed() -> None:
    """ConfigError that says how to get matplotlib; before hours of work, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the plots of rewardtune bench need matplotlib: pip install 'rewardtune[bench]' (or --no-plots)"
        ) from error


def lines(
    found: Mapping[str, Sequence[Points]],
    path: Path,
    *,
    x: str,
    y: str,
    title: str,
    log: bool | None = None,
    panels: Mapping[str, str] | None = None,
) -> Path:
    """found: label -> one list of (x, y) for each seed. A mean over fewer seeds than the others' says so.

    log: the y axis; None: where all is above 0 and spans more than a decade. panels: label -> heading of the panel that
    it is drawn in, side by side, each with its own y axis; None: one panel. One line that would squeeze the others
    leaves the axis, and the legend says from where to where it goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    headings = list(dict.fromkeys((panels or {}).values())) or [""]
    figure, row = pyplot.subplots(1, len(headings), figsize=(8 * len(headings), 5), dpi=120, squeeze=False)
    most = max(map(len, found.values()), default=0)
    for axes, heading in zip(row[0], headings, strict=True):
        shown = {label: runs for label, runs in found.items() if panels is None or panels[label] == heading}
        logarithmic = _decades(shown) if log is None else log
        far = None if logarithmic else _far_off(shown)
        _draw(axes, shown, most=most, far=far)
        axes.set(xlabel=x, ylabel=y, title=heading or title)
        if all(place == round(place) for runs in shown.values() for points in runs for place, _ in points):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if far is not None:
            axes.set_ylim(*_margin(*_range(runs for label, runs in shown.items() if label != far)))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if len(headings) > 1:
        figure.suptitle(title)
    with atomic(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _decades(found: Mapping[str, Sequence[Points]]) -> bool:
    low, high = _range(found.values())
    return low > 0 and high > 10 * low


def _range(methods: Iterable[Sequence[Points]]) -> tuple[float, float]:
    """Of what is finite; NaN where nothing is."""
    values = [y for seeds in methods for points in seeds for _, y in points if math.isfinite(y)]
    return min(values, default=math.nan), max(values, default=math.nan)


def _margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _far_off(found: Mapping[str, Sequence[Points]]) -> str | None:
    """The one line that alone stretches the axis more than threefold, so that the others could not be told apart."""
    drawn = {label: seeds for label, seeds in found.items() if seeds}
    if len(drawn) < 3:
        return None
    low, high = _range(drawn.values())
    for label in drawn:
        least, most = _range(seeds for other, seeds in drawn.items() if other != label)
        if high - low > 3 * (most - least) > 0:
            return label
    return None


def _draw(axes: Any, found: Mapping[str, Sequence[Points]], *, most: int, far: str | None) -> None:
    """far: the label of a line that leaves the axis, which its legend says."""
    for k, (label, seeds) in enumerate((name, runs) for name, runs in found.items() if runs):
        colour, mark = COLOURS[k % len(COLOURS)], MARKS[k % len(MARKS)]
        dash = "-" if k < len(COLOURS) else "--"
        for points in seeds:
            alone = "." if len(points) == 1 else ""  # a line through one point is not seen
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker=alone, alpha=0.3, linewidth=1)
        fewer = "" if len(seeds) == most else f" ({len(seeds)} of {most} seeds)"
        if label == far:
            low, high = _range([seeds])
            fewer += f"\nleaves the picture: {digits(low)} to {digits(high)}"
        mean = _mean(seeds)
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": mark, "markersize": 5, "linewidth": 2}
        axes.plot(*zip(*mean, strict=True), **style, label=label + fewer)
    axes.grid(alpha=0.25)
    if labels := axes.get_legend_handles_labels()[1]:
        beside: dict[str, Any] = (
            {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(labels) > 4 else {}
        )  # else it hides lines
        axes.legend(frameon=False, title="mean; faint: single seeds" if most > 1 else None, fontsize=9, **beside)


def _mean(seeds: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean over seeds, point by point; the seeds' x may differ a little (budgets are met with whole updates)."""
    length = min(map(len, seeds))
    columns: list[list[tuple[float, float]]] = [[points[i] for points in seeds] for i in range(length)]
    return [(_average(p[0] for p in column), _average(p[1] for p in column)) for column in columns]


def _average(numbers: Any) -> float:
    values = list(numbers)
    return sum(values) / len(values)
