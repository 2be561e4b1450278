"""The list of bad inputs, point by point through the command: one clear line, the exit code, nothing left behind."""

import errno
import json
import os

import pytest
import yaml
from tiny_runs import BASE, full_disk, save_tiny, write_run

from rewardtune.cli import main
from rewardtune.errors import ConfigError, first_line
from rewardtune.runfolder import RunFolder, cannot_write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def train(tmp_path, model, capsys, monkeypatch):
    """train(**sections) -> (exit code, what stood on stderr); the run file's sections are those of BASE, changed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **changes):
        code = main(["train", str(write_run(tmp_path, model, **changes)), *arguments])
        return code, capsys.readouterr().err

    return run


def one_line(error):
    assert error.startswith("rewardtune: ")
    assert error.count("\n") == 1, error
    return error


PROMPTS = {
    "missing": (None, "does not exist; give a .txt file"),
    "empty": (b"", "is empty; write one prompt a line"),
    "blank": (b"\n \n", "has only blank lines (2)"),
    "latin1": (b"a\nb\nf\xfcnf\n", "line 3: byte 0xfc is not UTF-8"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_files(case, train, tmp_path):
    content, message = PROMPTS[case]
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    code, error = train(prompts="p.txt")
    assert (code, message in one_line(error)) == (2, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 5, "m": 2}, "K=5 does not fit into the T=4 steps of this sampler: legal is 1 .. 4"),
        ({"K": 2, "m": 5}, "m=5 does not fit into the T=4 steps"),
        ({"K": 0, "m": 2}, "K=0: legal are whole numbers K >= 1"),
        ({"K": 2, "m": 0}, "m=0: legal are whole numbers m >= 1"),
        ({"k": 2}, "has no option 'k'"),
        ({"K": 2, "m": 2, "spacing": "even"}, "spacing='even' is unknown: legal are chain, executed, random"),
    ],
)
def test_method_options(options, message, train, tmp_path):
    code, error = train(method={"name": "drtune", "options": options})
    assert (code, message in one_line(error)) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_steps_that_the_scheduler_cannot_do(train, tmp_path):
    code, error = train(sampling=BASE["sampling"] | {"steps": 1001})
    assert code == 2
    assert "num_inference_steps=1001" in one_line(error)
    assert "DDIMScheduler" in error
    assert not (tmp_path / "out").exists()


def test_guidance_off(train, tmp_path):
    sampling = BASE["sampling"] | {"guidance": 1.0}
    code, error = train(sampling=sampling)
    assert code == 2
    assert "guidance_scale=1.0 switches classifier-free guidance off" in one_line(error)
    assert "allow_no_guidance" in error
    assert not (tmp_path / "out").exists()
    code, error = train(sampling=sampling | {"allow_no_guidance": True})
    assert code == 0, error


REWARDS = {
    "shape": ("return images.mean((2, 3))", "returned the shape (2, 3) for 2 images; legal is (2,)"),
    "mean": ("return images.mean()", "returned the shape () for 2 images"),
    "nan": ("return images.mean((1, 2, 3)) * float('nan')", "legal are finite numbers"),
    "detached": ("return images.detach().mean((1, 2, 3))", "has no gradient"),
    "rounded": ("return (images > 0.5).float().mean((1, 2, 3))", "gradient"),
    "raises": ("return images.no_such_thing", "raised AttributeError"),
    "size": ("check_size('mine', images, height=32, width=32); return images.mean((1, 2, 3))", "32x32 or larger"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_rewards_that_cannot_be_trained_on(case, train, tmp_path):
    body, message = REWARDS[case]
    code = f"from rewardtune.rewards.contract import check_size\n\n\ndef mine(images, prompts):\n    {body}\n"
    (tmp_path / f"bad_{case}.py").write_text(code)
    code, error = train(reward=f"bad_{case}:mine")
    assert (code, message in one_line(error)) == (3, True), error
    assert "mine" in error
    assert not (tmp_path / "out").exists()


def test_unknown_names(train, tmp_path):
    for changes, message in (
        ({"reward": "simmetry"}, "did you mean 'symmetry'?"),
        ({"method": "drtuned"}, "unknown method 'drtuned' (did you mean 'drtune'?)"),
        ({"model": "no/such-model"}, "model 'no/such-model' cannot be loaded"),
        ({"sampling": BASE["sampling"] | {"scheduler": "DDIMSheduler"}}, "did you mean 'DDIMScheduler'?"),
        ({"adapter": {"rank": 4, "targets": ["to_w"]}}, "to_w match no layer; legal suffixes here: "),
        ({"adapter": {"rank": 4, "targets": "atention"}}, "legal are attention"),
    ):
        code, error = train(**changes)
        assert (code, message in one_line(error)) == (2, True), error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"mean_of": ["symmetry", "simmetry"]}}, "did you mean 'symmetry'?"),
        ({"guards": {"rewards": ["clipscor"]}}, "did you mean 'clipscore'?"),
        ({"sampling": BASE["sampling"] | {"scheduler": "DDIMSheduler"}}, "did you mean 'DDIMScheduler'?"),
        (
            {"model": {"id": "no/model", "pipeline": "FluxPipelin"}},
            "unknown pipeline 'FluxPipelin' (did you mean 'Flux",
        ),
    ],
)
def test_names_are_looked_up_before_weights_load(changes, message, train):
    code, error = train(**{"model": "no/such-model"} | changes)
    assert (code, message in one_line(error)) == (2, True), error


def test_output_folder_that_exists(train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, error = train()
    assert code == 2
    assert "exists and is not empty" in one_line(error)
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
    code, error = train("--overwrite")  # nothing there says that it is a run: not ours to overwrite
    assert code == 2
    assert "holds no run to overwrite" in one_line(error)
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_overwrite_replaces_a_run_and_nothing_beside_it(train, tmp_path):
    out = tmp_path / "out"
    assert train()[0] == 0
    (out / "notes.txt").write_text("mine")
    (out / "samples" / "old.png").write_text("old")
    code, error = train("--overwrite")
    assert code == 0, error
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "samples" / "old.png").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "done"


def test_output_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, error = train()
    assert (code, "is a file" in one_line(error)) == (2, True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.slow  # ten seconds; test_faults.py has a quick one
def test_full_disk_while_saving(train, tmp_path, monkeypatch):
    code, error = train()
    out = tmp_path / "out"
    old = (out / "pytorch_lora_weights.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        # the folder is overwritten, so the old LoRA is gone before training; nothing half-written takes its place
        code, error = train("--overwrite")
    assert code == 1
    assert "No space left on device" in one_line(error)
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert not list(out.rglob("*.safetensors"))
    assert not list(out.rglob("*.tmp"))
    code, error = train("--overwrite")
    assert code == 0
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() == old  # and the same run gives the same file


def test_reward_that_turns_nan_while_training(train, tmp_path):
    """Exit 4, no update with it, and the LoRA of the last good update is there."""
    (tmp_path / "turns_nan.py").write_text(
        "calls = 0\n\n\ndef mine(images, prompts):\n    global calls\n    calls += images.requires_grad\n"
        "    return images.mean((1, 2, 3)) * (float('nan') if calls > 6 else 1.0)\n"
    )
    code, error = train(reward="turns_nan:mine", optim={"steps": 50, "batch": 2, "lr": 1e-3})
    assert code == 4
    assert "nan" in one_line(error)
    out = tmp_path / "out"
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    status = json.loads((out / "run.json").read_text())
    assert (status["status"], status["steps"]) == ("stopped", steps)
    assert 1 <= steps <= 6
    assert (out / "pytorch_lora_weights.safetensors").exists()


def test_no_output_folder_can_be_made(train, tmp_path):
    """Found before the model is looked for."""
    (tmp_path / "file").write_text("")
    code, error = train(output_dir="file/out", model="no/such-model")
    assert (code, "file is a file, not a folder" in one_line(error)) == (2, True), error


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(ConfigError, match=rf"out cannot be made: {tmp_path} is not writable; choose another"):
        RunFolder(tmp_path / "out")


def test_the_second_of_two_runs_leaves_the_folder_to_the_first(tmp_path, monkeypatch):
    """Both found the folder free; the second opens it late, or in the very moment."""
    first, second, third = (RunFolder(tmp_path / "out", overwrite=n == 2) for n in range(3))
    first.open()
    first.append("metrics.jsonl", {"step": 0})
    (first.path / "checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match=r"is not empty; .* go on with its run by --resume latest"):
        second.open()
    monkeypatch.setattr(RunFolder, "_refuse_used", lambda self: None)
    with pytest.raises(ConfigError, match="is not empty"):
        second.open()
    assert sorted(path.name for path in first.path.iterdir()) == ["checkpoint-1", "metrics.jsonl", "run.json"]
    third.open()  # overwrites
    assert [path.name for path in first.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "may write to"), (errno.EISDIR, "Give a file")],
)
def test_what_cannot_be_written_says_what_helps(tmp_path, number, cure):
    assert cure in str(cannot_write(tmp_path / "out", OSError(number, os.strerror(number))))


def test_bad_run_files(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "x", "optin": {}, "seed": -1}))
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "optin" in said
    assert "did you mean 'optim'" in said
    assert "seed" in said
    assert main(["train", str(tmp_path / "nothing.yaml")]) == 2
    assert "nothing.yaml" in one_line(capsys.readouterr().err)


def test_what_a_foreign_error_says_fits_into_a_sentence():
    told = {"": "OSError", " \n ": "OSError", "\nno network.\nmore": "no network", "code 404": "code 404"}
    assert {text: first_line(OSError(text)) for text in told} == told
