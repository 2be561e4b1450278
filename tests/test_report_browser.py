"""The pages in a headless Chromium; skipped by name where there is none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import browser
import pytest
from fake_run import fake_run, fake_sweep
from PIL import Image
from test_report import HOSTILE

from rewardtune.report import write_report
from rewardtune.report.sheet import make_sheet
from rewardtune.report.tally import tally

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium: apt-get install chromium, or set $CHROMIUM")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    found = browser.Browser(str(PROGRAM), tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    one, two = fake_run(folder / "one", prompts=HOSTILE), fake_run(folder / "two", prompts=HOSTILE, gain=0.1, draw=1)
    fake_sweep(one)
    fake_sweep(two, gain=0.2)
    running = fake_run(folder / "running", status="running")
    return {
        "one": write_report([one], folder / "one.html"),
        "two": write_report([one, two], folder / "two.html"),
        "running": write_report([running], folder / "running.html"),
    }


def loaded(page: browser.Page) -> bool:
    return bool(
        page.run("[...document.images].length > 0 && [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    )


@pytest.mark.parametrize("which", ["one", "two", "running"])
@pytest.mark.parametrize("look", ["desktop", "phone", "dark"])
def test_opens_clean(chromium, reports, which, look):
    """No console error, no request but for the page, every picture there, no sideways scrolling."""
    page = chromium.open(reports[which], width=360 if look == "phone" else 1200, dark=look == "dark")
    assert page.errors() == []
    assert page.requests() == [reports[which].resolve().as_uri()]
    assert loaded(page)
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    back = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 150) is (look == "dark")
    page.close()


def test_the_theme_can_be_changed(chromium, reports):
    page = chromium.open(reports["one"])
    colours = "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color"
    before = page.run(colours)
    page.click("#theme")
    assert page.run(colours) != before
    assert page.run("document.getElementById('theme').textContent") == "Light colours"
    page.close()


def test_a_curve_is_hovered_and_read_by_keys(chromium, reports):
    page = chromium.open(reports["one"])
    plot = "#rewards-0 .plot"
    page.run(f"document.querySelector('{plot}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    assert page.run(f"document.querySelector('{plot} .tip').hidden")
    page.move(*page.middle(plot))
    page.until(f"!document.querySelector('{plot} .tip').hidden", 10)
    tip = page.run(f"document.querySelector('{plot} .tip').textContent")
    assert 15 <= int(re.match(r"step (\d+)", tip)[1]) <= 22  # the middle of 40, the labels of the axis left of it
    assert "training batch" in tip
    page.run(f"document.querySelector('{plot}').focus()")
    page.press("End")
    assert page.run(f"document.querySelector('{plot} b').textContent") == "step 40"
    assert "eval pictures: " in page.run(f"document.querySelector('{plot} [aria-live]').textContent")
    page.press("Escape")
    assert page.run(f"document.querySelector('{plot} .tip').hidden")
    page.close()


def test_every_run_has_its_own_sweep(chromium, reports):
    """The trained reward against diversity on a page of two runs, read at the least diverse point: weight 1."""
    page = chromium.open(reports["two"])
    for run, text in enumerate(("1 at weight 1", "0.7 at weight 1")):
        plot = f"#sweep-{run}-4 .plot"
        page.run(f"document.querySelector('{plot}').focus()")
        page.press("Home")
        assert (
            page.run(f"document.querySelector('{plot} [aria-live]').textContent") == f"vendi 4, trained reward: {text}"
        )
    page.close()


def test_the_axis_is_switched(chromium, reports):
    page = chromium.open(reports["one"])
    page.click("input[value=seconds]")
    page.run("document.querySelector('#rewards-0 .plot').focus()")
    page.press("End")
    assert page.run("document.querySelector('#rewards-0 .plot b').textContent") == "1 min 20 s"  # 40 updates of 2 s
    page.click("input[value=images]")
    page.run("document.querySelector('#rewards-0 .plot').focus()")
    page.press("End")
    assert page.run("document.querySelector('#rewards-0 .plot b').textContent") == "320 images"
    page.run("document.querySelector('#rewards-0 details').open = true")
    page.until("document.querySelectorAll('#rewards-0 tbody tr').length === 41", 10)  # 40 updates and step 0
    page.close()


def test_a_table_is_sorted(chromium, reports):
    page = chromium.open(reports["two"])
    heads = page.run("[...document.querySelectorAll('#table-runs thead th')].map(h => h.textContent)")
    column = heads.index("Δ reward") + 1
    button = f"#table-runs thead th:nth-child({column}) button"
    seen = []
    for _ in range(2):
        page.click(button)
        names = page.run("[...document.querySelectorAll('#table-runs tbody th')].map(h => h.textContent)")
        seen.append((page.run(f"document.querySelector('{button}').parentNode.getAttribute('aria-sort')"), names))
    assert seen == [("descending", ["one", "two"]), ("ascending", ["two", "one"])]
    page.close()


def test_numbers_with_intervals_are_sorted_as_numbers(chromium, tmp_path):
    run = fake_run(tmp_path / "run")
    measures = {"hpsv2": {"what": "", "better": "more", "role": "held_out"}}
    candidates = [
        {"label": f"c{i}", "metrics": {"hpsv2": {"value": x, "low": x - 1, "high": x + 1}}}
        for i, x in enumerate((0.45, -0.377, 0.5, 0.0612, -0.05))
    ]
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(
        json.dumps({"kind": "eval", "measures": measures, "candidates": candidates})
    )
    page = chromium.open(write_report([run], tmp_path / "run.html"))
    table = "document.querySelector('#candidates-1-1')"
    for click, order in enumerate((["c2", "c0", "c3", "c4", "c1"], ["c1", "c4", "c3", "c0", "c2"])):
        page.run(f"{table}.querySelectorAll('thead button')[1].click()")
        names = page.run(f"[...{table}.querySelectorAll('tbody th')].map(h => h.textContent)")
        assert names == order, click
    assert page.run("clock(119.7)") == "2 min 00 s"
    page.close()


def test_a_wide_table_says_that_it_can_be_scrolled(chromium, reports):
    """On a phone: a line above it, and the names stay in sight; a table that fits has neither."""
    page = chromium.open(reports["two"], width=360)
    box = "document.getElementById('table-runs').parentNode"
    page.until(f"{box}.scrollWidth > {box}.clientWidth && {box}.classList.contains('more')", 10)
    assert "scroll" in page.run(f"getComputedStyle({box}, '::before').content")
    name = "document.querySelector('#table-runs tbody th').getBoundingClientRect().left"
    before = page.run(name)
    page.run(f"{box}.scrollLeft = 200")
    assert page.run(f"{box}.scrollLeft") == 200
    assert page.run(name) == before
    page.close()
    page = chromium.open(reports["two"], width=2400)
    assert not page.run(f"{box}.classList.contains('more')")
    page.close()


def test_the_key_looks_like_its_curve(chromium, reports):
    page = chromium.open(reports["one"])
    for style, look in {"mean": "repeating-linear-gradient", "raw": "none"}.items():
        found = page.run(f"getComputedStyle(document.querySelector('#rewards-0 .key .swatch.{style}')).backgroundImage")
        assert found.startswith(look)
    page.close()


def test_the_pairs_are_ordered(chromium, reports):
    page = chromium.open(reports["one"])
    order = "[...document.querySelectorAll('#list-1 > li')].map(card => Number(card.dataset.index))"
    assert page.run(order) == list(range(len(HOSTILE)))
    page.run("window.order = document.querySelector('.order')")
    page.run("order.value = order.options[order.options.length - 1].value")
    page.run("order.dispatchEvent(new Event('change'))")
    ranks = page.run("[...document.querySelectorAll('#list-1 > li')].map(card => Number(card.dataset[order.value]))")
    assert ranks == sorted(ranks)
    page.close()


def test_a_hostile_prompt_stays_text(chromium, reports):
    page = chromium.open(reports["one"])
    texts = page.run("[...document.querySelectorAll('#list-1 .prompt bdi')].map(p => p.textContent)")
    assert texts[:4] == HOSTILE[:4]
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('[onerror]').length") == 0
    assert page.errors() == []
    page.close()


def test_names_for_screen_readers(chromium, reports):
    """Landmarks, one h1, a name for all that can be reached, headings in order, ids once."""
    page = chromium.open(reports["two"])
    assert page.run("['main', 'nav', 'header', 'footer'].map(n => document.querySelectorAll(n).length)") == [1, 1, 1, 1]
    assert page.run("document.querySelectorAll('h1').length") == 1
    ids = page.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    reachable = {"button", "link", "radio", "checkbox", "combobox", "image", "region"}
    nodes = [node for node in tree if not node.get("ignored") and node.get("role", {}).get("value") in reachable]
    assert len(nodes) > 30
    assert not [node for node in nodes if not node.get("name", {}).get("value")]
    levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.close()


@pytest.mark.slow
def test_the_refresh_keeps_the_place(chromium, reports, tmp_path):
    quick = tmp_path / "quick.html"
    quick.write_text(reports["running"].read_text().replace('"refresh":20', '"refresh":3'))
    page = chromium.open(quick)
    fold = "document.getElementById('worst-1').open"
    page.run(f"(window.stamp = 1, {fold} = false, window.scrollTo({{top: 300, behavior: 'instant'}}))")
    page.wait("Page.loadEventFired")
    # one question, and the box that stops the next refresh ticked with it
    found = page.run(f"(document.getElementById('pause').checked = true, [window.stamp, window.scrollY, {fold}])")
    assert found == [None, 300, False]
    page.run("window.stamp = 2")
    time.sleep(4)
    assert page.run("window.stamp") == 2
    page.close()


def sheet_of(folder: Path, names: int = 4):
    for number, side in enumerate("ab"):
        (folder / side).mkdir()
        for index in range(names):
            Image.new("RGB", (24, 24), (200 * number, 40 * index, 90)).save(folder / side / f"{index:03d}.png")
            (folder / side / f"{index:03d}.txt").write_text(HOSTILE[index])
    return make_sheet(folder / "a", folder / "b", output=folder / "sheet.html", seed=0)


def test_votes_are_kept_saved_and_tallied(chromium, tmp_path):
    made = sheet_of(tmp_path)
    key = json.loads(made.key.read_text())
    page = chromium.open(made.page)
    assert page.run("document.getElementById('vote').hidden")
    page.run("document.getElementById('rater').focus()")
    page.write("Ada")
    page.click("#who button")
    b_side = {row["pair"]: "ArrowRight" if row["left"] == "A" else "ArrowLeft" for row in key["pairs"]}
    keys = [b_side[row["pair"]] for row in key["pairs"]]
    assert page.run("document.getElementById('ask').textContent") == key["pairs"][0]["prompt"]
    page.until("document.getElementById('left-image').naturalWidth > 0", 10)
    page.press(keys[0])
    page.press("ArrowDown")
    page.press("Backspace")
    page.press(keys[1])
    page.go(made.page.resolve().as_uri())  # closed and opened again: two votes are there
    assert page.run("document.getElementById('rater').value") == "Ada"
    page.click("#who button")
    assert page.run("document.getElementById('place').textContent") == "Ada, pair 3 of 4"
    page.press(keys[2])
    page.click("#tie")
    assert not page.run("document.getElementById('end').hidden")
    saved = tmp_path / "saved"
    saved.mkdir()
    chromium.send(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved), browserContextId=page.context
    )
    page.click("#end .save")
    until = time.monotonic() + 30
    while not list(saved.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    assert page.errors() == []
    assert not [url for url in page.requests() if url != made.page.resolve().as_uri()]
    found = tally(made.key, list(saved.glob("*.json")))
    assert (found.all.a, found.all.ties, found.all.b) == (0, 1, 3)
    assert found.all.rate.value == pytest.approx(3.5 / 4)
    page.close()


def test_the_sheet_on_a_phone(chromium, tmp_path):
    page = chromium.open(sheet_of(tmp_path).page, width=360, dark=True)
    page.run("document.getElementById('rater').focus()")
    page.write("Ada")
    page.press("Enter", "\r")
    page.until("!document.getElementById('vote').hidden", 10)
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.errors() == []
    page.close()
