"""Checkpoints: where they live, how they are opened, and what is said when that fails.

A file is downloaded on first use, or read from a local folder; HF_HUB_OFFLINE is respected. Pickles are opened with
`weights_only=True`, which runs no code of theirs, and, where they must be converted, once: the result is kept as
safetensors in `cache_folder()`.
"""

import hashlib
import http.client
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rewardtune import playground
from rewardtune.errors import ConfigError
from rewardtune.quietly import no_loading_bars, no_retry_lines
from rewardtune.rewards import convert as tables
from rewardtune.rewards.catalogue import REWARDS, Source

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
State = dict[str, Tensor]


def source_of(model: object, default: Source | None = None, *, revision: str | None = None, who: str) -> Source:
    """What a reward's `model` and `revision` name: a hub id or folder, the `default` (None, or its id), or "playground"
    for the playground's own network of the reward `who`. ConfigError for a revision of files on disk, which have none,
    and where the playground has no such network."""
    if model == "playground":
        source = Source(repo=str(playground.reward_path(who)))
    elif default is not None and model in (None, default.repo):
        source = default
    else:
        source = Source(repo=str(model))
    if not revision:
        return source
    if os.path.exists(source.repo):
        raise ConfigError(
            f"{who}: revision is {revision!r} but the model {source.repo} is local, and local files have no "
            "revisions; leave it out, or give a hub id as model"
        )
    return replace(source, revision=revision)


def cache_folder() -> Path:
    """$HF_HOME/rewardtune: converted checkpoints and what does not come from the hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "rewardtune"


def hub_file(source: Source, file: str, *, who: str, setting: str = "model") -> Path:
    """The path of `file`, downloaded if necessary, its checksum verified where one is known.

    setting: what takes the path of a local folder. Raises ConfigError: which file, from where, and how to place it by
    hand.
    """
    from huggingface_hub import hf_hub_download

    def find() -> Path:
        local = Path(source.repo) / file
        if os.path.isdir(source.repo):
            if not local.is_file():
                raise FileNotFoundError(f"no {file}")
            return local
        return Path(hf_hub_download(source.repo, file, revision=source.revision))

    path = found(find, source.repo, who=who, needed=file, only=file, setting=setting)
    for algorithm, digests in (("sha256", source.sha256), ("md5", source.md5)):
        if file in digests:
            check_digest(path, algorithm, digests[file], who=who)
    return path


def found(
    load: Callable[[], T],
    source: str,
    *,
    who: str,
    needed: str,
    any_of: tuple[str, ...] = (),
    only: str = "",
    setting: str = "model",
) -> T:
    """load(), or the ConfigError that says which files are missing and how to place them by hand.

    any_of: files of which a folder must hold one. Without them transformers loads defaults, and says nothing.
    only: the one file to download of a large repository. setting: what takes the path of a local folder.
    """
    check_folder(source, who=who)
    try:
        if os.path.isdir(source) and any_of and not any(os.path.isfile(os.path.join(source, file)) for file in any_of):
            raise FileNotFoundError(f"no {' or '.join(any_of)}")
        with _quietly(bars=not os.path.isdir(source)):
            return load()
    except ConfigError:
        raise
    except Exception as error:  # hub client, transformers, safetensors and pickle have no common base
        if foreign := _foreign(error):
            raise ConfigError(_refused(f"a checkpoint in '{source}'", who=who, foreign=foreign)) from error
        if os.path.isdir(source):
            cure = f"put {needed} into that folder, complete and of the right kind"
        else:
            rows = [row for entry in REWARDS for row in entry.weights if (row.repo, row.setting) == (source, setting)]
            known = next((row.command for row in rows if not only or only in row.files), "")
            command = known or " ".join(["hf download", source, *filter(None, [only]), "--local-dir FOLDER"])
            cure = (
                f"it needs {needed} from https://huggingface.co/{source}; without network download it elsewhere by "
                f"`{command}`, copy the folder here and give its path as {setting}"
            )
        raise ConfigError(f"{who}: cannot load '{source}': {cure} ({_reason(error)})") from error


@contextmanager
def _quietly(*, bars: bool) -> Iterator[None]:
    """Without the libraries' remarks: a line for each of the hub client's tries, transformers' table of weights that do
    not fit. What is wrong is said by our own error. bars: keep those of a download."""
    import transformers.utils.logging as transformers_log

    with ExitStack() as stack:
        stack.enter_context(no_retry_lines())
        stack.callback(transformers_log.set_verbosity, transformers_log.get_verbosity())
        transformers_log.set_verbosity_error()
        if not bars:
            stack.enter_context(no_loading_bars())
        yield


def check_folder(source: str, *, who: str) -> None:
    """ConfigError for a file, and for what is written as a folder and is none."""
    if os.path.isfile(source):
        raise ConfigError(f"{who}: {source} is a file; give its folder, {os.path.dirname(source) or '.'}")
    if not os.path.isdir(source) and source.startswith((".", "/", "~")):
        raise ConfigError(
            f"{who}: cannot load '{source}': there is no such folder; give an existing one (a full path, ~ is not "
            "replaced) or a hub id such as 'openai/clip-vit-base-patch32'"
        )


def download(url: str, *, sha256: str, who: str, setting: str) -> Path:
    """The file at `url`, kept in `cache_folder()` and verified. `setting` takes a path where there is no network."""
    from huggingface_hub import constants

    path = cache_folder() / url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, a wrong checksum, a cut
            raise ConfigError(
                f"{who}: cannot download {url} ({type(error).__name__}: {error}); download it elsewhere, then copy it "
                f"to {path} or give its path as {setting}"
            ) from error
    return check_digest(path, "sha256", sha256, who=who)


def check_digest(path: Path, algorithm: str, expected: str, *, who: str) -> Path:
    """The path itself; ConfigError where the file is not the published one. A verified file is not read again."""
    if (digest := digest_of(path, algorithm, expected)) != expected:
        raise ConfigError(
            f"{who}: {path} is not the published file ({algorithm} {digest}, not {expected}): its download was cut or "
            "it was changed; delete it and download it again"
        )
    return path


def digest_of(path: Path, algorithm: str, expected: str) -> str:
    """The file's digest. A file that has the expected one is read once; that is noted in the cache."""
    stamp = cache_folder() / "verified" / _identity(path, expected)
    if stamp.exists():
        return expected
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if digest == expected:
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return digest


def open_checkpoint(path: Path | str, *, who: str) -> State:
    """The tensors of a .safetensors file or of a pickle; a `state_dict` in it is unwrapped.

    Raises ConfigError for a missing or truncated file, one of another kind, and a pickle that holds code; that code
    does not run.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{who}: there is no file {path}; give the path of a checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # our error says more
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format and each way of being broken has its own
        if foreign := _foreign(error):
            raise ConfigError(_refused(str(path), who=who, foreign=foreign)) from error
        code = "" if path.suffix == ".safetensors" else "a pickle with code is refused; "
        raise ConfigError(
            f"{who}: {path} ({path.stat().st_size:,} bytes) is not a checkpoint, or a truncated one; give tensors as "
            f".safetensors or by torch.save, or download it again ({code}{_reason(error)})"
        ) from error
    weights: Any = state.get("state_dict", state) if isinstance(state, dict) else {}
    weights = weights if isinstance(weights, dict) else {}
    odd = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd or not weights:
        raise ConfigError(
            f"{who}: {path} holds no tensors by name; legal is the state_dict of a network"
            + (f" ({odd[0]!r} is no tensor with a name)" if odd else "")
        )
    return dict(weights)


def converted(path: Path | str, convert: Callable[[State], State], *, who: str) -> State:
    """convert(open_checkpoint(path)), kept as safetensors in `cache_folder()`, so that the pickle is opened once.

    Another file in its place, another converter and other tables of it convert again.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = Path(path)
    target = cache_folder() / f"{path.stem}-{_identity(path, convert.__qualname__, tables.EDITION)[:16]}.safetensors"
    with suppress(Exception):  # not there, or cut by a full disk: convert again
        return load_file(target)
    official = open_checkpoint(path, who=who)
    try:
        state = {key: value.contiguous() for key, value in convert(official).items()}
    except ConfigError as error:
        raise ConfigError(
            f"{who}: {path} does not fit: {error}; give the file that `rewardtune ls rewards {who}` names"
        ) from error
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # by the umask; safetensors keeps its files to the owner
        save_file(state, partial, metadata={"format": "pt"})
        partial.chmod(mode)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        with suppress(OSError):
            partial.unlink()
        warnings.warn(f"{who}: the converted checkpoint cannot be kept in {target.parent}: {error}", stacklevel=2)
    return state


def check_finite(tensors: Iterable[tuple[str, Tensor]], *, who: str, what: str) -> None:
    """ConfigError for NaN or infinity among the weights. A sum finds both, in one reading of each tensor."""
    for name, value in tensors:
        if value.is_floating_point() and not value.detach().float().sum().isfinite():
            raise ConfigError(
                f"{who}: {what} has NaN or infinite weights, {name} first: it is damaged, or its training diverged; "
                "download it again or give another"
            )


def load_strictly(make: Callable[[], Module], state: State, *, who: str, what: str) -> Module:
    """make() with the tensors of `state` as its float32 parameters; memory is taken once.

    Raises ConfigError unless names and shapes fit one to one: nothing is left at random values, nothing is unused.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # torch.device("meta") would leave the buffers there
        module = make()
    wanted = module.state_dict()
    if missing := wanted.keys() - state.keys():
        raise ConfigError(
            f"{who}: {what} is of another kind or incomplete: {len(missing)} weights are missing, {min(missing)} first"
        )
    if foreign := state.keys() - wanted.keys():
        raise ConfigError(
            f"{who}: {what} is of another kind: {len(foreign)} of its weights have no place in a "
            f"{type(module).__name__}, {min(foreign)} first"
        )
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise ConfigError(
                f"{who}: {what} is of another size: {name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
            )
    full = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    module.load_state_dict(full, strict=True, assign=True)
    return module


def load_tokenizer(
    source: str, *, revision: str = "main", vocabulary: int, who: str, setting: str = "processor"
) -> Any:
    """The tokenizer of a hub repository or folder; ConfigError where it does not fit a model of `vocabulary` tokens."""
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(source, revision=revision)

    needed = "tokenizer.json (or its vocabulary files) and tokenizer_config.json"
    any_of = ("tokenizer.json", "vocab.json", "vocab.txt")
    tokenizer = found(load, source, who=who, needed=needed, any_of=any_of, setting=setting)
    if not vocabulary / 2 <= len(tokenizer) <= vocabulary:  # without files transformers may make an empty tokenizer
        raise ConfigError(
            f"{who}: the tokenizer of {source} has {len(tokenizer)} tokens but the model reads {vocabulary}; "
            "give the processor that belongs to the model"
        )
    return tokenizer


def _foreign(error: BaseException | None) -> str:
    """What a pickle asked for that is not on torch's list of harmless things; empty for another kind of error."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError):
            match = re.search(r"GLOBAL ([\w.]+)|Can only (?:create new object|build) .* but got (.+)", str(error))
            if match:
                return match[1] or match[2]
        error = error.__cause__ or error.__context__
    return ""


def _refused(what: str, *, who: str, foreign: str) -> str:
    return (
        f"{who}: {what} holds more than weights and was not run (it asks for {foreign}); give a checkpoint of tensors "
        "alone, best as .safetensors"
    )


def _reason(error: BaseException) -> str:
    """The error in one line, without torch's advice to switch its safety off."""
    text = str(error).split("WeightsUnpickler error: ")[-1]
    text = re.split(r"In PyTorch 2\.6|Check the documentation", text)[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _identity(path: Path, *more: str) -> str:
    """A name for this file as it is now: another path, size or time of change gives another name."""
    path = path.resolve()
    stat = path.stat()
    return hashlib.sha256(repr((str(path), stat.st_size, stat.st_mtime_ns, *more)).encode()).hexdigest()
