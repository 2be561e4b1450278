"""A panel of measures that are never trained on: held-out rewards, diversity, sharpness, distance to the base pictures.

It measures the fixed eval pictures, always against those of step 0 (same prompts, same seeds).
Left out: LPIPS (its weights belong to no package that we depend on) and FID (a panel has too few pictures for it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import edits, evaluate
from .diversity import Features, across, mean_over, pairwise_distance, vendi, within
from .errors import ConfigError
from .guards import ACROSS, BY_FEATURES, METRICS, WITHIN, Evaluation, Metric
from .rewards.base import leaves, unique_names

if TYPE_CHECKING:
    from .rewards import Reward


def luma(images: Tensor) -> Tensor:
    """(N, H, W): Rec. 601."""
    return edits.luma(images)[:, 0]


def sharpness(images: Tensor) -> Tensor:
    """(N,): standard deviation over pixels of the luma's 4-neighbour Laplacian, 0 to 4.

    The square root of Pech-Pacheco et al. 2000, whose variance one picture of a brick wall can lead alone. Blur and
    fading lower it, noise and ringing raise it. It depends on the size: compare pictures of one size.
    """
    y = luma(images)
    centre = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * centre
    return laplacian.flatten(1).std(dim=1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """(N,): mean over pixels of the largest minus the smallest channel (HSV's chroma), 0 for grey to 1."""
    return (images.amax(1) - images.amin(1)).mean(dim=(1, 2))


def brightness(images: Tensor) -> Tensor:
    """(N,): mean of all pixels, as the reward of that name."""
    return images.mean(dim=(1, 2, 3))


def as_saved(images: Tensor) -> Tensor:
    """float32 pictures rounded to 8 bits, as a PNG keeps them; one with NaN or infinite pixels is NaN all over."""
    rounded = (images.detach().cpu().float().clamp(0, 1) * 255).round() / 255
    finite = torch.isfinite(images.detach().cpu()).flatten(1).all(dim=1)
    return torch.where(finite.view(-1, 1, 1, 1), rounded, torch.nan)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Measures the eval pictures of a step against those of step 0.

    Pictures are measured as they are saved, in 8 bits: the files in samples/ give the same numbers after a resume.

    prompts: of the pictures, in their order; a prompt with several seeds stands there several times.
    rewards: held out, one reward or a sum of them; each of its parts is a metric of its own, in its native value.
    trained: the reward that is trained on, measured too, so that rules and `best_of` can name it.
    features: for diversity and the distance to the base pictures; None: neither is measured.
    Names that are taken get a prefix: a held-out `clipscore` beside a trained one is `heldout_clipscore`.
    """

    prompts: Sequence[str]
    rewards: Reward | None = None
    trained: Reward | None = None
    features: Features | None = None
    batch: int = 8
    device: Any = "cpu"

    @property
    def held_out(self) -> list[str]:
        """The metrics that are held-out rewards."""
        return list(self._names()[1].values())

    @property
    def trained_names(self) -> list[str]:
        """The metrics that are the trained reward and its parts."""
        return [] if self.trained is None else ["reward", *self._names()[0].values()]

    def metrics(self) -> dict[str, Metric]:
        """Every metric that an evaluation will hold, by name."""
        trained, held_out = self._names()
        found = {} if self.trained is None else {"reward": Metric(what="the trained reward, total", better="more")}
        for reward, names, what in ((self.trained, trained, "trained"), (self.rewards, held_out, "held out")):
            for name, less in natives(reward).items():
                metric = Metric(what=f"{name}, {what}", better="less" if less else "more")
                found.setdefault(names[name], metric)
        repeats = min(map(len, self._groups()[1]))
        for name, metric in METRICS.items():
            if name in BY_FEATURES and self.features is None:
                continue
            if (name in WITHIN and repeats < 2) or (name in ACROSS and len(set(self.prompts)) < 2):
                continue
            found[name] = metric
        return found

    def roles(self) -> dict[str, dict[str, str]]:
        """Of every metric what it is, of which there should be more or less, and its role, as JSON keeps them."""
        roles = dict.fromkeys(self.held_out, "held_out") | dict.fromkeys(self.trained_names, "trained")
        return {
            name: {"what": metric.what, "better": metric.better, "role": roles.get(name, "guard")}
            for name, metric in self.metrics().items()
        }

    def __call__(
        self, images: Tensor, *, base: Tensor, step: int, scores: Mapping[str, Tensor] | None = None
    ) -> Evaluation:
        """images, base: (N, 3, H, W) in [0, 1], of this step and of step 0, in the order of `prompts`.

        scores: of the trained reward where they are there already, as `evaluate.score` gives them; else measured here.
        A picture with NaN has NaN for a value, and so has every metric that it takes part in.
        """
        if images.shape != base.shape or len(images) != len(self.prompts):
            raise ConfigError(
                f"a panel of {len(self.prompts)} prompts was given pictures {tuple(images.shape)} and base pictures "
                f"{tuple(base.shape)}; legal are two equal shapes (N, 3, H, W), one picture for each prompt"
            )
        images, base = as_saved(images), as_saved(base)
        broken = images.isnan().flatten(1).any(dim=1)
        trained, held_out = self._names()
        pictures: dict[str, Tensor] = {}
        if self.trained is not None:
            found = self._score(self.trained, images, ~broken) if scores is None else scores
            pictures |= {trained.get(name, name): value for name, value in found.items()}
        if self.rewards is not None:
            found = self._score(self.rewards, images, ~broken)
            pictures |= {held_out[name]: value for name, value in found.items() if name != "reward"}
            self.rewards.to("cpu")  # evaluations are rare, the device belongs to the training
        for measure in (sharpness, saturation, brightness):
            pictures[measure.__name__] = measure(images)
        pictures["base_pixels"] = (images - base).abs().mean(dim=(1, 2, 3))
        values: dict[str, float] = {}
        if self.features is not None:
            values, more = self._by_features(self.features, images, base)
            pictures |= more
        index = {prompt: place for place, prompt in enumerate(dict.fromkeys(self.prompts))}
        measured = Evaluation(
            step=step,
            values={},
            pictures={name: [float(x) for x in value] for name, value in pictures.items()},
            prompts=[index[prompt] for prompt in self.prompts],
        )
        values |= {name: fmean(measured.by_prompt(name)) for name in measured.pictures}
        values |= {"black": float((images.amax(dim=(1, 2, 3)) < 1.5 / 255).sum()), "nan": float(torch.sum(broken))}
        return Evaluation(
            step=step,
            values={name: values[name] for name in self.metrics() if name in values},
            pictures=measured.pictures,
            prompts=measured.prompts,
        )

    def leave_out(self, images: Tensor, *, groups: int = 40) -> dict[str, list[float]]:
        """The metrics of the whole set without each of at most `groups` groups of prompts, for `stats.jackknife`.

        images: as in a call. Empty without features, and for fewer than three prompts.
        """
        names = [name for name in ACROSS if name in self.metrics()]
        prompts = list(dict.fromkeys(self.prompts))
        if self.features is None or not names or len(prompts) < 3:
            return {}
        self.features.to(self.device)
        found = _finite_features(self.features, as_saved(images), self.batch)
        self.features.to("cpu")
        count = min(groups, len(prompts))
        group_of = {prompt: place % count for place, prompt in enumerate(prompts)}
        without: dict[str, list[float]] = {name: [] for name in names}
        for group in range(count):
            kept = [row for row, prompt in enumerate(self.prompts) if group_of[prompt] != group]
            over = across([self.prompts[row] for row in kept])
            for name, measure in zip(ACROSS, (vendi, pairwise_distance), strict=True):
                if name in without:
                    without[name].append(mean_over(over, found[kept], measure))
        return without

    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        """native name -> metric, of the trained reward (with its total) and of the held-out ones."""
        trained = {name: f"trained_{name}" if name in METRICS else name for name in natives(self.trained)}
        taken = {*METRICS, "reward", *trained.values()}  # a trained part called reward goes by the total of that name
        held_out = {name: f"heldout_{name}" if name in taken else name for name in natives(self.rewards)}
        return trained, held_out

    def _groups(self) -> tuple[list[list[int]], list[list[int]]]:
        return across(self.prompts), within(self.prompts)

    def _score(self, reward: Reward, images: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """evaluate.score on the pictures without NaN; NaN for the others."""
        rows = whole.nonzero().flatten().tolist()
        found = {name: torch.empty(0) for name in ("reward", *natives(reward))}
        if rows:
            prompts = [self.prompts[row] for row in rows]
            found = evaluate.score(reward, images[rows], prompts, batch=self.batch, device=self.device)
        spread = {name: torch.full((len(images),), torch.nan) for name in found}
        for name, value in found.items():
            spread[name][rows] = value
        return spread

    def _by_features(
        self, network: Features, images: Tensor, base: Tensor
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """(values of the whole set, values of each picture) that need features."""
        network.to(self.device)
        found, reference = (_finite_features(network, pictures, self.batch) for pictures in (images, base))
        network.to("cpu")
        measures: tuple[Callable[[Tensor], float], ...] = (vendi, pairwise_distance)
        over_prompts, per_prompt = self._groups()
        metrics = self.metrics()
        values = {
            name: mean_over(over_prompts, found, measure)
            for name, measure in zip(ACROSS, measures, strict=True)
            if name in metrics
        }
        pictures = {"base_distance": 1 - F.cosine_similarity(found.double(), reference.double(), dim=1)}
        for name, measure in zip(WITHIN, measures, strict=True):
            if name in metrics:
                pictures[name] = torch.empty(len(images), dtype=torch.float64)
                for group in per_prompt:
                    pictures[name][group] = measure(found[group])
        return values, pictures


def _finite_features(network: Features, images: Tensor, batch: int) -> Tensor:
    """(N, D); NaN for a picture with NaN, which would else reach its whole batch in some networks."""
    whole = ~images.isnan().flatten(1).any(dim=1)
    found = network(torch.where(whole.view(-1, 1, 1, 1), images, 0.0), batch=batch)
    return torch.where(whole[:, None], found, torch.nan)


def natives(reward: Reward | None) -> dict[str, bool]:
    """The native values that a reward logs, by name -> whether less of it is better."""
    if reward is None:
        return {}
    found: dict[int, tuple[Reward, bool]] = {}
    for weight, part in reward.terms:
        for leaf, _ in leaves(part):
            found.setdefault(id(leaf), (leaf, leaf.minimise != (weight < 0)))
    names = unique_names(leaf for leaf, _ in found.values())
    return dict(zip(names, (less for _, less in found.values()), strict=True))
