"""What every reward with a network shares: precision, micro-batches, checkpointed layers, the cache of prompts."""

import json
import warnings

import pytest
import tiny_clip
import torch
from saved_bytes import SavedBytes
from torch import nn

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import base
from rewardtune.rewards.network import NetworkReward, TextCache

PROMPTS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images():
    return torch.rand(5, 3, 48, 40, generator=torch.Generator().manual_seed(1))


def score_and_gradient(reward, images, prompts=PROMPTS):
    leaf = images.clone().requires_grad_()
    scores = reward(leaf, prompts)
    return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]


def saved(reward, images):
    """Bytes that autograd keeps after the forward pass: (inside the vision tower's layers, in all)."""
    with SavedBytes(reward.model.vision_model.encoder) as memory:
        reward(images.clone().requires_grad_(), PROMPTS)
    return memory.peak[True], sum(memory.peak.values())


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 5, 8])
def test_micro_batches_change_nothing_but_the_order_of_sums(folder, images, micro_batch, checkpointing):
    plain = rewards.CLIPScore(model=str(folder), checkpointing=False)
    pieces = rewards.CLIPScore(model=str(folder), micro_batch=micro_batch, checkpointing=checkpointing)
    for ours, theirs in zip(score_and_gradient(pieces, images), score_and_gradient(plain, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pieces(images, PROMPTS), plain(images, PROMPTS))  # also without a gradient


def test_checkpointed_layers_give_the_same_bits_and_keep_less(folder, images):
    plain = rewards.CLIPScore(model=str(folder), checkpointing=False)
    again = rewards.CLIPScore(model=str(folder))
    for ours, theirs in zip(score_and_gradient(again, images), score_and_gradient(plain, images), strict=True):
        assert torch.equal(ours, theirs)
    (inside, _), (before, _) = saved(again, images), saved(plain, images)
    assert inside == 2 * 5 * 17 * 16 * 4  # layers, images, tokens, width, bytes: the input of each layer and no more
    assert before > 8 * inside
    pieces = rewards.CLIPScore(model=str(folder), micro_batch=1)
    assert saved(pieces, images) == (0, 4 * images.numel())  # the pictures themselves and no more


def test_layers_are_computed_again_only_for_a_gradient(folder, images, monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPMLP

    runs, forward = [], CLIPMLP.forward
    monkeypatch.setattr(CLIPMLP, "forward", lambda self, x: runs.append(self) or forward(self, x))
    reward = rewards.CLIPScore(model=str(folder))
    reward.texts.stack(PROMPTS, torch.device("cpu"))
    runs.clear()
    with torch.no_grad():
        reward(images, PROMPTS)
    assert len(runs) == 2  # one for each of two layers
    runs.clear()
    score_and_gradient(reward, images)
    assert len(runs) == 4


def test_dropout_stays_off_in_checkpointed_layers(folder, images):
    """Layers checkpoint in training mode only; neither their dropout modules nor their attention's follow them."""
    from transformers import CLIPConfig, CLIPModel

    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.9
    model = CLIPModel.from_pretrained(folder, config=CLIPConfig.from_dict(config))
    adopted = NetworkReward().adopt(model)
    assert adopted.config.vision_config.attention_dropout == 0.9
    pixels = torch.rand(2, 3, 32, 32).requires_grad_()
    first, second = (adopted.get_image_features(pixel_values=pixels).pooler_output for _ in range(2))
    assert torch.equal(first, second)


def test_a_random_shift_is_drawn_once_for_forward_and_recomputation(folder, images):
    images = torch.cat([images, images], dim=2).repeat(1, 1, 1, 2)  # large enough to shrink
    settings = {"model": str(folder), "random_shift": True}
    torch.manual_seed(3)
    expected = score_and_gradient(rewards.CLIPScore(**settings, checkpointing=False), images[:1], PROMPTS[:1])
    torch.manual_seed(3)
    found = score_and_gradient(rewards.CLIPScore(**settings, micro_batch=1), images[:1], PROMPTS[:1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.manual_seed(4)
    assert not torch.equal(score_and_gradient(rewards.CLIPScore(**settings), images[:1], PROMPTS[:1])[0], expected[0])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_draw_the_same_random_shifts(folder, images, micro_batch):
    images = torch.cat([images, images], dim=2).repeat(1, 1, 1, 2)
    settings = {"model": str(folder), "random_shift": True}
    torch.manual_seed(3)
    expected = score_and_gradient(rewards.CLIPScore(**settings), images)
    torch.manual_seed(3)
    found = score_and_gradient(rewards.CLIPScore(**settings, micro_batch=micro_batch), images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- precision --------------------------------------------------------------------------------------------------------


def test_auto_is_float32_on_the_cpu(folder, images):
    reward = rewards.CLIPScore(model=str(folder)).to("cpu")
    assert {p.dtype for p in reward.model.parameters()} == {torch.float32}
    assert reward(images.bfloat16(), PROMPTS).dtype == torch.float32


def test_auto_is_bfloat16_from_the_first_accelerator_on(folder, monkeypatch):
    reward = rewards.CLIPScore(model=str(folder))
    exact = rewards.CLIPScore(model=str(folder), dtype="float32")
    monkeypatch.setattr(base.Reward, "to", lambda self, device: self)  # there is none here: all but the move itself
    text = reward.texts("a")
    for device in ("cuda", "cpu", "cuda"):
        reward.to(device)
        exact.to(device)
        assert {p.dtype for p in reward.model.parameters()} == {torch.bfloat16}  # rounded once, it stays so
        assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    assert not torch.equal(reward.texts("a"), text)  # what float32 weights had made of a prompt is forgotten
    again = reward.texts("a")
    assert reward.to("cuda").texts("a") is again


def test_an_autocast_around_a_reward_changes_nothing(folder, images):
    expected, gradient = score_and_gradient(rewards.CLIPScore(model=str(folder)), images)
    leaf = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = rewards.CLIPScore(model=str(folder))(leaf, PROMPTS)
    assert torch.equal(scores, expected)
    assert torch.equal(torch.autograd.grad(scores.sum(), leaf)[0], gradient)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_policy_on_cuda(folder, images):
    reward = rewards.CLIPScore(model=str(folder))
    on_cpu = score_and_gradient(reward, images)
    on_cuda = score_and_gradient(reward, images.cuda())
    assert {(p.dtype, p.device.type) for p in reward.model.parameters()} == {(torch.bfloat16, "cuda")}
    assert on_cuda[0].dtype == torch.float32
    torch.testing.assert_close(on_cuda[0].cpu(), on_cpu[0], rtol=0, atol=0.02)
    assert torch.cosine_similarity(on_cuda[1].cpu().flatten(), on_cpu[1].flatten(), dim=0) > 0.99
    held = torch.cuda.memory_allocated()
    reward.to("cpu")
    assert torch.cuda.memory_allocated() < held


# -- any network ------------------------------------------------------------------------------------------------------


class Pool(NetworkReward):
    """Less is better, and what is logged differs from what is maximised."""

    name = "pool"
    minimise = True

    def __init__(self, *, pair=False, **settings):
        super().__init__(**settings)
        self.pair = pair
        self.net = self.adopt(nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 40, 1), nn.Dropout(0.5)))

    def piece(self, images, prompts):
        native = self.net(images).squeeze(-1)
        return (native * 3, native.sigmoid()) if self.pair else native


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_piece_gives_the_native_value_or_score_and_native_value(images, micro_batch):
    torch.manual_seed(0)
    reward = Pool(micro_batch=micro_batch)
    value = reward.net(images).squeeze(-1)
    score, native = reward.evaluate(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(native, value)
    torch.testing.assert_close(score, -value)
    torch.testing.assert_close(reward.native(images, PROMPTS), value)
    reward.pair = True
    score, native = reward.evaluate(images, PROMPTS)
    torch.testing.assert_close(score, 3 * value)
    torch.testing.assert_close(native, value.sigmoid())


def test_an_adopted_network_is_frozen_and_in_eval_mode(images):
    reward = Pool(dtype="bfloat16")
    assert not any(module.training for module in reward.net.modules())
    assert not any(p.requires_grad for p in reward.net.parameters())
    assert {p.dtype for p in reward.net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"micro_batch": 0}, "pool: micro_batch is 0; legal is 1 or more"),
        ({"micro_batch": 2.5}, r"micro_batch is 2\.5; legal is a number of images"),
        ({"micro_batch": True}, "micro_batch is True; legal is a number of images"),
        ({"checkpointing": "yes"}, "checkpointing is 'yes'; legal: true, false"),
        ({"dtype": "int8"}, "pool: dtype is 'int8'; legal: auto, float32, bfloat16, float16, float64"),
        ({"dtype": torch.int32}, r"dtype is torch\.int32; legal: auto"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        Pool(**settings)


def test_a_subclass_without_a_piece_says_so():
    class Empty(NetworkReward):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define piece\(self, images, prompts\)"):
        Empty().evaluate(torch.rand(1, 3, 8, 8), ["a"])


# -- prompts ----------------------------------------------------------------------------------------------------------


class Letters:
    """One token per letter and an end token."""

    def __call__(self, text, *, verbose=True, truncation=False, max_length=None):
        ids = [ord(letter) for letter in text]
        ids = ids[: max_length - 1] if truncation else ids
        return type("Encoding", (), {"input_ids": [*ids, 0]})()


def test_each_prompt_is_encoded_once_cut_at_the_length_and_that_is_said_once():
    seen = []
    cache = TextCache(Letters(), lambda ids: seen.append(ids) or torch.tensor(ids), length=4, name="mine", limit=2)
    with pytest.warns(
        UserWarning, match="mine reads the first 4 tokens of a prompt; this one has 6 and is cut.*'abcde'"
    ):
        assert cache("abcde").tolist() == [97, 98, 99, 0]
    with warnings.catch_warnings(action="error"):
        assert cache("vwxyz").tolist() == [118, 119, 120, 0]
        assert cache("abc").tolist() == cache("abc").tolist() == [97, 98, 99, 0]
    assert len(seen) == 3
    assert len(cache) == 2


def test_a_cached_tensor_has_no_graph():
    weight = torch.ones(1, requires_grad=True)
    cache = TextCache(Letters(), lambda ids: weight * len(ids), length=9, name="mine")
    assert not cache("a").requires_grad
    assert not cache("a").is_inference()


def test_a_module_without_parameters_moves_as_well(monkeypatch):
    monkeypatch.setattr(base.Reward, "to", lambda self, device: self)  # there may be no such device
    reward = NetworkReward()
    reward.empty = torch.nn.Identity()
    assert reward.to("cuda") is reward
