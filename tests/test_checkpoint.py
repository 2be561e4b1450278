"""Checkpoints: bit for bit, whole or absent after a kill at any moment, damage noticed, a full disk survived."""

import copy
import ctypes
import errno
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewardtune import checkpoint
from rewardtune.checkpoint import (
    CheckpointError,
    compare_settings,
    find,
    flatten_optimizer,
    latest,
    load,
    restore,
    rewind,
    save,
    steps,
    unflatten_optimizer,
)
from rewardtune.errors import ConfigError, RewardTuneError
from rewardtune.runfolder import RunFolder
from rewardtune.state import TrainingState

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def numbers(step, size=4000):
    """A function of the step alone, so that what is read can be recomputed."""
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {f"layer.{i}.weight": torch.randn(size, generator=generator) for i in range(3)},
        "optimizer": {"m": torch.randn(size, generator=generator).bfloat16(), "step": torch.tensor(float(step))},
    }


def write(run, step, **changes):
    settings = {"tensors": numbers(step), "state": {"lr": 0.1 / (step + 1)}, "keep": 99} | changes
    return save(run, step, **settings)


def holds(found, step):
    """The whole content is that of `step`, every bit."""
    expected = numbers(step)
    same = set(found.groups) == set(expected) and found.step == step and found.state == {"lr": 0.1 / (step + 1)}
    return same and all(
        found.tensors(group).keys() == values.keys()
        and all(identical(found.tensors(group)[name], tensor) for name, tensor in values.items())
        for group, values in expected.items()
    )


def identical(a, b):
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def hidden(run):
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------ round trip


def test_every_dtype_shape_and_special_value_comes_back_bit_for_bit(tmp_path):
    shared = torch.arange(12.0)
    tensors = {str(dtype): torch.randn(5, 7).mul(50).to(dtype) for dtype in DTYPES}
    tensors |= {
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "slice": torch.randn(10, 10)[2:4, ::3],
        "shared": shared,
        "shared too": shared,
        "view": shared[3:5],
        "with grad": torch.nn.Parameter(torch.randn(3)),
    }
    save(tmp_path, 3, tensors={"adapter": tensors}, state={})
    back = load(tmp_path / "checkpoint-3").tensors("adapter")
    assert back.keys() == tensors.keys()
    assert all(identical(back[name], tensor.detach()) for name, tensor in tensors.items())


def test_the_state_comes_back_exactly(tmp_path):
    state = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "third": 1 / 3,
        "inf": math.inf,
        "best": {"step": 7, "value": None},
        "é": [1],
    }
    save(tmp_path, 0, tensors={}, state=state)
    found = load(tmp_path / "checkpoint-0")
    assert found.state == state
    assert found.groups == ()
    assert found.notes == ()


def test_a_plain_safetensors_reader_reads_the_files(tmp_path):
    path = write(tmp_path, 2)
    assert identical(load_file(path / "adapter.safetensors")["layer.1.weight"], numbers(2)["adapter"]["layer.1.weight"])


def test_the_checksums_are_those_of_another_program(tmp_path):
    path = write(tmp_path, 2)
    files = json.loads((path / "COMPLETE").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"COMPLETE"}
    for name, entry in files.items():
        said = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[0]
        assert (said, (path / name).stat().st_size) == (entry["sha256"], entry["size"])


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, tensors={}, state={"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_the_files_have_the_usual_permissions(tmp_path):
    path = write(tmp_path, 1)
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~mask}
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_other_library_versions_are_told(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "99.0"})
    (note,) = load(tmp_path / "checkpoint-1").notes
    assert "torch" in note
    assert "99.0" in note


# ----------------------------------------------------------------------------------------------- damage


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_damage_is_noticed_named_and_the_checkpoint_before_is_taken(name, harm, tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    file = tmp_path / "checkpoint-10" / name
    harm(file)
    said = name if name != "COMPLETE" or harm is not flip else "is damaged"  # there, what it says of a file is wrong
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "checkpoint-10")
    found = latest(tmp_path)
    assert holds(found, 5)
    assert "checkpoint-10" in found.notes[0]
    assert said in found.notes[0]


def test_any_flipped_bit_of_any_file_is_noticed_or_changes_nothing(tmp_path):
    path = write(tmp_path, 1, tensors=numbers(1, size=4))
    whole = {p.name: p.read_bytes() for p in path.iterdir()}
    draw, harmless = random.Random(0), 0
    for name, data in whole.items():
        for place in draw.sample(range(len(data)), min(len(data), 150)):
            harmed = bytearray(data)
            harmed[place] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(harmed)
            try:
                found = load(path)
            except CheckpointError:
                continue
            assert name == "COMPLETE"  # only there: a space or line end of the JSON
            assert harmed.split() == data.split() or json.loads(harmed) == json.loads(data)
            assert found.step == 1
            harmless += 1
        (path / name).write_bytes(data)
    assert harmless < 60
    assert load(path).step == 1


def test_none_left_is_an_error_that_names_all(tmp_path):
    with pytest.raises(CheckpointError, match="no folder checkpoint-N"):
        latest(tmp_path)
    with pytest.raises(CheckpointError, match="no folder checkpoint-N"):
        latest(tmp_path / "not there")
    flip(write(tmp_path, 1) / "adapter.safetensors")
    flip(write(tmp_path, 2) / "state.json")
    with pytest.raises(CheckpointError, match=r"(?s)state\.json.*adapter\.safetensors"):
        latest(tmp_path)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    write(tmp_path, 1).rename(tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError, match="different steps"):
        load(tmp_path / "checkpoint-9")
    assert load((tmp_path / "checkpoint-9").rename(tmp_path / "backup")).step == 1


def test_another_format_is_refused(tmp_path):
    marker = write(tmp_path, 1) / "COMPLETE"
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2"):
        latest(tmp_path)


def test_find_takes_latest_a_step_a_name_or_a_path(tmp_path):
    for step in (5, 20, 100):
        write(tmp_path, step)
    for name in (
        "checkpoint-abc",
        "checkpoint-",
        "checkpoint-007",
        "checkpoint-5.tmp",
        "xcheckpoint-6",
        "checkpoint--1",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-999").write_text("a file")
    assert steps(tmp_path) == [5, 20, 100]
    assert find(tmp_path, "latest").step == 100  # by number, not by name
    assert find(tmp_path, 20).step == find(tmp_path, "20").step == find(tmp_path, "checkpoint-20").step == 20
    assert find("elsewhere", tmp_path / "checkpoint-5").step == 5
    for wrong in ("7", "best", "checkpoint-999", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="5, 20, 100"):
            find(tmp_path, wrong)
    with pytest.raises(CheckpointError, match="COMPLETE is missing"):
        find(tmp_path, "checkpoint-abc")


# -------------------------------------------------------------------------------------------- keep, best


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [6]), (2, None, [5, 6]), (2, 3, [3, 5, 6]), (2, 6, [5, 6]), (9, None, [1, 2, 3, 4, 5, 6]), (1, 77, [6])],
)
def test_the_last_and_the_best_stay(keep, best, left, tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    write(tmp_path, 6, keep=keep, best=best)
    assert steps(tmp_path) == left
    assert all(holds(load(tmp_path / f"checkpoint-{step}"), step) for step in left)
    assert hidden(tmp_path) == []


def test_a_truncated_one_does_not_count_as_kept_and_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    truncate(tmp_path / "checkpoint-3" / "adapter.safetensors")
    write(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [2, 3, 4]


def test_keep_must_be_at_least_one(tmp_path):
    with pytest.raises(ConfigError, match="keep=0"):
        write(tmp_path, 1, keep=0)


def test_saving_the_same_step_again_changes_nothing_and_another_content_is_set_aside(tmp_path):
    path = write(tmp_path, 3)
    inode = path.stat().st_ino
    write(tmp_path, 3)
    assert path.stat().st_ino == inode
    save(tmp_path, 3, tensors=numbers(4), state={})
    assert identical(load(path).tensors("adapter")["layer.0.weight"], numbers(4)["adapter"]["layer.0.weight"])
    assert load(tmp_path / "cut" / "checkpoint-3").step == 3
    flip(path / "state.json")
    write(tmp_path, 3)
    assert holds(load(path), 3)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["checkpoint-3", "checkpoint-3.2"]
    assert hidden(tmp_path) == []


# ----------------------------------------------------------------------------------------- kill, disk


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: hundreds of flushed saves would keep a disk busy."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)


def forked(work):
    """The number of a child process that does `work()` and leaves by 0, or by 1 after an error."""
    number = os.fork()
    if number == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return number


def examine(run, keep):
    """What must hold after a kill at any moment: what has a valid name is whole. Gives the newest step."""
    present = steps(run)
    assert all(holds(load(run / f"checkpoint-{step}"), step) for step in present)
    assert len(present) <= keep + 2  # the best, and one whose prune was cut short
    return present[-1] if present else 0


def kill_at_random(run, kills, seed):
    draw, newest, made = random.Random(seed), 0, 0
    reader, writer = os.pipe()

    def train(first):
        for step in range(first, first + 10_000):
            write(run, step, keep=2, best=step // 2)
            os.write(writer, b".")

    for _ in range(kills):
        child = forked(lambda: train(newest + 1))  # noqa: B023 - called at once, in the child
        started = time.perf_counter()
        os.read(reader, 1)
        time.sleep(draw.uniform(0, 2) * (time.perf_counter() - started))  # somewhere in the next saves
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            os.read(reader, 10_000)
        os.set_blocking(reader, True)
        now = examine(run, keep=2)
        assert now > newest  # what was whole is never lost
        made, newest = made + bool(hidden(run)), now
    assert made > kills / 4  # that many kills fell into a save: it left its hidden folder
    write(run, newest + 1, keep=2)
    assert hidden(run) == []


def test_sigkill_at_random_moments_leaves_whole_checkpoints(memory):
    kill_at_random(memory, 30, seed=0)


@pytest.mark.slow  # some hundred kills: half a minute
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_many_random_moments_leaves_whole_checkpoints(seed, memory):
    kill_at_random(memory, 100, seed=seed + 1)


CALLS = ("rename", "fsync", "chmod", "mkdir", "rmdir", "unlink", "open")


def test_a_kill_before_any_single_system_call_leaves_whole_checkpoints(memory):
    """One process for each call of `save` that touches the disk, ended just before it: no moment is left out."""

    def work(run, stop):
        made = 0

        def wrap(function):
            def called(*args, **kwargs):
                nonlocal made
                made += 1
                if made == stop:
                    os._exit(9)
                return function(*args, **kwargs)

            return called

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        io.open = wrap(io.open)  # what `Path.open` calls
        write(run, 3, keep=1)

    before = memory / "before"
    write(before, 1)
    write(before, 2)
    for stop in range(1, 1000):
        run = memory / str(stop)
        shutil.copytree(before, run)
        _, status = os.waitpid(forked(lambda: work(run, stop)), 0)  # noqa: B023
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9)
        assert all(holds(load(run / f"checkpoint-{step}"), step) for step in steps(run))
        assert latest(run).step >= 2
        if code == 0:
            break
        write(run, 4, keep=2)
        assert hidden(run) == []
        assert holds(latest(run), 4)
    assert stop > 40  # there were that many moments
    assert steps(run) == [3]


LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB that can be mounted read-only; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    if not hasattr(LIBC, "mount") or LIBC.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, b"size=1m"):
        pytest.skip("a small disk of its own (mount tmpfs) needs root")
    yield place
    LIBC.umount2(str(place).encode(), 2)


def fill(ballast, *, pages):
    """Leave so many pages of 4 kB free."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, ballast.stat().st_size // 4096 * 4096 - pages * 4096)


def test_a_full_disk_is_said_and_costs_nothing(disk):
    run = disk / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    write(run, 1, tensors=numbers(1, size=10_000))
    write(run, 2, tensors=numbers(2, size=10_000))
    held = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for pages in (0, 1, 2, 3):  # one page a file: fails in adapter, optimizer, state.json, COMPLETE
        fill(disk / "ballast", pages=pages)
        with pytest.raises(RewardTuneError, match=r"(?i)checkpoint-3: .*no space left.*intact.*free some space"):
            write(run, 3, tensors=numbers(3, size=100))
        assert steps(run) == [1, 2]
        assert hidden(run) == []
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == held
    fill(disk / "ballast", pages=4)
    write(run, 4, tensors=numbers(4, size=100))
    assert latest(run).step == 4


def test_a_disk_that_is_full_to_the_last_byte_keeps_the_log_at_a_rewind(disk):
    (disk / "metrics.jsonl").write_text("1\n")
    found = load(write(disk, 1))
    (disk / "metrics.jsonl").write_text("1\n2\n")
    fill(disk / "ballast", pages=0)
    with pytest.raises(RewardTuneError, match="No space left"):
        rewind(disk, found)
    assert (disk / "metrics.jsonl").read_text() == "1\n2\n"
    (disk / "ballast").unlink()
    rewind(disk, found)
    assert ((disk / "metrics.jsonl").read_text(), (disk / "cut" / "metrics.jsonl").read_text()) == ("1\n", "2\n")


def test_a_file_that_may_not_grow_is_said_and_costs_nothing(tmp_path):
    """The same without root: the system refuses files above 20 kB."""
    write(tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(RewardTuneError, match="File too large"):
            write(tmp_path, 2)

    _, status = os.waitpid(forked(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert steps(tmp_path) == [1]
    assert hidden(tmp_path) == []
    assert holds(latest(tmp_path), 1)


def test_a_read_only_folder_is_said(disk):
    write(disk, 1)
    assert LIBC.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 32 | 1, None) == 0, errno.errorcode[ctypes.get_errno()]
    with pytest.raises(RewardTuneError, match=r"(?i)checkpoint-2: read-only"):
        write(disk, 2)
    assert holds(latest(disk), 1)
    with tempfile.TemporaryDirectory() as folder:
        earlier = load(write(Path(folder), 0))
    with pytest.raises(RewardTuneError, match=r"(?i)read-only"):
        rewind(disk, earlier)


# ------------------------------------------------------------------------------------------------ resume


def test_rewind_cuts_the_logs_and_loses_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open()
    for step in range(3):
        folder.append("metrics.jsonl", {"step": step})
    folder.append("eval.jsonl", {"step": 0})
    found = load(write(tmp_path, 3))
    held = (tmp_path / "metrics.jsonl").read_bytes()
    for step in range(3, 6):
        folder.append("metrics.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed in the middle of a line
    write(tmp_path, 5)
    (tmp_path / ".run.json.abc.tmp").mkdir()
    notes = rewind(tmp_path, found)
    assert (tmp_path / "metrics.jsonl").read_bytes() == held
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 0}\n'
    cut = (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert cut == '{"step": 3}\n{"step": 4}\n{"step": 5}\n{"step": 6, "rew\n'
    assert steps(tmp_path) == [3]
    assert holds(load(tmp_path / "cut" / "checkpoint-5"), 5)
    assert len(notes) == 2
    assert "checkpoint-5" in notes[0]
    assert "4 later line" in notes[1]
    assert hidden(tmp_path) == []
    assert rewind(tmp_path, found) == []  # again: nothing left to do
    folder.append("metrics.jsonl", {"step": "other"})
    rewind(tmp_path, found)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == cut + '{"step": "other"}\n'


def test_rewind_refuses_the_log_of_another_run_and_tells_of_lost_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("a line\nanother\n")
    found = load(write(tmp_path, 3))
    log.write_text("a line of another length\nand more\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is not the log"):
        rewind(tmp_path, found)
    log.write_text("a line\nano")
    notes = rewind(tmp_path, found)
    assert log.read_text() == "a line\n"
    assert "lines of it are lost" in notes[0]
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == "ano\n"


def test_the_run_folder_resumes_and_overwrites(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="no run to resume"):
        RunFolder(tmp_path / "run", resume=True)
    folder.open()
    folder.set_status("running", before=1)
    write(tmp_path / "run", 4)
    (tmp_path / "run" / "cut").mkdir()
    (tmp_path / "run" / "notes of the user.txt").write_text("stay")
    with pytest.raises(ConfigError, match="contradict"):
        RunFolder(tmp_path / "run", resume=True, overwrite=True)
    again = RunFolder(tmp_path / "run", resume=True)
    again.open()
    assert again.status["before"] == 1
    assert steps(tmp_path / "run") == [4]
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="move it away"):
        RunFolder(tmp_path / "run", resume=True)
    (tmp_path / "run" / "run.json").unlink()
    assert RunFolder(tmp_path / "run", resume=True).status == {}
    again.set_status("running")
    for name in ("kohya/export.json", "hub/README.md", "mine/a.txt"):
        file = tmp_path / "run" / "export" / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    RunFolder(tmp_path / "run", overwrite=True).open()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["export", "notes of the user.txt", "run.json"]
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["mine"]


def test_a_start_killed_before_its_first_file_does_not_block_the_next(tmp_path):
    (tmp_path / ".run.json.abc.tmp").mkdir()
    for overwrite in (False, True):
        RunFolder(tmp_path, overwrite=overwrite)
    RunFolder(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


SETTINGS = {
    "model": {"id": "playground", "dtype": "float32", "device": "cpu"},
    "reward": [{"name": "clipscore", "weight": 1.0}],
    "prompts": ["a", "b"],
    "optim": {"steps": 100, "lr": 1e-4, "betas": [0.9, 0.999], "schedule": "constant", "max_seconds": None},
    "memory": {"cache_text": True, "vae_dtype": None},
    "eval": {"every": None},
    "guards": {"rules": []},
    "output_dir": "runs/a",
}


def changed(**values):
    """SETTINGS with `section__key=value`."""
    settings = json.loads(json.dumps(SETTINGS))
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            settings.setdefault(section, {})[key] = value
        else:
            settings[section] = value
    return settings


def test_settings_that_may_change():
    now = changed(
        optim__steps=200,
        optim__max_seconds=60,
        optim__micro_batch=2,
        eval__every=10,
        guards__rules=[{"metric": "reward", "below": 0.1}],
        checkpoints__keep=3,
        log__project="x",
        output_dir="runs/b",
        memory__cache_text=False,
        model__device="cuda",
    )
    lines = compare_settings(SETTINGS, now)
    assert len(lines) == 10
    assert "optim.steps: 100 at the checkpoint, 200 now" in lines
    assert compare_settings(SETTINGS, changed()) == []
    assert compare_settings(SETTINGS, changed(adapter=None)) == []  # absent is null
    newer = {"sampling": {**SETTINGS.get("sampling", {}), "call": {}}, "columns": []}  # keys of a later version
    assert compare_settings(SETTINGS, {**SETTINGS, **newer}) == []
    with pytest.raises(CheckpointError, match=r"columns: null at the checkpoint, \["):
        compare_settings(SETTINGS, {**SETTINGS, "columns": ["image"]})


def test_settings_that_may_not_change_are_listed_all_at_once():
    now = changed(optim__lr=2e-4, model__dtype="bfloat16", memory__vae_dtype="bfloat16", seed=1, eval__every=5)
    now |= {"eval": {"every": 5, "count": 4, "prompts": "b.txt"}, "guards": {"features": "a", "rewards": ["b"]}}
    now |= {"prompts": ["a", "b", "c"], "reward": [{"name": "clipscore", "weight": 2.0}]}
    with pytest.raises(CheckpointError) as caught:
        compare_settings(SETTINGS, now)
    text = str(caught.value)
    for line in (
        "optim.lr: 0.0001 at the checkpoint, 0.0002 now",
        'model.dtype: "float32" at the checkpoint, "bfloat16" now',
        'memory.vae_dtype: null at the checkpoint, "bfloat16" now',
        "seed: null at the checkpoint, 1 now",
        "reward.0.weight: 1.0 at the checkpoint, 2.0 now",
        'prompts: ["a", "b"] at the checkpoint, ["a", "b", "c"] now',
        'eval.prompts: null at the checkpoint, "b.txt" now',
        "eval.count: null at the checkpoint, 4 now",
        'guards.features: null at the checkpoint, "a" now',
        'guards.rewards: null at the checkpoint, ["b"] now',
    ):
        assert line in text
    assert "eval.every" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("schedules", [("cosine", "cosine"), ("constant", "linear"), ("linear", "constant")])
def test_the_number_of_steps_is_part_of_any_other_schedule(schedules):
    was, now = (changed(optim__schedule=schedule) for schedule in schedules)
    now["optim"]["steps"] = 200
    with pytest.raises(
        CheckpointError, match=r"optim\.steps: 100 at the checkpoint, 200 now \(legal with schedule con"
    ):
        compare_settings(was, now)


def test_long_values_that_differ_at_their_end_are_told_apart():
    with pytest.raises(CheckpointError) as caught:
        compare_settings(changed(prompts="a" * 500 + "b"), changed(prompts="a" * 500 + "c"))
    was, now = str(caught.value).splitlines()[1].removeprefix("  prompts: ").split(" at the checkpoint, ")
    assert was != now.removesuffix(" now")
    assert len(was) < 150


# -------------------------------------------------------------------------------------------- optimiser


class Odd(torch.optim.Optimizer):
    """Stands for 8-bit AdamW and Prodigy: uint8 moments, one table shared by all, numbers, a tensor in the group."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(
            parameters, {"lr": lr, "betas": (0.9, 0.99), "d": 1e-6, "k": 0, "d_numerator": torch.tensor(0.0)}
        )
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "code": torch.full_like(p, 128, dtype=torch.uint8), "table": self.table}
                    state |= {"scale": torch.ones((), dtype=torch.float64), "p0": p.clone().bfloat16()}
                state["step"] += 1
                moment = 0.9 * state["table"][state["code"].long()] + 0.1 * p.grad
                state["code"] = torch.bucketize(moment, state["table"]).clamp(0, 255).to(torch.uint8)
                state["scale"] = state["scale"] * 0.999
                group["d_numerator"] = group["d_numerator"] + p.grad.abs().sum() * 1e-3
                p -= group["lr"] * (moment + 0.01 * (p - state["p0"].float())) * float(state["scale"])
            group["k"] += 1
            group["d"] = group["d"] * 1.1 + float(group["d_numerator"]) / 3


def adamw(parameters):
    wanted = list(parameters)
    return torch.optim.AdamW(
        [{"params": wanted[:2], "weight_decay": 0.1}, {"params": wanted[2:]}], lr=0.1, betas=(0.8, 0.9)
    )


OPTIMIZERS = {
    "adamw": adamw,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "odd": Odd,
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


def advance(model, optimizer, schedule, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        model(x).float().square().sum().backward()
        optimizer.step()
        schedule.step()


def cosine(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 20)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_optimisation_goes_on_bit_for_bit(name, dtype, tmp_path):
    make = OPTIMIZERS[name]
    model = network(dtype)
    optimizer = make(model.parameters())
    schedule = cosine(optimizer)
    advance(model, optimizer, schedule, 0, 7)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    adapter = dict(model.named_parameters())
    save(
        tmp_path,
        7,
        tensors={"adapter": adapter, "optimizer": tensors},
        state={"optimizer": state, "schedule": schedule.state_dict()},
    )
    held, held_state = {key: value.clone() for key, value in tensors.items()}, copy.deepcopy(state)
    advance(model, optimizer, schedule, 7, 15)

    found = latest(tmp_path)
    torch.manual_seed(99)
    other = network(dtype)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    again = make(other.parameters())
    schedule = cosine(again)
    restore(dict(other.named_parameters()), found.tensors("adapter"))
    schedule.load_state_dict(found.state["schedule"])
    unflatten_optimizer(again, other.named_parameters(), found.tensors("optimizer"), found.state["optimizer"])
    back, plain = flatten_optimizer(again, other.named_parameters())
    assert back.keys() == held.keys()
    assert all(identical(back[key], held[key]) for key in held)
    assert plain == held_state
    assert again.param_groups[0].get("betas") == optimizer.param_groups[0].get("betas")  # a tuple again
    advance(other, again, schedule, 7, 15)
    for (key, expected), (_, parameter) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert identical(parameter.detach(), expected.detach()), key


def test_without_the_optimiser_state_the_continuation_differs():
    """The control: the test above could fail."""
    model, other = network(), network()
    ends = []
    for current, fresh in ((model, False), (other, True)):
        optimizer = adamw(current.parameters())
        advance(current, optimizer, cosine(optimizer), 0, 7)
        optimizer = adamw(current.parameters()) if fresh else optimizer
        advance(current, optimizer, cosine(optimizer), 7, 15)
        ends.append(current[0].weight.detach())
    assert not torch.allclose(*ends)


def test_another_order_of_the_parameters_is_the_same():
    model, other = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    advance(model, optimizer, cosine(optimizer), 0, 3)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    again = torch.optim.AdamW(list(other.parameters())[::-1], lr=0.1)
    unflatten_optimizer(again, other.named_parameters(), tensors, json.loads(json.dumps(state)))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert identical(optimizer.state[mine]["exp_avg"], again.state[theirs]["exp_avg"])
        assert optimizer.state[mine]["exp_avg"].data_ptr() != again.state[theirs]["exp_avg"].data_ptr()


def test_a_learning_rate_that_is_a_tensor_comes_back():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.0625), foreach=False)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    again = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), foreach=False)
    unflatten_optimizer(again, model.named_parameters(), tensors, json.loads(json.dumps(state)))
    assert again.param_groups[0]["lr"] == 0.0625


def test_float_moments_of_half_parameters_are_not_rounded():
    """torch's own load_state_dict casts them to the parameter's dtype."""
    model = network(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(parameter.shape)}
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    again = torch.optim.AdamW(model.parameters())
    unflatten_optimizer(again, model.named_parameters(), tensors, state)
    assert again.state[model[0].weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 4)), r"2 only in the checkpoint \(2\.bias, 2\.weight\)"),
        (lambda: torch.nn.Sequential(*network(), torch.nn.Linear(2, 2)), r"2 only in the model \(3\.bias, 3\.weight\)"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)), r"0\.weight: "),
    ],
)
def test_another_model_is_refused_by_name_and_nothing_is_changed(other, message):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    advance(model, optimizer, cosine(optimizer), 0, 2)
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    present = other()
    again = torch.optim.AdamW(present.parameters(), lr=0.5)
    with pytest.raises(CheckpointError, match=message):
        unflatten_optimizer(again, present.named_parameters(), tensors, state)
    assert not again.state
    assert again.param_groups[0]["lr"] == 0.5
    before = [parameter.detach().clone() for parameter in present.parameters()]
    with pytest.raises(CheckpointError, match=message):
        restore(dict(present.named_parameters()), dict(model.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, present.parameters(), strict=True))


def test_what_an_optimiser_may_not_keep_is_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(CheckpointError, match="no name"):
        flatten_optimizer(optimizer, [])
    optimizer.state[model[0].weight] = {"history": {1, 2}}
    with pytest.raises(CheckpointError, match=r"set as 'history' of 0\.weight"):
        flatten_optimizer(optimizer, model.named_parameters())
    again = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="SGD in the checkpoint, AdamW now"):
        unflatten_optimizer(
            again,
            model.named_parameters(),
            {},
            flatten_optimizer(torch.optim.SGD(model.parameters()), model.named_parameters())[1],
        )


def test_a_state_of_another_optimiser_changes_no_weights(tmp_path):
    model = network()
    TrainingState(model, steps=4, lr=0.1).save(tmp_path, 1, {}, keep=1, best=None)
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["state"]
    state["optimizer"]["class"] = "SGD"
    found = replace(load(tmp_path / "checkpoint-1"), state=state)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    with pytest.raises(CheckpointError, match="SGD in the checkpoint, AdamW now"):
        TrainingState(model, steps=4, lr=0.1).load(found)
    assert (model[0].weight == 3).all()


def test_importing_the_module_is_light():
    code = "import sys, rewardtune.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
