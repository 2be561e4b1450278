"""Text embeddings encoded once a prompt: `pipe.encode_prompt` remembers, and the encoders may leave the device.

    with cached_text(pipe) as text:
        pipe(prompts, ...)            # any call, also within a rollout
        text.fill(coming_prompts)     # in the order of their use, with the arguments of that call; then the encoders
                                      # go to the CPU

No line per pipeline family: a prompt's embeddings are what the pipeline's own `encode_prompt` gives for a list of one.
A batch is put together from its prompts; whether the pipeline itself does that is tested at the first batch, and where
it does not (padding to the longest prompt, say) the pipeline encodes as it always did and `notes` says so. A prompt's
embeddings so never depend on the rest of its batch, nor on what is in the cache.
Left out: trained text encoders; encoders that are not named `text_encoder...` stay on the device.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Bytes of embeddings that are kept (on the CPU). SD 1.5 in float16: 0.2 MB a prompt; FLUX in bfloat16: 4 MB.
MAX_BYTES = 4 * 2**30
#: A prompt encoded alone may differ from itself in a batch by the encoder's round-off, relative to the largest value.
ROUND_OFF = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@contextmanager
def cached_text(pipe: Any, *, max_bytes: int = MAX_BYTES) -> Iterator["TextCache"]:
    """Put a `TextCache` before `pipe.encode_prompt` for the block; afterwards the pipeline is as it was.

    A pipeline without `encode_prompt` works as ever; `notes` says that nothing is cached.
    """
    cache = TextCache(pipe, max_bytes=max_bytes)
    if cache.works:
        before = pipe.__dict__.get("encode_prompt")
        pipe.__dict__["encode_prompt"] = cache
    try:
        yield cache
    finally:
        if cache.works:
            if before is None:
                pipe.__dict__.pop("encode_prompt", None)
            else:
                pipe.__dict__["encode_prompt"] = before
        cache.bring_back()


@contextmanager
def aside(pipe: Any) -> Iterator[None]:
    """Calls of the block are answered as ever, but `fill` and `holds` do not go by their arguments."""
    cache = pipe.__dict__.get("encode_prompt")
    last = cache._last if isinstance(cache, TextCache) else None
    try:
        yield
    finally:
        if isinstance(cache, TextCache):
            cache._last = last


class TextCache:
    """What stands in for `pipe.encode_prompt`.

    Attributes:
        works: whether the pipeline has an `encode_prompt` to stand in for.
        encoded, reused: prompts that were encoded, and that were answered from the cache.
        bytes: of the embeddings kept; the longest unused ones leave beyond `max_bytes`.
        notes: what is worth telling the user, in plain words.
    """

    def __init__(self, pipe: Any, *, max_bytes: int = MAX_BYTES) -> None:
        self.pipe, self.max_bytes = pipe, max_bytes
        self.encoded = self.reused = self.bytes = self._largest = 0
        self.notes: list[str] = []
        self._kept: OrderedDict[Any, tuple[tuple[Any, ...], bool, int]] = OrderedDict()
        self._seen: dict[int, Tensor] = {}  # by place in the answer: the first tensor, shared by its equals
        self._rules: dict[Any, tuple[str, ...] | None] = {}  # by kind of call: how prompts are put together
        self._last: dict[str, Any] | None = None
        networks = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
        # The networks without the doors of a rollout: a record, or a blank answer, must not depend on the cache.
        self._slots = [(module, module.__dict__.get("_compiled_call_impl")) for module in networks.values()]
        self._encoders = {name: module for name, module in networks.items() if name.startswith("text_encoder")}
        self._hooks: list[Any] = []
        self._visiting = self._came = False  # encoders that were sent away: whether a block has asked them to stay
        self._home: dict[str, torch.device] = {}
        self._real: Any = getattr(pipe, "encode_prompt", None)
        self.works = callable(self._real)
        if self.works:
            self._signature = inspect.signature(pipe.encode_prompt)
        else:
            self.notes.append(f"{type(pipe).__name__} has no encode_prompt: its text is encoded at every call")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `pipe.encode_prompt`: its arguments, its answer."""
        bound = self._signature.bind(*args, **kwargs).arguments
        rows = _rows(bound)
        if rows is None or any(_key(row) is None for row in rows):  # embeddings or images are given
            return self._run(bound)
        self._last = rows[0]
        if len(rows) == 1:
            answer, is_tuple = self._one(rows[0])
            joined: tuple[Any, ...] | None = tuple(_to(part, _device_of(bound, self.pipe)) for part in answer)
        else:
            kind = _key({name: None if _is_text(name, value) else value for name, value in rows[0].items()})
            if kind not in self._rules:
                self._rules[kind] = self._compare(bound, rows)
            rules = self._rules[kind]
            if rules is None:
                return self._run(bound)
            with self._visit():
                answers = [self._one(row) for row in rows]
            joined, is_tuple = (
                _join([answer for answer, _ in answers], rules, _device_of(bound, self.pipe)),
                answers[0][1],
            )
        if joined is None:  # lengths differ in this batch
            return self._run(bound)
        return joined if is_tuple else joined[0]

    def fill(self, prompts: Iterable[str], *, release: bool = True) -> int:
        """Encode prompts now, with the arguments of the last call; return how many of them the cache holds.

        prompts: in the order of their use; it stops where `max_bytes` hold no more of them together. release: then
        move the encoders to the CPU; prompts that are not in the cache bring them back, once for a batch.
        """
        if self._last is None:
            return 0  # nothing was encoded yet: nobody knows how
        held, size = set[Any](), 0  # of these prompts: the others may leave
        with self._visit():
            for prompt in prompts:
                key = _key(row := self._row(prompt))
                if key in held:
                    continue
                if size + self._largest > self.max_bytes:
                    full = f"the text cache holds {len(held)} prompts ({self.bytes / 2**30:.1f} GiB)"
                    if not any(note.startswith("the text cache holds") for note in self.notes):
                        self.notes.append(f"{full}: others are encoded when their turn comes")
                    break
                self._one(row)
                held.add(key)
                size += self._kept[key][2]
        if release:
            self.release()
        return len(held)

    def answers(self, batch: int) -> bool:
        """Whether calls of so many prompts are answered from what `fill` has encoded."""
        return self._last is not None and (batch == 1 or None not in self._rules.values())

    @property
    def room(self) -> int:
        """How many prompts of the size of the largest there is room for."""
        return self.max_bytes // max(1, self._largest)

    def holds(self, prompts: Iterable[str]) -> bool:
        """Whether all of them are in the cache, with the arguments of the last call."""
        return self._last is not None and all(_key(self._row(prompt)) in self._kept for prompt in prompts)

    def _row(self, prompt: str) -> dict[str, Any]:
        """The last call's arguments for `prompt`; `prompt_2` and its like repeat it where it has no text of its own."""
        assert self._last is not None
        own, sample = getattr(prompt, "arguments", {}), self._last["prompt"]
        return {
            name: [own[name]]
            if name in own
            else [str(prompt)]
            if value == sample and not name.startswith("negative")
            else value
            for name, value in self._last.items()
        }

    def release(self) -> None:
        """Move the text encoders to the CPU; one that is called after that comes back for the call.

        By accelerate's offload hooks, which tell diffusers where the pipeline computes. Nothing to do on the CPU.
        """
        from accelerate import cpu_offload_with_hook

        if self._hooks or not self.works:
            return
        for name, module in self._encoders.items():
            device = next(module.parameters()).device
            if device.type == "cpu" or hasattr(module, "_hf_hook"):  # there already, or offloaded by the user
                continue
            self._home[name] = device
            self._hooks.append(cpu_offload_with_hook(module, device)[1])
        self._offload()

    def bring_back(self) -> None:
        """The encoders on their device again, without hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._home:
            name, device = self._home.popitem()
            self._encoders[name].to(device)

    @contextmanager
    def _visit(self) -> Iterator[None]:
        """Encoders that were sent away and are called in the block go back at its end, not after each call."""
        outer, self._visiting = self._visiting, True
        try:
            yield
        finally:
            self._visiting = outer
            if self._came and not outer:
                self._offload()

    def _offload(self) -> None:
        self._came = False
        for hook in self._hooks:
            hook.offload()
        if self._hooks and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _one(self, row: dict[str, Any]) -> tuple[tuple[Any, ...], bool]:
        """The answer for one prompt as a tuple on the CPU, and whether the pipeline gives a tuple."""
        key = _key(row)
        if key in self._kept:
            self._kept.move_to_end(key)
            self.reused += 1
            return self._kept[key][:2]
        answer = self._run(row)
        is_tuple = isinstance(answer, tuple)
        parts = tuple(_map(self._share, part, place) for place, part in enumerate(answer if is_tuple else (answer,)))
        shared = {id(tensor) for tensor in self._seen.values()}
        size = sum(t.numel() * t.element_size() for part in parts for t in _tensors(part) if id(t) not in shared)
        self.encoded += 1
        self.bytes += size
        self._largest = max(self._largest, size)
        self._kept[key] = parts, is_tuple, size
        while self.bytes > self.max_bytes and len(self._kept) > 1:
            self.bytes -= self._kept.popitem(last=False)[1][2]
        return parts, is_tuple

    def _share(self, tensor: Tensor, place: int) -> Tensor:
        """On the CPU; the unconditional half and position ids are the same for every prompt and are kept once."""
        tensor = tensor.detach().cpu().clone()
        first = self._seen.setdefault(place, tensor)
        return first if first.dtype == tensor.dtype and torch.equal(first, tensor) else tensor

    def _run(self, arguments: dict[str, Any]) -> Any:
        """The pipeline's own `encode_prompt`, outside the doors of a rollout and without a graph."""
        call = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        present = [(module, module.__dict__.get("_compiled_call_impl")) for module, _ in self._slots]
        with self._visit():
            self._came = True
            try:
                _put(self._slots)
                with torch.no_grad():
                    return self._real(*call.args, **call.kwargs)
            finally:
                _put(present)

    def _compare(self, bound: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...] | None:
        """How the answers of single prompts make the pipeline's answer for the batch, part by part; None: they do not.

        The shapes tell: a part with a row (or more) a prompt is stacked, one of the same shape for all is kept.
        """
        whole = self._run(bound)
        answers = [self._one(row) for row in rows]
        parts = whole if isinstance(whole, tuple) else (whole,)
        rules = tuple(
            "keep" if isinstance(one, Tensor) and isinstance(all_, Tensor) and one.shape == all_.shape else "stack"
            for one, all_ in zip(answers[0][0], parts, strict=True)
        )
        joined = _join([answer for answer, _ in answers], rules, _device_of(bound, self.pipe))
        if joined is None:
            self._note("its prompts have embeddings of different lengths")
            return None
        if not _alike(joined, parts):
            self._note("it encodes the prompts of a batch together")
            return None
        return rules

    def _note(self, why: str) -> None:
        note = f"{type(self.pipe).__name__}: {why}, so text is encoded at every call of more than one prompt"
        if note not in self.notes:
            self.notes.append(note)


def _rows(arguments: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The arguments for each prompt alone, as lists of one; None without a prompt."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list | tuple) or not prompt or not all(isinstance(text, str) for text in prompt):
        return None
    listed = {
        name: list(value)
        for name, value in arguments.items()
        if "prompt" in name and isinstance(value, list | tuple) and len(value) == len(prompt)
    } | {"prompt": list(prompt)}
    count = range(len(prompt))
    return [{**arguments, **{name: [values[index]] for name, values in listed.items()}} for index in count]


def _is_text(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list)


def _key(row: dict[str, Any]) -> Any:
    """What the answer depends on, hashable; None when there is a tensor or an unknown object in it."""
    plain = (str, int, float, bool, type(None), torch.device, torch.dtype)
    items = []
    for name, value in sorted(row.items()):
        value = tuple(value) if isinstance(value, list) else value
        if not all(isinstance(each, plain) for each in (value if isinstance(value, tuple) else (value,))):
            return None
        items.append((name, value))
    return tuple(items)


def _device_of(arguments: dict[str, Any], pipe: Any) -> Any:
    device = arguments.get("device")
    return pipe._execution_device if device is None else device


def _join(answers: Sequence[tuple[Any, ...]], rules: tuple[str, ...], device: Any) -> tuple[Any, ...] | None:
    """One answer from those of single prompts by the rules of `_compare`; None where that cannot be done.

    Tensors are stacked along their first dimension, or kept where all are equal; lists (a tensor a prompt) are chained.
    """
    parts: list[Any] = []
    for rule, values in zip(rules, zip(*answers, strict=True), strict=True):
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            return None
        if isinstance(first, Tensor) and rule == "stack":
            if any(value.shape != first.shape or value.dtype != first.dtype for value in values):
                return None
            parts.append(torch.cat([value.to(device) for value in values]))
        elif isinstance(first, list):
            parts.append([_to(each, device) for value in values for each in value])
        else:
            if not all(torch.equal(value, first) if isinstance(first, Tensor) else value == first for value in values):
                return None
            parts.append(_to(first, device))
    return tuple(parts)


def _to(part: Any, device: Any) -> Any:
    """A copy on `device`: the pipeline may write into what it gets."""
    return _map(lambda tensor, _: tensor.to(device, copy=True), part, 0)


def _map(function: Any, part: Any, place: int) -> Any:
    if isinstance(part, Tensor):
        return function(part, place)
    return [_map(function, each, place) for each in part] if isinstance(part, list) else part


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    return [tensor for each in part for tensor in _tensors(each)] if isinstance(part, list) else []


def _alike(ours: Any, theirs: Any) -> bool:
    """Equal in structure and shape; floating tensors up to round-off, everything else exactly."""
    if isinstance(theirs, tuple | list):
        same = type(ours) is type(theirs) and len(ours) == len(theirs)
        return same and all(_alike(a, b) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(theirs, Tensor):
        return type(ours) is type(theirs) and ours == theirs
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    apart = (ours.double() - theirs.double()).abs().amax() if theirs.numel() else torch.zeros(())
    return float(apart) <= ROUND_OFF[theirs.dtype] * float(theirs.double().abs().amax() if theirs.numel() else 0)


def _put(slots: list[tuple[nn.Module, Any]]) -> None:
    for module, value in slots:
        if value is None:
            module.__dict__.pop("_compiled_call_impl", None)
        else:
            module.__dict__["_compiled_call_impl"] = value
