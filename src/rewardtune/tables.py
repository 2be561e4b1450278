"""Tables as aligned text, the same in a terminal, a pipe and a test."""

import itertools
import shutil
import textwrap
from collections.abc import Collection, Sequence

WIDTH = 120  # columns at most, where no word is longer than its place
LONGEST = 32  # letters of a word that is not broken


def text_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    flexible: int | Sequence[int],
    numbers: Collection[int] = (),
) -> str:
    """Rows under their headings, as wide as the terminal but at most 120 columns.

    flexible: the column, or columns, that wrap where space is short; they share what the others leave, and break no
    word of up to LONGEST letters. numbers: the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    wraps = [flexible] if isinstance(flexible, int) else list(flexible)
    room = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) - 2 * (len(widths) - 1)
    room -= sum(width for column, width in enumerate(widths) if column not in wraps)
    for left, column in zip(range(len(wraps), 0, -1), sorted(wraps, key=widths.__getitem__), strict=True):
        words = (len(word) for row in (headings, *rows) for word in row[column].split())
        least = max(12, min(LONGEST, max(words, default=0)))  # names of runs and files are not cut in two
        widths[column] = max(least, min(widths[column], room // left))  # what one does not need goes to the next
        room -= widths[column]
    lines = []
    for row in (headings, *rows):
        wrapped = [[cell] for cell in row]
        for column in wraps:
            wrapped[column] = textwrap.wrap(row[column], widths[column], break_on_hyphens=False)
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            cells = (
                f"{part:>{width}}" if index in numbers else f"{part:<{width}}"
                for index, (part, width) in enumerate(zip(parts, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
