"""Checkpoints: found, verified, opened, converted once, loaded strictly; and each way in which that fails."""

import hashlib
import http.client
import logging
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import Bomb
from torch import nn

from rewardtune import rewards
from rewardtune.errors import ConfigError
from rewardtune.rewards import weights
from rewardtune.rewards.weights import (
    Source,
    cache_folder,
    check_digest,
    converted,
    download,
    hub_file,
    load_strictly,
    load_tokenizer,
    open_checkpoint,
)

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_safetensors_and_pickles_open_to_the_same_tensors(tmp_path, legacy):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "b.pth", _use_new_zipfile_serialization=not legacy)
    for file in ("a.safetensors", "a.pt", "b.pth"):
        assert_same(open_checkpoint(tmp_path / file, who="hpsv2"), STATE)


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_truncated_download_is_an_error(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    big = {"weight": torch.rand(100, 100)}
    save_file(big, path) if suffix == "safetensors" else torch.save(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(
        ConfigError, match=r"^hpsv2: .* bytes\) is not a checkpoint, or a truncated one; .*download it"
    ) as caught:
        open_checkpoint(path, who="hpsv2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_web_page_in_place_of_a_checkpoint(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_text("<!DOCTYPE html><html>404: Not Found</html>")
    with pytest.raises(ConfigError, match="is not a checkpoint, or a truncated one") as caught:
        open_checkpoint(tmp_path / f"a.{suffix}", who="hpsv2")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, legacy):
    fuse = tmp_path / "the code ran"
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(2), "extra": Bomb(fuse)}, path, _use_new_zipfile_serialization=not legacy)
    words = r"holds more than weights and was not run \(it asks for \w+\.mkdir\); give a checkpoint of tensors alone"
    with pytest.raises(ConfigError, match=words) as caught:
        open_checkpoint(path, who="hpsv2")
    assert "weights_only" not in str(caught.value)  # torch's message tells how to run it
    assert not fuse.exists()
    torch.load(path, weights_only=False)
    assert fuse.exists()  # it is a bomb


@pytest.mark.parametrize(
    ("protocol", "words"),
    [(2, r"not run \(it asks for \w+\.mkdir\)"), (4, r"is not a checkpoint.*\(a pickle with code is refused; ")],
)
@pytest.mark.filterwarnings("error")  # torch's own, about the protocol
def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path, protocol, words):
    fuse = tmp_path / "the code ran"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weight": Bomb(fuse)}, protocol=protocol))
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(tmp_path / "a.pkl", who="hpsv2")
    assert not fuse.exists()


def test_a_training_checkpoint_with_numpy_scalars_is_refused_by_name(tmp_path):
    """As HPS_v2.pt, which carries its optimiser; the compressed file is the one to take."""
    torch.save({"state_dict": STATE, "loss": np.float64(0.5)}, tmp_path / "HPS_v2.pt")
    with pytest.raises(ConfigError, match=r"holds more than weights and was not run \(it asks for numpy\S*scalar\)"):
        open_checkpoint(tmp_path / "HPS_v2.pt", who="hpsv2")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ([torch.zeros(2)], "holds no tensors by name; legal is the state_dict"),
        ({}, "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ({"state_dict": torch.zeros(2)}, "holds no tensors by name"),
        ({"weight": torch.zeros(2), "epoch": 3}, r"\('epoch' is no tensor with a name\)"),
        ({0: torch.zeros(2)}, r"\(0 is no tensor with a name\)"),
        (torch.zeros(2), "holds no tensors by name"),
    ],
)
def test_other_payloads_are_refused(tmp_path, payload, words):
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(tmp_path / "a.pt", who="hpsv2")


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*nothing\.pt"):
        open_checkpoint(tmp_path / "nothing.pt", who="hpsv2")


# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"content")
    assert hub_file(Source(repo=str(tmp_path)), "a.pt", who="hpsv2") == tmp_path / "a.pt"
    with pytest.raises(ConfigError, match=r"put b\.pt into that folder"):
        hub_file(Source(repo=str(tmp_path)), "b.pt", who="hpsv2")
    with pytest.raises(ConfigError, match="there is no such folder"):
        hub_file(Source(repo=str(tmp_path / "nothing")), "b.pt", who="hpsv2")


def test_offline_it_says_which_file_from_where_and_how_to_place_it(offline):
    words = (
        r"hpsv2: cannot load 'xswu/HPSv2': it needs a\.pt from https://huggingface\.co/xswu/HPSv2; without network "
        r"download it elsewhere by `hf download xswu/HPSv2 a\.pt --local-dir FOLDER`, copy the folder here and give "
        "its path as model"
    )
    with pytest.raises(ConfigError, match=words):
        hub_file(Source(repo="xswu/HPSv2"), "a.pt", who="hpsv2")


def test_the_environment_variable_is_respected(tmp_path):
    code = (
        "from rewardtune.rewards.weights import Source, hub_file\n"
        "try: hub_file(Source(repo='xswu/HPSv2'), 'a.pt', who='hpsv2')\n"
        "except Exception as error: print(type(error).__name__, type(error.__cause__).__name__, error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError LocalEntryNotFoundError hpsv2: cannot load 'xswu/HPSv2': it needs a.pt")


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_checksums(tmp_path, algorithm, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"content")
    digests = {"a.pt": hashlib.new(algorithm, b"content").hexdigest()}
    source = Source(repo=str(tmp_path), **{algorithm: digests})
    assert hub_file(source, "a.pt", who="hpsv2") == path
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert hub_file(source, "a.pt", who="hpsv2") == path  # verified once, not read again
    path.write_bytes(b"conten")
    with pytest.raises(
        ConfigError, match=rf"is not the published file \({algorithm} .*; delete it and download it again"
    ):
        hub_file(source, "a.pt", who="hpsv2")


def test_downloads_are_verified_and_kept(tmp_path):
    origin = tmp_path / "far" / "head.pth"
    origin.parent.mkdir()
    origin.write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    path = download(origin.as_uri(), sha256=sha256, who="aesthetic", setting="head")
    assert path == cache_folder() / "head.pth"
    assert path.read_bytes() == b"content"
    origin.unlink()
    assert download(origin.as_uri(), sha256=sha256, who="aesthetic", setting="head") == path


def test_a_download_of_something_else_is_not_kept(tmp_path):
    origin = tmp_path / "head.pth"
    origin.write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"cannot download file:.*invalid hash value.*give its path as head"):
        download(origin.as_uri(), sha256="0" * 64, who="aesthetic", setting="head")
    assert not list(cache_folder().iterdir())


def test_a_download_that_breaks_off_is_not_kept(monkeypatch):
    def broken(*args, **settings):
        raise http.client.IncompleteRead(b"cont")

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(ConfigError, match=r"cannot download https:.*IncompleteRead.*give its path as head"):
        download("https://example.org/head.pth", sha256="0" * 64, who="aesthetic", setting="head")


def test_a_download_offline_says_where_to_put_the_file(offline):
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*copy it to .*rewardtune/head\.pth or give its path"):
        download("https://example.org/head.pth", sha256="0" * 64, who="aesthetic", setting="head")


def test_a_file_placed_by_hand_is_verified(tmp_path):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "head.pth").write_bytes(b"another")
    with pytest.raises(ConfigError, match="is not the published file"):
        download("https://example.org/head.pth", sha256="0" * 64, who="aesthetic", setting="head")


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    import huggingface_hub.constants

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "file"))
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert check_digest(path, "sha256", digest, who="hpsv2") == path
    with pytest.warns(UserWarning, match="the converted checkpoint cannot be kept"):
        assert_same(converted(path, dict, who="hpsv2"), STATE)


# -- converting -------------------------------------------------------------------------------------------------------


def double(state):
    return {key.upper(): 2 * value for key, value in state.items()}


def test_a_pickle_is_opened_and_converted_once(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    first = converted(path, double, who="hpsv2")
    assert_same(first, double(STATE))
    (kept,) = cache_folder().glob("*.safetensors")
    assert_same(load_file(kept), first)
    assert kept.stat().st_mode == path.stat().st_mode  # others may read a shared cache
    with monkeypatch.context() as patch:
        patch.setattr(weights, "open_checkpoint", None)
        assert_same(converted(path, double, who="hpsv2"), first)
    kept.write_bytes(kept.read_bytes()[:-4])  # a copy cut by a full disk
    assert_same(converted(path, double, who="hpsv2"), first)
    torch.save({"weight": torch.ones(1)}, path)  # another checkpoint in its place
    assert_same(converted(path, double, who="hpsv2"), {"WEIGHT": 2 * torch.ones(1)})


def test_other_key_tables_convert_again(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    for edition in (weights.tables.EDITION, "another"):
        monkeypatch.setattr(weights.tables, "EDITION", edition)
        converted(path, double, who="hpsv2")
    assert len(list(cache_folder().glob("*.safetensors"))) == 2


def test_a_full_disk_costs_time_only_and_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, signal, sys, torch\n"
        "from rewardtune.rewards.weights import converted\n"
        "torch.save({'weight': torch.ones(100, 100)}, sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "print(converted(sys.argv[1], dict, who='hpsv2')['weight'].sum().item())\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "10000.0\n"
    assert "the converted checkpoint cannot be kept" in done.stderr
    assert not list((tmp_path / "home" / "rewardtune").iterdir())


# -- loading ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)


def strictly(state):
    return load_strictly(Net, state, who="hpsv2", what="a.pt")


def test_a_strict_load_takes_every_weight_in_float32_and_keeps_buffers():
    half = {f"linear.{key}": value.half() for key, value in STATE.items()}
    net = strictly(half)
    assert net.linear.weight.dtype == torch.float32
    assert torch.equal(net.linear.weight, STATE["weight"])
    assert net.scale.item() == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear.bias": None}, r"a\.pt is of another kind or incomplete: 1 weights are missing, linear\.bias first"),
        ({"head.weight": torch.ones(1)}, r"1 of its weights have no place in a Net, head\.weight first"),
        ({"linear.weight": torch.ones(3, 2)}, r"another size: linear\.weight is \(3, 2\), not \(2, 3\)"),
    ],
)
def test_a_strict_load_refuses_what_does_not_fit(change, words):
    state = {f"linear.{key}": value for key, value in STATE.items()} | change
    with pytest.raises(ConfigError, match=words):
        strictly({key: value for key, value in state.items() if value is not None})


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"put tokenizer\.json .* into that folder"):
        load_tokenizer(str(tmp_path), vocabulary=10, who="hpsv2")


@pytest.mark.parametrize("make", [rewards.CLIPScore, rewards.HPSv2, rewards.ImageReward, rewards.Objectness])
def test_local_files_have_no_revision(tmp_path, make):
    with pytest.raises(
        ConfigError, match=r"revision is 'abc' but the model .* is local.*; leave it out, or give a hub"
    ):
        make(model=str(tmp_path), revision="abc")


def test_local_weights_load_without_a_progress_bar(capfd):
    from transformers.utils import logging

    from rewardtune import playground, rewards

    shown = logging.is_progress_bar_enabled()
    try:
        for enabled, switch in ((False, logging.disable_progress_bar), (True, logging.enable_progress_bar)):
            switch()
            rewards.CLIPScore(model=str(playground.clip_path()))
            assert "Loading weights" not in capfd.readouterr().err
            assert logging.is_progress_bar_enabled() == enabled
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def copied(name, tmp_path):
    """The playground's folder of a reward, to be changed."""
    from rewardtune import playground

    return shutil.copytree(playground.reward_path(name), tmp_path / name)


@pytest.mark.parametrize(("name", "settings"), [("clipscore", {}), ("objectness", {"target": None}), ("aesthetic", {})])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_of_nan_is_refused(name, settings, value, tmp_path):
    folder = copied(name, tmp_path)
    state = load_file(folder / "model.safetensors")
    last = sorted(state)[-1]
    state[last].view(-1)[-1] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name}: {folder} has NaN or infinite weights, {last} first: .*; download"):
        rewards.load(name, {"model": str(folder), **settings})


def test_a_head_of_nan_is_refused(tmp_path):
    folder = copied("aesthetic", tmp_path)
    head = load_file(folder / "head.safetensors")
    save_file({key: value * torch.nan for key, value in head.items()}, folder / "head.safetensors")
    with pytest.raises(ConfigError, match=r"aesthetic: .*head\.safetensors has NaN or infinite weights, weight first"):
        rewards.Aesthetic(model=str(folder))


@pytest.mark.parametrize("make", [rewards.CLIPScore, rewards.Objectness, rewards.ImageReward, rewards.Aesthetic])
def test_a_file_in_place_of_its_folder(make, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    with pytest.raises(ConfigError, match=rf"{path} is a file; give its folder, {tmp_path}$"):
        make(model=str(path))


def test_a_checkpoint_of_another_kind_names_reward_file_and_cure(tmp_path):
    torch.save(STATE, tmp_path / "mine.pt")
    words = r"hpsv2: .*mine\.pt does not fit: .*'weight', which open_clip's CLIP .*; give the file that `rewardtune ls"
    with pytest.raises(ConfigError, match=words):
        rewards.HPSv2(model=str(tmp_path / "mine.pt"))


@pytest.mark.parametrize("local", [True, False])
def test_the_libraries_remarks_are_not_heard_while_loading(local, tmp_path):
    """The hub client logs each of its tries, transformers a table of what does not fit; our own error says it once."""
    import huggingface_hub.utils.logging as hub_log
    import transformers.utils.logging as transformers_log

    loggers = [
        log.get_logger(f"{name}.test")
        for log, name in ((hub_log, "huggingface_hub"), (transformers_log, "transformers"))
    ]
    heard = []

    def load():
        for logger in loggers:
            heard.append(logger.isEnabledFor(logging.WARNING))
            assert logger.isEnabledFor(logging.ERROR)
        heard.append(transformers_log.is_progress_bar_enabled())
        raise OSError("no network")

    levels = [log.get_verbosity() for log in (hub_log, transformers_log)]
    shown = transformers_log.is_progress_bar_enabled()
    try:
        hub_log.set_verbosity_warning()
        transformers_log.set_verbosity_warning()
        transformers_log.enable_progress_bar()
        with pytest.raises(ConfigError, match="no network"):
            weights.found(load, str(tmp_path) if local else "someone/something", who="x", needed="files")
        assert heard == [False, False, not local]  # the bar of a download stays
        assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)
    finally:
        for log, level in zip((hub_log, transformers_log), levels, strict=True):
            log.set_verbosity(level)
        (transformers_log.enable_progress_bar if shown else transformers_log.disable_progress_bar)()
