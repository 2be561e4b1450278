"""A reward of your own on the playground: warmer pictures (more red than blue) that still match their caption.

python examples/own_reward.py [UPDATES] [FOLDER]; 40 updates take about a minute on a laptop.
"""

import sys

from torch import Tensor

from rewardtune import RewardTuner, methods, playground, rewards


def warmth(images: Tensor, prompts: list[str]) -> Tensor:
    """(B, 3, H, W) in [0, 1] and B prompts to (B,) scores, higher is better: any differentiable function will do."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


if __name__ == "__main__":
    updates, folder = int((sys.argv[1:] or [40])[0]), (sys.argv[2:] or ["runs/warmth"])[0]
    pipe = playground.pipeline()
    tuner = RewardTuner(
        pipe,
        reward=rewards.from_callable(warmth) + 0.5 * rewards.CLIPScore(model=str(playground.clip_path())),
        method=methods.drtune(K=2, m=4),
        prompts=playground.prompts(500),
        eval_prompts=playground.prompts(8, split="eval"),
        output_dir=folder,
        num_inference_steps=10,
        guidance_scale=4.0,
        rank=8,
        batch=4,
        overwrite=True,
    )
    tuner.train(updates, lr=3e-4)
    pipe("a blue star, night background", num_inference_steps=10).images[0].save(f"{folder}/star.png")
