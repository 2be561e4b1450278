"""CLIPScore and its preprocessing against the official transformers classes, on a tiny CLIP with random weights."""

import json
import string

import numpy as np
import pytest
import torch
from PIL import Image

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import clip as clip_module
from rewardtune.rewards.preprocess import crop_preprocess, resize

MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
PROMPTS = ["a red cat", "two dogs"]
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete CLIPModel folder: config, weights, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    tokens = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(path)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "bos_token_id": start, "eos_token_id": end}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | text | {"pad_token_id": end, "projection_dim": 8},
            vision_config=tower | {"image_size": SIZE, "patch_size": 8, "projection_dim": 8},
            projection_dim=8,
        )
    )
    for parameter in model.parameters():  # transformers' small initial values would hide errors
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def score(folder):
    return rewards.CLIPScore(model=str(folder))


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def to_pil(image):
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())


def smooth_photo(*, height, width):
    """8-bit values in [0, 1] without much detail above the target size, as photographs are."""
    noise = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(3))
    return resize(noise, height=height, width=width).mul(255).round() / 255


def official_cosine(folder, images, prompts):
    """CLIPModel.forward on pixels by the official processor from 8-bit images."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return out.logits_per_image.diagonal() / model.logit_scale.exp()


# -- the score ------------------------------------------------------------------------------------------------------


def test_score_is_the_official_forward(folder, score, images):
    images = images.mul(255).round() / 255  # at the model's own size the two differ by rounding errors only
    ours = score(images, PROMPTS)
    torch.testing.assert_close(ours, official_cosine(folder, images, PROMPTS), rtol=1e-5, atol=1e-6)
    assert (ours[0] - ours[1]).abs() > 1e-3


def test_score_is_the_official_forward_on_a_large_oblong_image(folder, score):
    images = smooth_photo(height=160, width=240).expand(2, -1, -1, -1)
    torch.testing.assert_close(score(images, PROMPTS), official_cosine(folder, images, PROMPTS), rtol=0, atol=2e-3)


def test_score_is_per_pair(score, images):
    swapped = score(images.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(score(images, PROMPTS).flip(0), swapped)
    assert not torch.allclose(score(images, PROMPTS[::-1]), score(images, PROMPTS), atol=1e-3)


def test_gradient_by_finite_differences(folder):
    score = rewards.CLIPScore(model=str(folder), dtype="float64")
    images = smooth_photo(height=40, width=48).double() * 0.8 + 0.1  # away from the clamp after the resize
    leaf = images.clone().requires_grad_()
    gradient = torch.autograd.grad(score(leaf, PROMPTS[:1]).sum(), leaf)[0]
    generator, h = torch.Generator().manual_seed(0), 1e-6
    for _ in range(3):
        direction = torch.randn(images.shape, dtype=torch.float64, generator=generator)
        ahead, behind = (score(images + step * direction, PROMPTS[:1]).item() for step in (h, -h))
        assert (ahead - behind) / (2 * h) == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_contract_and_no_leak_between_samples(score):
    rewards.check_reward(score + 0.2 * rewards.Symmetry(), size=(48, 40), prompts=PROMPTS)


def test_gradient_goes_to_the_images_alone_and_texts_have_no_graph(folder, images):
    score = rewards.CLIPScore(model=str(folder))
    leaf = images.requires_grad_()
    score(leaf, PROMPTS).sum().backward()
    score(leaf, PROMPTS).sum().backward()  # cached texts must survive a second backward
    assert leaf.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in score.model.parameters())
    assert not score.model.training
    assert not any(t.requires_grad or t.is_inference() for t in (score.text(prompt) for prompt in PROMPTS))


def test_texts_are_computed_once_and_the_cache_is_bounded(folder, images, monkeypatch):
    score, encoded = rewards.CLIPScore(model=str(folder)), []
    encode = score._encode
    monkeypatch.setattr(score, "_encode", lambda prompt: encoded.append(prompt) or encode(prompt))
    monkeypatch.setattr(clip_module, "CACHED_PROMPTS", 2)
    score(images, ["a", "a"])
    score(images, ["b", "a"])
    assert encoded == ["a", "b"]
    score(images, ["c", "a"])  # "b" is the oldest and goes
    score(images, ["a", "c"])
    assert encoded == ["a", "b", "c"]
    score(images, ["b", "c"])
    assert encoded == ["a", "b", "c", "b"]
    assert len(score._texts) == 2


def test_a_prompt_does_not_depend_on_its_companions(folder, images):
    alone, together = rewards.CLIPScore(model=str(folder)), rewards.CLIPScore(model=str(folder))
    together(images, ["a much longer one", PROMPTS[0]])
    assert torch.equal(alone.text(PROMPTS[0]), together.text(PROMPTS[0]))


def test_model_and_cached_texts_follow_the_images_to_their_device(folder, images):
    score = rewards.CLIPScore(model=str(folder))
    score.text("a")  # cached on the CPU
    scores = score.to("meta").native(images.to("meta"), ["a", "b"])
    assert score.model.device.type == scores.device.type == "meta"
    assert scores.shape == (2,)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_contract_on_cuda(folder):
    half = rewards.CLIPScore(model=str(folder), dtype="bfloat16")
    rewards.check_reward(
        half + rewards.Compressibility() + rewards.Colour("red"), size=32, prompts=PROMPTS, device="cuda"
    )


def test_a_cut_prompt_is_said_and_cut_as_transformers_does(folder, score, images):
    long = ["abcdefghijklmno", "a"]  # 15 letters, start and end: one token too many
    with pytest.warns(UserWarning, match="CLIP reads the first 16 tokens"):
        ours = score(images, long)
    torch.testing.assert_close(ours, official_cosine(folder, images.mul(255).round() / 255, long), rtol=0, atol=5e-3)


def test_bfloat16_network_gives_float32_scores(folder, score, images):
    half = rewards.CLIPScore(model=str(folder), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half(images, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(images, PROMPTS), score(images, PROMPTS), rtol=0, atol=0.05)


# -- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (300, 403)])
def test_preprocessing_is_the_pil_processors_to_8_bit_rounding(height, width):
    from transformers import CLIPImageProcessorPil

    image = smooth_photo(height=height, width=width)
    ones, zeros = [1.0] * 3, [0.0] * 3
    official = CLIPImageProcessorPil(image_mean=zeros, image_std=ones)(to_pil(image[0]), return_tensors="pt")
    ours = crop_preprocess(image, size=224, mean=zeros, std=ones)
    difference = (ours - official["pixel_values"]).abs() * 255
    assert difference.max() <= 3
    assert difference.mean() <= 0.35


def test_preprocessing_normalises_and_is_the_identity_at_equal_size(images):
    same = crop_preprocess(images, size=SIZE, mean=[0.0] * 3, std=[1.0] * 3)
    assert torch.equal(same, images)
    ours = crop_preprocess(images, size=SIZE, mean=MEAN, std=STD).numpy()
    np.testing.assert_allclose(ours[:, 2], (images.numpy()[:, 2] - 0.6) / 0.2, rtol=1e-5)


def test_every_pixel_gets_a_gradient_when_shrinking():
    leaf = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.25).requires_grad_()
    weights = torch.rand(32, 32, generator=torch.Generator().manual_seed(1))
    (crop_preprocess(leaf, size=32, mean=MEAN, std=STD) * weights).sum().backward()
    assert (leaf.grad != 0).float().mean() > 0.99


def test_settings_may_stand_in_processor_config_json(folder, images, score, tmp_path):
    """transformers 5 writes the processor's two halves into one file."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(rewards.CLIPScore(model=str(tmp_path))(images, PROMPTS), score(images, PROMPTS))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], "put config.json and model.safetensors"),
        (["model.safetensors"], "put config.json and model.safetensors"),
        (["tokenizer.json", "tokenizer_config.json"], "put tokenizer.json"),
        (["preprocessor_config.json"], "put preprocessor_config.json"),
    ],
)
def test_an_incomplete_folder_is_told_which_file(copy, missing, words):
    for name in missing:
        (copy / name).unlink()
    with pytest.raises(ConfigError, match=words) as caught:
        rewards.CLIPScore(model=str(copy))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_filled_with_random_numbers(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing, visual_projection\.weight first"):
        rewards.CLIPScore(model=str(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 40}}, "legal is resize, centre crop to the same size"),
        ({"do_resize": False}, "legal is resize"),
        ({"size": 40, "crop_size": 40}, "crops to 40 pixels but .* reads 32"),
    ],
)
def test_foreign_image_settings_are_refused(copy, change, words):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        rewards.CLIPScore(model=str(copy))


def test_offline_hub_model_says_what_to_download(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"huggingface.co/laion/CLIP-ViT-H.*hf download laion/.*--local-dir"
    ) as caught:
        rewards.CLIPScore()
    assert "model.safetensors" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such folder"):
        rewards.CLIPScore(model=str(tmp_path / "nothing"))


def test_a_foreign_tokenizer_is_refused(copy, folder):
    config = json.loads((copy / "config.json").read_text())
    settings = json.loads((copy / "tokenizer.json").read_text())
    assert len(settings["model"]["vocab"]) == config["text_config"]["vocab_size"]
    keep = [t for t, i in settings["model"]["vocab"].items() if i < 10 or i >= 52]
    settings["model"]["vocab"] = {t: i for i, t in enumerate(keep)}
    for added in settings["added_tokens"]:
        added["id"] = keep.index(added["content"])
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has 12 tokens but the model reads 54"):
        rewards.CLIPScore(model=str(folder), processor=str(copy))


@pytest.mark.parametrize("dtype", ["float33", "int64", "nn"])
def test_bad_dtype(folder, dtype):
    with pytest.raises(ConfigError, match="legal: float32, bfloat16"):
        rewards.CLIPScore(model=str(folder), dtype=dtype)
