"""The engine against the oracle where the network is not a plain float32 function of its arguments.

Dropout, autocast, half precision, gradient checkpointing, other attention processors: what a replayed call must find
again to be the call that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch

from rewardtune.errors import ConfigError

T = 4
METHODS = ["drtune", "refl", "nested, early stop", "alignprop per step"]


def lora_dropout(pipe: Any) -> None:
    """Dropout before every adapter, switched on: as during training."""
    for module in pipe.unet.modules():
        if hasattr(module, "lora_dropout"):
            for name in module.lora_dropout:
                module.lora_dropout[name] = torch.nn.Dropout(0.2)
    pipe.unet.train()


def checkpointing(pipe: Any) -> None:
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()


def plain_attention(pipe: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())


def nothing_frozen(pipe: Any) -> None:
    """As `from_pretrained` leaves it: the decoder and the text encoder would take gradients."""
    pipe.vae.requires_grad_(True)
    pipe.text_encoder.requires_grad_(True)


MODES: dict[str, Callable[[Any], Any]] = {
    "LoRA dropout": lora_dropout,
    "gradient checkpointing": checkpointing,
    "attention in plain torch": plain_attention,
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "nothing frozen": nothing_frozen,
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "model offloading": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "VAE checkpointing": lambda pipe: pipe.vae.enable_gradient_checkpointing(),
}


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in METHODS if method != "drtune"]


@pytest.mark.parametrize("method", ["drtune", *SLOW])
@pytest.mark.parametrize("mode", MODES)
def test_engine_is_algorithm_1(mode: str, method: str) -> None:
    pipe, call = tiny.stable_diffusion(steps=T)
    MODES[mode](pipe)
    verdict = judge.compare(pipe, judge.PLANS[method](T), call)
    assert verdict.images_equal
    assert verdict.gradient_difference < 1e-5
    assert verdict.result.replay_error < 1e-6  # torch takes another kernel for a weight that requires grad
    others = [*pipe.vae.parameters(), *pipe.text_encoder.parameters()]
    assert all(parameter.grad is None for parameter in others), "only the denoiser's parameters receive a gradient"


@pytest.mark.parametrize("method", [*METHODS, "draft-LV", "drtune, 0.3 of the input gradient"])
@pytest.mark.parametrize("mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES), "as it is"])
def test_kept_graphs_give_the_same_gradient(mode: str, method: str) -> None:
    """recompute=False; the weights of an offloaded denoiser move away from under its graph, so it is refused."""
    pipe, call = tiny.stable_diffusion(steps=T)
    MODES.get(mode, lambda pipe: None)(pipe)
    plan = judge.PLANS[method](T)
    if mode == "model offloading":
        with pytest.raises(ConfigError, match="switch offloading off"):
            judge.engine_gradient(pipe, plan, call, recompute=False)
        return
    pictures, gradient, result = judge.engine_gradient(pipe, plan, call, recompute=False)
    expected, exact, _ = judge.engine_gradient(pipe, plan, call)
    assert torch.equal(pictures, expected) or mode == "attention in plain torch"
    assert float((pictures - expected).abs().max()) < 1e-6  # torch takes another kernel for a weight that requires grad
    assert oracle.difference(gradient, exact) < 1e-6
    assert result.replay_error == 0 or mode in MODES
    others = [*pipe.vae.parameters(), *pipe.text_encoder.parameters()]
    assert all(parameter.grad is None for parameter in others), "only the denoiser's parameters receive a gradient"


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_decoding_one_picture_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures go through the decoder's backward pass in chunks of the batch."""
    from rewardtune.engine import doors

    pipe, call = tiny.BUILDERS[family](steps=T)
    monkeypatch.setattr(doors, "DECODE_PIXELS", 16 * 16)
    for method in METHODS:
        assert judge.compare(pipe, judge.PLANS[method](T), call).gradient_difference < 1e-5


def test_dropout_really_drops() -> None:
    pipe, call = tiny.stable_diffusion(steps=T)
    still = judge.plain_images(pipe, call)
    lora_dropout(pipe)
    assert not torch.equal(judge.plain_images(pipe, call), still)
    assert torch.equal(judge.plain_images(pipe, call), judge.plain_images(pipe, call)), (
        "drawn from the seeded generator"
    )


@pytest.mark.parametrize("sweep", ["outside", "inside"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, sweep: str) -> None:
    """Sampling under autocast, the sweep outside it as torch asks for, or inside as some do.

    The oracle does without autocast's cache of cast weights: with it, literal autograd adds up the gradients of all
    calls in bfloat16 before they reach the adapters; the engine adds them in float32. Nested plans add gradients of one
    latent in bfloat16, each in its own order.
    """
    pipe, call = tiny.stable_diffusion(steps=T)
    plan = judge.PLANS[method](T)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast:
        plain = judge.plain_images(pipe, call)
        if sweep == "inside":
            pictures, gradient, result = judge.engine_gradient(pipe, plan, call)
    if sweep == "outside":
        pictures, gradient, result = judge.engine_gradient(pipe, plan, call, sampling=autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        literal_pictures, literal = judge.literal(pipe, plan, call)
    assert torch.equal(pictures, literal_pictures)
    assert plan.end is not None or torch.equal(pictures, plain.float())
    assert result.replay_error == 0
    assert oracle.difference(gradient, literal) < (1e-5 if plan.input_gradient == 0 else 0.05)
    assert not torch.equal(pictures, judge.engine_gradient(pipe, plan, call)[0]), "autocast was really on"


def half_base(dtype: torch.dtype) -> tuple[Any, tiny.Call, Any]:
    """Frozen weights in half precision, LoRA in float32; and a float32 pipeline with the same, rounded, weights."""
    pipe, call = tiny.stable_diffusion(steps=T)
    same, _ = tiny.stable_diffusion(steps=T)
    for part in (pipe, same):
        part.to(dtype)
    same.to(torch.float32)
    for parameter in tiny.trainable(pipe).values():
        parameter.data = parameter.data.float()
    return pipe, call, same


@pytest.mark.parametrize("method", ["drtune", "refl", "draft-1", "draft-T, stopped input"])
def test_bfloat16_base_with_float32_lora(method: str) -> None:
    """Literal autograd's numbers exactly. Not float32's: a chain sampled in bfloat16 is another chain."""
    pipe, call, _ = half_base(torch.bfloat16)
    plan = judge.PLANS[method](T)
    verdict = judge.compare(pipe, plan, call)
    assert verdict.images_equal
    assert verdict.gradient_difference < 1e-5
    _, gradient, _ = judge.engine_gradient(pipe, plan, call)
    assert all(g.dtype == torch.float32 for g in gradient.values())


@pytest.mark.parametrize("method", ["drtune", "refl", "draft-1", "draft-T, stopped input"])
def test_float16_base_with_float32_lora(method: str) -> None:
    """The scale on the cotangents keeps what literal autograd loses below float16's smallest number."""
    pipe, call, same = half_base(torch.float16)
    plan = judge.PLANS[method](T)
    pictures, gradient, _ = judge.engine_gradient(pipe, plan, call)
    literal_pictures, literal = judge.literal(pipe, plan, call)
    _, exact, _ = judge.engine_gradient(same, plan, call)
    assert torch.equal(pictures, literal_pictures)
    assert oracle.cosine(gradient, exact) > 0.999
    assert oracle.cosine(gradient, exact) >= oracle.cosine(literal, exact)


def test_float16_gradient_survives_a_faint_loss() -> None:
    """A mean over many pixels and images makes cotangents far below float16's range; the direction must not suffer."""
    pipe, call, _ = half_base(torch.float16)
    plan = judge.PLANS["drtune"](T)
    _, strong, _ = judge.engine_gradient(pipe, plan, call)
    _, faint, _ = judge.engine_gradient(pipe, plan, call, loss_weight=1e-6)
    assert oracle.difference({name: g * 1e6 for name, g in faint.items()}, strong) < 1e-2


@pytest.mark.parametrize("where", ["while the images are judged", "while sampling"])
def test_an_exception_leaves_a_working_pipeline(where: str) -> None:
    pipe, call = tiny.stable_diffusion(steps=T)
    before = judge.plain_images(pipe, call)

    def stumble(*_: Any) -> dict:
        if where == "while sampling":
            raise KeyError("stumbled")
        return {}

    def roll_out() -> None:
        plan, arguments = judge.PLANS["drtune, whole chain"](T), {**tiny.fresh(call), "callback_on_step_end": stumble}
        with judge.rollout(pipe, plan, seed=0, **arguments) as tape:
            assert tape.images.requires_grad
            raise KeyError("stumbled")

    with pytest.raises(KeyError, match="stumbled"):
        roll_out()
    assert torch.equal(judge.plain_images(pipe, call), before)
    assert not judge.plain_images(pipe, call).requires_grad
    assert torch.is_grad_enabled()
