"""Compositions: hinges, targets, ensembles, standardised and balanced sums, against the formulas written out."""

import pytest
import torch

from rewardtune import rewards
from rewardtune.errors import ConfigError, RewardError
from rewardtune.rewards import balance, hinge, mean_of, minimum_of, standardise, target
from rewardtune.rewards.base import Composition

PROMPTS = ["a", "b", "c"]
BRIGHT, SYMMETRY, TEAL = rewards.Brightness(), rewards.Symmetry(), rewards.Colour("teal")


@pytest.fixture
def images():
    """Three pictures of different brightness, symmetry and colour."""
    noise = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    return noise * torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1, 1)


def gradient(reward, images):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(reward(leaf, PROMPTS[: len(images)]).sum(), leaf)[0]


def norms(gradients):
    return gradients.flatten(1).norm(dim=1)


# -- hinge, target, standardise -------------------------------------------------------------------------------------


def test_hinge_is_the_formula_and_logs_the_native_value(images):
    bright = images.mean(dim=(1, 2, 3))  # about 0.2, 0.35, 0.5
    total, natives = hinge(BRIGHT, 0.3).parts(images, PROMPTS)
    torch.testing.assert_close(total, -(0.3 - bright).relu())
    assert (total == 0).tolist() == [False, True, True]
    assert list(natives) == ["brightness"]
    torch.testing.assert_close(natives["brightness"], bright)


def test_a_satisfied_hinge_has_no_gradient_and_an_open_one_that_of_its_reward(images):
    got, plain = gradient(hinge(BRIGHT, 0.3), images), gradient(BRIGHT, images)
    torch.testing.assert_close(got[0], plain[0])
    assert not got[1:].any()


def test_levels_are_given_as_the_log_shows_them(images):
    """Symmetry is minimised: a hinge stops at its level from above, and a target draws from both sides."""
    native = SYMMETRY.native(images, PROMPTS)
    level = native.median().item()
    torch.testing.assert_close(hinge(SYMMETRY, level)(images, PROMPTS), -(native - level).relu())
    torch.testing.assert_close(target(SYMMETRY, level)(images, PROMPTS), -(native - level).abs())
    z = standardise(SYMMETRY, mean=0.5, std=0.1)
    torch.testing.assert_close(z(images, PROMPTS), -(native - 0.5) / 0.1)
    assert list(z.parts(images, PROMPTS)[1]) == ["symmetry"]
    torch.testing.assert_close(z.parts(images, PROMPTS)[1]["symmetry"], native)


def test_image_rewards_own_loss_written_as_a_hinge(images):
    """ReFL minimises relu(2 - r) * 1e-3."""
    reward = rewards.from_callable(lambda i, p: 6 * i.mean(dim=(1, 2, 3)), name="imagereward")
    r = 6 * images.mean(dim=(1, 2, 3))
    assert r.min() < 2 < r.max()
    torch.testing.assert_close((1e-3 * hinge(reward, 2.0))(images, PROMPTS), -1e-3 * (2 - r).relu())


def test_target_draws_from_both_sides(images):
    got = gradient(target(BRIGHT, 0.35), images)
    plain = gradient(BRIGHT, images)
    torch.testing.assert_close(got[0], plain[0])
    torch.testing.assert_close(got[2], -plain[2])


def test_a_hinge_on_a_sum_and_compositions_in_sums(images):
    total = BRIGHT(images, PROMPTS) + 0.2 * SYMMETRY(images, PROMPTS)
    torch.testing.assert_close(hinge(BRIGHT + 0.2 * SYMMETRY, 0.3)(images, PROMPTS), -(0.3 - total).relu())
    mixed = 2 * hinge(BRIGHT, 0.3) - target(TEAL, 0.1) / 4
    expected = 2 * hinge(BRIGHT, 0.3)(images, PROMPTS) - target(TEAL, 0.1)(images, PROMPTS) / 4
    torch.testing.assert_close(mixed(images, PROMPTS), expected)
    assert mixed.name == "2*hinge(brightness, 0.3) - 0.25*target(colour, 0.1)"
    assert list(mixed.parts(images, PROMPTS)[1]) == ["brightness", "colour"]


# -- ensembles ------------------------------------------------------------------------------------------------------


def test_ensembles_are_mean_and_minimum_per_image_with_every_member_logged(images):
    z = standardise(BRIGHT, mean=0.35, std=0.1), standardise(SYMMETRY, mean=1.2, std=0.2)
    both = torch.stack([member(images, PROMPTS) for member in z])
    assert both.argmin(dim=0).unique().numel() == 2  # the worst member is not the same for all images
    for make, expected in ((mean_of, both.mean(dim=0)), (minimum_of, both.amin(dim=0))):
        total, natives = make(*z).parts(images, PROMPTS)
        torch.testing.assert_close(total, expected)
        assert list(natives) == ["brightness", "symmetry", make.name]
        torch.testing.assert_close(natives["symmetry"], SYMMETRY.native(images, PROMPTS))
        torch.testing.assert_close(natives[make.name], expected)


def test_the_minimum_pulls_at_its_worst_member_alone(images):
    got = gradient(minimum_of(BRIGHT, lambda i, p: 0.3 + 0 * i.sum((1, 2, 3))), images)
    torch.testing.assert_close(got[0], gradient(BRIGHT, images)[0])
    assert not got[1:].any()


def test_a_reward_made_in_passing_is_not_taken_for_an_earlier_one(images):
    class Both(Composition):
        def _measure(self, call):
            return sum(call.score(weight * BRIGHT) for weight in (2.0, 3.0, 4.0))

    torch.testing.assert_close(Both()(images, PROMPTS), 9 * BRIGHT(images, PROMPTS))


def test_each_reward_is_evaluated_once_however_often_it_occurs(images):
    calls = []

    def counted(images, prompts):
        calls.append(torch.is_grad_enabled())
        return images.mean(dim=(1, 2, 3))

    reward = rewards.from_callable(counted)
    everywhere = minimum_of(reward, SYMMETRY) + 0.5 * reward + hinge(reward, 0.3)
    _, natives = everywhere.parts(images.requires_grad_(), PROMPTS)
    assert calls == [True]
    assert list(natives) == ["counted", "symmetry", "minimum_of"]
    calls.clear()
    logged = 0 * reward + hinge(reward, 0.3)  # what was only logged has no graph to lend
    assert torch.autograd.grad(logged(images, PROMPTS).sum(), images)[0].any()
    assert calls == [False, True]


# -- balance --------------------------------------------------------------------------------------------------------


def test_balanced_parts_pull_with_the_mean_norm_times_their_weight(images):
    """f_k = mean_j |g_j| / |g_k| per image, written out."""
    parts, weights = [BRIGHT, SYMMETRY, TEAL], [1.0, 0.2, -3.0]
    gradients = torch.stack([gradient(part, images) for part in parts])
    lengths = gradients.flatten(2).norm(dim=2)
    assert lengths.max() > 10 * lengths.min()  # there is something to balance
    expected = sum(
        w * (g * (lengths.mean(dim=0) / own).view(-1, 1, 1, 1))
        for w, g, own in zip(weights, gradients, lengths, strict=True)
    )
    got = gradient(balance(sum(w * part for w, part in zip(weights, parts, strict=True))), images)
    torch.testing.assert_close(got, expected)


def test_scale_of_a_part_does_not_matter_to_the_direction(images):
    loud = rewards.from_callable(lambda i, p: 1000 * SYMMETRY(i, p))
    a, b = gradient(balance(BRIGHT + SYMMETRY), images), gradient(balance(BRIGHT + loud), images)
    torch.testing.assert_close(a / norms(a).view(-1, 1, 1, 1), b / norms(b).view(-1, 1, 1, 1))
    plain = gradient(BRIGHT + loud, images)
    assert torch.cosine_similarity(plain.flatten(1), a.flatten(1)).max() < 0.9


def test_the_value_is_the_plain_sum_with_and_without_a_gradient(images):
    plain = BRIGHT + 0.2 * SYMMETRY + 0 * rewards.JPEGBytes()
    expected, natives = plain.parts(images, PROMPTS)
    for leaf in (images, images.clone().requires_grad_()):
        total, own = balance(plain).parts(leaf, PROMPTS)
        torch.testing.assert_close(total, expected)
        assert list(own) == list(natives) == ["brightness", "symmetry", "jpeg_bytes"]
        assert all(torch.equal(own[name], natives[name]) and not own[name].requires_grad for name in own)


def test_nothing_depends_on_the_rest_of_the_batch(images):
    whole = gradient(balance(BRIGHT + SYMMETRY), images)
    alone = torch.cat([gradient(balance(BRIGHT + SYMMETRY), image[None]) for image in images])
    torch.testing.assert_close(whole, alone)


def test_a_part_without_a_gradient_leaves_the_others_alone_and_the_factor_is_limited(images):
    satisfied = balance(BRIGHT + hinge(SYMMETRY, 10.0))
    torch.testing.assert_close(gradient(satisfied, images), 0.5 * gradient(BRIGHT, images))  # the mean of |g| and 0
    faint = rewards.from_callable(lambda i, p: 1e-9 * i.square().mean(dim=(1, 2, 3)))
    limited = gradient(balance(BRIGHT + faint, limit=10), images)
    torch.testing.assert_close(limited, 0.5 * gradient(BRIGHT, images), rtol=0, atol=1e-7)


def test_each_part_is_evaluated_once_and_its_graph_freed_before_the_next(images):
    alive, calls = [], []

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(True)
            return x.mean(dim=(1, 2, 3))

        @staticmethod
        def backward(ctx, slope):
            alive.pop()
            return slope.view(-1, 1, 1, 1).expand(3, 3, 16, 20) / 960

    def part(name):
        def score(images, prompts):
            assert not alive, "the graph of an earlier part is still there"
            calls.append(name)
            return Graph.apply(images)

        return rewards.from_callable(score, name)

    gradient(balance(part("a") + part("b")), images)
    assert calls == ["a", "b"]


def test_balance_works_in_half_precision_and_inside_other_compositions(images):
    half = images.half().requires_grad_()
    balance(BRIGHT + SYMMETRY)(half, PROMPTS).sum().backward()
    reference = gradient(balance(BRIGHT + SYMMETRY), images.half().float())
    torch.testing.assert_close(half.grad.float(), reference, rtol=2e-3, atol=1e-6)
    nested = gradient(2 * balance(balance(BRIGHT + SYMMETRY) + TEAL) + 0 * SYMMETRY, images)
    inner, teal = gradient(balance(BRIGHT + SYMMETRY), images), gradient(TEAL, images)
    mean = (norms(inner) + norms(teal)) / 2
    expected = 2 * sum(g * (mean / norms(g)).view(-1, 1, 1, 1) for g in (inner, teal))
    torch.testing.assert_close(nested, expected)


def test_compositions_pass_the_check_and_its_errors_name_the_member():
    good = balance(hinge(BRIGHT, -5.0) + SYMMETRY) + minimum_of(TEAL, target(BRIGHT, 0.2)) + 0 * rewards.JPEGBytes()
    rewards.check_reward(good, size=16, prompts=["one"])  # the hinge is satisfied by any picture
    broken = rewards.from_callable(lambda i, p: i.round().mean(dim=(1, 2, 3)), name="mine")
    for composed in (hinge(broken, 0.3), minimum_of(BRIGHT, broken), balance(BRIGHT + broken)):
        with pytest.raises(RewardError, match=r"^reward 'mine' \(a part of .*exactly 0"):
            rewards.check_reward(composed, size=8, prompts=["one"])


def test_compositions_move_their_members():
    class Net(rewards.Reward):
        def __init__(self):
            self.net = torch.nn.Linear(2, 2)

    nets = [Net() for _ in range(4)]
    balance(hinge(nets[0], 1) + minimum_of(nets[1], mean_of(nets[2], standardise(nets[3], mean=0, std=1)))).to("meta")
    assert all(net.net.weight.is_meta for net in nets)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hinge(BRIGHT, "2"), "hinge: level is '2'; legal is a finite number"),
        (lambda: hinge(BRIGHT, float("nan")), "hinge: level is nan"),
        (lambda: target(BRIGHT, True), "target: value is True"),
        (lambda: hinge(0.5 * SYMMETRY, 0.3), "hinge: .* put the weight outside: 0.5 . hinge"),
        (lambda: target(1.0 * SYMMETRY, 0.3), "target: '1.symmetry' is scored with the other sign than 'symmetry'"),
        (lambda: standardise(-BRIGHT, mean=0.2, std=0.1), "standardise: '-1.brightness' is scored with the other"),
        (lambda: hinge(3, 2.0), "cannot build 'hinge': 3 is a number"),
        (lambda: hinge(rewards.Symmetry, 2.0), "Symmetry is a class; make one first"),
        (lambda: standardise(BRIGHT, mean=0.2, std=0), "std is 0; legal is above 0"),
        (lambda: mean_of(BRIGHT), "mean_of: 1 rewards given; legal is two or more"),
        (lambda: minimum_of(BRIGHT, "clip"), "cannot use in minimum_of: 'clip' is a str"),
        (lambda: balance(BRIGHT), "balance: 'brightness' has fewer than two parts"),
        (lambda: balance(BRIGHT + 0 * SYMMETRY), "has fewer than two parts"),
        (lambda: balance(BRIGHT + SYMMETRY, limit=0.5), "limit is 0.5; legal is 1 or more"),
    ],
)
def test_wrong_settings_are_config_errors(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_balancing_what_has_no_gradient_is_an_error(images):
    with pytest.raises(RewardError, match="balance: 'jpeg_bytes' has no gradient; give it the weight 0"):
        balance(BRIGHT + rewards.JPEGBytes())(images.requires_grad_(), PROMPTS)
