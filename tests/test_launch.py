"""What a run file says of the optimiser and of memory reaches them."""

import math

import pytest
from tiny_runs import metrics, save_tiny, status, write_run

from rewardtune import checkpoint, gradient, launch
from rewardtune.config import load_config

SHORT = {"sampling": {"steps": 2, "guidance": 3.0, "width": 16, "height": 16}, "eval": {"count": 1}}
SHORT |= {"method": {"name": "draft", "options": {"K": 2}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_the_optimiser_and_its_schedule(model, tmp_path):
    optim = {"steps": 3, "lr": 1e-3, "batch": 1, "schedule": "cosine", "warmup": 1, "betas": [0.8, 0.95]}
    optim |= {"weight_decay": 0.3, "clip": 0.7, "max_seconds": 600}
    launch.train(load_config(write_run(tmp_path, model, optim=optim, **SHORT)))
    folder = tmp_path / "out"
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * k / 2)) for k in range(2)]
    assert [record["lr"] for record in metrics(folder)] == pytest.approx([0, *cosine])
    (group,) = checkpoint.find(folder, "latest").state["optimizer"]["groups"]
    used = group["options"]
    assert (list(used["betas"]), used["weight_decay"]) == ([0.8, 0.95], 0.3)
    told = status(folder)["train"]
    assert (told["clip"], told["max_seconds"]) == (0.7, 600)


def test_memory(model, tmp_path, monkeypatch):
    """Kept graphs and recomputed blocks: both are asked for, and the gradient is the plain one's."""
    asked, rollout = [], gradient.rollout

    def watched(pipe, *args, **settings):
        asked.append((settings["recompute"], pipe.unet.is_gradient_checkpointing))
        return rollout(pipe, *args, **settings)

    monkeypatch.setattr(gradient, "rollout", watched)
    runs = {"plain": {}, "both": {"recompute": False, "gradient_checkpointing": True}}
    optim = {"steps": 1, "lr": 1e-3, "batch": 1}
    for name, memory in runs.items():
        output = str(tmp_path / name)
        run = write_run(tmp_path, model, memory=memory, optim=optim, **SHORT, output_dir=output)
        asked.clear()
        launch.train(load_config(run))
        assert asked == [(not memory, bool(memory))]
    plain, both = (metrics(tmp_path / name)[0] for name in runs)
    assert both["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
