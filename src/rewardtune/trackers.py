"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, by the classes of accelerate.tracking.

The first process logs. No tracker ends a run or makes it wait: one that fails is reported once and left out, and nobody
is asked for a login. Left out: TensorBoard's hparams page (flat values only, a folder each time; the settings are a
text there), and pictures in trackio (accelerate has no call for them).
"""

import importlib.util
import json
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from .errors import ConfigError
from .runfolder import TRACKERS, RunFolder, write_text
from .spelling import nearest

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("tensorboard", "wandb", "trackio")  # each also the name of its package and of its extra
PICTURES = 16  # of a look, at most
STATE = "trackers.json"  # the run's name in the trackers, and up to where each of them has logged


def check_installed(names: Sequence[str]) -> None:
    """ConfigError for an unknown tracker, and for one whose package is missing."""
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"log.trackers: {name!r} is unknown{nearest(name, NAMES)}; legal: {', '.join(NAMES)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, as wandb leaves, is no package
            raise ConfigError(
                f"log.trackers: {name} is not installed: pip install 'rewardtune[{name}]', or leave it out"
            )


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name, `parts/NAME` for those of the parts.

    Without the step, which stands beside them, and without what is a list or has an entry for each sampling step.
    """
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    numbers |= {f"parts/{name}": value for name, value in record["parts"].items()}
    return {name: float(value) for name, value in numbers.items()}


@dataclass
class _Open:
    """A started tracker. logged: the last step of its "update"s and of its "look"s."""

    name: str
    tracker: Any
    logged: dict[str, int]


class Trackers:
    """The trackers of one run; a step is the number of updates made.

    names: of NAMES. folder: of the run; only the process that writes it logs. project: in W&B and trackio.
    say: takes a message for the user. Raises ConfigError as `check_installed`.
    """

    def __init__(
        self, names: Sequence[str], *, folder: RunFolder, project: str = "rewardtune", say: Callable[[str], None]
    ):
        check_installed(names)
        self.names = tuple(dict.fromkeys(names)) if folder.writes else ()
        self.folder, self.path, self.project, self.say = folder, folder.path / TRACKERS, project, say
        self.open: list[_Open] = []
        self.state: dict[str, Any] = {}

    def start(self, settings: Mapping[str, Any], *, step: int) -> None:
        """Open them after `step` updates. A run that goes on is the same run in all of them.

        What TensorBoard has of later steps is taken back; the others cannot do that and go on after their last step.
        settings: the resolved run file, logged when the run is new.
        """
        if not self.names:
            return
        from accelerate import PartialState

        PartialState()  # accelerate's loggers refuse to work without it
        file = self.path / STATE
        self.path.mkdir(parents=True, exist_ok=True)
        self.state = {}
        with suppress(OSError, ValueError):  # without it the run has a new name in the trackers
            self.state = dict(json.loads(file.read_text(encoding="utf-8")))
        self.state.setdefault("id", uuid.uuid4().hex[:8])
        for name in self.names:
            before = self.state.get(name)
            logged = dict(before or {"update": -1, "look": -1})
            if name == "tensorboard":
                logged = {kind: min(last, step) for kind, last in logged.items()}
            elif logged["update"] > step:
                self.say(f"{name} has the steps up to {logged['update']} already, and keeps them as they were")
            started = _Open(name, None, logged)
            self.open.append(started)
            with self._survived(started, step), no_questions():
                started.tracker = self._make(name, purge=None if before is None else step + 1)
                started.tracker.start()
                if before is None:
                    _log_settings(started, settings)
        self._remember()

    def _make(self, name: str, *, purge: int | None) -> Any:
        from accelerate import tracking

        run = f"{self.folder.path.resolve().name}-{self.state['id']}"
        if name == "tensorboard":
            self.say(f"TensorBoard: tensorboard --logdir {self.path}")
            tracker: Any = tracking.TensorBoardTracker("tensorboard", logging_dir=str(self.path), purge_step=purge)
        elif name == "wandb":
            mode: dict[str, Any] = {}
            if not wandb_can_log_in():
                mode = {"mode": "offline"}
                self.say(f"wandb: no API key found, so it works offline; later: wandb sync {self.path}/wandb/offline-*")
            resume = {"id": self.state["id"], "resume": "allow", "dir": str(self.path)}
            tracker = tracking.WandBTracker(self.project, name=run, **resume, **mode)
        else:
            from huggingface_hub import get_token

            if os.environ.get("TRACKIO_SPACE_ID") and not get_token():
                raise ConfigError("TRACKIO_SPACE_ID needs a Hugging Face token: hf auth login")  # trackio would ask
            tracker = tracking.TrackioTracker(self.project, name=run, resume="allow")
        return tracker

    def update(self, record: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        values = flatten(record)
        self._log("update", record["step"] + 1, lambda entry, step: entry.tracker.log(values, step=step))

    def look(self, step: int, values: Mapping[str, float], images: "Tensor") -> None:
        """Log the values of an evaluation as eval/NAME, and its first pictures: (N, 3, H, W) in [0, 1]."""
        if not self.open:
            return
        shown = (images[:PICTURES].float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

        def log(entry: _Open, step: int) -> None:
            entry.tracker.log({f"eval/{name}": float(value) for name, value in values.items()}, step=step)
            if hasattr(entry.tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if entry.name == "tensorboard" else {}
                entry.tracker.log_images({"eval/pictures": shown}, step=step, **layout)

        self._log("look", step, log)

    def finish(self) -> None:
        """Close them; those that fail have been reported."""
        while self.open:
            with self._survived(self.open[0]):
                self.open[0].tracker.finish()
            del self.open[:1]

    def _log(self, kind: str, step: int, log: Callable[[_Open, int], None]) -> None:
        behind = [entry for entry in self.open if entry.logged[kind] < step]
        for entry in behind:
            with self._survived(entry, step):
                log(entry, step)
                entry.logged[kind] = step
        if behind:
            self._remember()

    def _remember(self) -> None:
        self.state |= {entry.name: entry.logged for entry in self.open}
        write_text(self.path / STATE, json.dumps(self.state) + "\n")

    @contextmanager
    def _survived(self, entry: _Open, step: int | None = None) -> Iterator[None]:
        """Whatever error a tracker raises is said, and the tracker left out from there on."""
        try:
            yield
        except Exception as error:
            when = "at the end" if step is None else f"at step {step} and is left out from here on"
            self.say(f"{entry.name} failed {when}: {type(error).__name__}: {error}; metrics.jsonl has everything")
            if step is not None:
                self.open.remove(entry)


def _log_settings(entry: _Open, settings: Mapping[str, Any]) -> None:
    if entry.name == "tensorboard":
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        entry.tracker.log({"config": "".join(f"    {line}\n" for line in text.splitlines())}, step=0)  # Markdown: code
    else:
        entry.tracker.store_init_configuration(dict(settings))


@contextmanager
def no_questions() -> Iterator[None]:
    """Whoever asks the user something in here finds no terminal, and no answer."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = stdin


def wandb_can_log_in() -> bool:
    """Whether wandb finds credentials by itself: in its environment variables, or in a netrc file for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(path)).authenticators(host):
                return True
    return False
