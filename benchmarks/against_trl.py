"""The same updates by rewardtune and by TRL 0.19's AlignPropTrainer: `make bench-trl` (docs/results/against_trl.md).

Equal in both: a Stable Diffusion pipeline with random weights (one folder that both load), LoRA of rank 4 on the
attention, the chain of T DDIM steps with guidance, full back-propagation through the last K of them (DRaFT-K: what
TRL's `truncated_backprop_timestep` does), batch, AdamW with clipping, the reward, one thread. Every measurement is a
process of its own, and the libraries take turns, so that a disturbance of the machine meets both. TRL lives in an
environment of its own (benchmarks/trl_requirements.txt): it was removed from later releases.

Left out: what one library has and the other has not (early stop, detached input): printed apart. TRL computes log
probabilities at each step, which is part of its update.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = ["a red heart and a blue star", "a green circle on the left", "a yellow square", "two purple stars"]
GUIDANCE, LR, CLIP = 4.0, 1e-4, 1.0


def reward(images: Tensor) -> Tensor:
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


def resident() -> float:
    """Highest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def trl(folder: str, *, T: int, K: int, batch: int, updates: int) -> tuple[list[float], float]:
    """(seconds of each update, highest resident memory in MiB)."""
    from itertools import cycle

    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    prompts = cycle(PROMPTS)
    config = AlignPropConfig(
        num_epochs=updates, sample_num_steps=T, sample_guidance_scale=GUIDANCE, sample_eta=0.0, train_batch_size=batch,
        train_gradient_accumulation_steps=1, train_learning_rate=LR, train_max_grad_norm=CLIP, mixed_precision="no",
        truncated_backprop_rand=False, truncated_backprop_timestep=T - K, save_freq=10**9, log_image_freq=10**9,
    )  # fmt: skip
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=True)
    trainer = AlignPropTrainer(
        config, lambda images, prompts, metadata: reward(images), lambda: (next(prompts), {}), pipeline
    )
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    seconds = []
    for k in range(updates):
        start = time.perf_counter()
        trainer.step(k, k)
        seconds.append(time.perf_counter() - start)
    return seconds, resident()


def ours(
    folder: str, *, T: int, K: int, batch: int, updates: int, stopped: bool = False, recompute: bool = True
) -> tuple[list[float], float]:
    """The same by rewardtune. stopped: DRTune with K steps and m = 0.4 T instead of DRaFT-K."""
    from diffusers import StableDiffusionPipeline

    from rewardtune import RewardTuner, methods

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with tempfile.TemporaryDirectory() as run:
        tuner = RewardTuner(
            pipe,
            reward=lambda images, prompts: reward(images),
            method=methods.drtune(K=K, m=max(1, round(0.4 * T))) if stopped else methods.draft(K=K),
            prompts=PROMPTS,
            output_dir=f"{run}/run",
            num_inference_steps=T,
            guidance_scale=GUIDANCE,
            rank=4,
            batch=batch,
            recompute=recompute,
            eval_count=1,
            checkpoints={"every": None, "best": None},
            log={"report": False},
            show_progress=False,
        )
        tuner.train(updates, lr=LR, clip=CLIP)
        lines = (Path(run) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines], resident()


def drtune(folder: str, **given: int) -> tuple[list[float], float]:
    return ours(folder, stopped=True, **given)


def kept(folder: str, **given: int) -> tuple[list[float], float]:
    return ours(folder, recompute=False, **given)


LIBRARIES = {"trl": trl, "rewardtune": ours, "rewardtune, graphs kept": kept, "rewardtune, DRTune": drtune}


def save_for_trl(pipe: Any, folder: str) -> None:
    """A folder that both load: transformers 4, which TRL 0.19 runs on, wants the tokenizer's older files as well."""
    pipe.save_pretrained(folder)
    place = Path(folder) / "tokenizer"
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")


def measured(library: str, python: Path, **given: Any) -> dict[str, Any]:
    """One process; its answer is the last line that it prints."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [str(python), __file__, "--measure", json.dumps({"library": library, **given})]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{library} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": statistics.median(found["seconds"][1:]), "memory": found["memory"]}


def table(rows: dict[tuple[str, int], list[dict[str, Any]]], Ks: list[int]) -> list[str]:
    def middle(library: str, K: int, name: str) -> float:
        return statistics.median(row[name] for row in rows[library, K])

    lines = [
        "| K | TRL, s | rewardtune, s | rewardtune / TRL | graphs kept / TRL | DRTune with early stop / TRL | "
        "TRL, MiB | rewardtune, MiB | graphs kept, MiB |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for K in Ks:
        theirs, mine, keeping, stopped = (middle(library, K, "seconds") for library in LIBRARIES)
        ratios = [
            row["seconds"] / base["seconds"] for row, base in zip(rows["rewardtune", K], rows["trl", K], strict=True)
        ]
        ratio = statistics.median(ratios)
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(
            f"| {K} | {theirs:.2f} | {mine:.2f} | **{ratio:.2f}**{spread} | {keeping / theirs:.2f} | "
            f"{stopped / theirs:.2f} | {middle('trl', K, 'memory'):.0f} | {middle('rewardtune', K, 'memory'):.0f} | "
            f"{middle('rewardtune, graphs kept', K, 'memory'):.0f} |"
        )
    growth = {name: middle(name, Ks[-1], "memory") - middle(name, Ks[0], "memory") for name in ("trl", "rewardtune")}
    lines += [
        "",
        f"Growth of the highest resident memory from K = {Ks[0]} to K = {Ks[-1]}: TRL {growth['trl']:.0f} MiB, "
        f"rewardtune {growth['rewardtune']:.0f} MiB ({growth['rewardtune'] / growth['trl']:.2f} of it).",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--trl-python", type=Path, default=Path("build/trl/venv/bin/python"))
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="T")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4, help="of one process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/against_trl.md"))
    asked = parser.parse_args()
    if asked.measure:
        given = json.loads(asked.measure)
        torch.set_num_threads(1)
        seconds, memory = LIBRARIES[given.pop("library")](**given)
        print(json.dumps({"seconds": seconds, "memory": memory}))
        return
    if not asked.trl_python.exists():
        sys.exit(f"no {asked.trl_python}: run `make bench-trl`, which makes TRL's environment first")

    from step import random_stable_diffusion

    T, Ks = asked.steps, sorted({1, asked.steps // 2, asked.steps})
    pythons = dict.fromkeys(LIBRARIES, Path(sys.executable)) | {"trl": asked.trl_python}
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_for_trl(random_stable_diffusion(tuple(asked.channels), asked.latent), folder)
        given = {"folder": folder, "T": T, "batch": asked.batch, "updates": asked.updates}
        for number in range(asked.rounds):
            for K in Ks:
                for library, python in pythons.items():
                    rows.setdefault((library, K), []).append(found := measured(library, python, K=K, **given))
                    print(f"round {number + 1}, K = {K}, {library}: {found['seconds']:.2f} s", flush=True)
    shown = [word for word in sys.argv[1:] if word not in ("--trl-python", str(asked.trl_python))]
    command = " ".join(["python benchmarks/against_trl.py", *shown])
    out = [
        "# The same updates by TRL 0.19 and by rewardtune",
        "",
        f"`{command}`: random Stable Diffusion, UNet channels {asked.channels}, latents of {asked.latent},",
        f"T = {T}, batch {asked.batch}, one thread, torch {torch.__version__.split('+')[0]} in both; medians of",
        f"{asked.rounds} processes, in brackets the lowest and highest ratio of a round. Both execute all T steps and",
        "train the last K with full back-propagation; the column after trains K steps with DRTune instead, which stops",
        "early. Graphs kept is `recompute=False`. The script's header says what is equal.",
        "",
        *table(rows, Ks),
    ]
    asked.output.write_text("\n".join(out) + "\n")
    print(f"\nwritten: {asked.output}")


if __name__ == "__main__":
    main()
