"""Our rewards against the answers of the official code (tests/golden, written by parity/official.py), and what every
reward with a network promises."""

import golden_rewards
import pytest
import torch

SCORE, GRADIENT = 1e-5, 2e-5  # twice and ten times the largest measured on two processors (docs/results/parity.md)
REWARDS = sorted(golden_rewards.BUILDERS)

pytestmark = pytest.mark.filterwarnings("ignore:.* reads the first .* tokens of a prompt")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """reward name, settings -> our reward, opened once; converted checkpoints stay in a temporary folder."""
    cache = {}

    def open_(name, **traps):
        if (key := (name, *sorted(traps.items()))) not in cache:
            golden = golden_rewards.read(name)
            cache[key] = golden_rewards.BUILDERS[name](golden, tmp_path_factory.mktemp(name), **traps), golden
        return cache[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield open_


# -- score and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_score_and_pixel_gradient_are_the_official_ones(opened, name):
    score, gradient = golden_rewards.differences(*opened(name))
    assert score < SCORE
    assert gradient < GRADIENT


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "objectness", "imagereward"])
def test_the_tokens_are_the_official_ones(opened, name):
    """Also of a prompt that is cut, which keeps its end token."""
    reward, golden = opened(name)
    cache = {"objectness": "queries", "imagereward": "tokens"}.get(name, "texts")
    texts = ["book"] if name == "objectness" else golden.prompts
    for text, official in zip(texts, golden.tensors["ids"].tolist(), strict=False):
        ids = getattr(reward, cache).ids(text)
        assert ids == official[: len(ids)]
        assert not any(official[len(ids) :])  # padding


TRAPS = [
    *((name, {"hidden_act": "quick_gelu"}) for name in ("clipscore", "pickscore", "hpsv2")),
    *((name, {"hidden_act": "gelu"}) for name in ("aesthetic", "objectness")),
    *((name, {"num_attention_heads": 2}) for name in REWARDS),
    *((name, {"layer_norm_eps": 1e-6}) for name in REWARDS if name != "imagereward"),
    ("imagereward", {"vision_num_attention_heads": 8}),
]


@pytest.mark.parametrize(("name", "trap"), TRAPS, ids=str)
def test_a_wrong_setting_that_loads_without_a_word_is_far_outside_the_tolerance(opened, name, trap):
    score, gradient = golden_rewards.differences(*opened(name, **trap))
    assert score > 20 * SCORE
    assert gradient > 20 * GRADIENT


@pytest.mark.parametrize("tower", ["VISION_EPS", "TEXT_EPS"])
def test_imagereward_with_another_eps_is_far_outside_the_tolerance(monkeypatch, opened, tmp_path, tower):
    """No file can set these; that they matter is seen by changing the constant."""
    golden = opened("imagereward")[1]
    monkeypatch.setattr(f"rewardtune.rewards.imagereward.{tower}", 1e-5)
    settings = {"layer_norm_eps": 1e-5} if tower == "TEXT_EPS" else {}
    score, gradient = golden_rewards.differences(golden_rewards.imagereward(golden, tmp_path, **settings), golden)
    assert score > 20 * SCORE
    assert gradient > 20 * GRADIENT


# -- the checkpoints at full size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clipscore", "hpsv2", "aesthetic", "imagereward"])
def test_key_tables_make_the_names_and_shapes_of_transformers_at_full_size(name):
    ours, wanted = golden_rewards.full_size(name)
    assert ours == wanted


# -- the transforms and JPEG ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", ["landscape", "portrait"])
@pytest.mark.parametrize("way", ["openai_clip", "transformers_clip", "transformers_owlvit"])
def test_transforms_are_those_of_the_pil_ones_to_8_bit_rounding(way, picture):
    largest, mean = golden_rewards.transform_difference(golden_rewards.read("preprocessing"), way, picture)
    assert largest <= 3
    assert mean <= 0.35


@pytest.mark.parametrize("picture", ["landscape", "portrait", "hard edges"])
def test_the_letterbox_is_hpsv2s_exactly(picture):
    largest, _ = golden_rewards.transform_difference(golden_rewards.read("preprocessing"), "hpsv2", picture)
    assert largest < 1e-3


@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        ("openai_clip", {"fit": "squash"}),
        ("transformers_owlvit", {"fit": "crop"}),
        ("hpsv2", {"fit": "crop"}),
        ("openai_clip", {"antialias": False}),
        ("hpsv2", {"antialias": False}),
    ],
)
def test_another_transform_is_far_off(way, wrong):
    _, mean = golden_rewards.transform_difference(golden_rewards.read("preprocessing"), way, "landscape", **wrong)
    assert mean > 1


@pytest.mark.parametrize("quality", [20, 50, 80])
def test_jpeg_is_pillows(quality):
    assert golden_rewards.jpeg_psnr(golden_rewards.read("jpeg"), quality).min() > 43


# -- what every reward with a network promises, beside the contract (test_contract.py) ---------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_micro_batches_and_checkpointing_change_no_number(monkeypatch, opened, name):
    reward, golden = opened(name)
    plain = golden_rewards.score_and_gradient(reward, golden)
    monkeypatch.setattr(reward, "micro_batch", 1)
    in_pieces = golden_rewards.score_and_gradient(reward, golden)
    modules = [value for value in vars(reward).values() if isinstance(value, torch.nn.Module)]
    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    assert checkpointed
    for layer in checkpointed:
        monkeypatch.setattr(layer, "gradient_checkpointing", False)
    at_once = golden_rewards.score_and_gradient(reward, golden)
    for changed in (in_pieces, at_once):
        for before, after in zip(plain, changed, strict=True):
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
