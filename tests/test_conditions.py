"""Pictures and texts of the prompt file that go into the pipeline's call with their prompt: ControlNet, img2img."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import re
from pathlib import Path
from random import Random
from typing import Any

import judge
import numpy as np
import oracle
import pytest
import tiny
import torch
from PIL import Image
from tiny_runs import BASE, made_run, redness, save_tiny, write_run

from rewardtune import RewardTuner, app, evaluate, methods, modelcard
from rewardtune.candidates import candidates, load_base, opened
from rewardtune.cli import main
from rewardtune.engine import chain, count_steps, preflight
from rewardtune.errors import ConfigError
from rewardtune.export import open_run
from rewardtune.gradient import derive_seed
from rewardtune.processes import Processes
from rewardtune.prompts import Conditioned, identity, load_prompts, with_categories
from rewardtune.regularize import Denoising, DenoisingLoss
from rewardtune.runfolder import json_lines

T = 4


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """prompts.jsonl with a picture and a negative prompt for each, and columns that are nothing to the pipeline."""
    rows = []
    for number, (prompt, negative) in enumerate([("red heart", "grey"), ("blue stars", "dull"), ("moon", "red")]):
        draw(tmp_path / "given" / f"{number}.png", number)
        row = {"prompt": prompt, "image": f"given/{number}.png", "negative_prompt": negative, "id": number}
        rows.append({**row, "category": f"kind {number}"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv"])
def test_columns_become_arguments(folder: Path, name: str) -> None:
    prompts = load_prompts(folder / name, columns=["image", "negative_prompt"], template="a {}")
    assert prompts == ["a red heart", "a blue stars", "a moon"]
    given = evaluate.for_prompts(prompts[1:], {"num_inference_steps": 3})
    assert given["prompt"] == ["a blue stars", "a moon"]
    assert [type(prompt) for prompt in given["prompt"]] == [str, str]
    assert given["negative_prompt"] == ["dull", "red"]
    for picture, number in zip(given["image"], (1, 2), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(folder / "given" / f"{number}.png")))


def test_other_columns_are_read_past(folder: Path) -> None:
    assert not any(isinstance(prompt, Conditioned) for prompt in load_prompts(folder / "prompts.jsonl"))
    rows = with_categories(folder / "prompts.jsonl", columns=["image"])
    assert [category for _, category in rows] == ["kind 0", "kind 1", "kind 2"]
    assert evaluate.for_prompts([rows[0][0]], {}).keys() == {"prompt", "image"}


def test_prompts_travel_to_other_processes(folder: Path) -> None:
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    for there in (pickle.loads(pickle.dumps(prompts)), copy.deepcopy(prompts)):
        assert there == prompts
        assert [prompt.arguments for prompt in there] == [prompt.arguments for prompt in prompts]


def test_a_resume_tells_other_pictures(folder: Path) -> None:
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    before = identity(prompts)
    assert before[0][0] == "red heart"
    (folder / "given" / "0.png").rename(folder / "given" / "same.png")
    (folder / "prompts.jsonl").write_text((folder / "prompts.jsonl").read_text().replace("/0.png", "/same.png"))
    assert identity(load_prompts(folder / "prompts.jsonl", columns=["image"])) == before
    draw(folder / "given" / "same.png", 77)  # another picture under its name
    assert identity(prompts[1:]) == before[1:]
    assert identity(load_prompts(folder / "prompts.jsonl", columns=["image"]))[0] != before[0]
    assert identity(["red heart"]) == ["red heart"], "the digest of runs without columns stays what it was"


WRONG: dict[str, tuple[Any, str]] = {
    "no such column": ({"imag": "given/0.png"}, r"line 1: no column 'image' \(did you mean 'imag'\?\)"),
    "no path": ({"image": None}, "line 1, column image: None; legal is text"),
    "a number": ({"image": 3}, "line 1, column image: 3; legal is text"),
    "no such file": ({"image": "given/none.png"}, "none.png does not exist; paths begin at the folder of the prompt"),
    "no picture": ({"image": "prompts.jsonl"}, "is no picture that can be opened"),
    "another size": ({"image": "given/wide.png"}, "0.png is 16 x 16, but .*wide.png is 24 x 16"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files(folder: Path, what: str) -> None:
    change, said = WRONG[what]
    draw(folder / "given" / "wide.png", 9, size=(24, 16))
    rows = [{"prompt": "a red heart", **change}, {"prompt": "a blue star", "image": "given/0.png"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=said):
        load_prompts(folder / "prompts.jsonl", columns=["image"])


@pytest.mark.parametrize("source", ["playground:train", "builtin:simple_animals", ["a cat"], "lines.txt"])
def test_sources_without_columns(folder: Path, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("lines.txt").write_text("a cat\n")
    with pytest.raises(ConfigError, match=r"image.*\.jsonl, \.json, \.csv, \.parquet file"):
        load_prompts(source, columns=["image"])


# -- the gradient ----------------------------------------------------------------------------------------------------


def controlnet() -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny.stable_diffusion_controlnet(steps=T)
    return pipe, {"num_inference_steps": T, "guidance_scale": call["guidance_scale"]}


def img2img() -> tuple[Any, dict[str, Any]]:
    """Half of eight steps."""
    from diffusers import StableDiffusionImg2ImgPipeline

    base, call = tiny.stable_diffusion(steps=2 * T)
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    own = {"num_inference_steps": 2 * T, "guidance_scale": call["guidance_scale"], "strength": 0.5}
    return tiny.quiet(pipe), own


PIPES = {"controlnet": controlnet, "img2img": img2img}


def test_srpo_noises_a_chain_that_began_with_a_picture_with_fresh_noise(folder: Path, monkeypatch) -> None:
    """The first latent of image-to-image is the noised picture, which is no noise."""
    pipe, call = img2img()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])[:2]
    given = {**evaluate.for_prompts(prompts, call), "generator": tiny.generators()}
    used, drawn = [], []
    noised, draw = chain.noised, chain._noise_like

    def seen(scheduler, x0, noise, **timestep):
        used.append(noise)
        return noised(scheduler, x0, noise, **timestep)

    monkeypatch.setattr(chain, "noised", seen)
    monkeypatch.setattr(chain, "_noise_like", lambda *of: drawn.append(draw(*of)) or drawn[-1])
    judge.engine_gradient(pipe, methods.srpo()(T, Random(0)), given)
    assert len(used) == len(drawn) == 1
    assert used[0] is drawn[0]


def slow(*cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("controlnet", "drtune"),
        ("img2img", "draft-3"),
        *slow(("controlnet", "draft-3"), ("controlnet", "refl"), ("img2img", "drtune"), ("img2img", "refl")),
        *slow(("controlnet", "draft-LV")),  # the oracle's re-noising knows whole chains alone
    ],
)
def test_the_gradient_is_algorithm_1(folder: Path, kind: str, method: str) -> None:
    pipe, call = PIPES[kind]()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image", "negative_prompt"])[:2]
    given = {**evaluate.for_prompts(prompts, call), "generator": tiny.generators()}
    steps = count_steps(pipe, **tiny.fresh(given))
    assert steps == oracle.count_steps(pipe, tiny.fresh(given)) == T
    verdict = judge.compare(pipe, judge.PLANS[method](T), given)
    assert verdict.images_equal
    assert verdict.gradient_difference < 1e-5
    other = evaluate.for_prompts(load_prompts(folder / "prompts.jsonl", columns=["image", "negative_prompt"])[1:], call)
    moved = judge.plain_images(pipe, {**other, "prompt": given["prompt"], "generator": tiny.generators()})
    assert not torch.equal(moved, judge.plain_images(pipe, given)), "the picture is not looked at"


@pytest.mark.parametrize("strength", [0.13, *slow((0.5,), (1.0,))])
def test_the_preflight_of_a_shortened_chain(folder: Path, strength: float) -> None:
    """At a small strength few of the asked steps are made: its small calls must have some."""
    pipe, call = img2img()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])[:1]
    given = evaluate.for_prompts(prompts, {**call, "strength": strength}) | {"generator": tiny.generators(1)}
    found = preflight(pipe, **given).T
    assert found == round(2 * T * strength)


# -- the denoising loss ----------------------------------------------------------------------------------------------


def denoised_by_hand(pipe: Any, loss: DenoisingLoss, step: int, size: int) -> torch.Tensor:
    """weight * mean (F - noise)^2 of an epsilon model, written out: of the steps made, a caption with its picture."""
    x0, noise, captions = loss.draw(step, first=0, size=size)
    made = loss.call["num_inference_steps"]
    pipe.scheduler.set_timesteps(made)
    t = pipe.scheduler.timesteps[made - T :][loss.step_of(step)]
    text, _ = pipe.encode_prompt(list(map(str, captions)), "cpu", 1, False)
    a = pipe.scheduler.alphas_cumprod[t] ** 0.5
    x = a * x0 + (1 - a**2) ** 0.5 * noise
    beside: dict[str, Any] = {}
    if hasattr(pipe, "controlnet"):
        pictures = torch.cat(
            [pipe.control_image_processor.preprocess(Image.open(c.arguments["image"])) for c in captions]
        )
        down, mid = pipe.controlnet(x, t, encoder_hidden_states=text, controlnet_cond=pictures, return_dict=False)
        beside = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return loss.weight * (pipe.unet(x, t, encoder_hidden_states=text, **beside)[0] - noise).square().mean()


@pytest.mark.parametrize("kind", PIPES)
def test_the_denoising_loss_goes_with_each_prompts_own_picture(folder: Path, kind: str) -> None:
    """ImageReFL's loss (img2img), and its like under ControlNet: equal to the written formula, guidance left out."""
    pipe, call = PIPES[kind]()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image", "negative_prompt"])
    settings = Denoising(weight=0.3, count=3, images="prompts:image")
    loss = settings.prepare(pipe, prompts, call=call, seed=5)
    with torch.no_grad():
        pixels = torch.cat([pipe.image_processor.preprocess(Image.open(p.arguments["image"])) for p in prompts])
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert torch.allclose(loss.latents, latents, atol=2e-5 * float(latents.abs().max()))
    step = next(step for step in range(50) if "" in loss.draw(step, first=0, size=3)[2])  # a dropped caption as well
    exact = denoised_by_hand(pipe, loss, step, 3)
    for p in tiny.trainable(pipe).values():
        p.grad = None
    assert loss.weight * loss.add(step, first=0, size=3, batch=3) == pytest.approx(float(exact.detach()), rel=1e-4)
    found = {name: p.grad for name, p in tiny.trainable(pipe).items()}
    assert oracle.difference(found, oracle.gradients(tiny.trainable(pipe), exact)) < 1e-4


def test_a_kept_set_finds_the_pictures_again(folder: Path) -> None:
    """Sampled by the base model from the prompts' pictures; read back it has them, and other prompts are refused."""
    pipe, call = img2img()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    settings, file = Denoising(weight=1.0, count=4), folder / "set.safetensors"
    made = settings.prepare(pipe, prompts, call=call, seed=0, file=file)
    read = settings.prepare(pipe, prompts, call=call, seed=0, file=file)
    assert torch.equal(made.latents, read.latents)
    assert [caption.arguments for caption in read.captions] == [p.arguments for p in [*prompts, prompts[0]]]
    other = [Conditioned(str(prompts[0]), prompts[1].arguments), *prompts[1:]]
    with pytest.raises(ConfigError, match="other settings"):
        settings.prepare(pipe, other, call=call, seed=0, file=file)


def test_a_folder_of_pictures_lacks_those_of_the_prompts(folder: Path) -> None:
    pipe, call = img2img()
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    with pytest.raises(ConfigError, match="each prompt brings its image along; legal is prompts:image, or null"):
        Denoising(weight=1.0, images=folder / "given").prepare(pipe, prompts, call=call, seed=0)
    with pytest.raises(ConfigError, match="no prompt brings pictures along"):
        Denoising(weight=1.0, images="prompts:image").prepare(pipe, ["a cat"], call=call, seed=0)


# -- training --------------------------------------------------------------------------------------------------------


def tuner(pipe: Any, call: dict[str, Any], prompts: Any, folder: Path, **more: Any) -> RewardTuner:
    own = {key: value for key, value in call.items() if key not in ("num_inference_steps", "guidance_scale")}
    fields: dict[str, Any] = {
        "reward": redness,
        "method": methods.drtune(K=2, m=2),
        "output_dir": folder / "run",
        "num_inference_steps": call["num_inference_steps"],
        "guidance_scale": call["guidance_scale"],
        "call": own,
        "rank": 2,
        "batch": 2,
        "eval_count": 2,
        "show_progress": False,
    }
    return RewardTuner(pipe, prompts=prompts, **fields | more)


def bare(kind: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = PIPES[kind]()
    pipe.unet.unload_lora() if hasattr(pipe.unet, "unload_lora") else pipe.unet.delete_adapters("default")
    return pipe, call


@pytest.mark.parametrize("kind", ["img2img", *slow(("controlnet",))])
def test_training(folder: Path, kind: str) -> None:
    """Two updates by micro-batches of one, with both losses of ImageReFL; before them, each prompt's own picture."""
    pipe, call = bare(kind)
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image", "negative_prompt"])
    denoise = {"weight": 0.01, "images": "prompts:image"}
    made = tuner(pipe, call, prompts, folder, micro_batch=1, regularize={"denoise": denoise}).train(2, lr=1e-2)
    assert made.steps == 2
    assert all(line["denoise"] > 0 for line in json_lines(folder / "run" / "metrics.jsonl"))
    untuned, call = bare(kind)
    seeds = [derive_seed(0, "eval", index) for index in range(2)]
    given = evaluate.for_prompts(prompts[:2], call) | {"generator": evaluate.generators(seeds)}
    assert torch.allclose(made.before_images, untuned(**given, output_type="pt")[0], atol=1e-5)
    assert not torch.equal(made.before_images, made.after_images)


def test_micro_batches_and_processes_give_the_same_gradient(folder: Path) -> None:
    """A sample's picture goes with its index in the batch, whoever computes it."""
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    found = []
    for micro_batch in (2, 1):
        pipe, call = controlnet()
        run = tuner_with_lora(pipe, call, prompts, folder / str(micro_batch), micro_batch=micro_batch)
        gradient = run.gradient()
        for p in run.parameters:
            p.grad = None
        for first in gradient.chunks():  # as the processes do, a chunk each
            gradient.add(0, first, Processes())
        found.append({str(i): p.grad.clone() for i, p in enumerate(run.parameters) if p.grad is not None})
    assert oracle.difference(found[1], found[0]) < 1e-5


def tuner_with_lora(pipe: Any, call: dict[str, Any], prompts: Any, folder: Path, **more: Any) -> RewardTuner:
    """As far as `train` gets before its first update, with the LoRA that is there."""
    run = tuner(pipe, call, prompts, folder, **more)
    run.parameters = list(tiny.trainable(pipe).values())
    run.T = T
    return run


def test_columns_that_the_pipeline_does_not_take(folder: Path) -> None:
    prompts = load_prompts(folder / "prompts.jsonl", columns=["image"])
    pipe, call = tiny.stable_diffusion(steps=T, lora=False)
    call = {"num_inference_steps": T, "guidance_scale": 3.0}
    with pytest.raises(ConfigError, match="column 'image': StableDiffusionPipeline has no such argument"):
        tuner(pipe, call, prompts, folder)
    pipe, call = bare("controlnet")
    with pytest.raises(ConfigError, match="is an argument of the call too"):
        tuner(pipe, {**call, "image": None}, prompts, folder)
    with pytest.raises(ConfigError, match="name the same columns for both"):
        tuner(pipe, call, prompts, folder, eval_prompts=["a cat"])


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion in a folder, and a ControlNet for it beside."""
    from diffusers import ControlNetModel

    place = tmp_path_factory.mktemp("model")
    save_tiny(place / "tiny")
    pipe, _ = tiny.stable_diffusion(lora=False)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    tiny.liven(net, seed=9, gain=0.7).save_pretrained(place / "control")
    return place


def sections(model: Path, kind: str) -> dict[str, Any]:
    prompts = {"source": "prompts.jsonl", "columns": ["image", "negative_prompt"]}
    if kind == "img2img":
        named = {"id": str(model / "tiny"), "pipeline": "StableDiffusionImg2ImgPipeline"}
        return {
            "model": named,
            "prompts": prompts,
            "sampling": {"steps": 8, "guidance": 3.0, "call": {"strength": 0.5}},
        }
    named = {"id": str(model / "tiny"), "pipeline": "StableDiffusionControlNetPipeline"}
    return {"model": {**named, "controlnet": str(model / "control")}, "prompts": prompts}


@pytest.mark.parametrize("kind", ["controlnet", *slow(("img2img",))])
def test_check(folder: Path, model: Path, kind: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    path = write_run(folder, model / "tiny", **sections(model, kind))
    assert main(["check", str(path)]) == 0, capsys.readouterr().out
    assert "3 prompts, each with its image, negative_prompt" in capsys.readouterr().out
    (folder / "given" / "1.png").unlink()
    assert main(["check", str(path)]) == 2
    assert "1.png does not exist" in capsys.readouterr().out
    path = write_run(folder, model / "tiny", **sections(model, kind) | {"prompts": ["a cat"]})
    assert main(["check", str(path)]) == 2
    assert re.search(r"error +steps: \w+ with DDIMScheduler refuses this call", capsys.readouterr().out)


@pytest.mark.slow  # two runs of the command, and their comparison
@pytest.mark.parametrize("kind", PIPES)
def test_train_and_compare(folder: Path, model: Path, kind: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    path = write_run(folder, model / "tiny", **sections(model, kind))
    assert main(["train", str(path)]) == 0, capsys.readouterr()
    assert main(["compare", "base", str(folder / "out"), "--count", "2"]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"id": "playground", "controlnet": "x"}}, "needs a pipeline that takes it"),
        ({"sampling": {"call": {"guidance_scale": 3.0}}}, "guidance_scale is sampling.guidance"),
        (
            {"prompts": {"source": "p.jsonl", "columns": ["image"]}, "sampling": {"call": {"image": "x"}}},
            "image stands in sampling.call too",
        ),
        (
            {"prompts": {"source": "p.jsonl", "columns": ["negative_prompt"], "negative": "grey"}},
            "negative_prompt is given for all too",
        ),
        (
            {
                "prompts": {"source": "p.jsonl", "columns": ["image"]},
                "regularize": {"denoise": {"weight": 0.1, "images": "folder"}},
            },
            "folder: each prompt brings its image along; legal is prompts:image, or null",
        ),
        (
            {"regularize": {"denoise": {"weight": 0.1, "images": "prompts:image"}}},
            "prompts:image: no prompt brings pictures along; name their column in prompts.columns",
        ),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    from rewardtune.config import load_config

    with pytest.raises(ConfigError, match=said):
        load_config(write_run(tmp_path, Path("playground"), **changes))


def test_a_pipeline_class_that_does_not_fit(tmp_path: Path, model: Path) -> None:
    from rewardtune.models import load_pipeline

    with pytest.raises(ConfigError, match="did you mean 'StableDiffusionPipeline'"):
        load_pipeline(str(model / "tiny"), device="cpu", pipeline="StableDifusionPipeline")
    with pytest.raises(ConfigError, match="cannot be made of this StableDiffusionPipeline"):
        load_pipeline(str(model / "tiny"), device="cpu", pipeline="StableDiffusionControlNetPipeline")


# -- what takes a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with a run of each kind, one that takes prompts alone (plain), and the pictures of their prompts."""
    place = tmp_path_factory.mktemp("tuned")
    rows = []
    for number, (prompt, negative) in enumerate([("red heart", "grey"), ("blue stars", "dull")]):
        draw(place / "given" / f"{number}.png", number)
        rows.append({"prompt": prompt, "image": f"given/{number}.png", "negative_prompt": negative})
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(place / "wide.png", 9, size=(24, 16))
    for kind in PIPES:
        own = sections(model, kind)
        own["prompts"] = own["prompts"] | {"source": str(place / "prompts.jsonl")}
        if kind == "controlnet":  # so strong that the little network's pictures show which one was given
            own["sampling"] = BASE["sampling"] | {"call": {"controlnet_conditioning_scale": 20.0}}
        made_run(place / kind, model / "tiny", **own)
    made_run(place / "plain", model / "tiny")
    return place


def saved(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("kind", PIPES)
def test_sample_takes_pictures(tuned: Path, kind: str, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    """The pictures of `sample` are the plain pipeline's with the same arguments; each prompt has its own picture."""
    monkeypatch.chdir(tuned)
    words = ["sample", kind, "--output", str(tmp_path), "-p", "red heart", "-p", "blue stars"]
    each = ["--input", "image=given/0.png", "--input", "image=given/1.png", "--input", "negative_prompt=grey"]
    assert main([*words, *each]) == 0, capsys.readouterr()
    made = [saved(tmp_path / f"00{number}.png") for number in range(2)]
    (one,) = candidates([kind])
    pictures = [Image.open(tuned / "given" / f"{number}.png").convert("RGB") for number in range(2)]
    with opened(load_base([one]), one, prompts=["unused where nothing is mixed"]) as pipe:
        arrays = pipe(
            prompt=["red heart", "blue stars"],
            image=pictures,
            negative_prompt=["grey", "grey"],
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
            output_type="np",
            **one.settings.call,
        )[0]
    assert np.abs(np.stack(made) - 255 * arrays).max() <= 1
    assert main([*words, "--input", "image=given/1.png", "--input", "negative_prompt=grey"]) == 0, capsys.readouterr()
    assert not np.array_equal(saved(tmp_path / "002.png"), made[0]), "the first prompt has another picture now"
    assert np.array_equal(saved(tmp_path / "003.png"), made[1])


ASKED: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "controlnet samples from a picture beside each prompt (image): add --input image=PICTURE"),
    "no file": (["image=none.png"], "image: the picture none.png does not exist; an input is the path of a picture"),
    "no picture": (["image=prompts.jsonl"], "prompts.jsonl is no picture that can be opened"),
    "no name": (["given/0.png"], "--input 'given/0.png': write NAME=VALUE, e.g. image=photo.png"),
    "the prompt": (["prompt=a cat"], "the prompt has its own option, --prompt"),
    "no argument": (["image=given/0.png", "imag=given/0.png"], "has no such argument (did you mean 'image'?); it has"),
    "too many": (["image=given/0.png"] * 3, "input image: 3 values for 2 prompts; legal is one for all prompts or 2"),
    "two sizes": (["image=given/0.png", "image=wide.png"], "input, image: wide.png is 24 x 16, but given/0.png is 16"),
}


@pytest.mark.parametrize("what", ASKED)
def test_inputs_that_sample_cannot_take(tuned: Path, what: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tuned)
    given, said = ASKED[what]
    words = ["sample", "controlnet", "-p", "a cat", "-p", "a dog"]
    assert main([*words, *(word for value in given for word in ("--input", value))]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_pictures_takes_none(tuned: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tuned)
    assert main(["sample", "plain", "-p", "a cat", "--input", "image=given/0.png"]) == 2
    assert "--input image: StableDiffusionPipeline has no such argument" in capsys.readouterr().err


def test_a_pipeline_that_lacks_its_picture_says_so(model: Path) -> None:
    """A run that was started from Python tells no columns: the pipeline's own words, in one line."""
    pipe, call = controlnet()
    with pytest.raises(ConfigError, match="StableDiffusionControlNetPipeline with DDIMScheduler refuses this call"):
        evaluate.sample(pipe, ["a cat"], seeds=[0], call=call)


@pytest.mark.parametrize("kind", ["img2img", *slow(("controlnet",))])
def test_a_mix_counts_the_steps_of_its_own_call(tuned: Path, kind: str, monkeypatch: Any, tmp_path: Path) -> None:
    """Of eight steps image-to-image makes four: four steps of the base model are all of them."""
    monkeypatch.chdir(tuned)
    made = {}
    for spec in (kind, f"{kind}:base_steps={T}", f"{kind}:aig=0", f"{kind}@0"):
        words = ["sample", spec, "-p", "red heart", "--input", "image=given/0.png", "--output", str(tmp_path / spec)]
        assert main(words) == 0
        made[spec] = saved(tmp_path / spec / "000.png")
    assert np.array_equal(made[f"{kind}:base_steps={T}"], made[f"{kind}@0"])
    assert np.array_equal(made[f"{kind}:aig=0"], made[kind])
    assert np.abs(made[kind] - made[f"{kind}@0"]).max() > 2


def test_prompts_without_pictures_are_not_compared(tuned: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tuned)
    assert main(["eval", "img2img", "--prompts", "playground:eval", "--count", "2"]) == 2
    assert "(image), which playground:eval does not name; give a .jsonl" in capsys.readouterr().err
    assert main(["compare", "plain", "controlnet", "--count", "2"]) == 2
    assert "plain is sampled by the model's own pipeline and controlnet by" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["controlnet", *slow(("img2img",))])
def test_eval_and_sweep_take_the_pictures_of_the_file(tuned: Path, kind: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tuned)
    assert main(["eval", kind, f"{kind}:base_steps=1", "--count", "2"]) == 0, capsys.readouterr()
    assert main(["sweep", kind, "--weights", "1", "--count", "2"]) == 0, capsys.readouterr()
    swept, found = (tuned / kind / "sweep" / f"{kind}@1", tuned / kind / "eval" / "eval" / kind)
    assert [saved(swept / name).tolist() for name in ("000.png", "001.png")] == [
        saved(found / name).tolist() for name in ("000.png", "001.png")
    ]


@pytest.mark.parametrize("kind", PIPES)
def test_the_app_takes_pictures(tuned: Path, kind: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tuned)
    pair = app.Pair(kind)
    assert pair.columns == ["image", "negative_prompt"]
    first = pair.prompts()[0]
    assert isinstance(first, Conditioned)
    beside = {"image": "given/0.png", "negative_prompt": "grey"}
    base, made = pair.pictures("red heart", 0, inputs=beside)
    words = ["sample", kind, "-p", "red heart", "--output", str(tmp_path)]
    assert main([*words, *(w for name, value in beside.items() for w in ("--input", f"{name}={value}"))]) == 0
    assert np.array_equal(np.asarray(made), saved(tmp_path / "000.png"))
    other, _ = pair.pictures("red heart", 0, inputs=beside | {"image": "given/1.png"})
    assert not np.array_equal(np.asarray(base), np.asarray(other)), "another picture, another base"
    with pytest.raises(ConfigError, match="samples from a picture beside each prompt"):
        pair.pictures("red heart", 0)
    with pytest.raises(ConfigError, match=r"input 'imag': .* has no such argument"):
        pair.pictures("red heart", 0, inputs=beside | {"imag": "given/0.png"})


@pytest.mark.parametrize("kind", PIPES)
def test_the_model_card_tells_how_to_sample_it(tuned: Path, kind: str, monkeypatch: Any, tmp_path: Path) -> None:
    """Its snippet, run beside the base model and a picture, gives what `sample` gives."""
    monkeypatch.chdir(tuned)
    run = open_run(kind)
    code = modelcard.snippet(run, repo=str(tuned / kind))
    assert "given_image = load_image('0.png')" in code
    for folder, place in (("tiny", run.model.id), ("control", run.model.controlnet)):
        code = code.replace(f"'{folder}'", repr(place))  # the card tells no local paths
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes((tuned / "given" / "0.png").read_bytes())
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    words = ["sample", str(tuned / kind), "-p", "red heart", "--output", str(tmp_path / "s")]
    assert main([*words, "--input", "image=0.png", "--input", "negative_prompt=grey"]) == 0
    assert np.abs(np.asarray(names["image"]).astype(int) - saved(tmp_path / "s" / "000.png")).max() <= 1


# -- pictures from cameras, and rows without a prompt ----------------------------------------------------------------


def test_the_rotation_of_a_camera_is_applied(tmp_path: Path) -> None:
    """As diffusers' load_image does; the sizes that are compared are those of the turned pictures."""
    from diffusers.utils import load_image

    from rewardtune.regularize import _pixels

    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    picture.save(tmp_path / "lying.png", exif=turned)
    draw(tmp_path / "standing.png", 1, size=(16, 24))
    rows = [{"prompt": "x", "image": name} for name in ("lying.png", "standing.png")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = evaluate.for_prompts(load_prompts(tmp_path / "p.jsonl", columns=["image"]), {})["image"]
    assert [each.size for each in given] == [(16, 24), (16, 24)]
    upright = load_image(str(tmp_path / "lying.png"))
    assert np.array_equal(np.asarray(given[0]), np.asarray(upright))
    upright.save(tmp_path / "upright.png")  # the denoising loss sees the same picture
    assert torch.equal(_pixels(tmp_path / "lying.png", 24, 16), _pixels(tmp_path / "upright.png", 24, 16))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("p.csv", "image,prompt\n0.png,a\n0.png, \n", "line 3"),
        ("p.jsonl", '{"prompt": "", "image": "0.png"}\n', "line 1"),
        ("p.json", '[{"prompt": "", "image": "0.png"}]', "entry 0"),
    ],
)
def test_a_picture_without_a_prompt_is_not_dropped_silently(name: str, text: str, place: str, tmp_path: Path) -> None:
    draw(tmp_path / "0.png", 0)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{place}: the prompt is empty beside .*0\.png.*leave the row out"):
        load_prompts(tmp_path / name, columns=["image"])
