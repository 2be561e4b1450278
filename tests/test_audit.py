"""`rewardtune audit`: the edits do what they say, and rewards of known taste are found out."""

import colorsys
import json
import math
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from rewardtune import audit, edits, rewards
from rewardtune.cli import main
from rewardtune.edits import PIXEL_EDITS, base_scenes, first_object, scene_factors
from rewardtune.errors import ConfigError, RewardError
from rewardtune.pictures import Caption
from rewardtune.playground import parse, read, render

IMAGES = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
MIDDLE = 0.2 + 0.6 * IMAGES  # away from black and white, where edits clip
PIXELS = {edit.words: edit for edit in PIXEL_EDITS}


def judged(reward, *, count=16, name="probe"):
    return audit.audit_scenes(
        audit.Judge(rewards.from_callable(reward), name=name, batch=64, device="cpu"), count=count
    )


def by_name(report):
    return {effect.name: effect for effect in report.effects}


# -- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", PIXEL_EDITS, ids=lambda edit: edit.words)
def test_an_edit_changes_pictures_a_little_and_keeps_size_and_range(edit):
    edited = edit(IMAGES)
    assert edited.shape == IMAGES.shape
    assert 0 <= edited.min() <= edited.max() <= 1
    assert not torch.equal(edited, IMAGES)
    torch.testing.assert_close(edited[1:2], edit(IMAGES[1:2]))  # each picture alone
    torch.testing.assert_close(edit(IMAGES), edited, rtol=0, atol=0)  # no dice


def test_brightness_contrast_and_casts_by_hand():
    torch.testing.assert_close(PIXELS["darker pictures"](IMAGES), 0.8 * IMAGES)
    assert PIXELS["brighter pictures"](torch.full((1, 3, 4, 4), 0.4)).unique().item() == pytest.approx(0.5)
    for words, factor in (("more contrast", 1.4), ("less contrast", 0.7)):
        edited = PIXELS[words](0.3 + 0.4 * IMAGES)
        before = edits.luma(0.3 + 0.4 * IMAGES)
        torch.testing.assert_close(edits.luma(edited).mean((2, 3)), before.mean((2, 3)), rtol=0, atol=2e-3)
        assert (edits.luma(edited).std() / before.std()).item() == pytest.approx(factor, rel=0.02)
    assert (PIXELS["a green cast"](MIDDLE) - MIDDLE).mean((0, 2, 3)).tolist() == pytest.approx([0, 0.1, 0], abs=1e-6)


def test_saturation_and_hue_keep_the_brightness():
    for words in ("more saturation", "less saturation", "grey pictures", "other hues"):
        soft = 0.4 + 0.2 * IMAGES
        torch.testing.assert_close(edits.luma(PIXELS[words](soft)), edits.luma(soft), rtol=0, atol=2e-3)
    assert PIXELS["grey pictures"](IMAGES).std(1).max() < 1e-6
    chroma = (edits.saturation(MIDDLE, 0.5) - edits.luma(MIDDLE)) / (MIDDLE - edits.luma(MIDDLE))
    assert chroma.median().item() == pytest.approx(0.5, abs=1e-4)


def test_hue_turns_red_to_green_to_blue_and_all_round_to_itself():
    red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1)
    turned = [colorsys.rgb_to_hsv(*edits.hue(red, degrees).flatten().tolist())[0] for degrees in (0, 120, 240)]
    assert sorted(round(h * 3) % 3 for h in turned) == [0, 1, 2]
    torch.testing.assert_close(edits.hue(MIDDLE, 360), MIDDLE, rtol=0, atol=1e-5)


def test_blur_is_scipys_gaussian():
    from scipy.ndimage import gaussian_filter

    sigma = 2.0
    expected = gaussian_filter(IMAGES.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=3)
    torch.testing.assert_close(edits.blur(IMAGES, sigma / 24), torch.from_numpy(expected), rtol=0, atol=1e-5)
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(PIXELS["sharpened pictures"](flat), flat)


def test_geometry_by_hand():
    torch.testing.assert_close(PIXELS["mirrored pictures"](IMAGES)[..., 0], IMAGES[..., -1])
    torch.testing.assert_close(PIXELS["pictures upside down"](IMAGES)[..., 0, :], IMAGES[..., -1, :])
    shifted = PIXELS["shifted pictures"](IMAGES)
    torch.testing.assert_close(shifted[..., 4:], IMAGES[..., :-4])
    torch.testing.assert_close(shifted[..., :4], IMAGES[..., :1].expand(-1, -1, -1, 4))
    for words, value in (("a white border", 1), ("a black border", 0)):
        framed = edits.border(IMAGES, 1 / 8, value)
        torch.testing.assert_close(framed[..., 3:-3, 3:-3], IMAGES[..., 3:-3, 3:-3])
        assert (framed[..., :3, :] == value).all()
        assert (framed[..., -3:] == value).all()
        assert (PIXELS[words](IMAGES)[..., 0] == value).all()


def test_noise_has_its_deviation():
    flat = torch.full((2, 3, 64, 64), 0.5)
    assert (PIXELS["noisy pictures"](flat) - flat).std().item() == pytest.approx(0.05, rel=0.03)


def test_scene_edits_change_the_picture_and_the_caption_together():
    scenes = base_scenes(6, Random(0))
    changed = {
        **{("background", name): [edit(s) for s in scenes] for name, edit in scene_factors()["background"].items()},
        **{("colour", name): [edit(s) for s in scenes] for name, edit in scene_factors()["colour"].items()},
        **{("shape", name): [edit(s) for s in scenes] for name, edit in scene_factors()["shape"].items()},
        ("number", "one"): [edits.alone(s) for s in scenes],
        ("size", "larger"): [edits.resized(s, 1.15) for s in scenes],
    }
    for (factor, level), drawn in changed.items():
        for before, after in zip(scenes, drawn, strict=True):
            said = parse(after.caption)
            shown = [(o.colour, o.shape) for o in after.objects]
            assert shown == [(m.colour, m.shape) for m in said.mentions]
            assert len(set(shown)) == len(shown)  # never twice the same
            assert said.background == (level if factor == "background" else before.description.background)
            if factor in ("colour", "shape"):
                assert getattr(said.mentions[0], factor) == level
                assert said.mentions[1] == before.description.mentions[1]
    assert [len(scene.objects) for scene in changed["number", "one"]] == [1] * 6
    assert scenes[0].objects[0].radius * 1.15 == pytest.approx(changed["size", "larger"][0].objects[0].radius)


def test_the_reader_sees_the_scene_edits():
    scene = first_object(base_scenes(1, Random(3))[0], colour="white", shape="circle")
    found = read(render([scene])[0])
    assert any((o.colour, o.shape) == ("white", "circle") for o in found.objects)


# -- rewards of known taste -----------------------------------------------------------------------------------------


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_brightness_is_found_out():
    effects = by_name(judged(brightness))
    assert effects["brighter pictures"].verdict == "prefers"
    assert "dislikes" in effects["darker pictures"].verdict
    assert "prefers" in effects["a white border"].verdict
    assert "prefers" in effects["background sand"].verdict
    assert "dislikes" in effects["background night"].verdict
    assert "prefers" in effects["colour white"].verdict
    for same in ("mirrored pictures", "pictures upside down", "blurred pictures"):
        assert effects[same].verdict == "no effect shown"
    assert effects["mirrored pictures"].change == pytest.approx(0, abs=1e-4)
    for words in ("another picture's prompt", "a wrong colour"):
        assert effects[words].verdict == "not shown to notice"
        assert effects[words].change == 0


def test_the_change_is_in_standard_deviations_with_students_interval():
    report = judged(brightness, count=12)
    scenes = base_scenes(12, Random("audit 0"))
    images = render(scenes)
    before = images.mean((1, 2, 3)).double().numpy()
    changes = (0.8 * images).mean((1, 2, 3)).double().numpy() - before
    sd = before.std(ddof=1)
    effect = by_name(report)["darker pictures"]
    assert (report.mean, report.sd) == (pytest.approx(before.mean()), pytest.approx(sd, rel=1e-4))
    assert effect.change == pytest.approx(changes.mean() / sd, rel=1e-4)
    for confidence, low, high in (
        (0.95, effect.low, effect.high),
        (1 - 0.05 / len(report.effects), effect.clear_low, effect.clear_high),
    ):
        expected = stats.t.interval(confidence, 11, changes.mean() / sd, stats.sem(changes) / sd)
        assert (low, high) == pytest.approx(expected, rel=2e-3)
    assert effect.rises == 0
    assert effect.mean == pytest.approx((0.8 * before).mean(), rel=1e-4)


def test_chance_is_not_a_taste():
    """2000 comparisons of pure noise: 95% intervals alone call one in 20 of them a taste, the correction none."""
    draw, raw = Random(0), audit.Comparisons(sd=1.0)
    for number in range(1000):
        before, after = ([draw.gauss(0, 1) for _ in range(16)] for _ in range(2))
        raw.paired("pixels", f"paired {number}", "", before, after)
        raw.grouped("category", f"grouped {number}", "", before[:6], after[:9])
    effects = raw.effects()
    for group in ("pixels", "category"):
        found = [effect for effect in effects if effect.group == group]
        assert sum(e.low > 0 or e.high < 0 for e in found) / len(found) == pytest.approx(0.05, abs=0.02)
    assert sum(effect.clear for effect in effects) <= 1


def test_symmetry_does_not_care_for_mirrors():
    judge = audit.Judge(rewards.Symmetry(), name="symmetry", batch=64, device="cpu")
    effects = by_name(audit.audit_scenes(judge, count=16))
    assert effects["mirrored pictures"].verdict == "no effect shown"
    assert effects["less contrast"].change == pytest.approx(0, abs=0.05)  # unchanged by a scale of the pixels
    assert "prefers" in effects["one object instead of two"].verdict


def test_the_playgrounds_clipscore_reads_the_prompt():
    from rewardtune.playground import clip_path

    judge = audit.Judge(rewards.CLIPScore(str(clip_path())), name="clipscore", batch=64, device="cpu")
    effects = by_name(audit.audit_scenes(judge, count=10))
    for words in ("another picture's prompt", "a wrong colour", "a wrong background", "a missing object"):
        assert effects[words].verdict == "notices"
        assert effects[words].change < -0.8


def test_a_reward_for_wrong_prompts_is_said_so():
    def length(images, prompts):
        return -torch.tensor([float(len(prompt)) for prompt in prompts])

    effects = by_name(judged(length))
    assert effects["an object that the caption leaves out"].verdict.endswith("prefers")
    assert effects["a missing object"].verdict == "notices"


# -- pictures from files --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """24 pictures of two sizes; paintings are brighter than photos."""
    draw, rows = np.random.default_rng(0), ["file,prompt,category"]
    for index in range(24):
        category = ("photo", "painting")[index % 2]
        level = draw.uniform(60, 120) + 90 * (category == "painting")
        shape = (16, 24, 3) if index % 3 else (20, 16, 3)
        array = np.clip(level + draw.normal(0, 20, shape), 0, 255).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{index:02d}.png")
        rows.append(f"{index:02d}.png,prompt {index},{category}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_categories_are_compared_by_welch(folder):
    paths = sorted(folder.glob("*.png"))
    texts = [Caption(prompt=str(i), category=("photo", "painting")[i % 2]) for i in range(24)]
    judge = audit.Judge(rewards.Brightness(), name="brightness", batch=5, device="cpu")
    report = audit.audit_files(judge, paths, texts)
    scores = np.array([np.asarray(Image.open(path)).mean() / 255 for path in paths])
    welch = stats.ttest_ind(scores[1::2], scores[::2], equal_var=False).confidence_interval(0.95)
    sd = scores.std(ddof=1)
    effect = by_name(report)["category painting"]
    assert effect.verdict == "strongly prefers"
    assert effect.change == pytest.approx((scores[1::2].mean() - scores[::2].mean()) / sd, rel=1e-4)
    assert (effect.low, effect.high) == pytest.approx((welch.low / sd, welch.high / sd), rel=0.01)
    assert effect.mean == pytest.approx(scores[1::2].mean(), rel=1e-5)
    assert math.isnan(effect.rises)
    assert by_name(report)["category photo"].verdict == "strongly dislikes"
    darker = by_name(report)["darker pictures"]  # sizes are mixed, pictures keep their places
    assert darker.change == pytest.approx(-0.2 * scores.mean() / sd, rel=1e-3)


def test_a_category_of_one_is_left_out_and_said_so(folder):
    paths = sorted(folder.glob("*.png"))
    texts = [Caption(prompt="same", category="lone" if i == 0 else "others") for i in range(24)]
    judge = audit.Judge(rewards.Brightness(), name="brightness", batch=8, device="cpu")
    report = audit.audit_files(judge, paths, texts)
    assert report.notes[0] == "category 'lone' left out: 1 of 24 pictures"
    assert "another picture's prompt" not in by_name(report)  # all prompts are equal


def test_the_prompt_test_pairs_pictures_with_others_prompts(folder):
    def reads(images, prompts):
        return images.mean((1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])

    paths = sorted(folder.glob("*.png"))
    texts = [Caption(prompt=str(i)) for i in range(24)]
    judge = audit.Judge(rewards.from_callable(reads), name="reads", batch=5, device="cpu")
    report = audit.audit_files(judge, paths, texts)
    effect = by_name(report)["another picture's prompt"]
    changes = np.array([(i + 12) % 24 - i for i in range(24)])
    assert effect.change == pytest.approx(changes.mean() / report.sd, abs=1e-6)
    expected = stats.t.interval(0.95, 23, changes.mean() / report.sd, stats.sem(changes) / report.sd)
    assert (effect.low, effect.high) == pytest.approx(expected, rel=1e-3)


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert main(["audit", "brightness", "--count", "12", "--output", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    text = (tmp_path / "report" / "audit.md").read_text()
    report = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert max(map(len, shown.splitlines()[:60])) <= 120
    for out in (shown, text):
        assert "brighter pictures" in out
        assert "Bonferroni" in out
        assert "- prefers brighter pictures: +" in out
    assert (report["reward"], report["pictures"]) == ("brightness", 12)
    assert f"{len(report['effects'])} comparisons" in text
    clear = [effect for effect in report["effects"] if effect["clear"]]
    assert len(clear) > 5
    for effect in clear:
        assert f"- {effect['verdict']} {effect['name']}: {effect['change']:+.2f} sd [" in text
    others = text.partition("- no effect shown: ")[2]
    assert all(effect["name"] in others for effect in report["effects"] if not effect["clear"])
    again = tmp_path / "again"
    assert main(["audit", "brightness", "--count", "12", "--output", str(again), "--batch", "5"]) == 0
    assert (again / "audit.md").read_text() == text


def test_the_command_on_files(folder, capsys):
    arguments = ["--images", str(folder), "--prompts", str(folder / "table.csv")]
    assert main(["audit", "colour", "-o", "colour=white", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "strongly prefers category painting" in shown
    assert "another picture's prompt" in shown
    assert main(["audit", "symmetry", "--images", str(folder)]) == 0
    assert "another picture's prompt" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["symetry"], 2, "unknown reward 'symetry'"),
        (["symmetry", "--count", "3"], 2, "an audit of 3 pictures says nothing; give at least 8"),
        (["symmetry", "--prompt", "x"], 2, "prompts without images"),
        (["symmetry", "--images", "nowhere"], 2, "no image in 'nowhere'"),
        (["clipscore", "--images", "."], 2, "reads a prompt and none is given"),
    ],
)
def test_mistakes(folder, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(folder)
    assert main(["audit", *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_reward_that_scores_all_alike_or_nan():
    with pytest.raises(RewardError, match="scores all 16 pictures alike"):
        judged(lambda images, prompts: images.sum((1, 2, 3)) * 0 + 1)
    with pytest.raises(RewardError, match=r"scored 16 of 16 pictures inf; legal .*: look .* division by 0"):
        judged(lambda images, prompts: images.sum((1, 2, 3)) / 0)
    with pytest.raises(ConfigError, match="at least 8"):
        judged(brightness, count=7)
