"""The run file: strict, every problem at once with its line, numbers and overrides as people write them."""

import json
import re
from pathlib import Path
from types import MappingProxyType

import jsonschema
import pytest
import torch
import yaml

from rewardtune import rewards, strictyaml
from rewardtune.cli import main
from rewardtune.config import (
    ELSEWHERE,
    Checkpoints,
    Guards,
    Log,
    Part,
    Regularize,
    dump_config,
    load_config,
    parse_options,
    presets,
    section,
)
from rewardtune.errors import ConfigError
from rewardtune.launch import make_reward
from rewardtune.models import load_pipeline
from rewardtune.schema import json_schema, keys_table

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
    assert config.model.id == "playground"
    assert [part.name for part in config.reward] == ["symmetry"]
    assert config.method.name == "refl"
    assert (config.optim.lr, config.adapter.rank, config.optim.clip) == (2e-5, 128, 0.1)  # the paper's table 1


def test_scientific_numbers_and_overrides(tmp_path):
    path = write(tmp_path, GOOD + "optim: {lr: 1e-4}\n")
    assert load_config(path).optim.lr == 1e-4
    config = load_config(path, ["optim.lr=3e-4", "method.options.K=2", "sampling.guidance=null", "eval.prompts=[x]"])
    assert config.optim.lr == 3e-4
    assert config.method.options == {"K": 2}
    assert config.eval.prompts.source == ["x"]


def test_json_is_an_override(tmp_path):
    """Any text: JSON writes what lies beyond the first 65536 characters as two halves."""
    prompts = ["a cat \U0001f431", 'quotes " and \\ud83d', "line\nfeed\u2028\x85", "é"]
    config = load_config(write(tmp_path, GOOD), [f"eval.prompts={json.dumps(prompts)}"])
    assert config.eval.prompts.source == prompts
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        load_config(write(tmp_path, GOOD), ['eval.prompts=["a \\ud83d cat"]'])


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
        "line 11: prompts = 3: must be a string, a list of strings, or a mapping with a source",
        "override optim.clop: unknown key 'optim.clop' (did you mean 'clip'?)",
        "'output_dir' is missing",
    ):
        assert any(expected in line for line in found), (expected, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1: not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "'model' is missing"),
        (GOOD + "seed: 1\nseed: 2\n", "line 6: 'seed' is given twice .the first time in line 5.; keep one"),
        (GOOD + "seed: ${nothing}\n", "line 5: seed = .*: must be a valid integer"),
        (GOOD + "\tseed: 1\n", "line 5: not valid YAML: .*found character"),
        (GOOD + "seed: \x00\n", "line 5: not valid YAML: the character .* may not stand there"),
        (GOOD + "3: a\n", "line 5: '3' stands where a key must stand"),
        (GOOD + "eval: !!set {a}\n", "line 5: .*set' is not allowed"),
        (GOOD + "seed: " + 5000 * "9", "line 5: a number of 5000 digits is too long"),
        (GOOD + "eval: " + 100_000 * "[", "line 5: nested more than 40 deep"),
        (GOOD + "eval: &a [*a]\n", r"line 5: \*a stands inside what it refers to"),
        (
            "a: &a [1]\n"
            + "".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}' if n else '*a'])}]\n" for n in range(9)),
            "line [67]: more than 200000 values",
        ),
    ],
)
def test_files_that_are_no_run_files(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; .*playground"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match=r"run file playgroundd does not exist \(did you mean 'playground'\?\); give"):
        load_config("playgroundd")
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"line 1: byte 0xff is not UTF-8"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(tmp_path / "run.yaml").prompts.source == ["a", "b"]


def test_folders_are_no_run_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "playground").mkdir()
    assert load_config("playground").model.id == "playground"
    with pytest.raises(ConfigError, match=r"run file \. is a folder; give a YAML file"):
        load_config(".")
    write(tmp_path, GOOD).rename(tmp_path / "playground" / "config.yaml")
    with pytest.raises(ConfigError, match=r"run file playground is a folder; give playground/config\.yaml$"):
        load_config("./playground/")


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim lr=3"])
def test_overrides_that_are_none(override, tmp_path):
    with pytest.raises(ConfigError, match=r"write key=value, for example optim\.lr=1e-4"):
        load_config(write(tmp_path, GOOD), [override])


def test_the_home_folder_is_written_out(tmp_path, monkeypatch):
    """Where a path may stand, and nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model: ~/a\nreward: symmetry\nprompts: ~/p.txt\noutput_dir: ~/runs/a\neval: {prompts: [~/x]}\n"
    config = load_config(write(tmp_path, text))
    assert [config.model.id, config.prompts.source, config.output_dir] == [
        str(tmp_path / name) for name in ("a", "p.txt", "runs/a")
    ]
    assert config.eval.prompts.source == ["~/x"]


def test_a_section_without_keys_has_its_defaults(tmp_path):
    config = load_config(write(tmp_path, GOOD + "optim:\nregularize:\n  denoise:\n    # weight: 0.1\n"))
    assert config == load_config(write(tmp_path, GOOD))


def test_what_a_mapping_merges_in_takes_no_line_of_its_own_keys(tmp_path):
    text = "optim:\n  steps: 0\n  <<: &more\n    steps: 3\n    lr: fast\neval: {}\n"
    found = problems(tmp_path, GOOD + text)
    assert [line.partition("run.yaml, ")[2].split(" = ")[0] for line in found] == [
        "line 6: optim.steps",
        "line 9: optim.lr",
    ]


def test_the_resolved_copy_reads_back_equal(tmp_path):
    config = load_config("playground", ["optim.lr=1e-7"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "text", ["no", "1e5", "1:30", "0x1f", "~", "${x}", "???", " a ", "a: b", "# x", "\u2028", "\x07", "'"]
)
def test_strings_that_look_like_something_else_survive(text, tmp_path):
    config = load_config(write(tmp_path, GOOD), [f"prompts=[{yaml.safe_dump(text, default_style=chr(34)).strip()}]"])
    assert config.prompts.source == [text]
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped)) == config
    assert yaml.safe_load(dumped)["prompts"]["source"] == [text]  # and other readers understand the copy alike


def test_values_that_are_nearly_right_are_refused(tmp_path):
    text = (
        GOOD
        + """\
optim: {steps: true, lr: .nan, clip: .inf, batch: 2.5, betas: [0.9], weight_decay: "0"}
memory: {cache_text: 1, offload: [vae, gpu]}
sampling: {width: 3}
adapter: {targets: [], rank: 1e2}
seed: 9223372036854775808
"""
    )
    found = problems(tmp_path, text)
    for expected in (
        "line 5: optim.steps = True: must be a valid integer",
        "line 5: optim.lr = nan: must be ",
        "line 5: optim.clip = inf: must be a finite number",
        "line 5: optim.batch = 2.5: must be a valid integer",
        "line 5: optim.betas = [0.9]: must be two numbers, e.g. [0.9, 0.999]",
        "line 5: optim.weight_decay = '0': must be a valid number",
        "line 6: memory.cache_text = 1: must be true or false",
        "line 6: memory.offload.1 = 'gpu': must be 'text_encoders', 'vae' or 'reward'",
        "line 7: sampling.width = 3: must be greater than or equal to 8",
        "line 8: adapter.targets = []",
        "line 8: adapter.rank = 100.0: must be a valid integer",
        "line 9: seed = 9223372036854775808: must be less than 9223372036854775808",
    ):
        assert any(expected in line for line in found), (expected, found)
    assert problems(tmp_path, GOOD.replace("[a, b]", "[a, 3]")) == [
        f"{tmp_path / 'run.yaml'}, line 3: prompts.source.1 = 3: must be a valid string"
    ]


def test_renamed_keys_say_their_new_name(tmp_path):
    text = GOOD.replace("playground", "{id: a, path: b}") + "lora: {rank: 4}\noptim: {offload_reward: true}\n"
    found = problems(tmp_path, text)
    assert any("line 1: 'model.path': it is called model.id now" in line for line in found)
    assert any("line 5: 'lora': it is called adapter now" in line for line in found)
    assert any("line 6: 'optim.offload_reward': write memory: {offload: [reward]} now" in line for line in found)


# -- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_enter_lists_and_short_forms(tmp_path):
    path = write(tmp_path, GOOD + "eval:\n")
    overrides = [
        "model.dtype=bfloat16",
        "reward.0.weight=2",
        "prompts.template=a {}",
        "eval.prompts=x.txt",
        "eval.count=3",
    ]
    config = load_config(
        path, [*overrides, "method.options.K=2", "prompts.negative=ugly", "eval.prompts.template='{} b'"]
    )
    assert (config.model.id, config.model.dtype) == ("playground", "bfloat16")
    assert [(part.name, part.weight) for part in config.reward] == [("symmetry", 2)]
    assert (config.prompts.source, config.prompts.template, config.negative_prompt) == (["a", "b"], "a {}", "ugly")
    assert (config.eval.count, config.eval.prompts.source, config.eval.prompts.template) == (3, "x.txt", "{} b")
    assert load_config(path, ["prompts[1]=c", "prompts.0=d"]).prompts.source == ["d", "c"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=[", r"override optim\.lr, line 1: not valid YAML: .*needs quotes: optim\.lr="),
        ("optim.lr=1e-4x", r"override optim\.lr: optim\.lr = '1e-4x': must be a valid number"),
        ("optim.lr.x=3", r"override optim\.lr\.x: optim\.lr = .*: must be a valid number"),
        ("seed.x=3", r"override seed\.x: seed = \{'x': 3\}"),
        ("output_dir.x=3", r"override output_dir\.x: output_dir is 'out', which has no keys"),
        ("prompts.7=3", r"override prompts\.7: prompts is a list of 2; legal numbers: 0 to 1$"),
        ("reward.7.weight=2", r"override reward\.7\.weight: reward is a list of 1; legal numbers: 0$"),
        ("reward.weight=2", r"override reward\.weight: reward is a list of 1; write reward\.0\.weight$"),
        ("prompts=", r"override prompts: prompts = None: must be a string"),
        ("sampling.0=3", r"override sampling\.0: sampling is no list"),
        ("lora.rank=3", r"override lora\.rank: 'lora': it is called adapter now"),
        ("prompts=[a, 3]", r"override prompts: prompts\.source\.1 = 3"),
    ],
)
def test_wrong_overrides_are_named_by_their_key(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, GOOD), [override])


# -- settings that do not go together -------------------------------------------------------------------------------

TOGETHER = {
    "memory: {shard: true}\nadapter: {kind: dora}": "adapter.kind: does not go with memory.shard: use lora",
    "memory: {shard: true, recompute: false}": "memory.recompute: does not go with memory.shard: set it to true",
    "memory: {shard: true}\nmodel: {id: x/y, compile: true}": "model.compile: does not go with memory.shard",
    "optim: {steps: 5, warmup: 5}": "optim.warmup: 5 updates of warmup, but optim.steps is 5",
    "optim: {batch: 4, micro_batch: 8}": "optim.micro_batch: 8 is more than optim.batch, which is 4",
    "sampling: {negative_prompt: x}\nprompts: {source: a.txt, negative: y}": "prompts.negative: sampling.negative",
    "adapter: {kind: full}\nregularize: {kl: 0.1}": "regularize.kl: needs the base model, which full",
    "adapter: {kind: full}\nmodel: {id: x, quantize: nf4}": "adapter.kind: quantised weights cannot be trained",
    "adapter: {kind: full, rank: 4}": "adapter.rank: is of adapters, and adapter.kind full has none; leave it out",
    "adapter: {kind: full, alpha: 4}": "adapter.alpha: is of adapters, and adapter.kind full has none; leave it out",
    "adapter: {kind: full, targets: [to_q]}": "adapter.targets: is of adapters, and adapter.kind full has none",
    "adapter: {kind: full, inference_weight: 0.7}": "adapter.inference_weight: is of adapters, and adapter.kind full",
    "memory: {offload: [text_encoders], cache_text: false}": "memory.offload: text_encoders needs memory.cache_text",
    "sampling: {call: {prompt: x, generator: 3}}": "sampling.call: generator, prompt is set by the trainer itself",
    "sampling: {height: 64, call: {height: 32}}": "sampling.call: height is given by a key of its own too",
    "sampling: {negative_prompt: x, call: {negative_prompt: y}}": "sampling.call: negative_prompt is given by a key",
    "optim: {lr: 5.0e-8, schedule: polynomial}": "optim.lr: 5e-08 with schedule polynomial, which falls to 1e-07",
    "guards: {rules: [{metric: reward, below: 0, then: rollback}]}\neval: {every: 5}\ncheckpoints: {best: null}": (
        "guards.rules: then: rollback goes back to the best checkpoint, and checkpoints.best is null"
    ),
    "regularize: {denoise: {images: pictures}}": "regularize.denoise.images: has no effect while",
    "guards: {rules: [{metric: reward, below: 0}]}": "guards.rules: are judged at evaluations, and there are none",
    "checkpoints: {best: clipscore}": "checkpoints.best: 'clipscore' is measured at evaluations",
    "memory: {offload: [reward, reward]}": "memory.offload: reward is given twice",
}


def test_rules_and_best_go_with_a_single_look_at_the_end(tmp_path):
    """The weights of a last look that a rule forbids are not kept."""
    rules = "guards: {rules: [{metric: reward, below: 0}]}\ncheckpoints: {best: reward}\n"
    config = load_config(write(tmp_path, GOOD + rules + "eval: {every: 9}\noptim: {steps: 9}\n"))
    assert config.guards.rules[0].metric == "reward"


@pytest.mark.parametrize("text", TOGETHER)
def test_contradictions(text, tmp_path):
    base = "".join(line + "\n" for line in GOOD.splitlines() if f"\n{line.split(':')[0]}:" not in f"\n{text}")
    found = problems(tmp_path, base + text + "\n")
    assert len(found) == 1
    assert TOGETHER[text] in found[0]
    assert re.search(r"run\.yaml, line \d+: ", found[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regularize: {denoise: {noise_range: [0.8, 0.2]}}", "must be two rising numbers from 0 to 1"),
        ("regularize: {denoise: {noise_range: [0.8, 1.2]}}", "must be two rising numbers from 0 to 1"),
        ("checkpoints: {keep: 0}", "checkpoints.keep = 0: must be greater than or equal to 1"),
        ("optim: {ema: 1.0}", "optim.ema = 1.0: must be less than 1"),
        ("optim: {betas: [0.9, 1.0]}", "must be two numbers, each from 0 to below 1"),
        ("guards: {rules: [{metric: x, falls_by: 5}]}", "falls_by = 5: must be less than or equal to 1"),
        ("guards: {rules: [{metric: x}]}", "no limit given; legal is exactly one of falls_by, rises_by, below, above"),
        ("guards: {rules: [{metric: x, below: 1, above: 2}]}", "below and above given; legal is exactly one of"),
        ("eval: {prompts: {source: a.txt, template: 'a photo'}}", "must hold {} exactly once"),
    ],
)
def test_wrong_values_of_sections(text, message, tmp_path):
    (problem,) = problems(tmp_path, GOOD + text + "\n")
    assert "line 5" in problem
    assert message in problem


WORDS = {  # the whole line after its place
    "prompts: {source: a.txt, template: a photo}": (
        "prompts.template = 'a photo': must hold {} exactly once and no other brace, for example 'a photo of {}'"
    ),
    "prompts: []": "prompts.source = []: must have at least 1 item",
    "prompts: {source: ''}": "prompts.source = '': must not be empty",
    "prompts: {source: 3}": "prompts.source = 3: must be a valid string or a list",
    "memory: {offload: text_encoders}": (
        "memory.offload = 'text_encoders': must be a list of text_encoders, vae, reward, e.g. [text_encoders]"
    ),
    "log: {trackers: wandbb}": (
        "log.trackers = 'wandbb': must be a list of tensorboard, wandb, trackio, e.g. [tensorboard]"
    ),
    "guards: {rewards: clipscore}": "guards.rewards = 'clipscore': must be a list, e.g. [clipscore]",
    "guards: {rules: {metric: x}}": "guards.rules = {'metric': 'x'}: must be a list of mappings",
    "memory: {shard: nodes}": "memory.shard = 'nodes': must be true or false or 'node'",
    "memory: {shard: 3}": "memory.shard = 3: must be true or false or 'node'",
    "reward:": "reward = None: must be a name of `rewardtune ls rewards`, a mapping, or a list of these",
    "optim: {lr: fast}": "optim.lr = 'fast': must be a valid number, e.g. 2e-05",
    "optim: {lr: '1e-4'}": "optim.lr = '1e-4': must be a valid number; remove the quotes",
    "optim: {batch: '8'}": "optim.batch = '8': must be a valid integer; remove the quotes",
    "optim: {batch: '8.5'}": "optim.batch = '8.5': must be a valid integer, e.g. 32",
    "log: 3": "log = 3: must be a mapping; legal keys: trackers, project, report",
}


@pytest.mark.parametrize("text", WORDS)
def test_wrong_values_in_words(text, tmp_path):
    base = "".join(line + "\n" for line in GOOD.splitlines() if line.split(":")[0] != text.split(":")[0])
    (problem,) = problems(tmp_path, base + text + "\n")
    assert re.sub(r"^.*?run\.yaml, line \d+: ", "", problem) == WORDS[text]


@pytest.mark.parametrize(
    ("text", "key", "ours"),
    [
        ("learning_rate: 1e-4", "learning_rate", "optim.lr"),
        ("optim: {learning_rate: 1e-4}", "optim.learning_rate", "optim.lr"),
        ("max_train_steps: 3", "max_train_steps", "optim.steps"),
        ("optim: {train_batch_size: 3}", "optim.train_batch_size", "optim.batch"),
        ("adapter: {network_dim: 3}", "adapter.network_dim", "adapter.rank"),
        ("network_alpha: 3", "network_alpha", "adapter.alpha"),
        ("lora_rank: 3", "lora_rank", "adapter.rank"),
        ("sampling: {resolution: 512}", "sampling.resolution", "sampling.width and sampling.height"),
        ("training: {lr: 1e-4}", "training", "optim, with steps, lr, batch and the like in it"),
    ],
)
def test_keys_of_other_trainers_are_told_ours(text, key, ours, tmp_path):
    (problem,) = problems(tmp_path, GOOD + text + "\n")
    assert problem.endswith(f"line 5: unknown key {key!r}: here it is {ours}")


def test_the_keys_that_hints_name_exist():
    known = re.findall(r"^\| `(\S+)` \|", keys_table(), flags=re.MULTILINE)
    for ours in ELSEWHERE.values():
        named = re.findall(r"\b[a-z]+(?:\.[a-z]+)*", ours.partition(",")[0].replace(" and ", " "))
        assert named, ours
        assert set(named) <= set(known), ours


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (
            Guards,
            {"rulez": []},
            "unknown key 'guards.rulez' (did you mean 'rules'?); legal here: rewards, features, rules",
        ),
        (
            Checkpoints,
            {"evry": 2},
            "unknown key 'checkpoints.evry' (did you mean 'every'?); legal here: every, keep, best",
        ),
        (
            Regularize,
            {"denoise": {"weigth": 1}},
            "unknown key 'regularize.denoise.weigth' (did you mean 'weight'?); "
            "legal here: weight, images, count, noise_range",
        ),
        (Regularize, {"kl": "x"}, "regularize.kl = 'x': must be a valid number, e.g. 0.0"),
        (Regularize, "kl", "regularize = 'kl': must be a mapping; legal keys: kl, denoise"),
        (Regularize, 0, "regularize = 0: must be a mapping; legal keys: kl, denoise"),
        (Log, [("project", "x")], "log = [('project', 'x')]: must be a mapping; legal keys: trackers, project, report"),
        (Guards, {"rules": [{"below": 1}]}, "'guards.rules.0.metric' is missing"),
    ],
)
def test_sections_given_in_python(model, given, message):
    with pytest.raises(ConfigError) as caught:
        section(model, given, model.__name__.lower())
    assert str(caught.value) == message


def test_sections_given_in_python_that_are_right():
    assert section(Checkpoints, None, "checkpoints") == Checkpoints()
    assert section(Checkpoints, {"every": 2}, "checkpoints") == Checkpoints(every=2)
    assert section(Checkpoints, MappingProxyType({"every": 2}), "checkpoints").every == 2
    assert section(Checkpoints, Checkpoints(keep=3), "checkpoints").keep == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match=r"model\.device='cuda': .*; this PyTorch on this machine has auto, cpu"):
        load_pipeline("playground", device="cuda")


# -- the schema and the table ---------------------------------------------------------------------------------------


def test_the_schema_accepts_what_load_config_accepts(tmp_path):
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for text in [GOOD, COMPOSED, *(path.read_text() for path in presets().values())]:
        assert not list(validator.iter_errors(strictyaml.read(text, "x")[0]))
    resolved = dump_config(load_config(write(tmp_path, GOOD)))
    assert not list(validator.iter_errors(yaml.safe_load(resolved)))
    for wrong in (
        "optim: {lrr: 1}",
        "optim: {lr: 0}",
        "memory: {offload: [x]}",
        "model: 3",
        "reward: [{weight: a}]",
        "x: 1",
    ):
        value = yaml.safe_load(GOOD) | yaml.safe_load(wrong)
        assert list(validator.iter_errors(value)), wrong
        with pytest.raises(ConfigError):
            load_config(write(tmp_path, yaml.safe_dump(value)))


def test_every_key_has_a_description():
    schema = json_schema()
    for name, part in [("run file", schema), *schema["$defs"].items()]:
        assert part.get("description") or name == "run file", name
        for key, field in part["properties"].items():
            ref = field.get("$ref", "").rpartition("/")[2]
            assert field.get("description") or schema["$defs"][ref]["description"], (name, key)


def test_the_table_of_the_docs_is_up_to_date():
    page = (Path(__file__).parents[1] / "docs" / "run-files.md").read_text(encoding="utf-8")
    committed = page.partition("<!-- keys: rewardtune schema --table -->\n")[2].partition("<!-- end of keys -->")[0]
    assert committed.strip() == keys_table().strip(), "put the output of `rewardtune schema --table` into the page"
    assert keys_table().count("| `optim.warmup` |") == 1


def test_the_schema_command(tmp_path, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == json_schema()
    assert main(["schema", "--table"]) == 0
    assert capsys.readouterr().out == keys_table()


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
    assert "null" not in dump_config(config).partition("reward:")[2].partition("method:")[0]


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
        "line 9: reward.4.mean_of = ['a']: must have at least 2 items",
        "line 11: unknown key 'reward.5.mean_of.0.wieght' (did you mean 'weight'?)",
        "line 12: reward.5.mean_of.1 = 3: must be a name or a mapping",
        "line 13: unknown key 'reward.6.standardise.stdd' (did you mean 'std'?); legal here: mean, std",
        "line 14: reward.7.standardise.std = 0: must be greater than 0",
        "options are for a reward by name; a group has none",
    ):
        assert any(expected in line for line in found), (expected, found)
    with pytest.raises(ConfigError, match=r"balance: '2\*brightness' has fewer than two parts"):
        make_reward([Part(balance=[Part(name="brightness"), Part(name="brightness")])])
    with pytest.raises(ConfigError, match="reward is an empty list"):
        make_reward([])
