"""`rewardtune score`: what rewards say of pictures on disk, for people who only want scores.

Pictures are read one after the other and scored in batches of equal size, so folders of any size and mixed sizes fit
into memory. One that cannot be read or scored is skipped and named with the reason; the others are scored. Scores are
shown in the scale that papers print (`ls rewards` says whether more or less is better).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__
from .config import Part, parse_options
from .errors import ConfigError, RewardError, RewardTuneError, first_line
from .pictures import Caption, captions, find_images, open_image
from .progress import digits, with_interval
from .rewards.catalogue import OBJECT, REWARDS
from .stats import mean_interval
from .tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from .rewards import Reward

T = TypeVar("T")
Choices = Mapping[str, dict[str, Any]]  # reward: options
READS_NO_PROMPT = {entry.name for entry in REWARDS if not entry.reads_prompt}
LESS_IS_BETTER = {entry.name for entry in REWARDS if entry.better == "less"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One scored picture. native: by name of a part, in the scale that papers print. score: by reward, as maximised."""

    file: str
    width: int
    height: int
    prompt: str | None
    converted: str
    native: dict[str, float] = field(default_factory=dict)
    score: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One picture that could not be read or scored, and why."""

    file: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.file in self.reason else f"{self.file}: {self.reason}"


def choose(names: Sequence[str], options: Sequence[str] = ()) -> Choices:
    """{reward: its options} of a command line: `--reward hpsv2 --reward symmetry -o hpsv2.version=2.0`.

    With one reward its name may be left out: `-o version=2.0`. Raises ConfigError.
    """
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"the reward {min(repeated)!r} is given twice; give each once")
    found: dict[str, list[str]] = {name: [] for name in names}
    for option in options:
        if not re.match(r"[^=\s]+=", option):
            raise ConfigError(f"-o {option!r}: write [REWARD.]SETTING=VALUE, for example -o {names[0]}.{option}=VALUE")
        owner = next((name for name in names if option.startswith(f"{name}.")), None)
        if owner is None and len(names) != 1:
            raise ConfigError(f"-o {option}: say of which reward: -o {names[0]}.{option}")
        name = owner or names[0]
        found[name].append(option.removeprefix(f"{name}."))
    return {name: parse_options(given) for name, given in found.items()}


def load_rewards(choices: Choices, *, prompts: bool, device: str) -> dict[str, Reward]:
    """The rewards by name, on their device. ConfigError where there is none of a name, or one reads prompts and none
    are given: before any is loaded."""
    from .launch import make_reward
    from .rewards.loading import named

    for name, options in choices.items():
        named(name)
        own_prompt = name.lower() == "objectness" and options.get("target", OBJECT) is None
        if not prompts and (own_prompt or name.lower() not in READS_NO_PROMPT):
            raise ConfigError(
                f"the reward {name!r} reads a prompt and none is given: --prompt TEXT for all images, --prompts FILE "
                "with one line for each, or a text file beside each image (a reward of yours that reads none: "
                '--prompt "")'
            )
    return {name: make_reward([Part(name=name, options=options)]).to(device) for name, options in choices.items()}


def score_files(
    sources: Sequence[str],
    choices: Choices,
    *,
    prompts: Path | None = None,
    prompt: str | None = None,
    batch: int = 8,
    device: str = "auto",
) -> tuple[list[Picture], list[Skipped]]:
    """Score the pictures of files, folders and globs by each reward; gives those scored and those skipped, in order.

    Raises ConfigError, and the first picture's error where not one could be scored.
    """
    device, paths = pick_device(device), find_images(sources, skip=True)
    texts = captions(paths, prompts=prompts, prompt=prompt)
    rewards = load_rewards(choices, prompts=texts is not None, device=device)
    return _score(paths, texts, rewards, batch=batch, device=device)


def pick_device(device: str) -> str:
    """`auto`: the GPU where there is one."""
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r}: {first_line(error)}; legal: auto, cpu, cuda") from error
    return chosen


def _score(
    paths: Sequence[Path],
    texts: Sequence[Caption] | None,
    rewards: dict[str, Reward],
    *,
    batch: int,
    device: str,
) -> tuple[list[Picture], list[Skipped]]:
    scored: list[Picture] = []
    errors: dict[str, Exception] = {}

    def pictures() -> Iterator[tuple[Picture, Tensor]]:
        for index, path in enumerate(paths):
            try:
                image, converted = open_image(path)
            except Exception as error:  # Pillow has one for each format and each way of being broken
                errors[str(path)] = error
                continue
            height, width = image.shape[-2:]
            prompt = texts[index].prompt if texts else None
            yield Picture(file=str(path), width=width, height=height, prompt=prompt, converted=converted), image

    for group in equal_sizes(pictures(), batch):
        try:
            scored += _measured(group, rewards, device=device)
        except Exception:  # of one of them, or of their number: each alone
            for one in group:
                try:
                    scored += _measured([one], rewards, device=device)
                except Exception as error:  # whatever a user's reward raises
                    errors[one[0].file] = error
    in_order = [(str(path), errors[str(path)]) for path in paths if str(path) in errors]
    if not scored:
        raise in_order[0][1]
    return scored, [Skipped(file=file, reason=_reason(error)) for file, error in in_order]


def _measured(group: Sequence[tuple[Picture, Tensor]], rewards: dict[str, Reward], *, device: str) -> list[Picture]:
    """The pictures with their scores. Raises what a reward raises, and RewardError for a score of NaN or infinity."""
    import torch

    pictures = [replace(picture, native={}, score={}) for picture, _ in group]
    images = torch.stack([image for _, image in group]).to(device)
    for name, reward in rewards.items():
        with torch.no_grad():
            total, natives = reward.parts(images, [picture.prompt or "" for picture in pictures])
        columns = natives if len(natives) == 1 else natives | {name: total}
        for row, picture in enumerate(pictures):
            picture.score[name] = _finite(total[row], name, picture)
            for column, values in columns.items():
                value = _finite(values[row], name, picture)
                picture.native[f"{name}.{column}" if column in picture.native else column] = value
    return pictures


def _reason(error: Exception) -> str:
    """In one line; of an error that is not ours its kind as well."""
    kind = "" if isinstance(error, RewardTuneError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def _finite(value: Tensor, name: str, picture: Picture) -> float:
    if not value.isfinite():
        raise RewardError(f"reward '{name}' scored {picture.file} {value.item()}; legal is a finite number")
    return float(value)


def equal_sizes(items: Iterable[tuple[T, Tensor]], batch: int) -> Iterator[list[tuple[T, Tensor]]]:
    """Consecutive items in lists of at most `batch`, each with images of one size."""
    group: list[tuple[T, Tensor]] = []
    for item in items:
        if group and (len(group) == batch or item[1].shape != group[0][1].shape):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def as_table(pictures: Sequence[Picture], choices: Choices) -> str:
    """A row for each picture, the mean with its 95% interval (Student's t over the pictures), and what must be known to
    read them."""
    columns = list(pictures[0].native)
    prompted = any(picture.prompt is not None for picture in pictures)
    headings = ["image", *(["prompt"] if prompted else []), *columns]
    rows = [
        [p.file, *([p.prompt or ""] if prompted else []), *(digits(p.native[column]) for column in columns)]
        for p in pictures
    ]
    if len(pictures) > 1:
        means = (mean_interval([p.native[column] for p in pictures]) for column in columns)
        label = f"mean of {len(pictures)}, ± 95%"
        rows.append([label, *([""] if prompted else []), *(with_interval(mean, half) for mean, half in means)])
    text = text_table(headings, rows, flexible=1 if prompted else 0, numbers=range(1 + prompted, len(headings)))
    more = {name.lower() for name, options in choices.items() if options.get("minimise") is False}  # objectness
    if less := [column for column in columns if column in LESS_IS_BETTER - more]:
        text += f"\nLess is better: {', '.join(less)}"
    for options in (options for name, options in choices.items() if name.lower() == "objectness"):
        target = options.get("target", OBJECT)
        text += "\nobjectness looks for " + ("each image's own prompt" if target is None else repr(target))
    if odd := [picture for picture in pictures if picture.converted]:
        kinds = ", ".join(sorted({picture.converted for picture in odd}))
        text += f"\n{len(odd)} of {len(pictures)} images were not plain RGB and were converted ({kinds}): {odd[0].file}"
        text += ", ..." if len(odd) > 1 else ""
    return text


def skipped_lines(skipped: Sequence[Skipped], *, of: int) -> str:
    """What was left out of `of` pictures, a line each under a heading."""
    return "\n".join(
        [f"{len(skipped)} of {of} images could not be scored and are left out:", *map("  {}".format, skipped)]
    )


def as_json(pictures: Sequence[Picture], choices: Choices, skipped: Sequence[Skipped] = ()) -> str:
    """Everything: the rewards with their options, each picture, the means with half the width of their intervals, and
    the pictures left out with the reason."""
    summary: dict[str, Any] = {}
    for column in pictures[0].native:
        mean, half = mean_interval([picture.native[column] for picture in pictures])
        summary[column] = {"mean": mean, "half_width_95": None if math.isnan(half) else half, "images": len(pictures)}
    document = {
        "rewardtune": __version__,
        "rewards": [{"name": name, "options": options} for name, options in choices.items()],
        "summary": summary,
        "images": [vars(picture) for picture in pictures],
        "skipped": [vars(picture) for picture in skipped],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
