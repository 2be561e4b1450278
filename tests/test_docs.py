"""Every code block of README.md and docs/: Python is run, commands go through the real parser, YAML is a run file.

Pages are read as a user reads them: top to bottom, in one folder, one namespace. What a block needs and the page need
not show stands in a comment before it, and so does the reason where a block is not run here:

    <!-- setup: ... -->     Python that is run before the block
    <!-- slow: why -->      the block is run with the slow tests only
    <!-- not run: why -->   the block is only checked: it compiles, imports exist, calls of rewardtune fit

Commands of bash blocks are parsed; those of CHEAP are run as well, and all of a block that is marked slow.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from rewardtune.cli import app, main
from rewardtune.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHEAP = {"init", "schema", "plan", "ls", "env"}
# A run in tests: one small update; the last words of the same key count.
SMALL = ["sampling.steps=4", "method.options={K: 1, m: 2}", "optim.steps=1", "optim.batch=1", "eval.count=2"]
# A run file's required keys, for fragments that lack them.
REQUIRED = {"model": "playground", "reward": "symmetry", "prompts": ["a red heart"], "output_dir": "runs/fragment"}
DIRECTIVE = re.compile(r"<!-- (setup|slow|not run):\s(.*?)-->\n", flags=re.DOTALL)
FENCE = re.compile(
    r"((?:<!-- (?:setup|slow|not run):\s(?:(?!-->).)*-->\n)*)^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


#: (page, method, its picture there): those of README's table, and those elsewhere that a draw of T = 20 must give.
PICTURES = [
    (ROOT / "README.md", *row)
    for row in re.findall(r"^\| `(\w+\(.*?\))`.*?\| `(\\\|.*?)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
] + [
    (ROOT / "docs" / "methods.md", "drtune(K=2, m=8)", "|....#.........#.>----|"),
    (ROOT / "docs" / "methods.md", "drtune(K=2, m=8, stops=2)", "|#.........#..>.....>--|"),
    (ROOT / "docs" / "methods.md", "leapalign()", "|....#=============@=|"),
    (ROOT / "docs" / "methods.md", "srpo()", "|~~~~~~~~~~~~~#>------|"),
]
MANY = {"alignprop()", "flowbp_sparse()"}  # too many plans to meet one again


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    setup: str
    slow: bool
    not_run: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    def run_in(self, *, slow: bool) -> bool:
        return not self.not_run and (slow or not self.slow)


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page with what is said before them; ValueError for a comment that belongs to no block."""
    text = page.read_text(encoding="utf-8")
    found, said = [], 0
    for match in FENCE.finditer(text):
        directives = dict(DIRECTIVE.findall(match[1]))
        said += len(DIRECTIVE.findall(match[1]))
        found.append(
            Block(
                page=page,
                line=text[: match.start(3)].count("\n"),
                language=match[2],
                code=match[3],
                setup=directives.get("setup", ""),
                slow="slow" in directives,
                not_run=directives.get("not run", ""),
            )
        )
    if len(re.findall(r"<!-- (?:setup|slow|not run):", text)) != said or text.count("\n```") + text.startswith(
        "```"
    ) != 2 * len(found):
        raise ValueError(f"{page}: a comment for a block stands before none, or a fence is not closed")
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=f"{block.page.stem}:{block.line}") for block in ALL if block.language in languages]


# -- what every block must be, run or not ---------------------------------------------------------------------------


def calls_that_fail(code: str) -> list[str]:
    """Imports of rewardtune that do not exist, and calls of its functions with arguments that they do not take."""
    tree, names, wrong = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rewardtune":
            home = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    found = getattr(home, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    wrong.append(f"{node.module} has no {alias.name}")
                    continue
                names[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = _resolve(node.func, names, wrong)
        if callable(function):
            parameters = inspect.signature(function).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                legal = {parameter.name for parameter in parameters}
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                wrong += [f"{ast.unparse(node.func)} has no argument {name}" for name in sorted(given - legal)]
    return wrong


def _resolve(node: ast.expr, names: dict[str, Any], wrong: list[str]) -> Any:
    """What an expression like `methods.drtune` is, if it begins at an import of rewardtune; else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names, wrong)
        if owner is None:
            return None
        if not hasattr(owner, node.attr):
            wrong.append(f"{ast.unparse(node)} does not exist")
        return getattr(owner, node.attr, None)
    return None


@pytest.mark.parametrize("block", of("python"))
def test_python_fits_the_package(block: Block):
    assert calls_that_fail(block.code) == []


def test_the_check_of_python_can_fail():
    assert calls_that_fail("from rewardtune import nothing_like_it") == ["rewardtune has no nothing_like_it"]
    assert calls_that_fail("from rewardtune import methods as m\nm.drtune(k=5)") == ["m.drtune has no argument k"]
    assert calls_that_fail("from rewardtune import rewards\nrewards.Beauty()") == ["rewards.Beauty does not exist"]
    assert calls_that_fail("from rewardtune import methods\nmethods.drtune(K=5)\nother(k=5)") == []


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words, comments left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def parse(words: list[str]) -> dict[str, Any]:
    """`rewardtune WORDS` as the real command parses it, without running it; its usage error where it does not."""
    from typer.main import get_command

    command: Any = get_command(app)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            raise ValueError(f"no command {words[:1]}; legal: {', '.join(command.commands)}")
        command, words = command.commands[words[0]], words[1:]
    parameters: dict[str, Any] = command.make_context(command.name, words).params
    if overrides := parameters.get("overrides"):
        load_config("playground", list(overrides))
    return parameters


def check_command(words: list[str]) -> None:
    """Whether a command line of the docs can be typed: the command, options, extras, scripts and targets exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    program, *rest = words
    if program == "rewardtune":
        parse(rest)
    elif program == "torchrun":
        parse(rest[rest.index("rewardtune") + 1 :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE) for target in rest), words
    elif program == "python":
        script = rest[1] if rest[0] == "-m" else rest[0]
        assert importlib.util.find_spec(script) if rest[0] == "-m" else (ROOT / script).is_file(), words
    elif program == "pip":
        for extra in re.findall(r"rewardtune\[(.*?)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), words
    else:
        assert program in {"cp", "cd", "export", "git", "hf", "tensorboard", "trackio", "wandb"}, f"what is {program}?"


@pytest.mark.parametrize("block", of("bash"))
def test_commands_can_be_typed(block: Block):
    for words in commands(block):
        check_command(words)


@pytest.mark.parametrize("block", of(""))
def test_what_begins_with_rewardtune_is_a_command(block: Block):
    """Blocks without a language are output, plans and the overview of commands."""
    from typer.main import get_command

    for name in re.findall(r"^(?:.*?\S {3,})?rewardtune (\w+)", block.code, flags=re.MULTILINE):
        assert name in get_command(app).commands, name  # type: ignore[attr-defined]


def test_the_check_of_commands_can_fail():
    for wrong in (
        "rewardtune trian run.yaml",
        "make tea",
        "python benchmarks/none.py",
        "pip install rewardtune[none]",
        "sudo x",
    ):
        with pytest.raises((ValueError, AssertionError)):
            check_command(shlex.split(wrong))
    with pytest.raises(Exception, match="No such option"):
        check_command(["rewardtune", "train", "run.yaml", "--resmue", "latest"])
    with pytest.raises(Exception, match="did you mean 'lr'"):
        check_command(["rewardtune", "train", "run.yaml", "optim.lrr=1"])


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_run_file_or_a_part_of_one(block: Block, tmp_path):
    given = yaml.safe_load(block.code)
    missing = {key: value for key, value in REQUIRED.items() if key not in given}
    path = tmp_path / "run.yaml"
    path.write_text(block.code + "\n" + (yaml.safe_dump(missing) if missing else ""))
    load_config(path, [])


def test_languages_are_those_that_are_checked():
    assert {block.language for block in ALL} <= {"", "python", "bash", "yaml", "json"}


# -- running them ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of the playground as small as can be, with a checkpoint and an evaluation after each of its updates."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = [*SMALL, "optim.steps=2", f"output_dir={folder}", "eval.every=1", "checkpoints.every=1", "adapter.rank=2"]
    assert main(["train", "playground", *words, "guards.features=playground"]) == 0
    return folder


def run_page(page: Path, *, slow: bool) -> None:
    """All blocks of a page that run, in the current folder; a failure names its block."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.run_in(slow=slow):
            continue
        if block.language == "python":
            source = "\n" * block.line + block.code
            exec(compile(block.setup, f"setup of {block}", "exec"), names)
            exec(compile(source, str(block.page), "exec"), names)
        elif block.language == "bash":
            for program, *rest in commands(block):
                if program == "rewardtune" and (rest[0] in CHEAP or block.slow):
                    small = SMALL if rest[0] in ("train", "check") else []
                    assert main([rest[0], *rest[1:2], *small, *rest[2:]]) == 0, f"{block}: {' '.join(rest)}"


def runs_something(page: Path, *, slow: bool) -> bool:
    return any(
        block.run_in(slow=slow)
        and (block.slow or not slow)
        and (block.language == "python" or (block.language == "bash" and (block.slow or cheap(block))))
        for block in blocks(page)
    )


def cheap(block: Block) -> bool:
    return any(words[0] == "rewardtune" and words[1] in CHEAP for words in commands(block))


@pytest.mark.parametrize("page", [p for p in PAGES if runs_something(p, slow=False)], ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, slow=False)


@pytest.mark.slow  # a small run is trained, and some pages train one of their own
@pytest.mark.parametrize("page", [p for p in PAGES if runs_something(p, slow=True)], ids=lambda page: page.stem)
def test_page_runs_with_its_long_blocks(page: Path, tmp_path, monkeypatch, finished: Path):
    import shutil

    for name in ("a", "b", "NAME"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    run_page(page, slow=True)


# -- coming from TRL ------------------------------------------------------------------------------------------------

# The fields of AlignPropConfig and the arguments of AlignPropTrainer, TRL 0.19.1.
TRL_CONFIG = """
exp_name run_name seed log_with log_image_freq tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name
logdir num_epochs save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta
sample_guidance_scale train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2
train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm negative_prompts
truncated_backprop_rand truncated_backprop_timestep truncated_rand_backprop_minmax push_to_hub
"""
TRL_TRAINER = ["config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook"]


def test_every_argument_of_trl_has_its_row():
    page = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)
    assert [row for row in rows if row != "AlignPropTrainer"] == [*TRL_TRAINER, *TRL_CONFIG.split()]


def test_run_file_keys_of_the_tables_exist():
    """Dotted keys of the pages that translate or advise, such as `optim.clip`, are keys of the run file."""
    from rewardtune.schema import keys_table

    legal = set(re.findall(r"^\| `([\w.]+)`", keys_table(), flags=re.MULTILINE))
    sections = {key.partition(".")[0] for key in legal if "." in key}
    for name in ("from-trl", "faq", "choose-method", "choose-reward", "reward-hacking", "memory"):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for key in re.findall(r"`(\w+\.[\w.]+)[`:]", page):
            if key.partition(".")[0] in sections and not key.startswith("method.options.") and key != "eval.jsonl":
                assert key in legal, f"{name}.md: {key}"


@pytest.mark.parametrize(("page", "method", "picture"), PICTURES, ids=lambda x: str(getattr(x, "name", x)))
def test_pictures_of_plans_are_drawn_ones(page: Path, method: str, picture: str) -> None:
    from rewardtune import methods

    assert picture in page.read_text()
    shown, law = picture.replace("\\|", "|"), eval(method, vars(methods))
    drawn = {law(20, Random(draw)).draw() for draw in range(3000)}
    if method in MANY:
        drawn, shown = {"".join(sorted(one)) for one in drawn}, "".join(sorted(shown))  # as many marks of each kind
    assert shown in drawn, sorted(drawn)[:5]
