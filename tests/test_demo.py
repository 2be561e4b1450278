"""The demo end to end on the playground's own weights, small; at full length in the slow test."""

import json
import random

import pytest
import torch
from PIL import Image

from rewardtune import demo, playground
from rewardtune.cli import main
from rewardtune.config import load_config

SMALL = ["eval.count=4", "optim.batch=2"]


def test_a_small_demo_runs_and_says_where_things_are(tmp_path, capsys):
    before, after = demo.run(steps=2, output=tmp_path / "demo", overrides=SMALL)
    out = capsys.readouterr().out
    for line in ("symmetry (lower is better)", "CLIPScore", "right number of objects", "try next: rewardtune sample"):
        assert line in out
    assert f"pictures: {tmp_path / 'demo' / 'before_after.png'}" in out
    assert Image.open(tmp_path / "demo" / "before_after.png").size[0] > 500
    assert json.loads((tmp_path / "demo" / "run.json").read_text())["status"] == "done"
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "hpsv2 (held out)" in report
    assert 0 < before.symmetry < 1
    assert before != after
    # the folder is a run like any other: its LoRA can be sampled by name
    assert main(["sample", str(tmp_path / "demo"), "-p", "a red heart, night background", "--steps", "2",
                 "--output", str(tmp_path / "pictures")]) == 0  # fmt: skip
    assert Image.open(tmp_path / "pictures" / "000.png").size == (64, 64)


def test_the_demo_command_refuses_what_is_wrong(tmp_path, capsys):
    assert main(["demo", "--seconds", "0", "--output", str(tmp_path / "demo")]) == 2
    assert main(["demo", "--steps", "0", "--output", str(tmp_path / "demo")]) == 2
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    assert main(["demo", "--output", str(tmp_path / "used")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_count_of_objects_is_read_from_the_pictures():
    """Scenes drawn from their own captions count right; an empty picture counts wrong."""
    prompts = playground.prompts(12, split="eval", layout="free")
    asked = [len(playground.parse(prompt).mentions) for prompt in prompts]
    assert set(asked) == {1, 2}
    drawn = playground.draw_scenes(40, random.Random(3))
    grey = torch.full((40, 3, 64, 64), 0.5)
    scores = {"symmetry": (0.5, 0.0), "clipscore": (0.9, 0.0)}
    captions = [scene.caption for scene in drawn]
    assert demo.figures(scores, playground.render(drawn), captions).counted == 1
    assert demo.figures(scores, grey, captions).counted == 0


def test_held_out_means_held_out():
    config = load_config("playground")
    assert config.eval.prompts.source == "playground:eval:free"
    assert config.eval.count == 64
    train = set(playground.prompts(2000, split="train", layout="free"))
    assert not train & set(playground.prompts(64, split="eval", layout="free"))


@pytest.mark.slow  # the demo at full length: minutes of tuning a seed
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_the_demo_reaches(seed, tmp_path):
    """docs/results/demo.md, seeds 0-2: symmetry 79 to 81 % of the base, CLIPScore 98 to 100 %, the count not lower."""
    before, after = demo.run(seed=seed, output=tmp_path / "demo", seconds=1200)
    assert after.symmetry < 0.85 * before.symmetry
    assert after.clipscore > 0.96 * before.clipscore
    assert after.counted > before.counted - 0.05
    if not after.symmetry < 0.5 * before.symmetry:
        pytest.xfail("the goal, symmetry halved at 95 % of the CLIPScore, is not reached: docs/log.md")
