"""Started by test_processes.py, once or as one of several processes: a short run in float64, its outcome saved.

python one_of_several.py FOLDER BATCH MICRO_BATCH METHOD [FAULT]
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny import stable_diffusion
from tiny_runs import redness

from rewardtune import methods
from rewardtune.processes import join
from rewardtune.trainer import RewardTuner

METHODS = {"drtune": methods.drtune(K=2, m=2), "draft": methods.draft(K=2), "draft_lv": methods.draft_lv(n=2)}


def main(folder: Path, batch: int, micro_batch: int, method: str, fault: str = "") -> None:
    torch.set_num_threads(1)
    pipe, _ = stable_diffusion(lora=False)
    pipe.to(torch.float64)
    calls = 0

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 6 and join().rank == 1:
            if fault == "nan":
                return redness(images, prompts) * float("nan")
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return redness(images, prompts)

    tuner = RewardTuner(
        pipe,
        reward=reward,
        method=METHODS[method],
        prompts=["red heart", "blue star", "green moon", "pink cat", "grey dog"],
        output_dir=folder,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        rank=4,
        batch=batch,
        micro_batch=micro_batch,
        eval_count=3,
        show_progress=False,
    )
    tuner.train(5, lr=1e-2)
    if tuner.processes.first:
        gradients = [parameter.grad for parameter in tuner.parameters]
        torch.save({"weights": [p.detach() for p in tuner.parameters], "gradients": gradients}, folder / "out.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
