"""From a run file to a RewardTuner: the model, the reward and the method that its words name."""

import inspect
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from . import checkpoint, methods
from .config import Memory, MethodChoice, Model, Part, RunConfig, dump_config, named_parts
from .errors import ConfigError, RewardTuneError
from .guards import check_held_out
from .importing import by_path, is_path
from .methods import Method
from .spelling import nearest

if TYPE_CHECKING:
    from .rewards import Reward
    from .trainer import Result, RewardTuner


def tuner_from(
    config: RunConfig, *, overwrite: bool = False, resume: str | None = None, show_progress: bool = True
) -> "RewardTuner":
    """A RewardTuner as the run file says; cheap mistakes (prompts, folder, names) are found before weights load."""
    from .processes import join
    from .prompts import digests, load_prompts
    from .rewards.loading import named
    from .runfolder import RunFolder
    from .trackers import check_installed

    RunFolder(config.output_dir, overwrite=overwrite, resume=resume is not None, writes=join().first)
    check_installed(config.log.trackers)
    method = make_method(config.method)
    for part in named_parts([*config.reward, *config.guards.rewards]):
        named(str(part.name))
    check_held_out(config.reward, config.guards.rewards)
    prompts = load_prompts(config.prompts.source, template=config.prompts.template, columns=config.prompts.columns)
    held = config.eval.prompts
    held_out = prompts if held is None else load_prompts(held.source, template=held.template, columns=held.columns)
    settings = config.model_dump(mode="json")
    if resume is not None:  # refused here if it cannot be, before weights load
        found = checkpoint.find(config.output_dir, resume)
        now = settings | digests(prompts, held_out[: config.eval.count])
        checkpoint.compare_settings(found.state["settings"], now)
    pipe = load_pipeline(config.model, memory=config.memory, scheduler=config.sampling.scheduler)
    tuner = assemble(
        config,
        pipe,
        reward=make_reward(config.reward, weight=config.reward_weight),
        method=method,
        prompts=prompts,
        eval_prompts=held_out,
        overwrite=overwrite,
        resume=resume,
        show_progress=show_progress,
    )
    tuner.settings, tuner.config_text = settings, dump_config(config)
    return tuner


def assemble(
    config: RunConfig,
    pipe: Any,
    *,
    reward: "Reward",
    method: Method,
    prompts: list[str],
    eval_prompts: list[str],
    overwrite: bool = False,
    resume: str | None = None,
    show_progress: bool = True,
) -> "RewardTuner":
    """A RewardTuner of what is loaded already, with the settings of the run file."""
    from .trainer import RewardTuner

    negative = {"negative_prompt": config.negative_prompt} if config.negative_prompt else {}
    call = dict(config.sampling.call) | negative
    return RewardTuner(
        pipe,
        reward=reward,
        method=method,
        prompts=prompts,
        output_dir=config.output_dir,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance,
        height=config.sampling.height,
        width=config.sampling.width,
        call=call,
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        targets=config.adapter.targets,
        batch=config.optim.batch,
        micro_batch=config.optim.micro_batch,
        offload=config.memory.offload,
        cache_text=config.memory.cache_text,
        shard=config.memory.shard,
        recompute=config.memory.recompute,
        regularize=config.regularize,
        guards=config.guards.model_dump(),
        checkpoints=config.checkpoints,
        log=config.log,
        seed=config.seed,
        eval_prompts=eval_prompts,
        eval_count=config.eval.count,
        allow_no_guidance=config.sampling.allow_no_guidance,
        overwrite=overwrite,
        resume=resume,
        show_progress=show_progress,
    )


def train(config: RunConfig, *, overwrite: bool = False, resume: str | None = None) -> "Result":
    """The run that the file describes, from loading to the before/after grid; gives the trainer's Result."""
    return train_as(config, tuner_from(config, overwrite=overwrite, resume=resume))


def train_as(config: RunConfig, tuner: "RewardTuner") -> "Result":
    """Training with the `optim` section of the file."""
    optim = config.optim
    return tuner.train(
        optim.steps,
        lr=optim.lr,
        optimizer=optim.optimizer,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        schedule=optim.schedule,
        warmup=optim.warmup,
        ema=optim.ema,
        max_seconds=optim.max_seconds,
        eval_every=config.eval.every,
    )


def make_method(choice: MethodChoice) -> Method:
    """The method of that name, or of an import path: a Method, or a function of the options that gives one.

    Raises ConfigError for an unknown method or option, naming the nearest, and for whatever else is not a Method.
    """
    factory = by_path(choice.name, "method") if is_path(choice.name) else methods.ALL.get(choice.name)
    if factory is None:
        wraps = choice.name in ("rsa_ft", "conditional_only")
        around = f": it goes around a method, as method.{choice.name}"
        hint = around if wraps else nearest(choice.name, methods.ALL)
        raise ConfigError(
            f"unknown method {choice.name!r}{hint}; legal: {', '.join(methods.ALL)}, "
            'or an import path "my_methods:my_method"'
        )
    method = _made(factory, choice)
    if choice.rsa_ft is not None:
        method = methods.rsa_ft(method, image=choice.rsa_ft.image, weights=choice.rsa_ft.weights)
    if choice.conditional_only is not None:
        method = methods.conditional_only(method, factor=choice.conditional_only.factor)
    return method


def _made(factory: Any, choice: MethodChoice) -> Method:
    given = isinstance(factory, Method)
    parameters: tuple[inspect.Parameter, ...] = ()
    takes_any = False
    try:
        if callable(factory) and not given:
            parameters = tuple(inspect.signature(factory).parameters.values())
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    except ValueError:  # a class of Python's own
        takes_any = True
    legal = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in choice.options:
        if option not in legal and not takes_any:
            hint = nearest(option, legal)
            words = ", ".join(legal) or "none"
            raise ConfigError(f"method {choice.name} has no option {option!r}{hint}; legal: {words}")
    try:
        method = factory if given else factory(**choice.options)
    except RewardTuneError:
        raise
    except Exception as error:  # whatever a user's function raises
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"method {choice.name}: options {choice.options} do not fit ({why})") from error
    if not isinstance(method, Method):
        raise ConfigError(
            f"method {choice.name} is a {type(method).__name__}; legal is a rewardtune.methods.Method, or a function "
            "that gives one (docs/write-method.md)"
        )
    return method


def make_reward(parts: list[Part], *, weight: float = 1.0) -> "Reward":
    """`weight` times the weighted sum of the parts.

    The same name with the same options is one reward, loaded and evaluated once, wherever it stands.
    """
    if not parts:
        raise ConfigError("reward is an empty list; name at least one (see `rewardtune ls rewards`)")
    reward = _total(parts, {})
    return reward if weight == 1 else weight * reward


def _total(parts: list[Part], loaded: dict[str, "Reward"]) -> "Reward":
    terms = ((part.weight, _one(part, loaded)) for part in parts)
    return reduce(add, (reward if weight == 1 else weight * reward for weight, reward in terms))


def _one(part: Part, loaded: dict[str, "Reward"]) -> "Reward":
    """A part without its weight: the named reward or the group, with the hinge, target or standardising put on it."""
    from . import rewards

    if part.mean_of is not None or part.minimum_of is not None:
        join = rewards.mean_of if part.mean_of is not None else rewards.minimum_of
        reward: Reward = join(*(_total([member], loaded) for member in part.mean_of or part.minimum_of or []))
    elif part.balance is not None:
        reward = rewards.balance(_total(part.balance, loaded))
    else:
        reward = _named(str(part.name), part.options, loaded)
    if part.relative is not None:
        reward = rewards.relative(reward, **part.relative.model_dump())
    if part.hinge is not None:
        return rewards.hinge(reward, part.hinge)
    if part.target is not None:
        return rewards.target(reward, part.target)
    if part.standardise is not None:
        return rewards.standardise(reward, mean=part.standardise.mean, std=part.standardise.std)
    return reward


def _named(name: str, options: dict[str, Any], loaded: dict[str, "Reward"]) -> "Reward":
    from . import rewards

    key = repr((name, options))
    if key not in loaded:
        loaded[key] = rewards.load(name, options)
    return loaded[key]


def load_pipeline(model: Model, *, memory: Memory | None = None, scheduler: str | None = None) -> Any:
    """The pipeline that a run file's `model` names, on its device (see `models.load_pipeline`)."""
    from . import models
    from .processes import join

    memory = memory or Memory()
    return models.load_pipeline(
        model.id,
        revision=model.revision,
        variant=model.variant,
        config=model.config,
        dtype=model.dtype,
        device=model.device,
        quantize=model.quantize,
        compile=model.compile,
        pipeline=model.pipeline,
        controlnet=model.controlnet,
        gradient_checkpointing=memory.gradient_checkpointing,
        vae_dtype=memory.vae_dtype,
        scheduler=scheduler,
        aside=memory.shard and join().world > 1,
    )
