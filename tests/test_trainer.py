"""RewardTuner: the reward rises, micro-batches and repeats change nothing, a working pipeline is left behind."""

import json
import random
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import set_scheduler, stable_diffusion
from tiny_runs import metrics, redness

from rewardtune import evaluate, methods
from rewardtune.adapters import ADAPTER
from rewardtune.errors import ConfigError, PreflightError, RewardTuneError, TrainingStopped
from rewardtune.gradient import derive_seed
from rewardtune.trainer import RewardTuner, _Signals

PROMPTS = ["red heart", "blue star", "green moon", "pink cat", "grey dog"]


def plain():
    pipe, _ = stable_diffusion(lora=False)
    return pipe


def tuner(folder, pipe=None, **changes):
    settings = {
        "reward": redness,
        "method": methods.drtune(K=2, m=2),
        "prompts": PROMPTS,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "rank": 4,
        "batch": 4,
        "eval_count": 3,
        "show_progress": False,
    } | changes
    return RewardTuner(pipe or plain(), output_dir=folder, **settings)


def weights(pipe):
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if "lora_" in name}


METHODS = {
    "refl": methods.refl(m=2),
    "draft": methods.draft(K=2),
    "draft_lv": methods.draft_lv(n=2),
    "alignprop": methods.alignprop(),
    "drtune": methods.drtune(K=2, m=2),
}


@pytest.mark.parametrize(
    "name", [name if name == "drtune" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_the_reward_rises_with_every_method(name, tmp_path):
    """Measured over seeds 0-2 and all five methods: rises of 0.087 to 0.118, from 0.063 to 0.095."""
    result = tuner(tmp_path / "run", method=METHODS[name], seed=1, rank=8).train(12, lr=3e-3)
    rise = result.after["reward"][0] - result.before["reward"][0]
    assert rise > 0.04


def test_without_gradient_steps_nothing_moves(tmp_path):
    """The control of the test above: a learning rate of almost nothing leaves the reward where it was."""
    result = tuner(tmp_path / "run").train(2, lr=1e-9)
    assert abs(result.after["reward"][0] - result.before["reward"][0]) < 1e-5


def test_the_same_run_twice_is_the_same_bit_for_bit(tmp_path):
    first, second = plain(), plain()
    tuner(tmp_path / "a", first).train(3, lr=1e-3)
    torch.rand(7)  # the state of the global generator must not matter
    random.random()
    tuner(tmp_path / "b", second).train(3, lr=1e-3)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    lora = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "a" / lora).read_bytes() == (tmp_path / "b" / lora).read_bytes()


@pytest.mark.slow  # two runs
def test_another_seed_is_another_run(tmp_path):
    tuner(tmp_path / "a", seed=0).train(2)
    tuner(tmp_path / "b", seed=1).train(2)
    first, second = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [record["reward"] for record in first] != [record["reward"] for record in second]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", ["drtune", "draft_lv"])
def test_micro_batches_change_memory_and_nothing_else(name, micro_batch, tmp_path):
    """Same noise, same plan, mean over the whole batch: equal to round-off, also when the last part is smaller."""
    whole, parts = plain(), plain()
    tuner(tmp_path / "a", whole, method=METHODS[name]).train(2, lr=1e-4)
    tuner(tmp_path / "b", parts, method=METHODS[name], micro_batch=micro_batch).train(2, lr=1e-4)
    for first, second in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert second["reward"] == pytest.approx(first["reward"], abs=1e-6)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
        assert second["trained"] == first["trained"]


@pytest.mark.slow  # two runs
def test_stochastic_schedulers_too(tmp_path):
    """Noise inside the chain comes from each sample's own generator: micro-batches leave it alone."""
    pipes = [plain(), plain()]
    for pipe, folder, micro in zip(pipes, "ab", (None, 1), strict=True):
        set_scheduler(pipe, "EulerAncestralDiscreteScheduler")
        tuner(tmp_path / folder, pipe, micro_batch=micro).train(1)
    first, second = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert second["reward"] == pytest.approx(first["reward"], abs=1e-6)


def test_what_a_step_logs(tmp_path):
    tuner(tmp_path / "run", method=methods.draft(K=2)).train(3, lr=5e-4, clip=1e-3)
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["loss"] == -record["reward"]
        assert record["clipped"] is True
        assert record["grad_norm"] > 1e-3  # before clipping
        assert record["trained"] == [2, 3]
        assert record["end"] is None
        assert record["steps_run"] == 4
        assert record["lr"] == 5e-4
        assert record["replay_error"] == 0
        assert 0 <= record["clamped"] < 1
        assert set(record["step_grad_norms"]) == {"2", "3"}
        # contributions of single steps and their sum obey the triangle inequality
        assert record["grad_norm"] <= sum(record["step_grad_norms"].values()) * 1.001
    assert [record["images"] for record in records] == [4, 8, 12]


def test_the_folder_of_a_run(tmp_path):
    folder = tmp_path / "run"
    pipe = plain()
    result = tuner(folder, pipe).train(2, lr=1e-3, eval_every=1)
    status = json.loads((folder / "run.json").read_text())
    assert (status["status"], status["steps"], status["lora_verified"]) == ("done", 2, True)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["final", "step-000000", "step-000001"]
    assert Image.open(folder / "samples" / "final" / "000.png").size == (16, 16)
    with Image.open(folder / "before_after.png") as grid:
        assert min(grid.size) > 100
    evals = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evals] == [0, 1, 2]
    assert evals[0]["scores"]["reward"] == list(result.before["reward"])
    assert "verified" in (folder / "train.log").read_text()
    assert not list(folder.rglob("*.tmp"))


def test_a_working_tuned_pipeline_is_left_behind(tmp_path):
    """`pipe(prompt)` works, gives the "after" pictures, and plain diffusers with the saved file gives them too."""
    pipe = plain()
    result = tuner(tmp_path / "run", pipe).train(2, lr=1e-2)
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)
    assert pipe.unet._compiled_call_impl is None
    again = plain()
    again.load_lora_weights(tmp_path / "run")
    seeds = [derive_seed(0, "eval", index) for index in range(3)]
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}
    for each in (pipe, again):
        images = evaluate.sample(each, PROMPTS[:3], seeds=seeds, call=call, batch=4)
        assert torch.equal(images, result.after_images)
    assert (result.after_images - result.before_images).abs().max() > 0.01


def test_train_may_be_called_again(tmp_path):
    each = tuner(tmp_path / "run")
    each.train(2)
    each.train(1)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2]


def test_the_time_budget_ends_the_run(tmp_path):
    result = tuner(tmp_path / "run").train(10_000, max_seconds=1.5)
    assert result.status == "out of time"
    assert 1 <= result.steps < 100
    assert result.seconds < 4


def test_a_refused_run_leaves_pipeline_and_disk_as_they_were(tmp_path):
    pipe = plain()
    with pytest.raises(ConfigError, match="K=9 does not fit"):
        tuner(tmp_path / "run", pipe, method=methods.drtune(K=9, m=2)).train(2)
    assert not getattr(pipe.unet, "peft_config", None)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    assert not (tmp_path / "run").exists()
    tuner(tmp_path / "run", pipe).train(1)  # and can be tuned after all


@pytest.mark.slow
def test_no_early_stop_is_asked_of_a_scheduler_that_has_none(tmp_path):
    pipe = plain()
    set_scheduler(pipe, "IPNDMScheduler")
    with pytest.raises(PreflightError, match="x0"):
        tuner(tmp_path / "a", pipe).train(1)
    tuner(tmp_path / "b", pipe, method=methods.draft(K=1)).train(1)


def test_safety_checker_is_set_aside_once_and_comes_back(tmp_path, capsys):
    class Checker(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError("the safety checker must not be asked")

    pipe = plain()
    checker = pipe.safety_checker = Checker()
    tuner(tmp_path / "run", pipe, show_progress=True).train(2)
    assert pipe.safety_checker is checker
    assert capsys.readouterr().out.count("safety_checker set aside") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "the pictures hold NaN"), (-1e4, "all pictures are black")],
)
def test_broken_pictures_stop_the_run(value, message, tmp_path):
    """As an fp16 VAE breaks them: NaN, or black. The weights are those of the last good update, saved."""
    pipe = plain()
    each = tuner(tmp_path / "run", pipe)
    each.train(1, lr=1e-3)
    good = weights(pipe)
    pipe.vae.decoder.conv_out.bias.data.fill_(value)
    with pytest.raises(TrainingStopped, match=message):
        each.train(5)
    assert all(torch.equal(value, weights(pipe)[name]) for name, value in good.items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_satisfied_hinge_moves_nothing_and_ends_the_run_after_ten_updates(tmp_path):
    pipe, seen = plain(), []

    def hinged(images, prompts):
        trained = images.requires_grad and each.step > 0
        if trained:
            seen.append(weights(pipe))
        return -(images.mean((1, 2, 3)) * 0 if trained and each.step != 3 else (2 - redness(images, prompts)).relu())

    each = tuner(tmp_path / "run", pipe, reward=hinged, method=methods.refl(m=1))
    with pytest.raises(TrainingStopped, match=r"step 13: the reward was flat .* hinge"):
        each.train(20, lr=1e-3, eval_every=50)
    norms = [record["grad_norm"] for record in metrics(tmp_path / "run")]
    assert [norm > 0 for norm in norms] == [step in (0, 3) for step in range(14)]
    assert all(torch.equal(value, seen[2][name]) for name, value in seen[0].items())  # momentum of update 0 waits
    assert any(not torch.equal(value, seen[3][name]) for name, value in seen[2].items())
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["status"], told["steps"], told["lora_verified"]) == ("stopped", 14, True)
    assert told["after"].keys() == told["before"].keys()


def test_a_lora_that_does_not_load_back_is_an_error_and_not_left_as_if_whole(tmp_path, monkeypatch):
    """A writer that loses the scale of alpha, as `save_lora_weights` without metadata does when it is not folded."""
    pipe = plain()
    folded = type(pipe).save_lora_weights

    def unfolded(save_directory, unet_lora_layers, **settings):
        layers = {key: value / 2 if "lora_B" in key else value for key, value in unet_lora_layers.items()}
        folded(save_directory, unet_lora_layers=layers, **settings)

    monkeypatch.setattr(pipe, "save_lora_weights", unfolded, raising=False)
    with pytest.raises(RewardTuneError, match="differs from the trained one after loading"):
        tuner(tmp_path / "run", pipe, alpha=8).train(1, lr=1e-3)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert (tmp_path / "run" / "pytorch_lora_weights.unverified").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_prompts_and_plans_come_from_seed_and_step(tmp_path):
    """What the log says a step trained is what the method draws for (seed, step), whatever ran before."""
    each = tuner(tmp_path / "run", seed=3)
    each.train(3)
    for record in metrics(tmp_path / "run"):
        plan = each.method(4, random.Random(f"plan 3 {record['step']}"))
        assert record["trained"] == list(plan.executed)
        assert record["end"] == plan.end


def test_the_grid(tmp_path):
    red = torch.zeros(5, 3, 16, 16)
    red[:, 0] = 1
    evaluate.save_grid({"before": 1 - red, "after": red}, ["a"] * 5, tmp_path / "grid.png", per_row=2)
    grid = torch.tensor(list(Image.open(tmp_path / "grid.png").convert("RGB").getdata()))
    pure = (grid == torch.tensor([255, 0, 0])).all(1).sum().item()
    cyan = (grid == torch.tensor([0, 255, 255])).all(1).sum().item()
    assert pure == cyan == 5 * 160 * 160  # every picture is whole, none covers another


def test_the_adapter_has_its_own_name(tmp_path):
    pipe = plain()
    tuner(tmp_path / "run", pipe).train(1)
    assert list(pipe.unet.peft_config) == [ADAPTER]


@pytest.mark.slow
def test_a_negative_prompt_given_once_serves_every_sample(tmp_path):
    tuner(tmp_path / "with", plain(), call={"negative_prompt": "blue stars"}).train(1, lr=1e-3)
    tuner(tmp_path / "without", plain()).train(1, lr=1e-3)
    assert metrics(tmp_path / "with")[0]["reward"] != metrics(tmp_path / "without")[0]["reward"]


@pytest.mark.slow
def test_a_reward_waits_on_the_cpu_while_the_denoiser_is_replayed(tmp_path, monkeypatch):
    """Spied: the reward is set aside after its gradient and before the sweep, and only when asked."""
    from rewardtune.engine import Tape
    from rewardtune.rewards import Reward

    seen = []

    class Redness(Reward):
        def native(self, images, prompts):
            seen.append("scored")
            return redness(images, prompts)

        def to(self, device):
            seen.append(f"to {device}")
            return self

    backward = Tape.backward
    monkeypatch.setattr(Tape, "backward", lambda tape, *a, **k: (seen.append("sweep"), backward(tape, *a, **k))[1])
    updates = {}
    for offload in (False, True):
        tuner(tmp_path / str(offload), reward=Redness(), offload=["reward"] if offload else []).train(1, lr=1e-3)
        last = len(seen) - 1 - seen[::-1].index("sweep")  # the preflight sweeps too
        updates[offload] = seen[last - 2 : last]
        seen.clear()
    assert updates[True] == ["scored", "to cpu"]
    assert updates[False] == ["to cpu", "scored"]


@pytest.mark.slow  # three runs
def test_random_numbers_of_a_reward_come_from_seed_and_step(tmp_path):
    """A reward may shift its images at random: the same run twice draws the same, another seed another."""
    drawn = {}

    def jittery(images, prompts):
        drawn[name].append(torch.rand(()).item())
        return redness(images, prompts)

    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        drawn[name] = []
        torch.manual_seed(len(drawn))  # whatever the caller's generator holds
        tuner(tmp_path / name, reward=jittery, seed=seed, micro_batch=2).train(2, lr=1e-3)
    shared = set(drawn["one"]) & set(drawn["again"])
    assert len(shared) >= 4  # two updates of two micro-batches; the checks and evaluations around them may draw others
    assert not shared & set(drawn["other"])


def test_full_fine_tuning_leaves_weights_that_can_be_sampled(tmp_path):
    from tiny_runs import save_tiny, write_run

    from rewardtune.cli import main

    model = save_tiny(tmp_path / "tiny")
    run = write_run(tmp_path, model, adapter={"kind": "full"}, optim={"steps": 2, "lr": 1e-2, "batch": 2})
    assert main(["train", str(run)]) == 0
    assert main(["sample", str(tmp_path / "out"), "-p", "red heart", "--output", str(tmp_path / "tuned")]) == 0
    (tmp_path / "out" / "denoiser").rename(tmp_path / "denoiser")
    save_tiny(tmp_path / "out" / "denoiser_of_base")
    (tmp_path / "out" / "denoiser_of_base" / "unet").rename(tmp_path / "out" / "denoiser")
    assert main(["sample", str(tmp_path / "out"), "-p", "red heart", "--output", str(tmp_path / "base")]) == 0
    tuned, base = (Image.open(tmp_path / name / "000.png").tobytes() for name in ("tuned", "base"))
    assert tuned != base


@pytest.mark.slow
def test_with_ema_the_pipeline_is_left_with_the_averages_that_were_saved(tmp_path):
    pipe = plain()
    tuner(tmp_path / "run", pipe).train(3, lr=1e-2, ema=0.5)
    saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    left = {name.replace(f".{ADAPTER}", ""): value for name, value in weights(pipe).items()}
    assert len(saved) == len(left)
    for name, value in saved.items():
        assert torch.equal(left[name.removeprefix("unet.")], value), name
    alone = plain()
    tuner(tmp_path / "alone", alone).train(3, lr=1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(weights(alone).values(), weights(pipe).values(), strict=True))


def test_rules_without_evaluations_are_refused(tmp_path):
    rules = {"rules": [{"metric": "reward", "falls_by": 0.5}]}
    with pytest.raises(ConfigError, match="eval_every"):
        tuner(tmp_path / "run", guards=rules).train(1)


def test_a_reward_function_may_be_called_reward(tmp_path):
    def reward(images, prompts):
        return redness(images, prompts)

    tuner(tmp_path / "run", reward=reward, checkpoints={"every": 1}).train(1)
    assert "reward" in json.loads((tmp_path / "run/eval.jsonl").read_text().splitlines()[0])["panel"]["values"]


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_says_that_it_was_interrupted(first, tmp_path, capsys):
    with _Signals(speaks=first) as signals:
        signals._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        signals.leave(tmp_path, whole=False)
    assert ("--resume latest" in capsys.readouterr().out) == first


@pytest.mark.slow  # eight seconds
def test_every_checkpoint_holds_a_lora_file_that_can_be_exported(tmp_path):
    from tiny_runs import save_tiny, write_run

    from rewardtune.cli import main

    run = write_run(
        tmp_path,
        save_tiny(tmp_path / "tiny"),
        optim={"steps": 3, "lr": 1e-2, "batch": 2, "ema": 0.5},
        checkpoints={"every": 1, "keep": 3},
    )
    assert main(["train", str(run)]) == 0
    files = {}
    for step in ("1", "latest", "best"):
        asked = ["--checkpoint", step, "--output", str(tmp_path / step)]
        assert main(["export", str(tmp_path / "out"), *asked]) == 0
        files[step] = load_file(tmp_path / step / "diffusers" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(files["latest"][name], value) for name, value in files["best"].items())  # the averages
    assert any(not torch.equal(files["1"][name], value) for name, value in files["best"].items())


def test_a_rule_that_only_warns_does_not_choose_the_weights(tmp_path):
    rules = {"rules": [{"metric": "base_pixels", "above": 1e-6, "then": "warn"}]}
    folder = tmp_path / "run"
    result = tuner(folder, guards=rules).train(4, lr=3e-3, eval_every=2)
    assert result.after["reward"][0] > result.before["reward"][0]
    assert "kept_step" not in json.loads((folder / "run.json").read_text())
    assert "a warning" in (folder / "train.log").read_text()


def test_a_rollback_without_a_best_checkpoint_is_refused(tmp_path):
    rules = {"rules": [{"metric": "base_pixels", "above": 1e-6, "then": "rollback"}]}
    with pytest.raises(ConfigError, match="rollback needs"):
        tuner(tmp_path / "run", guards=rules, checkpoints={"best": None})


def test_an_optimiser_that_cannot_be_leaves_no_folder(tmp_path):
    for key, value in {"optimizer": "adam", "schedule": "cosin", "ema": 2.0, "warmup": 5}.items():
        with pytest.raises(ConfigError, match=f"optim.{key}='?{value}"):
            tuner(tmp_path / "run").train(2, **{key: value})
        assert not (tmp_path / "run").exists()


def test_a_guard_that_stops_leaves_the_comparison_of_what_is_kept(tmp_path):
    rules = {"rules": [{"metric": "base_pixels", "above": 1e-6}]}
    folder = tmp_path / "run"
    each = tuner(folder, guards=rules)
    with pytest.raises(TrainingStopped, match="step 0, the untuned model"):
        each.train(4, lr=3e-3, eval_every=2)
    told = json.loads((folder / "run.json").read_text())
    assert (told["status"], told["kept_step"], told["lora_verified"]) == ("stopped", 0, True)
    assert told["after"] == told["before"]
    assert (folder / "before_after.png").is_file()
    assert each.train(1, lr=3e-3, eval_every=2).status == "done"  # the stop was that of the first call
