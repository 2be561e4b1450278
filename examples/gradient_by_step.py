"""Research without a trainer: how large is the gradient that each sampling step contributes, method by method?

The paper's figure of exploding gradients in small: with the network's input in the graph (DRaFT) early steps are
amplified, with it detached (DRTune) they are not. python examples/gradient_by_step.py [STEPS]
"""

import sys
from random import Random

import torch

from rewardtune import add_lora, count_steps, methods, playground, rewards, rollout

if __name__ == "__main__":
    steps = int((sys.argv[1:] or [10])[0])
    pipe = playground.pipeline()
    parameters = add_lora(pipe.unet, rank=8)
    reward = rewards.Symmetry(detach_std=True)
    prompts = playground.prompts(4, split="eval")
    call = {"prompt": prompts, "num_inference_steps": steps, "guidance_scale": 4.0}
    T = count_steps(pipe, **call)
    for method in (methods.draft(K=None), methods.draft(K=None, input_gradient=0.0), methods.drtune(K=T, m=None)):
        plan = method(T, Random(0))
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        with rollout(pipe, plan, generator=noise, **call) as tape:
            sweep = tape.backward(-reward(tape.images, tape.prompts).mean())
        for parameter in parameters:
            parameter.grad = None
        print(f"{method}\n  {plan.draw()}")
        print("  " + " ".join(f"{norm:.1e}" for _, norm in sorted(sweep.grad_norms.items())))
