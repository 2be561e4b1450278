"""`rewardtune report`: one self-contained page about one or several runs.

`read.py` reads the folders, `results.py` compares before and after, `curves.py` prepares the charts, `content.py`
gathers what the template shows, `page.py` makes the page; `live.py` writes it while a run trains. The charts are a few
hundred lines of our own script: docs/log.md says why not plotly's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..runfolder import refuse_other, write_text

REPORT = "report.html"
MARK = '<meta name="generator" content="rewardtune '  # in every page that report.html.j2 makes


def write_report(runs: Sequence[str | Path], output: str | Path | None = None, *, pairs: int | None = None) -> Path:
    """Write the page about `runs` (folders) to `output` and give its path.

    output: default: report.html, in the folder of a single run. pairs: before/after pairs shown at most.
    Raises ConfigError for a folder without a run, or one given twice, and where another file would be replaced.
    """
    from .content import PAIRS, context, data
    from .page import render
    from .read import read_run

    if not runs:
        raise ConfigError("no run is given; give one or several run folders")
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is given twice; give each once")
    path = Path(output) if output is not None else folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    if os.path.isdir(path):
        raise ConfigError(f"--output {path} is a folder; give a file, e.g. {path / REPORT}")
    if path != folders[0] / REPORT:
        refuse_other(path, MARK, "report")
    read = [read_run(folder) for folder in folders]
    shown = context(read, pairs=PAIRS if pairs is None else pairs)
    write_text(path, render("report", data=data(shown), **shown))
    return path
