"""Writes docs/results/oracle.md: the engine against literal Algorithm 1, every pipeline and scheduler, every method.

    python tests/oracle_table.py            # a few minutes on one thread

The tests of test_oracle.py and test_schedulers.py assert the same comparisons; this prints the numbers.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
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
Column = tuple[str, judge.Draw]
T = 4

HEADER = """# The engine against literal Algorithm 1

Written by `python tests/oracle_table.py`; do not edit.

The oracle is `tests/oracle.py`: the pipeline's own `__call__` without its `no_grad`, the denoiser's input and output
detached where Algorithm 1 of the paper says so, one autograd graph through the whole chain. Each cell is
|gradient of the engine - gradient of the oracle| / |gradient of the oracle| over all trained parameters, in float32
and, behind the stroke, in float64. The schedulers that cast to float32 by name run their own code with that name
meaning float64; FLUX rotates its queries in float32, so its float64 column is float32 there.

*images*: equal bit for bit to plain `pipe(...)` for whole chains and to the oracle for early stops, in float32; a
number is the largest difference of a pixel where x0-hat is written by two formulas that round differently.

{versions}; tiny random-weight pipelines, {steps} inference steps, {size} images, seed 0.
"""


def main() -> None:
    torch.set_num_threads(1)
    quiet()
    parts = [HEADER.format(versions=versions(), steps=T, size="two 16x16")]
    parts += ["## Pipelines\n", table("pipeline", tiny.BUILDERS, pipelines, list(judge.PLANS.items()))]
    parts += ["## Schedulers\n", table("scheduler", test_schedulers.SETTINGS, schedulers, scheduler_plans())]
    parts += ["## Finite differences\n", finite_differences()]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n".join(parts))
    print(f"wrote {OUTPUT.relative_to(Path.cwd()) if OUTPUT.is_relative_to(Path.cwd()) else OUTPUT}")


def scheduler_plans() -> list[Column]:
    return list(test_schedulers.PLANS.items())


def pipelines(name: str) -> tuple[Any, tiny.Call]:
    return tiny.BUILDERS[name](steps=T)


def schedulers(name: str) -> tuple[Any, tiny.Call]:
    return test_schedulers.build(name)


def table(what: str, rows: Any, build: Callable[[str], tuple[Any, tiny.Call]], columns: list[Column]) -> str:
    lines = [
        f"| {what} | T | images | " + " | ".join(name for name, _ in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name in rows:
        print(name, file=sys.stderr)
        pipe, call = build(name)
        steps = oracle.count_steps(pipe, tiny.fresh(call))
        images, cells = 0.0, []
        for _, draw in columns:
            plan = draw(steps)
            single = judge.compare(pipe, plan, call)
            images = max(images, single.image_difference)
            with tiny.double(pipe, call):
                double = judge.compare(pipe, plan, call)
            cells.append(f"{number(single.gradient_difference)} / {number(double.gradient_difference)}")
        lines.append(f"| {name} | {steps} | {'equal' if images == 0 else number(images)} | " + " | ".join(cells) + " |")
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
