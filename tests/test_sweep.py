"""The suggestion on curves with known answers; one small sweep from the command to the plot."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image
from tiny_runs import made_run, save_tiny

from rewardtune.cli import main
from rewardtune.compare import Contrast, Scored
from rewardtune.guards import Measure
from rewardtune.stats import Interval
from rewardtune.sweep import Point, Sweep, _ticks, draw, suggest


def point(weight, reward, worse=()):
    scored = Scored(
        label=f"a@{weight}",
        spec="",
        weight=weight,
        base_steps=None,
        aig=None,
        digest=None,
        sampling={},
        folder="",
        metrics={"reward": Interval(value=reward, low=reward - 1, high=reward + 1)},
        values={},
    )
    return Point(
        weight=weight, scored=scored, to_base=Contrast(prompts=1, difference={}, win_rate={}), worse=list(worse)
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 1), (0.5, 2), (1, 3), (1.25, 4)], 1.25),  # nothing holds it back
        ([(0, 1), (0.5, 2), (1, 3, ["clipscore"]), (1.25, 4)], 0.5),  # a later recovery does not count
        ([(0, 1), (0.5, 2), (1, 1.5), (1.25, 4, ["vendi"])], 0.5),  # beyond the best reward there is nothing to gain
        ([(0, 1), (0.5, 0.5), (1, 0.2)], 0),  # the base model is better
        ([(0, 1), (0.5, 2, ["clipscore"]), (1, 3)], 0),
        ([(-0.5, 9), (0, 1), (0.5, 2)], 0.5),  # the walk begins at 0
        ([(0, 1), (0.5, math.nan), (1, 3)], 1),
    ],
)
def test_the_rule(points, expected):
    suggested, words = suggest([point(*given) for given in points], ["clipscore", "vendi"], tolerance=0.05)
    assert suggested == expected
    assert f"suggested weight {expected:g}: the highest trained reward" in words
    assert "5 %" in words
    first = next((given for given in points if len(given) == 3), None)
    assert ("which none was" in words) == (first is None)
    if first:
        assert f"weight {first[0]:g}: {first[2][0]}" in words


def test_a_weight_without_a_number_is_left_out_of_the_picture(tmp_path):
    points = [point(0, 1), point(0.5, math.nan), point(1, 3)]
    points = [replace(p, to_base=Contrast(prompts=1, difference=p.scored.metrics, win_rate={})) for p in points]
    measures = {"reward": Measure(what="", better="more", role="trained")}
    found = Sweep(
        settings={"count": 1}, measures=measures, points=points, tolerance=0.05, guarded=[], suggested=1, reason=""
    )
    draw(found, tmp_path / "sweep.png")
    without = replace(found, points=[points[0], points[2]])
    draw(without, tmp_path / "without.png")
    assert (tmp_path / "sweep.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_nothing_guards_nothing_is_suggested():
    suggested, words = suggest([point(0, 1), point(1, 2)], [], tolerance=0.05)
    assert suggested is None
    assert "add --reward" in words


def test_parts_of_a_sum_are_shown():
    def names(*trained):
        measures = {name: Measure(what=name, better="more", role="trained") for name in ("reward", *trained)}
        measures["clipscore"] = Measure(what="clipscore", better="more", role="held_out")
        return Sweep(
            settings={}, measures=measures, points=[], tolerance=0.05, guarded=["clipscore"], suggested=None, reason=""
        ).names

    assert names("symmetry", "aesthetic") == ["reward", "symmetry", "aesthetic", "clipscore"]
    assert names("symmetry") == ["reward", "clipscore"]


def test_round_ticks():
    assert _ticks(0.0, 1.0) == pytest.approx([0, 0.5, 1.0])
    for low, high in [(-0.1, 1.35), (0.6123, 0.6177), (-3e5, 2e6)]:
        ticks = _ticks(low, high)
        assert 3 <= len(ticks) <= 6
        assert all(low <= tick <= high + 1e-9 * abs(high) for tick in ticks)


def test_a_sweep_of_a_run(tmp_path, capsys):
    model = save_tiny(tmp_path / "tiny")
    guards = {"rewards": ["symmetry"], "features": "playground"}
    folder = made_run(tmp_path / "out", model, eval={"count": 3}, guards=guards)
    assert main(["sweep", str(folder), "--weights", "1,0.5", "--tolerance", "0.5"]) == 0
    out = capsys.readouterr().out
    document = json.loads((folder / "sweep.json").read_text())
    assert [p["weight"] for p in document["points"]] == [0, 0.5, 1]
    assert document["guarded"] == ["symmetry", "vendi", "pairwise_distance"]
    assert document["reason"] in out
    zero, half, whole = document["points"]
    assert zero["to_base"]["difference"]["reward"]["value"] == 0
    near, far = (p["to_base"]["difference"]["base_pixels"]["value"] for p in (half, whole))
    assert 0 < near < far
    before, after = (p["scored"]["metrics"]["reward"]["value"] for p in (zero, whole))
    assert whole["to_base"]["difference"]["reward"]["value"] == pytest.approx(after - before)
    for p in document["points"]:
        own, base = (each["scored"]["metrics"] for each in (p, zero))
        changes = {name: own[name]["value"] / base[name]["value"] for name in document["guarded"]}
        worse = [n for n, c in changes.items() if (c > 1.5 if n == "symmetry" else c < 0.5)]
        assert p["worse"] == worse
        assert len(list((folder / p["scored"]["folder"]).glob("*.png"))) == 3
    with Image.open(folder / "sweep.png") as plot:
        assert plot.width > 1000
    for arguments, words in [
        (["--weights", "a"], "write numbers with commas"),
        (["--weights", "0"], "the only weight is 0"),
        (["--tolerance", "5"], "a share between 0 and 1"),
    ]:
        assert main(["sweep", str(folder), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "nowhere")]) == 2
