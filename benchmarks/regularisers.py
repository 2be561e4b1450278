"""Do the regularisers keep the pictures diverse and faithful at equal reward? `python benchmarks/regularisers.py`

The playground, driven into reward hacking on purpose: DRTune on the aesthetic reward alone at a high learning rate,
alone and with several strengths of the KL term and of the denoising loss, three seeds each. Held-out prompts with fixed
noise are judged every few updates by the reward, by CLIPScore (never trained on), and by diversity (mean pairwise
distance 1 - cos of CLIP image features). Writes docs/results/regularisers.md, a curve and the numbers as JSON; a run
whose row already stands in the JSON is not repeated. Some five minutes a run and core.

The loop here is the plain one of a researcher, not the trainer: rollout, reward, sweep, Adam.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from stored import completed

RESULTS = Path("docs/results")
STORED = RESULTS / "regularisers.json"
LR, CLIP, BATCH, RANK = 1e-3, 0.1, 8, 16
CALL = {"num_inference_steps": 20, "guidance_scale": 4.0}
SETTINGS: dict[str, dict[str, float]] = {
    "none": {},
    "kl 0.1": {"kl": 0.1},
    "kl 1": {"kl": 1.0},
    "kl 10": {"kl": 10.0},
    "denoise 1": {"denoise": 1.0},
    "denoise 10": {"denoise": 10.0},
    "denoise 100": {"denoise": 100.0},
}
MEASURES = ("reward", "clipscore", "diversity")


def tune(name: str, seed: int, *, updates: int, every: int, count: int) -> dict[str, Any]:
    """One run: the three measures before, every `every` updates and at the end."""
    import torch

    from rewardtune import adapters, evaluate, methods, playground, rewards
    from rewardtune.engine import count_steps, rollout
    from rewardtune.gradient import derive_seed
    from rewardtune.prompts import batch_prompts
    from rewardtune.regularize import Denoising

    torch.set_num_threads(1)
    started, strengths = time.perf_counter(), SETTINGS[name]
    pipe = playground.pipeline()
    parameters = adapters.add_lora(pipe.unet, RANK, targets="attention+conv", seed=seed)
    train, held_out = (playground.prompts(n, split=s, layout="free") for n, s in ((1000, "train"), (count, "eval")))
    reward = rewards.Aesthetic(model=str(playground.reward_path("aesthetic")))
    clip = rewards.CLIPScore(model=str(playground.clip_path()))
    T = count_steps(pipe, **evaluate.for_prompts(train[:1], CALL))
    method = methods.drtune(K=2, m=8)
    denoising = None
    if strengths.get("denoise"):
        denoising = Denoising(weight=strengths["denoise"]).prepare(pipe, train, call=CALL, seed=seed)

    @torch.no_grad()
    def measured(update: int) -> dict[str, float]:
        seeds = [derive_seed("eval", index) for index in range(count)]  # the same noise for every run
        images = evaluate.sample(pipe, held_out, seeds=seeds, call=CALL)
        pixels = clip.preprocess(images)
        features = torch.nn.functional.normalize(
            clip.model.get_image_features(pixel_values=pixels).pooler_output, dim=1
        )
        pairs = (features @ features.T)[tuple(torch.triu_indices(count, count, offset=1))]
        return {
            "update": update,
            "reward": float(reward(images, held_out).mean()),
            "clipscore": float(clip(images, held_out).mean()),
            "diversity": float((1 - pairs).mean()),
        }

    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    trace, distances, losses = [measured(0)], [], []
    for step in range(updates):
        optimizer.zero_grad()
        prompts = batch_prompts(train, seed=seed, step=step, size=BATCH)
        seeds = [derive_seed(seed, step, index) for index in range(BATCH)]
        plan = method(T, random.Random(f"plan {seed} {step}"))
        given = {**CALL, "prompt": prompts, "generator": evaluate.generators(seeds)}
        with rollout(pipe, plan, seed=seeds[0], **given) as tape:
            swept = tape.backward(-reward(tape.images, prompts).mean(), kl=strengths.get("kl", 0.0))
        if swept.kl is not None:
            distances.append(swept.kl)
        if denoising is not None:
            losses.append(denoising.add(step, first=0, size=BATCH, batch=BATCH))
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == updates:
            trace.append(measured(step + 1))
    return {
        "setting": name,
        "seed": seed,
        "updates": updates,
        "every": every,
        "count": count,
        "lr": LR,
        "seconds": round(time.perf_counter() - started),
        "trace": trace,
        "kl": distances[-10:],
        "denoise": [statistics.mean(part) for part in (losses[:10], losses[-10:]) if part],
    }


def at_reward(trace: list[dict[str, float]], level: float, measure: str) -> float:
    """The measure where the run first reaches this reward, linear between two evaluations. ValueError if never."""
    if trace[0]["reward"] >= level:
        return trace[0][measure]
    for a, b in pairwise(trace):
        if a["reward"] < level <= b["reward"]:
            share = (level - a["reward"]) / (b["reward"] - a["reward"])
            return a[measure] + share * (b[measure] - a[measure])
    raise ValueError(f"a run never reaches the reward {level}")


def equal_level(rows: list[dict[str, Any]], name: str) -> tuple[float, list[tuple[Any, Any]]]:
    """The highest reward that all seeds of a setting reach, with and without it; their traces, in pairs."""
    plain = {row["seed"]: row["trace"] for row in rows if row["setting"] == "none"}
    pairs = [(plain[row["seed"]], row["trace"]) for row in rows if row["setting"] == name and row["seed"] in plain]
    return min(max(point["reward"] for point in trace) for pair in pairs for trace in pair), pairs


def at_equal(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Level, then for CLIPScore and diversity: without -> with there, the gain and its 95 % interval over seeds."""
    from rewardtune.stats import mean_interval

    level, pairs = equal_level(rows, name)
    cells = [f"{level:.2f}"]
    for measure in MEASURES[1:]:
        ends = [[at_reward(trace, level, measure) for trace in pair] for pair in pairs]
        gains = [after - before for before, after in ends]
        without, with_ = map(statistics.mean, zip(*ends, strict=True))
        mean, half = mean_interval(gains)
        cells.append(f"{without:.3f} -> {with_:.3f}: {mean:+.3f}" + (f" ± {half:.3f}" if len(gains) > 1 else ""))
    return cells


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| regulariser | seeds | aesthetic | CLIPScore | diversity | at reward | CLIPScore there | diversity there |"
    yield "|-|-|-|-|-|-|-|-|"
    base = [row["trace"][0] for row in rows]
    yield "| *before* | | " + " | ".join(spread([b[m] for b in base]) for m in MEASURES) + " | | | |"
    for name in SETTINGS:
        traces = [row["trace"] for row in rows if row["setting"] == name]
        if traces:
            end = [spread([trace[-1][m] for trace in traces]) for m in MEASURES]
            equal = ["", "", ""] if name == "none" else at_equal(rows, name)
            yield f"| {name} | {len(traces)} | " + " | ".join(end + equal) + " |"


def curve(rows: list[dict[str, Any]]) -> str:
    """SVG: CLIPScore and diversity against the reward, one line a run, one colour a setting."""
    colours = ["#222222", "#9ecae1", "#4292c6", "#084594", "#fdae6b", "#e6550d", "#8c2d04"]
    width, height, gap = 420, 300, 60
    points = [p for row in rows for p in row["trace"]]
    parts = []
    for k, measure in enumerate(MEASURES[1:]):
        low = {m: min(p[m] for p in points) for m in MEASURES}
        size = {m: max(p[m] for p in points) - low[m] or 1.0 for m in MEASURES}
        left = gap + k * (width + gap)
        parts.append(f'<rect x="{left}" y="20" width="{width}" height="{height}" fill="none" stroke="#bbb"/>')
        parts.append(f'<text x="{left}" y="14">{measure} against the reward trained on</text>')
        for end, anchor in ((0.0, "start"), (1.0, "end")):
            value = low["reward"] + end * size["reward"]
            parts.append(f'<text x="{left + end * width}" y="{height + 36}" text-anchor="{anchor}">{value:.3g}</text>')
            value = low[measure] + end * size[measure]
            parts.append(f'<text x="{left - 4}" y="{24 + (1 - end) * height}" text-anchor="end">{value:.3g}</text>')
        for row in rows:
            line = " ".join(
                f"{left + width * (p['reward'] - low['reward']) / size['reward']:.1f},"
                f"{20 + height * (1 - (p[measure] - low[measure]) / size[measure]):.1f}"
                for p in row["trace"]
            )
            colour = colours[list(SETTINGS).index(row["setting"]) % len(colours)]
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    run = {row["setting"] for row in rows}
    for k, name in enumerate(name for name in SETTINGS if name in run):
        colour = colours[list(SETTINGS).index(name) % len(colours)]
        parts.append(f'<text x="{gap + 120 * k}" y="{height + 64}" fill="{colour}">{name}</text>')
    total = 2 * (width + gap) + gap
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 80}" font-family="sans-serif" '
    return head + 'font-size="12"><rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Regularisers at equal reward",
        "",
        "`python benchmarks/regularisers.py`: the playground,",
        f"{rows[0]['updates']} updates of {BATCH} at {LR:g}, DRTune (K=2, m=8) on the aesthetic reward alone;",
        f"means over {rows[0]['count']} held-out prompts with fixed noise, ± standard deviation over seeds.",
        "Diversity is the mean pairwise 1 - cos of CLIP image features. The first columns are the runs' ends. The last",
        "three compare each setting with no regulariser where both first reach the same reward, the highest that all",
        "of their seeds reach: without -> with, and the gain, paired by seed, with Student's 95 % interval over seeds.",
        "",
        *table(rows),
        "",
        "![CLIPScore and diversity against the reward](regularisers.svg)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=48)
    parser.add_argument("--every", type=int, default=8, help="updates between two evaluations")
    parser.add_argument("--count", type=int, default=48, help="held-out prompts")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON, the table and the curve")
    asked = parser.parse_args()
    given = {"updates": asked.updates, "every": asked.every, "count": asked.count}
    rows = completed(
        asked.results / STORED.name,
        tune,
        key="setting",
        names=asked.settings,
        seeds=asked.seeds,
        made_with=lambda _: {**given, "lr": LR},
        processes=asked.processes,
        **given,
    )
    (asked.results / "regularisers.svg").write_text(curve(rows))
    text = report(rows)
    (asked.results / "regularisers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
