"""One strict YAML per run: unknown keys are errors with their line and the nearest legal key, all problems at once.

The models below are the whole truth about the run file: `rewardtune schema`, the table in docs/run-files.md and the
checks derive from their fields. `strictyaml` reads the file, pydantic checks it. Imports nothing heavy.
Left out on purpose: `${...}` and includes; a run file says everything itself, and `key=value` changes it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from . import strictyaml
from .errors import ConfigError
from .spelling import nearest

PRESETS = Path(__file__).parent / "presets"

MOVED = {  # keys of earlier run files
    "lora": "it is called adapter now",
    "model.path": "it is called model.id now",
    "optim.offload_reward": "write memory: {offload: [reward]} now",
    "optim.workers": "several processes are a matter of the command now: rewardtune train RUN.yaml -n 2",
}

ELSEWHERE = {  # keys of other trainers, wherever they stand
    "learning_rate": "optim.lr",
    "max_train_steps": "optim.steps",
    "train_batch_size": "optim.batch",
    "network_dim": "adapter.rank",
    "network_alpha": "adapter.alpha",
    "lora_rank": "adapter.rank",
    "resolution": "sampling.width and sampling.height",
    "training": "optim, with steps, lr, batch and the like in it",
}

SHORT = {  # `model: playground` is short for `model: {id: playground}`
    "model": "id",
    "method": "name",
    "prompts": "source",
    "eval.prompts": "source",
}


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section in it whose keys are all commented out is its default."""
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or not isinstance(_default(cls, k), _Section)}


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # what may be a path
Pair = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists only


class Model(_Section):
    """The pipeline to tune."""

    id: Place
    """hub id, diffusers folder, one .safetensors file, or `playground`"""
    revision: Text | None = None
    """branch, tag or commit of a hub id; null: its main branch"""
    variant: Text | None = None
    """of the files on the hub, e.g. fp16; null: the plain ones"""
    config: Place | None = None
    """for one .safetensors file: the diffusers folder or hub id that tells its layout; null: guessed from its keys"""
    pipeline: Text | None = None
    """another pipeline class for the same networks, e.g. StableDiffusionImg2ImgPipeline; null: the model's own"""
    controlnet: Place | None = None
    """hub id or folder of the ControlNet that `pipeline` takes; it stays as it is"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the frozen weights; adapters are always float32"""
    device: Text = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    quantize: Literal["int8", "nf4"] | None = None
    """load the denoiser in 8 or 4 bits (bitsandbytes, CUDA)"""
    compile: bool = False
    """torch.compile of the denoiser's repeated blocks"""


class Standardise(_Section):
    """(r - mean) / std"""

    mean: float
    """measured once on the untuned model"""
    std: float = Field(gt=0)
    """measured once on the untuned model"""


class Relative(_Section):
    """SRPO's reward: how much better a picture fits the prompt in wanted words than in unwanted ones."""

    positive: Text
    """the prompt with what is wanted, `{}` being the prompt, e.g. `Realistic photo. {}`"""
    negative: Text
    """the prompt with what is not wanted"""
    k: float = Field(default=0.0, ge=0)
    """score = (1 + k) r(positive) - r(negative)"""

    @field_validator("positive", "negative")
    @classmethod
    def _has_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError("must hold {} once, where the prompt goes")
        return value


class Part(_Section):
    """A reward by name, or a group of rewards; at most one of hinge, target, standardise is put on it."""

    name: Text | None = None
    """a reward of `rewardtune ls rewards`, or an import path `module:Name`"""
    mean_of: list["Part"] | None = Field(default=None, min_length=2)
    """an ensemble's mean, per image"""
    minimum_of: list["Part"] | None = Field(default=None, min_length=2)
    """its worst member, per image"""
    balance: list["Part"] | None = Field(default=None, min_length=2)
    """a sum whose parts' gradients at the image get equal norms"""
    weight: float = 1.0
    """factor in the sum; 0: only logged"""
    options: dict[str, Any] = {}
    """settings of the named reward"""
    relative: Relative | None = None
    """the reward of the prompt in other words, minus that in others still (SRPO)"""
    hinge: float | None = None
    """-relu(level - r): pushes up to this level and no further"""
    target: float | None = None
    """-|r - value|: holds the reward at this value"""
    standardise: Standardise | None = None
    """(r - mean) / std"""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`clipscore` for `{name: clipscore}`."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of(self) -> "Part":
        for words, least in (
            (("name", "mean_of", "minimum_of", "balance"), 1),
            (("hinge", "target", "standardise"), 0),
        ):
            given = [word for word in words if getattr(self, word) is not None]
            if not least <= len(given) <= 1:
                legal = "one" if least else "at most one"
                raise ValueError(f"{' and '.join(given) or 'nothing'} given; legal is {legal} of {', '.join(words)}")
        if self.options and self.name is None:
            raise ValueError("options are for a reward by name; a group has none")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Any) -> dict[str, Any]:
        """Without the settings that do not concern this part."""
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


def named_parts(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts by name, those within groups too."""
    for part in parts:
        if part.name is not None:
            yield part
        for group in (part.mean_of, part.minimum_of, part.balance):
            yield from named_parts(group or ())


class Robust(_Section):
    """RSA-FT, put on any method: the gradient at the worst case nearby."""

    image: float = Field(default=1e-2, ge=0)
    """how far each picture is moved down the reward, as the L2 norm over its values; 0: not"""
    weights: float = Field(default=1e-2, ge=0)
    """how far the trained weights are moved up the loss, as the L2 norm over all of them; 0: not. An update then costs
    twice as much"""


class Conditional(_Section):
    """The gradient through the conditional branch of classifier-free guidance alone; the same pictures."""

    factor: float | None = Field(default=None, gt=0)
    """what the conditional branch's gradient is multiplied by; null: one over its weight w in the guidance, so that it
    counts as much as both branches do; 1: w times as much"""


class MethodChoice(_Section):
    """How the reward's gradient goes through the sampling chain."""

    name: Text = "drtune"
    """one of `rewardtune ls methods` (docs/methods.md), or an import path `module:name` (docs/write-method.md)"""
    options: dict[str, Any] = {}
    """the method's arguments, e.g. {K: 5, m: 20}; see `rewardtune ls methods`"""
    rsa_ft: Robust | None = None
    """RSA-FT put on the method; null: not"""
    conditional_only: Conditional | None = None
    """train through the conditional branch of guidance alone; null: through both"""


class PromptSource(_Section):
    """Where prompts come from; docs/prompts.md."""

    source: Place | Annotated[list[Text], Field(min_length=1)]
    """a .txt, .jsonl, .json, .csv or .parquet file, hf:..., builtin:NAME, playground:train, or a list"""
    template: Text | None = None
    """put around every prompt, e.g. `a photo of {}`; null: as it is"""
    columns: list[Text] = []
    """columns of the file that are arguments of the pipeline's call, one for each sample: paths of pictures (image,
    control_image), beginning at the file, and texts (negative_prompt)"""

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str | None) -> str | None:
        from .prompts import check_template

        try:
            return value if value is None else check_template(value)
        except ConfigError as error:  # the line names key and value already
            raise ValueError(str(error).removeprefix(f"template {value!r} ")) from error


class Prompts(PromptSource):
    """What is trained on; docs/prompts.md."""

    negative: Text | None = None
    """one negative prompt for all; the same as sampling.negative_prompt"""


class Sampling(_Section):
    """How pictures are sampled, in training and in evaluation alike."""

    steps: int = Field(default=50, ge=1)
    """sampling steps, as num_inference_steps"""
    guidance: float | None = Field(default=None, ge=0)
    """classifier-free guidance scale; null: the pipeline's default"""
    width: int | None = Field(default=None, ge=8)
    """pixels; null: the pipeline's default"""
    height: int | None = Field(default=None, ge=8)
    """pixels; null: the pipeline's default"""
    scheduler: Text | None = None
    """a diffusers scheduler class, e.g. DDIMScheduler; null: as saved with the model"""
    negative_prompt: str | None = None
    """one negative prompt for all"""
    call: dict[str, Any] = {}
    """further arguments of the pipeline's call, e.g. {strength: 0.6}"""
    allow_no_guidance: bool = False
    """permit guidance <= 1 on a pipeline made for guidance (turbo, lightning)"""


class Adapter(_Section):
    """What is trained."""

    kind: Literal["lora", "dora", "full"] = "lora"
    """low-rank adapters, the same with a magnitude, or all weights of the denoiser"""
    rank: int = Field(default=128, ge=1)
    """of every adapter; full has none"""
    alpha: int | None = Field(default=None, ge=1)
    """the adapter is scaled by alpha / rank; null: rank"""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "attention"
    """attention, attention+conv, all-linear, all, or a list of module-name suffixes"""
    inference_weight: float = Field(default=1.0, gt=0)
    """how strongly to use what was trained: of `sample`, `export`, `push`, `eval`; training itself has 1"""


class Memory(_Section):
    """What trades time or precision for memory; docs/memory.md."""

    gradient_checkpointing: bool = False
    """the denoiser computes its activations again in the backward pass"""
    recompute: bool = True
    """trained steps run again when their gradient is due, so memory is that of one; false: the graphs of all are kept,
    which is faster by one forward for each trained step"""
    cache_text: bool = True
    """prompts are encoded once; memory.offload: [text_encoders] also takes the encoders off the device"""
    vae_dtype: Literal["float32", "bfloat16"] | None = None
    """of the VAE, which gives black images in float16; null: float32 beside a float16 model, else as model.dtype"""
    offload: list[Literal["text_encoders", "vae", "reward"]] = []
    """what waits on the CPU while the denoiser works"""
    shard: bool | Literal["node"] = False
    """with several processes: each holds a share of the denoiser's frozen weights (FSDP2); node: shared inside each
    machine, whole on every one; docs/processes.md"""


class Optim(_Section):
    """The optimiser, and how long it works."""

    steps: int = Field(default=1000, ge=1)
    """updates"""
    lr: float = Field(default=2e-5, gt=0)
    """learning rate"""
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """adamw8bit and prodigy need the extra `optim`"""
    betas: Pair = (0.9, 0.999)
    """of the optimiser, each from 0 to below 1"""
    weight_decay: float = Field(default=0.0, ge=0)
    """decoupled, as in AdamW"""
    clip: float = Field(default=0.1, gt=0)
    """largest gradient norm"""
    batch: int = Field(default=32, ge=1)
    """pictures an update, over all processes"""
    micro_batch: int | None = Field(default=None, ge=1)
    """how many of them at a time; null: all"""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """of the learning rate"""
    warmup: int = Field(default=0, ge=0)
    """updates in which the learning rate rises from 0"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """decay of the averaged adapters that are evaluated and saved; null: no average"""
    max_seconds: float | None = Field(default=None, gt=0)
    """stop in time, with what is there"""

    @field_validator("betas")
    @classmethod
    def _in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers, each from 0 to below 1")
        return value


class Denoise(_Section):
    """The denoising (pre-training) loss, mixed into each update."""

    weight: float = Field(default=0.0, ge=0)
    """factor in the loss; 0: off"""
    images: Place | None = None
    """a folder of pictures with captions beside them (cat.png, cat.txt); prompts:COLUMN: those of the prompt file;
    null: sampled from the base model"""
    count: int = Field(default=256, ge=1)
    """how many pictures"""
    noise_range: Pair = (0.6, 1.0)
    """part of the noise axis that is trained, 1 being pure noise; the early, noisy steps by default"""

    @field_validator("noise_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("must be two rising numbers from 0 to 1, e.g. [0.6, 1.0]")
        return value


class Regularize(_Section):
    """Against reward hacking; docs/regularize.md."""

    kl: float = Field(default=0.0, ge=0)
    """weight of the distance to the base model at the trained steps; 0: off"""
    denoise: Denoise = Denoise()


class Eval(_Section):
    """The fixed pictures that are compared before, during and after."""

    prompts: PromptSource | None = None
    """as `prompts`; null: the first training prompts"""
    count: int = Field(default=16, ge=1)
    """how many pictures"""
    every: int | None = Field(default=None, ge=1)
    """updates between evaluations; null: only before and after"""

    @field_validator("prompts", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return value if value is None else _prompt_mapping(value)


class Rule(_Section):
    """A limit that the run may not cross; exactly one of falls_by, rises_by, below, above."""

    metric: Text
    """a name of the evaluation: a reward, a held-out reward, or a measure of docs/guards.md"""
    falls_by: float | None = Field(default=None, gt=0, le=1)
    """share of the value before training, 0.10 being 10 %"""
    rises_by: float | None = Field(default=None, gt=0)
    """the same, for a metric of which less is better"""
    below: float | None = None
    """the value itself"""
    above: float | None = None
    """the value itself"""
    patience: int = Field(default=1, ge=1)
    """evaluations in a row that must cross it"""
    certain: bool = False
    """count only what is beyond the 95 % interval over prompts"""
    then: Literal["stop", "rollback", "warn"] = "stop"
    """stop: end the run; rollback: go back to the best checkpoint with half the learning rate, and go on; the third
    time the run stops; warn: only say so"""

    @model_validator(mode="after")
    def _one_limit(self) -> "Rule":
        words = ("falls_by", "rises_by", "below", "above")
        given = [word for word in words if getattr(self, word) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no limit'} given; legal is exactly one of {', '.join(words)}")
        return self


class Guards(_Section):
    """What is watched and never trained on; docs/guards.md."""

    rewards: list[Part] = []
    """held-out rewards, written as in `reward`"""
    features: Place | None = None
    """CLIP for diversity and distance to the base pictures: hub id, folder or `playground`; null: none"""
    rules: list[Rule] = []
    """limits that stop the run"""


class Checkpoints(_Section):
    """The training state on disk; docs/checkpoints.md."""

    every: int | None = Field(default=None, ge=1)
    """updates between checkpoints; null: only the best looks, and the end"""
    keep: int = Field(default=2, ge=1)
    """how many of the last ones stay"""
    best: Text | None = "reward"
    """the metric of the evaluation by which the best one stays too; null: none"""


class Log(_Section):
    """Trackers beside metrics.jsonl and train.log, which are always written."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """each needs the extra of its name"""
    project: Text = "rewardtune"
    """the project's name in the trackers"""
    report: bool = True
    """report.html in the run folder, written during training and at its end; docs/report.md"""


class RunConfig(_Section):
    """One run of rewardtune."""

    model: Model
    """the pipeline; `model: playground` is short for `model: {id: playground}`"""
    reward: Annotated[list[Part], Field(min_length=1)]
    """what is maximised: a name, a part, or a list whose weighted sum counts; docs/rewards.md"""
    reward_weight: float = 1.0
    """a factor on the whole reward, in the loss and in the log"""
    method: MethodChoice = MethodChoice()
    """`method: refl` is short for `method: {name: refl}`"""
    prompts: Prompts
    """a source, a list, or a mapping; docs/prompts.md"""
    sampling: Sampling = Sampling()
    adapter: Adapter = Adapter()
    memory: Memory = Memory()
    optim: Optim = Optim()
    regularize: Regularize = Regularize()
    eval: Eval = Eval()
    guards: Guards = Guards()
    checkpoints: Checkpoints = Checkpoints()
    log: Log = Log()
    output_dir: Place
    """folder of the run; one that holds something is refused"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """every random number of the run derives from it"""

    @property
    def looked_at(self) -> PromptSource:
        """The prompts of the evaluations: their own, or those that are trained on."""
        return self.eval.prompts or self.prompts

    @property
    def negative_prompt(self) -> str | None:
        return self.prompts.negative or self.sampling.negative_prompt or None

    @field_validator("model", "method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any, info: Any) -> Any:
        return {SHORT[info.field_name]: value} if isinstance(value, str) else value

    @field_validator("prompts", mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return _prompt_mapping(value)

    @field_validator("reward", mode="before")
    @classmethod
    def _one_reward(cls, value: Any) -> Any:
        """`reward: clipscore`, one mapping, or a list of either."""
        if value is None:
            raise ValueError("must be a name of `rewardtune ls rewards`, a mapping, or a list of these")
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        problems = list(_contradictions(self))
        if problems:
            text = "; ".join(f"{key}: {message}" for key, message in problems)
            raise PydanticCustomError("together", "{text}", {"text": text, "problems": problems})
        return self


def _prompt_mapping(value: Any) -> Any:
    if isinstance(value, str | list):
        return {"source": value}
    if isinstance(value, dict | PromptSource):
        return value
    raise ValueError("must be a string, a list of strings, or a mapping with a source")


def _contradictions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for settings that are legal alone and not together."""
    from .prompts import OURS, is_picture, wrong_images

    optim, regularize, guards = config.optim, config.regularize, config.guards
    if optim.warmup >= optim.steps:
        yield "optim.warmup", f"{optim.warmup} updates of warmup, but optim.steps is {optim.steps}: must be less"
    if optim.micro_batch is not None and optim.micro_batch > optim.batch:
        yield "optim.micro_batch", f"{optim.micro_batch} is more than optim.batch, which is {optim.batch}"
    if config.prompts.negative and config.sampling.negative_prompt:
        yield "prompts.negative", "sampling.negative_prompt is given too; keep one of them"
    if config.model.controlnet is not None and config.model.pipeline is None:
        yield (
            "model.controlnet",
            "needs a pipeline that takes it, e.g. model.pipeline StableDiffusionControlNetPipeline",
        )
    if config.model.pipeline is not None and config.model.quantize is not None:
        yield "model.pipeline", "does not go with model.quantize: save that pipeline in a folder, and name the folder"
    if optim.schedule == "polynomial" and optim.lr <= 1e-7:
        yield "optim.lr", f"{optim.lr:g} with schedule polynomial, which falls to 1e-07: must be above that"
    call = config.sampling.call
    for key, value in {"steps": "num_inference_steps", "guidance": "guidance_scale"}.items():
        if value in call:
            yield "sampling.call", f"{value} is sampling.{key}: set it there"
    if ours := sorted(OURS & call.keys()):
        yield "sampling.call", f"{', '.join(ours)} is set by the trainer itself: leave it out"
    given = {
        "height": config.sampling.height,
        "width": config.sampling.width,
        "negative_prompt": config.negative_prompt,
    }
    if twice := sorted(key for key, value in given.items() if value is not None and key in call):
        yield "sampling.call", f"{', '.join(twice)} is given by a key of its own too; keep one of them"
    columns = set(config.prompts.columns)
    if twice := sorted(columns & call.keys()):
        yield "prompts.columns", f"{', '.join(twice)} stands in sampling.call too; keep one of them"
    if "negative_prompt" in columns and config.negative_prompt:
        yield "prompts.columns", "negative_prompt is given for all too; keep one of them"
    if misplaced := wrong_images(regularize.denoise.images, sorted(filter(is_picture, columns))):
        yield "regularize.denoise.images", misplaced
    if config.adapter.kind == "full":
        for key in ("rank", "alpha", "targets", "inference_weight"):
            if getattr(config.adapter, key) != _default(Adapter, key):
                yield f"adapter.{key}", "is of adapters, and adapter.kind full has none; leave it out"
        if config.method.name == "draft_plus":
            yield (
                "method.name",
                "draft_plus needs the base model, which full fine-tuning changes: use lora or dora, or draft",
            )
        if regularize.kl > 0:
            yield (
                "regularize.kl",
                "needs the base model, which full fine-tuning changes: use adapter.kind lora or dora, or kl 0",
            )
        if config.model.quantize is not None:
            yield "adapter.kind", "quantised weights cannot be trained: adapter.kind lora, or model.quantize null"
    if config.memory.shard:
        for key, wrong, cure in (
            ("adapter.kind", config.adapter.kind != "lora", "use lora"),
            ("model.quantize", config.model.quantize is not None, "set it to null"),
            ("model.compile", config.model.compile, "set it to false"),
            ("memory.recompute", not config.memory.recompute, "set it to true"),
        ):
            if wrong:
                yield key, f"does not go with memory.shard: {cure}, or memory.shard false"
    if regularize.denoise.images is not None and regularize.denoise.weight == 0:
        yield (
            "regularize.denoise.images",
            "has no effect while regularize.denoise.weight is 0: raise it, or leave it out",
        )
    if config.eval.every is None:  # a number: the last look counts too, which a rule or `best` may turn down
        if guards.rules:
            yield "guards.rules", "are judged at evaluations, and there are none: set eval.every, e.g. 50"
        if config.checkpoints.best not in (None, "reward"):
            yield "checkpoints.best", f"{config.checkpoints.best!r} is measured at evaluations: set eval.every, e.g. 50"
    if config.checkpoints.best is None and any(rule.then == "rollback" for rule in guards.rules):
        yield (
            "guards.rules",
            "then: rollback goes back to the best checkpoint, and checkpoints.best is null: set it, e.g. reward, or "
            "use then: stop",
        )
    if "text_encoders" in config.memory.offload and not config.memory.cache_text:
        yield "memory.offload", "text_encoders needs memory.cache_text: set it to true"
    for index, word in enumerate(config.memory.offload):
        if word in config.memory.offload[:index]:
            yield "memory.offload", f"{word} is given twice"


def _default(model: Any, key: str) -> Any:
    return model.model_fields[key].default if key in model.model_fields else None


def presets() -> dict[str, Path]:
    """The run files shipped with the package, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def copy_preset(name: str, output: Path | None = None) -> Path:
    """Write the preset `name` to `output` (default: NAME.yaml), give the path. ConfigError if something is there."""
    from .runfolder import write_text

    found = presets()
    if name not in found:
        raise ConfigError(f"unknown preset {name!r}{nearest(name, found)}; legal: {', '.join(found)}")
    path = output or Path(f"{name}.yaml")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists; choose another name with --output, or remove it first")
    write_text(path, found[name].read_text(encoding="utf-8"))
    return path


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, or a shipped preset by name (`playground`), with `key=value` overrides (`optim.lr=1e-4`).

    A key may go through lists (`reward.0.weight=2`); a value is YAML (`prompts=[a, b]`, `eval.every=null`).
    Raises ConfigError listing every problem with its line, or the key of its override.
    """
    path = Path(source)
    if not path.is_file() and str(source) in presets():  # a folder of that name hides no preset
        path = presets()[str(source)]
    text = _read_text(path)
    values, lines = strictyaml.read(text, f"run file {path}")
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"run file {path}, line 1: must be a mapping of sections; legal keys: {', '.join(RunConfig.model_fields)}"
        )
    values = values or {}
    places = {where: f"{path}, line {line}" for where, line in lines.items()}
    for override in overrides:
        key, value = _parse(override)
        _set(values, key, value, override)
        places = {where: place for where, place in places.items() if where[: len(key)] != key}
        for n in range(1, len(key) + 1):  # also of the sections that it made
            places.setdefault(key[:n], f"override {override.partition('=')[0]}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, path, places))) from error


def _read_text(path: Path) -> str:
    if path.is_dir():
        run = path / "config.yaml"
        inside = f"give {run}" if run.is_file() else "give a YAML file, or a shipped preset by name"
        raise ConfigError(f"run file {path} is a folder; {inside}")
    if not path.is_file():
        known = ", ".join(presets()) or "none"
        hint = nearest(path.name, presets())
        raise ConfigError(f"run file {path} does not exist{hint}; give a YAML file or a shipped preset ({known})")
    data = b""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"run file {path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


S = TypeVar("S", bound=_Section)


def section(model: type[S], given: Mapping[str, Any] | S | None, name: str) -> S:
    """The section `name` of the run file from a mapping, as Python callers give it; ConfigError as for a file."""
    if isinstance(given, model):
        return given
    value = {} if given is None else given
    try:
        return model.model_validate(dict(value) if isinstance(value, Mapping) else value)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, None, {}, name))) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return strictyaml.write(config.model_dump(mode="json"))


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`["K=5", "spacing=random"]` -> {"K": 5, "spacing": "random"}, typed as in YAML."""
    values: dict[str, Any] = {}
    for option in options:
        key, value = _parse(option)
        _set(values, key, value, option)
    return values


Key = tuple[str | int, ...]


def _parse(override: str) -> tuple[Key, Any]:
    """`reward.0.weight=2` -> ("reward", 0, "weight"), 2."""
    dotted, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")
    if not equals or not all(re.fullmatch(r"[^\s\[\]]+", part) for part in parts):
        raise ConfigError(f"override {override!r}: write key=value, for example optim.lr=1e-4")
    try:
        value, _ = strictyaml.read(text, f"override {dotted}")
    except ConfigError as error:
        raise ConfigError(f"{error}; text with special characters needs quotes: {dotted}=\"'...'\"") from error
    return tuple(int(part) if re.fullmatch("[0-9]{1,6}", part) else part for part in parts), value


def _set(values: Any, key: Key, value: Any, override: str) -> None:
    """Put `value` at `key`, entering sections, lists and what is written in a short form."""
    for position, part in enumerate(key):
        if isinstance(values, list) != isinstance(part, int) or (isinstance(part, int) and part >= len(values)):
            name = ".".join(map(str, key[:position]))
            what = "no list"
            if isinstance(values, list) and values and isinstance(part, str):
                rest = ".".join(map(str, key[position:]))
                what = f"a list of {len(values)}; write {name}.0.{rest}" + " or another number" * (len(values) > 1)
            elif isinstance(values, list):
                last = len(values) - 1
                legal = "0" if last == 0 else f"0 to {last}" if last > 0 else "none"
                what = f"a list of {len(values)}; legal numbers: {legal}"
            raise ConfigError(f"override {override.partition('=')[0]}: {name or 'the run file'} is {what}")
        if position == len(key) - 1:
            values[part] = value
            return
        here = values[part] if isinstance(part, int) else values.get(part)
        values[part] = values = _written_out(key[: position + 1], here, key[position + 1])
        if not isinstance(values, dict | list):
            name = ".".join(map(str, key[: position + 1]))
            raise ConfigError(f"override {override.partition('=')[0]}: {name} is {_short(values)}, which has no keys")


def _written_out(where: Key, value: Any, key: str | int) -> Any:
    """The long form of what stands at `where`, so that `key` can be set in it."""
    if value is None:
        return {}
    if where == ("reward",) and not isinstance(value, list):
        return [value]
    short = SHORT.get(".".join(map(str, where)))
    if short and (isinstance(value, str) or (isinstance(value, list) and not isinstance(key, int))):
        return {short: value}
    return {"name": value} if isinstance(value, str) and isinstance(where[-1], int) and where[0] != "prompts" else value


# -- what is wrong, in words -----------------------------------------------------------------------------------------

_UNION = re.compile(r"str|int|bool|function-after\[.*\]|list\[.*\]|literal\[.*\]|constrained-\w+|nullable\[.*\]")


def _explain(error: ValidationError, path: Path | None, places: dict[Key, str], section: str = "") -> list[str]:
    """One line for each problem: where, what was given, what is legal. section: the one that was checked alone."""
    found: dict[tuple, tuple[Any, list[tuple[str, str]]]] = {}  # the members of a union share a line
    unions = []
    for problem in error.errors(include_url=False):
        loc = (*filter(None, [section]), *problem["loc"])
        last = len(loc) - (problem["type"] == "extra_forbidden")  # a key of the user's may be called `str`
        where = tuple(w for n, w in enumerate(loc) if n >= last or not (isinstance(w, str) and _UNION.fullmatch(w)))
        if problem["type"] == "together":
            for key, message in problem["ctx"]["problems"]:
                found[key, message] = {"loc": tuple(key.split(".")), "type": "together"}, [("together", message)]
            continue
        if where != loc:
            unions.append(where)
        entry = found.setdefault((where, problem["type"] == "extra_forbidden"), ({**problem, "loc": where}, []))
        entry[1].append((problem["type"], problem["msg"]))
    deeper = {where[:n] for where in unions for n in range(1, len(where))}
    lines = [
        _line(problem, messages, path, places)
        for problem, messages in found.values()
        if not (problem["loc"] in unions and problem["loc"] in deeper)
    ]
    return sorted(dict.fromkeys(lines), key=_line_number)


def _line_number(problem: str) -> float:
    """Where the problem stands in the file; those of no line come last."""
    found = re.match(r".*?, line (\d+): ", problem)
    return int(found[1]) if found else float("inf")


def _line(problem: Any, messages: list[tuple[str, str]], path: Path | None, places: dict[Key, str]) -> str:
    where = problem["loc"]
    dotted = ".".join(map(str, where))
    place = _place(where, path, places)
    if problem["type"] == "together":
        return f"{place}{dotted}: {messages[0][1]}"
    if problem["type"] == "extra_forbidden":
        if dotted in MOVED:
            return f"{place}{dotted!r}: {MOVED[dotted]}"
        if where[-1] in ELSEWHERE:
            return f"{place}unknown key {dotted!r}: here it is {ELSEWHERE[where[-1]]}"
        model = _model_at(where[:-1])
        legal = list(model.model_fields) if model else []
        return f"{place}unknown key {dotted!r}{nearest(str(where[-1]), legal)}; legal here: {', '.join(legal)}"
    if problem["type"] == "missing" and isinstance(where[-1], int):
        of = ".".join(map(str, where[:-1]))
        return f"{place}{of} = {_short(problem['input'])}: must be {_pair_words(where[:-1])}"
    if problem["type"] == "missing":
        hint = " (`rewardtune init` lists complete run files to start from)" if len(where) == 1 else ""
        return f"{place}{dotted!r} is missing{hint}"
    other = ("_type", "literal_error")  # the rest is of the fitting member of a union
    inner = [(kind, text) for kind, text in messages if not kind.endswith(other)]
    words = dict.fromkeys(_must(kind, text, problem) for kind, text in inner or messages)
    return f"{place}{dotted} = {_short(problem['input'])}: {_joined(list(words))}"


def _pair_words(where: Key) -> str:
    """`two numbers, e.g. [0.9, 0.999]`."""
    field = _field_at(where)
    example = "" if field is None or field.is_required() else f", e.g. {list(field.default)}"
    return f"two numbers{example}"


def _joined(words: list[str]) -> str:
    """`must be a, or be b` without the second `must be`."""
    return " or ".join(word if n == 0 else word.removeprefix("must be ") for n, word in enumerate(words))


def _must(kind: str, text: str, problem: Any) -> str:
    """What is legal at the problem's place, as a sentence that begins with its value."""
    value, field = problem["input"], _field_at(problem["loc"])
    if kind == "value_error":  # of the validators above, which say it all
        return text.removeprefix("Value error, ")
    if kind == "too_short":
        return re.sub(r"\w+ should have at least (\d+) (items?).*", r"must have at least \1 \2", text)
    if kind == "string_too_short":
        return "must not be empty"
    message = text.removeprefix("Input should be ")
    if kind in ("float_type", "int_type"):
        number = r"[-+]?\d+" if kind == "int_type" else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
        if isinstance(value, str) and re.fullmatch(number, value):
            return f"must be {message}; remove the quotes"
        default = None if field is None else field.default
        return f"must be {message}" + (f", e.g. {default}" if isinstance(default, int | float) else "")
    if kind == "list_type" and field is not None:
        words = _literals(field.annotation)
        of = f" of {', '.join(words)}" if words else " of mappings" if section_in(field.annotation) is Rule else ""
        example = value if isinstance(value, str) and (not words or value in words) else next(iter(words), None)
        return f"must be a list{of}" + (f", e.g. [{_short(example)[1:-1]}]" if example else "")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        model = _model_at(problem["loc"])
        name = "a name or " if model in (Model, MethodChoice, Part) else ""
        return f"must be {name}a mapping" + (f"; legal keys: {', '.join(model.model_fields)}" if model else "")
    return f"must be {message.replace('valid tuple', 'valid list').replace('a valid boolean', 'true or false')}"


def _literals(annotation: Any) -> list[str]:
    """The words of the Literal in `annotation`, through lists; none where there is no Literal."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for inner in get_args(annotation) for word in _literals(inner)]


def _place(where: Key, path: Path | None, places: dict[Key, str]) -> str:
    """The line, or the override, of the innermost key around `where` that is written somewhere; "" without a file."""
    written = [
        where,
        tuple(part for part in where if part != "source"),  # `prompts: [a, b]`
        where[:1] + where[2:] if where[:1] == ("reward",) else where,  # `reward: {name: clipscore}`
    ]
    found = [(n, places[form[:n]]) for form in written for n in range(len(form), 0, -1) if form[:n] in places]
    place = max(found, key=lambda pair: pair[0])[1] if found else path
    return "" if place is None else f"{place}: "


def _field_at(where: Key) -> FieldInfo | None:
    """The field at `where`; None for a list item and for what is unknown."""
    model = _model_at(where[:-1]) if where and isinstance(where[-1], str) else None
    return None if model is None else model.model_fields.get(str(where[-1]))


def _model_at(where: Key) -> type[BaseModel] | None:
    """The section at `where`."""
    model: type[BaseModel] | None = RunConfig
    for part in where:
        if model is not None and isinstance(part, str):
            field = model.model_fields.get(part)
            model = None if field is None else section_in(field.annotation)
    return model


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, through lists and unions; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(section_in, get_args(annotation)) if found), None)


def _short(value: Any) -> str:
    """repr, at most a line of it, without writing out what is huge."""
    if isinstance(value, dict | list) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, str) or len(value) < 200 else repr(value[:200])
    return text if len(text) <= 100 else f"{text[:97]}..."
