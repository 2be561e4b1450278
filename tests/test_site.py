"""The documentation site builds strictly and asks no other server for anything, while it is built and when it is read.

Skipped where the extra `docs` is not installed; `make docs` installs it and runs this.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest

import rewardtune
from rewardtune import rewards

ROOT = Path(__file__).parent.parent
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src", "use": "href"}
NO_NETWORK = """
import socket, sys
def refuse(*_, **__): raise OSError("the site asked for the network while it was built")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""

pytestmark = pytest.mark.slow  # reads the whole package and renders sixty pages


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", NO_NETWORK, "build", "--quiet", "--strict", "--site-dir", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


class Loaded(HTMLParser):
    """Addresses that a page loads by itself; links that a reader may click are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADS and given.get(LOADS[tag]) and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(str(given[LOADS[tag]]))


def test_no_page_loads_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.found, page
        assert [url for url in loaded.found if re.match(r"(https?:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_formulas_and_docstrings_are_rendered(site: Path):
    mathematics = (site / "mathematics.html").read_text(encoding="utf-8")
    assert mathematics.count("<math") > 50
    assert "arithmatex" not in mathematics
    reference = (site / "api.html").read_text(encoding="utf-8")
    names = {*rewardtune.__all__, *rewards.__all__} - {"BUILTIN", "methods", "playground", "rewards"}
    made = {name: getattr(rewards, name).__name__ for name in rewards.__all__ if name != "BUILTIN"}  # hinge is Hinge
    for name in (*(made.get(name, name) for name in names), "drtune"):
        assert re.search(rf'id="rewardtune\.[\w.]*{name}"', reference), name
    assert ":::" not in reference


def test_directives_of_the_tests_are_not_in_the_pages(site: Path):
    for page in site.rglob("*.html"):
        assert "&lt;!-- " not in page.read_text(encoding="utf-8"), page
        assert not re.search(r"<!-- (setup|slow|not run):", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("width", [1300, 390])
def test_pages_fit_the_window_and_ask_nobody(site: Path, tmp_path: Path, width: int):
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium on this machine")
    window = browser.Browser(program, tmp_path)
    try:
        for name in ("index", "mathematics", "from-trl", "api", "results/oracle"):
            page = window.open(site / f"{name}.html", width=width)
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), name
            assert [url for url in page.requests() if not url.startswith("file:")] == [], name
    finally:
        window.close()
