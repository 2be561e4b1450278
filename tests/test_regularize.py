"""The regularisers, against plain autograd of the written formula."""

from __future__ import annotations

import contextlib
import copy
import inspect

import judge
import oracle
import pytest
import tiny
import torch
from torch.utils import _pytree as pytree

from rewardtune.engine import rollout
from rewardtune.engine.call import adapters_off
from rewardtune.errors import ConfigError, TrainingStopped
from rewardtune.gradient import derive_seed
from rewardtune.plan import Plan
from rewardtune.prediction import noised, x0_hat
from rewardtune.regularize import Denoising, DenoisingLoss, _pixels, read_captions, target

KL = 0.7

# KL to the base model -------------------------------------------------------------------------------------------------


def term(pipe, plan: Plan, call: tiny.Call, *, base) -> tuple[torch.Tensor, int]:
    """D = mean over trained calls of mean (F(x) - F_ref(x))^2, x detached: by plain autograd along the chain.

    The pipeline's denoiser is replaced by a function that adds up the formula; `base` is another network altogether,
    the pipeline's own without any adapter. The chain ends by itself or by an exception at the plan's early stop.
    """
    network = tiny.denoiser_of(pipe)
    forward, step = network.forward, pipe.scheduler.step
    terms, count = [], [0]

    def watched(*args, **kwargs):
        with torch.no_grad():
            output = forward(*args, **kwargs)
        if count[0] in plan.train:
            with torch.no_grad():
                reference = base(*args, **kwargs)[0]
            with torch.enable_grad():
                terms.append((forward(*args, **kwargs)[0] - reference).square().mean())
        return output

    class Stop(Exception):  # noqa: N818
        pass

    def counted(*args, **kwargs):
        if count[0] == plan.end:
            raise Stop
        count[0] += 1
        return step(*args, **kwargs)

    counted.__signature__ = inspect.signature(step)
    network.forward, pipe.scheduler.step = watched, counted
    torch.manual_seed(0)
    try:
        with contextlib.suppress(Stop):
            pipe(**tiny.fresh(call), output_type="latent")
    finally:
        del network.forward, pipe.scheduler.step
    return torch.stack(terms).mean(), len(terms)


def without_adapters(pipe):
    """The base network as an object of its own, made by peft's own removal of the adapter."""
    base = copy.deepcopy(tiny.denoiser_of(pipe))
    base.unload_lora()
    return base


def swept(pipe, plan, call, *, factor=1.0, **options):
    parameters = tiny.trainable(pipe)
    for p in parameters.values():
        p.grad = None
    with rollout(pipe, plan, seed=0, **tiny.fresh(call)) as tape:
        result = tape.backward(factor * oracle.generic_loss(tape.images), **options)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found, result


PLANS = {
    "drtune, early stop": Plan(T=4, train=frozenset({0, 2, 3}), end=2),
    "draft-3, nested": Plan(T=4, train=frozenset({1, 2, 3}), input_gradient=1.0),
    "half of the input gradient, early stop": Plan(T=4, train=frozenset({0, 1, 2}), input_gradient=0.5, end=2),
}


@pytest.mark.parametrize("name", ["sd-v", "sd3", "flux", "sd-controlnet"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_kl_is_the_gradient_of_the_written_formula(name: str, plan: Plan):
    """Guided calls hold both halves (sd, sd3) or come in twos (flux): every raw output of a trained call counts."""
    if name == "sd-controlnet" and plan.input_gradient == 0:
        pytest.skip("an auxiliary network is on the tape in nested plans only")
    pipe, call = tiny.BUILDERS[name]()
    with tiny.double(pipe, call):
        base = without_adapters(pipe)
        D, calls = term(pipe, plan, call, base=base)
        assert calls == (2 if name == "flux" else 1) * len(plan.executed)
        exact = oracle.gradients(tiny.trainable(pipe), D)
        plain, _ = swept(pipe, plan, call)
        both, result = swept(pipe, plan, call, kl=KL)
        assert result.kl == pytest.approx(float(D.detach()), rel=1e-9)
        added = {n: both[n] - plain[n] for n in both}
        assert oracle.difference(added, {n: KL * g for n, g in exact.items()}) < 1e-7
        # and together it is the whole objective, as the oracle writes it
        _, reward = judge.literal(pipe, plan, call)
        assert oracle.difference(both, {n: reward[n] + KL * exact[n] for n in both}) < 1e-7


def test_kl_counts_every_draw_of_draft_lv():
    pipe, call = tiny.stable_diffusion()
    plan = Plan(T=4, train=frozenset({3}), start=3, draws=2)
    with tiny.double(pipe, call):
        base, terms = without_adapters(pipe), []
        with rollout(pipe, plan, seed=0, **tiny.fresh(call)) as tape:
            for record in (c for c in tape._calls if c.trained):
                args, kwargs = pytree.tree_unflatten(record.inputs, record.spec)
                reference = base(*args, **kwargs)[0].detach()
                terms.append((pipe.unet(*args, **kwargs)[0] - reference).square().mean())
        first, second = terms
        assert float(first.detach()) != pytest.approx(float(second.detach()), rel=1e-3)
        D = (first + second) / 2
        exact = oracle.gradients(tiny.trainable(pipe), D)
        plain, (both, result) = swept(pipe, plan, call)[0], swept(pipe, plan, call, kl=KL)
        assert result.kl == pytest.approx(float(D.detach()), rel=1e-9)
        assert oracle.difference({n: both[n] - plain[n] for n in both}, {n: KL * g for n, g in exact.items()}) < 1e-7


def test_without_weight_nothing_changes():
    pipe, call = tiny.stable_diffusion()
    ran = []
    pipe.unet.register_forward_hook(lambda *_: ran.append(1))
    plan = PLANS["draft-3, nested"]
    plain, _ = swept(pipe, plan, call)
    forwards = len(ran)
    zero, result = swept(pipe, plan, call, kl=0.0)
    assert all(torch.equal(plain[n], zero[n]) for n in plain)
    assert len(ran) == 2 * forwards
    assert result.kl is None
    swept(pipe, plan, call, kl=KL)
    assert len(ran) == 3 * forwards + 3  # one more for each trained call


def test_kl_acts_where_the_reward_is_flat():
    pipe, call = tiny.stable_diffusion()
    plan = PLANS["drtune, early stop"]
    with_reward, _ = swept(pipe, plan, call)
    both, _ = swept(pipe, plan, call, kl=KL)
    alone, result = swept(pipe, plan, call, factor=0.0, allow_zero=True, kl=KL)
    assert result.kl > 0
    assert oracle.difference(alone, {n: both[n] - with_reward[n] for n in both}) < 1e-4
    with torch.no_grad():
        for p in tiny.trainable(pipe).values():
            p.zero_()  # the base model itself: distance and gradient are exactly zero, and that is no error
    flat, result = swept(pipe, plan, call, factor=0.0, allow_zero=True, kl=KL)
    assert result.kl == 0.0
    assert not any(g.any() for g in flat.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1e-9, 1.0])
def test_the_half_precision_scale_does_not_touch_the_kl_term(dtype: torch.dtype, factor: float):
    """A reward of 1e-9 asks for a scale of 2^30, in which float16 would overflow on the KL term's cotangent."""
    plan = Plan(T=1, train=frozenset({0}))

    def gradient(kind: torch.dtype, **options):
        pipe, call = tiny.stable_diffusion(steps=1, lora=False)
        tiny.liven(pipe.unet, seed=5, gain=0.5)
        for module in (pipe.unet, pipe.text_encoder):
            for p in module.parameters():
                p.data = p.data.to(torch.bfloat16).to(kind)
        tiny.add_lora(pipe.unet)
        for p in tiny.trainable(pipe).values():
            p.data = p.data.float()
        found, result = swept(pipe, plan, call, **options)
        return torch.cat([g.flatten() for g in found.values()]).double(), result

    exact, wide = gradient(torch.float32, factor=factor, kl=KL)
    found, half = gradient(dtype, factor=factor, kl=KL)
    assert half.kl == pytest.approx(wide.kl, rel=0.02)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.999
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def state(network):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    flags = {n: p.requires_grad for n, p in network.named_parameters()}
    return [(layer.disable_adapters, layer.active_adapter) for layer in layers], flags


def test_adapters_come_back_as_they_were():
    pipe, _ = tiny.stable_diffusion()
    frozen = next(iter(tiny.trainable(pipe).values())).requires_grad_(False)  # peft's own switch would thaw it
    before = state(pipe.unet)
    with adapters_off(pipe.unet):
        assert all(off for off, _ in state(pipe.unet)[0])
        with adapters_off(pipe.unet):
            pass
        assert all(off for off, _ in state(pipe.unet)[0])  # an inner block leaves what it found
    assert state(pipe.unet) == before
    assert not frozen.requires_grad


def test_adapters_come_back_after_an_error():
    pipe, call = tiny.stable_diffusion()
    before, grads = state(pipe.unet), {}
    calls = []

    def fails_without_adapters(*_):
        calls.append(state(pipe.unet)[0][0][0])
        if calls[-1]:
            raise RuntimeError("no memory")

    pipe.unet.register_forward_hook(fails_without_adapters)
    for n, p in tiny.trainable(pipe).items():
        p.grad = grads[n] = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="no memory"), rollout(pipe, Plan(T=4, train=frozenset({3})), **call) as tape:
        tape.backward(oracle.generic_loss(tape.images), kl=KL)
    assert calls == [False] * 4 + [True]
    assert state(pipe.unet) == before
    assert all(p.grad is grads[n] for n, p in tiny.trainable(pipe).items())


def test_whole_weights_need_a_frozen_copy():
    pipe, call = tiny.stable_diffusion_full()
    plan = PLANS["drtune, early stop"]
    with tiny.double(pipe, call):
        base = copy.deepcopy(pipe.unet).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in pipe.unet.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        with pytest.raises(ConfigError, match="frozen copy"):
            swept(pipe, plan, call, kl=KL)
        D, _ = term(pipe, plan, call, base=base)
        exact = oracle.gradients(tiny.trainable(pipe), D)
        plain, _ = swept(pipe, plan, call)
        both, result = swept(pipe, plan, call, kl=KL, reference=base)
        assert result.kl == pytest.approx(float(D.detach()), rel=1e-9)
        assert oracle.difference({n: both[n] - plain[n] for n in both}, {n: KL * g for n, g in exact.items()}) < 1e-7


@pytest.mark.parametrize("kl", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(kl: float):
    pipe, call = tiny.stable_diffusion()
    with pytest.raises(ConfigError, match="KL term"):
        swept(pipe, Plan(T=4, train=frozenset({3})), call, kl=kl)


def test_an_underflowing_reward_is_still_an_error():
    pipe, call = tiny.stable_diffusion()
    with torch.no_grad():
        for p in tiny.trainable(pipe).values():
            p.zero_()  # both factors zero: no gradient arrives, whatever the loss
    with pytest.raises(TrainingStopped, match="zero everywhere"):
        swept(pipe, Plan(T=4, train=frozenset({3})), call, kl=KL)


# The denoising loss ---------------------------------------------------------------------------------------------------

SCHEDULERS = [("DDIMScheduler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction", "sample")] + [
    ("EulerDiscreteScheduler", {"prediction_type": "epsilon"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}),
    ("PNDMScheduler", {"prediction_type": "v_prediction", "skip_prk_steps": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("EDMEulerScheduler", {}),
]


@pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=lambda x: x if isinstance(x, str) else str([*x.values()]))
def test_the_target_is_what_gives_the_clean_latent_back(name: str, config: dict):
    """x0-hat of the target is x0: `prediction.x0_hat` is tested against the schedulers' own."""
    import diffusers

    betas = {} if name.startswith(("FlowMatch", "EDM")) else tiny.BETAS
    scheduler = getattr(diffusers, name)(**betas, **config)
    if name == "DDIMScheduler":
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    x0, noise, x = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3))
    for i, t in enumerate(scheduler.timesteps[:7]):
        if i and not (hasattr(type(scheduler), "state_in_first_order") and i % 2):
            noisy = noised(scheduler, x0, noise, timestep=t)
            F = target(scheduler, x0, noise, t)
            assert x0_hat(scheduler, noisy, F, timestep=t) == pytest.approx(x0, abs=2e-3)
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]


def by_hand(pipe, loss: DenoisingLoss, step: int, size: int) -> torch.Tensor:
    """weight * mean (F - F*)^2 for pipelines of the Stable Diffusion kind and SD3, written out; no engine, no doors."""
    x0, noise, captions = loss.draw(step, first=0, size=size)
    pipe.scheduler.set_timesteps(loss.call["num_inference_steps"])
    t = pipe.scheduler.timesteps[loss.step_of(step)]
    if hasattr(pipe, "transformer"):
        sigma = pipe.scheduler.sigmas[loss.step_of(step)]
        text, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, num_images_per_prompt=1
        )
        x = (1 - sigma) * x0 + sigma * noise
        F = pipe.transformer(x, timestep=t.expand(size), encoder_hidden_states=text, pooled_projections=pooled)[0]
        return loss.weight * (F - (noise - x0)).square().mean()
    text, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    a = pipe.scheduler.alphas_cumprod[t] ** 0.5
    s = (1 - a**2) ** 0.5
    F = pipe.unet(a * x0 + s * noise, t, encoder_hidden_states=text)[0]
    v = pipe.scheduler.config.prediction_type == "v_prediction"
    return loss.weight * (F - (a * noise - s * x0 if v else noise)).square().mean()


def prepared(pipe, call: tiny.Call, **settings) -> DenoisingLoss:
    settings = {"weight": 0.3, "count": 6, **settings}
    kept = {k: v[0] if isinstance(v, list) else v for k, v in call.items() if k not in ("prompt", "generator")}
    return Denoising(**settings).prepare(pipe, tiny.PROMPTS, call=kept, seed=5)


def added(pipe, loss: DenoisingLoss, *parts: tuple[int, int], step: int, batch: int):
    parameters = tiny.trainable(pipe)
    for p in parameters.values():
        p.grad = None
    values = [loss.add(step, first=first, size=size, batch=batch) for first, size in parts]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}, values


def playground_pipe(*, steps: int = 5):
    from rewardtune import playground

    pipe = playground.pipeline()
    pipe.unet.requires_grad_(False)
    tiny.add_lora(pipe.unet)
    return pipe, {"num_inference_steps": steps, "guidance_scale": 4.0}


@pytest.mark.parametrize("name", ["playground", "sd", "sd3"])
def test_denoising_is_the_gradient_of_the_written_formula(name: str):
    """v-prediction, epsilon and flow; the pipelines are called with guidance, which this loss switches off."""
    pipe, call = playground_pipe() if name == "playground" else tiny.BUILDERS[name](steps=5)
    loss = prepared(pipe, call)
    assert len({loss.step_of(step) for step in range(8)} & {1, 2}) == 2  # t / T = 0.8 and 0.6 of five steps
    for step in (0, 1):
        exact = by_hand(pipe, loss, step, 3)
        gradient, [value] = added(pipe, loss, (0, 3), step=step, batch=3)
        assert loss.weight * value == pytest.approx(float(exact.detach()), rel=1e-4)
        assert oracle.difference(gradient, oracle.gradients(tiny.trainable(pipe), exact)) < 1e-4
        halves, _ = added(pipe, loss, (0, 2), (2, 1), step=step, batch=3)  # whatever the micro-batches
        assert oracle.difference(halves, gradient) < 1e-4


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd-pag"])
def test_the_network_is_called_as_the_pipeline_does(name: str):
    """Packed latents and two calls a step (flux), scaled inputs (Euler), a perturbed branch (PAG): one row a sample."""
    pipe, call = tiny.BUILDERS[name]()
    loss = prepared(pipe, call, noise_range=(0.5, 1.0))
    x0, noise, _ = loss.draw(0, first=0, size=2)
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    tiny.denoiser_of(pipe).register_forward_pre_hook(keep, with_kwargs=True)
    gradient, [value] = added(pipe, loss, (0, 2), step=0, batch=2)
    assert any(g.any() for g in gradient.values())
    assert 0 < value < 100
    i = loss.step_of(0)
    if name == "flux":
        sigma = pipe.scheduler.sigmas[i]
        x = (1 - sigma) * x0 + sigma * noise
    elif name == "sdxl":
        sigma = pipe.scheduler.sigmas[i]
        x = (x0 + sigma * noise) / (sigma**2 + 1) ** 0.5
    else:
        a = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[i]] ** 0.5
        x = a * x0 + (1 - a**2) ** 0.5 * noise
    assert len(seen) == 3  # an early step that stands for all others, the step itself, and its replay
    assert seen[1].shape == x.shape
    assert torch.allclose(seen[1], x, atol=1e-5)


@pytest.mark.slow
def test_the_loss_falls_when_it_is_trained_on():
    pipe, call = tiny.stable_diffusion(steps=5)
    loss = prepared(pipe, call, weight=1.0, count=4)
    optimizer = torch.optim.Adam(tiny.trainable(pipe).values(), lr=3e-2)

    def on_fixed_draws() -> float:
        return sum(float(by_hand(pipe, loss, step, 4).detach()) for step in (100, 101, 102))

    before = on_fixed_draws()
    for step in range(20):
        optimizer.zero_grad()
        loss.add(step, first=0, size=4, batch=4)
        optimizer.step()
    assert on_fixed_draws() < 0.85 * before


def test_the_set_comes_from_the_base_model():
    """Sampled with the adapters off, so a resumed run has the same set; and it is what the pipeline draws itself."""
    pipe, call = tiny.stable_diffusion()
    loss = prepared(pipe, call)
    base = without_adapters(pipe)
    tuned, pipe.unet = pipe.unet, base
    again = prepared(pipe, call)
    assert torch.equal(loss.latents, again.latents)
    own = pipe(
        prompt=tiny.PROMPTS[:1],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(derive_seed(5, "denoising set", 0)),
        output_type="latent",
    )[0]
    assert torch.allclose(loss.latents[:1], own, rtol=1e-3, atol=1e-3)  # another batch size: other round-off
    pipe.unet = tuned
    assert loss.captions[:3] == [*tiny.PROMPTS, tiny.PROMPTS[0]]


def test_a_kept_set_is_read_back_and_guarded(tmp_path):
    pipe, call = tiny.stable_diffusion()
    kept = {k: v for k, v in call.items() if k not in ("prompt", "generator")}
    settings, file = Denoising(weight=1.0, count=2), tmp_path / "set.safetensors"
    made = settings.prepare(pipe, tiny.PROMPTS, call=kept, seed=0, file=file)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.zero_()  # the base model is gone
    read = settings.prepare(pipe, tiny.PROMPTS, call=kept, seed=0, file=file)
    assert torch.equal(made.latents, read.latents)
    assert made.captions == read.captions
    with pytest.raises(ConfigError, match="other settings"):
        settings.prepare(pipe, tiny.PROMPTS, call=kept, seed=1, file=file)
    file.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        settings.prepare(pipe, tiny.PROMPTS, call=kept, seed=0, file=file)


def picture_folder(folder, size: int = 16):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for k in range(2):
        small = torch.randint(0, 255, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}\n")
    return folder


@pytest.mark.parametrize("name", ["playground", "sd", "sd3", "flux"])
def test_pictures_are_encoded_into_the_samplers_layout(name: str, tmp_path):
    """Scaling (sd), shift (sd3) and packing (flux) are inverted without knowing them; here they are written out."""
    pipe, call = playground_pipe() if name == "playground" else tiny.BUILDERS[name]()
    folder = picture_folder(tmp_path, size=64 if name == "playground" else 16)
    loss = prepared(pipe, call, images=folder)
    assert loss.captions == ["picture 0", "picture 1"]
    pixels = torch.cat(
        [_pixels(folder / f"{k}.png", *([64] * 2 if name == "playground" else [16] * 2)) for k in (0, 1)]
    )
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels)
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    config = pipe.vae.config
    x = (z - (config.get("shift_factor") or 0)) * config.scaling_factor
    if name == "flux":
        x = pipe._pack_latents(x, *x.shape)
    assert torch.allclose(loss.latents, x, atol=2e-5 * float(x.abs().max()))
    gradient, _ = added(pipe, loss, (0, 2), step=0, batch=2)
    assert any(g.any() for g in gradient.values())


def test_pictures_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        read_captions(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no picture"):
        read_captions(tmp_path)
    folder = picture_folder(tmp_path)
    (folder / "1.txt").unlink()
    with pytest.raises(ConfigError, match=r"1 of 2 pictures .* \(first: 1.png\)"):
        read_captions(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "listed"}\n')
    assert [text for _, text in read_captions(folder)] == ["picture 0", "listed"]
    (folder / "metadata.jsonl").write_text('{"file": "1.png"}\n')
    with pytest.raises(ConfigError, match="captions cannot be read"):
        read_captions(folder)


@pytest.mark.parametrize(
    "settings", [{"weight": 0}, {"weight": -1}, {"weight": 1, "count": 0}, {"weight": 1, "noise_range": (0.9, 0.2)}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict):
    with pytest.raises(ConfigError, match="denoise"):
        Denoising(**settings)


def test_a_range_without_steps_is_refused():
    pipe, call = tiny.stable_diffusion()
    with pytest.raises(ConfigError, match="holds no step"):
        prepared(pipe, call, noise_range=(0.9, 1.0))  # of four steps: the first alone, which is pure noise


def test_the_engine_is_as_before_after_the_loss():
    pipe, call = tiny.stable_diffusion()
    before, plain = state(pipe.unet), judge.plain_images(pipe, call)
    loss = prepared(pipe, call)
    added(pipe, loss, (0, 2), step=0, batch=2)
    assert state(pipe.unet) == before
    assert torch.equal(judge.plain_images(pipe, call), plain)
