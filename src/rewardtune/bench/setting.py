"""On what the experiments run: the model, the rewards with their prompts, the budget, the grid of learning rates.

`playground`: the small world, on a CPU. `sd15`: the paper's own setting (section 4.1), for a GPU. Methods are named as
in the paper and scaled to the chain: ReFL-10 of 50 steps is the last fifth of any chain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError
from ..prompts import load_prompts
from ..spelling import nearest
from .cost import Cost


@dataclass(frozen=True, kw_only=True)
class Task:
    """One reward as it is trained: parts as in run files, and the prompts.

    native: the logged value that is compared; less: less of it is better. having: a word that every prompt must hold.

    """

    parts: list[dict[str, Any]]
    native: str
    train: str
    final: str
    less: bool = False
    having: str | None = None

    def prompts(self, *, search: int, final: int) -> dict[str, list[str]]:
        """train, search (the last `search` of the training source, never trained on) and final, held out from both."""
        having = re.compile(rf"\b{re.escape(self.having or '')}\b")
        train, held_out = ([p for p in load_prompts(s) if having.search(p)] for s in (self.train, self.final))
        train = list(dict.fromkeys(train))
        seen = set(train)
        held_out = [p for p in held_out if p not in seen]
        if not held_out:  # a list that serves both, as the paper's books: every third is held out
            held_out, train = train[::3], [p for k, p in enumerate(train) if k % 3]
            search = min(search, len(train) // 4)
        if len(train) <= search:
            raise ConfigError(f"{self.train} has {len(train)} prompts, but {search} are set aside to choose on")
        return {"train": train[:-search], "search": train[-search:], "final": held_out[:final]}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that the runs share.

    preset, changes: the run file and what is changed in it. T, batch: of the chain and of an update; lengths: the T of
    Figures 8 and 9, in the order of work.
    budget: denoiser evaluations of one run; half of them for a run that chooses a learning rate among `lrs` (rising).
    cost: of a replay, measured once; None: measured on the machine that runs.
    count: final prompts of Table 1, counted: of the ablations, looked: of the curves (`looks` after the first);
    searched: to choose on. saves: checkpoints of a run, from which it goes on when it was cut off; 0: it begins anew.
    extra: parts measured besides; features: for diversity.
    """

    name: str
    preset: str
    changes: tuple[str, ...]
    T: int
    lengths: tuple[int, ...]
    batch: int
    tasks: dict[str, Task]
    lrs: tuple[float, ...]
    budget: float
    count: int = 400
    counted: int = 128
    looked: int = 32
    searched: int = 48
    looks: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    cost: Cost | None = None
    search_seed: int = 7
    saves: int = 0
    extra: list[dict[str, Any]] = field(default_factory=list)
    features: str | None = None

    def told(self, reward: str) -> str:
        """The reward's name in a sentence."""
        small = self.preset == "playground" and reward not in ("symmetry", "compressibility")
        return f"{reward} (the playground's small imitation of it)" if small else reward

    @property
    def search_budget(self) -> float:
        """Denoiser evaluations of a run that chooses a learning rate."""
        return self.budget / 2


NEWER = (
    "DRTune, 2 stops",
    "DRaFT+",
    "LeapAlign",
    "FlowBP-Sparse",
    "FlowBP-Bridge",
    "FlowBP-Lagrange",
    "SRPO",
    "DRTune + RSA-FT",
)
METHODS = ("ReFL-10", "ReFL-20", "DRaFT-LV", "DRaFT-10", "AlignProp", "DRTune")


def method_of(name: str, T: int) -> dict[str, Any]:
    """A method by the paper's name, for chains of T steps, as a run file's `method`. The paper's T is 50."""
    fifth, two_fifths, tenth = (max(1, round(share * T)) for share in (0.2, 0.4, 0.1))
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "ReFL-10": ("refl", {"m": fifth}),
        "ReFL-20": ("refl", {"m": two_fifths}),
        "DRaFT-LV": ("draft_lv", {"n": 2}),
        "DRaFT-10": ("draft", {"K": fifth}),
        "AlignProp": ("alignprop", {}),
        "DRTune": ("drtune", {"K": tenth, "m": two_fifths}),
        # the ablations
        "DRTune, no early stop": ("drtune", {"K": tenth, "m": None}),
        "DRTune, executed": ("drtune", {"K": tenth, "m": two_fifths, "spacing": "executed"}),
        "DRTune, random": ("drtune", {"K": tenth, "m": two_fifths, "spacing": "random"}),
        "DRaFT-T": ("draft", {"K": None}),
        "DRaFT-T + sg": ("draft", {"K": None, "input_gradient": 0.0}),
        "DRaFT-T + stop": ("draft", {"K": None, "m": two_fifths}),
        "DRaFT-T + sg + stop": ("draft", {"K": None, "input_gradient": 0.0, "m": two_fifths}),
        "AlignProp + sg": ("alignprop", {"input_gradient": 0.0}),
        "AlignProp + stop": ("alignprop", {"m": two_fifths}),
        "AlignProp + sg + stop": ("alignprop", {"input_gradient": 0.0, "m": two_fifths}),
        "DRTune, 2 stops": ("drtune", {"K": tenth, "m": two_fifths, "stops": min(2, two_fifths)}),
        # newer methods, as their authors set them
        "DRaFT+": ("draft_plus", {"K": fifth}),
        "LeapAlign": ("leapalign", {}),
        "FlowBP-Sparse": ("flowbp_sparse", {"K": min(4, T)}),
        "FlowBP-Bridge": ("flowbp_bridge", {"K": min(5, T)}),
        "FlowBP-Lagrange": ("flowbp_lagrange", {}),
        "SRPO": ("srpo", {}),
    }
    base = name.removesuffix(" + RSA-FT")
    robust = base != name
    if base not in found:
        legal = ", ".join(found)
        raise ConfigError(f"unknown method {name!r}{nearest(name, found)}; legal: {legal}, each also as X + RSA-FT")
    kind, options = found[base]
    choice: dict[str, Any] = {"name": kind, "options": options}
    return {**choice, "rsa_ft": {}} if robust else choice


def _small(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "options": {"model": "playground", **options}}


_WORLD: dict[str, Any] = {"train": "playground:train:free", "final": "playground:eval:free"}
_KEEP = _small("clipscore") | {"weight": 2.5}

PLAYGROUND = Setting(
    name="playground",
    preset="playground",
    changes=("adapter.targets=attention",),  # as the paper, and cheaper than with convolutions
    T=20,
    lengths=(20, 10, 40),
    batch=4,
    tasks={
        "symmetry": Task(
            parts=[{"name": "symmetry", "options": {"detach_std": True}}, _KEEP], native="symmetry", less=True, **_WORLD
        ),
        "hpsv2": Task(parts=[_small("hpsv2")], native="hpsv2", **_WORLD),
        "objectness": Task(
            parts=[_small("objectness", target="heart")], native="objectness", less=True, having="heart", **_WORLD
        ),
        "pickscore": Task(parts=[_small("pickscore")], native="pickscore", **_WORLD),
        "aesthetic": Task(parts=[_small("aesthetic")], native="aesthetic", **_WORLD),
        "clipscore": Task(parts=[_small("clipscore")], native="clipscore", **_WORLD),
        "compressibility": Task(
            parts=[{"name": "compressibility", "weight": 300.0}, _KEEP], native="compressibility", less=True, **_WORLD
        ),
    },
    lrs=(1e-4, 3e-4, 9e-4, 2.7e-3),
    budget=8e3,
    cost=Cost(replay=1.9, nested=2.17, evaluation=0.0307, head=2.57),  # on 33 GFLOP/s a core, quiet
    extra=[{"name": "symmetry"}, *map(_small, ("clipscore", "hpsv2", "pickscore", "aesthetic"))],
    features="playground",
)

_HPD: dict[str, Any] = {
    "train": "hf:ymhao/HPDv2:train.json",
    "final": "hf:zhwang/HPDv2:benchmark/anime.json[:100],benchmark/concept-art.json[:100],"
    "benchmark/paintings.json[:100],benchmark/photo.json[:100]",
}
_BOOKS: dict[str, Any] = {"train": "builtin:concepts_with_books", "final": "builtin:concepts_with_books"}
_CLIP = {"name": "clipscore", "weight": 1.0}

SD15 = Setting(
    name="sd15",
    preset="sd15-drtune",
    changes=("optim.max_seconds=null",),
    T=50,
    lengths=(50, 20, 30, 40),
    batch=32,
    tasks={
        "symmetry": Task(parts=[{"name": "symmetry"}, _CLIP], native="symmetry", less=True, **_HPD),
        "hpsv2": Task(parts=[{"name": "hpsv2", "options": {"version": "2.1"}}], native="hpsv2", **_HPD),
        "objectness": Task(
            parts=[{"name": "objectness", "options": {"target": "book"}}], native="objectness", less=True, **_BOOKS
        ),
        "pickscore": Task(parts=[{"name": "pickscore"}], native="pickscore", **_HPD),
        "aesthetic": Task(parts=[{"name": "aesthetic"}], native="aesthetic", **_HPD),
        "clipscore": Task(parts=[{"name": "clipscore"}], native="clipscore", **_HPD),
        "compressibility": Task(
            parts=[{"name": "compressibility", "weight": 300.0}, _CLIP], native="compressibility", less=True, **_HPD
        ),
        # not among the paper's seven; the playground has no small version of it
        "imagereward": Task(parts=[{"name": "imagereward"}], native="imagereward", **_HPD),
    },
    lrs=(7e-6, 2e-5, 6e-5, 2e-4),  # the paper gives all the same 2e-5
    # 2 hours on 4 A100 are 28,800 GPU seconds; an evaluation at 512 pixels with guidance in half precision takes about
    # 40 ms there (an estimate: `evaluation` in cost.json is yours, in seconds: set --budget by it)
    budget=720e3,
    saves=20,
    extra=[{"name": "symmetry"}, {"name": "clipscore"}],
)


def quick(setting: Setting) -> Setting:
    """Everything runs, and no more: one rate, one seed, a twentieth of the budget; its results lie apart."""
    return replace(
        setting,
        name=f"{setting.name}-quick",
        lrs=(setting.lrs[len(setting.lrs) // 2],),
        budget=setting.budget / 20,
        seeds=setting.seeds[:1],
        count=min(setting.count, 16),
        counted=min(setting.counted, 16),
        looked=min(setting.looked, 4),
        saves=0,
    )


SETTINGS = {s.name: s for s in (PLAYGROUND, SD15, quick(PLAYGROUND), quick(SD15))}

PAPER = {  # Table 1 of the paper, in the order of METHODS; HPS v2 in the library's unit, a hundredth of the paper's
    "hpsv2": (0.3918, 0.3943, 0.3902, 0.3762, 0.3404, 0.4063),
    "pickscore": (0.2488, 0.2491, 0.2477, 0.2456, 0.2297, 0.2492),
    "aesthetic": (9.585, 9.911, 9.615, 8.317, 6.627, 10.360),
    "symmetry": (0.7512, 0.7328, 0.7648, 0.7250, 0.7840, 0.0551),
    "clipscore": (0.3771, 0.3844, 0.3613, 0.3707, 0.3580, 0.3856),
    "compressibility": (0.0057, 0.0043, 0.0088, 0.0073, 0.0097, 0.0038),
    "objectness": (0.0029, 0.0021, 0.1024, 0.0050, 0.9266, 0.0001),
}


def setting_of(name: str) -> Setting:
    if name not in SETTINGS:
        raise ConfigError(f"unknown setting {name!r}{nearest(name, SETTINGS)}; legal: {', '.join(SETTINGS)}")
    return SETTINGS[name]


def chosen_tasks(setting: Setting, names: Sequence[str] | None) -> list[str]:
    """The rewards asked for, in the order of work; ConfigError for an unknown one."""
    unknown = [name for name in names or () if name not in setting.tasks]
    if unknown:
        hint = nearest(unknown[0], setting.tasks)
        raise ConfigError(f"unknown reward {unknown[0]!r}{hint}; legal: {', '.join(setting.tasks)}")
    return [name for name in setting.tasks if names is None or name in names]
