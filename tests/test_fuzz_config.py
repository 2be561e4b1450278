"""Broken run files by hypothesis: each is accepted, or refused by a ConfigError that names a line or an override.

Never another exception. What is accepted survives `dump_config` and reads back equal.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewardtune.config import dump_config, load_config, presets
from rewardtune.errors import ConfigError

BASE = [path.read_text(encoding="utf-8") for path in presets().values()]
BASE.append(
    """\
model: {id: playground, dtype: float32}
reward:
  - {name: symmetry, weight: 1e-3, hinge: 2.0, options: {detach_std: true}}
  - minimum_of: [{name: clipscore, standardise: {mean: 0.5, std: 0.1}}, brightness]
prompts: {source: [a, b], template: "a {}", negative: null}
optim: {steps: 3, lr: 1e-4, betas: [0.9, 0.99]}
eval: {prompts: [x, y], count: 2, every: 1}
output_dir: out
"""
)
PLACE = re.compile(r", line \d+: |^override \S+|: '\w+(\.\w+)*' is missing")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30, max_value=10**400),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["playground", "1e-4", "no", "~", "${seed}", "${oc.env:HOME}", "???", "{}", "a {} {}", "builtin:x", ""]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
JUNK = ["\t", "\n\t", "[", "]", "{", "}", ": ", "- ", "&a ", "*a", "<<: ", "!!int ", "!!bool x", "!!python/name:os "]
JUNK += ["---\n", "'", '"', '"\\ud800"', '"\\Uffffffff"', "\x00", "\ufeff", "\u2028", "#", "|\n", ">\n", "? ", "@", "`"]
JUNK += ["%YAML 9\n", "\nseed: 1\nseed: 2\n", "\nlora: {}\n", "9" * 5000, "0o8", ".nan", "1:30", "\nx: &x {<<: *x}\n"]
JUNK += ["[" * 200, "{a: " * 200, "\n" + "- " * 200, "\nx: &x [1, 1]\ny: &y [*x, *x]\nz: [*y, *y]\n"]
junk = st.text(max_size=10) | st.sampled_from(JUNK)


@st.composite
def trees(draw):
    """A legal run file with keys dropped, renamed, added, or given other values."""
    tree = yaml.safe_load(draw(st.sampled_from(BASE)))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            change = draw(st.sampled_from(["drop", "rename", "value", "add"]))
            if change == "drop":
                del node[key]
            elif change == "value":
                node[key] = draw(values)
            elif isinstance(node, dict):
                new = draw(st.text(max_size=8) | st.sampled_from([*keys, "str", "int", f"{key}s"]))
                node[new] = node.pop(key) if change == "rename" else draw(values)
            break
    return yaml.safe_dump(
        tree, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, False]))
    )


@st.composite
def files(draw):
    """The bytes of a run file: a changed tree, or a legal text with pieces cut out and junk put in."""
    if draw(st.booleans()):
        text = draw(trees())
    else:
        text = draw(st.sampled_from(BASE))
        for _ in range(draw(st.integers(1, 3))):
            start = draw(st.integers(0, len(text)))
            end = min(len(text), start + draw(st.integers(0, 20)))
            text = text[:start] + draw(junk) + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place:]
    return data


KEYS = [
    "optim.lr",
    "model.dtype",
    "reward.0.weight",
    "prompts",
    "prompts.template",
    "eval.prompts",
    "lora.rank",
    "seed.x",
]
KEYS += [
    "reward",
    "reward[0]",
    "model",
    "optim",
    "",
    ".",
    "a..b",
    "optim.betas.1",
    "0",
    "optim.999999999",
    "memory.offload",
]
keys = st.sampled_from(KEYS) | st.text(max_size=8)
overrides = st.lists(st.builds(lambda key, value: f"{key}={value}", keys, junk | scalars.map(str)) | junk, max_size=2)


def check(data, changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(data)
        try:
            config = load_config(path, changes)
        except ConfigError as error:
            message = str(error)
            for line in message.splitlines():
                assert PLACE.search(line), line
            assert len(message) < 20_000
            return
        path.write_text(dump_config(config), encoding="utf-8")
        again = load_config(path)
        assert again == config or repr(again) == repr(config)  # a NaN among a reward's options differs from itself


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}


@settings(max_examples=300, derandomize=True, **ANY)
@given(files(), overrides)
def test_broken_run_files(data, changes):
    check(data, changes)


@pytest.mark.slow  # minutes: the same, thousands of times, other ones in each run
@settings(max_examples=10_000, **ANY)
@given(files(), overrides)
def test_thousands_of_broken_run_files(data, changes):
    check(data, changes)


def test_the_fuzzer_reaches_both_ends():
    """Were everything refused (or accepted), the tests above would say little."""
    results = Counter()

    @settings(max_examples=60, derandomize=True, **ANY)
    @given(files())
    def count(data):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.yaml"
            path.write_bytes(data)
            try:
                load_config(path)
                results["accepted"] += 1
            except ConfigError as error:
                results["YAML" if "not valid YAML" in str(error) else "refused"] += 1

    count()
    assert min(results["accepted"], results["YAML"], results["refused"]) >= 3, results
