"""One real update in memory, measured phase by phase: seconds, peak memory, and what they make of the whole run.

All of it is measured from outside: for the length of the dry run a few methods of this pipeline, this reward and the
tape's calls announce the phase that they begin. Training carries nothing of this.
Left out: several processes (the numbers are those of one), and the time in which checkpoints are written.
"""

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from . import checkpoint, evaluate
from .config import RunConfig
from .engine import count_steps, quiet
from .engine.call import Call
from .gradient import derive_seed
from .models import offloaded_vae
from .progress import clock
from .prompts import batch_prompts
from .regularize import Denoising
from .state import TrainingState
from .tables import text_table
from .textcache import cached_text

if TYPE_CHECKING:
    from .trainer import RewardTuner

TEXT, SAMPLING, REWARD, DECODER = "text encoding", "sampling", "decode + reward", "backward of the decoder"
STEP, DENOISING, OPTIMISER, EVALUATION = "backward of step", "denoising loss", "optimiser", "evaluation"
PREPARING, DENOISING_PICTURES = "preparing", "pictures of the denoising loss"  # before the update
CLOSE = 0.9  # share of the memory above which it is close
MANY = 8  # trained steps beyond which they share a row


@dataclass
class Phase:
    seconds: float = 0.0
    peak: int = 0  # bytes


class Meter:
    """Divides the time between `begin` and `end` among phases: one lasts until the next is marked, so none is missed.

    peak: on CUDA what torch had allocated at most; elsewhere the resident memory of the process, looked at every 10 ms
    and at every change of phase, after what is free was handed back to the system where it takes it (glibc).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, Phase] = {}
        self.current = ""
        self._held, self._since, self._peak = False, 0.0, 0
        self._ended = threading.Event()
        self._process = psutil.Process()

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        """Measures within the block; after an error `current` is the phase in which it came."""
        thread = threading.Thread(target=self._look_often, daemon=True)
        if self.device.type != "cuda":
            thread.start()
        try:
            self._restart()
            self.mark(PREPARING)
            yield self
            self._close()
        finally:
            self._ended.set()
            if thread.is_alive():
                thread.join()

    def mark(self, name: str) -> None:
        """From here on it is this phase; nothing changes within a held one."""
        if self._held or name == self.current:
            return
        self._close()
        self.current = name
        self.phases.setdefault(name, Phase())

    @contextmanager
    def holding(self, name: str, then: str | None = None) -> Iterator[None]:
        """All of the block is this phase, whatever is marked in it. then: the phase after it."""
        if self._held:
            yield
            return
        self.mark(name)
        self._held = True
        yield  # after an error it stays held: that is where the error came
        self._held = False
        if then is not None:
            self.mark(then)

    def _close(self) -> None:
        """Time and peak since the last change belong to the current phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._look()
        if self.current:
            phase = self.phases[self.current]
            phase.seconds += time.perf_counter() - self._since
            phase.peak = max(phase.peak, self._peak)
        self._restart()

    def _restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError, AttributeError):  # not glibc
                ctypes.CDLL(None).malloc_trim(0)
            self._peak = 0
            self._look()
        self._since = time.perf_counter()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _look_often(self) -> None:
        while not self._ended.wait(0.01):
            self._look()


@contextmanager
def metered(
    meter: Meter, pipe: Any, *, reward: Any, gradient: Any, state: TrainingState, denoising: Any
) -> Iterator[None]:
    """The methods at which a phase begins mark it; afterwards all are as they were."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            there = name in vars(owner)
            before = vars(owner).get(name)
            _assign(owner, name, value)
            stack.callback(_assign if there else _remove, owner, name, *([before] if there else []))

        def around(owner: Any, name: str, enter: Callable[..., AbstractContextManager[None]]) -> None:
            real = getattr(owner, name)

            def method(*args: Any, **kwargs: Any) -> Any:
                with enter(*args):
                    return real(*args, **kwargs)

            # pipelines read the signature of set_timesteps
            put(owner, name, functools.wraps(real, updated=())(method))

        def marked(phase: str) -> Callable[..., AbstractContextManager[None]]:
            def enter(*_: Any) -> AbstractContextManager[None]:
                meter.mark(phase)
                return nullcontext()

            return enter

        def replayed(call: Call, *_: Any) -> AbstractContextManager[None]:
            # Only decoders are replayed in chunks; a ControlNet belongs to its step.
            return meter.holding(DECODER if call.chunk else f"{STEP} {call.step}")

        if callable(getattr(pipe, "encode_prompt", None)):
            around(pipe, "encode_prompt", lambda *_: meter.holding(TEXT, then=SAMPLING))
        around(pipe.scheduler, "set_timesteps", marked(SAMPLING))
        for module in pipe.components.values():
            if isinstance(module, nn.Module) and callable(getattr(module, "decode", None)):
                around(module, "decode", marked(REWARD))
        around(reward, "parts", marked(REWARD))
        around(Call, "replay", replayed)
        if denoising is not None:
            around(denoising, "add", lambda *_: meter.holding(DENOISING))
        compute = gradient.compute

        def computed(*args: Any) -> Any:
            meter.mark(SAMPLING)
            parts = compute(*args)
            meter.mark(OPTIMISER)  # clipping, and the update
            return parts

        put(gradient, "compute", computed)
        around(state, "update", lambda *_: meter.holding(OPTIMISER))
        yield


def _assign(owner: Any, name: str, value: Any) -> None:
    """Past any `__setattr__` of a module or a frozen dataclass."""
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _remove(owner: Any, name: str) -> None:
    del vars(owner)[name]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a dry run found.

    phases: in the order of an update; their seconds add up to `update`, apart from the evaluation's. update: seconds of
    the one update. text: seconds in it for encoding, which the cache pays once a prompt; of_prompt: that, for one
    prompt; 0 without the cache, which has room for `room` prompts. evaluation: seconds of one, all its `pictures`.
    checkpoint: bytes of one. total: bytes of memory there are.
    """

    phases: dict[str, Phase]
    update: float
    text: float
    of_prompt: float
    room: int
    evaluation: float
    pictures: int
    checkpoint: int
    total: int
    cuda: bool

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        name = max(self.phases, key=lambda name: self.phases[name].peak)
        return name, self.phases[name].peak


def measure(tuner: "RewardTuner", config: RunConfig, meter: Meter) -> Measured:
    """One update of `tuner` (its parameters attached, T known) and one batch of its eval pictures, under `meter`.

    The trained weights are changed; nothing is written. Raises what an update raises.
    """
    optim, pipe = config.optim, tuner.pipe
    batch = batch_prompts(tuner.prompts, seed=tuner.seed, step=0, size=tuner.batch)
    with ExitStack() as stack:
        stack.enter_context(meter.running())
        stack.enter_context(quiet(pipe))
        text = stack.enter_context(cached_text(pipe)) if tuner.cache_text else None
        if "vae" in tuner.offload:
            stack.enter_context(offloaded_vae(pipe))
        of_prompt = 0.0
        if text is not None and "text_encoders" in tuner.offload:
            with meter.holding(TEXT):
                count_steps(pipe, **evaluate.for_prompts(batch[:1], tuner.call))  # shows the cache how to encode
                started, before = time.perf_counter(), text.encoded
                text.fill([*batch, *tuner.eval_prompts[: tuner.micro_batch]], release=False)
                of_prompt = (time.perf_counter() - started) / max(1, text.encoded - before)
                text.release()
        denoise = config.regularize.denoise
        if denoise.weight:
            loss = Denoising(**denoise.model_dump() | {"count": min(denoise.count, tuner.micro_batch)})
            with meter.holding(DENOISING_PICTURES):
                tuner.denoising = loss.prepare(
                    pipe, tuner.prompts, call=tuner.call, seed=tuner.seed, batch=tuner.micro_batch
                )
        meter.mark(PREPARING)
        state = TrainingState(
            tuner.denoiser,
            steps=optim.steps,
            lr=optim.lr,
            optimizer=optim.optimizer,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            schedule=optim.schedule,
            warmup=optim.warmup,
            ema=optim.ema,
        )
        gradient = tuner.gradient()
        before = text.encoded if text is not None else 0
        filled = meter.phases.get(TEXT, Phase()).seconds
        with metered(meter, pipe, reward=tuner.reward, gradient=gradient, state=state, denoising=tuner.denoising):
            meter.mark(SAMPLING)
            started = time.perf_counter()
            tuner._update(gradient, state, optim.clip)
            meter.mark(EVALUATION)
            update = time.perf_counter() - started
        kept = text is not None and text.works and None not in text._rules.values()
        encoding = meter.phases.get(TEXT, Phase()).seconds
        encoded = text.encoded if text is not None else 0
        with meter.holding(EVALUATION):
            started = time.perf_counter()
            shown = _evaluate(tuner)
            evaluation = (time.perf_counter() - started) * len(tuner.eval_prompts) / shown
    total = psutil.virtual_memory().total
    if meter.device.type == "cuda":
        total = torch.cuda.mem_get_info(meter.device)[1]
    return Measured(
        phases=_in_order(meter.phases),
        update=update,
        text=encoding - filled if kept and encoded > before else 0.0,
        of_prompt=of_prompt or (encoding / encoded if kept and encoded else 0.0),
        room=text.room if text is not None else 0,
        evaluation=evaluation,
        pictures=len(tuner.eval_prompts),
        checkpoint=_checkpoint_bytes(state, lora=tuner.adapter["kind"] != "full"),
        total=total,
        cuda=meter.device.type == "cuda",
    )


def _evaluate(tuner: "RewardTuner") -> int:
    """The first batch of eval pictures, sampled, scored and measured as an evaluation does; how many they are."""
    prompts = tuner.eval_prompts[: tuner.micro_batch]
    seeds = [derive_seed(tuner.seed, "eval", index) for index in range(len(prompts))]
    images = evaluate.sample(tuner.pipe, prompts, seeds=seeds, call=tuner.call, batch=tuner.micro_batch)
    scores = evaluate.score(tuner.reward, images, prompts, batch=tuner.micro_batch, device=tuner.device)
    replace(tuner.watch.panel, prompts=prompts)(images, base=images, step=0, scores=scores)
    return len(prompts)


def _checkpoint_bytes(state: TrainingState, *, lora: bool) -> int:
    """Of the tensors that a checkpoint holds; lora: also a LoRA file."""
    tensors, _ = checkpoint.flatten_optimizer(state.optimizer, state.named.items())
    groups: list[Mapping[str, torch.Tensor]] = [
        state.named,
        tensors,
        state.ema.state() if state.ema is not None else {},
        state.named if lora else {},
    ]
    return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())


def _in_order(phases: dict[str, Phase]) -> dict[str, Phase]:
    """As an update has them; many trained steps in one row."""
    steps = [name for name in phases if name.startswith(STEP)]
    found = {name: phases[name] for name in (TEXT, SAMPLING, REWARD, DECODER) if name in phases}
    if len(steps) > MANY:
        found[f"{STEP}s, all {len(steps)}"] = Phase(
            sum(phases[name].seconds for name in steps), max(phases[name].peak for name in steps)
        )
    else:
        found |= {name: phases[name] for name in steps}
    return found | {name: phases[name] for name in (DENOISING, OPTIMISER, EVALUATION) if name in phases}


def evaluations(config: RunConfig) -> int:
    """How often the eval pictures are looked at: before, in between, at the end."""
    every = config.eval.every
    return 2 + ((config.optim.steps - 1) // every if every else 0)


def expected_seconds(measured: Measured, config: RunConfig, prompts: int) -> float:
    """Of the run: its updates, its evaluations, and each of its `prompts` different prompts encoded once, or each time
    that it is drawn where the cache has no room for all. optim.max_seconds ends all but the first look and the last."""
    optim = config.optim
    drawn = optim.steps * optim.batch
    text = measured.of_prompt * (min(prompts, drawn) if prompts <= measured.room else drawn)
    updates = optim.steps * (measured.update - measured.text)
    inside = updates + text + (evaluations(config) - 2) * measured.evaluation
    if optim.max_seconds is not None:
        inside = min(inside, optim.max_seconds)
    return inside + 2 * measured.evaluation


def report(measured: Measured, config: RunConfig, prompts: int) -> str:
    """The table and what follows from it. prompts: how many different ones are trained on."""
    rows = [[name, f"{phase.seconds:.2f}", size(phase.peak)] for name, phase in measured.phases.items()]
    lines = [text_table(["phase", "seconds", "peak memory"], rows, flexible=0, numbers={1, 2}), ""]
    optim = config.optim
    first = (
        f", {measured.update - measured.text:.2f} s without the text, which is encoded once" if measured.text else ""
    )
    lines.append(f"an update takes {measured.update:.2f} s ({optim.batch} pictures){first}")
    lines.append(f"an evaluation takes {measured.evaluation:.2f} s ({measured.pictures} pictures)")
    late = (
        f", ended after {optim.max_seconds:g} s but for the first and the last look"
        if optim.max_seconds is not None
        else ""
    )
    lines.append(
        f"the run takes about {clock(expected_seconds(measured, config, prompts))} in one process: {optim.steps} "
        f"updates and {evaluations(config)} evaluations{late}"
    )
    lines.append(f"a checkpoint has {size(measured.checkpoint)}")
    name, peak = measured.peak
    share = peak / measured.total
    what = (
        "allocated by torch on the device" if measured.cuda else "resident memory of the process, looked at every 10 ms"
    )
    lines.append(f"peak memory: {size(peak)} in {name}, {share:.0%} of {size(measured.total)} ({what})")
    if share > CLOSE:
        lines += [f"that is close; {line}" if n == 0 else line for n, line in enumerate(advice(name, config))]
    if config.model.compile:
        lines.append("model.compile: the seconds hold the compilation, later updates are faster")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "B" else f"{value:.1f} {units[0]}"


def advice(phase: str, config: RunConfig) -> list[str]:
    """What to change so that `phase` needs less, the cheapest first; only what is not set already."""
    optim, memory, model = config.optim, config.memory, config.model
    cuda = model.device == "auto" or model.device.startswith("cuda")
    backward = phase.startswith((STEP, DENOISING))
    decoding = phase in (REWARD, DECODER, EVALUATION)
    found = []
    if cuda and model.dtype == "float32" and config.adapter.kind != "full":
        found.append("model.dtype=bfloat16 (half of the frozen weights)")
    micro = min(optim.micro_batch or optim.batch, optim.batch)
    if micro > 1 and phase != OPTIMISER:
        found.append(f"optim.micro_batch={micro // 2} (the same update in smaller parts)")
    if not memory.recompute and phase != OPTIMISER:
        found.append("memory.recompute=true (the graph of one trained step at a time)")
    if backward and not memory.gradient_checkpointing:
        found.append("memory.gradient_checkpointing=true (activations are computed twice)")
    if decoding and (memory.vae_dtype or model.dtype) != "bfloat16":
        found.append("memory.vae_dtype=bfloat16 (half of the decoder's activations)")
    idle = {"text_encoders": phase != TEXT, "vae": not decoding, "reward": phase not in (REWARD, EVALUATION)}
    wait = [word for word, waits in idle.items() if waits and word not in memory.offload]
    if cuda and wait:
        text = "" if memory.cache_text or "text_encoders" not in wait else " with memory.cache_text=true"
        found.append(f"memory.offload=[{', '.join([*memory.offload, *wait])}]{text} (on the CPU while not in use)")
    if cuda and optim.optimizer == "adamw" and (phase == OPTIMISER or config.adapter.kind == "full"):
        found.append("optim.optimizer=adamw8bit (2 bytes a trained weight in place of 8)")
    if config.adapter.kind == "full":
        found.append("adapter.kind=lora (all weights have a gradient and two moments now)")
    elif phase == OPTIMISER and config.adapter.rank > 1:
        found.append(f"adapter.rank={config.adapter.rank // 2}")
    elif cuda and model.quantize is None and phase != TEXT:
        found.append("model.quantize=nf4 (a quarter of a bfloat16 denoiser; hub ids and folders)")
    if phase != OPTIMISER:
        found.append("sampling.width and sampling.height smaller")
    lines = ["what helps, in this order:"] + [f"  {line}" for line in found]
    if memory.recompute:
        lines.append("method.options.K and sampling.steps change the time, not the peak: one trained step at a time")
    return lines


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also behind an error that tells of it."""
    while error is not None:
        words = str(error)
        torch_says = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in words or "out of memory" in words)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or torch_says:
            return True
        error = error.__cause__ or error.__context__
    return False
