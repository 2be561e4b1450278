"""`rewardtune score`: pictures found, opened, paired with prompts, scored, shown; and every way to get it wrong."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student_t

from rewardtune import rewards
from rewardtune.cli import main
from rewardtune.errors import ConfigError
from rewardtune.pictures import captions, find_images, open_image, read_table
from rewardtune.score import Picture, as_table, choose
from rewardtune.stats import mean_interval, student
from rewardtune.tables import text_table


def save(path, *, seed=0, size=(20, 16), mode="RGB", **settings):
    """A random picture of width x height; gives its pixels (H, W, C)."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(array.squeeze(-1) if channels == 1 else array, mode=mode).save(path, **settings)
    return array


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("b", 1), ("a", 0), ("c", 2)):
        save(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


# -- finding --------------------------------------------------------------------------------------------------------


def test_files_folders_and_globs_each_picture_once(folder):
    (folder / "sub").mkdir()
    save(folder / "sub" / "d.jpg")
    names = [path.name for path in find_images([str(folder / "c.png"), str(folder)])]
    assert names == ["c.png", "a.png", "b.png"]
    assert [path.name for path in find_images([str(folder / "**" / "*.jpg")])] == ["d.jpg"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "no image in '.*nothing': there is no such file"),
        ("*.webp", r"no image in '.*\*.webp': there is no such file, and no file matches"),
        ("empty", r"no image in '.*empty': the folder has no .png"),
        ("notes.md", r"cannot read the image .*notes.md: cannot identify"),
    ],
)
def test_what_is_no_picture(folder, source, words):
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        find_images([str(folder / source)])


# -- opening --------------------------------------------------------------------------------------------------------


def test_rgb_is_read_exactly(tmp_path):
    array = save(tmp_path / "x.png")
    image, converted = open_image(tmp_path / "x.png")
    assert converted == ""
    assert image.dtype == torch.float32
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), array)


def test_the_cameras_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is the right side of the stored picture
    array = save(tmp_path / "x.png", exif=exif)
    image, _ = open_image(tmp_path / "x.png")
    assert image.shape == (3, 20, 16)
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), np.rot90(array, -1))


def test_grey_palette_and_transparency_become_rgb(tmp_path):
    grey = save(tmp_path / "l.png", mode="L")
    image, converted = open_image(tmp_path / "l.png")
    assert converted == "L"
    assert np.array_equal((image * 255).round().byte().numpy(), np.repeat(grey.transpose(2, 0, 1), 3, 0))

    rgba = save(tmp_path / "rgba.png", mode="RGBA").astype(float) / 255
    image, converted = open_image(tmp_path / "rgba.png")
    assert converted == "RGBA"
    on_white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    assert np.abs(image.permute(1, 2, 0).numpy() - on_white).max() <= 1.01 / 255

    save(tmp_path / "rgb.png")
    Image.open(tmp_path / "rgb.png").quantize(16).save(tmp_path / "p.png")
    image, converted = open_image(tmp_path / "p.png")
    assert converted == "P"
    expected = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits_keep_their_range(tmp_path):
    array = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(array).save(tmp_path / "x.png")
    image, converted = open_image(tmp_path / "x.png")
    assert converted == "16-bit grey"
    torch.testing.assert_close(image, torch.from_numpy(array / 65535).float().expand(3, -1, -1))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    image, converted = open_image(tmp_path / "x.gif")
    assert "first frame" in converted
    assert image.mean(dim=(1, 2)).tolist() == [1, 0, 0]


def test_a_damaged_picture_and_one_of_unknown_range(tmp_path):
    save(tmp_path / "x.png", size=(64, 64))
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"cannot read the image .*cut.png"):
        open_image(tmp_path / "cut.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ConfigError, match=r"f.tif has pixels of mode F, whose range is unknown"):
        open_image(tmp_path / "f.tif")


def test_a_picture_too_large_for_pillow(tmp_path, monkeypatch):
    save(tmp_path / "x.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's limit is 179 million pixels, twice that an error
    with pytest.raises(ConfigError, match=r"cannot read the image .*x.png: Image size \(4096 pixels\) exceeds"):
        find_images([str(tmp_path)])


# -- prompts --------------------------------------------------------------------------------------------------------


def texts(found):
    return None if found is None else [caption.prompt for caption in found]


def test_where_prompts_come_from(folder):
    paths = find_images([str(folder)])
    assert captions(paths) is None
    assert texts(captions(paths, prompt="one")) == ["one"] * 3
    (folder / "lines.txt").write_text("A\nB\nC\n")
    assert texts(captions(paths, prompts=folder / "lines.txt")) == ["A", "B", "C"]
    (folder / "t.csv").write_text('file,prompt,category\nc.png,C,photo\na.png,"A, a",\nb.png,B,painting\n')
    found = captions(paths, prompts=folder / "t.csv")
    assert texts(found) == ["A, a", "B", "C"]
    assert [caption.category for caption in found] == ["", "painting", "photo"]
    rows = [{"file": f"{name}.png", "prompt": name.upper()} for name in "cba"]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(captions(paths, prompts=folder / "t.jsonl")) == ["A", "B", "C"]
    lines = "two\nlines", "and\u2028two", "C"  # a table keeps the breaks inside a prompt
    (folder / "t.csv").write_text(
        "".join(["file,prompt\n", *(f'{x}.png,"{y}"\n' for x, y in zip("abc", lines, strict=True))])
    )
    assert texts(captions(paths, prompts=folder / "t.csv")) == list(lines)
    rows = [{"file": f"{x}.png", "prompt": y} for x, y in zip("abc", lines, strict=True)]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert texts(captions(paths, prompts=folder / "t.jsonl")) == list(lines)
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"beside {name}\n")
    assert texts(captions(paths)) == ["beside a", "beside b", "beside c"]


def test_prompts_that_do_not_fit(folder):
    paths = find_images([str(folder)])
    (folder / "lines.txt").write_text("A\nB\n")
    with pytest.raises(ConfigError, match=r"lines.txt has 2 prompts for 3 images"):
        captions(paths, prompts=folder / "lines.txt")
    with pytest.raises(ConfigError, match="give one of them"):
        captions(paths, prompts=folder / "lines.txt", prompt="x")
    (folder / "a.txt").write_text("only a")
    with pytest.raises(ConfigError, match=r"1 of 3 images have a text file beside them, but .*b.txt is missing"):
        captions(paths)
    (folder / "t.csv").write_text("file,prompt\na.png,A\nb.png,B\n")
    with pytest.raises(ConfigError, match=r"t.csv has no row for the image .*c.png"):
        captions(paths, prompts=folder / "t.csv")


def test_a_row_that_two_pictures_claim(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        save(folder / name / "x.png")
    paths = find_images([str(folder / "one"), str(folder / "two")])
    (folder / "t.csv").write_text("file,prompt\nx.png,A\n")
    with pytest.raises(
        ConfigError, match=r"the row x\.png fits .*one/x\.png and .*two/x\.png; write the folder too, as two/x"
    ):
        captions(paths, prompts=folder / "t.csv")
    (folder / "t.csv").write_text("file,prompt\nx.png,A\ntwo/x.png,B\n")
    assert [caption.prompt for caption in captions(paths, prompts=folder / "t.csv")] == ["A", "B"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "file,promt\na.png,A\n", r"line 2: the columns are 'file', 'promt' \(did you mean 'prompt'\?\)"),
        ("t.csv", "file,prompt\na.png,A\na.png,B\n", "line 3: a.png occurs twice"),
        ("t.csv", "file,prompt\na.png\n", "line 2: the columns are"),
        ("t.jsonl", '{"file": "a.png", "prompt": "A"}\n[1]\n', "line 2: no JSON object"),
        ("t.jsonl", '{"file": "a.png", "prompt": "A"}\n\n{broken', "t.jsonl, line 3, column 2: no JSON .*; legal: "),
    ],
)
def test_bad_tables(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_table(tmp_path / name)


def test_a_missing_table(tmp_path):
    with pytest.raises(ConfigError, match=r"t.csv does not exist"):
        read_table(tmp_path / "t.csv")


# -- intervals and tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 63])
def test_student_against_scipy(freedom):
    assert student(0.95, freedom) == pytest.approx(student_t.ppf(0.975, freedom), rel=2e-3)
    assert student(0.99, freedom) == pytest.approx(student_t.ppf(0.995, freedom), rel=3e-3 if freedom > 3 else 8e-3)
    if freedom not in (3, 4):
        assert student(0.999, freedom) == pytest.approx(student_t.ppf(0.9995, freedom), rel=3e-3)


def test_mean_interval_covers_the_mean_95_times_in_100():
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(abs(mean) <= half for mean, half in map(mean_interval, draws)) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.012)  # a normal interval would cover 88%
    assert math.isnan(mean_interval([3.0])[1])


def test_tables_stay_within_the_terminal(monkeypatch):
    rows = [["x" * 10, "many words " * 20, "1.5"], ["y", "few", "10.25"]]
    for columns in (60, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = text_table(["name", "text", "n"], rows, flexible=1, numbers=[2]).splitlines()
        assert max(map(len, lines)) <= min(columns, 120)
        assert lines[-1].split() == ["y", "few", "10.25"]
        assert lines[-1].endswith("10.25")
    assert lines[1].endswith("  1.5")


def test_a_name_is_not_cut_in_two_where_space_is_short(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name, endless = "lora@0.5:base_steps=3", "/".join(["folder"] * 10)
    lines = text_table(["value", "candidate"], [["0" * 70, name], ["1", endless]], flexible=1).splitlines()
    assert lines[1].endswith(f"  {name}")
    assert len(lines) == 5  # the endless one is broken into three
    assert "".join(line.split()[-1] for line in lines[2:]) == endless


def test_several_columns_of_a_table_share_what_is_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = text_table(["a", "b", "c"], [["w " * 60, "n", "many words " * 9]], flexible=(0, 2)).splitlines()
    assert max(map(len, lines)) <= 80
    assert min(lines[1].index("n "), 80 - lines[1].index("many")) > 35
    words = " ".join(lines[1:]).split()
    assert [words.count(word) for word in ("w", "n", "many", "words")] == [60, 1, 9, 9]


# -- the command ----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_rewards(folder, capsys):
    save(folder / "d.png", seed=3, size=(32, 24))  # another size
    (folder / "p.txt").write_text("one\ntwo\nthree\nfour\n")
    out = folder / "scores.json"
    arguments = ["-r", "symmetry", "-r", "compressibility", "-o", "compressibility.quality=30"]
    assert main(["score", str(folder), *arguments, "--prompts", str(folder / "p.txt"), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["rewards"] == [
        {"name": "symmetry", "options": {}},
        {"name": "compressibility", "options": {"quality": 30}},
    ]
    judges = {"symmetry": rewards.Symmetry(), "compressibility": rewards.Compressibility(quality=30)}
    for row, prompt in zip(document["images"], ["one", "two", "three", "four"], strict=True):
        image = open_image(folder / row["file"].rpartition("/")[2])[0][None]
        assert (row["height"], row["width"]) == image.shape[-2:]
        assert row["prompt"] == prompt
        assert prompt in shown
        for name, judge in judges.items():
            assert row["native"][name] == pytest.approx(judge.native(image, [prompt]).item(), rel=1e-5)
            assert row["score"][name] == -row["native"][name]
    values = [row["native"]["symmetry"] for row in document["images"]]
    mean, half = mean_interval(values)
    assert document["summary"]["symmetry"] == {"mean": mean, "half_width_95": half, "images": 4}
    assert f"{mean:.4g} ± {half:.4g}" in shown
    assert "Less is better: symmetry, compressibility" in shown


def test_batches_change_nothing_and_a_single_image_has_no_interval(folder, capsys):
    printed = []
    for batch in ("1", "2", "8"):
        assert main(["score", str(folder), "-r", "brightness", "--batch", batch, "--json", "-"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["images"] == printed[1]["images"] == printed[2]["images"]
    assert main(["score", str(folder / "a.png"), "-r", "brightness", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["brightness"]["half_width_95"] is None


def test_conversions_are_announced(folder, capsys):
    save(folder / "grey.png", mode="L")
    assert main(["score", str(folder), "-r", "brightness"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("1 of 4 images were not plain RGB and were converted (L): ")
    assert line.endswith("grey.png")


def test_a_sum_by_import_path_shows_its_parts(folder, monkeypatch, capsys):
    (folder / "sum_of_two.py").write_text(
        "from rewardtune import rewards\nboth = rewards.Brightness() + 2 * rewards.Symmetry()\n"
    )
    monkeypatch.chdir(folder)
    arguments = ["-r", "sum_of_two:both", "-r", "brightness", "--prompt", "", "--json", "-"]
    assert main(["score", "a.png", *arguments]) == 0
    native = json.loads(capsys.readouterr().out)["images"][0]["native"]
    assert native["sum_of_two:both"] == pytest.approx(native["brightness"] - 2 * native["symmetry"])
    assert native["brightness.brightness"] == native["brightness"]


def test_the_playgrounds_clipscore_prefers_the_right_prompt(tmp_path, capsys):
    from random import Random

    from rewardtune.playground import draw_scenes, render

    scenes = draw_scenes(8, Random(0), split="eval")
    for index, image in enumerate(render(scenes)):
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    (tmp_path / "right.txt").write_text("\n".join(scene.caption for scene in scenes))
    (tmp_path / "wrong.txt").write_text("\n".join(scene.caption for scene in scenes[1:] + scenes[:1]))
    means = []
    for name in ("right", "wrong"):
        arguments = ["-r", "clipscore", "-o", "model=playground", "--prompts", str(tmp_path / f"{name}.txt")]
        assert main(["score", str(tmp_path), *arguments, "--json", "-"]) == 0
        means.append(json.loads(capsys.readouterr().out)["summary"]["clipscore"]["mean"])
    assert means[0] > means[1] + 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "-r", "symmetry"], "no image in 'nowhere'"),
        (["a.png", "-r", "symetry", "--prompt", "x"], "unknown reward 'symetry' (did you mean 'symmetry'?)"),
        (["a.png", "-r", "clipscor"], "unknown reward 'clipscor' (did you mean 'clipscore'?)"),
        (["a.png", "-r", "absent:f"], "reward 'absent:f': importing absent failed"),
        (["a.png", "-r", "clipscore"], "the reward 'clipscore' reads a prompt and none is given"),
        (
            ["a.png", "-r", "objectness", "-o", "model=playground", "-o", "target=null"],
            "the reward 'objectness' reads a prompt and none is given",
        ),
        (["a.png", "-r", "mine:function"], "the reward 'mine:function' reads a prompt and none is given"),
        (["a.png", "-r", "symmetry", "-r", "symmetry"], "'symmetry' is given twice"),
        (
            ["a.png", "-r", "symmetry", "-r", "colour", "-o", "colour=red"],
            "say of which reward: -o symmetry.colour=red",
        ),
        (["a.png", "-r", "symmetry", "-o", "epss=1"], "no setting 'epss' (did you mean 'eps'?)"),
        (["a.png", "-r", "symmetry", "-o", "eps"], "write [REWARD.]SETTING=VALUE, for example -o symmetry.eps=VALUE"),
        (["a.png", "-r", "symmetry", "--prompts", "none.txt"], "none.txt does not exist; give a .txt with one prompt"),
        (
            ["a.png", "-r", "symmetry", "--prompts", "none.txt"],
            "or a .csv (with headings) or .jsonl of file and prompt",
        ),
        (["a.png", "-r", "symmetry", "--prompts", "notes.md"], "notes.md is of another kind; give a .txt"),
        (["a.png", "-r", "symmetry", "--prompts", "."], "prompt file . is a folder"),
        (["a.png", "-r", "symmetry", "--device", "quantum"], "device 'quantum'"),
    ],
)
def test_mistakes_are_one_clear_line(folder, monkeypatch, capsys, arguments, words):
    (folder / "mine.py").write_text("def function(images, prompts): return images.mean((1, 2, 3))\n")
    monkeypatch.chdir(folder)
    assert main(["score", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_score_that_is_no_number_is_an_error(folder, monkeypatch, capsys):
    (folder / "nan_reward.py").write_text("def f(images, prompts): return images.mean((1, 2, 3)) * float('nan')\n")
    monkeypatch.chdir(folder)
    assert main(["score", "a.png", "-r", "nan_reward:f", "--prompt", ""]) == 3
    assert "scored a.png nan" in capsys.readouterr().err


def test_a_score_without_bound_is_an_error_also_where_its_native_value_is_finite(folder, monkeypatch, capsys):
    (folder / "log_reward.py").write_text(
        "from rewardtune.rewards import Reward\n"
        "class R(Reward):\n"
        "    def evaluate(self, images, prompts): return (0 * images.mean((1, 2, 3))).log(), images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(folder)
    assert main(["score", "a.png", "-r", "log_reward:R", "--prompt", "", "--json", "-"]) == 3
    assert "scored a.png -inf" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["1", "2", "8"])
def test_bad_pictures_are_skipped_and_named_and_all_others_scored(folder, monkeypatch, capsys, batch):
    (folder / "picky.py").write_text(
        "def f(images, prompts):\n"
        "    if images.shape[-1] == 30: raise ValueError('no thirties')\n"
        "    return images.mean((1, 2, 3)) / (images.amax((1, 2, 3)) > 0)\n"
    )
    monkeypatch.chdir(folder)
    assert main(["score", "a.png", "b.png", "c.png", "-r", "compressibility", "-r", "symmetry", "--json", "-"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["skipped"] == []
    save(folder / "aa_small.png", size=(20, 8))
    save(folder / "ab_thirty.png", size=(30, 16))
    Image.new("RGB", (20, 16)).save(folder / "ba_black.png")
    save(folder / "d.png", size=(64, 64))
    (folder / "bb_cut.png").write_bytes((folder / "d.png").read_bytes()[:4000])
    (folder / "d.png").write_bytes(b"")
    arguments = ["-r", "compressibility", "-r", "symmetry", "-r", "picky:f", "--prompt", "", "--batch", batch]
    assert main(["score", ".", *arguments, "--json", "all.json"]) == 5
    shown = capsys.readouterr()
    document = json.loads((folder / "all.json").read_text())
    assert [row["file"] for row in document["images"]] == ["a.png", "b.png", "c.png"]
    for row, other in zip(document["images"], alone["images"], strict=True):
        assert row["native"].keys() == {"compressibility", "symmetry", "f"}
        assert {name: row["native"][name] for name in other["native"]} == pytest.approx(other["native"])
    assert document["summary"]["symmetry"]["images"] == 3
    words = {
        "aa_small.png": "images are 8x20",
        "ab_thirty.png": "reward 'f' raised ValueError: no thirties",
        "ba_black.png": "scored ba_black.png nan",
        "bb_cut.png": "cannot read the image bb_cut.png",
        "d.png": "cannot read the image d.png",
    }
    assert [row["file"] for row in document["skipped"]] == list(words)
    assert shown.err.startswith("5 of 8 images could not be scored and are left out:\n")
    for row, line in zip(document["skipped"], shown.err.splitlines()[1:], strict=True):
        assert words[row["file"]] in row["reason"]
        assert row["file"] in line


def test_where_no_picture_can_be_scored_the_first_reason_is_the_error(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    save(folder / "small.png", size=(8, 8))
    assert main(["score", "small.png", "-r", "compressibility"]) == 3
    assert "images are 8x8" in capsys.readouterr().err
    assert main(["score", "notes.md", "-r", "symmetry"]) == 2
    assert "cannot read the image notes.md" in capsys.readouterr().err


def test_options_go_to_their_reward():
    assert choose(["a:B"], ["x=1", "a:B.y=[1,2]"]) == {"a:B": {"x": 1, "y": [1, 2]}}
    assert choose(["a", "b"], ["b.x=1e-4"]) == {"a": {}, "b": {"x": 1e-4}}


@pytest.mark.parametrize(
    ("option", "line"), [("target=heart", "looks for 'heart'"), ("target=null", "looks for each image's own prompt")]
)
def test_the_table_says_what_objectness_looks_for(folder, capsys, option, line):
    arguments = ["-r", "objectness", "-o", "model=playground", "-o", option, "--prompt", "a red heart"]
    assert main(["score", str(folder / "a.png"), *arguments]) == 0
    assert f"\nobjectness {line}\n" in capsys.readouterr().out


def test_the_table_says_what_objectness_looks_for_by_default():
    picture = Picture(file="a.png", width=8, height=8, prompt=None, converted="", native={"objectness": 0.5})
    assert as_table([picture], {"objectness": {}}).endswith("\nobjectness looks for 'book'")
    assert "looks for" not in as_table([picture], {"symmetry": {}})


@pytest.mark.parametrize(("options", "less"), [({}, True), ({"minimise": True}, True), ({"minimise": False}, False)])
def test_the_table_says_whether_less_is_better(options, less):
    picture = Picture(file="a.png", width=8, height=8, prompt=None, converted="", native={"objectness": 0.5})
    assert ("Less is better: objectness" in as_table([picture], {"objectness": options})) is less


@pytest.mark.parametrize(
    "command", [["score", "a.png", "--prompt", "x", "-r"], ["audit", "--images", ".", "--prompt", "x"]]
)
def test_an_error_in_a_users_reward_is_not_called_a_bug_of_ours(folder, monkeypatch, capsys, command):
    for index in range(8):
        save(folder / f"more{index}.png", seed=index)
    (folder / "crashing.py").write_text("def crash(images, prompts): raise ValueError('boom')\n")
    monkeypatch.chdir(folder)
    assert main([*command, "crashing:crash"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("rewardtune: reward 'crash' raised ValueError: boom; legal is (images (")
    assert "bug" not in error
