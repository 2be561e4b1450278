"""Every scheduler: the engine against literal Algorithm 1, and x0-hat against two independent sources.

The schedulers differ in what a step is: history of several outputs, two network calls per step, noise of their own,
a prediction that is clipped. All of it must pass through the engine unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch

from rewardtune import methods
from rewardtune.engine import count_steps, preflight, rollout
from rewardtune.engine.preflight import asked_of
from rewardtune.errors import PreflightError, TrainingStopped
from rewardtune.plan import Plan
from rewardtune.prediction import noised, x0_hat

pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have ta>=t0"),  # torchsde rounds the ends of its interval
    pytest.mark.filterwarnings(
        "ignore:The `scale_model_input` function should be called"
    ),  # x0-hat alone needs no network
]

N = 4  # inference steps; second-order schedulers make more scheduler steps of them
BETAS = {**tiny.BETAS, "clip_sample": False}


@dataclass(frozen=True)
class Setting:
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    family: str = "sd"


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
SETTINGS: dict[str, Setting] = {
    "DDPM": Setting("DDPMScheduler"),
    "DDPM, clipping": Setting("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    "DDIM": Setting("DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False}),
    "DDIM, eta 1": Setting("DDIMScheduler", {"steps_offset": 1}, {"eta": 1.0}),
    "DDIM, v": Setting("DDIMScheduler", V, family="sd-v"),
    "DDIM, v, zero SNR, trailing": Setting(
        "DDIMScheduler", {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, family="sd-v"
    ),
    "DDIM, thresholding": Setting("DDIMScheduler", {"thresholding": True, "sample_max_value": 3.0}),
    "PNDM": Setting("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "PNDM, Runge-Kutta start": Setting("PNDMScheduler", {"skip_prk_steps": False}),
    "LMS": Setting("LMSDiscreteScheduler"),
    "Euler": Setting("EulerDiscreteScheduler"),
    "Euler, v": Setting("EulerDiscreteScheduler", V, family="sd-v"),
    "Euler ancestral": Setting("EulerAncestralDiscreteScheduler"),
    "Heun": Setting("HeunDiscreteScheduler"),
    "Heun, v": Setting("HeunDiscreteScheduler", V, family="sd-v"),
    "KDPM2": Setting("KDPM2DiscreteScheduler"),
    "KDPM2 ancestral": Setting("KDPM2AncestralDiscreteScheduler"),
    "DPM++ 2M": Setting("DPMSolverMultistepScheduler"),
    "DPM++ 2M, v": Setting("DPMSolverMultistepScheduler", V, family="sd-v"),
    "DPM++ 3M, Karras": Setting("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "DPM++ SDE": Setting("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ singlestep": Setting("DPMSolverSinglestepScheduler"),
    "DPM SDE, Brownian tree": Setting("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}),
    "DEIS": Setting("DEISMultistepScheduler"),
    "UniPC": Setting("UniPCMultistepScheduler"),
    "UniPC, v": Setting("UniPCMultistepScheduler", V, family="sd-v"),
    "SASolver": Setting("SASolverScheduler"),
    "LCM": Setting("LCMScheduler"),
    "TCD": Setting("TCDScheduler", call={"eta": 0.3}),
    "SD3 flow Euler": Setting("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, family="sd3"),
    "SD3 flow Euler, stochastic": Setting(
        "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, family="sd3"
    ),
    "SD3 flow Heun": Setting("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, family="sd3"),
    "SD3 flow LCM": Setting("FlowMatchLCMScheduler", {"shift": 3.0}, family="sd3"),
    "SD3 flow DPM++": Setting("DPMSolverMultistepScheduler", FLOW, family="sd3"),
    "SD3 flow UniPC": Setting("UniPCMultistepScheduler", FLOW, family="sd3"),
    "SD3 flow DEIS": Setting("DEISMultistepScheduler", FLOW, family="sd3"),
}

# The two early stops fall on both halves of a second-order step.
PLANS: dict[str, judge.Draw] = {
    "drtune, early stop": lambda T: Plan(T=T, train=frozenset({0, T // 2}), end=T - 2),
    "refl": lambda T: Plan(T=T, train=frozenset({T - 3}), end=T - 3),
    "draft-3": judge.drawn(methods.draft(K=3)),
    "alignprop, nested": lambda T: Plan(T=T, train=frozenset({0, 1, T - 2}), input_gradient=1.0),
}


def build(name: str) -> tuple[Any, tiny.Call]:
    setting = SETTINGS[name]
    pipe, call = PIPES.get(setting.family) or PIPES.setdefault(setting.family, tiny.BUILDERS[setting.family](steps=N))
    tiny.set_scheduler(pipe, setting.scheduler, **setting.config)
    return pipe, {**call, **setting.call}


PIPES: dict[str, tuple[Any, tiny.Call]] = {}


def slow(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def check(name: str, draw: judge.Draw) -> None:
    pipe, call = build(name)
    T = count_steps(pipe, **tiny.fresh(call))
    assert oracle.count_steps(pipe, tiny.fresh(call)) == T
    plan = draw(T)
    verdict = judge.compare(pipe, plan, call)
    if plan.end is None or oracle.own_prediction(pipe.scheduler):
        assert verdict.images_equal, f"images differ by up to {verdict.image_difference:.1e}"
    assert verdict.image_difference < 2e-6  # two formulas for the same x0-hat round differently
    assert verdict.gradient_difference < 1e-5
    assert verdict.result.trained == plan.executed
    assert verdict.result.replay_error == 0


@pytest.mark.parametrize("method", ["drtune, early stop", "alignprop, nested", *slow(["refl", "draft-3"])])
@pytest.mark.parametrize("name", SETTINGS)
def test_engine_is_algorithm_1(name: str, method: str) -> None:
    check(name, PLANS[method])


@pytest.mark.slow  # the full grid, a few minutes: every method on every scheduler (DRaFT-LV has its own test below)
@pytest.mark.parametrize(
    "method", [name for name in judge.PLANS if not name.lower().startswith(("draft-lv", "restart"))]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_on_every_scheduler(name: str, method: str) -> None:
    if method == "draft-1" and name in LAST_OUTPUT_DISCARDED:
        refused_because_zero(name, judge.PLANS[method])
    else:
        check(name, judge.PLANS[method])


# Found by the grid: the last step of these multiplies the network's output by zero, so DRaFT-1 cannot train them.
LAST_OUTPUT_DISCARDED = ["PNDM, Runge-Kutta start", "SD3 flow DEIS"]


def refused_because_zero(name: str, draw: judge.Draw) -> None:
    pipe, call = build(name)
    plan = draw(count_steps(pipe, **tiny.fresh(call)))
    fields = {"train": plan.train, "end": plan.end, "input_gradient": plan.input_gradient}
    pictures = oracle.images(pipe, **fields, seed=0, call=tiny.fresh(call))
    exact = oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(pictures))
    assert not any(gradient.any() for gradient in exact.values())
    with pytest.raises(TrainingStopped, match="zero everywhere"):
        judge.engine_gradient(pipe, plan, call)


@pytest.mark.parametrize("name", [*slow(["PNDM, Runge-Kutta start"]), "SD3 flow DEIS"])
def test_the_preflight_takes_what_discards_the_last_output_and_says_so(name: str) -> None:
    pipe, call = build(name)
    assert any("by 0" in note for note in preflight(pipe, **tiny.fresh(call)).notes)


def test_what_plans_ask_of_a_pipeline() -> None:
    made = {"stop": methods.refl(m=2), "again": methods.draft_lv(n=1), "levels": methods.flowbp_sparse(2)}
    asked = {name: asked_of([method(6, Random(0))]) for name, method in made.items()}
    assert {name: {key for key, value in one.items() if value} for name, one in asked.items()} == {
        "stop": {"early_stop"},
        "again": {"restarts"},
        "levels": {"levels"},
    }
    one = methods.conditional_only(methods.draft(K=1))
    assert asked_of([made["again"](6, Random(0)), one(6, Random(0))])["conditional"]


def test_the_preflight_refuses_chains_that_cannot_begin_again() -> None:
    pipe, call = tiny.stable_diffusion(steps=N)
    tiny.set_scheduler(pipe, "IPNDMScheduler")
    preflight(pipe, early_stop=False, **tiny.fresh(call))
    with pytest.raises(PreflightError, match="IPNDMScheduler cannot noise"):
        preflight(pipe, early_stop=False, restarts=True, **tiny.fresh(call))


RESTARTED = ["DDPM", "DPM++ 2M", "SD3 flow Euler"]
RESTARTED += slow(["Heun", "DDIM, eta 1", "DPM++ SDE", "UniPC", "LCM", "TCD", "PNDM"])


@pytest.mark.parametrize("name", RESTARTED)
def test_draft_lv_restarts_the_schedulers_own_chain(name: str) -> None:
    """With the memory of a multistep scheduler as the finished chain left it before that step."""
    pipe, call = build(name)
    T = oracle.count_steps(pipe, tiny.fresh(call))
    for method in ("draft-LV", "draft-LV, early stop", "restarted, two nested steps"):
        verdict = judge.compare(pipe, judge.PLANS[method](T), call)
        assert verdict.image_difference < 2e-6, method
        assert verdict.gradient_difference < 1e-5, method


@pytest.mark.parametrize("scheduler", ["IPNDMScheduler", "CMStochasticIterativeScheduler"])
def test_schedulers_without_x0_hat_are_refused_for_an_early_stop_only(scheduler: str) -> None:
    pipe, call = tiny.stable_diffusion(steps=N)
    tiny.set_scheduler(pipe, scheduler)
    T = oracle.count_steps(pipe, tiny.fresh(call))
    early = Plan(T=T, train=frozenset({1}), end=T - 2)
    with pytest.raises(PreflightError, match="x0-hat"), rollout(pipe, early, seed=0, **tiny.fresh(call)):
        pass
    whole = Plan(T=T, train=frozenset({1}))
    assert judge.compare(pipe, whole, call).gradient_difference < 1e-5


# x0-hat against the scheduler's own prediction ------------------------------------------------------------------------


def scheduler_of(name: str, **config: Any) -> Any:
    """The scheduler of a setting alone, with its timesteps set."""
    import diffusers

    setting = SETTINGS[name]
    flow = setting.scheduler.startswith("FlowMatch")
    defaults = {} if flow else BETAS
    scheduler = getattr(diffusers, setting.scheduler).from_config({**defaults, **setting.config, **config})
    scheduler.set_timesteps(6)
    return scheduler


def converted(scheduler: Any) -> torch.Tensor | None:
    """x0-hat as a multistep solver keeps it in its history, if it keeps x0 and not noise."""
    if getattr(scheduler, "predict_x0", False) or "++" in scheduler.config.get("algorithm_type", ""):
        return scheduler.model_outputs[-1]
    return None


OWN = [name for name in SETTINGS if not SETTINGS[name].scheduler.startswith(("PNDM", "TCD", "FlowMatch", "DEIS"))]


@pytest.mark.parametrize("name", OWN)
def test_x0_hat_is_the_schedulers_own_prediction(name: str) -> None:
    scheduler, generator = scheduler_of(name), torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        F = torch.randn(x.shape, generator=generator)
        mine = x0_hat(scheduler, x, F, timestep=t)
        result = scheduler.step(F, t, x, return_dict=True)
        own = converted(scheduler)
        if own is None:
            own = result["denoised"] if "denoised" in result else result["pred_original_sample"]
        scale = own.abs().max()
        assert float((mine - own).abs().max() / scale) < 2e-6, f"timestep {t}"
        x = result.prev_sample


# x0-hat against a perfect denoiser ------------------------------------------------------------------------------------


def perfect_denoiser(scheduler: Any, x_in: torch.Tensor, t: torch.Tensor, clean: torch.Tensor, kind: str) -> Any:
    """What a network would answer that was trained on one point, from its own input and time alone.

    Written in the training parametrisation x_in = sqrt(abar_t) x* + sqrt(1 - abar_t) eps, with the training table of
    alpha-bar and, between two timesteps, log sigma linear in t; nothing is taken from the scheduler's sampling sigmas.
    A flow is trained at x_in = (1 - t/1000) x* + t/1000 eps.
    """
    if kind == "flow_prediction":
        return (x_in - clean) / (t.double() / 1000)
    abar = training_alphas_cumprod(scheduler)
    low, share = t.double().floor().long(), t.double().frac()
    if share == 0:
        abar = abar[low]
    else:
        log_snr = (abar / (1 - abar)).log()
        abar = torch.sigmoid((1 - share) * log_snr[low] + share * log_snr[low + 1])
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    noise = (x_in - alpha * clean) / sigma
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean.expand_as(x_in)}[kind]


def training_alphas_cumprod(scheduler: Any) -> torch.Tensor:
    if scheduler.config.get("rescale_betas_zero_snr", False):
        return scheduler.alphas_cumprod.double()
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


# These round t to an integer for Karras and flow sigmas: their own error, not x0-hat's.
ROUNDS_TIME = ("DPMSolver", "UniPC", "DEIS", "SASolver", "KDPM2")
PERFECT = [name for name in SETTINGS if not {"thresholding", "clip_sample"} & SETTINGS[name].config.keys()]


def kinds(scheduler: Any, setting: Setting) -> list[str]:
    if setting.family == "sd3":
        return ["flow_prediction"]
    no_sample = ("KDPM2", "DPMSolverSDE", "Heun", "EulerAncestral", "PNDM", "LMS")
    sample = [] if setting.scheduler.startswith(no_sample) else ["sample"]
    return ["epsilon", "v_prediction", *sample]


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        (name, spacing)
        for name in PERFECT
        for spacing in ([None] if SETTINGS[name].scheduler.startswith("FlowMatch") else ["leading", "trailing"])
    ],
)
def test_x0_hat_finds_the_only_point_of_a_data_set(name: str, spacing: str | None) -> None:
    """spacing: None where the scheduler knows none."""
    setting = SETTINGS[name]
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    uneven = {"use_karras_sigmas", "use_flow_sigmas"} & setting.config.keys()
    bound = 8e-3 if uneven and setting.scheduler.startswith(ROUNDS_TIME) else 1e-5
    for kind in kinds(None, setting):
        zero_snr = setting.config.get("rescale_betas_zero_snr", False)
        if zero_snr and kind == "epsilon":
            continue  # has no x0-hat at t = 999; see the test below
        config = {} if spacing is None else {"timestep_spacing": spacing, "prediction_type": kind}
        scheduler = scheduler_of(name, **config)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            F = perfect_denoiser(scheduler, x_in, t, clean, kind)
            error = (x0_hat(scheduler, x, F, timestep=t) - clean).abs().max()
            assert float(error) < bound, f"{kind}, timestep {t}"
            x = scheduler.step(F, t, x, return_dict=False)[0].double()


@pytest.mark.parametrize("name", PERFECT)
def test_a_finished_latent_is_noised_to_the_level_that_the_network_is_told(name: str) -> None:
    """By the timestep alone and the training table: half steps of second-order samplers have levels of their own."""
    setting, scheduler = SETTINGS[name], scheduler_of(name)
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        with pytest.raises(PreflightError, match="add_noise"):
            noised(scheduler, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), timestep=scheduler.timesteps[0])
        return
    flow = setting.family == "sd3"
    uneven = {"use_karras_sigmas", "use_flow_sigmas"} & setting.config.keys()
    bound = 2e-2 if uneven and setting.scheduler.startswith(ROUNDS_TIME) else 1e-4
    random = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=random, dtype=torch.float64) for _ in range(2))
    for t in scheduler.timesteps:
        x = noised(scheduler, clean, noise, timestep=t)
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        found = perfect_denoiser(scheduler, x_in, t, clean, "flow_prediction" if flow else "epsilon")
        error = (found + clean - noise if flow else found - noise).abs().max()
        assert float(error) < bound, f"timestep {t}"
        scheduler.step(found, t, x, return_dict=False)


def test_epsilon_with_zero_terminal_snr_has_no_x0_hat_at_the_first_step() -> None:
    scheduler = scheduler_of("DDIM, v, zero SNR, trailing", prediction_type="epsilon")
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(PreflightError, match="zero terminal SNR"):
        x0_hat(scheduler, x, x, timestep=scheduler.timesteps[0])


def test_x0_hat_is_differentiable_in_sample_and_output() -> None:
    """d x0-hat / dx = 1 / alpha and d x0-hat / dF = -sigma / alpha for epsilon prediction."""
    scheduler = scheduler_of("DDIM")
    t = scheduler.timesteps[2]
    abar = scheduler.alphas_cumprod[t]
    x, F = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 4, 8, 8, requires_grad=True)
    dx, dF = torch.autograd.grad(x0_hat(scheduler, x, F, timestep=t).sum(), [x, F])
    torch.testing.assert_close(dx, torch.full_like(dx, float(abar**-0.5)))
    torch.testing.assert_close(dF, torch.full_like(dF, float(-(((1 - abar) / abar) ** 0.5))))
