"""The model card: what it says is what the run says, its snippet runs, and foreign text stays text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from tiny_runs import BASE

from rewardtune import export, launch, modelcard
from rewardtune.config import Model, RunConfig, load_config

HOSTILE = [
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "[click](https://evil.example) ![x](https://evil.example/x.png) https://evil.example",
    "a | b |\n---\n# heading\n- item",
    "``` \n```python\nimport os\n```",
    "`code` ``two`` *bold* __bold__ @user {{ 7*7 }} {% raw %}",
    "---\nlicense: mit\n---",
    "right \u202eot tfel\u2066 \x00\x1b[31m",
    "'; import os; os.abort() #\\",
]


def made_run(folder: Path, **changes) -> export.Run:
    """A run that never ran: only what the card reads."""
    values = {"model": "user/base-model", "output_dir": str(folder), **BASE}
    facts = {
        "method": "drtune(K=2, m=2)",
        "reward": "brightness",
        "before": {"reward": [0.5, 0.02], "brightness": [0.5, 0.02]},
        "after": {"reward": [0.75, 0.03], "brightness": [0.75, float("nan")]},
    }
    fields = {
        "folder": folder,
        "file": folder / "pytorch_lora_weights.safetensors",
        "model": Model(id="user/base-model"),
        "scheduler": None,
        "prompts": ("red heart", "blue star"),
        "call": {"num_inference_steps": 4, "guidance_scale": 3.0},
        "facts": facts | changes.pop("facts", {}),
        "config": RunConfig.model_validate(values | changes.pop("settings", {})),
    }
    return export.Run(**{**fields, **changes})


def card_of(run: export.Run, folder: Path, **options) -> tuple[dict, str]:
    """(the YAML head, the Markdown body) of the card as written."""
    modelcard.write_card(run, folder, **options)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def tokens(body: str) -> list:
    """Every block and inline token of CommonMark with tables and HTML."""
    blocks = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return [*blocks, *(child for block in blocks for child in block.children or [])]


def test_head_and_scores(tmp_path):
    head, body = card_of(made_run(tmp_path), tmp_path / "card", repo="ann/tune", licence={"license": "openrail++"})
    assert head["base_model"] == "user/base-model"
    assert head["base_model_relation"] == "adapter"
    assert head["license"] == "openrail++"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["library_name"] == "diffusers"
    assert head["tags"] == ["text-to-image", "diffusers", "lora", "rewardtune", "drtune"]
    assert "| `reward` | 0.5 ± 0.02 | 0.75 ± 0.03 | yes |" in body
    assert "| `brightness` | 0.5 ± 0.02 | 0.75 | yes |" in body  # one picture has no interval
    assert "No held-out reward was measured" in body
    assert "pipe.load_lora_weights('ann/tune', weight_name='pytorch_lora_weights.safetensors')" in body
    assert "from_pretrained('user/base-model', torch_dtype=torch.float32)" in body


def test_held_out_rewards_are_told_from_trained_ones(tmp_path):
    run = made_run(tmp_path, facts={"held_out": ["brightness"]})
    _, body = card_of(run, tmp_path / "card")
    assert "| `brightness` | 0.5 ± 0.02 | 0.75 | no |" in body
    assert "Held-out rewards, never trained on, were measured: `brightness`." in body


def test_scores_come_from_eval_jsonl_when_run_json_has_none(tmp_path):
    lines = [{"step": step, "count": 16, "scores": {"reward": [0.1 * step, 0.01]}} for step in (0, 5, 10)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    _, body = card_of(made_run(tmp_path, facts={"before": None, "after": None}), tmp_path / "card")
    assert "| `reward` | 0 ± 0.01 | 1 ± 0.01 | yes |" in body
    assert "16 fixed prompts" in body
    (tmp_path / "eval.jsonl").unlink()
    _, body = card_of(made_run(tmp_path, facts={"before": None, "after": None}), tmp_path / "card")
    assert "Not measured" in body


def test_weights_chosen_on_the_pictures_of_the_table(tmp_path):
    """A caveat where the best of several looks was kept, and none where there was one look at the end."""
    for steps, said in (((0, 5, 10), True), ((0, 10), False)):
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        _, body = card_of(made_run(tmp_path, facts={"status": "done"}), tmp_path / "card")
        assert ("chosen among 2 looks at these very pictures by `reward`" in body) == said


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_stays_text(text, tmp_path):
    """In the head, in the gallery, in the snippet, in the tables and in the settings."""
    run = made_run(
        tmp_path,
        prompts=(text,),
        settings={"prompts": [text], "reward": [{"name": "brightness", "options": {"x": text}}]},
        facts={
            "reward": text,
            "method": "drtune(K=2)",
            "before": {text: [0, 1], "reward": [0, 1]},
            "after": {text: [1, 1], "reward": [1, 1]},
        },
    )
    (tmp_path / "samples" / "final").mkdir(parents=True)
    (tmp_path / "samples" / "final" / "000.png").write_bytes(b"png")
    head, body = card_of(run, tmp_path / "card", licence={"license": "mit"})
    harmless_head, harmless = card_of(
        made_run(tmp_path, prompts=("x",), settings={"prompts": ["x"]}),
        tmp_path / "harmless",
        licence={"license": "mit"},
    )
    assert head.keys() == harmless_head.keys()
    assert head["license"] == "mit"
    assert head["widget"] == [{"text": modelcard.plain(text), "output": {"url": "images/000.png"}}]
    kinds = [token.type for token in tokens(body)]
    assert not {"html_inline", "html_block", "link_open", "image"} & set(kinds)
    for kind in ("heading_open", "fence", "table_open", "tr_open", "bullet_list_open", "strong_open", "em_open"):
        assert kinds.count(kind) == [token.type for token in tokens(harmless)].count(kind)
    assert not set("\u202e\u2066\x00\x1b") & set(body)
    code = next(token.content for token in tokens(body) if token.type == "fence" and token.info == "python")
    compile(code, "snippet", "exec")
    assert "os" not in compile(code, "snippet", "exec").co_names


@pytest.mark.parametrize("text", ["`", "``", "a`b", "`a`", "plain", " ", "a|b"])
def test_code_spans_give_back_their_text(text):
    (paragraph,) = (token for token in MarkdownIt("commonmark").parse(modelcard.code(text)) if token.type == "inline")
    (span,) = paragraph.children
    assert span.content == (text if text.strip() else "(empty)")
    assert span.type == ("code_inline" if text.strip() else "text")


def test_local_paths_are_cut(tmp_path):
    private = tmp_path / "secret" / "prompts.txt"
    private.parent.mkdir()
    private.write_text("red heart")
    run = made_run(
        tmp_path,
        model=Model(id=str(tmp_path / "secret" / "base")),
        settings={"prompts": str(private), "model": str(tmp_path / "secret" / "base")},
    )
    head, body = card_of(run, tmp_path / "card")
    assert "secret" not in body + str(head)
    assert "source: prompts.txt" in body
    assert "base_model" not in head
    assert "put your own" in body


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("user/model", "user/model"),
        ("/home/ann/x", "x"),
        ("~/x/", "x"),
        ("../a/b.txt", "b.txt"),
        (r"C:\me\x", "x"),
        ("a dog / a cat", "a dog / a cat"),
        ("playground:train", "playground:train"),
    ],
)
def test_public_names(text, public):
    assert modelcard.public_name(text) == public


def test_licence_of_the_base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    assert modelcard.base_licence(str(folder)) == {}
    card = "---\nlicense: other\nlicense_name: small\nlicense_link: https://x.example\n---\nhello"
    (folder / "README.md").write_text(card)
    found = {"license": "other", "license_name": "small", "license_link": "https://x.example"}
    assert modelcard.base_licence(str(folder)) == found
    assert modelcard.base_licence("playground") == {"license": "apache-2.0"}
    api = SimpleNamespace(model_info=lambda repo, timeout: SimpleNamespace(card_data=SimpleNamespace(license="mit")))
    assert modelcard.base_licence("user/model", api=api) == {"license": "mit"}
    assert modelcard.base_licence("user/model") == {}  # never asks the network by itself
    broken = SimpleNamespace(model_info=lambda *_, **__: (_ for _ in ()).throw(ConnectionError("down")))
    assert modelcard.base_licence("user/model", api=broken) == {}
    _, body = card_of(made_run(tmp_path), tmp_path / "card", licence={})
    assert "The licence of the base model was not found" in body


def test_weight_and_checkpoint_are_said(tmp_path):
    _, body = card_of(made_run(tmp_path, checkpoint="500"), tmp_path / "card", weight=0.5)
    assert "this file is the LoRA of step 500, multiplied by 0.5." in body


# The playground: a real run, from training to the card's own snippet --------------------------------------------------


@pytest.fixture(scope="module")
def playground_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("playground") / "tune"
    small = ["optim.steps=2", "optim.batch=2", "optim.lr=1e-2", "eval.count=2", "sampling.steps=4"]
    config = load_config(
        "playground", [*small, "method.options.K=1", "method.options.m=2", "reward=brightness", f"output_dir={folder}"]
    )
    launch.train(config)
    return folder


@pytest.mark.slow  # trains on the playground: twenty seconds
def test_the_snippet_of_the_playground_card_gives_the_tuned_picture(playground_run, monkeypatch):
    """Executed in the folder of the card, and held against the run's own pipeline and file."""
    pushed = export.push_run(playground_run, "ann/tune", dry_run=True, formats=["kohya"])
    made = {each.format: each for each in pushed.exported}
    assert max(each.difference for each in made.values()) <= 1e-4 < min(each.effect for each in made.values())
    _, body = card_of(export.open_run(playground_run), pushed.folder, exported=pushed.exported)
    code = next(token.content for token in tokens(body) if token.type == "fence" and token.info == "python")
    monkeypatch.chdir(pushed.folder)
    names: dict = {}
    exec(compile(code, "snippet", "exec"), names)
    assert (pushed.folder / "tuned.png").is_file()
    run = export.open_run(playground_run)
    pipe = launch.load_pipeline(run.model, scheduler=run.scheduler)
    call = run.call | {"prompt": run.prompts[0], "output_type": "np"}
    untuned = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    pipe.load_lora_weights(str(playground_run))
    tuned = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    import numpy as np

    shown = np.asarray(names["image"]).astype(float) / 255
    assert abs(shown - tuned).max() <= 1 / 255
    assert abs(shown - untuned).max() > 2 / 255
    assert "kohya/tune.safetensors" in body
    assert (pushed.folder / "before_after.png").is_file()
    assert (pushed.folder / "images" / "000.png").is_file()
    facts = json.loads((playground_run / "run.json").read_text())
    assert f"| `reward` | {facts['before']['reward'][0]:.4g} ±" in body


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_snippet_has_the_scheduler_of_the_training(name, tmp_path):
    """Also on a base whose own scheduler says nothing of clipping: DDIM would clip latents by its default."""
    from diffusers import PNDMScheduler

    from rewardtune.models import make_scheduler

    base = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)
    pipe = SimpleNamespace(scheduler=base)
    lines = modelcard.snippet(made_run(tmp_path, scheduler=name), repo=None).splitlines()
    exec("\n".join(line for line in lines if "diffusers." in line or line == "import diffusers"), {"pipe": pipe})
    assert type(pipe.scheduler).__name__ == name
    assert dict(pipe.scheduler.config) == dict(make_scheduler(name, base).config)


# Runs that ended early, and bases of every kind -----------------------------------------------------------------------


def test_scores_of_another_step_than_the_weights_are_said(tmp_path):
    """Ctrl-C at step 130: the last look was at 100. After a NaN the weights of the best look are kept."""
    lines = [{"step": step, "count": 16, "scores": {"reward": [0.01 * step, 0.01]}} for step in (0, 50, 100)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def said(**facts):
        _, body = card_of(made_run(tmp_path, facts={"before": None, "after": None} | facts), tmp_path / "card")
        return body.partition("## Scores")[2].partition("## Limits")[0]

    early = said(status="interrupted", steps=130, lora_verified=True)
    assert "| 1 ± 0.01 |" in early
    assert "ended early at step 130 (`interrupted`): the scores after are those of step 100" in early
    assert "An error ended" not in early
    stopped = said(status="stopped", steps=130, kept_step=50, lora_verified=False)
    assert "| 0.5 ± 0.01 |" in stopped
    assert "ended early" not in stopped
    assert "were not loaded back and compared when they were saved" in stopped
    assert "early" not in said(status="done", steps=130, after={"reward": [2, 0.1]})


def test_steps_and_size_of_the_header_are_those_of_the_file(tmp_path):
    unet = SimpleNamespace(config={})
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(config={}))
    run = made_run(tmp_path, facts={"steps": 130, "kept_step": 50})
    header = modelcard.header(run, pipe, ranks={"x": 4})
    assert header["ss_steps"] == "50"
    assert not {"modelspec.resolution", "ss_resolution"} & header.keys()  # nothing tells the size
    sized = modelcard.header(made_run(tmp_path, call=run.call | {"width": 8, "height": 16}), pipe, ranks={"x": 4})
    assert (sized["modelspec.resolution"], sized["ss_resolution"]) == ("8x16", "(8, 16)")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            {"id": "me/base", "revision": "abc", "variant": "fp16"},
            "DiffusionPipeline.from_pretrained('me/base', revision='abc', variant='fp16', torch_dtype=torch.float32)",
        ),
        (
            {"id": "/data/xl.safetensors", "config": "me/xl"},
            "StableDiffusionXLPipeline.from_single_file('xl.safetensors', config='me/xl', torch_dtype=torch.float32)",
        ),
        (
            {"id": "/data/v1.safetensors", "pipeline": "StableDiffusionControlNetPipeline", "controlnet": "me/edges"},
            "StableDiffusionControlNetPipeline.from_single_file('v1.safetensors', controlnet=controlnet, torch_",
        ),
    ],
)
def test_the_snippet_loads_the_base_that_was_trained(model, line, tmp_path):
    facts = {"pipeline": "StableDiffusionXLPipeline"}
    code = modelcard.snippet(made_run(tmp_path, model=Model(**model), facts=facts), repo="ann/tune")
    assert f"pipe = {line}" in code
    assert line.partition(".")[0] in code.partition("from diffusers import ")[2].partition("\n")[0]
    assert ("controlnet = AutoModel.from_pretrained('me/edges'" in code) == ("controlnet" in model)


def test_lists_and_mappings_of_the_call_are_in_the_snippet(tmp_path):
    call = {
        "num_inference_steps": 4,
        "timesteps": [999, 499],
        "cross_attention_kwargs": {"scale": 0.5},
        "x": [object()],
    }
    code = modelcard.snippet(made_run(tmp_path, call=call), repo=None)
    assert "    timesteps=[999, 499],\n    cross_attention_kwargs={'scale': 0.5},\n" in code
    assert "x=" not in code


def test_prompts_are_no_paths(tmp_path):
    texts = [r"a cat \(animal\), sitting", "/imagine a cat", "~ a dream"]
    private = "/home/ann/secret prompts/list.txt"
    call = {"negative_prompt": texts[1]}
    settings = {"prompts": texts, "sampling": BASE["sampling"] | {"call": call}, "eval": {"prompts": private}}
    found = yaml.safe_load(modelcard.settings(made_run(tmp_path, settings=settings)))
    assert found["prompts"]["source"] == texts
    assert found["sampling"]["call"] == call
    assert found["eval"]["prompts"]["source"] == "list.txt"
    assert modelcard.public_name(texts[0]) == texts[0]
    assert modelcard.public_name(r"\\server\me\my x") == "my x"
