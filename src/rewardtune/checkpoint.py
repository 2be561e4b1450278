"""Checkpoints: the whole training state in `checkpoint-N`, there whole or not at all, checked before it is trusted.

A checkpoint is written in a hidden folder beside its place, one safetensors file a group of tensors, the rest as plain
JSON. COMPLETE, with size and sha256 of every other file, is written last; then the folder gets its name. A kill at any
moment leaves `checkpoint-N` whole or absent. Nothing here knows the trainer.
Left out: sharded states (FSDP2): gather full tensors first.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, RewardTuneError
from .runfolder import CUT, LOGS, cannot_write, checkpoint_folders, remove_leftovers, umask

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COMPLETE, STATE, FORMAT = "COMPLETE", "state.json", 1
LIBRARIES = ("rewardtune", "torch", "diffusers", "transformers", "peft", "accelerate")
# What may change at a resume; everything else would make another run of it. `memory.vae_dtype` changes the pictures.
LEGAL = re.compile(
    r"eval\.every|(guards\.rules|checkpoints|log|memory)(\..*)?|output_dir|model\.device"
    r"|optim\.(max_seconds|micro_batch)|adapter\.inference_weight"
)
MEANING = re.compile(r"memory\.vae_dtype")


class CheckpointError(ConfigError):
    """A checkpoint is damaged, missing, or does not fit the run (exit code 2)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint.

    step: number of updates made; state: what `save` was given, back from JSON (tuples are lists, keys are str);
    groups: names of its groups of tensors; logs: bytes of each log at that moment;
    notes: what a user should be told (damaged newer checkpoints that were skipped, other library versions).
    """

    path: Path
    step: int
    state: dict[str, Any]
    groups: tuple[str, ...]
    logs: dict[str, int]
    notes: tuple[str, ...] = ()

    def tensors(self, group: str) -> "dict[str, Tensor]":
        """The group's tensors by name, on the CPU, dtypes as saved. CheckpointError if there is none."""
        from safetensors.torch import load_file

        if group not in self.groups:
            raise CheckpointError(f"{self.path} holds no {group!r}; it holds {', '.join(self.groups) or 'no tensors'}")
        return load_file(self.path / f"{group}.safetensors")


# ----------------------------------------------------------------------------------------------- write


def save(
    run: str | Path,
    step: int,
    *,
    tensors: "Mapping[str, Mapping[str, Tensor]]",
    state: Mapping[str, Any],
    keep: int = 2,
    best: int | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write `run`/checkpoint-`step`, then remove all whole ones but the last `keep`, `best` and this one. Its path.

    tensors: group -> name -> tensor of any dtype and device, e.g. adapter, optimizer, ema.
    also: writes more files into the folder that it is given.
    state: anything JSON can hold; floats come back exactly. The lengths of the logs are added.
    A whole checkpoint-`step` with the same tensors is left as it is; another one of that name is moved to `cut/`.
    Raises RewardTuneError when the system refuses to write: earlier checkpoints stay as they are.
    """
    if keep < 1 or step < 0:
        raise ConfigError(f"checkpoints: keep={keep}, step={step}: keep at least 1, and steps count from 0")
    wrong = [group for group in tensors if not re.fullmatch(r"\w+", group)]
    if wrong:
        raise ConfigError(f"checkpoint groups {wrong}: use letters, digits and _")
    run = Path(run)
    target = run / f"checkpoint-{step}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run, "checkpoint-")
        facts = {"step": step, "logs": {name: _flushed(run / name) for name in LOGS}, "versions": _versions()}
        text = json.dumps(facts | {"state": dict(state)}, indent=1)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=run))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        for group, values in tensors.items():
            _write_tensors(folder / f"{group}.safetensors", values)
        (folder / STATE).write_text(text, encoding="utf-8")
        if also is not None:
            also(folder)
        _complete(folder, step)
        if not target.exists():
            _rename(folder, target)
        elif not _same_tensors(target, folder):
            set_aside(target)
            _rename(folder, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    prune(run, keep=keep, spare={step, best})
    return target


def prune(run: str | Path, *, keep: int, spare: Iterable[int | None] = ()) -> list[int]:
    """Remove whole checkpoints but the last `keep` and those in `spare`; the steps removed. Damaged ones stay."""
    run = Path(run)
    whole = [step for step in steps(run) if _looks_whole(run / f"checkpoint-{step}")]
    removed = sorted(set(whole[:-keep]) - set(spare))
    for step in removed:
        path = run / f"checkpoint-{step}"
        try:  # first away from its name: a kill half-way through the removal leaves no half checkpoint
            away = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=run))
            _rename(path, away / path.name)
        except OSError as error:
            raise RewardTuneError(f"cannot remove the old {path}: {error.strerror or error}") from error
        shutil.rmtree(away, ignore_errors=True)
    return removed


def set_aside(path: Path) -> Path:
    """Move a checkpoint to `cut/` beside it, under a free name; where it went."""
    cut = path.parent / CUT
    cut.mkdir(exist_ok=True)
    names = chain([path.name], (f"{path.name}.{number}" for number in count(2)))
    place = next(cut / name for name in names if not (cut / name).exists())
    _rename(path, place)
    return place


def _write_tensors(path: Path, values: "Mapping[str, Tensor]") -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(_own(values)), path)
    except SafetensorError as error:  # it wraps the system's error
        raise OSError(str(error)) from error


def _own(values: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """Each tensor on the CPU, contiguous and in memory of its own, as the format wants it."""
    seen = set()
    for name, tensor in values.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        yield name, plain


def _complete(folder: Path, step: int) -> None:
    """Everything to the disk, then COMPLETE."""
    mask = umask()
    os.chmod(folder, 0o777 & ~mask)
    files = {}
    for path in sorted(folder.iterdir()):
        os.chmod(path, 0o666 & ~mask)
        files[path.name] = {"size": _flushed(path), "sha256": _sha256(path)}
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    (folder / COMPLETE).write_text(text, encoding="utf-8")
    _flushed(folder / COMPLETE)
    _flush_folder(folder)


def _rename(path: Path, place: Path) -> None:
    os.rename(path, place)
    _flush_folder(place.parent)


def _flushed(path: Path) -> int:
    """Bytes of the file, all of them on the disk; 0 if there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _flush_folder(path: Path) -> None:
    """The names in a folder to the disk. Windows opens no folders and needs none of this."""
    if os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


# ------------------------------------------------------------------------------------------------ read


def steps(run: str | Path) -> list[int]:
    """The steps of the folders checkpoint-N in `run`, rising; whole or not. Other names are not looked at."""
    return sorted(checkpoint_folders(Path(run)))


def load(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, after every file was compared with COMPLETE in size and sha256.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    path = Path(path)
    try:
        marker = _marker(path)
        for name, expected in marker["files"].items():
            _verify(path, name, **expected)
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    named = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
    if saved["step"] != marker["step"] or (named and int(named[1]) != marker["step"]):
        raise _damaged(path, f"its name, {COMPLETE} and {STATE} speak of different steps")
    now = _versions()
    other = [f"{name} {was} (now {now.get(name)})" for name, was in saved["versions"].items() if was != now.get(name)]
    note = f"{path} was written with {', '.join(other)}: the continued run may differ in the last digits"
    return Checkpoint(
        path=path,
        step=marker["step"],
        state=saved["state"],
        groups=tuple(Path(name).stem for name in marker["files"] if name.endswith(".safetensors")),
        logs=saved["logs"],
        notes=(note,) if other else (),
    )


def latest(run: str | Path) -> Checkpoint:
    """The newest whole checkpoint of `run`; `notes` names the damaged ones that were skipped.

    Raises CheckpointError when none is left.
    """
    skipped: list[str] = []
    for step in reversed(steps(run)):
        try:
            found = load(Path(run) / f"checkpoint-{step}")
        except CheckpointError as error:
            skipped.append(f"skipped: {error}")
        else:
            return replace(found, notes=(*skipped, *found.notes))
    why = "\n".join(skipped) or "it holds no folder checkpoint-N"
    raise CheckpointError(
        f"nothing to resume from in {run}: {why}\nStart again with --overwrite, or name another run's output_dir"
    )


def find(run: str | Path, which: str | int | Path) -> Checkpoint:
    """The checkpoint of `run` meant by `latest`, a step (`500`), its name (`checkpoint-500`) or a path.

    Raises CheckpointError when there is none such, or when it is damaged.
    """
    run, word = Path(run), str(which)
    if word == "latest":
        return latest(run)
    asked = run / f"checkpoint-{int(word)}" if re.fullmatch(r"[0-9]+", word) else Path(word)
    places = [place for place in (asked, run / asked) if place.is_dir()]
    if not places:
        here = ", ".join(map(str, steps(run))) or "none"
        raise CheckpointError(f"no checkpoint {word!r}; legal: latest, a path, or a step of {run} ({here})")
    return load(places[0])


def _marker(path: Path) -> dict[str, Any]:
    """COMPLETE, read and checked for its form."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: it is not a folder")
    if not (path / COMPLETE).is_file():
        raise _damaged(path, f"{COMPLETE} is missing (the last file of a whole one)")
    try:
        marker = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        form = marker["format"]
        sound = isinstance(marker["step"], int) and STATE in marker["files"]
        sound &= all(set(entry) == {"size", "sha256"} for entry in marker["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{COMPLETE} is not readable") from error
    if form != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {form!r}, this rewardtune reads {FORMAT}: use its version")
    if not sound:
        raise _damaged(path, f"{COMPLETE} is not readable")
    return marker


def _verify(path: Path, name: str, *, size: int, sha256: str) -> None:
    file = path / name
    if not file.is_file():
        raise _damaged(path, f"{name} is missing")
    if file.stat().st_size != size:
        raise _damaged(path, f"{name} has {file.stat().st_size} bytes, {size} were written")
    if _sha256(file) != sha256:
        raise _damaged(path, f"{name} has changed since it was written (other sha256)")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {why}; --resume latest takes the newest whole one")


def _looks_whole(path: Path) -> bool:
    """COMPLETE is there and every file has its size; the contents are not read."""
    try:
        files = _marker(path)["files"]
        return all((path / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def _same_tensors(old: Path, new: Path) -> bool:
    """Whether `old` is whole and holds the tensors of `new`, bit for bit."""
    try:
        load(old)
    except CheckpointError:
        return False
    first, second = (
        {name: entry for name, entry in _marker(path)["files"].items() if name != STATE} for path in (old, new)
    )
    return first == second


# ---------------------------------------------------------------------------------------------- resume


def rewind(run: str | Path, checkpoint: Checkpoint) -> list[str]:
    """Make `run` what it was when `checkpoint` was written; notes of what was set aside.

    Later checkpoints and the later lines of metrics.jsonl and eval.jsonl go to `run`/cut/; nothing is deleted.
    The checkpoints go first: after a kill in between, the same resume does the rest.
    Raises CheckpointError when a log is not the one of this checkpoint, RewardTuneError when it cannot be written.
    """
    run, notes = Path(run), []
    try:
        remove_leftovers(run)
        for step in steps(run):
            if step > checkpoint.step:
                place = set_aside(run / f"checkpoint-{step}")
                notes.append(f"checkpoint-{step}, later than step {checkpoint.step}, was moved to {place}")
        for name in LOGS:
            notes += _cut(run, name, checkpoint.logs.get(name, 0))
    except OSError as error:
        raise cannot_write(run, error) from error
    return notes


def _cut(run: Path, name: str, length: int) -> list[str]:
    """Keep `length` bytes of the log; append what comes after them to `cut/`, on the disk before it is taken away."""
    path, rest = run / name, run / CUT / name
    data = path.read_bytes() if path.exists() else b""
    notes = []
    end = length
    if len(data) < length:
        notes.append(f"{path} has {len(data)} bytes, {length} when the checkpoint was written: lines of it are lost")
        end = data.rfind(b"\n") + 1
    elif end and data[end - 1 : end] != b"\n":
        raise CheckpointError(
            f"{path} is not the log of this checkpoint: no line ends at byte {length}. Resume in the run folder that "
            "the checkpoint belongs to, or move the log away"
        )
    tail = data[end:]
    if not tail:
        return notes
    rest.parent.mkdir(exist_ok=True)
    before = rest.stat().st_size if rest.exists() else 0
    try:
        with rest.open("ab") as file:
            file.write(tail if tail.endswith(b"\n") else tail + b"\n")
        _flushed(rest)
    except OSError:
        os.truncate(rest, before)
        raise
    os.truncate(path, end)
    _flushed(path)
    return [*notes, f"{len(tail.splitlines())} later line(s) of {name} were moved to {rest}"]


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's resolved settings and the present ones, a line each, all of it legal.

    Legal are eval.every, guards.rules, checkpoints, log, memory (but its vae_dtype), output_dir, model.device,
    optim.max_seconds, optim.micro_batch, adapter.inference_weight; and optim.steps when the schedule is constant: any
    other schedule's length is part of its state. A key that is absent counts as null, and as an empty list or mapping.
    Raises CheckpointError listing every other difference with both values.
    """
    schedules = {dict(settings.get("optim") or {}).get("schedule") or "constant" for settings in (saved, now)}
    legal: list[str] = []
    wrong: list[str] = []
    for key, was, present in _differences(dict(saved), dict(now), ""):
        line = f"{key}: {_short(was)} at the checkpoint, {_short(present)} now"
        if key == "optim.steps" and schedules != {"constant"}:
            line += f" (legal with schedule constant only, here {', '.join(sorted(schedules))})"
        allowed = (LEGAL.fullmatch(key) and not MEANING.fullmatch(key)) or (
            key == "optim.steps" and schedules == {"constant"}
        )
        (legal if allowed else wrong).append(line)
    if wrong:
        raise CheckpointError(
            "these settings differ from the checkpoint's and would make it another run:\n  "
            + "\n  ".join(wrong)
            + "\nSet them back to resume, or start a new run in another output_dir"
        )
    return legal


def _differences(saved: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value then, value now) of every leaf that differs."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*saved, *now]):
            yield from _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(saved, list | tuple) and isinstance(now, list | tuple) and len(saved) == len(now):
        for index, (was, present) in enumerate(zip(saved, now, strict=True)):
            yield from _differences(was, present, f"{where}.{index}")
    elif saved != now and not (_nothing(saved) and _nothing(now)):
        yield where, saved, now


def _nothing(value: Any) -> bool:
    """What a key that an earlier version did not have stands for."""
    if isinstance(value, Mapping):
        return all(map(_nothing, value.values()))
    return value is None or value in ([], ())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text)} characters, {digest(value)[:8]})"


def digest(value: Any) -> str:
    """sha256 of anything JSON can hold, whatever the order of its keys; tells whether a list of prompts changed."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# ------------------------------------------------------------------------------------------- optimiser


def restore(named: "Mapping[str, Tensor]", saved: "Mapping[str, Tensor]", *, what: str = "adapter") -> None:
    """Copy saved tensors into the present ones (parameters or plain tensors), in place, all of them or none.

    Raises CheckpointError naming the keys when names, shapes or dtypes differ.
    """
    import torch

    _same_keys(saved, named, what)
    for name, tensor in named.items():
        there = saved[name]
        if (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"{what} {name}: {tuple(there.shape)} {there.dtype} in the checkpoint, "
                f"{tuple(tensor.shape)} {tensor.dtype} now"
            )
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(saved[name])


def flatten_optimizer(
    optimizer: "torch.optim.Optimizer", named: "Iterable[tuple[str, torch.nn.Parameter]]"
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """The optimiser's state as flat tensors `NAME/KEY` (dtype kept) and plain values for JSON.

    named: `denoiser.named_parameters()`. Any optimiser whose state is tensors, numbers and texts will do: AdamW,
    its 8-bit kind, Prodigy. The tensors are the live ones: save them before the next step.
    Raises CheckpointError for a parameter without a name, or a value that is none of these.
    """
    from torch import Tensor

    names = {id(parameter): name for name, parameter in named}
    unnamed = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if unnamed:
        raise CheckpointError(f"{len(unnamed)} of the optimiser's parameters have no name in the denoiser")
    tensors: dict[str, Tensor] = {}

    def split(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        plain = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{where}/{key}"] = value
            elif _is_plain(value):
                plain[key] = value
            else:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {where}: "
                    "only tensors, numbers and texts can be saved; choose another optimizer"
                )
        return plain

    groups = []
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        shapes = {names[id(parameter)]: list(parameter.shape) for parameter in group["params"]}
        groups.append({"parameters": shapes, "options": split(f"group {number}", options)})
    values = {names[id(p)]: split(names[id(p)], state) for p, state in optimizer.state.items()}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "values": values}


def unflatten_optimizer(
    optimizer: "torch.optim.Optimizer",
    named: "Iterable[tuple[str, torch.nn.Parameter]]",
    tensors: "Mapping[str, Tensor]",
    state: Mapping[str, Any],
) -> None:
    """Put what `flatten_optimizer` gave back into a new optimiser of the same class, over the same names in any order.

    Everything is checked before anything is changed. How the step is computed (foreach, fused, capturable) stays as
    the new optimiser has it. Raises CheckpointError naming the keys that do not fit.
    """
    if state["class"] != type(optimizer).__name__:
        raise CheckpointError(f"optimizer: {state['class']} in the checkpoint, {type(optimizer).__name__} now")
    names = {id(parameter): name for name, parameter in named}
    if len(state["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"optimizer: {len(state['groups'])} groups of parameters in the checkpoint, "
            f"{len(optimizer.param_groups)} now"
        )
    for saved, group in zip(state["groups"], optimizer.param_groups, strict=True):
        shapes = {names.get(id(p), "a parameter without a name"): list(p.shape) for p in group["params"]}
        _same_keys(saved["parameters"], shapes, "optimizer state")
        for name, shape in shapes.items():
            if shape != saved["parameters"][name]:
                raise CheckpointError(
                    f"optimizer state {name}: {saved['parameters'][name]} in the checkpoint, {shape} now"
                )
    by_place: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in state["values"].items()}
    for key, tensor in tensors.items():
        where, _, name = key.rpartition("/")
        by_place.setdefault(where, {})[name] = tensor
    for number, (saved, group) in enumerate(zip(state["groups"], optimizer.param_groups, strict=True)):
        for key, value in (saved["options"] | by_place.get(f"group {number}", {})).items():
            if key not in ("foreach", "fused", "capturable"):
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            found = by_place.get(names[id(parameter)])
            if found is not None:
                optimizer.state[parameter] = {
                    key: _placed(value, key, parameter, group) for key, value in found.items()
                }


def _placed(value: Any, key: str, parameter: "Tensor", group: Mapping[str, Any]) -> Any:
    """A copy beside its parameter. torch keeps `step` on the CPU unless the step is fused or capturable."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        return value
    stays = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.clone() if stays else value.to(parameter.device, copy=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _same_keys(saved: Iterable[str], now: Iterable[str], what: str) -> None:
    lost, new = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
    if lost or new:
        parts = [
            f"{len(keys)} only {where} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
            for keys, where in ((lost, "in the checkpoint"), (new, "in the model"))
            if keys
        ]
        raise CheckpointError(f"{what}: the names do not fit: {'; '.join(parts)}. Is it the same model and adapter?")
