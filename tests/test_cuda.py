"""The engine on a CUDA device: the oracle again, half precision, autocast, offloading, memory. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import judge
import oracle
import pytest
import tiny
import torch

from rewardtune.plan import Plan

DEVICE = "cuda"
T = 4
METHODS = ["refl", "drtune", "draft-T", "nested, early stop", "draft-LV"]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TF32, and the same kernel with the same order of sums each time, where CUDA offers one."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    switches = {
        (torch.backends.cuda.matmul, "allow_tf32"): False,
        (torch.backends.cudnn, "allow_tf32"): False,
        (torch.backends.cudnn, "deterministic"): True,
        (torch.backends.cudnn, "benchmark"): False,
    }
    before = {switch: getattr(*switch) for switch in switches}
    for (owner, name), value in switches.items():
        setattr(owner, name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for (owner, name), value in before.items():
        setattr(owner, name, value)


def on_device(family: str, dtype: torch.dtype = torch.float32, **build: Any) -> tuple[Any, tiny.Call]:
    """The tiny pipeline on the device: frozen weights in `dtype`, the LoRA in float32."""
    pipe, call = tiny.BUILDERS[family](steps=T, **build)
    lora = {name: parameter.detach().clone() for name, parameter in tiny.trainable(pipe).items()}
    pipe.to(DEVICE, dtype)
    for name, parameter in tiny.trainable(pipe).items():
        parameter.data = lora[name].to(DEVICE)
    return pipe, call


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_engine_is_algorithm_1(family: str, method: str) -> None:
    pipe, call = on_device(family)
    plan = judge.PLANS[method](T)
    verdict = judge.compare(pipe, plan, call)
    assert verdict.image_difference < 1e-5
    assert verdict.gradient_difference < 1e-5
    assert verdict.result.replay_error < 1e-5
    assert verdict.result.trained == plan.executed


@pytest.mark.parametrize("method", ["drtune", "nested, early stop"])
def test_device_and_host_agree(method: str) -> None:
    """The generators of the call are on the host, so both devices sample the same chain."""
    plan = judge.PLANS[method](T)
    pipe, call = on_device("sd")
    _, there, _ = judge.engine_gradient(pipe, plan, call)
    _, here, _ = judge.engine_gradient(pipe.to("cpu"), plan, call)
    assert oracle.cosine(here, there) > 0.9999


def test_generators_of_the_device() -> None:
    pipe, call = on_device("sd")
    call["generator"] = [torch.Generator(DEVICE).manual_seed(i) for i in range(2)]
    call["eta"] = 1.0
    assert judge.compare(pipe, judge.PLANS["drtune"](T), call).gradient_difference < 1e-5


def test_dropout_of_the_device_is_replayed() -> None:
    """Dropout draws from the device's own generator; the replay finds it where the recorded call did."""
    from test_oracle_modes import lora_dropout

    pipe, call = on_device("sd")
    lora_dropout(pipe)
    verdict = judge.compare(pipe, judge.PLANS["draft-T"](T), call)
    assert verdict.gradient_difference < 1e-5
    assert verdict.result.replay_error < 1e-5


# Not `sd` at its last step: its float16 chain alone turns that small gradient by a cosine of 0.996, at any scale.
@pytest.mark.parametrize(
    ("family", "method"),
    [("sd", "drtune"), *((family, method) for family in ("sdxl", "sd3") for method in ("refl", "drtune", "draft-1"))],
)
def test_float16_base_with_float32_lora(family: str, method: str) -> None:
    plan = judge.PLANS[method](T)
    rounded, call = on_device(family, torch.float16)
    _, half, result = judge.engine_gradient(rounded, plan, call)
    assert all(g.dtype == torch.float32 for g in half.values())
    assert result.replay_error < 2e-3
    _, full, _ = judge.engine_gradient(rounded.to(torch.float32), plan, call)
    assert oracle.cosine(half, full) > 0.999


@pytest.mark.parametrize("method", ["refl", "drtune", "draft-1"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_bfloat16_base_with_float32_lora(family: str, method: str) -> None:
    """As far from float32 as literal autograd in bfloat16: the chain itself is another one, by its rounding."""
    plan = judge.PLANS[method](T)
    rounded, call = on_device(family, torch.bfloat16)
    _, half, result = judge.engine_gradient(rounded, plan, call)
    _, literal = judge.literal(rounded, plan, call)
    assert result.replay_error < 1e-2
    _, full, _ = judge.engine_gradient(rounded.to(torch.float32), plan, call)
    assert oracle.cosine(half, literal) > 0.999
    assert oracle.cosine(half, full) > oracle.cosine(literal, full) - 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    pipe, call = on_device("sd")
    plan = judge.PLANS["drtune"](T)
    _, gradient, result = judge.engine_gradient(pipe, plan, call, sampling=torch.autocast(DEVICE, dtype=dtype))
    with torch.autocast(DEVICE, dtype=dtype, cache_enabled=False):
        _, literal = judge.literal(pipe, plan, call)
    assert result.replay_error < 1e-2
    assert oracle.cosine(gradient, literal) > 0.999


def test_model_offloading_works_during_and_after_a_rollout() -> None:
    pipe, call = tiny.stable_diffusion(steps=T)
    plan = judge.PLANS["draft-T"](T)
    _, on_host, _ = judge.engine_gradient(pipe, plan, call)
    pipe.enable_model_cpu_offload()
    before = judge.plain_images(pipe, call)
    _, offloaded, result = judge.engine_gradient(pipe, plan, call)
    assert oracle.cosine(offloaded, on_host) > 0.9999
    assert result.replay_error < 1e-5
    torch.testing.assert_close(judge.plain_images(pipe, call), before, rtol=0, atol=1e-5)
    assert hasattr(pipe.unet, "_hf_hook"), "the hook that moves the denoiser is still there"


def test_peak_memory_does_not_grow_with_the_trained_steps() -> None:
    """All of 12 steps trained and nested cost the memory of one, apart from the recorded latents."""
    pipe, call = on_device("sd")
    call = {**call, "num_inference_steps": 12, "height": 256, "width": 256}
    steps = 12

    def peak(plan: Plan) -> int:
        judge.engine_gradient(pipe, plan, call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        judge.engine_gradient(pipe, plan, call)
        return torch.cuda.max_memory_allocated()

    def literal_peak(plan: Plan) -> int:
        torch.cuda.reset_peak_memory_stats()
        judge.literal(pipe, plan, call)
        return torch.cuda.max_memory_allocated()

    one = Plan(T=steps, train=frozenset({steps - 1}), input_gradient=1.0)
    all_nested = Plan(T=steps, train=frozenset(range(steps)), input_gradient=1.0)
    assert peak(all_nested) < 1.2 * peak(one)
    assert literal_peak(all_nested) > 3 * peak(all_nested), "the chain is long enough for the difference to show"


def test_float16_gradient_survives_a_faint_loss() -> None:
    pipe, call = on_device("sd", torch.float16)
    plan = judge.PLANS["drtune"](T)
    _, strong, _ = judge.engine_gradient(pipe, plan, call)
    _, faint, _ = judge.engine_gradient(pipe, plan, call, loss_weight=1e-6)
    assert oracle.difference({name: g * 1e6 for name, g in faint.items()}, strong) < 1e-2
