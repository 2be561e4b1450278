"""Pictures from a base model and a saved LoRA, for the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Model, Sampling, load_config
from .errors import ConfigError
from .runfolder import DENOISER_FOLDER, LORA_FILE


def sample_lora(
    lora: Path,
    prompts: Sequence[str],
    *,
    model: str | None,
    output: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
) -> list[Path]:
    """One picture a prompt (seed, seed + 1, ...), saved as `output`/NAME.png; gives the paths."""
    file = lora / LORA_FILE if lora.is_dir() else lora
    whole = lora / DENOISER_FOLDER
    if not file.is_file() and not whole.is_dir():
        raise ConfigError(f"no LoRA at {file}; give a run folder with {LORA_FILE}, or a .safetensors file")
    base, sampling = _settings(file.parent, model)
    from . import evaluate, launch
    from .engine import find_denoiser

    pipe = launch.load_pipeline(base, scheduler=sampling.scheduler)
    if whole.is_dir():
        name = find_denoiser(pipe)
        old = getattr(pipe, name)
        setattr(pipe, name, type(old).from_pretrained(whole).to(old.device, old.dtype))
    else:
        _load_lora(pipe, file, base.id)
    call: dict[str, Any] = {
        "num_inference_steps": steps or sampling.steps,
        "guidance_scale": guidance if guidance is not None else sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
        "negative_prompt": sampling.negative_prompt,
    }
    call = {name: value for name, value in call.items() if value is not None}
    seeds = [seed + index for index in range(len(prompts))]
    images = evaluate.sample(pipe, prompts, seeds=seeds, call=call, checkers=True)
    return evaluate.save_images(images, output)


def _load_lora(pipe: Any, file: Path, base: str) -> None:
    """ConfigError when the file does not load, or loads no key (diffusers says nothing then)."""
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except Exception as error:
        raise ConfigError(f"{file} does not load into {base}: {str(error).splitlines()[0]}") from error
    if not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
        raise ConfigError(f"{file} changes nothing in {base}: none of its keys fits; is it made for another model?")


def _settings(folder: Path, model: str | None) -> tuple[Model, Sampling]:
    """The base model and the sampling of the run in `folder`; a given `model` wins."""
    if (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml")
        sampling = config.sampling.model_copy(update={"negative_prompt": config.negative_prompt})
        return (config.model if model is None else Model(id=model)), sampling
    if model is None:
        raise ConfigError(
            f"{folder} has no config.yaml to tell the base model; add --model (a folder, a hub id, playground)"
        )
    return Model(id=model), Sampling()


def show_playground(output: Path, *, count: int, seed: int) -> Path:
    """A grid of `count` pictures of the untuned playground with their captions; gives the path."""
    from . import evaluate, playground

    prompts = playground.prompts(count, split="eval", seed=seed)
    pipe = playground.pipeline()
    call = {"num_inference_steps": 20, "guidance_scale": 4.0}
    images = evaluate.sample(pipe, prompts, seeds=[seed + index for index in range(count)], call=call)
    evaluate.save_grid({"": images}, prompts, output, per_row=6)
    return output
