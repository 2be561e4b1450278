"""From a word in a run file to a reward: a built-in name, or an import path "my_pkg.rewards:MyReward"."""

import inspect
from collections.abc import Mapping
from typing import Any

from rewardtune.errors import ConfigError, RewardTuneError
from rewardtune.importing import by_path, is_path
from rewardtune.rewards.base import Reward, as_reward
from rewardtune.rewards.catalogue import REWARDS
from rewardtune.spelling import nearest

BUILTIN = {entry.name: entry.path for entry in REWARDS}


def load(spec: str, settings: Mapping[str, Any] | None = None) -> Reward:
    """The reward that `spec` names, built with `settings`.

    spec: a key of BUILTIN, or "module:object", where the object is a class (called with the settings), a Reward, an
    nn.Module or a function (images, prompts) -> scores. Modules are also looked for in the current folder.
    Raises ConfigError: also for whatever else the object's own module or `__init__` raises.
    """
    target, given = named(spec), dict(settings or {})
    if inspect.isclass(target):
        return as_reward(_build(spec, target, given), action=f"use '{spec}' as a reward")
    if given:
        raise ConfigError(
            f"reward '{spec}' is not a class and takes no settings; given {', '.join(given)}: "
            "write a class whose __init__ takes them"
        )
    return as_reward(target, action=f"use '{spec}' as a reward")


def named(spec: str) -> Any:
    """What `spec` names, imported and not made. ConfigError where there is no such thing."""
    path = BUILTIN.get(spec.lower(), spec)
    if not is_path(path):
        raise ConfigError(
            f"unknown reward '{path}'{nearest(path.lower(), BUILTIN)}; legal: {', '.join(sorted(BUILTIN))}, "
            'or an import path "my_pkg.rewards:MyReward"'
        )
    return by_path(path, "reward")


def _build(spec: str, cls: type, settings: dict[str, Any]) -> object:
    if not any("__call__" in vars(base) for base in cls.__mro__):
        raise ConfigError(
            f"cannot use '{spec}' as a reward: objects of {cls.__name__} are not callable; "
            "legal is a subclass of Reward, or a class with __call__(images, prompts) -> (B,)"
        )
    parameters = inspect.signature(cls).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in settings:
        if key not in named and not takes_any:
            legal = ", ".join(named) or "none"
            raise ConfigError(f"reward '{spec}' has no setting '{key}'{nearest(key, named)}; legal: {legal}")
    missing = [name for name, p in named.items() if p.default is p.empty and name not in settings]
    if missing:
        raise ConfigError(f"reward '{spec}' needs the setting {', '.join(missing)}; give it beside the name")
    try:
        return cls(**settings)
    except RewardTuneError:
        raise
    except Exception as error:  # whatever a class raises that was given the wrong kind of value
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "no settings"
        raise ConfigError(f"reward '{spec}' cannot be made with {given} ({type(error).__name__}: {error})") from error
