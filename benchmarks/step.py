"""One DRTune step against its floor, and memory against K: `python benchmarks/step.py`.

The floor of a step that executes E denoiser calls and replays K of them is

    E f + K (f + b) + text + decode + reward

with every part timed alone in the same run: f a forward of the denoiser without graph, f + b a forward and backward of
it, text the prompt encoder, decode the decoder's forward plus its replay and backward, reward its forward and backward.
What is above the floor is ours: recording, the scheduler's arithmetic, the comparison of each replay.

Figures are ratios of one run, so they compare across machines; the seconds beside them do not.
Left out: the optimiser (the same for every library), data loading (none).
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from saved_bytes import SavedBytes
from torch import Tensor

from rewardtune import Plan, add_lora, playground, rollout

PROMPTS = ["a red heart and a blue star", "a green circle on the left", "a yellow square", "two purple stars"]
SIZES: dict[str, tuple[tuple[int, ...], int]] = {  # channels of the UNet, latent size
    "random SD 32-64": ((32, 64), 16),
    "random SD 64-128": ((64, 128), 16),
    "random SD 128-256": ((128, 256), 16),
    "random SD 1.5": ((320, 640, 1280, 1280), 64),
}


def random_stable_diffusion(channels: tuple[int, ...], latent: int) -> Any:
    """A Stable Diffusion pipeline with random weights: the text tower of the playground, a VAE and UNet of any size."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    base = playground.pipeline()
    torch.manual_seed(0)
    n = len(channels)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * (n - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (n - 1),
    }
    unet = UNet2DConditionModel(
        sample_size=latent,
        block_out_channels=channels,
        layers_per_block=2 if n == 4 else 1,
        attention_head_dim=8,
        cross_attention_dim=base.text_encoder.config.hidden_size,
        norm_num_groups=32,
        **blocks,
    )
    widths = (128, 256, 512, 512) if n == 4 else (32, 64, 64)
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2 if n == 4 else 1,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        sample_size=latent * 8,
    )
    scheduler = DDIMScheduler.from_config(base.scheduler.config)
    parts = {"text_encoder": base.text_encoder, "tokenizer": base.tokenizer, "scheduler": scheduler}
    return StableDiffusionPipeline(
        unet=unet, vae=vae, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def prepare(pipe: Any, device: str) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    add_lora(pipe.unet, rank=8)
    return pipe.to(device)


def reward(images: Tensor) -> Tensor:
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


def call_of(batch: int, steps: int) -> dict[str, Any]:
    return {
        "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(batch)],
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
    }


def seconds(run: Callable[[], Any]) -> float:
    """Of one run: process time on the CPU, which other programs disturb less; wall time on a GPU."""
    gpu = torch.cuda.is_available()
    now = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    start = now()
    run()
    if gpu:
        torch.cuda.synchronize()
    return now() - start


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run in every round, after a round to warm up; in turns, so a slow moment meets all of them."""
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [found[name] for found in rounds[1:]] for name in runs}


def equally_spaced(T: int, K: int, end: int | None = None) -> Plan:
    gap = T // K
    return Plan(T=T, train=frozenset(range(gap - 1, T, gap)) if K < T else frozenset(range(T)), end=end)


def step(pipe: Any, plan: Plan, call: dict[str, Any], *, recompute: bool = True) -> None:
    with rollout(pipe, plan, seed=0, recompute=recompute, **call) as tape:
        tape.backward(-reward(tape.images).mean())
    for p in pipe.unet.parameters():
        p.grad = None


def parts(pipe: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """Each part of the floor, to be timed alone."""
    unet, vae, device = pipe.unet, pipe.vae, pipe.device
    size = unet.config.sample_size
    x = torch.randn(2 * batch, 4, size, size, device=device)
    t = torch.tensor(500, device=device)
    text = pipe.encode_prompt(call_of(batch, 1)["prompt"], device, 1, True)
    embeds = torch.cat([text[1], text[0]]).detach()
    z = torch.randn(batch, 4, size, size, device=device)

    def forward() -> None:
        with torch.no_grad():
            unet(x, t, encoder_hidden_states=embeds, return_dict=False)

    def forward_backward() -> None:
        unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0].sum().backward()
        for p in unet.parameters():
            p.grad = None

    def decode() -> None:
        with torch.no_grad():
            vae.decode(z, return_dict=False)
        for one in z.split(max(1, 512 * 512 // (64 * size * size))):
            one = one.clone().requires_grad_()
            vae.decode(one, return_dict=False)[0].sum().backward()

    with torch.no_grad():
        images = vae.decode(z, return_dict=False)[0]

    def judge() -> None:
        reward(images.clone().requires_grad_()).sum().backward()

    def encode() -> None:
        with torch.no_grad():
            pipe.encode_prompt(call_of(batch, 1)["prompt"], device, 1, True)

    return {"f": forward, "f+b": forward_backward, "decode": decode, "reward": judge, "text": encode}


def over_floor(pipe: Any, T: int, batch: int, repeats: int) -> tuple[list[str], list[str]]:
    """Rows of the two tables: steps over their floors, and the shares of a step's phases; medians over rounds."""
    rows, shares = [], []
    call = call_of(batch, T)
    for K, end in ((1, None), (2, None), (T // 2, None), (T, None), (2, T - T // 4)):
        plan = equally_spaced(T, K, end)
        ours = {
            "step": lambda plan=plan: step(pipe, plan, call),
            "kept": lambda plan=plan: step(pipe, plan, call, recompute=False),
        }
        found = in_turns({**ours, **parts(pipe, batch)}, repeats)
        E, K_ran = plan.steps_run, len(plan.executed)
        phases = {"f": E, "f+b": K_ran, "decode": 1, "reward": 1, "text": 1}
        floor = [sum(n * found[name][k] for name, n in phases.items()) for k in range(repeats)]
        kept = [floor[k] - K_ran * found["f"][k] for k in range(repeats)]

        def ratio(above: list[float], below: list[float]) -> float:
            return statistics.median(a / b for a, b in zip(above, below, strict=True))

        rows.append(
            f"| {T} | {E} | {K_ran} | {statistics.median(found['step']):.3f} | {statistics.median(floor):.3f} | "
            f"**{ratio(found['step'], floor):.2f}** | {statistics.median(found['kept']):.3f} | "
            f"{statistics.median(kept):.3f} | **{ratio(found['kept'], kept):.2f}** | "
            f"{ratio(found['step'], found['kept']):.2f} | {ratio(found['f+b'], found['f']):.2f} |"
        )
        print(rows[-1], flush=True)
        each = [n * ratio(found[name], found["step"]) for name, n in phases.items()]
        rest = 1 - ratio(floor, found["step"])
        shares.append(f"| {T} | {E} | {K_ran} | " + " | ".join(f"{part:.1%}" for part in [*each, rest]) + " |")
    return rows, shares


def memory(pipe: Any, batch: int, steps: tuple[int, ...]) -> list[str]:
    rows = []
    for T in steps:
        for K in (1, 5, T):
            gc.collect()
            with SavedBytes(pipe.unet) as saved, rollout(pipe, equally_spaced(T, K), **call_of(batch, T)) as tape:
                recorded = tape.recorded_bytes
                tape.backward(-reward(tape.images).mean())
            for p in pipe.unet.parameters():
                p.grad = None
            rows.append(f"| {T} | {K} | {saved.peak[True] / 2**20:.2f} | {recorded / 2**20:.2f} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="T of the timed steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5 at its own size (needs a GPU)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/step.md"))
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # process time adds up all threads, waiting ones too

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    out = [
        "# Step time over its floor, memory against K",
        "",
        f"`python benchmarks/step.py --batch {asked.batch} --steps {asked.steps} --repeats {asked.repeats}` on "
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}, float32.",
        "Process time (wall time on a GPU), medians over rounds in which everything is timed in turn.",
        "",
        "Floor: E f + K (f + b) + text + decode + reward, each part timed alone beside the step it is compared with.",
        "Kept: `recompute=False` keeps the K graphs; its floor is (E - K) f + K (f + b) + text + decode + reward.",
        "Shares: the parts timed alone, of the step of the same row; the rest is recording, the scheduler and the",
        "comparison of each replay (below zero where a part alone was slower than in the step).",
    ]
    names = ["playground", *(name for name in SIZES if asked.full or name != "random SD 1.5")]
    for name in names:
        pipe = prepare(playground.pipeline() if name == "playground" else random_stable_diffusion(*SIZES[name]), device)
        count = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
        print(f"\n{name} ({count:.1f} M parameters in the UNet)", flush=True)
        out += ["", f"## {name}, {count:.1f} M parameters in the UNet", ""]
        rows, shares = over_floor(pipe, asked.steps, asked.batch, asked.repeats)
        out += [
            "| T | E | K | step, s | floor, s | step / floor | kept, s | its floor, s | kept / its floor | step / kept "
            "| (f+b) / f |",
            "|-|-|-|-|-|-|-|-|-|-|-|",
            *rows,
            "",
            "| T | E | K | forwards | replays | decode | reward | text | rest |",
            "|-|-|-|-|-|-|-|-|-|",
            *shares,
        ]
        out += ["", "| T | K | saved inside the denoiser, MiB | recorded inputs and outputs, MiB |", "|-|-|-|-|"]
        out += memory(pipe, asked.batch, (10, 20, 50) if count < 4 else (10,))
        del pipe
    asked.output.write_text("\n".join(out) + "\n")
    print(f"\nwritten: {asked.output}")


if __name__ == "__main__":
    main()
