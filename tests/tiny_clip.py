"""A complete CLIPModel folder with small random weights: config, weights, tokenizer, image processor."""

import json
import os
import string
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIZE, LENGTH, DIM = 32, 16, 8
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
PROMPTS = ["a red cat", "two dogs"]


def save(path: Path, *, act: str = "gelu") -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tokens = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(path)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"projection_dim": DIM, "hidden_act": act}
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": LENGTH, "pad_token_id": end}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | text | {"bos_token_id": start, "eos_token_id": end},
            vision_config=tower | {"image_size": SIZE, "patch_size": 8},
            projection_dim=DIM,
        )
    )
    for parameter in model.parameters():  # transformers' small initial values would hide errors
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(path)
    return path


def copy(source: Path, target: Path) -> Path:
    """A folder whose files may be changed."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_tower(folder: Path, tower: str, **change: Any) -> None:
    """Change config.json's text_config or vision_config; None removes a key."""
    config = json.loads((folder / "config.json").read_text())
    merged = config[tower] | change
    config[tower] = {key: value for key, value in merged.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit picture."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


def photo_like(*, height: int, width: int) -> Tensor:
    """(1, 3, H, W), 8-bit values in [0, 1]: colour noise with a photograph's spectrum (1/f^1.5) and one hard edge."""
    generator = torch.Generator().manual_seed(3)
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    noise = torch.fft.rfft2(torch.randn(4, height, width, generator=generator))
    noise = torch.fft.irfft2(noise * frequency.clamp_min(1 / max(height, width)) ** -1.5, s=(height, width))
    noise = noise / noise.std(dim=(1, 2), keepdim=True)
    rgb = 0.5 + 0.18 * noise[:1] + 0.04 * noise[1:]
    rgb[:, height // 3 : height // 2, width // 4 : width // 2] *= 0.4
    return rgb.clamp(0, 1).mul(255).round()[None] / 255


class Bomb:
    """Pickled, it asks whoever opens it to make a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)
