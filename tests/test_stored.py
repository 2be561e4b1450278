"""What benchmarks keep: stored rows say what they were made with, and no other settings are printed above them."""

import json
from pathlib import Path

import pytest
import raise_rewards
import regularisers
import reward_hacking

from rewardtune.bench.main import NAMES, _page
from rewardtune.bench.setting import chosen_tasks, setting_of
from rewardtune.bench.work import Work

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("benchmark", "arguments", "words"),
    [
        (raise_rewards, ["--count", "16"], "aesthetic, 0 was made with count 48 .asked: 16."),
        (regularisers, ["--every", "4", "--updates", "8"], "none, 0 was made with updates 48 .asked: 8., every 8"),
        (reward_hacking, ["--seed", "1"], "without guards, 0 was made with seed 0 .asked: 1."),
    ],
)
def test_rows_of_other_settings_are_refused_before_anything_runs(benchmark, arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit, match=words):
        benchmark.main()


def test_the_committed_pages_say_what_their_rows_hold():
    rows = {
        name: json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in ("raise_rewards", "regularisers")
    }
    assert raise_rewards.report(rows["raise_rewards"]) == (ROOT / "docs/results/raise_rewards.md").read_text()
    assert regularisers.report(rows["regularisers"]) == (ROOT / "docs/results/regularisers.md").read_text()
    rows["raise_rewards"][0]["count"] = 16
    assert "means over 16 held-out prompts" in raise_rewards.report(rows["raise_rewards"])


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_experiments_say_what_their_rows_hold(name):
    work = Work(setting=setting_of("playground"), folder=ROOT / "docs/results/bench/playground")
    page = _page(name, work, chosen_tasks(work.setting, None), run=False, plots=False)
    assert page == (work.folder / f"{name}.md").read_text()


def test_a_run_whose_reward_only_falls_reaches_the_level_where_it_begins():
    falling = [{"reward": 6.0, "clipscore": 0.8}, {"reward": 5.0, "clipscore": 0.5}]
    rising = [{"reward": 5.0, "clipscore": 0.8}, {"reward": 7.0, "clipscore": 0.4}]
    assert regularisers.at_reward(falling, 6.0, "clipscore") == 0.8
    assert regularisers.at_reward(rising, 6.0, "clipscore") == pytest.approx(0.6)
    with pytest.raises(ValueError, match="never reaches"):
        regularisers.at_reward(falling, 6.5, "clipscore")
