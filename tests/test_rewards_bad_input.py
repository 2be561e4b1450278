"""Images and prompts that are no images and prompts: one clear line, the same for every reward of the table."""

import pytest
import torch
from PIL import Image
from reward_table import PROMPTS, ROWS, images

from rewardtune import rewards
from rewardtune.errors import RewardError


def holed(value, *which):
    broken = images()
    for index in which:
        broken[index, 1, 5, 5] = value
    return broken


BATCH = images()
PICTURES = [Image.new("RGB", (56, 40))] * 3
CASES = {
    "grey": (
        BATCH[:, :1],
        PROMPTS,
        r"\(3, 1, 40, 56\); legal is a tensor \(B, 3, H, W\): grey images are images.expand",
    ),
    "rgba": (torch.cat([BATCH, BATCH[:, :1]], dim=1), PROMPTS, r"\(3, 4, 40, 56\).*transparency out, images\[:, :3\]"),
    "one image": (BATCH[0], PROMPTS, r"\(3, 40, 56\).*one image is images\[None\]"),
    "channels last": (BATCH.permute(0, 2, 3, 1), PROMPTS, r"\(3, 40, 56, 3\).*permute\(0, 3, 1, 2\)"),
    "two channels": (BATCH[:, :2], PROMPTS, r"Tensor \(3, 2, 40, 56\); legal is a tensor \(B, 3, H, W\)$"),
    "no images": (BATCH[:0], [], r"\(0, 3, 40, 56\).*this one is empty"),
    "no pixels": (BATCH[..., :0], PROMPTS, r"\(3, 3, 40, 0\).*this one is empty"),
    "numpy": (BATCH.numpy(), PROMPTS, r'ndarray \(3, 3, 40, 56\).*output_type="pt"'),
    "a list": (list(BATCH), PROMPTS, r"a list of 3 \(Tensor first\); legal is a tensor .*: torch.stack\(images\)$"),
    "a tuple of batches": ((BATCH[:1], BATCH[1:]), PROMPTS, r"a tuple of 2 .*: torch.cat\(images\)$"),
    "pictures": (
        PICTURES,
        PROMPTS,
        r'a list of 3 \(Image first\).*: of a pipeline pipe\(\.\.\., output_type="pt"\)\.images$',
    ),
    "one picture": (PICTURES[0], PROMPTS[:1], r'images are a Image;.*output_type="pt"'),
    "nothing": (None, PROMPTS, "images are a NoneType"),
    "uint8": (BATCH.mul(255).byte(), PROMPTS, r"torch.uint8; legal is float in \[0, 1\]: images.float\(\) / 255"),
    "bool": (BATCH > 0.5, PROMPTS, "torch.bool; legal is float"),
    "complex": (BATCH.to(torch.complex64), PROMPTS, "torch.complex64; legal is float"),
    "signed": (BATCH * 4 - 2 + 1e-3, PROMPTS, r"run from -1.00 to 1.00; legal is \[0, 1\]: try \(images \+ 1\) / 2"),
    "bytes": (BATCH * 255, PROMPTS, r"run from 63.\d+ to 191.\d+; legal is \[0, 1\].*division by 255"),
    "nan": (holed(float("nan"), 1), PROMPTS, "NaN or infinite pixels in image 1 of 3; legal are finite"),
    "several nan": (holed(float("nan"), 0, 2), PROMPTS, "NaN or infinite pixels in image 0, 2 of 3"),
    "infinite": (holed(float("inf"), 2), PROMPTS, "NaN or infinite pixels in image 2 of 3"),
    "too few prompts": (BATCH, PROMPTS[:2], "2 prompts for 3 images; legal is a list of strings, one for each image"),
    "too many prompts": (BATCH[:2], PROMPTS, "3 prompts for 2 images"),
    "one prompt": (BATCH, "a cat", "one string for 3 images"),
    "a string of as many letters": (BATCH, "cat", "one string for 3 images"),
    "no prompts": (BATCH, None, "prompts are a NoneType for 3 images"),
    "a set": (BATCH, set(PROMPTS), "prompts are a set for 3 images"),
    "a generator": (BATCH, (prompt for prompt in PROMPTS), "prompts are a generator for 3 images"),
    "no string": (BATCH, ["a", None, "c"], "prompt 1 is a NoneType for 3 images; legal is a list of strings"),
    "bytes prompt": (BATCH, ["a", "b", b"c"], "prompt 2 is a bytes for 3 images"),
    "tokens": (BATCH, [[1, 2], [3], [4]], "prompt 0 is a list for 3 images"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_reward_refuses_it_in_one_clear_line(name):
    reward = ROWS[name].make()
    for given, prompts, words in CASES.values():
        for ask in (reward, reward.parts):
            with pytest.raises(RewardError, match=words) as caught:
                ask(given, prompts)
            assert str(caught.value).startswith(f"reward '{reward.name}': ")
            assert "\n" not in str(caught.value)


def test_what_is_legal_is_not_refused():
    """Tuples of prompts, float64, a slack of a hundredth for finite differences, images that need no gradient."""
    reward = rewards.Brightness()
    for given in (BATCH, BATCH.double(), BATCH.half(), BATCH * 0, BATCH * 2 - 0.505, BATCH[..., ::2]):
        assert reward(given, tuple(PROMPTS)).shape == (3,)


def test_a_reward_never_sees_what_was_refused():
    seen = []
    reward = rewards.from_callable(lambda i, p: seen.append(i) or i.mean(dim=(1, 2, 3)), name="mine")
    for given, prompts, _ in CASES.values():
        with pytest.raises(RewardError):
            reward(given, prompts)
    assert not seen
