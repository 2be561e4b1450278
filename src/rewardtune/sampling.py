"""Pictures from a tuned model, for the command line."""

from collections.abc import Sequence
from pathlib import Path


def sample_candidate(
    spec: str,
    prompts: Sequence[str],
    *,
    model: str | None,
    output: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
) -> list[Path]:
    """One picture a prompt (seed, seed + 1, ...), saved as `output`/NAME.png; gives the paths.

    spec: what docs/evaluation.md calls a candidate, e.g. runs/a@0.7. Raises ConfigError for what cannot be opened.
    """
    from .candidates import candidates, load_base, opened

    (candidate,) = candidates([spec], model=model, steps=steps, guidance=guidance)
    from . import evaluate

    seeds = [seed + index for index in range(len(prompts))]
    with opened(load_base([candidate]), candidate) as pipe:
        images = evaluate.sample(pipe, prompts, seeds=seeds, call=candidate.settings.call, checkers=True)
    return evaluate.save_images(images, output)


def show_playground(output: Path, *, count: int, seed: int) -> Path:
    """A grid of `count` pictures of the untuned playground with their captions; gives the path."""
    from . import evaluate, playground

    prompts = playground.prompts(count, split="eval", seed=seed)
    pipe = playground.pipeline()
    call = {"num_inference_steps": 20, "guidance_scale": 4.0}
    images = evaluate.sample(pipe, prompts, seeds=[seed + index for index in range(count)], call=call)
    evaluate.save_grid({"": images}, prompts, output, per_row=6)
    return output
