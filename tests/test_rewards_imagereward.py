"""ImageReward's files: the key table, the traps of its config, its tokens, and bad folders.

That scores, gradients and full-size names are the official ones: tests/test_golden.py.
"""

import json
import shutil
import warnings

import golden_rewards
import pytest
import torch
from tiny_clip import edit

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import imagereward
from rewardtune.rewards.convert import IMAGE_REWARD_MEAN, IMAGE_REWARD_STD, imagereward_from_official

GOLDEN = golden_rewards.read("imagereward")
MED_CONFIG = json.loads((golden_rewards.FOLDER / "keys.json").read_text())["med_config"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """A complete folder; tests break one thing in it."""
    path = tmp_path / "imagereward"
    path.mkdir()
    golden_rewards.imagereward(GOLDEN, path)
    shutil.rmtree(tmp_path / "hub")
    return path


# -- the key table ----------------------------------------------------------------------------------------------------


def test_what_no_shape_betrays_is_right_at_full_size():
    state = imagereward_from_official(golden_rewards.official_shapes("imagereward"))
    vision = imagereward.vision_config(state, MED_CONFIG)
    text = imagereward.text_config(MED_CONFIG, width=1024)
    seen = {key: (vision[key], text[key]) for key in ("num_attention_heads", "layer_norm_eps", "hidden_act")}
    assert seen == {"num_attention_heads": (16, 12), "layer_norm_eps": (1e-6, 1e-12), "hidden_act": ("gelu", "gelu")}
    assert (vision["image_size"], vision["patch_size"]) == (224, 16)
    assert text["encoder_hidden_size"] == 1024


def test_every_key_is_used_exactly_once():
    state = golden_rewards.official_shapes("imagereward")
    assert len(state) == 625
    with pytest.raises(ConfigError, match=r"'blip.visual_encoder.new.weight', which ImageReward.pt does not know"):
        imagereward_from_official(state | {"blip.visual_encoder.new.weight": torch.empty(1, device="meta")})
    for layer in (0, 2, 4, 6, 7):
        with pytest.raises(ConfigError, match="lacks layers of the head"):
            imagereward_from_official({key: value for key, value in state.items() if key != f"mlp.layers.{layer}.bias"})


def test_a_missing_weight_is_named(folder):
    state = {key: value for key, value in GOLDEN.weights.items() if "text_encoder.encoder.layer.1.output" not in key}
    torch.save(state, folder / "ImageReward.pt")
    with pytest.raises(ConfigError, match=r"4 weights are missing, encoder.layer.1.output"):
        rewards.ImageReward(model=str(folder))


def test_the_head_is_one_affine_map():
    """Five layers and the standardisation, in float64."""
    state = imagereward_from_official(GOLDEN.weights)
    hidden = torch.randn(512, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    official = hidden
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (GOLDEN.weights[f"mlp.layers.{layer}.{part}"].double() for part in ("weight", "bias"))
        official = official @ weight.T + bias
    official = (official[:, 0] - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD
    ours = hidden @ state["head.weight"].double() + state["head.bias"].double()
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-5 * official.abs().max().item())


# -- traps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 8}, "text tower has 768 channels and .* gives 8 heads .*legal is a number that is 12"),
        ({"vision_num_attention_heads": 8}, "vision tower has 1024 channels .* 8 heads .*legal is a number that is 16"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05; legal is 1e-12"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; legal is 'gelu'"),
    ],
)
def test_full_size_traps_are_refused(change, words):
    state = imagereward_from_official(golden_rewards.official_shapes("imagereward"))
    settings = MED_CONFIG | change
    with pytest.raises(ConfigError, match=words):
        imagereward.vision_config(state, settings) | imagereward.text_config(settings, width=1024)


def test_a_tower_of_unknown_width_needs_its_heads(folder):
    settings = GOLDEN.about["config"] | {"vision_num_attention_heads": None}
    (folder / "med_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ConfigError, match=r"24 channels and med_config.json gives None heads as vision_num_attention_h"
    ):
        rewards.ImageReward(model=str(folder))
    (folder / "med_config.json").write_text(json.dumps(settings | {"vision_num_attention_heads": 5}))
    with pytest.raises(ConfigError, match=r"gives 5 heads .*legal is a number that divides it"):
        rewards.ImageReward(model=str(folder))


def test_bfloat16_rounds_the_towers_and_not_the_head(folder):
    full, half = (rewards.ImageReward(model=str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert half.weight.dtype == torch.float32
    torch.testing.assert_close(half.bias, full.bias)
    a, b = (reward(GOLDEN.images, GOLDEN.prompts) for reward in (full, half))
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.1


def test_a_checkpoint_in_half_precision_is_float32_here_and_float64_goes_as_well(folder):
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in GOLDEN.weights.items()},
               folder / "ImageReward.pt")  # fmt: skip
    reward = rewards.ImageReward(model=str(folder))
    assert reward.vision.dtype == reward.text.dtype == torch.float32
    double = rewards.ImageReward(model=str(folder), dtype="float64")
    scores = double(GOLDEN.images.double(), GOLDEN.prompts)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.float(), reward(GOLDEN.images, GOLDEN.prompts), rtol=1e-5, atol=1e-5)


def test_settings_reach_the_preprocessing(folder):
    reward = rewards.ImageReward(model=str(folder), antialias=False, clamp="ste", random_shift=True)
    given = reward.preprocess
    assert (given.fit, given.size) == ("crop", 32)
    assert (given.antialias, given.clamp, given.random_shift) == (False, "ste", True)


# -- text -------------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_to_35_tokens_as_the_official_ones(folder):
    reward = rewards.ImageReward(model=str(folder))
    ids, mask = reward.tokens.stack(GOLDEN.prompts, torch.device("cpu")).unbind(1)
    assert torch.equal(ids, GOLDEN.tensors["ids"])
    assert torch.equal(mask, GOLDEN.tensors["mask"])
    assert ids.shape == (2, 35)


def test_long_prompts_are_cut_at_35_tokens_and_that_is_said_once(folder):
    reward = rewards.ImageReward(model=str(folder))
    long = " ".join("abcdefgh" for _ in range(10))
    with pytest.warns(UserWarning, match="imagereward reads the first 35 tokens of a prompt; this one has 82"):
        first = reward(GOLDEN.images, [long, long + " and more"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = reward.tokens.ids(long + " again")
    assert len(ids) == 35
    assert ids[-1] == GOLDEN.about["words"].index("[SEP]")
    torch.testing.assert_close(reward(GOLDEN.images, [long, long]), first)


def test_the_prompt_matters_and_belongs_to_its_image(folder):
    reward = rewards.ImageReward(model=str(folder))
    straight = reward(GOLDEN.images, GOLDEN.prompts)
    crossed = reward(GOLDEN.images, GOLDEN.prompts[::-1])
    assert (straight - crossed).abs().min() > 1e-3
    alone = reward(GOLDEN.images[1:], GOLDEN.prompts[:1])
    torch.testing.assert_close(crossed[1:], alone, rtol=1e-5, atol=1e-6)


# -- bad folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "ImageReward.pt").unlink(), "cannot load .*put ImageReward.pt into that folder"),
        (lambda f: (f / "med_config.json").unlink(), "cannot load .*put med_config.json into that folder"),
        (lambda f: (f / "med_config.json").write_text("<html>"), "med_config.json is no JSON object"),
        (
            lambda f: (f / "med_config.json").write_text("[]"),
            "lacks hidden_act.*legal is ImageReward's med_config.json",
        ),
        (lambda f: (f / "med_config.json").write_text("{}"), "lacks hidden_act"),
        (
            lambda f: torch.save({"visual.proj": torch.ones(2, 2)}, f / "ImageReward.pt"),
            "'visual.proj', which ImageRew",
        ),
        (lambda f: torch.save({"step": 3}, f / "ImageReward.pt"), "holds no tensors by name"),
        (lambda f: without(f / "ImageReward.pt", "pos_embed"), "lacks embeddings.position_embedding of the vision"),
        (lambda f: without(f / "ImageReward.pt", "patch_embed"), "lacks embeddings.patch_embedding.weight of the vis"),
        (lambda f: without(f / "ImageReward.pt", "0.mlp.fc1"), "lacks encoder.layers.0.mlp.fc1.weight of the vision"),
        (lambda f: edit(f / "med_config.json", {"num_attention_heads": 0}), "num_attention_heads 0; legal is a whole"),
        (lambda f: edit(f / "med_config.json", {"vocab_size": None}), "vocab_size None; legal is a whole number"),
        (lambda f: cut(f / "ImageReward.pt"), "not a checkpoint, or a truncated one"),
        (lambda f: drop_words(f / "vocab.txt"), "has 30 tokens, the model 59 .*legal is bert-base-uncased"),
        (lambda f: (f / "vocab.txt").unlink(), "needs vocab.txt from .*/bert-base-uncased; .*its path as tokenizer"),
    ],
)
def test_bad_folders_say_what_is_wrong(folder, spoil, words):
    spoil(folder)
    with pytest.raises(ConfigError, match=words):
        rewards.ImageReward(model=str(folder))


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def without(path, word):
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if word not in key}, path)


def drop_words(path):
    path.write_text("\n".join(GOLDEN.about["words"][:30]))


def test_a_missing_download_says_what_to_place_by_hand():
    with pytest.raises(
        ConfigError,
        match=r"med_config.json from .*co/THUDM/ImageReward.*`hf download THUDM/ImageReward ImageReward.pt med_conf",
    ):
        rewards.ImageReward()


def test_the_checkpoint_is_opened_once(folder, monkeypatch):
    first = rewards.ImageReward(model=str(folder))(GOLDEN.images, GOLDEN.prompts)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was opened again"))
    again = rewards.ImageReward(model=str(folder))(GOLDEN.images, GOLDEN.prompts)
    torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-6)  # other addresses, other sums
