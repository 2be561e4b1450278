"""Which outputs of the denoiser are conditional, and the gradient through them alone.

Classifier-free guidance is arithmetic on the outputs of one step's calls: F = F_u + w (F_c - F_u), in one call over a
doubled batch, in two calls or by two networks, with perturbed or skipped branches beside them, sometimes scaled or with
its sign turned. Nothing of that is known here. The graph from the leaves to the `model_output` that the scheduler gets
says by itself how much each output counts: w for the conditional one, 1 - w for the unconditional one, -s for a
perturbed one, 1 of the whole together. So the conditional ones are those that count with the sign of the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewardtune.engine.call import Call
from rewardtune.errors import PreflightError

#: How a call is guided, in words for people. Embedded guidance is an input of the denoiser, hence none here.
NONE, EMBEDDED, BATCH, CALLS, NETWORKS = "none", "embedded", "one call", "two calls", "two networks"


class AlikeError(PreflightError):
    """Both branches count with the same sign, so none of them can be told to be the one to leave out."""


def conditional_only(guided: Tensor, calls: Sequence[Call], denoiser: nn.Module, factor: float | None) -> str:
    """Give the calls of one step their `shares`: 0 for what is not conditional, `factor` for what is.

    Args:
        guided: what the scheduler gets, with its graph.
        calls: the recorded calls of this step, of the denoiser and its kin.
        factor: None is one over the weight of the conditional branch in `guided`, which then counts as the whole.

    Returns:
        How the step is guided: NONE (nothing is left out), BATCH, CALLS or NETWORKS.

    Raises:
        AlikeError: under a guidance between 0 and 1.
    """
    outputs = [(call, i) for call in calls for i, leaf in enumerate(call.leaves) if leaf is not None]
    rows = _derivatives(guided, [call.leaves[i] for call, i in outputs])
    sums = [row.sum(1) for row in rows]
    total = sum(float(s.sum()) for s in sums)
    if not total:
        return NONE  # the sampler uses none of them
    conditional = [s * total > 0 for s in sums]
    left_out = [s * total < 0 for s in sums]
    used = sum(int(row[own].count_nonzero()) for row, own in zip(rows, conditional, strict=True))
    if used > 1.5 * guided.numel():
        raise AlikeError(
            "both branches of guidance count with the same sign, so neither can be left out: use a guidance above 1, "
            "or leave conditional_only out"
        )
    if not any(bool(out.any()) for out in left_out):
        return NONE
    weight = sum(float(s[own].sum()) for s, own in zip(sums, conditional, strict=True)) / total
    scale = 1 / weight if factor is None else factor
    for (call, i), own in zip(outputs, conditional, strict=True):
        call.shares = call.shares or [None] * len(call.leaves)
        call.shares[i] = own.float() * scale
    branches = {id(call): call for (call, _), out in zip(outputs, left_out, strict=True) if out.any()}
    with_both = {id(call) for (call, _), own in zip(outputs, conditional, strict=True) if own.any()} & branches.keys()
    if with_both:
        return BATCH
    return CALLS if all(call.module is denoiser for call in branches.values()) else NETWORKS


def _derivatives(guided: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    """d sum(guided) / d leaf, (rows, values) for each leaf; zeros where the pipeline drops a channel or an output."""
    known = [leaf for leaf in leaves if leaf is not None]
    if not guided.requires_grad or not known:
        return [torch.zeros(len(leaf), 1, device=leaf.device) for leaf in known]
    found = torch.autograd.grad(guided, known, torch.ones_like(guided), retain_graph=True, allow_unused=True)
    return [(torch.zeros_like(x) if g is None else g).float().flatten(1) for x, g in zip(known, found, strict=True)]
