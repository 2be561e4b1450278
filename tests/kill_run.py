"""A whole run killed again and again: SIGKILL to the command at random moments, then `--resume latest`.

    python tests/kill_run.py --kills 50 --seed 0

A small playground run is trained once without a stop, and once killed at least `kills` times (while it starts, in an
update, in an evaluation, in a save). Compared are the LoRA file and the pictures bit for bit, the last checkpoint's
tensors, and metrics.jsonl and eval.jsonl without their timings. One line a kill; exit code 0 when all is equal.
Left out: power cuts. `save` flushes files and folders for them, but no test pulls the plug.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from rewardtune import checkpoint

RUN: dict[str, Any] = {
    "model": {"id": "playground", "device": "cpu"},
    "reward": "brightness",
    "method": {"name": "drtune", "options": {"K": 1, "m": 2}},
    "prompts": "playground:train",
    "sampling": {"steps": 4, "guidance": 4.0},
    "adapter": {"rank": 4},
    "optim": {"steps": 24, "lr": 1e-3, "batch": 2, "schedule": "cosine", "ema": 0.9},
    "eval": {"count": 2, "every": 6},
    "checkpoints": {"every": 2, "keep": 2, "best": "reward"},
    "seed": 0,
}
TIMINGS = {"seconds", "cpu_seconds", "time", "eta", "memory"}  # of a record: they depend on the machine's mood
LIMIT = 600  # seconds for any one start


def write_run(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(RUN | {"output_dir": str(folder / name)}))
    return path


def start(file: Path, *, resume: bool, log: Path) -> subprocess.Popen:
    """`rewardtune train FILE`; from the beginning, or from the newest whole checkpoint."""
    how = ["--resume", "latest"] if resume else ["--overwrite"]
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "rewardtune", "train", str(file), *how], stdout=out, stderr=subprocess.STDOUT
        )


def uninterrupted(folder: Path) -> Path:
    """The run that nobody stops."""
    child = start(write_run(folder, "whole"), resume=False, log=folder / "whole.log")
    if child.wait(LIMIT):
        raise AssertionError(f"the uninterrupted run failed:\n{(folder / 'whole.log').read_text()[-3000:]}")
    return folder / "whole"


def killed(folder: Path, *, kills: int, longest: float, seed: int, say: Any = print) -> Path:
    """The same run, killed at least `kills` times after up to `longest` seconds, then left to end.

    After each kill every checkpoint that has a name must be whole, and none that was there may be gone but by pruning:
    the newest step never falls. A run that ends before enough kills is made again from an earlier checkpoint.
    """
    file, run, log, draw = write_run(folder, "killed"), folder / "killed", folder / "killed.log", random.Random(seed)
    done, newest = 0, 0
    while done < kills:
        child = start(file, resume=bool(checkpoint.steps(run)), log=log)
        wait = draw.uniform(0.0, longest)
        try:
            code = child.wait(wait)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            done += 1
        else:
            if code:
                raise AssertionError(f"start {done} ended with {code}:\n{log.read_text()[-3000:]}")
            if done < kills:  # it was done too early: once more from the oldest checkpoint that is left
                rewind_to_the_oldest(run)
                newest = checkpoint.latest(run).step
            continue
        present = checkpoint.steps(run)
        for step in present:
            checkpoint.load(run / f"checkpoint-{step}")  # CheckpointError if a named one is not whole
        if present and present[-1] < newest:
            raise AssertionError(f"kill {done}: checkpoint {newest} is gone, the newest is {present[-1]}")
        newest = present[-1] if present else newest
        say(f"kill {done} after {wait:.2f} s: newest checkpoint {newest}", flush=True)
    child = start(file, resume=bool(checkpoint.steps(run)), log=log)
    if child.wait(LIMIT):
        raise AssertionError(f"the last start failed:\n{log.read_text()[-3000:]}")
    return run


def rewind_to_the_oldest(run: Path) -> None:
    oldest = checkpoint.load(run / f"checkpoint-{checkpoint.steps(run)[0]}")
    checkpoint.rewind(run, oldest)


def records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def compare(whole: Path, other: Path) -> list[str]:
    """What differs between the two run folders; empty when the killed run equals the uninterrupted one."""
    wrong = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        if not records(whole / name):
            wrong.append(f"{name} is empty")
        if records(whole / name) != records(other / name):
            wrong.append(f"{name} differs")
    pictures = sorted(path.relative_to(whole) for path in (whole / "samples").rglob("*.png"))
    if not pictures:
        wrong.append("no pictures")
    for name in [Path("pytorch_lora_weights.safetensors"), *pictures]:
        if not (other / name).is_file() or (whole / name).read_bytes() != (other / name).read_bytes():
            wrong.append(f"{name} differs")
    mine, theirs = checkpoint.latest(whole), checkpoint.latest(other)
    for group in mine.groups:
        files = [found.path / f"{group}.safetensors" for found in (mine, theirs)]
        if mine.step != theirs.step or files[0].read_bytes() != files[1].read_bytes():
            wrong.append(f"the last checkpoint's {group} differs")
    left = [str(path.relative_to(other)) for path in other.rglob(".*.tmp")]
    return wrong + [f"left behind: {name}" for name in left]


def run(folder: Path, *, kills: int, seed: int = 0) -> list[str]:
    """Both runs; what differs. A start is given up to the time of the uninterrupted run before it is killed."""
    began = time.perf_counter()
    whole = uninterrupted(folder)
    seconds = time.perf_counter() - began
    print(f"uninterrupted: {seconds:.1f} s", flush=True)
    return compare(whole, killed(folder, kills=kills, longest=seconds, seed=seed))


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in, kept; default: a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        problems = run(asked.folder or Path(temporary), kills=asked.kills, seed=asked.seed)
    print("\n".join(problems) or "equal: weights, metrics, pictures")
    sys.exit(bool(problems))
