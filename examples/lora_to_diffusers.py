"""From a run to a LoRA in plain diffusers, on the playground: tune, export, load without this package, compare.

Loading a LoRA whose names do not fit raises nothing in diffusers, so the last lines look at the pictures: they must
differ from the base model's and equal the tuned pipeline's.

python examples/lora_to_diffusers.py [UPDATES] [FOLDER]
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

from rewardtune import RewardTuner, methods, playground, rewards
from rewardtune.export import export_run


def picture(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """(1, 3, 64, 64) in [0, 1], of one prompt and one seed."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 10, "guidance_scale": 4.0, "generator": generator, "output_type": "pt"}
    return pipe("a red heart, night background", **call).images


if __name__ == "__main__":
    updates, folder = int((sys.argv[1:] or [20])[0]), (sys.argv[2:] or ["runs/to_diffusers"])[0]
    pipe = playground.pipeline()
    base = picture(pipe)
    tuner = RewardTuner(
        pipe,
        reward=rewards.Brightness(),
        method=methods.drtune(K=1, m=4),
        prompts=playground.prompts(100),
        output_dir=folder,
        num_inference_steps=10,
        guidance_scale=4.0,
        rank=4,
        alpha=8,  # not the rank, on purpose: the scale must survive the way through the file
        batch=2,
        eval_count=1,
        overwrite=True,
    )
    tuner.train(updates, lr=1e-3)
    for made in export_run(folder, ["diffusers", "kohya"], model="playground"):
        print(made)

    plain = StableDiffusionPipeline.from_pretrained(playground.path(), torch_dtype=torch.float32)
    plain.load_lora_weights(f"{folder}/export/diffusers")
    from_tuner, from_file = picture(pipe), picture(plain)
    print(f"tuned and loaded: {(from_tuner - from_file).abs().max():.1e} apart at the worst pixel")
    print(f"tuned and base:   {(from_tuner - base).abs().max():.1e}")
    if (from_tuner - from_file).abs().max() > 1e-4 or torch.equal(from_tuner, base):
        raise SystemExit("the LoRA was not loaded as it was trained")
