"""Table 1: six methods on seven rewards at one compute budget, over seeds; the paper's figures beside ours.

Learning rates are chosen for each method and reward from one grid, by runs of half the budget on prompts that are
neither trained nor judged on. Every method then gets the same number of denoiser evaluations; how long that took is
printed beside it, and the same table at equal time, read from the looks on the way.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from ..progress import digits
from ..tables import markdown_table
from .cells import BASE
from .claims import Claim, best, better, claims_table
from .rows import Cell, Rows, made_by, timed_by
from .setting import METHODS, PAPER, Setting
from .work import Work

LEVELS = (1.0, 0.98, 0.95)  # of the untuned CLIPScore, at which symmetry is compared
IMITATIONS = (
    "Rewards but for symmetry and compressibility are the playground's small imitations of those of the same name, and",
    "objectness looks for hearts where the paper has books: columns compare methods, and no value with the paper's.",
)
COLUMNS = {
    "updates": "updates",
    "evaluations": "evaluations",
    "processor seconds": "cpu_seconds",
    "wall seconds": "seconds",
}


def base_cell(work: Work, reward: str, **given: Any) -> Cell:
    """The untuned model; given: of `Work.cell`, e.g. T, count."""
    return work.cell(BASE, reward, 0, lr=0.0, **given)


def run(work: Work, rewards: Sequence[str]) -> None:
    """Search, then all seeds, reward by reward."""
    for reward in rewards:
        work.choose(METHODS, reward)
        work.do([base_cell(work, reward), *final_cells(work, reward)])


def final_cells(work: Work, reward: str) -> list[Cell]:
    """The cells whose learning rate is known, seeds outermost so that the first seed is complete first."""
    rates = {method: work.lr(method, reward) for method in METHODS}
    return [
        work.cell(method, reward, seed, lr=rate)
        for seed in work.setting.seeds
        for method, rate in rates.items()
        if rate is not None
    ]


def found(work: Work, rows: Rows, reward: str) -> dict[str, dict[int, dict[str, Any]]]:
    """method -> seed -> row, of what has been run."""
    table: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in METHODS}
    for cell in final_cells(work, reward):
        row = rows.get(cell)
        if row is not None:
            table[cell.method][cell.seed] = row
    return table


def values(rows: dict[int, dict[str, Any]], name: str, *, of: Sequence[int] | None = None) -> list[float]:
    return [rows[seed]["scores"][name][0] for seed in sorted(rows) if of is None or seed in of]


def by_seed(rows: dict[int, dict[str, Any]], name: str) -> dict[int, float]:
    return {seed: row["scores"][name][0] for seed, row in rows.items()}


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; "not run" without any; runs that broke down have no number."""
    if not numbers:
        return "not run"
    if broke := sum(not math.isfinite(x) for x in numbers):
        return f"broke down in {broke} of {len(numbers)} runs"
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{digits(mean)} (1 seed)"
    deviation = (sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5
    return f"{digits(mean)} ± {deviation:.0f}" if deviation >= 10 else f"{digits(mean)} ± {deviation:.2g}"


def shared_seeds(table: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Only the seeds that every method with rows has: looks differ by seed, so other means would not be comparable."""
    common = set.intersection(*(set(runs) for runs in table.values() if runs)) if any(table.values()) else set()
    return {method: {seed: row for seed, row in runs.items() if seed in common} for method, runs in table.items()}


def report(work: Work) -> str:
    """The page, of whatever is there."""
    s, rows = work.setting, work.rows
    rewards = list(s.tasks)
    tables = {reward: found(work, rows, reward) for reward in rewards}
    done = sum(len(seeds) for table in tables.values() for seeds in table.values())
    lines = [
        f"# Table 1 on the setting `{s.name}`",
        "",
        f"`{work.command('table1')}`: {done} of {len(METHODS) * len(s.seeds) * len(rewards)} runs",
        "(`--reward NAME` runs one column of them).",
        f"T = {s.T}, batch {s.batch}, {s.budget:g} denoiser evaluations a run, judged on up to {s.count} held-out",
        "prompts with fixed noise; mean ± standard deviation over seeds, of those that were run; the best mean of a",
        "column in bold. Every row stands in `rows.jsonl`.",
        *(IMITATIONS if s.preset == "playground" else ()),
        "",
        "## Ours, at equal denoiser evaluations",
        "",
        markdown_table(["method", *(_head(s, r) for r in rewards)], _rows(work, rows, rewards, tables)),
        "",
        "## The paper's (Stable Diffusion 1.5, 2 hours on 4 A100)",
        "",
        markdown_table(["method", *(_head(s, r) for r in rewards)], _papers(s, rewards)),
        "",
        "## Claims",
        "",
        *claims_table([claim for reward in rewards for claim in claims(s, reward, tables[reward])]),
        "",
        *_sums(work, rows, tables),
        "## What the budget bought",
        "",
        markdown_table(["method", *COLUMNS, "time over DRTune's"], _bought(tables)),
        "",
        "On a CPU runs share the machine: processor seconds are less disturbed there than wall seconds, which count on",
        "a GPU. Rewards and seeds may have been run on machines of different speed: the last column is paired by both.",
        "",
        "## At equal time",
        "",
        f"Each seed at the time of its quickest method, between two of its {s.looks + 1} looks in proportion, so",
        f"coarse; on the looks' {s.looked} prompts, seeds that all methods have, the best mean in bold.",
        "",
        markdown_table(["method", *(_head(s, r) for r in rewards)], _equal_time(s, rewards, tables)),
        "",
        *_beside(work, rows, tables),
        "## Learning rates chosen",
        "",
        markdown_table(["method", *rewards], [[m, *(_rate(work, m, r) for r in rewards)] for m in METHODS]),
        "",
        *_how_chosen(s),
        "",
        *_symmetry(work, tables["symmetry"]),
    ]
    drawn = {reward: f"{work.stem(f'table1_{reward}')}.png" for reward in rewards if any(tables[reward].values())}
    there = {reward: name for reward, name in drawn.items() if (work.folder / name).exists()}
    lines += ["", "## Curves", ""]
    if there:
        lines += [f"On the looks' {s.looked} prompts, so on another level than the first table, and noisier.", ""]
    lines += [f"![{reward}]({name})\n" for reward, name in there.items()]
    lines += made_by(row for table in tables.values() for runs in table.values() for row in runs.values())
    return "\n".join(lines) + "\n"


def claims(setting: Setting, reward: str, table: dict[str, dict[int, dict[str, Any]]]) -> list[Claim]:
    """That DRTune is the best on this reward: against each of the others, by seed. (ours): the paper has none of it."""
    task = setting.tasks[reward]
    found = {method: by_seed(rows, task.native) for method, rows in table.items()}
    ours = found.pop("DRTune")
    says = f"{'' if reward in PAPER else '(ours) '}{reward}: DRTune is better than every other method"
    return [best(says, ours, found, less=task.less, name="DRTune")]


def at_level(trace: Sequence[dict[str, Any]], level: float, measure: str, by: str) -> float | None:
    """`measure` where `by` first falls from above to `level`, linear between looks; None where it never does."""
    for a, b in pairwise(trace):
        high, low = a["scores"][by], b["scores"][by]
        if high > level >= low:
            share = (high - level) / (high - low)
            return float(a["scores"][measure] + share * (b["scores"][measure] - a["scores"][measure]))
    return None


def at_equal(row: dict[str, Any], share: float) -> float | None:
    """The best symmetry of the looks that keep `share` of the untuned CLIPScore, crossings between looks included.

    None where no look after the untuned model's keeps it, which by itself says nothing of training; NaN of a run that
    broke down.
    """
    if "broke" in row:
        return math.nan
    trace = row["trace"]
    level = share * trace[0]["scores"]["clipscore"]
    kept = [look["scores"]["symmetry"] for look in trace[1:] if look["scores"]["clipscore"] >= level]
    crossing = at_level(trace, level, "symmetry", "clipscore")
    found = [*kept, *([] if crossing is None else [crossing])]
    return min(found, default=None)


def _symmetry(work: Work, table: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """The claim of section 4.1: DRTune reaches a symmetry that the late-step methods do not, at equal CLIPScore."""
    body, told, table = [], [], shared_seeds(table)
    for method, runs in table.items():
        cells = [_kept([at_equal(row, share) for _, row in sorted(runs.items())]) for share in LEVELS]
        moved = [row["moved"] for row in runs.values() if row.get("moved")]  # measured on the playground alone
        steps = list(moved[0]) if moved else []
        ratio = [m[steps[0]] / m[steps[-1]] for m in moved if m[steps[-1]]]
        body.append([method, *cells, spread(ratio) if ratio or not runs else "not measured"])
    for share in LEVELS:
        for late in ("DRaFT-LV", "ReFL-10"):
            common = sorted(table["DRTune"].keys() & table[late].keys())
            pairs = [(at_equal(table["DRTune"][seed], share), at_equal(table[late][seed], share)) for seed in common]
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            says = f"(ours) at {share:.0%} of the untuned CLIPScore DRTune is more symmetric than {late}"
            if len(both) < len(pairs):
                figure = f"{len(pairs) - len(both)} of {len(pairs)} seeds never keep it"
                told.append(Claim(says=says, figure=figure, verdict="cannot be told here"))
            else:
                ours, theirs = zip(*both, strict=True) if both else ((), ())
                told.append(better(says, ours, theirs, less=True, names=("DRTune", late)))
    looked, looks = work.setting.looked, work.setting.looks + 1
    return [
        "## Symmetry at equal CLIPScore",
        "",
        f"Lower is better. The lowest symmetry among the {looks} looks ({looked} prompts each) at which CLIPScore",
        "keeps at least that share of its untuned value, crossings between looks included: coarse, and equal",
        "where CLIPScore never fell so far. A seed whose looks after the untuned model's all lie below has no such",
        "symmetry. Seeds that all methods have. Last column: how far the tuned network",
        "moves x0-hat at the first step of the chain, over how far it moves it at the last: what training one part",
        "does to another.",
        "",
        markdown_table(["method", *(f"{share:.0%}" for share in LEVELS), "moved, first / last step"], body),
        "",
        *claims_table(told),
    ]


def _kept(found: Sequence[float | None]) -> str:
    known = [value for value in found if value is not None]
    return spread(known) if len(known) == len(found) else f"kept by {len(known)} of {len(found)} seeds"


def _head(setting: Setting, reward: str) -> str:
    return f"{reward} {'↓' if setting.tasks[reward].less else '↑'}"


def _rows(work: Work, rows: Rows, rewards: Sequence[str], tables: dict[str, Any]) -> list[list[str]]:
    untuned = [rows.get(base_cell(work, reward)) for reward in rewards]
    natives = [work.setting.tasks[reward].native for reward in rewards]
    first = [digits(row["scores"][name][0]) if row else "not run" for row, name in zip(untuned, natives, strict=True)]
    columns = [
        _column(work.setting, reward, {m: values(runs, name) for m, runs in tables[reward].items()})
        for reward, name in zip(rewards, natives, strict=True)
    ]
    return [[BASE, *first], *([method, *cells] for method, *cells in zip(METHODS, *columns, strict=True))]


def _papers(setting: Setting, rewards: Sequence[str]) -> list[list[str]]:
    columns = []
    for reward in rewards:
        values = dict(zip(METHODS, PAPER.get(reward, ()), strict=False))
        first = _best(setting, reward, {method: [value] for method, value in values.items()})
        told = [f"{values[m]:g}" if m in values else "–" for m in METHODS]
        columns.append([f"**{cell}**" if m in first else cell for m, cell in zip(METHODS, told, strict=True)])
    return [[method, *cells] for method, *cells in zip(METHODS, *columns, strict=True)]


def _column(setting: Setting, reward: str, found: dict[str, list[float]]) -> list[str]:
    """A cell for each method, the best in bold once all have been run."""
    first = _best(setting, reward, found)
    return [f"**{spread(numbers)}**" if method in first else spread(numbers) for method, numbers in found.items()]


def _best(setting: Setting, reward: str, found: dict[str, list[float]]) -> list[str]:
    """The method with the best mean, or all that share it; none that broke down, and none before all were run."""
    means = {method: fmean(numbers) for method, numbers in found.items() if numbers}
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    if len(means) < len(METHODS) or not finite:
        return []
    best = min(finite) if setting.tasks[reward].less else max(finite)
    return [method for method, mean in means.items() if mean == best]


def _bought(tables: dict[str, dict[str, dict[int, dict[str, Any]]]]) -> list[list[str]]:
    body = []
    for method in METHODS:
        runs = [row for table in tables.values() for row in table[method].values()]
        columns = [spread([float(row[name]) for row in runs]) for name in COLUMNS.values()]
        times = [time for table in tables.values() for time in _times(table[method], table["DRTune"])]
        body.append([method, *columns, "–" if runs and not times else spread(times)])
    return body


def _times(ours: dict[int, dict[str, Any]], drtune: dict[int, dict[str, Any]]) -> list[float]:
    """Time over DRTune's, seed by seed; without runs that broke down, which did less, and those of unlike devices."""
    pairs = [(ours[seed], drtune[seed]) for seed in sorted(ours.keys() & drtune.keys())]
    alike = [(a, b) for a, b in pairs if "broke" not in {**a, **b} and timed_by(a) == timed_by(b)]
    return [a[timed_by(a)] / b[timed_by(a)] for a, b in alike]


def _equal_time(setting: Setting, rewards: Sequence[str], tables: dict[str, Any]) -> list[list[str]]:
    """The looks' value of the untuned model, and of each method where its seed's quickest method ended.

    Looks differ by seed, so the untuned model has a spread as well.
    """
    columns = []
    for reward in rewards:
        native, table = setting.tasks[reward].native, shared_seeds(tables[reward])
        first = {seed: row["trace"][0]["scores"][native] for seeds in table.values() for seed, row in seeds.items()}
        limits: dict[int, float] = {}
        for seed, row in ((seed, row) for seeds in table.values() for seed, row in seeds.items() if "broke" not in row):
            limits[seed] = min(row[timed_by(row)], limits.get(seed, math.inf))
        found = {
            method: [
                at_time(row["trace"], limits.get(seed, math.inf), native, by=timed_by(row))
                for seed, row in seeds.items()
            ]
            for method, seeds in table.items()
        }
        columns.append([spread(list(first.values())), *_column(setting, reward, found)])
    return [[method, *cells] for method, *cells in zip((BASE, *METHODS), *columns, strict=True)]


def at_time(trace: Sequence[dict[str, Any]], limit: float, measure: str, *, by: str = "cpu_seconds") -> float:
    """`measure` after `limit` seconds, linear between looks."""
    for a, b in pairwise(trace):
        if a[by] <= limit <= b[by]:
            share = (limit - a[by]) / ((b[by] - a[by]) or 1.0)
            return float(a["scores"][measure] + share * (b["scores"][measure] - a["scores"][measure]))
    return float(trace[-1]["scores"][measure])


def _rate(work: Work, method: str, reward: str) -> str:
    rate = work.lr(method, reward)
    if rate is None:
        return "not run"
    grid = work.setting.lrs
    edge = "" if len(grid) < 2 else "<" if rate == min(grid) else ">" if rate == max(grid) else ""
    tried = ", ".join(f"{lr:g}: {digits(found)}" for lr, found in work.searched(method, reward).items())
    return f"{edge}{rate:g}" + (f" ({tried})" if tried else "")


def _how_chosen(s: Setting) -> list[str]:
    if len(s.lrs) < 2:
        return ["One rate for all: nothing was chosen."]
    return [
        f"From {', '.join(f'{lr:g}' for lr in s.lrs)}, by runs of {s.search_budget:g} evaluations with seed",
        f"{s.search_seed} on {s.searched} prompts of the training source that are never trained on; the highest",
        "trained reward (its sum, where CLIPScore stands beside) wins; in brackets what each reached. The middle two",
        "are tried, and the next one as long as the best lies at the edge of what was tried. `<`, `>`: the grid ends.",
    ]


def _sums(work: Work, rows: Rows, tables: dict[str, dict[str, dict[int, dict[str, Any]]]]) -> list[str]:
    """What was trained where it is a sum: the table above shows one part of it."""
    lines: list[str] = []
    for reward, task in work.setting.tasks.items():
        if len(task.parts) < 2:
            continue
        lines += [] if lines else ["## Where a sum was trained", ""]
        names = [task.native, *(part["name"] for part in task.parts if part["name"] != task.native), "reward"]
        base = rows.get(base_cell(work, reward))
        body = [[BASE, *(digits(base["scores"][name][0]) if base else "not run" for name in names)]]
        body += [[method, *(spread(values(runs, name)) for name in names)] for method, runs in tables[reward].items()]
        told = ", ".join(f"{part['name']} (weight {part.get('weight', 1):g})" for part in task.parts)
        lines += [
            f"For {reward} the sum of {told} is trained; less {task.native} counts as more reward:",
            "",
            markdown_table(["method", *names], body),
            "",
        ]
    return lines


def _beside(work: Work, rows: Rows, tables: dict[str, dict[str, dict[int, dict[str, Any]]]]) -> list[str]:
    """All that was measured of each reward's runs, trained or not; and where in the chain the network moved."""
    lines = []
    for reward, table in tables.items():
        runs = [row for seeds in table.values() for row in seeds.values()]
        if not runs:
            continue
        names = [name for name in runs[0]["scores"] if all(name in row["scores"] for row in runs)]
        steps = list(next((row["moved"] for row in runs if row.get("moved")), {}))
        ends = [steps[0], steps[-1]] if steps else []
        base = rows.get(base_cell(work, reward))
        body = [[BASE, *(digits(base["scores"][n][0]) if base and n in base["scores"] else "not run" for n in names)]]
        body[0] += [""] * len(ends)
        for method, seeds in table.items():
            looked_at = [row["moved"] for row in seeds.values() if row.get("moved")]  # none of a run that broke down
            moved = [spread([found[step] for found in looked_at]) for step in ends]
            body.append([method, *(spread(values(seeds, name)) for name in names), *moved])
        headings = ["method", *names, *(f"moved at step {step}" for step in ends)]
        lines += [f"## All that was measured where {reward} was trained", "", markdown_table(headings, body), ""]
    return lines


def picture(work: Work) -> list[Path]:
    """A curve for each reward with rows: its value against the budget, over the seeds that all methods have."""
    from . import plots

    made, rows = [], work.rows
    for reward in work.setting.tasks:
        native = work.setting.tasks[reward].native
        lines = {
            method: [[(look["evaluations"], look["scores"][native]) for look in row["trace"]] for row in runs.values()]
            for method, runs in shared_seeds(found(work, rows, reward)).items()
        }
        if not any(lines.values()):
            continue
        path = work.folder / f"{work.stem(f'table1_{reward}')}.png"
        title = f"{reward}, {'lower' if work.setting.tasks[reward].less else 'higher'} is better"
        label = f"{reward}, {work.setting.looked} held-out prompts"
        made.append(plots.lines(lines, path, x="denoiser evaluations", y=label, title=title))
    return made
