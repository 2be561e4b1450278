"""One strict YAML per run: unknown keys are errors with their line and the nearest legal key, all problems at once.

omegaconf reads the numbers (PyYAML takes `1e-4` for a string) and the `key=value` overrides; pydantic checks them.
Imports nothing heavy.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from .errors import ConfigError
from .spelling import nearest

RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Section):
    path: str = Field(description="`playground`, a diffusers folder, or a hub id")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")


class Standardise(_Section):
    mean: float
    std: float = Field(gt=0)


class Part(_Section):
    """A reward by name, or a group of rewards; at most one of hinge, target, standardise is put on it."""

    name: str | None = Field(
        default=None, description="a reward of `rewardtune ls rewards`, or an import path `module:Name`"
    )
    mean_of: list["Part"] | None = Field(default=None, min_length=2, description="an ensemble's mean, per image")
    minimum_of: list["Part"] | None = Field(default=None, min_length=2, description="its worst member, per image")
    balance: list["Part"] | None = Field(
        default=None, min_length=2, description="a sum whose parts' gradients at the image get equal norms"
    )
    weight: float = 1.0
    options: dict[str, Any] = Field(default={}, description="settings of the named reward")
    hinge: float | None = Field(default=None, description="-relu(level - r): pushes up to this level and no further")
    target: float | None = Field(default=None, description="-|r - value|: holds the reward at this value")
    standardise: Standardise | None = Field(default=None, description="(r - mean) / std")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`clipscore` for `{name: clipscore}`."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of(self) -> "Part":
        for words, least in (
            (("name", "mean_of", "minimum_of", "balance"), 1),
            (("hinge", "target", "standardise"), 0),
        ):
            given = [word for word in words if getattr(self, word) is not None]
            if not least <= len(given) <= 1:
                legal = "one" if least else "at most one"
                raise ValueError(f"{' and '.join(given) or 'nothing'} given; legal is {legal} of {', '.join(words)}")
        if self.options and self.name is None:
            raise ValueError("options are for a reward by name; a group has none")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Any) -> dict[str, Any]:
        """Without the settings that do not concern this part."""
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class MethodChoice(_Section):
    name: str = "drtune"
    options: dict[str, Any] = {}


class Sampling(_Section):
    steps: int = Field(default=50, ge=1)
    guidance: float | None = Field(
        default=None, description="classifier-free guidance scale; none = the pipeline's default"
    )
    width: int | None = Field(default=None, ge=8)
    height: int | None = Field(default=None, ge=8)
    scheduler: str | None = Field(
        default=None, description="a diffusers scheduler class, e.g. DDIMScheduler; none = as saved"
    )
    negative_prompt: str | None = None
    allow_no_guidance: bool = False


class Lora(_Section):
    rank: int = Field(default=128, ge=1)
    alpha: int | None = Field(default=None, ge=1, description="none = rank")
    targets: str | list[str] = "attention"


class Optim(_Section):
    steps: int = Field(default=1000, ge=1)
    lr: float = Field(default=2e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=0.1, gt=0, description="largest gradient norm")
    batch: int = Field(default=32, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    offload_reward: bool = Field(default=False, description="its networks wait on the CPU while the denoiser works")
    max_seconds: float | None = Field(default=None, gt=0)


class Eval(_Section):
    prompts: str | list[str] | None = Field(default=None, description="none = the first training prompts")
    count: int = Field(default=16, ge=1)
    every: int | None = Field(default=None, ge=1)


class RunConfig(_Section):
    model: Model
    reward: list[Part]
    reward_weight: float = Field(default=1.0, description="a factor on the whole reward, in the loss and in the log")
    method: MethodChoice = MethodChoice()
    prompts: str | list[str]
    sampling: Sampling = Sampling()
    lora: Lora = Lora()
    optim: Optim = Optim()
    eval: Eval = Eval()
    output_dir: str
    seed: int = Field(default=0, ge=0)

    @field_validator("model", "method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: Any) -> Any:
        """`model: playground` for `model: {path: playground}`, `method: drtune` likewise."""
        return {"path" if info.field_name == "model" else "name": value} if isinstance(value, str) else value

    @field_validator("reward", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        """`reward: clipscore`, one mapping, or a list of either."""
        return value if isinstance(value, list) else [value]


def recipes() -> dict[str, Path]:
    """The recipes shipped with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, or a shipped recipe by name (`playground`), with `key=value` overrides (`optim.lr=1e-4`).

    Raises ConfigError listing every problem with its line.
    """
    path = Path(source)
    if not path.exists() and str(source) in recipes():
        path = recipes()[str(source)]
    if not path.is_file():
        known = ", ".join(recipes()) or "none"
        raise ConfigError(f"run file {path} does not exist; give a YAML file or a shipped recipe ({known})")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"run file {path} must be a mapping of sections; legal keys: {', '.join(_keys(()))}")
        tree = OmegaConf.merge(OmegaConf.create(text), _dotlist(overrides))
        values = OmegaConf.to_container(tree, resolve=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"run file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"run file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = dict(_lines(node))
        problems = [_explain(problem, path, lines, overrides) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`["K=5", "spacing=random"]` -> {"K": 5, "spacing": "random"}, typed as in YAML."""
    return dict(OmegaConf.to_container(_dotlist(options)))  # type: ignore[arg-type]


def _dotlist(overrides: Sequence[str]) -> Any:
    for override in overrides:
        if not re.match(r"[^=\s]+=", override):
            raise ConfigError(f"{override!r}: write key=value, for example optim.lr=1e-4")
    return OmegaConf.from_dotlist(list(overrides))


def _explain(problem: Any, path: Path, lines: dict[tuple, int], overrides: Sequence[str]) -> str:
    """One line for one pydantic problem: where, what was given, what is legal."""
    where = tuple(problem["loc"])
    if where[-1] in (
        "str",
        "list[str]",
        "int",
        "literal['auto']",
    ):  # pydantic's name for a member of a union, not a key
        where = where[:-1]
    dotted = ".".join(str(part) for part in where)
    line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None)
    place = f"{path}, line {line}" if line else str(path)
    if any(override.partition("=")[0] == dotted for override in overrides):
        place = f"override {dotted}"
    if problem["type"] == "extra_forbidden":
        legal = _keys(where[:-1])
        hint = nearest(str(where[-1]), legal)
        return f"{place}: unknown key {dotted!r}{hint}; legal here: {', '.join(legal)}"
    if problem["type"] == "missing":
        return f"{place}: {dotted!r} is missing (`rewardtune ls recipes` names complete run files to start from)"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{place}: {dotted} = {problem['input']!r}: {re.sub('dictionary( or instance of .*)?', 'mapping', message)}"


def _keys(where: tuple) -> list[str]:
    """Legal keys of the section at `where`."""
    if where and where[0] == "reward":
        return list((Standardise if where[-1] == "standardise" else Part).model_fields)
    section: type[BaseModel] = RunConfig
    for part in where:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)


def _lines(node: Any, where: tuple = ()) -> Iterator[tuple[tuple, int]]:
    """(path of keys, line number from 1) of every key in a YAML node tree."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*where, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*where, index), value.start_mark.line + 1
            yield from _lines(value, (*where, index))
