"""Started by test_processes.py as one of several processes, or called by it: short runs in float64, outcomes saved.

python one_of_several.py FOLDER SCENARIO...
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from tiny import stable_diffusion
from tiny_runs import redness

from rewardtune import methods
from rewardtune.errors import RewardTuneError
from rewardtune.processes import join
from rewardtune.prompts import Conditioned
from rewardtune.sharding import held
from rewardtune.trainer import RewardTuner

METHODS = {"drtune": methods.drtune(K=2, m=2), "draft": methods.draft(K=2)}
CHECKPOINTS = {"every": 2, "keep": 9, "best": None}
SCENARIOS: dict[str, dict[str, Any]] = {
    "drtune": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5},
    "draft": {"method": "draft", "batch": 3, "micro_batch": 1, "steps": 3},
    "pictures": {"method": "drtune", "batch": 3, "micro_batch": 1, "steps": 3, "pictures": True},
    "half": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 2},  # of drtune, to go on from
    "resumed": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "resume": "latest"},
    "guarded": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "guard": True},
    "nan": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "fault": "nan"},
    "raises": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "fault": "raises"},
    "sharded": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "shard": True},
    "sharded_nan": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "shard": True, "fault": "nan"},
    "shared_by_two": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "shard": "node", "local": 2},
    "killed": {"method": "drtune", "batch": 4, "micro_batch": 2, "steps": 5, "fault": "killed"},
}


def with_pictures(prompts: list[str], folder: Path, *, first: int) -> list[str]:
    """The prompts with a picture and a negative prompt each: equal ones in every process, in a folder of its own.

    first: the seed of the first prompt's picture; those of the others follow.
    """
    folder.mkdir(parents=True)
    made = list[str]()
    for number, prompt in enumerate(prompts):
        values = np.random.default_rng(first + number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        made.append(Conditioned(prompt, {"image": folder / f"{number}.png", "negative_prompt": f"no {prompt}"}))
    return made


def run(folder: Path, *, method: str, batch: int, micro_batch: int, steps: int, **more: Any) -> None:
    """One training; rank 0 saves the weights, and all save how it ended (end-RANK.json)."""
    torch.set_num_threads(1)
    rank = join().rank
    if "local" in more:  # as if so many of the processes were on one machine
        os.environ["LOCAL_WORLD_SIZE"] = str(more["local"])
    pipe, _ = stable_diffusion(lora=False)
    prompts, sizes = ["red heart", "blue star", "green moon", "pink cat", "grey dog"], {"height": 16, "width": 16}
    if more.get("pictures"):
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        place = folder.parent / f"{folder.name}-given-{rank}"
        prompts, sizes = with_pictures(prompts, place, first=1 if more["pictures"] == "swapped" else 0), {}
    pipe.to(torch.float64)
    running: list[RewardTuner] = []  # once it is there

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if more.get("fault") and rank == 1 and running and running[0].step == 3:
            if more["fault"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if more["fault"] == "raises":
                raise ValueError("no network")
            return redness(images, prompts) * float("nan")
        return redness(images, prompts)

    rules = [{"metric": "base_pixels", "above": 0.002, "then": "stop"}] if more.get("guard") else []
    tuner = RewardTuner(
        pipe,
        reward=reward,
        method=METHODS[method],
        prompts=prompts,
        output_dir=folder,
        num_inference_steps=4,
        guidance_scale=3.0,
        **sizes,
        rank=4,
        batch=batch,
        micro_batch=micro_batch,
        eval_count=3,
        checkpoints=CHECKPOINTS,
        guards={"rules": rules},
        shard=more.get("shard", False),
        resume=more.get("resume"),
        show_progress=False,
    )
    running.append(tuner)
    end: dict[str, Any] = {"error": None}
    try:
        tuner.train(steps, lr=1e-2, eval_every=1 if more.get("guard") else None)
    except RewardTuneError as error:
        end = {"error": str(error), "exit_code": error.exit_code}
    (folder / f"end-{rank}.json").write_text(json.dumps(end | {"step": tuner.step, "held": held(tuner.denoiser)}))
    if rank == 0:
        gradients = [parameter.grad for parameter in tuner.parameters]
        torch.save({"weights": [p.detach() for p in tuner.parameters], "gradients": gradients}, folder / "out.pt")


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        run(Path(sys.argv[1]) / scenario, **SCENARIOS[scenario])
