"""The command `rewardtune`. Heavy imports stand inside the commands, so `--help` answers at once.

Exit codes: 0 fine, 1 unexpected error, 2 bad configuration or usage, 3 preflight failed, 4 stopped by a guard or NaN,
5 some pictures could not be scored, 130 / 143 interrupted by Ctrl-C / SIGTERM.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import ConfigError, RewardTuneError

# The base of typer's usage errors, which is click's own in older versions and a copy of it in newer ones.
USAGE_ERROR: type[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    name="rewardtune",
    help="Fine-tune a diffusers text-to-image pipeline to maximise a differentiable reward.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
playground_app = typer.Typer(help="The small text-to-image world that ships with the package.", no_args_is_help=True)
app.add_typer(playground_app, name="playground")


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="Most time for tuning; evaluation comes on top.")] = 240,
    steps: Annotated[int | None, typer.Option(help="Updates; default: the preset's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the output folder.")] = False,
) -> None:
    """DRTune on the playground, on the CPU, in minutes: more symmetry, the caption kept. Saves a before/after grid."""
    from .demo import run

    run(seconds=seconds, steps=steps, output=output, seed=seed, overwrite=overwrite)


@app.command()
def init(
    preset: Annotated[str | None, typer.Argument(help="Its name; without one they are listed.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; default: PRESET.yaml.")] = None,
) -> None:
    """Write a commented run file to start from. Never overwrites."""
    if preset is None:
        from .listing import listing

        print(f"{listing(['presets'])}\n\nrewardtune init NAME writes NAME.yaml")
        return
    from .config import copy_preset

    path = copy_preset(preset, output)
    print(f"{path} written; edit it, then: rewardtune train {path}")


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write; default: print it.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="The keys as Markdown instead, as in docs/run-files.md.")
    ] = False,
) -> None:
    """The JSON schema of run files, for editors (`# yaml-language-server: $schema=FILE` as the first line)."""
    import json

    from .runfolder import write_text
    from .schema import json_schema, keys_table

    text = keys_table() if table else json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)


@app.command()
def check(
    run: Annotated[str, typer.Argument(help="A run file, or a shipped preset by name.", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=1e-4")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also make one update in memory: its memory and time, phase by phase.")
    ] = False,
) -> None:
    """Try all that a run file needs before it trains; writes nothing. Exit code 0, 2 (settings) or 3 (pipeline)."""
    from .config import load_config

    config = load_config(run, overrides or [])  # before torch is imported
    from .check import check as check_run

    raise typer.Exit(check_run(config, dry_run=dry_run))


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="A run file, or a shipped preset by name.", metavar="RUN.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=1e-4")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the output folder.")] = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on from a checkpoint of the run: latest, a step, or a path.")
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Processes over all machines, one for each GPU.")] = 1,
    launcher: Annotated[
        str, typer.Option(help='More arguments of `accelerate launch`, e.g. "--num_machines 2 --machine_rank 0".')
    ] = "",
) -> None:
    """Train as a run file says."""
    from . import processes
    from .config import load_config

    config = load_config(run, overrides or [])  # before torch is imported: typing errors answer at once
    if launcher and count == 1:
        raise ConfigError("--launcher is for several processes: give their number over all machines by -n")
    if count > 1 and not processes.launched():
        again = ["train", run, *(overrides or []), *(["--overwrite"] if overwrite else [])]
        again += ["--resume", resume] if resume is not None else []
        cpu = processes.on_cpu(config.model.device)
        raise typer.Exit(processes.launch(count, again, cpu=cpu, extra=shlex.split(launcher)))
    from . import launch

    tuner = launch.tuner_from(config, overwrite=overwrite, resume=resume)
    result = launch.train_as(config, tuner)
    if not processes.join().first:
        return
    print(f"{result.status}: {result.steps} update{'s' if result.steps != 1 else ''} in {result.seconds:.0f} s")
    from .adapters import how_to_use

    use = how_to_use(tuner.pipe, result.folder, weight=config.adapter.inference_weight)
    print(f'use it: {use}, or: rewardtune sample {result.folder} --prompt "..."')


@app.command()
def sample(
    candidate: Annotated[
        str, typer.Argument(help="A run, a LoRA file or folder, base; with a weight: runs/a@0.7.", metavar="CANDIDATE")
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="May be given several times.")],
    model: Annotated[str | None, typer.Option(help="Base model, where no config.yaml lies beside the LoRA.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures; those in it stay.")] = Path("samples"),
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: those of the run.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: that of the run.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=VALUE",
            help="ControlNet, image-to-image: image=photo.png, once for all prompts, or once for each.",
        ),
    ] = None,
) -> None:
    """Pictures from a tuned model."""
    from .sampling import sample_candidate

    given: dict[str, Any] = {"model": model, "output": output, "steps": steps, "guidance": guidance, "seed": seed}
    for path in sample_candidate(candidate, prompt, **given, inputs=inputs or ()):
        print(path)


@app.command("app")
def app_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or any candidate, e.g. runs/a@0.7.")],
    model: Annotated[str | None, typer.Option(help="Base model, where no config.yaml tells it.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines of the network in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="A public link through gradio's servers.")] = False,
) -> None:
    """Base against tuned in the browser, with a slider for the LoRA's weight. Needs the extra `demo`."""
    from .app import launch

    launch(run, model=model, port=port, host=host, share=share)


@app.command()
def plan(
    method: Annotated[str, typer.Argument(help="One of `rewardtune ls methods`.")],
    steps: Annotated[int, typer.Option(help="Scheduler steps of a chain (T).")],
    draws: Annotated[int, typer.Option(help="How many plans to draw.")] = 5,
    option: Annotated[list[str] | None, typer.Option("-o", metavar="NAME=VALUE", help="e.g. -o K=5 -o m=20")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw a method's plans as text: which steps are trained, and where the chain stops."""
    import random

    from .config import MethodChoice, parse_options
    from .launch import make_method

    law = make_method(MethodChoice(name=method, options=parse_options(option or [])))
    legend = ". sampled  # trained  > jump to x0-hat  - never run  @ linked  = leapt over"
    print(f"{law}, T={steps}, noise on the left: {legend}")
    for draw in range(draws):
        drawn = law(steps, random.Random(f"plan {seed} {draw}"))
        trained = ", ".join(str(i) for i in drawn.executed)
        print(f"{drawn.draw()}  {drawn.steps_run} steps run, trained: {trained}")


@app.command("score")
def score(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files, folders or globs.")],
    reward: Annotated[list[str], typer.Option("--reward", "-r", help="As in run files; may be given several times.")],
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="[NAME.]KEY=VALUE", help="e.g. -o hpsv2.version=2.0")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help=".txt, a line for each image; or .csv, .jsonl with file and prompt.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all images.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all; - prints it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Score pictures. Without --prompt and --prompts the text file beside each picture is its prompt (cat.txt).

    Pictures that cannot be scored are left out and named at the end; the exit code is then 5.
    """
    from .runfolder import write_text
    from .score import as_json, as_table, choose, score_files, skipped_lines

    choices = choose(reward, option or [])
    pictures, skipped = score_files(images, choices, prompts=prompts, prompt=prompt, batch=batch, device=device)
    if json_file == Path("-"):
        print(as_json(pictures, choices, skipped), end="")
    else:
        print(as_table(pictures, choices))
    if json_file not in (None, Path("-")):
        write_text(json_file, as_json(pictures, choices, skipped))
    if skipped:
        print(skipped_lines(skipped, of=len(pictures) + len(skipped)), file=sys.stderr)
        raise typer.Exit(5)


# Options that eval, compare and sweep share.
RewardNames = Annotated[
    list[str] | None, typer.Option("--reward", "-r", help="Held-out rewards instead of the run's; several times.")
]
RewardOptions = Annotated[list[str] | None, typer.Option("-o", metavar="[NAME.]KEY=VALUE", help="Their settings.")]
PromptsFrom = Annotated[str | None, typer.Option("--prompts", help="docs/prompts.md; default: the run's eval prompts.")]
Count = Annotated[int | None, typer.Option(min=1, help="How many prompts, from the first.")]
Seeds = Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")]
Seed = Annotated[int | None, typer.Option(help="Of the pictures; default: the run's.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: those of each run.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: that of each run.")]
FeaturesOf = Annotated[str | None, typer.Option(help="CLIP for diversity: hub id, folder, playground.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
BaseModel = Annotated[str | None, typer.Option("--model", help="Base model, where no config.yaml tells it.")]
ResultName = Annotated[str | None, typer.Option("--name", help="Of the files in the folder.")]


@app.command("eval")
def eval_(
    candidate: Annotated[
        list[str], typer.Argument(metavar="CANDIDATE...", help="runs/a, runs/a@0.7, lora.safetensors")
    ],
    reward: RewardNames = None,
    option: RewardOptions = None,
    prompts: PromptsFrom = None,
    count: Count = None,
    seeds: Seeds = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    features: FeaturesOf = None,
    model: BaseModel = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: RUN/eval.")] = None,
    name: ResultName = None,
    batch: Batch = 8,
) -> None:
    """Rewards and guards of tuned models against the base model, with intervals. Syntax: docs/evaluation.md."""
    from .compare import evaluate_candidates

    result = evaluate_candidates(
        candidate,
        rewards=_parts(reward, option),
        prompts=prompts,
        count=count,
        seeds=seeds,
        seed=seed,
        steps=steps,
        guidance=guidance,
        features=features,
        model=model,
        output=output,
        name=name,
        batch=batch,
        say=_say,
    )
    print(result.as_text())


@app.command("compare")
def compare(
    candidate: Annotated[list[str], typer.Argument(metavar="A B...", help="runs/a runs/b@0.7 base")],
    reward: RewardNames = None,
    option: RewardOptions = None,
    prompts: PromptsFrom = None,
    count: Count = None,
    seeds: Seeds = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    features: FeaturesOf = None,
    model: BaseModel = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: eval/ in the first run.")] = None,
    name: ResultName = None,
    batch: Batch = 8,
) -> None:
    """Tuned models against each other: paired differences and win rates, also by category of the prompts."""
    from .compare import compare_candidates

    result = compare_candidates(
        candidate,
        rewards=_parts(reward, option),
        prompts=prompts,
        count=count,
        seeds=seeds,
        seed=seed,
        steps=steps,
        guidance=guidance,
        features=features,
        model=model,
        output=output,
        name=name,
        batch=batch,
        say=_say,
    )
    print(result.as_text())


@app.command("sweep")
def sweep(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    weights: Annotated[str, typer.Option(help="Factors on the LoRA.")] = "0,0.25,0.5,0.75,1,1.25",
    tolerance: Annotated[float, typer.Option(help="How much worse than the base a held-out reward may be.")] = 0.05,
    reward: RewardNames = None,
    option: RewardOptions = None,
    prompts: PromptsFrom = None,
    count: Count = None,
    seeds: Seeds = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    features: FeaturesOf = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: RUN.")] = None,
    batch: Batch = 8,
) -> None:
    """Reward against held-out rewards and diversity at several LoRA weights, and a suggested weight."""
    from .sweep import sweep as run_sweep

    try:
        factors = [float(word) for word in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights!r}: write numbers with commas, e.g. 0,0.5,1") from None
    result = run_sweep(
        run,
        weights=factors,
        tolerance=tolerance,
        rewards=_parts(reward, option),
        prompts=prompts,
        count=count,
        seeds=seeds,
        seed=seed,
        steps=steps,
        guidance=guidance,
        features=features,
        output=output,
        batch=batch,
        say=_say,
    )
    print(result.as_text())


def _parts(names: list[str] | None, options: list[str] | None) -> Any:
    """The rewards of a command line as a run file's parts; None without any."""
    from .config import Part, section
    from .score import choose

    if not names:
        if options:
            raise ConfigError(f"-o {options[0]}: it is the setting of a reward, and no --reward is given")
        return None
    return [
        section(Part, {"name": name, "options": given}, "reward")
        for name, given in choose(names, options or []).items()
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@app.command("audit")
def audit(
    reward: Annotated[str, typer.Argument(help="As in run files.")],
    option: Annotated[list[str] | None, typer.Option("-o", metavar="KEY=VALUE", help="e.g. -o version=2.0")] = None,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="Your files, folders or globs instead of drawn scenes.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Of --images: .txt, .csv or .jsonl; a column category is compared too.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all --images.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Drawn scenes.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the drawn scenes.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for audit.md and audit.json.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """What a reward likes: brightness, colours, counts, borders, ...; and whether it reads the prompt."""
    from .audit import as_text, run, write

    report = run(
        reward,
        option or [],
        images=images,
        prompts=prompts,
        prompt=prompt,
        count=count,
        seed=seed,
        batch=batch,
        device=device,
    )
    print(as_text(report), end="")
    if output is not None:
        write(report, output)


@app.command("ls")
def ls(
    what: Annotated[str, typer.Argument(help="rewards, methods, presets, models, or all")] = "all",
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="After rewards: all about this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rewards as JSON.")] = False,
) -> None:
    """What can be named in a run file."""
    from .listing import SECTIONS, listing, reward_page, rewards_json, rewards_table

    if what != "all" and what not in SECTIONS:
        raise ConfigError(f"nothing to list under {what!r}; legal: {', '.join(SECTIONS)}, all")
    if what != "rewards" and (as_json or name):
        raise ConfigError("a NAME and --json go with rewards: rewardtune ls rewards clipscore, ls rewards --json")
    if what == "rewards":
        print(reward_page(name) if name else rewards_json() if as_json else rewards_table())
    else:
        print(listing(list(SECTIONS) if what == "all" else [what]))


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    formats: Annotated[str, typer.Option("--format", help="diffusers,kohya,merged")] = "diffusers",
    output: Annotated[Path | None, typer.Option(help="Folder; default: RUN/export.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Factor on the LoRA; default: the run's adapter.inference_weight.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best, latest, or a number.")] = "best",
    model: Annotated[str | None, typer.Option(help="Base model, where the run has no config.yaml.")] = None,
) -> None:
    """The LoRA as files for other programs, each loaded back and compared."""
    from .export import export_run

    names = [name.strip() for name in formats.split(",") if name.strip()]
    for made in export_run(run, names, output=output, weight=weight, checkpoint=checkpoint, model=model):
        print(made, *(f"note: {note}" for note in made.notes), sep="\n")


@app.command("push")
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repo: Annotated[str, typer.Option(help="user/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that only you see.")] = False,
    formats: Annotated[str, typer.Option("--format", help="diffusers,kohya")] = "diffusers",
    weight: Annotated[
        float | None, typer.Option(help="Factor on the LoRA; default: the run's adapter.inference_weight.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best, latest, or a number.")] = "best",
    model: Annotated[str | None, typer.Option(help="Base model, where the run has no config.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder and upload nothing.")] = False,
) -> None:
    """Upload the LoRA with a model card to the Hugging Face hub."""
    from .export import push_run

    names = [name.strip() for name in formats.split(",") if name.strip()]
    settings: dict[str, Any] = {
        "formats": names,
        "weight": weight,
        "checkpoint": checkpoint,
        "model": model,
        "dry_run": dry_run,
    }
    pushed = push_run(run, repo, private=private, **settings)
    print(*pushed.exported, *(f"note: {note}" for note in pushed.notes), sep="\n")
    print(pushed.url or f"written: {pushed.folder}")


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or under way.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html, in the folder of a single run.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Before/after pairs shown at most.")] = 48,
) -> None:
    """One HTML file about a run, or several side by side: verdict, pictures, curves, guards, settings."""
    from .report import write_report

    print(write_report(runs, output, pairs=pairs))


@app.command("sheet")
def sheet(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder of pictures, or a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, with pictures of the same names.")],
    output: Annotated[Path, typer.Option(help="The page for the raters.")] = Path("sheet.html"),
    key: Annotated[Path | None, typer.Option(help="Which is which; default: OUTPUT with .key.json.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Of A's pictures: .txt, .csv or .jsonl; a column category is tallied too.")
    ] = None,
    question: Annotated[str, typer.Option(help="What the raters are asked.")] = "Which picture is better?",
    count: Annotated[int | None, typer.Option(min=1, help="Pairs, drawn at random; default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sides and order; default: one nobody can guess.")] = None,
) -> None:
    """A page on which people choose between two sets of pictures, blind. Votes: rewardtune tally."""
    from .report.sheet import make_sheet

    made = make_sheet(a, b, output=output, key=key, prompts=prompts, question=question, count=count, seed=seed)
    print(f"{made.page}: {made.pairs} pairs, for the raters")
    print(f"{made.key}: which is which; keep it, and then: rewardtune tally {made.key} VOTES.json ...")


@app.command("tally")
def tally(
    key: Annotated[Path, typer.Argument(metavar="KEY.json", help="As `rewardtune sheet` wrote it.")],
    votes: Annotated[list[Path], typer.Argument(metavar="VOTES.json...", help="One file for each rater.")],
    missing: Annotated[bool, typer.Option("--missing", help="Count what is there where votes are missing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the tally.")] = None,
) -> None:
    """How often B was better than A in the votes on a sheet, with intervals, by category and rater."""
    from .report.tally import tally as count_votes
    from .runfolder import refuse_other, write_text

    if json_file is not None:
        refuse_other(json_file, '"kind": "tally"', "tally")
    found = count_votes(key, votes, missing=missing)
    print(found.as_text())
    if json_file is not None:
        write_text(json_file, found.as_json())


@app.command()
def bench(
    experiment: Annotated[
        str, typer.Argument(help="table1, fig4 to fig9, spacing, earlystop, newer", metavar="EXPERIMENT")
    ],
    setting: Annotated[str, typer.Option(help="playground (CPU, hours) or sd15 (the paper's, GPUs).")] = "playground",
    quick: Annotated[bool, typer.Option("--quick", help="A twentieth of the budget: only that it runs.")] = False,
    reward: Annotated[list[str] | None, typer.Option(help="Of Table 1; may be given several times.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; default: 3.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="Denoiser evaluations of a run.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="The grid of learning rates; several times.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="One process each, e.g. --device cuda:0 --device cuda:1; default: all.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of rows and pages.")] = None,
    only_report: Annotated[
        bool, typer.Option("--report", help="Run nothing, write the page of what is there.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Needs matplotlib.")] = True,
) -> None:
    """The paper's experiments at equal compute; runs what is missing, then the page with its verdicts."""
    from .bench.main import RESULTS
    from .bench.main import bench as run_bench

    page = run_bench(
        experiment,
        setting=f"{setting.removesuffix('-quick')}-quick" if quick else setting,
        results=results or RESULTS,
        devices=device,
        rewards=reward,
        seeds=seeds,
        budget=budget,
        lrs=lr,
        only_report=only_report,
        plots=plots,
    )
    print(page.read_text(encoding="utf-8"), f"written: {page}", sep="\n")


@app.command()
def env() -> None:
    """Versions, threads and devices, for a bug report."""
    from .listing import environment

    print(environment())


@playground_app.command("build")
def playground_build(
    output: Annotated[Path, typer.Option(help="Folder for the weights.")],
    seed: Annotated[int, typer.Option()] = 0,
    quick: Annotated[bool, typer.Option(help="Seconds instead of hours: shows only that it fits together.")] = False,
) -> None:
    """Train the playground's weights again from nothing (hours on a CPU)."""
    from .playground.build import build

    print(build(output, seed=seed, quick=quick))


@playground_app.command("show")
def playground_show(
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("playground.png"),
    count: Annotated[int, typer.Option(min=1, max=64)] = 12,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Sample the untuned playground into one picture."""
    from .sampling import show_playground

    print(show_playground(output, count=count, seed=seed))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"rewardtune {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code. Expected errors are one clear line each on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        formatwarning, warnings.formatwarning = warnings.formatwarning, _one_line
        try:
            return _run(arguments)
        finally:
            warnings.formatwarning = formatwarning


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as the command shows it, without the place in the code."""
    return f"rewardtune: warning: {' '.join(str(message).split())}\n"


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code: Any = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except RewardTuneError as error:
        print(f"rewardtune: {error}", file=sys.stderr)
        return error.exit_code
    except USAGE_ERROR as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("rewardtune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("REWARDTUNE_DEBUG"):
            raise
        print(f"rewardtune: unexpected {type(error).__name__}: {error}", file=sys.stderr)
        print("This is a bug, or a case nobody met yet: REWARDTUNE_DEBUG=1 shows the traceback.", file=sys.stderr)
        return 1
