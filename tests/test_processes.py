"""Two gloo processes equal one with the doubled batch; an error or a killed process ends all of them with a message.

A start of two processes takes seconds: one (`two`) makes the runs of the quick tests, another (`more`) those of the
slow ones.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_of_several
import pytest
import torch
from tiny_runs import metrics, save_tiny, status, write_run

from rewardtune import checkpoint, cli, sharding
from rewardtune.errors import ConfigError
from rewardtune.processes import Processes

SCRIPT = Path(one_of_several.__file__)
START = "import sys; from rewardtune.processes import start; sys.exit(start({count}, sys.argv[1:], cpu=True))"
QUICK = ("drtune", "nan")
SLOW = ("draft", "pictures", "resumed", "guarded", "raises", "sharded", "sharded_nan")

slow = pytest.mark.slow  # a start of two processes, and their runs: a minute


def environment() -> dict[str, str]:
    paths = [str(SCRIPT.parent), *filter(None, sys.path)]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}


def start(folder: Path, *scenarios: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START.format(count=count), str(SCRIPT), str(folder), *scenarios]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def alone(folder: Path, *scenarios: str) -> Path:
    """The runs of one process, made here."""
    threads = torch.get_num_threads()
    for name in scenarios:
        one_of_several.run(folder / name, **one_of_several.SCENARIOS[name])
    torch.set_num_threads(threads)
    return folder


def together(folder: Path, *scenarios: str) -> Path:
    done = start(folder, *scenarios)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("one"), "drtune")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two"), *QUICK)


@pytest.fixture(scope="module")
def more(one, two):
    """The runs of the slow tests, in the same folders; `resumed` goes on from what one process has begun."""
    alone(one, "draft", "pictures", "half")
    shutil.copytree(one / "half", two / "resumed")
    return together(two, *SLOW)


def ends(folder: Path, count: int = 2) -> list[dict]:
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(count)]


def same_weights(first: Path, second: Path, *kinds: str) -> bool:
    pair = [torch.load(folder / "out.pt") for folder in (first, second)]
    rows = [row for kind in kinds for row in zip(pair[0][kind], pair[1][kind], strict=True)]
    return all(float((a - b).abs().max()) <= 1e-6 * float(a.abs().max()) for a, b in rows)


@slow
def test_two_processes_equal_one_with_an_odd_batch(one, more):
    check_equal("draft", one, more)


@slow
def test_two_processes_equal_one_with_pictures_beside_the_prompts(one, more):
    """Each picture goes with its prompt, whichever process has the sample: with others, the weights are others."""
    check_equal("pictures", one, more)
    swapped = one_of_several.SCENARIOS["pictures"] | {"pictures": "swapped"}
    one_of_several.run(one / "swapped", **swapped)
    assert not same_weights(one / "pictures", one / "swapped", "weights")


def test_two_processes_equal_one_with_the_whole_batch(one, two):
    check_equal("drtune", one, two)


def check_equal(name, one, two):
    assert same_weights(one / name, two / name, "gradients", "weights")
    for first, second in zip(metrics(one / name), metrics(two / name), strict=True):
        assert second["reward"] == pytest.approx(first["reward"], abs=1e-9)
        assert second["trained"] == first["trained"]
        assert second["images"] == first["images"]
    evaluated = [(folder / name / "eval.jsonl").read_text().splitlines() for folder in (one, two)]
    for first, second in zip(*(map(json.loads, lines) for lines in evaluated), strict=True):
        assert second["scores"]["reward"] == pytest.approx(first["scores"]["reward"], abs=1e-6)
    assert len(list((two / name / "samples" / "final").glob("*.png"))) == 3


@slow
def test_two_processes_go_on_from_the_checkpoint_of_one(one, more):
    assert [record["step"] for record in metrics(more / "resumed")] == list(range(5))
    assert same_weights(one / "drtune", more / "resumed", "weights")


def test_one_process_goes_on_from_the_checkpoint_of_two(one, two, tmp_path):
    shutil.copytree(two / "drtune", tmp_path / "run")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    assert checkpoint.latest(tmp_path / "run").step == 2
    one_of_several.run(tmp_path / "run", **one_of_several.SCENARIOS["resumed"])
    assert same_weights(one / "drtune", tmp_path / "run", "weights")


@slow
def test_a_sharded_denoiser_gives_the_same_weights(one, more):
    """Also the looks are the same: three pictures on two processes, which have to call the denoiser equally often."""
    assert same_weights(one / "drtune", more / "sharded", "gradients", "weights")
    held, whole = (sum(end["held"] for end in ends(more / name)) for name in ("sharded", "drtune"))
    trained = sum(weights.numel() for weights in torch.load(one / "drtune" / "out.pt")["weights"])
    assert held - 2 * trained == (whole - 2 * trained) // 2  # the frozen weights are there once, the LoRA twice
    assert [record["step"] for record in metrics(more / "sharded")] == list(range(5))
    assert status(more / "sharded")["lora_verified"]
    for name in ("step-000000", "final"):
        files = [sorted((folder / "samples" / name).glob("*.png")) for folder in (one / "drtune", more / "sharded")]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []


@slow
def test_machines_each_share_a_copy_among_their_own_processes(one, tmp_path):
    """Four processes on what counts as two machines."""
    done = start(tmp_path, "shared_by_two", count=4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(one / "drtune", tmp_path / "shared_by_two", "gradients", "weights")
    trained = sum(weights.numel() for weights in torch.load(one / "drtune" / "out.pt")["weights"])
    (whole,) = {json.loads((one / "drtune" / "end-0.json").read_text())["held"]}
    held = [end["held"] for end in ends(tmp_path / "shared_by_two", 4)]
    assert held[:2] == held[2:]  # the same shares on both
    assert sum(held[:2]) - 2 * trained == whole - trained  # a whole copy on each


def test_a_machine_s_processes_have_to_be_known(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert sharding.sharers(True, 6) == 6
    with pytest.raises(ConfigError, match=r"memory.shard=node: 6 processes, LOCAL_WORLD_SIZE=not set: .*torchrun"):
        sharding.sharers("node", 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert sharding.sharers("node", 6) == 2
    with pytest.raises(ConfigError, match="5 processes, LOCAL_WORLD_SIZE=2"):
        sharding.sharers("node", 5)


def test_what_cannot_be_shared_evenly_is_refused():
    sharding.check_even(batch=8, micro_batch=2, world=2)
    with pytest.raises(ConfigError, match=r"memory.shard: .* makes 3, which 2 processes .* optim.batch=4"):
        sharding.check_even(batch=5, micro_batch=2, world=2)
    even = Processes(2, 3, sharded=True)
    assert even.padded(even.mine(range(5)), range(5)) == [2, 0]
    assert Processes(2, 3).padded([2], range(5)) == [2]


@slow
def test_a_guard_stops_all_processes_at_the_same_step(more):
    first, second = ends(more / "guarded")
    assert "base_pixels is" in first["error"]
    assert (first["exit_code"], first["step"]) == (4, second["step"])
    assert second["error"] == first["error"]
    assert status(more / "guarded")["status"] == "stopped"


@pytest.mark.parametrize(
    ("fault", "code", "word", "message"),
    [
        ("nan", 4, "stopped", "not finite"),
        pytest.param("raises", 1, "failed", "no network", marks=slow),
        pytest.param("sharded_nan", 4, "stopped", "not finite", marks=slow),
    ],
)
def test_an_error_in_one_process_ends_both_with_its_message(fault, code, word, message, request):
    two = request.getfixturevalue("two" if fault in QUICK else "more")
    first, second = ends(two / fault)
    assert first["exit_code"] == second["exit_code"] == code
    assert first["error"] == f"process 1: {second['error']}"
    assert message in second["error"]
    assert (status(two / fault)["status"], status(two / fault)["error"]) == (word, first["error"])
    assert checkpoint.latest(two / fault).step == 2


@slow
def test_a_killed_process_ends_the_run_and_does_not_hang(tmp_path):
    done = start(tmp_path, "killed")  # its timeout is an assertion too
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.latest(tmp_path / "killed").step == 2
    assert "another process of this run has ended" in status(tmp_path / "killed")["error"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def command(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "rewardtune", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(), **pipes)


@slow
def test_an_interrupted_command_saves_once_and_goes_on_in_one_process(model, tmp_path):
    """`train -n 2`, Ctrl-C when it trains, then the same run to its end in this process."""
    file = write_run(tmp_path, model, optim={"steps": 2000, "lr": 1e-4, "batch": 4, "micro_batch": 2})
    child, folder = command(file, "-n", 2), tmp_path / "out"
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130, (out, err)
    assert out.count("stopping:") == out.count("--resume latest") == 1
    assert "Traceback" not in err
    reached = checkpoint.latest(folder).step
    assert (status(folder)["status"], status(folder)["steps"]) == ("interrupted", reached)
    assert len(metrics(folder)) == reached
    assert cli.main(["train", str(file), "--resume", "latest", f"optim.steps={reached + 1}"]) == 0
    assert [record["step"] for record in metrics(folder)] == list(range(reached + 1))


@slow
def test_a_refused_run_says_one_line(model, tmp_path):
    """A used output folder: what the user sees is what one process says."""
    file = write_run(tmp_path, model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("here")
    out, err = (child := command(file, "-n", 2)).communicate(timeout=300)
    assert (child.returncode, out) == (2, "")
    assert err.startswith(f"rewardtune: output folder {tmp_path / 'out'} exists and is not empty")
    assert err.count("\n") == 1


@slow
def test_the_command_launches_itself(model, tmp_path):
    file = write_run(tmp_path, model, optim={"steps": 2, "lr": 3e-3, "batch": 4})
    out, err = (child := command(file, "-n", 2)).communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    assert out.count("done: 2 updates") == 1
    assert len(metrics(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_chunks_are_dealt_out_in_turn():
    assert [Processes(rank, 3).mine([0, 2, 4, 6, 8]) for rank in range(3)] == [[0, 6], [2, 8], [4]]
    assert Processes().gather("x") == ["x"]
    Processes().raise_together(None)
    with pytest.raises(ValueError, match="mine"):
        Processes().raise_together(ValueError("mine"))


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_ends_all_processes_unless_nohup_asks_for_none(ignored, tmp_path):
    child = f"""
import os, pathlib, signal, sys, time
here = pathlib.Path({str(tmp_path)!r}, os.environ["RANK"])
signal.signal(signal.SIGTERM, lambda *_: (here.write_text("saved"), sys.exit(143)))
here.write_text("trains")
time.sleep(3 if {ignored} else 60)
"""
    launcher = "import sys; from rewardtune.processes import start; sys.exit(start(2, ['-c', sys.argv[1]], cpu=True))"
    arrange = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    parent = subprocess.Popen([sys.executable, "-c", launcher, child], env=environment(), preexec_fn=arrange)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGHUP)
    assert parent.wait(timeout=60) == (0 if ignored else 143)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"trains" if ignored else "saved"}
