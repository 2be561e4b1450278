"""The run file: strict, every problem at once with its line, numbers and overrides as people write them."""

import re
from pathlib import Path

import pytest
import torch

from rewardtune import rewards
from rewardtune.config import Part, dump_config, load_config, parse_options, recipes
from rewardtune.errors import ConfigError
from rewardtune.launch import make_reward

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
        "line 3: unknown key 'reward.0.weigth' (did you mean 'weight'?); legal here: name, mean_of",
        "line 5: reward.1.weight = 'heavy': must be a valid number",
        "line 7: unknown key 'optim.lrr' (did you mean 'lr'?)",
        "line 8: optim.steps = 0: must be greater than or equal to 1",
        "line 9: optim.lr = '1e-4x': must be a valid number",
        "line 10: unknown key 'sampling.stpes' (did you mean 'steps'?)",
        "line 11: prompts = 3: must be a valid string",
        "override optim.clop: unknown key 'optim.clop' (did you mean 'clip'?)",
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


# -- the reward -----------------------------------------------------------------------------------------------------

COMPOSED = """\
model: playground
prompts: [a, b]
output_dir: out
reward_weight: 1e-2
reward:
  - {name: brightness, weight: 1e-3, hinge: 2.0}
  - minimum_of:
      - {name: symmetry, standardise: {mean: 0.55, std: 0.1}, options: {detach_std: true}}
      - mean_of: [brightness, {name: colour, options: {colour: teal}}]
    weight: 2
  - balance: [brightness, {name: symmetry, weight: 0.2, target: 0.3}]
"""


def test_compositions_are_built_as_written(tmp_path):
    config = load_config(write(tmp_path, COMPOSED))
    built = make_reward(config.reward, weight=config.reward_weight)
    bright, teal = rewards.Brightness(), rewards.Colour("teal")
    worst = rewards.minimum_of(
        rewards.standardise(rewards.Symmetry(detach_std=True), mean=0.55, std=0.1), rewards.mean_of(bright, teal)
    )
    pull = rewards.balance(bright + 0.2 * rewards.target(rewards.Symmetry(), 0.3))
    expected = 1e-2 * (1e-3 * rewards.hinge(bright, 2.0) + 2 * worst + pull)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(built(images, ["a", "b"]), expected(images, ["a", "b"]))
    gradients = [torch.autograd.grad(reward(images, ["a", "b"]).sum(), images)[0] for reward in (built, expected)]
    torch.testing.assert_close(*gradients)
    natives = built.parts(images, ["a", "b"])[1]  # brightness stands there three times and is one reward
    assert list(natives) == ["brightness", "symmetry", "colour", "mean_of", "minimum_of", "symmetry_2"]
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert "null" not in dump_config(config).partition("method:")[0]


def test_the_example_of_the_docs_is_a_run_file(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(reward:.*?)```", text, flags=re.DOTALL)
    config = load_config(write(tmp_path, GOOD.replace("reward: symmetry\n", example)))
    assert [part.hinge for part in config.reward] == [2.0, None, None]
    assert [part.name for part in config.reward[1].minimum_of] == ["hpsv2", "pickscore"]
    assert config.reward[2].balance[1].options == {"detach_std": True}


def test_wrong_compositions_are_named_with_their_line(tmp_path):
    text = """\
model: playground
prompts: [a, b]
output_dir: out
reward:
  - {hinge: 2}
  - {name: x, mean_of: [a, b]}
  - {name: x, hinge: 2, target: 3}
  - {name: x, hinge: high}
  - mean_of: [a]
  - mean_of:
    - {name: a, wieght: 3}
    - 3
  - {name: x, standardise: {mean: 0, stdd: 1}}
  - {name: x, standardise: {mean: 0, std: 0}}
  - {balance: [a, b], options: {limit: 2}}
"""
    found = problems(tmp_path, text)
    for expected in (
        "line 5: reward.0 = {'hinge': 2}: nothing given; legal is one of name, mean_of, minimum_of, balance",
        "line 6: reward.1 = {'name': 'x', 'mean_of': ['a', 'b']}: name and mean_of given; legal is one of name",
        "hinge and target given; legal is at most one of hinge, target, standardise",
        "line 8: reward.3.hinge = 'high': must be a valid number",
        "line 9: reward.4.mean_of = ['a']: List should have at least 2 items",
        "line 11: unknown key 'reward.5.mean_of.0.wieght' (did you mean 'weight'?)",
        "line 12: reward.5.mean_of.1 = 3: must be a valid mapping",
        "line 13: unknown key 'reward.6.standardise.stdd' (did you mean 'std'?); legal here: mean, std",
        "line 14: reward.7.standardise.std = 0: must be greater than 0",
        "options are for a reward by name; a group has none",
    ):
        assert any(expected in line for line in found), (expected, found)
    with pytest.raises(ConfigError, match=r"balance: '2\*brightness' has fewer than two parts"):
        make_reward([Part(balance=[Part(name="brightness"), Part(name="brightness")])])
    with pytest.raises(ConfigError, match="reward is an empty list"):
        make_reward([])
