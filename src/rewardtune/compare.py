"""`rewardtune eval` and `compare`: candidates on the same prompts and seeds, fully sampled; intervals over prompts.

Sampled one after the other on one base model, measured by the panel that also watches runs (`panel.py`), always against
the pictures of the base model. Everything comes back as plain data: `Comparison.as_json()` is what the files hold.
Left out: judging by people, more than one base model at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, stats
from .candidates import BASE, Candidate, candidates, load_base, opened
from .config import Part, RunConfig
from .config import named_parts as config_parts
from .errors import ConfigError
from .guards import Evaluation, Measure, Metric, bare, chosen_by, judged, named_parts
from .progress import digits
from .prompts import TABLES, is_picture, load_prompts, with_categories
from .runfolder import json_lines, refuse_place, write_text
from .stats import Interval
from .tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from .panel import Panel
    from .rewards import Reward

MOST = 400  # prompts, where nobody says how many
SHOWN = 24  # prompts in the grid of pictures
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every candidate is asked: texts and seeds, one for each picture, prompt by prompt, and the panel."""

    texts: list[str]
    categories: list[str]
    seeds: list[int]
    panel: Panel
    measures: dict[str, Measure]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def firsts(self) -> list[int]:
        """The first picture of each prompt."""
        repeats = self.facts["seeds"]
        return list(range(0, len(self.texts), repeats))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate's pictures, measured.

    folder: their folder's name. without: of whole-set metrics, for the jackknife. shown: (n, 3, H, W).
    """

    candidate: Candidate
    folder: str
    evaluation: Evaluation
    without: dict[str, list[float]]
    shown: Tensor = field(repr=False)

    def interval(self, metric: str) -> Interval:
        """The value with its interval over prompts; without one for mere counts."""
        if metric in self.evaluation.pictures:
            return stats.bootstrap_mean(self.evaluation.by_prompt(metric), confidence=CONFIDENCE)
        return stats.jackknife(self.evaluation.values[metric], self.without.get(metric, ()), confidence=CONFIDENCE)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A candidate with its numbers. values: metric -> one a picture. folder: of its pictures, beside the file."""

    label: str
    spec: str
    weight: float | None
    base_steps: int | None
    aig: float | None
    digest: str | None
    sampling: dict[str, Any]
    folder: str
    metrics: dict[str, Interval]
    values: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """a against b on some prompts: metric -> a - b, and metric -> the share of pictures by which a is better."""

    prompts: int
    difference: dict[str, Interval]
    win_rate: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two candidates by label, on all prompts and on each category of them."""

    a: str
    b: str
    all: Contrast
    categories: dict[str, Contrast]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `eval` and `compare` found. kind: eval (each pair is a candidate and the base) or compare (all pairs)."""

    kind: str
    settings: dict[str, Any]
    measures: dict[str, Measure]
    pictures: list[dict[str, Any]]
    candidates: list[Scored]
    pairs: list[Pair]
    notes: tuple[str, ...] = ()
    time: str = ""

    def as_json(self) -> str:
        """docs/evaluation.md lists the keys."""
        return to_json({"rewardtune": __version__, **asdict(self)})

    def as_text(self) -> str:
        """The tables for a terminal."""
        return _eval_text(self) if self.kind == "eval" else _compare_text(self)


def evaluate_candidates(specs: Sequence[str], **options: Any) -> Comparison:
    """`rewardtune eval`: every candidate and the base model; each candidate against the base. Options as `compare`."""
    return compare_candidates(specs, kind="eval", **options)


def compare_candidates(
    specs: Sequence[str],
    *,
    kind: str = "compare",
    rewards: Sequence[Part] | Reward | None = None,
    prompts: str | Sequence[str] | None = None,
    count: int | None = None,
    seeds: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    features: str | None = None,
    model: str | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    batch: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Sample, score and compare; writes `output`/`name`.json, .png and the pictures, and gives what the file holds.

    specs: of docs/evaluation.md, e.g. ["runs/a", "runs/b@0.7"]; the base model is added where it is not among them.
    rewards: instead of the runs' trained and held-out ones. prompts: a source of docs/prompts.md; None: the eval
    prompts of the first run. count: of them, from the first; seeds: pictures of each. seed: None: the first run's.
    steps, guidance: for all, instead of each run's own. features: a CLIP for diversity; None: the first run's.
    output: None: the folder `eval` of the first run.

    Raises ConfigError, before anything is sampled, for what cannot be opened or measured.
    """
    found = with_base(candidates(specs, model=model, steps=steps, guidance=guidance))
    if kind == "compare" and len(specs) < 2:
        raise ConfigError("compare needs two candidates or more; for one against the base model: rewardtune eval")
    folder = _folder(found, output)
    by_spec = {candidate.spec: candidate.label for candidate in found}
    asked = [by_spec[spec] for spec in specs]
    name = name or (kind if kind == "eval" else slug("-vs-".join(asked)))
    if name != Path(name).name or name == "..":
        raise ConfigError(f"--name {name}: give a name without a folder; the folder is --output")
    setup = prepare(
        found,
        rewards=rewards,
        prompts=prompts,
        count=count,
        seeds=seeds,
        seed=seed,
        features=features,
        batch=batch,
    )
    measured = measure(load_base(found), found, setup, folder / name, batch=batch, say=say)
    by_label = {one.candidate.label: one for one in measured}
    against = [(label, BASE) for label in asked if label != BASE] if kind == "eval" else combinations(asked, 2)
    result = Comparison(
        kind=kind,
        settings=setup.facts | {"model": found[0].settings.model.id},
        measures=setup.measures,
        pictures=_pictures(setup),
        candidates=[scored(one, setup, folder=f"{name}/{one.folder}") for one in measured],
        pairs=[_pair(by_label[a], by_label[b], setup) for a, b in against],
        notes=setup.notes,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_result(folder / f"{name}.json", result.as_json())
    save_grid(measured, setup, folder / f"{name}.png")
    say(f"written: {folder / f'{name}.json'}, {name}.png, and the pictures in {folder / name}")
    return result


def with_base(found: Sequence[Candidate]) -> list[Candidate]:
    """The base model first, whether it was named or not."""
    base = next((candidate for candidate in found if candidate.place is None), None)
    base = base or Candidate(spec=BASE, label=BASE, place=None, settings=found[0].settings)
    return [base, *(candidate for candidate in found if candidate.place is not None)]


def _folder(found: Sequence[Candidate], output: str | Path | None) -> Path:
    runs = [candidate.run / "eval" for candidate in found if candidate.run is not None]
    if output is None and not runs:
        raise ConfigError("no candidate is a run, so there is no folder for the results; add --output FOLDER")
    folder = runs[0] if output is None else Path(output)
    refuse_place(folder, "--output")
    return folder


# -- what is asked ---------------------------------------------------------------------------------------------------


def prepare(
    found: Sequence[Candidate],
    *,
    rewards: Sequence[Part] | Reward | None = None,
    trained_too: bool = False,
    prompts: str | Sequence[str] | None = None,
    count: int | None = None,
    seeds: int = 1,
    seed: int | None = None,
    features: str | None = None,
    batch: int = 8,
) -> Setup:
    """Prompts, seeds and the panel, from the runs' settings where nothing is given. Raises ConfigError.

    trained_too: measure the trained reward also where other `rewards` are given.
    """
    configs = [candidate.settings.config for candidate in found if candidate.settings.config is not None]
    first = configs[0] if configs else None
    if min(seeds, batch) < 1 or (count is not None and count < 1):
        raise ConfigError(f"count={count}, seeds={seeds}, batch={batch}: each must be at least 1")
    rows, source = _prompts(found, prompts, count)
    seed = (first.seed if first else 0) if seed is None else seed
    texts = [text for text, _ in rows for _ in range(seeds)]
    features = features or (first.guards.features if first else None)
    panel, roles = _panel(found, texts, rewards=rewards, trained_too=trained_too, features=features, batch=batch)
    prompted = [text for text, _ in rows]
    notes = [*_settings_notes(found), *_trained_on(configs, prompted), *_chosen_on(found, prompted, seed)]
    if untold := [one.label for one in found if _trained_names(one) is None] if "unknown" in roles.values() else []:
        notes.append(f"nothing tells what {', '.join(untold)} was trained on, so no reward is known to be held out")
    if len(rows) < stats.FEW:
        notes.append(f"few prompts ({len(rows)}): the intervals are rough, and too narrow for lopsided scores")
    if features is None:
        notes.append("no features (a CLIP) are named, so neither diversity nor base_distance is measured: --features")
    return Setup(
        texts=texts,
        categories=[kind for _, kind in rows for _ in range(seeds)],
        seeds=[_seed(seed, index, repeat) for index in range(len(rows)) for repeat in range(seeds)],
        panel=panel,
        measures={name: _as_measure(metric, roles.get(name, "guard")) for name, metric in panel.metrics().items()},
        facts={
            "prompts": source,
            "count": len(rows),
            "seeds": seeds,
            "seed": seed,
            "features": features,
            "confidence": CONFIDENCE,
            "resamples": stats.RESAMPLES,
        },
        notes=tuple(notes),
    )


def _as_measure(metric: Metric, role: str) -> Measure:
    return Measure(what=metric.what, better=metric.better, role=role)


def _seed(seed: int, index: int, repeat: int) -> int:
    """Of the first picture of a prompt as a run's own evaluations draw it; it depends on no count."""
    from .gradient import derive_seed

    return derive_seed(seed, "eval", index) if repeat == 0 else derive_seed(seed, "eval", index, repeat)


def _prompts(
    found: Sequence[Candidate], given: str | Sequence[str] | None, count: int | None
) -> tuple[list[tuple[str, str]], Any]:
    """((prompt, category) of each, the source by name); of the first run where none is given."""
    settings = next((candidate.settings for candidate in found if candidate.settings.config), found[0].settings)
    own, columns = settings.prompts, settings.columns
    if given is None and own is None:
        raise ConfigError("no candidate has a config.yaml to tell the prompts; add --prompts (docs/prompts.md)")
    source: Any = given
    template = None
    if own is not None and given is None:
        assert settings.config is not None
        source, template, count = own.source, own.template, count or settings.config.eval.count
    elif not (isinstance(given, str) and given.endswith(TABLES)):
        if pictures := [name for name in columns if is_picture(name)]:
            told = given if isinstance(given, str) else "a list"
            raise ConfigError(
                f"the run samples from a picture beside each prompt ({', '.join(pictures)}), which {told} does not "
                f"name; give a {', '.join(TABLES)} file with {'these columns' if len(columns) > 1 else 'this column'}: "
                f"{', '.join(columns)}"
            )
        columns = []
    rows = with_categories(source, template=template, columns=columns)
    if count is None and len(rows) > MOST:
        raise ConfigError(f"the prompts are {len(rows)}; say how many of them, from the first: --count {MOST}")
    if count is not None and count > len(rows):
        raise ConfigError(f"count={count}: there are {len(rows)} prompts")
    return rows[:count], source if isinstance(source, str) else "a list"


def _settings_notes(found: Sequence[Candidate]) -> Iterable[str]:
    """Where candidates are sampled in different ways, which a difference of theirs may come from."""
    base = found[0].settings
    for candidate in found[1:]:
        own = candidate.settings
        apart = {key for key in base.call.keys() | own.call.keys() if base.call.get(key) != own.call.get(key)}
        apart |= {"scheduler"} if own.scheduler != base.scheduler else set()
        if apart:
            yield f"{candidate.label} is sampled with another {', '.join(sorted(apart))} than the base model"
        steps = own.call.get("num_inference_steps")
        if candidate.mix and steps and candidate.mix.base_weight(steps - 1, steps) == 1:
            yield f"{candidate.label}: the base model makes all {steps} steps, so these are its pictures"


def _trained_on(configs: Sequence[RunConfig], prompts: Sequence[str]) -> Iterable[str]:
    for source in {json.dumps(config.prompts.model_dump()): config.prompts for config in configs}.values():
        try:
            known = set(load_prompts(source.source, template=source.template))
        except ConfigError:  # moved since, or no network; only a note hangs on it
            continue
        if shared := sum(prompt in known for prompt in prompts):
            yield f"{shared} of {len(prompts)} prompts were trained on: this says little of other prompts"


def _chosen_on(found: Sequence[Candidate], prompts: Sequence[str], seed: int) -> Iterable[str]:
    """Where a candidate is judged on the very pictures by which its weights were chosen (`guards.chosen_by`)."""
    for run, settings in {one.run: one.settings for one in found if one.run is not None}.items():
        facts, config = settings.facts, settings.config
        steps = {line.get("step", 0) for line in json_lines(run / "eval.jsonl")}
        by = chosen_by(facts, config.checkpoints.best if config else facts.get("best", "reward"), steps)
        same = sum(a == b for a, b in zip(prompts, facts.get("eval_prompts", ()), strict=False))
        if by and same and seed == facts.get("seed"):
            yield (
                f"by {same} of these pictures the weights of {run.resolve().name} were chosen among its "
                f"{len(steps - {0})} looks ({by}), which favours them: --seed or --prompts takes fresh ones"
            )


def _trained_names(candidate: Candidate) -> set[str] | None:
    """The rewards that it was trained on, by name in lower case; None where neither config.yaml nor run.json tells."""
    config, measures = candidate.settings.config, candidate.settings.facts.get("measures")
    if candidate.place is None:
        return set()
    if config is not None:
        return {name.rpartition(":")[2].lower() for name, _ in named_parts(config.reward)}
    if not measures:
        return None
    return {bare(name).lower() for name, measure in measures.items() if measure.get("role") == "trained"}


def _role(name: str, options: Mapping[str, Any] | None, found: Sequence[Candidate]) -> str:
    """trained, held_out or unknown. options: None where they are not known: by its name alone it may be the same."""
    names = [_trained_names(candidate) for candidate in found]
    for candidate, own in zip(found, names, strict=True):
        config = candidate.settings.config
        if options is None or config is None:
            trained = name.rpartition(":")[2].lower() in (own or ())
        else:
            trained = judged(name, options) in [judged(*part) for part in named_parts(config.reward)]
        if trained:
            return "trained"
    return "unknown" if None in names else "held_out"


def _panel(
    found: Sequence[Candidate],
    texts: Sequence[str],
    *,
    rewards: Sequence[Part] | Reward | None,
    trained_too: bool,
    features: str | None,
    batch: int,
) -> tuple[Panel, dict[str, str]]:
    """(the panel, metric -> role of its rewards)."""
    from .diversity import Features
    from .launch import make_reward
    from .panel import Panel
    from .rewards.base import Reward, leaves
    from .score import pick_device

    configs = [candidate.settings.config for candidate in found if candidate.settings.config is not None]
    total, parts = None, list[Part]()
    alike = len({json.dumps([c.model_dump()["reward"], c.reward_weight], default=str) for c in configs}) == 1
    if (rewards is None or trained_too) and alike:
        total = make_reward(configs[0].reward, weight=configs[0].reward_weight)
    if rewards is None:
        if not configs:
            raise ConfigError("no candidate has a config.yaml to tell its rewards; name some: --reward clipscore")
        if not alike:  # no total is common to all: every named reward by itself
            keys = [key for config in configs for key in named_parts(config.reward)]
            parts = [Part(name=name, options=options) for name, options in keys]
        parts += [part for config in configs for part in config.guards.rewards]
    elif not isinstance(rewards, Reward):
        parts = list(rewards)
    parts = list({json.dumps(part.model_dump(), default=str, sort_keys=True): part for part in parts}.values())
    built = [(part, make_reward([part])) for part in parts]
    others = reduce(add, (reward for _, reward in built)) if built else None
    if isinstance(rewards, Reward):
        others, built = rewards, []
    device = pick_device(found[0].settings.model.device)
    for reward in (total, others):
        if reward is not None:
            reward.to(device)
    panel = Panel(
        prompts=texts,
        rewards=others,
        trained=total,
        features=Features(features) if features else None,
        batch=batch,
        device=device,
    )
    known = set[int]()
    by_leaf = [_role(leaf.name, None, found) for leaf, _ in leaves(rewards)] if isinstance(rewards, Reward) else []
    for part, reward in built:
        each = {_role(str(one.name).lower(), one.options, found) for one in config_parts([part])}
        role = next(role for role in ("trained", "unknown", "held_out") if role in each)
        new = [id(leaf) for leaf, _ in leaves(reward) if id(leaf) not in known]
        known |= set(new)
        by_leaf += [role] * len(new)
    roles = dict(zip(panel.held_out, by_leaf, strict=True))
    return panel, roles | dict.fromkeys(panel.trained_names, "trained")


# -- sampling and measuring ------------------------------------------------------------------------------------------


def measure(
    pipe: Any,
    found: Sequence[Candidate],
    setup: Setup,
    folder: Path,
    *,
    batch: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Every candidate's pictures, sampled, saved to folders of their own and measured; the base model comes first."""
    from . import evaluate

    base: Tensor | None = None
    results = []
    folders = folder_names([candidate.label for candidate in found])
    for place, (candidate, own) in enumerate(zip(found, folders, strict=True), 1):
        say(f"{candidate.label} ({place} of {len(found)}): {len(setup.texts)} pictures")
        with opened(pipe, candidate, prompts=setup.texts):
            images = evaluate.sample(
                pipe, setup.texts, seeds=setup.seeds, call=candidate.settings.call, batch=batch, checkers=False
            )
        base = images if base is None else base
        if images.shape != base.shape:
            raise ConfigError(
                f"{candidate.label} gives pictures of {tuple(images.shape[-2:])} pixels and the base model of "
                f"{tuple(base.shape[-2:])}; compare candidates of one size"
            )
        evaluate.save_images(images, folder / own)
        if setup.panel.rewards is not None:
            setup.panel.rewards.to(setup.panel.device)  # the panel leaves it on the CPU
        results.append(
            Measured(
                candidate=candidate,
                folder=own,
                evaluation=setup.panel(images, base=base, step=place - 1),
                without=setup.panel.leave_out(images),
                shown=images[setup.firsts[:SHOWN]].clone(),
            )
        )
    return results


def scored(measured: Measured, setup: Setup, *, folder: str) -> Scored:
    candidate = measured.candidate
    mix = candidate.mix
    return Scored(
        label=candidate.label,
        spec=candidate.spec,
        weight=None if candidate.place is None else candidate.weight,
        base_steps=mix.base_steps if mix else None,
        aig=mix.aig if mix else None,
        digest=candidate.digest,
        sampling=candidate.settings.call | {"scheduler": candidate.settings.scheduler},
        folder=folder,
        metrics={name: measured.interval(name) for name in setup.measures},
        values=measured.evaluation.pictures,
    )


def _pair(a: Measured, b: Measured, setup: Setup) -> Pair:
    kinds = dict.fromkeys(filter(None, setup.categories))
    everything = range(len(setup.texts))
    return Pair(
        a=a.candidate.label,
        b=b.candidate.label,
        all=contrast(a, b, setup, everything),
        categories={
            kind: contrast(a, b, setup, [row for row in everything if setup.categories[row] == kind])
            for kind in (kinds if len(kinds) > 1 else ())
        },
    )


def contrast(a: Measured, b: Measured, setup: Setup, rows: Sequence[int]) -> Contrast:
    """a against b on the pictures of `rows`; metrics of the whole set only on all of them."""
    difference, wins = dict[str, Interval](), dict[str, Interval]()
    clusters = [a.evaluation.prompts[row] for row in rows]
    whole = len(rows) == len(setup.texts)
    bases = BASE in (a.candidate.label, b.candidate.label)
    for name, measure in setup.measures.items():
        if name in a.evaluation.pictures:
            one, other = ([m.evaluation.pictures[name][row] for row in rows] for m in (a, b))
            difference[name] = stats.paired_difference(one, other, clusters, confidence=CONFIDENCE)
            if measure.better and not (bases and name in TO_BASE):
                less = measure.better == "less"
                wins[name] = stats.win_rate(one, other, clusters, less=less, confidence=CONFIDENCE)
        elif whole:
            apart = a.evaluation.values[name] - b.evaluation.values[name]
            without = [x - y for x, y in zip(a.without.get(name, ()), b.without.get(name, ()), strict=True)]
            difference[name] = stats.jackknife(apart, without, confidence=CONFIDENCE)
    return Contrast(prompts=len(set(clusters)), difference=difference, win_rate=wins)


# -- files and tables ------------------------------------------------------------------------------------------------


def write_result(path: Path, text: str) -> None:
    """The JSON of an evaluation; pictures of the one that stood there go, unless the new one has them too.

    Beside the new ones they would pass for theirs.
    """
    earlier = _listed(path)
    write_text(path, text)
    for picture in earlier - _listed(path):
        with suppress(OSError):
            picture.unlink()
            picture.parent.rmdir()  # where it was the last one


def _listed(path: Path) -> set[Path]:
    """The pictures of an evaluation's JSON; none where it is not there, or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        scored = [*found.get("candidates", ()), *(point["scored"] for point in found.get("points", ()))]
        counts = [(one["folder"], max(map(len, one["values"].values()), default=0)) for one in scored]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {path.parent / folder / f"{index:03d}.png" for folder, count in counts for index in range(count)}


def _pictures(setup: Setup) -> list[dict[str, Any]]:
    return [
        {"prompt": text, "category": kind, "seed": seed, "file": f"{index:03d}.png"}
        for index, (text, kind, seed) in enumerate(zip(setup.texts, setup.categories, setup.seeds, strict=True))
    ]


def save_grid(measured: Sequence[Measured], setup: Setup, path: Path) -> None:
    """The first prompts, the candidates side by side."""
    from . import evaluate

    prompts = [setup.texts[row] for row in setup.firsts[:SHOWN]]
    columns = {one.candidate.label: one.shown for one in measured}
    evaluate.save_grid(columns, prompts, path, per_row=max(1, min(3, 6 // len(columns))))


def to_json(document: Mapping[str, Any]) -> str:
    """Strict JSON: NaN and infinity, which it has no word for, are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


LONGEST = 100  # bytes of a file's or a folder's name that is kept whole; systems allow 255


def slug(label: str) -> str:
    """The label as a name of a file; a long one is cut, and told from others by a digest."""
    name = re.sub(r"[^\w.@=+-]+", "-", label).strip(".-") or "candidate"
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return name if len(name.encode()) <= LONGEST else f"{name[:30]}-{digest}"


def folder_names(labels: Sequence[str]) -> list[str]:
    """A name of its own for each label: `./a` and `../a` would be the same."""
    found: list[str] = []
    for label in labels:
        name, number = slug(label), 1
        while name in found:
            number += 1
            name = f"{slug(label)}-{number}"
        found.append(name)
    return found


def shown(interval: Interval, *, percent: bool = False, signed: bool = False) -> str:
    """`0.25 [0.24, 0.27]`; the value alone where it has no interval."""

    def word(value: float) -> str:
        if percent:
            return f"{100 * value:.0f}"
        return ("+" if signed and value > 0 else "") + digits(value)

    unit = " %" if percent else ""
    if math.isnan(interval.low):
        return word(interval.value) + unit
    return f"{word(interval.value)}{unit} [{word(interval.low)}, {word(interval.high)}]"


ORDER = ("held_out", "unknown", "trained", "guard")
COUNTS = ("black", "nan")
TO_BASE = ("base_distance", "base_pixels")  # 0 for the base model itself


def _ordered(result: Comparison) -> list[str]:
    """Held-out rewards first: they are what to look at. Counts of broken pictures only where there are some."""
    names = sorted(result.measures, key=lambda name: ORDER.index(result.measures[name].role))
    return [
        name
        for name in names
        if name not in COUNTS or any(candidate.metrics[name].value for candidate in result.candidates)
    ]


def titled(name: str, measures: Mapping[str, Measure]) -> str:
    """With an arrow to where better is."""
    return name + {"more": " ↑", "less": " ↓"}.get(measures[name].better, "")


ROLES = {"held_out": "held out", "unknown": "unknown", "trained": "trained", "guard": "guard"}


def _eval_text(result: Comparison) -> str:
    rows = []
    for name in _ordered(result):
        for candidate in result.candidates:
            pair = next((pair for pair in result.pairs if pair.a == candidate.label), None)
            change = pair.all.difference.get(name) if pair else None
            wins = pair.all.win_rate.get(name) if pair else None
            if candidate.weight is None and name in TO_BASE:
                continue
            first = candidate is result.candidates[name in TO_BASE]
            rows.append(
                [
                    titled(name, result.measures) if first else "",
                    ROLES[result.measures[name].role] if first else "",
                    candidate.label,
                    shown(candidate.metrics[name]),
                    "" if change is None else shown(change, signed=True),
                    "" if wins is None else shown(wins, percent=True),
                ]
            )
    headings = ["metric", "role", "candidate", "value [95 %]", "change to base [95 %]", "better than base [95 %]"]
    return "\n".join([text_table(headings, rows, flexible=2), _foot(result)])


def _compare_text(result: Comparison) -> str:
    rows = []
    for name in _ordered(result):
        for number, pair in enumerate(result.pairs):
            blocks = {"": pair.all} | (pair.categories if result.measures[name].role != "guard" else {})
            for kind, block in blocks.items():
                if name not in block.difference:
                    continue
                wins = block.win_rate.get(name)
                title = titled(name, result.measures) if number == 0 and not kind else ""
                against = f"{pair.a} against {pair.b}" if not kind else f"  {kind}"
                rows.append(
                    [
                        title,
                        against,
                        str(block.prompts),
                        shown(block.difference[name], signed=True),
                        "" if wins is None else shown(wins, percent=True),
                    ]
                )
    headings = ["metric", "candidates", "prompts", "difference [95 %]", "the first wins [95 %]"]
    return "\n".join([text_table(headings, rows, flexible=1, numbers=[2]), _foot(result)])


def _foot(result: Comparison) -> str:
    settings = result.settings
    each = "one picture" if settings["seeds"] == 1 else f"{settings['seeds']} pictures"
    lines = [
        f"{settings['count']} prompts of {settings['prompts']}, {each} of each, the same seeds for all; intervals over "
        "prompts, each by itself at 95 %; ↑ more, ↓ less is better",
        *(f"note: {note}" for note in result.notes),
    ]
    return "\n".join(lines)
