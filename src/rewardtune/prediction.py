"""x0-hat: the clean latent that a scheduler's step implies, from its input x and the raw network output F.

One formula per family of schedulers; the engine prefers the scheduler's own prediction when ``step`` reports one and
uses these otherwise. Each formula is tested against the scheduler's own value and against a perfect denoiser.
What has no x0-hat (IPNDM, consistency-model samplers) is refused here, and only an early stop needs it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewardtune.errors import PreflightError


class NoPredictionError(PreflightError):
    """This scheduler defines no x0-hat, which an early stop needs."""


#: Discrete variance-preserving chains: x = sqrt(abar) x0 + sqrt(1 - abar) eps, indexed by the timestep.
VP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
#: Sigma-scaled chains: x = x0 + sigma eps, the network sees x / sqrt(sigma^2 + 1).
SIGMA = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
#: Exponential integrators that carry their own alpha_t, sigma_t: x = alpha_t x0 + sigma_t eps.
ALPHA_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
)
#: Rectified flow: x = (1 - sigma) x0 + sigma eps, F = eps - x0.
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
#: EDM preconditioning, done by the scheduler's own `precondition_outputs`.
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")


def x0_hat(scheduler: Any, sample: Tensor, output: Tensor, *, timestep: Tensor | float | int) -> Tensor:
    """Early-stop prediction x0-hat (Algorithm 1, line 20). Call it before ``scheduler.step`` of the same step.

    Args:
        scheduler: a diffusers scheduler after ``set_timesteps``.
        sample: x_t as ``scheduler.step`` gets it, ``(B, C, H, W)`` or any shape.
        output: F, the network's output after guidance, of the same shape (or with learned variance channels).
        timestep: as passed to ``scheduler.step``.

    Returns:
        x0-hat in the shape of ``sample``, differentiable in ``sample`` and ``output``.

    Raises:
        NoPredictionError: if this scheduler (or its prediction type) defines no x0-hat.
    """
    kind = _family(scheduler)
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if sample.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
        output = output.chunk(2, dim=1)[0]  # learned variance
    x, F = sample, output

    if kind == "edm":
        return scheduler.precondition_outputs(x, F, scheduler.sigmas[step_index(scheduler, timestep)])
    if kind == "flow" or prediction == "flow_prediction":
        return _threshold(scheduler, x - _like(scheduler.sigmas[step_index(scheduler, timestep)], x) * F)
    if prediction == "sample":
        return _threshold(scheduler, F)
    if kind == "sigma":
        sigma = _like(_sigma(scheduler, timestep), x)
        if prediction == "v_prediction":
            return x / (sigma**2 + 1) - F * sigma / (sigma**2 + 1).sqrt()
        return x - sigma * F

    alpha, sigma = _alpha_sigma(scheduler, timestep, kind)
    alpha, sigma = _like(alpha, x), _like(sigma, x)
    if prediction == "v_prediction":
        return _threshold(scheduler, alpha * x - sigma * F)
    if prediction != "epsilon":
        raise NoPredictionError(
            f"{type(scheduler).__name__} with prediction_type={prediction!r} has no known x0-hat; legal are epsilon, "
            "v_prediction, sample, flow_prediction. Use a method without early stop (m=None)."
        )
    return _threshold(scheduler, (x - sigma * F) / alpha)


@dataclass(frozen=True)
class Span:
    """The noise levels of one step: in them, the raw output F is the velocity of `scale * x`.

    kind: what the level u is. scale * x is (1 - u) x0 + u noise in a "flow", x0 + u noise with "epsilon", and
    cos(u) x0 + sin(u) noise with "v": there a constant picture and noise make an arc of the path, not a line.
    """

    start: float
    end: float
    start_scale: float = 1.0
    end_scale: float = 1.0
    kind: Literal["flow", "epsilon", "v"] = "flow"

    @property
    def length(self) -> float:
        return self.end - self.start

    @property
    def step(self) -> tuple[float, float]:
        """The sampler's own arithmetic, as the two factors of `across`."""
        return self.across(self.end, self.end_scale)

    def across(self, level: float, scale: float) -> tuple[float, float]:
        """(a, b) of a x + b F: the latent at `level`, where this step's call foresees the whole way (DDIM, Euler)."""
        way = level - self.start
        straight, along = (math.cos(way), math.sin(way)) if self.kind == "v" else (1.0, way)
        return straight * self.start_scale / scale, along / scale

    def clean(self, x: Tensor, noise: Tensor) -> Tensor:
        """x0 in the latent x after this step, which holds this noise."""
        u = self.end
        a, s = {"flow": (1 - u, u), "epsilon": (1.0, u), "v": (math.cos(u), math.sin(u))}[self.kind]
        return (self.end_scale * x - s * noise) / a


#: Deterministic samplers of one network call a step whose step is linear in F: a call stands for one stretch there.
PLAIN = ("DDIMScheduler", "DDIMParallelScheduler", "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")


def span(scheduler: Any, timestep: Tensor | float | int) -> Span:
    """Levels before and after the coming ``scheduler.step``: sigma (flow), sigma / alpha (epsilon), the angle (v).

    Raises:
        PreflightError: for a sampler in which one call does not stand for one stretch, or another kind of prediction.
    """
    name, kind = type(scheduler).__name__, getattr(scheduler.config, "prediction_type", "epsilon")
    if getattr(scheduler.config, "stochastic_sampling", False):
        name, kind = f"{name} with stochastic_sampling", "velocity"
    for clips in ("clip_sample", "thresholding"):
        if getattr(scheduler.config, clips, False):
            name = f"{name} with {clips}"
    if name == "FlowMatchEulerDiscreteScheduler":
        i = step_index(scheduler, timestep)
        return Span(float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1]))
    if name not in PLAIN or kind not in ("epsilon", "v_prediction"):
        raise PreflightError(
            f"{name} with prediction_type={kind!r}: a method that works with the noise levels of single steps "
            f"(leapalign, flowbp_..., srpo) needs one of {', '.join(PLAIN)} without fresh noise and clipping, "
            "predicting a velocity, epsilon or v. Set sampling.scheduler, or use another method"
        )
    if name == "EulerDiscreteScheduler":  # x = x0 + sigma eps
        i = step_index(scheduler, timestep)
        start, end = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
        if kind == "epsilon":
            return Span(start, end, kind="epsilon")
        start, end = math.atan(start), math.atan(end)
        return Span(start, end, math.cos(start), math.cos(end), kind="v")
    t = int(timestep)
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abars = (
        scheduler.alphas_cumprod[t],
        scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod,
    )
    alphas = [math.sqrt(float(abar)) for abar in abars]
    start, end = (math.sqrt(1 - float(a)) / max(alpha, 1e-12) for a, alpha in zip(abars, alphas, strict=True))
    if kind == "epsilon":
        before_scale, after_scale = (1 / max(alpha, 1e-12) for alpha in alphas)
        return Span(start, end, before_scale, after_scale, kind="epsilon")
    return Span(math.atan(start), math.atan(end), kind="v")


def step_index(scheduler: Any, timestep: Tensor | float | int) -> int:
    """Index of the coming ``step`` in ``scheduler.sigmas``, also before the scheduler has fixed it at its first."""
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None:
        return scheduler.begin_index
    return int(scheduler.index_for_timestep(timestep))


def _family(scheduler: Any) -> str:
    families = {"vp": VP, "sigma": SIGMA, "alpha_sigma": ALPHA_SIGMA, "flow": FLOW, "edm": EDM}
    for cls in type(scheduler).__mro__:
        for kind, names in families.items():
            if cls.__name__ in names:
                return kind
    raise NoPredictionError(
        f"{type(scheduler).__name__} has no known x0-hat, which an early stop needs. Switch the early stop off "
        "(m=None) or use another scheduler, for example DDIM, Euler or DPM++."
    )


def noised(scheduler: Any, x0: Tensor, noise: Tensor, *, timestep: Tensor | float | int) -> Tensor:
    """x_t of the coming ``step`` by the scheduler's own law, which does not know the half steps of two samplers.

    Raises:
        PreflightError: for a scheduler without one.
    """
    if type(scheduler).__name__ in ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"):
        return x0 + _like(_sigma(scheduler, timestep), x0) * noise
    times = torch.as_tensor(timestep, device=x0.device).reshape(-1).expand(len(x0))
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x0, noise, times)
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(x0, times, noise)
    raise PreflightError(
        f"{type(scheduler).__name__} cannot noise a finished latent again (it has no add_noise), which draft_lv, srpo "
        "and the denoising loss need. Set sampling.scheduler, or use another method"
    )


def _sigma(scheduler: Any, timestep: Tensor | float | int) -> Tensor:
    """Noise level of the coming step's sample, half steps of the second-order schedulers included."""
    i = step_index(scheduler, timestep)
    name = type(scheduler).__name__
    if getattr(scheduler, "state_in_first_order", True):
        return scheduler.sigmas[i]
    if name == "KDPM2DiscreteScheduler":
        return scheduler.sigmas_interpol[i]
    if name == "KDPM2AncestralDiscreteScheduler":
        return scheduler.sigmas_interpol[i - 1]
    if name == "DPMSolverSDEScheduler":
        return (scheduler.sigmas[i - 1] * scheduler.sigmas[i]).sqrt()
    return scheduler.sigmas[i]


def _alpha_sigma(scheduler: Any, timestep: Tensor | float | int, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "alpha_sigma":
        return scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[step_index(scheduler, timestep)])
    abar = scheduler.alphas_cumprod[int(timestep)]
    if float(abar) == 0.0 and getattr(scheduler.config, "prediction_type", "epsilon") == "epsilon":
        raise NoPredictionError(
            f"epsilon prediction with zero terminal SNR has no x0-hat at t={int(timestep)}: lower m or use v_prediction"
        )
    return abar.sqrt(), (1 - abar).sqrt()


def _threshold(scheduler: Any, x0: Tensor) -> Tensor:
    """The clipping that the scheduler itself applies to its prediction."""
    config = scheduler.config
    if getattr(config, "thresholding", False):
        return scheduler._threshold_sample(x0)
    if getattr(config, "clip_sample", False) and type(scheduler).__name__ in VP:
        limit = getattr(config, "clip_sample_range", 1.0)
        return x0.clamp(-limit, limit)
    return x0


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A scalar of the scheduler's tables on the device of x; 0-dimensional, so that x keeps its dtype."""
    return torch.as_tensor(value).to(x.device)
