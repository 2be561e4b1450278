"""The pipeline that a run tunes: from the hub, a folder, one .safetensors file or the playground, as a run file says.

Everything is diffusers' own; here are the checks that come before weights load, and errors that say what to type.
Left out: pickled checkpoints (.ckpt, .bin run code when opened), quantised text encoders.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, first_line, missing_package, out_of_memory
from .quietly import no_loading_bars
from .spelling import nearest

T = TypeVar("T")

#: Keyword arguments of diffusers' BitsAndBytesConfig.
QUANTIZE: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def load_pipeline(
    id: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    vae_dtype: str | None = None,
    scheduler: str | None = None,
    aside: bool = False,
    pipeline: str | None = None,
    controlnet: str | None = None,
) -> Any:
    """The diffusers pipeline on its device.

    Args:
        id: a hub id, a folder saved by `pipe.save_pretrained`, one .safetensors file, or `playground`.
        revision, variant: branch, tag or commit of the hub id; file variant such as `fp16`.
        config: diffusers folder or hub id with the configuration of a single file; None = guessed from its keys.
        dtype: float32, bfloat16 or float16; device: auto, cpu, cuda, cuda:1, mps.
        quantize: `int8` or `nf4` holds the denoiser's weights in 8 or 4 bits (CUDA, extra `quantize`).
        compile: torch.compile of the denoiser's repeated blocks (see `compile_blocks`).
        gradient_checkpointing: the denoiser keeps its blocks' inputs only, and computes them twice for a gradient.
        vae_dtype: float32 or bfloat16; None = float32 beside a float16 model (its pictures would turn black), else
            the model's own.
        scheduler: name of a diffusers scheduler class; None = as saved.
        aside: the denoiser waits on the CPU, to be sharded from there (sharding.py).
        pipeline: name of another pipeline class of diffusers for the same networks; controlnet: hub id or folder of the
            ControlNet that it takes.

    Raises ConfigError when it cannot be had, where possible before any weights load.
    """
    import torch

    where = _device(device)
    if pipeline is not None:
        _class_of("Pipeline", pipeline)
    if scheduler is not None:
        _class_of("Scheduler", scheduler)
    _refuse_misfits(id, revision=revision, variant=variant, config=config, quantize=quantize)
    floating = _dtype(dtype, "model.dtype", ("float32", "bfloat16", "float16"))
    vae = floating if vae_dtype is None else _dtype(vae_dtype, "memory.vae_dtype", ("float32", "bfloat16"))
    if vae_dtype is None and floating == torch.float16:
        vae = torch.float32
    settings = {"revision": revision, "variant": variant}
    if quantize is not None:
        _refuse_quantize(quantize, where.type)
        settings["quantization_config"] = _quantization(id, quantize, floating, revision)
    if id == "playground":
        from . import playground

        pipe = playground.pipeline(floating)
    elif _is_single_file(id):
        pipe = _from_single_file(Path(id), config, floating)
    else:
        pipe = _from_pretrained(id, floating, {key: value for key, value in settings.items() if value is not None})
    if pipeline is not None:
        pipe = _as_class(pipe, pipeline, controlnet, floating)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    if isinstance(getattr(pipe, "vae", None), torch.nn.Module) and pipe.vae.dtype != vae:
        pipe.vae.to(vae)
    pipe = check_device(device, lambda: _without_denoiser(pipe, where) if aside else pipe.to(where))
    denoiser = _denoiser(pipe)
    if gradient_checkpointing:
        checkpoint_blocks(denoiser)
    if compile:
        compile_blocks(denoiser)
    return pipe


def _as_class(pipe: Any, name: str, controlnet: str | None, dtype: Any) -> Any:
    """The same networks in another pipeline class, with a ControlNet if one is given."""
    import diffusers

    cls = _class_of("Pipeline", name)
    try:
        more = {} if controlnet is None else {"controlnet": diffusers.AutoModel.from_pretrained(controlnet)}
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.controlnet={controlnet} does not load: {first_line(error)}") from error
    try:
        return cls.from_pipe(pipe, torch_dtype=dtype, **more)
    except (ValueError, TypeError, AttributeError) as error:
        kind, why = type(pipe).__name__, first_line(error)
        raise ConfigError(f"model.pipeline={name} cannot be made of this {kind}: {why}") from error


def checkpoint_blocks(denoiser: Any) -> None:
    """Switch the denoiser's gradient checkpointing on; ConfigError where the model has none."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise ConfigError(
            f"memory.gradient_checkpointing: {type(denoiser).__name__} has no gradient checkpointing; set it to false"
        )
    denoiser.enable_gradient_checkpointing()


def compile_blocks(denoiser: Any, *, backend: str = "inductor") -> None:
    """torch.compile each repeated block of the denoiser, in place; the first call of each shape compiles.

    The blocks are compiled, not the network around them, so the engine's doors, LoRA and checkpointing stay outside.
    A compiled block makes one graph to sample and another one for gradients. Their results differ by round-off, which
    the engine compares with its tolerance at every trained step.
    Raises ConfigError where the model names no repeated blocks.
    """
    try:
        denoiser.compile_repeated_blocks(backend=backend)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"model.compile: {type(denoiser).__name__} names no repeated blocks to compile; set it to false"
        ) from error


@contextmanager
def offloaded_vae(pipe: Any) -> Iterator[None]:
    """The VAE waits on the CPU while the denoiser works, when it samples and when it is replayed.

    It comes when it decodes and leaves at the denoiser's next call, by accelerate's offload hook, which also tells
    diffusers where the pipeline computes. Afterwards it is where it was. Nothing happens on the CPU.
    """
    from accelerate import cpu_offload_with_hook

    vae = getattr(pipe, "vae", None)
    if vae is None or vae.device.type == "cpu" or hasattr(vae, "_hf_hook"):  # offloaded by the user
        yield
        return
    device = vae.device
    _, hook = cpu_offload_with_hook(vae, device)

    def leave(*_: Any) -> None:
        if vae.device.type != "cpu":
            hook.offload()

    handle = _denoiser(pipe).register_forward_pre_hook(leave)
    try:
        yield
    finally:
        handle.remove()
        hook.remove()
        vae.to(device)


def _without_denoiser(pipe: Any, device: Any) -> Any:
    import torch

    denoiser = _denoiser(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part is not denoiser:
            part.to(device)
    return pipe


def _denoiser(pipe: Any) -> Any:
    from .engine import find_denoiser

    return getattr(pipe, find_denoiser(pipe))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device={name!r}: no such device; legal are auto, cpu, cuda, cuda:1, mps") from error


def check_device(name: str, put: Callable[[], T]) -> T:
    """put(), which puts something on the device `name`; ConfigError with the legal devices where there is none."""
    try:
        return put()
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"model.device={name!r}: {first_line(error)}; this PyTorch on this machine has {', '.join(_devices())}"
        ) from error


def _devices() -> list[str]:
    """What model.device may be here."""
    import torch

    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["auto", "cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _dtype(name: str, setting: str, legal: tuple[str, ...]) -> Any:
    import torch

    if name not in legal:
        hint = "; a VAE in float16 gives black pictures" if setting == "memory.vae_dtype" else nearest(name, legal)
        raise ConfigError(f"{setting}={name!r}{hint}; legal are {', '.join(legal)}")
    return getattr(torch, name)


def _is_single_file(id: str) -> bool:
    return id.endswith(".safetensors")


def _refuse_misfits(
    id: str, *, revision: str | None, variant: str | None, config: str | None, quantize: str | None
) -> None:
    """Settings that this kind of model would ignore silently, and files that are no model."""
    path = Path(id)
    single = _is_single_file(id)
    if single and not path.is_file():
        raise ConfigError(f"model {id}: no such file")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(
            f"model {id}: a pickled file may run any code when it is opened; give a .safetensors file of the same model"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ConfigError(
            f"model {id}: the folder has no model_index.json; give a folder saved by pipe.save_pretrained"
        )
    if not single and not path.is_dir() and (id[0] in "./~\\" or id.count("/") > 1):
        raise ConfigError(
            f"model {id}: there is no such folder; give a folder saved by pipe.save_pretrained, a .safetensors file, "
            "a hub id (owner/name), or `playground`"
        )
    local = single or path.is_dir() or id == "playground"
    if revision is not None and local:
        raise ConfigError(f"model.revision={revision!r} is for hub ids; {id} is on this machine: leave it out")
    if variant is not None and (single or id == "playground"):
        raise ConfigError(f"model.variant={variant!r} is for hub ids and folders; {id} has one set of weights")
    if config is not None and not single:
        raise ConfigError(f"model.config={config!r} is for a single .safetensors file; {id} brings its own")
    if config is not None and not (Path(config) / "model_index.json").is_file() and Path(config).exists():
        raise ConfigError(f"model.config={config}: no model_index.json there; give a diffusers folder or a hub id")
    if quantize is not None and (single or id == "playground"):
        raise ConfigError(
            f"model.quantize={quantize!r} is for hub ids and diffusers folders, not for {id}; "
            "save the pipeline with pipe.save_pretrained(folder) first, or leave it out"
        )


def _refuse_quantize(name: str, device: str) -> None:
    """ConfigError for an unknown kind, for a device without the kernels, and without bitsandbytes."""
    if name not in QUANTIZE:
        raise ConfigError(f"model.quantize={name!r}{nearest(name, QUANTIZE)}; legal are {', '.join(QUANTIZE)}, null")
    if device != "cuda":
        raise ConfigError(
            f"model.quantize={name!r} needs a CUDA device, but the model is put on {device}; set model.quantize=null"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantize={name!r} needs bitsandbytes, which is not installed: pip install 'rewardtune[quantize]'"
        )


def _quantization(id: str, name: str, dtype: Any, revision: str | None) -> Any:
    """diffusers' PipelineQuantizationConfig for the denoiser alone."""
    from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig

    from .engine.doors import DENOISERS

    try:
        names = DiffusionPipeline.load_config(id, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError) as error:
        raise _cannot_load(id, error) from error
    denoiser = next((key for key in DENOISERS if key in names), None)
    if denoiser is None:
        raise ConfigError(
            f"model.quantize={name!r}: {id} has no {' / '.join(DENOISERS)} to quantise; set model.quantize=null"
        )
    compute = {"bnb_4bit_compute_dtype": dtype} if name == "nf4" else {}
    mapping: dict[str, Any] = {denoiser: BitsAndBytesConfig(**QUANTIZE[name], **compute)}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _from_pretrained(path: str, dtype: Any, settings: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():  # newer diffusers call it dtype, older ones do not know that name
            warnings.simplefilter("ignore", FutureWarning)
            with no_loading_bars() if Path(path).is_dir() else nullcontext():
                return DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, **settings)
    except (OSError, ValueError, ImportError) as error:
        if package := missing_package(error):
            raise ConfigError(
                f"model {path!r} needs the package {package}, which is not installed: pip install {package}"
            ) from error
        if isinstance(error, ImportError):
            raise
        raise _cannot_load(path, error) from error


def _from_single_file(file: Path, config: str | None, dtype: Any) -> Any:
    """One file of the layout that a model was published in; diffusers converts it with the configuration in `config`.

    Without `config`, diffusers guesses the model by its keys and fetches the configuration from the hub.
    """
    import diffusers

    source = config or _guessed_config(file)
    try:
        name = diffusers.DiffusionPipeline.load_config(source)["_class_name"]
        cls: Any = getattr(diffusers, name, None)
        if not hasattr(cls, "from_single_file"):
            raise ConfigError(f"model {file}: diffusers has no single-file loading for {name}; give a diffusers folder")
        with warnings.catch_warnings(), no_loading_bars():
            warnings.simplefilter("ignore", FutureWarning)
            pipe = cls.from_single_file(str(file), config=source, torch_dtype=dtype)
    except ConfigError:
        raise
    except Exception as error:  # the converters raise whatever they stumble over
        raise ConfigError(
            f"model {file} cannot be loaded with the configuration of {source}: {first_line(error)}. Give a file that "
            "holds the whole pipeline (not a LoRA, not a single network), and the folder or hub id of a pipeline of "
            "the same kind in model.config"
        ) from error
    for name, part in pipe.components.items():
        if any(tensor.is_meta for tensor in getattr(part, "parameters", list)()):
            raise ConfigError(f"model {file} holds no weights for the {name} of {source}: is it another model.config?")
    return pipe


def _guessed_config(file: Path) -> str:
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors.torch import load_file

    try:
        return fetch_diffusers_config(load_file(file))["pretrained_model_name_or_path"]
    except Exception as error:
        raise ConfigError(f"model {file} cannot be read: {first_line(error)}") from error


def _cannot_load(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model {path!r} cannot be loaded: {first_line(error)}. Give a diffusers folder, a hub id that "
        "this machine can reach, a .safetensors file, or `playground`"
    )


def _class_of(kind: str, name: str) -> Any:
    """The class `name` of diffusers; kind: Pipeline or Scheduler. ConfigError where there is none."""
    import diffusers

    legal = [word for word in dir(diffusers) if word.endswith(kind)]
    if name not in legal:
        kind = kind.lower()
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, legal)}; legal: the {kind} classes of diffusers")
    return getattr(diffusers, name)


def make_scheduler(name: str, old: Any) -> Any:
    """The diffusers scheduler class `name` with the configuration of `old`. ConfigError for an unknown one."""
    cls = _class_of("Scheduler", name)
    return cls.from_config({**scheduler_defaults(cls), **old.config})


def scheduler_defaults(cls: Any) -> dict[str, Any]:
    """What a scheduler of this class gets where the configuration before it says nothing."""
    clips = "clip_sample" in inspect.signature(cls.__init__).parameters
    return {"clip_sample": False} if clips else {}  # DDIM's and DDPM's default is for pixels
