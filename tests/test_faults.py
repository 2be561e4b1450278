"""What goes wrong in a run is named, leaves a whole folder behind, and a resumed run equals the one that never stopped.

The faults strike in update 3 of 6, or at the moment that the test names; checkpoints and looks come every 2 updates.
"""

import json
import os
import shutil
import signal
import subprocess

import kill_run
import pytest
import torch
from safetensors.torch import load_file
from tiny import stable_diffusion
from tiny_runs import metrics, redness, save_tiny, status, write_run

from rewardtune import adapters, checkpoint, cli, methods, rewards
from rewardtune import gradient as gradient_module
from rewardtune.engine import Tape
from rewardtune.errors import ConfigError, RewardTuneError, TrainingStopped
from rewardtune.rewards.base import as_reward
from rewardtune.trainer import RewardTuner

PROMPTS = ["red heart", "blue star", "green moon", "pink cat", "grey dog"]
TRAIN = {"lr": 1e-3, "schedule": "cosine", "ema": 0.9, "eval_every": 2}
LORA = "pytorch_lora_weights.safetensors"


def tuner(folder, pipe=None, **changes):
    settings = {
        "reward": redness,
        "method": methods.drtune(K=1, m=2),
        "prompts": PROMPTS,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "rank": 4,
        "batch": 2,
        "eval_count": 2,
        "checkpoints": {"every": 2, "keep": 2, "best": "reward"},
        "show_progress": False,
    } | changes
    return RewardTuner(pipe or stable_diffusion(lora=False)[0], output_dir=folder, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs. The reward has the name of the disturbed one, which a resume compares."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tuner(folder, reward=faulty(lambda images: None)).train(6, **TRAIN)
    return folder


def faulty(strike):
    def reward(images, prompts):
        changed = strike(images)
        return redness(images, prompts) if changed is None else changed

    return reward


def evaluated(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def resumed_equals(whole, folder, **changes):
    """Go on from the newest checkpoint in a fresh pipeline; what differs from the undisturbed run at the end."""
    settings = {"reward": faulty(lambda images: None), "resume": "latest"} | changes
    tuner(folder, **settings).train(6, **TRAIN)
    assert status(folder)["status"] == "done"
    assert "error" not in status(folder)
    return kill_run.compare(whole, folder)


# ------------------------------------------------------------------------------------------- what fails


class Fault:
    """Switched on in update 3; `each` is the tuner."""

    def __init__(self):
        self.each = None

    def due(self):
        return self.each is not None and self.each.step == 3


def memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def break_reward(what):
    def arrange(fault, monkeypatch):
        def strike(images):
            if not fault.due():
                return None
            if what == "nan":
                return images.mean((1, 2, 3)) * float("nan")
            if what == "memory":
                memory()
            raise ValueError("the network is gone")

        return {"reward": faulty(strike)}

    return arrange


def break_picture(value):
    """As an fp16 VAE does it: NaN or black."""

    def arrange(fault, monkeypatch):
        pipe = fault.pipe
        pipe.vae.decoder.register_forward_hook(lambda *a: torch.full_like(a[2], value) if fault.due() else None)
        return {}

    return arrange


def break_denoiser(fault, monkeypatch):
    fault.pipe.unet.register_forward_hook(
        lambda module, given, out: tuple(part * float("nan") for part in out) if fault.due() else None
    )
    return {}


def break_function(owner, name):
    def arrange(fault, monkeypatch):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: memory() if fault.due() else own(*a, **k))
        return {}

    return arrange


def break_optimizer(fault, monkeypatch):
    """It fails when the first parameter has moved already."""
    own = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        if fault.due():
            optimizer.param_groups[0]["params"][0].data.add_(1.0)
            memory()
        return own(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return {}


FAULTS = {
    "NaN from the reward": (break_reward("nan"), TrainingStopped, r"step 3: the reward is \[nan, nan\]: not finite"),
    "NaN from the denoiser": (break_denoiser, TrainingStopped, "step 3: the pictures hold NaN"),
    "NaN from the VAE": (break_picture(float("nan")), TrainingStopped, "step 3: the pictures hold NaN"),
    "black pictures": (break_picture(-1e4), TrainingStopped, "step 3: all pictures are black"),
    "the reward raises": (
        break_reward("raise"),
        RewardTuneError,
        "step 3: reward .* raised ValueError: the network is",
    ),
    "memory, sampling": (break_function(gradient_module, "rollout"), TrainingStopped, r"memory \(step 3, sampling"),
    "memory, reward": (break_reward("memory"), TrainingStopped, r"out of memory \(step 3, the reward: .* 20.00 MiB"),
    "memory, replay": (break_function(Tape, "backward"), TrainingStopped, r"out of memory \(step 3, the replay"),
    "memory, optimiser": (break_optimizer, TrainingStopped, r"out of memory \(step 3, the optimiser"),
}


slow = pytest.mark.slow  # every case is a run and a half: all of them take minutes
QUICK = ("NaN from the reward",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else slow) for name in FAULTS])
def test_a_fault_in_an_update(name, whole, tmp_path, monkeypatch):
    arrange, kind, message = FAULTS[name]
    folder, fault = tmp_path / "run", Fault()
    fault.pipe, _ = stable_diffusion(lora=False)
    with monkeypatch.context() as patch:
        settings = {"reward": faulty(lambda images: None)} | arrange(fault, patch)
        fault.each = tuner(folder, fault.pipe, **settings)
        with pytest.raises(kind, match=message) as met:
            fault.each.train(6, **TRAIN)
    stopped = kind is TrainingStopped
    assert met.value.exit_code == (4 if stopped else 1)
    told = status(folder)
    assert (told["status"], told["steps"], told["error"]) == ("stopped" if stopped else "failed", 3, str(met.value))
    assert str(met.value) in (folder / "train.log").read_text()
    if name.startswith("memory"):
        for key in ("optim.micro_batch", "memory.gradient_checkpointing", "memory.offload"):
            assert key in str(met.value)
    assert checkpoint.latest(folder).step == 2
    broken = "pictures" in message
    assert told.get("kept_step") == (2 if broken else None)
    saved_by_step_2 = broken or name == "memory, optimiser"  # half an update is not saved
    assert good_weights(folder, whole, steps=2 if saved_by_step_2 else 3)
    assert resumed_equals(whole, folder) == []


@pytest.mark.parametrize("best", ["reward", None])
def test_weights_that_give_nan_do_not_replace_those_of_a_look(best, tmp_path):
    folder = tmp_path / "run"
    each = tuner(folder, checkpoints={"best": best})
    own = each._update

    def update(*args):
        record = own(*args)
        if each.step == 2:  # of the update after the look
            args[1].parameters[0].data.fill_(float("nan"))
        return record

    each._update = update
    with pytest.raises(TrainingStopped, match="step 3: the pictures hold NaN"):
        each.train(6, lr=1e-3, eval_every=2)
    assert all(torch.isfinite(value).all() for value in load_file(folder / LORA).values())
    assert status(folder).get("kept_step") == (2 if best else None)
    said = "of step 2, the best look, are in" if best else "after 3 updates gave these pictures and are not saved"
    assert f"the weights {said}" in (folder / "train.log").read_text()


BY_STEP = {}


def good_weights(folder, whole, *, steps):
    """Whether the LoRA file is the average after `steps` updates, as a run made of that many has it."""
    if steps not in BY_STEP:
        place = whole.parent / f"steps-{steps}"
        each = tuner(place, reward=faulty(lambda images: None))
        seen = []
        own = each._update

        def update(*args):
            record = own(*args)
            if each.step == steps - 1:
                with args[1].averaged():
                    seen.append(adapters.save(each.pipe, place / "good").read_bytes())
            return record

        each._update = update
        each.train(6, **TRAIN)
        BY_STEP[steps] = seen[0]
    return (folder / LORA).read_bytes() == BY_STEP[steps]


def test_too_little_memory_before_the_first_update_is_named_too(tmp_path):
    with pytest.raises(TrainingStopped, match=r"out of memory .*optim.micro_batch"):
        tuner(tmp_path / "run", reward=lambda images, prompts: memory()).train(1)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no tmpfs: needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("moment", ["checkpoint", pytest.param("metrics", marks=slow)])
def test_a_full_disk(moment, whole, small_disk, monkeypatch):
    folder, ballast = small_disk / "run", small_disk / "ballast"

    def fill(left):
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"x" * max(0, free - left))

    each = tuner(folder, reward=faulty(lambda images: None))
    own = each.folder.append if moment == "metrics" else checkpoint.save

    def before(*args, **kwargs):
        if each.step == 4:
            fill(0 if moment == "metrics" else 20_000)
        if each.step == 4 and moment == "metrics":  # pages that are there already take a few more lines
            while True:
                own(*args, **kwargs)
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        if moment == "metrics":
            patch.setattr(each.folder, "append", before)
        else:
            patch.setattr(checkpoint, "save", before)
        with pytest.raises(RewardTuneError, match=r"cannot write .*(No space left|os error 28)") as met:
            each.train(6, **TRAIN)
    assert met.value.exit_code == 1
    found = checkpoint.latest(folder)
    assert (found.step, found.notes) == (2, ())
    assert all(line.endswith("}") for line in (folder / "metrics.jsonl").read_text().splitlines())
    if moment == "checkpoint":  # what the half checkpoint took is free again: there is room to say it
        assert (status(folder)["status"], status(folder)["error"]) == ("failed", str(met.value))
    ballast.unlink()
    assert resumed_equals(whole, folder) == []


# ----------------------------------------------------------------------------------------------- signals


def strike_in_update(each, send, patch):
    own = each._update
    patch.setattr(each, "_update", lambda *a: (send() if each.step == 3 else None, own(*a))[1])


def strike_at_the_update_before_a_look(each, send, patch):
    """The look after update 4 is still made: the resumed run starts behind it."""
    own = each._update
    patch.setattr(each, "_update", lambda *a: (own(*a), send() if each.step == 3 else None)[0])


def strike_in_evaluation(each, send, patch):
    own = each.watch.panel
    patch.setattr(each.watch, "panel", Spy(own, lambda: send() if each.step == 4 else None))


def strike_in_first_evaluation(each, send, patch):
    own = each.watch.panel
    patch.setattr(each.watch, "panel", Spy(own, lambda: send() if each.step == 0 else None))


def strike_in_checkpoint(each, send, patch):
    own = checkpoint._complete
    patch.setattr(checkpoint, "_complete", lambda *a: (send() if each.step == 4 else None, own(*a))[1])


class Spy:
    def __init__(self, panel, do):
        self.panel, self.do = panel, do

    def __call__(self, *args, **kwargs):
        self.do()
        return self.panel(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.panel, name)


MOMENTS = {
    "an update": (strike_in_update, 4),
    "the update before a look": (strike_at_the_update_before_a_look, 4),
    "the first look": (strike_in_first_evaluation, 1),
    "a look": (strike_in_evaluation, 4),
    "a checkpoint": (strike_in_checkpoint, 5),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [("a checkpoint", signal.SIGTERM)]
    + [pytest.param(moment, signal.SIGINT, marks=slow) for moment in ("an update", "the first look", "a checkpoint")]
    + [pytest.param("the update before a look", signal.SIGINT, marks=slow)]
    + [pytest.param(moment, signal.SIGTERM, marks=slow) for moment in ("an update", "a look")],
)
def test_a_signal_finishes_the_update_and_saves(moment, number, whole, tmp_path, monkeypatch, capsys):
    arrange, reached = MOMENTS[moment]
    folder = tmp_path / "run"
    each = tuner(folder, reward=faulty(lambda images: None))
    with monkeypatch.context() as patch:
        arrange(each, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as met:
            each.train(6, **TRAIN)
    if number == signal.SIGTERM:
        assert met.value.code == 143
    assert (status(folder)["status"], status(folder)["steps"]) == ("interrupted", reached)
    assert checkpoint.latest(folder).step == reached
    assert "--resume latest" in capsys.readouterr().out
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert resumed_equals(whole, folder) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [("a checkpoint", signal.SIGINT)]
    + [pytest.param(*case, marks=slow) for case in (("an update", signal.SIGINT), ("a checkpoint", signal.SIGTERM))],
)
def test_the_second_signal_acts_at_once(moment, number, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    each = tuner(folder, reward=faulty(lambda images: None))

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        MOMENTS[moment][0](each, twice, patch)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            each.train(6, **TRAIN)
    assert status(folder)["status"] == "interrupted"
    assert checkpoint.latest(folder).step == 2
    assert resumed_equals(whole, folder) == []


def test_a_signal_in_the_last_save_leaves_a_run_that_is_done(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    each = tuner(folder, reward=faulty(lambda images: None))
    own = each._save
    monkeypatch.setattr(each, "_save", lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), own(*a, **k))[1])
    with pytest.raises(KeyboardInterrupt):
        each.train(6, **TRAIN)
    assert status(folder)["status"] == "done"
    assert "the run was done" in capsys.readouterr().out
    assert kill_run.compare(whole, folder) == []


@pytest.mark.slow
def test_exit_codes_of_the_command(tmp_path, monkeypatch, capsys):
    """One after the other on one saved model: 130, 143, 4, 1 and, resumed, 0."""
    file = write_run(tmp_path, save_tiny(tmp_path / "tiny"), optim={"steps": 3, "batch": 2}, checkpoints={"every": 1})
    own = gradient_module.Gradient.add

    def command(strike, *more):
        with monkeypatch.context() as patch:
            patch.setattr(gradient_module.Gradient, "add", lambda g, *given: (strike(), own(g, *given))[1])
            try:
                return cli.main(["train", str(file), *more])
            except SystemExit as left:
                return left.code

    def broken():
        raise OSError("stale handle")

    assert command(lambda: os.kill(os.getpid(), signal.SIGINT)) == 130
    assert command(lambda: os.kill(os.getpid(), signal.SIGTERM), "--overwrite") == 143
    assert command(memory, "--overwrite") == 4
    assert "out of memory" in capsys.readouterr().err
    assert command(broken, "--overwrite") == 1
    assert "Traceback" in (tmp_path / "out" / "train.log").read_text()  # the screen has one line of it
    assert command(lambda: None, "--resume", "latest") == 0
    assert status(tmp_path / "out")["status"] == "done"


# ------------------------------------------------------------------------------------------------ guards


def guarded(folder, rules, **changes):
    """Looks at every second update; the pictures move away from the base's at once, which the rules watch."""
    return tuner(folder, reward=faulty(lambda images: None), guards={"rules": rules}, **changes)


FAR = {"metric": "base_pixels", "above": 0.004}
HARD = {"lr": 1e-2, "eval_every": 2, "ema": 0.5}


def test_a_rule_that_stops_keeps_the_best_look(tmp_path):
    """Patience 2: looks 2 and 4 violate it, so the best look is step 0, whose LoRA changes nothing."""
    folder = tmp_path / "run"
    with pytest.raises(TrainingStopped, match=r"base_pixels is .* training stops") as met:
        guarded(folder, [FAR | {"then": "stop", "patience": 2}]).train(8, **HARD)
    assert met.value.exit_code == 4
    told = status(folder)
    assert (told["status"], told["steps"], told["kept_step"]) == ("stopped", 4, 0)
    assert told["error"] == str(met.value)
    pipe, _ = stable_diffusion(lora=False)
    state = pipe.lora_state_dict(folder)[0]
    assert not any(value.any() for name, value in state.items() if "lora_B" in name or "lora.up" in name)
    assert [record["step"] for record in evaluated(folder)] == [0, 2, 4]


def test_a_rule_that_warns_only_warns(tmp_path):
    folder = tmp_path / "run"
    guarded(folder, [FAR | {"then": "warn"}]).train(4, **HARD)
    assert status(folder)["status"] == "done"
    assert "base_pixels is" in (folder / "train.log").read_text()


def test_a_rollback_goes_back_halves_the_lr_and_the_third_stops(tmp_path):
    """The best look is step 0 for ever: its weights come back after each of the first two looks."""
    folder = tmp_path / "run"
    words = r"base_pixels is .*; training was rolled back before and stops now, best checkpoint is step 0"
    with pytest.raises(TrainingStopped, match=words):
        guarded(folder, [FAR | {"then": "rollback", "above": 0.001}]).train(12, **HARD)
    assert [record["lr"] for record in metrics(folder)] == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
    assert status(folder)["kept_step"] == 0
    assert checkpoint.load(folder / "checkpoint-4").state["rollbacks"] == 2
    back = checkpoint.load(folder / "checkpoint-4").tensors("adapter")
    start = checkpoint.load(folder / "checkpoint-0").tensors("adapter")
    assert all(torch.equal(back[name], start[name]) for name in start)


@pytest.mark.slow  # three runs
def test_a_resume_after_a_rollback_equals_the_run_that_went_on(tmp_path):
    """Out of memory in the update after the rollback; KL, denoising, schedule and EMA on."""
    rules = [FAR | {"then": "rollback"}]
    more = {"regularize": {"kl": 0.1, "denoise": {"weight": 0.1, "count": 4}}}
    settings = HARD | {"schedule": "cosine"}
    guarded(tmp_path / "whole", rules, **more).train(6, **settings)
    each = guarded(tmp_path / "broken", rules, **more)
    own = each._update
    each._update = lambda *a: memory() if each.rollbacks else own(*a)
    with pytest.raises(TrainingStopped, match="out of memory"):
        each.train(6, **settings)
    assert checkpoint.latest(tmp_path / "broken").state["rollbacks"] == 1
    guarded(tmp_path / "broken", rules, resume="latest", **more).train(6, **settings)
    assert kill_run.compare(tmp_path / "whole", tmp_path / "broken") == []
    record = metrics(tmp_path / "whole")[-1]
    assert record["kl"] > 0
    assert record["denoise"] > 0


def test_the_best_look_is_kept_at_the_end_and_it_is_the_average(tmp_path):
    """From update 4 on the training is driven the wrong way; the looks measure the same reward all the time."""
    folder = tmp_path / "run"

    def turning(images, prompts):
        return redness(images, prompts) * (-1 if images.requires_grad and each.step >= 4 else 1)

    each = tuner(folder, reward=turning)
    each.train(12, **HARD | {"ema": 0.2})
    scores = {record["step"]: record["scores"]["reward"][0] for record in evaluated(folder)}
    best = max(scores, key=scores.get)
    assert 0 < best < 12
    told = status(folder)
    assert told["kept_step"] == best
    assert told["after"]["reward"][0] == pytest.approx(scores[best], abs=1e-6)
    found = checkpoint.find(folder, best)
    raw, averages = found.tensors("adapter"), found.tensors("ema")
    saved = torch.cat(
        [value.flatten() for value in stable_diffusion(lora=False)[0].lora_state_dict(folder)[0].values()]
    )
    average = torch.cat([value.flatten() for value in averages.values()])
    own_weights = torch.cat([value.flatten() for value in raw.values()])
    assert float(saved.norm()) == pytest.approx(float(average.norm()), rel=1e-6)
    assert float(saved.norm()) != pytest.approx(float(own_weights.norm()), rel=1e-4)


@pytest.mark.slow
def test_a_resume_is_held_against_the_look_at_step_0(tmp_path):
    """Other eval prompts and held-out rewards, a rule that this look crosses, a metric that it lacks: all refused."""
    folder = tmp_path / "run"
    training = {"lr": 1e-3, "eval_every": 2}
    tuner(folder).train(2, **training)
    text = (folder / "eval.jsonl").read_text()

    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "eval.jsonl"}

    def refused(words, **changes):
        with pytest.raises(ConfigError, match=words):
            tuner(folder, resume="latest", **changes).train(4, **training)
        assert all(path.read_bytes() == held for path, held in kept.items())  # run.json above all

    refused("(?s)method: .*seed: ", method=methods.drtune(K=1, m=1), seed=3)
    refused("eval_prompts_digest", eval_prompts=["red cat", "blue dog"])
    refused("guards.rewards", guards={"rewards": as_reward(redness, action="guard") + rewards.Symmetry()})
    refused(
        r"guards.rules\[0\]: brightness .* already above 0", guards={"rules": [{"metric": "brightness", "above": 0}]}
    )
    (folder / "eval.jsonl").write_text(text.replace('"saturation"', '"saturatiom"'))
    rules = [{"metric": "saturation", "above": 0.99}]
    refused("saturation of guards.rules .* not measured at its step 0", guards={"rules": rules})
    (folder / "eval.jsonl").write_text(text)
    assert checkpoint.latest(folder).step == 2
    tuner(folder, resume="latest", guards={"rules": rules}).train(4, **training)
    assert status(folder)["status"] == "done"


@pytest.mark.slow
def test_a_resumed_run_that_fails_keeps_no_facts_of_its_earlier_end(tmp_path):
    folder = tmp_path / "run"
    tuner(folder).train(2, lr=1e-3)
    assert status(folder)["lora_verified"]
    each = tuner(folder, resume="latest")
    own = each._update
    each._update = lambda *args: memory() if each.step == 3 else own(*args)
    with pytest.raises(TrainingStopped):
        each.train(4, lr=1e-3)
    told = status(folder)
    assert (told["status"], told["steps"], told["lora_verified"]) == ("stopped", 3, False)
    assert "before" in told
    assert not {"after", "seconds"} & told.keys()
