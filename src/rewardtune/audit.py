"""`rewardtune audit`: what a reward likes, before training makes all pictures like that.

Every comparison is paired: the same pictures with one thing changed (`edits.py`), or the same pictures with another
prompt. A change is given in standard deviations (sd) of the reward over the untouched pictures, with Student's 95%
interval over pictures; a verdict is spoken only where the interval excludes 0 after Bonferroni's correction for all
comparisons of the report, and the change is at least 0.01 sd. The sd itself is taken as known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean, stdev, variance
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__
from .edits import FALSE_CAPTIONS, PIXEL_EDITS, SCENE_EDITS, alone, base_scenes, false_captions, scene_factors
from .errors import ConfigError, RewardError
from .pictures import Caption, captions, find_images, open_image
from .runfolder import write_text
from .score import choose, equal_sizes, load_rewards, pick_device
from .stats import student
from .tables import markdown_table, text_table

if TYPE_CHECKING:
    from .playground import Scene
    from .rewards import Reward

LEAST = 0.01  # sd; a smaller change is called none, however certain it is
FEWEST = 8  # pictures
GROUPS = {
    "pixels": "The same pictures, edited",
    "scene": "The same scenes, drawn differently, caption and all",
    "category": "By category, against the others",
    "prompt": "The same pictures, another prompt",
}

HEADINGS = ("changed", "how", "change", "95% interval", "rises", "score", "verdict")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One comparison. change, low, high, clear_low, clear_high: in sd; the last two are corrected for all others.

    rises: share of the pictures whose score rises, NaN where the two sides are not paired.
    mean: the mean score of the edited pictures or of the category, in the reward's own units.
    """

    group: str
    name: str
    what: str
    change: float
    low: float
    high: float
    clear_low: float
    clear_high: float
    rises: float
    mean: float
    pictures: int

    @property
    def clear(self) -> bool:
        """Excludes 0 after the correction, and is not negligible."""
        return (self.clear_low > 0 or self.clear_high < 0) and abs(self.change) >= LEAST

    @property
    def verdict(self) -> str:
        """strongly dislikes, dislikes, slightly dislikes, no effect shown, slightly prefers, ...; of another prompt:
        notices it, or not shown to notice it."""
        if not self.clear:
            return "not shown to notice" if self.group == "prompt" else "no effect shown"
        if self.group == "prompt" and self.change < 0:
            return "notices"
        degree = "slightly " if abs(self.change) < 0.2 else "strongly " if abs(self.change) >= 0.8 else ""
        return f"{degree}{'prefers' if self.change > 0 else 'dislikes'}"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A report. mean, sd: of the untouched pictures' scores, higher is better. notes: what was left out, and why."""

    reward: str
    source: str
    pictures: int
    mean: float
    sd: float
    effects: tuple[Effect, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Comparisons:
    """Comparisons, collected until it is known how many there are. sd: the unit of their changes."""

    def __init__(self, sd: float) -> None:
        self.sd, self.rows = sd, list[tuple[dict[str, Any], float, int]]()

    def paired(self, group: str, name: str, what: str, before: Sequence[float], after: Sequence[float]) -> None:
        changes = [(b - a) / self.sd for a, b in zip(before, after, strict=True)]
        facts = {
            "rises": fmean(change > 0 for change in changes),
            "mean": fmean(after),
            "pictures": len(changes),
        }
        error = stdev(changes) / math.sqrt(len(changes))
        self._add(group, name, what, fmean(changes), error, len(changes) - 1, facts)

    def grouped(self, group: str, name: str, what: str, inside: Sequence[float], outside: Sequence[float]) -> None:
        """Welch's comparison of two sets of pictures."""
        own, others = (variance(values) / len(values) / self.sd**2 for values in (inside, outside))
        freedom = 1
        if own + others > 0:
            freedom = int((own + others) ** 2 / (own**2 / (len(inside) - 1) + others**2 / (len(outside) - 1)))
        change = (fmean(inside) - fmean(outside)) / self.sd
        facts = {"rises": math.nan, "mean": fmean(inside), "pictures": len(inside)}
        self._add(group, name, what, change, math.sqrt(own + others), max(1, freedom), facts)

    def _add(
        self, group: str, name: str, what: str, change: float, error: float, freedom: int, facts: dict[str, Any]
    ) -> None:
        row = {"group": group, "name": name, "what": what, "change": change, **facts}
        self.rows.append((row, error, freedom))

    def effects(self) -> tuple[Effect, ...]:
        found = []
        for row, error, freedom in self.rows:
            half = student(0.95, freedom) * error
            wide = student(1 - 0.05 / len(self.rows), freedom) * error
            change = row["change"]
            found.append(
                Effect(**row, low=change - half, high=change + half, clear_low=change - wide, clear_high=change + wide)
            )
        return tuple(found)


class Judge:
    """Scores of pictures, in batches, without a graph."""

    def __init__(self, reward: Reward, *, name: str, batch: int, device: str) -> None:
        self.reward, self.name, self.batch, self.device = reward.to(device), name, batch, device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(images), self.batch):
            part = slice(first, first + self.batch)
            found += self.reward(images[part].to(self.device), list(prompts[part])).tolist()
        if broken := [score for score in found if not math.isfinite(score)]:
            raise RewardError(
                f"reward '{self.name}' scored {len(broken)} of {len(found)} pictures {broken[0]}; legal are finite "
                "numbers: look in it for a division by 0 or a log or root of a negative number"
            )
        return found

    def unit(self, scores: Sequence[float]) -> float:
        """The standard deviation of the untouched pictures' scores. RewardError where all score alike."""
        sd = stdev(scores)
        if not sd > 1e-6 * max(1e-6, abs(fmean(scores))):
            raise RewardError(
                f"reward '{self.name}' scores all {len(scores)} pictures alike ({scores[0]:.6g}); an audit needs "
                "pictures that it tells apart"
            )
        return sd


def run(
    name: str,
    options: Sequence[str] = (),
    *,
    images: Sequence[str] | None = None,
    prompts: Path | None = None,
    prompt: str | None = None,
    count: int = 64,
    seed: int = 0,
    batch: int = 32,
    device: str = "auto",
) -> Audit:
    """The audit of a reward by name, on `count` drawn scenes or on pictures of files, folders and globs."""
    if not images and (prompts is not None or prompt is not None):
        raise ConfigError("prompts without images: drawn scenes have captions of their own; add --images")
    choices, device = choose([name], options), pick_device(device)
    paths = find_images(images) if images else []
    texts = captions(paths, prompts=prompts, prompt=prompt) if images else None
    reward = load_rewards(choices, prompts=not images or texts is not None, device=device)[name]
    judge = Judge(reward, name=name, batch=batch, device=device)
    report = audit_files(judge, paths, texts) if images else audit_scenes(judge, count=count, seed=seed)
    return replace(report, options=choices[name])


def audit_scenes(judge: Judge, *, count: int = 64, seed: int = 0) -> Audit:
    """The audit on `count` drawn scenes of the playground: no file, no download."""
    from .playground import render

    _enough(count)
    scenes = base_scenes(count, Random(f"audit {seed}"))
    prompts = [scene.caption for scene in scenes]
    images = render(scenes)
    before = judge(images, prompts)
    raw, notes = Comparisons(judge.unit(before)), list[str]()
    for edit in PIXEL_EDITS:
        raw.paired("pixels", edit.words, edit.what, before, judge(edit(images), prompts))

    def drawn(change: Callable[[Scene], Scene]) -> list[float]:
        changed = [change(scene) for scene in scenes]
        return judge(render(changed), [scene.caption for scene in changed])

    for words, change in SCENE_EDITS.items():
        raw.paired("scene", words, "", before, drawn(change))
    for factor, levels in scene_factors().items():
        scores = {level: drawn(change) for level, change in levels.items()}
        middle = [fmean(row) for row in zip(*scores.values(), strict=True)]
        for level, after in scores.items():
            raw.paired("scene", f"{factor} {level}", f"against the mean of {len(levels)}", middle, after)
    single = [alone(scene) for scene in scenes]
    pictures = render(single)
    told = judge(pictures, [scene.caption for scene in single])
    raw.paired("prompt", "a missing object", "drawn without it", told, judge(pictures, prompts))
    for kind, words in FALSE_CAPTIONS.items():
        false = false_captions(scenes, kind, Random(f"audit {seed} {kind}"))
        rows = [row for row, caption in enumerate(false) if caption is not None]
        if len(rows) < 2:
            notes.append(f"not tried, too few of the scenes allow it: {words}")
            continue
        after = judge(images[rows], [caption for caption in false if caption is not None])
        raw.paired("prompt", words, "caption false in one thing", [before[row] for row in rows], after)
    _other_prompts(raw, before, prompts, lambda rows, texts: judge(images[rows], texts))
    return _report(judge, "drawn scenes of the playground", before, raw, notes)


def audit_files(judge: Judge, paths: Sequence[Path], texts: Sequence[Caption] | None) -> Audit:
    """The audit on pictures of the user's, by category where the captions have one."""
    _enough(len(paths))
    prompts = [caption.prompt for caption in texts] if texts else [""] * len(paths)
    before: list[float] = []
    edited: list[list[float]] = [[] for _ in PIXEL_EDITS]
    for images, rows in _groups(paths, range(len(paths)), judge.batch):
        given = [prompts[row] for row in rows]
        before += judge(images, given)
        for scores, edit in zip(edited, PIXEL_EDITS, strict=True):
            scores += judge(edit(images), given)
    raw = Comparisons(judge.unit(before))
    for scores, edit in zip(edited, PIXEL_EDITS, strict=True):
        raw.paired("pixels", edit.words, edit.what, before, scores)
    notes = _categories(raw, before, [caption.category for caption in texts or ()])

    def again(rows: Sequence[int], texts: Sequence[str]) -> list[float]:
        wanted = dict(zip(rows, texts, strict=True))
        return [
            score
            for images, part in _groups(paths, rows, judge.batch)
            for score in judge(images, [wanted[row] for row in part])
        ]

    _other_prompts(raw, before, prompts, again)
    return _report(judge, "pictures from files", before, raw, notes)


def _enough(count: int) -> None:
    if count < FEWEST:
        raise ConfigError(f"an audit of {count} pictures says nothing; give at least {FEWEST}")


def _groups(paths: Sequence[Path], rows: Sequence[int], batch: int) -> Iterator[tuple[Tensor, list[int]]]:
    for group in equal_sizes(((row, open_image(paths[row])[0]) for row in rows), batch):
        yield torch.stack([image for _, image in group]), [row for row, _ in group]


def _categories(raw: Comparisons, before: Sequence[float], categories: Sequence[str]) -> tuple[str, ...]:
    notes = []
    for category in dict.fromkeys(filter(None, categories)):
        inside = [score for score, own in zip(before, categories, strict=True) if own == category]
        outside = [score for score, own in zip(before, categories, strict=True) if own != category]
        if min(len(inside), len(outside)) < 2:
            notes.append(f"category {category!r} left out: {len(inside)} of {len(before)} pictures")
            continue
        raw.grouped("category", f"category {category}", "", inside, outside)
    return tuple(notes)


def _other_prompts(
    raw: Comparisons,
    before: Sequence[float],
    prompts: Sequence[str],
    judge: Callable[[Sequence[int], Sequence[str]], list[float]],
) -> None:
    """Every picture with the prompt of the picture half the set further on; equal prompts are left out."""
    others = [prompts[(row + len(prompts) // 2) % len(prompts)] for row in range(len(prompts))]
    rows = [row for row, (own, other) in enumerate(zip(prompts, others, strict=True)) if own != other]
    if len(rows) >= 2:
        after = judge(rows, [others[row] for row in rows])
        raw.paired("prompt", "another picture's prompt", "prompts exchanged", [before[row] for row in rows], after)


def _report(judge: Judge, source: str, before: Sequence[float], raw: Comparisons, notes: Sequence[str] = ()) -> Audit:
    return Audit(
        reward=judge.name,
        source=source,
        pictures=len(before),
        mean=fmean(before),
        sd=raw.sd,
        effects=raw.effects(),
        notes=tuple(notes),
    )


def write(audit: Audit, folder: Path) -> None:
    """audit.md and audit.json in `folder`."""
    write_text(folder / "audit.md", as_markdown(audit))
    write_text(folder / "audit.json", as_json(audit))


def _rows(audit: Audit, group: str) -> list[list[str]]:
    return [
        [
            effect.name,
            effect.what,
            f"{effect.change:+.2f}",
            f"[{effect.low:+.2f}, {effect.high:+.2f}]",
            "" if math.isnan(effect.rises) else f"{effect.rises:.0%}",
            f"{effect.mean:.4g}",
            effect.verdict,
        ]
        for effect in audit.effects
        if effect.group == group
    ]


def verdicts(audit: Audit) -> list[str]:
    """The clear effects, largest first, and last a line with what was not shown."""
    clear = sorted((effect for effect in audit.effects if effect.clear), key=lambda effect: -abs(effect.change))
    lines = [f"{e.verdict} {e.name}: {e.change:+.2f} sd [{e.low:+.2f}, {e.high:+.2f}]" for e in clear]
    for verdict in ("no effect shown", "not shown to notice"):
        if names := [effect.name for effect in audit.effects if effect.verdict == verdict]:
            lines.append(f"{verdict}: {', '.join(names)}")
    return lines


def _document(audit: Audit, heading: Callable[[int, str], str], table: Callable[..., str]) -> str:
    count = len(audit.effects)
    blocks = [
        heading(1, f"Audit of {audit.reward}"),
        f"{audit.pictures} {audit.source}. Score {audit.mean:.4g}, standard deviation (sd) {audit.sd:.4g}; higher is "
        f"better.\nChanges are in sd, with 95% intervals over the pictures; a verdict needs {1 - 0.05 / count:.2%} "
        f"(Bonferroni, {count} comparisons).",
        *audit.notes,
    ]
    for group, title in GROUPS.items():
        if rows := _rows(audit, group):
            blocks += [heading(2, title), table(HEADINGS, rows)]
    blocks += [heading(2, "In short"), "\n".join(f"- {line}" for line in verdicts(audit))]
    return "\n\n".join(blocks) + "\n"


def as_text(audit: Audit) -> str:
    """For the terminal."""

    def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return text_table(headings, rows, flexible=0, numbers=(2, 4, 5))

    return _document(audit, lambda level, text: text if level == 1 else f"{text}:", table)


def as_markdown(audit: Audit) -> str:
    return _document(audit, lambda level, text: f"{'#' * level} {text}", markdown_table)


def as_json(audit: Audit) -> str:
    """Everything. A share that does not exist is null."""
    effects = [
        {**asdict(e), "rises": None if math.isnan(e.rises) else e.rises, "clear": e.clear, "verdict": e.verdict}
        for e in audit.effects
    ]
    document = {"rewardtune": __version__, **asdict(audit), "effects": effects}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
