"""What is trained in the denoiser: LoRA or DoRA by peft, or all of its weights.

Saved in the diffusers format, loaded back and compared before anyone relies on it.
Left out: kohya keys, text-encoder adapters.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine import find_denoiser, quiet
from .engine.chain import fresh
from .errors import ConfigError, RewardTuneError, first_line
from .quietly import no_text_encoder_remarks
from .runfolder import DENOISER_FOLDER, LORA_FILE, atomic
from .spelling import nearest

ADAPTER = "rewardtune"
KINDS = ("lora", "dora", "full")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_query", "to_key", "to_value")
GROUPS = {
    "attention": "the attention projections " + ", ".join(ATTENTION),
    "attention+conv": "the same and every convolution",
    "all-linear": "every linear layer",
    "all": "every linear layer and convolution",
}


def trainable(denoiser: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def attach(
    denoiser: Any,
    *,
    kind: str = "lora",
    rank: int = 128,
    alpha: int | None = None,
    targets: str | list[str] | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Make `denoiser` trainable as `kind` says and return the float32 parameters to train.

    kind: "lora"; "dora", which trains the norm of every output of a layer besides its direction (Liu et al. 2024,
    arXiv 2402.09353, eq. 5); "full", all weights (the base model must be loaded in float32).
    rank, alpha, targets, seed: see `add_lora`; "full" does not use them.
    The pictures do not change: exactly with lora and full, up to round-off with dora.
    Raises ConfigError for an unknown kind, and where the denoiser does not fit. `detach` undoes it.
    """
    if kind == "lora":
        return add_lora(denoiser, rank, alpha=alpha, targets=targets, seed=seed)
    if kind == "dora":
        return _add_adapter(denoiser, rank, alpha=alpha, targets=targets, seed=seed, dora=True)
    if kind == "full":
        return _train_all(denoiser)
    raise ConfigError(f"adapter.kind={kind!r}{nearest(kind, KINDS)}; legal are {', '.join(KINDS)}")


def detach(denoiser: Any) -> None:
    """Take the adapter of `attach` off and freeze the denoiser; what full fine-tuning has changed stays."""
    if ADAPTER in getattr(denoiser, "peft_config", {}):
        denoiser.unload_lora()
    denoiser.requires_grad_(False)


def add_lora(
    denoiser: Any, rank: int, *, alpha: int | None = None, targets: str | list[str] | None = None, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze `denoiser`, add a LoRA of `rank` and scale alpha / rank (default 1), return its parameters.

    They are float32, or float64 on a float64 base.

    targets: a key of GROUPS (default "attention") or a list of module-name suffixes.
    lora_B starts at zero, so the pictures do not change; lora_A is drawn from `seed`.
    Raises ConfigError when nothing matches, or when the denoiser carries an adapter already.
    """
    return _add_adapter(denoiser, rank, alpha=alpha, targets=targets, seed=seed, dora=False)


def _add_adapter(
    denoiser: Any, rank: int, *, alpha: int | None, targets: str | list[str] | None, seed: int, dora: bool
) -> list[nn.Parameter]:
    from peft import LoraConfig

    if rank < 1:
        raise ConfigError(f"LoRA rank {rank}: must be at least 1")
    _refuse_adapters(denoiser)
    names = _match(denoiser, targets or "attention")
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names, use_dora=dora)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adaptable(denoiser).add_adapter(config, adapter_name=ADAPTER)
    parameters = trainable(denoiser)
    for parameter in parameters:  # peft creates them in the base's dtype here: fp16 Adam steps would vanish
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if dora:
        _exact_magnitudes(denoiser)
    assert parameters
    assert all(parameter.dtype in (torch.float32, torch.float64) for parameter in parameters)
    return parameters


def adaptable(denoiser: Any) -> Any:
    """The same network, able to hold adapters.

    A few denoisers of diffusers (PixArt, Hunyuan-DiT, CogView 3+, Lumina) lack the mixin that gives the others
    `add_adapter` and its kin. It needs nothing of them, so theirs gets a subclass of its class with the mixin.
    """
    from diffusers.loaders import PeftAdapterMixin

    kind = type(denoiser)
    if not isinstance(denoiser, PeftAdapterMixin):
        denoiser.__class__ = type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})
    return denoiser


def _refuse_adapters(denoiser: Any) -> None:
    if getattr(denoiser, "peft_config", None):
        raise ConfigError(
            f"the denoiser carries LoRA adapters already ({', '.join(denoiser.peft_config)}); "
            "fuse or remove them first: pipe.fuse_lora(); pipe.unload_lora_weights()"
        )


@torch.no_grad()
def _exact_magnitudes(denoiser: nn.Module) -> None:
    """DoRA's norms of the base weights, in float32: rounded to a half base's dtype they would change the pictures."""
    for layer, norm in _magnitudes(denoiser, ADAPTER):
        layer.weight.data.copy_(norm)


def _magnitudes(denoiser: nn.Module, adapter_name: str) -> Iterator[tuple[Any, Tensor]]:
    """peft's DoRA layers, each with the norms of its base weight in float32."""
    from peft.utils.integrations import dequantize_module_weight

    for module in denoiser.modules():
        magnitudes: Any = getattr(module, "lora_magnitude_vector", {})
        if adapter_name in magnitudes:
            weight = dequantize_module_weight(module.get_base_layer()).float()  # type: ignore[operator]
            yield (
                magnitudes[adapter_name],
                magnitudes[adapter_name].get_weight_norm(weight, torch.zeros_like(weight), 1.0),
            )


def _train_all(denoiser: Any) -> list[nn.Parameter]:
    _refuse_adapters(denoiser)
    dtypes = {parameter.dtype for parameter in denoiser.parameters()}
    if not dtypes <= {torch.float32, torch.float64}:
        given = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"adapter.kind=full trains the weights themselves, which are {given} here: small updates would be rounded "
            "away. Set model.dtype=float32 and model.quantize=null, or use adapter.kind=lora"
        )
    denoiser.requires_grad_(True)
    return trainable(denoiser)


def _match(denoiser: nn.Module, targets: str | list[str]) -> list[str]:
    """Full names of the modules to adapt. Convolutions in groups are left out: LoRA does not fit them."""
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    conv = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    if isinstance(targets, str):
        if targets not in GROUPS:
            raise ConfigError(f"LoRA targets {targets!r}: legal are {', '.join(GROUPS)}, or a list of module suffixes")
        if targets in ("all", "all-linear"):
            return linear + (conv if targets == "all" else [])
        attention = [name for name in linear if _ends_with(name, ATTENTION)]
        found = attention + (conv if targets == "attention+conv" else [])
        wanted: tuple[str, ...] = ATTENTION
    else:
        wanted = tuple(targets)
        found = [name for name in linear + conv if _ends_with(name, wanted)]
        missing = [suffix for suffix in wanted if not any(_ends_with(name, (suffix,)) for name in found)]
        if missing:
            found = []
            wanted = tuple(missing)
    if not found:
        common = [suffix for suffix, _ in Counter(_suffix(name) for name in linear + conv).most_common(16)]
        raise ConfigError(f"LoRA targets {', '.join(wanted)} match no layer; legal suffixes here: {', '.join(common)}")
    return found


def _ends_with(name: str, suffixes: tuple[str, ...]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _suffix(name: str) -> str:
    """The last part of a dotted name, with its parent when it is a bare number (to_out.0)."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def lora_state(denoiser: Any) -> dict[str, Tensor]:
    """The adapter's tensors with alpha / rank folded into lora_B, so that alpha = rank and no loader can lose it.

    The same holds for DoRA: alpha / rank stands nowhere but before lora_B lora_A, also within the norm.
    """
    from peft.utils import get_peft_model_state_dict

    config = denoiser.peft_config[ADAPTER]
    scale = config.lora_alpha / config.r
    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    return {key: (value * scale if ".lora_B." in key else value).detach().cpu() for key, value in state.items()}


def save_lora(pipe: Any, folder: str | Path) -> Path:
    """Write `folder`/pytorch_lora_weights.safetensors as the pipeline's own `save_lora_weights` does; return its path.

    A pipeline class without that method gets the same file with the same kind of keys; `load_lora` reads both.
    Written beside its place and renamed. Raises RewardTuneError when it cannot be written (the old file stays).
    """
    from safetensors.torch import save_file

    name = find_denoiser(pipe)
    layers = f"{name}_lora_layers"
    writer = getattr(pipe, "save_lora_weights", None)
    target = Path(folder) / LORA_FILE
    state = lora_state(getattr(pipe, name))
    with atomic(target) as temporary:
        try:
            if writer is not None and layers in inspect.signature(writer).parameters:
                writer(save_directory=temporary.parent, weight_name=temporary.name, **{layers: state})
            else:
                keyed = {f"{name}.{key}": value.contiguous() for key, value in state.items()}
                save_file(keyed, temporary, {"format": "pt"})
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's error in its own class
            raise OSError(f"{error}") from error
    return target


def loads_lora(pipe: Any) -> bool:
    """Whether the pipeline's class loads LoRAs by itself.

    Many do not (PixArt, Hunyuan-DiT ...), and a few have the method of another family, which asks for networks that
    they lack (PRX, Kolors with PAG).
    """
    parts = getattr(pipe, "_lora_loadable_modules", ())
    return hasattr(pipe, "load_lora_weights") and all(name in pipe.components for name in parts)


def load_lora(pipe: Any, folder: str | Path, *, weight_name: str = LORA_FILE, adapter_name: str | None = None) -> None:
    """`pipe.load_lora_weights`, also for the pipeline classes of diffusers that lack it (see `loads_lora`)."""
    if loads_lora(pipe):
        with no_text_encoder_remarks():
            pipe.load_lora_weights(str(folder), weight_name=weight_name, adapter_name=adapter_name)
        return
    name = find_denoiser(pipe)
    denoiser = adaptable(getattr(pipe, name))
    denoiser.load_lora_adapter(str(folder), weight_name=weight_name, prefix=name, adapter_name=adapter_name)


def unload_lora(pipe: Any) -> None:
    """Take off what `load_lora` has loaded."""
    if loads_lora(pipe):
        pipe.unload_lora_weights()
    else:
        getattr(pipe, find_denoiser(pipe)).unload_lora()


def weigh_lora(pipe: Any, adapter_name: str, weight: float) -> None:
    """The adapter with `weight` times its strength: 0 is the base model, 1 the adapter as trained.

    Of DoRA the magnitudes m go the same way, to ||W|| + weight (m - ||W||). diffusers' `set_adapters` leaves them.
    """
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    denoiser = getattr(pipe, find_denoiser(pipe))
    if loads_lora(pipe):
        pipe.set_adapters([adapter_name], adapter_weights=[weight])
    else:
        set_weights_and_activate_adapters(denoiser, [adapter_name], [weight])
    for layer, norm in _magnitudes(denoiser, adapter_name):
        if not hasattr(layer, "as_trained"):  # so that a second weight starts from the trained ones too
            layer.as_trained = layer.weight.detach().clone()
        layer.weight.data.copy_(norm.lerp(layer.as_trained.to(norm), weight))


def weigh_state(denoiser: Any, state: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The tensors of an adapter, by peft's names, with `weight` times its strength (as `weigh_lora`)."""
    from peft.utils.integrations import dequantize_module_weight

    weighed = {key: value * weight if ".lora_B." in key else value for key, value in state.items()}
    layers = dict(denoiser.named_modules())
    for key, value in state.items() if weight != 1 else ():
        name, found, _ = key.partition(".lora_magnitude_vector")
        if found and name in layers:
            base = dequantize_module_weight(layers[name]).detach().float().cpu()
            weighed[key] = base.flatten(1).norm(dim=1).reshape(value.shape).lerp(value.float(), weight).to(value.dtype)
    return weighed


def how_to_use(pipe: Any, folder: str | Path, *, weight: float = 1.0) -> str:
    """The line of Python that puts what `save` wrote to `folder` into another `pipe` of this class, at `weight`."""
    where = str(folder)
    if not _has_adapter(pipe):
        return f"the weights are in {Path(folder) / DENOISER_FOLDER}"
    if loads_lora(pipe) and weight == 1:
        return f"pipe.load_lora_weights({where!r})"
    if loads_lora(pipe) and not getattr(pipe, find_denoiser(pipe)).peft_config[ADAPTER].use_dora:
        return f'pipe.load_lora_weights({where!r}, adapter_name="tuned"); pipe.set_adapters(["tuned"], [{weight:g}])'
    if weight == 1:
        return f"from rewardtune.adapters import load_lora; load_lora(pipe, {where!r})"
    return (
        "from rewardtune.adapters import load_lora, weigh_lora; "
        f'load_lora(pipe, {where!r}, adapter_name="tuned"); weigh_lora(pipe, "tuned", {weight:g})'
    )


def verify_lora(pipe: Any, folder: str | Path, *, call: dict[str, Any]) -> float:
    """Load the saved file back under another name and compare with the live adapter; return the images' difference.

    Compared are every tensor, the scale, and the pictures of `pipe(**call)` with the same noise; two steps are enough.
    Raises RewardTuneError when a key did not load or the pictures differ by more than round-off of the dtype.
    """
    from peft.utils import get_peft_model_state_dict

    denoiser = getattr(pipe, find_denoiser(pipe))
    copy = ADAPTER + "_verify"
    expected = lora_state(denoiser)
    live = _images(pipe, call)
    noise = float((_images(pipe, call) - live).abs().max())  # 0 unless the machine itself does not repeat
    try:
        try:
            with _silent():
                load_lora(pipe, folder, adapter_name=copy)
        except Exception as error:
            raise RewardTuneError(f"the saved LoRA in {folder} does not load: {first_line(error)}") from error
        if copy not in getattr(denoiser, "peft_config", {}):
            raise RewardTuneError(f"the saved LoRA in {folder} does not load: none of its keys fits the denoiser")
        loaded = get_peft_model_state_dict(denoiser, adapter_name=copy)
        wrong = sorted(k for k in expected.keys() | loaded.keys() if not _same(expected.get(k), loaded.get(k)))
        config = denoiser.peft_config[copy]
        scale = config.lora_alpha / config.r
        if wrong or scale != 1:
            raise RewardTuneError(
                f"the saved LoRA in {folder} differs from the trained one after loading "
                f"({len(wrong)} of {len(expected)} tensors, first: {wrong[:1]}; scale {scale})"
            )
        denoiser.set_adapter(copy)
        apart = (_images(pipe, call) - live).abs()
        # Half precision rounds single pixels far apart: there the mean counts (the tensors are compared exactly).
        difference = float(apart.max() if denoiser.dtype == torch.float32 else apart.mean())
    finally:
        denoiser.set_adapter(ADAPTER)
        if copy in denoiser.peft_config:
            denoiser.delete_adapters(copy)
    allowed = (1e-4 if denoiser.dtype == torch.float32 else 1e-2) + 10 * noise
    if not difference <= allowed:
        raise RewardTuneError(
            f"the saved LoRA in {folder} gives other pictures after loading (difference {difference:.2e}, "
            f"allowed {allowed:.0e}): do not use it, and please report this pipeline"
        )
    return difference


def save_denoiser(pipe: Any, folder: str | Path) -> Path:
    """Write the whole denoiser (full fine-tuning) to `folder`/denoiser by its `save_pretrained`; return that folder.

    One weights file, written beside its place and renamed. Raises RewardTuneError when it cannot be written.
    """
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    denoiser, target = getattr(pipe, find_denoiser(pipe)), Path(folder) / DENOISER_FOLDER
    with atomic(target / SAFETENSORS_WEIGHTS_NAME) as temporary:
        try:
            denoiser.save_pretrained(temporary.parent, max_shard_size="1TB")
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's error in its own class
            raise OSError(f"{error}") from error
        with atomic(target / "config.json") as place:
            place.write_bytes((temporary.parent / place.name).read_bytes())
    return target


def verify_denoiser(pipe: Any, folder: str | Path) -> float:
    """Load the saved denoiser back (on the CPU) and compare class, configuration and every tensor; return 0.0.

    Equal weights in an equal network are the same function, so no pictures are made.
    Raises RewardTuneError when the folder does not load or anything differs.
    """
    denoiser, place = getattr(pipe, find_denoiser(pipe)), Path(folder) / DENOISER_FOLDER
    expected = denoiser.state_dict()
    try:
        with _silent():
            copy = type(denoiser).from_pretrained(place, torch_dtype=denoiser.dtype)
    except Exception as error:
        raise RewardTuneError(f"the saved denoiser in {place} does not load: {first_line(error)}") from error
    loaded = copy.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | loaded.keys()
        if not _same(expected[key].detach().cpu() if key in expected else None, loaded.get(key))
    )
    if wrong or _public(copy) != _public(denoiser):
        raise RewardTuneError(
            f"the saved denoiser in {place} differs from the trained one after loading "
            f"({len(wrong)} of {len(expected)} tensors, first: {wrong[:1]}): do not use it"
        )
    return 0.0


def _public(network: Any) -> dict[str, Any]:
    """The configuration that makes the network, without the library's remarks on where it came from."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in network.config.items()
        if not key.startswith("_")
    }


def save(pipe: Any, folder: str | Path) -> Path:
    """What was trained: the adapter's file, or with full fine-tuning the denoiser's folder."""
    return (save_lora if _has_adapter(pipe) else save_denoiser)(pipe, folder)


def verify(pipe: Any, folder: str | Path, *, call: dict[str, Any]) -> float:
    """Load back what `save` wrote and compare; see `verify_lora` and `verify_denoiser`."""
    return verify_lora(pipe, folder, call=call) if _has_adapter(pipe) else verify_denoiser(pipe, folder)


def _has_adapter(pipe: Any) -> bool:
    return ADAPTER in getattr(getattr(pipe, find_denoiser(pipe)), "peft_config", {})


@contextmanager
def _silent() -> Iterator[None]:
    """Two adapters at once are meant here and every key is compared below, whatever peft and diffusers warn of."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _images(pipe: Any, call: dict[str, Any]) -> Tensor:
    with torch.random.fork_rng(), quiet(pipe):
        torch.manual_seed(0)
        return torch.as_tensor(pipe(**fresh(call), output_type="pt", return_dict=False)[0]).float().cpu()


def _same(expected: Tensor | None, loaded: Tensor | None) -> bool:
    if expected is None or loaded is None or expected.shape != loaded.shape or loaded.is_meta:
        return False  # meta: diffusers made the layer but the file held no weight for it
    return torch.equal(expected.to(loaded.dtype), loaded.detach().cpu())
