"""Trackers get what the files of the run hold, once, and can neither stop a run nor keep it waiting."""

import importlib.util
import json
import sys

import pytest
import torch
from test_trainer import tuner
from tiny_runs import metrics

from rewardtune import launch, trackers
from rewardtune.config import load_config
from rewardtune.errors import ConfigError, TrainingStopped
from rewardtune.runfolder import RunFolder
from rewardtune.trackers import Trackers, flatten, no_questions, wandb_can_log_in


class Fake:
    """In the place of a tracker class of accelerate: notes every call. fails: methods that raise."""

    def __init__(self, project, *, calls, fails=(), **options):
        self.calls, self.fails = calls, fails
        self._note("init", project, options)

    def _note(self, what, *values):
        self.calls.append((what, *values))
        if what in self.fails:
            raise ConnectionError("no route to host")

    def start(self):
        self._note("start", sys.stdin.isatty(), sys.stdin.read())

    def store_init_configuration(self, values):
        self._note("config", values)

    def log(self, values, step):
        self._note("log", step, values)

    def finish(self):
        self._note("finish")


class FakeWithPictures(Fake):
    def log_images(self, values, step, **options):
        self._note("images", step, values, options)


@pytest.fixture
def calls(monkeypatch):
    """name -> the calls that its fake tracker got; `calls.fails` may name methods that raise."""
    from accelerate import tracking

    class Calls(dict):
        fails = ()

    calls = Calls({name: [] for name in trackers.NAMES})
    for name, place in (("tensorboard", "TensorBoard"), ("wandb", "WandB"), ("trackio", "Trackio")):
        kind = Fake if name == "trackio" else FakeWithPictures

        def make(*project, kind=kind, noted=calls[name], **options):
            return kind(*project, calls=noted, fails=calls.fails, **options)

        monkeypatch.setattr(tracking, f"{place}Tracker", make)
    monkeypatch.setattr(trackers, "check_installed", lambda names: None)
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    return calls


def evals(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def logged(calls, word):
    return [call[1:] for call in calls if call[0] == word]


@pytest.mark.parametrize(
    "name", [trackers.NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in trackers.NAMES[1:])]
)
def test_every_tracker_gets_the_lines_of_the_files(name, calls, tmp_path):
    tuner(tmp_path / "run", log={"trackers": [name], "project": "mine"}).train(3, lr=1e-3, eval_every=2)
    got = logged(calls[name], "log")
    config = [values for _, values in got if "config" in values] if name == "tensorboard" else []
    updates = {step: values for step, values in got if "grad_norm" in values}
    looks = {step: values for step, values in got if "eval/reward" in values}
    assert len(got) == len(updates) + len(looks) + len(config) == 3 + 3 + (name == "tensorboard")
    for record in metrics(tmp_path / "run"):
        values = updates[record["step"] + 1]
        for key in ("reward", "loss", "grad_norm", "lr", "seconds", "replay_error"):
            assert values[key] == record[key], key
        assert {k[6:]: v for k, v in values.items() if k.startswith("parts/")} == record["parts"]
        assert all(type(value) is float for value in values.values())
        assert "step" not in values
    for line in evals(tmp_path / "run"):
        values = {key.removeprefix("eval/"): value for key, value in looks[line["step"]].items()}
        assert values == {key: mean for key, (mean, _) in line["scores"].items()} | line["panel"]["values"]
        assert {"reward", "sharpness", "saturation"} <= values.keys()
    assert [call[0] for call in calls[name]].count("finish") == 1
    assert calls[name][-1] == ("finish",)
    assert calls[name][0][1] == ("tensorboard" if name == "tensorboard" else "mine")
    if name == "tensorboard":
        assert "seed: 0" in config[0]["config"]
    else:
        assert logged(calls[name], "config")[0][0]["seed"] == 0
    pictures = logged(calls[name], "images")
    assert [step for step, *_ in pictures] == ([] if name == "trackio" else [0, 2, 3])
    for _, values, options in pictures:
        assert values["eval/pictures"].shape == (3, 16, 16, 3)
        assert options == ({"dataformats": "NHWC"} if name == "tensorboard" else {})


def test_pictures_are_those_of_samples_and_at_most_16(calls, tmp_path):
    folder = RunFolder(tmp_path)
    some = Trackers(["wandb"], folder=folder, say=print)
    some.start({}, step=0)
    images = torch.rand(20, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    some.look(0, {"reward": 1.0}, images)
    shown = logged(calls["wandb"], "images")[0][1]["eval/pictures"]
    assert shown.shape == (16, 4, 6, 3)
    expected = torch.round(images[5, 1, 2, 3] * 255)
    assert shown[5, 2, 3, 1] == expected
    assert shown.dtype == "uint8"


def test_only_numbers_are_logged():
    record = {"step": 3, "reward": 1, "parts": {"a": 2.0}, "clipped": True, "end": None, "trained": [1], "lr": 0.1}
    assert flatten(record | {"step_grad_norms": {"4": 1.0}}) == {"reward": 1, "parts/a": 2, "clipped": 1, "lr": 0.1}


def stop_after(folder, steps):
    """A run with trackers that breaks down after `steps` updates; checkpoints every 2."""
    run = tuner(folder, reward=brightness, log={"trackers": ["tensorboard", "wandb"]}, checkpoints={"every": 2})
    update = run._update

    def break_down(gradient, state, clip):
        if run.step == steps:
            raise TrainingStopped("broken")
        return update(gradient, state, clip)

    run._update = break_down
    with pytest.raises(TrainingStopped, match="broken"):
        run.train(6, lr=1e-3)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_and_logs_nothing_twice(calls, tmp_path):
    stop_after(tmp_path / "run", 3)
    steps = {name: [step for step, values in logged(calls[name], "log") if "lr" in values] for name in calls}
    assert steps["tensorboard"] == steps["wandb"] == [1, 2, 3]
    first = {name: calls[name][0] for name in ("tensorboard", "wandb")}
    for name in calls:
        calls[name].clear()

    again = {"trackers": ["tensorboard", "wandb"]}
    tuner(tmp_path / "run", reward=brightness, resume="latest", log=again, checkpoints={"every": 2}).train(6, lr=1e-3)
    steps = {name: [step for step, values in logged(calls[name], "log") if "lr" in values] for name in calls}
    assert steps["wandb"] == [4, 5, 6]  # 3 is there already, and W&B cannot take it back
    assert steps["tensorboard"] == [3, 4, 5, 6]
    assert first["tensorboard"][2]["purge_step"] is None
    assert calls["tensorboard"][0][2]["purge_step"] == 3  # TensorBoard forgets its own 3
    for name in first:
        ids = ("id", "name") if name == "wandb" else ("logging_dir",)
        assert [first[name][2][key] for key in ids] == [calls[name][0][2][key] for key in ids]
        assert not logged(calls[name], "config")
        assert not [values for _, values in logged(calls[name], "log") if "config" in values]
    looks = [step for step, values in logged(calls["wandb"], "log") if "eval/reward" in values]
    assert looks == [6]  # the one of step 0 was logged before
    assert "wandb has the steps up to 3 already" in (tmp_path / "run/train.log").read_text()


@pytest.mark.slow
def test_overwriting_a_run_starts_the_trackers_anew(calls, tmp_path):
    tuner(tmp_path / "run", log={"trackers": ["wandb"]}).train(1)
    tuner(tmp_path / "run", log={"trackers": ["wandb"]}, overwrite=True).train(1)
    one, two = (call[2]["id"] for call in calls["wandb"] if call[0] == "init")
    assert one != two
    assert [step for step, _ in logged(calls["wandb"], "log")] == [0, 1, 1] * 2


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("init", "start", "config", "images", "finish")]


@pytest.mark.parametrize("method", ["log", *SLOW])
def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(method, calls, tmp_path):
    calls.fails = (method,)
    result = tuner(tmp_path / "run", log={"trackers": ["wandb"]}).train(3)
    assert result.status == "done"
    assert len(metrics(tmp_path / "run")) == 3
    reports = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if "wandb failed" in line]
    assert len(reports) == 1
    assert "ConnectionError: no route to host" in reports[0]
    assert [call[0] for call in calls["wandb"]].count(method) == 1


def test_one_that_fails_leaves_the_others_alone(calls, tmp_path, monkeypatch):
    from accelerate import tracking

    def broken(project, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(tracking, "WandBTracker", broken)
    tuner(tmp_path / "run", log={"trackers": ["wandb", "trackio"]}).train(1)
    assert [step for step, _ in logged(calls["trackio"], "log")] == [0, 1, 1]


def test_a_process_that_is_not_the_first_logs_nothing(calls, tmp_path):
    some = Trackers(["wandb", "tensorboard"], folder=RunFolder(tmp_path / "run", writes=False), say=print)
    some.start({}, step=0)
    some.look(0, {"reward": 1.0}, torch.zeros(1, 3, 2, 2))
    some.update({"step": 0, "reward": 1.0, "parts": {}})
    some.finish()
    assert not any(calls.values())
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_before_the_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = f"{{model: {tmp_path}/none, reward: brightness, prompts: [a], output_dir: {tmp_path}/out"
    (tmp_path / "run.yaml").write_text(text + ", log: {trackers: [wandb]}}")
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'rewardtune\[wandb\]'"):
        launch.train(load_config(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match=r"'tensorbord' is unknown.*tensorboard"):
        trackers.check_installed(["tensorbord"])


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match="trackio is not installed"):
        trackers.check_installed(["trackio"])


# -- nobody is asked for a login ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "netrc", "offline"),
    [
        ({}, "", True),
        ({"WANDB_MODE": "online"}, "", True),
        ({"WANDB_API_KEY": "k"}, "", False),
        ({}, "machine api.wandb.ai login user password key", False),
        ({}, "machine example.org login user password key", True),
        ({"WANDB_BASE_URL": "https://example.org"}, "machine example.org login user password key", False),
        ({}, "this is no netrc file", True),
    ],
)
def test_wandb_works_offline_without_credentials(environment, netrc, offline, calls, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_can_log_in() != offline
    said = []
    Trackers(["wandb"], folder=RunFolder(tmp_path / "run"), say=said.append).start({}, step=0)
    assert (calls["wandb"][0][2].get("mode") == "offline") == offline
    assert sum("offline" in words for words in said) == offline


def test_nobody_can_be_asked_while_a_tracker_starts(calls, tmp_path):
    Trackers(["wandb"], folder=RunFolder(tmp_path / "run"), say=print).start({}, step=0)
    assert logged(calls["wandb"], "start") == [(False, "")]
    stdin = sys.stdin
    with pytest.raises(EOFError), no_questions():
        input("API key: ")
    assert sys.stdin is stdin


def test_trackio_in_a_space_needs_a_token(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = []
    Trackers(["trackio"], folder=RunFolder(tmp_path / "run"), say=said.append).start({}, step=0)
    assert not calls["trackio"]
    assert "needs a Hugging Face token" in said[0]


# -- the real ones, where they are installed ------------------------------------------------------------------------


def test_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    for steps, more in ((3, {}), (5, {"resume": "2"})):  # the second one makes step 3 again
        run = tuner(folder, reward=brightness, log={"trackers": ["tensorboard"]}, checkpoints={"every": 2}, **more)
        run.train(steps, lr=1e-3, eval_every=2)
    assert "failed" not in (folder / "train.log").read_text()
    events = EventAccumulator(str(folder / "logs/tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    for key in ("reward", "grad_norm", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(r["step"] + 1, pytest.approx(r[key], rel=1e-6)) for r in metrics(folder)], key
    assert [event.step for event in events.Scalars("eval/reward")] == [line["step"] for line in evals(folder)]
    assert [event.step for event in events.Images("eval/pictures")] == [0, 2, 4, 5]
    assert b"seed: 0" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    folder = tmp_path / "run"
    for steps, more in ((3, {}), (5, {"resume": "2"})):
        run = tuner(folder, reward=brightness, log={"trackers": ["wandb"]}, checkpoints={"every": 2}, **more)
        run.train(steps, lr=1e-3)
    log = (folder / "train.log").read_text()
    assert "failed" not in log
    assert "works offline" in log
    assert len(list((folder / "logs/wandb").glob("offline-run-*/*.wandb"))) == 2


def test_trackio_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported: nobody else does
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    for steps, more in ((3, {}), (5, {"resume": "2"})):
        run = tuner(folder, reward=brightness, log={"trackers": ["trackio"]}, checkpoints={"every": 2}, **more)
        run.train(steps, lr=1e-3)
    assert "failed" not in (folder / "train.log").read_text()
    (name,) = SQLiteStorage.get_runs("rewardtune")
    found = [(row["step"], row["lr"]) for row in SQLiteStorage.get_logs("rewardtune", name) if "lr" in row]
    assert found == [(step, 1e-3) for step in (1, 2, 3, 4, 5)]
