"""The JPEG of `Compressibility` against Pillow's, and what its gradient reaches: `python benchmarks/jpeg.py`.

Two tables for docs/results/jpeg.md: how near the tensor codec is to the real one, and how far 200 steps of Adam on the
pixels bring the *real* error down, by Pillow on 8-bit pictures. Straight-through rounding stands there to show why the
reward does not offer it. Left out: speed (a codec costs less than one layer of the decoder before it).
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewardtune.rewards import Compressibility
from rewardtune.rewards.jpeg import cubic_round, jpeg

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "tests/pictures").glob("*.png"))
QUALITIES = (20, 50, 80)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def pillow(image: Tensor, quality: int) -> tuple[Tensor, int]:
    """(the decoded JPEG (1, 3, H, W), its size in bytes) of an 8-bit image."""
    file = io.BytesIO()
    array = image[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return as_tensor(Image.open(file)), file.tell()


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def codec_rows() -> list[str]:
    rows = []
    for path in PICTURES:
        image = as_tensor(Image.open(path))
        for quality in QUALITIES:
            real, _ = pillow(image, quality)
            hard, cubic = jpeg(image, quality), jpeg(image, quality, rounding=cubic_round, samples=torch.positive)
            error, true_error = ((image - other).square().mean().item() for other in (hard, real))
            surrogate = Compressibility(quality=quality, mode="cubic").native(image, [""]).item()
            rows.append(
                f"| {path.stem} | {quality} | {psnr(hard, real):.1f} | {psnr(cubic, real):.1f} "
                f"| {error:.6f} | {true_error:.6f} | {1 - surrogate / error:.0%} |"
            )
    return rows


def optimise(image: Tensor, error: Callable[[Tensor], Tensor], *, quality: int, steps: int) -> tuple[float, int]:
    """(real error, bytes) after Adam on the pixels: the picture as 8 bits against its own JPEG."""
    leaf = image.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=2e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        error(leaf.clamp(0, 1)).mean().backward()
        optimiser.step()
    final = leaf.detach().clamp(0, 1).mul(255).round() / 255
    real, size = pillow(final, quality)
    return (final - real).square().mean().item(), size


def gradient_rows(*, quality: int, steps: int) -> list[str]:
    def by(mode: str) -> Callable[[Tensor], Tensor]:
        reward = Compressibility(quality=quality, mode=mode)
        return lambda images: reward.native(images, [""])

    def identity(images: Tensor) -> Tensor:
        return (
            (images - jpeg(images, quality, rounding=straight_through, samples=straight_through))
            .square()
            .mean(dim=(1, 2, 3))
        )

    rows = []
    for path in PICTURES:
        image = as_tensor(Image.open(path))
        real, size = pillow(image, quality)
        before = (image - real).square().mean().item()
        for name, error in (("detach", by("detach")), ("cubic", by("cubic")), ("straight-through", identity)):
            after, bytes_after = optimise(image, error, quality=quality, steps=steps)
            rows.append(
                f"| {path.stem} | {name} | {before:.6f} | {after:.7f} | {before / after:.0f} | {size} | {bytes_after} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", type=int, default=50, help="of the optimisation")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/jpeg.md")
    args = parser.parse_args()
    text = [
        "# JPEG on tensors, against Pillow",
        f"\n`python benchmarks/jpeg.py --quality {args.quality} --steps {args.steps}` on `tests/pictures`, torch "
        f"{torch.__version__.partition('+')[0]}, Pillow {Image.__version__}, 4:2:0. Errors are mean squares on [0, 1].",
        "\n## The codec\n",
        "| picture | quality | PSNR, hard rounding, dB | PSNR, cubic, dB | error (I - ours) | error (I - Pillow's) "
        "| cubic reads lower by |",
        "|-|-|-|-|-|-|-|",
        *codec_rows(),
        f"\n## {args.steps} steps of Adam on the pixels, quality {args.quality}\n",
        "The error is Pillow's own, on the picture as 8 bits; its rounding alone is 0.0000013.\n",
        "| picture | gradient | error before | after | times lower | bytes before | after |",
        "|-|-|-|-|-|-|-|",
        *gradient_rows(quality=args.quality, steps=args.steps),
    ]
    args.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
