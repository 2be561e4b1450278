"""The LoRA file: plain diffusers gives the tuned pipeline's very pictures, and a file that does not is an error."""

import errno
import shutil

import pytest
import torch
import zoo
from judge import plain_images
from safetensors.torch import load_file, save_file
from tiny import denoiser_of, set_scheduler, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tiny_runs import BASE, full_disk, write_run

from rewardtune import adapters, cli
from rewardtune.errors import ConfigError, RewardTuneError
from rewardtune.runfolder import LORA_FILE


def without_lora(build):
    """The builder's pipeline as it would come from a user: no adapter on it."""
    pipe, call = build()
    if getattr(denoiser_of(pipe), "peft_config", None):
        denoiser_of(pipe).unload_lora()
    return pipe, call


def tuned(build=stable_diffusion, *, rank=4, alpha=None, targets=None):
    pipe, call = without_lora(build)
    denoiser = denoiser_of(pipe)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.add_lora(denoiser, rank, alpha=alpha, targets=targets):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe, call


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3])
def test_plain_diffusers_gives_identical_pictures(build, tmp_path):
    pipe, call = tuned(build)
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(build)
    base = plain_images(plain, call)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(plain_images(plain, call), plain_images(pipe, call))
    assert (base - plain_images(pipe, call)).abs().max() > 0.01  # the LoRA does something


@pytest.mark.parametrize(("alpha", "tolerance"), [pytest.param(8, 0.0, marks=pytest.mark.slow), (1, 0.0), (3, 1e-5)])
def test_alpha_is_folded(alpha, tolerance, tmp_path):
    """Exactly where alpha / rank is a power of two, to round-off elsewhere; losing alpha=3 would show at 1e-2."""
    pipe, call = tuned(alpha=alpha)
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(stable_diffusion)
    plain.load_lora_weights(tmp_path)
    assert (plain_images(plain, call) - plain_images(pipe, call)).abs().max() <= tolerance
    pipe.unet.peft_config["rewardtune"].lora_alpha = 4
    for module in pipe.unet.modules():
        if hasattr(module, "scaling"):
            module.scaling["rewardtune"] = 1.0
    assert (plain_images(plain, call) - plain_images(pipe, call)).abs().max() > 0.003


def test_convolutions_too(tmp_path):
    pipe, call = tuned(targets="attention+conv")
    assert any("conv" in name for name in adapters.lora_state(pipe.unet))
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(stable_diffusion)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(plain_images(plain, call), plain_images(pipe, call))


def test_new_lora_changes_nothing_and_depends_on_its_seed_alone():
    pipe, call = without_lora(stable_diffusion)
    before = plain_images(pipe, call)
    state = torch.get_rng_state()
    adapters.add_lora(pipe.unet, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(plain_images(pipe, call), before)
    first = adapters.lora_state(pipe.unet)
    torch.rand(3)
    again, _ = without_lora(stable_diffusion)
    adapters.add_lora(again.unet, 4, seed=1)
    assert all(torch.equal(value, first[key]) for key, value in adapters.lora_state(again.unet).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_are_float32_on_a_half_base(dtype):
    pipe, _ = without_lora(stable_diffusion)
    pipe.unet.to(dtype)
    parameters = adapters.add_lora(pipe.unet, 4)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert {parameter.dtype for parameter in pipe.unet.parameters() if not parameter.requires_grad} == {dtype}


def test_targets_that_match_nothing_name_the_legal_ones():
    pipe, _ = without_lora(stable_diffusion)
    with pytest.raises(ConfigError, match=r"to_w match no layer; legal suffixes here: .*to_q"):
        adapters.add_lora(pipe.unet, 4, targets=["to_q", "to_w"])
    with pytest.raises(ConfigError, match=r"'atention': legal are attention"):
        adapters.add_lora(pipe.unet, 4, targets="atention")


def test_a_second_lora_is_refused():
    pipe, _ = tuned()
    with pytest.raises(ConfigError, match=r"carries LoRA adapters already \(rewardtune\)"):
        adapters.add_lora(pipe.unet, 4)


def few_steps(call):
    return {key: value for key, value in call.items() if key != "generator"} | {"num_inference_steps": 2}


def test_verify_accepts_what_was_saved_and_leaves_the_adapter_active(tmp_path):
    pipe, call = tuned(alpha=8)
    before = plain_images(pipe, call)
    adapters.save_lora(pipe, tmp_path)
    assert adapters.verify_lora(pipe, tmp_path, call=few_steps(call)) == 0
    assert list(pipe.unet.peft_config) == ["rewardtune"]
    assert torch.equal(plain_images(pipe, call), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in pipe.unet.named_parameters())


@pytest.mark.parametrize("damage", ["rename one", "rename all", "drop one", "scale one", "truncate"])
def test_verify_finds_a_damaged_file(damage, tmp_path):
    pipe, call = tuned()
    path = adapters.save_lora(pipe, tmp_path)
    state = load_file(path)
    key = next(key for key in sorted(state) if "lora_B" in key)
    if damage == "rename one":
        state[key.replace("to_", "tu_")] = state.pop(key)
    if damage == "rename all":
        state = {name.replace("attentions", "attention"): value for name, value in state.items()}
    if damage == "drop one":
        del state[key]
    if damage == "scale one":
        state[key] = state[key] * 1.5
    save_file(state, path, metadata={"format": "pt"})
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RewardTuneError, match=r"does not load|differs from the trained one"):
        adapters.verify_lora(pipe, tmp_path, call=few_steps(call))
    assert list(pipe.unet.peft_config) == ["rewardtune"]


def test_full_disk_keeps_the_old_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    pipe, _ = tuned()
    path = adapters.save_lora(pipe, tmp_path)
    old = path.read_bytes()

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(RewardTuneError, match=r"No space left on device.*intact"):
        adapters.save_lora(pipe, tmp_path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == [LORA_FILE]
    shutil.rmtree(tmp_path)


def test_euler_and_the_rest_of_the_pipeline_do_not_matter(tmp_path):
    """The file belongs to the denoiser: another scheduler loads the same LoRA."""
    pipe, call = tuned()
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(stable_diffusion)
    plain.load_lora_weights(tmp_path)
    for each in (pipe, plain):
        set_scheduler(each, "EulerDiscreteScheduler")
    assert torch.equal(plain_images(plain, call), plain_images(pipe, call))


def dora(build=stable_diffusion, *, rank=4, alpha=None, targets=None, dtype=None):
    """A DoRA away from its start, on a pipeline of `dtype`."""
    pipe, call = without_lora(build)
    if dtype is not None:
        pipe.to(dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.attach(denoiser_of(pipe), kind="dora", rank=rank, alpha=alpha, targets=targets):
        parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pipe, call


def test_dora_is_the_formula_of_its_paper():
    """Eq. 5 of arXiv 2402.09353 for one layer: m (W + s B A) / ||W + s B A|| by rows, applied to x; autograd too.

    The norm is a constant in the gradient (section 4.3 of the paper).
    """
    pipe, _ = dora(alpha=8)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    A, B = layer.lora_A["rewardtune"].weight, layer.lora_B["rewardtune"].weight
    m = layer.lora_magnitude_vector["rewardtune"].weight
    assert A.shape[0] == 4
    V = layer.base_layer.weight + 8 / 4 * B @ A
    expected = x @ (m[:, None] * V / V.norm(dim=1, keepdim=True).detach()).T
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(layer(x).square().sum(), [A, B, m])
    theirs = torch.autograd.grad(expected.square().sum(), [A, B, m])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(("alpha", "tolerance"), [(None, 0.0), (8, 0.0), (3, 1e-5)])
def test_dora_file_gives_plain_diffusers_the_same_pictures(alpha, tolerance, tmp_path):
    """alpha folds exactly where alpha / rank is a power of two, as with LoRA: it scales B A and nothing else."""
    pipe, call = dora(alpha=alpha)
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(stable_diffusion)
    base = plain_images(plain, call)
    plain.load_lora_weights(tmp_path)
    assert any("lora_magnitude_vector" in key for key in load_file(tmp_path / LORA_FILE))
    assert (plain_images(plain, call) - plain_images(pipe, call)).abs().max() <= tolerance
    assert (base - plain_images(pipe, call)).abs().max() > 0.01
    assert adapters.verify(pipe, tmp_path, call=few_steps(call)) <= tolerance


@pytest.mark.parametrize("build", [stable_diffusion_xl, stable_diffusion_3])
def test_dora_of_other_families_and_convolutions(build, tmp_path):
    targets = "attention" if build is stable_diffusion_3 else "attention+conv"
    pipe, call = dora(build, targets=targets)
    adapters.save_lora(pipe, tmp_path)
    plain, _ = without_lora(build)
    plain.load_lora_weights(tmp_path)
    assert torch.equal(plain_images(plain, call), plain_images(pipe, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_dora_changes_nothing(dtype):
    """Norms rounded to bfloat16 would scale every output by up to 0.4 %."""
    pipe, _ = without_lora(stable_diffusion)
    pipe.unet.to(dtype)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = layer(x)
    parameters = adapters.attach(pipe.unet, kind="dora", rank=4, seed=1)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    adapted = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert torch.allclose(adapted(x).float(), before.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("damage", ["drop a norm", "scale a norm"])
def test_verify_finds_a_damaged_dora(damage, tmp_path):
    pipe, call = dora()
    path = adapters.save_lora(pipe, tmp_path)
    state = load_file(path)
    key = next(key for key in sorted(state) if "magnitude" in key)
    if damage == "drop a norm":
        del state[key]
    else:
        state[key] = state[key] * 1.01
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RewardTuneError, match=r"does not load|differs from the trained one"):
        adapters.verify_lora(pipe, tmp_path, call=few_steps(call))
    assert list(pipe.unet.peft_config) == ["rewardtune"]


def fully_tuned():
    pipe, call = without_lora(stable_diffusion)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.attach(pipe.unet, kind="full"):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return pipe, call


def test_full_fine_tuning_is_saved_as_a_denoiser_that_diffusers_loads(tmp_path):
    pipe, call = fully_tuned()
    assert adapters.save(pipe, tmp_path) == tmp_path / "denoiser"
    plain, _ = without_lora(stable_diffusion)
    base = plain_images(plain, call)
    plain.unet = type(plain.unet).from_pretrained(tmp_path / "denoiser")
    assert torch.equal(plain_images(plain, call), plain_images(pipe, call))
    assert (base - plain_images(pipe, call)).abs().max() > 0.01
    assert adapters.verify(pipe, tmp_path, call=call) == 0
    assert sorted(entry.name for entry in (tmp_path / "denoiser").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_verify_finds_a_changed_denoiser(tmp_path):
    pipe, call = fully_tuned()
    path = adapters.save(pipe, tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] = state["conv_in.bias"] + 1e-6
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RewardTuneError, match=r"1 of \d+ tensors, first: \['conv_in.bias'\]"):
        adapters.verify(pipe, tmp_path, call=call)


def test_full_disk_keeps_the_old_denoiser(tmp_path, monkeypatch):
    pipe, _ = fully_tuned()
    path = adapters.save(pipe, tmp_path) / "diffusion_pytorch_model.safetensors"
    old = path.read_bytes()

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(pipe.unet), "save_pretrained", full)
    with pytest.raises(RewardTuneError, match=r"No space left on device.*intact"):
        adapters.save(pipe, tmp_path)
    assert path.read_bytes() == old
    assert len(list(path.parent.iterdir())) == 2


def test_full_fine_tuning_wants_float32():
    pipe, _ = without_lora(stable_diffusion)
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"are bfloat16 here: small updates.*model.dtype=float32"):
        adapters.attach(pipe.unet, kind="full")


def test_kinds_and_the_way_back():
    pipe, call = without_lora(stable_diffusion)
    before = plain_images(pipe, call)
    with pytest.raises(
        ConfigError, match=r"adapter.kind='dorra' \(did you mean 'dora'\?\); legal are lora, dora, full"
    ):
        adapters.attach(pipe.unet, kind="dorra")
    for kind in adapters.KINDS:
        assert adapters.attach(pipe.unet, kind=kind, rank=2)
        adapters.detach(pipe.unet)
        assert not adapters.trainable(pipe.unet)
        assert not getattr(pipe.unet, "peft_config", None)
        assert torch.equal(plain_images(pipe, call), before)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "PixArtAlphaPipeline", "KolorsPAGPipeline"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_line_that_tells_how_to_use_a_run_works(name, weight, tmp_path):
    """Executed as it stands: with diffusers' own loader, without one, and with one that asks for other networks."""
    pipe, call = tuned(zoo.PIPELINES[name])
    adapters.save(pipe, tmp_path)
    plain, _ = without_lora(zoo.PIPELINES[name])
    base = plain_images(plain, call)
    line = adapters.how_to_use(pipe, tmp_path, weight=weight)
    assert ("rewardtune" in line) == (name != "StableDiffusionPipeline")
    exec(line, {"pipe": plain})
    for key, parameter in denoiser_of(pipe).named_parameters():
        if ".lora_B." in key:
            parameter.data *= weight
    assert torch.allclose(plain_images(plain, call), plain_images(pipe, call), atol=1e-5)
    assert (base - plain_images(pipe, call)).abs().max() > 0.001


@pytest.mark.slow  # trains
def test_the_command_prints_that_line(tmp_path, capsys):
    pipe, _ = without_lora(zoo.PIPELINES["PixArtAlphaPipeline"])
    pipe.save_pretrained(tmp_path / "tiny")
    own = {"sampling": BASE["sampling"] | {"call": {"use_resolution_binning": False}}, "eval": {"count": 1}}
    run = write_run(tmp_path, tmp_path / "tiny", optim={"steps": 1, "lr": 1e-3, "batch": 1}, **own)
    assert cli.main(["train", str(run)]) == 0, capsys.readouterr()
    line = f"use it: from rewardtune.adapters import load_lora; load_lora(pipe, '{tmp_path / 'out'}'), or: rewardtune"
    assert line in capsys.readouterr().out


def test_the_weight_of_a_dora_goes_from_the_base_to_the_trained_model():
    """Its magnitudes too: with the products alone, weight 0 would keep the trained lengths."""
    pipe, call = without_lora(stable_diffusion)
    base, norms = plain_images(pipe, call), {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            norms[name] = module.weight.detach().flatten(1).pow(2).sum(1).sqrt()
    for parameter in adapters.attach(pipe.unet, kind="dora", rank=2, targets="attention+conv"):
        parameter.data = 1.2 * parameter.data + 0.05
    tuned, state = (
        plain_images(pipe, call),
        {key: value.clone() for key, value in adapters.lora_state(pipe.unet).items()},
    )
    magnitudes = [key for key in state if ".lora_magnitude_vector" in key]
    weighed = adapters.weigh_state(pipe.unet, state, 0.5)
    adapters.weigh_lora(pipe, adapters.ADAPTER, 0.5)
    half, live = plain_images(pipe, call), adapters.lora_state(pipe.unet)
    for key in magnitudes:
        expected = (norms[key.partition(".lora_m")[0]] + state[key].flatten()) / 2
        torch.testing.assert_close(live[key].flatten(), expected)
        torch.testing.assert_close(weighed[key].flatten(), expected)
    for weight, expected in ((0.0, base), (1.0, tuned), (0.5, half)):
        adapters.weigh_lora(pipe, adapters.ADAPTER, weight)
        assert torch.equal(plain_images(pipe, call), expected), weight
    assert 0.01 < (half - base).abs().max() < (tuned - base).abs().max()
    assert "weigh_lora" in adapters.how_to_use(pipe, "run", weight=0.5)  # set_adapters leaves the magnitudes
