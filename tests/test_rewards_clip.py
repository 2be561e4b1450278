"""The CLIP family against the official transformers classes, on a tiny CLIP with random weights."""

import hashlib
import json
import math
import sys
import types
import warnings

import pytest
import tiny_clip
import torch
from tiny_clip import PROMPTS, SIZE, Bomb, edit, edit_tower, photo_like, to_pil

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import clip, clipmodel
from rewardtune.rewards.clipmodel import UNSEEN, check_clip_config
from rewardtune.rewards.weights import Source

FAMILY = [rewards.CLIPScore, rewards.PickScore, lambda model, **settings: rewards.HPSv2(model=model, **settings)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def score(folder):
    return rewards.CLIPScore(model=str(folder))


@pytest.fixture
def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


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
    images = photo_like(height=160, width=240).expand(2, -1, -1, -1)
    torch.testing.assert_close(score(images, PROMPTS), official_cosine(folder, images, PROMPTS), rtol=0, atol=2e-3)


def test_score_is_per_pair(score, images):
    swapped = score(images.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(score(images, PROMPTS).flip(0), swapped)
    assert not torch.allclose(score(images, PROMPTS[::-1]), score(images, PROMPTS), atol=1e-3)


def test_gradient_by_finite_differences(folder):
    score = rewards.CLIPScore(model=str(folder), dtype="float64")
    images = photo_like(height=40, width=48).double() * 0.8 + 0.1  # away from the clamp after the resize
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
    assert not any(t.requires_grad or t.is_inference() for t in (score.texts(prompt) for prompt in PROMPTS))


def test_texts_are_computed_once_and_the_cache_is_bounded(folder, images, monkeypatch):
    score, encoded = rewards.CLIPScore(model=str(folder)), []
    ids = score.texts.ids
    monkeypatch.setattr(score.texts, "ids", lambda prompt: encoded.append(prompt) or ids(prompt))
    monkeypatch.setattr(score.texts, "limit", 2)
    score(images, ["a", "a"])
    score(images, ["b", "a"])
    assert encoded == ["a", "b"]
    score(images, ["c", "a"])  # "b" is the oldest and goes
    score(images, ["a", "c"])
    assert encoded == ["a", "b", "c"]
    score(images, ["b", "c"])
    assert encoded == ["a", "b", "c", "b"]
    assert len(score.texts) == 2


def test_a_prompt_does_not_depend_on_its_companions(folder, images):
    alone, together = rewards.CLIPScore(model=str(folder)), rewards.CLIPScore(model=str(folder))
    together(images, ["a much longer one", PROMPTS[0]])
    assert torch.equal(alone.texts(PROMPTS[0]), together.texts(PROMPTS[0]))


def test_model_and_cached_texts_follow_the_images_to_their_device(folder, images):
    score = rewards.CLIPScore(model=str(folder))
    score.texts("a")  # cached on the CPU
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


def test_a_cut_prompt_is_said_once_and_cut_as_transformers_does(folder, images):
    score, long = (
        rewards.CLIPScore(model=str(folder)),
        ["abcdefghijklmno", "a"],
    )  # 15 letters, start and end: one token too many
    with pytest.warns(UserWarning, match="clipscore reads the first 16 tokens of a prompt; this one has 17"):
        ours = score(images, long)
    with warnings.catch_warnings(action="error"):
        score(images, ["another prompt that is too long", "a"])  # said once
    torch.testing.assert_close(ours, official_cosine(folder, images.mul(255).round() / 255, long), rtol=0, atol=5e-3)


def test_an_end_token_inside_a_prompt_cuts_it_and_is_said(folder, score, images):
    with pytest.warns(UserWarning, match=r"clipscore: a prompt itself holds the tokenizer's end token .*; it is cut"):
        cut = score(images[:1], ["ab<|endoftext|>cd"])
    torch.testing.assert_close(cut, score(images[:1], ["ab"]))


def test_bfloat16_network_gives_float32_scores(folder, score, images):
    half = rewards.CLIPScore(model=str(folder), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half(images, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(images, PROMPTS), score(images, PROMPTS), rtol=0, atol=0.05)


def test_settings_may_stand_in_processor_config_json(folder, images, score, tmp_path):
    """transformers 5 writes the processor's two halves into one file."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(rewards.CLIPScore(model=str(tmp_path))(images, PROMPTS), score(images, PROMPTS))


# -- the three classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILY)
def test_every_image_is_scored_against_its_own_prompt(folder, images, make):
    """Not against prompt 0, as code that copies the `[0]` of PickScore's example does in a batch."""
    batch, prompts = torch.cat([images, images[:1]]), [*PROMPTS, "six"]
    reward = make(model=str(folder))
    single = [reward(batch[b : b + 1], prompts[b : b + 1]).item() for b in range(3)]
    assert reward(batch, prompts).tolist() == pytest.approx(single, abs=1e-6)
    assert abs(single[0] - single[2]) > 1e-3  # the same image, another prompt


def test_logit_is_the_official_logit(folder, images):
    images = images.mul(255).round() / 255
    reward = rewards.PickScore(model=str(folder), scale="logit")
    logits = official_cosine(folder, images, PROMPTS) * math.exp(2.6592)  # logit_scale_init_value
    torch.testing.assert_close(reward(images, PROMPTS), logits, rtol=1e-5, atol=1e-5)
    half = rewards.PickScore(model=str(folder), scale="logit", dtype="bfloat16")
    assert half.factor == reward.factor  # exp of a rounded logarithm would be off by up to 2 %
    with pytest.raises(ConfigError, match=r"scale is 'logits' \(did you mean 'logit'\?\)"):
        rewards.PickScore(model=str(folder), scale="logits")


def test_hps_keeps_the_ends_of_an_oblong_image_and_clip_does_not(folder):
    leaf = photo_like(height=40, width=120).requires_grad_()
    covered = {}
    for make in FAMILY:
        reward = make(model=str(folder))
        (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS[:1]).sum(), leaf)
        covered[reward.name] = (gradient != 0).any(dim=1)[0, 20].float().mean().item()
    assert covered["hpsv2"] == 1
    assert covered["clipscore"] == covered["pickscore"] < 0.45


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_without_a_tokenizer_takes_laions(copy, offline):
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"pickscore: cannot load 'laion/CLIP-ViT-H.*tokenizer.*as processor"):
        rewards.PickScore(model=str(copy))
    with pytest.raises(ConfigError, match=r"clipscore: cannot load '/.*put tokenizer.json"):
        rewards.CLIPScore(model=str(copy))


def test_cleaning_is_a_step_of_its_own(folder):
    raw, clean = rewards.CLIPScore(model=str(folder)), rewards.HPSv2(model=str(folder))
    assert clean.texts.ids("two &amp;amp; dogs ") == clean.texts.ids("two & dogs") == raw.texts.ids("two & dogs")
    assert raw.texts.ids("two &amp; dogs") != raw.texts.ids("two & dogs")


def test_ftfy_mends_the_text_where_it_is_installed_and_is_asked_for_where_not(folder, monkeypatch):
    reward = rewards.HPSv2(model=str(folder))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.warns(UserWarning, match="hpsv2: .*`pip install ftfy`"):
        curly = reward.texts.ids("a dog’s")
    assert curly != reward.texts.ids("a dog's")
    monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text.replace("’", "'")))
    assert reward.texts.ids("a dog’s") == reward.texts.ids("a dog's")


@pytest.mark.parametrize(("version", "legal"), [("2.0", "2.0"), ("v2.1", "2.1"), (2.1, "2.1")])
def test_versions_of_hps(hps, version, legal):
    folder, transformers_folder = hps
    assert rewards.HPSv2(version, model=str(folder)).version == legal
    assert rewards.HPSv2(model=str(folder)).version == "2.1"
    with pytest.raises(ConfigError, match=r"version is '3'; legal: 2\.0, 2\.1"):
        rewards.HPSv2("3", model=str(folder))
    with pytest.raises(
        ConfigError, match=rf"version is {legal} but .* CLIPModel, which is its own version; leave the v"
    ):
        rewards.HPSv2(version, model=str(transformers_folder))


@pytest.mark.parametrize("make", FAMILY)
def test_the_playgrounds_clip_opens_in_every_class(make):
    from rewardtune import playground

    reward = make(model=str(playground.clip_path()))
    rewards.check_reward(reward, size=(64, 80), prompts=["a red circle", "two blue squares"])


# -- HPS's own checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture
def hps(tmp_path, monkeypatch):
    """(folder with the two checkpoints as hpsv2 publishes them, only small; the same model by transformers)."""
    import golden_rewards
    import huggingface_hub.constants
    from transformers import CLIPConfig

    golden = golden_rewards.read("hpsv2")
    config = golden_rewards.config_of(golden.about["sizes"])
    sides = {key: UNSEEN | config[key] for key in ("text_config", "vision_config")}
    small = CLIPConfig(**sides, projection_dim=config["projection_dim"])
    monkeypatch.setattr(clipmodel, "vit_h_config", lambda: small)
    monkeypatch.setattr(clip, "HPS", Source(repo="xswu/HPSv2"))  # the checksums are those of the large files
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "pt").mkdir()
    folder = golden_rewards.clip_folder(golden, tmp_path / "hf")
    for file in [*folder.glob("*token*"), folder / "preprocessor_config.json"]:
        (tmp_path / "pt" / file.name).write_bytes(file.read_bytes())
    for version, factor in (("HPS_v2_compressed.pt", 0.5), ("HPS_v2.1_compressed.pt", 1)):
        state = {key: (factor * value).half() for key, value in golden.weights.items()}
        torch.save({"state_dict": state}, tmp_path / "pt" / version)
    return tmp_path / "pt", folder


def test_hps_own_checkpoint_is_converted_and_kept(hps, monkeypatch):
    folder, transformers_folder = hps
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    scores = rewards.HPSv2(model=str(folder))(images, PROMPTS)
    expected = rewards.HPSv2(model=str(transformers_folder))(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)  # the file is float16, as HPS's
    assert (rewards.HPSv2("2.0", model=str(folder))(images, PROMPTS) - scores).abs().max() > 5e-3
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # the pickle is not opened again
        again = rewards.HPSv2(model=str(folder))
    assert torch.equal(again(images, PROMPTS), scores)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    file = rewards.HPSv2(model=str(folder / "HPS_v2.1_compressed.pt"), processor=str(folder))
    assert torch.equal(file(images, PROMPTS), scores)


def test_a_file_of_the_other_hps_version_is_refused(hps, monkeypatch):
    folder, _ = hps
    files = ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
    md5 = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(clip, "HPS", Source(repo="xswu/HPSv2", md5=md5))
    for (version, file), other in zip(clip.HPS_FILES.items(), ("2.1", "2.0"), strict=True):
        renamed = (folder / file).rename(folder / f"mine_{version}.pt")
        rewards.HPSv2(version, model=str(renamed), processor=str(folder))
        with pytest.raises(ConfigError, match=f"checkpoint of version {version} but version is {other}; give version="):
            rewards.HPSv2(other, model=str(renamed), processor=str(folder))


def test_hps_checkpoints_are_checked(hps, monkeypatch):
    folder, _ = hps
    path = folder / "HPS_v2.1_compressed.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(
        ConfigError, match=r"hpsv2: .*HPS_v2\.1_compressed\.pt .* is not a checkpoint, or a truncated one"
    ):
        rewards.HPSv2(model=str(folder))
    torch.save({"state_dict": {"fc.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(ConfigError, match=r"has 'fc\.weight', which open_clip's CLIP does not know"):
        rewards.HPSv2(model=str(folder))
    path.unlink()
    with pytest.raises(ConfigError, match=r"put HPS_v2\.1_compressed\.pt, or a transformers model: config\.json"):
        rewards.HPSv2(model=str(folder))
    monkeypatch.undo()
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"is not the published file \(sha256 .*not c57a38fb"):
        rewards.HPSv2(model=str(folder))


# -- values that no weight's shape betrays --------------------------------------------------------------------------


def as_if_vit_h(folder, **change):
    """config.json with LAION's sizes; that the weights are others comes out after it."""
    vision = {"hidden_size": 1280, "num_attention_heads": 16}
    edit_tower(folder, "text_config", **({"hidden_size": 1024, "num_attention_heads": 16} | change))
    edit_tower(folder, "vision_config", **(vision | change))


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' in text_config, but .*trained with 'gelu'"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 in text_config, but .*trained with 16"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06 in text_config, but .*trained with 1e-05"),
    ],
)
def test_a_vit_h_with_a_wrong_config_is_refused(copy, make, change, words):
    as_if_vit_h(copy, **change)
    with pytest.raises(ConfigError, match=words):
        make(model=str(copy))


def test_another_vit_h_may_have_its_own_config(copy):
    as_if_vit_h(copy, hidden_act="quick_gelu")
    with pytest.raises(ConfigError, match="mismatch"):  # gets as far as the weights, which are small
        rewards.CLIPSimilarity(model=str(copy))


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
@pytest.mark.parametrize("key", ["hidden_act", "num_attention_heads"])
def test_a_config_that_leaves_it_to_transformers_is_noticed(copy, tower, key):
    edit_tower(copy, tower, **{key: None})
    with pytest.warns(UserWarning, match=f"{tower} in config.json of .* does not state {key}; transformers assumes"):
        check_clip_config(Source(repo=str(copy)), who="clipscore", needed="")


def test_the_activation_does_move_the_score(folder, copy, images):
    for tower in ("text_config", "vision_config"):
        edit_tower(copy, tower, hidden_act="quick_gelu")
    right, wrong = rewards.CLIPScore(model=str(folder)), rewards.CLIPScore(model=str(copy))
    assert (right(images, PROMPTS) - wrong(images, PROMPTS)).abs().max() > 1e-3


@pytest.mark.parametrize("make", FAMILY)
def test_a_half_precision_checkpoint_is_opened_in_float32(copy, images, make):
    from safetensors.torch import load_file, save_file

    weights = {key: value.half() for key, value in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    edit(copy / "config.json", {"dtype": "float16", "torch_dtype": "float16"})
    reward = make(model=str(copy))
    assert {p.dtype for p in reward.model.parameters()} == {torch.float32}
    assert reward(images, PROMPTS).dtype == torch.float32


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path):
    return tiny_clip.copy(folder, tmp_path)


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


def test_a_model_of_another_kind(copy):
    edit(copy / "config.json", {"model_type": "siglip"})
    with pytest.raises(ConfigError, match=r"clipscore: .* is a model of type 'siglip'; legal: clip"):
        rewards.CLIPScore(model=str(copy))


def test_a_truncated_download(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"put config\.json and model\.safetensors .* complete and of the right kind"):
        rewards.CLIPScore(model=str(copy))


def test_a_pickle_with_code_is_refused_and_not_run(copy):
    (copy / "model.safetensors").unlink()
    torch.save({"logit_scale": torch.ones(()), "extra": Bomb(copy / "the code ran")}, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds more than weights and was not run \(it asks for \w+\.mkdir\)"):
        rewards.CLIPScore(model=str(copy))
    assert not (copy / "the code ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 40}}, "legal is resize by filter 3 .*, centre crop to the same size"),
        ({"do_resize": False}, "legal is resize"),
        ({"resample": 2}, "by filter 2 .*legal is resize by filter 3"),
        ({"size": 40, "crop_size": 40}, "resizes to 40 pixels but .* reads 32"),
        ({"size": {"height": 32, "width": 32}}, "legal is resize by filter 3 .* of the short side"),  # a squash
        ({"size": [32, 32]}, "legal is resize"),
        ({"size": {"longest_edge": 32}}, "legal is resize"),
        ({"crop_size": {"height": 32, "width": 48}}, "legal is resize"),
        ({"image_mean": [0.5]}, r"image_mean \[0\.5\]; legal are three numbers"),
        ({"image_std": "0.5"}, r"image_std '0\.5'; legal are three numbers"),
    ],
)
def test_foreign_image_settings_are_refused(copy, change, words):
    edit(copy / "preprocessor_config.json", change)
    with pytest.raises(ConfigError, match=words):
        rewards.CLIPScore(model=str(copy))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (rewards.CLIPScore, r"huggingface.co/laion/CLIP-ViT-H.*`hf download laion/\S* config.*--local-dir.*as model"),
        (rewards.PickScore, r"`hf download yuvalkirstain/PickScore_v1 config.json model.safetensors --revision a4e436"),
        (rewards.HPSv2, r"needs HPS_v2.1_compressed.pt from .*`hf download xswu/HPSv2 HPS_v2.1_compressed.pt --rev"),
        (lambda: rewards.HPSv2("2.0"), r"needs HPS_v2_compressed.pt from .*co/xswu/HPSv2"),
    ],
)
def test_offline_hub_model_says_what_to_download(offline, make, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path):
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


@pytest.mark.parametrize("end", [20, 49407])
def test_a_model_that_would_read_another_token_than_the_end(copy, end):
    rewards.CLIPScore(model=str(copy))
    edit_tower(copy, "text_config", eos_token_id=end)
    with pytest.raises(ConfigError, match=rf"'book'; legal .* end with the one id {end}, eos_token_id of"):
        rewards.CLIPScore(model=str(copy))
    edit_tower(copy, "text_config", eos_token_id=2)  # as in LAION's config: the highest id, whichever that is
    rewards.CLIPScore(model=str(copy))


def test_clean_is_a_switch(folder):
    with pytest.raises(ConfigError, match="clipscore: clean is 'no'; legal: true, false"):
        rewards.CLIPScore(model=str(folder), clean="no")


@pytest.mark.parametrize("dtype", ["float33", "int64", "nn"])
def test_bad_dtype(folder, dtype):
    with pytest.raises(ConfigError, match="legal: auto, float32, bfloat16"):
        rewards.CLIPScore(model=str(folder), dtype=dtype)


def test_a_config_that_holds_a_list(copy):
    (copy / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"put config\.json and model\.safetensors .*into that folder"):
        rewards.CLIPScore(model=str(copy))
