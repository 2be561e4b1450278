"""A plan: which network calls of one sampling chain are trained, and how the gradient reaches them.

Every method of the DRTune paper (Wu et al. 2024) and of its family answers the same questions - where does the chain
start, which calls are trained, where is the gradient stopped, how does the chain end - and nothing else. The answers
are this frozen record; `methods.py` draws it, `engine/` carries it out.

Index law: step ``i = 0 .. T-1`` counts ``scheduler.step`` calls in sampling order, 0 is the noisiest.
The paper counts ``t = T - i``: t = T is the noisiest, t = 1 the last.
"""

from dataclasses import dataclass

from rewardtune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One chain of ``T`` scheduler steps, checked when it is made.

    Attributes:
        T: number of ``scheduler.step`` calls of the chain (second-order schedulers have more than inference steps).
        train: steps whose network calls are trained (the gradient reaches the parameters); the paper's ``t_train``.
        input_gradient: 0 detaches the network's input (the paper's ``sg``, eq. 3), 1 back-propagates fully through
            it, a value between scales that gradient.
        end: at this step the chain stops and jumps to x0-hat (the paper's ``t_min``); None runs to the end.
        start: chains begin at this step from the finished, detached x_0 of a first chain, re-noised; None starts
            from noise. This is DRaFT-LV.
        draws: how many such chains are started, each with fresh noise; 1 unless ``start`` is set.

    Raises:
        ConfigError: if a field is out of range or no trained step would run.
    """

    T: int
    train: frozenset[int]
    input_gradient: float = 0.0
    end: int | None = None
    start: int | None = None
    draws: int = 1

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
        if self.start == 0:
            raise ConfigError(f"start=0 leaves no step before the re-noised x_0: legal are 1 .. {T - 1}")
        if self.draws < 1 or (self.draws > 1 and self.start is None):
            raise ConfigError(f"draws={self.draws}: at least 1, and more than 1 only together with start")
        outside = sorted(i for i in self.train if not 0 <= i < T)
        if outside:
            raise ConfigError(f"trained steps {outside} are not steps of this chain: legal are 0 .. {T - 1} (T={T})")
        if not self.executed:
            raise ConfigError(
                f"no trained step would run: train={sorted(self.train)}, start={self.start}, end={self.end}, T={T}"
            )

    @property
    def last(self) -> int:
        """The last step that runs."""
        return self.T - 1 if self.end is None else self.end

    @property
    def executed(self) -> tuple[int, ...]:
        """Trained steps that really run, in sampling order: early stop cuts off those after ``end``."""
        first = self.start or 0
        return tuple(sorted(i for i in self.train if first <= i <= self.last))

    @property
    def steps_run(self) -> int:
        """Steps of which the network is evaluated while sampling, the first chain of a DRaFT-LV plan included."""
        if self.start is None:
            return self.last + 1
        return self.T + self.draws * (self.last - self.start + 1)

    def draw(self) -> str:
        """The chain as text, noise on the left: ``.`` sampled, ``#`` trained, ``>`` jump to x0-hat, ``-`` never runs.

        With ``start`` set, ``~`` marks the steps of the first chain that the re-noised ones do not repeat.
        """
        trained, first = set(self.executed), self.start or 0
        cells = "".join(
            "~" if i < first else "-" if i > self.last else "#" if i in trained else "." for i in range(self.T)
        )
        if self.end is not None:
            cells = cells[: self.end + 1] + ">" + cells[self.end + 1 :]
        return f"|{cells}|" + (f" x{self.draws}" if self.draws > 1 else "")
