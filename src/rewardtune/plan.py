"""A plan: which network calls of one sampling chain are trained, and how the gradient reaches them.

Every method of the DRTune paper (Wu et al. 2024) and of its family answers the same questions - where does the chain
start, which calls are trained, where is the gradient stopped, how does the chain end - and nothing else. The answers
are this frozen record; `methods.py` draws it, `engine/` carries it out.

Index law: step ``i = 0 .. T-1`` counts ``scheduler.step`` calls in sampling order, 0 is the noisiest.
The paper counts ``t = T - i``: t = T is the noisiest, t = 1 the last.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewardtune.errors import ConfigError

if TYPE_CHECKING:
    from rewardtune.stretches import Leaps, Rescaled


def check_guidance(conditional_only: bool, factor: float | None) -> None:
    """ConfigError unless these are fields of a plan."""
    if factor is not None and not 0 < factor < float("inf"):
        raise ConfigError(f"the factor of the conditional branch is {factor!r}: legal are numbers above 0, and null")
    if factor is not None and not conditional_only:
        raise ConfigError(f"guidance_factor={factor!r} belongs to conditional_only=True")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One chain of ``T`` scheduler steps, checked when it is made.

    Attributes:
        T: number of ``scheduler.step`` calls of the chain (second-order schedulers have more than inference steps).
        train: steps whose network calls are trained (the gradient reaches the parameters); the paper's ``t_train``.
        input_gradient: 0 detaches the network's input (the paper's ``sg``, eq. 3), 1 back-propagates fully through
            it, a value between scales that gradient.
        end: at this step the chain stops and jumps to x0-hat (the paper's ``t_min``); None runs to the end.
        stops: earlier steps whose x0-hat is judged as well, as if the chain had stopped there; the network's calls are
            made once for all of them. The pictures are those of `end`, then those of each of `stops`, rising.
        start: chains begin at this step from the finished, detached x_0 of a first chain, re-noised; None starts
            from noise. This is DRaFT-LV.
        draws: how many such chains are started, each with fresh noise; 1 unless ``start`` is set.
        linked: trained steps whose input carries ``input_gradient``, the others' being detached; None is all.
        weight: how much each call weighs, by the noise level it stands for (`stretches.py`); None is 1. The reward
            sees the real end of the chain, with the gradient of the path that these weights describe.
        conditional_only: of the branches of classifier-free guidance only the conditional one passes the gradient; the
            others are constants, at the same pictures.
        guidance_factor: what the conditional branch's gradient is multiplied by then. None compensates for the weight w
            that guidance gives to it (1 / w), so it counts as much as both branches together do; 1 leaves w in it.
        known_noise: x_0 is re-noised with the chain's own first noise (fresh noise after a chain that began with a
            picture), which is thus known; at ``end`` the sampler
            takes its step, and what noise is left is taken off exactly. The reward sees that (Direct-Align).

    Raises:
        ConfigError: if a field is out of range or no trained step would run.
    """

    T: int
    train: frozenset[int]
    input_gradient: float = 0.0
    end: int | None = None
    stops: frozenset[int] = frozenset()
    start: int | None = None
    draws: int = 1
    linked: frozenset[int] | None = None
    weight: "Leaps | Rescaled | None" = None
    known_noise: bool = False
    conditional_only: bool = False
    guidance_factor: float | None = None

    def __post_init__(self) -> None:
        T = self.T
        if T < 1:
            raise ConfigError(f"a plan needs T >= 1 steps, got T={T}")
        if not 0.0 <= self.input_gradient <= 1.0:
            raise ConfigError(
                f"input_gradient={self.input_gradient} is outside 0 (input detached) .. 1 (full back-propagation)"
            )
        for name, step in (("end", self.end), ("start", self.start)):
            if step is not None and not 0 <= step < T:
                raise ConfigError(f"{name}={step} is not a step of this chain: legal are 0 .. {T - 1} (T={T})")
        wrong = sorted(i for i in self.stops if not min(self.train, default=T) <= i < self.last)
        if wrong:
            raise ConfigError(
                f"stops {wrong} are no stops of this chain: each comes before its last step {self.last}, "
                f"with a trained step at or before it; train={sorted(self.train)}"
            )
        if self.stops and (self.start is not None or self.weight is not None):
            raise ConfigError("stops need a chain from noise (start=None) without weight")
        if self.start == 0:
            raise ConfigError(f"start=0 leaves no step before the re-noised x_0: legal are 1 .. {T - 1}")
        if self.draws < 1 or (self.draws > 1 and self.start is None):
            raise ConfigError(f"draws={self.draws}: at least 1, and more than 1 only together with start")
        outside = sorted(i for i in self.train if not 0 <= i < T)
        if outside:
            raise ConfigError(f"trained steps {outside} are not steps of this chain: legal are 0 .. {T - 1} (T={T})")
        if self.linked is not None and not self.linked <= self.train:
            raise ConfigError(f"linked={sorted(self.linked)} are not all trained: train={sorted(self.train)}")
        if self.weight is not None and (self.end is not None or self.start is not None):
            raise ConfigError(f"weight needs a whole chain from noise: given start={self.start}, end={self.end}")
        if self.known_noise and (self.start is None or self.end is None):
            raise ConfigError(f"known_noise needs a start and an end: given start={self.start}, end={self.end}")
        check_guidance(self.conditional_only, self.guidance_factor)
        if not self.executed:
            raise ConfigError(
                f"no trained step would run: train={sorted(self.train)}, start={self.start}, end={self.end}, T={T}"
            )

    @property
    def needs_levels(self) -> bool:
        """Whether the noise levels of single steps matter, which only plain samplers have (`prediction.span`)."""
        return self.weight is not None or self.known_noise

    @property
    def needs_prediction(self) -> bool:
        """Whether the reward sees an x0-hat of the sampler's."""
        return (self.end is not None and not self.known_noise) or bool(self.stops)

    @property
    def pictures(self) -> int:
        """How many pictures a prompt gets."""
        return self.draws * (1 + len(self.stops))

    @property
    def last(self) -> int:
        """The last step that runs."""
        return self.T - 1 if self.end is None else self.end

    @property
    def executed(self) -> tuple[int, ...]:
        """Trained steps that really run, in sampling order: early stop cuts off those after ``end``."""
        first = self.start or 0
        return tuple(sorted(i for i in self.train if first <= i <= self.last))

    def gradient_into(self, step: int) -> float:
        """The share of the gradient that goes on through the input of this step's call."""
        return self.input_gradient if self.linked is None or step in self.linked else 0.0

    @property
    def steps_run(self) -> int:
        """Steps of which the network is evaluated while sampling, the first chain of a DRaFT-LV plan included."""
        if self.start is None:
            return self.last + 1
        return self.T + self.draws * (self.last - self.start + 1)

    def draw(self) -> str:
        """The chain as text, noise on the left: ``.`` sampled, ``#`` trained, ``>`` jump to x0-hat, ``-`` never runs.

        ``@`` is trained with a linked input, where only some are; ``=`` is a step that a leap crosses.
        With ``start`` set, ``~`` marks the steps of the first chain that the re-noised ones do not repeat.
        """
        trained, first = set(self.executed), self.start or 0
        leaps = getattr(self.weight, "leaps", ())
        idle = "=" if leaps else "."
        begin = leaps[0].supports[0] if leaps else 0
        cells = "".join(
            "~"
            if i < first
            else "-"
            if i > self.last
            else "@"
            if i in (self.linked or ())
            else "#"
            if i in trained
            else "."
            if i < begin
            else idle
            for i in range(self.T)
        )
        for step in sorted({*self.stops, *([] if self.end is None else [self.end])}, reverse=True):
            cells = cells[: step + 1] + ">" + cells[step + 1 :]
        return f"|{cells}|" + (f" x{self.draws}" if self.draws > 1 else "")
