"""Writes docs/results/oracle.md: the engine against literal Algorithm 1, every pipeline and scheduler, every method.

    python tests/oracle_table.py            # a few minutes on one thread

The tests of test_oracle.py and test_schedulers.py assert the same comparisons; this prints the numbers.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import judge
import oracle
import test_finite_differences
import test_schedulers
import tiny
import torch

OUTPUT = Path(__file__).parent.parent / "docs" / "results" / "oracle.md"
T = 4

HEADER = """# The engine against literal Algorithm 1

Written by `python tests/oracle_table.py`; do not edit.

The oracle is `tests/oracle.py`: the pipeline's own `__call__` without its `no_grad`, the denoiser's input and output
detached where Algorithm 1 of the paper says so, one autograd graph through the whole chain. Each cell is
|gradient of the engine - gradient of the oracle| / |gradient of the oracle| over all trained parameters, in float32
and, behind the stroke, in float64. The schedulers that cast to float32 by name run their own code with that name
meaning float64; FLUX rotates its queries in float32 whatever its dtype, on both sides alike.

*images*: equal bit for bit to plain `pipe(...)` for whole chains and to the oracle for early stops, in float32; a
number is the largest difference of a pixel where x0-hat is written by two formulas that round differently.

{versions}; tiny random-weight pipelines, {steps} inference steps, {size} images, seed 0.
"""


def main() -> None:
    torch.set_num_threads(1)
    quiet()
    parts = [HEADER.format(versions=versions(), steps=T, size="two 16x16")]
    by_pipeline = {name: measured(name, tiny.BUILDERS[name](steps=T), judge.PLANS) for name in tiny.BUILDERS}
    parts += ["## Pipelines\n", methods_down(by_pipeline)]
    by_scheduler = {
        name: measured(name, test_schedulers.build(name), test_schedulers.PLANS) for name in test_schedulers.SETTINGS
    }
    parts += ["## Schedulers\n", schedulers_down(by_scheduler)]
    parts += ["## Finite differences\n", finite_differences()]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n".join(parts))
    print(f"wrote {OUTPUT}")


@dataclass
class Row:
    """One pipeline or scheduler: T, the largest difference of a pixel, and a cell and a picture per plan."""

    T: int
    image_difference: float = 0.0
    cells: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> str:
        return "equal" if self.image_difference == 0 else number(self.image_difference)


def measured(name: str, case: tuple[Any, tiny.Call], plans: dict[str, judge.Draw]) -> Row:
    print(name, file=sys.stderr)
    pipe, call = case
    row = Row(T=oracle.count_steps(pipe, tiny.fresh(call)))
    for method, draw in plans.items():
        plan = draw(row.T)
        single = judge.compare(pipe, plan, call)
        with tiny.double(pipe, call):
            double = judge.compare(pipe, plan, call)
        row.image_difference = max(row.image_difference, single.image_difference)
        row.cells[method] = f"{number(single.gradient_difference)} / {number(double.gradient_difference)}"
        row.pictures[method] = plan.draw().strip("|").replace("|", "")
    return row


def methods_down(rows: dict[str, Row]) -> str:
    first = next(iter(rows.values()))
    lines = [
        "`#` trained, `.` sampled, `>` jump to x0-hat, `-` never runs, `~` before the restart.\n",
        "| method | plan | " + " | ".join(rows) + " |",
        "|---|---|" + "---|" * len(rows),
        "| *images* | | " + " | ".join(row.images for row in rows.values()) + " |",
    ]
    for method in first.cells:
        cells = " | ".join(row.cells[method] for row in rows.values())
        lines.append(f"| {method} | `{first.pictures[method]}` | {cells} |")
    return "\n".join(lines) + "\n"


def schedulers_down(rows: dict[str, Row]) -> str:
    lines = [
        "| scheduler | T | images | " + " | ".join(test_schedulers.PLANS) + " |",
        "|---|---|---|" + "---|" * len(test_schedulers.PLANS),
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.T} | {row.images} | " + " | ".join(row.cells.values()) + " |")
    return "\n".join(lines) + "\n"


def finite_differences() -> str:
    """The largest relative error of two random directional derivatives, all calls trained and nested, float64."""
    text = (
        "Every call trained, nothing stopped, float64: the engine's gradient along a random direction against the\n"
        "five-point central difference of the plain pipeline, `pipe(...)`, without autograd. The larger of two.\n\n"
    )
    lines = ["| case | T | relative difference |", "|---|---|---|"]
    for name in test_finite_differences.CASES:
        print(name, file=sys.stderr)
        steps, pairs = test_finite_differences.derivatives(name)
        worst = max(abs(engine - measured) / abs(measured) for engine, measured in pairs)
        lines.append(f"| {name} | {steps} | {number(worst)} |")
    return text + "\n".join(lines) + "\n"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    return f"Python {platform.python_version()}, {packages}, CPU"


def quiet() -> None:
    import warnings

    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
