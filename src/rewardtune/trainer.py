"""RewardTuner: check, then gradient (`gradient.py`) -> clip -> update (`state.py`); look, judge (`watch.py`), save.

Thin on purpose: no base class, no callbacks. All processes of a run do the same; the first one writes and speaks.
"""

import inspect
import math
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from . import adapters, checkpoint, evaluate, guards, sharding
from .config import Checkpoints, Guards, Log, Regularize, section
from .engine import count_steps, find_denoiser, preflight, quiet
from .engine.call import check_reference
from .engine.chain import few_steps
from .engine.preflight import asked_of
from .errors import BrokenPictures, ConfigError, RewardTuneError, TrainingStopped, first_line, out_of_memory
from .gradient import Gradient, doing
from .listing import versions
from .methods import Method
from .models import offloaded_vae
from .panel import Panel
from .processes import join
from .progress import Progress
from .prompts import OURS, Conditioned, check_argument, digests, load_prompts
from .regularize import Denoising, DenoisingLoss
from .report.live import LiveReport
from .rewards import check_reward
from .rewards.base import Reward, as_reward
from .runfolder import DENOISER_FOLDER, DENOISING_FILE, LORA_FILE, RunFolder, storable, write_text
from .state import TrainingState
from .textcache import TextCache, cached_text
from .trackers import Trackers
from .watch import Score, Watch, line

ROLLBACKS = 2  # the third stops the run
FLAT = 10  # so many updates in a row without a gradient stop it


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
    """Tune `pipe` to give pictures that `reward` likes. The pipeline itself stays usable, tuned.

    Args:
        pipe: any diffusers text-to-image pipeline.
        reward: callable (images (B, 3, H, W) in [0, 1], prompts) -> scores (B,), higher is better.
        method: a Method of `rewardtune.methods`, e.g. `methods.drtune(K=5, m=20)`.
        prompts: a list of str, or any source of docs/prompts.md.
        output_dir: folder of the run; a non-empty one is refused unless `overwrite` or `resume`.
        num_inference_steps, guidance_scale, height, width, call: sampling, `call` being further arguments of
            `pipe(...)`; None leaves the pipeline's default.
        kind, rank, alpha, targets: lora, dora or full; see `adapters.attach`.
        batch: samples an update, over all processes; micro_batch: how many of them at a time (None = all).
        offload: what waits on the CPU while the denoiser works: "text_encoders", "vae", "reward".
        cache_text: encode each prompt once.
        recompute: see `rollout`; False keeps the graphs of all trained steps: faster, more memory.
        shard: each of several processes holds a share of the denoiser's frozen weights; "node": of a copy for each
            machine (sharding.py).
        regularize, guards, checkpoints, log: the run file's sections of these names, as mappings;
            `guards["rewards"]` may also be a reward.
        eval_prompts, eval_count: the fixed pictures of the before/after comparison; None = the first prompts.
        allow_no_guidance: permit guidance_scale <= 1 on a pipeline made for guidance.
        resume: "latest", a step or a path: go on from that checkpoint of the run in `output_dir`.

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
        kind: str = "lora",
        rank: int = 128,
        alpha: int | None = None,
        targets: str | list[str] | None = None,
        batch: int = 32,
        micro_batch: int | None = None,
        offload: Sequence[str] = (),
        cache_text: bool = True,
        recompute: bool = True,
        shard: bool | Literal["node"] = False,
        regularize: Mapping[str, Any] | Regularize | None = None,
        guards: Mapping[str, Any] | None = None,
        checkpoints: Mapping[str, Any] | Checkpoints | None = None,
        log: Mapping[str, Any] | Log | None = None,
        seed: int = 0,
        eval_prompts: str | Path | Sequence[str] | None = None,
        eval_count: int = 16,
        allow_no_guidance: bool = False,
        overwrite: bool = False,
        resume: str | int | Path | None = None,
        show_progress: bool = True,
    ):
        self.pipe, self.method, self.seed = pipe, method, seed
        self.reward = as_reward(reward, action="train on it")
        self.prompts = load_prompts(prompts)
        held_out = self.prompts if eval_prompts is None else load_prompts(eval_prompts)
        self.eval_prompts = held_out[:eval_count]
        self.processes, self.resume = join(), resume
        self.folder = RunFolder(output_dir, overwrite=overwrite, resume=resume is not None, writes=self.processes.first)
        sampling = {"guidance_scale": guidance_scale, "height": height, "width": width}
        self.call = {"num_inference_steps": num_inference_steps} | (call or {})
        self.call |= {name: value for name, value in sampling.items() if value is not None}
        ours = sorted(self.call.keys() & OURS)
        if ours:
            raise ConfigError(f"call holds {', '.join(ours)}, which the trainer sets itself: leave it out")
        if eval_count < 1:
            raise ConfigError(f"eval_count={eval_count}: at least 1 picture is compared before and after")
        check_sampling(pipe, self.call, allow_no_guidance=allow_no_guidance)
        check_columns(pipe, self.call, self.prompts, self.eval_prompts)
        if min(batch, micro_batch or 1) < 1:
            raise ConfigError(f"batch={batch}, micro_batch={micro_batch}: each must be at least 1")
        if batch < self.processes.world:
            raise ConfigError(f"batch={batch}: {self.processes.world} processes need at least one sample each")
        unknown = [word for word in offload if word not in ("text_encoders", "vae", "reward")]
        if unknown or ("text_encoders" in offload and not cache_text):
            what = f"{unknown[0]!r} is unknown" if unknown else "text_encoders needs cache_text"
            raise ConfigError(f"offload={list(offload)}: {what}; legal: text_encoders, vae, reward")
        self.batch, self.offload, self.cache_text, self.recompute = batch, tuple(offload), cache_text, recompute
        self.show_progress = show_progress and self.processes.first
        self.micro_batch = min(micro_batch or batch, math.ceil(batch / self.processes.world))
        if shard and self.processes.world > 1:
            if kind != "lora":
                raise ConfigError(f"shard=True does not go with kind={kind!r}: use lora, or shard=False")
            if not recompute:
                raise ConfigError("shard=True does not go with recompute=False: a graph would need the whole weights")
            sharding.check_even(batch, self.micro_batch, self.processes.world)
            self._sharers = sharding.sharers(shard, self.processes.world)
            self.processes = replace(self.processes, sharded=True)
        self.adapter: dict[str, Any] = {"kind": kind, "rank": rank, "alpha": alpha, "targets": targets}
        self.regularize = section(Regularize, regularize, "regularize")
        self.checkpoints = section(Checkpoints, checkpoints, "checkpoints")
        self.denoiser = getattr(pipe, find_denoiser(pipe))
        self.device = sharding.home(pipe, self.denoiser) if self.processes.sharded else self.denoiser.device
        logs = section(Log, log, "log")
        self.trackers = Trackers(logs.trackers, folder=self.folder, project=logs.project, say=self._say)
        self.report = LiveReport(self.folder, enabled=logs.report, say=self._say)
        if guards is not None and not isinstance(guards, Mapping):
            raise ConfigError(f"guards={guards!r}: give a mapping with rewards, features, rules")
        self.watch = self._watch(dict(guards or {}))
        self.text: TextCache | None = None
        self.parameters: list[torch.nn.Parameter] = []
        self.denoising: DenoisingLoss | None = None
        self.step, self.saved, self.T, self.rollbacks, self.rolled_back_at = 0, 0, 0, 0, 0
        self.kept: int | None = None  # the step whose weights are kept, where that is not the last one
        self.stop: str | None = None  # why a guard ends the run
        self.flat = 0  # updates in a row without a gradient
        self.torn = False  # the weights are those of no step
        self.settings: dict[str, Any] = {}  # the run file, resolved; what a resume compares
        self.config_text: str | None = None  # the same as YAML; saved as config.yaml

    def _watch(self, given: dict[str, Any]) -> Watch:
        """The eval pictures with their panel and rules; ConfigError for what cannot be watched."""
        from .diversity import Features
        from .launch import make_reward

        held_out = given.pop("rewards", None)
        settings = section(Guards, given | ({"rewards": held_out} if isinstance(held_out, list) else {}), "guards")
        rewards: Reward | None = make_reward(settings.rewards) if settings.rewards else None
        if held_out is not None and not isinstance(held_out, list):
            rewards = as_reward(held_out, action="guard with it")
        panel = Panel(
            prompts=self.eval_prompts,
            rewards=rewards,
            trained=self.reward,
            features=Features(settings.features) if settings.features else None,
            batch=self.micro_batch,
            device=self.device,
        )
        watch = Watch(
            pipe=self.pipe,
            reward=self.reward,
            prompts=self.eval_prompts,
            call=self.call,
            seed=self.seed,
            batch=self.micro_batch,
            device=self.device,
            folder=self.folder,
            processes=self.processes,
            panel=panel,
            rules=guards.make_rules([rule.model_dump() for rule in settings.rules]),
            best=self.checkpoints.best,
            trackers=self.trackers,
        )
        watch.check()
        if watch.best is None and any(rule.then == "rollback" for rule in watch.rules):
            raise ConfigError(
                "guards.rules: rollback needs a best checkpoint, and checkpoints.best is null: name a metric"
            )
        return watch

    def train(
        self,
        steps: int,
        *,
        lr: float = 2e-5,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 0.1,
        schedule: str = "constant",
        warmup: int = 0,
        ema: float | None = None,
        max_seconds: float | None = None,
        eval_every: int | None = None,
    ) -> Result:
        """Make `steps` updates (fewer when `max_seconds` is over), save, and give the scores before and after.

        A second call makes `steps` more, with an optimiser of its own; a resumed run makes the rest of `steps`.
        lr, optimizer, betas, weight_decay, schedule, warmup, ema: see optimizers.py; clip: largest gradient norm;
        eval_every: pictures, scores and rules every so often. With it, the best look is what is kept at the end
        (`checkpoints`).
        The first Ctrl-C or SIGTERM finishes the update, saves and leaves (KeyboardInterrupt, SystemExit(143)).
        Raises TrainingStopped on a NaN, on black pictures, when the memory does not suffice, when the reward has been
        flat (a satisfied hinge) at all pictures of 10 updates in a row,
        or when a guard says so; the last good weights are saved: those of the best look, if the pictures are broken.
        """
        for name, value in {"steps": steps, "lr": lr, "clip": clip}.items():
            if not value > 0:
                raise ConfigError(f"{name}={value}: must be greater than 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
            raise ConfigError(f"betas={betas}, weight_decay={weight_decay}: two betas in 0 .. 1 (below 1), decay >= 0")
        if self.watch.rules and not eval_every:
            raise ConfigError("guards.rules are judged at evaluations, and there are none: set eval_every, e.g. 50")
        moves: dict[str, Any] = {
            "steps": steps,
            "lr": lr,
            "optimizer": optimizer,
            "betas": list(betas),
            "weight_decay": weight_decay,
        }
        moves |= {"schedule": schedule, "warmup": warmup, "ema": ema}
        TrainingState(torch.nn.Linear(1, 1, device=self.device), **moves)  # refuses what cannot be, before all else
        with _memory_named(), ExitStack() as stack:
            set_aside = stack.enter_context(quiet(self.pipe))
            self.text = stack.enter_context(cached_text(self.pipe)) if self.cache_text else None
            self.watch.text = self.text if "text_encoders" in self.offload else None
            if "vae" in self.offload:
                stack.enter_context(offloaded_vae(self.pipe))
            optim = moves | {"clip": clip, "batch": self.batch}
            found = self._prepare(set_aside, optim)
            state = TrainingState(self.denoiser, **moves)
            stack.callback(self.trackers.finish)
            settings = self._settings(optim)
            self.stop = self.kept = None
            for stale in ("error", "kept_step", "after", "lora_verified", "seconds"):  # of an earlier end
                self.folder.status.pop(stale, None)
            self.folder.set_status("running", train=optim | {"max_seconds": max_seconds})
            with _Signals(speaks=self.processes.first) as signals:
                try:
                    before, before_images = self._begin(state, found, settings)
                    started = time.perf_counter()
                    last = (0 if found is not None else self.step) + steps
                    status = self._loop(state, settings, last, clip, max_seconds, eval_every, signals)
                    seconds = time.perf_counter() - started
                    if status != "interrupted":
                        after, after_images = self._finish(state, status, bool(eval_every), before, before_images)
                    self._save(state, status, seconds=round(seconds, 1))
                    if status != "interrupted":
                        self.folder.set_status(status, after=after)
                        state.settle()
                    if self.stop is not None:
                        raise TrainingStopped(self.stop)
                except BaseException as error:
                    self._rescue(state, error)
                    raise
                finally:
                    self.report.finish()
            signals.leave(self.folder.path, whole=status != "interrupted")
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

    def _prepare(self, set_aside: list[str], optim: dict[str, Any]) -> checkpoint.Checkpoint | None:
        """Once: every check that can refuse the run before it costs anything, then the folder.

        Gives the checkpoint to go on from, if the run is a resumed one.
        """
        if self.parameters:
            return None
        try:
            self.parameters = adapters.attach(self.denoiser, seed=self.seed, **self.adapter)
            if self.processes.sharded:
                world, group = self.processes.world, self._sharers
                sharding.shard(self.denoiser, self.parameters, self.device, world=world, group=group)
            if self.regularize.kl or self.method.kl:
                check_reference(self.denoiser)
            call = evaluate.for_prompts(self.prompts[:1], self.call)
            self.T = count_steps(self.pipe, **call)
            plans = [self.method(self.T, random.Random(draw)) for draw in range(8)]  # refuses K > T and m > T
            facts = preflight(self.pipe, **asked_of(plans), **call)
            picture = evaluate.sample(self.pipe, self.prompts[:1], seeds=[0], call=self.call)
            height, width = picture.shape[-2:]
            check_reward(self.reward, size=(height, width), prompts=self.prompts[:2], device=self.device)
            if self.watch.text is not None:
                self.watch.text.fill(self.eval_prompts)
            found = self._find(optim)
            self.folder.open()
            self.folder.set_status("running", **self._describe(), notes=facts.notes)
            if self.config_text is not None and self.folder.writes:
                write_text(self.folder.path / "config.yaml", self.config_text)
            self.denoising = self._denoising()
        except BaseException:
            if self.parameters:
                adapters.detach(self.denoiser)  # hand the pipeline back as it came
                self.parameters = []
            raise
        notes = [*facts.notes, *(self.text.notes if self.text else ()), *(f"{name} set aside" for name in set_aside)]
        for note in notes:
            self._say(note)
        return found

    def _denoising(self) -> DenoisingLoss | None:
        settings = self.regularize.denoise
        if not settings.weight:
            return None
        loss = Denoising(**settings.model_dump())
        file = self.folder.path / DENOISING_FILE
        mine = file if self.folder.writes or file.exists() else None  # the others sample the same pictures
        batch = self.micro_batch
        return loss.prepare(self.pipe, self.prompts, call=self.call, seed=self.seed, batch=batch, file=mine)

    def _describe(self) -> dict[str, Any]:
        name = getattr(self.pipe.config, "_name_or_path", None) if hasattr(self.pipe, "config") else None
        return {
            "pipeline": type(self.pipe).__name__,
            "model": None if name is None else str(name),
            "scheduler": type(self.pipe.scheduler).__name__,
            "reward": str(getattr(self.reward, "name", self.reward)),
            "held_out": sorted(self.watch.panel.held_out),
            "measures": self.watch.panel.roles(),
            "eval_prompts": self.eval_prompts,
            "best": self.checkpoints.best,
            "method": str(self.method),
            "T": self.T,
            "call": {key: value for key, value in self.call.items() if storable(value)},
            "lora": self.adapter | {"parameters": sum(p.numel() for p in self.parameters)},
            "prompts": len(self.prompts),
            "processes": self.processes.world,
            "seed": self.seed,
            "versions": versions(self.device),
        }

    def _settings(self, optim: dict[str, Any]) -> dict[str, Any]:
        """What a resume compares: the run file, or where there is none the facts; and the prompts themselves."""
        settings = (self.settings or self._facts()) | digests(self.prompts, self.eval_prompts)
        return settings | {"optim": dict(settings.get("optim", {})) | optim}

    def _facts(self) -> dict[str, Any]:
        facts = self._describe()
        told = {key: facts[key] for key in ("pipeline", "model", "scheduler", "reward", "method", "T", "call", "seed")}
        features = self.watch.panel.features
        guards = {"rewards": facts["held_out"], "features": features and features.name}
        told |= {"adapter": self.adapter, "regularize": self.regularize.model_dump(mode="json")}
        return told | {"guards": guards}

    def _find(self, optim: dict[str, Any]) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from, if it is one of the same run. Nothing is written before that is known."""
        if self.resume is None:
            return None
        found = checkpoint.find(self.folder.path, self.resume)
        notes = [*found.notes, *checkpoint.compare_settings(found.state["settings"], self._settings(optim))]
        self.watch.check_resume()
        for note in notes:
            self._say(note)
        return found

    def _begin(
        self, state: TrainingState, found: checkpoint.Checkpoint | None, settings: dict[str, Any]
    ) -> tuple[Score, Tensor]:
        """Scores and pictures before training: looked at now, or remembered by the run that goes on."""
        if found is not None:
            state.load(found)
            self.step = self.saved = found.step
            self.rollbacks, self.rolled_back_at = found.state["rollbacks"], found.state["rolled_back_at"]
            self.flat = found.state.get("flat", 0)
            if self.processes.first:
                for note in checkpoint.rewind(self.folder.path, found):
                    self._say(note)
            self.processes.agree(None)  # nobody reads before all is rewound
            self._say(f"goes on after step {self.step}, from {found.path}")
            self.trackers.start(settings, step=self.step)
            return self.watch.resume()
        self.trackers.start(settings, step=self.step)
        scores, images = self.watch.look(self.step)
        if self.step == 0:
            self.folder.set_status("running", before=scores)
            self._say(f"before: {line(scores)}")
            self.report.look()
            if self.checkpoints.every or self.watch.rules:
                self._checkpoint(state, settings)
        return scores, images

    def _loop(
        self,
        state: TrainingState,
        settings: dict[str, Any],
        last: int,
        clip: float,
        max_seconds: float | None,
        eval_every: int | None,
        signals: "_Signals",
    ) -> str:
        """The updates up to step `last`; gives why they ended: done, out of time, interrupted."""
        started, begun, ahead = time.perf_counter(), self.step, 0.0
        gradient = self.gradient()
        status = "done"
        shown = Progress(last, done=begun, max_seconds=max_seconds, enabled=self.show_progress, log=self.folder.log)
        with shown as progress:
            while self.step < last:
                if self.watch.text is not None:
                    ahead += self._encode_ahead(self.watch.text, gradient, last, signals)
                record = self._update(gradient, state, clip)
                self.step += 1
                self.folder.append("metrics.jsonl", record)
                progress.update(record)
                self.trackers.update(record)
                self.report.update()
                if self.flat >= FLAT:
                    self.stop = (
                        f"step {self.step - 1}: the reward was flat at all pictures of the last {FLAT} updates, as "
                        "beyond the level of a hinge: nothing is left to train; raise the level for more"
                    )
                every = self.checkpoints.every
                save = every is not None and self.step % every == 0
                if eval_every and self.step % eval_every == 0 and self.step < last:  # also of the last before a stop:
                    save |= self._judge(state, progress)  # a resumed run does not come back to it
                elapsed, done = time.perf_counter() - started, self.step - begun
                pace = (elapsed - ahead) / done  # text is encoded for many updates at once
                late = max_seconds is not None and elapsed + pace > max_seconds and self.step < last
                everyone = self.processes.gather((signals.caught, late))
                signals.caught = next((caught for caught, _ in everyone if caught), None)
                if self.stop is not None:
                    return "stopped"
                if signals.caught or any(late for _, late in everyone):
                    status = "interrupted" if signals.caught else "out of time"
                    break
                if save and self.step < last:
                    self._checkpoint(state, settings)
        self._checkpoint(state, settings)
        return status

    def gradient(self) -> Gradient:
        """What computes an update's gradient; after the parameters, T and the denoising loss are there."""
        return Gradient(
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
            offload_reward="reward" in self.offload,
            recompute=self.recompute,
            kl=self.regularize.kl,
            denoising=self.denoising,
        )

    def _judge(self, state: TrainingState, progress: Progress) -> bool:
        """A look, the weights as of now in the folder, and what the rules say; whether this is the best look so far."""
        with state.averaged():
            scores, _ = self.watch.look(self.step)
            if self.processes.first:
                adapters.save(self.pipe, self.folder.path)

        def tell(words: str) -> None:
            self.folder.log(words)
            progress.message(words)

        tell(f"step {self.step}: {line(scores)}")
        verdicts = self.watch.verdicts(since=self.rolled_back_at, last=self.rollbacks == ROLLBACKS)
        act = guards.action(verdicts)
        for verdict in verdicts:
            if act != "stop" or not verdict.due:  # those that stop the run are the error that ends it
                tell(verdict.words)
        if act == "rollback":
            self.rollbacks, self.rolled_back_at = self.rollbacks + 1, self.step
            back = self._take_back(state)
            if back is None:
                raise TrainingStopped("there is no checkpoint of the best look to roll back to; training stops")
            state.slower(0.5)
            tell(f"the weights are those of {_step(back)} again, the learning rate is halved")
        if act == "stop":
            back = self._take_back(state)
            self.kept = self.step if back is None else back
            kept = "the weights are kept" if back is None else f"the weights kept are those of {_step(back)}, the best"
            self.stop = f"{' '.join(v.words for v in verdicts if v.due)}; {kept}"
        self.report.look()
        return act in (None, "warn") and self.watch.best_step() == self.step

    def _take_back(self, state: TrainingState) -> int | None:
        """The weights of the best look, where its checkpoint is there; its step."""
        best = self.watch.best_step()
        if best is None or best == self.step or best not in checkpoint.steps(self.folder.path):
            return None
        state.load_weights(checkpoint.find(self.folder.path, best))
        return best

    def _finish(
        self, state: TrainingState, status: str, looked: bool, before: Score, before_images: Tensor
    ) -> tuple[Score, Tensor]:
        """The last look; where an earlier one was better, its weights. Scores and pictures of what is kept."""
        if self.kept is None:
            with state.averaged():
                after, after_images = self.watch.look(self.step, name="final")
            self.kept = self._take_back(state) if looked else None
            if self.kept is not None:
                self._say(f"step {self.step}: {line(after)}")
                self._say(f"{self.watch.why(self.kept)}: the weights kept are those of {_step(self.kept)}")
        if self.kept is not None:
            self.folder.set_status(status, kept_step=self.kept)
            with state.averaged():
                after, after_images = self.watch.look(self.kept, name="final", record=False)
        if self.processes.first:
            shown = slice(0, 12)
            pictures = {"before": before_images[shown], "after": after_images[shown]}
            path = self.folder.path / "before_after.png"
            evaluate.save_grid(pictures, self.eval_prompts[shown], path)
            self._say(f"after:  {line(after)}")
            self._say(f"pictures before and after: {path}")
        return after, after_images

    def _update(self, gradient: Gradient, state: TrainingState, clip: float) -> dict[str, Any]:
        """One update: the gradient is the mean over the whole batch, gathered over micro-batches of one plan.

        Where the reward is flat at all pictures the weights stay: an optimiser's momentum would move them on.
        """
        started, cpu, step, lr = time.perf_counter(), time.process_time(), self.step, state.lr
        state.optimizer.zero_grad(set_to_none=True)
        parts = gradient.compute(step, self.processes)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        if not math.isfinite(norm):
            raise TrainingStopped(
                f"step {step}: the gradient is {norm}; try a lower lr or another dtype, or check the reward"
            )
        self.flat = 0 if norm else self.flat + 1
        if self.flat:
            self.folder.log(f"step {step}: the reward is flat at all pictures (a satisfied hinge): the weights stay")
            state.schedule.step()
        else:
            self.torn = True  # an update that fails half-way leaves weights of two steps
            with doing(f"step {step}, the optimiser"):
                state.update()
            self.torn = False
        plan = gradient.plan(step)
        means = {name: float(torch.cat([part.scores[name] for part in parts]).mean()) for name in parts[0].scores}
        extra = {
            name: sum(part.size * value for part in parts if (value := read(part)) is not None) / self.batch
            for name, read in (("kl", lambda part: part.sweep.kl), ("denoise", lambda part: part.denoise))
            if read(parts[0]) is not None
        }
        return {
            "step": step,
            "reward": means["reward"],
            "parts": {name: means[name] for name in parts[0].natives},
            "loss": -means["reward"],
            **extra,
            "grad_norm": norm,
            "clipped": norm > clip,
            # with micro-batches: the sum of their norms, an upper bound of the norm of the sum
            "step_grad_norms": {i: sum(part.sweep.grad_norms.get(i, 0.0) for part in parts) for i in plan.executed},
            "trained": list(plan.executed),
            "end": plan.end,
            "steps_run": plan.steps_run,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "images": (step + 1) * self.batch,
            "lr": lr,
            "replay_error": max(part.sweep.replay_error for part in parts),
            "clamped": sum(part.size * part.sweep.clamped for part in parts) / self.batch,
        }

    def _checkpoint(self, state: TrainingState, settings: dict[str, Any]) -> None:
        """checkpoint-N of this step, with the LoRA file of its own; older ones are pruned."""
        if not self.processes.first:
            return
        facts: dict[str, Any] = {"settings": settings, "flat": self.flat}
        facts |= {"rollbacks": self.rollbacks, "rolled_back_at": self.rolled_back_at}
        best = self.watch.best_step()

        def weights(folder: Path) -> None:
            if self.adapter["kind"] != "full":
                with state.averaged():
                    adapters.save(self.pipe, folder)

        keep = self.checkpoints.keep
        state.save(self.folder.path, self.step, facts, keep=keep, best=best, also=weights)

    def _save(self, state: TrainingState, status: str, **facts: Any) -> None:
        """The weights, loaded back and compared; a file that fails is kept under a name that no loader reads."""
        self.saved = self.step
        if not self.processes.first and not self.processes.sharded:
            return
        call = evaluate.for_prompts(self.eval_prompts[:1], few_steps(self.call, T=self.T))
        with state.averaged():
            path = self.folder.path / LORA_FILE
            if self.processes.first:
                path = adapters.save(self.pipe, self.folder.path)
            if self.processes.sharded:  # all of them sample the pictures that are compared
                self.processes.agree(None)  # nobody reads the file before it is there
            try:
                difference = adapters.verify(self.pipe, self.folder.path, call=call)
            except RewardTuneError:
                if self.processes.first:
                    path.replace(path.with_suffix(".unverified"))
                raise
        self._say(f"saved {path}, verified (loaded back: pictures differ by {difference:.1e})")
        self.folder.set_status(status, steps=self.step, lora_verified=True, **facts)

    def _rescue(self, state: TrainingState, error: BaseException) -> None:
        """An error ends the run: save the last good weights and say why."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)  # the second signal: at once
        stopped = isinstance(error, TrainingStopped) or out_of_memory(error)
        words = "interrupted at once" if interrupted else _in_words(error)
        with suppress(Exception):  # the first error is the one to report
            if self.processes.first and self.step > self.saved and not interrupted and not self.torn:
                self._say(self._save_good(state, broken=isinstance(error, BrokenPictures)))
        with suppress(Exception):
            status = "interrupted" if interrupted else "stopped" if stopped else "failed"
            self.folder.set_status(status, steps=self.step, error=words)
        with suppress(Exception):
            self.folder.log(words)
            if not interrupted and not isinstance(error, TrainingStopped):
                self.folder.log("".join(traceback.format_exception(error)).rstrip())

    def _save_good(self, state: TrainingState, *, broken: bool) -> str:
        """The weights of the last good update, unverified; what was saved, in words.

        broken: the weights after the last update give NaN or black pictures, so those of the best look are saved. Where
        there is none they replace no file that an earlier look has saved.
        """
        now, folder = f"the weights after {self.step} updates", self.folder.path
        back = self._take_back(state) if broken and len(self.watch.history) > 1 else None
        if broken and back is None and any((folder / name).exists() for name in (LORA_FILE, DENOISER_FOLDER)):
            return f"{now} gave these pictures and are not saved; what an earlier look saved is left in {folder}"
        with state.averaged():
            adapters.save(self.pipe, folder)
        self.folder.status["lora_verified"] = False
        if back is None:
            return f"{now}{', which gave these pictures,' if broken else ''} are in {folder}"
        self.folder.status["kept_step"] = back
        return f"the weights of {_step(back)}, the best look, are in {folder}"

    def _encode_ahead(self, text: TextCache, gradient: Gradient, last: int, signals: "_Signals") -> float:
        """The text encoders come back once for as many updates as the cache can hold, not for each prompt: seconds."""
        if not text.answers(self.micro_batch) or text.holds(gradient.prompts_of(self.step, self.processes)):
            return 0.0
        started, told = time.perf_counter(), len(text.notes)
        with doing(f"step {self.step}, encoding the text of this and later updates"):
            steps = (step for step in range(self.step, last) if signals.caught is None or step == self.step)
            text.fill(prompt for step in steps for prompt in gradient.prompts_of(step, self.processes))
        for note in text.notes[told:]:
            self._say(note)
        return time.perf_counter() - started

    def _say(self, text: str) -> None:
        self.folder.log(text)
        if self.show_progress:
            print(text, flush=True)


def _step(number: int) -> str:
    return f"step {number}" if number else "step 0, the untuned model"


@contextmanager
def _memory_named() -> Iterator[None]:
    """Too little memory, wherever it was met, is a stop with its cures."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise TrainingStopped(_in_words(error)) from error


def _in_words(error: BaseException) -> str:
    if not out_of_memory(error):
        return str(error) or type(error).__name__
    where: list[str] = getattr(error, "__notes__", None) or ["before the first step"]
    said = first_line(error)
    return (
        f"out of memory ({where[0]}: {said}). Set a smaller optim.micro_batch (1 needs least, the result is the same), "
        "memory.recompute=true where it is false, "
        "memory.gradient_checkpointing=true, or memory.offload=[text_encoders, vae, reward]; then go on with "
        "--resume latest where there is a checkpoint (only gradient_checkpointing and the other keys of memory, "
        "and micro_batch, may change at a resume)"
    )


class _Signals:
    """Ctrl-C and SIGTERM: the first is noted (the update finishes, all is saved), the second acts at once."""

    def __init__(self, *, speaks: bool) -> None:
        self.caught: int | None = None
        self.speaks = speaks
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
        if self.caught is not None:
            _raise(number)
        self.caught = number
        if self.speaks:
            print("stopping: this update is finished and saved first (again to stop at once)", flush=True)

    def leave(self, folder: Path, *, whole: bool) -> None:
        """End as the signal asks, if there was one. whole: it came so late that the run is done."""
        if self.caught is None:
            return
        if self.speaks and whole:
            print(f"the run was done before it could be interrupted; all is in {folder}", flush=True)
        elif self.speaks:
            again = f"rewardtune train {folder / 'config.yaml'} --resume latest"
            print(f"interrupted; the weights so far are in {folder}. To go on: {again}", flush=True)
        _raise(self.caught)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def check_columns(pipe: Any, call: dict[str, Any], prompts: Sequence[str], eval_prompts: Sequence[str]) -> None:
    """ConfigError for columns of the prompt file that the pipeline's call does not take, or that are given for all."""
    given, held = (
        set(p[0].arguments) if p and isinstance(p[0], Conditioned) else set() for p in (prompts, eval_prompts)
    )
    if given != held:
        raise ConfigError(
            f"the training prompts bring {', '.join(sorted(given)) or 'nothing'} along, the eval prompts "
            f"{', '.join(sorted(held)) or 'nothing'}: name the same columns for both"
        )
    for name in sorted(given):
        check_argument(pipe, name, f"column {name!r}")
        if name in call:
            raise ConfigError(f"column {name!r} of the prompts is an argument of the call too: keep one of them")


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
