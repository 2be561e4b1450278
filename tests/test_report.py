"""The page of `rewardtune report`, without a browser: what it says, what it must not hold, and who may fail."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_run import MEASURES, PROMPTS, fake_run, fake_sweep
from test_trainer import plain, tuner

from rewardtune.cli import main
from rewardtune.config import dump_config, load_config
from rewardtune.errors import ConfigError
from rewardtune.report import live, write_report
from rewardtune.report.content import context
from rewardtune.report.curves import charts, running_mean, x_axes
from rewardtune.report.read import read_run
from rewardtune.report.results import agree, changes, duel, falls, signed, verdict
from rewardtune.runfolder import RunFolder
from rewardtune.stats import paired_difference

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }} ]]> --> & &amp; <b>",
    "\ud800 \u202e backwards \x07",
    "plain",
]


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page(*runs: Path, **options: Any) -> tuple[str, Elements]:
    path = write_report(runs, runs[0].parent / "page.html", **options)
    html = path.read_text(encoding="utf-8")
    return html, Elements(html)


def data_of(html: str) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_a_whole_page(tmp_path):
    html, elements = page(fake_run(tmp_path / "drtune"))
    assert "The reward rose, and clipscore, never trained on, got worse." in elements.text
    sections = [section["id"] for section in elements.named("section") if "id" in section]
    assert sections == ["pictures", "rewards", "gradients", "guards", "use", "environment"]
    assert {link["href"] for link in elements.named("a")} == {"#main", "#verdict", *(f"#{name}" for name in sections)}
    images = elements.named("img")
    assert all(image["alt"] for image in images)
    assert len({image["src"] for image in images if "src" in image}) == 2 * len(PROMPTS)
    for place in ("torch", "2.13.0", "DDIMScheduler", "drtune(K=3, m=8)", "Time of the updates1 min 20 s"):
        assert place in elements.text
    assert "/home/somebody" not in html
    shown = data_of(html)
    titles = [chart["title"] for chart in shown["charts"]]
    assert titles[:3] == ["Trained reward", "symmetry", "clipscore"]
    assert {"Gradient norm before clipping", "Gradient norm per denoising step", "Trained sampling steps"} <= set(
        titles
    )
    assert {figure.get("id") for figure in elements.named("figure")} >= {chart["id"] for chart in shown["charts"]}
    assert shown["refresh"] == 0


def test_nothing_is_asked_of_the_network(tmp_path):
    html, elements = page(fake_run(tmp_path / "a"), fake_run(tmp_path / "b", draw=1))
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html)
    policy = next(meta["content"] for meta in elements.named("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not any("style" in attributes for _, attributes in elements.found)  # the policy would drop them


def test_a_hostile_prompt_stays_text(tmp_path):
    run = fake_run(tmp_path / "run", prompts=HOSTILE, method=HOSTILE[0], error=HOSTILE[1], status="failed")
    html, elements = page(run)
    assert len(elements.named("script")) == 2  # the data and ours
    assert not [image for image in elements.named("img") if "onerror" in image]
    for prompt in HOSTILE[:4]:
        assert prompt in elements.text
    assert "\u202e" not in html


def test_the_reward_rose_and_nothing_fell(tmp_path):
    run = read_run(fake_run(tmp_path / "run", held_out=0.3))
    said = verdict(run, changes(run))
    assert said.mood == "good"
    assert said.headline == "The reward rose, and clipscore, never trained on, got better."


def test_a_total_that_rose_hides_no_part_that_fell(tmp_path):
    """The reward and the one held-out reward rose; a part of it and diversity fell: the headline says so."""
    measures = MEASURES | {"symmetry": {"what": "", "better": "more", "role": "trained"}}
    run = read_run(fake_run(tmp_path / "run", held_out=0.3, vendi=-0.5, measures=measures))
    said = verdict(run, changes(run))
    assert said.mood == "mixed"
    assert said.headline == (
        "The reward rose, and clipscore, never trained on, got better; symmetry, a part of the reward, got worse; "
        "diversity fell by 10\u00a0%."
    )


def test_the_mood_knows_diversity(tmp_path):
    for fall, mood in ((-0.2, "good"), (-0.3, "mixed")):  # of 5: 4 % and 6 %
        run = read_run(fake_run(tmp_path / mood, held_out=0.3, vendi=fall))
        assert verdict(run, changes(run)).mood == mood


def test_held_out_rewards_are_named(tmp_path):
    measures = MEASURES | {"brightness": {"what": "", "better": "more", "role": "held_out"}}
    run = read_run(fake_run(tmp_path / "run", measures=measures, noise=0.2))
    assert verdict(run, changes(run)).headline == (
        "The reward rose, and clipscore, never trained on, got worse; no change of brightness can be told."
    )


def test_a_distance_to_the_untuned_picture_is_no_win_or_loss(tmp_path):
    measures = MEASURES | {"brightness": {"what": "", "better": "less", "role": "guard"}}
    path = fake_run(tmp_path / "run", measures=measures)
    assert changes(read_run(path))["brightness"].won is not None
    looks = (path / "eval.jsonl").read_text().replace("brightness", "base_distance")
    (path / "eval.jsonl").write_text(looks)
    assert changes(read_run(path))["base_distance"].won is None


def test_every_minus_is_the_same_sign():
    assert (signed(7.12e-05), signed(-8.84e-05)) == ("+7.12e\u221205", "\u22128.84e\u221205")


def test_noise_is_no_change(tmp_path):
    run = read_run(fake_run(tmp_path / "run", gain=0.0, held_out=0.0))
    said = verdict(run, changes(run))
    assert said.mood == "unclear"
    assert "No change of the reward can be told from the noise over 6 prompts." in said.headline


def test_without_a_held_out_reward_the_verdict_says_so(tmp_path):
    measures = {"clipscore": {"what": "", "better": "more", "role": "trained"}}
    run = fake_run(
        tmp_path / "run", held_out=0.3, measures=measures | {"reward": {"better": "more", "role": "trained"}}
    )
    read = read_run(run)
    said = verdict(read, changes(read))
    assert said.mood == "mixed"
    assert any("No held-out reward was measured" in sentence for sentence in said.sentences)


def test_the_numbers_of_the_verdict(tmp_path):
    """The paired change is that of the file, and less is better where run.json says so."""
    run = read_run(fake_run(tmp_path / "run"))
    found = changes(run)
    first, last = run.looks[0], run.looks[-1]
    apart = [b - a for a, b in zip(first.pictures["symmetry"], last.pictures["symmetry"], strict=True)]
    assert found["symmetry"].difference.value == pytest.approx(sum(apart) / len(apart))
    assert found["symmetry"].sign == 1
    assert found["symmetry"].won.value == 1.0
    assert found["clipscore"].sign == -1
    assert found["vendi"].won is None
    losses = falls(run, "clipscore")
    worst = max(range(len(PROMPTS)), key=lambda i: first.pictures["clipscore"][i] - last.pictures["clipscore"][i])
    assert losses[0][0] == worst
    assert [loss for _, loss in losses] == sorted((loss for _, loss in losses), reverse=True)
    assert falls(run, "symmetry") == []


def test_seeds_of_a_prompt_are_one_prompt(tmp_path):
    run = fake_run(tmp_path / "run", prompts=["a", "a", "b", "b", "c", "c"])
    assert changes(read_run(run))["reward"].prompts == 3
    assert "seed 2 of 2" in page(run)[1].text


def test_axes_and_means(tmp_path):
    run = read_run(fake_run(tmp_path / "run", steps=4, every=2))
    assert x_axes(run) == {"steps": [1, 2, 3, 4], "images": [8, 16, 24, 32], "seconds": [2, 4, 6, 8]}
    looks = next(c for c in charts([run])["rewards"][0]["curves"] if c["style"] == "eval")
    assert looks["x"] == {"steps": [0, 2, 4], "images": [0, 16, 32], "seconds": [0, 4, 8]}
    assert looks["low"][0] == looks["high"][0] == looks["y"][0]  # no change from itself
    assert running_mean([1, 2, 3]) == [1.5, 2, 2.5]
    trained = next(chart for chart in charts([run])["gradients"] if chart["title"] == "Trained sampling steps")
    assert sum(trained["bars"][0]["y"]) == 4 * 3


def test_a_long_run_is_thinned(tmp_path):
    run = read_run(fake_run(tmp_path / "run", steps=2000, every=1000))
    raw = charts([run])["rewards"][0]["curves"][0]
    assert len(raw["y"]) == 400
    assert raw["name"] == "training batch, mean of 5 updates"
    assert raw["x"]["steps"][-1] == 2000


def test_several_runs_against_each_other(tmp_path):
    better, worse = fake_run(tmp_path / "better", gain=0.6), fake_run(tmp_path / "worse", gain=0.1, draw=1)
    other = fake_run(tmp_path / "other", prompts=["x", "y", "z"])
    a, b, c = map(read_run, (better, worse, other))
    assert agree(a, b)
    assert not agree(a, c)
    apart, rate = duel(a, b)["symmetry"]
    assert apart.value < 0
    assert rate.value == 1.0
    assert rate.low > 0.5
    _, elements = page(better, worse, other)
    assert "A better than B" in elements.text
    assert "other are those of no other run here" in elements.text
    assert [table["id"] for table in elements.named("table") if "id" in table] == [
        "table-runs",
        "table-seeds",
        "table-duels",
    ]


def test_the_comparison_tells_runs_apart(tmp_path):
    """Changes first, then the settings that differ; what all share stands once."""
    train = {"steps": 40, "batch": 8}
    runs = [read_run(fake_run(tmp_path / f"lr{lr:g}", train=train | {"lr": lr})) for lr in (1e-4, 3e-4)]
    table = context(runs)["table"]
    assert table["headings"] == [
        *("Run", "Δ reward", "Δ symmetry (less is better)", "Δ clipscore", "Δ vendi"),
        *("lr", "Updates", "Images", "Time", "Status"),
    ]
    assert [row[5]["text"] for row in table["rows"]] == ["0.0001", "0.0003"]
    reward = "reward symmetry (symmetry: less is better, counts negative)"
    assert table["same"] == ["batch 8", "seed 0", "method drtune(K=3, m=8)", reward]


def test_means_are_over_seeds_alone(tmp_path):
    """Runs of one method with another length, or with other prompts, are not averaged."""
    seeds = [fake_run(tmp_path / f"seed{seed}", seed=seed, draw=seed) for seed in (0, 1)]
    others = [fake_run(tmp_path / "short", steps=20), fake_run(tmp_path / "prompts", prompts=["x", "y"])]
    found = context([read_run(run) for run in (*seeds, *others)])["seeds"]
    assert [row[0]["text"] for row in found["rows"]] == ["seed0, seed1"]
    deltas = [changes(read_run(run))["reward"].difference.value for run in seeds]
    assert found["rows"][0][2]["sort"] == pytest.approx(sum(deltas) / 2)
    assert found["rows"][0][2]["ends"] == f"{signed(min(deltas))} to {signed(max(deltas))}"
    assert found["rows"][0][2]["word"] == "better"
    assert "no means over seeds" in page(seeds[0], *others)[1].text


def test_run_files_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    for name, override in {"a": "seed=1", "b": "seed=2", "c": "optim.lr=1e-5"}.items():
        folder = fake_run(tmp_path / name)
        config = load_config("playground-quick", [override, f"output_dir=runs/{name}"])
        (folder / "config.yaml").write_text(dump_config(config))
    found = context([read_run(tmp_path / name) for name in "abc"])["seeds"]
    assert [row[0]["text"] for row in found["rows"]] == ["a, b"]


def test_the_playgrounds_imitations_are_named(tmp_path):
    folder = fake_run(tmp_path / "run")
    assert "From the playground" not in page(folder)[1].text
    (folder / "config.yaml").write_text(
        dump_config(load_config("playground", ["guards.rewards=[{name: hpsv2, options: {model: playground}}]"]))
    )
    text = page(folder)[1].text
    assert "From the playground, not the published models: clipscore and hpsv2." in text
    assert "clipscore (playground)" in text
    assert "No rule was set for this run." in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"status": "running", "looks": False, "steps": 0}, "Nothing has been looked at yet."),
        ({"status": "running", "steps": 3, "every": 40}, "Only the untuned model has been looked at so far."),
        ({"status": "interrupted", "error": "interrupted at once"}, "interrupted at once"),
        ({"status": "stopped", "error": "clipscore fell", "kept_step": 10}, "the weights of step 10"),
        ({"kept_step": 0}, "The untuned model is kept"),
        ({"looks": False}, "Nothing has been looked at yet."),
        ({"measures": None, "eval_prompts": None, "versions": None}, "symmetry (trained on) fell"),
    ],
)
def test_runs_in_any_state(tmp_path, facts, words):
    elements = page(fake_run(tmp_path / "run", **facts))[1]
    assert words in elements.text


def test_a_line_that_is_being_written(tmp_path):
    run = fake_run(tmp_path / "run", status="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "rew')
    html, elements = page(run)
    assert data_of(html)["refresh"] > 0
    assert "is read again every" in elements.text


def test_folders_without_a_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    fake_run(tmp_path / "runs" / "a", steps=2, every=1)
    for folder, words in {"none": "no run folder", "empty": "there is no run.json", "runs": "it holds runs"}.items():
        assert main(["report", str(tmp_path / folder)]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="given twice"):
        write_report([tmp_path / "runs" / "a"] * 2)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no report of rewardtune; give another name"):
        write_report([tmp_path / "runs" / "a"], notes)
    assert notes.read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "runs" / "b", steps=2, every=1)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.html exists and is no report of rewardtune"):
        write_report([tmp_path / "runs" / "a", tmp_path / "runs" / "b"])
    (tmp_path / "report.html").write_text("")  # nothing would be lost
    for _ in range(2):
        write_report([tmp_path / "runs" / "a", tmp_path / "runs" / "b"])


def test_sweep_and_evaluations_are_shown(tmp_path):
    run = fake_run(tmp_path / "run")
    fake_sweep(run, gain=0.4)
    ends = {"value": 0.5, "low": 0.4, "high": None}
    measures = {"clipscore": {"what": "", "better": "more", "role": "held_out"}}
    (run / "eval").mkdir()
    pair = {"a": "run", "b": "base", "all": {"difference": {"clipscore": ends}, "win_rate": {"clipscore": ends}}}
    pair["categories"] = {"two <b>shapes</b>": {"difference": {"clipscore": ends | {"value": 0.75}}, "win_rate": {}}}
    candidates = [{"label": "base", "metrics": {"clipscore": ends}}]
    found = {"kind": "eval", "measures": measures, "candidates": candidates, "pairs": [pair], "notes": ["a note"]}
    (run / "eval" / "eval.json").write_text(json.dumps(found))
    (run / "eval" / "foreign.json").write_text("[]")
    (run / "eval" / "hurt.json").write_text(json.dumps(found | {"candidates": 3}))
    html, elements = page(run)
    assert "<because>" in elements.text
    by_title = {chart["title"]: chart for chart in data_of(html)["charts"] if chart["id"].startswith("sweep-0-")}
    assert list(by_title) == ["reward", "clipscore", "vendi", "reward against clipscore", "reward against vendi"]
    along = by_title["reward against vendi"]
    assert along["curves"][0]["x"] == {"along": [5, 4.5, 4]}
    assert along["curves"][0]["y"] == pytest.approx([0.5, 0.7, 0.9])
    assert along["curves"][0]["labels"] == ["0", "0.5", "1"]
    chart = by_title["clipscore"]
    assert chart["mark"]["x"] == 0.5
    assert chart["curves"][0]["low"] == pytest.approx([0.49] * 3)  # the paired change's interval, around the value
    assert chart["curves"][0]["high"] == pytest.approx([0.52] * 3)
    assert "run – base" in elements.text
    assert "a note" in elements.text
    assert "two <b>shapes</b>" in elements.text
    assert "+0.75" in elements.text
    assert "eval/hurt.json cannot be read" in elements.text


def test_the_trainer_writes_it_and_says_when_it_is_done(tmp_path, monkeypatch):
    pages = []
    write = live.LiveReport._write

    def kept(self: live.LiveReport) -> None:
        write(self)
        pages.append((tmp_path / "run" / "report.html").read_text())

    monkeypatch.setattr(live.LiveReport, "_write", kept)
    monkeypatch.setattr(live, "SHARE", 1e9)
    tuner(tmp_path / "run", plain()).train(2, lr=1e-3, eval_every=1)
    assert [data_of(each)["refresh"] > 0 for each in pages] == [True, True, False]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["eval_prompts"]


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no page today")

    monkeypatch.setattr("rewardtune.report.write_report", broken)
    result = tuner(tmp_path / "run", plain()).train(2, lr=1e-3, eval_every=1)
    assert result.status == "done"
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("warning: report.html was not written (ValueError: no page today)") == 1


def test_it_can_be_switched_off(tmp_path):
    tuner(tmp_path / "run", plain(), log={"report": False}).train(1, lr=1e-3)
    assert not (tmp_path / "run" / "report.html").exists()


def clocked(tmp_path, monkeypatch, seconds: float) -> tuple[live.LiveReport, list[float], list[float]]:
    """A report of which each page takes so many seconds; the clock, and when pages were written."""
    now, written = [0.0], []

    def slow(*_: object, **__: object) -> None:
        written.append(now[0])
        now[0] += seconds

    monkeypatch.setattr("rewardtune.report.write_report", slow)
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.set_status("running")
    return live.LiveReport(folder, enabled=True, say=print, clock=lambda: now[0]), now, written


def test_its_share_of_the_time(tmp_path, monkeypatch):
    """Looks every 10 s, a page of 0.2 s: after the first one a page is written only where 0.5 % allow it."""
    report, now, written = clocked(tmp_path, monkeypatch, 0.2)
    for _ in range(200):
        report.look()
        now[0] += 10
    assert written[0] == 0
    assert 40 < len(written) < 60
    assert 0.2 * len(written) < 0.006 * now[0]


def test_a_run_without_looks_is_shown_every_minute(tmp_path, monkeypatch):
    """Updates of 10 s and a page of 0.1 s: once a minute, where the share would allow every other update."""
    report, now, written = clocked(tmp_path, monkeypatch, 0.1)
    report.look()
    for _ in range(60):
        now[0] += 10
        report.update()
    apart = [b - a for a, b in itertools.pairwise(written)]
    assert written[0] == 0
    assert 60 <= min(apart) <= max(apart) < 72
    assert len(written) in (10, 11)


def test_the_trainer_shows_updates_between_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "SHARE", 1e9)
    monkeypatch.setattr(live, "EVERY", 0.0)
    shown = []
    write = live.LiveReport._write

    def kept(self: live.LiveReport) -> None:
        write(self)
        lines = tmp_path / "run" / "metrics.jsonl"
        shown.append(len(lines.read_text().splitlines()) if lines.exists() else 0)

    monkeypatch.setattr(live.LiveReport, "_write", kept)
    tuner(tmp_path / "run", plain()).train(3, lr=1e-3)
    assert shown == [0, 1, 2, 3, 3]  # before, after each update, at the end


def test_large_pictures_are_reduced(tmp_path):
    from PIL import Image

    from rewardtune.report.pictures import data_uri

    noise = (torch.rand(900, 1200, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    Image.fromarray(noise).save(tmp_path / "large.png")
    uri = data_uri(tmp_path / "large.png")
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < (tmp_path / "large.png").stat().st_size / 5


def held_out_lost(folder: Path) -> Path:
    """A run whose held-out reward is NaN at its last look."""
    *lines, last = (folder / "eval.jsonl").read_text().splitlines()
    record = json.loads(last)
    record["panel"]["values"]["clipscore"] = float("nan")
    record["panel"]["pictures"]["clipscore"] = [float("nan")] * len(PROMPTS)
    (folder / "eval.jsonl").write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    return folder


def test_a_held_out_reward_that_is_lost_is_not_good(tmp_path):
    run = read_run(held_out_lost(fake_run(tmp_path / "run", held_out=0.3)))
    said = verdict(run, changes(run))
    assert said.mood == "mixed"
    assert said.headline == "The reward rose, and clipscore, never trained on, can no longer be measured."
    assert any("clipscore (held out) was 0." in sentence for sentence in said.sentences)
    assert "lost: no number" in page(run.folder)[1].text


def test_a_held_out_reward_of_which_nothing_can_be_told_is_not_good(tmp_path):
    run = read_run(fake_run(tmp_path / "run", held_out=0.0))
    said = verdict(run, changes(run))
    assert said.mood == "mixed"
    assert said.headline == "The reward rose, and no change of clipscore, never trained on, can be told."


def test_weights_chosen_among_looks_have_wider_intervals(tmp_path):
    """4 looks: the reward's interval holds for the best of them, at 1 - 0.05 / 4; the held-out one's as before."""
    run = read_run(fake_run(tmp_path / "run"))
    last = replace(run, facts=run.facts | {"best": None})  # whichever came last was kept
    chosen, plainly = changes(run), changes(last)
    for name in ("reward", "symmetry"):
        a, b = run.looks[-1].pictures[name], run.looks[0].pictures[name]
        assert chosen[name].difference == paired_difference(a, b, confidence=1 - 0.05 / 4)
        assert plainly[name].difference == paired_difference(a, b)
        assert chosen[name].difference.half > 1.1 * plainly[name].difference.half
    assert chosen["clipscore"] == plainly["clipscore"]
    said, before = verdict(run, chosen).sentences, verdict(last, plainly).sentences
    assert "for the best of 4 looks" in said[0]
    assert any("chosen among 4 looks at these very pictures by reward" in sentence for sentence in said)
    assert not any("chosen among" in sentence or "looks" in sentence for sentence in before)
    for facts in ({"steps": 10}, {"status": "running"}):  # one look, and none chosen yet
        assert read_run(fake_run(tmp_path / str(facts), **facts)).chosen_by is None


def test_two_rewards_of_one_name_are_not_compared(tmp_path):
    """b's clipscore has other weights: every look of it lies 100 higher."""
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", draw=1)
    looks = [json.loads(line) for line in (b / "eval.jsonl").read_text().splitlines()]
    for look in looks:
        look["panel"]["pictures"]["clipscore"] = [x + 100 for x in look["panel"]["pictures"]["clipscore"]]
        look["panel"]["values"]["clipscore"] += 100
    assert "clipscore" in duel(read_run(a), read_run(b))
    (b / "eval.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    assert duel(read_run(a), read_run(b)).keys() == {"reward", "symmetry"}
    assert "clipscore of a and b cannot be compared" in page(a, b)[1].text


def test_a_reward_that_either_run_was_trained_on_is_trained(tmp_path):
    measures = MEASURES | {"clipscore": MEASURES["clipscore"] | {"role": "trained"}}
    runs = [read_run(fake_run(tmp_path / "a")), read_run(fake_run(tmp_path / "b", draw=1, measures=measures))]
    for pair in (runs, runs[::-1]):
        shown = context(pair)
        assert {row[2]["text"]: row[3]["text"] for row in shown["duels"]["rows"]}["clipscore"] == "trained"
        assert {row[3]["word"].rpartition(", ")[2] for row in shown["table"]["rows"]} == {"held out", "trained on"}
        titles = [section["title"] for section in shown["galleries"][0]["worst"]]
        assert titles == ["clipscore", "The trained reward"]


def test_better_and_worse_are_words_too(tmp_path):
    """Not colours alone: less of symmetry is better, and clipscore fell."""
    runs = [read_run(fake_run(tmp_path / f"seed{seed}", seed=seed, draw=seed)) for seed in (0, 1)]
    shown = context([*runs, read_run(fake_run(tmp_path / "other", gain=0.9))])
    for table, first in (("table", 1), ("seeds", 2)):
        assert shown[table]["headings"][first + 1] == "Δ symmetry (less is better)"
        for cell, word in zip(shown[table]["rows"][0][first : first + 3], ("better", "better", "worse"), strict=True):
            assert cell["word"] == word
    won = next(row[5] for row in shown["duels"]["rows"] if row[2]["text"] == "symmetry")
    assert (won["mood"], won["word"]) == ("bad", "B is better")


def test_the_command_names_a_folder_with_spaces(tmp_path):
    shown = context([read_run(fake_run(tmp_path / "my run"))])
    command = shlex.split(shown["runs"][0]["snippet"]["command"])
    assert command[:3] == ["rewardtune", "sample", str(tmp_path / "my run")]
