"""The three doors held open while a diffusers pipeline samples itself: autograd, its networks, its scheduler.

No sampling loop is copied: the user's own ``pipe(...)`` runs, and the doors decide at each network call and at each
``scheduler.step`` what is computed, what is recorded and where the chain ends. Everything is put back when the doors
close, also after an exception.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewardtune.engine.call import Call, hold
from rewardtune.engine.guidance import conditional_only
from rewardtune.errors import ConfigError, PreflightError
from rewardtune.plan import Plan
from rewardtune.prediction import NoPredictionError, Span, span, x0_hat

log = logging.getLogger("rewardtune")

#: Names under which diffusers pipelines keep the network that is tuned.
DENOISERS = ("unet", "transformer", "prior", "decoder")
#: A decoder is replayed on at most this many pixels at once: one picture of 512 x 512.
DECODE_PIXELS = 512 * 512

#: Hooks of diffusers that reuse results between steps: a call that uses them cannot be repeated from its arguments.
CACHE_HOOKS = ("cache", "fbc_", "faster_cache", "pyramid_attention", "layer_skip", "smoothed_energy", "taylorseer")

_told: "weakref.WeakSet[Any]" = weakref.WeakSet()


class Doors:
    """What the doors do during one sampling chain, and what they saw.

    Attributes:
        plan: the chain's plan; None computes everything and records nothing.
        blank: compute the first of equally shaped network calls and answer the others with it, trained steps and what
            comes before the loop apart: enough to count steps, or to reach one step of a chain cheaply.
        prediction: with ``blank``, the ``model_output`` of the last trained step, with its graph.
        step: scheduler steps carried out so far; ``asked``: those asked for, the ones after the stop included.
        calls: the tape, in order.
        calls_per_step: denoiser calls before each scheduler step.
        outputs: with ``keep_outputs``, all network outputs in order: constants, or the recorded call. A restarted
            chain (DRaFT-LV) gets them as ``given``, so its steps before ``start`` cost no network call and its
            scheduler's history is true; a chain with an earlier stop gets those of all its steps.
        recompute: whether trained calls of the denoiser run without a graph, and again in the sweep.
        first, final: the first latent and the last ``prev_sample``; ``timesteps``: the timestep of every step. They
            serve re-noising.
        guidance: how the trained steps are guided (guidance.py), with `plan.conditional_only`.
        spans, states: with ``plan.weight``, the noise levels of every step, and its latents and outputs where the rule
            compares them.
        carries: step -> factor on the gradient that leaves its sampler for the latent; put in after the chain.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan | None,
        *,
        denoiser: str,
        blank: bool = False,
        keep_outputs: bool = False,
        given: Sequence[Any] = (),
        recompute: bool = True,
        restart: Callable[[Any], Tensor] | None = None,
        known: Tensor | None = None,
    ) -> None:
        self.pipe, self.plan, self.blank = pipe, plan, blank
        self.denoiser = pipe.components[denoiser]
        trained = {id(p) for p in self.denoiser.parameters() if p.requires_grad}
        self._sharing = {
            name
            for name, module in pipe.components.items()
            if isinstance(module, nn.Module) and any(id(p) in trained for p in module.parameters())
        }
        self.keep_outputs, self.given, self.recompute = keep_outputs, list(given), recompute
        self.restart, self.known = restart, known
        self.step, self.asked = 0, 0
        self.timestep_sets = 0
        self.calls: list[Call] = []
        self.calls_per_step: dict[int, int] = {}
        self.outputs: list[Any] = []
        self.timesteps: list[Any] = []
        self.first: Tensor | None = None
        self.final: Tensor | None = None
        self.spans: list[Span] = []
        self.states: list[tuple[Tensor, Tensor]] = []
        self.carries: dict[int, float] = {}
        self.prediction: Tensor | None = None
        self.guidance: set[str] = set()
        self._answers: dict[Any, Any] = {}
        self._graphed = False  # whether the latents carry a graph by now
        self._end: Any = None

    @property
    def stopped(self) -> bool:
        return self._end is not None

    @contextmanager
    def open(self) -> Iterator["Doors"]:
        """Hold the doors open; restores every attribute it sets, in reverse order."""
        _refuse_inference_mode()
        scheduler = self.pipe.scheduler
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # door 1: restore the mode
            aside = stack.enter_context(quiet(self.pipe))
            if aside and self.pipe not in _told:
                _told.add(self.pipe)
                log.warning("%s is set aside while rollouts run: it carries no gradient", " and ".join(aside))
            for name, module in self.pipe.components.items():
                if isinstance(module, nn.Module):
                    _refuse_hooks(name, module)
                    inner = module._compiled_call_impl or module._call_impl
                    # The outermost call slot of nn.Module: hooks of accelerate, diffusers, FSDP and dynamo stay inside.
                    hold(stack, module, "_compiled_call_impl", functools.partial(self._network, name, module, inner))
                    decode: Any = getattr(module, "decode", None)
                    if callable(decode):
                        hold(stack, module, "decode", functools.partial(self._decode, name, module, decode))
            hold(stack, scheduler, "step", self._step_door(scheduler.step))
            hold(stack, scheduler, "set_timesteps", self._count_timesteps(scheduler.set_timesteps))
            yield self

    # Door 2: networks ---------------------------------------------------------------------------------------------

    def _network(self, name: str, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_denoiser = module is self.denoiser
        if is_denoiser:
            self.calls_per_step[self.step] = self.calls_per_step.get(self.step, 0) + 1
        if self.plan is None and not self.blank and not self.keep_outputs:
            return self._constant(inner, args, kwargs)
        signature = (name, *_shapes((args, kwargs)))
        if (self.stopped or self._idle) and signature in self._answers:
            return _copied(self._answers[signature])
        if self.given and (self._start == 0 or self.step < self._start):  # a chain with another stop; a restarted one
            known = self.given.pop(0)
            output = known.handed() if isinstance(known, Call) else _copied(known)
            self._graphed |= isinstance(known, Call)
            self._answers[signature] = _constants(output)
            return output
        recorded = None
        if self._taped(name, module, args, kwargs):
            assert self.plan is not None
            call = Call(
                step=self.step,
                name=name,
                module=module,
                run=inner,
                trained=name in self._sharing,
                # Scaled once, at the denoiser's arguments: a ControlNet below it is not scaled again.
                input_gradient=self.plan.gradient_into(self.step) if self.is_kin(module) else 1.0,
                keep=is_denoiser and not self.recompute,
            )
            output, recorded, self._graphed = call.record(args, kwargs), call, True
            self.calls.append(call)
        else:
            output = self._constant(inner, args, kwargs)
        self._answers[signature] = _constants(output)
        if self.keep_outputs:
            # A copy: the pipeline may write into what it got.
            self.outputs.append(recorded or _copied(self._answers[signature]))
        return output

    def is_kin(self, module: nn.Module) -> bool:
        """The denoiser, or a second network of its class: the other half of the guidance (Ideogram 4)."""
        return isinstance(module, type(self.denoiser)) or isinstance(self.denoiser, type(module))

    @property
    def _idle(self) -> bool:
        """Whether the networks answer from memory: ``blank``, and this is no trained step (nor a text encoder)."""
        if not self.blank or self.plan is None:
            return self.blank
        return bool(self.calls_per_step) and self.step not in self.plan.train

    @property
    def _start(self) -> int:
        return 0 if self.plan is None or self.plan.start is None else self.plan.start

    def _taped(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> bool:
        if self.stopped or self.plan is None or self.step not in self.plan.train:
            return False
        if module is self.denoiser or name in self._sharing:
            return True
        if self.plan.conditional_only and self.is_kin(module):
            return True  # only to be seen in the guidance
        if self.plan.gradient_into(self.step) == 0:
            return False
        # ControlNets and their like carry gradient only in nested plans, from their inputs.
        inputs = pytree.tree_leaves((args, kwargs))
        return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)

    def _constant(self, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return inner(*args, **kwargs)

    def _decode(self, name: str, module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return self._constant(inner, args, kwargs)
        call = Call(step=self.step, name=name, module=module, run=inner, trained=False, input_gradient=1.0)
        output = call.record(args, kwargs)
        picture = next(leaf for leaf in call.leaves if leaf is not None)
        pixels = picture[0, 0].numel()
        call.chunk, call.checkpoint = max(1, DECODE_PIXELS // max(1, pixels)), pixels >= DECODE_PIXELS
        self.calls.append(call)
        return output

    # Door 3: scheduler.step ---------------------------------------------------------------------------------------

    def _step_door(self, real_step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(real_step)

        @functools.wraps(real_step)  # pipelines look for `eta` and `generator` in the signature
        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            as_dict = bound.arguments["return_dict"]
            self.asked += 1
            if self.stopped:
                return self._end if as_dict else self._end.to_tuple()
            if self._graphed:
                torch.set_grad_enabled(True)
            self.timesteps.append(bound.arguments["timestep"])
            if self.first is None:
                self.first = bound.arguments["sample"].detach()
            if self.plan is not None and self.plan.needs_levels:
                self._observe(bound.arguments)
                bound.arguments["sample"] = self._carried(bound.arguments["sample"])
            if self.plan is not None and self.plan.conditional_only and self.step in self.plan.train:
                self._choose_branch(bound.arguments["model_output"])
            if self.plan is not None and self.step == self.plan.end:
                self._end = self._stop(real_step, bound)
                self.step += 1
                return self._end if as_dict else self._end.to_tuple()
            if self.blank and self.plan is not None and self.step in self.plan.train:
                self.prediction = bound.arguments["model_output"]
            answer = real_step(*bound.args, **bound.kwargs)
            answer = self._restarted(answer)
            self.final = _previous(answer)
            self.step += 1
            return answer

        return step

    def _choose_branch(self, guided: Tensor) -> None:
        assert self.plan is not None
        calls = [call for call in self.calls if call.step == self.step and self.is_kin(call.module)]
        if not calls:
            return  # of the chain that these outputs are given from
        self.guidance.add(conditional_only(guided, calls, self.denoiser, self.plan.guidance_factor))

    def _observe(self, arguments: dict[str, Any]) -> None:
        """What the plan's weights are made of; PreflightError where a call does not stand for its step."""
        assert self.plan is not None
        if arguments.get("eta"):
            raise PreflightError(
                f"eta={arguments['eta']} adds fresh noise at every step, so a call does not stand for one stretch of "
                "the noise levels: leapalign, flowbp_... and srpo need eta 0"
            )
        x, F = arguments["sample"].detach(), arguments["model_output"].detach()
        found = span(self.pipe.scheduler, arguments["timestep"])
        if not found.length:
            raise PreflightError(
                f"step {self.step} of {type(self.pipe.scheduler).__name__} ends at the noise level at which it starts, "
                "so its call stands for nothing: leapalign, flowbp_... and srpo need set_alpha_to_one=True, another "
                "timestep_spacing or another scheduler (sampling.scheduler)"
            )
        self.spans.append(found)
        if getattr(self.plan.weight, "tau", None) is not None:
            self.states.append((x, F.chunk(2, dim=1)[0] if F.ndim > 1 and F.shape[1] == 2 * x.shape[1] else F))

    def _carried(self, x: Tensor) -> Tensor:
        """The latent as the sampler gets it, apart from what its network got: the plan may weigh this way."""
        if not x.requires_grad:
            return x
        x, step, carries = x.view_as(x), self.step, self.carries  # not self: the graph must not hold the records
        x.register_hook(lambda gradient: gradient * carries.get(step, 1.0))
        return x

    def _stop(self, real_step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Algorithm 1, lines 19-21: the chain ends here with x0-hat in place of the next latent.

        Where the noise is known, x0-hat is the next latent without the rest of it; the last step leaves none.
        """
        arguments = bound.arguments
        torch.set_grad_enabled(True)  # under no_grad the scheduler's own prediction would carry no graph
        scheduler, sample, output = self.pipe.scheduler, arguments["sample"], arguments["model_output"]
        formula, refusal = None, None
        try:
            if self.known is None:
                formula = x0_hat(scheduler, sample, output, timestep=arguments["timestep"])
        except NoPredictionError as error:
            refusal = error
        arguments["return_dict"] = True
        answer = real_step(*bound.args, **bound.kwargs)
        own = getattr(answer, "pred_original_sample", None)
        own = own if own is not None else getattr(answer, "denoised", None)
        if self.known is not None:
            assert self.plan is not None
            last = self.step + 1 == self.plan.T
            own = answer.prev_sample if last else self.spans[-1].clean(answer.prev_sample, self.known)
        x0 = own if own is not None else formula
        if x0 is None:
            raise refusal or NoPredictionError(f"{type(scheduler).__name__} has no x0-hat")
        x0 = x0.to(answer.prev_sample.dtype)
        for key, value in answer.items():
            if isinstance(value, Tensor) and value.shape == x0.shape:
                answer[key] = x0  # pipelines of LCM and SCM decode the second value
        return answer

    def _restarted(self, answer: Any) -> Any:
        """DRaFT-LV: the chain goes on from the finished x_0, re-noised to the level of step ``start``."""
        if self.restart is None or self.step != self._start - 1:
            return answer
        latent = self.restart(self.pipe.scheduler).to(_previous(answer).dtype)
        if isinstance(answer, tuple):
            return (latent, *answer[1:])
        answer["prev_sample"] = latent
        return answer

    def _count_timesteps(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self.timestep_sets += 1
            if self.timestep_sets > 1:
                raise PreflightError(
                    f"{type(self.pipe).__name__} samples in more than one stage (set_timesteps is called again in one "
                    "call). Tune a single-stage pipeline, or each stage by itself."
                )
            return real(*args, **kwargs)

        return set_timesteps


def find_denoiser(pipe: Any, name: str | None = None) -> str:
    """Name of the component that is tuned: ``name`` if given, else the usual ones of diffusers.

    Raises:
        PreflightError: if the pipeline is of a kind that cannot be opened, or has no such component.
    """
    from diffusers import DiffusionPipeline

    if not issubclass(type(pipe), DiffusionPipeline):
        raise PreflightError(
            f"{type(pipe).__name__} is not a diffusers DiffusionPipeline (modular pipelines have no single call whose "
            "networks and scheduler can be held): load the classic pipeline class of the same model."
        )
    networks = [key for key, module in pipe.components.items() if isinstance(module, nn.Module)]
    names = [name] if name else [key for key in DENOISERS if key in networks]
    if not names or names[0] not in networks:
        raise PreflightError(
            f"{type(pipe).__name__} has no denoiser named {name or ' / '.join(DENOISERS)}: its networks are "
            f"{', '.join(networks)}. Pass denoiser=<name>."
        )
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise PreflightError(
            f"{type(pipe).__name__} has no scheduler with a step of its own (several stages, or an autoregressive "
            "model): its chain cannot be opened. Tune each stage's pipeline by itself."
        )
    return names[0]


@contextmanager
def quiet(pipe: Any, *, checkers: bool = False) -> Iterator[list[str]]:
    """The pipeline without its progress bar, and without what leaves torch: safety checker and watermark.

    A decoder kept in float32 beside a half-precision denoiser gets its latents in its own dtype, which diffusers leaves
    to some pipelines and forgets in others. Everything comes back at the end.

    Args:
        checkers: keep the safety checker and the watermark (pictures for people rather than for a reward).

    Yields:
        Names of what was set aside.
    """
    with ExitStack() as stack:
        names = () if checkers else ("safety_checker", "watermark")
        aside = [name for name in names if getattr(pipe, name, None) is not None]
        for name in aside:
            hold(stack, pipe, name, None)
        hold(stack, pipe, "_progress_bar_config", {**getattr(pipe, "_progress_bar_config", {}), "disable": True})
        for module in pipe.components.values():
            decode: Any = getattr(module, "decode", None)
            if isinstance(module, nn.Module) and callable(decode):
                hold(stack, module, "decode", functools.partial(_decode_in_own_dtype, module, decode))
        yield aside


def _decode_in_own_dtype(module: Any, decode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.to(module.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    args, kwargs = pytree.tree_map(cast, (args, kwargs))
    return decode(*args, **kwargs)


def _refuse_hooks(name: str, module: nn.Module) -> None:
    for path, child in module.named_modules():
        where = f"pipe.{name}.{path}".rstrip(".")
        registry = getattr(child, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}):
            if any(mark in hook for mark in CACHE_HOOKS):
                raise PreflightError(
                    f"{where} carries the hook {hook!r}, which reuses results between steps: a call cannot be "
                    "repeated from its arguments. Remove it (disable_cache) before tuning."
                )
        hf_hook = getattr(child, "_hf_hook", None)
        if type(hf_hook).__name__ == "AlignDevicesHook" and getattr(hf_hook, "offload", False):
            raise PreflightError(
                f"{where} is offloaded sequentially, which replaces its parameters: gradients would be lost. "
                "Use enable_model_cpu_offload() instead of enable_sequential_cpu_offload()."
            )
    if any(p.is_meta for p in module.parameters()):
        raise PreflightError(f"pipe.{name} has parameters on the meta device (sequential offload?): load them first")


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "a rollout runs under torch.inference_mode, where nothing carries a graph: leave that context"
        )


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(tree)
    return (tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in leaves), str(spec))


def _constants(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _previous(answer: Any) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer.prev_sample
