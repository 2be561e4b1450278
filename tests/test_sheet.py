"""The blind A/B sheet and its tally: nothing on the page tells, votes are checked, the statistics are known ones."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
from fake_run import PROMPTS, fake_run
from PIL import Image, PngImagePlugin

from rewardtune.cli import main
from rewardtune.errors import ConfigError
from rewardtune.report.sheet import make_sheet
from rewardtune.report.tally import _left, agree, tally
from rewardtune.stats import wilson


def folders(path: Path, count: int = 6) -> tuple[Path, Path]:
    for number, side in enumerate(("secret_a", "secret_b")):
        (path / side).mkdir(parents=True)
        for index in range(count):
            told = PngImagePlugin.PngInfo()
            told.add_text("Comment", f"tuned-{number}")
            picture = Image.new("RGB", (16, 16), (200 * number, 20 * index, 9))
            picture.save(path / side / f"{index:03d}.png", pnginfo=told)
    return path / "secret_a", path / "secret_b"


def prompts(path: Path, count: int = 6) -> Path:
    rows = ["file,prompt,category"] + [
        f"{i:03d}.png,prompt {i // 2},{'animals' if i < 4 else 'people'}" for i in range(count)
    ]
    path.write_text("\n".join(rows))
    return path


def vote(path: Path, key: dict[str, Any], choose: Any, rater: str = "Ada", **changes: Any) -> Path:
    """choose: row of the key -> A, B or tie."""
    other = {"A": "B", "B": "A"}
    sides = {row["pair"]: {row["left"]: "left", other[row["left"]]: "right", "tie": "tie"} for row in key["pairs"]}
    votes = [{"pair": row["pair"], "choice": sides[row["pair"]][choose(row)]} for row in key["pairs"]]
    facts = {"kind": "sheet-votes", "sheet": key["sheet"], "rater": rater, "votes": votes} | changes
    path.write_text(json.dumps(facts))
    return path


@pytest.fixture
def made(tmp_path: Path):
    a, b = folders(tmp_path)
    found = make_sheet(a, b, output=tmp_path / "sheet.html", prompts=prompts(tmp_path / "p.csv"), seed=3)
    return found, json.loads(found.key.read_text())


def test_nothing_on_the_page_tells(made):
    sheet, key = made
    html = sheet.page.read_text()
    assert sheet.pairs == 6
    assert {row["left"] for row in key["pairs"]} == {"A", "B"}
    assert [row["file"] for row in key["pairs"]] != sorted(row["file"] for row in key["pairs"])
    for word in ("secret", "tuned-", "Comment", "animals", ".png"):
        assert word not in html
    assert 'content="default-src &#39;none&#39;' in html


def test_sides_and_order_are_random_and_repeat(tmp_path):
    a, b = folders(tmp_path, 40)
    keys = [
        json.loads(make_sheet(a, b, output=tmp_path / f"{name}.html", seed=seed).key.read_text())
        for name, seed in (("one", 1), ("again", 1), ("two", 2), ("three", None), ("four", None))
    ]
    assert keys[0]["pairs"] == keys[1]["pairs"]
    assert keys[0]["sheet"] == keys[1]["sheet"]
    assert len({json.dumps(key["pairs"]) for key in keys}) == 4
    for key in keys:
        assert 8 < sum(row["left"] == "A" for row in key["pairs"]) < 32


def test_a_count_draws_pairs(tmp_path):
    a, b = folders(tmp_path)
    key = json.loads(make_sheet(a, b, output=tmp_path / "s.html", count=3, seed=0).key.read_text())
    assert len(key["pairs"]) == 3
    with pytest.raises(ConfigError, match="there are 6 pairs"):
        make_sheet(a, b, output=tmp_path / "t.html", count=7)


def test_runs_bring_their_prompts(tmp_path):
    one, two = fake_run(tmp_path / "one"), fake_run(tmp_path / "two", draw=1)
    key = json.loads(make_sheet(one, two, output=tmp_path / "s.html").key.read_text())
    assert sorted(row["prompt"] for row in key["pairs"]) == sorted(PROMPTS)


def test_pairs_are_of_one_prompt_and_seed(tmp_path):
    one = fake_run(tmp_path / "one")
    other = fake_run(tmp_path / "other", prompts=[*PROMPTS[:-1], "a dog"])
    with pytest.raises(ConfigError, match=r"005 of .* have different prompts: 'green star' and 'a dog'; a pair is"):
        make_sheet(one, other, output=tmp_path / "s.html")
    with pytest.raises(ConfigError, match=r"000 of .* have different seeds"):
        make_sheet(one, fake_run(tmp_path / "seed", seed=5), output=tmp_path / "s.html")
    assert not (tmp_path / "s.html").exists()


def test_evaluations_bring_prompts_and_categories(tmp_path):
    a, b = folders(tmp_path / "eval" / "a-vs-b.1")
    rows = [
        {"prompt": f"prompt {i // 2}", "category": "ab"[i % 2], "seed": i, "file": f"{i:03d}.png"} for i in range(6)
    ]
    (tmp_path / "eval" / "a-vs-b.1.json").write_text(json.dumps({"pictures": rows}))
    key = json.loads(make_sheet(a, b, output=tmp_path / "s.html").key.read_text())
    found = {row["file"]: (row["prompt"], row["category"]) for row in key["pairs"]}
    assert found == {f"{i:03d}": (f"prompt {i // 2}", "ab"[i % 2]) for i in range(6)}


def test_folders_that_do_not_match(tmp_path):
    a, b = folders(tmp_path)
    with pytest.raises(ConfigError, match="given twice"):
        make_sheet(a, a, output=tmp_path / "s.html")
    Image.new("RGB", (20, 16)).save(b / "000.png")
    with pytest.raises(ConfigError, match="sizes would tell"):
        make_sheet(a, b, output=tmp_path / "s.html")
    (b / "000.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 6 pictures in .*secret_a have no partner .*the first: 000"):
        make_sheet(a, b, output=tmp_path / "s.html")
    assert not (tmp_path / "s.html").exists()


def test_a_sheet_is_not_overwritten(made, tmp_path):
    with pytest.raises(ConfigError, match="votes may belong to it"):
        make_sheet(tmp_path / "secret_a", tmp_path / "secret_b", output=tmp_path / "sheet.html")
    with pytest.raises(ConfigError, match="is both the page and its key"):
        make_sheet(tmp_path / "secret_a", tmp_path / "secret_b", output=tmp_path / "s.html", key=tmp_path / "s.html")
    assert not (tmp_path / "s.html").exists()


def test_a_tally_replaces_a_tally_and_no_other_file(made, tmp_path, capsys):
    sheet, key = made
    ada = vote(tmp_path / "ada.json", key, lambda row: "B")
    for path in (sheet.key, ada):
        kept = path.read_text()
        assert main(["tally", str(sheet.key), str(ada), "--json", str(path)]) == 2
        assert f"{path} exists and is no tally of rewardtune; give another name" in capsys.readouterr().err
        assert path.read_text() == kept
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "exists and is no tally"),
        ("y" * 300, "Choose a shorter name"),
    ):  # a pipe, /dev/stdout
        assert main(["tally", str(sheet.key), str(ada), "--json", str(tmp_path / name)]) != 0
        assert words in capsys.readouterr().err
    for _ in range(2):
        assert main(["tally", str(sheet.key), str(ada), "--json", str(tmp_path / "t.json")]) == 0


@pytest.mark.parametrize(
    "change", [{"pairs": None}, {"pairs": [{"pair": "p0000"}]}, {"sheet": None}, {"side": "C"}, {"twice": 1}]
)
def test_a_damaged_key_is_named(made, tmp_path, change):
    sheet, key = made
    ada = vote(tmp_path / "ada.json", key, lambda row: "B")
    if "side" in change:
        key["pairs"][0]["left"] = change["side"]
    if "twice" in change:
        key["pairs"].append(key["pairs"][0])
    damaged = {name: value for name, value in (key | change).items() if value is not None}
    sheet.key.write_text(json.dumps(damaged))
    with pytest.raises(ConfigError, match=r"is damaged .*restore it as `rewardtune sheet` wrote it"):
        tally(sheet.key, [ada])


def test_the_tally(made, tmp_path, capsys):
    """Ada always wants B; Bob wants A for people; prompts are averaged first."""
    sheet, key = made
    ada = vote(tmp_path / "ada.json", key, lambda row: "B")
    bob = vote(tmp_path / "bob.json", key, lambda row: "A" if row["category"] == "people" else "B", "Bob")
    found = tally(sheet.key, [ada, bob])
    assert (found.all.prompts, found.all.votes, found.all.a, found.all.b) == (3, 12, 2, 10)
    assert found.all.rate.value == pytest.approx((1 + 1 + 0.5) / 3)
    assert found.categories["animals"].rate.value == 1.0
    assert found.categories["people"].rate.value == 0.5
    assert found.raters["Ada"].rate.value == 1.0
    assert found.raters["Bob"].rate.value == pytest.approx(2 / 3)
    assert found.agreement == pytest.approx(4 / 6)
    assert main(["tally", str(sheet.key), str(ada), str(bob), "--json", str(tmp_path / "t.json")]) == 0
    text = capsys.readouterr().out
    assert "category animals" in text
    assert "rater Bob" in text
    assert "few prompts (below 12), so the intervals are rough: all, category animals, category people, rater" in text
    assert json.loads((tmp_path / "t.json").read_text())["all"]["votes"] == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sheet": "another"}, "but the key is of"),
        ({"kind": "x"}, "holds no votes"),
        ({"rater": " "}, "names no rater"),
        ({"votes": [{"pair": "p9999", "choice": "left"}]}, "no pair of the key"),
        ({"votes": [{"pair": "p0000", "choice": "up"}]}, "legal: left, right, tie"),
        ({"votes": [{"pair": "p0000", "choice": "tie"}] * 2}, "two votes on p0000"),
        ({"votes": [{"pair": "p0000", "choice": "tie"}]}, "5 of 6 votes are missing"),
    ],
)
def test_votes_that_cannot_be_counted(made, tmp_path, changes, words):
    sheet, key = made
    with pytest.raises(ConfigError, match=words):
        tally(sheet.key, [vote(tmp_path / "v.json", key, lambda row: "B", **changes)])


def test_missing_votes_can_be_allowed_and_raters_not_doubled(made, tmp_path):
    sheet, key = made
    some = vote(tmp_path / "v.json", key, lambda row: "B", votes=[{"pair": "p0000", "choice": "tie"}])
    found = tally(sheet.key, [some], missing=True)
    assert (found.missing, found.all.votes, found.all.ties) == (5, 1, 1)
    with pytest.raises(ConfigError, match="has voted in another file too"):
        tally(sheet.key, [some, some], missing=True)
    with pytest.raises(ConfigError, match="is no key"):
        tally(some, [some])


def test_krippendorffs_own_example():
    """Krippendorff 2011, section C (nominal, four observers, missing values): alpha = 0.743."""
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[str(row[unit]) for row in table if row[unit] is not None] for unit in range(12)]
    assert agree(units)[1] == pytest.approx(0.743, abs=5e-4)


def test_agreement_by_chance_is_0_and_all_equal_is_1():
    rng = random.Random(0)
    assert abs(agree([[rng.choice("AB") for _ in range(3)] for _ in range(3000)])[1]) < 0.03
    assert agree([["A", "A"], ["B", "B"]]) == (1.0, 1.0)
    assert all(x != x for x in agree([["A"], ["B"]]))


def test_intervals_over_prompts_cover(made, tmp_path):
    """200 studies of 60 prompts, 2 pictures each, 3 raters who share a prompt's leaning; the true rate is 0.6.

    The interval must hold it 95 times in 100, and one that took votes for independent ones would not.
    """
    from rewardtune.report.tally import _share

    rng = random.Random(1)
    held = naive = 0
    for _ in range(200):
        ballots = []
        for prompt in range(60):
            leaning = rng.betavariate(0.9, 0.6)
            for picture in range(2):
                row = {"pair": f"{prompt}-{picture}", "prompt": str(prompt), "left": "A", "category": ""}
                ballots += [(f"r{r}", row, "right" if rng.random() < leaning else "left") for r in range(3)]
        share = _share(ballots)
        held += share.rate.low <= 0.6 <= share.rate.high
        p = share.rate.value
        naive += abs(p - 0.6) <= 1.96 * (p * (1 - p) / len(ballots)) ** 0.5
    assert 180 <= held <= 199
    assert naive < 160


@pytest.mark.parametrize(("agreeing", "habit"), [(1.0, 0.0), (0.8, 0.0), (0.8, 0.3)])
def test_intervals_of_the_left_habit_cover(agreeing, habit):
    """400 studies of 60 pairs with sides at random, seen by 3 raters; the true share of the left is known.

    Raters choose the better picture (with probability `agreeing`), or the left one by habit; some votes are ties.
    """
    ties = (1 - habit) * (1 - agreeing) / 3
    truth = 0.5 + habit / 2 / (1 - ties)
    rng = random.Random(2)
    held = naive = 0
    for _ in range(400):
        ballots = []
        for pair in range(60):
            side = rng.choice(("left", "right"))
            for rater in range(3):
                choice = side if rng.random() < agreeing else rng.choice(("left", "right", "tie"))
                choice = "left" if rng.random() < habit else choice
                ballots.append((f"r{rater}", {"pair": str(pair)}, choice))
        share = _left(ballots)
        held += not share.excludes(truth)
        decided = [choice for _, _, choice in ballots if choice != "tie"]
        naive += not wilson(decided.count("left"), len(decided)).excludes(truth)
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert naive / 400 < 0.9


def test_a_side_that_nobody_chose_has_no_interval():
    assert math.isnan(_left([("r", {"pair": "p"}, "tie")]).value)
