"""RewardTuner: check, then gradient (`gradient.py`) -> clip -> AdamW -> log, then save and compare before with after.

Thin on purpose: no base class, no callbacks.
Left out so far: several processes, resume, learning-rate schedules, regularisers.
"""

import inspect
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from . import adapters, evaluate
from .engine import count_steps, find_denoiser, preflight, quiet
from .errors import ConfigError, RewardTuneError, TrainingStopped
from .gradient import Gradient, check_images, derive_seed
from .methods import Method
from .progress import Progress, with_interval
from .prompts import load_prompts
from .rewards import check_reward
from .rewards.base import as_reward
from .runfolder import RunFolder, write_text
from .workers import Workers, open_workers, refuse_workers

Score = dict[str, tuple[float, float]]  # name -> mean and half the width of its 95% interval over prompts


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `train` gives back: `status` is "done" or "out of time"; scores and pictures of the eval prompts."""

    status: str
    steps: int
    seconds: float
    before: Score
    after: Score
    before_images: Tensor = field(repr=False)  # (N, 3, H, W) in [0, 1], on the CPU
    after_images: Tensor = field(repr=False)
    folder: Path


class RewardTuner:
    """Tune `pipe` by LoRA to give pictures that `reward` likes. The pipeline itself stays usable, tuned.

    Args:
        pipe: any diffusers text-to-image pipeline.
        reward: callable (images (B, 3, H, W) in [0, 1], prompts) -> scores (B,), higher is better.
        method: a Method of `rewardtune.methods`, e.g. `methods.drtune(K=5, m=20)`.
        prompts: a .txt file, a list of str, or `playground:train`.
        output_dir: folder of the run; a non-empty one is refused unless `overwrite`.
        num_inference_steps, guidance_scale, height, width, call: sampling, `call` being further arguments of
            `pipe(...)`; None leaves the pipeline's default.
        rank, alpha, targets: see `adapters.add_lora`.
        batch: samples an update; micro_batch: how many of them at a time (None = all).
        offload_reward: the reward's networks wait on the CPU while the denoiser samples and is replayed.
        workers: processes that share an update's micro-batches; only for small models on a CPU (see `workers.py`).
        eval_prompts, eval_count: the fixed pictures of the before/after comparison; None = the first prompts.
        allow_no_guidance: permit guidance_scale <= 1 on a pipeline made for guidance.

    Raises ConfigError at once for wrong settings; `train` raises PreflightError, RewardError, TrainingStopped.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        reward: Callable,
        method: Method,
        prompts: str | Path | Sequence[str],
        output_dir: str | Path,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        call: dict[str, Any] | None = None,
        rank: int = 128,
        alpha: int | None = None,
        targets: str | list[str] | None = None,
        batch: int = 32,
        micro_batch: int | None = None,
        workers: int = 1,
        offload_reward: bool = False,
        seed: int = 0,
        eval_prompts: str | Path | Sequence[str] | None = None,
        eval_count: int = 16,
        allow_no_guidance: bool = False,
        overwrite: bool = False,
        show_progress: bool = True,
    ):
        self.pipe, self.method, self.seed, self.show_progress = pipe, method, seed, show_progress
        self.reward = as_reward(reward, action="train on it")
        self.prompts = load_prompts(prompts)
        held_out = self.prompts if eval_prompts is None else load_prompts(eval_prompts)
        self.eval_prompts = held_out[:eval_count]
        self.folder = RunFolder(output_dir, overwrite=overwrite)
        sampling = {"guidance_scale": guidance_scale, "height": height, "width": width}
        self.call = {"num_inference_steps": num_inference_steps} | (call or {})
        self.call |= {name: value for name, value in sampling.items() if value is not None}
        ours = sorted(self.call.keys() & {"prompt", "generator", "num_images_per_prompt", "output_type", "return_dict"})
        if ours:
            raise ConfigError(f"call holds {', '.join(ours)}, which the trainer sets itself: leave it out")
        if eval_count < 1:
            raise ConfigError(f"eval_count={eval_count}: at least 1 picture is compared before and after")
        check_sampling(pipe, self.call, allow_no_guidance=allow_no_guidance)
        if min(batch, micro_batch or 1, workers) < 1:
            raise ConfigError(f"batch={batch}, micro_batch={micro_batch}, workers={workers}: each must be at least 1")
        self.batch, self.workers, self.offload_reward = batch, workers, offload_reward
        self.micro_batch = min(micro_batch or batch, math.ceil(batch / workers))
        self.lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": targets}
        self.denoiser = getattr(pipe, find_denoiser(pipe))
        self.device = self.denoiser.device
        refuse_workers(workers, self.device.type)
        self.parameters: list[torch.nn.Parameter] = []
        self.step, self.saved, self.T = 0, 0, 0
        self.config_text: str | None = None  # the run file, resolved; saved as config.yaml

    def train(
        self,
        steps: int,
        *,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 0.1,
        max_seconds: float | None = None,
        eval_every: int | None = None,
    ) -> Result:
        """Make `steps` updates (fewer when `max_seconds` is over), save the LoRA, and give the scores before and after.

        lr, betas, weight_decay: AdamW; clip: largest gradient norm; eval_every: pictures and scores every so often.
        The first Ctrl-C or SIGTERM finishes the update, saves and leaves (KeyboardInterrupt, SystemExit(143)).
        Raises TrainingStopped on a NaN, on black pictures, or when no gradient arrives; the last good LoRA is saved.
        """
        for name, value in {"steps": steps, "lr": lr, "clip": clip}.items():
            if not value > 0:
                raise ConfigError(f"{name}={value}: must be greater than 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            raise ConfigError(f"betas={betas}, weight_decay={weight_decay}: two betas in 0 .. 1 (below 1), decay >= 0")
        with quiet(self.pipe) as set_aside:
            self._prepare(set_aside)
            settings = {"steps": steps, "lr": lr, "betas": betas, "weight_decay": weight_decay, "clip": clip}
            self.folder.set_status("running", train=settings | {"batch": self.batch, "max_seconds": max_seconds})
            optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay)
            with _Signals() as signals:
                try:
                    before, before_images = self._evaluate()
                    started = time.perf_counter()
                    status = self._loop(optimizer, steps, clip, max_seconds, eval_every, signals)
                    seconds = time.perf_counter() - started
                    self._save(status, seconds=round(seconds, 1))
                    if signals.caught is None:
                        after, after_images = self._evaluate(final=True)
                        self._grid(before, after, before_images, after_images)
                        self.folder.set_status(status, after=after)
                except BaseException as error:
                    self._rescue(error)
                    raise
            signals.leave(self.folder.path)
        return Result(
            status=status,
            steps=self.step,
            seconds=seconds,
            before=before,
            after=after,
            before_images=before_images,
            after_images=after_images,
            folder=self.folder.path,
        )

    def _prepare(self, set_aside: list[str]) -> None:
        """Once: every check that can refuse the run before it costs anything, then the folder."""
        if self.parameters:
            return
        try:
            self.parameters = adapters.add_lora(self.denoiser, seed=self.seed, **self.lora)
            call = evaluate.for_prompts(self.prompts[:1], self.call)
            self.T = count_steps(self.pipe, **call)
            plans = [self.method(self.T, random.Random(draw)) for draw in range(8)]  # refuses K > T and m > T
            stops = any(plan.end is not None for plan in plans)
            facts = preflight(self.pipe, early_stop=stops, **call)
            picture = evaluate.sample(self.pipe, self.prompts[:1], seeds=[0], call=self.call)
            height, width = picture.shape[-2:]
            check_reward(self.reward, size=(height, width), prompts=self.prompts[:2], device=self.device)
            self.folder.open()
            if self.config_text is not None:
                write_text(self.folder.path / "config.yaml", self.config_text)
            self.folder.set_status("running", **self._describe(), notes=facts.notes)
        except BaseException:
            if self.parameters:
                self.denoiser.unload_lora()  # hand the pipeline back as it came
                self.parameters = []
            raise
        for line in [*facts.notes, *(f"{name} set aside while training" for name in set_aside)]:
            self._say(line)

    def _describe(self) -> dict[str, Any]:
        name = getattr(self.pipe.config, "_name_or_path", None) if hasattr(self.pipe, "config") else None
        return {
            "pipeline": type(self.pipe).__name__,
            "model": None if name is None else str(name),
            "scheduler": type(self.pipe.scheduler).__name__,
            "reward": str(getattr(self.reward, "name", self.reward)),
            "method": str(self.method),
            "T": self.T,
            "call": {key: value for key, value in self.call.items() if isinstance(value, int | float | str)},
            "lora": self.lora | {"parameters": sum(p.numel() for p in self.parameters)},
            "prompts": len(self.prompts),
            "seed": self.seed,
        }

    def _loop(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        clip: float,
        max_seconds: float | None,
        eval_every: int | None,
        signals: "_Signals",
    ) -> str:
        """The updates; gives why they ended: done, out of time, interrupted."""
        started = time.perf_counter()
        gradient = Gradient(
            pipe=self.pipe,
            reward=self.reward,
            method=self.method,
            prompts=self.prompts,
            parameters=self.parameters,
            T=self.T,
            seed=self.seed,
            batch=self.batch,
            micro_batch=self.micro_batch,
            call=self.call,
            offload_reward=self.offload_reward,
        )
        bar = Progress(steps, max_seconds=max_seconds, enabled=self.show_progress)
        with open_workers(gradient, self.workers) as team, bar as progress:
            for done in range(1, steps + 1):
                record = self._update(team, optimizer, clip)
                self.step += 1
                self.folder.append("metrics.jsonl", record)
                progress.update(record)
                if signals.caught:
                    return "interrupted"
                elapsed = time.perf_counter() - started
                if max_seconds is not None and elapsed + elapsed / done > max_seconds and done < steps:
                    return "out of time"
                if eval_every and done % eval_every == 0 and done < steps:
                    adapters.save_lora(self.pipe, self.folder.path)
                    scores, _ = self._evaluate()
                    progress.message(f"step {self.step}: {_line(scores)}")
        return "done"

    def _update(self, gradient: Workers, optimizer: torch.optim.Optimizer, clip: float) -> dict[str, Any]:
        """One update: the gradient is the mean over the whole batch, gathered over micro-batches of one plan."""
        started, step = time.perf_counter(), self.step
        optimizer.zero_grad(set_to_none=True)
        parts = gradient.compute(step)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        if not math.isfinite(norm) or norm == 0:
            what = "is zero: the reward does not reach the trained parameters" if norm == 0 else f"is {norm}"
            raise TrainingStopped(
                f"step {step}: the gradient {what}; try a lower lr or another dtype, or check the reward"
            )
        optimizer.step()
        plan = gradient.gradient.plan(step)
        means = {name: float(torch.cat([part.scores[name] for part in parts]).mean()) for name in parts[0].scores}
        return {
            "step": step,
            "reward": means["reward"],
            "parts": {name: means[name] for name in parts[0].natives},
            "loss": -means["reward"],
            "grad_norm": norm,
            "clipped": norm > clip,
            # with micro-batches: the sum of their norms, an upper bound of the norm of the sum
            "step_grad_norms": {i: sum(part.sweep.grad_norms.get(i, 0.0) for part in parts) for i in plan.executed},
            "trained": list(plan.executed),
            "end": plan.end,
            "steps_run": plan.steps_run,
            "seconds": time.perf_counter() - started,
            "images": (step + 1) * self.batch,
            "lr": optimizer.param_groups[0]["lr"],
            "replay_error": max(part.sweep.replay_error for part in parts),
            "clamped": sum(part.size * part.sweep.clamped for part in parts) / self.batch,
        }

    def _evaluate(self, *, final: bool = False) -> tuple[Score, Tensor]:
        """Fixed prompts and seeds: pictures to samples/, scores to eval.jsonl."""
        seeds = [derive_seed(self.seed, "eval", index) for index in range(len(self.eval_prompts))]
        images = evaluate.sample(self.pipe, self.eval_prompts, seeds=seeds, call=self.call, batch=self.micro_batch)
        check_images(images, self.step)
        values = evaluate.score(self.reward, images, self.eval_prompts, batch=self.micro_batch, device=self.device)
        scores = {name: evaluate.interval(value) for name, value in values.items()}
        evaluate.save_images(images, self.folder.path / "samples" / ("final" if final else f"step-{self.step:06d}"))
        self.folder.append("eval.jsonl", {"step": self.step, "count": len(images), "scores": scores})
        if self.step == 0 and not final:
            self.folder.set_status("running", before=scores)
            self._say(f"before: {_line(scores)}")
        return scores, images

    def _grid(self, before: Score, after: Score, before_images: Tensor, after_images: Tensor) -> None:
        shown = slice(0, 12)
        path = self.folder.path / "before_after.png"
        pictures = {"before": before_images[shown], "after": after_images[shown]}
        evaluate.save_grid(pictures, self.eval_prompts[shown], path)
        self._say(f"after:  {_line(after)}")
        self._say(f"pictures before and after: {path}")

    def _save(self, status: str, **facts: Any) -> None:
        """The LoRA file, loaded back and compared; one that fails is kept under a name that no loader reads."""
        self.saved = self.step
        path = adapters.save_lora(self.pipe, self.folder.path)
        short = self.call | {"num_inference_steps": min(2, self.call["num_inference_steps"])}
        call = evaluate.for_prompts(self.eval_prompts[:1], short)
        try:
            difference = adapters.verify_lora(self.pipe, self.folder.path, call=call)
        except RewardTuneError:
            path.replace(path.with_suffix(".unverified"))
            raise
        self._say(f"saved {path}, verified (loaded back: pictures differ by {difference:.1e})")
        self.folder.set_status(status, steps=self.step, lora_verified=True, **facts)

    def _rescue(self, error: BaseException) -> None:
        """An error ends the run: the parameters are those of the last good update, save them and say why."""
        status = {TrainingStopped: "stopped", KeyboardInterrupt: "interrupted"}.get(type(error), "failed")
        with suppress(Exception):  # the first error is the one to report
            if self.step > self.saved and status != "interrupted":  # a second Ctrl-C means at once
                adapters.save_lora(self.pipe, self.folder.path)
                self._say(f"the LoRA after {self.step} good updates is in {self.folder.path}")
        with suppress(Exception):
            self.folder.set_status(status, steps=self.step, error=str(error) or type(error).__name__)

    def _say(self, line: str) -> None:
        self.folder.log(line)
        if self.show_progress:
            print(line, flush=True)


class _Signals:
    """Ctrl-C and SIGTERM: the first is noted (the update finishes, the LoRA is saved), the second acts at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def _note(self, number: int, _frame: object) -> None:
        self.caught = number
        self.__exit__()
        print("stopping: this update is finished and saved first (again to stop at once)", flush=True)

    def leave(self, folder: Path) -> None:
        if self.caught is not None:
            print(f"interrupted; the LoRA so far is in {folder}", flush=True)
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self.caught == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)


def check_sampling(pipe: Any, call: dict[str, Any], *, allow_no_guidance: bool) -> None:
    """ConfigError for guidance off on a pipeline made for it: users would sample the tuned model with guidance."""
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    default = parameter.default if parameter is not None and isinstance(parameter.default, int | float) else 0.0
    scale = call.get("guidance_scale", default)
    if default > 1 and scale <= 1 and not allow_no_guidance:
        raise ConfigError(
            f"guidance_scale={scale} switches classifier-free guidance off, but {type(pipe).__name__} uses {default} "
            "by default: the tuned model would be used with guidance it never saw. Set guidance_scale above 1, "
            "or sampling.allow_no_guidance=true if the model is made for it (turbo, lightning)"
        )


def _line(scores: Score) -> str:
    return ", ".join(f"{name} {with_interval(mean, half)}" for name, (mean, half) in scores.items())
