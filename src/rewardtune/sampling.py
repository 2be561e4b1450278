"""Pictures from a tuned model, for the command line."""

from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError
from .prompts import check_argument
from .runfolder import refuse_place


def sample_candidate(
    spec: str,
    prompts: Sequence[str],
    *,
    model: str | None,
    output: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
    inputs: Sequence[str] = (),
) -> list[Path]:
    """One picture a prompt (seed, seed + 1, ...), saved as `output`/000.png, ...; gives the paths.

    Pictures that are there stay: the numbers go on after theirs.

    spec: what docs/evaluation.md calls a candidate, e.g. runs/a@0.7. inputs: NAME=VALUE, more arguments of the call,
    e.g. image=photo.png; a name that is given once is for all prompts, else for each in turn.
    Raises ConfigError for what cannot be opened, and for inputs that are missing or do not fit.
    """
    from .candidates import asked, candidates, load_base, opened

    refuse_place(output, "--output")
    (candidate,) = candidates([spec], model=model, steps=steps, guidance=guidance)
    given = _inputs(inputs)
    conditioned = asked(candidate, prompts, given)
    from . import evaluate

    pipe = load_base([candidate])
    for name in given:
        check_argument(pipe, name, f"--input {name}")
    seeds = [seed + index for index in range(len(prompts))]
    with opened(pipe, candidate, prompts=conditioned):
        images = evaluate.sample(pipe, conditioned, seeds=seeds, call=candidate.settings.call, checkers=True)
    numbers = [int(path.stem) for path in output.glob("*.png") if path.stem.isdecimal()]
    return evaluate.save_images(images, output, first=max(numbers, default=-1) + 1)


def _inputs(words: Sequence[str]) -> dict[str, list[str]]:
    """["image=a.png", "image=b.png"] -> {"image": ["a.png", "b.png"]}."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--input {word!r}: write NAME=VALUE, e.g. image=photo.png, or negative_prompt=grey")
        if name == "prompt":
            raise ConfigError(f"--input {word!r}: the prompt has its own option, --prompt")
        found.setdefault(name, []).append(value)
    return found


def show_playground(output: Path, *, count: int, seed: int) -> Path:
    """A grid of `count` pictures of the untuned playground with their captions; gives the path."""
    from . import evaluate, playground

    prompts = playground.prompts(count, split="eval", seed=seed)
    pipe = playground.pipeline()
    call = {"num_inference_steps": 20, "guidance_scale": 4.0}
    images = evaluate.sample(pipe, prompts, seeds=[seed + index for index in range(count)], call=call)
    evaluate.save_grid({"": images}, prompts, output, per_row=6)
    return output
