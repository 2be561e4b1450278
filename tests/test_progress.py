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
