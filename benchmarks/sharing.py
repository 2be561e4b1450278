"""Does a late-step method reach the layout through steps that it never trains? `python benchmarks/sharing.py`

Runs of Table 1 on symmetry (`rewardtune bench table1 --reward symmetry`: the same settings, learning rates and seeds)
are tuned again, and the tuned network samples the same held-out prompts in three ways: at all T steps; at its last
n steps alone, the base model before them; at all but these, the base model after them. n is how many steps at the end
of the chain the method trains. "At the last n alone" is what a method would reach whose training did not move the
steps that it leaves out, as in a network with weights of its own for each noise level.

Writes docs/results/sharing.md and its numbers as JSON; a run whose row already stands there is not repeated. Some
four minutes a run and core.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stored import completed

from rewardtune.bench.setting import setting_of
from rewardtune.bench.work import Work
from rewardtune.mixing import Mix
from rewardtune.stats import mean_interval

RESULTS = Path("docs/results")
ROWS = RESULTS / "bench" / "playground"
SETTING, REWARD = setting_of("playground"), "symmetry"
LATE = {"DRaFT-LV": 1, "ReFL-10": 4, "DRaFT-10": 4, "DRTune": 4}  # n; DRTune trains all of the chain, for comparison
WAYS = ("untuned", "throughout", "last n alone", "all but the last n")
MEASURES = ("symmetry", "clipscore")


@dataclass(frozen=True, kw_only=True)
class Early(Mix):
    """The other way round: the tuned model for the first n steps, the base model after them."""

    def base_weight(self, i: int, T: int) -> float:
        return 1 - super().base_weight(i, T)


def rate(method: str) -> float:
    """The learning rate that Table 1 chose."""
    lr = Work(setting=SETTING, folder=ROWS).lr(method, REWARD)
    if lr is None:
        raise SystemExit(f"no learning rate of {method}: run rewardtune bench table1 --reward {REWARD} first")
    return lr


def tune(method: str, seed: int, *, count: int) -> dict[str, Any]:
    """One run of Table 1 again; means over `count` prompts, sampled in each of the WAYS."""
    import torch

    from rewardtune import evaluate, launch
    from rewardtune.bench.cells import final_prompts, law_of, open_cell
    from rewardtune.bench.cost import updates_within
    from rewardtune.gradient import derive_seed
    from rewardtune.mixing import mixed

    torch.set_num_threads(1)
    assert SETTING.cost is not None
    lr, T = rate(method), SETTING.T
    cell = Work(setting=SETTING, folder=ROWS).cell(method, REWARD, seed, lr=lr)
    updates = updates_within(cell.budget, law_of(cell), T, seed=seed, batch=SETTING.batch, cost=SETTING.cost)
    prompts = final_prompts(SETTING, cell)[:count]
    seeds = [derive_seed("bench", "final", index) for index in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        config, tuner = open_cell(cell, folder=f"{folder}/run", updates=updates)
        launch.train_as(config, tuner)
    n = LATE[method]
    ways = {
        "untuned": Mix(base_steps=T),
        "throughout": Mix(base_steps=0),
        "last n alone": Mix(base_steps=T - n),
        "all but the last n": Early(base_steps=T - n),
    }
    scores: dict[str, dict[str, float]] = {}
    for way, mix in ways.items():
        with mixed(tuner.pipe, mix, steps=T):
            images = evaluate.sample(tuner.pipe, prompts, seeds=seeds, call=tuner.call, batch=16)
        found = evaluate.score(tuner.reward, images, prompts, batch=16, device=tuner.device)
        scores[way] = {name: float(found[name].mean()) for name in MEASURES}
    return {"run": method, "seed": seed, "n": n, "lr": lr, "updates": updates, "count": count, "scores": scores}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a method: both measures in each way, and the share of the change that the untrained steps carry."""
    yield "| method | n | rate | measure | " + " | ".join(WAYS) + " | change throughout | change by the last n alone |"
    yield "|" + "-|" * (len(WAYS) + 6)
    for method, n in LATE.items():
        runs = sorted((row for row in rows if row["run"] == method), key=lambda row: row["seed"])
        for measure in MEASURES if runs else ():
            values = {way: [row["scores"][way][measure] for row in runs] for way in WAYS}
            means = [
                f"{statistics.mean(found):.3f}" + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")
                for found in values.values()
            ]
            changes = [
                "{:+.3f} ± {:.3f}".format(
                    *mean_interval([x - y for x, y in zip(values[way], values["untuned"], strict=True)])
                )
                for way in ("throughout", "last n alone")
            ]
            yield f"| {method} | {n} | {runs[0]['lr']:g} | {measure} | " + " | ".join([*means, *changes]) + " |"


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What a late method reaches through steps that it never trained",
        "",
        f"`python benchmarks/sharing.py`: runs of Table 1 on symmetry (less is more symmetric), T = {SETTING.T}, tuned",
        f"again; {rows[0]['count']} held-out prompts, fixed noise, sampled by the tuned network at all steps, at the",
        "last n alone (the base model before them), and at all but the last n (the base model after them). DRaFT-LV",
        "trains the last step, ReFL-10 and DRaFT-10 the last four; DRTune, which trains steps of the whole chain, for",
        "comparison. ± standard deviation over seeds; the changes, paired by seed, with Student's 95 % interval.",
        "",
        *table(rows),
        "",
        "Read in [the paper's experiments](bench/README.md#symmetry).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(LATE), default=list(LATE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=128, help="held-out prompts")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page and its JSON")
    asked = parser.parse_args()
    rows = completed(
        asked.results / "sharing.json",
        tune,
        key="run",
        names=asked.methods,
        seeds=asked.seeds,
        made_with=lambda name: {"count": asked.count, "n": LATE[name], "lr": rate(name)},
        processes=asked.processes,
        count=asked.count,
    )
    text = report(rows)
    (asked.results / "sharing.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
