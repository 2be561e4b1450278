"""The text cache: the same pictures and gradients, every prompt encoded once, and a pipeline left as it came."""

import functools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import fresh
from torch import nn

from rewardtune import RewardTuner, evaluate, methods, trainer
from rewardtune.engine import count_steps, rollout
from rewardtune.plan import Plan
from rewardtune.prompts import Conditioned
from rewardtune.rewards import Brightness
from rewardtune.textcache import cached_text

BUILDERS = {"sd": tiny.stable_diffusion, "sdxl": tiny.stable_diffusion_xl, "sd3": tiny.stable_diffusion_3}
BUILDERS["flux"] = tiny.flux


def images(pipe, call, prompts=None):
    given = fresh(call) | ({} if prompts is None else {"prompt": prompts, "generator": tiny.generators(len(prompts))})
    return torch.as_tensor(pipe(**given, output_type="pt").images)


def count_calls(pipe):
    """A list that grows with every call of a text encoder."""
    seen = []
    for name, module in pipe.components.items():
        if name.startswith("text_encoder") and module is not None:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@pytest.mark.parametrize("name", BUILDERS)
def test_pictures_are_bit_for_bit_those_of_each_prompt_and_no_encoder_runs_twice(name):
    """Filled beforehand, and read back in any order: never the embeddings of a neighbour."""
    pipe, call = BUILDERS[name](steps=2)
    call.pop("negative_prompt", None)
    prompts = ["red heart", "blue stars", "green moon"]
    alone = [images(pipe, call, [prompt]) for prompt in prompts]
    assert (alone[0] - alone[1]).abs().max() > 1e-3  # prompts matter
    seen = count_calls(pipe)
    with cached_text(pipe) as text:
        images(pipe, call, prompts[:1])
        assert seen
        text.fill(prompts)
        assert text.encoded == 3
        seen.clear()
        for prompt, picture in reversed(list(zip(prompts, alone, strict=True))):
            assert torch.equal(images(pipe, call, [prompt]), picture)
        assert not seen
    images(pipe, call)
    assert seen  # the block is over
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_is_the_pipelines_own_up_to_the_encoders_round_off(name):
    """An encoder rounds a batch of two and a batch of one differently; the cache gives that of one, always the same."""
    pipe, call = BUILDERS[name](steps=2)
    expected = images(pipe, call)
    seen = count_calls(pipe)
    with cached_text(pipe) as text:
        first = images(pipe, call)
        assert torch.allclose(first, expected, rtol=0, atol=1e-4)
        seen.clear()
        assert torch.equal(images(pipe, call), first)
        assert not seen
        assert text.notes == []


PLANS = {
    "drtune": Plan(T=4, train=frozenset({1, 2}), end=2),
    "draft-lv": Plan(T=4, train=frozenset({3}), start=3, draws=2),
}


@pytest.mark.parametrize("plan", PLANS)
def test_equal_gradients_inside_a_rollout(plan):
    """Counting steps answers networks with blanks, and DRaFT-LV hands a chain's outputs on: neither meets the cache."""

    def gradient(pipe, call):
        for p in pipe.unet.parameters():
            p.grad = None
        with rollout(pipe, PLANS[plan], seed=0, **fresh(call)) as tape:
            weights = torch.linspace(-1, 1, tape.images.numel()).view_as(tape.images)
            tape.backward((tape.images * weights).mean())
        return [p.grad for p in pipe.unet.parameters() if p.requires_grad]

    pipe, call = tiny.stable_diffusion()
    expected = gradient(pipe, call)
    with cached_text(pipe) as text:
        assert count_steps(pipe, **fresh(call)) == 4
        first, second = gradient(pipe, call), gradient(pipe, call)
        assert text.encoded == 2
    for theirs, one, other in zip(expected, first, second, strict=True):
        assert torch.equal(theirs, one)
        assert torch.equal(theirs, other)


def test_given_embeddings_go_their_own_way():
    pipe, _ = tiny.stable_diffusion(steps=2)
    embeds = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "num_inference_steps": 2}
    expected = pipe(**given, generator=torch.Generator().manual_seed(3), output_type="pt").images
    with cached_text(pipe) as text:
        assert torch.equal(pipe(**given, generator=torch.Generator().manual_seed(3), output_type="pt").images, expected)
        assert text.encoded == 0


class Letters:
    """A pipeline's text half: (B, letters, 2) embeddings of the codes, padded to the longest; position ids."""

    def __init__(self, style):
        self.style, self.calls, self.components = style, 0, {"text_encoder": nn.Linear(1, 1)}
        self._execution_device = torch.device("cpu")

    def encode_prompt(self, prompt, device=None, scale=1.0, prompt_embeds=None, negative_prompt=None):
        self.calls += 1
        prompt = [prompt] if isinstance(prompt, str) else prompt
        rows = [torch.tensor([[ord(letter), scale] for letter in text]) for text in prompt]
        if self.style == "list":
            return rows, [-row for row in rows]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if self.style == "mixing":
            embeds = embeds - embeds.mean(0)
        if self.style == "alone":
            return embeds
        return embeds, embeds.sum(1), torch.zeros(embeds.shape[1], 3), None


def equal(a, b):
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b


@pytest.mark.parametrize("style", ["padded", "list", "alone", "mixing"])
def test_answers_are_the_pipelines_own_whatever_their_form(style):
    """Equal lengths, other lengths, repeated prompts, one prompt as a str: the very structure of `encode_prompt`."""
    pipe, plain = Letters(style), Letters(style)
    with cached_text(pipe):
        for prompt in (["abc", "xyz"], ["abc", "abc"], ["abc", "de", "q"], "xyz", ["q"], ["xyz", "abc"]):
            for scale in (1.0, 2.0):
                assert equal(pipe.encode_prompt(prompt, scale=scale), plain.encode_prompt(prompt, scale=scale))


def test_a_batch_that_is_more_than_its_prompts_is_encoded_by_the_pipeline():
    pipe = Letters("mixing")
    with cached_text(pipe) as text:
        for _ in range(3):
            pipe.encode_prompt(["abc", "xyz"])
        assert text.notes == [
            "Letters: it encodes the prompts of a batch together, so text is encoded at every call of more than one "
            "prompt"
        ]
    assert pipe.calls == 1 + 2 + 3  # once a batch and its prompts alone, to compare; then every batch


def test_the_longest_unused_prompts_leave():
    pipe = Letters("alone")
    size = pipe.encode_prompt("abcd").numel() * 4
    pipe.calls = 0
    with cached_text(pipe, max_bytes=2 * size) as text:
        pipe.encode_prompt("zzzz")  # the first is kept for its equals and not counted
        for prompt in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa"):
            pipe.encode_prompt(prompt)
        assert pipe.calls == 4
        assert text.bytes <= 2 * size
        pipe.encode_prompt("bbbb")
        assert pipe.calls == 5
        text.fill(["aaaa", "bbbb", "cccc", "dddd", "eeee"])
        assert text.notes == ["the text cache holds 2 prompts (0.0 GiB): others are encoded when their turn comes"]
        assert text.holds(["aaaa", "bbbb"])
        assert not text.holds(["bbbb", "cccc"])
        assert text.room == 2


def test_encoders_that_were_sent_away_come_back_once_for_a_batch(monkeypatch):
    """The hooks are accelerate's and need a GPU; when they act is ours."""
    pipe = Letters("alone")
    with cached_text(pipe) as text:
        pipe.encode_prompt(["ab", "cd"])
        sent = []
        monkeypatch.setattr(text, "_hooks", [SimpleNamespace(offload=lambda: sent.append(pipe.calls), remove=list)])
        calls = pipe.calls
        pipe.encode_prompt(["ab", "cd"])
        assert sent == []  # nobody was called
        pipe.encode_prompt(["ef", "gh", "ab"])
        assert sent == [calls + 2]
        text.fill(["ij", "kl", "ef"], release=False)
        assert sent == [calls + 2, calls + 4]


def test_a_prompts_own_texts_are_encoded_with_it():
    pipe = Letters("alone")
    prompts = [Conditioned("ab", {"negative_prompt": "xy"}), Conditioned("cd", {"negative_prompt": "zz"})]
    with cached_text(pipe) as text:
        pipe.encode_prompt(["ab"], negative_prompt=["xy"])
        assert text.fill(prompts, release=False) == 2
        calls = pipe.calls
        pipe.encode_prompt(["cd"], negative_prompt=["zz"])
        assert pipe.calls == calls


def away(tmp_path, monkeypatch, *, room, **more):
    """A RewardTuner whose text encoders are away, twenty prompts of which the cache holds `room`."""
    pipe, call = tiny.stable_diffusion(steps=2)
    pipe.unet.unload_lora()
    one = sum(part.numel() * part.element_size() for part in pipe.encode_prompt("a", "cpu", 1, False)[:1])
    monkeypatch.setattr(trainer, "cached_text", functools.partial(cached_text, max_bytes=room * one))
    return RewardTuner(
        pipe,
        reward=Brightness(),
        prompts=[f"{letter} heart" for letter in "abcdefghijklmnopqrst"],  # a tokenizer of letters: no digits
        method=methods.draft(K=1),
        output_dir=tmp_path / "run",
        num_inference_steps=2,
        guidance_scale=call["guidance_scale"],
        batch=4,
        rank=2,
        eval_count=2,
        offload=["text_encoders"],
        show_progress=False,
        **more,
    )


def test_the_denoising_loss_does_not_tell_how_to_encode_ahead(tmp_path, monkeypatch):
    """It is unguided: what an update samples with is encoded ahead all the same."""
    denoise = {"weight": 0.1, "count": 2, "noise_range": [0.0, 1.0]}
    tuner, missing = away(tmp_path, monkeypatch, room=12, regularize={"denoise": denoise}), []

    @contextmanager
    def noted(*args, **kwargs):
        before = tuner.text.encoded
        with rollout(*args, **kwargs) as tape:
            missing.append(tuner.text.encoded - before)
            yield tape

    monkeypatch.setattr("rewardtune.gradient.rollout", noted)
    tuner.train(5, lr=1e-3)
    assert missing == [0] * 5


def test_a_long_run_encodes_ahead(tmp_path, monkeypatch):
    """Room for six prompts of twenty, four an update: no update and no look finds one missing."""
    missing = []

    def noting(function, name):
        def noted(self, *args, **kwargs):
            before = self.text.encoded
            found = function(self, *args, **kwargs)
            missing.append((name, self.text.encoded - before))
            return found

        return noted

    sample = evaluate.sample
    tuner = away(tmp_path, monkeypatch, room=6)

    def sampled(*args, **kwargs):
        before = tuner.text.encoded
        images = sample(*args, **kwargs)
        missing.append(("look", tuner.text.encoded - before))
        return images

    monkeypatch.setattr(RewardTuner, "_update", noting(RewardTuner._update, "update"))
    monkeypatch.setattr("rewardtune.watch.evaluate.sample", sampled)
    tuner.train(5, lr=1e-3, eval_every=2)
    assert missing[1:] == [(name, 0) for name, _ in missing[1:]]  # the first picture of all shows how to encode
    assert [name for name, _ in missing].count("update") == 5
    assert [name for name, _ in missing].count("look") >= 4
    assert 20 < tuner.text.encoded <= 20 + 6 + 4 * 2  # some twice: the cache was too small for all


def test_encoding_ahead_is_not_the_pace_of_an_update(tmp_path, monkeypatch):
    """180 s, of which the text of all updates takes 100: of updates of 10 s eight fit, not one. A clock by hand."""
    tuner, now = away(tmp_path, monkeypatch, room=100), [0.0]
    update = RewardTuner._update

    def ahead(self, *_):
        took = 100.0 if self.step == 0 else 0.0
        now[0] += took
        return took

    def updated(self, *args):
        record = update(self, *args)
        now[0] += 10.0
        return record

    monkeypatch.setattr(RewardTuner, "_encode_ahead", ahead)
    monkeypatch.setattr(RewardTuner, "_update", updated)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]))
    assert tuner.train(20, lr=1e-3, max_seconds=180).steps == 8


def test_a_signal_ends_the_encoding_ahead(tmp_path, monkeypatch):
    """Only what the update under way needs is encoded then."""
    tuner, asked = away(tmp_path, monkeypatch, room=100), []
    text = SimpleNamespace(
        answers=lambda _: True, holds=lambda _: False, notes=[], fill=lambda some: asked.extend(some)
    )
    gradient = SimpleNamespace(prompts_of=lambda step, _: [f"of {step}"])
    tuner._encode_ahead(text, gradient, 3, SimpleNamespace(caught=None))
    tuner._encode_ahead(text, gradient, 3, SimpleNamespace(caught=2))
    assert asked == ["of 0", "of 1", "of 2", "of 0"]


def test_what_comes_out_is_a_copy():
    pipe = Letters("padded")
    with cached_text(pipe):
        first = pipe.encode_prompt("abc")
        kept = first[0].clone()
        first[0].zero_()
        assert torch.equal(pipe.encode_prompt("abc")[0], kept)


def test_a_pipeline_without_encode_prompt_is_told_so():
    pipe = SimpleNamespace(components={})
    with cached_text(pipe) as text:
        assert text.fill(["red"]) == 0
        text.release()
    assert "has no encode_prompt" in text.notes[0]
    assert vars(pipe) == {"components": {}}


def test_an_error_leaves_the_pipeline_as_it_came():
    pipe = Letters("padded")
    with pytest.raises(RuntimeError, match="stop"), cached_text(pipe):
        raise RuntimeError("stop")
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BUILDERS)
def test_released_encoders_are_on_the_cpu_and_come_back(name):
    pipe, call = BUILDERS[name](steps=2)
    pipe.to("cuda")
    encoders = [module for part, module in pipe.components.items() if part.startswith("text_encoder") and module]
    expected = images(pipe, call, ["green moon"])
    with cached_text(pipe) as text:
        images(pipe, call, ["red heart"])
        text.fill(["red heart", "blue stars"])
        assert all(next(module.parameters()).device.type == "cpu" for module in encoders)
        assert torch.equal(images(pipe, call, ["green moon"]), expected)  # not in the cache
        assert all(next(module.parameters()).device.type == "cpu" for module in encoders)
        assert pipe._execution_device.type == "cuda"
    assert all(next(module.parameters()).device.type == "cuda" for module in encoders)
    assert not any(hasattr(module, "_hf_hook") for module in encoders)


def test_nothing_is_encoded_ahead_that_no_batch_is_answered_from():
    """The pipeline encodes its batches together: the entries of single prompts would be of no use."""
    mixing, plain = Letters("mixing"), Letters("padded")
    for pipe, answers in ((mixing, False), (plain, True)):
        with cached_text(pipe) as text:
            assert not text.answers(1)  # nobody has called yet
            pipe.encode_prompt(["ab", "cd"])
            assert text.answers(1)
            assert text.answers(2) is answers
