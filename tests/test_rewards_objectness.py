"""Objectness against OWL-ViT's own forward pass: pairing, the query mask, saturation, and bad settings and folders.

That transformers 4 gives the same numbers: tests/test_golden.py.
"""

import json

import golden_rewards
import pytest
import torch
import torch.nn.functional as F

from rewardtune import rewards
from rewardtune.errors import ConfigError

GOLDEN = golden_rewards.read("objectness")
WORDS = ["book", "a red fox"]
LETTERS = [*golden_rewards.LETTERS, *(f"{letter}</w>" for letter in golden_rewards.LETTERS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("owlvit")
    golden_rewards.objectness(GOLDEN, path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to spoil."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def reward(folder):
    return rewards.Objectness("book", model=str(folder))


@pytest.fixture
def images():
    return GOLDEN.images


def tokenizer(folder, tokens):
    from transformers import CLIPTokenizer

    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)


def full_forward(reward, images, queries):
    """The logits (B, boxes) of OWL-ViT's forward: one query for each image, padded as its processor does."""
    length = reward.model.config.text_config.max_position_embeddings
    ids = torch.zeros(len(queries), length, dtype=torch.long)
    for row, query in zip(ids, queries, strict=True):
        tokens = torch.tensor(reward.queries.ids(query))
        row[: len(tokens)] = tokens
    pixels = reward.preprocess(images)
    return reward.model(input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=pixels).logits[..., 0]


# -- against the full forward -----------------------------------------------------------------------------------------


def test_cached_text_gives_the_logits_of_the_full_forward(reward, images):
    torch.testing.assert_close(
        reward.logits(images, ["", ""]), full_forward(reward, images, ["book", "book"]), rtol=1e-6, atol=1e-6
    )


def test_each_image_is_asked_its_own_query(folder, images):
    reward = rewards.Objectness(None, model=str(folder))
    logits = reward.logits(images, WORDS)
    torch.testing.assert_close(logits, full_forward(reward, images, WORDS), rtol=1e-6, atol=1e-6)
    crossed = reward.logits(images, WORDS[::-1])
    assert (logits - crossed).abs().amax(dim=1).min() > 1e-2
    # The trap: transformers takes 4 ids for 2 images as 2 queries each, so ours never pass through its batch.
    alone = torch.cat([reward.logits(image[None], [word]) for image, word in zip(images, WORDS, strict=True)])
    torch.testing.assert_close(alone, logits, rtol=1e-5, atol=1e-5)


def test_a_query_whose_first_token_is_0_is_not_taken_for_padding(broken, images):
    """The full forward masks it: every logit is the lowest float, and every gradient 0."""
    tokenizer(broken, ["<|startoftext|>", *LETTERS, "<|endoftext|>"])
    reward = rewards.Objectness("book", model=str(broken))
    assert reward.queries.ids("book")[0] == 0
    assert (full_forward(reward, images, ["book", "book"]) == torch.finfo(torch.float32).min).all()
    logits = reward.logits(images, ["", ""])
    assert logits.abs().max() < 100
    assert logits.std() > 0


# -- the score --------------------------------------------------------------------------------------------------------


def test_the_probability_is_logged_and_its_logarithm_optimised(folder, images):
    away, towards = (rewards.Objectness("book", model=str(folder), minimise=flag) for flag in (True, False))
    p = away.logits(images, ["", ""]).amax(dim=1).sigmoid()
    total, natives = away.parts(images, ["", ""])
    torch.testing.assert_close(natives["objectness"], p)
    torch.testing.assert_close(total, (1 - p).log())
    total, natives = towards.parts(images, ["", ""])
    torch.testing.assert_close(natives["objectness"], p)
    torch.testing.assert_close(total, p.log())
    assert (away.minimise, towards.minimise) == (True, False)


@pytest.mark.parametrize("minimise", [True, False])
def test_the_score_does_not_saturate_where_the_probability_does(folder, images, minimise):
    reward = rewards.Objectness("book", model=str(folder), minimise=minimise)
    reward.model.class_head.logit_scale.weight.zero_()
    reward.model.class_head.logit_scale.bias.fill_(40.0)  # scale 41
    reward.model.class_head.logit_shift.weight.zero_()
    reward.model.class_head.logit_shift.bias.fill_(3.0 if minimise else -6.0)
    pixels = images.requires_grad_()
    score, p = reward.evaluate(pixels, ["", ""])
    wrong_end = torch.ones(2) if minimise else torch.zeros(2)
    assert torch.allclose(p, wrong_end, atol=1e-30)
    (dead,) = torch.autograd.grad(p.sum(), pixels, retain_graph=True)
    assert dead.abs().max() < 1e-20
    (alive,) = torch.autograd.grad(score.sum(), pixels)
    assert (alive.flatten(1).norm(dim=1) > 1e-2).all()


def test_ascent_removes_the_object(reward, images):
    pixels = images.clone().requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=0.02)
    before = reward.logits(images, ["", ""]).amax(dim=1)
    for _ in range(30):
        optimiser.zero_grad()
        (-reward(pixels.clamp(0, 1), ["", ""]).sum()).backward()
        optimiser.step()
    after = reward.logits(pixels.detach().clamp(0, 1), ["", ""]).amax(dim=1)
    assert (after < before - 3).all()


def test_the_prompt_is_ignored_once_there_is_a_target_and_the_text_tower_runs_once(folder, images, monkeypatch):
    reward = rewards.Objectness("book", model=str(folder))
    calls = []
    real = reward.model.owlvit.get_text_features
    monkeypatch.setattr(reward.model.owlvit, "get_text_features", lambda **k: (calls.append(1), real(**k))[1])
    first = reward(images, ["a", "b"])
    assert torch.equal(reward(images, WORDS), first)
    assert len(calls) == 1


def test_the_template_frames_the_target(folder, images):
    framed = rewards.Objectness("book", model=str(folder), template="a {} here")
    whole = rewards.Objectness("a book here", model=str(folder))
    assert torch.equal(framed(images, ["", ""]), whole(images, ["", ""]))


def test_bfloat16_leaves_the_class_head_in_float32(folder, images):
    """Only the weights are rounded: a cosine rounded to bfloat16 and scaled by a large logit_scale would be coarse."""
    full, half = (rewards.Objectness("book", model=str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    logits = half.logits(images, ["", ""])
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert 0 < (logits - full.logits(images, ["", ""])).abs().mean() < 0.05  # the logits run from -3 to 5


def test_oblong_images_are_squashed(reward):
    """Not cropped: every column reaches the network, in its own proportion."""
    images = torch.rand(1, 3, 40, 80, generator=torch.Generator().manual_seed(0))
    size = reward.model.config.vision_config.image_size
    squashed = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(reward(images, [""]), reward(squashed, [""]))


def test_a_checkpoint_in_half_precision_is_float32_here_and_float64_goes_as_well(broken, folder, images):
    from transformers import OwlViTForObjectDetection

    OwlViTForObjectDetection.from_pretrained(folder, dtype=torch.float16).save_pretrained(broken)
    assert json.loads((broken / "config.json").read_text())["dtype"] == "float16"
    reward = rewards.Objectness("book", model=str(broken))
    assert reward.model.dtype == torch.float32
    double = rewards.Objectness("book", model=str(broken), dtype="float64")
    scores = double(images.double(), ["", ""])
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.float(), reward(images, ["", ""]), rtol=1e-5, atol=1e-5)


def test_settings_reach_the_preprocessing(folder):
    given = rewards.Objectness("book", model=str(folder), antialias=False, clamp="ste", random_shift=True).preprocess
    assert (given.fit, given.size) == ("squash", 32)
    assert (given.antialias, given.clamp, given.random_shift) == (False, "ste", True)


# -- bad settings and folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": ""}, "target is ''; legal is the name of an object"),
        ({"target": 3}, "target is 3"),
        ({"template": "a photo"}, "template is 'a photo'; legal is a text with one {}"),
        ({"template": "{} and {}"}, "template is"),
        ({"minimise": "no"}, "minimise is 'no'; legal: true, false"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"clamp": "soft"}, "clamp is 'soft'"),
        ({"model": "/no/such/folder"}, "there is no such folder"),
    ],
)
def test_bad_settings_are_config_errors(folder, settings, words):
    with pytest.raises(ConfigError, match=words):
        rewards.Objectness(**{"model": str(folder)} | settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "has no 'book'; legal"),
        ({"target": "haert"}, r"has no 'haert' \(did you mean 'heart'\?\); legal targets there: a shape \(.*heart"),
        ({"target": "red hart"}, r"\(did you mean 'red heart'\?\).*, or none for each image's own prompt"),
    ],
)
def test_the_playground_has_no_such_object(given, words):
    for make in (rewards.Objectness, lambda **settings: rewards.load("objectness", settings)):
        with pytest.raises(ConfigError, match=words):
            make(model="playground", **given)


@pytest.mark.parametrize("target", ["heart", "red heart", None])
def test_what_the_playground_has(target):
    assert rewards.load("objectness", {"model": "playground", "target": target}).target == target


def remove(folder, name):
    (folder / name).unlink()


def edit(folder, name, **change):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))


def drop_weights(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("class_head")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: remove(f, "config.json"), "put config.json and model.safetensors"),
        (lambda f: remove(f, "model.safetensors"), "put config.json and model.safetensors"),
        (lambda f: remove(f, "preprocessor_config.json"), "put preprocessor_config.json"),
        (lambda f: remove(f, "tokenizer.json"), "tokenizer.json"),
        (lambda f: edit(f, "config.json", model_type="owlv2"), "of type 'owlv2'; legal is 'owlvit'"),
        (lambda f: edit(f, "config.json", model_type="clip"), "of type 'clip'"),
        (lambda f: (f / "config.json").write_text("[1]"), "put config.json and model.safetensors"),
        (lambda f: edit(f, "preprocessor_config.json", image_mean=[0.5]), r"image_mean \[0\.5\]; legal are three"),
        (drop_weights, "not a complete OwlViTForObjectDetection: 6 weights are missing, class_head"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "cannot load"),
    ],
)
def test_bad_folders_say_what_is_wrong(broken, spoil, words):
    spoil(broken)
    with pytest.raises(ConfigError, match="objectness: .*" + words):
        rewards.Objectness("book", model=str(broken))


def test_a_tokenizer_whose_end_is_not_the_highest_id_is_refused(broken):
    """OWL-ViT would read the query at another token, without a word."""
    tokenizer(broken, ["<|endoftext|>", "<|startoftext|>", *LETTERS])
    with pytest.raises(ConfigError, match="legal is a CLIP tokenizer, whose texts end with the one highest id"):
        rewards.Objectness("book", model=str(broken))
