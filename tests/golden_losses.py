"""The losses of 20 updates of the playground: the numbers of tests/golden/losses.json.

python tests/golden_losses.py            the largest differences from the file
python tests/golden_losses.py --write    write the file anew, after a change that is meant to change numbers
OMP_NUM_THREADS is the number of threads.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from rewardtune import launch
from rewardtune.config import RunConfig

FILE = Path(__file__).parent / "golden" / "losses.json"
KEYS = ("loss", "grad_norm")
RUN = {
    "model": {"id": "playground", "device": "cpu"},
    "reward": [{"name": "aesthetic", "options": {"model": "playground"}}],
    "method": {"name": "drtune", "options": {"K": 1, "m": 2}},
    "prompts": "playground:train",
    "sampling": {"steps": 4, "guidance": 4.0},
    "adapter": {"rank": 4},
    "optim": {"steps": 20, "lr": 1e-3, "batch": 2},
    "eval": {"count": 1},
}


def losses(folder: Path) -> dict[str, list[float]]:
    """key -> its value in each of the 20 updates; the run is written to `folder`."""
    config = RunConfig.model_validate(RUN | {"output_dir": str(folder)})
    launch.tuner_from(config, show_progress=False).train(config.optim.steps, lr=config.optim.lr)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: [record[key] for record in records] for key in KEYS}


def differences(found: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """key -> the largest relative difference."""
    return {key: max(abs(a - b) / abs(b) for a, b in zip(found[key], expected[key], strict=True)) for key in KEYS}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder) / "run")
    if "--write" in sys.argv[1:]:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(differences(found, json.loads(FILE.read_text())))
