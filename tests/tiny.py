"""Tiny diffusers pipelines with random weights, built offline: what the engine's tests sample from.

Every builder returns `(pipe, call)`: a complete pipeline of diffusers with a LoRA on its denoiser, and the arguments of
`pipe(**call)`. One call of 4 to 6 steps takes a few hundredths of a second on one thread.

The weights are drawn again after construction (`liven`), with a gain that makes the denoiser answer to its input, its
prompt and its time: with the default initialisation dF/dx is so small that stopping or passing the gradient of the
network's input would give the same numbers, and a test of it could not fail.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PROMPTS = ["red heart", "blue stars"]
Call = dict[str, Any]

# Stable Diffusion's noise schedule; set_scheduler hands it to every scheduler.
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# The linears and convolutions that get a LoRA: attention of every family (both streams of an MMDiT), resnets, FFNs.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "add_q_proj", "add_v_proj", "proj_mlp", "ff.net.2"]


# Call arguments -------------------------------------------------------------------------------------------------------


def fresh(call: Call) -> Call:
    """The same call again: generators are stateful, so each run gets copies that start where the originals stand."""

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            twin = torch.Generator(value.device)
            twin.set_state(value.get_state())
            return twin
        if isinstance(value, list):
            return [copy(item) for item in value]
        return value

    return {key: copy(value) for key, value in call.items()}


def generators(count: int = len(PROMPTS), seed: int = 7) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def base_call(steps: int, **extra: Any) -> Call:
    return {"prompt": list(PROMPTS), "num_inference_steps": steps, "generator": generators(), **extra}


# Weights --------------------------------------------------------------------------------------------------------------


def liven(module: nn.Module, *, seed: int, gain: float = 1.0) -> nn.Module:
    """Draw every weight again, N(0, gain / fan_in) for matrices and kernels; norms stay near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name and "bias" not in name))
    return module.eval().requires_grad_(False)


def add_lora(denoiser: nn.Module, *, seed: int = 3, rank: int = 2) -> None:
    """A LoRA as diffusers attaches it, both factors non-zero so that the gradient reaches both."""
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def trainable(pipe: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in denoiser_of(pipe).named_parameters() if p.requires_grad}


# Parts ----------------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> Any:
    """CLIP's tokenizer over single letters: no merges, 16 tokens, nothing to download."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def clip_text(*, seed: int, projection: bool = False, hidden: int = 16, length: int = 16) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=hidden,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return liven((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=seed)


def t5(*, seed: int) -> tuple[Any, nn.Module]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5Tokenizer(vocab=vocab, extra_ids=0), liven(T5EncoderModel(config), seed=seed)


def vae(*, seed: int, channels: int = 4, **config: Any) -> nn.Module:
    """Latents 8x8 to images 16x16. The small gain keeps most pixels inside [0, 1], and lets a few saturate."""
    from diffusers import AutoencoderKL

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "scaling_factor": 0.5,
    }
    return liven(AutoencoderKL(**{**blocks, **config}), seed=seed, gain=0.8)


def unet(*, seed: int, cross: int = 16, **config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    blocks = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": cross,
    }
    return liven(UNet2DConditionModel(**{**blocks, **config}), seed=seed, gain=1.4)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_scheduler(pipe: Any, name: str, **config: Any) -> Any:
    """Another scheduler of diffusers on the pipeline's own noise schedule; `config` overrides its settings."""
    import diffusers

    kept = {key: pipe.scheduler.config[key] for key in (*BETAS, "prediction_type") if key in pipe.scheduler.config}
    pipe.scheduler = getattr(diffusers, name).from_config({"clip_sample": False, **kept, **config})
    return pipe.scheduler


# Pipelines ------------------------------------------------------------------------------------------------------------


def stable_diffusion(*, steps: int = 4, prediction_type: str = "epsilon", lora: bool = True) -> tuple[Any, Call]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae(seed=1),
        text_encoder=clip_text(seed=2),
        tokenizer=clip_tokenizer(),
        unet=unet(seed=4),
        scheduler=DDIMScheduler(
            **BETAS, prediction_type=prediction_type, clip_sample=False, steps_offset=1, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if lora:
        add_lora(pipe.unet)
    return quiet(pipe), base_call(steps, guidance_scale=3.0)


def stable_diffusion_v(*, steps: int = 4) -> tuple[Any, Call]:
    return stable_diffusion(steps=steps, prediction_type="v_prediction")


def stable_diffusion_full(*, steps: int = 4) -> tuple[Any, Call]:
    """Every weight of the UNet is trained, no LoRA."""
    pipe, call = stable_diffusion(steps=steps, lora=False)
    pipe.unet.requires_grad_(True)
    return pipe, call


def stable_diffusion_pag(*, steps: int = 4) -> tuple[Any, Call]:
    """Perturbed-attention guidance: the pipeline swaps the attention processors for the time of the call."""
    from diffusers import StableDiffusionPAGPipeline

    base, call = stable_diffusion(steps=steps)
    pipe = StableDiffusionPAGPipeline(**base.components, requires_safety_checker=False, pag_applied_layers="mid")
    return quiet(pipe), {**call, "pag_scale": 2.0}


def stable_diffusion_controlnet(*, steps: int = 4) -> tuple[Any, Call]:
    """A second network between the scheduler and the denoiser; frozen, but the gradient of the input passes it."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    base, call = stable_diffusion(steps=steps, lora=False)
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    add_lora(base.unet)
    pipe = StableDiffusionControlNetPipeline(
        **base.components, controlnet=liven(net, seed=9, gain=0.7), requires_safety_checker=False
    )
    image = torch.rand(len(PROMPTS), 3, 16, 16, generator=torch.Generator().manual_seed(10))
    return quiet(pipe), {**call, "image": image}


def stable_diffusion_xl(*, steps: int = 4) -> tuple[Any, Call]:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    denoiser = unet(
        seed=14,
        cross=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=(1, 1),
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(seed=11),
        text_encoder=clip_text(seed=12),
        text_encoder_2=clip_text(seed=13, projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    add_lora(pipe.unet)
    return quiet(pipe), base_call(steps, guidance_scale=3.0, height=16, width=16)


def stable_diffusion_3(*, steps: int = 4) -> tuple[Any, Call]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=liven(transformer, seed=24, gain=1.2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed=21, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip_text(seed=22, projection=True),
        text_encoder_2=clip_text(seed=23, projection=True),
        text_encoder_3=None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=None,
    )
    add_lora(pipe.transformer)
    return quiet(pipe), base_call(steps, guidance_scale=3.0, height=16, width=16)


def flux(*, steps: int = 4) -> tuple[Any, Call]:
    """FLUX with true guidance: two calls of the denoiser between two steps of the scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=False,
    )
    tokenizer_2, text_encoder_2 = t5(seed=33)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed=31, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip_text(seed=32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=liven(transformer, seed=34, gain=1.2),
    )
    add_lora(pipe.transformer)
    negative = ["grey", "blurred"]
    extra = {"negative_prompt": negative, "true_cfg_scale": 2.0, "max_sequence_length": 16, "height": 16, "width": 16}
    return quiet(pipe), base_call(steps, **extra)


Builder = Callable[..., tuple[Any, Call]]
BUILDERS: dict[str, Builder] = {
    "sd": stable_diffusion,
    "sd-v": stable_diffusion_v,
    "sd-full": stable_diffusion_full,
    "sd-pag": stable_diffusion_pag,
    "sd-controlnet": stable_diffusion_controlnet,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


# Double precision -----------------------------------------------------------------------------------------------------


class _Float64Torch:
    """`torch`, except that `torch.float32` reads `torch.float64`."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def double(pipe: Any, call: Call) -> Iterator[tuple[Any, Call]]:
    """The same pipeline and call in float64, for exact gradients; back to float32 afterwards.

    Many schedulers cast to `torch.float32` by name. Their own code runs here with that name meaning float64, in their
    own module only: nothing else of diffusers, torch or the engine sees the change.
    """
    module = sys.modules[type(pipe.scheduler).__module__]
    kept, module.torch = module.torch, _Float64Torch()
    schedule = pipe.scheduler
    try:
        pipe.scheduler = type(schedule).from_config(schedule.config)
        yield pipe.to(torch.float64), call
    finally:
        module.torch = kept
        pipe.scheduler = schedule
        pipe.to(torch.float32)
