"""Run folders as the trainer leaves them, without training, for the tests of the report. All numbers are drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from rewardtune.stats import mean_interval

PROMPTS = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("heart", "star")]
MEASURES = {
    "reward": {"what": "the trained reward, total", "better": "more", "role": "trained"},
    "symmetry": {"what": "symmetry, trained", "better": "less", "role": "trained"},
    "clipscore": {"what": "clipscore, held out", "better": "more", "role": "held_out"},
    "vendi": {"what": "Vendi score over prompts", "better": "more", "role": "guard"},
    "brightness": {"what": "mean of all pixels", "better": "", "role": "guard"},
}


def fake_run(
    folder: Path,
    *,
    prompts: list[str] = PROMPTS,
    steps: int = 40,
    every: int = 10,
    gain: float = 0.5,
    held_out: float = -0.2,
    vendi: float = -0.1,
    noise: float = 0.05,
    seed: int = 0,
    draw: int = 0,
    looks: bool = True,
    **facts: Any,
) -> Path:
    """gain, held_out, vendi: by how much the trained reward, clipscore and diversity change. draw: of the noise."""
    rng, base = random.Random(f"noise {draw}"), random.Random(f"base {seed}")
    folder.mkdir(parents=True)
    start = {
        name: [base.uniform(0.4, 0.6) for _ in prompts] for name in ("reward", "symmetry", "clipscore", "brightness")
    }
    slope = {"reward": gain, "symmetry": -gain, "clipscore": held_out, "brightness": 0.0}
    distinct = list(dict.fromkeys(prompts))
    for step in [0, *range(every, steps + 1, every)] if looks else []:
        now = {
            name: [
                x + step / steps * slope[name] * rng.uniform(0.8, 1.2) + (rng.gauss(0, noise) if step else 0)
                for x in row
            ]
            for name, row in start.items()
        }
        panel = {
            "step": step,
            "values": {name: sum(row) / len(row) for name, row in now.items()} | {"vendi": 5 + vendi * step / steps},
            "pictures": now,
            "prompts": [distinct.index(prompt) for prompt in prompts],
        }
        scores = {name: mean_interval(now[name]) for name in ("reward", "symmetry", "clipscore")}
        _append(folder / "eval.jsonl", {"step": step, "count": len(prompts), "scores": scores, "panel": panel})
        pictures = (
            folder / "samples" / ("final" if step == steps and facts.get("status") != "running" else f"step-{step:06d}")
        )
        pictures.mkdir(parents=True)
        for index in range(len(prompts)):
            shade = (40 * index % 256, 10 * step % 256, 120)
            Image.new("RGB", (32, 32), shade).save(pictures / f"{index:03d}.png")
    for step in range(steps):
        trained = sorted(rng.sample(range(20), 3))
        norm = rng.uniform(0.05, 0.2)
        record = {
            "step": step, "reward": 0.5 + gain * step / steps, "parts": {"symmetry": 0.5}, "loss": -0.5,
            "grad_norm": norm, "clipped": norm > 0.1, "step_grad_norms": {str(t): norm / 3 for t in trained},
            "trained": trained, "end": None, "steps_run": 20, "seconds": 2.0, "images": 8 * (step + 1), "lr": 1e-4,
            "replay_error": 0.0, "clamped": 0.01,
        }  # fmt: skip
        _append(folder / "metrics.jsonl", record)
    status = {
        "status": "done", "time": "2026-01-01T00:00:00+00:00", "pipeline": "StableDiffusionPipeline", "T": 20,
        "model": "/home/somebody/models/tiny", "scheduler": "DDIMScheduler", "reward": "symmetry",
        "held_out": ["clipscore"],
        "measures": MEASURES, "eval_prompts": prompts, "method": "drtune(K=3, m=8)", "seed": seed, "processes": 1,
        "call": {"num_inference_steps": 20}, "lora": {"rank": 4, "parameters": 1234},
        "train": {"steps": steps, "lr": 1e-4, "batch": 8}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({key: x for key, x in (status | facts).items() if x is not None}))
    return folder


def fake_sweep(folder: Path, *, gain: float = 0.5) -> Path:
    """sweep.json of a run, as `rewardtune sweep` leaves it: three weights, the last `gain` above the base model."""
    points = []
    for weight in (0.0, 0.5, 1.0):
        metrics = {
            name: {"value": value, "low": value - 0.1, "high": None}
            for name, value in (("reward", 0.5 + gain * weight), ("clipscore", 0.5), ("vendi", 5 - weight))
        }
        apart = {"difference": {"clipscore": {"value": 0.0, "low": -0.01, "high": 0.02}}}
        points.append({"weight": weight, "scored": {"metrics": metrics}, "to_base": apart})
    found = {
        "kind": "sweep", "measures": {name: MEASURES[name] for name in ("reward", "clipscore", "vendi")},
        "points": points, "guarded": ["clipscore", "vendi"], "suggested": 0.5, "reason": "<because>",
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(found))
    return folder


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
