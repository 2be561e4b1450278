"""Pixel rewards against hand computation, finite differences, and Pillow's own JPEG."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewardtune import rewards
from rewardtune.errors import ConfigError, RewardError
from rewardtune.rewards.jpeg import cubic_round, jpeg

X = ["x"]


PICTURES = ("grain", "sky", "market", "night")  # committed; tests/pictures/make.py drew them


def picture(name: str) -> torch.Tensor:
    """(3, H, W) 8-bit values in [0, 1]; about 160x160."""
    return as_tensor(Image.open(Path(__file__).parent / "pictures" / f"{name}.png"))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def pillow_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    array = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return as_tensor(Image.open(buffer))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


def gradient_of(native, images):
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(native(leaf).sum(), leaf)[0]


# -- symmetry -------------------------------------------------------------------------------------------------------


def test_symmetry_by_hand():
    row = torch.tensor([0.1, 0.4, 0.4, 0.9]).expand(1, 3, 2, 4)  # |I - flip| = .8 0 0 .8; mean .45, var .0825
    value = rewards.Symmetry().native(row, X)
    torch.testing.assert_close(value, torch.tensor([0.4 / math.sqrt(0.0825)]), rtol=1e-5, atol=0)
    torch.testing.assert_close(rewards.Symmetry()(row, X), -value)


def test_symmetry_uses_one_std_over_all_channels_and_pixels():
    flat_red = torch.zeros(1, 3, 4, 4)
    flat_red[:, 0] = 1.0  # each channel is flat, the image is not
    flat_red[..., 0, 0] += 0.5
    expected = np.abs(flat_red.numpy() - flat_red.numpy()[..., ::-1]).mean() / flat_red.numpy().std()
    assert rewards.Symmetry().native(flat_red, X).item() == pytest.approx(expected, rel=1e-5)


def test_symmetry_of_independent_pixels_is_two_over_root_pi():
    noise = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert rewards.Symmetry().native(noise, X).tolist() == pytest.approx([2 / math.sqrt(math.pi)] * 2, abs=0.01)


def test_symmetry_ignores_affine_changes_and_is_zero_only_for_left_right_mirrors():
    images = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    symmetry = rewards.Symmetry()
    torch.testing.assert_close(symmetry.native(2 * images - 1, X), symmetry.native(images, X))
    half = images[..., :5]
    assert symmetry.native(torch.cat([half, half.flip(-1)], dim=-1), X).abs().max() == 0
    assert symmetry.native(torch.cat([half, half.flip(-2)], dim=-1), X).min() > 0.5


@pytest.mark.parametrize("detach_std", [False, True])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_symmetry_of_a_flat_image_is_finite(detach_std, level):
    flat = torch.full((1, 3, 8, 8), level)
    symmetry = rewards.Symmetry(detach_std=detach_std)
    assert symmetry.native(flat, X).item() == 0
    assert gradient_of(lambda i: symmetry.native(i, X), flat).isfinite().all()


def test_symmetry_of_an_odd_width_leaves_the_middle_column_to_the_std():
    """The middle mirrors itself: it can only change the denominator, and nothing where that is held."""
    images = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    free, held = (
        gradient_of(lambda i, r=reward: r.native(i, X), images)[..., 3]
        for reward in (rewards.Symmetry(), rewards.Symmetry(detach_std=True))
    )
    assert (free != 0).all()
    assert not held.any()


def test_symmetry_gradient_by_finite_differences():
    images = torch.rand(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i: rewards.Symmetry().native(i, X), images)


def test_detach_std_keeps_the_value_and_earns_nothing_from_contrast():
    """A scale leaves eq. 6 unchanged; with the std held constant shrinking the differences is what pays."""
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free, held = rewards.Symmetry(), rewards.Symmetry(detach_std=True)
    torch.testing.assert_close(held.native(images, X), free.native(images, X))
    # Whitening a symmetric background leaves |I - flip| alone, so all it can gain is by the std.
    background = torch.zeros_like(images)
    background[..., 0, :] = 1.0
    assert (gradient_of(lambda i: free.native(i, X), images) * background).sum().abs() > 1e-3
    assert (gradient_of(lambda i: held.native(i, X), images) * background).sum().abs() < 1e-12


# -- JPEG and compressibility ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("quality", [20, 50, 80])
def test_jpeg_is_pillows_jpeg_to_42_5_db(name, quality):
    """46.7 to 53.3 dB: benchmarks/jpeg.py. The error that the reward measures is the real one to 3 percent."""
    image = picture(name)
    real, ours = pillow_jpeg(image, quality), jpeg(image[None], quality)[0]
    assert ours.shape == image.shape
    assert psnr(ours, real) >= 42.5
    error = rewards.Compressibility(quality=quality).native(image[None], X).item()
    assert error == pytest.approx((image - real).square().mean().item(), rel=0.03)


@pytest.mark.parametrize("name", PICTURES)
def test_a_worse_codec_would_be_noticed(name):
    """42.5 dB is no loose bound: a quality of 45 for 50 misses it."""
    image = picture(name)
    real = pillow_jpeg(image, 50)
    assert psnr(jpeg(image[None], 45)[0], real) < 42.5


def test_jpeg_clips_between_the_transforms_as_decoders_do():
    """Over-exposed images ring past black and white; without the clipping of Y, Cb and Cr this is 2 dB worse."""
    for name in PICTURES:
        image = ((picture(name) - 0.5) * 6 + 0.5).clamp(0, 1).mul(255).round() / 255
        assert psnr(jpeg(image[None], 20)[0], pillow_jpeg(image, 20)) >= 40, name


def small_photo() -> torch.Tensor:
    """64x64 in float64, off the 8-bit grid and away from black and white, where decoding would clip."""
    return picture("grain")[None, :, 40:104, 40:104].double() * 0.5 + 0.2503


def test_detach_is_the_exact_gradient_of_the_true_error():
    images, h = small_photo(), 1e-8
    reward = rewards.Compressibility(quality=50)
    gradient = gradient_of(lambda i: reward.native(i, X), images)
    direction = gradient / gradient.norm()
    ahead, behind = images + h * direction, images - h * direction
    assert torch.equal(jpeg(ahead, 50), jpeg(behind, 50))  # no rounding flips between the two
    error = [(i - jpeg(i, 50)).square().mean().item() for i in (ahead, behind)]
    assert (error[0] - error[1]) / (2 * h) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_samples_that_are_not_rounded_are_left_as_they_are():
    flat = torch.tensor([0.8, 0.3, 0.5]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    out = jpeg(flat, 50, rounding=torch.positive, samples=torch.positive)
    torch.testing.assert_close(out, flat, rtol=0, atol=1e-6)


def test_cubic_rounding_points_the_same_way():
    images = small_photo()
    exact, cubic = (
        gradient_of(lambda i, mode=mode: rewards.Compressibility(quality=50, mode=mode).native(i, X), images)
        for mode in ("detach", "cubic")
    )
    assert torch.cosine_similarity(exact.flatten(), cubic.flatten(), dim=0) > 0.9
    assert 0.7 < cubic.norm() / exact.norm() < 0.99


def test_cubic_rounding_by_hand():
    x = torch.tensor([2.3, -0.4, 5.0], requires_grad=True)
    value = cubic_round(x)
    torch.testing.assert_close(value, torch.tensor([2.027, -0.064, 5.0]))
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([0.27, 0.48, 0.0]))


def test_cubic_gradient_by_finite_differences():
    images, h = small_photo(), 1e-7  # cubic rounding jumps at .5: so small a step meets none
    reward = rewards.Compressibility(quality=50, mode="cubic")
    gradient = gradient_of(lambda i: reward.native(i, X), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ahead, behind = (reward.native(images + step * direction, X).item() for step in (h, -h))
    assert (ahead - behind) / (2 * h) == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_why_there_is_no_straight_through_mode():
    """With rounding's derivative set to 1, d(c(I)) moves with I in luma and the gradient of I - d(c(I)) vanishes."""

    def straight_through(x):
        return x + (x.round() - x).detach()

    def error(images, rounding):
        return (images - jpeg(images, 50, rounding=rounding, samples=rounding)).square().mean(dim=(1, 2, 3))

    images = small_photo()
    # The sum over channels is the derivative with respect to grey, that is, luma.
    exact = gradient_of(lambda i: rewards.Compressibility(quality=50).native(i, X), images).sum(dim=1)
    vanished = gradient_of(lambda i: error(i, straight_through), images).sum(dim=1)
    assert exact.norm() > 0
    assert vanished.norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["detach", "cubic"])
def test_compressibility_of_flat_images_is_small_and_finite(mode, level):
    flat = torch.full((1, 3, 16, 16), level)
    reward = rewards.Compressibility(mode=mode)
    assert reward.native(flat, X).item() < 1e-4
    assert gradient_of(lambda i: reward.native(i, X), flat).isfinite().all()


def real_error(images: torch.Tensor, quality: int) -> float:
    """What a user gets: the picture as 8 bits against the same picture through Pillow's JPEG."""
    image = images[0].detach().clamp(0, 1).mul(255).round() / 255
    return (image - pillow_jpeg(image, quality)).square().mean().item()


@pytest.mark.parametrize("name", PICTURES)
def test_optimising_pixels_lowers_the_real_error_50_fold(name):
    leaf = picture(name)[None, :, -64:, -64:].clone().requires_grad_()
    reward, optimiser = rewards.Compressibility(quality=50), torch.optim.Adam([leaf], lr=2e-3)
    before = real_error(leaf, 50)
    for _ in range(200):
        optimiser.zero_grad()
        (-reward(leaf.clamp(0, 1), X)).sum().backward()
        optimiser.step()
    assert real_error(leaf, 50) < before / 50


def test_straight_through_is_never_offered():
    for mode in ("ste", "straight-through", "identity", "hard", None):
        with pytest.raises(ConfigError, match=r"legal: detach, cubic .straight-through would have no gradient"):
            rewards.Compressibility(mode=mode)


def test_jpeg_bytes_are_pillows():
    image = picture("sky")[:, :40, :56]
    buffer = io.BytesIO()
    array = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(buffer, "JPEG", quality=80, subsampling="4:2:0")
    assert rewards.JPEGBytes(quality=80).native(image[None], X).tolist() == [len(buffer.getvalue())]


# -- brightness, colour ---------------------------------------------------------------------------------------------


def test_brightness_and_colour_by_hand():
    image = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert rewards.Brightness()(image, X).item() == pytest.approx(0.5)
    expected = ((0.2 - 1) ** 2 + 0.4**2 + 0.9**2) / 3
    for colour in ("red", "#ff0000", (1, 0, 0)):
        assert rewards.Colour(colour).native(image, X).item() == pytest.approx(expected)
        assert rewards.Colour(colour)(image, X).item() == pytest.approx(-expected)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rewards.Compressibility(quality=0), "quality is 0; legal is a whole number from 1"),
        (lambda: rewards.Compressibility(quality=0.8), "quality is 0.8"),
        (lambda: rewards.JPEGBytes(quality=101), "quality is 101"),
        (lambda: rewards.Compressibility(mode="cubik"), "did you mean 'cubic'"),
        (lambda: rewards.Symmetry(eps=0), "eps is 0; legal is above 0"),
        (lambda: rewards.Symmetry(detach_std="no"), "detach_std is 'no'; legal: true, false"),
        (lambda: rewards.Colour("tael"), "did you mean 'teal'"),
        (lambda: rewards.Colour((255, 0, 0)), "divide by 255"),
        (lambda: rewards.Colour("rgb(300,0,0)"), r"colour is 'rgb\(300,0,0\)'; legal in rgb\(\) is 0 to 255"),
        (lambda: rewards.Colour((0.1, 0.2)), r"legal is \(r, g, b\)"),
    ],
)
def test_bad_settings_are_config_errors(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("reward", "size", "legal"),
    [(rewards.Symmetry(), (8, 1), "1x2"), (rewards.Compressibility(), (15, 64), "16x16")],
)
def test_images_too_small(reward, size, legal):
    with pytest.raises(RewardError, match=f"images are {size[0]}x{size[1]} .*legal is {legal} or larger: ask the pipe"):
        reward(torch.rand(1, 3, *size), X)
    with pytest.raises(RewardError, match=f"legal is {legal} or larger"):
        rewards.check_reward(reward, size=size, prompts=X)
