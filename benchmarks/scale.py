"""What several devices move, one process against two, and a projection to 1,024 GPUs: `python benchmarks/scale.py`.

Writes docs/results/scale.md and scale.json. Three parts:

- bytes: the published denoisers are built without weights (torch's meta device), the LoRA is attached as in a run, and
  its parameters are counted: float32 gradients of these are what the one all-reduce of an update sums.
- measured: the playground's preset on the CPU by the real launcher, one thread a process. Rounds of four runs that take
  turns: one process; two that share an update; one with the batch of both; two that know nothing of each other, which
  shows what the machine itself loses with both cores busy. The plans are the same in all of them, so updates are
  compared step by step. The all-reduce is timed alone in a start of its own.
- projected: arithmetic on counted operations and the constants below, each with its source. Not a measurement.

`--arithmetic` writes the first and the last part anew and keeps what was measured before.
Left out of the projection: decoding and the reward (they need no device but their own, so efficiency would be higher),
stragglers, data loading, evaluation, checkpoints.
"""

import argparse
import json
import math
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewardtune import add_lora
from rewardtune.config import load_config
from rewardtune.launch import make_method

# Assumptions of the projection ----------------------------------------------------------------------------------------

H100_BF16 = 989e12  # FLOP/s, dense; NVIDIA H100 SXM data sheet
UTILISATION = 0.40  # share of it that is reached: assumed. Less makes each step longer, and the efficiencies higher
NVLINK = 450e9  # bytes/s of a GPU in one direction: half of the 900 GB/s of NVLink 4 in the same data sheet
NETWORK = 50e9  # bytes/s of one network card in one direction: InfiniBand NDR, 400 Gb/s
NODE = 8  # GPUs of a node, and its network cards: DGX H100
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6  # seconds of one step of a ring; NCCL's own model (tuning.cc: ring, Simple)
FLOAT32, BFLOAT16 = 4, 2  # bytes
COUNTS = (8, 64, 1024)  # GPUs


def bandwidth(n: int, *, cards: int = 1) -> float:
    """Bytes/s of the slowest link of a ring of `n` GPUs: NVLink inside a node, else `cards` network cards at once.

    cards = 1 is one ring through one card. NCCL makes a ring through each card: up to NODE.
    """
    return NVLINK if n <= NODE else min(NVLINK, cards * NETWORK)


def latency(n: int, rounds: int) -> float:
    """Seconds of `rounds` times around a ring of `n` GPUs with nothing to carry, as NCCL models them."""
    nodes = math.ceil(n / NODE)
    return rounds * ((n - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP)


def all_reduce(size: float, n: int, *, cards: int = 1) -> float:
    """Seconds to sum `size` bytes over a ring of `n`: each GPU sends 2 (n - 1) / n of them."""
    return 2 * (n - 1) / n * size / bandwidth(n, cards=cards) + latency(n, 2)


def all_gather(size: float, n: int, *, parts: int = 1, cards: int = 1) -> float:
    """Seconds until every GPU holds all of `size` bytes that lie in shares on `n`, in `parts` gatherings."""
    return (n - 1) / n * size / bandwidth(n, cards=cards) + parts * latency(n, 1)


def seconds(flop: float) -> float:
    return flop / (H100_BF16 * UTILISATION)


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update of one process: E denoiser calls, K of them replayed (means over the method's draws).

    forward, replay: seconds of a call, and of the same call with gradient and backward, for its pictures.
    """

    E: float
    K: float
    forward: float
    replay: float

    @property
    def alone(self) -> float:
        """Seconds on one GPU that holds everything."""
        return self.E * self.forward + self.K * self.replay

    def sharded(self, gather: float, *, overlap: bool) -> float:
        """Seconds when the weights are gathered at each call, in `gather` seconds; a replay gathers twice.

        overlap: a block's weights arrive while the block before it computes; the slower of both counts.
        """
        if not overlap:
            return self.alone + (self.E + 2 * self.K) * gather
        backward = self.replay - self.forward
        return (self.E + self.K) * max(self.forward, gather) + self.K * max(backward, gather)


# The networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, so that what is counted once is kept
class Model:
    """A published denoiser: its class in diffusers, its config.json, and the preset that is projected with it.

    inputs: shapes of the arguments for one picture; a first number of 2 is guidance in one call.
    """

    name: str
    preset: str
    network: str
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    added: dict[str, tuple[int, ...]] | None = None


CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
MODELS = [
    Model(
        name="SD 1.5",
        preset="sd15-drtune",
        network="UNet2DConditionModel",
        config={
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        },
        inputs={"sample": (2, 4, 64, 64), "timestep": (), "encoder_hidden_states": (2, 77, 768)},
    ),
    Model(
        name="SDXL",
        preset="sdxl-fdxl",
        network="UNet2DConditionModel",
        config={
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        inputs={"sample": (2, 4, 128, 128), "timestep": (), "encoder_hidden_states": (2, 77, 2048)},
        added={"text_embeds": (2, 1280), "time_ids": (2, 6)},
    ),
    Model(
        name="FLUX.1-dev",
        preset="flux",
        network="FluxTransformer2DModel",
        config={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        inputs={  # 1024 x 1024: 64 x 64 tokens of the picture, 512 of the text
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "timestep": (1,),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
            "guidance": (1,),
        },
    ),
]
BY_NAME = {model.name: model for model in MODELS}


def build(model: Model, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The denoiser without weights, with a LoRA as the preset attaches it; its trained parameters."""
    import diffusers

    with torch.device("meta"):
        denoiser = getattr(diffusers, model.network)(**model.config)
        return denoiser, add_lora(denoiser, rank, targets=load_config(model.preset).adapter.targets)


@cache
def counted(model: Model, rank: int) -> tuple[int, int]:
    """(frozen weights, trained parameters)."""
    denoiser, trained = build(model, rank)
    ours = sum(p.numel() for p in trained)
    return sum(p.numel() for p in denoiser.parameters()) - ours, ours


@cache
def operations(model: Model, rank: int) -> tuple[float, float]:
    """FLOP of a call for one picture, and of its replay: forward, backward and what checkpointing computes again.

    Counted by torch's FlopCounterMode on the meta device: matrix products, convolutions, attention; 2 a multiply-add.
    """
    from torch.utils.flop_counter import FlopCounterMode

    denoiser, _ = build(model, rank)
    given: dict[str, Any] = {name: torch.empty(shape, device="meta") for name, shape in model.inputs.items()}
    if model.added:
        given["added_cond_kwargs"] = {name: torch.empty(shape, device="meta") for name, shape in model.added.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        denoiser(**given, return_dict=False)
    if load_config(model.preset).memory.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    with FlopCounterMode(display=False) as replay:
        denoiser(**given, return_dict=False)[0].sum().backward()
    return float(forward.get_total_flops()), float(replay.get_total_flops())


def calls(preset: str, draws: int = 4000) -> tuple[float, float]:
    """(E, K) of the preset's method: means over draws of its plans."""
    config = load_config(preset)
    method = make_method(config.method)
    plans = [method(config.sampling.steps, random.Random(i)) for i in range(draws)]
    return statistics.mean(p.steps_run for p in plans), statistics.mean(len(p.executed) for p in plans)


def gatherings(model: Model) -> int:
    """How many groups of weights `sharding.shard` makes of the denoiser: its blocks, and the rest."""
    denoiser, _ = build(model, 1)
    names = {*(denoiser._repeated_blocks or ()), *(denoiser._no_split_modules or ())}  # type: ignore[operator, misc]
    return 1 + sum(type(part).__name__ in names for part in denoiser.modules())


# Bytes and projection -------------------------------------------------------------------------------------------------


def moved_rows() -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        own = load_config(model.preset).adapter.rank
        for rank in sorted({16, own, 128}):
            frozen, trained = counted(model, rank)
            row = {"model": model.name, "rank": rank, "preset": rank == own, "frozen": frozen, "trained": trained}
            rows.append(row | {"moved": trained * FLOAT32, "full": frozen * FLOAT32, "weights": frozen * BFLOAT16})
    return rows


def small_talk(pictures: int) -> int:
    """Bytes that a process gathers from each other one besides gradients: the scores and norms of its micro-batch."""
    from rewardtune.engine import Sweep
    from rewardtune.gradient import Part

    norms = dict.fromkeys(range(5), 1.0)
    sweep = Sweep(grad_norms=norms, trained=tuple(norms), steps_run=40, replay_error=0.0, clamped=0.0, scale=1.0)
    scores = {"reward": torch.zeros(pictures), "hpsv2": torch.zeros(pictures)}
    return len(pickle.dumps([Part(size=pictures, scores=scores, natives=["hpsv2"], sweep=sweep)]))


def update_of(model: Model, pictures: float) -> Update:
    """An update of the preset with `pictures` on a GPU."""
    E, K = calls(model.preset)
    forward, replay = operations(model, load_config(model.preset).adapter.rank)
    return Update(E=E, K=K, forward=seconds(pictures * forward), replay=seconds(pictures * replay))


def projected_rows() -> list[dict[str, Any]]:
    """Data parallel. Each GPU one micro-batch of the preset, so the whole batch grows with the GPUs (weak); and the
    preset's own batch over 8 GPUs and over as many as it has pictures (strong)."""
    rows = []
    for model in MODELS:
        config = load_config(model.preset)
        size = FLOAT32 * counted(model, config.adapter.rank)[1]
        micro, batch = config.optim.micro_batch or config.optim.batch, config.optim.batch
        shares = [("weak", n, micro) for n in COUNTS] + [("strong", n, batch / n) for n in (8, batch)]
        flop = dict(zip(("f", "r"), operations(model, config.adapter.rank), strict=True))
        for kind, n, pictures in shares:
            update, reduced = update_of(model, pictures), all_reduce(size, n)
            row = {"model": model.name, "kind": kind, "gpus": n, "pictures": pictures, "bytes": size, **flop}
            row |= asdict(update) | {
                "alone": update.alone,
                "all_reduce": reduced,
                "efficiency": update.alone / (update.alone + reduced),
            }
            rows.append(row)
    return rows


def sharded_rows() -> list[dict[str, Any]]:
    """FLUX.1-dev with its frozen weights shared out: inside each node, or over all GPUs, through 1 or 8 cards."""
    model = BY_NAME["FLUX.1-dev"]
    config = load_config(model.preset)
    frozen, trained = counted(model, config.adapter.rank)
    rows = []
    for n in COUNTS:
        ways = [(NODE, 1)] + [(n, cards) for cards in (1, NODE) if n > NODE]
        for group, cards in ways:
            gather = all_gather(frozen * BFLOAT16, group, parts=gatherings(model), cards=cards)
            update, reduced = update_of(model, config.optim.micro_batch or 1), all_reduce(trained * FLOAT32, n)
            row = {"gpus": n, "group": group, "cards": cards if group > NODE else 0, "gather": gather}
            row |= {"forward": update.forward, "break_even": math.ceil(gather / update_of(model, 1).forward)}
            for overlap in (False, True):
                row["overlap" if overlap else "apart"] = update.alone / (
                    update.sharded(gather, overlap=overlap) + reduced
                )
            rows.append(row)
    return rows


# Measured -------------------------------------------------------------------------------------------------------------

ONE, TWO, WHOLE, APART = "one process", "two processes", "one process, the batch of both", "two runs apart"


def train(folder: Path, *, processes: int, batch: int, micro: int, updates: int) -> "subprocess.Popen[str]":
    """A run of the playground's preset on the CPU, started."""
    given = [f"output_dir={folder}", "model.device=cpu", f"optim.batch={batch}", f"optim.micro_batch={micro}"]
    given += [f"optim.steps={updates}", "eval.count=2", "checkpoints.every=null", "checkpoints.best=null"]
    command = [sys.executable, "-m", "rewardtune", "train", "playground", *given, "log.report=false"]
    if processes > 1:
        command += ["-n", str(processes)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | threads, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def finished(run: "subprocess.Popen[str]", folder: Path) -> list[float]:
    """Seconds of each update but the first."""
    said = run.communicate()[1]
    if run.returncode:
        sys.exit(f"a run failed: {said[-2000:]}")
    return [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]


def one_round(folder: Path, *, batch: int, updates: int) -> dict[str, list[float]]:
    """Seconds of each update by kind of run."""
    found: dict[str, list[float]] = {}
    kinds = {ONE: (1, batch, 1), TWO: (2, 2 * batch, 1), WHOLE: (1, 2 * batch, 1), APART: (1, batch, 2)}
    for number, (kind, (processes, whole, copies)) in enumerate(kinds.items()):
        places = [folder / f"{number}-{copy}" for copy in range(copies)]
        given = {"processes": processes, "batch": whole, "micro": batch, "updates": updates}
        runs = [train(place, **given) for place in places]
        each = [finished(run, place) for run, place in zip(runs, places, strict=True)]
        found[kind] = [statistics.mean(step) for step in zip(*each, strict=True)]
        print(f"{kind}: {statistics.median(found[kind]):.2f} s an update", flush=True)
    return found


def reduce_alone(answer: Path, *, batch: int, repeats: int = 30) -> None:
    """In each of two processes: median seconds of the all-reduce, and of a gathering of scores, with nothing else."""
    from rewardtune import adapters, playground
    from rewardtune.processes import join

    torch.set_num_threads(1)
    adapter = load_config("playground").adapter
    processes, pipe = join(), playground.pipeline()
    parameters = adapters.attach(pipe.unet, kind=adapter.kind, rank=adapter.rank, targets=adapter.targets)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parts = b"0" * small_talk(batch)
    times: dict[str, list[float]] = {"all_reduce": [], "gather": []}
    work: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: processes.sum_gradients(parameters),
        "gather": lambda: processes.gather(parts),
    }
    for _ in range(repeats):
        for name, run in work.items():
            processes.gather(None)  # both begin together
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    if processes.first:
        size = sum(p.numel() * p.element_size() for p in parameters)
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        answer.write_text(json.dumps(medians | {"bytes": size}))


def measure(*, batch: int, updates: int, rounds: int) -> dict[str, Any]:
    """What the runs gave: seconds by kind (one list over all rounds), the all-reduce alone, and the machine."""
    from rewardtune.processes import start

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)
            for kind, values in one_round(Path(name) / str(number), batch=batch, updates=updates).items():
                found.setdefault(kind, []).extend(values)
        answer = Path(name) / "reduce.json"
        code = start(2, [__file__, "--reduce", str(answer), "--batch", str(batch)], cpu=True)
        if code:
            sys.exit(f"the all-reduce alone failed with exit code {code}")
        alone = json.loads(answer.read_text())
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__.split("+")[0]}
    return {"batch": batch, "updates": updates, "rounds": rounds, **machine, "seconds": found, "alone": alone}


def ratio(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios of updates with the same plan."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


# The page -------------------------------------------------------------------------------------------------------------


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e7 else f"{size / 1e6:,.0f}"


def moved_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| denoiser | weights, M | LoRA rank | trained, M | all-reduce of an update, MB | full fine-tuning, MB | "
        "LoRA / full | frozen weights in bfloat16, GB |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        rank = f"**{row['rank']}**" if row["preset"] else f"{row['rank']}"
        lines.append(
            f"| {row['model']} | {row['frozen'] / 1e6:,.1f} | {rank} | {row['trained'] / 1e6:,.1f} | "
            f"{megabytes(row['moved'])} | {megabytes(row['full'])} | {row['moved'] / row['full']:.2%} | "
            f"{row['weights'] / 1e9:.2f} |"
        )
    return lines


def measured_tables(measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return ["Not measured yet: `python benchmarks/scale.py` does it."]
    found, alone, batch = measured["seconds"], measured["alone"], measured["batch"]
    pictures = {ONE: f"{batch}", TWO: f"{batch} + {batch}", WHOLE: f"{2 * batch}", APART: f"{batch} and {batch}"}
    lines = [
        f"`rewardtune train playground`, {batch} pictures a micro-batch, on a {measured['machine']} CPU with "
        f"{measured['cores']} cores, one thread a process, torch {measured['torch']}, gloo;",
        f"{measured['rounds']} rounds of {measured['updates']} updates, the first of each run left out; medians.",
        "",
        "| run | pictures an update | seconds an update |",
        "|-|-|-|",
        *(f"| {kind} | {pictures[kind]} | {statistics.median(found[kind]):.3f} |" for kind in pictures),
        "",
        "| ratio of updates with the same plan | median | lowest | highest | ideal |",
        "|-|-|-|-|-|",
    ]
    ratios = {
        "weak efficiency: one process / two processes, equal share each": (ONE, TWO, "1"),
        "the machine alone: one process / two runs apart": (ONE, APART, "1"),
        "sharing the update: two runs apart / two processes": (APART, TWO, "1"),
        "strong speed-up: one process with the whole batch / two processes": (WHOLE, TWO, "2"),
    }
    for words, (first, second, ideal) in ratios.items():
        middle, low, high = ratio(found[first], found[second])
        lines.append(f"| {words} | **{middle:.3f}** | {low:.3f} | {high:.3f} | {ideal} |")
    update = statistics.median(found[TWO])
    lines += [
        "",
        f"The all-reduce alone, {alone['bytes'] / 1e6:.2f} MB, both processes ready: "
        f"{alone['all_reduce'] * 1e3:.2f} ms, {alone['all_reduce'] / update:.2%} of an update of two",
        f"processes. A gathering of scores: {alone['gather'] * 1e3:.2f} ms; an update has three. The rest of what is "
        "lost is one process waiting for the other, and the machine.",
    ]
    return lines


def projected_tables(rows: list[dict[str, Any]]) -> list[str]:
    weak = [row for row in rows if row["kind"] == "weak"]
    lines = [
        "| denoiser | pictures a GPU | E | K | f, TFLOP | replay, TFLOP | replay / f | computing, s | "
        + " | ".join(f"all-reduce on {n:,}, ms" for n in COUNTS)
        + " | "
        + " | ".join(f"efficiency on {n:,}" for n in COUNTS)
        + " |",
        "|" + "-|" * (8 + 2 * len(COUNTS)),
    ]
    for model in MODELS:
        own = [row for row in weak if row["model"] == model.name]
        f, r = own[0]["f"], own[0]["r"]
        cells = [model.name, f"{own[0]['pictures']}", f"{own[0]['E']:.1f}", f"{own[0]['K']:.2f}", f"{f / 1e12:.2f}"]
        cells += [f"{r / 1e12:.2f}", f"{r / f:.2f}", f"{own[0]['alone']:.2f}"]
        cells += [f"{row['all_reduce'] * 1e3:.1f}" for row in own] + [f"**{row['efficiency']:.1%}**" for row in own]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each GPU has one micro-batch of its preset, so the batch grows with the GPUs: 1,024 of them make "
        + ", ".join(f"{1024 * row['pictures']:,} ({row['model']})" for row in weak if row["gpus"] == 1024),
        "pictures an update, which is another recipe than the preset. The preset's own batch is shared out like this;",
        "that a GPU with one picture reaches less of its peak than one with eight is not in it:",
        "",
        "| denoiser | batch | GPUs | pictures a GPU | computing, s | efficiency |",
        "|-|-|-|-|-|-|",
    ]
    for row in (row for row in rows if row["kind"] == "strong"):
        lines.append(
            f"| {row['model']} | {row['pictures'] * row['gpus']:.0f} | {row['gpus']} | {row['pictures']:g} | "
            f"{row['alone']:.2f} | {row['efficiency']:.1%} |"
        )
    return lines


def by_hand(row: dict[str, Any]) -> list[str]:
    """One row of the projection, step by step."""
    f, r = row["f"] / 1e12, row["r"] / 1e12
    n, nodes, size = row["gpus"], math.ceil(row["gpus"] / NODE), row["bytes"]
    total, sent = row["pictures"] * (row["E"] * f + row["K"] * r), 2 * (n - 1) / n * size
    return [
        f"{row['model']} on {n:,} GPUs, by hand:",
        "",
        f"- computing: {row['pictures']} pictures x ({row['E']:.1f} calls x {f:.2f} TFLOP + {row['K']:.2f} replays x "
        f"{r:.2f} TFLOP) = {total:,.0f} TFLOP; / ({H100_BF16 / 1e12:.0f} TFLOP/s x {UTILISATION:.0%}) = "
        f"{row['alone']:.3f} s",
        f"- the ring: 2 x {n - 1:,} / {n:,} x {size / 1e6:.1f} MB = {sent / 1e6:.1f} MB from each GPU; / "
        f"{bandwidth(n) / 1e9:.0f} GB/s = {sent / bandwidth(n) * 1e3:.2f} ms",
        f"- its latency: 2 x ({n - nodes:,} x {NVLINK_HOP * 1e6:.1f} us + {nodes - 1:,} x {NETWORK_HOP * 1e6:.0f} us) "
        f"= {latency(n, 2) * 1e3:.2f} ms",
        f"- efficiency: {row['alone']:.3f} / ({row['alone']:.3f} + {row['all_reduce']:.4f}) = {row['efficiency']:.1%}",
    ]


def sharded_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| GPUs | weights shared over | network cards at once | one gathering, s | f, s | gathering / f | "
        "efficiency, nothing hidden | efficiency, hidden behind computing | pictures a call that hide it |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        where = f"{row['group']:,}" + (", a node" if row["group"] == NODE else "")
        lines.append(
            f"| {row['gpus']:,} | {where} | {row['cards'] or 'none'} | {row['gather']:.3f} | {row['forward']:.3f} | "
            f"{row['gather'] / row['forward']:.2f} | {row['apart']:.0%} | **{row['overlap']:.0%}** | "
            f"{row['break_even']} |"
        )
    return lines


def assumptions() -> list[str]:
    return [
        "| assumption | value | from |",
        "|-|-|-|",
        f"| peak of a GPU | {H100_BF16 / 1e12:.0f} TFLOP/s | H100 SXM data sheet, bfloat16, dense |",
        f"| of it reached | {UTILISATION:.0%} | assumed; less makes updates longer and every efficiency here higher |",
        f"| NVLink of a GPU, one direction | {NVLINK / 1e9:.0f} GB/s | the same data sheet: 900 GB/s in both |",
        f"| a network card, one direction | {NETWORK / 1e9:.0f} GB/s | InfiniBand NDR, 400 Gb/s |",
        f"| GPUs, and cards, of a node | {NODE} | DGX H100 |",
        f"| one step of a ring | {NVLINK_HOP * 1e6:.1f} us NVLink, {NETWORK_HOP * 1e6:.0f} us network | "
        "NCCL's model of itself (tuning.cc; ring, Simple) |",
        "| all-reduce | 2 (n - 1) / n of the bytes, the slowest link | one ring; across nodes through one card. NCCL "
        "makes a ring through each card |",
        "| FLOP of a call and of its replay | counted | FlopCounterMode, LoRA attached, gradient checkpointing as in "
        "the presets |",
        "| E, K, pictures | the presets | means over draws of their methods |",
        "| gathering weights slows computing | not at all | optimistic: NCCL takes some of the GPU's units |",
        "| the all-reduce hides behind | nothing | it comes after the last gradient (`processes.py`) |",
    ]


def page(found: dict[str, Any], command: str) -> list[str]:
    example = next(row for row in found["projected"] if row["model"] == "SD 1.5" and row["gpus"] == 1024)
    return [
        "# Scale: bytes, two processes, a projection",
        "",
        f"`{command}`",
        "",
        "## Bytes of an update",
        "",
        *moved_table(found["moved"]),
        "",
        "Bold: the rank of the preset. A GPU of n sends 2 (n - 1) / n of the all-reduce's bytes (a ring). Besides, a",
        f"process tells each other one {found['small_talk'] / 1e3:.1f} kB of scores and norms for a micro-batch of 8.",
        "The frozen weights stay where they are, unless `memory.shard` gathers them.",
        "",
        "## Measured: one and two processes",
        "",
        *measured_tables(found["measured"]),
        "",
        "## Projected: data parallel",
        "",
        "Arithmetic, not a measurement: nothing here has run on a GPU. Stragglers, data loading, evaluation and",
        "checkpoints are left out; decoding and the reward too, which would make the efficiencies higher.",
        "",
        *assumptions(),
        "",
        *projected_tables(found["projected"]),
        "",
        *by_hand(example),
        "",
        "## Projected: a 12 B transformer in shares (FSDP2)",
        "",
        f"FLUX.1-dev, `memory.shard`, one picture a call: {found['weights'] / 1e9:.1f} GB of bfloat16 weights are "
        f"gathered, in {found['gatherings']} parts,",
        "at each of the E calls and twice at each of the K replays (forward, backward). Efficiency: against a GPU that",
        "holds the whole model and works alone. One card is the slow bound across nodes, eight the fast one.",
        "`memory.shard: true` shares the weights over all processes of a run, `node` inside each machine.",
        "",
        *sharded_table(found["sharded"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pictures of a process and update")
    parser.add_argument("--updates", type=int, default=12, help="of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arithmetic", action="store_true", help="measure nothing; keep what was measured before")
    parser.add_argument("--output", type=Path, default=Path("docs/results/scale.md"))
    parser.add_argument("--reduce", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.reduce:
        reduce_alone(asked.reduce, batch=asked.batch)
        return
    if asked.updates < 2:
        parser.error(f"--updates {asked.updates}: at least 2, the first is not counted")
    data = asked.output.with_suffix(".json")
    before = json.loads(data.read_text())["measured"] if asked.arithmetic and data.exists() else None
    given = {"batch": asked.batch, "updates": asked.updates, "rounds": asked.rounds}
    found = {
        "measured": before if asked.arithmetic else measure(**given),
        "moved": moved_rows(),
        "small_talk": small_talk(8),
        "projected": projected_rows(),
        "weights": counted(BY_NAME["FLUX.1-dev"], 1)[0] * BFLOAT16,
        "gatherings": gatherings(BY_NAME["FLUX.1-dev"]),
        "sharded": sharded_rows(),
    }
    shown = found["measured"] or given
    command = f"python benchmarks/scale.py --batch {shown['batch']} --updates {shown['updates']} "
    text = "\n".join(page(found, command + f"--rounds {shown['rounds']}")) + "\n"
    asked.output.write_text(text)
    data.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{text}\nwritten: {asked.output}, {data}")


if __name__ == "__main__":
    main()
