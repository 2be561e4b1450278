"""A small random-weight pipeline of every text-to-image class of diffusers, built offline: what the contract runs on.

`PIPELINES[name]()` gives `(pipe, call)` as the builders of `tiny` do: the class `name` complete with text encoders of
its real classes, a LoRA on its denoiser whose both factors are drawn, and the arguments of `pipe(**call)`. Widths are
the smallest that each class accepts; pictures have 16 to 64 pixels a side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tiny import (
    BETAS,
    PROMPTS,
    Call,
    base_call,
    clip_text,
    clip_tokenizer,
    liven,
    quiet,
    t5,
    unet,
    vae,
)
from torch import nn

from rewardtune.adapters import attach, trainable
from rewardtune.engine import find_denoiser

STEPS = 4
Case = tuple[Any, Call]
NEGATIVE = ["grey", "blurred"]
SQUARE = {"height": 16, "width": 16}


def assemble(name: str, call: Call, *, sizes: dict[str, Any] | None = None, **components: Any) -> Case:
    """The pipeline with a LoRA of rank 2 as the trainer attaches it, but no factor zero, and the call's arguments.

    sizes: attributes of the pipeline that hold the sizes of the published model.
    """
    import diffusers

    pipe = getattr(diffusers, name)(**components)
    for attribute, size in (sizes or {}).items():
        assert hasattr(pipe, attribute)
        setattr(pipe, attribute, size)
    denoiser = pipe.components[find_denoiser(pipe)]
    attach(denoiser, rank=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(denoiser):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return quiet(pipe), base_call(STEPS, **call)


def alone() -> Call:
    return {"prompt": PROMPTS[0], "generator": torch.Generator().manual_seed(7)}


def picture(side: int = 16, *, seed: int = 10) -> torch.Tensor:
    return torch.rand(len(PROMPTS), 3, side, side, generator=torch.Generator().manual_seed(seed))


def made(name: str, *, seed: int, gain: float = 1.2, **config: Any) -> nn.Module:
    """A network of diffusers by its class's name, its weights drawn by `tiny.liven`."""
    import diffusers

    return liven(getattr(diffusers, name)(**config), seed=seed, gain=gain)


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def flow_vae(*, seed: int = 31, **config: Any) -> nn.Module:
    return vae(seed=seed, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, **config)


# Text -----------------------------------------------------------------------------------------------------------------

VOCABULARY = 128
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}{% endfor %}"
)


def words(*, side: str = "right", length: int = 512, positions: bool = False) -> Any:
    """A tokenizer of one token a word, mark or line break, in place of any language model's.

    It counts 34 tokens in Qwen-Image's system message as the model's own does, and knows the words of our prompts.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    class Reader(PreTrainedTokenizerFast):
        """Stands in for the processors of models that see, too: they are asked for text alone."""

        tokenizer = property(lambda self: self)

        def __call__(self, text: Any = None, *args: Any, images: Any = None, videos: Any = None, **more: Any) -> Any:
            read = super().__call__(text, *args, **more)
            if positions:
                read["position_ids"] = torch.arange(read.input_ids.shape[1]).expand(read.input_ids.shape)
            return read

        def apply_chat_template(self, *args: Any, **more: Any) -> Any:
            read = super().apply_chat_template(*args, **more)
            return [read] if more.get("return_dict") is False else read  # as the processors do

    marks = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "\n"]
    tokens = [*marks, *" ".join([*PROMPTS, *NEGATIVE]).split(), *"abcdefghijklmnopqrstuvwxyz,.:"]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.add_special_tokens(marks[:-1])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    made = Reader(tokenizer_object=raw, padding_side=side, model_max_length=length, **special)
    made.chat_template = CHAT
    return made


LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def language(name: str, *, seed: int, **config: Any) -> nn.Module:
    """A language model of transformers by its class's name."""
    import transformers

    kind = getattr(transformers, name)
    return liven(kind(kind.config_class(**{**LANGUAGE, **config})), seed=seed)


def seeing(name: str, *, seed: int, vision: dict[str, Any] | None = None, **text: Any) -> nn.Module:
    """A language model that could see pictures too (Qwen-VL, Mistral 3)."""
    import transformers

    kind = getattr(transformers, name)
    width = text.get("hidden_size", LANGUAGE["hidden_size"])
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    words = {**LANGUAGE, "rope_parameters": rope, **text}
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config = kind.config_class(text_config=words, vision_config=sight if vision is None else vision, **ids)
    return liven(kind(config), seed=seed)


# Stable Diffusion 1, 2 and XL -----------------------------------------------------------------------------------------


def sd_parts(**config: Any) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return {
        "vae": vae(seed=1),
        "text_encoder": clip_text(seed=2),
        "tokenizer": clip_tokenizer(),
        "unet": unet(seed=4, **config),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    }


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd(name: str) -> Case:
    return assemble(name, {"guidance_scale": 3.0}, **sd_parts(), **UNCHECKED)


def sd_pag(name: str) -> Case:
    parts = {**sd_parts(), **UNCHECKED, "pag_applied_layers": "mid"}
    if "ControlNet" in name:
        control = control_net(parts["unet"])
        call = {"guidance_scale": 3.0, "pag_scale": 2.0, "image": picture()}
        return assemble(name, call, controlnet=control, **parts)
    return assemble(name, {"guidance_scale": 3.0, "pag_scale": 2.0}, **parts)


def control_net(denoiser: nn.Module) -> nn.Module:
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4, 8))
    return liven(net, seed=9, gain=0.7)


def sd_controlnet(name: str) -> Case:
    parts = sd_parts()
    control = control_net(parts["unet"])
    return assemble(name, {"guidance_scale": 3.0, "image": picture()}, controlnet=control, **parts, **UNCHECKED)


def sd_controlnet_xs(name: str) -> Case:
    from diffusers import ControlNetXSAdapter

    xl = "XL" in name
    parts = xl_parts(layers_per_block=2) if xl else sd_parts(layers_per_block=2)
    net = ControlNetXSAdapter.from_unet(
        parts["unet"],
        size_ratio=1.0,
        num_attention_heads=2,
        learn_time_embedding=True,
        conditioning_embedding_out_channels=(4, 8),
    )
    call = {**(XL_CALL if xl else {"guidance_scale": 3.0}), "image": picture()}
    more = {"add_watermarker": False} if xl else UNCHECKED
    return assemble(name, call, controlnet=liven(net, seed=9, gain=0.7), **parts, **more)


def sd_adapter(name: str) -> Case:
    from diffusers import T2IAdapter

    xl = "XL" in name
    kind, factor = ("full_adapter_xl", 4) if xl else ("full_adapter", 2)
    adapter = T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    if xl:
        call = {"guidance_scale": 3.0, **SQUARE, "image": picture()}
        return assemble(name, call, adapter=liven(adapter, seed=9, gain=0.7), **xl_parts())
    parts = sd_parts(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    call = {"guidance_scale": 3.0, "image": picture()}
    return assemble(name, call, adapter=liven(adapter, seed=9, gain=0.7), **parts, **UNCHECKED)


def lcm(name: str) -> Case:
    from diffusers import LCMScheduler

    parts = sd_parts(time_cond_proj_dim=8)
    parts["scheduler"] = LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    return assemble(name, {"guidance_scale": 3.0}, **parts, **UNCHECKED)


XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
    "transformer_layers_per_block": (1, 1),
}


def xl_parts(**config: Any) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "vae": vae(seed=11),
        "text_encoder": clip_text(seed=12),
        "text_encoder_2": clip_text(seed=13, projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet(seed=14, cross=32, **XL_UNET, **config),
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }


XL_CALL = {"guidance_scale": 3.0, **SQUARE}


def sdxl(name: str) -> Case:
    return assemble(name, XL_CALL, **xl_parts(), add_watermarker=False)


def sdxl_pag(name: str) -> Case:
    call, parts = {**XL_CALL, "pag_scale": 2.0}, {**xl_parts(), "pag_applied_layers": "mid"}
    if "ControlNet" in name:
        return assemble(name, {**call, "image": picture()}, controlnet=control_net(parts["unet"]), **parts)
    return assemble(name, call, **parts, add_watermarker=False)


def sdxl_controlnet(name: str) -> Case:
    parts = xl_parts()
    call = {**XL_CALL, "image": picture()}
    return assemble(name, call, controlnet=control_net(parts["unet"]), **parts, add_watermarker=False)


def sdxl_controlnet_union(name: str) -> Case:
    from diffusers import ControlNetUnionModel

    parts = xl_parts()
    net = ControlNetUnionModel(
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(4, 8),
        num_control_type=6,
        num_trans_channel=8,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=8,
        **XL_UNET,
    )
    call = {**XL_CALL, "control_image": [picture()], "control_mode": [0]}
    return assemble(name, call, controlnet=liven(net, seed=9, gain=0.7), **parts, add_watermarker=False)


# Stable Diffusion 3 ---------------------------------------------------------------------------------------------------

SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}


def sd3(name: str) -> Case:
    parts = {
        "transformer": made("SD3Transformer2DModel", seed=24, **SD3),
        "scheduler": flow(),
        "vae": flow_vae(seed=21),
        "text_encoder": clip_text(seed=22, projection=True),
        "text_encoder_2": clip_text(seed=23, projection=True),
        "text_encoder_3": None,
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": None,
    }
    call: Call = {"guidance_scale": 3.0, **SQUARE}
    if "PAG" in name:
        return assemble(name, {**call, "pag_scale": 2.0}, **parts, pag_applied_layers="blocks.0")
    if "ControlNet" in name:
        parts["controlnet"] = made("SD3ControlNetModel", seed=9, gain=0.7, **{**SD3, "num_layers": 1})
        call["control_image"] = picture()
    return assemble(name, call, **parts)


# FLUX and its kin -----------------------------------------------------------------------------------------------------

FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 2, 2),
}
SHORT = {"max_sequence_length": 16, **SQUARE}


def flux(name: str) -> Case:
    tokenizer_2, text_encoder_2 = t5(seed=33)
    config: dict[str, Any] = {**FLUX, "guidance_embeds": name != "FluxPipeline"}
    if name == "FluxControlPipeline":
        config |= {"in_channels": 32, "out_channels": 16}
    parts = {
        "transformer": made("FluxTransformer2DModel", seed=34, **config),
        "scheduler": flow(),
        "vae": flow_vae(),
        "text_encoder": clip_text(seed=32),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
    }
    call: Call = dict(SHORT)
    if name == "FluxPipeline":
        call |= {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.0}
    if name == "FluxKontextPipeline":
        call |= {"max_area": 16 * 16, "_auto_resize": False}
    if "Control" in name:
        call["control_image"] = picture()
    if name == "FluxControlNetPipeline":
        parts["controlnet"] = made("FluxControlNetModel", seed=9, gain=0.7, **config)
    return assemble(name, call, **parts)


def flux2_vae(*, seed: int = 35) -> nn.Module:
    return made(
        "AutoencoderKLFlux2",
        seed=seed,
        gain=0.8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2(name: str) -> Case:
    klein = "Klein" in name
    encoder = language("Qwen3ForCausalLM", seed=36) if klein else mistral3("Mistral3ForConditionalGeneration", seed=36)
    transformer = made(
        "Flux2Transformer2DModel",
        seed=37,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    call: Call = {**SHORT, "text_encoder_out_layers": (1,), "max_sequence_length": 64}
    if name == "Flux2KleinPipeline":
        call["guidance_scale"] = 3.0
    if name == "Flux2KleinKVPipeline":
        from PIL import Image

        call["image"] = Image.new("RGB", (64, 64))
    return assemble(
        name,
        call,
        transformer=transformer,
        scheduler=flow(),
        vae=flux2_vae(),
        text_encoder=encoder,
        tokenizer=words(),
    )


def mistral3(name: str, *, seed: int) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    sight = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"intermediate_size": 16, "image_size": 12, "patch_size": 6}
    text = {"model_type": "mistral", **LANGUAGE}
    config = transformers.Mistral3Config(text_config=text, vision_config=sight, image_token_index=120)
    return liven(kind(config), seed=seed)


def chroma(name: str) -> Case:
    tokenizer, text_encoder = t5(seed=33)
    transformer = made(
        "ChromaTransformer2DModel",
        seed=38,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    call = {**SHORT, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
    parts = {"scheduler": flow(), "vae": flow_vae(), "text_encoder": text_encoder, "tokenizer": tokenizer}
    return assemble(name, call, transformer=transformer, **parts)


def bria(name: str) -> Case:
    tokenizer, text_encoder = t5(seed=33)
    transformer = made(
        "BriaTransformer2DModel",
        seed=39,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    call = {**SHORT, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
    parts = {"scheduler": flow(), "vae": vae(seed=31, shift_factor=0.0)}
    return assemble(name, call, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, **parts)


# More transformers ----------------------------------------------------------------------------------------------------


def pixart(name: str) -> Case:
    from diffusers import DPMSolverMultistepScheduler

    tokenizer, text_encoder = t5(seed=43)
    transformer = made(
        "PixArtTransformer2DModel",
        seed=44,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    call: Call = {"guidance_scale": 3.0, "use_resolution_binning": False, "clean_caption": False, **SQUARE}
    more: dict[str, Any] = {}
    if "PAG" in name:
        call["pag_scale"], more = 2.0, {"pag_applied_layers": ["blocks.1"]}
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae(seed=41)}
    return assemble(name, call, transformer=transformer, scheduler=scheduler, **parts, **more)


def dc_vae(*, seed: int = 45) -> nn.Module:
    return made(
        "AutoencoderDC",
        seed=seed,
        gain=0.8,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )


SANA = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 16,
    "sample_size": 8,
}


def sana(name: str) -> Case:
    from diffusers import DPMSolverMultistepScheduler, SCMScheduler

    sprint = "Sprint" in name
    config: dict[str, Any] = {**SANA}
    if sprint:
        config |= {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
    parts: dict[str, Any] = {
        "transformer": made("SanaTransformer2DModel", seed=46, **config),
        "vae": dc_vae(),
        "text_encoder": language("Gemma2Model", seed=47),
        "tokenizer": words(),
        "scheduler": DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    }
    call: Call = {
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "height": 32,
        "width": 32,
    }
    if sprint:
        parts["scheduler"] = SCMScheduler()
        call["intermediate_timesteps"] = None
    if "PAG" in name:
        parts["pag_applied_layers"] = "transformer_blocks.1"
        call["pag_scale"] = 2.0
    if "ControlNet" in name:
        parts["controlnet"] = made("SanaControlNetModel", seed=9, gain=0.7, **{**SANA, "num_layers": 1})
        call["control_image"] = picture(32)
    return assemble(name, call, **parts)


HUNYUAN_DIT = {
    "sample_size": 8,
    "num_layers": 4,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "hidden_size": 16,
    "activation_fn": "gelu-approximate",
}


def hunyuan_dit(name: str) -> Case:
    from diffusers import DDPMScheduler
    from transformers import BertConfig, BertModel

    tokenizer_2, text_encoder_2 = t5(seed=53)
    shape = {key: LANGUAGE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    bert = BertModel(BertConfig(**shape, num_attention_heads=2, max_position_embeddings=128))
    tokenizer = words(length=77)
    parts: dict[str, Any] = {
        "transformer": made("HunyuanDiT2DModel", seed=54, **HUNYUAN_DIT),
        "vae": vae(seed=51),
        "scheduler": DDPMScheduler(
            beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        "text_encoder": liven(bert, seed=52),
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        **UNCHECKED,
    }
    call: Call = {"guidance_scale": 3.0, "use_resolution_binning": False, **SQUARE}
    if "PAG" in name:
        parts["pag_applied_layers"] = "blocks.1"
        call["pag_scale"] = 2.0
    if "ControlNet" in name:
        config = {key: value for key, value in HUNYUAN_DIT.items() if key != "num_layers"}
        parts["controlnet"] = made("HunyuanDiT2DControlNetModel", seed=9, gain=0.7, **config, transformer_num_layers=4)
        call["control_image"] = picture()
    return assemble(name, call, **parts)


def aura_flow(name: str) -> Case:
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer, _ = t5(seed=43)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = made(
        "AuraFlowTransformer2DModel",
        seed=55,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    )
    call = {"guidance_scale": 3.0, "max_sequence_length": 16, **SQUARE}
    parts = {"tokenizer": tokenizer, "text_encoder": liven(encoder, seed=56), "vae": vae(seed=51), "scheduler": flow()}
    return assemble(name, call, transformer=transformer, **parts)


def cogview3(name: str) -> Case:
    from diffusers import CogVideoXDDIMScheduler

    tokenizer, text_encoder = t5(seed=43)
    transformer = made(
        "CogView3PlusTransformer2DModel",
        seed=57,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    call = {"guidance_scale": 3.0, "max_sequence_length": 16, **SQUARE}
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae(seed=51), "scheduler": scheduler}
    return assemble(name, call, transformer=transformer, **parts)


def cogview4(name: str) -> Case:
    control = "Control" in name
    transformer = made(
        "CogView4Transformer2DModel",
        seed=58,
        patch_size=2,
        in_channels=8 if control else 4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    call: Call = {"guidance_scale": 3.0, "max_sequence_length": 16, **SQUARE}
    if control:
        call["control_image"] = picture()
    parts = {
        "tokenizer": words(side="left"),
        "text_encoder": language("GlmModel", seed=59),
        "vae": vae(seed=51, shift_factor=0.0),
        "scheduler": flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    }
    return assemble(name, call, transformer=transformer, **parts)


def lumina(name: str) -> Case:
    transformer = made(
        "LuminaNextDiT2DModel",
        seed=61,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=16,
        scaling_factor=1.0,
    )
    call = {"guidance_scale": 3.0, "max_sequence_length": 16, "clean_caption": False, "height": 64, "width": 64}
    parts = {"tokenizer": words(), "text_encoder": language("GemmaForCausalLM", seed=62), "vae": vae(seed=51)}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts)


def lumina2(name: str) -> Case:
    transformer = made(
        "Lumina2Transformer2DModel",
        seed=63,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
        cap_feat_dim=16,
    )
    call = {"guidance_scale": 3.0, "max_sequence_length": 16, "system_prompt": "draw", "height": 64, "width": 64}
    parts = {"tokenizer": words(), "text_encoder": language("Gemma2Model", seed=64), "vae": flow_vae()}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts)


def qwen_vae(*, seed: int = 65) -> nn.Module:
    return made(
        "AutoencoderKLQwenImage",
        seed=seed,
        gain=0.8,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_image(name: str) -> Case:
    parts: dict[str, Any] = {
        "transformer": made("QwenImageTransformer2DModel", seed=66, **QWEN),
        "scheduler": flow(),
        "vae": qwen_vae(),
        "text_encoder": seeing("Qwen2_5_VLForConditionalGeneration", seed=67),
        "tokenizer": words(),
    }
    call: Call = {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE, "max_sequence_length": 16, **SQUARE}
    if "ControlNet" in name:
        parts["controlnet"] = made("QwenImageControlNetModel", seed=9, gain=0.7, **QWEN)
        call["control_image"] = picture()
    return assemble(name, call, **parts)


Z_IMAGE = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "dim": 32,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "qk_norm": True,
}


def z_image(name: str) -> Case:
    config = {"in_channels": 4, "n_layers": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    parts: dict[str, Any] = {
        "scheduler": flow(),
        "vae": flow_vae(),
        "text_encoder": language("Qwen3Model", seed=69),
        "tokenizer": words(),
    }
    call: Call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "max_sequence_length": 16, **SQUARE}
    if "Omni" in name:
        from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

        sight = Siglip2VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        config["siglip_feat_dim"] = 16
        parts |= {"siglip": liven(Siglip2VisionModel(sight), seed=70), "siglip_processor": Siglip2ImageProcessorPil()}
    transformer = made("ZImageTransformer2DModel", seed=68, **Z_IMAGE, **config)
    if "ControlNet" in name:
        inpaint = "Inpaint" in name
        places = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0]}
        net = made(
            "ZImageControlNetModel",
            seed=9,
            gain=0.7,
            control_in_dim=9 if inpaint else 4,
            add_control_noise_refiner="control_layers",
            **places,
            **Z_IMAGE,
        )
        parts["controlnet"] = net
        call["control_image"] = picture()
        if inpaint:
            call |= {"image": picture(seed=11), "mask_image": torch.ones(2, 1, 16, 16)}
    return assemble(name, call, transformer=transformer, **parts)


def ovis(name: str) -> Case:
    transformer = made(
        "OvisImageTransformer2DModel",
        seed=71,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, **SHORT}
    parts = {"vae": flow_vae(), "text_encoder": language("Qwen3Model", seed=72), "tokenizer": words()}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts)


def longcat(name: str) -> Case:
    transformer = made(
        "LongCatImageTransformer2DModel",
        seed=73,
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 2, 2],
    )
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "enable_prompt_rewrite": False, **SQUARE}
    tokenizer = words()
    parts = {"vae": flow_vae(channels=16), "text_encoder": seeing("Qwen2_5_VLForConditionalGeneration", seed=74)}
    readers = {"tokenizer": tokenizer, "text_processor": tokenizer}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts, **readers)


def kolors(name: str) -> Case:
    from diffusers import EulerDiscreteScheduler
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    glm = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=2,
        original_rope=True,
        _attn_implementation="eager",
    )
    denoiser = unet(seed=14, cross=16, **XL_UNET)
    parts: dict[str, Any] = {
        "vae": vae(seed=11),
        "text_encoder": liven(ChatGLMModel(glm), seed=75),
        "tokenizer": words(side="left", length=256, positions=True),
        "unet": denoiser,
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }
    call: Call = {"guidance_scale": 3.0, **SQUARE}
    if "PAG" in name:
        call["pag_scale"], parts["pag_applied_layers"] = 2.0, "mid"
    return assemble(name, call, **parts)


def prx(name: str) -> Case:
    pixel = "Pixel" in name
    more = {"bottleneck_size": 16, "resolution_embeds": True} if pixel else {}
    transformer = made(
        "PRXTransformer2DModel",
        seed=76,
        patch_size=2,
        in_channels=3 if pixel else 4,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
        **more,
    )
    # With guidance these classes repeat the time twice, whatever the batch: one prompt.
    call = {**alone(), "guidance_scale": 3.0, "use_resolution_binning": False, **SQUARE}
    parts: dict[str, Any] = {"transformer": transformer, "scheduler": flow(), "tokenizer": words(length=32)}
    if pixel:
        return assemble(name, call, **parts, text_encoder=language("Qwen3Model", seed=77), prompt_max_tokens=16)
    from transformers import T5GemmaConfig, T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    module = T5GemmaModuleConfig(**LANGUAGE, layer_types=["full_attention"] * 2, query_pre_attn_scalar=8)
    encoder = T5GemmaEncoder(T5GemmaConfig(encoder=module, is_encoder_decoder=False).encoder)
    return assemble(name, call, **parts, text_encoder=liven(encoder, seed=77), vae=flow_vae())


def krea2(name: str) -> Case:
    transformer = made(
        "Krea2Transformer2DModel",
        seed=78,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "max_sequence_length": 16, **SQUARE}
    parts = {"vae": qwen_vae(), "text_encoder": seeing("Qwen3VLModel", seed=79), "tokenizer": words()}
    more = {"scheduler": flow(use_dynamic_shifting=True), "text_encoder_select_layers": (0, 1)}
    return assemble(name, call, transformer=transformer, **parts, **more)


def hidream(name: str) -> Case:
    tokenizer_3, text_encoder_3 = t5(seed=81)
    transformer = made(
        "HiDreamImageTransformer2DModel",
        seed=82,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    parts: dict[str, Any] = {
        "transformer": transformer,
        "scheduler": flow(),
        "vae": vae(seed=31, shift_factor=0.1),
        "text_encoder": clip_text(seed=83, projection=True),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text(seed=84, projection=True),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": text_encoder_3,
        "tokenizer_3": tokenizer_3,
        "text_encoder_4": language("LlamaForCausalLM", seed=85),
        "tokenizer_4": words(),
    }
    return assemble(
        name,
        {"guidance_scale": 3.0, "max_sequence_length": 16, **SQUARE},
        sizes={"default_sample_size": 8},
        **parts,
    )


def hunyuan_image(name: str) -> Case:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    tokenizer_2, text_encoder_2 = t5(seed=86)
    transformer = made(
        "HunyuanImageTransformer2DModel",
        seed=87,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    decoder = made(
        "AutoencoderKLHunyuanImage",
        seed=88,
        gain=0.8,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    parts: dict[str, Any] = {
        "scheduler": flow(),
        "vae": decoder,
        "text_encoder": seeing("Qwen2_5_VLForConditionalGeneration", seed=89),
        "tokenizer": words(),
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        "guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        "ocr_guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    }
    call = {"negative_prompt": NEGATIVE, **SQUARE}
    return assemble(name, call, sizes={"tokenizer_max_length": 64}, transformer=transformer, **parts)


def ernie(name: str) -> Case:
    transformer = made(
        "ErnieImageTransformer2DModel",
        seed=91,
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    parts = {"vae": flux2_vae(), "text_encoder": mistral3("Mistral3Model", seed=92), "tokenizer": words()}
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, **SQUARE}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts)


def ideogram4(name: str) -> Case:
    shape = {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "adaln_dim": 16, "llm_features_dim": 16 * 13}
    parts: dict[str, Any] = {
        "scheduler": flow(),
        "vae": flux2_vae(),
        "text_encoder": seeing("Qwen3VLModel", seed=93, num_hidden_layers=36),
        "tokenizer": words(),
        "transformer": made("Ideogram4Transformer2DModel", seed=94, mrope_section=(4, 2, 2), **shape),
        "unconditional_transformer": made("Ideogram4Transformer2DModel", seed=95, mrope_section=(4, 2, 2), **shape),
    }
    call = {"guidance_schedule": (3.0,) * STEPS, "max_sequence_length": 24, **SQUARE}
    return assemble(name, call, **parts)


def nucleus(name: str) -> Case:
    transformer = made(
        "NucleusMoEImageTransformer2DModel",
        seed=96,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        dense_moe_strategy="none",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0],
    )
    parts = {"vae": qwen_vae(), "text_encoder": seeing("Qwen3VLForConditionalGeneration", seed=97)}
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "return_index": -1, **SQUARE}
    call["max_sequence_length"] = 512
    return assemble(name, call, transformer=transformer, scheduler=flow(), processor=words(), **parts)


def deepfloyd(name: str) -> Case:
    from diffusers import DDPMScheduler

    tokenizer, text_encoder = t5(seed=98)
    denoiser = unet(
        seed=99,
        cross=16,
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="positional",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        prediction_type="epsilon",
        variance_type="learned_range",
    )
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "unet": denoiser, "scheduler": scheduler}
    absent = {"watermarker": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    call = {"guidance_scale": 3.0, "clean_caption": False, **SQUARE}
    return assemble(name, call, **parts, **absent)


def movq(*, seed: int) -> nn.Module:
    decoder: Any = made(
        "VQModel",
        seed=seed,
        gain=0.8,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    with torch.no_grad():
        decoder.decoder.conv_out.weight *= 0.05  # its norms are scaled by the latent, which would saturate the pixels
    return decoder


def kandinsky3(name: str) -> Case:
    from diffusers import DDPMScheduler

    tokenizer, text_encoder = t5(seed=101)
    denoiser = made(
        "Kandinsky3UNet",
        seed=102,
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, thresholding=False)
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "scheduler": scheduler, "movq": movq(seed=103)}
    return assemble(name, {"guidance_scale": 3.0, "height": 64, "width": 64}, unet=denoiser, **parts)


def kandinsky5(name: str) -> Case:
    transformer = made(
        "Kandinsky5Transformer3DModel",
        seed=104,
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        visual_cond=False,
        attention_type="regular",
    )
    parts: dict[str, Any] = {
        "scheduler": flow(),
        "vae": flow_vae(),
        "text_encoder": seeing("Qwen2_5_VLForConditionalGeneration", seed=105),
        "tokenizer": words(),
        "text_encoder_2": clip_text(seed=106, length=77),
        "tokenizer_2": clip_tokenizer(),
    }
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "max_sequence_length": 256, "height": 64, "width": 64}
    return assemble(name, call, sizes={"resolutions": [(64, 64)]}, transformer=transformer, **parts)


def bria_fibo(name: str) -> Case:
    transformer = made(
        "BriaFiboTransformer2DModel",
        seed=107,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        text_encoder_dim=16,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    parts = {"vae": wan_vae(), "text_encoder": language("SmolLM3ForCausalLM", seed=108), "tokenizer": words()}
    call = {"guidance_scale": 3.0, "negative_prompt": NEGATIVE, "max_sequence_length": 32, "height": 64, "width": 64}
    return assemble(name, call, transformer=transformer, scheduler=flow(), **parts)


def wan_vae(*, seed: int = 109, **config: Any) -> nn.Module:
    shape = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return made("AutoencoderKLWan", seed=seed, gain=0.8, **shape, **statistics, **config)


def glm_image(name: str) -> Case:
    """The tokens of the picture, which a language model writes first, are given: that half has no gradient."""
    tokenizer, text_encoder = t5(seed=117)
    transformer = made(
        "GlmImageTransformer2DModel",
        seed=118,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "processor": None,
        "text_encoder": text_encoder,
        "vision_language_encoder": None,
        "vae": vae(seed=51, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "scheduler": flow(),
    }
    tokens = torch.arange(2 * 16).view(2, 16) % 32
    call = {"guidance_scale": 3.0, "max_sequence_length": 16, "prior_token_ids": tokens, **SQUARE}
    return assemble(name, call, transformer=transformer, **parts)


def kandinsky22(name: str) -> Case:
    """Two pipelines in one: the prior's chain gives the picture's embedding, the decoder's is the one we open."""
    from diffusers import DDIMScheduler, PriorTransformer, UnCLIPScheduler
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=16
    )
    sight = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    denoiser = unet(
        seed=121,
        cross=8,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
    )
    parts: dict[str, Any] = {
        "unet": denoiser,
        "scheduler": DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        "movq": movq(seed=122),
        "prior_prior": liven(prior, seed=123),
        "prior_image_encoder": liven(CLIPVisionModelWithProjection(sight), seed=124),
        "prior_text_encoder": clip_text(seed=125, projection=True),
        "prior_tokenizer": clip_tokenizer(),
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "prior_image_processor": CLIPImageProcessorPil(size=28, crop_size=28),
    }
    call = {"guidance_scale": 3.0, "prior_num_inference_steps": 2, "height": 64, "width": 64}
    return assemble(name, call, **parts)


def qwen_image21(name: str) -> Case:
    """The checkpoints' four channels (RGBA) are left at three here."""
    transformer = made(
        "QwenImage21Transformer2DModel",
        seed=126,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        mlp_ratio=2,
        axes_dims_rope=(8, 4, 4),
    )
    decoder = made(
        "AutoencoderKLQwenImage21",
        seed=127,
        gain=0.8,
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        in_channels=3,
        out_channels=3,
    )
    parts = {"vae": decoder, "text_encoder": seeing("Qwen3VLForConditionalGeneration", seed=128)}
    call = {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE, "use_kv_cache": False, "height": 64, "width": 64}
    return assemble(name, call, transformer=transformer, scheduler=flow(), processor=words(), **parts)


def dreamlite(name: str) -> Case:
    denoiser = made(
        "DreamLiteUNetModel",
        seed=114,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=1,
    )
    tiny_vae = made(
        "AutoencoderTiny",
        seed=115,
        gain=0.8,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with torch.no_grad():
        tiny_vae.decoder.layers[-1].bias += 0.5  # else most pixels are below zero
    encoder = seeing("Qwen3VLForConditionalGeneration", seed=116)
    reader = words()
    call = {**alone(), "guidance_scale": 3.0}
    call |= {"negative_prompt": NEGATIVE[0], "max_sequence_length": 16, **SQUARE}
    if "Mobile" in name:
        for key in ("guidance_scale", "negative_prompt"):
            call.pop(key)
    parts = {"text_encoder": encoder, "tokenizer": reader, "processor": reader, "vae": tiny_vae}
    return assemble(name, call, unet=denoiser, scheduler=flow(), **parts)


PIPELINES: dict[str, Callable[[], Case]] = {
    name: functools.partial(build, name)
    for build, names in {
        sd: ["StableDiffusionPipeline"],
        sd_pag: ["StableDiffusionPAGPipeline", "StableDiffusionControlNetPAGPipeline"],
        sd_controlnet: ["StableDiffusionControlNetPipeline"],
        sd_controlnet_xs: ["StableDiffusionControlNetXSPipeline", "StableDiffusionXLControlNetXSPipeline"],
        sd_adapter: ["StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"],
        lcm: ["LatentConsistencyModelPipeline"],
        sdxl: ["StableDiffusionXLPipeline"],
        sdxl_pag: ["StableDiffusionXLPAGPipeline", "StableDiffusionXLControlNetPAGPipeline"],
        sdxl_controlnet: ["StableDiffusionXLControlNetPipeline"],
        sdxl_controlnet_union: ["StableDiffusionXLControlNetUnionPipeline"],
        sd3: ["StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline", "StableDiffusion3ControlNetPipeline"],
        flux: ["FluxPipeline", "FluxControlPipeline", "FluxControlNetPipeline", "FluxKontextPipeline"],
        flux2: ["Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"],
        chroma: ["ChromaPipeline"],
        bria: ["BriaPipeline"],
        pixart: ["PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"],
        sana: ["SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline", "SanaControlNetPipeline"],
        hunyuan_dit: ["HunyuanDiTPipeline", "HunyuanDiTPAGPipeline", "HunyuanDiTControlNetPipeline"],
        aura_flow: ["AuraFlowPipeline"],
        cogview3: ["CogView3PlusPipeline"],
        cogview4: ["CogView4Pipeline", "CogView4ControlPipeline"],
        lumina: ["LuminaPipeline"],
        lumina2: ["Lumina2Pipeline"],
        qwen_image: ["QwenImagePipeline", "QwenImageControlNetPipeline"],
        z_image: [
            "ZImagePipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
            "ZImageOmniPipeline",
        ],
        ovis: ["OvisImagePipeline"],
        longcat: ["LongCatImagePipeline"],
        kolors: ["KolorsPipeline", "KolorsPAGPipeline"],
        prx: ["PRXPipeline", "PRXPixelPipeline"],
        krea2: ["Krea2Pipeline"],
        hidream: ["HiDreamImagePipeline"],
        hunyuan_image: ["HunyuanImagePipeline"],
        ernie: ["ErnieImagePipeline"],
        ideogram4: ["Ideogram4Pipeline"],
        nucleus: ["NucleusMoEImagePipeline"],
        deepfloyd: ["IFPipeline"],
        kandinsky3: ["Kandinsky3Pipeline"],
        kandinsky5: ["Kandinsky5T2IPipeline"],
        bria_fibo: ["BriaFiboPipeline"],
        glm_image: ["GlmImagePipeline"],
        kandinsky22: ["KandinskyV22CombinedPipeline"],
        qwen_image21: ["QwenImage21Pipeline"],
        dreamlite: ["DreamLitePipeline", "DreamLiteMobilePipeline"],
    }.items()
    for name in names
}
