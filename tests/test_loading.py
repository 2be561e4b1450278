"""From a word to a reward, and the catalogue that holds the words."""

import inspect
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.listing import REWARD_HEADINGS, reward_rows
from rewardtune.rewards.catalogue import REWARDS, Source
from rewardtune.spelling import nearest
from rewardtune.tables import markdown_table

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["one", "two"]


def reward_class(entry):
    module, _, attribute = entry.path.partition(":")
    return getattr(import_module(module), attribute)


# -- the catalogue --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", REWARDS, ids=lambda entry: entry.name)
def test_a_row_says_what_its_class_says(entry):
    cls = reward_class(entry)
    assert cls.name == entry.name
    assert getattr(rewards, cls.__name__) is cls  # exported
    assert cls.__name__ in rewards.__all__
    settings = inspect.signature(cls).parameters
    assert (entry.better == "less") == cls.minimise
    for source in entry.weights:
        assert source.setting in settings


@pytest.mark.parametrize("entry", [entry for entry in REWARDS if entry.weights], ids=lambda entry: entry.name)
def test_a_class_downloads_what_its_row_pins(entry):
    module = vars(import_module(entry.path.partition(":")[0]))
    assert entry.weights[0].setting == "model"
    for source in entry.weights:
        assert any(value is source for value in module.values())
        commit = source.repo.rpartition("/")[2] if "://" in source.repo else source.revision
        assert len(commit) == 40  # no branch that moves


def test_the_catalogue_needs_no_torch():
    code = "import sys, rewardtune.listing as l; l.rewards_table(); l.rewards_json(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_docs_show_the_catalogue():
    page = Path(__file__).parent.parent / "docs" / "rewards.md"
    assert markdown_table(REWARD_HEADINGS, reward_rows()) in page.read_text(encoding="utf-8")


def test_builtin_is_the_catalogue():
    assert list(rewards.BUILTIN.items()) == [(entry.name, entry.path) for entry in REWARDS]
    assert len(rewards.BUILTIN) == len(REWARDS)


def test_by_hand():
    hub = Source(repo="me/Model", files=("a.json", "b.bin"), licence="MIT", size="1 GB", revision="abc")
    assert hub.by_hand() == "hf download me/Model a.json b.bin --revision abc --local-dir Model, then model=./Model"
    url = Source(repo="https://x.org/raw/main", files=("h.pth",), licence="MIT", size="1 MB", setting="head")
    assert url.by_hand() == "download https://x.org/raw/main/h.pth, then head=PATH"


@pytest.mark.parametrize(
    ("word", "legal", "hint"),
    [
        ("symetry", ["symmetry", "colour"], " (did you mean 'symmetry'?)"),
        ("zzz", ["symmetry"], ""),
        ("x", [], ""),
    ],
)
def test_nearest(word, legal, hint):
    assert nearest(word, legal) == hint


# -- loading: functions, classes, instances, modules ----------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The name of an importable module with one object of every kind."""
    name = f"kinds_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent("""
        import torch
        from rewardtune.rewards import Reward

        def function(images, prompts):
            return images.mean((1, 2, 3))

        class Net(torch.nn.Module):
            def __init__(self, channels=3):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(channels))

            def forward(self, images, prompts):
                return (images.mean((2, 3)) * self.weight).sum(-1)

        class Callable:
            def __init__(self, *, scale: float):
                self.scale = 1.0 * scale

            def __call__(self, images, prompts):
                return self.scale * images.mean((1, 2, 3))

        class Free(Callable):
            def __init__(self, **anything):
                super().__init__(**anything)

        class Less(Reward):
            minimise = True

            def native(self, images, prompts):
                return images.mean((1, 2, 3))

        net, callable_instance, reward_instance = Net(), Callable(scale=3), 2 * Less()
        bound = callable_instance.__call__
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("attribute", "settings", "factor"),
    [
        ("function", {}, 1),
        ("Net", {}, 3),
        ("Net", {"channels": 3}, 3),
        ("net", {}, 3),
        ("Callable", {"scale": 2}, 2),
        ("callable_instance", {}, 3),
        ("bound", {}, 3),
        ("Free", {"scale": 5}, 5),
        ("Less", {}, -1),
        ("reward_instance", {}, -2),
    ],
)
def test_load_every_kind_of_callable(module, attribute, settings, factor):
    reward = rewards.load(f"{module}:{attribute}", settings)
    assert isinstance(reward, rewards.Reward)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), factor * IMAGES.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("attribute", "settings", "words"),
    [
        ("Callable", {"scael": 2}, r"no setting 'scael' \(did you mean 'scale'\?\); legal: scale"),
        ("Callable", {}, "needs the setting scale"),
        ("Callable", {"scale": None}, r"cannot be made with scale=None \(TypeError"),
        ("Free", {"scael": 2}, r"cannot be made with scael=2 \(TypeError"),
        ("net", {"channels": 3}, "takes no settings; given channels"),
        ("nett", {}, r"has no 'nett' \(did you mean 'net'\?\)"),
        ("torch", {}, "is a module"),
        ("", {}, "unknown reward"),
    ],
)
def test_load_errors(module, attribute, settings, words):
    with pytest.raises(ConfigError, match=words):
        rewards.load(f"{module}:{attribute}", settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", r"failed \(ZeroDivisionError: division by zero\) in .*broken_rewards\.py, line 1$"),
        ("\ndef f(:\n", r"failed \(SyntaxError: .*\) in .*broken_rewards\.py, line 2$"),
        ("\nimport json\njson.loads('{')", r"failed \(JSONDecodeError: .*\) in .*broken_rewards\.py, line 3$"),
        ("import no_such_thing", r"No module named 'no_such_thing'\) in .*broken_rewards\.py, line 1$"),
        ("raise SystemExit(3)", r"failed \(SystemExit: 3\) in .*broken_rewards\.py, line 1$"),
        (None, r"No module named 'broken_rewards'\); install the module or call the command from its folder$"),
    ],
)
def test_a_module_that_fails_to_import(text, words, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ConfigError, match=words):
        rewards.load("broken_rewards:Any")
