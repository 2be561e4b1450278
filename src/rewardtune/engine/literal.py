"""The gradient of a few steps by one autograd graph: the preflight holds the sweep against it, on the user's pipeline.

Nothing of the tape takes part: the trained calls of the denoiser run once, with their graphs, and torch does the rest.
It costs the memory of those graphs together, so it is for a small number of steps and one sample.
"""

import functools
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.engine.call import differentiable, hold
from rewardtune.engine.doors import quiet


def literal_gradient(
    pipe: Any, denoiser: str, train: Collection[int], call: dict[str, Any], loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """``pipe(**call)`` with a graph through the steps `train`, from their inputs on, those of the others cut.

    Args:
        train: indices of scheduler steps; the gradient of their inputs passes too (nested).
        loss: of the last latent, which the scheduler's last step gives.

    Returns:
        That latent (without its graph), and the gradient of each trained parameter of the denoiser; None where none
        arrives.
    """
    network, scheduler = pipe.components[denoiser], pipe.scheduler
    real_step, latents = scheduler.step, list[Tensor]()
    parameters = [p for p in network.parameters() if p.requires_grad]
    trained = {id(p) for p in parameters}

    def called(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if len(latents) not in train:
            with torch.no_grad():
                return inner(*args, **kwargs)
        torch.set_grad_enabled(True)  # the pipeline's own no_grad puts it back when it ends
        return inner(*args, **kwargs)

    @functools.wraps(real_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        answer = real_step(*args, **kwargs)
        latents.append(answer[0] if isinstance(answer, tuple) else answer.prev_sample)
        return answer

    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        for part in parts:
            stack.enter_context(differentiable(part))
            if any(id(p) in trained for p in part.parameters()):  # a ControlNet may share layers with the denoiser
                inner = part._compiled_call_impl or part._call_impl
                hold(stack, part, "_compiled_call_impl", functools.partial(called, inner))
        hold(stack, scheduler, "step", step)
        with torch.no_grad():  # its exit restores the mode, whatever is switched on in between
            pipe(**{**call, "return_dict": False})
        with torch.enable_grad():
            found = torch.autograd.grad(loss(latents[-1]), parameters, allow_unused=True)
    return latents[-1].detach(), list(found)
