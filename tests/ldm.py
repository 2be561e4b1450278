"""A tiny Stable Diffusion in one file of the layout in which it was published (CompVis latent-diffusion names).

The reverse of the conversion that diffusers makes when it loads such a file, written after the modules of that
repository: `input_blocks`, `middle_block`, `output_blocks`; `down`, `mid`, `up` of its autoencoder.
"""

import re
from pathlib import Path

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, layers: int, with_attention: dict[int, bool]) -> str:
    """`layers`: resnets of a down block; `with_attention`: by up block, which shifts its upsampler."""
    for ours, theirs in ENDS.items():
        if key.startswith(ours + "."):
            return key.replace(ours, theirs, 1)
    found = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    )
    assert found, key
    side, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{RESNET[part]}.{tail}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    first = (layers + 1) * block
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + index + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if with_attention[block] else 1}.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def vae_name(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.attentions.0", "mid.attn_1")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
    if "attn_1" in key:
        for ours, theirs in ATTENTION.items():
            key = key.replace("." + ours + ".", "." + theirs + ".")
    return key


def save_single_file(pipe, path: Path) -> Path:
    """All weights of a StableDiffusionPipeline in one file; returns its path."""
    config, state = pipe.unet.config, {}
    attention = {index: "CrossAttn" in name for index, name in enumerate(config.up_block_types)}
    for key, value in pipe.unet.state_dict().items():
        state["model.diffusion_model." + unet_name(key, config.layers_per_block, attention)] = value
    for key, value in pipe.vae.state_dict().items():
        name = vae_name(key, len(pipe.vae.config.block_out_channels))
        kernel = "attn_1" in name and value.ndim == 2  # 1x1 convolutions there
        state["first_stage_model." + name] = value[:, :, None, None] if kernel else value
    for key, value in pipe.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path
