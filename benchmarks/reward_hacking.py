"""Driven into reward hacking on purpose, with and without guards: `python benchmarks/reward_hacking.py`

The playground's preset with the aesthetic reward alone and a high learning rate, twice with the same seed: once
watched by a rule on CLIPScore, which is never trained on, and once not. Both runs' saved pictures are measured by the
same panel afterwards. Writes docs/results/reward_hacking.md, its curve and pictures as PNG, and the numbers as JSON; a
run that stands in the JSON is not repeated. About five minutes a run and core.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from stored import refuse_other
from torch import Tensor

from rewardtune import evaluate, playground
from rewardtune.config import Part, load_config
from rewardtune.diversity import Features
from rewardtune.errors import TrainingStopped
from rewardtune.guards import Evaluation, best_of, make_rules
from rewardtune.launch import make_reward, train
from rewardtune.panel import Panel
from rewardtune.pictures import open_image
from rewardtune.runfolder import write_text

RESULTS = Path("docs/results")
STORED = RESULTS / "reward_hacking.json"
LR = 1e-3  # two and a half times that of the preset
TRAINED = {"name": "aesthetic", "options": {"model": "playground"}}
HELD_OUT = {"name": "clipscore", "options": {"model": "playground"}}
ALLOWED = 0.10  # of the held-out reward's base value: what the guarded run may not lose
RULES = [{"metric": "clipscore", "falls_by": 0.05, "then": "stop"}]
EVERY = {"without guards": 4, "with guards": 2}  # updates between evaluations; at 4 the fall was noticed at 17 %
SHOWN = 8
COLOURS = {"without guards": "#c0392b", "with guards": "#2471a3"}


def run(name: str, *, updates: int, every: int, count: int, seed: int) -> dict[str, Any]:
    """One run; its curve, how it ended, and its pictures before and at its last evaluation."""
    prompts = playground.prompts(count, split="eval", layout="free")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        changes = [f"reward={json.dumps([TRAINED])}", f"seed={seed}", f"output_dir={path}"]
        changes += [f"optim.steps={updates}", f"optim.lr={LR}", f"eval.every={every}", f"eval.count={count}"]
        changes += [f"eval.prompts={json.dumps(prompts)}"]
        if name == "with guards":
            changes += [f"guards.rewards={json.dumps([HELD_OUT])}", f"guards.rules={json.dumps(RULES)}"]
        else:
            changes += ["checkpoints.best=null"]  # keep the last weights, whatever they have become
        ended = "made all updates"
        try:
            train(load_config("playground", changes))
        except TrainingStopped as stopped:
            ended = str(stopped)
        curve, pictures = measured(path / "samples", prompts, updates)
    evaluate.save_images(pictures[0][:SHOWN], folder_of(name) / "before")
    evaluate.save_images(pictures[-1][:SHOWN], folder_of(name) / "after")
    rules = make_rules(RULES) if name == "with guards" else []
    return {
        "run": name,
        "seed": seed,
        "updates": updates,
        "every": every,
        "lr": LR,
        "ended": ended,
        "best": best_of(curve, "reward", rules),
        "prompts": prompts,
        "curve": [asdict(evaluation) for evaluation in curve],
    }


def measured(samples: Path, prompts: list[str], updates: int) -> tuple[list[Evaluation], list[Tensor]]:
    """The panel on every folder of `samples` (step-000000, ..., final), in the order of steps."""
    folders = {int(path.name.removeprefix("step-")): path for path in samples.glob("step-*")}
    if (samples / "final").is_dir():
        folders[updates] = samples / "final"
    panel = Panel(
        prompts=prompts,
        rewards=make_reward([Part(**HELD_OUT)]),
        trained=make_reward([Part(**TRAINED)]),
        features=Features("playground"),
    )
    pictures = [
        torch.stack([open_image(file)[0] for file in sorted(folders[step].glob("*.png"))]) for step in sorted(folders)
    ]
    steps = zip(sorted(folders), pictures, strict=True)
    return [panel(images, base=pictures[0], step=step) for step, images in steps], pictures


def folder_of(name: str) -> Path:
    return RESULTS / "reward_hacking" / name.replace(" ", "_")


def curve_of(row: dict[str, Any]) -> list[Evaluation]:
    return [Evaluation(**evaluation) for evaluation in row["curve"]]


def share(evaluation: Evaluation, base: float) -> float:
    """The change of CLIPScore as a share of its base value."""
    return (evaluation.values["clipscore"] - base) / abs(base)


def plot(path: Path, curves: dict[str, list[Evaluation]], metrics: Sequence[str]) -> None:
    """One panel a metric, updates against the value with its 95 % interval over prompts; PNG `path`."""
    width, height, left, top, gap = 380, 260, 56, 34, 30
    canvas = Image.new("RGB", (len(metrics) * (left + width + gap), top + height + 60), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    last = max(curve[-1].step for curve in curves.values())
    for place, metric in enumerate(metrics):
        x0 = place * (left + width + gap) + left
        values = [e.interval(metric) for curve in curves.values() for e in curve]
        halves = [0.0 if half != half else half for _, half in values]
        line = (1 - ALLOWED) * next(iter(curves.values()))[0].values[metric]
        low = min(value - half for (value, _), half in zip(values, halves, strict=True))
        low = min(low, line) if metric == "clipscore" else low
        high = max(value + half for (value, _), half in zip(values, halves, strict=True))
        scale = height / max(high - low, 1e-9)

        def at(step: int, value: float, x0: int = x0, high: float = high, scale: float = scale) -> tuple[float, float]:
            return x0 + width * step / last, top + (high - value) * scale

        pen.rectangle((x0, top, x0 + width, top + height), outline="silver")
        pen.text((x0, 8), metric, fill="black", font=font)
        for value in (low, high):
            pen.text((x0 - left + 4, at(0, value)[1] - 8), f"{value:.3g}", fill="dimgray", font=font)
        for step in (0, last):
            pen.text((at(step, low)[0] - 8, top + height + 4), str(step), fill="dimgray", font=font)
        if metric == "clipscore":
            y = at(0, line)[1]
            pen.line((x0, y, x0 + width, y), fill="gray")
        for name, curve in curves.items():
            points = [at(e.step, e.values[metric]) for e in curve]
            pen.line(points, fill=COLOURS[name], width=2)
            for e, (x, y) in zip(curve, points, strict=True):
                half = e.interval(metric)[1]
                if half == half:
                    pen.line((x, y - half * scale, x, y + half * scale), fill=COLOURS[name])
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[name])
    for place, name in enumerate(curves):
        pen.text((left + 180 * place, top + height + 30), name, fill=COLOURS[name], font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def pictures(rows: list[dict[str, Any]]) -> None:
    """reward_hacking_pictures.png: before, and the last evaluation of each run."""
    columns = {}
    for row in rows:
        for moment in ("before", "after"):
            name = "before" if moment == "before" else f"{row['run']}, step {row['curve'][-1]['step']}"
            files = sorted((folder_of(row["run"]) / moment).glob("*.png"))
            columns[name] = torch.stack([open_image(file)[0] for file in files])
    evaluate.save_grid(columns, rows[0]["prompts"][:SHOWN], RESULTS / "reward_hacking_pictures.png", per_row=2)


def report(rows: list[dict[str, Any]]) -> str:
    shown = ["aesthetic", "clipscore", "vendi", "saturation", "sharpness", "base_distance"]
    lines = [
        "# Reward hacking, with and without guards",
        "",
        f"`python benchmarks/reward_hacking.py`: the playground, aesthetic reward alone, learning rate {LR:g},",
        f"seed {rows[0]['seed']}; {len(rows[0]['prompts'])} held-out prompts, fixed noise. CLIPScore is not",
        f"trained on. The rule of the guarded run: `{json.dumps(RULES[0])}`; asked is that less than {ALLOWED:.0%} is",
        "lost. Intervals are Student's at 95 % over prompts; one seed. What is lost when a rule acts depends on how",
        "far two evaluations are apart.",
        "",
        "![curve](reward_hacking.png)",
        "",
        "The grey line is what may not be crossed. Pictures of the last evaluations:",
        "",
        "![pictures](reward_hacking_pictures.png)",
        "",
    ]
    for row in rows:
        curve = curve_of(row)
        base = curve[0].values["clipscore"]
        best = next(e for e in curve if e.step == row["best"])
        lines += [
            f"## {row['run'].capitalize()}",
            "",
            f"Ended: {row['ended']}. The best evaluation by the trained reward is step {row['best']}: CLIPScore",
            f"{best.values['clipscore']:.3f}, {share(best, base):+.1%} of its base value;",
            f"at the last evaluation {share(curve[-1], base):+.1%}.",
            "",
            "| updates | " + " | ".join(shown) + " | CLIPScore, change |",
            "|-|" + "-|" * (len(shown) + 1),
        ]
        for e in curve:
            cells = [f"{e.values[name]:.3g}" for name in shown]
            cells[1] = f"{e.values['clipscore']:.3f} ± {e.interval('clipscore')[1]:.3f}"
            lines.append(f"| {e.step} | " + " | ".join(cells) + f" | {share(e, base):+.1%} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--count", type=int, default=32, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = {row["run"]: row for row in json.loads(STORED.read_text())} if STORED.exists() else {}
    settings = {"seed": asked.seed, "updates": asked.updates}
    for name, row in rows.items():
        refuse_other({**row, "count": len(row["prompts"])}, **settings, every=EVERY[name], lr=LR, count=asked.count)
    for name in COLOURS:
        if name not in rows:
            rows[name] = run(name, **settings, every=EVERY[name], count=asked.count)
            write_text(STORED, json.dumps(list(rows.values())) + "\n")
    ordered = [rows[name] for name in COLOURS]
    plot(RESULTS / "reward_hacking.png", {r["run"]: curve_of(r) for r in ordered}, ["aesthetic", "clipscore", "vendi"])
    pictures(ordered)
    text = report(ordered)
    write_text(RESULTS / "reward_hacking.md", text)
    print(text)


if __name__ == "__main__":
    main()
