"""Two gloo processes equal one with the doubled batch; an error or a killed process ends all of them with a message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import save_tiny, write_run

from rewardtune.processes import Processes

SCRIPT = Path(__file__).with_name("one_of_several.py")
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def run(folder: Path, *arguments: object, count: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [*TORCHRUN, "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *map(str, arguments)]
    import os

    paths = [str(SCRIPT.parent), *sys.path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": ":".join(paths)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("method", "batch", "micro_batch"), [("drtune", 4, 2), ("draft", 3, 1)])
def test_two_processes_equal_one_with_the_whole_batch(method, batch, micro_batch, tmp_path):
    one = run(tmp_path / "one", batch, batch, method)
    two = run(tmp_path / "two", batch, micro_batch, method, count=2)
    assert one.returncode == 0, one.stderr[-2000:]
    assert two.returncode == 0, two.stderr[-2000:]
    alone, shared = (torch.load(tmp_path / name / "out.pt") for name in ("one", "two"))
    for what in ("gradients", "weights"):
        for first, second in zip(alone[what], shared[what], strict=True):
            assert (first - second).abs().max() <= 1e-6 * first.abs().max(), what
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert second["reward"] == pytest.approx(first["reward"], abs=1e-9)
        assert second["trained"] == first["trained"]
        assert second["images"] == first["images"]
    evaluated = [(tmp_path / name / "eval.jsonl").read_text().splitlines() for name in ("one", "two")]
    for first, second in zip(*(map(json.loads, lines) for lines in evaluated), strict=True):
        assert second["scores"]["reward"] == pytest.approx(first["scores"]["reward"], abs=1e-6)
    assert len(list((tmp_path / "two" / "samples" / "final").glob("*.png"))) == 3


def test_an_error_in_one_process_ends_both_with_its_message(tmp_path):
    done = run(tmp_path / "run", 4, 2, "drtune", "nan", count=2)
    assert done.returncode != 0
    assert "not finite" in done.stderr
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "stopped"
    assert "process 1" in status["error"]


def test_a_killed_process_ends_the_run_and_does_not_hang(tmp_path):
    done = run(tmp_path / "run", 4, 2, "drtune", "killed", count=2)  # the timeout of `run` is the assertion
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr


def test_the_command_launches_itself(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    file = write_run(tmp_path, model, optim={"steps": 2, "lr": 3e-3, "batch": 4})
    command = [sys.executable, "-m", "rewardtune", "train", str(file), "-n", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done: 2 updates") == 1
    assert len(metrics(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_chunks_are_dealt_out_in_turn():
    assert [Processes(rank, 3).mine([0, 2, 4, 6, 8]) for rank in range(3)] == [[0, 6], [2, 8], [4]]
    assert Processes().gather("x") == ["x"]
    Processes().raise_together(None)
    with pytest.raises(ValueError, match="mine"):
        Processes().raise_together(ValueError("mine"))
