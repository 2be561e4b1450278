"""Scales of the rewards on the playground's pictures: `python benchmarks/reward_scales.py`.

For each: mean and std of the native value, which `standardise` wants, and the norm of its gradient at the image, which
`balance` evens out. Writes docs/results/reward_scales.md. Left out: anything about other models; measure your own.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rewardtune import evaluate, playground, rewards
from rewardtune.rewards import Reward

OUTPUT = Path(__file__).parents[1] / "docs/results/reward_scales.md"
PIXELS: dict[str, Reward] = {
    "symmetry": rewards.Symmetry(),
    "compressibility": rewards.Compressibility(),
    "brightness": rewards.Brightness(),
    "colour": rewards.Colour("teal"),
}


def networks() -> dict[str, Reward]:
    """The playground's own, as far as they are built."""
    shipped = [name for name, folder in playground.REWARDS.items() if (playground.WEIGHTS / folder).is_dir()]
    settings = {"objectness": {"target": "heart"}}
    return {
        name: rewards.load(name, {"model": str(playground.reward_path(name))} | settings.get(name, {}))
        for name in shipped
    }


def measure(reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """(native values (B,), norms of the score's gradient at each image (B,))."""
    leaf = images.clone().requires_grad_()
    total, natives = reward.parts(leaf, prompts)
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    return natives[reward.name], gradient.flatten(1).norm(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="prompts, one picture each")
    args = parser.parse_args()
    prompts = playground.prompts(args.count, split="eval")
    call = {"num_inference_steps": 20, "guidance_scale": 4.0}
    images = evaluate.sample(playground.pipeline(), prompts, seeds=list(range(args.count)), call=call)
    found = {name: measure(reward, images, prompts) for name, reward in (networks() | PIXELS).items()}
    largest = max(norms.mean().item() for _, norms in found.values())
    rows = [
        "# Scales of the rewards on the playground\n",
        f"`python benchmarks/reward_scales.py --count {args.count}`: untuned pipeline, 20 steps, guidance 4, held-out "
        "prompts. Gradient: of the score at the image, its norm averaged over the pictures.\n",
        "| reward | native mean | std over pictures | gradient norm | largest norm / own |",
        "|-|-|-|-|-|",
        *(
            f"| {name} | {values.mean():.4g} | {values.std():.2g} | {norms.mean():.2g} | {largest / norms.mean():.0f} |"
            for name, (values, norms) in found.items()
        ),
    ]
    OUTPUT.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
