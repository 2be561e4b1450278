"""An update of DRTune on published networks at their own size, with random weights: `python benchmarks/full_size.py`.

Stable Diffusion 1.5 at 512 x 512 (preset sd15-drtune) and SDXL at 1024 x 1024 (sdxl-fdxl), loaded from a folder as a
user's are, one picture at a time: seconds and peak memory of the update's phases for several K, all T steps executed
(m = null; an early stop makes less of them). The reward is one of pixels, so decode + reward is the decoder alone.
Measured as `rewardtune check --dry-run` measures (dryrun.py), each K in a process of its own.

On a GPU everything; memory is what torch had allocated. On a CPU an update of SDXL takes half an hour, and memory is
what the process had resident; since it does not depend on T, few steps tell it:

    python benchmarks/full_size.py --models "SDXL" --K 3 --steps 3 --dtype bfloat16
"""

import argparse
import gc
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scale import BY_NAME
from torch import nn

from rewardtune import dryrun

NAMES = ("SD 1.5", "SDXL")
CHANGES = [  # of the presets: nothing to download, one picture
    "reward=[symmetry]",
    'prompts=["a red heart and a blue star"]',
    "eval.prompts=null",
    "eval.count=1",
    "guards={}",
    "model.variant=null",
    "optim.batch=1",
    "optim.micro_batch=1",
]
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser of the published configuration; weights drawn in `dtype`, which needs no float32 copy."""
    import diffusers

    model = BY_NAME[name]
    with torch.device("meta"):
        made = getattr(diffusers, model.network)(**model.config)
    made = made.to(dtype).to_empty(device="cpu")
    for key, weight in made.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02)
        else:
            nn.init.constant_(weight, float(key.endswith("weight")))  # norms begin as the identity
    return made


def save_pipeline(name: str, folder: Path, dtype: torch.dtype) -> None:
    """A pipeline folder as the hub has it, with random weights and the playground's small tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from rewardtune import playground

    torch.manual_seed(0)
    tokenizer = playground.pipeline().tokenizer
    tokenizer.model_max_length = 77
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=8 * int(BY_NAME[name].config["sample_size"]),
    ).to(dtype)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    parts: dict[str, Any] = {"unet": network(name, dtype), "vae": vae, "tokenizer": tokenizer, "scheduler": scheduler}
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**CLIP_L, **special, projection_dim=768)).to(dtype)
    if name == "SDXL":
        second = CLIPTextConfig(**CLIP_G, **special, projection_dim=1280)
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(second).to(dtype), "tokenizer_2": tokenizer}
        pipe: Any = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts)
    pipe.save_pretrained(folder)


def measured(name: str, folder: Path, K: int, asked: Sequence[str]) -> dict[str, Any]:
    """One update: its phases as (seconds, bytes), and what it was made with."""
    from rewardtune import adapters, evaluate
    from rewardtune.config import load_config
    from rewardtune.engine import count_steps
    from rewardtune.launch import tuner_from

    method = f"method={{name: drtune, options: {{K: {K}, m: null}}}}"
    with tempfile.TemporaryDirectory() as out:
        own = [f"model.id={json.dumps(str(folder))}", method, f"output_dir={out}/run"]
        config = load_config(BY_NAME[name].preset, [*CHANGES, *own, *asked])
        tuner = tuner_from(config, show_progress=False)
        tuner.parameters = adapters.attach(tuner.denoiser, seed=tuner.seed, **tuner.adapter)
        tuner.T = count_steps(tuner.pipe, **evaluate.for_prompts(tuner.prompts[:1], tuner.call))
        found = dryrun.measure(tuner, config, dryrun.Meter(torch.device(tuner.device)))
    return {
        "model": name,
        "T": tuner.T,
        "K": K,
        "dtype": config.model.dtype,
        "vae": config.memory.vae_dtype or config.model.dtype,
        "rank": config.adapter.rank,
        "update": found.update,
        "phases": {key: (phase.seconds, phase.peak) for key, phase in found.phases.items()},
    }


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Two tables: seconds as shares of the update, and peak memory, by phase."""
    phases = [dryrun.TEXT, dryrun.SAMPLING, dryrun.REWARD, dryrun.DECODER, dryrun.STEP, dryrun.OPTIMISER]
    head = ["model", "T", "K", "denoiser", "decoder", "rank"]
    out = [f"| {' | '.join([*head, 'update, s', *phases])} |", "|" + "-|" * (len(head) + 1 + len(phases))]
    peaks = [f"| {' | '.join([*head, 'highest', *phases])} |", out[1]]
    for row in rows:
        first = [row["model"], row["T"], row["K"], row["dtype"], row["vae"], row["rank"]]
        each = {phase: [v for key, v in row["phases"].items() if key.startswith(phase)] for phase in phases}
        share = [f"{sum(s for s, _ in found) / row['update']:.1%}" for found in each.values()]
        high = [dryrun.size(max((peak for _, peak in found), default=0)) for found in each.values()]
        top = max(peak for phase, (_, peak) in row["phases"].items() if phase != dryrun.EVALUATION)
        out.append("| " + " | ".join(map(str, [*first, f"{row['update']:.2f}", *share])) + " |")
        peaks.append("| " + " | ".join(map(str, [*first, f"**{dryrun.size(top)}**", *high])) + " |")
    return ["Seconds of an update, and the share of its phases:", "", *out, "", "Peak memory by phase:", "", *peaks]


def page(rows: Sequence[dict[str, Any]], command: str) -> str:
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    memory = "allocated by torch on the device" if gpu else "resident in the process, looked at every 10 ms"
    lines = [
        "# Published networks at their own size",
        "",
        f"`{command}` on",
        f"{machine}, torch {torch.__version__.split('+')[0]}: DRTune on random weights, one picture,",
        "all T steps executed, a reward of pixels; everything else as the presets sd15-drtune (512 x 512) and",
        f"sdxl-fdxl (1024 x 1024) have it, gradient checkpointing included. Memory is what was {memory}.",
        "",
        *lines_of(rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--K", type=int, nargs="+", help="default: 1, 3, 5, 10 and T")
    parser.add_argument("--steps", type=int, help="T; default: the preset's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the preset's")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more changes of the presets")
    parser.add_argument("--output", type=Path, default=Path("docs/results/full_size.md"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # name, folder, K
    asked = parser.parse_args()
    changes = list(asked.set)
    changes += [f"sampling.steps={asked.steps}"] if asked.steps else []
    changes += [f"model.dtype={asked.dtype}", f"memory.vae_dtype={asked.dtype}"] if asked.dtype else []
    if asked.one:
        name, folder, K = asked.one
        print(json.dumps(measured(name, Path(folder), int(K), changes)))
        return

    from rewardtune.config import load_config

    rows = []
    for name in asked.models:
        preset = load_config(BY_NAME[name].preset, [*CHANGES, *changes])
        T = preset.sampling.steps
        with tempfile.TemporaryDirectory() as folder:
            save_pipeline(name, Path(folder), getattr(torch, preset.model.dtype))
            gc.collect()  # a pipeline's parts know each other: its memory is needed by the process that measures
            for K in asked.K or [*(K for K in (1, 3, 5, 10) if K < T), T]:
                command = [sys.executable, __file__, "--one", name, folder, str(K), "--set", *changes]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    words = [word for word in sys.argv[1:] if word not in ("--output", str(asked.output))]
    text = page(rows, " ".join(["python benchmarks/full_size.py", *map(shlex.quote, words)]))
    asked.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
