"""Writes docs/results/parity.md: our rewards against the fixtures of the official code (tests/golden).

    make parity                             # makes the fixtures anew by the official code, then runs this
    python parity/compare.py                # the table from the fixtures as they are

Runs in the ordinary environment; parity/official.py runs in one of its own. tests/test_golden.py asserts the same.
"""

import json
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# ruff: noqa: E402 - the folder of the tests comes first
import golden_rewards
from huggingface_hub import constants
from transformers.utils import logging

from rewardtune.rewards import imagereward

OUTPUT = ROOT / "docs" / "results" / "parity.md"

HEADER = """# The rewards against the official code

Written by `make parity`; do not edit. `parity/official.py` runs the official packages, in an environment of their own,
on small networks with random weights and writes checkpoint, images, scores and pixel gradients to `tests/golden`; here
our classes open those checkpoints through the same key tables and loaders as downloaded ones. The ordinary tests
(`tests/test_golden.py`) hold the same fixtures: 1e-5 in score, 2e-5 in gradient. No pretrained weight is involved. All
differences are float32 rounding, whose last digits change with the processor, in the official code as in ours: run
anew on a second one, the largest were 5e-6 in score (pickscore, a cosine times 14) and 1e-6 in gradient.

{versions}; float32.

"""

REWARDS = """## Score and gradient

Two oblong images of 40x56 pixels through resize, fit, network and formula. *score*: the largest |ours - official|.
*gradient*: the largest |ours - official| at a pixel, as a part of the largest official one. *wrong* columns: the score
difference if a setting that no weight's shape betrays were wrong, the other activation (quick_gelu or gelu), half the
heads or fewer, and a layer norm's eps of 1e-6 for 1e-5 (ImageReward's vision tower: 1e-5 for 1e-6).

| reward | official code | scores | score | gradient | wrong activation | wrong heads | wrong eps |
|---|---|---|---|---|---|---|---|
"""

FULL = """
## Checkpoints at full size

Names and shapes of every tensor, as the official classes make them, through the key table: each source key is used
exactly once, and the result has the names and shapes of the transformers model, no more and no less.

| checkpoint | official tensors | of transformers | names and shapes |
|---|---|---|---|
"""

TRANSFORMS = """
## From a picture to the network's input

8-bit pictures; largest and mean difference in units of 1/255. Official code that starts from a PIL image rounds to
8 bits after each of its two passes, ours does not; that is the mean. *hard edges*: one pixel between black and white,
as in no photograph, where the first pass of PIL is clipped. hpsv2 resizes tensors and clips nothing, so `HPSv2` does
neither; a clamp as in the others would differ in the last column. image-reward's and open_clip's transforms equal
openai-clip's bit for bit. Where a centre crop cuts an odd rest, torchvision (openai-clip, open_clip, image-reward)
rounds half a pixel to even, and so do `Aesthetic`, `CLIPScore` and `ImageReward`; transformers rounds it down, and so
does `PickScore`.

| official transform | ours | photo-like | hard edges | with `clamp="hard"` |
|---|---|---|---|---|
"""

JPEG = """
## JPEG

Our hard-rounding codec against Pillow's decoded file, {official}, two photo-like pictures of 96x112 pixels (more of
them, larger: [jpeg.md](jpeg.md)).

| quality | PSNR |
|---|---|
"""

TRAPS = {
    "activation": lambda name: {"hidden_act": "gelu" if name in ("aesthetic", "objectness") else "quick_gelu"},
    "heads": lambda name: {"num_attention_heads": 2},
    "eps": lambda name: {"layer_norm_eps": 1e-6},
}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".* reads the first .* tokens of a prompt")
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pillow"))
    parts = [HEADER.format(versions=f"Ours: Python {platform.python_version()}, {names}"), REWARDS]
    parts += [reward_row(name) for name in golden_rewards.BUILDERS]
    parts += [FULL, *(full_size_row(name) for name in ("clipscore", "hpsv2", "aesthetic", "imagereward"))]
    parts += [tokens_line(), TRANSFORMS, *(transform_row(way) for way in golden_rewards.WAYS)]
    golden = golden_rewards.read("jpeg")
    parts += [JPEG.format(official=golden.about["official"])]
    for quality in (20, 50, 80):
        parts.append(
            f"| {quality} | {', '.join(f'{value:.1f}' for value in golden_rewards.jpeg_psnr(golden, quality))} dB |\n"
        )
    OUTPUT.write_text("".join(parts))
    print(f"wrote {OUTPUT}")


def opened_differences(name: str, **traps: Any) -> tuple[float, float]:
    golden = golden_rewards.read(name)
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HOME = folder  # of converted checkpoints
        return golden_rewards.differences(golden_rewards.BUILDERS[name](golden, Path(folder), **traps), golden)


def reward_row(name: str) -> str:
    golden = golden_rewards.read(name)
    score, gradient = opened_differences(name)
    wrong = []
    for trap, settings in TRAPS.items():
        if name != "imagereward" or trap == "heads":
            wrong.append(f"{opened_differences(name, **settings(name))[0]:.0e}")
        elif trap == "activation":
            wrong.append("refused")
        else:
            imagereward.VISION_EPS, kept = 1e-5, imagereward.VISION_EPS
            wrong.append(f"{opened_differences(name)[0]:.0e}")
            imagereward.VISION_EPS = kept
    scores = ", ".join(f"{value:.2f}" for value in golden.tensors["scores"].tolist())
    cells = [name, golden.about["official"], scores, f"{score:.0e}", f"{gradient:.0e}", *wrong]
    return f"| {' | '.join(cells)} |\n"


def full_size_row(name: str) -> str:
    ours, wanted = golden_rewards.full_size(name)
    official = {"clipscore": "open_clip ViT-H/14", "hpsv2": "hpsv2 ViT-H/14", "aesthetic": "openai-clip ViT-L/14"}
    equal = "equal" if ours == wanted else "DIFFERENT"
    cells = [official.get(name, "image-reward"), len(golden_rewards.official_shapes(name)), len(wanted), equal]
    return f"| {' | '.join(map(str, cells))} |\n"


def tokens_line() -> str:
    """Needs the byte pairs, 1.4 MB, which lie in the environment of `make parity` and not in the repository."""
    golden = json.loads((golden_rewards.FOLDER / "tokens.json").read_text())
    files = list((ROOT / "build" / "parity" / "venv").glob("lib/python*/site-packages/open_clip/bpe_simple_vocab*"))
    if not files:
        return "\nToken ids were not compared: the byte pairs are in the environment that `make parity` makes.\n"
    tokenizer = golden_rewards.bpe_tokenizer(files[0])
    ours = [tokenizer(text, truncation=True, max_length=77).input_ids for text in golden["texts"]]
    same = sum(a == b for a, b in zip(ours, golden["ids"], strict=True))
    return (
        f"\nToken ids of transformers' CLIPTokenizer with the official byte pairs against open_clip's: equal for "
        f"{same} of {len(ours)} prompts (plain, empty, punctuation, accents, emoji, Japanese, cut at 77 tokens).\n"
    )


def transform_row(way: str) -> str:
    golden = golden_rewards.read("preprocessing")

    def cell(*pictures: str, **settings: Any) -> str:
        found = [golden_rewards.transform_difference(golden, way, picture, **settings) for picture in pictures]
        return f"{max(largest for largest, _ in found):.2f} / {max(mean for _, mean in found):.2f}"

    settings = ", ".join(f"{key}={value!r}" for key, value in golden_rewards.WAYS[way].items())
    last = cell("landscape", "portrait", "hard edges", clamp="hard") if "clamp" in golden_rewards.WAYS[way] else ""
    return f"| {way} | `Preprocess({settings})` | {cell('landscape', 'portrait')} | {cell('hard edges')} | {last} |\n"


if __name__ == "__main__":
    main()
