"""Writes the table of pipelines: docs/results/pipelines.md, and src/rewardtune/pipelines.json for `rewardtune ls`.

    python tests/pipelines_table.py            # about ten minutes on one thread
    python tests/pipelines_table.py Sana Flux  # those whose name holds one of these; the other rows stay

Each row is what `contract.row` gives; test_pipelines.py asserts that the table is it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import contract
import oracle_table
import torch
import zoo

ROOT = Path(__file__).parent.parent
DATA = ROOT / "src" / "rewardtune" / "pipelines.json"
PAGE = ROOT / "docs" / "results" / "pipelines.md"

HEADER = """# Every pipeline

Written by `python tests/pipelines_table.py`; do not edit.

Each text-to-image pipeline of diffusers as a small one of random weights, with text encoders of its real classes
(`tests/zoo.py`), and what it was put to (`tests/contract.py`):

- the opened pipeline gives the pictures of plain `pipe(...)`, bit for bit;
- the gradient is that of Algorithm 1 by one autograd graph, within 1e-5 of its norm in float32: DRTune with its
  early stop, nested DRaFT-3, ReFL (of Sana 3e-5 and of Kandinsky 5 3e-4, which is rounding: 1e-12 in float64);
- afterwards pipeline, networks and scheduler have the attributes they had, and give the same pictures;
- the LoRA, saved and loaded into the same weights, gives the same pictures, and taken off again those of before.

**{exact} of {all} classes are exact**; {refused} are refused by the preflight, for the reason that stands below. The
same table: `rewardtune ls models`.

*other schedulers*: those that the class takes in place of its own, of those that were tried ({others}); DRTune with its
early stop is exact with each. *guidance*: one call (both branches in one batch), two calls, two networks, embedded (an
input of the denoiser), none; with the arguments of the test. *calls*: of the denoiser between two steps. *LoRA*:
`pipeline` where the class has `load_lora_weights`, `denoiser` where it lacks it and
`rewardtune.adapters.load_lora(pipe, folder)` loads the file.

{versions}.
"""

PICTURES = """## Beginning with a picture

Image-to-image classes ([prompts](../prompts.md#pictures-with-the-prompts-controlnet-image-to-image)), with half of the
steps: pictures, gradients and what is left behind hold, by the same contract in `tests/test_pipelines.py`, for
{names}.
"""

LEFT_OUT = """## Not in the table

Classes that make a picture from a prompt and are not in the table. Not listed are pipelines that diffusers has
deprecated:

| pipeline | why |
|---|---|
"""


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    oracle_table.quiet()
    known = {row["pipeline"]: row for row in json.loads(DATA.read_text())} if DATA.exists() else {}
    rows, failed = [], dict[str, str]()
    for name in zoo.PIPELINES:
        if not words or name not in known or any(word in name for word in words):
            print(name, file=sys.stderr, flush=True)
            try:
                known[name] = asdict(contract.row(name))
            except AssertionError as error:  # the table of what holds is not written while something does not
                failed[name] = str(error)
                continue
        rows.append(known[name])
    if failed:
        raise SystemExit("\n".join(f"{name}: {error}" for name, error in failed.items()))
    DATA.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))
    print(f"wrote {DATA.name} and {PAGE.name}")


def page(rows: list[dict]) -> str:
    exact = [row for row in rows if row["status"] == "exact"]
    lines = [
        "| pipeline | denoiser | scheduler | other schedulers | guidance | calls | LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in exact:
        tried = row["schedulers"]
        others = "not tried" if tried is None else ", ".join(short(name) for name in tried) or "none"
        cells = [short(row["pipeline"]), row["denoiser"], short(row["scheduler"]), others, row["guidance"]]
        lines.append("| " + " | ".join([*cells, str(row["calls"]), row["lora"]]) + " |")
    refused = [f"| {short(row['pipeline'])} | {row['reason']} |" for row in rows if row["status"] != "exact"]
    counts = {"exact": len(exact), "all": len(rows), "refused": len(refused)}
    others = " and ".join(f"{len(names)} for {kind}" for kind, names in contract.OTHERS.items())
    head = HEADER.format(**counts, others=others, versions=oracle_table.versions())
    parts = [head, "## Exact\n", "\n".join(lines), "\n## Refused\n", "| pipeline | reason |\n|---|---|"]
    left = "\n".join(f"| {short(name)} | {why} |" for name, why in contract.LEFT_OUT.items())
    pictures = PICTURES.format(names=", ".join(map(short, contract.IMG2IMG)))
    return "\n".join([*parts, *refused, "", pictures, LEFT_OUT + left]) + "\n"


def short(name: str) -> str:
    """The class's name without the word that all of its kind end with."""
    return name.removesuffix("Pipeline").removesuffix("Scheduler")


if __name__ == "__main__":
    main(sys.argv[1:])
