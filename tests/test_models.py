"""Loading: every kind of model, and settings that do not fit refused before any weights load."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from judge import plain_images
from ldm import save_single_file
from safetensors.torch import save_file
from tiny import fresh
from tiny_runs import redness, write_run

from rewardtune import RewardTuner, adapters, cli, evaluate, launch, methods, models
from rewardtune.engine import count_steps, rollout
from rewardtune.errors import ConfigError, missing_package
from rewardtune.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipe, _ = tiny.stable_diffusion(lora=False)
    pipe.save_pretrained(path)
    return path


def test_a_scheduler_named_in_a_run_file_does_not_clip_latents():
    """DDIM clips to -1 .. 1 by default, which is for pixels; a configuration of Euler says nothing of it."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    assert not models.make_scheduler("DDIMScheduler", EulerDiscreteScheduler()).config.clip_sample
    assert models.make_scheduler("DDIMScheduler", DDIMScheduler(clip_sample=True)).config.clip_sample


def test_folder_gives_the_pictures_of_the_pipeline_that_was_saved(folder):
    pipe, call = tiny.stable_diffusion(steps=2, lora=False)
    loaded = models.load_pipeline(str(folder), device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        saved, read = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[key], read[key]) for key in saved)
    # Weights mapped from a file lie at other addresses, so the CPU may round their products differently.
    assert torch.allclose(plain_images(loaded, call), plain_images(pipe, call), rtol=0, atol=1e-5)


def test_single_file_of_the_layout_of_stable_diffusion(folder, tmp_path):
    """diffusers' converter reads the published layout; a wrong key or a transposed weight would change the pictures."""
    pipe, call = tiny.stable_diffusion(steps=2, lora=False)
    file = save_single_file(pipe, tmp_path / "model.safetensors")
    loaded = models.load_pipeline(str(file), config=str(folder), device="cpu")
    assert torch.allclose(plain_images(loaded, call), plain_images(pipe, call), rtol=0, atol=1e-5)


def test_files_that_are_no_pipeline(folder, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, lora)
    with pytest.raises(ConfigError, match=r"lora.safetensors .*holds the whole pipeline|holds no weights for"):
        models.load_pipeline(str(lora), config=str(folder), device="cpu")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"broken.safetensors cannot be read"):
        models.load_pipeline(str(broken), device="cpu")


MISFITS = [
    ({"id": "no/such.safetensors"}, r"model no/such.safetensors: no such file"),
    ({"id": "/no/such/folder"}, r"model /no/such/folder: there is no such folder; give .* hub id \(owner/name\)"),
    ({"id": "model.ckpt"}, r"a pickled file may run any code.*\.safetensors"),
    ({"id": "playground", "revision": "main"}, r"model.revision='main' is for hub ids"),
    ({"id": "playground", "variant": "fp16"}, r"model.variant='fp16' is for hub ids and folders"),
    ({"id": "playground", "config": "x"}, r"model.config='x' is for a single .safetensors file"),
    ({"id": "playground", "quantize": "nf4"}, r"model.quantize='nf4' is for hub ids and diffusers folders"),
    ({"id": "FOLDER", "variant": "fp16"}, r"cannot be loaded: .*variant=fp16"),
    ({"id": "FOLDER", "dtype": "float15"}, r"model.dtype='float15' \(did you mean 'float16'\?\); legal are float32"),
    ({"id": "FOLDER", "vae_dtype": "float16"}, r"memory.vae_dtype='float16'; a VAE in float16 gives black pictures"),
    ({"id": "FOLDER", "device": "gpu"}, r"model.device='gpu': no such device; legal are auto"),
    ({"id": "FOLDER", "scheduler": "DDIMSheduler"}, r"did you mean 'DDIMScheduler'"),
    ({"id": "FOLDER", "quantize": "int4", "device": "cpu"}, r"model.quantize='int4'.*legal are int8, nf4, null"),
    ({"id": "FOLDER", "quantize": "int8", "device": "cpu"}, r"needs a CUDA device, but the model is put on cpu"),
]


@pytest.mark.parametrize(("settings", "message"), MISFITS)
def test_settings_that_do_not_fit(settings, message, folder):
    given = {key: str(folder) if value == "FOLDER" else value for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        models.load_pipeline(**given)


def test_an_empty_folder_and_a_bad_config(tmp_path):
    with pytest.raises(ConfigError, match=r"the folder has no model_index.json"):
        models.load_pipeline(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match=r"model.config=.*: no model_index.json there"):
        models.load_pipeline(str(tmp_path / "m.safetensors"), config=str(tmp_path))


def test_quantising_without_its_extra(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'rewardtune\[quantize\]'"):
        models.load_pipeline(str(folder), quantize="nf4", device="cuda")


@pytest.mark.parametrize(("name", "field"), [("int8", "load_in_8bit"), ("nf4", "load_in_4bit")])
def test_the_denoiser_alone_is_quantised(name, field, folder, monkeypatch):
    """What diffusers is asked for; that it works is for a machine with CUDA and bitsandbytes."""
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.48.0")
    asked = models._quantization(str(folder), name, torch.bfloat16, None).quant_mapping
    assert list(asked) == ["unet"]
    assert getattr(asked["unet"], field)
    if name == "nf4":
        assert asked["unet"].bnb_4bit_quant_type == "nf4"
        assert asked["unet"].bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "vae_dtype", "expected"),
    [
        ("float16", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", None, torch.float32),
    ],
)
def test_dtypes(dtype, vae_dtype, expected, folder):
    pipe = models.load_pipeline(str(folder), dtype=dtype, vae_dtype=vae_dtype, device="cpu")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == getattr(torch, dtype)
    assert pipe.vae.dtype == expected


def gradient(pipe, call):
    """Gradient of a fixed weighting of the pictures at two trained steps, and the pictures."""
    denoiser = tiny.denoiser_of(pipe)
    for p in denoiser.parameters():
        p.grad = None
    with rollout(pipe, Plan(T=4, train=frozenset({1, 3})), **fresh(call)) as tape:
        weights = torch.linspace(-1, 1, tape.images.numel()).view_as(tape.images)
        sweep = tape.backward((tape.images * weights).mean())
    return tape.images.detach(), [p.grad for p in denoiser.parameters() if p.requires_grad], sweep


@pytest.mark.parametrize("build", [tiny.stable_diffusion, tiny.stable_diffusion_3, tiny.flux])
def test_gradient_checkpointing_changes_no_bit_of_the_gradient(build):
    pipe, call = build()
    pictures, plain, _ = gradient(pipe, call)
    denoiser, recomputed = tiny.denoiser_of(pipe), []
    models.checkpoint_blocks(denoiser)
    block = next(module for name, module in denoiser.named_modules() if name.endswith("attn1") or name.endswith("attn"))
    block.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    same, checkpointed, sweep = gradient(pipe, call)
    assert torch.equal(pictures, same)
    assert sweep.replay_error == 0
    assert sum(recomputed) >= 4  # each of the two trained calls runs with a graph twice: forward and recomputed
    for one, other in zip(plain, checkpointed, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_offloaded_vae_changes_neither_pictures_nor_gradients():
    pipe, call = tiny.stable_diffusion()
    pipe.to("cuda")
    pictures, plain, _ = gradient(pipe, call)
    where = []
    handle = pipe.unet.register_forward_hook(lambda *_: where.append(pipe.vae.device.type))
    with models.offloaded_vae(pipe):
        same, offloaded, _ = gradient(pipe, call)
        assert set(where) == {"cpu"}
    handle.remove()
    assert pipe.vae.device.type == "cuda"
    assert torch.equal(pictures, same)
    for one, other in zip(plain, offloaded, strict=True):
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_there_is_nothing_to_offload_on_the_cpu():
    pipe, _ = tiny.stable_diffusion()
    with models.offloaded_vae(pipe):
        assert not hasattr(pipe.vae, "_hf_hook")


def test_models_without_checkpointing_or_repeated_blocks_say_so():
    with pytest.raises(ConfigError, match="Linear has no gradient checkpointing"):
        models.checkpoint_blocks(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"model.compile: Linear names no repeated blocks"):
        models.compile_blocks(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_compiled_blocks_give_the_gradient_of_the_plain_ones():
    """Slow: it compiles. `aot_eager` traces the same two graphs, to sample and for gradients, without generated C++."""
    pipe, call = tiny.stable_diffusion()
    pictures, plain, _ = gradient(pipe, call)
    models.compile_blocks(pipe.unet, backend="aot_eager")
    compiled_pictures, compiled, sweep = gradient(pipe, call)
    assert torch.allclose(pictures, compiled_pictures, rtol=0, atol=1e-4)
    assert sweep.replay_error < 1e-5
    for one, other in zip(plain, compiled, strict=True):
        assert one is None or float((one - other).norm()) <= 1e-3 * float(one.norm()) + 1e-9
    assert "_compiled_call_impl" not in vars(pipe.unet)  # the door's place is free again


def test_the_playground_loads():
    pipe = models.load_pipeline(
        "playground", device="cpu", gradient_checkpointing=True, scheduler="EulerDiscreteScheduler"
    )
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.unet.is_gradient_checkpointing
    assert adapters.attach(pipe.unet, rank=2)
    assert json.loads(json.dumps(pipe.unet.config["in_channels"])) == 4


# -- optional packages of diffusers ----------------------------------------------------------------------------------


@pytest.fixture
def without_ftfy(monkeypatch):
    """PRX, which uses the name ftfy whether it was imported or not, where ftfy is not installed."""
    pipe, call = zoo.PIPELINES["PRXPipeline"]()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.delattr(sys.modules[type(pipe).__module__], "ftfy", raising=False)
    return pipe, call


NO_FTFY = "PRXPipeline needs the package ftfy, which is not installed: pip install ftfy"


def test_a_package_that_the_pipeline_lacks_is_named(without_ftfy, tmp_path):
    pipe, call = without_ftfy
    with pytest.raises(NameError, match="ftfy"):
        pipe(**fresh(call))
    with pytest.raises(ConfigError, match=NO_FTFY):
        count_steps(pipe, **fresh(call))
    with pytest.raises(ConfigError, match=NO_FTFY):
        evaluate.sample(pipe, ["a cat"], seeds=[0], call={"num_inference_steps": 2})
    pipe.transformer.unload_lora()
    tuner = RewardTuner(
        pipe, reward=redness, method=methods.refl(m=1), prompts=["a cat"], output_dir=tmp_path / "run", batch=1,
        num_inference_steps=2, guidance_scale=3.0, rank=2, show_progress=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=NO_FTFY):
        tuner.train(1)


def test_check_names_it(without_ftfy, tmp_path, monkeypatch, capsys):
    pipe, _ = without_ftfy
    pipe.transformer.unload_lora()
    monkeypatch.setattr(launch, "load_pipeline", lambda *_, **__: pipe)
    assert cli.main(["check", str(write_run(tmp_path, Path("playground")))]) == 2
    assert f"error    steps: {NO_FTFY}" in capsys.readouterr().out


def test_a_package_that_loading_lacks_is_named(folder, monkeypatch):
    """diffusers' own words for Kolors without its tokenizer's library; other failed imports stay what they are."""
    words = "\nKolorsPipeline requires the sentencepiece library but it was not found in your environment."

    def fails(*_, **__):
        raise ImportError(words)

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fails)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"needs the package sentencepiece, .*: pip install sentencepiece"):
        models.load_pipeline(str(folder), device="cpu")
    words = "cannot import name 'x' from 'y'"
    with pytest.raises(ImportError, match="cannot import name"):
        models.load_pipeline(str(folder), device="cpu")


def test_other_names_are_bugs_and_stay_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert missing_package(NameError("name 'ftfy' is not defined", name="ftfy")) == "ftfy"
    assert missing_package(NameError("name 'fty' is not defined", name="fty")) is None
    assert missing_package(ImportError("cannot import name 'Image' from 'PIL'", name="PIL")) is None
    assert missing_package(ValueError("ftfy")) is None
    monkeypatch.setitem(sys.modules, "ftfy", pytest)  # it is there: then its name is missing for another reason
    assert missing_package(NameError("name 'ftfy' is not defined", name="ftfy")) is None
