"""The app: base and tuned with the same noise, the weight's meaning, one picture at a time; the page."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import browser
import numpy as np
import pytest
from test_export import make_run

from rewardtune import app, cli
from rewardtune.errors import ConfigError

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed (extra demo)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, _, _ = make_run(tmp_path_factory.mktemp("app"))
    text = (folder / "config.yaml").read_text()
    assert "inference_weight: 1.0" in text
    (folder / "config.yaml").write_text(text.replace("inference_weight: 1.0", "inference_weight: 0.7"))
    return folder


@pytest.fixture(scope="module")
def pair(run):
    return app.Pair(str(run))


def pixels(pictures):
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_the_runs_own_settings_are_the_default(pair):
    assert pair.weight == 0.7
    assert pair.prompts() == ["red heart", "blue star", "green moon"]
    base, tuned = pixels(pair.pictures("red heart", 3))
    same = pixels(pair.pictures("red heart", 3, weight=0.7, steps=4, guidance=3.0))
    assert (base == same[0]).all() and (tuned == same[1]).all()  # noqa: PT018
    assert base.shape == tuned.shape == (16, 16, 3)


def test_the_weight_goes_from_the_base_to_the_tuned_model(pair):
    none, full = (pixels(pair.pictures("red heart", 3, weight=weight)) for weight in (0, 1))
    assert (none[0] == full[0]).all()  # the base does not move
    assert (none[1] == none[0]).all()
    half = pixels(pair.pictures("red heart", 3, weight=0.5))[1]
    assert np.abs(half - none[1]).max() > 2 < np.abs(half - full[1]).max()


def test_pictures_are_those_of_sample(pair, run, tmp_path):
    assert cli.main(["sample", str(run), "-p", "red heart", "--seed", "3", "--output", str(tmp_path)]) == 0
    from PIL import Image

    assert (np.asarray(Image.open(tmp_path / "000.png")) == np.asarray(pair.pictures("red heart", 3)[1])).all()


def test_seed_steps_and_guidance_count(pair):
    one = pixels(pair.pictures("red heart", 3))
    for other in ({"seed": 4}, {"seed": 3, "steps": 2}, {"seed": 3, "guidance": 1.5}):
        two = pixels(pair.pictures("red heart", **other))
        assert np.abs(one[0] - two[0]).max() > 2 < np.abs(one[1] - two[1]).max()


def test_one_picture_at_a_time(pair, monkeypatch):
    alone = {seed: pixels(pair.pictures("blue star", seed, weight=seed / 4)) for seed in range(4)}
    inside, most, sample = 0, 0, pair._sample

    def counted(*given):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        found = sample(*given)
        inside -= 1
        return found

    monkeypatch.setattr(pair, "_sample", counted)
    monkeypatch.setattr(pair, "_base", {})
    found = {}

    def work(seed):
        found[seed] = pixels(pair.pictures("blue star", seed, weight=seed / 4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for seed, expected in alone.items():
        assert all((a == b).all() for a, b in zip(found[seed], expected, strict=True))


def test_a_base_picture_is_kept_while_the_slider_moves(pair, monkeypatch):
    sampled, sample = [], pair._sample
    monkeypatch.setattr(pair, "_base", {})
    monkeypatch.setattr(pair, "_sample", lambda candidate, *rest: sampled.append(candidate) or sample(candidate, *rest))
    for weight in (0.2, 0.4):
        pair.pictures("red heart", 5, weight=weight)
    assert [candidate.place is None for candidate in sampled] == [True, False, False]


def test_the_newest_base_pictures_are_kept(pair, monkeypatch):
    sampled = []
    monkeypatch.setattr(pair, "_base", {})
    monkeypatch.setattr(pair, "_sample", lambda candidate, prompt, seed, call: sampled.append((candidate, seed)))
    for seed in range(app.KEPT + 3):
        pair.pictures("red heart", seed)
    assert [key[1] for key in pair._base] == list(range(3, app.KEPT + 3))
    sampled.clear()
    for seed in (3, app.KEPT + 2, 0):  # the oldest that is there, the newest, the first, which is gone
        pair.pictures("red heart", seed)
    assert [seed for candidate, seed in sampled if candidate.place is None] == [0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": -1}, "seed -1: must be a whole number from 0"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": None}, "seed None"),
        ({"seed": float("inf")}, "seed inf: must be a whole number from 0"),
        ({"seed": float("nan")}, "seed nan"),
        ({"steps": float("inf")}, "steps inf: must be a whole number from 1"),
        ({"steps": float("nan")}, "steps nan"),
        ({"weight": float("nan")}, "weight nan"),
        ({"steps": 0}, "steps 0: must be a whole number from 1"),
        ({"guidance": -1.0}, "guidance -1.0: must be 0 or more"),
    ],
)
def test_what_cannot_be_sampled_is_said(pair, given, words):
    with pytest.raises(ConfigError, match=words):
        pair.pictures(**{"prompt": "red heart"} | given)


def test_no_run_and_no_gradio_are_said(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert cli.main(["app", str(tmp_path / "nosuch")]) == 2
    assert "needs gradio" not in capsys.readouterr().err  # the nearer of two reasons
    assert cli.main(["app", str(run)]) == 2
    assert "needs gradio, which is not installed: pip install 'rewardtune[demo]'" in capsys.readouterr().err
    monkeypatch.setattr(app, "find_spec", lambda name: object())
    assert cli.main(["app", str(tmp_path)]) == 2
    assert f"no LoRA at {tmp_path}" in capsys.readouterr().err
    assert cli.main(["app", "base"]) == 2
    assert "give a run folder" in capsys.readouterr().err


# -- the page itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(run):
    """The command, headless, on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "rewardtune", "app", str(run), "--port", str(port)]
    paths = ":".join(filter(None, sys.path))
    child = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    while child.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            time.sleep(0.3)
    assert child.poll() is None, child.communicate()[1][-2000:]
    yield address
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)


@needs_gradio
@pytest.mark.slow  # starts the command, and torch and gradio in it
def test_the_page_answers_and_asks_nobody_else(served, pair):
    with urllib.request.urlopen(served) as answer:
        text = answer.read().decode()
    config = json.loads(urllib.request.urlopen(f"{served}/config").read())
    assert config["analytics_enabled"] is False
    sliders = [c["props"] for c in config["components"] if c["type"] == "slider"]
    assert [slider["value"] for slider in sliders] == [0.7, 4]
    assert "fonts.googleapis" not in text + json.dumps(config)

    from gradio_client import Client

    client = Client(served, verbose=False)
    base, tuned = client.predict("red heart", 3, 0.5, 4, 3.0, api_name="/pictures")
    from PIL import Image

    expected = pixels(pair.pictures("red heart", 3, weight=0.5))
    assert all(
        (np.asarray(Image.open(file)) == picture).all() for file, picture in zip((base, tuned), expected, strict=True)
    )
    with pytest.raises(Exception, match="prompt is empty"):
        client.predict(" ", 3, 0.5, 4, 3.0, api_name="/pictures")


@needs_gradio
@pytest.mark.slow  # opens a model, and gradio
def test_the_page_of_a_run_with_pictures_has_a_field_for_each(tmp_path, monkeypatch):
    """Asked as a browser asks: the example's own picture is uploaded, and one is missing."""
    from gradio_client import Client, handle_file
    from PIL import Image
    from tiny_runs import made_run, save_tiny

    monkeypatch.chdir(tmp_path)
    given = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(given).save("one.png")
    Path("prompts.jsonl").write_text('{"prompt": "red heart", "image": "one.png", "negative_prompt": "grey"}\n')
    made_run(
        tmp_path / "run",
        save_tiny(tmp_path / "tiny"),
        model={"id": str(tmp_path / "tiny"), "pipeline": "StableDiffusionImg2ImgPipeline"},
        prompts={"source": "prompts.jsonl", "columns": ["image", "negative_prompt"]},
        sampling={"steps": 8, "guidance": 3.0, "call": {"strength": 0.5}},
    )
    pair = app.Pair("run")
    blocks = app.page(pair)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        labels = [block.label for block in blocks.blocks.values() if getattr(block, "label", None)]
        assert [label for label in labels if label in ("image", "negative_prompt")][:2] == ["image", "negative_prompt"]
        client = Client(address, verbose=False)
        asked = ["red heart", 3, 1.0, 8, 3.0]
        files = client.predict(*asked, handle_file("one.png"), "dull", api_name="/pictures")
        expected = pair.pictures("red heart", 3, weight=1.0, inputs={"image": "one.png", "negative_prompt": "dull"})
        for file, picture in zip(files, pixels(expected), strict=True):
            assert (np.asarray(Image.open(file)) == picture).all()
        with pytest.raises(Exception, match="image: choose a picture"):
            client.predict(*asked, None, "", api_name="/pictures")
    finally:
        blocks.close()


@needs_gradio
@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="chromium is not installed")
def test_a_browser_draws_the_page_without_other_hosts(served, tmp_path):
    """The net log of a headless Chromium that can resolve no name but the app's own."""
    log, shot = tmp_path / "net.json", tmp_path / "page.png"
    done = subprocess.run(
        [browser.find(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,1100",
         "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=15000", f"--log-net-log={log}", f"--screenshot={shot}", served],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert shot.is_file(), done.stderr[-2000:]
    hosts = {
        host
        for host in re.findall(r'"url":"https?://([^/":]+)', log.read_text(errors="replace"))
        if not host.endswith(("google.com", "googleapis.com", "gvt1.com")) or "fonts" in host  # Chromium's own
    }
    assert hosts <= {"127.0.0.1"}, hosts
    if keep := os.environ.get("KEEP_SCREENSHOT"):
        Path(keep).write_bytes(shot.read_bytes())
