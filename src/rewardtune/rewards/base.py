"""What a reward is, and its arithmetic.

A reward maps images (B, 3, H, W), float in [0, 1], and B prompts to scores (B,), higher is better, differentiable in
the images. Subclasses write `native`, the quantity in the scale that papers print; `minimise = True` says that less
of it is better. Sums, and the compositions of `compose.py`, keep what they are made of: in one `Call` every reward is
evaluated once, for the loss and for the log.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Self

import torch
from torch import Tensor, nn

from rewardtune.errors import ConfigError, RewardError, RewardTuneError
from rewardtune.rewards.contract import check_inputs, check_scores, full

Scorer = Callable[[Tensor, Sequence[str]], Tensor]


class Call:
    """One evaluation, on images in float32 or wider: each reward is asked once, its native value kept for the log."""

    def __init__(self, images: Tensor, prompts: Sequence[str]) -> None:
        self.images, self.prompts = full(images), prompts
        self.measured: dict[int, tuple[Reward, Tensor]] = {}
        self._scores: dict[tuple[int, bool], tuple[Reward, Tensor]] = {}  # held, so that no other reward gets its id

    def score(self, reward: "Reward") -> Tensor:
        """Scores (B,) of `reward` or of a reward inside it, float32 or wider."""
        key = id(reward), torch.is_grad_enabled()  # what was only logged has no graph to lend
        if key not in self._scores:
            self._scores[key] = reward, full(reward._measure(self))
        return self._scores[key][1]

    def keep(self, reward: "Reward", native: Tensor) -> None:
        """Native values (B,) for the log, in the order in which they are kept."""
        self.measured.setdefault(id(reward), (reward, full(native.detach())))

    def natives(self) -> dict[str, Tensor]:
        """What was kept, by name."""
        names = unique_names([reward for reward, _ in self.measured.values()])
        return dict(zip(names, (native for _, native in self.measured.values()), strict=True))


class Reward:
    """Base of all rewards. Subclass it, write `native`, and set `minimise` where less is better."""

    name: str = "reward"
    minimise: bool = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__.lower())

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The quantity in its own sign and scale, (B,): symmetry 0.25 is better than 0.50."""
        raise NotImplementedError(f"{type(self).__name__} must define native(self, images, prompts) -> (B,)")

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(score to maximise (B,), native value to log (B,)). Override it where the two differ by more than a sign."""
        value = self.native(images, prompts)
        return (-value if self.minimise else value), value

    @property
    def terms(self) -> tuple[tuple[float, "Reward"], ...]:
        """The weighted parts; a single reward is its own only part."""
        return ((1.0, self),)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float32 or wider, higher is better."""
        return self.parts(images, prompts)[0]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total (B,) and each part's native value (B,), detached, from one evaluation of every part.

        A part of weight 0 is only logged: it is evaluated without a graph and may be non-differentiable.
        Raises RewardError when the images, the prompts or a part's scores break the contract.
        """
        check_inputs(self.name, images, prompts)
        call = Call(images, prompts)
        kind = images.device.type
        kind = kind if torch.amp.is_autocast_available(kind) else "cpu"
        with torch.autocast(kind, enabled=False):  # a trainer's autocast is for its own network
            return call.score(self), call.natives()

    def _measure(self, call: Call) -> Tensor:
        self.to(call.images.device)  # a reward follows its images; `to("cpu")` sets it aside in between
        score, native = asked(self, call.images, call.prompts, who=f"reward '{self.name}'")
        call.keep(self, native)
        return score

    def to(self, device: torch.device | str) -> Self:
        """Move the modules and tensors among the attributes to `device`; returns the reward itself."""
        for key, value in vars(self).items():
            if isinstance(value, nn.Module):
                value.to(device)
            elif isinstance(value, Tensor):
                setattr(self, key, value.to(device))
        return self

    def __add__(self, other: "Reward | Scorer") -> "Reward":
        return Sum(self.terms + as_reward(other, action=f"add to the reward '{self.name}'").terms)

    def __radd__(self, other: "Reward | Scorer | int") -> "Reward":
        if isinstance(other, int) and not isinstance(other, bool) and other == 0:
            return self  # sum([a, b]) starts from 0
        return as_reward(other, action=f"add to the reward '{self.name}'") + self

    def __sub__(self, other: "Reward | Scorer") -> "Reward":
        return self + -as_reward(other, action=f"subtract from the reward '{self.name}'")

    def __rsub__(self, other: "Reward | Scorer") -> "Reward":
        return as_reward(other, action=f"combine with the reward '{self.name}'") - self

    def __mul__(self, weight: float) -> "Reward":
        _check_weight(self, weight)
        return Sum((float(weight) * own, part) for own, part in self.terms)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Reward":
        _check_weight(self, divisor)
        if divisor == 0:
            raise ConfigError(f"the reward '{self.name}' is divided by 0; divide by any other number")
        return Sum((own / float(divisor), part) for own, part in self.terms)

    def __neg__(self) -> "Reward":
        return -1.0 * self

    def __repr__(self) -> str:
        return f"<reward {self.name}>"


class Composition(Reward):
    """A reward made of others, its `members`. Subclasses write `_measure`, which asks the call for their scores."""

    members: tuple[Reward, ...] = ()

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        score = Call(images, prompts).score(self)
        return score, score

    def to(self, device: torch.device | str) -> Self:
        for member in self.members:
            member.to(device)
        return self


class Sum(Composition):
    """sum_k w_k r_k, made by arithmetic. Always flat; a reward that occurs twice is one part with both weights."""

    def __init__(self, terms: Iterable[tuple[float, Reward]]) -> None:
        merged: dict[int, tuple[float, Reward]] = {}
        for weight, part in terms:
            merged[id(part)] = (weight + merged.get(id(part), (0.0, part))[0], part)
        self._terms = tuple(merged.values())
        self.members = tuple(part for _, part in self._terms)
        pairs = zip(unique_names(self.members), self._terms, strict=True)
        self.name = " + ".join(f"{weight:g}*{name}" for name, (weight, _) in pairs).replace("+ -", "- ")

    @property
    def terms(self) -> tuple[tuple[float, Reward], ...]:
        return self._terms

    def _measure(self, call: Call) -> Tensor:
        total = call.images.new_zeros(len(call.images))
        for weight, part in self._terms:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                score = call.score(part)
            total = total + weight * score if weight != 0 else total  # not 0 * score: 0 * inf is NaN
        return total


class _FromCallable(Reward):
    def __init__(self, function: Scorer, name: str) -> None:
        self.function, self.name = function, name

    def native(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


def from_callable(function: Scorer, name: str | None = None) -> Reward:
    """Wrap a function (or nn.Module) `(images, prompts) -> scores (B,)`, higher is better.

    For a quantity to minimise write `-from_callable(loss)`: the log then shows the loss itself.
    """
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"from_callable needs a function (images, prompts) -> (B,) scores; given {function!r}")
    return _FromCallable(function, name or getattr(function, "__name__", type(function).__name__).strip("<>"))


def as_reward(thing: object, *, action: str = "use as a reward") -> Reward:
    """A Reward as it is, a plain callable wrapped; anything else is a ConfigError that names `action`."""
    if isinstance(thing, Reward):
        return thing
    if isinstance(thing, type):
        raise ConfigError(f"cannot {action}: {thing.__name__} is a class; make one first: {thing.__name__}(...)")
    if callable(thing):
        return from_callable(thing)
    if isinstance(thing, Real):
        raise ConfigError(
            f"cannot {action}: {thing!r} is a number, and a constant changes no gradient; "
            "numbers multiply (0.2 * a), rewards add (a + b)"
        )
    raise ConfigError(
        f"cannot {action}: {thing!r} is a {type(thing).__name__}; "
        "legal is a Reward or a callable (images, prompts) -> (B,) scores"
    )


def asked(reward: Reward, images: Tensor, prompts: Sequence[str], *, who: str) -> tuple[Tensor, Tensor]:
    """reward.evaluate(images, prompts), each checked to be one float per image; whatever else it raises, a user's own
    reward above all, is a RewardError that names `who`."""
    try:
        score, native = reward.evaluate(images, prompts)
    except Exception as error:
        # torch's checkpoint ends a recomputation that has all it needs by an exception of its own
        if isinstance(error, RewardTuneError) or type(error).__module__ == "torch.utils.checkpoint":
            raise
        batch = len(images)
        raise RewardError(
            f"{who} raised {type(error).__name__}: {error}; legal is (images ({batch}, 3, H, W) in [0, 1], "
            f"{batch} prompt{'s' * (batch > 1)}) -> ({batch},)"
        ) from error
    for values in (score, native):
        check_scores(who, values, batch=len(images))
    return score, native


def leaves(reward: Reward, *, trained: bool = True) -> list[tuple[Reward, bool]]:
    """The rewards that measure something themselves, each once and in order, and whether a gradient is asked of it."""
    if not isinstance(reward, Composition):
        return [(reward, trained)]
    terms = reward.terms if isinstance(reward, Sum) else [(1.0, member) for member in reward.members]
    found: dict[int, tuple[Reward, bool]] = {}
    for weight, part in terms:
        for leaf, wanted in leaves(part, trained=trained and weight != 0):
            found[id(leaf)] = leaf, wanted or found.get(id(leaf), (leaf, False))[1]
    return list(found.values())


def unique_names(rewards: Iterable[Reward]) -> list[str]:
    """Their names in order, made unique: symmetry, symmetry_2, ..."""
    names: list[str] = []
    for reward in rewards:
        name, count = reward.name, 1
        while name in names:
            count += 1
            name = f"{reward.name}_{count}"
        names.append(name)
    return names


def _check_weight(reward: Reward, weight: object) -> None:
    if isinstance(weight, Reward):
        raise ConfigError(
            f"cannot multiply or divide rewards ('{reward.name}' by '{weight.name}'); add them: a + 0.2 * b"
        )
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ConfigError(
            f"the weight of the reward '{reward.name}' is {weight!r}; legal is a finite number such as 0.2"
        )
