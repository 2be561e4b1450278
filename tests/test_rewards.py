"""Rewards: arithmetic, parts, loading by name, and the check before training."""

import random
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rewardtune import rewards
from rewardtune.errors import ConfigError, RewardError

PROMPTS = ["a cat", "a dog", "a bird"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(1))


class Counted(rewards.Reward):
    """Minimised, so that native and score differ in sign; counts how often it is evaluated."""

    name = "red"
    minimise = True

    def __init__(self):
        self.calls = 0

    def native(self, images, prompts):
        self.calls += 1
        return images[:, 0].mean(dim=(1, 2))


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_arithmetic_is_that_of_the_scores(images):
    a, b, c = rewards.Brightness(), rewards.Symmetry(), rewards.Colour("teal")
    A, B, C = (r(images, PROMPTS) for r in (a, b, c))
    cases = {
        "weights": (1.0 * a + 0.2 * b, A + 0.2 * B),
        "minus": (a - b, A - B),
        "negative": (-a, -A),
        "quotient": (a / 2, A / 2),
        "right factor": (a * 3, 3 * A),
        "sum()": (sum([a, b, c]), A + B + C),
        "nested": (0.5 * (a + 2 * (b - c)) / 4, (A + 2 * (B - C)) / 8),
        "plain callable right": (a + mean_of_squares, A + images.square().mean((1, 2, 3))),
        "plain callable left": (mean_of_squares - a, images.square().mean((1, 2, 3)) - A),
    }
    for law, (reward, expected) in cases.items():
        torch.testing.assert_close(reward(images, PROMPTS), expected, msg=lambda text, law=law: f"{law}: {text}")


def mean_of_squares(images, prompts):
    return images.square().mean(dim=(1, 2, 3))


def test_gradient_of_a_sum_is_the_weighted_sum_of_gradients(images):
    def gradient(reward):
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(reward(leaf, PROMPTS).sum(), leaf)[0]

    a, b = rewards.Brightness(), rewards.Symmetry()
    torch.testing.assert_close(gradient(1.5 * a - 0.3 * b), 1.5 * gradient(a) - 0.3 * gradient(b))


def test_parts_are_computed_once_and_logged_in_their_native_sign(images):
    red = Counted()
    reward = 2.0 * red + rewards.Brightness()
    total, natives = reward.parts(images.requires_grad_(), PROMPTS)
    assert red.calls == 1
    assert list(natives) == ["red", "brightness"]
    assert not any(value.requires_grad for value in natives.values())
    assert total.requires_grad
    torch.testing.assert_close(natives["red"], images[:, 0].mean(dim=(1, 2)).detach())
    torch.testing.assert_close(total, -2.0 * natives["red"] + natives["brightness"])
    torch.testing.assert_close(total, reward(images, PROMPTS))


def test_the_same_reward_twice_is_one_part(images):
    red = Counted()
    total, natives = (red + 2 * red).parts(images, PROMPTS)
    assert red.calls == 1
    assert list(natives) == ["red"]
    torch.testing.assert_close(total, -3 * natives["red"])


def test_different_rewards_of_one_name_get_a_suffix(images):
    third = rewards.from_callable(mean_of_squares, name="red_2")
    _, natives = (third + Counted() + Counted() + Counted()).parts(images, PROMPTS)
    assert list(natives) == ["red_2", "red", "red_3", "red_4"]


def test_weight_zero_is_only_logged(images):
    reward = (
        rewards.Brightness() + 0 * rewards.JPEGBytes() + 0 * rewards.from_callable(lambda i, p: i.mean((1, 2, 3)) / 0)
    )
    total, natives = reward.parts(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(total, images.mean(dim=(1, 2, 3)))  # 0 * inf would be NaN
    assert natives["jpeg_bytes"].min() > 100
    assert natives["lambda"].isinf().all()


def test_score_and_log_may_differ_by_more_than_a_sign(images):
    class Odds(rewards.Reward):
        def evaluate(self, images, prompts):
            logit = images.mean(dim=(1, 2, 3))
            return -torch.nn.functional.softplus(logit), logit.sigmoid()

    total, natives = (0.5 * Odds()).parts(images, PROMPTS)
    torch.testing.assert_close(natives["odds"], images.mean(dim=(1, 2, 3)).sigmoid())
    torch.testing.assert_close(total, 0.5 * (1 - natives["odds"]).log())  # -softplus(x) = log(1 - sigmoid(x))


def test_names_and_half_precision(images):
    a, b = rewards.Brightness(), rewards.Symmetry()
    assert (1.0 * a + 0.2 * b).name == "1*brightness + 0.2*symmetry"
    assert (-a - b / 4).name == "-1*brightness - 0.25*symmetry"
    assert rewards.Brightness()(images.bfloat16(), PROMPTS).dtype == torch.float32


def test_to_reaches_the_modules_and_tensors_of_every_part():
    class Net(rewards.Reward):
        def __init__(self):
            self.net = torch.nn.Linear(2, 2)
            self.offset = torch.zeros(3)

    net = Net()
    (rewards.Brightness() + 2 * net).to("meta")
    assert net.net.weight.device.type == "meta"
    assert net.offset.device.type == "meta"


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (lambda a: a + 1, "brightness.*1 is a number.*0.2 \\* a"),
        (lambda a: 1 - a, "1 is a number"),
        (lambda a: 1 + a, "1 is a number"),
        (lambda a: a + 0, "0 is a number"),
        (lambda a: a + "clip", "'clip' is a str"),
        (lambda a: a + rewards.Symmetry, "Symmetry is a class; make one first"),
        (lambda a: a * a, "cannot multiply or divide rewards"),
        (lambda a: a * "2", "weight.*'2'.*finite number"),
        (lambda a: float("nan") * a, "weight.*nan"),
        (lambda a: a * True, "weight.*True"),
        (lambda a: a / 0, "divided by 0"),
        (lambda a: rewards.from_callable(rewards.Symmetry), "from_callable needs a function"),
        (lambda a: rewards.from_callable(3), "from_callable needs a function"),
    ],
)
def test_wrong_arithmetic_is_a_config_error(expression, words):
    with pytest.raises(ConfigError, match=words):
        expression(rewards.Brightness())


# -- loading --------------------------------------------------------------------------------------------------------


def test_load_built_in_names_and_settings():
    assert isinstance(rewards.load("symmetry"), rewards.Symmetry)
    assert rewards.load("Symmetry", {"detach_std": True}).detach_std
    assert rewards.load("compressibility", {"quality": 30}).quality == 30


def test_load_an_import_path_from_the_current_folder(tmp_path, monkeypatch, images):
    module = f"my_rewards_{random.getrandbits(32)}"
    (tmp_path / f"{module}.py").write_text(
        "from rewardtune.rewards import Reward\n"
        "class Mine(Reward):\n"
        "    def __init__(self, *, power: int = 1): self.power = power\n"
        "    def native(self, images, prompts): return images.pow(self.power).mean((1, 2, 3))\n"
        "def plain(images, prompts): return images.mean((1, 2, 3))\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    squares = rewards.load(f"{module}:Mine", {"power": 2})
    torch.testing.assert_close(squares(images, PROMPTS), mean_of_squares(images, PROMPTS))
    assert rewards.load(f"{module}:plain").name == "plain"
    for spec, settings, words in [
        (f"{module}:Mime", {}, "did you mean 'Mine'"),
        (f"{module}:plain", {"power": 2}, "takes no settings; given power"),
        (f"{module}:number", {}, "3 is a number"),
    ]:
        with pytest.raises(ConfigError, match=words):
            rewards.load(spec, settings)


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        ("symetry", {}, "unknown reward 'symetry' .did you mean 'symmetry'.*legal: aesthetic, brightness"),
        ("zzz", {}, "unknown reward 'zzz'; legal: aesthetic, brightness"),
        ("symmetry", {"detachstd": True}, "no setting 'detachstd' .did you mean 'detach_std'.*legal: detach_std, eps"),
        ("colour", {}, "needs the setting colour"),
        ("no_such_package:Reward", {}, "importing no_such_package failed .ModuleNotFoundError"),
        ("collections:OrderedDict", {}, "cannot use 'collections:OrderedDict'.*not callable"),
    ],
)
def test_load_errors_name_what_is_legal(spec, settings, words):
    with pytest.raises(ConfigError, match=words):
        rewards.load(spec, settings)


# -- check_reward ---------------------------------------------------------------------------------------------------


def detached_by_numpy(images, prompts):
    return torch.from_numpy(images.detach().numpy()).mean(dim=(1, 2, 3))


def of_its_own_weight(images, prompts):
    return torch.ones(len(images), requires_grad=True) * images.detach().mean()


def root_at_zero(images, prompts):
    return (images - images).square().sum(dim=(1, 2, 3)).sqrt()


def batch_normed(images, prompts):
    return (images - images.mean()).square().mean(dim=(1, 2, 3))


def first_image_for_all(images, prompts):
    return images[:1].mean(dim=(1, 2, 3)).expand(len(images))


def written_in_place(images, prompts):
    y = images.mean(dim=(1, 2, 3)).exp()
    z = y * y
    y.add_(1)
    return z


BROKEN = [
    (lambda i, p: i.mean(), r"returned the shape \(\) for 2 images; legal is \(2,\): drop the .mean"),
    (lambda i, p: i.mean()[None], r"shape \(1,\) .*: drop the .mean"),
    (lambda i, p: i.mean(dim=(2, 3))[:, :1], r"shape \(2, 1\).*squeeze"),
    (lambda i, p: i.mean(dim=(1, 2, 3), keepdim=True), r"shape \(2, 1, 1, 1\).*: add .flatten\(\)"),
    (lambda i, p: i.mean(dim=(2, 3)), r"shape \(2, 3\).*one number"),
    (lambda i, p: [0.0, 1.0], "returned list; legal is a tensor"),
    (lambda i, p: i.mean(dim=(1, 2, 3)).long(), "torch.int64; legal is a float"),
    (lambda i, p: (i.mean(dim=(1, 2, 3)) - 2).log(), "nan.*finite"),
    (lambda i, p: i.mean(dim=(1, 2, 3)) / 0, "inf.*finite"),
    (lambda i: i, "raised TypeError.*2 prompts"),
    (detached_by_numpy, "has no gradient.*numpy"),
    (of_its_own_weight, "does not reach the images"),
    (lambda i, p: i.round().mean(dim=(1, 2, 3)), "exactly 0.*round"),
    (root_at_zero, "NaN or infinite gradient.*sqrt"),
    (batch_normed, "score of image 0 changes with image 1"),
    (first_image_for_all, "score of image 1 changes with image 0"),
    (written_in_place, "in its backward.*in-place"),
]


@pytest.mark.parametrize(("function", "words"), BROKEN)
def test_a_broken_reward_is_refused_by_name_alone_and_as_part_of_a_sum(function, words):
    broken = rewards.from_callable(function, name="mine")
    with pytest.raises(RewardError, match="^reward 'mine'.*" + words):
        rewards.check_reward(broken, size=8, prompts=PROMPTS)
    with pytest.raises(RewardError, match=r"^reward 'mine' \(a part of '1\*brightness \+ 0.1\*mine'\).*" + words):
        rewards.check_reward(rewards.Brightness() + 0.1 * broken, size=8, prompts=PROMPTS)


def test_errors_are_one_line_and_exit_with_3():
    with pytest.raises(RewardError) as caught:
        rewards.check_reward(detached_by_numpy, size=8, prompts=PROMPTS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_good_rewards_pass_and_logged_parts_need_no_gradient():
    good = rewards.Symmetry() + rewards.Compressibility() + rewards.Compressibility(mode="cubic") + mean_of_squares
    rewards.check_reward(good + rewards.Colour("red") + 0 * rewards.JPEGBytes(), size=(16, 24), prompts=["one"])
    with pytest.raises(RewardError, match=r"jpeg_bytes.*weight 0"):
        rewards.check_reward(rewards.JPEGBytes(), size=16, prompts=["one"])
    with pytest.raises(RewardError, match="every weight is 0"):
        rewards.check_reward(0 * rewards.Brightness(), size=16, prompts=["one"])


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_check_needs_a_list_of_prompts(prompts):
    with pytest.raises(ConfigError, match="at least one prompt"):
        rewards.check_reward(rewards.Brightness(), size=16, prompts=prompts)


@pytest.mark.parametrize(("shape", "hint"), [((), "drop the .mean"), ((1, 1), r"add \.squeeze"), ((3,), "one number")])
def test_the_advice_on_the_shape_of_a_single_score(shape, hint):
    with pytest.raises(RewardError, match=rf"for 1 images; legal is \(1,\): .*{hint}"):
        rewards.from_callable(lambda i, p: i.mean().expand(shape))(torch.rand(1, 3, 8, 8), ["a"])


@pytest.mark.parametrize("size", [-3, 0, "64", (64,), (64, 0), 64.0, None])
def test_a_size_that_is_none(size):
    with pytest.raises(ConfigError, match=r"size is .*; legal is a side such as 512, or \(height, width\)"):
        rewards.check_reward(rewards.Symmetry(), size=size, prompts=["a"])


def test_what_a_users_reward_raises_is_named_everywhere_in_the_same_words():
    def crash(images, prompts):
        raise ValueError("boom")

    reward = rewards.Symmetry() + rewards.from_callable(crash)
    words = (
        r"^reward 'crash'.* raised ValueError: boom; "
        r"legal is \(images \(2, 3, H, W\) in \[0, 1\], 2 prompts\) -> \(2,\)$"
    )
    for ask in (
        lambda: reward(torch.rand(2, 3, 8, 8), ["a", "b"]),
        lambda: reward.parts(torch.rand(2, 3, 8, 8), ["a", "b"]),
        lambda: rewards.check_reward(reward, size=8, prompts=["a"]),
    ):
        with pytest.raises(RewardError, match=words) as caught:
            ask()
        assert isinstance(caught.value.__cause__, ValueError)


def test_a_reward_may_be_recomputed():
    """torch's checkpoint ends the recomputation by an exception inside the reward, which is not the reward's."""
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    reward = rewards.from_callable(lambda i, p: ((i.exp() * i).sin() * i).mean(dim=(1, 2, 3)))
    (plain,) = torch.autograd.grad(reward(images, ["a", "b"]).sum(), images)
    (again,) = torch.autograd.grad(checkpoint(reward, images, ["a", "b"], use_reentrant=False).sum(), images)
    assert torch.equal(plain, again)
