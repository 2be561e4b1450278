"""Aesthetic scores: LAION's head folded into one affine map, on the vision halves of small CLIPs and SigLIPs."""

from itertools import pairwise

import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_clip import DIM, SIZE, edit, photo_like, to_pil
from torch import nn

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import aesthetic
from rewardtune.rewards.aesthetic import affine

PROMPTS = ["ignored", "as well"]


def laions_mlp(width):
    """The official head: five linear layers, dropout between them, no activations."""
    sizes = [width, 32, 16, 8, 4, 1]
    linear = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    dropout = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    layers = [linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], linear[3], linear[4]]
    mlp = nn.Module()
    mlp.layers = nn.Sequential(*layers)
    return mlp.eval()


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(1)
    return laions_mlp(DIM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mlp):
    """A CLIPModel with a head beside it, as the playground ships it."""
    path = tiny_clip.save(tmp_path_factory.mktemp("aesthetic"))
    save_file(mlp.state_dict(), path / "head.safetensors")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return tiny_clip.copy(folder, tmp_path)


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


def official(folder, mlp, images):
    """CLIPModel, the official processor on 8-bit pictures, L2 normalisation, the MLP layer by layer."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedding = model.get_image_features(pixel_values=pixels).pooler_output
        return mlp.layers(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(-1)


# -- the score --------------------------------------------------------------------------------------------------------


def test_score_is_the_official_predictors(folder, mlp, images):
    scores = rewards.Aesthetic(str(folder))(images, PROMPTS)
    torch.testing.assert_close(scores, official(folder, mlp, images), rtol=1e-5, atol=1e-6)
    assert (scores[0] - scores[1]).abs() > 1e-5
    oblong = photo_like(height=160, width=240)
    torch.testing.assert_close(
        rewards.Aesthetic(str(folder))(oblong, ["x"]), official(folder, mlp, oblong), rtol=0, atol=1e-3
    )


def test_the_folded_head_is_the_mlp_in_float64():
    torch.manual_seed(0)
    mlp = laions_mlp(768)
    weight, bias = affine(mlp.state_dict(), what="head", who="aesthetic")
    x = F.normalize(torch.randn(256, 768, dtype=torch.float64), dim=-1)
    exact = mlp.double().layers(x).squeeze(-1)
    torch.testing.assert_close(x @ weight + bias, exact, rtol=0, atol=1e-12)
    rounded = mlp.bfloat16().layers(x.bfloat16()).squeeze(-1).double()
    assert (rounded - exact).abs().max() > 1e-4  # what the folding avoids


def test_it_keeps_the_contract_and_ignores_the_prompts(folder, images):
    reward = rewards.Aesthetic(str(folder))
    rewards.check_reward(reward, size=(48, 40), prompts=PROMPTS)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))
    half = rewards.Aesthetic(str(folder), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.weight.dtype == torch.float32  # the head is not rounded
    torch.testing.assert_close(half(images, PROMPTS), reward(images, PROMPTS), rtol=0, atol=0.02)


def test_the_head_may_be_one_layer_of_its_own_file(folder, images, tmp_path):
    """As the older sa_0_4_vit_l_14_linear.pth."""
    torch.manual_seed(2)
    linear = nn.Linear(DIM, 1)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    scores = rewards.Aesthetic(str(folder), head=str(tmp_path / "linear.pth"))(images, PROMPTS)
    torch.testing.assert_close(scores, official(folder, _sequential(linear), images), rtol=1e-5, atol=1e-6)
    assert (scores - rewards.Aesthetic(str(folder))(images, PROMPTS)).abs().min() > 1e-3


def _sequential(*layers):
    holder = nn.Module()
    holder.layers = nn.Sequential(*layers)
    return holder


def test_a_vision_model_alone_scores_the_same(folder, copy, images):
    from transformers import CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(copy)
    assert "text_model.final_layer_norm.bias" not in load_file(copy / "model.safetensors")
    ours, theirs = rewards.Aesthetic(str(copy)), rewards.Aesthetic(str(folder))
    torch.testing.assert_close(ours(images, PROMPTS), theirs(images, PROMPTS))


def test_the_playgrounds_tower_takes_a_head(tmp_path):
    from rewardtune import playground

    save_file({"weight": torch.randn(1, 96), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    reward = rewards.Aesthetic(str(playground.clip_path()), head=str(tmp_path / "head.safetensors"))
    rewards.check_reward(reward, size=64, prompts=PROMPTS)


@pytest.mark.parametrize("whole", [False, True])
def test_a_siglip_takes_a_head_of_the_user(tmp_path, whole):
    from transformers import (
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=tower | {"vocab_size": 10}, vision_config=vision))
    if not whole:
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    model.eval().save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=3)
    processor.save_pretrained(tmp_path)
    head = nn.Linear(16, 1)
    save_file(head.state_dict(), tmp_path / "mine.safetensors")
    reward = rewards.AffineEmbedding(str(tmp_path), str(tmp_path / "mine.safetensors"))
    image = photo_like(height=96, width=128)
    pixels = processor([to_pil(image[0])], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = (model.vision_model if whole else model)(pixel_values=pixels).pooler_output
        expected = head(F.normalize(pooled, dim=-1)).squeeze(-1)
    torch.testing.assert_close(reward(image, ["x"]), expected, rtol=0, atol=2e-3)
    rewards.check_reward(reward, size=(48, 40), prompts=["x"])


# -- LAION's head -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(mlp, tmp_path, monkeypatch):
    """A head of our own in the place of the published one, its checksum with it."""
    import hashlib

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "far" / "head.pth"
    path.parent.mkdir()
    torch.save(mlp.state_dict(), path)
    monkeypatch.setattr(aesthetic, "HEAD", path.as_uri())
    monkeypatch.setattr(aesthetic, "HEAD_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_without_a_head_of_its_own_the_model_must_be_openais(copy, published):
    (copy / "head.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"LAION's head was fitted to OpenAI's CLIP ViT-L/14 with hidden_act 'quick_gelu'"
    ):
        rewards.Aesthetic(str(copy))


def test_a_missing_folder_is_named_before_a_head_is_downloaded(monkeypatch):
    monkeypatch.setattr(aesthetic, "download", None)
    with pytest.raises(ConfigError, match=r"cannot load './nope': there is no such folder"):
        rewards.Aesthetic("./nope")


def test_the_published_head_is_downloaded_and_verified(tmp_path, mlp, published, images, monkeypatch):
    folder = tiny_clip.save(tmp_path / "clip", act="quick_gelu")
    monkeypatch.setattr(aesthetic, "OPENAI_VIT_L", {"hidden_act": "quick_gelu"})
    scores = rewards.Aesthetic(str(folder))(images, PROMPTS)
    torch.testing.assert_close(scores, official(folder, mlp, images), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(aesthetic, "HEAD_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="is not the published file"):
        rewards.Aesthetic(str(folder))


def test_offline_the_head_and_the_model_say_how_to_be_placed(published, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"aesthetic: cannot download file.*copy it to .*head\.pth or give its path as head"
    ):
        rewards.Aesthetic()
    with pytest.raises(
        ConfigError, match=r"aesthetic: cannot load 'openai/clip-vit-large-patch14': it needs config.json"
    ):
        rewards.Aesthetic(head=str(published))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"fc.kernel": torch.ones(1, 4)}, "has 'fc.kernel'; legal are weight and bias, or layers.0.weight"),
        ({"weight": torch.ones(2, 4)}, "gives 2 numbers; legal is one, the score"),
        ({"bias": torch.ones(1)}, "the weight of layer 0 is None"),
        ({"0.weight": torch.ones(3, 4), "1.weight": torch.ones(1, 2)}, r"layer 1 is \(1, 2\); legal are linear layers"),
        ({"0.weight": torch.ones(4), "1.weight": torch.ones(1, 4)}, r"layer 0 is \(4,\)"),
        ({"weight": torch.ones(1, 4), "bias": torch.ones(7)}, r"bias of layer 0 is \(7,\); legal is \(1,\)"),
        ({"a.0.weight": torch.ones(1, 4), "b.0.weight": torch.ones(1, 4)}, "the weight of layer 0 twice"),
    ],
)
def test_heads_of_another_kind_are_refused(state, words):
    with pytest.raises(ConfigError, match=words):
        affine(state, what="head.pth", who="aesthetic")


def test_a_head_without_bias_and_in_the_order_of_its_numbers():
    state = {
        "layers.10.weight": torch.full((1, 2), 3.0),
        "layers.2.weight": torch.eye(2),
        "layers.2.bias": torch.ones(2),
    }
    weight, bias = affine(state, what="head.pth", who="aesthetic")
    assert weight.tolist() == [3, 3]
    assert bias.item() == 6


def test_a_head_for_another_width(copy):
    save_file({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, copy / "head.safetensors")
    with pytest.raises(ConfigError, match=r"reads embeddings of 768 numbers, .* gives 8; give the model that"):
        rewards.Aesthetic(str(copy))


def test_a_head_with_relus_is_known_by_its_name(copy):
    """LAION's ava+logos-l14-reluMSE.pth has the keys and shapes of the linear one."""
    (copy / "head.safetensors").rename(copy / "ava+logos-l14-reluMSE.safetensors")
    with pytest.raises(ConfigError, match="is by its name an MLP with ReLUs"):
        rewards.Aesthetic(str(copy), head=str(copy / "ava+logos-l14-reluMSE.safetensors"))


def test_a_model_of_another_kind(copy):
    edit(copy / "config.json", {"model_type": "bert"})
    with pytest.raises(ConfigError, match="is a model of type 'bert'; legal: clip, clip_vision_model, siglip"):
        rewards.Aesthetic(str(copy))


def test_missing_weights_are_not_filled_with_random_numbers(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is incomplete: 1 weights are missing, visual_projection\.weight first"):
        rewards.Aesthetic(str(copy))
