"""What five ways to a faster update bring, or could bring at most: `python benchmarks/trials.py`.

Writes docs/results/trials.md.

1. The K trained calls in one replay: K calls forward and backward in turn, against one call of all their rows with a
   vector of timesteps. Where inputs are detached the calls are independent, so the gradient is the same. It takes the
   memory of K graphs, so beside it stands what that memory gives otherwise: graphs kept while sampling
   (`memory.recompute: false`), or a micro-batch K times as large.
2. Several stops of one sampled chain, each with its own x0-hat and reward, instead of one. Gradients of single
   pictures at every stop give the variance of an update's gradient for any number d of stops (`Noise`); costs are
   those of the parts, timed in the same run. Nothing is trained.
3. Decode and reward: their share of an update, and what less work there could bring at most.
4. bfloat16 autocast.
5. Whole updates with what can be switched on: `method.conditional_only`, `recompute: false`, `channels_last`.

Figures are ratios of one run. The engine is not touched, so gains are bounds: what it would have to record, compare and
add up comes on top.
"""

import argparse
import itertools
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from step import SIZES, call_of, equally_spaced, in_turns, parts, prepare, random_stable_diffusion
from step import step as an_update
from torch import Tensor, nn

from rewardtune import add_lora, playground, rewards
from rewardtune.prediction import x0_hat
from rewardtune.stats import jackknife

T, K, M, GUIDANCE = 20, 3, 8, 4.0  # the playground's preset: DRTune's K, and stops at t_min ~ U{1..M}
GAP = T // K
STARTS = T - (K - 1) * GAP  # DRTune's s ~ U{1..STARTS}
EVALUATIONS = 16  # forwards of an update around the K replays: T less the mean early stop


def middle(found: dict[str, list[float]], of: Callable[[dict[str, float]], float]) -> tuple[float, float, float]:
    """Median, smallest and largest over rounds of a figure that is made of one round's seconds."""
    rounds = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    each = [of(one) for one in rounds]
    return statistics.median(each), min(each), max(each)


def ratio(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


# One replay of K calls ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Network:
    """A denoiser with a LoRA, and its arguments at `rows` rows; every tensor among them has the rows first."""

    name: str
    module: nn.Module
    guided: bool  # two rows a picture
    arguments: Callable[[int], dict[str, Tensor]]
    shared: dict[str, Tensor]


def networks() -> list[Network]:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    unet = prepare(playground.pipeline(), "cpu").unet
    text = unet.config.cross_attention_dim
    sd3 = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=32, num_attention_heads=8, joint_attention_dim=256,
        caption_projection_dim=256, pooled_projection_dim=128, pos_embed_max_size=16,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=256, pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for module in (sd3, flux):
        add_lora(module, rank=8)

    def for_unet(rows: int) -> dict[str, Tensor]:
        return {
            "sample": torch.randn(rows, 4, 16, 16),
            "timestep": torch.randint(1, 1000, (1,)).expand(rows),
            "encoder_hidden_states": torch.randn(rows, 32, text),
        }

    def for_sd3(rows: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(rows, 16, 16, 16),
            "timestep": torch.randint(1, 1000, (1,)).expand(rows),
            "encoder_hidden_states": torch.randn(rows, 32, 256),
            "pooled_projections": torch.randn(rows, 128),
        }

    def for_flux(rows: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(rows, 64, 64),
            "timestep": torch.rand(1).expand(rows),
            "guidance": torch.full((rows,), GUIDANCE),
            "encoder_hidden_states": torch.randn(rows, 32, 256),
            "pooled_projections": torch.randn(rows, 128),
        }

    places = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    return [
        Network(name="playground's UNet", module=unet, guided=True, arguments=for_unet, shared={}),
        Network(name="SD3-like transformer", module=sd3, guided=True, arguments=for_sd3, shared={}),
        Network(
            name="FLUX-like transformer",
            module=flux,
            guided=False,
            arguments=for_flux,
            shared={"img_ids": places, "txt_ids": torch.zeros(32, 3)},
        ),
    ]


def gradient(network: Network, calls: Sequence[dict[str, Tensor]], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Of the trained parameters, each call forward and backward in turn."""
    trained = [p for p in network.module.parameters() if p.requires_grad]
    for arguments, cotangent in zip(calls, cotangents, strict=True):
        network.module(**arguments, **network.shared, return_dict=False)[0].backward(cotangent)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for p in trained:
        p.grad = None
    return found


def forward(network: Network, calls: Sequence[dict[str, Tensor]]) -> Tensor:
    """The last call's output; all of them run without a graph."""
    with torch.no_grad():
        return [network.module(**arguments, **network.shared, return_dict=False)[0] for arguments in calls][-1]


def as_one(calls: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([arguments[name] for arguments in calls]) for name in calls[0]}


def apart(found: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    squares = [(float((a - b).square().sum()), float(a.square().sum())) for a, b in zip(found, other, strict=True)]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5


def one_replay(network: Network, *, batches: Sequence[int], counts: Sequence[int], repeats: int) -> list[str]:
    """Rows: seconds in turn, gain on the replays, then gains on an update of EVALUATIONS forwards and these replays."""
    rows = []
    for B, k in itertools.product(batches, counts):
        calls = [network.arguments(B * (1 + network.guided)) for _ in range(k)]
        cotangents = [torch.randn_like(forward(network, [one])) for one in calls]
        together, all_cotangents = as_one(calls), torch.cat(cotangents)
        runs: dict[str, Callable[[], Any]] = {
            "turn": lambda c=calls, a=cotangents: gradient(network, c, a),
            "one": lambda c=together, a=all_cotangents: gradient(network, [c], [a]),
            "f turn": lambda c=calls: forward(network, c),
            "f one": lambda c=together: forward(network, [c]),
        }
        error = apart(runs["turn"](), runs["one"]())
        found = in_turns(runs, repeats)

        def update(s: dict[str, float], k: int = k) -> float:
            return EVALUATIONS * s["f turn"] / k + s["turn"]

        replays = middle(found, lambda s: s["turn"] / s["one"])
        one = middle(found, lambda s: update(s) / (update(s) - s["turn"] + s["one"]))
        kept = middle(found, lambda s: update(s) / (update(s) - s["f turn"]))
        larger = middle(found, lambda s, k=k: update(s) / (EVALUATIONS * s["f one"] / k + s["one"]))
        rows.append(
            f"| {network.name} | {B} | {k} | {statistics.median(found['turn']):.3f} | {ratio(*replays)} | "
            f"**{one[0]:.2f}** | {kept[0]:.2f} | {larger[0]:.2f} | {error:.0e} |"
        )
        print(rows[-1], flush=True)
    return rows


def autocast(network: Network, *, repeats: int) -> str:
    """float32 over bfloat16 autocast: a forward, and a forward and backward, of four pictures."""
    calls = [network.arguments(4 * (1 + network.guided))]
    cotangents = [torch.randn_like(forward(network, calls))]

    def half(run: Callable[[], Any]) -> Callable[[], Any]:
        def under() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                run()

        return under

    runs: dict[str, Callable[[], Any]] = {
        "f": lambda: forward(network, calls),
        "replay": lambda: gradient(network, calls, cotangents),
    }
    found = in_turns({**runs, **{f"{name} half": half(run) for name, run in runs.items()}}, repeats)
    forwards = middle(found, lambda s: s["f"] / s["f half"])
    replays = middle(found, lambda s: s["replay"] / s["replay half"])
    row = f"| {network.name} | {ratio(*forwards)} | {ratio(*replays)} |"
    print(row, flush=True)
    return row


# Several stops of one chain -------------------------------------------------------------------------------------------


def stop_gradients(
    pipe: Any, prompt: str, seed: int, judges: dict[str, Any], *, s: int
) -> dict[tuple[str, str], Tensor]:
    """{(method, reward): (M, P)}: the gradient of the reward of x0-hat at each of the last M steps of one chain.

    ReFL trains the stop's own call; DRTune the calls t = s + k GAP >= t_min (or t_min alone, if there are none), inputs
    detached. Every call is run once with a graph, for all stops, methods and rewards. P: the entries of lora_B; on an
    untuned LoRA the gradient of lora_A is zero.
    """
    parameters = [p for name, p in pipe.unet.named_parameters() if "lora_B" in name]
    scheduler, spaced = pipe.scheduler, [T - (s + k * GAP) for k in reversed(range(K))]
    stops = range(T - M, T)
    text = pipe.encode_prompt([prompt], pipe.device, 1, True)
    embeds = torch.cat([text[1], text[0]]).detach()
    scheduler.set_timesteps(T)
    size = pipe.unet.config.sample_size
    x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma

    def network(x: Tensor, step: int) -> Tensor:
        return pipe.unet(torch.cat([x, x]), scheduler.timesteps[step], embeds, return_dict=False)[0]

    inputs, leaves, ends = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = network(x, step)
        if step in stops or step in spaced:
            inputs[step], leaves[step] = x.detach(), output.requires_grad_()
        free, conditional = output.chunk(2)
        F = free + GUIDANCE * (conditional - free)
        if step in stops:
            ends[step] = x0_hat(scheduler, x, F, timestep=t)
        x = scheduler.step(F, t, x, return_dict=False)[0]

    z = torch.cat([end.detach() for end in ends.values()]).requires_grad_()
    images = (pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    arrived: dict[int, list[tuple[str, str, int, Tensor]]] = {step: [] for step in leaves}
    for name, judge in judges.items():
        (at_ends,) = torch.autograd.grad(judge(images, [prompt] * M).sum(), z, retain_graph=True)
        for (stop, end), at_end in zip(ends.items(), at_ends.split(1), strict=True):
            trained = [step for step in spaced if step <= stop] or [stop]
            for method, steps in (("ReFL", [stop]), ("DRTune", trained)):
                cotangents = torch.autograd.grad(end, [leaves[step] for step in steps], at_end, retain_graph=True)
                for step, cotangent in zip(steps, cotangents, strict=True):
                    arrived[step].append((method, name, stop, cotangent))
    width = sum(p.numel() for p in parameters)
    sums = {(method, name): torch.zeros(M, width) for method in METHODS for name in judges}
    for step, waiting in arrived.items():
        if waiting:
            cotangents = torch.stack([cotangent for *_, cotangent in waiting])
            grads = torch.autograd.grad(network(inputs[step], step), parameters, cotangents, is_grads_batched=True)
            rows = torch.cat([grad.flatten(1) for grad in grads], dim=1)
            for (method, name, stop, _), row in zip(waiting, rows, strict=True):
                sums[method, name][stop - (T - M)] += row
    return sums


METHODS = ("ReFL", "DRTune")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Variances (summed over parameters) of the gradient of one picture; `mean` is its squared expectation.

    plans: between the means of the plans' other draw (DRTune's s); stops: between the means of stops;
    pictures: between prompts and seeds, of the mean over stops; rest: between stops within a picture, beyond `stops`.

    A mean over d distinct stops, uniform, has the expectation of one stop, and the variance between stops times
    phi(d) = (M - d) / (d (M - 1)).
    """

    mean: float
    plans: float
    stops: float
    pictures: float
    rest: float

    def of_update(self, d: int, batch: int, *, one_plan: bool) -> float:
        """Variance of the mean gradient of `batch` pictures, which share one plan or have each their own."""
        phi = (M - d) / (d * (M - 1))
        shared, own = self.plans + self.stops * phi, self.pictures + self.rest * phi
        return shared + own / batch if one_plan else (shared + own) / batch


def noise(products: Tensor) -> Noise:
    """Of inner products (G, n, m, G, n, m) of gradients: G plans, n pictures of each, m stops; without bias."""
    G, n = products.shape[:2]
    g = torch.arange(G)
    within = products[g, :, :, g]  # (G, n, m, n, m): a plan with itself
    pictures = torch.arange(n)
    alone = within[:, pictures, :, pictures]  # (n, G, m, m)
    own = alone.diagonal(dim1=-2, dim2=-1).mean(-1).mean(0)
    of_picture = alone.mean((-2, -1)).mean(0)
    of_stop = within.mean((1, 3)).diagonal(dim1=-2, dim2=-1).mean(-1)
    of_plan = within.mean((1, 2, 3, 4))
    between = (of_picture - of_plan) * n / (n - 1)
    rest = (own - of_picture - (of_stop - of_plan)) * n / (n - 1)
    stops = own - of_picture - rest
    chance = between.mean() / n  # the variance of a plan's mean over n pictures
    return Noise(
        mean=float(products.mean() - chance / G),
        plans=float(of_plan.mean() - products.mean() - (1 - 1 / G) * chance),
        stops=float(stops.mean()),
        pictures=float(between.mean()),
        rest=float(rest.mean()),
    )


def expected_calls(method: str, d: int) -> tuple[float, float]:
    """(evaluations, replays) of a picture whose chain has d distinct stops, on average over the law's draws."""
    evaluations, replays = list[float](), list[float]()
    for stops in itertools.combinations(range(1, M + 1), d):  # t_min
        for s in range(1, STARTS + 1):
            spaced = {s + k * GAP for k in range(K)}
            trained = {t for t_min in stops for t in ({t for t in spaced if t >= t_min} or {t_min})}
            evaluations.append(T - min(stops) + 1)
            replays.append(d if method == "ReFL" else len(trained))
    return statistics.mean(evaluations), statistics.mean(replays)


def gradients(pipe: Any, judges: dict[str, Any], *, pictures: int) -> dict[tuple[str, str], Tensor]:
    """{(method, reward): (G, n, M, P)}: each picture with a prompt, noise and start s of its own; ReFL has no s."""
    prompts = playground.prompts(pictures, layout="free", seed=1)
    each = []
    for k, prompt in enumerate(prompts):
        each.append(stop_gradients(pipe, prompt, k, judges, s=1 + k % STARTS))
        if k % 16 == 15:
            print(f"{k + 1} of {pictures} chains", flush=True)
    stacked = {key: torch.stack([one[key] for one in each]) for key in each[0]}
    return {
        (method, name): g[None] if method == "ReFL" else g.unflatten(0, (-1, STARTS)).transpose(0, 1)
        for (method, name), g in stacked.items()
    }


def inner_products(g: Tensor) -> Tensor:
    flat = g.flatten(0, 2).double()
    return (flat @ flat.T).reshape(*g.shape[:3], *g.shape[:3])


def apart_from_one(g: Tensor, d: int) -> float:
    """Squared distance between the mean gradients of d stops and of one, over what chance alone gives: near 1."""
    rng, flat = random.Random(d), g.flatten(0, 1)
    differences = torch.stack([one[rng.sample(range(M), d)].mean(0) - one[rng.randrange(M)] for one in flat])
    chance = differences.var(0).sum() / len(differences)
    return float(differences.mean(0).square().sum() / chance)


def several_stops(*, pictures: int, batch: int, repeats: int) -> tuple[list[str], list[str]]:
    """Rows of two tables: where the variance of an update lies, and what d stops gain."""
    pipe = prepare(playground.pipeline(), "cpu")
    judges = {
        "hpsv2": rewards.HPSv2(model="playground"),
        "symmetry": rewards.Symmetry(detach_std=True),
    }
    images = torch.rand(4, 3, 64, 64)
    judged = {
        name: (lambda judge=judge: judge(images.clone().requires_grad_(), ["a red heart"] * 4).sum().backward())
        for name, judge in judges.items()
    }
    seconds = in_turns({**parts(pipe, 4), **judged}, repeats)
    found = gradients(pipe, judges, pictures=pictures)
    shares, gains = [], []
    for (method, name), g in found.items():
        products = inner_products(g)
        whole, n = noise(products), g.shape[1]
        left = [[k for k in range(n) if k != out] for out in range(n)]
        without = [noise(products[:, kept][:, :, :, :, kept]) for kept in left]

        def cost(s: dict[str, float], d: int, method: str = method, name: str = name) -> float:
            evaluations, replays = expected_calls(method, d)
            return evaluations * s["f"] + replays * s["f+b"] + d * (s["decode"] + s[name]) + s["text"]

        one = whole.of_update(1, batch, one_plan=True)
        parts_of = (whole.plans, whole.stops, whole.pictures / batch, whole.rest / batch)
        own = one / whole.of_update(1, batch, one_plan=False)
        shares.append(
            f"| {method} | {name} | {whole.mean / one:.2f} | "
            + " | ".join(f"{part / one:.0%}" for part in parts_of)
            + f" | {own:.2f} |"
        )
        print(shares[-1], flush=True)
        for d in (2, 4):
            dearer = middle(seconds, lambda s, d=d, cost=cost: cost(s, d) / cost(s, 1))[0]
            cells = []
            for one_plan in (True, False):

                def less(x: Noise, d: int = d, one_plan: bool = one_plan) -> float:
                    return x.of_update(1, batch, one_plan=one_plan) / x.of_update(d, batch, one_plan=one_plan)

                gain = jackknife(less(whole) / dearer, [less(x) / dearer for x in without])
                cells.append(f"{less(whole):.2f} | **{gain.value:.2f}** ({gain.low:.2f} to {gain.high:.2f})")
            gains.append(
                f"| {method} | {name} | {d} | {dearer:.2f} | {cells[0]} | {cells[1]} | {apart_from_one(g, d):.2f} |"
            )
            print(gains[-1], flush=True)
    return shares, gains


# Decode and reward ----------------------------------------------------------------------------------------------------


def decoding(name: str, pipe: Any, judge: Any, *, repeats: int) -> str:
    """A row: the share of decode and reward in a DRTune update of four pictures, and what less of them could bring."""
    size, vae = pipe.unet.config.sample_size, pipe.vae
    z, small = torch.randn(4, 4, size, size), torch.randn(4, 4, size // 2, size // 2)

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z, return_dict=False)[0]

    def without_graph(z: Tensor) -> Tensor:
        with torch.no_grad():
            return decode(z)

    def replay(z: Tensor) -> None:
        decode(z.clone().requires_grad_()).sum().backward()

    images = without_graph(z).clamp(0, 1)
    runs: dict[str, Callable[[], Any]] = {
        **{part: run for part, run in parts(pipe, 4).items() if part in ("f", "f+b", "text")},
        "decode": lambda: without_graph(z),
        "replay": lambda: replay(z),
        "small": lambda: (without_graph(small), replay(small)),
        "reward": lambda: judge(images.clone().requires_grad_(), ["a red heart"] * 4).sum().backward(),
    }
    found = in_turns(runs, repeats)
    evaluations, replays = expected_calls("DRTune", 1)

    def update(s: dict[str, float]) -> float:
        return evaluations * s["f"] + replays * s["f+b"] + s["decode"] + s["replay"] + s["reward"] + s["text"]

    shares = [middle(found, of)[0] for of in (
        lambda s: (s["decode"] + s["replay"]) / update(s),
        lambda s: s["reward"] / update(s),
    )]  # fmt: skip
    gains = [middle(found, lambda s, of=of: update(s) / (update(s) - of(s)))[0] for of in (
        lambda s: s["decode"],
        lambda s: s["decode"] + s["replay"] - s["small"],
        lambda s: s["decode"] + s["replay"] + s["reward"],
    )]  # fmt: skip
    row = f"| {name} | " + " | ".join([*(f"{x:.1%}" for x in shares), *(f"{x:.2f}" for x in gains)]) + " |"
    print(row, flush=True)
    return row


# Whole updates ------------------------------------------------------------------------------------------------------


def switched_on(*, repeats: int) -> list[str]:
    """An update of four pictures as it is, over the same one with something switched on, for few and for all steps."""
    pipe, other = (prepare(playground.pipeline(), "cpu") for _ in range(2))
    other.unet.to(memory_format=torch.channels_last)
    call, rows = call_of(4, T), []
    for trained in (K, T):
        plan = equally_spaced(T, trained)
        one_branch = replace(plan, conditional_only=True)
        runs: dict[str, Callable[[], Any]] = {
            "as it is": lambda plan=plan: an_update(pipe, plan, call),
            "conditional_only": lambda plan=one_branch: an_update(pipe, plan, call),
            "graphs kept": lambda plan=plan: an_update(pipe, plan, call, recompute=False),
            "channels_last": lambda plan=plan: an_update(other, plan, call),
        }
        found = in_turns(runs, repeats)
        each = [ratio(*middle(found, lambda s, name=name: s["as it is"] / s[name])) for name in list(runs)[1:]]
        rows.append(f"| {trained} | " + " | ".join(each) + " |")
        print(rows[-1], flush=True)
    return rows


# The page -------------------------------------------------------------------------------------------------------------

PAGE = """# Trials: what could make an update faster

`python benchmarks/trials.py {settings}` on {machine}, float32.
Process time; medians (smallest to largest) over rounds in which everything is timed in turn. A gain of 1.10 is a tenth
more updates in the same time. Gains are bounds: made of parts timed alone, not of an engine that does it. What they
say, and what was decided, stands in [the log](../log.md#speed-and-memory).

## The K trained calls in one replay

Gain on an update of {evaluations} forwards and K replays of B pictures, and nothing else. All three take the memory of
K graphs of B pictures: one replay of all K calls; the K graphs kept while sampling (`memory.recompute: false`); or
K B pictures in a micro-batch, replayed step by step, where the batch is that large. Difference: between the gradient
of one replay and that of K in turn, relative.

| network | B | K | in turn, s | gain on the replays | one replay | graphs kept | larger micro-batch | difference |
|-|-|-|-|-|-|-|-|-|
{replays}

## Several stops of one chain

The playground, T = {T}, guidance {guidance:g}, an untuned LoRA of rank 8 on the attention, {pictures} chains,
a prompt each. ReFL, and DRTune with K = {K}; t_min is uniform in 1..{M}. d stops are d distinct ones of these: each is
uniform, so the expected gradient is that of one. Variances are of the mean gradient of {batch} pictures, summed over
parameters.

Where the variance lies with one stop, when all pictures of an update share one plan, as in training. Signal: the
squared expected gradient over that variance. Own plans: the gain if each picture had a plan of its own, at equal cost.

| method | reward | signal | DRTune's s | the stop | pictures | stops within a picture | own plans |
|-|-|-|-|-|-|-|-|
{shares}

d stops, each judged, against one: the cost of a picture; how many times smaller the variance is; gain: that over the
cost, with its 95 % interval (jackknife over prompts). Distance: between the mean gradients of d stops and of one,
squared, over what chance gives where their expectations are equal.

| method | reward | d | cost | one plan an update: variance | gain | own plans: variance | gain | distance |
|-|-|-|-|-|-|-|-|-|
{gains}

## Decode and reward

An update of DRTune (T = {T}, K = {K}, m = {M}) of four pictures, the sum of its parts. Gains at most: if the decoder's
graph were kept (its forward not repeated); if latents of half the side were decoded, whatever a reward would make of
such pictures; if decode and reward were free.

| pipeline, reward | decode | reward | graph kept | half the side | free |
|-|-|-|-|-|-|
{decodes}

## bfloat16 autocast

float32 / bfloat16 autocast, four pictures: below 1 is slower.

| network | forward | forward and backward |
|-|-|-|
{halves}

## What can be switched on

A whole update of the playground (T = {T}, four pictures, symmetry, all steps executed) as it is, over the same one
with the unconditional branch's gradient left out (`method.conditional_only`, which is another gradient), with the
graphs kept (`memory.recompute: false`), and with the UNet in `channels_last`.

| K | conditional_only | graphs kept | channels_last |
|-|-|-|-|
{switched}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48, help="chains whose gradients are taken")
    parser.add_argument("--batch", type=int, default=8, help="pictures of an update, for its variance")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of the timings")
    parser.add_argument("--output", type=Path, default=Path("docs/results/trials.md"))
    asked = parser.parse_args()
    if asked.pictures % STARTS or asked.pictures < 3 * STARTS:
        parser.error(f"--pictures {asked.pictures}: a multiple of {STARTS}, at least {3 * STARTS}")
    torch.set_num_threads(1)  # process time adds up all threads, waiting ones too

    small, counts = networks(), {"batches": (1, 2, 4), "counts": (2, 5, 10)}
    replays = [row for one in small for row in one_replay(one, repeats=asked.repeats, **counts)]
    halves = [autocast(one, repeats=asked.repeats) for one in small]
    del small
    base, symmetry = prepare(playground.pipeline(), "cpu"), rewards.Symmetry(detach_std=True)
    other = prepare(random_stable_diffusion(*SIZES["random SD 32-64"]), "cpu")
    decodes = [
        decoding("playground, HPS v2", base, rewards.HPSv2(model="playground"), repeats=asked.repeats),
        decoding("playground, symmetry", base, symmetry, repeats=asked.repeats),
        decoding("random SD 32-64 (AutoencoderKL), symmetry", other, symmetry, repeats=asked.repeats),
    ]
    switched = switched_on(repeats=asked.repeats)
    shares, gains = several_stops(pictures=asked.pictures, batch=asked.batch, repeats=asked.repeats)
    page = PAGE.format(
        settings=f"--pictures {asked.pictures} --batch {asked.batch} --repeats {asked.repeats}",
        machine=f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}",
        T=T, K=K, M=M, guidance=GUIDANCE, evaluations=EVALUATIONS, pictures=asked.pictures, batch=asked.batch,
        replays="\n".join(replays), shares="\n".join(shares), gains="\n".join(gains),
        decodes="\n".join(decodes), halves="\n".join(halves), switched="\n".join(switched),
    )  # fmt: skip
    asked.output.write_text(page)
    print(f"written: {asked.output}")


if __name__ == "__main__":
    main()
