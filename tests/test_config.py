"""The run file: strict, every problem at once with its line, numbers and overrides as people write them."""

import pytest

from rewardtune.config import dump_config, load_config, parse_options, recipes
from rewardtune.errors import ConfigError

GOOD = """\
model: playground
reward: symmetry
prompts: [a, b]
output_dir: out
"""


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def problems(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value).splitlines()


def test_short_forms_and_defaults(tmp_path):
    config = load_config(write(tmp_path, GOOD + "method: refl\n"))
    assert config.model.path == "playground"
    assert [part.name for part in config.reward] == ["symmetry"]
    assert config.method.name == "refl"
    assert (config.optim.lr, config.lora.rank, config.optim.clip) == (2e-5, 128, 0.1)  # the paper's table 1


def test_scientific_numbers_and_overrides(tmp_path):
    path = write(tmp_path, GOOD + "optim: {lr: 1e-4}\n")
    assert load_config(path).optim.lr == 1e-4
    config = load_config(path, ["optim.lr=3e-4", "method.options.K=2", "sampling.guidance=null", "eval.prompts=[x]"])
    assert config.optim.lr == 3e-4
    assert config.method.options == {"K": 2}
    assert config.eval.prompts == ["x"]


def test_all_problems_at_once_with_lines(tmp_path):
    text = """\
model: playground
reward:
  - {name: symmetry, weigth: 2}
  - name: clipscore
    weight: heavy
optim:
  lrr: 1e-4
  steps: 0
  lr: 1e-4x
sampling: {stpes: 3}
prompts: 3
"""
    found = problems(tmp_path, text, ["optim.clop=3"])
    for expected in (
        "line 3: unknown key 'reward.0.weigth'; did you mean 'weight'? legal here: name, weight, options",
        "line 5: reward.1.weight = 'heavy': must be a valid number",
        "line 7: unknown key 'optim.lrr'; did you mean 'lr'?",
        "line 8: optim.steps = 0: must be greater than or equal to 1",
        "line 9: optim.lr = '1e-4x': must be a valid number",
        "line 10: unknown key 'sampling.stpes'; did you mean 'steps'?",
        "line 11: prompts = 3: must be a valid string",
        "override optim.clop: unknown key 'optim.clop'; did you mean 'clip'?",
        "'output_dir' is missing",
    ):
        assert any(expected in line for line in found), (expected, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "'model' is missing"),
        (GOOD + "seed: 1\nseed: 2\n", "not valid YAML: .*duplicate key seed"),
        (GOOD + "seed: ${nothing}\n", "not valid YAML: .*nothing"),
    ],
)
def test_files_that_are_no_run_files(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; .*playground"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim lr=3"])
def test_overrides_that_are_none(override, tmp_path):
    with pytest.raises(ConfigError, match=r"write key=value, for example optim\.lr=1e-4"):
        load_config(write(tmp_path, GOOD), [override])


def test_the_resolved_copy_reads_back_equal(tmp_path):
    config = load_config("playground", ["optim.lr=1e-7"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_every_shipped_recipe_is_valid():
    assert "playground" in recipes()
    for name in recipes():
        load_config(name)


def test_options_of_the_plan_command():
    assert parse_options(["K=5", "spacing=random", "m=null"]) == {"K": 5, "spacing": "random", "m": None}
