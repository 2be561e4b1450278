"""The scripts that made the playground's weights, as one command.

    python -m rewardtune.playground.build --output DIR [--stage text clip vae unet pickscore ... assemble] [--quick]

Stages continue where they were stopped (checkpoints lie in DIR/checkpoints) and train what they need first, so
`--stage assemble` alone builds the pipeline. The result is DIR/clip and DIR/pipeline, ordinary folders for
`CLIPModel.from_pretrained` and `StableDiffusionPipeline.from_pretrained`, and a folder for each reward model
(pickscore, hpsv2, aesthetic, objectness), all weights in float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rewardtune.errors import ConfigError

from . import aesthetic, autoencoder, clip, denoiser, detector, preference
from .heads import Heads
from .training import Schedule
from .words import write_tokenizer

STAGES = ("text", "clip", "vae", "unet", "clip_finish", "pickscore", "hpsv2", "aesthetic", "objectness", "assemble")
QUICK = {"steps": 2, "batch": 4, "warmup": 1}
OPENED = {"dtype": "float32"}  # unless asked otherwise


@dataclass(frozen=True, kw_only=True)
class _Build:
    """What all stages share; a network that is trained already comes from its checkpoint at once."""

    output: Path
    seed: int
    schedules: Mapping[str, Schedule]
    scenes: int
    stop_after: int | None
    workers: int

    def _settings(self, name: str) -> dict[str, Any]:
        return {"schedule": self.schedules[name], "seed": self.seed, "stop_after": self.stop_after}

    def _checkpoint(self, name: str) -> Path:
        return self.output / "checkpoints" / f"{name}.ckpt"

    @cached_property
    def text(self) -> Heads:
        return clip.train_text(self.output / "clip", self._checkpoint("text"), **self._settings("text"))

    @cached_property
    def seeing(self) -> Heads:
        tokenizer = write_tokenizer(self.output / "clip")
        return clip.train_vision(self.text, tokenizer, self._checkpoint("clip"), **self._settings("clip"))

    @property
    def clip(self) -> Any:
        """The small CLIP that the reward models start from."""
        return self.seeing.clip

    @cached_property
    def clip_finish(self) -> Any:
        pipe = small_pipeline(self.output, text_model=self.clip.text_model, vae=self.vae, unet=self.unet)
        tokenizer, heads = pipe.tokenizer, deepcopy(self.seeing)
        settings = self._settings("clip_finish") | {"look": clip.stopped_early(pipe), "upstream": (self.unet, self.vae)}
        return clip.train_vision(heads, tokenizer, self._checkpoint("clip_finish"), **settings).clip

    @cached_property
    def vae(self) -> Any:
        settings = self._settings("vae") | {"workers": self.workers}
        return autoencoder.train_autoencoder(self._checkpoint("vae"), **settings)

    @cached_property
    def unet(self) -> Any:
        tokenizer = write_tokenizer(self.output / "clip")
        settings = self._settings("unet") | {"scenes": self.scenes, "workers": self.workers}
        settings |= {"finish": self.schedules["finish"]}
        return denoiser.train_unet(self.vae, self.text.clip, tokenizer, self._checkpoint("unet"), **settings)

    @cached_property
    def pickscore(self) -> None:
        self._preference("pickscore")

    @cached_property
    def hpsv2(self) -> None:
        self._preference("hpsv2")

    @cached_property
    def traits(self) -> Any:
        tokenizer = write_tokenizer(self.output / "clip")
        return preference.train_traits(self.clip, tokenizer, self._checkpoint("traits"), **self._settings("traits"))

    def _preference(self, name: str) -> None:
        tokenizer = write_tokenizer(self.output / "clip")
        arguments = name, self.traits, tokenizer, self._checkpoint(name)
        model = preference.train_preference(*arguments, **self._settings(name))
        preference.write_preference(_emptied(self.output / name), model)
        _edit(self.output / name / "config.json", **OPENED)

    @cached_property
    def aesthetic(self) -> None:
        head = aesthetic.fit_head(self.clip, scenes=min(self.scenes, aesthetic.SCENES), seed=self.seed)
        aesthetic.write_aesthetic(_emptied(self.output / "aesthetic"), self.clip, head)
        _edit(self.output / "aesthetic" / "config.json", **OPENED)

    @cached_property
    def objectness(self) -> None:
        tokenizer = write_tokenizer(self.output / "clip")
        arguments = self.clip, tokenizer, self._checkpoint("objectness")
        model = detector.train_detector(*arguments, **self._settings("objectness"))
        detector.write_detector(_emptied(self.output / "objectness"), model)
        _edit(self.output / "objectness" / "config.json", **OPENED)

    @cached_property
    def assemble(self) -> None:
        write_folders(self.output, clip_model=self.clip_finish, vae=self.vae, unet=self.unet)


def small_pipeline(output: Path, *, text_model: Any, vae: Any, unet: Any) -> Any:
    """The networks as a `StableDiffusionPipeline`, with the tokenizer of `output/clip`."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model,
        tokenizer=write_tokenizer(output / "clip"),
        unet=unet,
        scheduler=denoiser.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_folders(output: Path, *, clip_model: Any, vae: Any, unet: Any) -> None:
    """Write `output/clip` and `output/pipeline` from trained networks, float16 on disk."""
    import torch

    for folder in (output / "clip", output / "pipeline"):
        _emptied(folder)
    clip_model, vae, unet = (deepcopy(network).to(torch.float16) for network in (clip_model, vae, unet))
    pipeline = small_pipeline(output, text_model=clip_model.text_model, vae=vae, unet=unet)
    clip.write_processor(output / "clip")
    clip_model.save_pretrained(output / "clip")
    pipeline.save_pretrained(output / "pipeline")
    write_tokenizer(output / "pipeline" / "tokenizer")
    for config in (output / "clip" / "config.json", output / "pipeline" / "text_encoder" / "config.json"):
        _edit(config, **OPENED)
    _edit(output / "pipeline" / "vae" / "config.json", block_out_channels=None)  # derived; warned about when stored


def _emptied(folder: Path) -> Path:
    """The folder without what an earlier build left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _edit(config: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes them."""
    settings = json.loads(config.read_text()) | changes
    kept = {key: value for key, value in settings.items() if value is not None or key not in changes}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def build(
    output: str | Path,
    *,
    stages: Sequence[str] = STAGES,
    seed: int = 0,
    steps: Mapping[str, int] | None = None,
    quick: bool = False,
    stop_after: int | None = None,
    workers: int = 1,
) -> Path:
    """Train the world's networks and its rewards' and assemble them; returns the pipeline's folder.

    steps: training steps in place of the recipe's, by training ("text", "clip", "vae", "unet", "traits", "pickscore",
    "hpsv2", "objectness"). quick: a build of seconds that shows only that everything fits together. stop_after:
    interrupt each training after so many steps.
    workers: threads that share each step of the UNet; they change its speed and not its result.
    ConfigError for an unknown stage or network, and for checkpoints that belong to other settings.
    """
    schedules = {
        "text": clip.TEXT_SCHEDULE,
        "clip": clip.SCHEDULE,
        "clip_finish": clip.FINISH,
        "vae": autoencoder.SCHEDULE,
        "unet": denoiser.SCHEDULE,
        "finish": denoiser.FINISH,
        "traits": preference.TRAITS_SCHEDULE,
        "pickscore": preference.SCHEDULE,
        "hpsv2": preference.SCHEDULE,
        "objectness": detector.SCHEDULE,
    }
    unknown = [*(s for s in stages if s not in STAGES), *(s for s in steps or {} if s not in schedules)]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no stage of the playground's build; legal are {', '.join(STAGES)}")
    if quick:
        schedules = {name: replace(schedule, **QUICK) for name, schedule in schedules.items()}
    schedules |= {name: replace(schedules[name], steps=number) for name, number in (steps or {}).items()}
    scenes = 16 if quick else denoiser.SCENES
    job = _Build(
        output=Path(output), seed=seed, schedules=schedules, scenes=scenes, stop_after=stop_after, workers=workers
    )
    for stage in STAGES:
        if stage in stages:
            getattr(job, stage)
    for file in job.output.rglob("*.safetensors"):
        file.chmod(0o644)
    return job.output / "pipeline"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m rewardtune.playground.build", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and results")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="threads that share a training step of the UNet")
    parser.add_argument("--quick", action="store_true", help="a smoke build of seconds")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)  # small products: one thread each is faster than two
    settings = {"stages": given.stage, "seed": given.seed, "quick": given.quick, "workers": given.workers}
    print(f"pipeline in {build(given.output, **settings)}")


if __name__ == "__main__":
    main()
