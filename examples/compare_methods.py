"""Two methods on one reward at an equal number of network calls, on the playground: which raises it further?

Each update of a method costs what it samples and trains; the one that costs less gets more updates. Both start from
the same weights, see the same prompts and noise, and are judged on the same held-out prompts, by the trained reward
and by a CLIPScore that neither was trained on. One run each says little: repeat it with other seeds.

python examples/compare_methods.py [CALLS] [FOLDER]; 6,000 calls a method take some minutes on a laptop.
"""

import random
import sys
from pathlib import Path
from statistics import mean

from rewardtune import RewardTuner, methods, playground, rewards
from rewardtune.compare import compare_candidates
from rewardtune.methods import Method

T, BATCH, REPLAY = 10, 4, 3.0  # a trained call is sampled, computed again and back-propagated: about three calls


def calls_of_an_update(method: Method) -> float:
    """Network calls for the pictures of one update, mean over the method's plans."""
    plans = [method(T, random.Random(draw)) for draw in range(500)]
    return BATCH * mean(plan.steps_run + (REPLAY - 1) * len(plan.executed) for plan in plans)


if __name__ == "__main__":
    calls, folder = int((sys.argv[1:] or [6000])[0]), Path((sys.argv[2:] or ["runs/methods"])[0])
    for method in (methods.drtune(K=1, m=4), methods.refl(m=2)):
        updates = max(1, round(calls / calls_of_an_update(method)))
        print(f"{method}: {updates} updates of {BATCH} pictures")
        tuner = RewardTuner(
            playground.pipeline(),
            reward=rewards.Symmetry(detach_std=True),
            method=method,
            prompts=playground.prompts(500),
            eval_count=1,
            output_dir=folder / method.name,
            num_inference_steps=T,
            guidance_scale=4.0,
            rank=8,
            batch=BATCH,
            overwrite=True,
        )
        tuner.train(updates, lr=3e-4)
    clipscore = rewards.load("clipscore", {"model": "playground"})
    found = compare_candidates(
        [str(folder / "drtune"), str(folder / "refl")],
        model="playground",
        rewards=rewards.Symmetry() + clipscore,
        prompts=playground.prompts(16, split="eval"),
        steps=T,
        guidance=4.0,
        output=folder / "compared",
    )
    print(found.as_text())
