"""Exports: each file gives the tuned pipeline's pictures in plain diffusers, and one that does not is an error."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from judge import plain_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import denoiser_of, quiet, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiny_runs import BASE, full_disk, made_run, save_tiny

from rewardtune import adapters, export, launch
from rewardtune.config import Model, RunConfig, dump_config
from rewardtune.errors import ConfigError, RewardTuneError
from rewardtune.runfolder import LORA_FILE

FACTS = {
    "status": "done",
    "time": "2026-11-20T12:00:00+00:00",
    "reward": "brightness",
    "method": "drtune(K=2, m=2)",
    "seed": 0,
    "train": {"steps": 2, "lr": 0.003, "batch": 2, "clip": 0.1},
    "steps": 2,
    "call": {"num_inference_steps": 4, "guidance_scale": 3.0, "width": 16, "height": 16},
    "before": {"reward": [0.50, 0.02]},
    "after": {"reward": [0.75, 0.03]},
}


def make_run(
    folder: Path, build: Any = stable_diffusion, *, targets: Any = "attention", dora: bool = False, name: str = "tune"
) -> tuple[Path, Any, Any]:
    """A run folder as the trainer leaves it, of a tiny pipeline with a random LoRA (rank 4, alpha 8).

    Gives (folder, the tuned pipeline itself, arguments of its call).
    """
    pipe, call = build()
    denoiser = denoiser_of(pipe)
    denoiser.unload_lora()
    pipe.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(5)
    if dora:
        from peft import LoraConfig

        config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], use_dora=True)
        denoiser.add_adapter(config, adapter_name=adapters.ADAPTER)
    else:
        adapters.add_lora(denoiser, 4, alpha=8, targets=targets)
    for key, parameter in denoiser.named_parameters():
        if ".lora_" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).abs()
    run = folder / name
    adapters.save_lora(pipe, run)
    values = {"model": str(folder / "base"), "output_dir": str(run), **BASE}
    (run / "config.yaml").write_text(dump_config(RunConfig.model_validate(values)))
    (run / "run.json").write_text(json.dumps(FACTS))
    return run, pipe, call


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, Any, Any]:
    """One Stable Diffusion run for the tests that do not change it."""
    return make_run(tmp_path_factory.mktemp("shared"), targets="attention+conv")


def base(run: Path) -> Any:
    return quiet(DiffusionPipeline.from_pretrained(run.parent / "base"))


@pytest.mark.parametrize(
    ("form", "build"),
    [
        ("diffusers", stable_diffusion_xl),
        ("kohya", stable_diffusion),
        pytest.param("diffusers", stable_diffusion, marks=pytest.mark.slow),
        pytest.param("kohya", stable_diffusion_xl, marks=pytest.mark.slow),
    ],
)
def test_plain_diffusers_gives_the_tuned_pictures(build, form, tmp_path):
    """Every linear layer and convolution, alpha unlike rank; the pipeline held against is the tuned one itself."""
    run, tuned, call = make_run(tmp_path, build, targets="all")
    (made,) = export.export_run(run, [form])
    plain = base(run)
    before = plain_images(plain, call)
    plain.load_lora_weights(str(made.path.parent))  # finds the file by itself
    torch.testing.assert_close(plain_images(plain, call), plain_images(tuned, call), rtol=0, atol=1e-5)
    assert (before - plain_images(tuned, call)).abs().max() > 0.01
    assert made.difference <= 1e-5 < made.effect
    assert made.tensors == len(adapters.lora_state(denoiser_of(tuned)))
    assert "verified: max difference" in str(made)


def test_kohya_names_convolutions_and_alphas(shared, tmp_path):
    (made,) = export.export_run(shared[0], ["kohya"], output=tmp_path)
    state = load_file(made.path)
    assert made.path == tmp_path / "kohya" / "tune.safetensors"
    for layer in ("down_blocks_0_resnets_0_conv1", "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"):
        assert state[f"lora_unet_{layer}.alpha"].item() == len(state[f"lora_unet_{layer}.lora_down.weight"]) == 4
    assert state["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (4, 8, 3, 3)
    assert {key.rpartition(".lora_")[2] if ".lora_" in key else "alpha" for key in state} == {
        "down.weight",
        "up.weight",
        "alpha",
    }


def test_merged_weights_are_the_base_plus_the_weighted_lora(shared, tmp_path):
    """W + weight (alpha / rank) B A by hand from the live adapter; the base on disk stays as it was."""
    run, tuned, call = shared
    untouched = {path: path.read_bytes() for path in (run.parent / "base").rglob("*") if path.is_file()}
    (made,) = export.export_run(run, ["merged"], output=tmp_path, weight=0.7)
    merged, plain = quiet(DiffusionPipeline.from_pretrained(made.path)), base(run)
    old, new = plain.unet.state_dict(), merged.unet.state_dict()
    assert old.keys() == new.keys()
    expected = dict(old)
    for name, module in tuned.unet.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (part[adapters.ADAPTER].weight for part in (module.lora_A, module.lora_B))
            change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(old[f"{name}.weight"].shape)
            expected[f"{name}.weight"] = old[f"{name}.weight"] + 0.7 * (8 / 4) * change
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert len(changed) == sum(hasattr(module, "lora_A") for module in tuned.unet.modules())
    for key in old:
        torch.testing.assert_close(new[key], expected[key], rtol=1e-5, atol=1e-6)
    tuned.unet.set_adapters(adapters.ADAPTER, 0.7)
    try:
        torch.testing.assert_close(plain_images(merged, call), plain_images(tuned, call), rtol=0, atol=1e-4)
    finally:
        tuned.unet.set_adapters(adapters.ADAPTER, 1.0)
    assert {path: path.read_bytes() for path in untouched} == untouched
    assert not getattr(merged.unet, "peft_config", None)


def test_weight_is_written_into_the_lora_file(shared, tmp_path):
    whole, half = (
        load_file(export.export_run(shared[0], output=tmp_path / str(weight), weight=weight)[0].path)
        for weight in (1.0, 0.5)
    )
    for key, value in whole.items():
        assert torch.equal(half[key], value * 0.5 if ".lora_B." in key else value)


def test_transformers_have_no_kohya_names(tmp_path, monkeypatch):
    def load(model, *, scheduler=None):  # diffusers opens this folder only when told that there is no T5
        return quiet(StableDiffusion3Pipeline.from_pretrained(model.id, text_encoder_3=None, tokenizer_3=None))

    monkeypatch.setattr(launch, "load_pipeline", load)
    run, tuned, call = make_run(tmp_path, stable_diffusion_3)
    with pytest.raises(ConfigError, match=r"StableDiffusion3Pipeline has a transformer: use --format diffusers"):
        export.export_run(run, ["diffusers", "kohya"])
    assert not (run / "export").exists()  # refused before anything was written
    lora, merged = export.export_run(run, ["diffusers", "merged"])
    plain = load(Model(id=str(run.parent / "base")))
    plain.load_lora_weights(str(lora.path.parent))
    torch.testing.assert_close(plain_images(plain, call), plain_images(tuned, call), rtol=0, atol=1e-5)
    assert merged.difference < 1e-4


def test_dora_goes_to_diffusers_and_not_to_kohya(tmp_path):
    run, tuned, call = make_run(tmp_path, dora=True)
    with pytest.raises(ConfigError, match=r"is a DoRA.*use --format diffusers, or merged"):
        export.export_run(run, ["kohya"])
    lora, merged = export.export_run(run, ["diffusers", "merged"])
    plain = base(run)
    plain.load_lora_weights(str(lora.path.parent))
    torch.testing.assert_close(plain_images(plain, call), plain_images(tuned, call), rtol=0, atol=1e-5)
    loaded = quiet(DiffusionPipeline.from_pretrained(merged.path))
    torch.testing.assert_close(plain_images(loaded, call), plain_images(tuned, call), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["drop a layer", "rename a layer", "scale a layer", "rename all", "lose alpha"])
def test_a_file_that_loads_back_differently_is_an_error(damage, shared, tmp_path, monkeypatch):
    """diffusers says nothing of most of these."""
    real = export.to_kohya
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"

    def broken(state):
        made = real(state)
        if damage == "scale a layer":
            made[f"{layer}.lora_up.weight"] = made[f"{layer}.lora_up.weight"] * 1.5
        if damage == "lose alpha":
            return {key: torch.tensor(8.0) if key.endswith(".alpha") else value for key, value in made.items()}
        if damage == "rename all":
            return {key.replace("_attentions_", "_attention_"): value for key, value in made.items()}
        parts = [key for key in made if key.startswith(layer + ".")]
        for key in parts if damage.endswith("a layer") and "scale" not in damage else ():
            value = made.pop(key)
            if damage == "rename a layer":
                made[key.replace("to_q", "to_w")] = value
        return made

    monkeypatch.setattr(export, "to_kohya", broken)
    with pytest.raises(RewardTuneError, match=r"(does not load|tensors differ).*kohya\.unverified: do not use it"):
        export.export_run(shared[0], ["kohya"], output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kohya.unverified"]
    assert [path.name for path in (tmp_path / "kohya.unverified").iterdir()] == ["tune.unverified"]


def test_a_merge_that_misses_one_layer_is_an_error(shared, tmp_path, monkeypatch):
    real = export.write_merged

    def forgetful(pipe, component, state, folder):
        layer = next(key for key in state if "to_q.lora_B" in key)
        return real(pipe, component, {**state, layer: state[layer] * 0}, folder)

    monkeypatch.setattr(export, "write_merged", forgetful)
    with pytest.raises(RewardTuneError, match=r"1 merged weights are not the base plus the LoRA, first: .*to_q.weight"):
        export.export_run(shared[0], ["merged"], output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["merged.unverified"]
    assert (tmp_path / "merged.unverified" / "unet" / "diffusion_pytorch_model.unverified").is_file()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rounding_of_a_half_precision_merge_is_said():
    """bfloat16 has 8 bits: a change of 1e-4 of the weight is lost nearly whole, one of its own size is kept."""
    base_, merged = torch.nn.Linear(64, 64, bias=False).bfloat16(), torch.nn.Linear(64, 64, bias=False).bfloat16()
    generator = torch.Generator().manual_seed(0)
    base_.weight.data = torch.randn(64, 64, generator=generator).bfloat16()
    wrap = torch.nn.ModuleDict
    for size, low, high in ((1e-4, 0.5, 20.0), (1.0, 0.0, 0.01)):
        up, down = torch.randn(64, 4, generator=generator) * size, torch.randn(4, 64, generator=generator)
        state = {"to_q.lora_A.weight": down, "to_q.lora_B.weight": up}
        merged.weight.data = (base_.weight.float() + up @ down).bfloat16()
        assert low < export.check_merged(wrap({"to_q": base_}), wrap({"to_q": merged}), state) < high


def test_header(shared, tmp_path):
    lora, kohya = export.export_run(shared[0], ["diffusers", "kohya"], output=tmp_path)
    for made in (lora, kohya):
        with safe_open(made.path, framework="pt") as file:
            header = file.metadata()
        assert header["modelspec.sai_model_spec"] == "1.0.0"
        assert header["modelspec.architecture"] == "StableDiffusionPipeline/lora"  # tiny: no Stable Diffusion 1
        assert "ss_base_model_version" not in header
        assert header["modelspec.title"] == header["ss_output_name"] == "tune"
        assert header["modelspec.resolution"] == "16x16"
        assert header["modelspec.date"] == FACTS["time"]
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
        assert json.loads(header["ss_network_args"]) == {"conv_dim": 4, "conv_alpha": 4}
        assert header["ss_network_module"] == "networks.lora"
        assert header["ss_sd_model_name"] == "base"  # no path of the author's machine
        assert str(tmp_path.parent) not in json.dumps(header)
        data = made.path.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert header["sshs_model_hash"] == digest
        assert header["modelspec.hash_sha256"] == f"0x{digest}"
    settings = json.loads(safe_open(lora.path, framework="pt").metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 4


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"in_channels": 4, "cross_attention_dim": 768}, ("stable-diffusion-v1", "sd_v1")),
        ({"in_channels": 4, "cross_attention_dim": 1024}, ("stable-diffusion-v2-512", "sd_v2")),
        (
            {"in_channels": 4, "cross_attention_dim": 2048, "addition_embed_type": "text_time"},
            ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        ),
        ({"in_channels": 9, "cross_attention_dim": 768}, ("SimpleNamespace", None)),  # inpainting
    ],
)
def test_architecture_is_read_off_the_denoiser(config, name):
    from rewardtune.modelcard import architecture_of

    pipe = SimpleNamespace(
        unet=SimpleNamespace(config=config), scheduler=SimpleNamespace(config={"prediction_type": "epsilon"})
    )
    assert architecture_of(pipe) == name


@pytest.mark.parametrize("name", ["checkpoint-test", "my optimizer", "Scheduler/../x"])
def test_file_names_that_loaders_take(name):
    stem = export.file_stem(name)
    assert not any(word in stem.lower() for word in ("checkpoint", "optimizer", "scheduler"))
    assert "/" not in stem
    assert stem


def test_exports_are_replaced_and_foreign_folders_are_not(shared, tmp_path):
    (first,) = export.export_run(shared[0], output=tmp_path, weight=0.5)
    (again,) = export.export_run(shared[0], output=tmp_path)
    assert first.path == again.path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diffusers"]
    assert json.loads((tmp_path / "diffusers" / "export.json").read_text())["weight"] == 1.0
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"merged exists and is no earlier export; choose another --output"):
        export.export_run(shared[0], ["merged"], output=tmp_path)
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def test_full_disk_keeps_the_earlier_export(shared, tmp_path, monkeypatch):
    (made,) = export.export_run(shared[0], output=tmp_path)
    old = made.path.read_bytes()

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(RewardTuneError, match=r"cannot write .*diffusers: No space left on device"):
        export.export_run(shared[0], output=tmp_path, weight=0.5)
    assert made.path.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["diffusers"]


def copy_of(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("export"))


def test_checkpoints_are_chosen_by_number(shared, tmp_path):
    run = copy_of(shared[0], tmp_path)
    for step in (10, 200):
        (run / f"checkpoint-{step}").mkdir()
        state = {key: value * step if "lora_B" in key else value for key, value in load_file(run / LORA_FILE).items()}
        save_file(state, run / f"checkpoint-{step}" / LORA_FILE)
    (run / "checkpoint-old").mkdir()
    for choice, folder in ((10, "checkpoint-10"), ("10", "checkpoint-10"), ("latest", "checkpoint-200")):
        opened = export.open_run(run, checkpoint=choice)
        assert opened.file == run / folder / LORA_FILE
        assert opened.checkpoint == folder.removeprefix("checkpoint-")
    assert export.open_run(run).checkpoint == "best"
    with pytest.raises(ConfigError, match=r"no checkpoint 7; legal: best, latest, or a number of: 10, 200"):
        export.open_run(run, checkpoint=7)
    with pytest.raises(ConfigError, match=r"no checkpoint 'newest'"):
        export.open_run(run, checkpoint="newest")


def test_wrong_input_is_refused_by_name(shared, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown export format 'kohja'.*kohya.*legal: diffusers, kohya, merged"):
        export.export_run(shared[0], ["kohja"])
    with pytest.raises(ConfigError, match="weight 0: must be greater than 0"):
        export.export_run(shared[0], weight=0)
    with pytest.raises(ConfigError, match="no run folder"):
        export.export_run(tmp_path / "nowhere")
    run = copy_of(shared[0], tmp_path)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no config.yaml to tell the base model; add --model"):
        export.export_run(run)
    (run / LORA_FILE).rename((run / LORA_FILE).with_suffix(".unverified"))
    with pytest.raises(ConfigError, match=r"holds no pytorch_lora_weights.safetensors \(only .* failed its check\)"):
        export.export_run(run)
    assert not (shared[0] / "export").exists()


def test_a_full_fine_tuning_is_exported_merged(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    run = made_run(tmp_path / "out", model, kind="full")
    for formats, words in [(["diffusers"], "no LoRA to export: use --format merged"), (["kohya"], "no LoRA")]:
        with pytest.raises(ConfigError, match=words):
            export.export_run(run, formats)
    with pytest.raises(ConfigError, match="no LoRA to weaken: leave --weight out"):
        export.export_run(run, ["merged"], weight=0.5)
    (made,) = export.export_run(run, ["merged"])
    assert "the fine-tuning itself" in str(made)
    assert made.difference < 1e-6 < made.effect
    loaded = quiet(DiffusionPipeline.from_pretrained(made.path))
    expected, found = load_file(run / "denoiser" / "diffusion_pytorch_model.safetensors"), loaded.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())

    def other(pipe, component, state, folder):
        return write_whole(pipe, component, {key: value * 1.01 for key, value in state.items()}, folder)

    write_whole = export.write_whole
    monkeypatch.setattr(export, "write_whole", other)
    with pytest.raises(RewardTuneError, match="saved weights are not the trained ones"):
        export.export_run(run, ["merged"])
    (run / "denoiser" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        export.export_run(run, ["merged"])


def test_a_lora_of_another_model_is_refused(shared, tmp_path):
    run = copy_of(shared[0], tmp_path)
    state = load_file(run / LORA_FILE)
    save_file({key.replace("down_blocks.1", "down_blocks.7"): value for key, value in state.items()}, run / LORA_FILE)
    with pytest.raises(ConfigError, match=r"does not fit this UNet2DConditionModel: .* first: down_blocks.7"):
        export.export_run(run)
    save_file({key.replace("unet.", "transformer."): value for key, value in state.items()}, run / LORA_FILE)
    with pytest.raises(ConfigError, match=r"belong to no LoRA of the unet.*is it made for another model"):
        export.export_run(run)


def test_alpha_in_the_header_is_folded(shared, tmp_path):
    """Files of other writers carry alpha beside the tensors."""
    state = {"unet.x.lora_A.weight": torch.ones(4, 2), "unet.x.lora_B.weight": torch.ones(3, 4)}
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    read = export.read_lora(tmp_path / "a.safetensors", "unet")
    assert torch.equal(read["x.lora_B.weight"], torch.full((3, 4), 0.5))
    assert torch.equal(read["x.lora_A.weight"], torch.ones(4, 2))


# Push -----------------------------------------------------------------------------------------------------------------


class FakeApi:
    """What push uses of huggingface_hub.HfApi, kept in memory."""

    def __init__(self, *, public: bool = False, fail: Exception | None = None):
        self.public, self.fail, self.files, self.calls = public, fail, {}, []

    def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create_repo", repo, private, exist_ok))
        return f"https://huggingface.co/{repo}"

    def model_info(self, repo: str, **_: Any) -> Any:
        return SimpleNamespace(private=not self.public, card_data=None)

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: str, commit_message: str, delete_patterns: list[str]
    ) -> None:
        if self.fail:
            raise self.fail
        self.removed = delete_patterns
        root = Path(folder_path)
        self.files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_push_uploads_the_verified_files_and_the_card(shared, tmp_path):
    api = FakeApi()
    run = copy_of(shared[0], tmp_path)
    pushed = export.push_run(
        run, "ann/tune", private=True, formats=["kohya"], api=api, model=str(shared[0].parent / "base")
    )
    assert api.calls == [("create_repo", "ann/tune", True, True)]
    assert sorted(api.files) == ["README.md", "kohya/run.safetensors", LORA_FILE]
    assert b"ann/tune" in api.files["README.md"]
    assert api.files[LORA_FILE] == (run / "export" / "diffusers" / LORA_FILE).read_bytes()
    assert pushed.url == "https://huggingface.co/ann/tune"
    assert any("licence of the base model is unknown" in note for note in pushed.notes)


def test_push_needs_a_token_and_never_asks(shared, tmp_path, monkeypatch):
    run = copy_of(shared[0], tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.login", lambda *_, **__: pytest.fail("asked for a login"))
    with pytest.raises(ConfigError, match=r"no Hugging Face token: .*HF_TOKEN.*hf auth login.*--dry-run"):
        export.push_run(run, "ann/tune")
    assert not (run / "export").exists()
    pushed = export.push_run(run, "ann/tune", dry_run=True)
    assert pushed.url is None
    assert (pushed.folder / "README.md").is_file()


@pytest.mark.parametrize("repo", ["tune", "ann/tune/x", "ann/ tune", ""])
def test_push_refuses_a_bad_name(repo, shared):
    with pytest.raises(ConfigError, match="write user/name"):
        export.push_run(shared[0], repo, api=FakeApi())


def test_push_says_what_went_wrong_and_keeps_the_folder(shared, tmp_path):
    run = copy_of(shared[0], tmp_path)
    with pytest.raises(
        RewardTuneError, match=r"upload to ann/tune failed: no route.*push again, or `hf upload ann/tune"
    ):
        export.push_run(run, "ann/tune", api=FakeApi(fail=ConnectionError("no route\nto host")))
    assert (run / "export" / "hub" / "README.md").is_file()
    public = FakeApi(public=True)
    with pytest.raises(ConfigError, match="exists and is public"):
        export.push_run(run, "ann/tune", private=True, api=public)
    assert not public.files


# Weights of a DoRA ----------------------------------------------------------------------------------------------------


def test_the_weight_of_a_dora_is_written_into_its_file(tmp_path):
    run, tuned, _ = make_run(tmp_path, dora=True)
    tuned.unet.unload_lora()
    state = {key: value * 1.5 if "magnitude" in key else value for key, value in load_file(run / LORA_FILE).items()}
    save_file(state, run / LORA_FILE)
    (made,) = export.export_run(run, weight=0.5)
    for key, value in load_file(made.path).items():
        if "magnitude" in key:
            layer = key.removeprefix("unet.").partition(".lora_")[0]
            norm = tuned.unet.get_submodule(layer).weight.norm(dim=1)
            torch.testing.assert_close(value, (norm + state[key]) / 2)


# Runs without a run file, or whose prompt file is gone ----------------------------------------------------------------


def test_a_run_from_python_has_its_prompts_and_scheduler(tmp_path):
    """run.json holds both; no run file does."""
    (tmp_path / LORA_FILE).touch()
    told = {"eval_prompts": ["a red heart", "a moon"], "scheduler": "DDIMScheduler"}
    (tmp_path / "run.json").write_text(json.dumps(FACTS | told))
    opened = export.open_run(tmp_path, model="playground")
    assert (opened.prompts, opened.scheduler, opened.notes) == (("a red heart", "a moon"), "DDIMScheduler", ())
    (tmp_path / "run.json").write_text(json.dumps(FACTS | {"scheduler": "OneOfTheBasesOwn"}))
    opened = export.open_run(tmp_path, model="playground")
    assert (opened.prompts, opened.scheduler) == ((), None)


def test_prompts_outlive_their_file_but_pictures_do_not(tmp_path):
    (tmp_path / LORA_FILE).touch()
    (tmp_path / "run.json").write_text(json.dumps(FACTS | {"eval_prompts": ["a red heart"]}))
    for source in ("gone.jsonl", {"source": "gone.jsonl", "columns": ["image"]}):
        values = {"model": "playground", "output_dir": str(tmp_path), **BASE, "prompts": source}
        (tmp_path / "config.yaml").write_text(dump_config(RunConfig.model_validate(values)))
        if isinstance(source, str):
            assert export.open_run(tmp_path).prompts == ("a red heart",)
        else:
            with pytest.raises(ConfigError, match=r"prompt file gone\.jsonl does not exist"):
                export.open_run(tmp_path)


def test_a_rank_of_its_own_for_some_layers_is_refused(tmp_path):
    """alpha / rank differs by layer then."""
    state = {"unet.x.lora_A.weight": torch.ones(8, 2), "unet.x.lora_B.weight": torch.ones(3, 8)}
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"x": 8}})
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ConfigError, match="a scale of its own for some layers"):
        export.read_lora(tmp_path / "a.safetensors", "unet")


def test_bases_of_an_export_are_not_compiled(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(launch, "load_pipeline", lambda model, *, scheduler: loaded.append(model.compile))
    model = Model(id="playground", compile=True)
    run = export.Run(
        folder=tmp_path, file=tmp_path, model=model, scheduler=None, prompts=(), call={}, facts={}, config=None
    )
    export._Trained.base(SimpleNamespace(run=run))
    assert loaded == [False]


def test_a_merged_dora_is_compared_by_its_weights():
    """m (W + B A) / ||W + B A||; a forgotten length is found, and what bfloat16 rounds away is told."""
    generator = torch.Generator().manual_seed(0)
    W, down, up = (torch.randn(*shape, generator=generator) for shape in ((64, 32), (4, 32), (64, 4)))
    wrap = torch.nn.ModuleDict
    base_, merged = (torch.nn.Linear(32, 64, bias=False) for _ in range(2))
    for size, dtype, low, high in ((1.0, torch.float32, 0, 1e-4), (1e-3, torch.bfloat16, 0.5, 20)):
        old = base_.to(dtype).weight.data = W.to(dtype)
        tuned = old.float() + size * up @ down
        m = (1 + size) * old.float().norm(dim=1)
        merged.to(dtype).weight.data = (m[:, None] * tuned / tuned.norm(dim=1, keepdim=True)).to(dtype)
        state = {"to_q.lora_A.weight": down, "to_q.lora_B.weight": size * up, "to_q.lora_magnitude_vector": m}
        assert low <= export.check_merged(wrap({"to_q": base_}), wrap({"to_q": merged}), state) < high
        state["to_q.lora_magnitude_vector"] = 2 * m
        with pytest.raises(RewardTuneError, match="1 merged weights are not the base plus the LoRA"):
            export.check_merged(wrap({"to_q": base_}), wrap({"to_q": merged}), state)


def test_a_dry_run_says_that_the_licence_is_looked_up_later(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_run", lambda *_, **__: [])
    run = copy_of(shared[0], tmp_path)
    pushed = export.push_run(run, "ann/tune", dry_run=True, model="me/base")
    assert any("looked up when this is pushed" in note for note in pushed.notes)
    assert "looked up when this is pushed" in (pushed.folder / "README.md").read_text()
    asked = export.push_run(run, "ann/tune", api=FakeApi(), model="me/base")  # its card has no licence
    assert any("the licence of the base model is unknown" in note for note in asked.notes)


def test_a_push_removes_what_an_earlier_one_left_and_nothing_else(shared, tmp_path, monkeypatch):
    run, api = copy_of(shared[0], tmp_path), FakeApi()
    (tmp_path / "made.safetensors").touch()
    made = {
        "diffusers": SimpleNamespace(format="diffusers", path=tmp_path / "made.safetensors", notes=()),
        "kohya": SimpleNamespace(format="kohya", path=tmp_path / "run.safetensors", notes=()),
    }
    (tmp_path / "run.safetensors").touch()
    monkeypatch.setattr(export, "export_run", lambda run, formats, **_: [made[name] for name in formats])
    monkeypatch.setattr("rewardtune.modelcard.write_card", lambda *_, **__: ())
    pictures = [f"images/00{index}.png" for index in range(4)]
    export.push_run(run, "ann/tune", api=api, formats=["kohya"])
    assert api.removed == ["before_after.png", *pictures]
    export.push_run(run, "ann/tune", api=api)
    assert api.removed == ["kohya/run.safetensors", "before_after.png", *pictures]


def test_run_json_keeps_lists_of_the_call(tmp_path):
    """What a run from Python is sampled with afterwards; tensors and pictures it cannot keep."""
    from rewardtune import RewardTuner, methods

    call = {"timesteps": [999, 499], "cross_attention_kwargs": {"scale": 0.5}, "sigmas": (torch.ones(1),)}
    tuner = RewardTuner(
        stable_diffusion(lora=False)[0],
        reward=lambda images, prompts: images.mean((1, 2, 3)),
        method=methods.drtune(K=1, m=1),
        prompts=["red heart"],
        output_dir=tmp_path,
        num_inference_steps=2,
        guidance_scale=3.0,
        call=call,
    )
    tuner.T = 2
    kept = json.loads(json.dumps(tuner._describe()))["call"]
    assert kept == {"num_inference_steps": 2, "guidance_scale": 3.0} | {key: call[key] for key in list(call)[:2]}
