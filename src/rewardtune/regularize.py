"""Regularisers against reward hacking: the denoising (pre-training) loss, mixed into each batch. docs/regularize.md.

The KL term to the base model lives in the sweep, where the trained calls are replayed: ``tape.backward(loss, kl=0.1)``.

Nothing here knows a family of models. The pipeline's own chain is run to one of its early steps, whose latent is
replaced by a clean one with noise added by the pipeline's own scheduler; the network is then called by the pipeline
itself, with its own text, time and layout; what reaches ``scheduler.step`` is compared with what a perfect network
would have given. All other steps of that chain cost no network call but one.
"""

import inspect
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import evaluate, prediction
from .engine import Tape, count_steps, find_denoiser
from .engine.call import adapters_off
from .engine.chain import execution_device, fresh, seeded
from .engine.doors import Doors
from .errors import ConfigError, PreflightError
from .gradient import derive_seed
from .plan import Plan
from .prompts import BESIDE, Conditioned, identity, pictures_beside, without_text, wrong_images
from .runfolder import atomic
from .textcache import aside

#: Share of captions that are replaced by the empty one, so that the unconditional network is held as well: it is the
#: other half of classifier-free guidance. Stable Diffusion was trained with the same share.
DROPPED = 0.1
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
#: Guidance by other means than `guidance_scale`, switched off wherever a pipeline has it.
OFF = {"true_cfg_scale": 1.0, "pag_scale": 0.0}


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Settings of the denoising loss.

    Attributes:
        weight: its weight beside the negated reward.
        images: folder of pictures with captions (see `read_captions`); "prompts:COLUMN", the pictures of that column
            of the prompt file, with their prompts for captions; None: pictures that the base model samples first.
        count: size of the set of pictures (of a folder at most so many are taken).
        noise_range: share t / T of the sampler's steps, t = T the noisiest. The first step of all is left out: what the
            network gets there is pure noise.
    """

    weight: float
    images: str | Path | None = None
    count: int = 256
    noise_range: tuple[float, float] = (0.6, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf or self.count < 1:
            raise ConfigError(f"denoise.weight={self.weight}, denoise.count={self.count}: must be above 0, at least 1")
        low, high = self.noise_range
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"denoise.noise_range={list(self.noise_range)}: legal is 0 <= low <= high <= 1 (1: noise)"
            )

    def prepare(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        call: dict[str, Any],
        seed: int,
        batch: int = 8,
        file: Path | None = None,
    ) -> "DenoisingLoss":
        """Make the set of clean latents once: encode the pictures, or sample them from the base model (adapters off).

        Args:
            prompts: captions of the sampled pictures, in turn, with what they bring along; with a folder of ``images``
                unused.
            call: the other arguments of ``pipe(...)`` as in training; the pictures are sampled with its guidance.
            batch: pictures at a time.
            file: where the set is kept, and read from when it is there. Needed to resume a run that trains whole
                weights: the base model is gone by then.

        Raises:
            ConfigError: for ``images`` that cannot be used, or a ``file`` made with other settings.
            PreflightError: if this pipeline's guidance cannot be switched off, or its pictures cannot be encoded.
        """
        name, empty = find_denoiser(pipe), without_text(prompts[0])
        paths, captions = self._pictures(prompts)
        T = count_steps(pipe, **evaluate.for_prompts([empty], call))
        steps = _steps(pipe.scheduler, T, self.noise_range)
        plain, timesteps = _unguided(pipe, name, T, call, empty)
        known = {"seed": seed, "count": self.count, "images": str(self.images), "call": repr(sorted(call.items()))}
        told = {} if self._folder else {"prompts": derive_seed(*map(str, identity(prompts)))}
        key = json.dumps(known | told)
        if file is not None and file.exists():
            latents, kept = _load(file, key)
            captions = kept if self._folder else captions
        elif paths:
            latents = encode(pipe, name, paths, call=plain, T=T, empty=empty)
        else:
            with adapters_off(getattr(pipe, name)):
                latents = _sampled(pipe, name, captions, call=call, seed=seed, batch=batch)
        if file is not None and not file.exists():
            _save(file, key, latents, captions)
        return DenoisingLoss(
            pipe=pipe,
            weight=self.weight,
            latents=latents,
            captions=captions,
            call=plain,
            T=T,
            timesteps=timesteps,
            steps=steps,
            seed=seed,
        )

    @property
    def _folder(self) -> bool:
        return self.images is not None and not str(self.images).startswith(BESIDE)

    def _pictures(self, prompts: Sequence[str]) -> tuple[list[Path], list[str]]:
        """The given pictures, none where they are to be sampled, and the captions."""
        if wrong := wrong_images(self.images, pictures_beside(prompts[0])):
            raise ConfigError(f"denoise.images={wrong}")
        if self.images is None:
            return [], [prompts[k % len(prompts)] for k in range(self.count)]
        if self._folder:
            pairs = read_captions(self.images)[: self.count]
            return [path for path, _ in pairs], [caption for _, caption in pairs]
        column, captions = str(self.images).removeprefix(BESIDE), list(prompts[: self.count])
        return [Path(own.arguments[column]) for own in captions if isinstance(own, Conditioned)], captions


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss:
    """The denoising loss, ready for its clean latents ``(N, ...)`` in the sampler's own layout, on the CPU."""

    pipe: Any
    weight: float
    latents: Tensor = field(repr=False)
    captions: Sequence[str] = field(repr=False)
    call: dict[str, Any]
    T: int
    timesteps: Sequence[Any] = field(repr=False)
    steps: tuple[int, ...]
    seed: int

    def step_of(self, step: int) -> int:
        """The sampler's step that update `step` trains: drawn from (seed, step) alone, as a plan is."""
        return self.steps[derive_seed(self.seed, "denoise", step) % len(self.steps)]

    def add(self, step: int, *, first: int, size: int, batch: int) -> float:
        """Samples first .. first + size - 1 of update `step`'s batch: weight * size / batch * loss, to `.grad`.

        Picture, noise and dropped caption of a sample are drawn from (seed, step, its index in the batch).

        Returns:
            ``mean((F - F*)^2)`` over these samples, without its weight.

        Raises:
            TrainingStopped: if the gradient is not finite.
        """
        x0, noise, captions = self.draw(step, first=first, size=size)
        seeds = [derive_seed(self.seed, "denoise", step, index) for index in range(first, first + size)]
        given = _without_guidance(captions, self.call) | {"generator": evaluate.generators(seeds)}
        i = self.step_of(step)
        with seeded(seeds[0], self.pipe):
            tape, target = predict(self.pipe, x0, noise, T=self.T, step=i, timestep=self.timesteps[i], call=given)
        loss = (tape.images - target).square().mean()
        tape.backward(self.weight * size / batch * loss, allow_zero=True)
        return float(loss.detach())

    def draw(self, step: int, *, first: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
        """Clean latents, noise ``(size, ...)`` and captions."""
        x0, noise, captions = [], [], []
        for index in range(first, first + size):
            drawn = random.Random(f"denoise {self.seed} {step} {index}")
            k = drawn.randrange(len(self.latents))
            x0.append(self.latents[k])
            own = self.captions[k]
            captions.append(without_text(own) if drawn.random() < DROPPED else own)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "denoising noise", step, index))
            noise.append(torch.randn(x0[-1].shape, generator=generator, dtype=x0[-1].dtype))
        return torch.stack(x0), torch.stack(noise), captions


def predict(
    pipe: Any, x0: Tensor, noise: Tensor, *, T: int, step: int, timestep: Any, call: dict[str, Any]
) -> tuple[Tape, Tensor]:
    """The network's prediction at `step` for clean latents with noise: a tape whose `images` is F, and the target F*.

    Args:
        x0, noise: ``(B, ...)`` in the layout of the sampler's latents.
        T, step, timestep: steps of this call, the one that is meant (at least 1), and its timestep.
        call: arguments of ``pipe(...)`` for B samples, without guidance.
    """
    name = find_denoiser(pipe)
    device = execution_device(pipe)
    x0, noise = x0.to(device), noise.to(device)
    targets: list[Tensor] = []

    def restart(scheduler: Any) -> Tensor:
        x = prediction.noised(scheduler, x0, noise, timestep=timestep)
        targets.append(target(scheduler, x0, noise, timestep))
        return x

    plan = Plan(T=T, train=frozenset({step}), start=step)
    doors = Doors(pipe, plan, denoiser=name, blank=True, restart=restart)
    with aside(pipe), doors.open():
        pipe(**fresh({**call, "output_type": "latent", "return_dict": False}))
    F = doors.prediction
    assert F is not None
    if F.ndim > 1 and F.shape[1] == 2 * x0.shape[1]:
        F = F.chunk(2, dim=1)[0]  # learned variance
    if F.shape != x0.shape:
        raise PreflightError(
            f"{type(pipe).__name__} predicts {tuple(F.shape)} for latents of shape {tuple(x0.shape)}: the denoising "
            "loss does not fit this pipeline; set its weight to 0"
        )
    return Tape(plan, F, doors.calls, pipe.components[name], [""] * len(x0)), targets[0]


def target(scheduler: Any, x0: Tensor, noise: Tensor, timestep: Any) -> Tensor:
    """F*: what a perfect network gives, in its own parametrisation, when ``x = a x0 + s noise``.

    epsilon: noise. sample: x0. v: (a noise - s x0) / sqrt(a^2 + s^2). flow: noise - x0. EDM: x0 through the inverse of
    its preconditioning. The loss on F is the one the network was pre-trained with, up to weights of the noise levels;
    a loss on x0-hat would be it times (dx0-hat/dF)^2, which at high noise is large for epsilon (1/a^2) and uneven.
    a and s are taken from the scheduler itself, which must stand at that step.

    Raises:
        PreflightError: for schedulers without a known parametrisation.
    """
    try:
        family = prediction._family(scheduler)
    except prediction.NoPredictionError as error:
        raise PreflightError(
            f"{type(scheduler).__name__} has no known parametrisation, which the denoising loss needs: set its weight "
            "to 0 or use another scheduler, for example DDIM, Euler or DPM++"
        ) from error
    kind = "edm" if family == "edm" else getattr(scheduler.config, "prediction_type", "epsilon")
    if family == "flow" or kind == "flow_prediction":
        return noise - x0
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "edm":
        x = prediction.noised(scheduler, x0, noise, timestep=timestep)
        sigma = scheduler.sigmas[prediction.step_index(scheduler, timestep)]
        at_0 = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
        return (x0 - at_0) / (scheduler.precondition_outputs(x, torch.ones_like(x), sigma) - at_0)
    if kind == "v_prediction":
        one, zero = torch.ones_like(x0), torch.zeros_like(x0)
        a = prediction.noised(scheduler, one, zero, timestep=timestep)
        s = prediction.noised(scheduler, zero, one, timestep=timestep)
        return (a * noise - s * x0) / (a**2 + s**2).sqrt()
    raise PreflightError(f"prediction_type={kind!r} has no known target: set the weight of the denoising loss to 0")


# Clean latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _sampled(pipe: Any, name: str, captions: Sequence[str], *, call: dict[str, Any], seed: int, batch: int) -> Tensor:
    """The last latents of the pipeline's own chains, one seed a picture."""
    found = []
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        seeds = [derive_seed(seed, "denoising set", index) for index in range(first, first + len(part))]
        given = evaluate.for_prompts(part, call) | {"generator": evaluate.generators(seeds)}
        doors = Doors(pipe, None, denoiser=name)
        with seeded(seeds[0], pipe), doors.open():
            pipe(**{**given, "output_type": "latent", "return_dict": False})
        assert doors.final is not None
        found.append(doors.final.detach().cpu())
    return _widened(torch.cat(found))


def encode(pipe: Any, name: str, paths: Sequence[Path], *, call: dict[str, Any], T: int, empty: str = "") -> Tensor:
    """Latents ``(N, ...)`` of pictures, in the layout of the sampler, by the pipeline's own encoder.

    The way from the sampler's latent x to the decoder's input z (scaling, shift, packing) is the pipeline's own and
    differs by family. It only moves and scales elements, so one vector-Jacobian product inverts it exactly:
    x = x_ref + J^T (z - z_ref) / (J^T 1)^2. That it does so is checked. empty: the prompt of that probe.
    """
    doors = _probe(pipe, name, T, call, empty, output_type="pt")
    decoded = [c for c in doors.calls if c.module is not doors.denoiser and hasattr(c.module, "encode")]
    z = next((x for c in decoded for x in c.inputs if isinstance(x, Tensor) and x.requires_grad), None)
    if len(decoded) != 1 or z is None or doors.final is None:
        raise _not_encodable(pipe, "its pictures do not come from one decoder with an encoder beside it")
    final, vae, picture = doors.final, decoded[0].module, decoded[0].leaves[0]
    assert picture is not None

    def pulled(v: Tensor) -> Tensor:
        grad = torch.autograd.grad(z, final, v.to(z), retain_graph=True, allow_unused=True)[0]
        if grad is None:
            raise _not_encodable(pipe, "its decoder does not read the sampler's last latent")
        return grad.detach()

    factor, v = pulled(torch.ones_like(z)), torch.linspace(1, 2, z.numel(), device=z.device).view_as(z)
    moves = z.numel() == final.numel() and bool((factor != 0).all())
    if not moves or not torch.allclose(pulled(v) ** 2, pulled(v**2) * factor, rtol=1e-2):
        raise _not_encodable(pipe, "the way from its latents to its decoder mixes elements")
    found = []
    for path in paths:
        pixels = _pixels(path, *picture.shape[-2:]).to(device=z.device, dtype=next(vae.parameters()).dtype)
        with torch.no_grad():
            encoded = vae.encode(pixels.unsqueeze(2) if z.ndim == 5 else pixels)  # type: ignore[operator]
        dist = getattr(encoded, "latent_dist", None)
        latent = dist.mode() if dist is not None else encoded[0]
        if latent.shape != z.shape:
            raise _not_encodable(pipe, f"it encodes to {tuple(latent.shape)} and decodes from {tuple(z.shape)}")
        found.append((final.detach() + pulled(latent - z.detach()) / factor**2).cpu())
    return _widened(torch.cat(found))


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """Pictures of `folder` with their captions, by name: from `metadata.jsonl` ({"file_name": ..., "text": ...} a
    line, as Hugging Face's image folders have it), or from `NAME.txt` beside each picture.

    Raises ConfigError for a missing folder, a folder without pictures, and a picture without caption.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not paths:
        what = f"holds no picture ({', '.join(IMAGES)})" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"denoise.images: {folder} {what}")
    listed: dict[str, str] = {}
    table = folder / "metadata.jsonl"
    try:
        if table.exists():
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            listed = {row["file_name"]: row["text"] for row in rows}
        for path in paths:
            beside = path.with_suffix(".txt")
            if path.name not in listed and beside.exists():
                listed[path.name] = beside.read_text(encoding="utf-8").strip()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"denoise.images: {folder}: captions cannot be read ({error!r}); a line of metadata.jsonl is "
            '{"file_name": "a.png", "text": "a red heart"}'
        ) from error
    bare = [path.name for path in paths if path.name not in listed]
    if bare:
        raise ConfigError(
            f"denoise.images: {len(bare)} of {len(paths)} pictures in {folder} have no caption (first: {bare[0]}): add "
            f"them to metadata.jsonl, or write {Path(bare[0]).stem}.txt"
        )
    return [(path, listed[path.name]) for path in paths]


def _pixels(path: Path, height: int, width: int) -> Tensor:
    """The picture ``(1, 3, H, W)`` in [-1, 1]: turned as its camera says, scaled to cover, the middle cut out."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
            picture = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except OSError as error:
        raise ConfigError(f"denoise.images: {path} cannot be read: {error}") from error
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
    return flat.view(1, height, width, 3).permute(0, 3, 1, 2) / 127.5 - 1


def _save(file: Path, key: str, latents: Tensor, captions: list[str]) -> None:
    from safetensors.torch import save_file

    with atomic(file) as temporary:
        save_file({"latents": latents.contiguous()}, temporary, {"key": key, "captions": json.dumps(captions)})


def _load(file: Path, key: str) -> tuple[Tensor, list[str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            facts, latents = stored.metadata() or {}, stored.get_tensor("latents")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"the denoising set {file} cannot be read ({error}): delete it, it is made again") from error
    if facts.get("key") != key:
        raise ConfigError(
            f"the denoising set {file} was made with other settings (sampling, prompts, seed, images or count): delete "
            "it to have it made again, or go back to those settings"
        )
    return latents, json.loads(facts["captions"])


# Looking at the pipeline ----------------------------------------------------------------------------------------------


def _steps(scheduler: Any, T: int, noise_range: tuple[float, float]) -> tuple[int, ...]:
    """Steps i with t / T in the range, t = T - i; without the first, and without half-steps of second order."""
    low, high = noise_range
    halves = hasattr(type(scheduler), "state_in_first_order")  # Heun, KDPM2 ...: every other step
    found = [i for i in range(1, T) if low - 1e-9 <= (T - i) / T <= high + 1e-9 and not (halves and i % 2)]
    if not found:
        raise ConfigError(
            f"denoise.noise_range={list(noise_range)} holds no step of this sampler's {T} (its first, pure noise, does "
            "not count): widen the range or sample in more steps"
        )
    return tuple(found)


def _without_guidance(prompts: Sequence[str], call: dict[str, Any]) -> dict[str, Any]:
    """`call`, of `_unguided`, for these prompts, whose own negative prompts are left out too."""
    given = evaluate.for_prompts(prompts, call)
    return {key: value for key, value in given.items() if not key.startswith("negative_prompt")}


def _probe(pipe: Any, name: str, T: int, call: dict[str, Any], empty: str, *, output_type: str = "latent") -> Doors:
    """One sample's chain at the cost of two network calls, the last step's with a graph behind it."""
    given = _without_guidance([empty], call) | {"generator": evaluate.generators([0])}
    doors = Doors(pipe, Plan(T=T, train=frozenset({T - 1})), denoiser=name, blank=True)
    with aside(pipe), seeded(0, pipe), doors.open():
        pipe(**{**given, "output_type": output_type, "return_dict": False})
    return doors


def _unguided(pipe: Any, name: str, T: int, call: dict[str, Any], empty: str) -> tuple[dict[str, Any], list[Any]]:
    """`call` without guidance, and the timesteps of its steps.

    A guidance scale that the network itself reads (distilled models) is kept: only what combines several predictions
    is switched off, and that it is off is read from the graph between the network and `scheduler.step`.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    plain = {key: value for key, value in call.items() if not key.startswith("negative_prompt")}
    plain |= {key: value for key, value in OFF.items() if key in accepted}
    scales: list[dict[str, Any]] = [{}]
    if "guidance_scale" in accepted:
        scales += [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}]
    for scale in scales:
        doors = _probe(pipe, name, T, plain | scale, empty)
        if _is_single(doors):
            return plain | scale, doors.timesteps
    raise PreflightError(
        f"the guidance of {type(pipe).__name__} cannot be switched off by its arguments, which the denoising loss "
        "needs: set denoise.weight to 0"
    )


def _is_single(doors: Doors) -> bool:
    """Whether every element of the scheduler's model_output comes from one element of one network output."""
    F = doors.prediction
    leaves = [leaf for c in doors.calls if c.module is doors.denoiser for leaf in c.leaves if leaf is not None]
    if F is None or not F.requires_grad:
        return False
    grads = torch.autograd.grad(F.sum(), leaves, retain_graph=True, allow_unused=True)
    factors = torch.cat([g[g != 0].abs().float() for g in grads if g is not None])
    return factors.numel() == F.numel() and bool((factors - factors[0]).abs().max() <= 1e-3 * factors[0])


def _not_encodable(pipe: Any, why: str) -> PreflightError:
    return PreflightError(
        f"pictures cannot be encoded for {type(pipe).__name__}: {why}. Leave denoise.images out: pictures that the "
        "base model samples beforehand serve instead"
    )


def _widened(latents: Tensor) -> Tensor:
    return latents if latents.dtype == torch.float64 else latents.float()


__all__ = ["Denoising", "DenoisingLoss", "encode", "predict", "read_captions", "target"]
