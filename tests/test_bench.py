"""The paper's experiments: what runs, what it costs, and what is made of the rows."""

import itertools
import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from PIL import Image

from rewardtune import evaluate, methods
from rewardtune.bench import ablations, cells, gradients, pictures, plots, table1
from rewardtune.bench.cells import BASE, final_prompts, law_of, open_cell, run_cell
from rewardtune.bench.claims import JUDGED, best, better
from rewardtune.bench.cost import Cost, spent, updates_within
from rewardtune.bench.main import NAMES, bench
from rewardtune.bench.rows import Cell, Rows, made_by, timed_by
from rewardtune.bench.setting import METHODS, PAPER, SETTINGS, method_of, setting_of
from rewardtune.bench.work import Work
from rewardtune.checkpoint import CheckpointError
from rewardtune.errors import CannotWrite, ConfigError, PreflightError, TrainingStopped
from rewardtune.gradient import derive_seed
from rewardtune.stats import student

COST = Cost(replay=2.0, nested=2.5, evaluation=0.01, head=1.0)


def test_the_paper_s_names_give_the_paper_s_settings_at_its_own_length():
    expected = {
        "ReFL-10": ("refl", {"m": 10}),
        "ReFL-20": ("refl", {"m": 20}),
        "DRaFT-LV": ("draft_lv", {"n": 2}),
        "DRaFT-10": ("draft", {"K": 10}),
        "AlignProp": ("alignprop", {}),
        "DRTune": ("drtune", {"K": 5, "m": 20}),
    }
    assert {name: tuple(method_of(name, 50).values()) for name in METHODS} == expected
    assert method_of("DRTune", 20)["options"] == {"K": 2, "m": 8}


@pytest.mark.parametrize("name", [v.method for a in ablations.ABLATIONS.values() for v in a.variants])
@pytest.mark.parametrize("T", [10, 20, 50])
def test_every_variant_draws_plans(name, T):
    cell = Cell(setting="playground", reward="hpsv2", method=name, lr=1e-4, seed=0, T=T, budget=1.0)
    assert law_of(cell)(T, random.Random(0)).executed


def test_an_evaluation_counts_once_and_a_replay_as_measured():
    plan = methods.drtune(K=2, m=None)(10, random.Random(0))
    assert COST.of(plan) == 10 + 2 * 2.0
    assert COST.of(methods.draft(K=3)(10, random.Random(0))) == 10 + 3 * 2.5
    assert COST.of(methods.draft_lv(n=2)(10, random.Random(0))) == 10 + 2 + 2 * 2.0  # both draws sampled and replayed
    assert COST.of(methods.drtune(K=1, m=5)(10, random.Random(1))) < 10 + 2.0  # an early stop is paid by what ran


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_spent_and_not_exceeded(name):
    given = {"seed": 3, "batch": 4, "cost": COST}
    law = law_of(Cell(setting="playground", reward="hpsv2", method=name, lr=1e-4, seed=3, T=20, budget=1.0))
    updates = updates_within(2000.0, law, 20, **given)
    used = spent(law, 20, updates=updates + 1, **given)
    assert used[updates] <= 2000 < used[updates + 1]
    assert updates_within(1.0, law, 20, **given) == 1


def test_rows_are_found_again_and_none_is_run_twice(tmp_path):
    cell = Cell(setting="playground", reward="hpsv2", method="DRTune", lr=1e-4, seed=0, T=20, budget=8e3)
    other = replace(cell, options=(("K", 4), ("m", 8)))
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add({"cell": json.loads(other.key), "updates": 3})
    again = Rows(tmp_path / "rows.jsonl")
    assert again.get(cell) is None
    assert again.get(other)["updates"] == 3
    assert again.missing([cell, other, cell]) == [cell]


def test_a_run_judged_on_more_prompts_serves_for_fewer(tmp_path):
    cell = Cell(setting="playground", reward="hpsv2", method="DRTune", lr=1e-4, seed=0, T=20, budget=8e3, count=400)
    rows = Rows(tmp_path / "rows.jsonl")
    scores = {"scores": {"hpsv2": [0.7, 0.1]}, "first": {"128": {"hpsv2": [0.6, 0.2]}}}
    rows.add({"cell": json.loads(cell.key), "updates": 3, **scores})
    assert rows.get(cell)["scores"] == scores["scores"]
    assert rows.get(replace(cell, count=128)) == {**rows.get(cell), "scores": scores["first"]["128"]}
    for other in (replace(cell, count=64), replace(cell, count=128, seed=1), replace(cell, count=128, judged="search")):
        assert rows.get(other) is None


def test_a_broken_line_is_named(tmp_path):
    cell = Cell(setting="playground", reward="symmetry", method="DRTune", lr=1e-4, seed=0, T=20, budget=8000.0)
    path = tmp_path / "rows.jsonl"
    for line in ('{"cell": ', '{"cell": 3}', '{"cell": {}}', "[]"):
        path.write_text(f'{{"cell": {cell.key}}}\n{line}\n')
        with pytest.raises(ConfigError, match="line 2 is no row of results"):
            Rows(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot be read .*restore it, or move it away"):
        Rows(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Rows(tmp_path)


def test_a_verdict_follows_the_paired_interval():
    ours, theirs = [1.0, 2.0, 3.0], [0.5, 1.4, 2.6]  # gains 0.5, 0.6, 0.4
    told = better("ours", ours, theirs, less=False, names=("a", "b"))
    half = student(0.95, 2) * 0.1 / 3**0.5
    assert told.verdict == "holds"
    assert f"0.5 ± {half:.4g}" in told.spread
    assert better("ours", ours, theirs, less=True, names=("a", "b")).verdict == "fails"
    assert better("ours", [1, 2, 3], [0, 3, 2], less=False, names=("a", "b")).verdict == "cannot be told here"
    assert better("ours", [1.0], [0.0], less=False, names=("a", "b")).verdict == "cannot be told here"
    assert better("ours", [], [0.0], less=False, names=("a", "b")).verdict == "not run"


def test_the_best_beats_every_rival_and_fails_beyond_the_noise_of_many():
    ours = {0: 1.0, 1: 1.1, 2: 1.2}

    def told(**rivals):
        return best("ours", ours, rivals, less=False, name="a")

    worse, equal = {0: 0.5, 1: 0.61, 2: 0.7}, {0: 0.9, 1: 1.3, 2: 1.1}
    assert told(b=worse, c={0: 0.2, 1: 0.3, 2: 0.41}).verdict == "holds"
    assert "the best other, b," in told(b=worse, c={0: 0.2, 1: 0.3, 2: 0.41}).figure
    assert told(b=worse, c=equal).verdict == "cannot be told here"
    assert told(b=worse, c={0: 1.5, 1: 1.6, 2: 1.71}).verdict == "fails"
    # below one of five rivals at 95 %, but not at 99 %
    slightly = {0: 1.07, 1: 1.2, 2: 1.33}
    assert better("b", list(slightly.values()), list(ours.values()), less=False, names=("b", "a")).verdict == "holds"
    assert told(b=slightly, c=worse, d=worse, e=worse, f=worse).verdict == "cannot be told here"
    assert told(b=worse, c={}).verdict == "not run"
    assert told(b=worse, c={5: 1.0}).verdict == "not run"  # no seed in common
    assert best("ours", {0: 1.0}, {"b": {0: 0.0}}, less=False, name="a").verdict == "cannot be told here"


def test_a_run_has_one_row_whichever_figure_asks_for_it(tmp_path):
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    own = work.cell("DRTune", "hpsv2", 0, lr=1e-3, count=128)
    figures = [ablations.ABLATIONS[name] for name in ("fig8", "fig9", "spacing", "earlystop")]
    variants = [v for a in figures for v in a.variants if v.method == "DRTune" and v.T in (None, work.setting.T)]
    cells = [work.cell(v.method, "hpsv2", 0, lr=1e-3, count=128, T=v.T, options=v.options) for v in variants]
    assert cells.count(own) == 4
    assert len(set(cells)) == len(cells) - 3


def look(evaluations, symmetry, clipscore):
    scores = {"symmetry": symmetry, "clipscore": clipscore, "reward": clipscore - symmetry}
    return {"updates": evaluations // 10, "evaluations": evaluations, "cpu_seconds": evaluations / 2, "scores": scores}


def test_symmetry_is_read_where_clipscore_crosses_the_level():
    trace = [look(0, 0.5, 1.0), look(100, 0.4, 0.96), look(200, 0.2, 0.86)]
    assert table1.at_level(trace, 0.91, "symmetry", "clipscore") == pytest.approx(0.3)
    assert table1.at_equal({"trace": trace}, 0.91) == pytest.approx(0.3)
    assert table1.at_equal({"trace": trace}, 1.0) is None  # the untuned look alone: not what a run reached
    assert math.isnan(table1.at_equal({"trace": trace, "broke": "step 9: NaN"}, 0.91))
    assert table1.at_equal({"trace": trace}, 0.5) == 0.2  # never crossed: the best look
    assert table1.at_time(trace, 75.0, "symmetry") == pytest.approx(0.3)
    assert table1.at_time(trace, 500.0, "symmetry") == 0.2


def test_at_equal_time_each_seed_ends_with_its_quickest_method():
    """Seed 1 ran on a machine of half the speed: the limit is DRTune's 40 s in seed 0 and its 80 s in seed 1."""
    setting, tables = setting_of("playground"), {"hpsv2": {method: {} for method in METHODS}}
    for method, seed in itertools.product(METHODS, range(2)):
        seconds = (40 if method == "DRTune" else 50) * (1 + seed)
        scores = [{"hpsv2": 0.0 + seed}, {"hpsv2": 1.0 + METHODS.index(method)}]
        trace = [{"cpu_seconds": x, "scores": y} for x, y in zip((0, seconds), scores, strict=True)]
        tables["hpsv2"][method][seed] = {"cpu_seconds": seconds, "trace": trace}
    told = dict(table1._equal_time(setting, ["hpsv2"], tables))
    assert told["untuned"] == "0.5 ± 0.71"  # its looks differ by seed
    assert told["DRTune"] == "**6 ± 0**"
    assert told["AlignProp"] == "4.1 ± 0.14"  # 5 of its own, at 0.8 of its time: 4 from 0, 4.2 from 1
    tables["hpsv2"]["AlignProp"][1] |= {"broke": "NaN", "cpu_seconds": 1.0}
    assert dict(table1._equal_time(setting, ["hpsv2"], tables))["DRTune"] == "**6 ± 0**"  # no limit of a broken run
    for runs in tables["hpsv2"].values():
        for row in runs.values():
            row["broke"], row["trace"][-1]["scores"] = "NaN", {"hpsv2": math.nan}
    assert dict(table1._equal_time(setting, ["hpsv2"], tables))["DRTune"] == "broke down in 2 of 2 runs"


def test_the_best_of_a_column():
    setting, found = setting_of("playground"), {method: [float(k), k + 1.0] for k, method in enumerate(METHODS)}
    assert table1._best(setting, "hpsv2", found) == ["DRTune"]
    assert table1._best(setting, "symmetry", found) == ["ReFL-10"]  # less is better
    assert table1._best(setting, "hpsv2", found | {"DRTune": [math.nan, 9.0]}) == ["AlignProp"]
    assert table1._best(setting, "hpsv2", found | {"AlignProp": [5.5]}) == ["AlignProp", "DRTune"]
    assert table1._best(setting, "hpsv2", found | {"AlignProp": []}) == []


def test_time_is_the_processors_on_a_cpu_and_by_the_wall_on_a_gpu():
    on = [{}, {"device": "x86_64 CPU"}, {"device": "x86_64 CPU (Some Model)"}, {"device": "NVIDIA H200"}]
    assert [timed_by({"on": facts}) for facts in on] == ["cpu_seconds"] * 3 + ["seconds"]
    assert timed_by({}) == "cpu_seconds"
    row = {"on": on[3], "cpu_seconds": 1.0, "seconds": 30.0}
    assert table1._times({0: row}, {0: row | {"seconds": 20.0}}) == [1.5]
    assert table1._times({0: row}, {0: row | {"on": on[1]}}) == []


def test_another_grid_or_budget_has_a_page_of_its_own(tmp_path):
    pages = [
        bench("spacing", results=tmp_path, only_report=True, plots=False, **given)
        for given in ({}, {"lrs": [9e-4]}, {"budget": 1234567.0, "seeds": 2}, {"lrs": [1e-3, 1e-4]}, {"seeds": 3})
    ]
    names = ["", "_lr-0.0009", "_seeds-2_budget-1234567", "_lr-0.0001_lr-0.001", ""]  # three seeds are the setting's
    assert [page.name for page in pages] == [f"spacing{name}.md" for name in names]
    assert "`rewardtune bench spacing --setting playground --seeds 2 --budget 1234567`" in pages[2].read_text()


def test_what_cannot_run_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"sd15 takes days without a GPU.*--device cpu"):
        bench("table1", setting="sd15", results=tmp_path, plots=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, words in (("gpu0", "no device; legal: cpu, cuda:0"), ("cuda:0", "there are 0 GPUs here; legal: cpu$")):
        with pytest.raises(ConfigError, match=f"--device {name}: {words}"):
            bench("table1", results=tmp_path, devices=["cpu", name], plots=False)
    assert not list(tmp_path.iterdir())
    assert bench("table1", setting="sd15", results=tmp_path, only_report=True, plots=False).exists()


def test_figures_8_and_9_have_the_chains_of_the_setting():
    for name in ("fig8", "fig9", "spacing"):
        for setting, lengths in (("playground", [20, 10, 40]), ("sd15", [50, 20, 30, 40])):
            a = ablations.ABLATIONS[name].on(setting_of(setting))
            assert list(dict.fromkeys(v.T for v in a.variants)) == ([None] if name == "spacing" else lengths)
            assert all(v.T is None or v.x == round(v.x * v.T) / v.T for v in a.variants)


def test_pictures_stand_with_their_claim_and_a_lost_one_is_named(tmp_path):
    work = filled(tmp_path, setting="playground")
    cells = [work.cell(method, "symmetry", 0, lr=work.lr(method, "symmetry")) for method in METHODS]
    (tmp_path / "playground" / "pictures").mkdir()
    for cell in cells[1:]:
        Image.new("RGB", (64, 8)).save(work.picture(cell))
    page = pictures.report(work, "fig4")
    assert "Not run: untuned.\n" in page
    lost = work.picture(cells[0]).name
    assert f"ReFL-10: the picture {lost} is missing; remove its row to run it again." in page
    assert "| symmetry: DRTune is better than every other method | DRTune 0.101" in page
    assert page.count("is missing") == 1
    assert "![pictures" not in page  # nothing was drawn yet, and no page links to what is not there
    with Image.open(pictures.picture(work, "fig4")) as drawn:
        assert drawn.size == (
            150 + 8 * (96 + 6),
            24 + 5 * (96 + 6),
        )  # eight prompts, the five methods that have pictures
    assert "![pictures, numbered as the prompts](fig4.png)" in pictures.report(work, "fig4")
    Image.new("RGB", (63, 8)).save(work.picture(cells[1]))
    with pytest.raises(ConfigError, match="does not hold 8 pictures side by side"):
        pictures.picture(work, "fig4")
    work.rows.add(work.rows.get(cells[0]) | {"broke": "step 9: NaN"})
    page = pictures.report(work, "fig4")
    assert "ReFL-10 broke down, so there are no pictures of it: step 9: NaN." in page
    assert "is missing" not in page


def test_processor_time_is_compared_seed_by_seed_and_without_broken_runs():
    ours = {0: {"cpu_seconds": 30.0}, 1: {"cpu_seconds": 2.0, "broke": "NaN"}, 2: {"cpu_seconds": 9.0}}
    drtune = {0: {"cpu_seconds": 20.0}, 1: {"cpu_seconds": 10.0}, 3: {"cpu_seconds": 7.0}}
    assert table1._times(ours, drtune) == [1.5]
    tables = {"symmetry": {method: {} for method in METHODS}}
    whole = {"updates": 1, "evaluations": 8, "seconds": 1.0}
    tables["symmetry"] |= {"DRTune": {0: whole | drtune[0]}, "ReFL-10": {0: whole | ours[0]}}
    told = {line[0]: line[-1] for line in table1._bought(tables)}
    assert [told[name].split()[0] for name in ("ReFL-10", "DRTune")] == ["1.5", "1"]
    assert told["DRaFT-LV"] == "not run"
    tables["symmetry"]["DRTune"] = {}
    assert {line[0]: line[-1] for line in table1._bought(tables)}["ReFL-10"] == "–"  # it was run


def row(cell, native, value, moved=None):
    trace = [look(0, 0.5, 1.0), look(100, 0.4, 0.97)]
    scores = {native: [value, 0.01], "reward": [value, 0.01], "symmetry": [0.4, 0.01], "clipscore": [0.9, 0.01]}
    scores[native] = [value, 0.01]
    facts = {"updates": 10, "evaluations": 100, "cpu_seconds": 50.0, "seconds": 60.0, "trained": 2.0, "grad_norm": 1.0}
    return {"cell": json.loads(cell.key), "scores": scores, "trace": trace, "moved": moved, **facts}


def searched(work, method, reward, score=lambda lr: lr):
    """Rows of a search, as it asks for them; unless told otherwise the highest rate is the best."""
    while cells := work.rows.missing(work.search(method, reward)):
        for cell in cells:
            work.rows.add(row(cell, reward, score(cell.lr)))


def filled(tmp_path, *, setting, seeds=3):
    """Rows in which DRTune's symmetry is 0.1 and the others' 0.3, 0.31, ..., and the highest rate is always chosen."""
    work = Work(setting=replace(setting_of(setting), seeds=tuple(range(seeds))), folder=tmp_path / setting)
    rows = work.rows
    for k, method in enumerate(METHODS):
        searched(work, method, "symmetry")
        for seed in range(seeds):
            cell = work.cell(method, "symmetry", seed, lr=work.lr(method, "symmetry"))
            value = 0.1 if method == "DRTune" else 0.3 + 0.01 * k
            rows.add(row(cell, "symmetry", value + 0.001 * seed, {"0": 0.02, "19": 0.04}))
    return work


def test_table_1_says_who_wins_and_what_is_missing(tmp_path):
    work = filled(tmp_path, setting="playground")
    assert work.lr("DRTune", "symmetry") == max(work.setting.lrs)
    page = table1.report(work)
    assert "18 of 126 runs" in page
    line = next(x for x in page.splitlines() if x.startswith("| DRTune"))
    assert line == "| DRTune | **0.101 ± 0.001** |" + " not run |" * 6
    assert page.count("**0.101") == 1
    paper = page.partition("## The paper's")[2].partition("##")[0]
    assert [x.count("**") for x in paper.splitlines() if x.startswith("|")] == [0] * 7 + [14]  # DRTune wins its table
    claim = next(x for x in page.splitlines() if "symmetry: DRTune is better than every" in x)
    assert "the best other, ReFL-10," in claim  # 0.3 is the next
    assert claim.endswith("| holds |")
    assert next(x for x in page.splitlines() if "hpsv2: DRTune" in x).endswith("| not run |")
    assert "| ReFL-10 | 0.7512 | 0.3918 | 0.0029 |" in page  # the paper's own
    assert "at 98% of the untuned CLIPScore DRTune is more symmetric than DRaFT-LV" in page
    assert "| DRTune | >0.0027 (0.0003: 0.0003, 0.0009: 0.0009, 0.0027: 0.0027) | not run |" in page
    measured = page.split("## All that was measured where symmetry was trained")[1].split("##")[0].splitlines()
    assert measured[2] == "| method | symmetry | reward | clipscore | moved at step 0 | moved at step 19 |"
    assert measured[-2].startswith("| DRTune | 0.101 ± 0.001 |")
    assert measured[-2].endswith("| 0.02 ± 0 | 0.04 ± 0 |")


def ablated(a, tmp_path, value):
    """Rows of an ablation: `value(variant)` and a little for the seed."""
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    a = a.on(work.setting)
    for method in a.searched():
        searched(work, method, a.reward)
    for variant in a.variants:
        for cell in a.cells(work, variant):
            work.rows.add(row(cell, a.reward, value(variant) + 0.001 * cell.seed + 0.0001 * (cell.seed == 2)))
    return {claim.says: claim for claim in a.told(a, work, work.rows)}


def test_claims_of_the_sweeps_follow_the_rows(tmp_path):
    found = ablated(
        ablations.FIG8, tmp_path / "8", lambda v: {0.1: 0.5, 0.2: 0.6}.get(v.x, 0.3) if v.T == 20 else 1 - v.x
    )
    assert {says: claim.verdict for says, claim in found.items()} == {
        "K = 0.1 T is best at T = 10": "holds",
        "K = 0.1 T is best at T = 20": "fails",
        "K = 0.1 T is best at T = 40": "holds",
    }
    assert "the best other, T=20, K=4," in found["K = 0.1 T is best at T = 20"].figure


@pytest.mark.parametrize(("broken", "verdict"), [(0, "fails"), (1, "cannot be told here"), (3, "holds")])
def test_a_run_that_broke_down_failed_to_optimise(tmp_path, broken, verdict):
    a, work = ablations.FIG6, Work(setting=setting_of("playground"), folder=tmp_path)
    for method in a.searched():
        searched(work, method, a.reward)
    for cell in a.cells(work, a.of("DRaFT-T")):
        found = row(cell, "hpsv2", 0.5)
        last = math.nan if cell.seed < broken else 0.6 + 0.01 * cell.seed
        found["trace"] = [{"scores": {"hpsv2": 0.5}}, {"scores": {"hpsv2": last}}]
        work.rows.add(found | ({"broke": "step 3: NaN"} if cell.seed < broken else {}))
    claim = next(c for c in a.told(a, work, work.rows) if "fails to optimise" in c.says)
    assert claim.verdict == verdict
    assert (f"broke down in {broken} of 3 runs" in claim.figure) == (broken > 0)


def test_claims_of_pairs_follow_the_rows(tmp_path):
    found = ablated(ablations.SPACING, tmp_path, lambda v: {"random": 0.5, "equally spaced": 0.6}.get(v.label, 0.55))
    assert [claim.verdict for claim in found.values()] == ["holds", "fails"]
    assert "equally spaced 0.6" in found["equally spaced steps beat random ones"].figure


def test_the_paper_s_table_is_whole():
    assert PAPER.keys() == setting_of("playground").tasks.keys()
    assert [*PAPER, "imagereward"] == sorted(setting_of("sd15").tasks, key=[*PAPER, "imagereward"].index)
    assert all(len(values) == len(METHODS) for values in PAPER.values())
    for reward, values in PAPER.items():
        less = setting_of("sd15").tasks[reward].less
        assert values[-1] == (min if less else max)(values), f"DRTune is bold for {reward} in the paper"


@pytest.mark.parametrize(
    ("reached", "verdict"),
    [
        ([10, 11, 12], "holds"),
        ([17, 18, 19], "fails"),  # fewer iterations, and by no means half of them
        ([10, 15, 19], "cannot be told here"),
    ],
)
def test_half_of_the_iterations_is_told_from_a_few_less(reached, verdict, tmp_path):
    """AlignProp ends at 1 after 20 updates; with stop-gradient the curve is there after `reached`."""
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    for method in ("AlignProp", "AlignProp + sg"):
        searched(work, method, "hpsv2")
        for seed, updates in enumerate(reached):
            end = 20 if method == "AlignProp" else updates
            rate = work.lr(method, "hpsv2")
            cell = work.cell(method, "hpsv2", seed, lr=rate, T=None, options=(), count=work.setting.counted)
            trace = [{"updates": u, "scores": {"hpsv2": value}} for u, value in ((0, 0.0), (end, 1.0))]
            work.rows.add({"cell": json.loads(cell.key), "trace": trace})
    told = ablations._iterations(ablations.FIG6, work, work.rows, "hpsv2")
    assert told.verdict == verdict
    assert told.figure == f"{sum(reached) / 60:.4g} of them, on the looks' 32 pictures"


@pytest.mark.parametrize(
    ("ends", "looks", "verdict"),
    [
        (0.80, [(60, 0.59)] * 3, "fails"),
        (0.80, [(36, 0.75)] * 3, "fails"),  # three quarters of the updates
        (0.80, [(35, 0.75)] * 3, "cannot be told here"),  # it had no time to get there
        (0.80, [(60, 0.59), (60, 0.59), (20, 0.81)], "cannot be told here"),
        (0.80, [(60, 0.59)], "cannot be told here"),  # one seed
        (0.50, [(60, 0.59)] * 3, "cannot be told here"),  # AlignProp fell, and this never was below it
    ],
)
def test_a_reward_that_is_never_reached_is_no_half_of_the_iterations(ends, looks, verdict, tmp_path):
    """AlignProp ends at `ends` after 48 updates; with stop-gradient each seed ends with a look of (updates, reward)."""
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    for method, seeds in (("AlignProp", [(48, ends)] * len(looks)), ("AlignProp + sg", looks)):
        searched(work, method, "hpsv2")
        for seed, last in enumerate(seeds):
            rate = work.lr(method, "hpsv2")
            cell = work.cell(method, "hpsv2", seed, lr=rate, T=None, options=(), count=work.setting.counted)
            trace = [{"updates": u, "scores": {"hpsv2": value}} for u, value in ((0, 0.6), last)]
            work.rows.add({"cell": json.loads(cell.key), "trace": trace})
    told = ablations._iterations(ablations.FIG6, work, work.rows, "hpsv2")
    assert told.verdict == verdict
    assert "reached" in told.figure


def test_a_rate_that_broke_the_run_is_not_chosen(tmp_path):
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    searched(work, "DRTune", "hpsv2", {1e-4: 0.2, 3e-4: 0.1, 9e-4: float("nan")}.get)
    assert work.lr("DRTune", "hpsv2") == 1e-4


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-4, {1e-4, 3e-4, 9e-4}),
        (3e-4, {1e-4, 3e-4, 9e-4}),  # an edge of the middle two: its neighbour is tried
        (9e-4, {3e-4, 9e-4, 2.7e-3}),
        (2.7e-3, {3e-4, 9e-4, 2.7e-3}),
    ],
)
def test_a_search_goes_on_while_the_best_lies_at_the_edge(best, tried, tmp_path):
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    assert work.lr("DRTune", "hpsv2") is None
    searched(work, "DRTune", "hpsv2", lambda lr: -abs(math.log(lr / best)))
    assert work.lr("DRTune", "hpsv2") == best
    assert set(work.searched("DRTune", "hpsv2")) == tried
    one = replace(work.setting, lrs=(2e-5,))
    assert Work(setting=one, folder=tmp_path).lr("DRTune", "hpsv2") == 2e-5
    assert Work(setting=one, folder=tmp_path).search("DRTune", "hpsv2") == []


@pytest.mark.parametrize("name", NAMES)
def test_every_page_can_be_made_before_anything_ran(name, tmp_path):
    page = bench(name, results=tmp_path, only_report=True, plots=False)
    text = page.read_text()
    assert "not run" in text or "0 of" in text
    tables = text.count("| claim | here |")
    assert tables == (2 if name == "table1" else 1)
    assert text.count("\n".join(JUDGED)) == tables
    assert not (tmp_path / "playground" / "rows.jsonl").exists()


def test_wrong_words_are_refused_with_the_nearest(tmp_path):
    for given, words in (
        ({"name": "table2"}, "did you mean 'table1'"),
        ({"name": "table1", "setting": "playgroud"}, "did you mean 'playground'"),
        ({"name": "table1", "rewards": ["symetry"]}, "did you mean 'symmetry'"),
    ):
        with pytest.raises(ConfigError, match=words):
            bench(given.pop("name"), results=tmp_path, only_report=True, plots=False, **given)


def test_options_that_mean_nothing_are_refused(tmp_path, monkeypatch):
    for given, words in (
        ({"name": "fig6", "rewards": ["symmetry"]}, "--reward symmetry: only table1 takes rewards"),
        ({"name": "table1", "lrs": [-1.0]}, "--lr -1: give a positive number"),
        ({"name": "table1", "lrs": [float("nan")]}, "--lr nan"),
        ({"name": "table1", "budget": float("inf")}, "--budget inf"),
    ):
        with pytest.raises(ConfigError, match=words):
            bench(given.pop("name"), results=tmp_path, only_report=True, plots=False, **given)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no folder docs/results/bench: run it in a checkout.* --results"):
        bench("table1", only_report=True, plots=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(table1, "run", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file is a file, not a folder; choose another --results"):
        bench("table1", results=tmp_path / "file", plots=False)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr("os.access", lambda path, mode: os.path.basename(path) != "rows.jsonl")
    (tmp_path / "playground").mkdir()
    (tmp_path / "playground" / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rows.jsonl is not writable: mend that, or choose another --results"):
        bench("table1", results=tmp_path, plots=False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"playground is not writable; choose another --results"):
        bench("table1", results=tmp_path, plots=False)
    assert bench("table1", results=tmp_path, only_report=True, plots=False).exists()


def test_a_page_says_by_which_command_and_on_what_it_was_made(tmp_path):
    work = filled(tmp_path, setting="playground", seeds=1)
    page = bench("table1", results=tmp_path, seeds=1, rewards=["symmetry"], only_report=True, plots=False).read_text()
    assert "`rewardtune bench table1 --setting playground --seeds 1`: 6 of 42 runs" in page
    assert page.endswith("Rows made with: not recorded.\n")
    (one,) = [r for r in work.rows if r["cell"]["method"] == "DRTune" and r["cell"]["judged"] == "final"]
    assert made_by([one | {"on": {"device": "x", "torch": "2"}}] * 2) == ["", "Rows made with: device x, torch 2."]
    assert made_by([]) == []
    assert "![symmetry]" not in page  # --no-plots
    assert "Rows made with" not in bench("fig6", results=tmp_path, only_report=True, plots=False).read_text()


def test_a_sum_is_shown_with_its_parts(tmp_path):
    page = table1.report(filled(tmp_path, setting="playground"))
    sums = page.partition("For symmetry the sum of symmetry (weight 1), clipscore (weight 2.5) is trained")[2]
    line = next(x for x in sums.splitlines() if x.startswith("| ReFL-10"))
    assert line == "| ReFL-10 | 0.301 ± 0.001 | 0.9 ± 0 | 0.301 ± 0.001 |"


def test_means_that_are_compared_are_over_the_same_seeds():
    table = {"a": {0: {"v": 1}, 1: {"v": 2}}, "b": {1: {"v": 3}, 2: {"v": 4}}, "not run": {}}
    assert table1.shared_seeds(table) == {"a": {1: {"v": 2}}, "b": {1: {"v": 3}}, "not run": {}}
    assert table1.shared_seeds({"a": {}, "b": {}}) == {"a": {}, "b": {}}


def test_searched_prompts_are_neither_trained_nor_judged_on():
    for lists in map(lists_of, ("symmetry", "objectness")):
        assert len(lists["search"]) == 48
        assert len(lists["final"]) == 400
        sets = [set(prompts) for prompts in lists.values()]
        assert not sets[0] & sets[1]
        assert not sets[2] & (sets[0] | sets[1])
    assert all(" heart" in prompt for prompt in lists["final"])


def test_a_list_for_training_and_judging_is_split():
    lists = setting_of("sd15").tasks["objectness"].prompts(search=48, final=100)
    assert len(lists["final"]) >= 20
    assert len(lists["train"]) >= 40
    assert not set(lists["final"]) & {*lists["train"], *lists["search"]}


def lists_of(reward):
    return setting_of("playground").tasks[reward].prompts(search=48, final=400)


def test_growth_of_the_gradient_norm_is_told():
    T = 20
    rows = [
        {
            "full": {str(K): (K if K <= 6 else 6 * (K / 6) ** 3) * (1 + seed / 100) for K in gradients.counts(T)},
            "stopped": {str(K): K * (1 + seed / 50) for K in gradients.counts(T)},
        }
        for seed in range(3)
    ]
    assert [c.verdict for c in gradients.claims(rows, T)][:2] == ["holds", "holds"]
    flat = [{"full": r["stopped"], "stopped": r["stopped"]} for r in rows]
    assert gradients.claims(flat, T)[0].verdict != "holds"


def test_a_plot_is_drawn(tmp_path):
    found = {"a": [[(0, 1), (1, 2)], [(0, 1.5), (1.1, 2.5)]], "nothing": []}
    path = plots.lines(found, tmp_path / "p.png", x="x", y="y", title="t")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plots._mean(found["a"]) == [(0, 1.25), (1.05, 2.25)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib import figure

    figures, saved = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k)))
    return figures


def test_a_plot_has_a_panel_for_each_heading_and_a_log_axis_for_decades(tmp_path, drawn):
    found = {"a": [[(0, 1), (1, 0.05)]], "b": [[(0, 1), (1, 0.5)]], "c": [[(0, 1), (1, -0.5)], [(0, 1), (1, -0.6)]]}
    panels = {"a": "first", "b": "second", "c": "second"}
    plots.lines(found, tmp_path / "p.png", x="x", y="y", title="t", panels=panels)
    first, second = drawn[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["first", "second"]
    assert first.get_yscale() == "log"  # 1 to 0.05
    assert second.get_yscale() == "linear"
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["b (1 of 2 seeds)", "c"]
    faint = [line for line in second.lines if line.get_alpha() == 0.3]
    assert len(faint) == 3  # one a seed


def test_one_line_that_would_squeeze_the_others_leaves_the_axis_and_the_legend_says_so(tmp_path, drawn):
    found = {"a": [[(0, 1), (1, 1.2)]], "b": [[(0, 1), (1, 1.1)]], "far": [[(0, 1), (1, 0.5)], [(0, 1), (1, 0.4)]]}
    plots.lines(found, tmp_path / "p.png", x="x", y="y", title="t")
    (axes,) = drawn[0].axes
    assert axes.get_ylim() == pytest.approx((0.99, 1.21))  # of a and b, and a margin
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "a (1 of 2 seeds)",
        "b (1 of 2 seeds)",
        "far\nleaves the picture: 0.4 to 1",
    ]
    assert all(tick == round(tick) for tick in axes.get_xticks())  # as all x are
    broke = [[(0, 1), (1, float("nan"))]]
    for kept in (
        found | {"far": [[(0, 1), (1, 0.7)]]},  # no more than three times the others' range
        found | {"far too": found["far"]},  # no single one
        {name: found[name] for name in ("a", "far")},  # nothing else to tell apart
        found | {"far": broke},
        dict.fromkeys(found, broke),
        {"a": [[(0, 1), (1, 1)]], "b": [[(0, 1), (1, 1)]], "far": found["far"]},  # others without a range
    ):
        plots.lines(kept, tmp_path / "p.png", x="x", y="y", title="t")
        assert not any("leaves" in text.get_text() for text in drawn[-1].axes[0].get_legend().get_texts())


def test_the_plot_of_fig6_has_a_panel_for_each_method_with_the_looks_of_its_variants(tmp_path, monkeypatch):
    a, work = ablations.FIG6, Work(setting=setting_of("playground"), folder=tmp_path)
    level = {v.label: 0.1 * k for k, v in enumerate(a.variants)}
    for v in a.variants:
        searched(work, v.method, "hpsv2", (lambda lr: -lr) if v.method == "AlignProp" else (lambda lr: lr))
        for cell in a.cells(work, v):
            trace = [{"evaluations": 100, "scores": {"hpsv2": level[v.label] + 0.01 * cell.seed}}]
            work.rows.add(row(cell, "hpsv2", 0.5) | {"trace": trace})
    asked = {}
    monkeypatch.setattr(plots, "lines", lambda found, path, **given: asked.update(given, found=found))
    ablations.picture(a, work)
    rates = [0.0001 if v.label == "AlignProp" else 0.0027 for v in a.variants]
    labels = [f"{v.label}, lr {rate:g}" for v, rate in zip(a.variants, rates, strict=True)]
    assert list(asked["found"]) == labels
    assert [asked["panels"][label] for label in labels] == ["DRaFT-T"] * 4 + ["AlignProp"] * 4
    for v, label in zip(a.variants, labels, strict=True):
        assert asked["found"][label] == [[(100, level[v.label] + 0.01 * seed)] for seed in range(3)]


@pytest.fixture(scope="module")
def cell():
    return Cell(
        setting="playground-quick", reward="symmetry", method="DRTune", lr=1e-3, seed=0, T=4, budget=60.0, count=2
    )


@pytest.mark.slow  # trains twice: half a minute
def test_a_run_is_that_of_the_trainer(cell, tmp_path):
    """The row's looks are those of a RewardTuner with the same settings and updates."""
    made = run_cell(cell, COST, pictures=tmp_path / "strip.png")
    config, tuner = open_cell(cell, folder=str(tmp_path / "run"), updates=made["updates"])
    law = law_of(cell)
    batch = setting_of(cell.setting).batch
    assert made["updates"] == updates_within(60.0, law, 4, seed=0, batch=batch, cost=COST)
    result = tuner.train(made["updates"], lr=1e-3, clip=config.optim.clip)
    assert made["trace"][-1]["scores"]["symmetry"] == pytest.approx(result.after["symmetry"][0], rel=1e-6)
    assert made["trace"][-1]["evaluations"] == made["evaluations"] <= 60
    assert {"symmetry", "clipscore", "hpsv2", "reward", "pairwise_distance"} <= made["scores"].keys()
    assert made["moved"]["0"] > 0
    # what the tables show is the tuned model's: sampled once more, with the LoRA not fused
    prompts = final_prompts(setting_of(cell.setting), cell)
    seeds = [derive_seed("bench", "final", index) for index in range(len(prompts))]
    images = evaluate.sample(tuner.pipe, prompts, seeds=seeds, call=tuner.call)
    tuned = float(tuner.reward.parts(images, prompts)[0].mean())
    assert made["scores"]["reward"][0] == pytest.approx(tuned, rel=1e-3)
    tuner.denoiser.disable_adapters()
    untuned = evaluate.sample(tuner.pipe, prompts, seeds=seeds, call=tuner.call)
    assert float((images - untuned).abs().max()) > 1e-3
    assert float(tuner.reward.parts(untuned, prompts)[0].mean()) != pytest.approx(tuned, rel=1e-3)
    assert (tmp_path / "strip.png").exists()
    json.dumps(made)


@pytest.mark.slow  # trains twice, and judges three times
def test_a_long_run_that_was_cut_off_goes_on(cell, tmp_path, monkeypatch):
    """Killed in its fourth update, then while it was judged: the row is that of a run in one go."""
    from rewardtune.trainer import RewardTuner

    class Killed(BaseException):
        pass

    monkeypatch.setitem(SETTINGS, cell.setting, replace(setting_of(cell.setting), saves=6))
    cell = replace(cell, budget=300.0)
    whole, calls, update = run_cell(cell, COST), [], RewardTuner._update

    def counted(self, *args):
        calls.append(self.step)
        if len(calls) == 4:
            raise Killed
        return update(self, *args)

    def killed(*_):
        raise Killed

    monkeypatch.setattr(RewardTuner, "_update", counted)
    with pytest.raises(Killed):
        run_cell(cell, COST, folder=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(cells, "sample", killed)
        with pytest.raises(Killed):
            run_cell(cell, COST, folder=tmp_path / "run")
    found = run_cell(cell, COST, folder=tmp_path / "run")
    assert calls[3] == 3
    assert 0 < calls[4] <= 3  # went on from a checkpoint
    assert calls[4:] == list(range(calls[4], whole["updates"]))  # and was not trained again to be judged
    for key in ("updates", "evaluations", "scores", "moved"):
        assert found[key] == whole[key]
    assert [x["scores"] for x in found["trace"]] == [x["scores"] for x in whole["trace"]]


def test_two_commands_are_not_at_one_run(cell, tmp_path):
    folder = tmp_path / "runs" / "a"
    with cells._held(folder):
        with pytest.raises(ConfigError, match="another command is at this run"):
            run_cell(cell, COST, folder=folder)
        with cells._held(tmp_path / "runs" / "b"), cells._held(None):
            pass
    with cells._held(folder):
        pass


def test_a_run_cut_off_before_its_first_checkpoint_begins_anew_and_another_is_refused(cell, tmp_path):
    opened = {"folder": str(tmp_path / "run"), "updates": 2}
    _, tuner = open_cell(cell, **opened)
    tuner.folder.open()
    tuner.folder.set_status("running")
    with pytest.raises(ConfigError, match="--overwrite"):
        open_cell(cell, **opened)
    config, tuner = open_cell(cell, **opened, cut_off=True)
    cells.launch.train_as(config, tuner)
    with pytest.raises(CheckpointError, match=r"optim.lr: (.|\n)*To begin this run anew, remove .*run$"):
        open_cell(replace(cell, lr=2e-3), **opened, cut_off=True)


def test_runs_are_kept_where_the_setting_says_so_until_their_row_is_there(tmp_path, monkeypatch):
    asked = []

    def run(cell, cost, pictures, folder):
        asked.append(folder)
        if folder is not None:
            folder.mkdir(parents=True)
        return row(cell, "hpsv2", 0.5) | {"on": {}}

    monkeypatch.setattr("rewardtune.bench.work._run", run)
    monkeypatch.setattr(Work, "_pool", lambda self, devices: ThreadPoolExecutor(1))
    for saves in (0, 20):
        setting = replace(setting_of("playground"), saves=saves)
        work = Work(setting=setting, folder=tmp_path / str(saves), say=list)
        work.do([work.cell("DRTune", "hpsv2", seed, lr=1e-3) for seed in range(2)])
    assert setting_of("sd15").saves == 20
    assert asked[:2] == [None, None]
    assert asked[2] != asked[3]
    assert not list((tmp_path / "20" / "runs").iterdir())


def test_a_run_that_breaks_down_is_a_row(cell, monkeypatch, tmp_path):
    """NaN all over and the reason: the rate is the worst of a search, the table says so, and nothing is run again."""

    def stops(config, tuner):
        tuner.folder.path.mkdir(exist_ok=True)
        (tuner.folder.path / "metrics.jsonl").write_text("")
        look = {"step": 0, "scores": {"symmetry": [0.5, 0.1], "clipscore": [0.7, 0.1], "reward": [1.2, 0.1]}}
        (tuner.folder.path / "eval.jsonl").write_text(json.dumps(look) + "\n")
        tuner.watch.history.append("the look at step 0")
        raise TrainingStopped("step 0: pictures with NaN")

    monkeypatch.setattr(cells.launch, "train_as", stops)
    made = json.loads(json.dumps(run_cell(cell, COST)))
    assert (made["broke"], made["updates"], made["evaluations"]) == ("step 0: pictures with NaN", 0, 0)
    assert {"symmetry", "clipscore", "hpsv2", "reward", "pairwise_distance"} <= made["scores"].keys()
    assert all(math.isnan(mean) for mean, _ in made["scores"].values())
    assert [look["scores"]["symmetry"] for look in made["trace"]] == pytest.approx([0.5, math.nan], nan_ok=True)
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(made)
    assert Rows(rows.path).missing([cell]) == []
    assert table1.spread([0.5, made["scores"]["symmetry"][0]]) == "broke down in 1 of 2 runs"
    work = Work(setting=setting_of("playground"), folder=tmp_path / "page")
    searched(work, "DRTune", "symmetry")
    final = work.cell("DRTune", "symmetry", 0, lr=work.lr("DRTune", "symmetry"))
    work.rows.add({**made, "cell": json.loads(final.key)})
    page = table1.report(work)
    assert "| DRTune | broke down in 1 of 1 runs |" in page
    table1.picture(work)
    assert (work.folder / "table1_symmetry.png").exists()


def test_a_rival_that_broke_down_leaves_a_claim_open():
    told = best("x", {0: 2.0, 1: 2.1}, {"a": {0: math.nan, 1: 1.0}, "b": {0: 1.0, 1: 1.1}}, less=False, name="ours")
    assert told.verdict == "cannot be told here"
    assert "the best other, b, 1.05" in told.figure


def test_one_method_that_cannot_run_keeps_no_other_from_its_page(tmp_path, monkeypatch):
    """As LeapAlign on a sampler that it refuses: it fails once, DRTune is run and shown, then the error comes."""

    def run(cell, cost, *_):
        if cell.method == "LeapAlign":
            raise PreflightError("not this sampler")
        scores = {"scores": {"hpsv2": [0.5, 0.1], "reward": [cell.lr, 0.1]}, "grad_norm": 1.0, "trained": 2, "on": {}}
        return {"cell": json.loads(cell.key), "updates": 9, "cpu_seconds": 1.0, "cost": {}, **scores}

    monkeypatch.setattr("rewardtune.bench.work._run", run)
    monkeypatch.setattr(Work, "_pool", lambda self, devices: ThreadPoolExecutor(1))
    variants = tuple(v for v in ablations.ABLATIONS["newer"].variants if v.method in ("DRTune", "LeapAlign"))
    monkeypatch.setitem(
        ablations.ABLATIONS, "newer", replace(ablations.ABLATIONS["newer"], variants=variants, told=lambda *_: [])
    )
    with pytest.raises(
        ConfigError, match=r"runs that failed: 2; the others are kept and in .*newer.md:\n.*LeapAlign.*not this sampler"
    ):
        bench("newer", results=tmp_path, plots=False, say=list)
    page = (tmp_path / "playground" / "newer.md").read_text()
    assert "| DRTune | 0.5 ± 0 |" in page
    assert "| LeapAlign | not run |" in page


def test_the_untuned_model_is_judged_as_it_is(cell, monkeypatch):
    made = run_cell(replace(cell, method=BASE, lr=0.0), COST)
    assert made["updates"] == made["evaluations"] == 0
    assert made["moved"] is None
    assert 0 < made["scores"]["symmetry"][0] < 2
    assert "first" not in made
    monkeypatch.setattr(cells, "setting_of", lambda name: replace(setting_of(name), counted=cell.count))
    more = run_cell(replace(cell, method=BASE, lr=0.0, count=cell.count + 1), COST)  # judged on one more
    assert more["scores"]["symmetry"] != made["scores"]["symmetry"]
    for name, value in made["scores"].items():
        assert more["first"][str(cell.count)][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_missing_runs_are_made_once(cell, tmp_path):
    said = []
    setting = replace(setting_of(cell.setting), count=2)
    work = Work(setting=setting, folder=tmp_path, devices=("cpu",), say=said.append)
    (tmp_path / "cost.json").write_text(json.dumps(asdict(COST)))
    base = work.cell(BASE, "symmetry", 0, lr=0.0)
    work.do([base, base])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
    assert work.picture(base).exists()
    said.clear()
    work.do([base])
    assert not said


def _fails_for_seed_1(cell, device):
    if cell.seed == 1:
        raise ConfigError(f"no luck on {device}")
    return {"cell": json.loads(cell.key)}


def _cannot_be_kept(cell, device):
    raise CannotWrite(f"the disk of {device} is full")


def _dies(cell, device):
    os._exit(1)


def test_an_ablation_shows_what_training_began_from(tmp_path):
    a = ablations.ABLATIONS["fig8"].on(setting_of("playground"))
    work = Work(setting=setting_of("playground"), folder=tmp_path)
    base = list(a.untuned(work).values())
    assert [(cell.method, cell.T, cell.count) for cell in base] == [(BASE, T, 128) for T in (20, 10, 40)]
    work.rows.add(row(base[1], "hpsv2", 0.625))
    page = a.report(work)
    assert "| T=20, untuned | not run |" in page
    assert "| T=10, untuned | 0.625 |" in page
    assert "| untuned | not run |" in ablations.FIG6.report(work)


def test_runs_are_announced_and_a_failed_one_loses_no_other(cell, tmp_path, monkeypatch):
    said = []
    work = Work(setting=setting_of(cell.setting), folder=tmp_path, say=said.append)
    monkeypatch.setattr(work, "_pool", lambda devices: ThreadPoolExecutor(len(devices)))
    cells = [replace(cell, seed=seed) for seed in range(3)]
    work.each(cells, _fails_for_seed_1)
    assert work.failed == [f"{cells[1]}: no luck on cpu"]
    told = [line.split(": ")[0] for line in said[1:]]
    assert told == ["started", f"1/3 {cell}", "started", "failed", "started", f"3/3 {cells[2]}"]
    assert "to go" in said[2]
    assert "to go" not in said[-1]
    assert Rows(work.rows.path).missing(cells) == [cells[1]]


def test_runs_that_could_not_be_kept_are_not_begun(cell, tmp_path, monkeypatch):
    work = Work(setting=setting_of(cell.setting), folder=tmp_path)
    monkeypatch.setattr(work, "_pool", lambda devices: ThreadPoolExecutor(len(devices)))
    cells = [replace(cell, seed=seed) for seed in range(3)]
    with pytest.raises(CannotWrite, match="the disk of cpu is full; 3 runs are missing, those before are kept"):
        work.each(cells, _cannot_be_kept)
    assert work.failed == [f"{cells[0]}: the disk of cpu is full", *(f"{c}: not started" for c in cells[1:])]


def test_a_row_that_could_not_be_kept_ends_the_whole_experiment(tmp_path, monkeypatch):
    """The search and the next reward do not go on with it."""
    work, started = Work(setting=setting_of("playground"), folder=tmp_path, devices=("cpu", "cpu")), []
    monkeypatch.setattr(work, "_pool", lambda devices: ThreadPoolExecutor(len(devices)))
    monkeypatch.setattr(
        "rewardtune.bench.work._run", lambda cell, *_: started.append(cell) or row(cell, "hpsv2", cell.lr)
    )
    work.rows.path.mkdir()  # no row can be written
    with pytest.raises(CannotWrite, match="it is a folder"):
        table1.run(work, ["hpsv2", "aesthetic"])
    assert len(started) == 2
    assert not any(work.rows.get(cell) for cell in started)


def _is_terminated(cell, device):
    if cell.seed == 1:
        raise SystemExit(143)
    return {"cell": json.loads(cell.key)}


def test_a_run_that_is_terminated_loses_no_other(cell, tmp_path, monkeypatch):
    work = Work(setting=setting_of(cell.setting), folder=tmp_path)
    monkeypatch.setattr(work, "_pool", lambda devices: ThreadPoolExecutor(len(devices)))
    cells = [replace(cell, seed=seed) for seed in range(3)]
    work.each(cells, _is_terminated)
    assert work.failed == [f"{cells[1]}: 143"]
    assert work.rows.missing(cells) == [cells[1]]


def test_an_interrupted_command_says_what_is_kept(cell, tmp_path, monkeypatch):
    said = []
    work = Work(setting=setting_of(cell.setting), folder=tmp_path, say=said.append)
    monkeypatch.setattr(work, "_pool", lambda devices: ThreadPoolExecutor(len(devices)))
    monkeypatch.setattr("rewardtune.bench.work.wait", lambda *_, **__: _interrupt())
    with pytest.raises(KeyboardInterrupt):
        work.each([cell], _fails_for_seed_1)
    assert said[-1].startswith("interrupted: every row that was printed is kept")


def _interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_process_that_dies_fails_what_is_left_and_says_so(cell, tmp_path):
    work = Work(setting=setting_of(cell.setting), folder=tmp_path)
    cells = [replace(cell, seed=seed) for seed in range(2)]
    work.each(cells, _dies)
    assert [line.rsplit(": ", 1)[0] for line in work.failed[-1:]] == [str(cells[1])]
    assert "terminated abruptly" in work.failed[0]
    assert work.failed[1].endswith(": not started")


def test_quick_settings_are_small_and_apart():
    for name in ("playground", "sd15"):
        whole, small = SETTINGS[name], SETTINGS[f"{name}-quick"]
        assert small.budget < whole.budget
        assert small.search_budget == small.budget / 2
        assert len(small.seeds) == len(small.lrs) == 1
