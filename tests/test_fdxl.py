"""The FDXL recipe (preset sdxl-fdxl) from check to plain diffusers, on a small SDXL; only sizes and places overridden.

The learning rate is raised where the LoRA must be seen: a few updates at 5e-6 change no 8-bit pixel.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import metrics
from tiny_xl import SIDE, overrides, save_tiny_hps, save_tiny_xl

from rewardtune import evaluate, launch
from rewardtune.candidates import candidates, load_base, opened
from rewardtune.cli import main
from rewardtune.config import load_config
from rewardtune.engine import count_steps, quiet
from rewardtune.export import open_run
from rewardtune.rewards import preprocess
from rewardtune.runfolder import LORA_FILE

PROMPTS = ["red heart", "blue star"]
VISIBLE = "optim.lr=1e-2"
LAST = 25 - 10  # the first index at which the chain may end: t_min = T - i <= m


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fdxl")
    return save_tiny_xl(folder / "xl"), save_tiny_hps(folder / "hps")


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    """Two updates of 4 pictures, with the random shifts that they drew: (folder, [(down, right, pictures), ...])."""
    folder, drawn, shift = tmp_path_factory.mktemp("run") / "fdxl", [], preprocess.shift

    def noted(images, *, down, right):
        drawn.append((down, right, len(images)))
        return shift(images, down=down, right=right)

    preprocess.shift = noted
    try:
        more = ("optim.batch=4", "optim.steps=2", "eval.every=2", "checkpoints.every=1", VISIBLE)
        assert main(["train", "sdxl-fdxl", *overrides(*places, folder, *more)]) == 0
    finally:
        preprocess.shift = shift
    return folder, drawn


def pictures(pipe, call):
    return evaluate.sample(pipe, PROMPTS, seeds=[1, 2], call=call)


def plain(places, folder: Path | None = None):
    """StableDiffusionXLPipeline and DPM++ by diffusers alone, with the LoRA file of `folder`."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(places[0])
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if folder is not None:
        pipe.load_lora_weights(str(folder), adapter_name="fdxl")
    return pipe


# -- the sampler ------------------------------------------------------------------------------------------------------


def test_the_sampler_is_dpm_plus_plus_2m(places):
    """Algorithm 2 of Lu et al. (DPM-Solver++) by hand, over the whole chain of 25 steps."""
    config = load_config("sdxl-fdxl", overrides(*places, Path("unused")))
    pipe = launch.load_pipeline(config.model, scheduler=config.sampling.scheduler)
    scheduler = pipe.scheduler
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler"
    options = {name: scheduler.config[name] for name in ("algorithm_type", "solver_order", "solver_type")}
    assert options == {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    assert (scheduler.config.timestep_spacing, scheduler.config.steps_offset) == ("leading", 1)  # SDXL's own
    scheduler.set_timesteps(25)
    assert len(scheduler.timesteps) == 25
    sigmas = scheduler.sigmas.double()
    alphas = 1 / (sigmas**2 + 1).sqrt()
    generator = torch.Generator().manual_seed(0)
    x = mine = torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64)
    before = None
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        clean = (mine - alphas[i] * sigmas[i] * noise) / alphas[i]
        x = scheduler.step(noise, t, x).prev_sample
        if i == 24:  # the last step goes to sigma 0: the prediction itself
            mine = clean
            break
        h = sigmas[i].log() - sigmas[i + 1].log()
        d = clean
        if i > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            d = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before
        ratio = alphas[i + 1] * sigmas[i + 1] / (alphas[i] * sigmas[i])
        mine, before = ratio * mine - alphas[i + 1] * torch.expm1(-h) * d, clean
        torch.testing.assert_close(x, mine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, mine, rtol=1e-4, atol=1e-4)


def test_25_steps_and_plans_of_K_3_m_10(places):
    config = load_config("sdxl-fdxl", overrides(*places, Path("unused")))
    pipe = launch.load_pipeline(config.model, scheduler=config.sampling.scheduler)
    call = {"num_inference_steps": config.sampling.steps, "guidance_scale": config.sampling.guidance}
    with quiet(pipe):
        T = count_steps(pipe, prompt=PROMPTS[:1], height=SIDE, width=SIDE, **call)
    assert T == 25
    plans = [launch.make_method(config.method)(T, random.Random(draw)) for draw in range(400)]
    assert {plan.end for plan in plans} == set(range(LAST, 25))
    for plan in plans:
        first, gap = min(plan.train), 25 // 3
        assert sorted(plan.train) == [i for i in (first, first + gap, first + 2 * gap) if i <= plan.end]
    assert {min(plan.train) for plan in plans} == set(range(9))  # s ~ U{1 .. T - 2 * 8}
    # The third step is at 16 .. 24 and the end at 15 .. 24, both uniform: it runs in half of the draws.
    assert sum(len(plan.train) for plan in plans) / len(plans) == pytest.approx(2.5, abs=0.1)


def test_the_shift_at_the_papers_sizes():
    """1024 to 224 pixels: 0 .. ceil(4.57) = 5, each drawn."""
    read = preprocess.Preprocess(size=224, mean=(0, 0, 0), std=(1, 1, 1), fit="letterbox", random_shift=True)
    ramp = (torch.arange(1024.0) / 1024).expand(64, 3, 64, 1024)  # low: the width alone decides
    torch.manual_seed(0)
    seen = read(ramp.clone().requires_grad_()).detach()
    still = read(ramp[:1])
    moved = ((still - seen)[:, 0, 112, 112] * 1024).round().int()
    assert set(moved.tolist()) == set(range(6)) == set(range(math.ceil(1024 / 224) + 1))


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the fixture trains, with 25 steps a chain
def test_an_update_is_what_the_recipe_says(run):
    folder, drawn = run
    lines = metrics(folder)
    assert [line["images"] for line in lines] == [4, 8]
    for line in lines:
        assert LAST <= line["end"] < 25
        assert 1 <= len(line["trained"]) <= 3
        assert line["steps_run"] == line["end"] + 1
        assert line["grad_norm"] > 0
    # every trained picture is shifted, with bounds of the actual sizes; those of evaluations are not
    assert {(down, right) for down, right, _ in drawn} == {(math.ceil(SIDE / 32),) * 2} == {(2, 2)}
    assert {count for *_, count in drawn} == {2}  # micro_batch
    config = load_config(folder / "config.yaml")
    assert (config.optim.clip, config.optim.micro_batch, config.adapter.rank) == (0.1, 2, 128)
    weights = load_file(folder / LORA_FILE)
    assert {len(value) for key, value in weights.items() if ".lora_A." in key} == {128}
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_the_run_is_used_at_0_7_everywhere(run, places, tmp_path, capsys):
    """sample, the three exports and plain diffusers agree with lora_B times 0.7, not with the LoRA as trained."""
    folder, _ = run
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    state = load_file(folder / LORA_FILE)
    save_file({k: v * 0.7 if ".lora_B." in k else v for k, v in state.items()}, scaled / LORA_FILE)
    call = open_run(folder).call
    expected = pictures(plain(places, scaled), call)

    (own,) = candidates([str(folder)])
    assert (own.weight, own.label) == (0.7, "fdxl@0.7")
    with opened(load_base([own]), own) as pipe:
        torch.testing.assert_close(pictures(pipe, own.settings.call), expected, rtol=0, atol=1e-4)

    at_weight = plain(places, folder)
    full = pictures(at_weight, call)
    at_weight.set_adapters(["fdxl"], [0.7])
    torch.testing.assert_close(pictures(at_weight, call), expected, rtol=0, atol=1e-4)
    base = pictures(plain(places), call)
    effect = (expected - base).abs().max()
    assert (full - expected).abs().max() > 1e-2 < effect

    capsys.readouterr()
    assert main(["export", str(folder), "--format", "diffusers,kohya,merged"]) == 0
    said = capsys.readouterr().out
    assert said.count("verified: max difference") == 3
    assert "multiplied by 0.7, the run's adapter.inference_weight; --weight 1: as trained" in said
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    for form in ("diffusers", "kohya"):
        pipe = plain(places, folder / "export" / form)
        torch.testing.assert_close(pictures(pipe, call), expected, rtol=0, atol=1e-3)
    merged = StableDiffusionXLPipeline.from_pretrained(folder / "export" / "merged")
    assert isinstance(merged.scheduler, DPMSolverMultistepScheduler)
    torch.testing.assert_close(pictures(merged, call), expected, rtol=0, atol=1e-3)
    (exported,) = candidates([str(folder / "export" / "diffusers")])
    assert exported.weight == 1  # the file holds the 0.7 already


@pytest.mark.slow
def test_the_card_and_the_header_say_it(run, tmp_path):
    from safetensors import safe_open

    folder, _ = run
    assert main(["push", str(folder), "--repo", "someone/fdxl", "--dry-run"]) == 0
    card = (folder / "export" / "hub" / "README.md").read_text()
    assert "this file is multiplied by 0.7. Load it with weight 1: it is the lower weight already." in card
    assert "inference_weight: 0.7" in card
    with safe_open(folder / "export" / "hub" / LORA_FILE, framework="pt") as file:
        assert "weight 1, the file holds 0.7 of the LoRA as trained" in file.metadata()["modelspec.usage_hint"]


@pytest.mark.slow
def test_a_named_weight_wins(run):
    folder, _ = run
    one, half, mixed, checkpoint = candidates(
        [f"{folder}@1", f"{folder}@0.5", f"{folder}:aig=1", f"{folder}/checkpoint-1"]
    )
    assert [c.weight for c in (one, half, mixed, checkpoint)] == [1, 0.5, 0.7, 0.7]
    assert [c.label for c in (one, mixed)] == ["fdxl@1", "fdxl@0.7:aig=1"]


@pytest.mark.slow  # an update more than the quick run, twice
def test_a_resumed_run_is_the_whole_run(run, places, tmp_path):
    more = ("optim.batch=4", "eval.every=2", "checkpoints.every=1", VISIBLE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "sdxl-fdxl", *overrides(*places, whole, "optim.steps=3", *more)]) == 0
    assert main(["train", "sdxl-fdxl", *overrides(*places, parts, "optim.steps=2", *more)]) == 0
    again = overrides(*places, parts, "optim.steps=3", *more, "adapter.inference_weight=0.6")  # may change
    assert main(["train", "sdxl-fdxl", *again, "--resume", "latest"]) == 0
    for key, value in load_file(whole / "checkpoint-3" / LORA_FILE).items():
        assert torch.equal(value, load_file(parts / "checkpoint-3" / LORA_FILE)[key]), key
    assert load_config(parts / "config.yaml").adapter.inference_weight == 0.6


@pytest.mark.slow  # half precision takes a CPU minutes
def test_half_precision_at_the_papers_rate(places, tmp_path):
    """fp16 frozen weights of the variant fp16, fp32 LoRA, the float32 VAE, lr 5e-6; 2 pictures of the recipe's 64."""
    assert load_config("sdxl-fdxl").optim.batch == 8 * 2 * 4
    model = save_tiny_xl(tmp_path / "fp16", variant="fp16")
    more = ["optim.batch=2", "optim.steps=1", "model.dtype=float16", "model.variant=fp16"]
    more += ["guards.rules=[]", "checkpoints.best=null"]  # the last weights, whatever they are worth
    assert main(["train", "sdxl-fdxl", *overrides(model, places[1], tmp_path / "out", *more)]) == 0
    (line,) = metrics(tmp_path / "out")
    assert (line["images"], line["lr"]) == (2, 5e-6)
    state = load_file(tmp_path / "out" / LORA_FILE)
    moved = max(float(value.abs().max()) for key, value in state.items() if ".lora_B." in key)
    assert moved == pytest.approx(5e-6, rel=0.05)  # Adam's first step is the rate itself


@pytest.mark.slow
def test_check_makes_a_dry_run(places, tmp_path, capsys):
    assert main(["check", "sdxl-fdxl", *overrides(*places, tmp_path / "out", "optim.batch=4"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "steps: T = 25 calls of scheduler.step in 25 inference steps" in said
    assert "all checks passed" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow  # starts two processes
def test_two_processes_with_half_the_accumulation_equal_one(places, tmp_path):
    """2 processes x 2 pictures x 1 accumulated against 1 x 2 x 2, by the command's own -n."""
    more = ("optim.batch=4", "optim.steps=2", "eval.every=2", "model.device=cpu", VISIBLE)
    weights = []
    for count in (1, 2):
        words = ["train", "sdxl-fdxl", *overrides(*places, tmp_path / str(count), *more), "-n", str(count)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-m", "rewardtune", *words], env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_file(tmp_path / str(count) / LORA_FILE))
    one, two = (metrics(tmp_path / str(count)) for count in (1, 2))
    assert [line["images"] for line in one] == [line["images"] for line in two] == [4, 8]
    assert [line["trained"] for line in one] == [line["trained"] for line in two]
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0.05 * float(value.abs().max()))
