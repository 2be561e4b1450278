"""The scripts of examples/, run as a user runs them, with the smallest arguments they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "own_reward.py": (["1", "out"], "out/star.png"),
    "gradient_by_step.py": (["6"], None),
    "compare_methods.py": (["50", "out"], "out/compared"),
    "lora_to_diffusers.py": (["1", "out"], "out/export/kohya"),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


def run(name: str, folder: Path) -> str:
    arguments, left = RUNS[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    if left is not None:
        assert (folder / left).exists()
    return made.stdout


@pytest.mark.slow  # each trains and samples: tens of seconds
@pytest.mark.parametrize("name", ["own_reward.py", "compare_methods.py", "lora_to_diffusers.py"])
def test_example_trains(name: str, tmp_path: Path):
    assert run(name, tmp_path)


@pytest.mark.slow  # half a minute
def test_gradients_grow_without_the_stop_and_not_with_it(tmp_path: Path):
    """Three methods, each with its plan and one norm for each of its six trained steps, all made at the same noise."""
    lines = run("gradient_by_step.py", tmp_path).strip().splitlines()
    assert len(lines) == 9
    draft, stopped, drtune = ([float(norm) for norm in norms.split()] for norms in lines[2::3])
    assert len(draft) == 6
    assert stopped == drtune
    assert draft[-1] == stopped[-1]  # nothing comes after the last step
    assert draft[0] > 2 * draft[3]  # measured: 3.0
    assert draft[0] > 1.5 * stopped[0]  # 2.3
    assert stopped[0] < 1.5 * stopped[3]  # 1.2
