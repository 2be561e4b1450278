"""What candidates mean: their words, whose settings they take, and that a weight and a mix do what they say."""

import pytest
import torch
from tiny_runs import save_tiny, write_run

from rewardtune import evaluate
from rewardtune.candidates import candidates, load_base, opened, run_of
from rewardtune.cli import main
from rewardtune.errors import ConfigError
from rewardtune.mixing import Mix
from rewardtune.runfolder import LORA_FILE

PROMPTS = ["red heart", "blue star"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    optim = {"steps": 2, "lr": 3e-2, "batch": 2}
    file = write_run(folder, model, output_dir=str(folder / "a"), optim=optim, eval={"count": 3})
    assert main(["train", str(file), "checkpoints.every=1"]) == 0
    return folder / "a"


@pytest.fixture(scope="module")
def full(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    file = write_run(folder, model, output_dir=str(folder / "full"), adapter={"kind": "full"})
    assert main(["train", str(file), "optim.lr=1e-3"]) == 0
    return folder / "full"


def pictures(spec, **options):
    (candidate,) = candidates([str(spec)], **options)
    with opened(load_base([candidate]), candidate) as pipe:
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
    for name in (LORA_FILE, "config.yaml", "run.json"):
        (other / name).write_bytes((run / name).read_bytes())
    assert [c.label for c in candidates([str(run), str(other), f"{run}@0.5"])] == [str(run), str(other), "a@0.5"]


def test_weights_and_mixes_have_base_and_tuned_as_their_ends(run):
    tuned = pictures(run)
    found = candidates(["base", str(run)])
    with opened(load_base(found), found[0]) as pipe:
        base = evaluate.sample(pipe, PROMPTS, seeds=[1, 2], call=found[0].settings.call)
    assert not torch.equal(base, tuned)
    for spec, expected in [
        (f"{run}@0", base),
        (f"{run}@1", tuned),
        (f"{run}:base_steps=0", tuned),
        (f"{run}:base_steps=4", base),
        (f"{run}:aig=0", tuned),
        (f"{run}:aig=inf", base),
        (f"{run}@0:aig=1", base),
    ]:
        torch.testing.assert_close(pictures(spec), expected, rtol=0, atol=0 if ":aig=1" not in spec else 1e-6)
    assert not torch.equal(pictures(f"{run}@0.5"), tuned)


def test_a_whole_denoiser_too(full):
    found = candidates(["base", str(full)])
    pipe = load_base(found)
    own = pipe.unet
    with opened(pipe, found[0]):
        base = evaluate.sample(pipe, PROMPTS, seeds=[1, 2], call=found[0].settings.call)
    with opened(pipe, found[1]):
        assert pipe.unet is not own
        tuned = evaluate.sample(pipe, PROMPTS, seeds=[1, 2], call=found[1].settings.call)
    assert pipe.unet is own
    assert not torch.equal(base, tuned)
    assert torch.equal(pictures(f"{full}@0"), base)
    assert torch.equal(pictures(f"{full}:base_steps=4"), base)
    assert torch.equal(pictures(f"{full}:aig=0"), tuned)
    middle = pictures(f"{full}@0.5")
    assert not torch.equal(middle, base)
    assert not torch.equal(middle, tuned)


def test_the_pipeline_is_the_base_again(run):
    base, tuned = candidates(["base", str(run)], scheduler="EulerDiscreteScheduler")
    pipe = load_base([base])
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
    with pytest.raises(ConfigError, match=r"given twice"):
        candidates([str(run), str(run)])
