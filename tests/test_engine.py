"""The doors and the sweep beyond the oracle: memory, half precision, sabotage, what is put back, what is refused."""

import functools
import weakref
from random import Random

import oracle
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from judge import engine_gradient
from saved_bytes import SavedBytes
from torch import nn

from rewardtune import methods
from rewardtune.engine import count_steps, find_denoiser, preflight, rollout
from rewardtune.engine.call import Call
from rewardtune.errors import ConfigError, PreflightError, ReplayError, RewardError, TrainingStopped
from rewardtune.plan import Plan

LAST = Plan(T=4, train=frozenset({3}))
ALL = Plan(T=4, train=frozenset(range(4)), input_gradient=1.0)


@pytest.fixture
def sd():
    return tiny.stable_diffusion()


def sweep(pipe, plan, call, **options):
    with rollout(pipe, plan, seed=0, **tiny.fresh(call)) as tape:
        return tape.backward(oracle.generic_loss(tape.images), **options)


# Memory ---------------------------------------------------------------------------------------------------------------


def measure(plan: Plan, *, recompute: bool = True) -> tuple[int, int, int]:
    pipe, call = tiny.stable_diffusion(steps=plan.T)
    with SavedBytes(pipe.unet) as saved, rollout(pipe, plan, recompute=recompute, **call) as tape:
        recorded = tape.recorded_bytes
        tape.backward(oracle.generic_loss(tape.images))
    return saved.peak[True], saved.peak[False], recorded


@pytest.mark.parametrize(
    "input_gradient",
    [pytest.param(0.0, id="stopped"), pytest.param(1.0, id="nested", marks=pytest.mark.slow)],
)
def test_memory_inside_the_denoiser_is_that_of_one_call(input_gradient: float):
    def peak(T: int, K: int) -> int:
        return measure(Plan(T=T, train=frozenset(range(T - K, T)), input_gradient=input_gradient))[0]

    alone = peak(10, 1)
    several = {peak(T, K) for T, K in [(10, 5), (10, 10), (40, 5), (40, 40)]}
    assert alone > 100_000
    assert len(several) == 1
    # The first trained call of a chain has a constant input: a nested plan saves a little less there.
    assert alone == several.pop() if input_gradient == 0 else alone <= several.pop() <= 1.05 * alone


def test_kept_graphs_cost_their_number():
    one, three = (measure(Plan(T=4, train=frozenset(range(K))), recompute=False)[0] for K in (1, 3))
    assert one == measure(Plan(T=4, train=frozenset({0})))[0]
    assert three == 3 * one


def test_a_kept_graph_is_computed_once_and_refuses_changed_arguments(sd):
    pipe, call = sd
    runs = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    plan = Plan(T=4, train=frozenset({1, 3}))
    with rollout(pipe, plan, seed=0, recompute=False, **tiny.fresh(call)) as tape:
        assert runs == [False, True, False, True]
        tape.backward(oracle.generic_loss(tape.images))
    assert len(runs) == 4
    with rollout(pipe, plan, seed=0, recompute=False, **tiny.fresh(call)) as tape:
        tape._calls[0].inputs[0].add_(1)
        with pytest.raises(ReplayError, match="changed in place"):
            tape.backward(oracle.generic_loss(tape.images))


def test_recorded_calls_cost_a_few_times_their_own_size():
    pipe, call = tiny.stable_diffusion(steps=10)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    own = 2 * 2 * len(call["prompt"]) * channels * size**2 * 4  # input and output, both guidance branches, float32
    at = {K: measure(Plan(T=10, train=frozenset(range(10 - K, 10)), input_gradient=1.0)) for K in (1, 10)}
    per_call = (at[10][2] - at[1][2]) / 9
    graph_per_call = (at[10][1] - at[1][1]) / 9
    assert own <= per_call + graph_per_call <= 4 * own


# Half precision -------------------------------------------------------------------------------------------------------


def half_gradient(dtype: torch.dtype, plan: Plan, factor: float) -> torch.Tensor:
    """Gradient over ``factor``. The base holds the same weights (rounded to bfloat16) in every dtype."""
    pipe, call = tiny.stable_diffusion(steps=plan.T, lora=False)
    tiny.liven(pipe.unet, seed=5, gain=0.5)  # smoother than the oracle's: rounding of the forward is not amplified
    for module in (pipe.unet, pipe.text_encoder):
        for p in module.parameters():
            p.data = p.data.to(torch.bfloat16).to(dtype)
    tiny.add_lora(pipe.unet)
    for p in tiny.trainable(pipe).values():
        p.data = p.data.float()
    with rollout(pipe, plan, seed=0, **call) as tape:
        tape.backward(oracle.generic_loss(tape.images) * factor)
    return torch.cat([p.grad.flatten() for p in tiny.trainable(pipe).values()]).double() / factor


MEAN_OF_32_PICTURES = 1 / (32 * 512 * 512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_point_the_same_way(dtype: torch.dtype):
    """One call, so that both see the same latents; the VAE stays in float32, as Stable Diffusion's needs to."""
    plan = Plan(T=1, train=frozenset({0}))
    assert cosine(half_gradient(dtype, plan, MEAN_OF_32_PICTURES), half_gradient(torch.float32, plan, 1.0)) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_chains_lose_nothing_to_small_cotangents(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    plan = methods.drtune(2, 2)(6, Random(0))
    large, small = half_gradient(dtype, plan, 1.0), half_gradient(dtype, plan, MEAN_OF_32_PICTURES)
    assert cosine(small, large) > 1 - 1e-6
    if dtype == torch.float16:
        assert cosine(small, half_gradient(torch.float32, plan, 1.0)) > 0.999
        monkeypatch.setattr("rewardtune.engine.tape._power_of_two", lambda cotangent: 1.0)
        try:
            unscaled = cosine(half_gradient(dtype, plan, MEAN_OF_32_PICTURES), large)
        except TrainingStopped:
            unscaled = 0.0  # not one non-zero value was left
        assert unscaled < 0.99


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# Per-step norms and reports -------------------------------------------------------------------------------------------


def test_steps_that_ran_are_counted(sd):
    pipe, call = sd
    ran = []
    pipe.unet.register_forward_hook(lambda *_: ran.append(1))
    plan = Plan(T=4, train=frozenset({0, 2}), end=2)
    result = sweep(pipe, plan, call)
    assert (result.trained, result.steps_run, result.replay_error) == ((0, 2), 3, 0.0)
    assert len(ran) == 3 + 2  # forwards while sampling, and one replay for each trained step


def test_draft_lv_answers_earlier_steps_without_the_network(sd):
    pipe, call = sd
    ran = []
    pipe.unet.register_forward_hook(lambda *_: ran.append(1))
    with rollout(pipe, methods.draft_lv(3)(4, Random(0)), **call) as tape:
        assert len(ran) == 4 + 3
        assert len(tape.images) == len(tape.prompts) == 3 * len(call["prompt"])
        assert tape.prompts == call["prompt"] * 3
        assert (tape.images[0] - tape.images[len(call["prompt"])]).abs().max() > 1e-4  # fresh noise for each draw


def test_erratum_4_early_steps_are_amplified_for_vp_and_not_for_flow():
    """dL/dx_t = (prod_{s<=t} a_s) dL/dx_0: 13.15 for DDIM-50 with Stable Diffusion's betas, 1 for flow matching."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    def gradient_at_noise(scheduler) -> float:
        scheduler.set_timesteps(50)
        noise = torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
        return float(torch.autograd.grad(x.sum(), noise)[0])

    sd_betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    vp = DDIMScheduler(**sd_betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    assert gradient_at_noise(vp) == pytest.approx(13.15, rel=0.02)
    assert gradient_at_noise(FlowMatchEulerDiscreteScheduler()) == pytest.approx(1.0)


# Sabotage: refused, not averaged over ---------------------------------------------------------------------------------


class Restless:
    """An attention processor that answers differently each time."""

    def __init__(self, inner) -> None:
        self.inner, self.count = inner, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.inner(*args, **kwargs) * (1 + 0.01 * self.count)


def test_a_processor_that_changes_is_refused(sd):
    pipe, call = sd
    pipe.unet.set_attn_processor(Restless(next(iter(pipe.unet.attn_processors.values()))))
    with pytest.raises(ReplayError, match="differs from the recorded one"):
        sweep(pipe, LAST, call)


def test_processors_set_after_sampling_do_not_reach_the_replay(sd):
    """PAG pipelines swap their processors back at the end of the call: each call is replayed with its own."""
    pipe, call = sd
    _, expected, _ = engine_gradient(pipe, LAST, call)
    others = {name: Restless(p) for name, p in pipe.unet.attn_processors.items()}
    with rollout(pipe, LAST, seed=0, **tiny.fresh(call)) as tape:
        pipe.unet.set_attn_processor(dict(others))
        tape.backward(oracle.generic_loss(tape.images))
    found = {n: p.grad for n, p in pipe.unet.named_parameters() if p.requires_grad}
    assert oracle.difference(found, expected) == 0
    assert all(pipe.unet.attn_processors[name] is others[name] for name in others)


def test_an_argument_changed_in_place_is_refused(sd):
    pipe, call = sd

    def spoil(pipe, step, timestep, given):
        given["prompt_embeds"].mul_(1.5)
        return given

    spoiled = {"callback_on_step_end": spoil, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ReplayError, match="changed in place"):
        sweep(pipe, Plan(T=4, train=frozenset({0})), {**call, **spoiled})


def test_weights_changed_between_sampling_and_sweep_are_refused(sd):
    pipe, call = sd
    with rollout(pipe, LAST, **call) as tape:
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.1)
        with pytest.raises(ReplayError, match="is not a function of its arguments"):
            tape.backward(oracle.generic_loss(tape.images))


class Cache:
    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


def test_a_cache_that_travels_with_the_call_is_refused(sd):
    pipe, call = sd
    cache, forward = Cache(), pipe.unet.forward

    def cached(*args, **kwargs):
        kwargs.pop("cross_attention_kwargs", None)
        cache.keys.append(args[0])
        return forward(*args, **kwargs)

    pipe.unet.forward = cached
    with pytest.raises(PreflightError, match="Cache that holds tensors"):
        sweep(pipe, LAST, {**call, "cross_attention_kwargs": {"cache": cache}})


def test_a_caching_hook_is_refused_by_name():
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    pipe, call = tiny.flux()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PreflightError, match="reuses results between steps"):
        preflight(pipe, **call)


def test_dropout_is_replayed_exactly(sd):
    pipe, call = sd
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    pipe.unet.train()
    assert sweep(pipe, ALL, call).replay_error == 0


# What is put back -----------------------------------------------------------------------------------------------------


def attributes(pipe) -> dict:
    owners = {"pipe": pipe, "scheduler": pipe.scheduler, **pipe.components}
    names = ("_compiled_call_impl", "decode", "step", "set_timesteps", "safety_checker", "_progress_bar_config")
    return {
        (key, name): owner.__dict__.get(name, "absent")
        for key, owner in owners.items()
        if hasattr(owner, "__dict__")
        for name in names
    }


def fails_in_the_network(pipe, call, error):
    def hook(*_):
        raise error

    handle = pipe.unet.register_forward_hook(hook)
    try:
        sweep(pipe, LAST, call)
    finally:
        handle.remove()


def fails_in_the_reward(pipe, call, error):
    with rollout(pipe, LAST, **call):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("fail", [fails_in_the_network, fails_in_the_reward])
def test_doors_are_restored_after_a_failure(sd, fail, error):
    pipe, call = sd
    pipe.safety_checker = lambda *_, **__: pytest.fail("the safety checker ran")
    before, images = attributes(pipe), None
    pipe.safety_checker = None
    images = pipe(**tiny.fresh(call), output_type="pt")[0]
    pipe.safety_checker = before["pipe", "safety_checker"]
    with pytest.raises(type(error)):
        fail(pipe, tiny.fresh(call), error)
    assert attributes(pipe) == before
    assert torch.is_grad_enabled()
    pipe.safety_checker = None
    assert torch.equal(pipe(**tiny.fresh(call), output_type="pt")[0], images)


def test_doors_are_restored_after_success(sd):
    pipe, call = sd
    before = attributes(pipe)
    sweep(pipe, ALL, call)
    assert attributes(pipe) == before


def test_a_failed_sweep_leaves_the_gradients_as_they_were(sd):
    pipe, call = sd
    sweep(pipe, LAST, call)
    parameters = tiny.trainable(pipe)
    before = {n: p.grad.clone() for n, p in parameters.items()}
    with rollout(pipe, ALL, **call) as tape:
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.1)
        with pytest.raises(ReplayError):
            tape.backward(oracle.generic_loss(tape.images))
    assert all(torch.equal(p.grad, before[n]) for n, p in parameters.items())


def test_the_global_generator_is_restored(sd):
    pipe, call = sd
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sweep(pipe, LAST, {k: v for k, v in call.items() if k != "generator"})
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_vae_is_not_needed(sd):
    """Networks that are not tuned get no gradient even if their parameters ask for one, as after from_pretrained."""
    pipe, call = sd
    for module in (pipe.vae, pipe.text_encoder):
        module.requires_grad_(True)
    sweep(pipe, ALL, call)
    assert all(p.grad is None and p.requires_grad for m in (pipe.vae, pipe.text_encoder) for p in m.parameters())


# What is refused ------------------------------------------------------------------------------------------------------


def test_modular_pipelines_are_refused():
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    with pytest.raises(PreflightError, match="modular pipelines"):
        find_denoiser(StableDiffusionXLAutoBlocks().init_pipeline())


def test_pipelines_of_several_stages_are_refused(sd):
    pipe, call = sd

    class TwoStages(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    with pytest.raises(PreflightError, match="more than one stage"):
        count_steps(TwoStages(**{**pipe.components, "requires_safety_checker": False}), **call)


def test_sequential_offload_is_refused(sd):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe, call = sd
    add_hook_to_module(pipe.unet.conv_in, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    with pytest.raises(PreflightError, match="enable_model_cpu_offload"):
        count_steps(pipe, **call)


def test_inference_mode_is_refused(sd):
    pipe, call = sd
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        count_steps(pipe, **call)


def test_a_pipeline_without_trainable_parameters_is_refused(sd):
    pipe, call = sd
    pipe.unet.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        sweep(pipe, LAST, call)


def test_a_plan_for_another_number_of_steps_is_refused(sd):
    pipe, call = sd
    with pytest.raises(PreflightError, match="T = count_steps"):
        sweep(pipe, Plan(T=7, train=frozenset({6})), call)


def test_a_number_of_steps_the_scheduler_cannot_do(sd):
    pipe, call = sd
    with pytest.raises(ConfigError, match="num_inference_steps=2000"):
        count_steps(pipe, **{**call, "num_inference_steps": 2000})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x: x.mean(dim=(1, 2, 3)), "scalar"),
        (lambda x: x.detach().mean(), "requires_grad=False"),
        (lambda x: torch.ones((), requires_grad=True), "does not depend on tape.images"),
        (lambda x: (x.mean() * 0).sqrt(), "not finite"),
        (lambda x: (x * 0).sum(), "is zero"),
    ],
)
def test_losses_without_a_gradient_are_refused(sd, loss, words: str):
    pipe, call = sd
    with rollout(pipe, LAST, **call) as tape, pytest.raises(RewardError, match=words):
        tape.backward(loss(tape.images))


def test_a_tape_is_swept_once(sd):
    pipe, call = sd
    with rollout(pipe, LAST, **call) as tape:
        tape.backward(oracle.generic_loss(tape.images))
        with pytest.raises(ConfigError, match="swept"):
            tape.backward(oracle.generic_loss(tape.images))


# Preflight ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_preflight_passes_on_every_family(family: str):
    pipe, call = tiny.BUILDERS[family]()
    facts = preflight(pipe, **call)
    assert facts.T == count_steps(pipe, **call) == 4
    assert facts.early_stop
    assert facts.calls_per_step == (2 if family == "flux" else 1)
    assert all(p.grad is None for p in tiny.trainable(pipe).values())


@pytest.mark.parametrize(("scheduler", "T"), [("HeunDiscreteScheduler", 11), ("LCMScheduler", 6), ("DDIMScheduler", 6)])
def test_T_is_the_number_of_scheduler_steps(sd, scheduler: str, T: int):
    pipe, call = sd
    tiny.set_scheduler(pipe, scheduler)
    assert count_steps(pipe, **{**call, "num_inference_steps": 6}) == T


def test_a_scheduler_without_x0_hat_is_refused_for_early_stop_only(sd):
    pipe, call = sd
    tiny.set_scheduler(pipe, "IPNDMScheduler")
    with pytest.raises(PreflightError, match="no known x0-hat"):
        preflight(pipe, **call)
    facts = preflight(pipe, early_stop=False, **call)
    assert not facts.early_stop
    assert "no early stop" in facts.notes[-1]


# Each of these was silently wrong once -----------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"])
def test_restarted_chains_see_the_first_chains_noise_without_a_generator(scheduler: str):
    """Without `generator` latents come from the global one: a restarted chain must start from the same ones."""
    pipe, call = tiny.stable_diffusion(steps=6)
    tiny.set_scheduler(pipe, scheduler)
    call.pop("generator")
    plan = Plan(T=6, train=frozenset({4, 5}), start=4)
    step, histories = pipe.scheduler.step, []
    pipe.scheduler.step = functools.wraps(step)(
        lambda *args, **kwargs: histories.append(args[2].clone()) or step(*args, **kwargs)
    )
    with rollout(pipe, plan, seed=0, **call):
        pass
    first, again = histories[:6], histories[6:]
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    assert not torch.equal(first[4], again[4])  # here the finished picture, re-noised, takes over


@pytest.mark.parametrize("end", [None, 2])
def test_a_plan_for_another_T_is_refused_with_an_early_stop_too(sd, end):
    pipe, call = sd
    with pytest.raises(PreflightError, match=r"plan is for T=7 steps but .* took 4"):
        sweep(pipe, Plan(T=7, train=frozenset({1}), end=end), call)


def test_the_loss_may_come_in_chunks(sd):
    pipe, call = sd
    _, whole, _ = engine_gradient(pipe, LAST, call)
    with rollout(pipe, LAST, seed=0, **tiny.fresh(call)) as tape:
        half = tape.images.detach().clone().requires_grad_()
        oracle.generic_loss(half).backward()
        for i, gradient in enumerate(half.grad):
            (tape.images[i] * gradient).sum().backward()
        tape.backward()
    found = {n: p.grad for n, p in tiny.trainable(pipe).items()}
    assert oracle.difference(found, whole) < 1e-6


def test_a_loss_leaves_other_parameters_alone(sd):
    pipe, call = sd
    judge = nn.Conv2d(3, 1, 3)
    with rollout(pipe, LAST, **call) as tape:
        tape.backward(judge(tape.images).mean())
    assert all(p.grad is None for p in judge.parameters())


def test_counting_and_preflight_leave_the_generator_where_it_was(sd):
    pipe, call = sd
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    single = {**call, "prompt": call["prompt"][0], "generator": generator}
    count_steps(pipe, **single)
    preflight(pipe, **single)
    assert torch.equal(generator.get_state(), state)


def test_norms_of_several_draws_are_those_of_their_sum(sd):
    pipe, call = sd
    plan = Plan(T=4, train=frozenset({2, 3}), start=2, draws=3)
    _, gradient, result = engine_gradient(pipe, plan, call)
    alone = []
    for step in (2, 3):
        _, part, report = engine_gradient(pipe, Plan(T=4, train=frozenset({step}), start=2, draws=3), call)
        assert result.grad_norms[step] == pytest.approx(report.grad_norms[step], rel=1e-5)
        alone.append(part)
    assert oracle.difference({n: a + alone[1][n] for n, a in alone[0].items()}, gradient) < 1e-6


def test_a_satisfied_hinge_can_be_allowed(sd):
    pipe, call = sd
    with rollout(pipe, LAST, **call) as tape:
        result = tape.backward((tape.images * 0).sum(), allow_zero=True)
    assert result.grad_norms == {3: 0.0}
    assert all(p.grad is None for p in tiny.trainable(pipe).values())


def test_a_rollout_under_no_grad_still_records(sd):
    pipe, call = sd
    with torch.no_grad(), rollout(pipe, LAST, seed=0, **tiny.fresh(call)) as tape, torch.enable_grad():
        tape.backward(oracle.generic_loss(tape.images))
    assert all(p.grad is not None for p in tiny.trainable(pipe).values())


def test_large_pictures_are_decoded_with_checkpointing(sd, monkeypatch: pytest.MonkeyPatch):
    pipe, call = sd
    _, expected, _ = engine_gradient(pipe, LAST, call)
    monkeypatch.setattr("rewardtune.engine.doors.DECODE_PIXELS", 16)
    switched = []
    monkeypatch.setattr(pipe.vae, "enable_gradient_checkpointing", lambda: switched.append("on"))
    monkeypatch.setattr(pipe.vae, "disable_gradient_checkpointing", lambda: switched.append("off"))
    _, found, _ = engine_gradient(pipe, LAST, call)
    assert switched == ["on", "off"]
    monkeypatch.undo()
    monkeypatch.setattr("rewardtune.engine.doors.DECODE_PIXELS", 16)
    _, really, _ = engine_gradient(pipe, LAST, call)
    assert oracle.difference(found, expected) < 1e-5
    assert oracle.difference(really, expected) < 1e-5
    assert not pipe.vae.is_gradient_checkpointing


class Misfit(StableDiffusionPipeline):
    """Stable Diffusion with one `fault`."""

    fault = ""
    noise = torch.Generator()

    def __call__(self, *args, output_type="pil", **kwargs):
        images = super().__call__(*args, output_type=output_type, **kwargs)[0]
        if self.fault == "noise of its own":
            images = images + 0.01 * float(torch.rand((), generator=self.noise))
        if self.fault == "answers the doors" and "step" in vars(self.scheduler):
            images = images + 0.01
        if self.fault == "leaves an attribute":
            self.unet.left = object()
        if self.fault == "another range" and output_type == "pt":
            images = 0.5 * images
        return (images,)


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        ("noise of its own", {}, "does not repeat itself with equal seeds"),
        ("answers the doors", {}, "renders other pictures with the doors open"),
        ("leaves an attribute", {}, "pipe.unet.left is not what it was"),
        ("another range", {}, "'pt' and 'np' are different pictures"),
        ("", {"denoiser": "vae"}, "pipe.vae is not called between scheduler steps"),
    ],
)
def test_preflight_refuses_a_pipeline_that_does_not_hold_still(sd, fault: str, settings: dict, words: str):
    pipe, call = sd
    misfit = tiny.quiet(Misfit(**{**pipe.components, "requires_safety_checker": False}))
    misfit.fault = fault
    with pytest.raises(PreflightError, match=words):
        preflight(misfit, **settings, **call)


def test_preflight_refuses_a_gradient_that_is_not_that_of_one_graph(sd, monkeypatch: pytest.MonkeyPatch):
    pipe, call = sd
    monkeypatch.setattr(Plan, "gradient_into", lambda plan, step: 0.5 * plan.input_gradient)
    with pytest.raises(PreflightError, match="differs from that of one autograd graph by"):
        preflight(pipe, **call)


def test_preflight_takes_the_name_of_the_denoiser(sd):
    pipe, call = sd
    assert preflight(pipe, denoiser="unet", **call).denoiser == "unet"
    with pytest.raises(PreflightError, match="no denoiser named transformer"):
        preflight(pipe, denoiser="transformer", **call)


def test_a_decoder_in_float32_beside_a_bfloat16_denoiser(sd):
    pipe, call = sd
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    for p in tiny.trainable(pipe).values():
        p.data = p.data.float()
    facts = preflight(pipe, **call)
    assert facts.T == 4
    assert pipe.vae.dtype == torch.float32
    assert "decode" not in pipe.vae.__dict__


def test_a_flat_batch_in_half_precision_is_allowed_too(sd):
    pipe, call = sd
    pipe.unet.to(torch.float16)
    pipe.text_encoder.to(torch.float16)
    for p in tiny.trainable(pipe).values():
        p.data = p.data.float()
    with rollout(pipe, LAST, **call) as tape:
        assert tape.backward((tape.images * 0).sum(), allow_zero=True).grad_norms == {3: 0.0}


def test_records_are_freed_as_they_are_swept(sd, monkeypatch: pytest.MonkeyPatch):
    pipe, call = sd
    alive, replay = [], Call.replay
    with rollout(pipe, ALL, **call) as tape:
        records = [weakref.ref(recorded) for recorded in tape._calls]

        def counted(self, frozen, **settings):
            alive.append(sum(record() is not None for record in records))
            return replay(self, frozen, **settings)

        monkeypatch.setattr(Call, "replay", counted)
        tape.backward(oracle.generic_loss(tape.images))
    assert alive == [5, 4, 3, 2, 1]  # the decoder and four network calls
