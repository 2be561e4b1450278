"""The ablations of section 4.2 at equal compute: what runs, and what is claimed of it.

Figures 6, 8 and 9, equally spaced against random steps, with and without early stop; and, not of the paper, the newer
methods beside DRTune. The paper does not name their reward: HPS v2.1 here, the one it tunes SDXL with. Methods that
differ in kind have their learning rate chosen from the grid, each for itself; DRTune with another K, m or T keeps that
of DRTune, as the paper keeps its hyperparameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from ..progress import digits
from ..stats import mean_interval
from ..tables import markdown_table
from .cells import BASE
from .claims import Claim, Verdict, best, better, claims_table
from .rows import Cell, Rows, made_by, timed_by
from .setting import NEWER, SETTINGS, Setting, method_of
from .table1 import base_cell, by_seed, shared_seeds, spread, values
from .work import Work

COLUMNS = {
    "updates": "updates",
    "trained steps": "trained",
    "gradient norm": "grad_norm",
}
MOST_OF = 0.75  # of the iterations: below it "about half" holds, above it it fails


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of a figure. x: its place on the axis, where there is one; options: of the method, if not its own.

    panel: of the plot, where it has several.
    """

    label: str
    method: str
    T: int | None = None
    x: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    panel: str = ""


Told = Callable[["Ablation", Work, Rows], list[Claim]]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """title, what it shows; axis: name of x, where there is one; curves: drawn against the budget."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    told: Told
    reward: str = "hpsv2"
    axis: str | None = None

    def on(self, setting: Setting) -> "Ablation":
        """With the chains of the setting, in its order of work."""
        variants = [v for T in (None, *setting.lengths) for v in self.variants if v.T == T]
        return replace(self, variants=tuple(variants))

    def searched(self) -> list[str]:
        """Methods whose own learning rate is needed."""
        return list(dict.fromkeys(v.method for v in self.variants))

    def cells(self, work: Work, variant: Variant) -> list[Cell]:
        """One a seed; none while the learning rate is unknown."""
        lr = work.lr(variant.method, self.reward)
        if lr is None:
            return []
        given: dict[str, Any] = {"T": variant.T, "options": variant.options, "count": work.setting.counted}
        return [work.cell(variant.method, self.reward, seed, lr=lr, **given) for seed in work.setting.seeds]

    def untuned(self, work: Work) -> dict[int | None, Cell]:
        """What training began from, for each length of chains in the order of the variants; None: the setting's."""
        lengths = dict.fromkeys(v.T for v in self.variants)
        return {T: base_cell(work, self.reward, T=T, count=work.setting.counted) for T in lengths}

    def rows(self, work: Work, rows: Rows, variant: Variant) -> dict[int, dict[str, Any]]:
        found = {cell.seed: rows.get(cell) for cell in self.cells(work, variant)}
        return {seed: row for seed, row in found.items() if row is not None}

    def of(self, label: str) -> Variant:
        return next(v for v in self.variants if v.label == label)

    def run(self, work: Work) -> None:
        work.choose(self.searched(), self.reward)
        for T, base in self.untuned(work).items():  # one length after another, seeds outermost
            of_T = [self.cells(work, variant) for variant in self.variants if variant.T == T]
            work.do([base, *(cell for cells in zip_longest(*of_T) for cell in cells if cell is not None)])

    def report(self, work: Work) -> str:
        s, rows, native = work.setting, work.rows, work.setting.tasks[self.reward].native
        body, begun = [], []
        for T, cell in self.untuned(work).items():
            label, row = BASE if T is None else f"T={T}, {BASE}", rows.get(cell)
            begun += [row] if row else []
            body.append([label, digits(row["scores"][native][0]) if row else "not run", *[""] * (len(COLUMNS) + 2)])
        for variant in self.variants:
            runs = self.rows(work, rows, variant)
            of = [spread([float(row[name]) for row in runs.values()]) for name in COLUMNS.values()]
            of.append(spread([row[timed_by(row)] for row in runs.values()]))
            body.append([variant.label, spread(values(runs, native)), *of, _rate(work, variant, self.reward)])
        png = f"{work.stem(self.name)}.png"
        done = sum(len(self.rows(work, rows, v)) for v in self.variants)
        lines = [
            f"# {self.title}",
            "",
            f"`{work.command(self.name)}`: {done} of {len(self.variants) * len(s.seeds)} runs.",
            f"{s.told(self.reward)}, {s.budget:g} denoiser evaluations a run, {s.counted} held-out prompts; mean ±",
            "standard deviation over seeds. Gradient norms are those before clipping, mean over the updates. Seconds",
            "(of the processor, on a GPU by the wall) hold what evaluations do not count: decoding and the reward,",
            "twice where a chain has two stops; rows may come from machines of different speed.",
            "",
            markdown_table(["", self.reward, *COLUMNS, "seconds", "learning rate"], body),
            "",
            *claims_table(self.told(self, work, rows)),
            *(
                ["", self._what_is_drawn(s), "", f"![{self.title}]({png})"]
                if done and (work.folder / png).exists()
                else []
            ),
            *made_by([*begun, *(row for v in self.variants for row in self.rows(work, rows, v).values())]),
        ]
        return "\n".join(lines) + "\n"

    def _what_is_drawn(self, s: Setting) -> str:
        if self.axis is not None:
            return f"Drawn are the {s.counted} pictures of the table."
        return (
            f"The curves are of the looks' {s.looked} pictures, the table of {s.counted}: levels and order may differ."
        )

    def pair(self, work: Work, rows: Rows, says: str, ours: str, theirs: str) -> Claim:
        """ours beats theirs by the final score; both by label."""
        task = work.setting.tasks[self.reward]
        a, b = (self.rows(work, rows, self.of(label)) for label in (ours, theirs))
        common = sorted(a.keys() & b.keys())
        numbers = [values(runs, task.native, of=common) for runs in (a, b)]
        return better(says, *numbers, less=task.less, names=(ours, theirs))

    def best_of(self, work: Work, rows: Rows, says: str, ours: str, others: Sequence[str]) -> Claim:
        """ours beats each of the others."""
        task = work.setting.tasks[self.reward]
        found = {v: by_seed(self.rows(work, rows, self.of(v)), task.native) for v in (ours, *others)}
        return best(says, found.pop(ours), found, less=task.less, name=ours)


def _rate(work: Work, variant: Variant, reward: str) -> str:
    lr = work.lr(variant.method, reward)
    return "not run" if lr is None else f"{lr:g}"


def half_way(row: dict[str, Any], level: float, native: str) -> float | None:
    """Updates after which the curve first reaches `level` from below, linear between looks; None: never."""
    trace = row["trace"]
    for a, b in pairwise(trace):
        low, high = a["scores"][native], b["scores"][native]
        if low <= level <= high and high > low:
            return float(a["updates"] + (level - low) / (high - low) * (b["updates"] - a["updates"]))
    return None


def _fig6(a: Ablation, work: Work, rows: Rows) -> list[Claim]:
    told = [
        a.pair(work, rows, "stop-gradient helps DRaFT-T", "DRaFT-T + sg", "DRaFT-T"),
        a.pair(work, rows, "stop-gradient helps AlignProp", "AlignProp + sg", "AlignProp"),
        a.pair(work, rows, "early stop helps DRaFT-T", "DRaFT-T + stop", "DRaFT-T"),
        a.pair(work, rows, "early stop helps AlignProp", "AlignProp + stop", "AlignProp"),
        a.pair(work, rows, "early stop helps DRaFT-T with stop-gradient", "DRaFT-T + sg + stop", "DRaFT-T + sg"),
        a.pair(work, rows, "early stop helps AlignProp with stop-gradient", "AlignProp + sg + stop", "AlignProp + sg"),
    ]
    native = work.setting.tasks[a.reward].native
    return [*told, _fails(a, work, rows, native), _iterations(a, work, rows, native)]


def _fails(a: Ablation, work: Work, rows: Rows, native: str) -> Claim:
    """That DRaFT-T fails to optimise: it ends below the untuned model, or breaks down."""
    says = "DRaFT-T fails to optimise without stop-gradient (it ends below the untuned model, or breaks down)"
    runs = [row for row in a.rows(work, rows, a.of("DRaFT-T")).values() if row.get("trace")]
    gains = [row["trace"][-1]["scores"][native] - row["trace"][0]["scores"][native] for row in runs]
    broke = sum("broke" in row for row in runs)
    if not broke:
        gain = f"gain of DRaFT-T on the looks' {work.setting.looked} pictures"
        return better(says, [0.0] * len(gains), gains, less=False, names=("untuned", gain))
    failed = sum("broke" in row or gain < 0 for row, gain in zip(runs, gains, strict=True))
    figure = f"broke down in {broke} of {len(runs)} runs"
    verdict: Verdict = "holds" if failed == len(runs) > 1 else "cannot be told here"
    return Claim(says=says, figure=figure, spread=f"failed in {failed} of {len(runs)} seeds", verdict=verdict)


def _iterations(a: Ablation, work: Work, rows: Rows, native: str) -> Claim:
    """AlignProp with stop-gradient needs half of the iterations for the reward that AlignProp ends with.

    It fails as well where it stays below that reward in every seed, for MOST_OF of AlignProp's updates or more.
    """
    says = "AlignProp with stop-gradient needs about half of the iterations for the same reward"
    plain, ours = (a.rows(work, rows, a.of(label)) for label in ("AlignProp", "AlignProp + sg"))
    shares, missed, common = [], 0, sorted(plain.keys() & ours.keys())
    for seed in common:
        last, trace = plain[seed]["trace"][-1], ours[seed]["trace"]
        level = last["scores"][native]
        reached = half_way(ours[seed], level, native)
        if reached is not None:
            shares.append(reached / last["updates"])
        elif trace[-1]["updates"] >= MOST_OF * last["updates"]:
            missed += all(look["scores"][native] < level for look in trace)
    if not common:
        return Claim(says=says)
    if missed == len(common) > 1:
        return Claim(says=says, figure="reached by no seed", spread=f"{missed} of {missed} seeds", verdict="fails")
    if len(shares) < len(common):
        return Claim(says=says, figure="not reached by every seed", verdict="cannot be told here")
    mean, half = mean_interval(shares)
    figure = f"{digits(mean)} of them, on the looks' {work.setting.looked} pictures"
    if len(shares) < 2:
        return Claim(says=says, figure=figure, spread="one seed", verdict="cannot be told here")
    verdict: Verdict = "holds" if mean + half < MOST_OF else "fails" if mean - half > MOST_OF else "cannot be told here"
    return Claim(
        says=says, figure=figure, spread=f"{digits(mean)} ± {digits(half)} ({len(shares)} seeds)", verdict=verdict
    )


FIG6 = Ablation(
    name="fig6",
    title="Stop-gradient and early stop for DRaFT-T and AlignProp (Fig. 6)",
    variants=tuple(
        Variant(label=f"{method}{more}", method=f"{method}{more}", panel=method)
        for method in ("DRaFT-T", "AlignProp")
        for more in ("", " + sg", " + stop", " + sg + stop")
    ),
    told=_fig6,
)


def _sweep(share: float, says: str) -> Told:
    def told(a: Ablation, work: Work, rows: Rows) -> list[Claim]:
        found = []
        for T in dict.fromkeys(v.T for v in a.variants):
            labels = {v.x: v.label for v in a.variants if v.T == T}
            others = [label for x, label in labels.items() if x != share]
            found.append(a.best_of(work, rows, says.format(T=T), labels[share], others))
        return found

    return told


def _drtune(T: int, **changed: int) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({**method_of("DRTune", T)["options"], **changed}.items()))


LENGTHS = sorted({T for setting in SETTINGS.values() for T in setting.lengths})  # the paper has 20 to 50

FIG8 = Ablation(
    name="fig8",
    title="How many steps to train: K over T (Fig. 8)",
    variants=tuple(
        Variant(label=f"T={T}, K={round(x * T)}", method="DRTune", T=T, x=x, options=_drtune(T, K=round(x * T)))
        for T in LENGTHS
        for x in (0.1, 0.2, 0.4, 1.0)
    ),
    told=_sweep(0.1, "K = 0.1 T is best at T = {T}"),
    axis="K / T",
)

FIG9 = Ablation(
    name="fig9",
    title="How early to stop: m over T (Fig. 9)",
    variants=tuple(
        Variant(label=f"T={T}, m={round(x * T)}", method="DRTune", T=T, x=x, options=_drtune(T, m=round(x * T)))
        for T in LENGTHS
        for x in (0.1, 0.2, 0.4, 0.6, 0.8)
    ),
    told=_sweep(0.4, "m = 0.4 T is best at T = {T}"),
    axis="m / T",
)


def _spacing(a: Ablation, work: Work, rows: Rows) -> list[Claim]:
    return [
        a.pair(work, rows, "equally spaced steps beat random ones", "equally spaced", "random"),
        a.pair(work, rows, "(ours) spacing them inside what runs helps", "spaced within what runs", "equally spaced"),
    ]


SPACING = Ablation(
    name="spacing",
    title="Equally spaced against random steps (section 3.2)",
    variants=(
        Variant(label="equally spaced", method="DRTune"),
        Variant(label="random", method="DRTune, random"),
        Variant(label="spaced within what runs", method="DRTune, executed"),
    ),
    told=_spacing,
)


def _early(a: Ablation, work: Work, rows: Rows) -> list[Claim]:
    return [a.pair(work, rows, "early stop helps DRTune", "with early stop", "without")]


EARLYSTOP = Ablation(
    name="earlystop",
    title="DRTune with and without early stop (sections 3.2, 4.2)",
    variants=(
        Variant(label="with early stop", method="DRTune"),
        Variant(label="without", method="DRTune, no early stop"),
    ),
    told=_early,
)


def _newer(a: Ablation, work: Work, rows: Rows) -> list[Claim]:
    says = "(ours) {} is better than DRTune at equal compute"
    return [a.pair(work, rows, says.format(method), method, "DRTune") for method in NEWER]


NEWER_METHODS = Ablation(
    name="newer",
    title="The newer methods, and several stops of a chain, beside DRTune",
    variants=tuple(Variant(label=method, method=method) for method in ("DRTune", *NEWER)),
    told=_newer,
)

ABLATIONS = {a.name: a for a in (FIG6, FIG8, FIG9, SPACING, EARLYSTOP, NEWER_METHODS)}


def picture(a: Ablation, work: Work) -> Path | None:
    """Curves against the budget; in figures with an axis, the final score against it, one line a T. None: no rows."""
    from . import plots

    s, rows, native = work.setting, work.rows, work.setting.tasks[a.reward].native
    path, told = work.folder / f"{work.stem(a.name)}.png", f"{a.reward} on held-out prompts"
    found: dict[str, list[list[tuple[float, float]]]] = {}
    if not any(a.rows(work, rows, v) for v in a.variants):
        return None
    if a.axis is None:
        panels = {}
        of = shared_seeds({v.label: a.rows(work, rows, v) for v in a.variants})
        for v in a.variants:
            label = f"{v.label}, lr {_rate(work, v, a.reward)}"
            panels[label] = v.panel
            found[label] = [
                [(look["evaluations"], look["scores"][native]) for look in row["trace"]] for row in of[v.label].values()
            ]
        y = f"{told}, {s.looked} pictures"
        return plots.lines(found, path, x="denoiser evaluations", y=y, title=a.title, panels=panels)
    for T in dict.fromkeys(v.T for v in a.variants):
        of_T = [(v.x or 0.0, a.rows(work, rows, v)) for v in a.variants if v.T == T]
        found[f"T = {T}"] = [
            points
            for seed in s.seeds
            if (points := [(x, runs[seed]["scores"][native][0]) for x, runs in of_T if seed in runs])
        ]
    return plots.lines(found, path, x=a.axis, y=f"{told}, {s.counted} pictures", title=a.title)
