"""Key tables: every number once, the load at full size, what they refuse. Names and scores: test_golden.py."""

import re
from pathlib import Path

import pytest
import torch
from golden_rewards import official_shapes
from safetensors.torch import load_file

from rewardtune.errors import ConfigError
from rewardtune.rewards.clipmodel import UNSEEN, vit_h_config
from rewardtune.rewards.convert import OPEN_CLIP, Row, clip_from_open_clip, rename
from rewardtune.rewards.weights import load_strictly

GOLDEN = Path(__file__).parent / "golden"


def tiny(name="hpsv2"):
    """A small official checkpoint whose numbers are all different: 0, 1, 2, ... over all keys."""
    weights = load_file(GOLDEN / f"{name}.safetensors")
    state, start = {}, 0
    for key in sorted(key for key in weights if key.startswith("weights.")):
        value = weights[key]
        state[key.removeprefix("weights.")] = torch.arange(start, start + value.numel()).view(value.shape)
        start += value.numel()
    return state


@pytest.mark.parametrize("name", ["clipscore", "hpsv2"])
def test_open_clips_vit_h_loads_into_a_clip_model_of_full_size(name):
    from transformers import CLIPModel

    ours = clip_from_open_clip(official_shapes(name))
    assert sum(value.numel() for value in ours.values()) == pytest.approx(986.1e6, rel=1e-4)
    model = load_strictly(lambda: CLIPModel(vit_h_config()), ours, who="test", what=name)
    assert model.vision_model.embeddings.position_ids.device.type == "cpu"  # a buffer that no checkpoint holds


def test_every_number_arrives_once():
    state = tiny()
    result = clip_from_open_clip(state)
    numbers = torch.cat([value.flatten() for value in result.values()])
    assert torch.equal(numbers.sort().values, torch.arange(sum(value.numel() for value in state.values())))


def test_every_source_key_is_read_once_and_none_is_needless():
    keys = [*tiny(), "input_resolution", "attn_mask"]
    hits = {key: [row for row in OPEN_CLIP if re.fullmatch(row.source, key)] for key in keys}
    assert all(len(rows) == 1 for rows in hits.values())
    assert {id(rows[0]) for rows in hits.values()} == {id(row) for row in OPEN_CLIP}  # no row without a key


def test_queries_keys_and_values_in_this_order_and_matrices_turned():
    state = tiny()
    result = clip_from_open_clip(state)
    fused = state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    for part, name in zip(fused.chunk(3), "qkv", strict=True):
        assert torch.equal(result[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"], part)
    assert torch.equal(result["visual_projection.weight"], state["visual.proj"].T)
    assert torch.equal(result["text_projection.weight"], state["text_projection"].T)
    assert torch.equal(
        result["text_model.encoder.layers.0.mlp.fc2.bias"], state["transformer.resblocks.0.mlp.c_proj.bias"]
    )


def test_what_is_no_weight_is_dropped():
    extra = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    assert clip_from_open_clip(tiny() | extra).keys() == clip_from_open_clip(tiny()).keys()


@pytest.mark.parametrize("key", ["visual.trunk.blocks.0.norm1.weight", "text.proj", "visual.attnpool.c_proj.weight"])
def test_an_unknown_key_is_named(key):
    with pytest.raises(ConfigError, match=f"has '{key}', which open_clip's CLIP does not know"):
        clip_from_open_clip(tiny() | {key: torch.zeros(2)})


def test_a_table_with_two_rows_for_a_key_and_two_keys_for_a_name_are_refused():
    state = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    with pytest.raises(ConfigError, match=r"table of it has 2 rows for 'a.weight'"):
        rename(state, [Row(r"a\.weight", ("x",)), Row(r"[ab]\.weight", (r"y",))], what="it")
    with pytest.raises(ConfigError, match=r"writes 'x' twice, the second time by 'b\.weight'"):
        rename(state, [Row(r"[ab]\.weight", ("x",))], what="it")


def test_what_is_missing_is_named_by_the_strict_load():
    from transformers import CLIPModel

    state = official_shapes("hpsv2")
    del state["visual.transformer.resblocks.7.ln_1.bias"]
    with pytest.raises(
        ConfigError, match=r"1 weights are missing, vision_model.encoder.layers.7.layer_norm1.bias first"
    ):
        load_strictly(lambda: CLIPModel(vit_h_config()), clip_from_open_clip(state), who="hpsv2", what="the file")


def test_the_config_of_the_vit_h_states_what_no_shape_betrays():
    config = vit_h_config()
    assert UNSEEN == {"hidden_act": "gelu", "num_attention_heads": 16, "layer_norm_eps": 1e-5}
    for tower in (config.text_config, config.vision_config):
        assert {key: getattr(tower, key) for key in UNSEEN} == UNSEEN
        assert tower.projection_dim == config.projection_dim == 1024
