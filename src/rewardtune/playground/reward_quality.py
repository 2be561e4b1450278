"""How well the playground's reward models say what they were taught, on contents that no network saw.

    python -m rewardtune.playground.reward_quality [--output docs/results] [--weights FOLDER]

Each model is measured through the class that users call, on the eval split and without the errors that its training
answers had. Writes playground_rewards.md and the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.rewards import Reward

from . import REWARDS, WEIGHTS
from .clip import soften
from .quality import wilson
from .scenes import Scene, arrange, draw_scenes, render
from .taste import TASTES, Choice, beauty, draw_choices, mistakes, prefer, show
from .training import draw_for

OWN, SHARE, CORRELATION = 0.90, 0.85, 0.90  # the targets
BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report: a value with its 95% interval, from `n` cases."""

    model: str
    what: str
    n: int
    value: float
    low: float
    high: float
    target: float | None = None


def share(model: str, what: str, outcomes: Sequence[bool], *, target: float | None = None) -> Row:
    """A share of successes with its Wilson interval."""
    s = wilson(what, outcomes)
    return Row(model=model, what=what, n=s.n, value=s.share, low=s.low, high=s.high, target=target)


def correlation(model: str, what: str, x: Tensor, y: Tensor, *, target: float | None = None) -> Row:
    """Pearson's correlation with Fisher's interval."""
    r, half = torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item(), 1.959964 / math.sqrt(len(x) - 3)
    low, high = (math.tanh(math.atanh(r) + side * half) for side in (-1, 1))
    return Row(model=model, what=what, n=len(x), value=r, low=low, high=high, target=target)


def area(model: str, what: str, yes: Tensor, no: Tensor) -> Row:
    """The probability that one of `yes` is above one of `no` (area under the ROC curve), with the interval of Hanley
    and McNeil (1982)."""
    ordered = no.sort().values
    below, upto = (torch.searchsorted(ordered, yes, right=right).double() for right in (False, True))
    a, m, n = ((below + upto) / 2 / len(no)).mean().item(), len(yes), len(no)
    spread = (m - 1) * (a / (2 - a) - a * a) + (n - 1) * (2 * a * a / (1 + a) - a * a) + a * (1 - a)
    half = 1.959964 * math.sqrt(max(0.0, spread) / (m * n))
    return Row(model=model, what=what, n=m + n, value=a, low=a - half, high=min(1.0, a + half))


def average_precision(scores: Tensor, right: Tensor, *, total: int) -> float:
    """The mean, over the `total` things to be found, of the precision at which each is found (0 if it is not)."""
    hits = right[scores.argsort(descending=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum().item() / total


@torch.no_grad()
def scores_of(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward's scores, in batches."""
    parts = [reward(images[i : i + BATCH], prompts[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return torch.cat(parts)


def softened(images: Tensor, seed: int) -> Tensor:
    """All of them as a denoiser's early predictions show them, each two neighbours alike."""
    done = []
    for i, part in enumerate(images.split(8)):  # `soften` takes the first third of what it is given
        done.append(soften(torch.cat([part] * 3), draw_for(seed, "softened", i))[: len(part)])
    return torch.cat(done)


def choice_rows(model: str, reward: Reward, choices: Sequence[Choice], images: Tensor, *, target: str) -> list[Row]:
    """How often a reward prefers the picture that a taste prefers; pairs between which that has none are left out."""
    scores = scores_of(reward, images, [str(asked) for asked, _ in choices for _ in range(2)]).view(-1, 2)
    said = (scores[:, 0] > scores[:, 1]).tolist()
    rows = []
    for name, taste in TASTES.items():
        likings = [[taste(asked, picture) for picture in pair] for asked, pair in choices]
        answers = [prefer(*liking) for liking in likings]
        kept = [mistakes(asked, a.scene) == mistakes(asked, b.scene) for asked, (a, b) in choices]
        decided = [i for i, answer in enumerate(answers) if answer != 0.5]
        right = {i: said[i] == (answers[i] == 1) for i in decided}
        rule = f"agrees with `{taste.__name__}`"
        rows.append(share(model, rule, list(right.values()), target=OWN if name == target else None))
        if name == target:
            rows.append(share(model, f"{rule}, mistakes differ", [right[i] for i in decided if not kept[i]]))
            rows.append(share(model, f"{rule}, taste alone decides", [right[i] for i in decided if kept[i]]))
    return rows


def preference_rows(rewards: dict[str, Reward], *, n: int, seed: int) -> list[Row]:
    """The preference models, and CLIPScore, which was taught no taste, on the same pairs; also softened."""
    choices = draw_choices(n, random.Random(f"{seed}/choices"), each=2, split="eval")
    images = show([picture for _, pair in choices for picture in pair])
    soft = softened(images, seed)
    rows: list[Row] = []
    for name in ("pickscore", "hpsv2"):
        rows += choice_rows(name, rewards[name], choices, images, target=name)
        first, *_ = (row for row in choice_rows(name, rewards[name], choices, soft, target=name) if row.target)
        rows.append(replace(first, what=f"{first.what}, softened pictures", target=None))
    rows += choice_rows("clipscore", rewards["clipscore"], choices, images, target="")
    vivid, calm = ([prefer(*(taste(a, p) for p in pair)) for a, pair in choices] for taste in TASTES.values())
    both = [v == c for v, c in zip(vivid, calm, strict=True) if 0.5 not in (v, c)]
    return [*rows, share("(the rules)", "`vivid` and `calm` agree", both)]


def rating_rows(reward: Reward, *, n: int, seed: int) -> list[Row]:
    """The aesthetic head against its rule, over all scenes and between two layouts of one caption."""
    rng = random.Random(f"{seed}/ratings")
    scenes = draw_scenes(n, rng, split="eval")
    others = [arrange(scene.description, rng) for scene in scenes]
    (one, true_one), (two, true_two) = (
        (scores_of(reward, render(s), [scene.caption for scene in s]), torch.tensor([beauty(scene) for scene in s]))
        for s in (scenes, others)
    )
    apart = (true_one - true_two).abs() >= 0.25
    same = ((one > two) == (true_one > true_two))[apart].tolist()
    return [
        correlation("aesthetic", "correlation with `beauty`", one, true_one, target=CORRELATION),
        correlation("aesthetic", "correlation, two layouts of one caption: difference", one - two, true_one - true_two),
        share("aesthetic", "prefers the layout that is better by 0.25 or more", same),
    ]


@torch.no_grad()
def detector_rows(reward: Any, *, n: int, seed: int) -> list[Row]:
    """The detector's boxes and its confidence, on scenes and on softened ones."""
    scenes = draw_scenes(n, random.Random(f"{seed}/boxes"), split="eval")
    images = render(scenes)
    rows = _detector_rows(reward, scenes, images)
    first, *_ = _detector_rows(reward, scenes, softened(images, seed))
    return [*rows, replace(first, what=f"{first.what}, softened pictures", target=None)]


def _detector_rows(reward: Any, scenes: Sequence[Scene], images: Tensor) -> list[Row]:
    from .detector import PAIRS, QUERIES, box_of, detect, fitting, overlap

    queries = torch.stack([reward.queries(query) for query in QUERIES])
    parts = [detect(reward.model, part, queries) for part in images.split(BATCH)]
    logits, boxes = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    hits: dict[bool, list[bool]] = {True: [], False: []}
    found = torch.zeros(logits.shape, dtype=torch.bool)  # the one box of a query that finds an object
    present = torch.zeros(len(scenes), len(QUERIES), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        over = torch.stack([overlap(boxes[i], torch.tensor(box_of(o)))[0] >= 0.5 for o in scene.objects])  # (k, 64)
        named = torch.tensor([fitting(o) for o in scene.objects])  # (k, 48)
        present[i] = named.any(0)
        for q in present[i].nonzero()[:, 0].tolist():
            here = over[named[:, q]]
            hits[q < PAIRS].append(bool(here.any(0)[logits[i, :, q].argmax()]))
            for mask in here:  # objects are apart: no box is over two of them
                if mask.any():
                    found[i, torch.where(mask, logits[i, :, q], -torch.inf).argmax(), q] = True
    totals = [sum(fitting(o)[q] for s in scenes for o in s.objects) for q in range(len(QUERIES))]
    precisions = [
        average_precision(logits[:, :, q].flatten(), found[:, :, q].flatten(), total=totals[q]) if totals[q] else None
        for q in range(len(QUERIES))
    ]
    best = logits.amax(1)  # (n, 48)
    near = torch.stack([torch.tensor([_near(scene, query) for query in QUERIES]) for scene in scenes]) & ~present
    return [
        share("objectness", 'best box of "red heart" over it (IoU >= 0.5)', hits[True], target=SHARE),
        share("objectness", 'best box of "heart" over one', hits[False], target=SHARE),
        _mean("class AP at IoU 0.5, colour and shape", precisions[:PAIRS]),
        _mean("class AP at IoU 0.5, shape", precisions[PAIRS:]),
        area("objectness", "present above absent queries (AUC)", best[present], best[~present]),
        area("objectness", "present above absent queries that share a colour or shape", best[present], best[near]),
    ]


def _near(scene: Scene, query: str) -> bool:
    words = query.split()
    return any(word in (o.colour, o.shape) for o in scene.objects for word in words)


def _mean(what: str, values: Sequence[float | None]) -> Row:
    """A mean over classes, with the interval of its standard error."""
    known = torch.tensor([v for v in values if v is not None])
    mean, half = known.mean().item(), 1.959964 * known.std().item() / math.sqrt(len(known))
    return Row(model="objectness", what=what, n=len(known), value=mean, low=mean - half, high=min(1.0, mean + half))


def open_rewards(weights: Path = WEIGHTS) -> dict[str, Any]:
    """The reward classes on the playground's folders."""
    from rewardtune import rewards

    return {name: rewards.load(name, {"model": str(weights / folder)}) for name, folder in REWARDS.items()}


def measure(output: Path, *, weights: Path = WEIGHTS, n: int = 2000, seed: int = 7) -> list[Row]:
    """Measure everything on `n` fresh pairs and scenes and write the report to `output`."""
    rewards = open_rewards(weights)
    rows = preference_rows(rewards, n=n, seed=seed)
    rows += rating_rows(rewards["aesthetic"], n=n, seed=seed)
    rows += detector_rows(rewards["objectness"], n=n // 2, seed=seed)
    files = [file for folder in {*REWARDS.values(), "pipeline"} for file in (weights / folder).rglob("*")]
    megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    output.mkdir(parents=True, exist_ok=True)
    results = {"n": n, "seed": seed, "megabytes": megabytes, "rows": [asdict(row) for row in rows]}
    (output / "playground_rewards.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "playground_rewards.md").write_text(report(rows, n=n, seed=seed, megabytes=megabytes))
    return rows


def report(rows: Sequence[Row], *, n: int, seed: int, megabytes: float) -> str:
    lines = [
        "# The playground's rewards, measured",
        "",
        f"{n} captions of the eval split with two pictures each, {n} scenes rated, {n // 2} searched, all through",
        f"`rewardtune.rewards`; made by `python -m rewardtune.playground.reward_quality` (seed {seed}). 95% intervals.",
        "The rules are in `playground/taste.py`; pairs between which a rule has no preference are left out.",
        f"All weights of the playground, pipeline included, take {megabytes:.1f} MB.",
        "",
        "| model | measured | cases | value | 95% interval | target |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        target = "" if r.target is None else f"{r.target:.2f}" + ("" if r.value >= r.target else " (missed)")
        lines.append(f"| {r.model} | {r.what} | {r.n} | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {target} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m rewardtune.playground.reward_quality", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with clip, pickscore, hpsv2, ...")
    parser.add_argument("--pairs", type=int, default=2000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure(given.output, weights=given.weights, n=given.pairs)
    print((given.output / "playground_rewards.md").read_text())


if __name__ == "__main__":
    main()
