"""Vendi score and mean pairwise distance on sets with known answers; the features of the playground's CLIP."""

import math
import random

import pytest
import torch
from tiny_clip import photo_like, save
from torch.nn import functional as F

from rewardtune import playground, rewards
from rewardtune.diversity import Features, across, mean_over, pairwise_distance, vendi, within
from rewardtune.errors import ConfigError

DRAWN = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("d", [3, 40])
def test_equal_pictures_count_as_one(n, d):
    features = torch.linspace(0.5, 2.0, n)[:, None] * torch.arange(1.0, d + 1)  # equal directions, other lengths
    assert vendi(features) == pytest.approx(1)
    if n > 1:
        assert pairwise_distance(features) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_orthogonal_pictures_count_each(n):
    turned = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0]
    features = 3 * turned
    assert vendi(features) == pytest.approx(n, rel=1e-5)
    assert pairwise_distance(features) == pytest.approx(1, rel=1e-5)


def test_clusters_count_by_their_entropy():
    """Orthogonal clusters of shares p: exp(entropy(p)), and a pair differs with the chance of two clusters."""
    sizes = [1, 2, 5]
    features = torch.cat([torch.eye(6)[k].expand(size, -1) for k, size in enumerate(sizes)])
    shares = [size / 8 for size in sizes]
    assert vendi(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    apart = 1 - sum(size * (size - 1) for size in sizes) / (8 * 7)
    assert pairwise_distance(features) == pytest.approx(apart)


def test_two_pictures_by_hand():
    """K / 2 has the eigenvalues (1 +- c) / 2; opposite pictures lie 2 apart."""
    c = 0.6
    features = torch.tensor([[1.0, 0.0], [c, 0.8]])
    high, low = (1 + c) / 2, (1 - c) / 2
    assert vendi(features) == pytest.approx(math.exp(-high * math.log(high) - low * math.log(low)))
    assert pairwise_distance(features) == pytest.approx(1 - c)
    assert pairwise_distance(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2)


def test_they_equal_the_formulas_written_out():
    cosine = F.cosine_similarity(DRAWN.double()[:, None], DRAWN.double()[None], dim=-1)
    eigenvalues = torch.linalg.eigvals(cosine / 12).real
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi(DRAWN) == pytest.approx(float((-(eigenvalues * eigenvalues.log()).sum()).exp()), rel=1e-6)
    pairs = [1 - cosine[i, j] for i in range(12) for j in range(12) if i != j]
    assert pairwise_distance(DRAWN) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-6)


def test_order_length_and_rotation_of_features_do_not_matter():
    shuffled = DRAWN[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    turned = DRAWN @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    for measure in (vendi, pairwise_distance):
        for other in (shuffled, turned, 7 * DRAWN):
            assert measure(other) == pytest.approx(measure(DRAWN), rel=1e-5)


def test_a_repeated_picture_lowers_both():
    repeated = DRAWN.clone()
    repeated[6:] = repeated[0]
    assert vendi(repeated) < 0.8 * vendi(DRAWN)
    assert pairwise_distance(repeated) < 0.8 * pairwise_distance(DRAWN)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_picture_without_a_direction_is_nan(value):
    features = DRAWN.clone()
    features[3] = value
    assert math.isnan(vendi(features))
    assert math.isnan(pairwise_distance(features))


def test_what_has_no_answer():
    assert math.isnan(pairwise_distance(DRAWN[:1]))
    for wrong in (DRAWN[0], DRAWN[None], DRAWN[:0]):
        with pytest.raises(ConfigError, match=r"legal is \(N, D\)"):
            vendi(wrong)


def test_groups_within_and_across_prompts():
    prompts = ["a", "b", "a", "c", "b", "a"]
    assert within(prompts) == [[0, 2, 5], [1, 4], [3]]
    assert across(prompts) == [[0, 1, 3], [2, 4], [5]]
    assert across([]) == within([]) == []


def test_one_picture_a_prompt_and_one_prompt_a_picture_are_told_apart():
    """Seeds of a prompt alike, prompts different: nothing within, everything across; and the other way round."""
    prompts = ["a", "a", "b", "b", "c", "c"]
    by_prompt, by_seed = torch.eye(3).repeat_interleave(2, 0), torch.eye(2).repeat(3, 1)
    assert mean_over(within(prompts), by_prompt, vendi) == pytest.approx(1)
    assert mean_over(across(prompts), by_prompt, vendi) == pytest.approx(3)
    assert mean_over(within(prompts), by_seed, vendi) == pytest.approx(2)
    assert mean_over(across(prompts), by_seed, vendi) == pytest.approx(1)
    assert math.isnan(mean_over(within(["a", "b"]), by_seed[:2], vendi))  # one picture each: nothing to compare


def test_features_are_the_embeddings_of_the_clip():
    images = playground.render(playground.draw_scenes(5, random.Random(0)))
    found = Features("playground")(images, batch=2)
    clip = rewards.CLIPScore(model=str(playground.clip_path()))
    expected = clip.model.get_image_features(pixel_values=clip.preprocess(images)).pooler_output
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert found.dtype == torch.float32


def test_features_equal_those_of_transformers_own_processor(tmp_path):
    """On an 8-bit picture larger than the network's input: the official PIL processor and model, up to resizing."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = save(tmp_path)
    image = photo_like(height=90, width=70)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        image[0].mul(255).round().byte().permute(1, 2, 0).numpy(), return_tensors="pt"
    ).pixel_values
    expected = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=pixels).pooler_output
    assert F.cosine_similarity(Features(str(folder))(image), expected).item() > 0.999


def test_a_missing_folder_is_named():
    with pytest.raises(ConfigError, match=r"guards\.features: cannot load './nowhere'"):
        Features("./nowhere")
