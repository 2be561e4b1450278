"""What the documentation site needs beyond mkdocs: the pages are written for GitHub, and read there as they are.

- README.md is the first page; files outside docs/ that pages link to (scripts, the changelog) become pages too.
- Lists and tables may follow a line of text directly, as on GitHub; Python-Markdown wants an empty line there.
- Comments that tell the tests about a block (tests/test_docs.py) are left out.
- Formulas become MathML while the site is built, so that the page loads no renderer.
"""

import html
import posixpath
import re
from itertools import pairwise
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
FENCED = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- (?:setup|slow|not run):\s.*?-->\n", flags=re.DOTALL)
HOME = "README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README.md as index.md, and a page for every file outside docs/ that some page links to."""
    pages = {HOME: (ROOT / HOME).read_text(encoding="utf-8")}
    pages |= {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    files.append(File.generated(config, "index.md", content=pages[HOME]))
    linked = {_target(home, link[2]) for home, text in pages.items() for link in LINK.finditer(text)}
    for path in sorted(path for path in linked if _outside(path)):
        text = (ROOT / path).read_text(encoding="utf-8")
        content = text if path.endswith(".md") else f"# {path}\n\n```{_language(path)}\n{text}```\n"
        files.append(File.generated(config, _page_of(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links and blocks as mkdocs wants them."""
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown
    home = HOME if source == "index.md" else f"docs/{source}"

    def moved(link: re.Match[str]) -> str:
        path = _target(home, link[2])
        if path == HOME:
            path = "docs/index.md"
        elif _outside(path):
            path = f"docs/{_page_of(path)}"
        there = posixpath.relpath(path, posixpath.dirname(f"docs/{source}"))
        return f"{link[1]}{there}{link[3] or ''}{link[4]}"

    parts = FENCED.split(COMMENT.sub("", markdown))
    for i in range(0, len(parts), 2):  # the others are blocks of code
        parts[i] = _spaced(LINK.sub(moved, parts[i]))
    return "".join(parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Formulas, which arithmatex hands on as \(...\) and \[...\], as MathML; \| in a table is |, as on GitHub."""
    found = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)

    def rendered(match: re.Match[str]) -> str:
        block = match[1] == "div"
        return convert(html.unescape(match[2]).strip(), display="block" if block else "inline")

    content = re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), content, flags=re.DOTALL)
    return found.sub(rendered, content)


def _target(home: str, link: str) -> str:
    """The path in the repository of what `link` on the page `home` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _outside(path: str) -> bool:
    return not path.startswith(("docs/", "..")) and path != HOME and (ROOT / path).is_file()


def _page_of(path: str) -> str:
    return "changelog.md" if path == "CHANGELOG.md" else f"source/{path}" + ("" if path.endswith(".md") else ".md")


def _language(path: str) -> str:
    return {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(Path(path).suffix, "text")


def _spaced(text: str) -> str:
    """An empty line before each list and table that follows a line of text."""
    lines = text.split("\n")
    out = lines[:1]
    for before, line in pairwise(lines):
        begins = re.match(r"(- |1\. |\|)", line)
        goes_on = not before.strip() or before.startswith((" ", "#")) or re.match(r"(- |\d+\. |\|)", before)
        out += ["", line] if begins and not goes_on else [line]
    return "\n".join(out)
