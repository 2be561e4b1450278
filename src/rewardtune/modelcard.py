"""What a run says about itself: the README.md of a repository on the hub, and the header of a LoRA file.

Everything that came from outside (prompts, names, settings) stands in code spans or fenced blocks: it stays text,
whatever it holds. Local paths are cut to their last part, because cards and headers are published.
"""

import json
import math
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import __version__
from .config import RunConfig
from .guards import chosen_by
from .prompts import Conditioned, is_picture
from .runfolder import LORA_FILE, json_lines, storable, write_text

if TYPE_CHECKING:
    from .export import Exported, Run

TEXTS = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "prompt_4",
    "template",
    "negative",
    "positive",
)  # keys of no paths, by their ends
LATER = "The licence of the base model is looked up when this is pushed: a dry run asks nobody."
PICTURES = 4  # single pictures in the card's gallery
CONTROLS = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
PLAYGROUND = {"license": "apache-2.0"}  # its weights ship with this package, under the package's licence


# The header of a safetensors file -------------------------------------------------------------------------------------


def header(run: "Run", pipe: Any, *, ranks: Mapping[str, int], weight: float = 1.0) -> dict[str, str]:
    """`modelspec.*` (modelspec 1.0.0) and the `ss_*` keys of kohya's scripts that are true of this file, all strings.

    ranks: rank of every adapted layer. Left out: what kohya counts and reward training has not (images, epochs,
    captions), the author, and the licence where the base's own folder does not tell it.
    """
    facts, train = run.facts, run.facts.get("train", {})
    architecture, kohya_base = architecture_of(pipe)
    size = _size(run, pipe)
    base = public_name(run.model.id)
    licence = base_licence(run.model.id).get("license")
    most = max(ranks.values())
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipe.scheduler.config.get("prediction_type"))
    convolutions = [name for name in ranks if "conv" in name.rpartition(".")[2] or name.endswith(".conv")]
    values: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.description": plain(
            f"LoRA tuned by {facts.get('method', 'rewardtune')} to raise {facts.get('reward', 'a reward')} on {base}"
        ),
        "modelspec.date": facts.get("time"),
        "modelspec.resolution": f"{size[0]}x{size[1]}" if all(size) else None,
        "modelspec.prediction_type": prediction,
        "modelspec.license": licence,
        "modelspec.usage_hint": plain(f"{usage(run)}; no trigger word; {_strength(weight)}"),
        "modelspec.tags": "rewardtune, reward fine-tuning",
        "ss_output_name": run.name,
        "ss_sd_model_name": base,
        "ss_base_model_version": kohya_base,
        "ss_v2": str(kohya_base in ("sd_v2", "sd_v2_v")) if kohya_base else None,
        "ss_network_module": "networks.lora" if getattr(pipe, "unet", None) is not None else None,
        "ss_network_dim": most,
        "ss_network_alpha": most,
        "ss_network_args": json.dumps({"conv_dim": most, "conv_alpha": most}) if convolutions else None,
        "ss_resolution": str(size) if all(size) else None,
        "ss_learning_rate": train.get("lr"),
        "ss_unet_lr": train.get("lr"),
        "ss_max_train_steps": train.get("steps"),
        "ss_steps": run.checkpoint if run.checkpoint.isdigit() else _kept_step(facts),
        "ss_total_batch_size": train.get("batch"),
        "ss_max_grad_norm": train.get("clip"),
        "ss_seed": facts.get("seed"),
        "ss_training_comment": plain(
            f"rewardtune {__version__}, reward fine-tuning, no training images; method {facts.get('method')}, "
            f"reward {facts.get('reward')}, checkpoint {run.checkpoint}, weight {weight:g} and alpha in lora_up"
        ),
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def architecture_of(pipe: Any) -> tuple[str, str | None]:
    """modelspec's name of the base's architecture and kohya's, read off the denoiser's shape.

    A model of no known shape has its pipeline's class as its name and no name of kohya's.
    """
    unet = getattr(pipe, "unet", None)
    if unet is not None and unet.config.get("in_channels") == 4:
        cross = unet.config.get("cross_attention_dim")
        if cross == 2048 and unet.config.get("addition_embed_type") == "text_time":
            return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
        if cross == 768:
            return "stable-diffusion-v1", "sd_v1"
        if cross == 1024:
            v = pipe.scheduler.config.get("prediction_type") == "v_prediction"
            return ("stable-diffusion-v2-768-v", "sd_v2_v") if v else ("stable-diffusion-v2-512", "sd_v2")
    name = type(pipe).__name__
    if name == "FluxPipeline" and pipe.transformer.config.get("joint_attention_dim") == 4096:
        return ("flux-1-dev" if pipe.transformer.config.get("guidance_embeds") else "flux-1-schnell"), "flux1"
    if name == "StableDiffusion3Pipeline" and pipe.transformer.config.get("joint_attention_dim") == 4096:
        return "stable-diffusion-3", None
    return name, None


def _size(run: "Run", pipe: Any) -> tuple[int, int]:
    """(width, height) of the pictures that the run trained on; 0 where nothing tells."""
    default = getattr(pipe, "default_sample_size", None) or getattr(
        getattr(getattr(pipe, "unet", None), "config", None), "sample_size", 0
    )
    side = default * getattr(pipe, "vae_scale_factor", 8) if isinstance(default, int) else 0
    return int(run.call.get("width", side)), int(run.call.get("height", side))


def usage(run: "Run") -> str:
    """How to sample, in words: the run's own steps, guidance and scheduler."""
    parts = [f"{run.call['num_inference_steps']} steps"]
    if "guidance_scale" in run.call:
        parts.append(f"guidance {run.call['guidance_scale']:g}")
    if run.scheduler:
        parts.append(run.scheduler)
    return ", ".join(parts)


def _strength(weight: float) -> str:
    return "weight 1" if weight == 1 else f"weight 1, the file holds {weight:g} of the LoRA as trained"


# The licence of the base ----------------------------------------------------------------------------------------------


def base_licence(path: str, *, api: Any = None) -> dict[str, str]:
    """The licence fields of the base's model card (license, license_name, license_link); empty when nobody says.

    A folder is read from its README.md. A hub id is looked up through `api` (a huggingface_hub.HfApi), if given.
    """
    if path == "playground":
        return PLAYGROUND
    data: Any = None
    try:
        if Path(path).is_dir():
            from huggingface_hub import ModelCard

            readme = Path(path) / "README.md"
            data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        elif api is not None and hub_id(path):
            data = api.model_info(path, timeout=10).card_data
    except Exception:  # a card that cannot be read says nothing: the caller tells the reader so
        return {}
    fields = ("license", "license_name", "license_link")
    found = {name: getattr(data, name, None) for name in fields} if data is not None else {}
    return {name: value for name, value in found.items() if isinstance(value, str)} if found.get("license") else {}


def hub_id(path: str) -> str | None:
    """`path` if it can only be a hub id (user/name), else None."""
    local = Path(path).exists() or path == "playground" or path.endswith(".safetensors")
    return path if not local and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) else None


# The card -------------------------------------------------------------------------------------------------------------


def write_card(
    run: "Run",
    folder: Path,
    *,
    repo: str | None = None,
    exported: Sequence["Exported"] = (),
    licence: Mapping[str, str] | None = None,
    licence_later: bool = False,
    weight: float = 1.0,
) -> tuple[str, ...]:
    """Write `folder`/README.md and the pictures it shows beside it; give notes on what could not be said.

    repo: "user/name" of the snippet; None: the snippet loads the LoRA of the folder it is run in.
    licence_later: the hub has not been asked for the base's licence yet (a dry run).
    """
    from huggingface_hub import ModelCard

    licence = base_licence(run.model.id) if licence is None else licence
    later = licence_later and not licence and hub_id(run.model.id) is not None
    told = LATER if later else _licence_line(licence)
    gallery = _copy_pictures(run, folder)
    data = card_data(run, gallery=gallery, licence=licence)
    body = card_text(run, repo=repo, exported=exported, licence=told, weight=weight, grid=_copy_grid(run, folder))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    write_text(folder / "README.md", str(card))
    missing = (
        []
        if licence
        else [LATER]
        if later
        else ["the licence of the base model is unknown, so the card has none: add `license:`"]
    )
    if not gallery:
        why = "the run has no final pictures" if run.prompts else "nothing tells the run's prompts"
        missing.append(f"{why}, so the card shows no pictures")
    return tuple(missing)


def card_data(run: "Run", *, gallery: Mapping[str, str], licence: Mapping[str, str]) -> Any:
    """The YAML head (ModelCardData). `gallery`: file of a picture -> its prompt."""
    from huggingface_hub import ModelCardData

    method = str(run.facts.get("method", "")).partition("(")[0]
    base = hub_id(run.model.id)
    extra: dict[str, Any] = dict(licence) | ({"base_model_relation": "adapter"} if base else {})
    if gallery:
        extra["widget"] = [{"text": plain(text) or "-", "output": {"url": file}} for file, text in gallery.items()]
    tags = ["text-to-image", "diffusers", "lora", "rewardtune", re.sub(r"[^\w-]+", "-", method).strip("-")]
    return ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[tag for tag in tags if tag],
        **extra,
    )


def card_text(
    run: "Run",
    *,
    repo: str | None,
    exported: Sequence["Exported"],
    licence: str,
    weight: float,
    grid: str | None,
) -> str:
    """The Markdown under the head. licence: what is said of it."""
    facts = run.facts
    base = "the playground of rewardtune" if run.model.id == "playground" else code(public_name(run.model.id))
    kohya = [export.path.name for export in exported if export.format == "kohya"]
    sections = [
        f"# {code(run.name)}",
        f"A LoRA for {base}, tuned by back-propagating a reward through the sampling chain: method "
        f"{code(facts.get('method', 'unknown'))}, reward {code(facts.get('reward', 'unknown'))}. "
        "Made with rewardtune. No training images were used, and there is no trigger word.",
        licence,
        f"![before and after]({grid})\n\nThe same prompts and seeds, before (left) and after (right)." if grid else "",
        "## Use it",
        fenced(snippet(run, repo=repo), "python"),
        f"Made for {code(usage(run))}. Other samplers, step counts and resolutions were not tried.",
        f"For ComfyUI and A1111: {', '.join(code('kohya/' + name) for name in kohya)}." if kohya else "",
        "## Scores",
        scores_table(run),
        _differs(run, weight),
        "## Limits",
        limits(run),
        "## Settings",
        fenced(settings(run), "yaml"),
        "## Checks",
        "\n".join(
            f"- {export.format}: loaded back into a fresh pipeline, {export.tensors} tensors compared, pictures differ "
            f"by {export.difference:.1e} ({export.measure}; pixels from 0 to 1)"
            for export in exported
        ),
        _versions(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def snippet(run: "Run", *, repo: str | None) -> str:
    """Python that samples the LoRA in plain diffusers. The playground's own folder stands for its hub id.

    A run with model.pipeline puts the networks into that class, as training did; pictures beside its prompts go by the
    names of their files, for the reader's own.
    """
    base = run.model.id
    playground = base == "playground"
    where = "playground.path()" if playground else repr(hub_id(base) or public_name(base))
    comment = "" if playground or hub_id(base) else "  # a folder or file on the author's machine: put your own"
    prompt = run.prompts[0] if run.prompts else "a red heart"
    pictures, texts = _beside(run, prompt)
    call = {key: value for key, value in run.call.items() if storable(value)} | texts
    given = [repr(plain(prompt)), *(f"{key}={value!r}" for key, value in call.items())]
    given += [f"{name}=given_{name}" for name in pictures]
    given += ["generator=torch.Generator().manual_seed(0)"]
    loaded, classes = _loading(run, where, comment)
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(classes))}",
        "from diffusers.utils import load_image" if pictures else "",
        "from rewardtune import playground  # for the folder of its base model" if playground else "",
        "",
        *loaded,
        _scheduler_lines(run.scheduler),
        f"pipe.load_lora_weights({repo or '.'!r}, weight_name={LORA_FILE!r})",
        *(f"given_{name} = load_image({file!r})  # a picture of your own" for name, file in pictures.items()),
        "image = pipe(\n" + "".join(f"    {argument},\n" for argument in given) + ").images[0]",
        'image.save("tuned.png")',
    ]
    return "\n".join(line for number, line in enumerate(lines) if line or number == 4)


def _beside(run: "Run", prompt: str) -> tuple[dict[str, str], dict[str, str]]:
    """(file names of the pictures, texts) that stand beside the prompt, by argument."""
    columns = () if run.config is None else run.config.looked_at.columns
    found = {name: f"{name}.png" for name in columns if is_picture(name)}
    held = prompt.arguments if isinstance(prompt, Conditioned) else {}
    found |= {name: plain(Path(value).name) for name, value in held.items() if is_picture(name)}
    return found, {name: plain(str(value)) for name, value in held.items() if not is_picture(name)}


def _loading(run: "Run", where: str, comment: str) -> tuple[list[str], set[str]]:
    """The lines that load the base model as the run did, and diffusers' classes in them. where: its id, as Python."""
    model, lines = run.model, list[str]()
    dtype, kind = f"torch_dtype=torch.{model.dtype}", model.pipeline
    if model.controlnet is not None:
        place = repr(hub_id(model.controlnet) or public_name(model.controlnet))
        lines.append(f"controlnet = AutoModel.from_pretrained({place}, {dtype})")
    held = "controlnet=controlnet, " if lines else ""
    classes = {"AutoModel"} if lines else set[str]()
    if model.id.endswith(".safetensors"):  # a class of its own opens it: DiffusionPipeline cannot
        own = kind or str(run.facts.get("pipeline", "StableDiffusionPipeline"))
        config = f"config={hub_id(model.config) or public_name(model.config)!r}, " if model.config else ""
        lines.append(f"pipe = {own}.from_single_file({where}, {config}{held}{dtype}){comment}")
        return lines, classes | {own}
    which = "".join(
        f"{name}={value!r}, " for name in ("revision", "variant") if (value := getattr(model, name)) is not None
    )
    lines.insert(0, f"pipe = DiffusionPipeline.from_pretrained({where}, {which}{dtype}){comment}")
    lines += [f"pipe = {kind}.from_pipe(pipe, {held}{dtype})"] if kind else []
    return lines, classes | {"DiffusionPipeline"} | ({kind} if kind else set())


def _scheduler_lines(name: str | None) -> str:
    """The scheduler as `models.make_scheduler` makes it."""
    if name is None:
        return ""
    import diffusers

    from .models import scheduler_defaults

    ours = scheduler_defaults(getattr(diffusers, name, object))
    config = f"{{**{ours!r}, **pipe.scheduler.config}}" if ours else "pipe.scheduler.config"
    return f"import diffusers\npipe.scheduler = diffusers.{name}.from_config({config})"


def scores_table(run: "Run") -> str:
    """Means over the fixed eval pictures before and after, with 95% intervals, as a Markdown table."""
    before, after, count = _scores(run)
    if not before or not after:
        return "Not measured: the run ended before its final pictures."
    held = set(run.facts.get("held_out", ()))
    names = [name for name in before if name in after]
    rows = [
        f"| {cell(name)} | {_value(before[name])} | {_value(after[name])} | {'no' if name in held else 'yes'} |"
        for name in names
    ]
    pictures = f"{count} fixed prompts and seeds" if count else "the fixed eval prompts and seeds"
    return "\n".join(
        [
            "| score | before | after | trained on |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Means over {pictures}, with half the width of a 95 % interval over the prompts (not over training "
            f"seeds: one run). {code('reward')} is what was maximised; the others are its parts in their own units, "
            "of some of which less is better." + _choice(run),
        ]
    )


def _choice(run: "Run") -> str:
    """A caveat where the weights are the best of several looks at the very pictures of the table."""
    steps = {line.get("step", 0) for line in json_lines(run.folder / "eval.jsonl")}
    by = chosen_by(run.facts, run.config.checkpoints.best if run.config else run.facts.get("best", "reward"), steps)
    return (
        f" The weights kept were chosen among {len(steps - {0})} looks at these very pictures by {code(by)}, which "
        "favours the scores after: fresh prompts and seeds tell more."
        if by
        else ""
    )


def _scores(run: "Run") -> tuple[dict[str, Any], dict[str, Any], int]:
    """(before, after, number of pictures) from run.json, else from the first and last line of eval.jsonl."""
    lines = json_lines(run.folder / "eval.jsonl")
    count = int(lines[-1].get("count", 0)) if lines else 0
    before = run.facts.get("before") or (lines[0].get("scores", {}) if len(lines) > 1 else {})
    after = run.facts.get("after") or (_last_look(run).get("scores", {}) if len(lines) > 1 else {})
    return before, after, count


def _last_look(run: "Run") -> dict[str, Any]:
    """The line of eval.jsonl that is nearest to the weights: that of the step that was kept, else the last."""
    lines = json_lines(run.folder / "eval.jsonl")
    kept = [line for line in lines if line.get("step") == run.facts.get("kept_step", ...)]
    return (kept or lines or [{}])[-1]


def _value(pair: Sequence[float]) -> str:
    mean, half = float(pair[0]), float(pair[1])
    return f"{mean:.4g}" if math.isnan(half) else f"{mean:.4g} ± {half:.2g}"


def _differs(run: "Run", weight: float) -> str:
    """Where the file is not the very LoRA that was scored, or may not be."""
    early = _early(run)
    parts = [f"the LoRA of step {run.checkpoint}"] if run.checkpoint != "best" else []
    parts += [f"multiplied by {weight:g}"] if weight != 1 else []
    if not parts:
        return early
    again = " Load it with weight 1: it is the lower weight already." if weight < 1 else ""
    said = f"The scores are those of the run's own LoRA at weight 1; this file is {', '.join(parts)}.{again}"
    return f"{said} {early}".strip()


def _early(run: "Run") -> str:
    """Of a run without scores of its end (Ctrl-C, a NaN): which weights were scored, and where the run ended."""
    facts, looked, kept = run.facts, _last_look(run).get("step"), _kept_step(run.facts)
    said = ""
    if not facts.get("after") and looked not in (None, kept):
        ended = f" at step {facts['steps']}" if "steps" in facts else ""
        said = (
            f"The run ended early{ended} ({code(facts.get('status', 'unknown'))}): the scores after are those of step "
            f"{looked}, and the weights may be later ones."
        )
    if facts.get("lora_verified") is False:
        said += " An error ended the run: its weights were not loaded back and compared when they were saved."
    return said.strip()


def _kept_step(facts: Mapping[str, Any]) -> int | None:
    """The step of the weights in the run's folder."""
    step: int | None = facts.get("kept_step", facts.get("steps"))
    return step


def limits(run: "Run") -> str:
    """What a reader should not conclude, and what was measured."""
    held = list(run.facts.get("held_out", ()))
    measured = (
        f"Held-out rewards, never trained on, were measured: {', '.join(map(code, held))}."
        if held
        else "No held-out reward was measured: all scores above are of what was trained on, so they show that the "
        "optimisation worked and not that pictures are better."
    )
    return (
        "A reward is not taste. A model tuned to raise a reward learns its blind spots too (reward hacking): look for "
        "lost detail, repeated compositions, a common style, and prompts that are followed less closely. "
        f"{measured} Diversity, other prompts than the fixed ones and the judgement of people are not in these "
        "numbers. A lower LoRA weight gives back some of the base model's behaviour. The biases and limits of the base "
        "model remain."
    )


def settings(run: "Run") -> str:
    """The run file as YAML without local paths and lists of prompts."""
    if run.config is None:
        known = {
            key: run.facts[key] for key in ("method", "reward", "call", "lora", "train", "seed") if key in run.facts
        }
        return yaml.safe_dump(_public(known), sort_keys=False, allow_unicode=True).strip()
    values = run.config.model_dump(mode="json", exclude={"output_dir"})
    return yaml.safe_dump(_public(_without_defaults(values)), sort_keys=False, allow_unicode=True).strip()


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Sections that are as every run has them say nothing."""
    defaults = {
        name: field.default.model_dump(mode="json")
        for name, field in RunConfig.model_fields.items()
        if hasattr(field.default, "model_dump")
    }
    return {name: value for name, value in values.items() if value != defaults.get(name, ...)}


def _public(value: Any, key: str = "") -> Any:
    """`value` with local paths cut, but for what stands under a `key` of prompts: `/imagine a cat` is no path."""
    if isinstance(value, Mapping):
        return {plain(name): _public(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        long = len(value) > 8 and all(isinstance(item, str) for item in value)
        return (
            f"{len(value)} of them" if long else [_public(item, "prompt" if key == "source" else key) for item in value]
        )
    if not isinstance(value, str):
        return value
    return plain(value if key.endswith(TEXTS) else public_name(value))


def public_name(text: str) -> str:
    """A local path cut to its last part; anything else as it is."""
    local = text.startswith(("/", "~", "./", "../")) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\", text))
    local = local or ("\\" in text and not any(map(str.isspace, text)))
    if not local and "/" in text:
        local = len(text) < 1000 and "\n" not in text and Path(text).exists()
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if local else text


def _licence_line(licence: Mapping[str, str]) -> str:
    if not licence:
        return "The licence of the base model was not found: look it up before you use or share this LoRA."
    name = licence.get("license_name") or licence["license"]
    link = f", {code(licence['license_link'])}" if "license_link" in licence else ""
    return f"Licence: that of the base model ({code(name)}{link})."


def _versions() -> str:
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "peft")
    return f"rewardtune {__version__}, " + ", ".join(f"{name} {version(name)}" for name in names) + "."


def _copy_grid(run: "Run", folder: Path) -> str | None:
    return _copy(run.folder / "before_after.png", folder / "before_after.png", "before_after.png")


def _copy_pictures(run: "Run", folder: Path) -> dict[str, str]:
    """images/000.png ... of the final pictures, with their prompts."""
    found = {}
    for index, prompt in enumerate(run.prompts[:PICTURES]):
        name = f"images/{index:03d}.png"
        if _copy(run.folder / "samples" / "final" / f"{index:03d}.png", folder / name, name):
            found[name] = prompt
    return found


def _copy(source: Path, target: Path, name: str) -> str | None:
    if not source.is_file():
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return name


# Text that stays text -------------------------------------------------------------------------------------------------


def plain(text: Any) -> str:
    """One line without control characters, surrogates, and marks that turn the direction of reading."""
    kept = (" " if unicodedata.category(char) in CONTROLS or char in TURNS else char for char in str(text))
    return " ".join("".join(kept).split())


def code(text: Any) -> str:
    """A Markdown code span of any text: no markup, link, mention or HTML in it works."""
    words = plain(text)
    if not words:
        return "(empty)"
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    space = " " if "`" in (words[0], words[-1]) else ""
    return f"{fence}{space}{words}{space}{fence}"


def cell(text: Any) -> str:
    """The same in a table, where a bar would end the cell."""
    return code(text).replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """A fenced block that nothing in `text` can end."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
