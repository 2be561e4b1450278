"""Recorded network calls, kept so that each can be replayed with a graph, one at a time.

While a pipeline samples, every network runs under no_grad. A call that matters for the gradient is kept as a
`Call`: its arguments by reference and what the outcome depends on besides them (RNG, autocast, dtype,
attention processors). Its output is handed on as a fresh leaf, so the only graph that grows is the arithmetic of the
scheduler and the guidance. `replay` runs the call again with a graph, refuses if the outcome is not what was
recorded, and back-propagates the cotangent that has arrived at the leaf.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewardtune.errors import ConfigError, PreflightError, ReplayError, out_of_memory

#: Largest relative difference between a replayed output and the recorded one.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Surroundings:
    """What a network call depends on besides its arguments and weights."""

    device: torch.device
    dtype: torch.dtype | None
    rng: Tensor
    device_rng: Tensor | None
    autocast: tuple[bool, torch.dtype]
    processors: list[tuple[Any, Any]]  # attention layers, and what each computes with

    @classmethod
    def of(cls, module: nn.Module, inputs: list[Any]) -> "Surroundings":
        parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
        # The inputs tell where the call runs: an offloaded module is still on the CPU at this moment.
        device = next((x.device for x in inputs if _floating(x)), torch.device("cpu"))
        kind = device.type
        return cls(
            device=device,
            dtype=parameter.dtype if parameter is not None else None,
            rng=torch.get_rng_state(),
            device_rng=torch.cuda.get_rng_state(device) if kind == "cuda" else None,
            autocast=(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            processors=[(at, at.processor) for at in _layers_with(module, "set_processor") if hasattr(at, "processor")],
        )

    @contextmanager
    def restored(self, module: nn.Module) -> Iterator[None]:
        """Make ``module`` see what it saw when it was recorded; put everything back afterwards."""
        with ExitStack() as stack:
            stack.enter_context(_forked_rng(self))
            current = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
            if current is not None and self.dtype is not None and current != self.dtype:
                module.to(self.dtype)  # an up-cast VAE that its pipeline has cast back
                stack.callback(module.to, current)
            for layer, processor in self.processors:
                if layer.processor is not processor:
                    stack.callback(layer.set_processor, layer.processor)
                    layer.set_processor(processor)
            stack.enter_context(differentiable(module))
            yield

    def autocasting(self) -> torch.autocast:
        # The weight cache is off: it outlives the graph and would swallow adapter gradients.
        enabled, dtype = self.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """What a few networks of diffusers need before a gradient can pass them; as it was afterwards."""
    with ExitStack() as stack:
        if not hasattr(module, "gradient_checkpointing"):
            hold(stack, module, "gradient_checkpointing", False)  # Z-Image's ControlNet reads what it lacks
        for experts in _layers_with(module, "moe_infer"):
            if not experts.training:
                # Mixtures of experts (HiDream) compute under a no_grad of their own unless they are in training mode: a
                # replay would take their outputs for constants. In training mode the values are the same.
                hold(stack, experts, "training", True)
                hold(stack, experts, "_force_inference_output", False)
        yield


@dataclass
class Call:
    """One recorded call of a network (or of a decoder).

    Attributes:
        step: the scheduler step it belongs to; ``T`` for the decoder.
        module, run: the network, and the callable that runs it as the pipeline did.
        trained: whether its parameters receive the gradient.
        input_gradient: factor on the gradient that is sent on to its inputs; 0 sends none.
        weight: factor on the cotangent that arrives at its output (the plan's `weight`).
        shares: factors on the rows of each output's cotangent (rows,), where guidance hands the gradient to one branch.
        chunk: pictures replayed at once (decoder only); 0 means all.
        checkpoint: replay with the module's gradient checkpointing (large pictures, decoder only).
        keep: the call is run with a graph that waits for the sweep, which then computes nothing again.
    """

    step: int
    name: str
    module: nn.Module
    run: Callable[..., Any]
    trained: bool
    input_gradient: float
    weight: float = 1.0
    shares: list[Tensor | None] = field(default_factory=list)
    chunk: int = 0
    checkpoint: bool = False
    keep: bool = False
    inputs: list[Any] = field(default_factory=list)
    spec: Any = None
    leaves: list[Tensor | None] = field(default_factory=list)
    rest: list[Any] = field(default_factory=list)  # what of the output is no leaf
    out_spec: Any = None
    versions: list[int | None] = field(default_factory=list)
    surroundings: Surroundings | None = None
    graph: tuple[list[Any], list[Any]] | None = None  # with keep: inputs and flat outputs of the call's own graph

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call on its own; hand out its output with every floating tensor as a new leaf."""
        self.inputs, self.spec = pytree.tree_flatten((args, kwargs))
        self.surroundings = Surroundings.of(self.module, self.inputs)
        for value in self.inputs:
            _refuse_hidden_tensors(self.name, value)
        self.versions = [x._version if isinstance(x, Tensor) else None for x in self.inputs]
        if self.keep:
            inputs = self._leaves_of(self.inputs)
            args, kwargs = pytree.tree_unflatten(inputs, self.spec)
            with torch.enable_grad(), self.surroundings.autocasting(), differentiable(self.module):
                output = self.run(*args, **kwargs)
        else:
            with torch.no_grad():
                output = self.run(*args, **kwargs)
        flat, self.out_spec = pytree.tree_flatten(output)
        self.graph = (inputs, flat) if self.keep else None
        self.leaves = [x.detach().requires_grad_() if _floating(x) else None for x in flat]
        self.rest = [x if leaf is None else None for x, leaf in zip(flat, self.leaves, strict=True)]
        return self.handed()

    def handed(self) -> Any:
        """The output, each floating tensor as a copy of its leaf: arithmetic in place on it cannot touch the record."""
        torch.set_grad_enabled(True)  # door 1: the pipeline's own no_grad puts it back when it ends
        flat = [x if leaf is None else leaf.clone() for x, leaf in zip(self.rest, self.leaves, strict=True)]
        return pytree.tree_unflatten(flat, self.out_spec)

    @property
    def _live(self) -> list[int]:
        """The inputs that the gradient is sent on to."""
        return [i for i, x in enumerate(self.inputs) if self.input_gradient > 0 and _floating(x) and x.requires_grad]

    def _leaves_of(self, inputs: list[Any]) -> list[Any]:
        """Algorithm 1, line 14: sg(x_t) - the inputs enter as constants, or as leaves of this call's own graph."""
        own = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        for i in self._live:
            own[i].requires_grad_()
        return own

    def _again(self, part: Callable[[Tensor], Tensor]) -> tuple[list[Any], list[Any]]:
        """Inputs and flat outputs of the call with a graph: the one that was kept, or computed once more."""
        if self.graph is not None:
            graph, self.graph = self.graph, None
            return graph
        assert self.surroundings is not None
        inputs = self._leaves_of([part(x) if isinstance(x, Tensor) else x for x in self.inputs])
        args, kwargs = pytree.tree_unflatten(inputs, self.spec)
        with self.surroundings.autocasting():
            return inputs, pytree.tree_flatten(self.run(*args, **kwargs))[0]

    @property
    def recorded(self) -> list[Tensor]:
        """Tensors this call keeps alive: its inputs and its output."""
        return [x for x in (*self.inputs, *self.leaves) if isinstance(x, Tensor)]

    def replay(
        self, frozen: Sequence[nn.Parameter], *, pull: float = 0.0, reference: nn.Module | None = None
    ) -> tuple[float, float]:
        """Back-propagate what has arrived at the leaves: Algorithm 1's gradient of this one call.

        Parameter gradients are accumulated into ``.grad``; gradients of the inputs, times ``input_gradient``, are
        sent on through the scheduler's graph to earlier leaves.

        Args:
            frozen: parameters that must not receive a gradient here.
            pull: weight of ``mean((F - F_ref)^2)``, which is added for the parameters alone: the inputs get none of it.
            reference: the frozen network of F_ref; None is this call's own network with its adapters off.

        Returns:
            Largest relative difference between replayed and recorded output, and ``mean((F - F_ref)^2)`` (0 without
            ``pull``).

        Raises:
            ReplayError: if the call does not reproduce its record.
        """
        cotangents = self._cotangents()
        if all(c is None for c in cotangents) and not pull:
            return 0.0, 0.0  # the sampler did not use this output
        self._refuse_changed_arguments()
        assert self.surroundings is not None
        error, distance = 0.0, 0.0
        checkpointed = _checkpointed(self.module) if self.checkpoint else nullcontext()
        with self.surroundings.restored(self.module), _no_gradient_for(frozen), checkpointed, torch.enable_grad():
            live = self._live
            sent: dict[int, list[Tensor]] = {i: [] for i in live}
            base = self._reference(reference) if pull else None  # before this call's graph takes its memory
            rows = None if pull else self._rows()
            for part in self._parts(rows):
                inputs, output = self._again(part)
                error = max(error, self._compare(output, part))
                pairs = [
                    (out, part(c))
                    for out, c in zip(output, cotangents, strict=True)
                    if c is not None and out.requires_grad
                ]
                pulls: list[tuple[Tensor, Tensor]] = []
                if base is not None:
                    distance, pulls = _pulls(output, base, pull)
                    if not live or not pairs:  # nothing else sees the cotangent: one vector-Jacobian product for both
                        pairs, pulls = _summed(pairs + pulls), []
                if pairs:
                    outputs, arrived = zip(*pairs, strict=True)
                    torch.autograd.backward(outputs, arrived, retain_graph=bool(pulls))
                for i in live:
                    grad, inputs[i].grad = inputs[i].grad, None
                    grad = torch.zeros_like(inputs[i]) if grad is None else grad
                    if rows is not None and grad.ndim:
                        grad = torch.zeros_like(self.inputs[i]).index_copy(0, rows, grad)
                    sent[i].append(grad)
                if pulls:  # a second product, whose gradient at the inputs is dropped
                    torch.autograd.backward([out for out, _ in pulls], [c for _, c in pulls])
        for leaf in self.leaves:
            if leaf is not None:
                leaf.grad = None
        if live:
            torch.autograd.backward(
                [self.inputs[i] for i in live],
                [
                    torch.cat(sent[i]) * self.input_gradient if self.chunk else sent[i][0] * self.input_gradient
                    for i in live
                ],
                retain_graph=True,
            )
        return error, distance

    def _cotangents(self) -> list[Tensor | None]:
        """What has arrived at the leaves, times `weight` and `shares`; None where that is nothing."""
        arrived: list[Tensor | None] = []
        for leaf, share in zip(self.leaves, self.shares or [None] * len(self.leaves), strict=True):
            cotangent = None if leaf is None else leaf.grad
            if cotangent is not None and self.weight != 1:
                cotangent = cotangent * self.weight
            if cotangent is not None and share is not None:
                share = share.to(cotangent).view(-1, *[1] * (cotangent.ndim - 1))
                cotangent = cotangent * share if share.any() else None
            arrived.append(cotangent)
        return arrived

    def _reference(self, reference: nn.Module | None) -> list[Any]:
        """Flat outputs of the reference network at this call's own (detached) arguments."""
        assert self.surroundings is not None
        network: nn.Module = self.module if reference is None else reference
        off = adapters_off(network) if reference is None else nullcontext()
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in self.inputs]
        args, kwargs = pytree.tree_unflatten(inputs, self.spec)
        run = self.run if reference is None else reference
        with self.surroundings.restored(network), off, torch.no_grad(), self.surroundings.autocasting():
            return pytree.tree_flatten(run(*args, **kwargs))[0]

    def _rows(self) -> Tensor | None:
        """The rows that carry gradient, if these are a part and the network computes each row by itself.

        Whether it does is tried, without a graph, at its first call with its present attention processors: some mix the
        branches of guidance (PAG), and dropout draws other numbers for another number of rows.
        """
        shares = [share for share in self.shares if share is not None]
        if not shares or self.graph is not None:
            return None
        used = torch.stack([share != 0 for share in shares]).any(0)
        tensors = [x for x in (*self.inputs, *self.leaves) if isinstance(x, Tensor) and x.ndim]
        if used.all() or any(len(x) != len(used) for x in tensors):
            return None
        rows = used.nonzero()[:, 0]
        assert self.surroundings is not None
        processors, by_row = _by_row.get(self.module, ([], False))
        present = [processor for _, processor in self.surroundings.processors]
        if self.module not in _by_row or any(a is not b for a, b in zip_longest(processors, present)):
            by_row = self._is_by_row(rows)
            _by_row[self.module] = (present, by_row)
        return rows if by_row else None

    def _is_by_row(self, rows: Tensor) -> bool:
        assert self.surroundings is not None
        (part,) = self._parts(rows)
        with _forked_rng(self.surroundings), torch.no_grad():  # the replay itself begins with the recorded state
            try:
                self._compare(self._again(part)[1], part)
            except Exception as error:
                if out_of_memory(error):
                    raise
                return False
        return True

    def _parts(self, rows: Tensor | None = None) -> list[Callable[[Tensor], Tensor]]:
        """The call whole, its `rows` alone, or chunks of its leading dimension when every tensor argument shares it."""
        if rows is not None:
            return [lambda x: x[rows] if x.ndim else x]
        tensors = [x for x in (*self.inputs, *self.leaves) if isinstance(x, Tensor)]
        batch = next((leaf.shape[0] for leaf in self.leaves if leaf is not None), 0)
        if not 0 < self.chunk < batch or any(x.ndim == 0 or x.shape[0] != batch for x in tensors):
            self.chunk = 0
            return [lambda x: x]
        return [
            lambda x, start=start: x[start : start + self.chunk]  # type: ignore[misc]
            for start in range(0, batch, self.chunk)
        ]

    def _compare(self, output: list[Any], part: Callable[[Tensor], Tensor]) -> float:
        worst = 0.0
        if len(output) != len(self.leaves):
            raise ReplayError(
                f"{self.name} at step {self.step}: replayed with {len(output)} outputs, recorded with other"
            )
        for out, leaf in zip(output, self.leaves, strict=True):
            if leaf is None:
                continue
            recorded = part(leaf.detach())
            if out.shape != recorded.shape:
                raise ReplayError(
                    f"{self.name} at step {self.step}: replayed output has shape {tuple(out.shape)}, recorded was "
                    f"{tuple(recorded.shape)}"
                )
            scale = recorded.abs().max().double().clamp_min(1e-30)
            error = float((out.detach() - recorded).abs().max().double() / scale)
            legal = TOLERANCE.get(recorded.dtype, 1e-5)
            if (self.chunk or len(recorded) < len(leaf)) and recorded.device.type != "cpu":
                legal = max(TOLERANCE.values())  # a GPU may take another kernel (TF32) for another batch size
            if not error <= legal:
                raise ReplayError(
                    f"{self.name} at step {self.step}: the replayed call differs from the recorded one by {error:.1e} "
                    f"(relative; legal is {legal:.0e} in {recorded.dtype}). The network "
                    "is not a function of its arguments: remove caches, guiders, hooks or callbacks that change it "
                    "during the call."
                )
            worst = max(worst, error)
        return worst

    def _refuse_changed_arguments(self) -> None:
        for x, version in zip(self.inputs, self.versions, strict=True):
            if isinstance(x, Tensor) and x._version != version:
                raise ReplayError(
                    f"{self.name} at step {self.step}: an argument of shape {tuple(x.shape)} was changed in place "
                    "after the call, so the call cannot be repeated. Let the callback or pipeline write to a copy."
                )


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _pulls(output: list[Any], base: list[Any], weight: float) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """mean((F - F_ref)^2) over all elements, and each output's cotangent 2 weight (F - F_ref) / n."""
    apart: list[tuple[Tensor, Tensor]] = []
    for out, ref in zip(output, base, strict=True):
        if _floating(out):
            if out.shape != ref.shape:
                raise ConfigError(
                    f"the reference network answers {tuple(ref.shape)} where the tuned one answers "
                    f"{tuple(out.shape)}: pass a frozen copy of the tuned network as it was before training"
                )
            wide = torch.float64 if out.dtype == torch.float64 else torch.float32
            apart.append((out, out.detach().to(wide) - ref.to(wide)))
    n = sum(d.numel() for _, d in apart)
    distance = sum(float(d.square().sum(dtype=torch.float64)) for _, d in apart) / n
    return distance, [(out, (2 * weight / n * d).to(out.dtype)) for out, d in apart if out.requires_grad]


def _summed(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Every output once, with the sum of its cotangents."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for out, c in pairs:
        sums[id(out)] = (out, sums[id(out)][1] + c) if id(out) in sums else (out, c)
    return list(sums.values())


def check_reference(module: nn.Module) -> None:
    """ConfigError unless ``module`` without its adapters is the base model: all that is trained lies in adapters."""
    adapters = {
        id(p)
        for layer in _adapter_layers(module)
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in adapters]
    if outside:
        raise ConfigError(
            f"the KL term compares with the base model, but {len(outside)} trained tensors ({outside[0]} ...) are its "
            "own weights and not an adapter's: train a LoRA, pass reference=<a frozen copy of the network>, or set "
            "the KL weight to 0"
        )


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """``module`` as its base model: every adapter of peft (LoRA, DoRA) switched off, and back in its state after it.

    peft's own ``enable_adapters`` also rewrites ``requires_grad`` and the list of active adapters; the switch alone
    leaves both as they are.
    """
    layers = [layer for layer in _adapter_layers(module) if not layer.disable_adapters]
    try:
        for layer in layers:
            layer._disable_adapters = True
        assert all(layer.disable_adapters for layer in layers)
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapter_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


#: Of each network, the attention processors with which it was tried, and whether it computes rows by themselves.
_by_row: "weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], bool]]" = weakref.WeakKeyDictionary()
_layers: "weakref.WeakKeyDictionary[nn.Module, dict[str, list[Any]]]" = weakref.WeakKeyDictionary()


def _layers_with(module: nn.Module, attribute: str) -> list[Any]:
    """Looked for once: looking for attention's processors at each call took a twentieth of an update."""
    found = _layers.setdefault(module, {})
    if attribute not in found:
        found[attribute] = [layer for layer in module.modules() if hasattr(layer, attribute)]
    return found[attribute]


def hold(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute past any ``__setattr__``; the stack restores what was there."""
    present = owner.__dict__
    if name in present:
        stack.callback(present.__setitem__, name, present[name])
    else:
        stack.callback(present.pop, name, None)
    present[name] = value


@contextmanager
def _forked_rng(recorded: Surroundings) -> Iterator[None]:
    devices = [recorded.device] if recorded.device_rng is not None else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(recorded.rng)
        if recorded.device_rng is not None:
            torch.cuda.set_rng_state(recorded.device_rng, recorded.device)
        yield


@contextmanager
def _no_gradient_for(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    switched = [p for p in parameters if p.requires_grad]
    for p in switched:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in switched:
            p.requires_grad_(True)


@contextmanager
def _checkpointed(module: Any) -> Iterator[None]:
    """Gradient checkpointing for one replay: a decoder at 1024 px otherwise saves some 24 GB a picture in float32."""
    if not getattr(module, "_supports_gradient_checkpointing", False) or module.is_gradient_checkpointing:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


def _refuse_hidden_tensors(name: str, value: Any) -> None:
    """A cache object that travels from call to call makes the call more than a function of its arguments."""
    plain = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)
    if isinstance(value, plain) or callable(value):
        return
    if _holds_tensor(value, depth=4):
        raise PreflightError(
            f"{name} is called with a {type(value).__name__} that holds tensors (a cache): the call cannot be "
            "repeated from its arguments. Switch the cache off, for example use_kv_cache=False."
        )


def _holds_tensor(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        children: Any = value.values()
    elif isinstance(value, list | tuple | set):
        children = value
    else:
        children = list(getattr(value, "__dict__", {}).values())
    return any(_holds_tensor(child, depth - 1) for child in children)
