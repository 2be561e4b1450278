"""The contract, for every reward of tests/reward_table.py: one law a test, one row a reward."""

import pytest
import torch
from reward_table import BUILT_IN, PROMPTS, ROWS, Row, images
from torch import Tensor, nn

from rewardtune import rewards
from rewardtune.rewards import Reward
from rewardtune.rewards.base import Composition, leaves

EVERY = pytest.mark.parametrize("name", ROWS)
DIFFERENTIABLE = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.differentiable])


@pytest.fixture
def pixels() -> Tensor:
    return images()


def gradients(reward: Reward, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """(scores (B,), d score_i / d image_j as (B, B, 3, H, W))."""
    leaf = pixels.clone().requires_grad_()
    scores = reward(leaf, prompts)
    rows = [torch.autograd.grad(score, leaf, retain_graph=True)[0] for score in scores]
    return scores.detach(), torch.stack(rows)


def test_every_built_in_reward_is_enrolled():
    assert set(BUILT_IN) == set(rewards.BUILTIN)
    for name, row in BUILT_IN.items():
        assert type(row.make()) is type_of(name)


def type_of(name: str) -> type:
    module, _, attribute = rewards.BUILTIN[name].partition(":")
    return getattr(__import__(module, fromlist=[attribute]), attribute)


@EVERY
def test_scores_are_one_finite_float_for_each_image(name, pixels):
    total, natives = ROWS[name].make().parts(pixels, PROMPTS)
    assert natives
    for values in (total, *natives.values()):
        assert values.shape == (len(PROMPTS),)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert total.unique().numel() == len(PROMPTS), "different images, equal scores"
    assert not any(values.requires_grad for values in natives.values())


@DIFFERENTIABLE
def test_gradient_is_not_zero_at_any_covered_pixel_and_reaches_no_other_image(name, pixels):
    row = ROWS[name]
    _, slopes = gradients(row.make(), pixels, PROMPTS)
    assert slopes.isfinite().all()
    for i, image in enumerate(slopes):
        assert (image[i, :, :, slice(*row.columns)] != 0).all(), "covered pixels without a gradient"
        assert not image[[j for j in range(len(PROMPTS)) if j != i]].any(), "samples leak"


@EVERY
def test_a_score_depends_on_its_own_image_and_prompt_alone(name, pixels):
    reward = ROWS[name].make()
    before = reward(pixels, PROMPTS)
    changed = pixels.clone()
    changed[1:] = changed[1:].square() + 0.2
    after = reward(changed, [PROMPTS[0], "a tree", "blue"])
    torch.testing.assert_close(after[0], before[0], rtol=ROWS[name].rtol, atol=1e-7)
    assert not torch.equal(after[1:], before[1:])


@EVERY
def test_a_batch_of_one_scores_as_a_batch_of_three(name, pixels):
    reward, row = ROWS[name].make(), ROWS[name]
    together = reward(pixels, PROMPTS)
    alone = torch.cat([reward(pixels[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=row.rtol, atol=1e-6)
    if row.differentiable:
        _, slopes = gradients(reward, pixels, PROMPTS)
        for i in range(3):
            _, own = gradients(reward, pixels[i : i + 1], PROMPTS[i : i + 1])
            torch.testing.assert_close(own[0, 0], slopes[i, i], rtol=1e-3, atol=1e-5 * own.abs().max().item())


@EVERY
def test_same_bits_again_and_random_numbers_left_alone(name, pixels):
    reward = ROWS[name].make()
    state = torch.get_rng_state()
    first = reward.parts(pixels, PROMPTS)
    second = reward.parts(pixels, PROMPTS)
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    if ROWS[name].differentiable:
        (scores, slopes), (again, slopes_again) = (gradients(reward, pixels, PROMPTS) for _ in range(2))
        assert torch.equal(scores, again)
        assert torch.equal(slopes, slopes_again)
        torch.testing.assert_close(scores, first[0], rtol=1e-6, atol=1e-7)  # with a gradient and without
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_nothing_is_trained_or_written(name, pixels):
    reward, prompts = ROWS[name].make(), list(PROMPTS)
    leaf, version = pixels.requires_grad_(ROWS[name].differentiable), pixels._version
    copy = pixels.detach().clone()
    scores = reward(leaf, prompts)
    if ROWS[name].differentiable:
        scores.sum().backward()
    assert pixels._version == version
    assert torch.equal(pixels, copy)
    assert prompts == PROMPTS
    networks = list(modules(reward))
    for parameter in (p for network in networks for p in network.parameters()):
        assert not parameter.requires_grad
        assert parameter.grad is None
    if name in ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "objectness"):
        assert networks, "this test looked at nothing"
    dropouts = [m for network in networks for m in network.modules() if isinstance(m, nn.Dropout)]
    assert not any(dropout.training for dropout in dropouts)


def modules(reward: Reward):
    for leaf, _ in leaves(reward):
        assert not isinstance(leaf, Composition)
        yield from (value for value in vars(leaf).values() if isinstance(value, nn.Module))


@EVERY
def test_half_precision_images_are_scored_in_float32_and_autocast_changes_nothing(name, pixels):
    reward = ROWS[name].make()
    rounded = pixels.bfloat16()
    scores = reward(rounded, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(rounded.float(), PROMPTS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward(pixels, PROMPTS)
    torch.testing.assert_close(inside, reward(pixels, PROMPTS), rtol=1e-6, atol=1e-7)


@DIFFERENTIABLE
def test_the_check_before_training_passes(name):
    rewards.check_reward(ROWS[name].make(), size=(40, 56), prompts=PROMPTS)


# -- the laws notice what breaks them -------------------------------------------------------------------------------


class Trained(Reward):
    def __init__(self):
        self.net = nn.Linear(3, 1)

    def native(self, images, prompts):
        return self.net(images.mean(dim=(2, 3)))[:, 0]


def value(images: Tensor) -> Tensor:
    return images.square().mean(dim=(1, 2, 3))


BROKEN = [
    (lambda i, p: value(i) * float("nan"), test_scores_are_one_finite_float_for_each_image),
    (lambda i, p: value(i[:1]).expand(len(i)), test_scores_are_one_finite_float_for_each_image),
    (lambda i, p: value(i[..., :-1]), test_gradient_is_not_zero_at_any_covered_pixel_and_reaches_no_other_image),
    (lambda i, p: value(i) + i.mean(), test_gradient_is_not_zero_at_any_covered_pixel_and_reaches_no_other_image),
    (lambda i, p: value(i - i.detach().mean()), test_a_score_depends_on_its_own_image_and_prompt_alone),
    (lambda i, p: value(i) + len(p[1:2]), test_a_batch_of_one_scores_as_a_batch_of_three),
    (lambda i, p: value(i) + torch.rand(len(i)), test_same_bits_again_and_random_numbers_left_alone),
    (lambda i, p: value(i) + 0 * torch.rand(len(i)), test_same_bits_again_and_random_numbers_left_alone),
    (lambda i, p: value(i) * (1 + i.requires_grad), test_same_bits_again_and_random_numbers_left_alone),
    (lambda i, p: i.mean(dim=(1, 2, 3)) + i.detach().mul_(0.5).mean(), test_nothing_is_trained_or_written),
    (lambda i, p: value(i) + len(p.pop()), test_nothing_is_trained_or_written),
    (Trained(), test_nothing_is_trained_or_written),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_a_broken_reward_fails_its_law(case, monkeypatch, pixels):
    broken, law = BROKEN[case]
    reward = broken if isinstance(broken, Reward) else rewards.from_callable(broken)
    monkeypatch.setitem(ROWS, "broken", Row(make=lambda: reward))
    with pytest.raises(AssertionError):
        law("broken", pixels)
