"""Figure 7: the norm of the parameters' gradient against K, with and without stop-gradient; nothing is trained.

DRaFT-K (the last K steps) on the untuned model, several batches a seed. The paper sees the norm rise rapidly from
K = 15 of 50 without the stop, and not with it.
"""

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tables import markdown_table
from .claims import Claim, better, claims_table
from .rows import Cell, made_by
from .setting import Setting
from .table1 import spread
from .work import Work

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # K over T
REWARD, BATCHES = "hpsv2", 4


def counts(T: int) -> list[int]:
    return sorted({max(1, round(share * T)) for share in SHARES})


def cell_of(setting: Setting, seed: int) -> Cell:
    """The row of one seed: no method, no rate, no budget."""
    return Cell(
        setting=setting.name, reward=REWARD, method="gradient norms", lr=0.0, seed=seed, T=setting.T, budget=0.0
    )  # fmt: skip


def run(work: Work) -> None:
    work.each([cell_of(work.setting, seed) for seed in work.setting.seeds], measure)


def measure(cell: Cell, device: str) -> dict[str, Any]:
    """{"batch": pictures, "full": {K: norm}, "stopped": {K: norm}}: L2 norms of all parameters, means over batches."""
    import tempfile
    from dataclasses import replace

    import torch

    from .. import adapters, evaluate, methods
    from ..engine import rollout
    from ..gradient import derive_seed
    from ..prompts import batch_prompts
    from .cells import open_cell, where

    with tempfile.TemporaryDirectory() as folder:
        _, tuner = open_cell(replace(cell, method="DRTune", lr=1e-4), folder=f"{folder}/run", device=device)
    parameters = adapters.attach(tuner.denoiser, seed=cell.seed, **tuner.adapter)
    found: dict[str, dict[str, float]] = {}
    for name, input_gradient in (("full", 1.0), ("stopped", 0.0)):
        for K in counts(cell.T):
            plan = methods.draft(K=K, input_gradient=input_gradient)(cell.T, random.Random(0))
            norms = []
            for batch in range(BATCHES):
                prompts = batch_prompts(tuner.prompts, seed=cell.seed, step=batch, size=tuner.micro_batch)
                seeds = [derive_seed(cell.seed, "fig7", batch, index) for index in range(len(prompts))]
                call = evaluate.for_prompts(prompts, tuner.call)
                with rollout(tuner.pipe, plan, seed=seeds[0], generator=evaluate.generators(seeds), **call) as tape:
                    tape.backward(-tuner.reward(tape.images, tape.prompts).mean())
                norms.append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))
                for parameter in parameters:
                    parameter.grad = None
            found.setdefault(name, {})[str(K)] = statistics.mean(norms)
    return {"cell": json.loads(cell.key), "batch": tuner.micro_batch, **found, "on": where(tuner)}


def claims(rows: Sequence[dict[str, Any]], T: int) -> list[Claim]:
    """Growth from the few to all steps: the norm at K = T over that at 0.1 T."""
    few, all_ = str(max(1, round(0.1 * T))), str(T)
    growth = {name: [row[name][all_] / row[name][few] for row in rows] for name in ("full", "stopped")}
    says = "without stop-gradient the norm grows more from 0.1 T to T trained steps than with it"
    told = [better(says, growth["full"], growth["stopped"], less=False, names=("without: times", "with: times"))]
    onset = str(min((K for K in counts(T) if K >= 0.3 * T), default=T))
    early = [row["full"][onset] / row["full"][few] for row in rows]
    linear = [int(onset) / int(few)] * len(rows)  # what K equal and aligned steps would give
    says = "without stop-gradient it rises rapidly from 0.3 T on (faster than in proportion to K)"
    late = [row["full"][all_] / row["full"][onset] for row in rows]
    proportion = [T / int(onset)] * len(rows)
    told.append(better(says, late, proportion, less=False, names=("times", "in proportion")))
    says = "up to 0.3 T it does not (no faster than in proportion)"
    told.append(better(says, early, linear, less=True, names=("times", "in proportion")))
    return told


def report(work: Work) -> str:
    s = work.setting
    rows = [row for row in (work.rows.get(cell_of(s, seed)) for seed in s.seeds) if row is not None]
    body = [
        [str(K), *(spread([row[name][str(K)] for row in rows]) for name in ("full", "stopped"))] for K in counts(s.T)
    ]
    png = f"{work.stem('fig7')}.png"
    batch = rows[0].get("batch", s.batch) if rows else s.batch  # micro-batches: what is on the device at once
    lines = [
        "# The norm of the gradient against K (Fig. 7)",
        "",
        f"`{work.command('fig7')}`: {len(rows)} of {len(s.seeds)} seeds. DRaFT-K, untuned model,",
        f"T = {s.T}, {s.told(REWARD)}, mean over {BATCHES} batches of {batch};",
        "± standard deviation over seeds.",
        "",
        markdown_table(["K", "norm without stop-gradient", "norm with it"], body),
        "",
        *claims_table(claims(rows, s.T)),
        *(["", f"![gradient norm]({png})"] if rows and (work.folder / png).exists() else []),
        *made_by(rows),
    ]
    return "\n".join(lines) + "\n"


def picture(work: Work) -> Path | None:
    """None without rows."""
    from . import plots

    s = work.setting
    rows = [row for row in (work.rows.get(cell_of(s, seed)) for seed in s.seeds) if row is not None]
    if not rows:
        return None
    lines = {
        label: [[(int(K), norm) for K, norm in row[name].items()] for row in rows]
        for label, name in (("full back-propagation", "full"), ("stop-gradient", "stopped"))
    }
    title = f"Gradient norm against K (Fig. 7; T = {s.T}, {REWARD})"
    path = work.folder / f"{work.stem('fig7')}.png"
    return plots.lines(lines, path, x="trained steps K", y="gradient norm", title=title, log=True)
