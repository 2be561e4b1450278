"""What every pipeline must hold, put to the small ones of `zoo`: the engine's contract, and a row of the table.

Pictures: a chain whose steps are all left alone is plain `pipe(...)` bit for bit, one with an early stop is the
oracle's. Gradients: Algorithm 1 by one autograd graph (`oracle.py`), for DRTune with its early stop, nested DRaFT-3 and
ReFL. Afterwards the pipeline is what it was, and its gradients are after a preflight. A LoRA that is saved and loaded
into the same weights gives the same pictures. Other schedulers are tried by DRTune with its early stop.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import judge
import numpy as np
import oracle
import pytest
import tiny
import torch
import zoo
from PIL import Image

from rewardtune import adapters
from rewardtune.engine import count_steps, find_denoiser, preflight
from rewardtune.errors import PreflightError, RewardTuneError

METHODS = ("drtune", "draft-3", "refl")
#: Bound of a gradient's relative difference in float32. Nested ones pass it by rounding, some on one processor and not
#: on another: Kandinsky 5's 7e-5, Sana's 0.8e-5 and 1.2e-5. So up to ROUNDED is allowed to them where the same gradient
#: in float64 is within DOUBLE.
BOUND, DOUBLE = 1e-5, 1e-12
ROUNDED = {"Kandinsky5T2IPipeline": 3e-4, "SanaPipeline": 3e-5}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
#: What a pipeline is tried with besides its own scheduler, by what its scheduler is.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "diffusion": {
        "EulerDiscreteScheduler": {},
        "DPMSolverMultistepScheduler": {},
    },
    "flow": {
        "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
        "UniPCMultistepScheduler": FLOW,
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pipeline's row in the table.

    status: "exact", or "refused" with the `reason` that the preflight gives. schedulers: other ones that are exact;
    None: none was tried.
    calls: of the denoiser between two steps of the scheduler. lora: who writes and reads the file, "pipeline" or,
    where its class has no `load_lora_weights`, "denoiser" (`adapters.load_lora`).
    """

    pipeline: str
    denoiser: str
    scheduler: str
    schedulers: tuple[str, ...] | None = None
    guidance: str = ""
    calls: int = 0
    lora: str = ""
    status: str = "exact"
    reason: str = ""


def row(name: str, *, methods: Sequence[str] = METHODS, others: bool = True) -> Row:
    """The contract on `zoo.PIPELINES[name]`; AssertionError where it is broken."""
    pipe, call = zoo.PIPELINES[name]()
    kinds = {
        "pipeline": name,
        "denoiser": type(denoiser_of(pipe)).__name__,
        "scheduler": type(pipe.scheduler).__name__,
    }
    gradients = {p: torch.ones_like(p) for p in tiny.trainable(pipe).values()}
    for p, given in gradients.items():
        p.grad = given
    try:
        facts = preflight(pipe, **tiny.fresh(call))
    except PreflightError as refusal:
        return Row(**kinds, status="refused", reason=str(refusal))
    assert all(p.grad is given and bool((given == 1).all()) for p, given in gradients.items())
    for method in methods:
        check_gradient(pipe, call, method, T=facts.T)
    check_left_as_it_was(pipe, call, T=facts.T)
    check_lora(name, pipe, call)
    tried = None
    if others:
        tried = tuple(other for other in candidates(pipe) if exact_with(pipe, call, other))
    lora = "pipeline" if adapters.loads_lora(pipe) else "denoiser"
    return Row(**kinds, schedulers=tried, guidance=facts.guidance, calls=facts.calls_per_step, lora=lora)


def denoiser_of(pipe: Any) -> torch.nn.Module:
    return pipe.components[find_denoiser(pipe)]


def check_gradient(pipe: Any, call: tiny.Call, method: str, *, T: int) -> None:
    plan = judge.PLANS[method](T)
    pictures, result, literal, apart = beside_the_oracle(pipe, call, plan)
    if apart >= BOUND:
        assert apart < ROUNDED.get(type(pipe).__name__, BOUND), (method, apart)
        with everywhere_double(pipe, call) as double:
            exactly = beside_the_oracle(*double, plan)[-1]
        assert exactly < DOUBLE, (method, apart, exactly)
    expected = literal
    if plan.end is None:
        expected = pictures_as_numpy(pipe, call)
    apart = float((pictures - expected).abs().max())
    assert apart <= (0 if plan.end is None or oracle.own_prediction(pipe.scheduler) else 2e-6), (method, apart)
    assert result.trained == plan.executed
    assert result.replay_error == 0


def beside_the_oracle(pipe: Any, call: tiny.Call, plan: Any) -> tuple[torch.Tensor, Any, torch.Tensor, float]:
    """(the engine's pictures, its sweep, the oracle's pictures, the gradients' relative difference)."""
    pictures, gradient, result = judge.engine_gradient(pipe, plan, call)
    fields: dict[str, Any] = {"train": plan.train, "end": plan.end, "input_gradient": plan.input_gradient}
    with for_autograd(pipe):
        literal = oracle.images(pipe, **fields, call=tiny.fresh(call), own_decoding=True)
        exact = oracle.gradients(tiny.trainable(pipe), oracle.generic_loss(literal))
    return pictures, result, literal.detach(), oracle.difference(gradient, exact)


@contextlib.contextmanager
def everywhere_double(pipe: Any, call: tiny.Call) -> Iterator[tuple[Any, tiny.Call]]:
    """`tiny.double` for networks that turn much of what they are given into float32: that is float64 in the block."""
    to = torch.Tensor.to

    def wide(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return to(tensor, *args, **kwargs)

    with tiny.double(pipe, call) as double, pytest.MonkeyPatch.context() as patch:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.double()  # some refuse `to` for parts of them
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.Tensor, "to", wide)
        yield double
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()


def pictures_as_numpy(pipe: Any, call: tiny.Call, *, seed: int = 0) -> torch.Tensor:
    """What people see: a few pipelines leave the last line, x / 2 + 0.5, to their output as "np"."""
    torch.manual_seed(seed)
    return torch.as_tensor(pipe(**tiny.fresh(call), output_type="np")[0]).permute(0, 3, 1, 2)


@contextlib.contextmanager
def for_autograd(pipe: Any) -> Iterator[None]:
    """Two networks of diffusers cannot be differentiated as they are; this mends them for the oracle.

    HiDream's experts are summed under `no_grad` unless they train, and Z-Image's ControlNet reads an attribute that it
    lacks as soon as a gradient is wanted.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    experts = [m for part in networks for m in part.modules() if hasattr(m, "moe_infer") and not m.training]
    lacking = [part for part in networks if not hasattr(part, "gradient_checkpointing")]
    for module in experts:
        module.training = True
    for module in lacking:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in experts:
            module.training = False
        for module in lacking:
            del module.gradient_checkpointing


def check_left_as_it_was(pipe: Any, call: tiny.Call, *, T: int) -> None:
    """Attributes, pictures, and what is trained."""
    before, kept = judge.plain_images(pipe, call), attributes(pipe)
    flags = [p.requires_grad for p in denoiser_of(pipe).parameters()]
    judge.engine_gradient(pipe, judge.PLANS["drtune"](T), call)
    assert attributes(pipe) == kept
    assert flags == [p.requires_grad for p in denoiser_of(pipe).parameters()]
    assert torch.equal(judge.plain_images(pipe, call), before)


def attributes(pipe: Any) -> dict[str, dict[str, int | None]]:
    """Which attributes the pipeline, its networks and its scheduler have, and which object each of a network's is."""
    owners = {"": pipe, **{key: part for key, part in pipe.components.items() if hasattr(part, "__dict__")}}
    found = {}
    for name, owner in owners.items():
        network = isinstance(owner, torch.nn.Module)
        found[name] = {
            key: id(value) if network and not key.startswith("_") else None for key, value in vars(owner).items()
        }
    return found


def check_lora(name: str, pipe: Any, call: tiny.Call) -> None:
    tuned = judge.plain_images(pipe, call)
    other, _ = zoo.PIPELINES[name]()
    adapters.detach(denoiser_of(other))
    bare = judge.plain_images(other, call)
    assert not torch.equal(bare, tuned), "the LoRA changes no picture: this comparison could not fail"
    with tempfile.TemporaryDirectory() as folder:
        adapters.save(pipe, folder)
        adapters.load_lora(other, folder)
    assert torch.equal(judge.plain_images(other, call), tuned)
    adapters.unload_lora(other)
    assert torch.equal(judge.plain_images(other, call), bare)


# Other schedulers -----------------------------------------------------------------------------------------------------


def kind_of(scheduler: Any) -> str:
    """flow: also schedulers of diffusion that are set to flow matching (Sana's DPM-Solver)."""
    flows = scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod")
    return "flow" if flows else "diffusion"


def candidates(pipe: Any) -> list[str]:
    return [name for name in OTHERS[kind_of(pipe.scheduler)] if name != type(pipe.scheduler).__name__]


def exact_with(pipe: Any, call: tiny.Call, scheduler: str) -> bool:
    """Whether the pipeline samples with this scheduler, and its gradient is then exact. AssertionError: it is not."""
    kind, own = kind_of(pipe.scheduler), pipe.scheduler
    try:
        tiny.set_scheduler(pipe, scheduler, **OTHERS[kind][scheduler])
        try:
            usable = bool(torch.isfinite(judge.plain_images(pipe, call)).all())
        except Exception:  # each pipeline has its own way of refusing; the table leaves the scheduler out
            usable = False
        if usable:
            check_gradient(pipe, call, "drtune", T=count_steps(pipe, **tiny.fresh(call)))
        return usable
    except RewardTuneError:  # said aloud: no steps to count, or a gradient that is zero or not finite
        return False
    finally:
        pipe.scheduler = own


# Pipelines that begin with a picture ----------------------------------------------------------------------------------

#: Image-to-image classes, and the class of the zoo that has the same networks.
IMG2IMG = {
    f"{family}Img2ImgPipeline": f"{family}Pipeline"
    for family in (
        "StableDiffusion",
        "StableDiffusionPAG",
        "StableDiffusionControlNet",
        "StableDiffusionXL",
        "StableDiffusionXLPAG",
        "StableDiffusionXLControlNet",
        "StableDiffusion3",
        "Flux",
        "FluxControlNet",
        "LatentConsistencyModel",
        "Kolors",
        "QwenImage",
        "ZImage",
        "IF",
    )
}


def image_to_image(name: str) -> tuple[Any, tiny.Call]:
    """The pipeline with a picture for each prompt, half of eight steps."""
    import diffusers

    base, call = zoo.PIPELINES[IMG2IMG[name]]()
    kind = getattr(diffusers, name)
    takes, asks = (inspect.signature(of).parameters for of in (kind.__init__, kind.__call__))
    parts = {key: value for key, value in base.components.items() if key in takes}
    parts |= {key: False for key in ("requires_safety_checker", "add_watermarker") if key in takes}
    height, width = judge.plain_images(base, call).shape[-2:]
    count = len(call["prompt"]) if isinstance(call["prompt"], list) else 1
    draw = np.random.default_rng(0).integers
    pictures = [Image.fromarray(draw(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
    given = {key: value for key, value in call.items() if key in asks and key not in ("sigmas", "timesteps")}
    beside = {key: pictures for key in ("image", "control_image") if key in asks}
    return tiny.quiet(kind(**parts)), {**given, **beside, "num_inference_steps": 8, "strength": 0.5}


# What is left out -----------------------------------------------------------------------------------------------------

#: Pipelines of diffusers that are no text-to-image pipelines, by name or by the file that has them (first that fits).
NOT_TEXT_TO_IMAGE: dict[str, str] = {
    r"/deprecated/|^AltDiffusion|^VersatileDiffusion|^UniDiffuser": "deprecated in diffusers",
    r"Modular|^DiffusionPipeline$": "modular or abstract: no single call whose networks and scheduler can be held",
    r"Onnx": "no torch graph",
    r"Img2Img|Depth2Img|Kandinsky5I2I|^LEdits|Emb2Emb": "starts from a picture: IMG2IMG above",
    r"Inpaint|Fill|RePaint|PaintByExample": "fills a hole of a given picture",
    r"Edit|Pix2Pix|Layered|VisualCloze|Redux|ImageVariation|DualGuided": "edits or varies a given picture",
    r"Upscale|SuperResolution|Upsample|Refiner|Kandinsky6SR": "enlarges or refines a given picture",
    r"Video|I2V|T2V|TI2V|^(AnimateDiff|Allegro|AnyFlow|ConsisID|EasyAnimate|Helios|HunyuanSkyreels|LTX|Latte|Mochi|PIA|"
    r"SkyReels|Wan)|^Cosmos(?!2TextToImage)|^SanaWM": "moving pictures",
    r"Audio|Music|Dance|Spectrogram|AceStep": "sound",
    r"ShapE|RFD4|LLaDA|Gemma": "gives no picture: shapes, molecules, text",
    r"^(DDIM|DDPM|PNDM|LDM|ScoreSdeVe|KarrasVe|ConsistencyModel|DiT)Pipeline": "has no prompt",
    r"Marigold": "measures a given picture",
    r"Prior|Decoder": "one stage of several: gives, or begins with, an embedding",
}
#: Text-to-image pipelines that are not in the zoo.
LEFT_OUT: dict[str, str] = {
    "AmusedPipeline": "masked tokens are drawn: no gradient",
    "BlipDiffusionControlNetPipeline": "needs a picture of a subject, and a class that is deprecated",
    "BriaFibo2Pipeline": "not built: its processor reads pictures and text by Qwen3-VL's own template",
    "Cosmos2TextToImagePipeline": "needs the package cosmos_guardrail",
    "KandinskyCombinedPipeline": "two stages; as KandinskyV22CombinedPipeline, which is in the table",
    "KandinskyPipeline": "begins with the embedding of a prior, not with a prompt alone",
    "KandinskyV22Pipeline": "begins with the embedding of a prior, not with a prompt",
    "KandinskyV22ControlnetPipeline": "begins with the embedding of a prior, not with a prompt",
    "LDMTextToImagePipeline": "not built: the latent diffusion of 2022 with a BERT of its own",
    "OmniGenPipeline": "not built: a language model that keeps keys and values from step to step",
    "StableCascadeCombinedPipeline": "two stages with a scheduler each",
    "StableUnCLIPPipeline": "two stages: a prior's chain in the same call",
}


@cache
def defined() -> dict[str, str]:
    """Every pipeline class in the installed diffusers' sources: its file below `pipelines`."""
    import diffusers

    root = Path(diffusers.__file__).parent / "pipelines"
    found = {}
    for path in root.rglob("*.py"):
        for name in re.findall(r"^class (\w+Pipeline)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found[name] = f"/{path.relative_to(root).as_posix()}"
    return found


def exported() -> list[str]:
    """The pipeline classes that `import diffusers` offers."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Pipeline"))


def why_not(name: str) -> str | None:
    """Why this pipeline is not in the zoo; None: nobody has said."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    for pattern, reason in NOT_TEXT_TO_IMAGE.items():
        if re.search(pattern, name) or re.search(pattern, defined().get(name, "")):
            return reason
    return None
