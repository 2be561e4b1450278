"""`eval` and `compare` against what can be recomputed from the pictures on disk, and what they refuse."""

import errno
import json
import math
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import made_run, save_tiny, write_run

from rewardtune import rewards
from rewardtune.candidates import Candidate, Settings
from rewardtune.cli import main
from rewardtune.compare import compare_candidates, evaluate_candidates, folder_names, prepare, slug
from rewardtune.config import Model, Part, load_config
from rewardtune.pictures import open_image
from rewardtune.prompts import with_categories
from rewardtune.runfolder import LORA_FILE, RunFolder, cannot_write
from rewardtune.stats import paired_difference, win_rate
from rewardtune.watch import Watch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Of the command, with the pictures that it took itself."""
    folder = tmp_path_factory.mktemp("a")
    values = {"optim": {"steps": 2, "lr": 3e-2, "batch": 2}, "eval": {"count": 3}}
    guards = {"rewards": ["symmetry"], "features": "playground"}
    assert main(["train", str(write_run(folder, model, output_dir=str(folder / "a"), guards=guards, **values))]) == 0
    return folder / "a"


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("b") / "b", model, seed=5, reward="symmetry", eval={"count": 3})


@pytest.fixture(scope="module")
def evaluated(run):
    return evaluate_candidates([str(run), f"{run}@0.5"], seeds=2)


def images(folder: Path) -> torch.Tensor:
    return torch.stack([open_image(file)[0] for file in sorted(folder.glob("*.png"))])


def test_the_pictures_are_those_of_the_run_itself(evaluated, run):
    """The first seed of each prompt: before training the base's, after it the candidate's."""
    place = run / "eval" / "eval"
    assert torch.equal(images(place / "base")[::2], images(run / "samples" / "step-000000"))
    assert torch.equal(images(place / "a")[::2], images(run / "samples" / "final"))
    assert not torch.equal(images(place / "a")[::2], images(place / "a")[1::2])


def test_every_number_is_that_of_the_pictures_on_disk(evaluated, run):
    document = json.loads((run / "eval" / "eval.json").read_text())
    assert (document["kind"], document["settings"]["count"], document["settings"]["seeds"]) == ("eval", 3, 2)
    assert document["settings"]["prompts"] == "a list"
    assert [c["label"] for c in document["candidates"]] == ["base", "a", "a@0.5"]
    assert len(document["pictures"]) == 6
    prompts = [picture["prompt"] for picture in document["pictures"]]
    assert prompts == [p for p in ["red heart", "blue star", "green moon"] for _ in range(2)]
    judges = {"brightness": rewards.load("brightness"), "symmetry": rewards.Symmetry()}
    values = {}
    for candidate in document["candidates"]:
        pictures = images(run / "eval" / candidate["folder"])
        for name, judge in judges.items():
            expected = judge.native(pictures, prompts).tolist()
            assert candidate["values"][name] == pytest.approx(expected, rel=1e-5)
            assert candidate["metrics"][name]["value"] == pytest.approx(fmean(expected), rel=1e-5)
            assert candidate["metrics"][name]["low"] <= fmean(expected) <= candidate["metrics"][name]["high"]
            values[candidate["label"], name] = expected
    roles = {name: measure["role"] for name, measure in document["measures"].items()}
    assert [roles[name] for name in ("trained_brightness", "reward", "symmetry", "vendi", "brightness")] == [
        "trained",
        "trained",
        "held_out",
        "guard",
        "guard",  # the measure of the same name
    ]
    assert document["measures"]["symmetry"]["better"] == "less"
    pairs = {(pair["a"], pair["b"]): pair["all"] for pair in document["pairs"]}
    assert set(pairs) == {("a", "base"), ("a@0.5", "base")}
    for (a, b), block in pairs.items():
        clusters = [0, 0, 1, 1, 2, 2]
        change = paired_difference(values[a, "symmetry"], values[b, "symmetry"], clusters)
        assert block["difference"]["symmetry"]["value"] == pytest.approx(change.value, rel=1e-4)
        assert block["difference"]["symmetry"]["low"] == pytest.approx(change.low, rel=1e-4)
        wins = win_rate(values[a, "symmetry"], values[b, "symmetry"], clusters, less=True)
        assert block["win_rate"]["symmetry"]["value"] == wins.value
        assert "base_pixels" not in block["win_rate"]
    weights = [(c["weight"], c["base_steps"], c["sampling"]["num_inference_steps"]) for c in document["candidates"]]
    assert weights == [(None, None, 4), (1.0, None, 4), (0.5, None, 4)]
    assert (run / "eval" / "eval.png").is_file()
    notes = " ".join(document["notes"])
    assert "3 of 3 prompts were trained on" in notes  # eval.prompts is not set: the training prompts serve
    assert "few prompts (3)" in notes


def test_whole_set_metrics_have_jackknife_intervals(evaluated):
    base = evaluated.candidates[0].metrics["vendi"]
    assert 1 <= base.value <= 3
    assert base.low < base.value < base.high
    assert evaluated.pairs[0].all.difference["vendi"].value == pytest.approx(
        evaluated.candidates[1].metrics["vendi"].value - base.value
    )
    assert math.isnan(evaluated.candidates[0].metrics["black"].low)


def test_the_weaker_weight_lies_between(evaluated):
    apart = {pair.a: pair.all.difference["base_pixels"].value for pair in evaluated.pairs}
    assert 0 < apart["a@0.5"] < apart["a"]


def test_a_second_evaluation_leaves_no_older_pictures(run, tmp_path):
    """Fewer prompts, other candidates: of ours the folder holds what the file lists, and no other file is touched."""
    folder = tmp_path / "out" / "eval"
    others = {folder / "base" / "007.png", folder / "real" / "000.png"}
    for path in others:
        path.parent.mkdir(parents=True)
        path.touch()
    first, second = [str(run), f"{run}@0.5"], [f"{run}:base_steps=99", f"{run}:aig=inf", f"{run}:base_steps=3"]
    for specs, options in ((first, {"count": 2}), (second, {"count": 1})):
        found = evaluate_candidates(specs, output=tmp_path / "out", features="playground", **options)
    ours = {folder.parent / one.folder / "000.png" for one in found.candidates}
    assert set(folder.rglob("*.png")) == ours | others
    assert {path.name for path in folder.iterdir()} == {Path(one.folder).name for one in found.candidates} | {"real"}
    notes = [note for note in found.notes if "the base model makes all 4 steps" in note]
    assert [note.partition(": ")[0] for note in notes] == [one.label for one in found.candidates[1:3]]


def test_compare_by_category(run, other, tmp_path, capsys):
    """Two runs of different rewards: every named reward is measured, none of them is held out."""
    table = tmp_path / "p.csv"
    table.write_text("prompt,category\nred heart,hearts\nblue star,stars\ngreen star,stars\npink star,stars\n")
    arguments = ["compare", str(run), str(other), "--prompts", str(table), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "a against b" in out
    assert "  stars" in out
    document = json.loads((tmp_path / "out" / "a-vs-b.json").read_text())
    assert (tmp_path / "out" / "a-vs-b.png").is_file()
    assert [c["label"] for c in document["candidates"]] == ["base", "a", "b"]
    (pair,) = document["pairs"]
    assert (pair["a"], pair["b"], pair["all"]["prompts"]) == ("a", "b", 4)
    assert {kind: block["prompts"] for kind, block in pair["categories"].items()} == {"hearts": 1, "stars": 3}
    roles = {name: measure["role"] for name, measure in document["measures"].items()}
    assert (roles["heldout_brightness"], roles["symmetry"]) == ("trained", "trained")
    assert "reward" not in roles
    values = {c["label"]: c["values"]["symmetry"] for c in document["candidates"]}
    stars = win_rate(values["a"][1:], values["b"][1:], less=True)
    assert pair["categories"]["stars"]["win_rate"]["symmetry"]["value"] == stars.value
    assert pair["categories"]["hearts"]["win_rate"]["symmetry"]["low"] is None  # one prompt has no interval
    assert "vendi" in pair["all"]["difference"]
    assert "vendi" not in pair["categories"]["stars"]["difference"]


def test_a_lora_file_with_everything_named(run, model, tmp_path):
    file = tmp_path / "style.safetensors"
    file.write_bytes((run / LORA_FILE).read_bytes())
    options = {"model": str(model), "steps": 2, "prompts": ["red heart", "blue star"], "output": tmp_path / "out"}
    found = evaluate_candidates([str(file)], rewards=rewards.Symmetry(), **options)
    assert [c.label for c in found.candidates] == ["base", "style"]
    assert found.measures["symmetry"].role == "unknown"  # it may have been trained on anything
    assert "nothing tells what style was trained on" in " ".join(found.notes)
    assert "unknown" in found.as_text()
    assert "vendi" not in found.measures
    assert any("--features" in note for note in found.notes)


def candidate(place, **settings):
    return Candidate(
        spec="x", label="x", place=place and place / LORA_FILE, settings=Settings(model=Model(id="x"), scheduler=None,
        call={}, **settings)
    )  # fmt: skip


def role_of(asked, *tuned):
    """As `eval --reward` gives it, for candidates beside the base model."""
    setup = prepare([candidate(None), *tuned], rewards=asked, prompts=["red heart"])
    return setup.measures[next(name for name in setup.measures if name.endswith(("symmetry", "clipscore")))].role


def test_a_reward_that_was_trained_on_is_not_held_out(tmp_path):
    """The playground's preset trains symmetry with `detach_std`, which changes its gradient and not its value."""
    run = candidate(tmp_path, config=load_config("playground"))
    playground = {"model": "playground"}
    by_name = Part(name="symmetry")
    assert role_of([by_name], run) == "trained"
    assert role_of([Part(name="symmetry", options={"eps": 0.1})], run) == "held_out"  # another value
    assert role_of([Part(name="clipscore", options=playground | {"scale": "logit"})], run) == "trained"
    assert role_of([Part(minimum_of=[by_name, Part(name="brightness")])], run) == "trained"
    assert role_of(rewards.Symmetry(), run) == "trained"
    assert role_of(2 * rewards.load("brightness") - rewards.Symmetry(), run) == "trained"
    other = candidate(tmp_path, config=load_config("playground", ["reward=[brightness]"]))
    assert role_of([by_name], other) == "held_out"
    assert role_of(rewards.Symmetry(), other) == "held_out"
    assert role_of([by_name], other, run) == "trained"


def test_what_a_candidate_was_trained_on_may_be_unknown(tmp_path):
    """Without a run file run.json tells the rewards by name, and a LoRA file tells nothing."""
    facts = {"measures": {"reward": {"role": "trained"}, "symmetry_2": {"role": "trained"}, "vendi": {"role": "guard"}}}
    python, file = candidate(tmp_path, facts=facts), candidate(tmp_path)
    for asked in ([Part(name="symmetry")], rewards.Symmetry()):
        assert role_of(asked, python) == "trained"
        assert role_of(asked, file) == "unknown"
        assert role_of(asked, file, python) == "trained"
    clip = [Part(name="clipscore", options={"model": "playground"})]
    assert role_of(clip, python) == "held_out"
    assert role_of(clip, file, python) == "unknown"


def test_pictures_that_chose_the_weights_are_told(tmp_path):
    """Same prompts, same seed, and the best of several looks kept: the numbers favour it."""
    facts = {"status": "done", "seed": 0, "eval_prompts": ["red heart", "blue star"]}
    (tmp_path / "run.json").write_text("{}")
    found = [candidate(None), candidate(tmp_path, facts=facts)]

    def notes(prompts, **options):
        return " ".join(prepare(found, rewards=rewards.Symmetry(), prompts=prompts, **options).notes)

    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 5, 10)))
    assert "by 1 of these pictures the weights" in notes(["red heart"])
    assert "2 looks (reward)" in notes(["red heart"])
    assert "the weights" not in notes(["red heart"], seed=1)
    assert "the weights" not in notes(["green moon"])
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 10)))
    assert "the weights" not in notes(["red heart"])  # one look at the end is no choice


def test_a_candidate_against_itself_is_a_tie(run, tmp_path):
    found = compare_candidates([str(run), f"{run}@1"], output=tmp_path, count=2, steps=2)
    (pair,) = found.pairs
    assert pair.all.difference["symmetry"].value == 0
    assert pair.all.win_rate["symmetry"].value == 0.5


def test_every_candidate_has_a_folder_of_its_own():
    assert folder_names(["base", "./a", "../a", "a-2", "a@0.7"]) == ["base", "a", "a-2", "a-2-2", "a@0.7"]
    long = slug("-vs-".join(f"runs-of-{i}" * 3 for i in range(20)))
    assert len(long) < 50
    assert long != slug("-vs-".join(f"runs-of-{i}" * 3 for i in range(21)))


def test_what_is_refused(run, model, tmp_path, capsys):
    lora = str(run / LORA_FILE)
    bare = tmp_path / "x.safetensors"
    bare.write_bytes((run / LORA_FILE).read_bytes())
    for arguments, words in [
        (["eval", "nowhere"], "no LoRA at nowhere"),
        (["eval", str(run), "-r", "clipscor"], "did you mean 'clipscore'?"),
        (["eval", str(run), "-o", "version=2.0"], "no --reward is given"),
        (["eval", str(run), "-r", ""], "must not be empty"),
        (["eval", str(run), "--prompts", ""], "prompt file"),
        (["eval", str(run), "--count", "9"], "there are 3 prompts"),
        (["eval", str(bare), "--model", str(model)], "add --output FOLDER"),
        (["eval", str(bare), "--model", str(model), "--output", str(tmp_path)], "add --prompts"),
        (
            [
                *("eval", str(bare), "--model", str(model), "--output", str(tmp_path)),
                *("--prompts", "playground:eval", "--count", "2"),
            ],
            "name some: --reward",
        ),
        (["eval", str(run), "--prompts", "playground:train"], "the prompts are 2000"),
        (["compare", lora], "compare needs two candidates"),
        (["eval", str(run), "--output", lora], "is a file, not a folder; choose another --output"),
        (["sweep", str(run), "--output", lora], "is a file, not a folder; choose another --output"),
        (["sweep", lora], "no run folder"),
        (["eval", str(run), "--name", "../x"], "--name ../x: give a name without a folder"),
        (["eval", str(run), "--name", ".."], "--name ..: give a name without a folder"),
        (["eval", str(run), "--guidance", "inf"], "guidance inf: must be 0 or more"),
        (["eval", str(run), "--steps", "1001"], "steps 1001: must be a whole number from 1 to 1000"),
    ]:
        assert main(arguments) == 2, arguments
        assert words in capsys.readouterr().err, arguments
    assert not list(tmp_path.glob("*/"))  # nothing was sampled


def test_categories_of_prompts(tmp_path):
    rows = with_categories("playground:eval")
    assert {kind for _, kind in rows} == {"one object", "two objects"}
    assert all((" and " in text) == (kind == "two objects") for text, kind in rows)
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "category": "k"}\n"y"\n{"text": "z", "Category": null}\n')
    assert with_categories(tmp_path / "a.jsonl", template="a {}") == [("a x", "k"), ("a y", ""), ("a z", "")]
    for name, words in (("anime", ["p", "q"]), ("photo", ["r"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(words))
    assert with_categories(f"hf:{tmp_path}:anime.json[:1],photo.json") == [("p", "anime"), ("r", "photo")]


def test_overwriting_a_run_removes_its_results(tmp_path):
    for name in ("run.json", "sweep.json", "sweep.png", "eval/eval.json", "sweep/a/000.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path, overwrite=True).open()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_a_name_that_is_too_long_is_said(tmp_path):
    """The error asks whether a file is in the way of the folders, which for such a name is an error of its own."""
    path = tmp_path / ("a" * 300) / "b" / "000.png"
    said = str(cannot_write(path, OSError(errno.ENAMETOOLONG, "File name too long")))
    assert "File name too long" in said
    assert "Choose a shorter name" in said


def test_the_first_pictures_come_back_in_the_order_of_the_prompts(tmp_path):
    """Beyond 1,000 of them, too: 101.png, 1000.png."""
    folder = tmp_path / "samples" / "step-000000"
    folder.mkdir(parents=True)
    for number in (1000, 101, 9, 999):
        (folder / f"{number:03d}.png").touch()
    watch = SimpleNamespace(folder=SimpleNamespace(path=tmp_path))
    assert [path.stem for path in Watch._first_pictures(watch)] == ["009", "101", "999", "1000"]
