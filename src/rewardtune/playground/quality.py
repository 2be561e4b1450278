"""How good the playground's world is, measured on contents that no network saw.

    python -m rewardtune.playground.quality [--output docs/results] [--prompts 256] [--seed 7]

Pictures are judged by the reader (`reader.py`), which no network was trained with. Writes playground_quality.md,
the same numbers as JSON, and playground_samples.png.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune import stats
from rewardtune.prediction import x0_hat

from .captions import KINDS, negative
from .reader import Match, matches, read
from .scenes import Scene, draw_scenes, render
from .words import tokens

STEPS, GUIDANCE = 20, 4.0  # of the world, in everything that is measured in it
EARLY_SHARE = 0.4  # early stops fall into the last 40% of the steps
TARGETS = {
    "samples: colour": 0.90,
    "samples: number": 0.85,
    "samples: place where named": 0.90,
    "samples: shape": 0.75,
    "reader on rendered scenes": 0.98,
    "reader on reconstructions": 0.98,
    **{f"CLIP against a wrong {kind}": 0.97 for kind in KINDS},
    **{f"CLIP on early stops against a wrong {kind}": 0.97 for kind in KINDS},
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of successes with its 95% Wilson interval."""

    name: str
    hits: int
    n: int
    share: float
    low: float
    high: float


def wilson(name: str, outcomes: Iterable[bool | None]) -> Share:
    """The share of True among the outcomes that are not None, with the 95% Wilson score interval."""
    known = [bool(outcome) for outcome in outcomes if outcome is not None]
    found = stats.wilson(sum(known), len(known))
    return Share(name=name, hits=sum(known), n=len(known), share=found.value, low=found.low, high=found.high)


def sample(pipe: Any, prompts: Sequence[str], *, seed: int = 0, batch: int = 32, steps: int = STEPS) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1]; the i-th starts from the noise that (seed, i) names."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
        pictures.append(pipe(part, generator=noise, **settings).images.float())
    return torch.cat(pictures)


def holds(m: Match) -> bool:
    """Everything that the caption says is true of the picture."""
    return m.colour and m.number and m.shape and m.background and m.place is not False and m.size is not False


def sample_shares(prompts: Sequence[str], pictures: Tensor) -> list[Share]:
    """What the reader finds of each prompt in its picture."""
    found = [matches(prompt, read(picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
    mentions = [mention for match in found for mention in match.objects]
    every: list[tuple[str, Callable[[Match], bool | None]]] = [
        ("colour", lambda m: m.colour),
        ("number", lambda m: m.number),
        ("place where named", lambda m: m.place),
        ("shape", lambda m: m.shape),
        ("size where named", lambda m: m.size),
        ("background", lambda m: m.background),
        ("everything", holds),
    ]
    shares = [wilson(f"samples: {name}", map(outcome, found)) for name, outcome in every]
    shares += [
        wilson(f"single objects: {name}", [m[i] for m in mentions]) for i, name in enumerate(("colour", "shape"))
    ]
    return shares


def reader_share(name: str, scenes: Sequence[Any], pictures: Tensor) -> Share:
    """How often the reader is right about everything that is true of a scene."""
    found = [matches(scene, read(picture)) for scene, picture in zip(scenes, pictures, strict=True)]
    right = [holds(m) for m in found]
    return wilson(name, right)


def texts(pipe: Any, scenes: Sequence[Scene]) -> Tensor:
    """The text encoder's states (n, 24, 96) of the scenes' captions."""
    return pipe.text_encoder(tokens(pipe.tokenizer, [scene.caption for scene in scenes])).last_hidden_state


def predict(pipe: Any, x0: Tensor, noise: Tensor, timestep: int, text: Tensor) -> Tensor:
    """x0-hat: what the network takes `x0` for at the noise level of `timestep`."""
    t = torch.tensor(timestep)
    noisy = pipe.scheduler.add_noise(x0, noise, t)
    return x0_hat(pipe.scheduler, noisy, pipe.unet(noisy, t, text).sample, timestep=t)


@torch.no_grad()
def early_stops(pipe: Any, scenes: Sequence[Scene], *, seed: int) -> Tensor:
    """Scenes as a chain that stops early shows them (n, 3, 64, 64): x0-hat, with guidance, at a step drawn from
    the last 40% of STEPS."""
    from .autoencoder import decode, encode

    pipe.scheduler.set_timesteps(STEPS)
    last = pipe.scheduler.timesteps.tolist()[round((1 - EARLY_SHARE) * STEPS) :]
    rng, noise = random.Random(f"{seed}/early stops"), torch.Generator().manual_seed(seed)
    empty = pipe.text_encoder(tokens(pipe.tokenizer, [""])).last_hidden_state
    pictures = []
    for start in range(0, len(scenes), 32):
        part, timestep = scenes[start : start + 32], rng.choice(last)
        x0, text = encode(pipe.vae, render(part)), texts(pipe, part)
        epsilon = torch.randn(x0.shape, generator=noise)
        free = predict(pipe, x0, epsilon, timestep, empty.expand_as(text))
        told = predict(pipe, x0, epsilon, timestep, text)
        pictures.append(decode(pipe.vae, free + GUIDANCE * (told - free)))
    return torch.cat(pictures)


def clip_shares(
    clip: Any, tokenizer: Any, scenes: Sequence[Scene], pictures: Tensor, *, name: str, seed: int
) -> list[Share]:
    """How often the small CLIP prefers a scene's caption to one that is wrong in one attribute, given its picture."""
    from .clip import embed_images, embed_texts

    rng = random.Random(f"{seed}/clip quality")
    with torch.no_grad():
        images = embed_images(clip, pictures)
        true = embed_texts(clip, tokens(tokenizer, [scene.caption for scene in scenes]))
        shares = []
        for kind in KINDS:
            wrong = [negative(scene, kind, rng, split="eval", tries=200) for scene in scenes]
            rows = [i for i, description in enumerate(wrong) if description is not None]
            false = embed_texts(clip, tokens(tokenizer, [str(wrong[i]) for i in rows]))
            better = (images[rows] * true[rows]).sum(1) > (images[rows] * false).sum(1)
            shares.append(wilson(f"{name} against a wrong {kind}", better.tolist()))
    return shares


def reconstruct(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures through the autoencoder and back."""
    from .autoencoder import decode, encode

    with torch.no_grad():
        return torch.cat([decode(vae, encode(vae, part)) for part in pictures.split(32)])


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Mean over pictures of the peak signal to noise ratio in dB."""
    return (-10 * (pictures - others).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean().item()


def asymmetry(pictures: Tensor) -> float:
    """Mean over pictures of |I - mirror(I)| over I's standard deviation."""
    return ((pictures - pictures.flip(-1)).abs().mean((1, 2, 3)) / pictures.std((1, 2, 3))).mean().item()


def measure(output_dir: str | Path, *, n: int = 256, seed: int = 7) -> dict[str, Any]:
    """Measure everything on `n` fresh prompts and scenes and write the report to `output_dir`."""
    from transformers import CLIPModel, CLIPTokenizer

    from . import clip_path, pipeline, prompts

    pipe = pipeline()
    captions = prompts(n, split="eval", seed=seed)
    pictures = sample(pipe, captions, seed=seed)
    scenes = draw_scenes(n, random.Random(f"{seed}/reader quality"), split="eval")
    drawn = render(scenes)
    rebuilt = reconstruct(pipe.vae, drawn)
    clip = CLIPModel.from_pretrained(clip_path(), dtype=torch.float32).eval()
    shares = sample_shares(captions, pictures)
    shares += [reader_share("reader on rendered scenes", scenes, drawn)]
    shares += [reader_share("reader on reconstructions", scenes, rebuilt)]
    tokenizer, judged = (
        CLIPTokenizer.from_pretrained(clip_path()),
        draw_scenes(4 * n, random.Random(f"{seed}/clip"), split="eval"),
    )
    shares += clip_shares(clip, tokenizer, judged, render(judged), name="CLIP", seed=seed)
    stopped = early_stops(pipe, judged, seed=seed)
    true = [holds(matches(scene, read(picture))) for scene, picture in zip(judged, stopped, strict=True)]
    shares += [wilson("early stops of which the caption is still true", true)]
    still = [i for i, holding in enumerate(true) if holding]  # the rest is the denoiser's doing
    of_true = ([judged[i] for i in still], stopped[still])
    shares += clip_shares(clip, tokenizer, *of_true, name="CLIP on early stops", seed=seed)
    shares += clip_shares(clip, tokenizer, judged, stopped, name="CLIP on all early stops", seed=seed)
    numbers = {
        "autoencoder PSNR (dB)": psnr(drawn, rebuilt),
        "mirror asymmetry of drawn scenes": asymmetry(drawn),
        "mirror asymmetry of samples": asymmetry(pictures),
    }
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = {"prompts": n, "steps": STEPS, "guidance": GUIDANCE, "seed": seed, "numbers": numbers}
    results["shares"] = [asdict(share) for share in shares]
    (output / "playground_quality.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "playground_quality.md").write_text(_report(results, shares, numbers))
    grid(captions[:32], pictures[:32], output / "playground_samples.png")
    return results


def _report(results: dict[str, Any], shares: list[Share], numbers: dict[str, float]) -> str:
    lines = [
        "# The playground, measured",
        "",
        f"{results['prompts']} prompts of the eval split, {STEPS} DDIM steps, guidance {GUIDANCE:g}, judged by the",
        f"reader; made by `python -m rewardtune.playground.quality` (seed {results['seed']}).",
        "A picture counts only if all of its objects are right; 95% Wilson intervals.",
        "",
        "| | right | of | share | 95% interval | target |",
        "|---|---|---|---|---|---|",
    ]
    for s in shares:
        target = (
            f"{TARGETS[s.name]:.0%}" + ("" if s.share >= TARGETS[s.name] else " (missed)") if s.name in TARGETS else ""
        )
        lines.append(f"| {s.name} | {s.hits} | {s.n} | {s.share:.1%} | {s.low:.1%} to {s.high:.1%} | {target} |")
    lines += ["", "| | value |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in numbers.items())]
    return "\n".join(lines) + "\n"


def grid(captions: Sequence[str], pictures: Tensor, file: Path, *, columns: int = 8, scale: int = 2) -> None:
    """Save pictures with their captions below."""
    import textwrap

    from PIL import Image, ImageDraw

    side, text = pictures.shape[-1] * scale, 46
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    for i, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
        x, y = i % columns * (side + 8), i // columns * (side + text)
        array = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 2), textwrap.fill(caption, 23), fill="black", font_size=10, spacing=1)
    sheet.save(file, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m rewardtune.playground.quality", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--prompts", type=int, default=256, help="how many")
    parser.add_argument("--seed", type=int, default=7, help="another seed, other prompts and scenes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure(given.output, n=given.prompts, seed=given.seed)
    print((given.output / "playground_quality.md").read_text())


if __name__ == "__main__":
    main()
