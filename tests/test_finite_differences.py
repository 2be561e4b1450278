"""The second oracle: with every call trained and nothing stopped, the gradient is the plain pipeline's derivative.

No autograd on this side: `pipe(...)` itself is called with the parameters moved along random directions, in float64.
"""

from __future__ import annotations

from typing import Any

import judge
import oracle
import pytest
import tiny

from rewardtune import methods

T = 4
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DDIM": ("sd", "DDIMScheduler", {"steps_offset": 1}),
    "DDIM, v-prediction": ("sd-v", "DDIMScheduler", {"steps_offset": 1}),
    "DPM++ 2M, multistep": ("sd", "DPMSolverMultistepScheduler", {}),
    "UniPC, multistep": ("sd", "UniPCMultistepScheduler", {}),
    "Heun, second order": ("sd", "HeunDiscreteScheduler", {}),
    "DDPM, stochastic": ("sd", "DDPMScheduler", {}),
    "Euler ancestral, stochastic": ("sd", "EulerAncestralDiscreteScheduler", {}),
    "PAG": ("sd-pag", "DDIMScheduler", {"steps_offset": 1}),
    "ControlNet": ("sd-controlnet", "DDIMScheduler", {"steps_offset": 1}),
    "SDXL, Euler": ("sdxl", "EulerDiscreteScheduler", {}),
    "SD3, flow Euler": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "SD3, flow Heun": ("sd3", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
}


def derivatives(name: str) -> tuple[int, list[tuple[float, float]]]:
    """T, and for two random directions the derivative by the engine's gradient and by differences of `pipe(...)`."""
    family, scheduler, config = CASES[name]
    pipe, call = tiny.BUILDERS[family](steps=T)
    tiny.set_scheduler(pipe, scheduler, **config)
    steps = oracle.count_steps(pipe, tiny.fresh(call))
    pairs = []
    with tiny.double(pipe, call):
        _, gradient, _ = judge.engine_gradient(pipe, judge.drawn(methods.draft(K=None))(steps), call)
        parameters = tiny.trainable(pipe)

        def loss() -> float:
            return float(oracle.generic_loss(judge.plain_images(pipe, call)))

        for seed in (0, 1):
            direction = oracle.random_direction(parameters, seed=seed)
            measured = oracle.directional_derivative(loss, parameters, direction, h=1e-4)
            pairs.append((oracle.inner(gradient, direction), measured))
    return steps, pairs


QUICK = ("DDIM", "Heun, second order", "DDPM, stochastic", "SDXL, Euler", "SD3, flow Euler")


@pytest.mark.parametrize("name", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_gradient_is_the_derivative_of_the_plain_pipeline(name: str) -> None:
    for engine, measured in derivatives(name)[1]:
        assert engine == pytest.approx(measured, rel=1e-6)
