"""The fixed eval pictures of a run: sampled, scored and measured at some steps, and held against the rules."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import evaluate, guards
from .errors import ConfigError
from .gradient import asking, check_images, derive_seed, doing
from .guards import Evaluation, Rule, Verdict
from .panel import Panel
from .pictures import by_number
from .processes import Processes
from .progress import with_interval
from .runfolder import RunFolder
from .spelling import nearest
from .stats import mean_interval
from .textcache import TextCache
from .trackers import Trackers

if TYPE_CHECKING:
    from .rewards import Reward

Score = dict[str, tuple[float, float]]  # name -> mean and half the width of its 95% interval over prompts


@dataclass(kw_only=True)
class Watch:
    """Looks at a pipeline by fixed prompts and seeds, dealt out to the processes; remembers every look.

    batch: pictures at a time. best: the metric by which the best step is told; None: no step is better.
    """

    pipe: Any
    reward: "Reward"
    prompts: list[str]
    call: dict[str, Any]
    seed: int
    batch: int
    device: Any
    folder: RunFolder
    processes: Processes
    panel: Panel
    rules: list[Rule]
    best: str | None
    trackers: Trackers
    text: TextCache | None = None  # whose encoders wait on the CPU: they come once for a look
    history: list[Evaluation] = field(default_factory=list)
    base: Tensor | None = None  # (N, 3, H, W), the pictures of step 0

    def check(self) -> None:
        """ConfigError for rules and a best metric that cannot be measured; before anything is sampled."""
        metrics = self.panel.metrics()
        guards.check_rules(self.rules, metrics)
        if self.best is not None and self.best not in metrics:
            raise ConfigError(
                f"checkpoints.best={self.best!r} is not measured{nearest(self.best, metrics)}; legal: "
                f"{', '.join(metrics)}, null"
            )

    def look(self, step: int, *, name: str | None = None, record: bool = True) -> tuple[Score, Tensor]:
        """Pictures to samples/`name` (default: by step), scores and measures to eval.jsonl, unless not to `record`.

        Raises TrainingStopped for NaN and black pictures, and ConfigError at step 0 for rules that would act at once.
        """
        images, values = self._sample_and_score(step)
        if self.base is None:
            self.base = images
        found, error = None, None
        if self.processes.first:
            try:
                with doing(f"step {step}, measuring the eval pictures"):
                    found = self.panel(images, base=self.base, step=step, scores=values)
            except Exception as met:
                error = met
        self.processes.raise_together(error)
        found = self.processes.agree(found)
        assert found is not None
        also = self.panel.held_out
        held_out = {metric: torch.tensor(row) for metric, row in found.pictures.items() if metric in also}
        scores = {metric: mean_interval(value.double().tolist()) for metric, value in (values | held_out).items()}
        if self.processes.first:
            evaluate.save_images(images, self.folder.path / "samples" / (name or f"step-{step:06d}"))
        if record:
            facts = {"step": step, "count": len(images), "scores": scores, "panel": asdict(found)}
            self.folder.append("eval.jsonl", facts)
            self.history.append(found)
            means = {metric: mean for metric, (mean, _) in scores.items()}
            self.trackers.look(step, means | found.values, images)
        if step == 0:
            guards.check_start(self.rules, found)
        return scores, images

    def verdicts(self, *, since: int = 0, last: bool = False) -> list[Verdict]:
        """What the rules say to the latest look; since, last: of `guards.judge`."""
        return guards.judge(self.history, self.rules, best=self.best_step(), since=since, last=last)

    def best_step(self) -> int | None:
        """The step of the best look so far that violates no rule; the first one's, where none is better."""
        if self.best is None:
            return None
        less = self.panel.metrics()[self.best].better == "less"
        return guards.best_of(self.history, self.best, self._binding, less=less)

    def why(self, step: int) -> str:
        """Why the look at `step` is kept and not the latest one, in words."""
        first, latest = self.history[0], self.history[-1]
        crossed = [rule.metric for rule in self._binding if guards.violates(rule, latest, first)]
        if crossed:
            return f"the last look crosses the rule on {', '.join(crossed)}"
        return f"step {step} was better by {self.best}"

    @property
    def _binding(self) -> list[Rule]:
        """The rules that forbid a step to be the best: not those that only warn."""
        return [rule for rule in self.rules if rule.then != "warn"]

    def check_resume(self) -> None:
        """ConfigError where the folder's look at step 0 is not there, or is none that the rules can be held against."""
        path = self.folder.path / "eval.jsonl"
        line, whole, _ = (path.read_text(encoding="utf-8") if path.exists() else "").partition("\n")
        first: dict[str, Any] = json.loads(line) if whole else {"step": None}
        if first["step"] != 0 or len(self._first_pictures()) != len(self.prompts):
            raise ConfigError(
                f"{self.folder.path} cannot be resumed: its first evaluation (eval.jsonl, samples/step-000000 with "
                f"{len(self.prompts)} pictures) is not there; start a new run in another output_dir"
            )
        look = Evaluation(**first["panel"])
        wanted = [*(rule.metric for rule in self.rules), *([] if self.best is None else [self.best])]
        if lacking := [name for name in wanted if name not in look.values]:
            raise ConfigError(
                f"{self.folder.path} cannot be resumed: {lacking[0]} of guards.rules or checkpoints.best was not "
                f"measured at its step 0; legal: {', '.join(look.values)}"
            )
        guards.check_start(self.rules, look)

    def resume(self) -> tuple[Score, Tensor]:
        """Remember what eval.jsonl and samples/ hold; gives the scores and pictures of step 0."""
        from .pictures import open_image

        text = (self.folder.path / "eval.jsonl").read_text(encoding="utf-8")
        lines, files = [json.loads(line) for line in text.splitlines()], self._first_pictures()
        self.history = [Evaluation(**line["panel"]) for line in lines]
        self.base = torch.stack([open_image(file)[0] for file in files])
        return {name: tuple(pair) for name, pair in lines[0]["scores"].items()}, self.base

    def _first_pictures(self) -> list[Path]:
        return sorted((self.folder.path / "samples" / "step-000000").glob("*.png"), key=by_number)

    def _sample_and_score(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices = range(len(self.prompts))
        own = self.processes.mine(indices)
        asked = self.processes.padded(own, indices)
        error: Exception | None = None
        images, values, sampled = torch.empty(0), dict[str, Tensor](), False
        try:
            if asked:
                prompts = [self.prompts[index] for index in asked]
                seeds = [derive_seed(self.seed, "eval", index) for index in asked]
                with doing(f"step {step}, sampling the eval pictures"):
                    if self.text is not None and self.text.answers(self.batch):
                        self.text.fill(prompts)
                    images = evaluate.sample(self.pipe, prompts, seeds=seeds, call=self.call, batch=self.batch)
                sampled, images = True, images[: len(own)]
            if own:
                check_images(images, step)
                with asking(step):
                    values = evaluate.score(
                        self.reward, images, prompts[: len(own)], batch=self.batch, device=self.device
                    )
        except Exception as met:
            if self.processes.sharded and not sampled:  # the others wait in the denoiser, and cannot be told
                raise
            error = met
        self.processes.raise_together(error)
        shares = [share for share in self.processes.gather((images, values)) if len(share[0])]
        dealt = [index for rank in range(self.processes.world) for index in indices[rank :: self.processes.world]]
        order = torch.tensor(dealt).argsort()  # from the order of the processes back to that of the prompts
        names = list(shares[0][1])
        pictures = torch.cat([share[0] for share in shares])[order]
        return pictures, {name: torch.cat([share[1][name] for share in shares])[order] for name in names}


def line(scores: Score) -> str:
    """Scores in one line for people."""
    return ", ".join(f"{name} {with_interval(mean, half)}" for name, (mean, half) in scores.items())
