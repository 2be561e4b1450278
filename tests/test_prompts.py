"""Prompts: what cannot be read says where, and the order is a pure function of (seed, step)."""

from collections import Counter
from itertools import chain

import pytest

from rewardtune.errors import ConfigError
from rewardtune.prompts import batch_prompts, load_prompts


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red heart\r\n\r\n  zwei blaue Sterne – groß \n".encode())
    assert load_prompts(path) == ["a red heart", "zwei blaue Sterne – groß"]
    assert load_prompts(str(path)) == load_prompts(path)
    assert load_prompts(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"p\.txt does not exist; give a \.txt file"),
        (b"", r"p\.txt is empty; write one prompt a line"),
        (b"\n  \n\n", r"p\.txt has only blank lines \(3\)"),
        (b"fine\nalso fine\nf\xfcnf\n", r"p\.txt, line 3: byte 0xfc is not UTF-8; .*iconv"),
    ],
)
def test_files_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of prompts is empty"),
        (["a", " "], "prompt 1 of the list is ' '"),
        (["a", 3], "prompt 1 of the list is 3"),
        ("playground:test", "playground:train, playground:eval"),
        ("playground:train:fre", "playground:train, playground:eval"),
    ],
)
def test_other_sources_that_cannot_be_used(source, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts(source)


def test_only_txt(tmp_path):
    (tmp_path / "p.csv").write_text("a,b")
    with pytest.raises(ConfigError, match=r"only \.txt"):
        load_prompts(tmp_path / "p.csv")
    with pytest.raises(ConfigError, match="is a folder"):
        load_prompts(tmp_path)


def test_every_epoch_shows_each_prompt_once_in_a_new_order():
    prompts = [str(i) for i in range(12)]
    steps = [batch_prompts(prompts, seed=3, step=step, size=4) for step in range(6)]
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert Counter(first) == Counter(second) == Counter(prompts)
    assert first != second
    assert first != prompts


def test_a_batch_depends_on_seed_and_step_alone():
    prompts = [str(i) for i in range(7)]
    stream = [batch_prompts(prompts, seed=0, step=step, size=4) for step in range(20)]
    assert batch_prompts(prompts, seed=0, step=13, size=4) == stream[13]
    assert batch_prompts(prompts, seed=1, step=13, size=4) != stream[13]
    # a batch may run over the end of an epoch and be longer than the list
    assert Counter(list(chain(*stream))[:70]) == Counter(prompts * 10)
    assert Counter(batch_prompts(prompts, seed=0, step=0, size=21)) == Counter(prompts * 3)
