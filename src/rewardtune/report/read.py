"""A run folder, read for people to look at: as much of it as is there, whatever state the run is in.

A run may be under way, interrupted, stopped or of an older version, so nothing but run.json has to exist, and a
half-written last line is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config, named_parts
from ..errors import ConfigError, RewardTuneError
from ..guards import METRICS, Evaluation, Measure, Rule, bare, chosen_by, make_rules
from ..pictures import by_number
from ..prompts import load_prompts
from ..runfolder import json_lines

# Of runs whose run.json does not tell yet: the shipped rewards of which less is better.
LESS = ("symmetry", "compressibility", "objectness")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What lies in a run folder. `folder` as the user gave it; `prompts`: one for each eval picture, or none known."""

    folder: Path
    facts: Mapping[str, Any]  # run.json
    metrics: Sequence[Mapping[str, Any]]  # metrics.jsonl
    looks: Sequence[Evaluation]  # eval.jsonl
    measures: Mapping[str, Measure]
    prompts: Sequence[str]
    config: RunConfig | None
    rules: Sequence[Rule]
    log: Sequence[str]  # train.log
    sweep: Mapping[str, Any] | None  # sweep.json
    evals: Mapping[str, Mapping[str, Any]]  # eval/NAME.json by NAME

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def running(self) -> bool:
        return self.facts.get("status") == "running"

    @property
    def before(self) -> Evaluation | None:
        """The look at the untuned model."""
        return self.looks[0] if self.looks and self.looks[0].step == 0 else None

    @property
    def after(self) -> Evaluation | None:
        """The look at the weights that are kept; while the run is under way, the latest one."""
        kept = self.facts.get("kept_step")
        known = [look for look in self.looks if kept is None or look.step == kept]
        return known[-1] if known and self.before is not None and (len(self.looks) > 1 or kept is not None) else None

    @property
    def chosen_by(self) -> str | None:
        """The metric by which the kept weights were chosen among several looks; None where they were not."""
        best = self.config.checkpoints.best if self.config else self.facts.get("best", "reward")
        return chosen_by(self.facts, best, (look.step for look in self.looks))

    @property
    def imitations(self) -> list[str]:
        """The rewards that are the playground's small versions; none known where there is no run file."""
        found = named_parts([*self.config.reward, *self.config.guards.rewards]) if self.config else ()
        return list(dict.fromkeys(str(part.name) for part in found if "playground" in part.options.values()))

    def pictures(self, step: int) -> list[Path]:
        """The eval pictures after `step` updates, in the order of the prompts; none where they are gone."""
        samples = self.folder / "samples"
        after = self.after
        folders = [samples / f"step-{step:06d}"]
        if not self.running and after is not None and after.step == step:
            folders.append(samples / "final")
        found = (sorted(folder.glob("[0-9]*.png"), key=by_number) for folder in folders)
        return next((files for files in found if files), [])


def read_run(folder: str | Path) -> RunData:
    """ConfigError where there is no run in `folder`, or its run.json is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no run folder {folder}; give the output_dir of a run")
    if not (folder / "run.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/run.json"))
        hint = f"; it holds runs, give one of them or several: {', '.join(map(str, inside[:5]))}" if inside else ""
        raise ConfigError(f"{folder} holds no run (there is no run.json){hint or '; give the output_dir of a run'}")
    facts = read_json(folder / "run.json")
    looks = [Evaluation(**line["panel"]) for line in json_lines(folder / "eval.jsonl") if "panel" in line]
    config = _config(folder)
    return RunData(
        folder=folder,
        facts=facts,
        metrics=[line for line in json_lines(folder / "metrics.jsonl") if "step" in line],
        looks=looks,
        measures=_measures(facts, looks),
        prompts=_prompts(facts, config, looks),
        config=config,
        rules=make_rules([rule.model_dump() for rule in config.guards.rules]) if config else (),
        log=_text(folder / "train.log").splitlines(),
        sweep=_json_of(folder / "sweep.json", "sweep"),
        evals={
            path.stem: found
            for path in sorted((folder / "eval").glob("*.json"))
            if (found := _json_of(path, "eval", "compare")) is not None
        },
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; give one that is there") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); restore it, or leave it out") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; restore it, or leave it out")
    return found


def _json_of(path: Path, *kinds: str) -> dict[str, Any] | None:
    """The file where it is one of `rewardtune eval`, `compare` or `sweep`; another's file is not ours to judge."""
    try:
        found = read_json(path)
    except ConfigError:
        return None
    return found if found.get("kind") in kinds else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _config(folder: Path) -> RunConfig | None:
    path = folder / "config.yaml"
    try:
        return load_config(path) if path.is_file() else None
    except RewardTuneError:  # of another version
        return None


def _measures(facts: Mapping[str, Any], looks: Sequence[Evaluation]) -> dict[str, Measure]:
    """As run.json tells them, else by the names that are known; every metric of the looks has one."""
    told = {
        name: Measure(what=str(m.get("what", "")), better=str(m.get("better", "")), role=str(m.get("role", "guard")))
        for name, m in dict(facts.get("measures") or {}).items()
    }
    held_out = set(facts.get("held_out") or ())
    names = {name for look in looks for name in (*look.values, *look.pictures)}
    guessed = {}
    for name in sorted(names - told.keys()):
        if name in METRICS:
            guessed[name] = Measure(what=METRICS[name].what, better=METRICS[name].better, role="guard")
            continue
        role = "held_out" if name in held_out else "trained"
        guessed[name] = Measure(what=name, better="less" if bare(name) in LESS else "more", role=role)
    return told | guessed


def _prompts(facts: Mapping[str, Any], config: RunConfig | None, looks: Sequence[Evaluation]) -> list[str]:
    told = facts.get("eval_prompts")
    if told is None and config is not None:
        try:
            source = config.looked_at
            told = load_prompts(source.source, template=source.template)[: config.eval.count]
        except RewardTuneError:  # the file has moved
            told = None
    count = len(looks[0].prompts) if looks else 0
    return list(map(str, told)) if told is not None and len(told) == count else []
