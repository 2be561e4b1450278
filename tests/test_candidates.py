"""What candidates mean: their words, whose settings they take, and that a weight and a mix do what they say."""

import pytest
import torch
from tiny_runs import made_run, save_tiny

from rewardtune import evaluate
from rewardtune.candidates import candidates, load_base, opened, run_of
from rewardtune.errors import ConfigError
from rewardtune.mixing import Mix
from rewardtune.runfolder import LORA_FILE

PROMPTS = ["red heart", "blue star"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = made_run(tmp_path_factory.mktemp("run") / "a", model)
    earlier = made_run(folder / "checkpoint-1", model, seed=1)
    (earlier / "config.yaml").unlink()  # a checkpoint has the settings of its run
    return folder


@pytest.fixture(scope="module")
def full(model, tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("full") / "full", model, kind="full")


@pytest.fixture(scope="module")
def pipe(run):
    return load_base(candidates(["base", str(run)])[:1])


def pictures(pipe, spec, beside):
    """Of one candidate, `base` having the settings of the run `beside`."""
    candidate = candidates(list(dict.fromkeys([spec, str(beside)])))[0]
    with opened(pipe, candidate):
        return evaluate.sample(pipe, PROMPTS, seeds=[1, 2], call=candidate.settings.call)


def test_words(run):
    first, half, mixed, aig, checkpoint, file = candidates(
        [
            str(run),
            f"{run}@0.5",
            f"{run}@0.7:base_steps=2",
            f"{run}:aig=1.5",
            f"{run}/checkpoint-1@-1",
            f"{run}/{LORA_FILE}@2",
        ]
    )
    assert [c.label for c in (first, half, mixed, aig)] == ["a", "a@0.5", "a@0.7:base_steps=2", "a:aig=1.5"]
    assert (checkpoint.label, file.label) == ("a/checkpoint-1@-1", "a@2")
    assert [c.weight for c in (first, half, mixed, aig, checkpoint, file)] == [1, 0.5, 0.7, 1, -1, 2]
    assert (first.mix, mixed.mix, aig.mix) == (None, Mix(base_steps=2), Mix(aig=1.5))
    assert {c.run for c in (first, checkpoint, file)} == {run}
    assert first.digest == half.digest != checkpoint.digest
    assert first.settings.call == {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}


def test_settings_asked_for_win_and_the_base_takes_those_of_the_first_run(run):
    base, tuned = candidates(["base", str(run)], steps=2, guidance=1.5)
    assert base.place is None
    assert base.settings.call == tuned.settings.call
    assert (tuned.settings.call["num_inference_steps"], tuned.settings.call["guidance_scale"]) == (2, 1.5)
    assert run_of(run / "checkpoint-1") == run_of(run / "export" / "diffusers") == run


def test_equal_labels_are_written_out(run, tmp_path):
    other = tmp_path / "a"
    other.mkdir()
    for name in (LORA_FILE, "config.yaml"):
        (other / name).write_bytes((run / name).read_bytes())
    assert [c.label for c in candidates([str(run), str(other), f"{run}@0.5"])] == [str(run), str(other), "a@0.5"]


def test_a_run_called_base_is_not_the_base_model(run, tmp_path, monkeypatch):
    other = tmp_path / "base"
    other.mkdir()
    for name in (LORA_FILE, "config.yaml"):
        (other / name).write_bytes((run / name).read_bytes())
    (found,) = candidates([str(other)])
    assert found.place is not None
    assert found.label == f"{tmp_path.name}/base"
    (tmp_path / "base.safetensors").write_bytes((run / LORA_FILE).read_bytes())
    assert candidates([str(tmp_path / "base.safetensors")], model="playground")[0].label == f"{tmp_path.name}/base"
    monkeypatch.chdir(tmp_path)
    assert candidates(["base"], model="playground")[0].place is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_and_mixes_have_base_and_tuned_as_their_ends(kind, run, full, pipe):
    """Of a LoRA and of a whole denoiser; the pipeline is the base model's again after each."""
    path = {"lora": run, "full": full}[kind]
    own, before = pipe.unet, pictures(pipe, "base", path)
    tuned = pictures(pipe, str(path), path)
    assert not torch.equal(before, tuned)
    for words, expected in [
        ("@0", before),
        ("@1", tuned),
        (":base_steps=0", tuned),
        (":base_steps=4", before),
        (":aig=0", tuned),
        (":aig=inf", before),
    ]:
        assert torch.equal(pictures(pipe, f"{path}{words}", path), expected), words
    torch.testing.assert_close(pictures(pipe, f"{path}@0:aig=1", path), before, rtol=0, atol=1e-6)
    middle = pictures(pipe, f"{path}@0.5", path)
    assert not torch.equal(middle, before)
    assert not torch.equal(middle, tuned)
    assert pipe.unet is own
    assert torch.equal(pictures(pipe, "base", path), before)


def test_a_scheduler_for_the_time_of_one_candidate(run, pipe):
    (tuned,) = candidates([str(run)], scheduler="EulerDiscreteScheduler")
    before = pipe.scheduler
    with opened(pipe, tuned):
        assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
        assert pipe.unet.peft_config
    assert pipe.scheduler is before
    assert not getattr(pipe.unet, "peft_config", None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", r"no LoRA at nowhere; give base, or RUN_OR_LORA"),
        ("{run}@x", r"the weight 'x' is no finite number"),
        ("{run}@inf", r"the weight 'inf'"),
        ("{run}:base_step=2", r"no option 'base_step' \(did you mean 'base_steps'"),
        ("{run}:base_steps=1.5", r"base_steps='1.5' is not a number of steps"),
        ("{run}:aig=-1", r"0 or more"),
        ("{run}:aig=1,base_steps=2", r"both given"),
        ("base@0.5", r"the base model has no weight"),
        ("base", r"only the base model is given; add --model"),
    ],
)
def test_what_is_no_candidate(spec, words, run):
    with pytest.raises(ConfigError, match=words):
        candidates([spec.format(run=run)])


def test_one_base_model_for_all(run, model, tmp_path):
    (tmp_path / "b").mkdir()
    text = (run / "config.yaml").read_text().replace("float32", "bfloat16")
    (tmp_path / "b" / "config.yaml").write_text(text)
    (tmp_path / "b" / LORA_FILE).write_bytes((run / LORA_FILE).read_bytes())
    with pytest.raises(ConfigError, match=r"share their base model"):
        candidates([str(run), str(tmp_path / "b")])
    text = (run / "config.yaml").read_text().replace("quantize: null", "quantize: nf4")
    (tmp_path / "b" / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"has model.quantize: None and .*b model.quantize: nf4; .*--model"):
        candidates([str(run), str(tmp_path / "b")])
    both = candidates([str(run), str(tmp_path / "b")], model=str(model))  # as the error says
    assert [one.settings.model.quantize for one in both] == [None, None]
    with pytest.raises(ConfigError, match=r"given twice"):
        candidates([str(run), str(run)])


def test_another_base_model_is_taken_as_it_is(tmp_path):
    """What picked the weights of the run's own base (quantize, revision ...) would be refused of a folder."""
    from rewardtune.candidates import settings_of

    model = "model: {id: me/base, revision: abc, variant: fp16, quantize: nf4, dtype: bfloat16}"
    (tmp_path / "config.yaml").write_text(f"{model}\nreward: brightness\nprompts: [red heart]\noutput_dir: x\n")
    for id, revision in ((str(tmp_path), None), ("me/base", "abc")):
        found = settings_of(tmp_path, model=id).model
        assert (found.id, found.revision, found.quantize, found.dtype) == (id, revision, None, "bfloat16")
        assert (found.variant is None) == (revision is None)
    assert settings_of(tmp_path).model.quantize == "nf4"


def test_opening_a_lora_says_nothing_of_text_encoders(run, pipe, caplog):
    """The app opens one for every picture; words on keys that fit nothing stay."""
    import logging

    logger = logging.getLogger("diffusers.loaders.lora_base")
    caplog.set_level("WARNING", logger=logger.name)
    logger.addHandler(caplog.handler)
    try:
        with opened(pipe, candidates([str(run)])[0]):
            logger.warning("keys are lost")
        logger.warning("No LoRA keys associated to a text encoder")
    finally:
        logger.removeHandler(caplog.handler)
    said = dict.fromkeys(record.getMessage()[:12] for record in caplog.records)  # twice, where it propagates too
    assert list(said) == ["keys are los", "No LoRA keys"]
