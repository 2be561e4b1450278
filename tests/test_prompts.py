"""Prompts: what cannot be read says where, and the order is a pure function of (seed, step)."""

import builtins
import json
from collections import Counter
from itertools import chain

import huggingface_hub
import pytest

from rewardtune.errors import ConfigError
from rewardtune.prompts import batch_prompts, builtin_lists, check_template, load_prompts


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red heart\r\n\r\n  zwei blaue Sterne – groß \nwith a\u2028separator".encode())
    assert load_prompts(path) == ["a red heart", "zwei blaue Sterne – groß", "with a\u2028separator"]
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
        ("builtin:simple_animal", r"no such list \(did you mean 'simple_animals'\?\); legal: concepts_with_books"),
        ("hf:name", r"write hf:DATASET:SPLIT:COLUMN, for example"),
        ("hf::train:prompt", r"write hf:DATASET:SPLIT:COLUMN"),
        ("hf:a/b:train", r"write hf:DATASET:SPLIT:COLUMN"),
        ("hf:a/b:x:y:z", r"write hf:DATASET:SPLIT:COLUMN"),
    ],
)
def test_other_sources_that_cannot_be_used(source, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts(source)


def test_suffixes_and_folders(tmp_path):
    (tmp_path / "p.doc").write_text("a,b")
    with pytest.raises(ConfigError, match=r"\.doc cannot be read; legal: \.txt, \.jsonl, \.json, \.csv, \.parquet"):
        load_prompts(tmp_path / "p.doc")
    with pytest.raises(ConfigError, match="is a folder"):
        load_prompts(tmp_path)


# -- tables ---------------------------------------------------------------------------------------------------------

TEXTS = ["a cat, sitting", 'a "red" heart', "zwei\nZeilen", "ü"]


def written(tmp_path, name, column="prompt"):
    """TEXTS in a file, written by another library than the one that reads it where there is one."""
    path = tmp_path / name
    rows = [{"id": n, column: text} for n, text in enumerate(TEXTS)]
    if name.endswith(".jsonl"):
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        from pyarrow import csv, parquet

        table = pyarrow.Table.from_pylist([*rows, {"id": 9, column: None}])
        (parquet.write_table if name.endswith(".parquet") else csv.write_csv)(table, path)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "P.CSV", "p.parquet"])
def test_tables_and_their_columns(name, tmp_path):
    assert load_prompts(written(tmp_path, name)) == TEXTS
    assert load_prompts(written(tmp_path, name, "Caption")) == TEXTS
    with pytest.raises(ConfigError, match=r"no column prompt, text, caption; its columns are id, words: rename one"):
        load_prompts(written(tmp_path, name, "words"))


def test_prompt_wins_over_text_and_caption(tmp_path):
    (tmp_path / "p.csv").write_text("caption,text,prompt\n1,2,3\n\n4,5,6\n")
    assert load_prompts(tmp_path / "p.csv") == ["3", "6"]
    (tmp_path / "p.csv").write_text("caption,text\n1,2\n")
    assert load_prompts(tmp_path / "p.csv") == ["2"]


def test_strings_in_json(tmp_path):
    (tmp_path / "p.json").write_text('["a", "b", " "]')
    (tmp_path / "p.jsonl").write_text('"a"\n{"text": "b"}\n')
    assert load_prompts(tmp_path / "p.json") == load_prompts(tmp_path / "p.jsonl") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '"a"\n{"prompt": }\n', r"p\.jsonl, line 2: not valid JSON, .*column 12"),
        ("p.jsonl", '"a"\n\n3\n', r"p\.jsonl, line 3: 3 is no prompt; legal is a string"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl, line 1: 3 is no prompt"),
        ("p.jsonl", '{"x": 3}\n', r"p\.jsonl, line 1: no column prompt.*columns are x"),
        ("p.json", '["a",\n "b"\n', r"p\.json, line 3: not valid JSON"),
        ("p.json", '{"prompt": "a"}', r"p\.json holds no list"),
        ("p.json", '["a", null]', r"p\.json, entry 1: None is no prompt"),
        ("p.json", "[" * 100_000, r"p\.json, line 1: not valid JSON"),
        (
            "p.csv",
            "id,prompt\n1,a\n2,a cat, sitting\n",
            r"p\.csv, line 3: 3 columns, but the first line has 2; .*quotes",
        ),
        ("p.csv", 'id,prompt\n1,"a"b\n', r"p\.csv, line 2: not valid CSV"),
        ("p.csv", "id,prompt\n", r"p\.csv is empty"),
        ("p.csv", "", r"p\.csv is empty"),
        ("p.parquet", "no parquet", r"p\.parquet is no parquet file that can be read"),
    ],
)
def test_tables_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(tmp_path / name)


def without(monkeypatch, package):
    real = builtins.__import__

    def refuse(name, *arguments, **more):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_what_is_missing_names_its_extra(tmp_path, monkeypatch):
    path = written(tmp_path, "p.parquet")
    without(monkeypatch, "pyarrow")
    with pytest.raises(ConfigError, match=r"needs the extra data: pip install 'rewardtune\[data\]'"):
        load_prompts(path)
    without(monkeypatch, "datasets")
    with pytest.raises(ConfigError, match=r"need the extra data: pip install 'rewardtune\[data\]'"):
        load_prompts("hf:a/b:train:prompt")


# -- the hub and the package ----------------------------------------------------------------------------------------


def test_files_of_a_dataset(tmp_path, monkeypatch):
    """The layout of HPD v2: lists of strings, and a list of objects."""
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "anime.json").write_text('["a", "b", "c"]')
    (tmp_path / "train.json").write_text('[{"human_preference": [1, 0], "prompt": "d"}]')
    asked = []

    def download(repository, file, *, repo_type):
        asked.append((repository, file, repo_type))
        if not (tmp_path / file).exists():
            raise OSError("no such file on the hub")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_prompts("hf:me/prompts:benchmark/anime.json[:2], train.json") == ["a", "b", "d"]
    assert asked == [("me/prompts", "benchmark/anime.json", "dataset"), ("me/prompts", "train.json", "dataset")]
    with pytest.raises(ConfigError, match=r"photo\.json of the dataset 'me/prompts' cannot be had: no such file on"):
        load_prompts("hf:me/prompts:photo.json")
    assert load_prompts(f"hf:{tmp_path}:train.json") == ["d"]  # a local folder
    assert len(asked) == 3


def test_a_dataset_by_its_column(tmp_path):
    pytest.importorskip("datasets", reason="the extra data")
    written(tmp_path, "train.parquet", "words")
    assert load_prompts(f"hf:{tmp_path}:train:words") == TEXTS
    with pytest.raises(
        ConfigError, match=r"has no column 'word' \(did you mean 'words'\?\); its columns are id, words"
    ):
        load_prompts(f"hf:{tmp_path}:train:word")
    with pytest.raises(ConfigError, match="split 'tests', cannot be read"):
        load_prompts(f"hf:{tmp_path}:tests:words")


def test_the_lists_of_the_package():
    animals, books = load_prompts("builtin:simple_animals"), load_prompts("builtin:concepts_with_books")
    assert len(animals) == len(set(animals)) == 45
    assert {"cat", "zebra", "hedgehog"} < set(animals)
    assert len(books) == len(set(books))
    assert all(prompt.endswith(", and books.") for prompt in books)
    assert set(builtin_lists()) == {"simple_animals", "concepts_with_books"}


def test_templates():
    assert load_prompts(["cat", "a {} in braces"], template="a photo of a {}!") == [
        "a photo of a cat!",
        "a photo of a a {} in braces!",
    ]
    assert load_prompts("builtin:simple_animals", template="one {}")[0] == "one cat"
    for wrong in ("a photo", "{} and {}", "{name}", "{} {x}", "{", "{{}}", "{}}"):
        with pytest.raises(ConfigError, match=r"must hold \{\} exactly once"):
            check_template(wrong)


# -- the order ------------------------------------------------------------------------------------------------------


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
