"""Run the official reward code on tiny random models and write what it answers to tests/golden/*.safetensors.

    make parity            # makes the environment, runs this in it, then compares our classes (tests/golden_rewards.py)

A fixture holds the checkpoint as the official code would save it ("weights.*"), images (B, 3, H, W) uint8, the token
ids, the scores (B,) and the gradient of their sum at the pixels (on [0, 1]). Everything from the pixels on is official
code: its transforms on tensors, its towers, its formula. Only sizes are ours, so that a fixture has a few hundred kB;
where a size is a constant in the official code, the line that changes it says so. Numbers are float32 on one thread.
"""

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import shims

# ruff: noqa: E402 - the shims come before the packages that they mend
TORCHVISION = shims.install()

import clip.clip
import clip.model
import ImageReward.ImageReward
import numpy as np
import open_clip
import open_clip.model
import open_clip.transform
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import transformers
from hpsv2.src.open_clip import model as hps_model
from hpsv2.src.open_clip import transform as hps_transform
from ImageReward.models.BLIP import blip, blip_pretrain, vit
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
LIMIT = 300_000  # bytes of a fixture
PROMPTS = ["a red fox", "two blue books on a shelf"]
SIZE = 32  # side of every tiny network's input
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


# -- inputs -----------------------------------------------------------------------------------------------------------


def images() -> Tensor:
    """(2, 3, 40, 56) uint8, oblong, and so far from black and white that a bicubic resize stays in [0, 1].

    There the clamp of 8-bit images does nothing, so that tensors through the official transforms, which do not clamp,
    must agree with ours to float32 rounding; with the clamp the transforms are compared in `preprocessing`.
    """
    noise = torch.rand(2, 3, 10, 14, generator=torch.Generator().manual_seed(1))
    return (255 * (0.25 + 0.5 * F.interpolate(noise, (40, 56), mode="bilinear"))).round().byte()


def picture(height: int, width: int, *, seed: int, hard: bool = False) -> Image.Image:
    """Photo-like: soft shades, texture, edges, black and white; drawn four times larger and averaged, as a camera does.

    hard: edges of one pixel between black and white, as no photograph's are.
    """
    fine, ink, paper = (1, 0.0, 1.0) if hard else (4, 0.15, 0.85)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.randn(1, 3, *grid, generator=generator), (height, width), mode="bicubic") * weight
        for grid, weight in (((3, 4), 0.2), ((12, 16), 0.06), ((height, width), 0.02))
    ]
    shades = F.interpolate((0.5 + sum(layers)).clamp(0, 1), scale_factor=fine, mode="nearest")[0]
    y, x = torch.meshgrid(torch.arange(height * fine) / fine, torch.arange(width * fine) / fine, indexing="ij")
    shades[:, (x - width / 3) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = torch.tensor([[paper], [ink], [ink]])
    shades[:, (x > 0.7 * width + 0.4) & (y > 0.6 * height + 0.3)] = paper
    shades = F.avg_pool2d(shades, fine)
    return Image.fromarray((255 * shades).round().byte().permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def clip_ids(prompts: Sequence[str], length: int = 16) -> Tensor:
    """CLIP's byte pairs with an empty merge list: letters, the last of a word marked; start 52, end 53, padding 0."""
    rows = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [LETTERS.index(c) + 26 * (i == len(word) - 1) for word in prompt.split() for i, c in enumerate(word)]
        ids = [52, *ids[: length - 2], 53]
        row[: len(ids)] = torch.tensor(ids)
    return rows


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int, small: Sequence[str] = ()) -> nn.Module:
    """Random weights at which every part matters: the official initial values are so small that errors would hide.

    small: parts of names whose weights are drawn with the trained models' std 0.02, where the layer norm's eps shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("logit_scale"):
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if any(part in name for part in small) and "LayerNorm" not in name:
            weight.copy_(0.02 * noise)
        elif weight.ndim > 1:
            weight.copy_(noise * 1.5 / math.sqrt(weight[0].numel()))
        else:
            weight.copy_(0.2 * noise + (1.0 if "weight" in name else 0.0))
    return model.eval()


# -- running and writing ----------------------------------------------------------------------------------------------


def score_and_gradient(score: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    pixels = (images().float() / 255).requires_grad_()
    scores = score(pixels)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    return {"images": images(), "scores": scores.detach(), "gradient": gradient}


def on_tensors(transform: T.Compose) -> Callable[[Tensor], Tensor]:
    """The official transform from tensors (B, 3, H, W) in [0, 1] on: without the steps that read a PIL image."""
    steps = [step for step in transform.transforms if isinstance(step, nn.Module)]
    assert len(steps) in (2, 3), steps  # resize, perhaps centre crop, normalise
    return lambda batch: torch.stack([T.Compose(steps)(image) for image in batch])


def write(
    name: str, tensors: dict[str, Tensor], *, weights: Iterable[tuple[str, Tensor]] = (), **about: object
) -> None:
    tensors |= {f"weights.{key}": value for key, value in weights}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    path = GOLDEN / f"{name}.safetensors"
    save_file(tensors, path, metadata={"about": json.dumps({"name": name} | about, sort_keys=True)})
    assert path.stat().st_size < LIMIT, f"{path} has {path.stat().st_size} bytes; legal are {LIMIT}"
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", tensors.get("scores", torch.empty(0)).tolist())


# -- the rewards ------------------------------------------------------------------------------------------------------

CLIP_VISION = {"layers": 2, "width": 24, "head_width": 6, "patch_size": 8, "image_size": SIZE}
CLIP_TEXT = {"context_length": 16, "vocab_size": 54, "width": 16, "heads": 4, "layers": 2}
CLIP_SIZES = {"vision": CLIP_VISION, "text": CLIP_TEXT, "embed_dim": 12}


def clipscore() -> None:
    """open_clip: the cosine of its two normalised embeddings."""
    model = open_clip.model.CLIP(
        12, open_clip.model.CLIPVisionCfg(**CLIP_VISION), open_clip.model.CLIPTextCfg(**CLIP_TEXT)
    )
    randomise(model, seed=2, small=["class_embedding", "positional_embedding"])
    preprocess = on_tensors(open_clip.transform.image_transform(SIZE, is_train=False))
    ids = clip_ids(PROMPTS)

    def score(pixels: Tensor) -> Tensor:
        image = model.encode_image(preprocess(pixels), normalize=True)
        return (image * model.encode_text(ids, normalize=True)).sum(-1)

    about = {"official": f"open_clip_torch {open_clip.__version__}", "prompts": PROMPTS, "sizes": CLIP_SIZES}
    write("clipscore", score_and_gradient(score) | {"ids": ids}, weights=model.state_dict().items(), **about)


def hpsv2() -> None:
    """hpsv2's own open_clip and `img_score.score`: diagonal(image @ text.T), letterboxed images."""
    model = hps_model.CLIP(12, hps_model.CLIPVisionCfg(**CLIP_VISION), hps_model.CLIPTextCfg(**CLIP_TEXT))
    randomise(model, seed=3, small=["class_embedding", "positional_embedding"])
    preprocess = on_tensors(hps_transform.image_transform(SIZE, is_train=False, resize_longest_max=True))
    ids = clip_ids(PROMPTS)

    def score(pixels: Tensor) -> Tensor:
        image_features, text_features, _ = model(preprocess(pixels), ids)
        return torch.diagonal(image_features @ text_features.T)

    about = {"official": "hpsv2 1.2.0", "prompts": PROMPTS, "sizes": CLIP_SIZES}
    write("hpsv2", score_and_gradient(score) | {"ids": ids}, weights=model.state_dict().items(), **about)


def pickscore() -> None:
    """The model card's code on transformers 4: exp(logit_scale) * cosine, each image against its own prompt."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 12, "hidden_act": "gelu"}
    vision = tower | {"hidden_size": 24, "intermediate_size": 96, "image_size": SIZE, "patch_size": 8}
    text = tower | {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 54, "max_position_embeddings": 16}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = randomise(transformers.CLIPModel(config), seed=4, small=["class_embedding", "position_embedding"])
    preprocess = on_tensors(clip.clip._transform(SIZE))
    ids = clip_ids(PROMPTS)

    def score(pixels: Tensor) -> Tensor:
        image_embs = model.get_image_features(pixel_values=preprocess(pixels))
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(input_ids=ids)
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        scores = model.logit_scale.exp() * (text_embs @ image_embs.T)
        return scores.diagonal()

    about = {"official": f"transformers {transformers.__version__}", "prompts": PROMPTS}
    about |= {"config": {"vision_config": vision, "text_config": text, "projection_dim": 12}}
    write("pickscore", score_and_gradient(score) | {"ids": ids}, weights=model.state_dict().items(), **about)


def narrow_head(width: int) -> nn.Sequential:
    """The LAION head and ImageReward's: five linear layers, dropout between, no activations; 1024-128-64-16 there."""
    sizes = [width, 20, 16, 12, 8, 1]
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(
        linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), linear[3], linear[4]
    )


def aesthetic() -> None:
    """openai-clip's tower and improved-aesthetic-predictor's `simple_inference.py`: its head on the unit vector."""
    model = clip.model.CLIP(
        embed_dim=12, image_resolution=SIZE, vision_layers=1, vision_width=64, vision_patch_size=8,
        context_length=16, vocab_size=54, transformer_width=16, transformer_heads=4, transformer_layers=2,
    )  # fmt: skip
    # openai-clip fixes the head width to 64; the tower itself takes any.
    model.visual = clip.model.VisionTransformer(
        input_resolution=SIZE, patch_size=8, width=24, layers=2, heads=4, output_dim=12
    )
    randomise(model, seed=5, small=["class_embedding", "positional_embedding"])
    head = nn.Module()
    head.layers = narrow_head(12)
    randomise(head, seed=6)
    preprocess = on_tensors(clip.clip._transform(SIZE))

    def score(pixels: Tensor) -> Tensor:
        features = model.encode_image(preprocess(pixels))
        return head.layers(features / features.norm(dim=-1, keepdim=True))[:, 0]

    weights = [*model.state_dict().items(), *((f"head.{key}", value) for key, value in head.state_dict().items())]
    sizes = {"vision": CLIP_VISION, "text": CLIP_TEXT, "embed_dim": 12}
    about = {"official": "openai-clip 1.0.1, improved-aesthetic-predictor's head", "prompts": PROMPTS, "sizes": sizes}
    write("aesthetic", score_and_gradient(score), weights=weights, **about)


# The file beside ImageReward.pt, which is BLIP's own.
MED_CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip


def imagereward() -> None:
    """image-reward 1.5: `ImageReward.score_gard`, the differentiable entrance that ReFL trains on."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = MED_CONFIG | {
        "hidden_size": 24, "intermediate_size": 48, "max_position_embeddings": 40, "num_attention_heads": 3,
        "num_hidden_layers": 2, "vocab_size": len(words) + 2,
    }  # fmt: skip

    def tiny_vit(*_: object) -> tuple[nn.Module, int]:  # the official one knows "base" and "large" only
        tower = vit.VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=4, drop_path_rate=0.1
        )
        return tower, 24

    with tempfile.TemporaryDirectory() as folder:
        (vocabulary := Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
        (med_config := Path(folder) / "med_config.json").write_text(json.dumps(config))
        bert = transformers.BertTokenizer(vocabulary)  # bert-base-uncased there; the next line finds this one
        blip.BertTokenizer.from_pretrained = lambda _: bert
        blip_pretrain.init_tokenizer = blip.init_tokenizer
        blip_pretrain.create_vit = tiny_vit
        official = blip_pretrain.BLIP_Pretrain
        ImageReward.ImageReward.BLIP_Pretrain = lambda image_size, **settings: official(
            image_size=SIZE, embed_dim=4, **settings
        )
        model = ImageReward.ImageReward.ImageReward(med_config=str(med_config))
    model.mlp.layers = narrow_head(24)
    randomise(model, seed=7, small=["cls_token", "pos_embed", "patch_embed", "embeddings"])
    text = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    preprocess = on_tensors(ImageReward.ImageReward._transform(SIZE))

    def score(pixels: Tensor) -> Tensor:
        return model.score_gard(text.input_ids, text.attention_mask, preprocess(pixels))[:, 0]

    tensors = score_and_gradient(score) | {"ids": text.input_ids, "mask": text.attention_mask}
    about = {"official": "image-reward 1.5", "prompts": PROMPTS, "words": words}
    about |= {"config": config | {"vision_num_attention_heads": 4}}
    write("imagereward", tensors, weights=model.state_dict().items(), **about)


def objectness() -> None:
    """transformers 4's full OWL-ViT forward (the original is JAX): the largest logit of the query over the boxes."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = tower | {"hidden_size": 24, "intermediate_size": 96, "image_size": SIZE, "patch_size": 8}
    text = tower | {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 54, "max_position_embeddings": 16}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 0}
    config = transformers.OwlViTConfig(vision_config=vision, text_config=text, projection_dim=16)
    model = transformers.OwlViTForObjectDetection(config)
    randomise(model, seed=8, small=["class_embedding", "position_embedding"])
    ids = clip_ids(["book"]).expand(2, -1)  # one query for each image: (batch * queries, length)

    def score(pixels: Tensor) -> Tensor:
        squashed = T.Compose([T.Resize((SIZE, SIZE), T.InterpolationMode.BICUBIC), CLIP_NORMALISE])(pixels)
        logits = model(input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=squashed).logits  # (B, boxes, 1)
        return -F.softplus(logits[..., 0].amax(dim=1))

    about = {"official": f"transformers {transformers.__version__}, full forward", "target": "book"}
    about |= {"config": {"vision_config": vision, "text_config": text, "projection_dim": 16}, "prompts": PROMPTS}
    write("objectness", score_and_gradient(score) | {"ids": ids}, weights=model.state_dict().items(), **about)


# -- the transforms and JPEG ------------------------------------------------------------------------------------------

CLIP_NORMALISE = T.Normalize(
    clip.clip._transform(SIZE).transforms[-1].mean, clip.clip._transform(SIZE).transforms[-1].std
)


def preprocessing() -> None:
    """Every official way from an 8-bit picture to a network's input, full range, landscape and portrait.

    Sizes at which the centre crop cuts an even rest: half a pixel is rounded to even by torchvision, down by
    transformers.
    """
    pictures = {
        "landscape": picture(80, 120, seed=11),
        "portrait": picture(117, 84, seed=12),
        "hard edges": picture(80, 98, seed=13, hard=True),
    }
    size = 36
    square = {"height": size, "width": size}
    ways = {
        "openai_clip": clip.clip._transform(size),
        "image_reward": ImageReward.ImageReward._transform(size),
        "open_clip": open_clip.transform.image_transform(size, is_train=False),
        "hpsv2": hps_transform.image_transform(size, is_train=False, resize_longest_max=True),
        "transformers_clip": processor(transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)),
        "transformers_owlvit": processor(transformers.OwlViTImageProcessor(size=square)),
    }
    tensors = {f"{name}.picture": as_tensor(image) for name, image in pictures.items()}
    for way, transform in ways.items():
        for name, image in pictures.items():
            tensors[f"{name}.{way}"] = transform(image).float()
    for name in pictures:  # three copies of one function: keep it once
        for copy in ("image_reward", "open_clip"):
            assert torch.equal(tensors.pop(f"{name}.{copy}"), tensors[f"{name}.openai_clip"]), copy
    about = {"official": TORCHVISION, "size": size}
    write("preprocessing", tensors, mean=list(CLIP_NORMALISE.mean), std=list(CLIP_NORMALISE.std), **about)


def processor(official: Callable[..., object]) -> Callable[[Image.Image], Tensor]:
    return lambda image: official(image, return_tensors="pt").pixel_values[0]


def jpeg() -> None:
    """Pillow's JPEG (libjpeg, 4:2:0) of two pictures at three qualities, decoded again."""
    import io

    import PIL

    pictures = [picture(96, 112, seed=seed) for seed in (21, 22)]
    tensors = {"pictures": torch.stack([as_tensor(image) for image in pictures])}
    for quality in (20, 50, 80):
        decoded = []
        for image in pictures:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
            decoded.append(as_tensor(Image.open(file).convert("RGB")))
        tensors[f"quality_{quality}"] = torch.stack(decoded)
    write("jpeg", tensors, official=f"Pillow {PIL.__version__}")


# -- the tokenizer and the checkpoints at full size -------------------------------------------------------------------


TEXTS = [
    "",
    "a red fox",
    "  Two BLUE books,on a   shelf!! ",
    "an astronaut's dog, 4k (highly detailed:1.3), 85mm f/1.8 -- it's 50% off",
    "東京の夜景, neon",
    "café crème, naïve façade, señor",
    "a cat 🐈‍⬛ and 3½ dogs 👨‍👩‍👧",
    "under_score hyphen-ated semi;colon [brackets] <tag> #hash @at $5 a=b",
    "word " * 100,
]


def tokens() -> None:
    """open_clip's token ids of ordinary and awkward prompts, without the padding."""
    ids = [[i for i in row if i] for row in open_clip.tokenize(TEXTS).tolist()]
    (GOLDEN / "tokens.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}, ensure_ascii=False) + "\n")
    print("tokens.json:", [len(row) for row in ids])


def keys() -> None:
    """Name and shape of every tensor in the official checkpoints, from the official classes."""
    configs = Path(hps_model.__file__).parent / "model_configs"
    vit_h = {
        "clipscore": (open_clip.model.CLIP, open_clip.get_model_config("ViT-H-14")),
        "hpsv2": (hps_model.CLIP, json.loads((configs / "ViT-H-14.json").read_text())),
    }
    with torch.device("meta"):
        models = {name: make(**config) for name, (make, config) in vit_h.items()}
        models["aesthetic"] = clip.model.CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)  # ViT-L/14
    with tempfile.TemporaryDirectory() as folder:
        (med_config := Path(folder) / "med_config.json").write_text(json.dumps(MED_CONFIG))
        blip_pretrain.init_tokenizer = lambda: None  # a download
        # Its constructor reads numbers, which the meta device does not have: 1.8 GB for some seconds.
        models["imagereward"] = ImageReward.ImageReward.ImageReward(med_config=str(med_config))
    shapes = {
        name: {key: "x".join(map(str, value.shape)) for key, value in model.state_dict().items()}
        for name, model in models.items()
    }
    (GOLDEN / "keys.json").write_text(json.dumps(shapes | {"med_config": MED_CONFIG}, indent=0) + "\n")
    print("keys.json:", {name: len(found) for name, found in shapes.items()})


ALL = [keys, tokens, clipscore, pickscore, hpsv2, aesthetic, imagereward, objectness, preprocessing, jpeg]

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    GOLDEN.mkdir(exist_ok=True)
    print(f"{TORCHVISION}, torch {torch.__version__}, transformers {transformers.__version__}")
    for make in ALL:
        if not sys.argv[1:] or make.__name__ in sys.argv[1:]:
            make()
