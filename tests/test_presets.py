"""The shipped run files: each loads, says where it comes from, and carries the settings of the paper that it names."""

import random
import re

import pytest
import torch
from torch.optim import AdamW

from rewardtune.cli import main
from rewardtune.config import dump_config, load_config, presets
from rewardtune.launch import make_method
from rewardtune.prompts import builtin_lists

TABLE_1 = {  # the method of each row, as its text says
    "sd15-refl-10": "refl(m=10)",
    "sd15-refl-20": "refl(m=20)",
    "sd15-draft-lv": "draft_lv(n=2)",
    "sd15-draft-10": "draft(K=10, m=None, input_gradient=1.0)",
    "sd15-alignprop": "alignprop(law=per_chain, m=None, input_gradient=1.0)",
    "sd15-drtune": "drtune(K=5, spacing=chain, m=20, input_gradient=0.0)",
}
OTHERS = {"sdxl-fdxl", "sdxl-24gb", "sd3", "flux", "flux-24gb", "playground", "playground-quick"}


def test_the_list_is_whole():
    assert set(presets()) == set(TABLE_1) | OTHERS


@pytest.mark.parametrize("name", presets())
def test_a_preset_loads_and_says_where_it_comes_from(name, tmp_path):
    config = load_config(name)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.output_dir == f"runs/{name}"
    text = presets()[name].read_text(encoding="utf-8")
    heading = " ".join(line.lstrip("# ") for line in text.partition("\nmodel:")[0].splitlines())
    assert re.search(r"paper \(?.*section 4|section 4\.\d", heading)
    assert "Differs:" in heading or "Not in the paper" in heading or "As the preset" in heading or "demo's" in heading
    assert max(map(len, text.splitlines())) <= 120
    steps = config.sampling.steps
    make_method(config.method)(steps, random.Random(0))  # K and m fit into the steps
    assert config.optim.batch % (config.optim.micro_batch or 1) == 0


def test_the_playground_presets_need_nothing_that_is_not_wired():
    for name in ("playground", "playground-quick"):
        assert load_config(name).model.id == "playground"


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name):
    """Section 4.1: what every method shares."""
    config = load_config(name)
    assert str(make_method(config.method)) == TABLE_1[name]
    sampling, optim = config.sampling, config.optim
    assert (sampling.scheduler, sampling.steps, sampling.guidance) == ("DDPMScheduler", 50, 7.5)
    assert (sampling.width, sampling.height) == (512, 512)
    assert (optim.optimizer, optim.betas, optim.schedule, optim.warmup) == ("adamw", (0.9, 0.999), "constant", 0)
    assert (optim.lr, optim.batch, optim.clip, optim.max_seconds) == (2e-5, 32, 0.1, 7200)
    assert (optim.weight_decay, optim.ema) == (AdamW([torch.zeros(1)]).defaults["weight_decay"], None)
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 128, None)
    assert (config.model.dtype, config.memory.gradient_checkpointing) == ("float16", True)
    assert (config.eval.count, config.eval.prompts.source.count("[:100]")) == (400, 4)
    assert (config.regularize.kl, config.regularize.denoise.weight) == (0, 0)


def test_fdxl():
    """Section 4.3."""
    config = load_config("sdxl-fdxl")
    assert config.model.id == "stabilityai/stable-diffusion-xl-base-1.0"
    assert str(make_method(config.method)) == "drtune(K=3, spacing=chain, m=10, input_gradient=0.0)"
    sampling, optim = config.sampling, config.optim
    assert (sampling.scheduler, sampling.steps, sampling.guidance) == ("DPMSolverMultistepScheduler", 25, 5.0)
    assert (sampling.width, sampling.height) == (1024, 1024)
    assert (optim.lr, optim.steps, optim.batch, optim.micro_batch) == (5e-6, 1900, 8 * 2 * 4, 2)
    assert [(part.name, part.weight) for part in config.reward] == [("hpsv2", 1.0)]
    assert config.reward[0].options == {"version": "2.1", "random_shift": True}
    assert config.adapter.inference_weight == load_config("sdxl-24gb").adapter.inference_weight == 0.7
    # "All other settings remain consistent with those outlined in Sec. 4.1."
    table_1 = load_config("sd15-drtune")
    for key in ("optimizer", "betas", "weight_decay", "clip", "schedule", "warmup", "ema"):
        assert getattr(optim, key) == getattr(table_1.optim, key), key
    for key in ("kind", "rank", "alpha", "targets"):
        assert getattr(config.adapter, key) == getattr(table_1.adapter, key), key
    assert (config.model.dtype, config.memory.gradient_checkpointing) == ("float16", True)
    assert config.prompts == table_1.prompts


def test_init_lists_writes_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in presets())
    assert main(["init", "playground-quick"]) == 0
    assert "playground-quick.yaml written" in capsys.readouterr().out
    assert (tmp_path / "playground-quick.yaml").read_bytes() == presets()["playground-quick"].read_bytes()
    assert load_config("playground-quick.yaml") == load_config("playground-quick")
    (tmp_path / "mine.yaml").write_text("mine")
    assert main(["init", "playground", "--output", "mine.yaml"]) == 2
    assert "mine.yaml exists; choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert main(["init", "playgruond"]) == 2
    assert "unknown preset 'playgruond' (did you mean 'playground'?)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "playground-quick.yaml"]


def test_the_lists_that_presets_and_docs_name_exist():
    assert set(builtin_lists()) == {"simple_animals", "concepts_with_books"}
