"""`rewardtune app RUN`: base against tuned in the browser, the same prompt and noise, the LoRA's weight on a slider.

What it shows is made by `Pair`, which knows nothing of gradio. One picture at a time, whatever browsers ask: the two
pipelines share one set of weights. Nothing leaves the machine: gradio's analytics, version check and web fonts are off
(`--share` alone opens a tunnel, and says so). A run whose prompts come with pictures (`prompts.columns`) has a field
for each of these columns. Left out: several runs at once (`rewardtune compare`), batches.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .candidates import BASE, Candidate, asked, call_of, candidates, load_base, opened, whole
from .errors import ConfigError
from .prompts import Conditioned, check_argument, is_picture

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 16  # base pictures that are not sampled again while the slider moves
MOST_WEIGHT = 1.5
MOST_STEPS = 100
SEEDS = 2**32  # of the seeds that the page takes


class Pair:
    """The base model and one tuned model, opened; safe to call from several threads."""

    def __init__(self, spec: str, *, model: str | None = None) -> None:
        """spec: as in docs/evaluation.md, e.g. runs/a or runs/a@0.7. model: the base, where no config.yaml tells it.

        Raises ConfigError where there is no tuned model at `spec`.
        """
        if spec == BASE:
            raise ConfigError("the app shows a tuned model beside its base; give a run folder, e.g. runs/playground")
        (self.candidate,) = candidates([spec], model=model)
        self._pipe = load_base([self.candidate])
        self._lock = threading.Lock()
        self._base: dict[tuple[Any, ...], Image] = {}

    @property
    def call(self) -> dict[str, Any]:
        """The run's own arguments of `pipe(...)`."""
        return self.candidate.settings.call

    @property
    def weight(self) -> float:
        """The weight at which the run is meant to be used."""
        return self.candidate.weight

    @property
    def columns(self) -> list[str]:
        """What stands beside a prompt of the run: pictures and texts, by argument of `pipe(...)`."""
        return self.candidate.settings.columns

    def prompts(self) -> list[str]:
        """A few of the run's eval prompts to start from, with what they bring along; none where they would have to be
        downloaded."""
        from .prompts import load_prompts

        source = self.candidate.settings.prompts
        if source is None or str(source.source).startswith("hf:"):
            return []
        try:
            return load_prompts(source.source, template=source.template, columns=source.columns)[:6]
        except ConfigError:  # a file that has moved since: the page works without
            return []

    def pictures(
        self,
        prompt: str,
        seed: int = 0,
        *,
        weight: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        inputs: Mapping[str, str | Path] | None = None,
    ) -> tuple[Image, Image]:
        """(base, tuned) with the same noise. None: what the run has. Raises ConfigError for what cannot be sampled.

        inputs: what stands beside the prompt (`columns`): paths of pictures, and texts.
        """
        weight = self.weight if weight is None else weight
        seed, given = _checked(prompt, seed, weight, steps, guidance)
        call = self.call | given
        beside = {name: str(value) for name, value in (inputs or {}).items()}
        for name in beside:
            check_argument(self._pipe, name, f"input {name!r}")
        (prompt,) = asked(self.candidate, [prompt], {name: [value] for name, value in beside.items()})
        held = [Path(value).read_bytes() if is_picture(name) else value for name, value in sorted(beside.items())]
        key = (str(prompt), seed, *sorted(given.items()), *sorted(beside), *held)
        with self._lock:
            if key not in self._base:
                untuned = replace(self.candidate, place=None, weight=1.0, mix=None)
                self._base[key] = self._sample(untuned, prompt, seed, call)
                if len(self._base) > KEPT:
                    del self._base[next(iter(self._base))]
            return self._base[key], self._sample(replace(self.candidate, weight=weight), prompt, seed, call)

    def _sample(self, candidate: Candidate, prompt: str, seed: int, call: dict[str, Any]) -> Image:
        from . import evaluate

        settings = replace(candidate.settings, call=call)  # a mix counts the steps of this call
        with opened(self._pipe, replace(candidate, settings=settings), prompts=[prompt]) as pipe:
            (image,) = evaluate.sample(pipe, [prompt], seeds=[seed], call=call, checkers=True)
        return evaluate.to_pil(image)


def _checked(
    prompt: str, seed: float, weight: float, steps: float | None, guidance: float | None
) -> tuple[int, dict[str, Any]]:
    """(seed, arguments of the call that were given); the fields of a page give numbers as floats, and anything."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("the prompt is empty; write what the picture should show")
    if not whole(seed, 0, SEEDS - 1):
        raise ConfigError(f"seed {seed}: must be a whole number from 0 to {SEEDS - 1}")
    if not math.isfinite(weight):
        raise ConfigError(f"weight {weight}: must be a number; 0 is the base model, 1 what was trained")
    return int(seed), call_of(steps, guidance)


def check_installed() -> None:
    """ConfigError, with the command that helps, where gradio is missing."""
    if find_spec("gradio") is None:
        raise ConfigError("the app needs gradio, which is not installed: pip install 'rewardtune[demo]'")


def page(pair: Pair) -> Any:
    """The page, a `gradio.Blocks`; its one endpoint is `/pictures`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio

    def pictures(
        prompt: str, seed: float, weight: float, steps: float, guidance: float | None, *beside: str | None
    ) -> tuple[Any, Any]:
        inputs = {name: value for name, value in zip(pair.columns, beside, strict=True) if value}
        if empty := [name for name in pair.columns if is_picture(name) and name not in inputs]:
            raise gradio.Error(f"{', '.join(empty)}: choose a picture")
        try:
            return pair.pictures(prompt, seed, weight=weight, steps=steps, guidance=guidance, inputs=inputs)  # type: ignore[arg-type]
        except ConfigError as error:
            raise gradio.Error(str(error)) from error

    call, prompts = pair.call, pair.prompts()
    examples = [[str(text), *_beside(text, pair.columns)] for text in prompts]
    with gradio.Blocks(title=f"{pair.candidate.label}: base and tuned", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Base and tuned: `{pair.candidate.label.replace('`', '')}`")
        prompt = gradio.Textbox(label="Prompt", value=prompts[0] if prompts else "", lines=2)
        with gradio.Row(visible=bool(pair.columns)):
            beside = [
                gradio.Image(label=name, type="filepath", value=value)
                if is_picture(name)
                else gradio.Textbox(label=name, value=value)
                for name, value in zip(pair.columns, _beside(prompts[0] if prompts else "", pair.columns), strict=True)
            ]
        weight = gradio.Slider(
            0, max(MOST_WEIGHT, pair.weight), value=pair.weight, step=0.05, label="LoRA weight (0: base, 1: as trained)"
        )
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0, minimum=0)
            own_steps = call["num_inference_steps"]
            steps = gradio.Slider(1, max(MOST_STEPS, own_steps), value=own_steps, step=1, label="Sampling steps")
            guidance = gradio.Number(label="Guidance (empty: the run's own)", value=call.get("guidance_scale"))
        button = gradio.Button("Sample both", variant="primary")
        with gradio.Row():
            base = gradio.Image(label="Base", format="png", interactive=False)
            tuned = gradio.Image(label="Tuned", format="png", interactive=False)
        fields = [prompt, seed, weight, steps, guidance, *beside]
        options: dict[str, Any] = {"fn": pictures, "inputs": fields, "outputs": [base, tuned], "concurrency_id": "one"}
        button.click(**options, api_name="pictures", concurrency_limit=1)
        prompt.submit(**options, api_visibility="private", concurrency_limit=1)
        weight.release(**options, api_visibility="private", concurrency_limit=1)
        if prompts:
            gradio.Examples(examples, [prompt, *beside], label="Prompts of the run")
    return blocks


def _beside(prompt: str, columns: Sequence[str]) -> list[str | None]:
    """What the prompt brings along for each of the columns, paths as text."""
    arguments = prompt.arguments if isinstance(prompt, Conditioned) else {}
    return [str(arguments[name]) if name in arguments else None for name in columns]


def launch(
    spec: str, *, model: str | None = None, port: int | None = None, host: str = "127.0.0.1", share: bool = False
) -> None:
    """Open the models, serve the page until Ctrl-C. port: None takes the first free one from 7860 on."""
    if spec != BASE:
        candidates([spec], model=model)  # a run that is not there is said before what is not installed
    check_installed()
    pair = Pair(spec, model=model)
    blocks = page(pair)
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        blocks.queue().launch(
            server_name=host, server_port=port, share=share, theme=theme, footer_links=[], show_error=True
        )
    except OSError as error:
        raise ConfigError(f"the app cannot listen on {host}, port {port}: {error}; choose another --port") from error
