"""The playground's own rewards: written tastes, their training, the shipped networks through the public classes."""

import json
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rewardtune import playground, rewards
from rewardtune.config import Part
from rewardtune.errors import ConfigError
from rewardtune.launch import make_reward
from rewardtune.playground import aesthetic, detector, preference, reader, reward_quality, scenes, taste

REWARDS = {"clipscore": {}, "pickscore": {}, "hpsv2": {}, "aesthetic": {}, "objectness": {"target": "red heart"}}


@pytest.fixture(scope="module")
def choices():
    """150 captions with two pictures each."""
    return taste.draw_choices(150, random.Random("tests"), each=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The small CLIP, untrained."""
    from rewardtune.playground.clip import small_clip
    from rewardtune.playground.words import write_tokenizer

    torch.manual_seed(0)
    return small_clip(write_tokenizer(tmp_path_factory.mktemp("words"))).eval()


# tastes


def test_mistakes_are_what_the_reader_finds_wrong(choices):
    """The reader knows pixels only: a picture makes no mistake just when everything asked for is there."""
    pairs = [(asked, picture.scene) for asked, pair in choices[:60] for picture in pair]
    wrong = 0
    for (asked, scene), image in zip(pairs, scenes.render([scene for _, scene in pairs]), strict=True):
        m = reader.matches(asked, reader.read(image))
        held = m.colour and m.number and m.shape and m.background and m.place is not False and m.size is not False
        wrong += held != (taste.mistakes(asked, scene) == 0)
    assert wrong <= 2  # the reader itself errs in one of a hundred


def test_mistakes_are_counted():
    asked = scenes.parse("a red heart on the left and a small blue star, night background")
    heart = scenes.Object(colour="red", shape="heart", x=16.0, y=32.0, radius=12.0)
    star = scenes.Object(colour="blue", shape="star", x=48.0, y=32.0, radius=9.0)

    def count(*objects, background="night"):
        description = replace(asked, background=background)
        return taste.mistakes(asked, scenes.Scene(description=description, objects=objects, horizon=36.0))

    assert count(heart, star) == count(star, heart) == 0
    assert count(heart, star, background="sea") == 1
    assert count(replace(heart, x=40.0, y=10.0), star) == 1
    assert count(heart, replace(star, radius=15.0)) == 1
    assert count(replace(heart, colour="blue"), replace(star, colour="red")) == 2
    assert count(heart) == count(heart, star, replace(star, y=10.0)) == 2
    assert count() == 4


def test_every_taste_puts_the_caption_first(choices):
    for rule in taste.TASTES.values():
        for asked, (first, second) in choices:
            a, b = (taste.mistakes(asked, picture.scene) for picture in (first, second))
            if a != b:
                assert taste.prefer(rule(asked, first), rule(asked, second)) == float(a < b)


def test_tastes_differ_where_both_pictures_keep_the_caption(choices):
    kept = [
        [taste.prefer(*(rule(asked, picture) for picture in pair)) for rule in taste.TASTES.values()]
        for asked, pair in choices
        if taste.mistakes(asked, pair[0].scene) == taste.mistakes(asked, pair[1].scene)
    ]
    decided = [(vivid, calm) for vivid, calm in kept if 0.5 not in (vivid, calm)]
    assert len(decided) > 40
    assert 0.3 < sum(vivid != calm for vivid, calm in decided) / len(decided) < 0.7


@pytest.mark.parametrize(("rule", "better"), [(taste.vivid, {"saturation": 1.3}), (taste.calm, {"light": 0.5})])
def test_a_taste_likes_what_it_says(rule, better):
    scene = scenes.draw_scenes(1, random.Random(0))[0]
    plain = taste.Picture(scene=scene)
    assert rule(scene.description, replace(plain, **better)) > rule(scene.description, plain)
    assert rule(scene.description, replace(plain, blur=2.0)) < rule(scene.description, plain)


def test_answers_are_antisymmetric():
    assert taste.prefer(1.0, 0.0) == 1 - taste.prefer(0.0, 1.0) == 1
    assert taste.prefer(0.5, 0.5 + taste.TIE / 2) == 0.5


def test_pictures_show_their_scene():
    scene = scenes.draw_scenes(1, random.Random(1))[0]
    plain = taste.Picture(scene=scene)
    looks = [plain, replace(plain, saturation=0.0), replace(plain, light=0.5), replace(plain, blur=2.0)]
    shown, grey, dark, soft = taste.show(looks)
    assert torch.equal(shown, scenes.render([scene])[0])
    assert (grey.std(0) < 1e-6).all()
    torch.testing.assert_close(dark, shown / 2)
    assert soft.diff(dim=-1).abs().max() < 0.5 * shown.diff(dim=-1).abs().max()
    torch.testing.assert_close(soft.mean(), shown.mean(), atol=0.02, rtol=0)


def test_beauty_is_a_rating():
    rated = [taste.beauty(scene) for scene in scenes.draw_scenes(300, random.Random(2))]
    assert min(rated) > 1
    assert max(rated) < 10
    assert max(rated) - min(rated) > 4


# preference models


def test_preference_loss_is_pickscores_cross_entropy():
    scores, answers = torch.randn(7, 2), torch.tensor([1, 0, 0.5, 1, 0, 0.5, 1])
    wanted = F.cross_entropy(scores, torch.stack([answers, 1 - answers], 1))
    torch.testing.assert_close(preference.preference_loss(*scores.unbind(1), answers), wanted)


def test_traits_are_standardised(choices):
    found = preference.traits([picture for _, pair in choices for picture in pair])
    assert found.shape == (300, 6)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(6))


def test_equal_captions_do_not_compete():
    image, text = (F.normalize(torch.randn(3, 5), dim=-1) for _ in range(2))
    text[1] = text[0]
    ours = preference.caption_loss(image, text, ["a", "a", "b"], 7.0)
    logits = 7 * image @ text.T
    rows = [logits[0, [0, 2]], logits[1, [1, 2]], logits[2, [2, 0, 1]]]  # its own first
    torch.testing.assert_close(ours, -torch.stack([row.log_softmax(0)[0] for row in rows]).mean())


# the detector


def test_boxes_are_what_the_reader_measures():
    drawn = scenes.draw_scenes(30, random.Random(3))
    for scene, image in zip(drawn, scenes.render(drawn), strict=True):
        for seen in reader.read(image).objects:
            near = min(scene.objects, key=lambda o: abs(o.x - seen.x) + abs(o.y - seen.y))
            ours = torch.tensor(detector.box_of(near)) * scenes.SIZE
            assert (ours - torch.tensor(seen.box)).abs().max() < 2


def test_overlap_is_transformers():
    from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

    first, second = (detector.corners(torch.rand(20, 4) * 0.5 + 0.2) for _ in range(2))
    iou, generalised = detector.overlap(first, second)
    torch.testing.assert_close(iou, box_iou(first, second)[0].diagonal())
    torch.testing.assert_close(generalised, generalized_box_iou(first, second).diagonal())


def test_matching_is_the_cheapest():
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(30, 9, 2).round(decimals=1)  # with ties, and the same best box for both
    chosen = detector.match(cost)
    for row, boxes in zip(cost, chosen, strict=True):
        best = linear_sum_assignment(row.numpy())
        assert boxes[0] != boxes[1]
        assert row[boxes, torch.arange(2)].sum().item() == pytest.approx(row.numpy()[best].sum())


def test_focal_loss_is_transformers():
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss

    logits, answers = torch.randn(5, 6), torch.randint(2, (5, 6)).float()
    theirs = sigmoid_focal_loss(logits, answers, num_boxes=1)  # a mean over the second dimension
    torch.testing.assert_close(detector.focal_loss(logits, answers).mean(1).sum(), theirs)


def test_detector_is_an_ordinary_owlvit(clip):
    """`detect` gives what the full forward of transformers gives; both towers begin as the CLIP's."""
    model = detector.small_owlvit(clip).eval()
    images = torch.rand(2, 3, 64, 64)
    ids = torch.tensor([[613, 20, 614], [613, 30, 614]])
    with torch.no_grad():
        logits, boxes = detector.detect(model, images, detector.query_features(model, ids))
        whole = model(input_ids=ids.repeat(2, 1), pixel_values=detector.normalise(images))
        tower = clip.vision_model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(model.owlvit.vision_model(pixel_values=images).last_hidden_state, tower)
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(boxes, detector.corners(whole.pred_boxes))


def test_queries_name_what_is_drawn():
    heart = scenes.Object(colour="red", shape="heart", x=16.0, y=32.0, radius=12.0)
    assert [q for q, fits in zip(detector.QUERIES, detector.fitting(heart), strict=True) if fits] == [
        "red heart",
        "heart",
    ]
    assert len(detector.QUERIES) == 48


def test_detection_loss_falls_to_nothing_for_the_truth():
    """Logits and boxes that say exactly what is drawn cost nothing; a moved box or a wrong name does."""
    drawn = scenes.draw_scenes(4, random.Random(5))
    logits, boxes = torch.full((4, 64, 48), -20.0), torch.rand(4, 64, 4).sort(-1).values
    for i, scene in enumerate(drawn):
        for j, o in enumerate(scene.objects):
            boxes[i, 7 + j] = torch.tensor(detector.box_of(o))
            logits[i, 7 + j, torch.tensor(detector.fitting(o))] = 20.0
    right, _ = detector.detection_loss(logits, boxes, drawn)
    assert right < 1e-5
    assert detector.detection_loss(logits, boxes + 0.05, drawn)[0] > 0.1
    assert detector.detection_loss(logits.roll(1, -1), boxes, drawn)[0] > 1


# the aesthetic head


def test_head_finds_a_planted_one(clip, monkeypatch):
    """Where ratings are an affine map of the embedding, the head is that map."""
    from rewardtune.playground.clip import embed_images

    def planted(drawn, rng):
        with torch.no_grad():
            return 5 + 4 * embed_images(clip, scenes.render(drawn))[:, 0].double()

    monkeypatch.setattr(aesthetic, "ratings", planted)
    monkeypatch.setattr(aesthetic, "soften", lambda images, draw: images)
    monkeypatch.setattr(aesthetic, "RIDGE", 1e-12)
    weight, bias = aesthetic.fit_head(clip, scenes=300)
    drawn = scenes.draw_scenes(50, random.Random(6))
    with torch.no_grad():
        found = embed_images(clip, scenes.render(drawn)) @ weight[0] + bias
    torch.testing.assert_close(found.double(), planted(drawn, None), atol=1e-3, rtol=0)


def test_ratings_stay_on_the_scale():
    drawn = scenes.draw_scenes(200, random.Random(7))
    told, rule = aesthetic.ratings(drawn, random.Random(8)), torch.tensor([taste.beauty(s) for s in drawn])
    assert told.min() >= 1
    assert told.max() <= 10
    assert (told - rule).std().item() == pytest.approx(aesthetic.ERROR, rel=0.2)


# the report's numbers


def test_average_precision_by_hand():
    scores, right = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([True, False, True, False])
    assert reward_quality.average_precision(scores, right, total=2) == pytest.approx((1 + 2 / 3) / 2)
    assert reward_quality.average_precision(scores, right, total=4) == pytest.approx((1 + 2 / 3) / 4)


def test_area_under_the_curve_by_hand():
    row = reward_quality.area("x", "y", torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert row.value == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert row.low < row.value < row.high


def test_correlation_interval():
    """r = 0.5 of 28 cases after Fisher: 0.156 to 0.736."""
    x = torch.randn(28, generator=torch.Generator().manual_seed(0)).double()
    y = torch.randn(28, generator=torch.Generator().manual_seed(1)).double()
    x = (x - x.mean()) / x.std()
    y = y - y.mean() - x * (x @ (y - y.mean())) / (x @ x)
    row = reward_quality.correlation("x", "y", x, 0.5 * x + 0.75**0.5 * y / y.std())
    assert (row.value, row.low, row.high) == pytest.approx((0.5, 0.156, 0.736), abs=1e-3)


# the shipped networks


@pytest.fixture(scope="module")
def shipped():
    return reward_quality.open_rewards()


def test_all_weights_fit_in_25_megabytes():
    files = [file for file in playground.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "aesthetic", "objectness"])
def test_weights_are_half_precision_on_disk(name):
    from safetensors import safe_open

    folder = playground.reward_path(name)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", REWARDS)
def test_run_files_say_playground(name):
    reward = make_reward([Part(name=name, options={"model": "playground", **REWARDS[name]})])
    rewards.check_reward(reward, size=64, prompts=["a red heart, night background", "a blue star, sea background"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (rewards.CLIPScore, "clipscore"),
        (rewards.PickScore, "pickscore"),
        (rewards.HPSv2, "hpsv2"),
        (rewards.Aesthetic, "aesthetic"),
        (lambda model: rewards.Objectness("heart", model=model), "objectness"),
    ],
)
def test_classes_say_playground_too(make, name):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red heart", "a blue star"]
    assert torch.equal(
        make(model="playground")(images, prompts), make(model=str(playground.reward_path(name)))(images, prompts)
    )


def test_other_rewards_have_no_network_here():
    with pytest.raises(ConfigError, match="no network for the reward 'imagereward'"):
        rewards.ImageReward(model="playground")
    with pytest.raises(ConfigError, match="no network for the reward 'imagereward'; it has clipscore, pickscore"):
        make_reward([Part(name="imagereward", options={"model": "playground"})])


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(playground, "WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match="rewardtune playground build"):
        playground.reward_path("hpsv2")


@pytest.mark.slow  # the shipped weights, measured: ten seconds
def test_preference_models_agree_with_their_rule(shipped):
    rows = reward_quality.preference_rows(shipped, n=200, seed=3)
    own = [row for row in rows if row.target is not None]
    assert [row.model for row in own] == ["pickscore", "hpsv2"]
    for row in own:
        assert row.value >= 0.88, row  # measured here 0.905 and 0.914; docs/results/playground_rewards.json has as much
        (other,) = (r for r in rows if r.model == row.model and "," not in r.what and r != row)
        assert other.high < row.value, (row, other)


def test_aesthetic_head_follows_the_ratings(shipped):
    overall, within, _ = reward_quality.rating_rows(shipped["aesthetic"], n=300, seed=3)
    assert overall.value >= 0.93, overall  # measured here 0.951; docs/results/playground_rewards.json has 0.946
    assert within.value >= 0.75, within  # 0.814; 0.784


def test_detector_finds_what_is_asked_for(shipped):
    rows = reward_quality.detector_rows(shipped["objectness"], n=60, seed=3)
    for row in rows:
        if row.target is not None:
            assert row.value >= 0.97, row  # measured here 1.0; docs/results/playground_rewards.json has 0.99
    assert min(row.value for row in rows if "absent" in row.what) > 0.9


def test_objectness_falls_when_the_object_is_gone():
    objectness = rewards.Objectness("red heart", model=str(playground.reward_path("objectness")))
    heart = scenes.Object(colour="red", shape="heart", x=20.0, y=32.0, radius=13.0)
    star = scenes.Object(colour="blue", shape="star", x=48.0, y=32.0, radius=11.0)
    description = scenes.parse("a red heart and a blue star, night background")
    both = scenes.Scene(description=description, objects=(heart, star), horizon=36.0)
    images = scenes.render([both, replace(both, objects=(star,))])
    there, gone = objectness.native(images, ["", ""]).tolist()
    assert there > 0.5
    assert gone < 0.2


# the build


@pytest.mark.slow  # eight seconds
def test_build_of_the_rewards_resumes(tmp_path):
    from safetensors.torch import load_file

    from rewardtune.playground.build import build

    stages, interruptions = ("pickscore", "aesthetic", "objectness"), 0
    build(tmp_path / "whole", stages=stages, quick=True)
    while True:
        try:
            build(tmp_path / "parts", stages=stages, quick=True, stop_after=1)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions <= 5
    assert interruptions == 5  # text, clip, traits, pickscore and objectness, each once
    files = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
