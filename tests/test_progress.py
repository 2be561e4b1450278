"""What a run shows on the screen."""

import math

import pytest

from rewardtune.progress import Progress, digits, with_interval
from rewardtune.watch import line


@pytest.mark.parametrize(
    ("reward", "parts", "shown"),
    [
        (0.25, {"symmetry": 0.25}, "reward 0.25 | grad"),  # the reward itself, once
        (-2.134e-4, {"compressibility": 2.134e-4}, "reward -0.0002134, compressibility 0.0002134 | grad"),
        (-3.0, {"objectness": 0.9502}, "reward -3, objectness 0.9502 | grad"),
        (0.0025, {"clipscore": 0.25}, "reward 0.0025, clipscore 0.25 | grad"),  # by reward_weight
        (0.2, {"clipscore": 0.25, "symmetry": 0.25}, "reward 0.2, clipscore 0.25, symmetry 0.25 | grad"),
        (-1.0, {"jpeg_bytes": 12345.6}, "reward -1, jpeg_bytes 12346 | grad"),
    ],
)
def test_a_line_shows_the_reward_and_the_native_values_that_differ(reward, parts, shown, capsys):
    Progress(10).update({"seconds": 1.0, "reward": reward, "parts": parts, "grad_norm": 0.5})
    assert f"| {shown} 0.5" in capsys.readouterr().out


def test_small_numbers_keep_their_digits_and_one_value_has_no_interval():
    assert line({"compressibility": (2.1e-4, 1.3e-5)}) == "compressibility 0.00021 ± 1.3e-05"
    assert line({"reward": (0.3, math.nan), "symmetry": (0.25, 0.01)}) == "reward 0.3, symmetry 0.25 ± 0.01"
    assert with_interval(20000.4, 312.7) == "20000 ± 312.7"
    assert digits(1 / 3) == "0.3333"


RECORD = {"seconds": 2.0, "reward": 1.0, "parts": {}, "grad_norm": 0.5}


def test_a_resumed_run_counts_on(capsys):
    progress = Progress(6, done=3)
    progress.update(RECORD)
    line = capsys.readouterr().out
    assert line.startswith("step 4/6, 0:04 left, 2.00 s/step | ")
    progress.update(RECORD | {"seconds": 1.0})
    assert progress.smooth == pytest.approx(0.9 * 2 + 0.1 * 1)


def test_the_log_gets_a_line_an_interval_and_the_last_update(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = []
    with Progress(100, every=10, enabled=False, log=lines.append) as progress:
        for _ in range(25):
            progress.update(RECORD)
            now += 1
    assert [line.split(",")[0] for line in lines] == ["step 1/100", "step 11/100", "step 21/100", "step 25/100"]
    assert capsys.readouterr().out == ""


def test_the_last_update_of_all_is_said_once(capsys):
    lines = []
    with Progress(3, every=1e9, log=lines.append) as progress:
        for _ in range(3):
            progress.update(RECORD)
    assert [line.split(",")[0] for line in lines] == ["step 1/3", "step 3/3"]
    assert capsys.readouterr().out.splitlines() == lines
