"""Diversity of pictures: Vendi score and mean pairwise distance on the cosine of image features.

Source of the first: Friedman and Dieng 2023, "The Vendi Score: A Diversity Evaluation Metric for Machine Learning",
with the cosine as kernel. Both are functions of a feature matrix (N, D) alone. Two questions are kept apart: `within`
one prompt (do its seeds still differ?) and `across` prompts (does another prompt still give another picture?).
Left out: other orders of the Vendi score, and kernels other than the cosine.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError
from .rewards.aesthetic import _vision
from .rewards.catalogue import OPENAI
from .rewards.clipmodel import image_settings
from .rewards.contract import full
from .rewards.preprocess import Preprocess
from .rewards.weights import check_folder, source_of


def vendi(features: Tensor) -> float:
    """exp(-sum_i l_i log l_i), l the eigenvalues of K / N, K_ij = cos(f_i, f_j): the effective number of pictures.

    features: (N, D). 1 for N equal directions, N for N orthogonal ones; NaN where a row is 0 or not finite.
    """
    unit = _directions(features)
    if unit is None:
        return float("nan")
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues, apart from zeros
    eigenvalues = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def pairwise_distance(features: Tensor) -> float:
    """The mean of 1 - cos(f_i, f_j) over all pairs i != j: 0 for equal directions, 1 for orthogonal ones, at most 2.

    features: (N, D). NaN for a single row, and where a row is 0 or not finite.
    """
    unit = _directions(features)
    if unit is None or len(unit) < 2:
        return float("nan")
    n = len(unit)
    return float(1 - (unit.sum(0).square().sum() - n) / (n * (n - 1)))


def within(prompts: Sequence[str]) -> list[list[int]]:
    """The indices of each prompt's pictures, prompts in the order in which they first occur."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return list(groups.values())


def across(prompts: Sequence[str]) -> list[list[int]]:
    """The first picture of every prompt, the second of every prompt, and so on: no group has a prompt twice."""
    groups = within(prompts)
    return [[group[k] for group in groups if len(group) > k] for k in range(max(map(len, groups), default=0))]


def mean_over(groups: Sequence[Sequence[int]], features: Tensor, measure: Callable[[Tensor], float]) -> float:
    """The mean of measure(features of a group) over the groups of two and more; NaN where there is none."""
    values = [measure(features[list(group)]) for group in groups if len(group) > 1]
    return fmean(values) if values else float("nan")


class Features:
    """images (N, 3, H, W) in [0, 1] -> embeddings (N, D) by the vision half of a CLIP or SigLIP, without a graph.

    model: hub id, folder, or `playground` for the playground's small CLIP. revision: of the hub repository.
    The loader, the checks of its config and the resizing are those of the rewards. Raises ConfigError.
    """

    def __init__(self, model: str, *, revision: str | None = None) -> None:
        who, self.name = "guards.features", model
        if model == "playground":
            from . import playground

            model = str(playground.clip_path())
        check_folder(model, who=who)
        source = source_of(model, OPENAI, revision=revision, who=who)
        network, self.output, fit = _vision(source, who=who)
        size, mean, std = image_settings(source, who=who, crop=fit == "crop")
        if size != network.config.image_size:
            raise ConfigError(f"{who}: {source.repo} resizes to {size} pixels but reads {network.config.image_size}")
        self.model = network.requires_grad_(False).eval()
        self.preprocess = Preprocess(size=size, mean=mean, std=std, fit=fit)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch: int = 8) -> Tensor:
        """(N, D) on the CPU, `batch` pictures at a time on the device of the network."""
        device = next(self.model.parameters()).device
        pieces = [self.preprocess(full(part.to(device))) for part in images.split(batch)]
        return torch.cat([full(self.model(pixel_values=pixels)[self.output]).cpu() for pixels in pieces])

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self


def _directions(features: Tensor) -> Tensor | None:
    """Rows of length 1 in float64; None where a row has no direction. ConfigError unless (N, D)."""
    if features.ndim != 2 or not features.numel():
        raise ConfigError(f"features are {tuple(features.shape)}; legal is (N, D): one row for each picture")
    rows = features.double()
    if not (torch.isfinite(rows).all() and (rows != 0).any(dim=1).all()):
        return None
    return F.normalize(rows, dim=1, eps=0)
