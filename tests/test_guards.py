"""Rules on histories with known answers; a panel on the playground that notices what training must not do."""

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from loopholes import erased
from PIL import Image

from rewardtune import evaluate, playground, rewards
from rewardtune.diversity import Features
from rewardtune.errors import ConfigError
from rewardtune.guards import (
    Evaluation,
    Metric,
    Rule,
    action,
    best_of,
    check_held_out,
    check_rules,
    check_start,
    judge,
    make_rules,
    paired,
    violates,
)
from rewardtune.panel import Panel, as_saved, saturation, sharpness
from rewardtune.pictures import open_image
from rewardtune.rewards.base import Reward, from_callable


def evaluations(*values, name="clipscore", spread=0.0, prompts=8):
    """One evaluation for each value, at steps 0, 10, ...; pictures differ by `spread`, the same at every step."""
    offsets = [spread * (2 * k / (prompts - 1) - 1) for k in range(prompts)]
    return [
        Evaluation(
            step=10 * index,
            values={name: value},
            pictures={name: [value + offset for offset in offsets]},
            prompts=list(range(prompts)),
        )
        for index, value in enumerate(values)
    ]


# rules


@pytest.mark.parametrize(
    ("settings", "value", "base", "crossed"),
    [
        ({"falls_by": 0.10}, 0.90, 1.0, False),  # the bound itself is kept
        ({"falls_by": 0.10}, 0.89, 1.0, True),
        ({"falls_by": 0.10}, 1.50, 1.0, False),
        ({"falls_by": 0.10}, -1.05, -1.0, False),  # of |base|
        ({"falls_by": 0.10}, -1.15, -1.0, True),
        ({"falls_by": 0.10}, -0.50, -1.0, False),  # a rise
        ({"rises_by": 0.50}, 1.40, 1.0, False),
        ({"rises_by": 0.50}, 1.60, 1.0, True),
        ({"rises_by": 0.50}, -0.40, -1.0, True),
        ({"rises_by": 0.50}, -1.60, -1.0, False),
        ({"below": 0.5}, 0.5, 9.0, False),
        ({"below": 0.5}, 0.49, 9.0, True),
        ({"below": 0}, -1e-9, 9.0, True),
        ({"above": 0}, 0.0, 0.0, False),
        ({"above": 0}, 1.0, 0.0, True),
        ({"above": 0.5}, math.nan, 0.0, True),
        ({"below": 0.5}, math.nan, 0.0, True),
        ({"falls_by": 0.1}, math.nan, 1.0, True),
        ({"falls_by": 0.1}, 1.0, math.nan, True),
        ({"above": 0.5}, math.inf, 0.0, True),
    ],
)
def test_bounds(settings, value, base, crossed):
    assert Rule(metric="clipscore", **settings).crossed(value, base) is crossed


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"metric": "vendi"}, "no bound; legal is exactly one of falls_by, rises_by, below, above"),
        ({"metric": "vendi", "falls_by": 0.1, "below": 3}, "falls_by and below"),
        ({"metric": "vendi", "fals_by": 0.1}, r"unknown key 'fals_by' \(did you mean 'falls_by'\?\)"),
        ({"falls_by": 0.1}, "'metric' is missing"),
        ({"metric": 3, "falls_by": 0.1}, "metric is 3"),
        ({"metric": "vendi", "falls_by": 10}, "0.10 is 10 %"),
        ({"metric": "vendi", "falls_by": 0}, "above 0"),
        ({"metric": "vendi", "falls_by": -0.1}, "above 0"),
        ({"metric": "vendi", "rises_by": 0}, "above 0"),
        ({"metric": "vendi", "below": math.nan}, "finite number"),
        ({"metric": "vendi", "above": math.inf}, "finite number"),
        ({"metric": "vendi", "below": True}, "finite number"),
        ({"metric": "vendi", "below": "3"}, "finite number"),
        ({"metric": "vendi", "below": 3, "patience": 0}, "patience is 0"),
        ({"metric": "vendi", "below": 3, "patience": 1.5}, "patience is 1.5"),
        ({"metric": "vendi", "below": 3, "then": "stopp"}, r"did you mean 'stop'\?\); legal: warn, rollback, stop"),
        ({"metric": "vendi", "below": 3, "certain": "yes"}, "legal: true, false"),
        ("vendi", "unknown key 'vendi'"),
    ],
)
def test_wrong_rules_are_refused_with_their_place(row, words):
    with pytest.raises(ConfigError, match=rf"guards\.rules\[1\]: .*{words}"):
        make_rules([{"metric": "vendi", "below": 3}, row])


def test_all_problems_at_once_and_good_rules_as_they_are():
    with pytest.raises(ConfigError, match=r"rules\[0\].*\n.*rules\[2\]"):
        make_rules([{"metric": "a"}, {"metric": "b", "below": 1}, {"metric": "c", "above": "x"}])
    rule = Rule(metric="vendi", falls_by=0.2, patience=2, then="rollback")
    assert make_rules([{"metric": "vendi", "falls_by": 0.2, "patience": 2, "then": "rollback"}, rule]) == [rule, rule]


METRICS = {
    "clipscore": Metric(what="", better="more"),
    "symmetry": Metric(what="", better="less"),
    "sharpness": Metric(what=""),
    "base_distance": Metric(what="", better="less", zero=True),
    "pairwise_distance": Metric(what="", better="more", paired=False),
}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            Rule(metric="clipscor", falls_by=0.1),
            r"'clipscor' is not measured \(did you mean 'clipscore'\?\); legal: clip",
        ),
        (Rule(metric="vendi", below=3), r"'vendi' is not measured.*guards\.features"),
        (Rule(metric="prompt_vendi", below=3), "at least two pictures of every eval prompt"),
        (Rule(metric="base_distance", rises_by=0.5), "0 at step 0, so rises_by means nothing; use above"),
        (Rule(metric="symmetry", falls_by=0.1), "would act on an improvement; use rises_by"),
        (Rule(metric="clipscore", rises_by=0.1), "would act on an improvement; use falls_by"),
        (Rule(metric="pairwise_distance", falls_by=0.1, certain=True), "leave certain out"),
    ],
)
def test_rules_that_cannot_mean_anything_are_refused_before_training(rule, words):
    with pytest.raises(ConfigError, match=rf"guards\.rules\[1\]: .*{words}"):
        check_rules([Rule(metric="clipscore", falls_by=0.1), rule], METRICS)


def test_rules_that_mean_something_pass():
    rules = [
        Rule(metric="symmetry", rises_by=0.1),
        Rule(metric="sharpness", rises_by=0.5),
        Rule(metric="sharpness", falls_by=0.5, certain=True),
        Rule(metric="base_distance", above=0.5),
        Rule(metric="clipscore", below=0.1),
    ]
    check_rules(rules, METRICS)


@pytest.mark.parametrize(
    ("rule", "base", "spread", "words"),
    [
        (Rule(metric="clipscore", falls_by=0.1), 0.0, 0.0, "cannot be told from 0"),
        (Rule(metric="clipscore", falls_by=0.1), 0.1, 2.0, r"0.1 ± 1.2 at step 0, which cannot be told from 0"),
        (Rule(metric="clipscore", rises_by=0.1), -0.1, 2.0, "use below or above"),
        (Rule(metric="clipscore", below=0.7), 0.6, 0.0, "already below 0.7"),
        (Rule(metric="clipscore", above=0.5), 0.6, 0.0, "already above 0.5"),
        (Rule(metric="clipscore", above=0.5), math.nan, 0.0, "is NaN at step 0"),
    ],
)
def test_a_start_that_makes_a_rule_meaningless_is_refused(rule, base, spread, words):
    with pytest.raises(ConfigError, match=words):
        check_start([rule], evaluations(base, spread=spread)[0])


def test_a_good_start_passes():
    rules = [Rule(metric="clipscore", falls_by=0.1), Rule(metric="clipscore", below=-2)]
    for base in (0.7, -0.7):
        check_start(rules, evaluations(base, spread=0.2)[0])
        check_start(rules, evaluations(base, prompts=2)[0])
    alone = replace(evaluations(0.7)[0], pictures={}, prompts=[])
    check_start(rules, alone)  # a metric of the whole set has no interval
    wide = evaluations(0.7, spread=0.69, prompts=3)[0]  # an interval that holds 0, but no prompt below it
    assert wide.interval("clipscore")[1] > 0.7
    check_start(rules[:1], wide)


# judging


def test_the_words_of_a_stop():
    history = evaluations(0.781, 0.79, 0.78, 0.70, 0.640)
    rules = [Rule(metric="clipscore", falls_by=0.10)]
    assert judge(history[:3], rules) == []
    (verdict,) = judge(history, rules, best=10)
    assert verdict.words.startswith(
        "clipscore fell from 0.781 (step 0) to 0.64 (step 40), 18.1 %: more than the 10 % of guards.rules[0]; "
        "training stops, best checkpoint is step 10"
    )
    assert (verdict.due, verdict.step, verdict.row) == (True, 40, 2)
    assert verdict.change == pytest.approx(-0.141)
    assert action([verdict]) == "stop"


def test_step_0_and_unharmed_runs_give_no_verdict():
    rules = [Rule(metric="clipscore", falls_by=0.1), Rule(metric="clipscore", above=9)]
    assert judge(evaluations(0.8), rules) == judge(evaluations(0.8, 0.9), rules) == []
    assert action([]) is None


@pytest.mark.parametrize(
    ("values", "row", "due"),
    [
        ((1.0, 0.8), 1, False),
        ((1.0, 0.8, 0.8), 2, True),
        ((1.0, 0.8, 1.0, 0.8), 1, False),  # not in a row
        ((1.0, math.nan, 0.8), 2, True),
        ((1.0, 0.8, 0.8, 0.8), 3, True),
    ],
)
def test_patience_counts_evaluations_in_a_row(values, row, due):
    (verdict,) = judge(evaluations(*values), [Rule(metric="clipscore", falls_by=0.1, patience=2)])
    assert (verdict.row, verdict.due) == (row, due)
    assert ("1 of 2 in a row, training goes on" in verdict.words) is not due
    assert action([verdict]) == ("stop" if due else None)


def test_after_a_rollback_patience_starts_again():
    rules = [Rule(metric="clipscore", falls_by=0.1, patience=2, then="rollback")]
    history = evaluations(1.0, 0.8, 0.8, 0.8)
    assert judge(history, rules, since=20)[0].row == 1
    assert action(judge(history, rules, since=20)) is None
    assert "training goes back to step 0, the best checkpoint" in judge(history, rules, best=0)[0].words


def test_a_nan_violates_and_is_named():
    history = evaluations(0.8, math.nan)
    history[1].values["nan"] = 2.0
    (verdict,) = judge(history, [Rule(metric="clipscore", above=5, certain=True)])
    assert verdict.due
    assert "clipscore is NaN at step 10 (2 of 8 pictures hold NaN), which violates guards.rules[0]" in verdict.words


def test_words_of_the_other_bounds():
    words = [
        judge(evaluations(*values), [rule])[0].words
        for values, rule in [
            ((0.5, 0.8), Rule(metric="clipscore", rises_by=0.5, then="warn")),
            ((0.5, 0.2), Rule(metric="clipscore", below=0.3)),
            ((0.0, 0.8), Rule(metric="clipscore", above=0.5)),
        ]
    ]
    assert words[0].startswith("clipscore rose from 0.5 (step 0) to 0.8 (step 10), 60 %: more than the 50 % of")
    assert "; a warning" in words[0]
    assert words[1].startswith(
        "clipscore is 0.2 at step 10 (0.5 at step 0): below the 0.3 of guards.rules[0]; training"
    )
    assert words[2].startswith("clipscore is 0.8 at step 10 (0 at step 0): above the 0.5 of guards.rules[0]; training")


def test_the_most_severe_rule_decides():
    rules = [Rule(metric="clipscore", falls_by=0.1, then=then) for then in ("warn", "stop", "rollback")]
    verdicts = judge(evaluations(1.0, 0.5), rules)
    assert [v.index for v in verdicts] == [0, 1, 2]
    assert action(verdicts) == "stop"
    assert action([verdicts[0], verdicts[2]]) == "rollback"
    assert action([verdicts[0]]) == "warn"


def noisy(changes):
    """Two evaluations whose pictures change by `changes`."""
    first = evaluations(1.0, prompts=len(changes))[0]
    pictures = [1.0 + change for change in changes]
    values = {"clipscore": sum(pictures) / len(pictures)}
    return [first, replace(first, step=10, values=values, pictures={"clipscore": pictures})]


def test_the_interval_is_students_on_paired_differences():
    from scipy import stats

    changes = [-0.5, -0.1, -0.4, 0.1, -0.3]
    history = noisy(changes)
    mean, half = paired("clipscore", history[1], history[0])
    low, high = stats.t.interval(0.95, 4, loc=sum(changes) / 5, scale=stats.sem(changes))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=2e-3)


def test_a_fall_within_the_noise_is_told_from_one_beyond_it():
    rule = Rule(metric="clipscore", falls_by=0.1, certain=True)
    loose, firm = noisy([-0.9, 0.6, -0.8, 0.5]), noisy([-0.2, -0.15, -0.25, -0.2])
    (unsure,), (sure,) = judge(loose, [rule]), judge(firm, [rule])
    assert (unsure.certain, unsure.due, unsure.row) == (False, False, 0)
    assert "since the rule asks for a certain change" in unsure.words
    assert "within its 95 % interval" in unsure.words
    assert (sure.certain, sure.due) == (True, True)
    assert "beyond its 95 % interval" in sure.words
    assert not violates(rule, loose[1], loose[0])
    assert judge(loose, [replace(rule, certain=False)])[0].due  # only the asked rule waits for certainty
    assert judge(loose, [replace(rule, certain=False)])[0].certain is False


def test_seeds_of_one_prompt_are_not_independent():
    """Ten seeds of each of two prompts are two pairs, not twenty."""
    first = Evaluation(step=0, values={"a": 1.0}, pictures={"a": [1.0] * 20}, prompts=[0] * 10 + [1] * 10)
    after = replace(first, step=10, values={"a": 0.7}, pictures={"a": [0.8] * 10 + [0.6] * 10})
    mean, half = paired("a", after, first)
    assert mean == pytest.approx(-0.3)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-3)  # t of one degree of freedom, standard error 0.1


def test_a_metric_of_the_whole_set_has_no_certainty():
    first = Evaluation(step=0, values={"vendi": 8.0})
    (verdict,) = judge([first, Evaluation(step=10, values={"vendi": 2.0})], [Rule(metric="vendi", falls_by=0.5)])
    assert verdict.certain is None
    assert verdict.due
    assert math.isnan(verdict.half)


def test_best_of():
    history = evaluations(0.5, 0.7, 0.9, 0.9, name="reward")
    for evaluation, clip in zip(history, (0.8, 0.79, 0.75, 0.6), strict=True):
        evaluation.values["clipscore"] = clip
    assert best_of(history, "reward") == 20  # of equals the earliest
    assert best_of(history, "reward", less=True) == 0
    assert best_of(history, "reward", [Rule(metric="clipscore", falls_by=0.05)]) == 10
    assert best_of(history, "reward", [Rule(metric="clipscore", falls_by=0.05, patience=3, then="warn")]) == 10
    assert best_of(history, "reward", [Rule(metric="clipscore", falls_by=0.001)]) == 0
    history[2].values["reward"] = math.nan
    assert best_of(history, "reward") == 30
    with pytest.raises(ConfigError, match=r"'rewrad' is not measured \(did you mean 'reward'\?\)"):
        best_of(history, "rewrad")


def test_a_history_survives_json():
    history = evaluations(0.8, 0.1 + 0.2, spread=0.1)
    lines = [json.dumps(asdict(evaluation)) for evaluation in history]
    assert [Evaluation(**json.loads(line)) for line in lines] == history


def test_a_reward_that_is_trained_on_cannot_guard():
    def part(name=None, **more):
        plain = {"weight": 1.0, "options": {}, "mean_of": None, "minimum_of": None, "balance": None}
        return SimpleNamespace(name=name, **(plain | more))

    clip, other = part("clipscore"), part("clipscore", options={"model": "playground"})
    check_held_out([part("aesthetic"), part("clipscore", weight=0.0)], [clip])  # only logged, not trained
    check_held_out([other], [clip])
    for trained in ([clip], [part("hpsv2"), part(mean_of=[part("hpsv2"), part("CLIPScore")])]):
        with pytest.raises(ConfigError, match="clipscore is trained on, so it cannot guard"):
            check_held_out(trained, [clip])
    with pytest.raises(ConfigError, match="symmetry is trained on, so it cannot guard"):  # the same value
        check_held_out([part("symmetry", options={"detach_std": True})], [part("symmetry")])
    own = [part("mine:reward", options={"scale": scale}) for scale in (1, 2)]
    check_held_out(own[:1], own[1:])


def test_rules_need_no_torch():
    code = "import sys, rewardtune.guards as g; g.Rule(metric='a', below=1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# the panel


@pytest.fixture(scope="module")
def scenes():
    return playground.draw_scenes(12, random.Random("guards"), split="eval", layout="free")


@pytest.fixture(scope="module")
def drawn(scenes):
    return playground.render(scenes)


@pytest.fixture(scope="module")
def panel(scenes):
    return Panel(
        prompts=[scene.caption for scene in scenes],
        rewards=rewards.CLIPScore(model=str(playground.clip_path())),
        trained=from_callable(lambda images, prompts: -images.mean((1, 2, 3)), "darkness"),
        features=Features("playground"),
    )


@pytest.fixture(scope="module")
def first(panel, drawn):
    return panel(drawn, base=drawn, step=0)


RULES = [
    Rule(metric="clipscore", falls_by=0.10, certain=True),
    Rule(metric="vendi", falls_by=0.20),
    Rule(metric="saturation", falls_by=0.30, certain=True),
    Rule(metric="sharpness", falls_by=0.50, certain=True),
    Rule(metric="black", above=0),
]


def seen(panel, first, images, base):
    """The metrics of RULES that the panel's evaluation of `images` violates, step 1."""
    history = [first, panel(images, base=base, step=1)]
    return {verdict.rule.metric for verdict in judge(history, RULES) if verdict.due}


def test_at_step_0_nothing_has_changed(panel, first, drawn):
    assert list(first.values) == list(panel.metrics())
    assert first.values["base_pixels"] == 0
    assert first.values["base_distance"] == pytest.approx(0, abs=1e-6)
    assert first.values["black"] == first.values["nan"] == 0
    assert 1 < first.values["vendi"] <= 12
    check_rules(RULES, panel.metrics())
    check_start(RULES, first)
    assert seen(panel, first, drawn, drawn) == set()


def test_the_panels_scores_are_the_rewards_own(panel, first, drawn):
    expected = panel.rewards(as_saved(drawn), panel.prompts)
    torch.testing.assert_close(torch.tensor(first.pictures["clipscore"]), expected, rtol=1e-5, atol=1e-6)
    assert first.values["reward"] == first.values["darkness"] == pytest.approx(-first.values["brightness"], rel=1e-6)


def test_erased_objects_are_noticed(panel, first, drawn, scenes):
    assert "clipscore" in seen(panel, first, erased(scenes), drawn)


def test_grey_pictures_are_noticed(panel, first, drawn):
    grey = drawn.mean(1, keepdim=True).expand_as(drawn)
    assert "saturation" in seen(panel, first, grey, drawn)
    assert panel(grey, base=drawn, step=1).values["saturation"] == pytest.approx(0, abs=1e-6)


def test_one_picture_for_all_prompts_is_noticed(panel, first, drawn):
    repeated = drawn[:1].expand_as(drawn)
    assert {"vendi", "clipscore"} <= seen(panel, first, repeated, drawn)
    values = panel(repeated, base=drawn, step=1).values
    assert values["vendi"] == pytest.approx(1, abs=1e-3)
    assert values["pairwise_distance"] == pytest.approx(0, abs=1e-5)


def test_blurred_and_black_pictures_are_noticed(panel, first, drawn):
    from rewardtune.edits import blur

    assert "sharpness" in seen(panel, first, blur(drawn, 1 / 32), drawn)
    dark = drawn.clone()
    dark[3] = 0
    assert "black" in seen(panel, first, dark, drawn)


def test_the_distance_to_the_base_follows_the_picture(panel, drawn):
    moved = drawn.clone()
    moved[:6] = drawn[6:]
    found = panel(moved, base=drawn, step=1)
    distances, pixels = found.pictures["base_distance"], found.pictures["base_pixels"]
    assert min(distances[:6]) > 1e-3 > max(map(abs, distances[6:]))
    assert min(pixels[:6]) > 0 == max(pixels[6:])
    shifted = panel((drawn * 0.5 + 0.25), base=drawn * 0.5, step=1)
    assert shifted.values["base_pixels"] == pytest.approx(0.25, abs=1 / 255)


def test_a_nan_picture_spoils_what_it_takes_part_in_and_is_counted(panel, first, drawn):
    spoiled = drawn.clone()
    spoiled[5, 0, 1, 1], spoiled[7, 1, 2, 2] = math.nan, math.inf
    found = panel(spoiled, base=drawn, step=1)
    assert found.values["nan"] == 2
    for name in ("clipscore", "reward", "darkness", "vendi", "sharpness", "base_distance", "base_pixels"):
        assert math.isnan(found.values[name])
    for name in ("clipscore", "sharpness", "base_distance"):
        assert [math.isnan(value) for value in found.pictures[name]] == [row in (5, 7) for row in range(12)]
    others = [row for row in range(12) if row not in (5, 7)]
    torch.testing.assert_close(
        [found.pictures["clipscore"][row] for row in others], [first.pictures["clipscore"][row] for row in others]
    )
    assert {v.rule.metric for v in judge([first, found], RULES)} == {"clipscore", "vendi", "saturation", "sharpness"}
    nothing = panel(torch.full_like(drawn, math.nan), base=drawn, step=1)
    assert nothing.values["nan"] == 12
    assert math.isnan(nothing.values["clipscore"])


def test_saved_pictures_give_the_same_numbers(panel, first, drawn, tmp_path):
    """The reference of a resumed run is read from samples/step-000000."""
    files = evaluate.save_images(drawn, tmp_path)
    read = torch.stack([open_image(file)[0] for file in files])
    assert panel(read, base=read, step=0) == first


def test_several_seeds_of_a_prompt(drawn, scenes):
    prompts = [scene.caption for scene in scenes[:4]] * 3
    panel = Panel(prompts=prompts, features=Features("playground"))
    within = panel(drawn[:4].repeat(3, 1, 1, 1), base=drawn, step=1)  # the seeds of a prompt alike
    assert within.values["prompt_vendi"] == pytest.approx(1, abs=1e-3)
    assert within.values["vendi"] > 1.05
    across = panel(drawn[:3].repeat_interleave(4, 0), base=drawn, step=1)  # one picture a seed, whatever the prompt
    assert across.values["vendi"] == pytest.approx(1, abs=1e-3)
    assert across.values["prompt_vendi"] > 1.05
    assert within.prompts == [0, 1, 2, 3] * 3
    assert within.interval("prompt_vendi")[1] == pytest.approx(0, abs=1e-3)


def test_what_is_measured_depends_on_what_is_given(scenes, drawn):
    bare = Panel(prompts=[scene.caption for scene in scenes])
    assert list(bare.metrics()) == ["sharpness", "saturation", "brightness", "base_pixels", "black", "nan"]
    assert list(bare(drawn, base=drawn, step=0).values) == list(bare.metrics())
    alone = Panel(prompts=["a"] * 12, features=Features("playground"))
    assert "vendi" not in alone.metrics()
    assert "prompt_vendi" in alone.metrics()


class Flatness(Reward):
    minimise = True

    def native(self, images, prompts):
        return images.std((1, 2, 3))


def test_names_directions_and_given_scores(drawn):
    sharp = from_callable(lambda images, prompts: images[:, 0].mean((1, 2)), "sharpness")
    trained = Flatness() + 0.5 * sharp - from_callable(lambda images, prompts: images.amax((1, 2, 3)), "peak")
    panel = Panel(prompts=["x"] * 12, rewards=Flatness() + 0.0 * sharp, trained=trained)
    found = panel.metrics()
    assert list(found)[:6] == [
        "reward",
        "flatness",
        "trained_sharpness",
        "peak",
        "heldout_flatness",
        "heldout_sharpness",
    ]
    better = [found[name].better for name in list(found)[:6]]
    assert better == ["more", "less", "more", "less", "less", "more"]
    scores = evaluate.score(trained, drawn, ["x"] * 12)
    given = panel(drawn, base=drawn, step=0, scores=scores)
    assert list(given.values) == list(found)
    assert given.pictures["reward"] == scores["reward"].tolist()
    assert given.values["reward"] == pytest.approx(panel(drawn, base=drawn, step=0).values["reward"], abs=0.01)


def test_pictures_that_do_not_fit_are_refused(panel, drawn):
    for images, base in ((drawn[:3], drawn[:3]), (drawn, drawn[:3]), (drawn, drawn[..., :32])):
        with pytest.raises(ConfigError, match="a panel of 12 prompts was given"):
            panel(images, base=base, step=0)


def test_measures_by_hand():
    board = torch.zeros(1, 3, 6, 6)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1.0  # the Laplacian of a checkerboard is +4 and -4
    assert sharpness(board).item() == pytest.approx(4)
    assert sharpness(torch.linspace(0, 1, 6).expand(1, 3, 6, 6)).item() == pytest.approx(0, abs=1e-6)
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.2, 0.6, 0.4]]).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    torch.testing.assert_close(saturation(colours), torch.tensor([1.0, 0.0, 0.4]))


def test_as_saved_is_what_pillow_keeps(drawn, tmp_path):
    noisy = drawn[:1] + 0.1 * torch.randn(drawn[:1].shape, generator=torch.Generator().manual_seed(0))
    (file,) = evaluate.save_images(noisy, tmp_path)
    with Image.open(file) as opened:
        pixels = torch.tensor(list(opened.convert("RGB").getdata())).view(64, 64, 3).permute(2, 0, 1)
    assert torch.equal((as_saved(noisy)[0] * 255).round().long(), pixels)
