"""Which outputs of the denoiser are conditional, and the gradient through them alone.

Classifier-free guidance is arithmetic on the outputs of one step's calls: F = F_u + w (F_c - F_u), in one call over a
doubled batch or in two calls, with perturbed or skipped branches beside them, sometimes with the sign of the whole
turned. Nothing of that is known here. The graph from the leaves to the `model_output` that the scheduler gets says by
itself how much each output counts: w for the conditional one, 1 - w for the unconditional one, -s for a perturbed one;
together they count 1. So the conditional ones are those that count with the sign of the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardtune.engine.call import Call
from rewardtune.errors import PreflightError

#: How a step is guided, as `conditional_only` finds it, in words for people.
NONE, BATCH, CALLS, NETWORKS = "none", "one call", "two calls", "two networks"
#: How far a factor may be from that of an unguided output, which is 1.
CLOSE = 1e-2


def conditional_only(guided: Tensor, calls: Sequence[Call], factor: float | None) -> str:
    """Give the calls of one step their `shares`: 0 for what is not conditional, `factor` for what is.

    Args:
        guided: what the scheduler gets, with its graph.
        calls: the recorded calls of this step, of the denoiser and its kin.
        factor: None is one over the weight that the conditional output has in `guided`, which then counts 1.

    Returns:
        How the step is guided: NONE (nothing is left out; embedded guidance is no arithmetic), BATCH, CALLS, NETWORKS.

    Raises:
        PreflightError: if two branches count with one sign, as under a guidance below 1.
    """
    outputs = [(call, i) for call in calls for i, leaf in enumerate(call.leaves) if leaf is not None]
    weights = _weights(guided, [call.leaves[i] for call, i in outputs])
    if not weights:
        return NONE
    sign = 1.0 if sum(float(w.sum()) for w in weights) > 0 else -1.0
    weights = [w * sign for w in weights]
    counted = torch.cat([w[w != 0] for w in weights])
    conditional, left_out = counted[counted > 0], counted[counted < 0]
    own = float(conditional.mean())
    if not len(left_out) and own < 1 - CLOSE:
        raise PreflightError(
            f"the branches of guidance count alike ({', '.join(f'{w:.2g}' for w in sorted(set(counted.tolist()))[:4])} "
            "of the whole), so none of them is left out: use a guidance above 1, or guidance_gradient='both'"
        )
    scale = 1 / own if factor is None else factor
    for (call, i), weight in zip(outputs, weights, strict=True):
        call.shares = call.shares or [None] * len(call.leaves)
        call.shares[i] = (weight > 0).to(weight) * scale
    if len(left_out):
        whole = any(not bool((weight > 0).any()) for weight in weights)
        return CALLS if whole and len({id(call) for call in calls}) > 1 else BATCH
    return NETWORKS if own > 1 + CLOSE else NONE


def _weights(guided: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    """How much each row of each leaf counts in `guided`, (rows,): the mean of d sum(guided) / d leaf where it is not 0.

    Channels that the pipeline drops (learned variance) have a zero there. A row that nothing uses counts 0.
    """
    if not guided.requires_grad:
        return []
    found = torch.autograd.grad(guided, leaves, torch.ones_like(guided), retain_graph=True, allow_unused=True)
    weights = []
    for leaf, grad in zip(leaves, found, strict=True):
        assert leaf is not None
        rows = torch.zeros(len(leaf), 1, device=leaf.device) if grad is None else grad.float().flatten(1)
        weights.append(rows.sum(1) / rows.count_nonzero(1).clamp_min(1))
    return weights
