"""Preprocessing against PIL and the official processors, and its gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_table import network
from tiny_clip import photo_like, to_pil

from rewardtune.errors import ConfigError
from rewardtune.rewards.preprocess import Preprocess, shift

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def plain(size, **settings):
    """Without normalisation, so that differences are in pixels."""
    return Preprocess(size=size, mean=ZEROS, std=ONES, **settings)


def photo(height, width):
    return photo_like(height=height, width=width)


def official(cls, image, **settings):
    processor = cls(image_mean=[0.0] * 3, image_std=[1.0] * 3, **settings)
    return processor([to_pil(image[0])], return_tensors="pt")["pixel_values"]


def assert_to_8_bit_rounding(ours, theirs):
    difference = (ours - theirs).abs() * 255
    assert difference.max() <= 3, difference.max()
    assert difference.mean() <= 0.35, difference.mean()


# -- against the official code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (300, 403), (1024, 1024)])
def test_crop_is_clips_pil_processor(height, width):
    from transformers import CLIPImageProcessorPil

    image = photo(height, width)
    theirs = official(CLIPImageProcessorPil, image)
    assert_to_8_bit_rounding(plain(224)(image), theirs)
    assert (plain(224, antialias=False)(image) - theirs).abs().mean() * 255 > 0.6  # the tolerance is not too wide


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (769, 500)])
def test_letterbox_is_hpsv2s_on_8_bit_pictures(height, width):
    """ResizeMaxSize, by PIL: long side to 224, sides rounded, black around, an odd rest to the right and below."""
    image = photo(height, width)
    scale = 224 / max(height, width)
    small = to_pil(image[0]).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(small, ((224 - small.width) // 2, (224 - small.height) // 2))
    theirs = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255
    assert_to_8_bit_rounding(plain(224, fit="letterbox")(image), theirs)


def test_letterbox_is_hpsv2s_on_tensors_overshoot_included():
    image = torch.rand(
        1, 3, 300, 401, generator=torch.Generator().manual_seed(0)
    ).round()  # black and white: overshoots
    small = F.interpolate(image, (168, 224), mode="bicubic", antialias=True, align_corners=False)
    theirs = F.pad(small, (0, 0, 28, 28))
    assert small.max() > 1.01
    assert torch.equal(plain(224, fit="letterbox", clamp="none")(image), theirs)


def test_black_of_the_letterbox_is_normalised_too():
    letterbox = Preprocess(size=8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1), fit="letterbox")
    corner = letterbox(torch.ones(1, 3, 4, 8))[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.tensor([-1.0, -2.0, -3.0]))


@pytest.mark.parametrize(
    ("processor", "height", "width", "size"),
    [("OwlViTImageProcessorPil", 1024, 900, 768), ("SiglipImageProcessorPil", 512, 640, 384)],
)
def test_squash_is_the_pil_processor_of_owlvit_and_siglip(processor, height, width, size):
    import transformers

    image = photo(height, width)
    settings = {"size": {"height": size, "width": size}, "resample": 3}
    theirs = official(getattr(transformers, processor), image, **settings)
    assert_to_8_bit_rounding(plain(size, fit="squash")(image), theirs)


def test_fits_agree_on_squares_and_differ_otherwise():
    square, oblong = photo(96, 96), photo(64, 96)
    crop, letterbox, squash = (plain(32, fit=fit) for fit in ("crop", "letterbox", "squash"))
    assert torch.equal(crop(square), letterbox(square))
    assert torch.equal(crop(square), squash(square))
    for one, other in ((crop, letterbox), (crop, squash), (letterbox, squash)):
        assert (one(oblong) - other(oblong)).abs().max() > 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 500), (31, 33)])
@pytest.mark.parametrize("fit", ["crop", "letterbox", "squash"])
def test_any_size_fits(fit, height, width):
    out = plain(32, fit=fit)(torch.rand(2, 3, height, width))
    assert out.shape == (2, 3, 32, 32)
    assert out.isfinite().all()


def test_an_odd_rest_is_cropped_as_transformers_does():
    ramp = torch.arange(35.0).expand(1, 3, 32, 35) / 100  # no resize: 32 is the short side
    assert plain(32)(ramp)[0, 0, 0, 0].item() == pytest.approx(0.01)


@pytest.mark.parametrize("rest", [0, 1, 2, 3, 5, 7, 103])
def test_an_odd_rest_is_cropped_as_torchvision_does(rest):
    """torchvision.transforms.functional.center_crop: crop_top = int(round((image_height - crop_height) / 2.0))."""
    ramp = torch.arange(32.0 + rest) / 1000
    begins = int(round((32 + rest - 32) / 2.0)) / 1000  # noqa: RUF046 - as it stands there
    for images, size in ((ramp.expand(1, 3, 32, -1), 32), (ramp[:, None].expand(1, 3, -1, 32), 32)):
        assert plain(size, round_rest=True)(images)[0, 0, 0, 0].item() == pytest.approx(begins)


@pytest.mark.parametrize(
    ("name", "rounds"), [("aesthetic", True), ("clipscore", True), ("imagereward", True), ("pickscore", False)]
)
def test_each_reward_cuts_an_odd_rest_as_its_official_code(name, rounds):
    """openai-clip, open_clip and image-reward crop by torchvision, PickScore's by transformers."""
    assert network(name).preprocess.round_rest is rounds


def test_normalises_in_float32_and_is_the_identity_at_equal_size():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(32)(images), images)
    ours = Preprocess(size=32, mean=(0.4, 0.5, 0.6), std=(0.3, 0.25, 0.2))(images).numpy()
    np.testing.assert_allclose(ours[:, 2], (images.numpy()[:, 2] - 0.6) / 0.2, rtol=1e-5)
    half = Preprocess(size=16, mean=(0.4, 0.5, 0.6), std=(0.3, 0.25, 0.2))
    assert half(images.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half(images.bfloat16()), half(images.bfloat16().float()))
    assert half(images.double()).dtype == torch.float64


# -- antialiasing and clamp -------------------------------------------------------------------------------------------


def test_without_antialiasing_it_is_the_plain_interpolation():
    image = photo(96, 96)
    theirs = F.interpolate(image, (32, 32), mode="bicubic", align_corners=False)
    assert torch.equal(plain(32, antialias=False, clamp="none")(image), theirs)
    assert (plain(32, clamp="none")(image) - theirs).abs().max() > 0.05


def gradient(preprocess, images):
    leaf = images.clone().requires_grad_()
    weights = torch.rand(3, preprocess.size, preprocess.size, generator=torch.Generator().manual_seed(1)) + 0.1
    return torch.autograd.grad((preprocess(leaf) * weights).sum(), leaf)[0]


def test_every_pixel_gets_a_gradient_with_antialiasing_and_not_without():
    image = photo(160, 160) * 0.5 + 0.25  # away from the clamp
    assert (gradient(plain(32), image) != 0).all()
    assert (gradient(plain(32, antialias=False), image) != 0).float().mean() < 0.9


@pytest.mark.parametrize("clamp", ["hard", "ste"])
def test_clamps_give_the_same_values(clamp):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round()
    expected = plain(48, clamp="none")(image).clamp(0, 1)
    torch.testing.assert_close(plain(48, clamp=clamp)(image), expected, rtol=0, atol=1e-7)


def test_the_hard_clamp_kills_the_gradient_and_the_straight_through_one_passes_it():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round()  # overshoots in many places
    hard, ste, none = (gradient(plain(48, clamp=clamp), image) for clamp in ("hard", "ste", "none"))
    torch.testing.assert_close(ste, none)
    assert (hard - none).abs().max() > 0.1
    assert hard.abs().sum() < 0.95 * none.abs().sum()


# -- random shift -----------------------------------------------------------------------------------------------------


def offsets(preprocess, draws, *, side):
    """(down, right) of each draw, read from a picture whose pixels are their own coordinates."""
    ramp = torch.arange(float(side)) / side
    image = torch.stack([ramp[:, None].expand(side, side), ramp.expand(side, side), torch.zeros(side, side)])
    seen = preprocess(image.expand(draws, 3, side, side).clone().requires_grad_()).detach()
    still = plain(preprocess.size)(image[None])
    middle = preprocess.size // 2
    return ((still - seen)[:, :2, middle, middle] * side).round().int().tolist()


def test_shifts_are_uniform_over_0_to_ceil_of_the_factor_in_both_directions():
    torch.manual_seed(0)
    found = offsets(plain(16, random_shift=True), 2000, side=40)  # 40 / 16 = 2.5: 0, 1, 2, 3
    counts = {(down, right): found.count([down, right]) for down in range(4) for right in range(4)}
    assert sum(counts.values()) == 2000
    # A multinomial with 16 equal cells: 125 each, standard deviation 10.8.
    assert all(80 < count < 170 for count in counts.values()), counts


def test_shifts_follow_the_seed_and_differ_between_images():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(offsets(plain(16, random_shift=True), 8, side=64))
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(offset) for offset in draws[0]}) > 1


def test_no_shift_without_a_gradient_or_without_shrinking():
    image, state = photo(64, 64), torch.get_rng_state()
    still, random = plain(16), plain(16, random_shift=True)
    assert torch.equal(random(image), still(image))
    with torch.no_grad():
        assert torch.equal(random(image.requires_grad_()), still(image))
    same = plain(64, random_shift=True)
    assert torch.equal(same(image), image)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn either


def test_a_shift_repeats_the_border_and_moves_the_rest():
    image = torch.arange(12.0).view(1, 1, 3, 4).expand(64, 3, 3, 4)
    torch.manual_seed(0)
    moved = {tuple(one[0].flatten().tolist()) for one in shift(image, down=1, right=0)}
    assert moved == {tuple(range(12)), (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)}


def test_each_side_shifts_by_its_own_ratio():
    torch.manual_seed(0)
    columns = torch.arange(16.0).expand(1, 3, 64, 16) / 16
    out = plain(16, fit="squash", random_shift=True)(columns.expand(32, 3, 64, 16).clone().requires_grad_())
    torch.testing.assert_close(out.detach(), columns[:, :, :16].expand(32, 3, 16, 16))  # the width does not shrink
    rows = torch.arange(64.0)[:, None].expand(1, 3, 64, 16) / 64
    out = plain(16, fit="squash", random_shift=True)(rows.expand(32, 3, 64, 16).clone().requires_grad_())
    assert len(out[:, 0, 8, 0].mul(64).floor().unique()) == 5  # the height does, by 4: 0 to 4


# -- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"fit": "letterbocks"},
            r"fit is 'letterbocks' \(did you mean 'letterbox'\?\); legal: crop, letterbox, squash",
        ),
        ({"clamp": True}, "clamp is True; legal: hard, ste, none"),
        ({"antialias": "no"}, "antialias is 'no'; legal: true, false"),
        ({"random_shift": 3}, "random_shift is 3; legal: true, false"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        plain(32, **settings)
