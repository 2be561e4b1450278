"""The playground: a small complete text-to-image world that ships with the package and runs offline on a CPU.

`pipeline()` is an ordinary `StableDiffusionPipeline`, only small; `prompts()` are captions of its world; `read`,
`count_objects` and `matches` judge its pictures without any network. Networks are imported where they are used.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardtune.errors import ConfigError
from rewardtune.quietly import no_loading_bars

if TYPE_CHECKING:
    from .reader import Match, Reading, Seen, count_objects, matches, read
    from .scenes import Description, Mention, Object, Scene, draw_scenes, parse, render

WEIGHTS = Path(__file__).parent / "weights"

REWARDS = {  # reward: its folder under WEIGHTS
    "clipscore": "clip",
    "pickscore": "pickscore",
    "hpsv2": "hpsv2",
    "aesthetic": "aesthetic",
    "objectness": "objectness",
}

_READER = ("Match", "Reading", "Seen", "count_objects", "matches", "read")
_SCENES = ("Description", "Mention", "Object", "Scene", "draw_scenes", "parse", "render")
__all__ = [  # noqa: RUF022 - the functions of this file first
    "path",
    "clip_path",
    "reward_path",
    "pipeline",
    "prompts",
    "Match",
    "Reading",
    "Seen",
    "count_objects",
    "matches",
    "read",
    "Description",
    "Mention",
    "Object",
    "Scene",
    "draw_scenes",
    "parse",
    "render",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in (("reader", _READER), ("scenes", _SCENES)):
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def path() -> Path:
    """The folder that `StableDiffusionPipeline.from_pretrained` opens; ConfigError where it is missing."""
    return _found("pipeline", "model_index.json")


def clip_path() -> Path:
    """The folder that `CLIPModel.from_pretrained` opens; ConfigError where it is missing."""
    return _found("clip", "config.json")


def reward_path(name: str) -> Path:
    """The folder that the reward `name` takes as its `model`; ConfigError for a reward without a network of the
    playground's own, and where the folder is missing."""
    if name not in REWARDS:
        raise ConfigError(
            f"the playground has no network for the reward {name!r}; it has {', '.join(REWARDS)}: "
            "leave `model: playground` out or name one of these"
        )
    return _found(REWARDS[name], "config.json")


def pipeline(dtype: Any = None) -> Any:
    """The playground's `StableDiffusionPipeline` on the CPU, without progress bar, in `dtype` (default float32)."""
    with _quiet():
        from diffusers import StableDiffusionPipeline  # remarks that torchvision is not there

        pipe = StableDiffusionPipeline.from_pretrained(path())
        pipe.set_progress_bar_config(disable=True)
        return pipe if dtype is None else pipe.to(dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' loading bars and remarks: that the autoencoder is not `AutoencoderKL`, and the like."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        with no_loading_bars():
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def prompts(n: int, *, split: str = "train", seed: int = 0, layout: str = "any") -> list[str]:
    """`n` captions of the world, always the same for the same arguments.

    split: "train" or "eval"; no content (colours, shapes, background) is in both, and no network of the playground
    was trained on eval captions. layout: "free" names no place, "any" names places in 35% of the captions.
    Captions are distinct; where too few are found there are fewer than `n`.
    """
    if split not in ("train", "eval") or layout not in ("any", "free", "named"):
        raise ConfigError(f"split={split!r} must be train or eval, layout={layout!r} must be any, free or named")
    return list(_captions(n, split, seed, layout))


@functools.cache
def _captions(n: int, split: str, seed: int, layout: str) -> tuple[str, ...]:
    from .scenes import draw_description

    rng, found = random.Random(f"prompts/{split}/{layout}/{seed}"), dict[str, None]()
    for _ in range(20 * n):
        if len(found) == n:
            break
        found[str(draw_description(rng, split=split, layout=layout))] = None
    return tuple(found)


def _found(folder: str, file: str) -> Path:
    if not (WEIGHTS / folder / file).exists():
        raise ConfigError(
            f"the playground's weights are not in {WEIGHTS / folder}: reinstall rewardtune, "
            f"or build them (hours on a CPU): rewardtune playground build --output {WEIGHTS}"
        )
    return WEIGHTS / folder
