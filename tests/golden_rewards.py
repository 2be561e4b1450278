"""Our rewards opened on the official code's fixtures (tests/golden), and how far they are from it.

parity/official.py says what a fixture holds. The checkpoint goes through the same key table, files and loader as a
downloaded one. test_golden.py asserts the differences, parity/compare.py prints them.
"""

import gzip
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rewardtune import rewards
from rewardtune.rewards.clipmodel import vit_h_config
from rewardtune.rewards.convert import clip_from_open_clip, imagereward_from_official
from rewardtune.rewards.imagereward import text_config, vision_config
from rewardtune.rewards.jpeg import jpeg
from rewardtune.rewards.preprocess import Preprocess

FOLDER = Path(__file__).parent / "golden"
LETTERS = list(string.ascii_lowercase)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Golden:
    """about: what the official run was made of. tensors: what went in and came out. weights: the checkpoint."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def images(self) -> Tensor:
        return self.tensors["images"].float() / 255

    @property
    def prompts(self) -> list[str]:
        return self.about["prompts"]


def read(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        about = json.loads(file.metadata()["about"])
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    return Golden(about, tensors, weights)


def score_and_gradient(reward: rewards.Reward, golden: Golden) -> tuple[Tensor, Tensor]:
    """The scores (B,) and the gradient of their sum at the pixels, as the fixture holds them."""
    pixels = golden.images.requires_grad_()
    scores = reward(pixels, golden.prompts)
    return scores.detach(), torch.autograd.grad(scores.sum(), pixels)[0]


def differences(reward: rewards.Reward, golden: Golden) -> tuple[float, float]:
    """max |score - official|, and max |gradient - official| as a part of the official gradient's largest entry."""
    scores, gradient = score_and_gradient(reward, golden)
    official = golden.tensors["gradient"]
    return (
        (scores - golden.tensors["scores"]).abs().max().item(),
        ((gradient - official).abs().max() / official.abs().max()).item(),
    )


# -- from a fixture to our reward -------------------------------------------------------------------------------------


def clip_tokenizer(folder: Path, *, length: int) -> None:
    from transformers import CLIPTokenizer

    vocabulary = {token: i for i, token in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS)])}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length).save_pretrained(folder)


def clip_folder(golden: Golden, folder: Path, *, hidden_act: str = "gelu", **changes: Any) -> Path:
    """A transformers `CLIPModel` folder from the fixture's checkpoint; `changes` of both towers set traps."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    config = golden.about.get("config") or config_of(golden.about["sizes"])
    both = {"hidden_act": hidden_act} | changes
    towers = {f"{side}_config": config[f"{side}_config"] | both for side in ("vision", "text")}
    model = CLIPModel(CLIPConfig(**towers, projection_dim=config["projection_dim"]))
    state = golden.weights if "config" in golden.about else clip_from_open_clip(golden.weights)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    clip_tokenizer(folder, length=towers["text_config"]["max_position_embeddings"])
    side = towers["vision_config"]["image_size"]
    square = {"height": side, "width": side}
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


def config_of(sizes: dict[str, Any]) -> dict[str, Any]:
    """transformers' words for open_clip's."""
    vision, text, width = sizes["vision"], sizes["text"], sizes["embed_dim"]
    return {
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
            "projection_dim": width,
        },
        "text_config": {
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
            "projection_dim": width,
        },
        "projection_dim": width,
    }


def clipscore(golden: Golden, folder: Path, **traps: Any) -> rewards.Reward:
    return rewards.CLIPScore(model=str(clip_folder(golden, folder, **traps)))


def pickscore(golden: Golden, folder: Path, **traps: Any) -> rewards.Reward:
    return rewards.PickScore(model=str(clip_folder(golden, folder, **traps)), scale="logit")


def hpsv2(golden: Golden, folder: Path, **traps: Any) -> rewards.Reward:
    return rewards.HPSv2(model=str(clip_folder(golden, folder, **traps)))


def aesthetic(golden: Golden, folder: Path, **traps: Any) -> rewards.Reward:
    from safetensors.torch import save_file

    head = {key.removeprefix("head."): value for key, value in golden.weights.items() if key.startswith("head.")}
    tower = {key: value for key, value in golden.weights.items() if not key.startswith("head.")}
    clip_folder(
        Golden(golden.about, golden.tensors, tower), folder, hidden_act=traps.pop("hidden_act", "quick_gelu"), **traps
    )
    save_file(head, folder / "head.safetensors")
    return rewards.Aesthetic(model=str(folder))


def imagereward(golden: Golden, folder: Path, **settings: Any) -> rewards.Reward:
    torch.save(golden.weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(golden.about["config"] | settings))
    (folder / "vocab.txt").write_text("\n".join(golden.about["words"]) + "\n")
    return rewards.ImageReward(model=str(folder))


def objectness(golden: Golden, folder: Path, **traps: Any) -> rewards.Reward:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil

    config = golden.about["config"]
    towers = {f"{side}_config": config[f"{side}_config"] | traps for side in ("vision", "text")}
    model = OwlViTForObjectDetection(OwlViTConfig(**towers, projection_dim=config["projection_dim"]))
    model.load_state_dict(golden.weights, strict=True)
    model.save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer(folder, length=config["text_config"]["max_position_embeddings"])
    return rewards.Objectness(golden.about["target"], model=str(folder))


BUILDERS: dict[str, Callable[..., rewards.Reward]] = {
    "clipscore": clipscore,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
    "objectness": objectness,
}


# -- the transforms ---------------------------------------------------------------------------------------------------

# How each official way from a picture to the network's input is written here, and what it rounds to 8 bits between.
WAYS = {
    "openai_clip": {"fit": "crop"},
    "transformers_clip": {"fit": "crop"},
    "transformers_owlvit": {"fit": "squash"},
    "hpsv2": {"fit": "letterbox", "clamp": "none"},
}


def transform_difference(golden: Golden, way: str, picture: str, **settings: Any) -> tuple[float, float]:
    """max and mean |ours - official| over the network's input, in units of 1/255."""
    about = golden.about
    preprocess = Preprocess(
        size=about["size"], mean=tuple(about["mean"]), std=tuple(about["std"]), **WAYS[way] | settings
    )
    ours = preprocess(golden.tensors[f"{picture}.picture"][None].float() / 255)[0]
    gap = 255 * (ours - golden.tensors[f"{picture}.{way}"]).abs() * torch.tensor(about["std"]).view(3, 1, 1)
    return gap.max().item(), gap.mean().item()


def jpeg_psnr(golden: Golden, quality: int) -> Tensor:
    """dB of our codec against Pillow's, by picture."""
    ours = jpeg(golden.tensors["pictures"].float() / 255, quality)
    error = (ours - golden.tensors[f"quality_{quality}"].float() / 255).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


# -- names, shapes and tokens at full size ----------------------------------------------------------------------------


def official_shapes(name: str) -> dict[str, Tensor]:
    """The full-size official checkpoint of a reward, without its numbers."""
    shapes = json.loads((FOLDER / "keys.json").read_text())[name]
    return {
        key: torch.empty([int(side) for side in shape.split("x") if side], device="meta")
        for key, shape in shapes.items()
    }


def full_size(name: str) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """(names and shapes that the key table makes of the official checkpoint, those of the transformers model)."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

    if name == "imagereward":
        state = imagereward_from_official(official_shapes(name))
        settings = json.loads((FOLDER / "keys.json").read_text())["med_config"]
        vision = vision_config(state, settings)
        text = text_config(settings, width=vision["hidden_size"])
        with torch.device("meta"):
            towers = {
                "vision": BlipVisionModel(BlipVisionConfig(**vision)),
                "text": BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False),
            }
        wanted = {
            f"{tower}.{key}": value.shape
            for tower, model in towers.items()
            for key, value in model.state_dict().items()
        }
        wanted |= {"head.weight": torch.Size([768]), "head.bias": torch.Size([])}
    else:
        state = clip_from_open_clip(official_shapes(name))
        large = CLIPConfig(
            text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            vision_config={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
            projection_dim=768,
        )
        with torch.device("meta"):
            model = CLIPModel(large if name == "aesthetic" else vit_h_config())
        wanted = {key: value.shape for key, value in model.state_dict().items()}
    return {key: value.shape for key, value in state.items()}, wanted


def bpe_tokenizer(file: Path) -> Any:
    """transformers' CLIPTokenizer of the official byte pairs, as open_clip reads its file."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges=merges
    )
