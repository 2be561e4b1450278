"""`rewardtune check`: a good run passes, each broken one gives its line and exit code, and nothing is left behind."""

import importlib.util
import json
import re
import time

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from tiny_runs import BASE, save_tiny, write_run

from rewardtune import check as checking
from rewardtune import dryrun
from rewardtune.cli import main
from rewardtune.config import load_config
from rewardtune.dryrun import Measured, Meter, Phase
from rewardtune.errors import ConfigError
from rewardtune.watch import Watch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def check(tmp_path, model, capsys, monkeypatch):
    """check(*arguments, **sections) -> (exit code, stdout, stderr); and no file but the run file itself is there."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, keep=(), **changes):
        path = write_run(tmp_path, changes.pop("at", model), **changes)
        code = main(["check", str(path), *arguments])
        out, err = capsys.readouterr()
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run.yaml", *keep])
        return code, out, err

    return run


def errors(out):
    return [line for line in out.splitlines() if line.startswith("error")]


def warnings(out):
    return [line for line in out.splitlines() if line.startswith("warning")]


def test_a_good_run_passes(check):
    code, out, _ = check()
    assert code == 0
    assert "all checks passed" in out
    lines = out.splitlines()[:-1]
    assert all(line.startswith("ok ") for line in lines), out
    checked = [re.match(r"ok +([^:]+):", line)[1] for line in lines]
    for what in ("output_dir", "prompts", "method", "model", "pipeline", "adapter", "steps", "plan", "preflight"):
        assert what in checked
    assert "gradient of brightness" in checked
    assert re.search(r"plan: \|[.#>-]+\| is the first update's", out)
    assert "T = 4 calls" in out


def test_a_run_with_everything_passes(check, tmp_path):
    """Held-out rewards (one without a gradient), rules, KL, the denoising loss, offload, a scheduler of its own."""
    code, out, _ = check(
        reward=["brightness", {"name": "jpeg_bytes", "weight": 0.0}],
        sampling=BASE["sampling"] | {"scheduler": "EulerDiscreteScheduler"},
        guards={"rewards": ["symmetry", "jpeg_bytes"], "rules": [{"metric": "symmetry", "rises_by": 0.5}]},
        regularize={"kl": 0.1, "denoise": {"weight": 0.1, "count": 2}},
        eval={"count": 2, "every": 1},
        memory={"offload": ["text_encoders", "vae", "reward"]},
    )
    assert (code, errors(out)) == (0, []), out
    assert "held-out symmetry: reaches the pictures" in out
    assert "held-out jpeg_bytes: it has no gradient, and needs none" in out
    assert "gradient of jpeg_bytes: it has no gradient, and needs none" in out
    assert "heldout_jpeg_bytes" in out


NAN = "import torch\n\ndef nan(images, prompts):\n    return images.mean((1, 2, 3)) * float('nan')\n"
FLAT = "def flat(images, prompts):\n    return images.detach().mean((1, 2, 3))\n"

BROKEN = {
    "prompts": ({"prompts": "none.txt"}, 2, "prompts: prompt file none.txt does not exist"),
    "eval prompts": ({"eval": {"prompts": "no.csv", "count": 1}}, 2, "eval.prompts: prompt file no.csv does not exist"),
    "method": ({"method": {"name": "drtun"}}, 2, "method: unknown method 'drtun'"),
    "K": (
        {"method": {"name": "drtune", "options": {"K": 5, "m": 2}}},
        2,
        "plan: drtune: K=5 does not fit into the T=4",
    ),
    "scheduler": (
        {"sampling": BASE["sampling"] | {"scheduler": "DDIMSchedular"}},
        2,
        "sampling.scheduler: unknown scheduler 'DDIMSchedular'",
    ),
    "optimizer": (
        {"optim": BASE["optim"] | {"optimizer": "prodigy"}},
        2,
        "optim.optimizer: optim.optimizer=prodigy needs prodigyopt",
    ),
    "tracker": ({"log": {"trackers": ["trackio"]}}, 2, "log.trackers: log.trackers: trackio is not installed"),
    "images": (
        {"regularize": {"denoise": {"weight": 0.1, "images": "pictures"}}},
        2,
        "regularize.denoise.images: denoise.images: pictures is not a folder",
    ),
    "model": ({"at": "nowhere/tiny.safetensors"}, 2, "model: model nowhere/tiny.safetensors: no such file"),
    "reward": ({"reward": "brightnes"}, 2, "reward brightnes: unknown reward 'brightnes'"),
    "reward folder": (
        {"reward": {"name": "clipscore", "options": {"model": "./clip"}}},
        2,
        "reward clipscore: clipscore: cannot load './clip': there is no such folder",
    ),
    "guidance": (
        {"sampling": BASE["sampling"] | {"guidance": 1.0}},
        2,
        "sampling: guidance_scale=1.0 switches classifier-free guidance off",
    ),
    "rule": (
        {"guards": {"rules": [{"metric": "clipscor", "falls_by": 0.1}]}, "eval": {"count": 2, "every": 1}},
        2,
        "guards: guards.rules[0]: metric 'clipscor' is not measured",
    ),
    "held out": (
        {"guards": {"rewards": ["brightness"]}},
        2,
        "guards.rewards: guards.rewards: brightness is trained on",
    ),
    "targets": ({"adapter": {"rank": 2, "targets": ["to_x"]}}, 2, "adapter: "),
    "steps": ({"sampling": BASE["sampling"] | {"steps": 1001}}, 2, "steps: StableDiffusionPipeline with DDIMScheduler"),
    "flat": ({"reward": "broken:flat"}, 3, "gradient of flat: reward 'flat' has no gradient"),
    "nan": ({"reward": "broken:nan"}, 3, "gradient of nan: reward 'nan' scored random images"),
}


QUICK = ("K", "guidance", "rule", "nan")  # the others, most of them in one run: test_all_independent_problems_at_once


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in BROKEN])
def test_broken_runs(case, check, tmp_path, monkeypatch):
    changes, exit_code, line = BROKEN[case]
    keep = ()
    if exit_code == 3:
        (tmp_path / "broken.py").write_text(NAN + FLAT)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("sys.dont_write_bytecode", True)
        keep = ("broken.py",)
    if case == "optimizer" and importlib.util.find_spec("prodigyopt"):
        pytest.skip("prodigyopt is installed")
    if case == "tracker":
        own = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *more: None if name == "trackio" else own(name, *more)
        )
    code, out, _ = check(keep=keep, **changes)
    found = errors(out)
    assert code == exit_code, out
    assert len(found) == 1, out
    assert line in found[0]


def test_all_independent_problems_at_once(check):
    code, out, _ = check(
        prompts="none.txt",
        method={"name": "drtun"},
        reward=["brightnes", "symmetri"],
        guards={"rewards": ["colr"]},
        sampling=BASE["sampling"] | {"scheduler": "Eular"},
        model={"id": "nowhere.safetensors", "device": "cuda:99"},
    )
    whats = [re.match(r"error +([^:]+):", line)[1] for line in errors(out)]
    assert code == 2
    assert whats == [
        "prompts",
        "method",
        "sampling.scheduler",
        "model.device",
        "reward brightnes",
        "reward symmetri",
        "guards.rewards colr",
        "model",
    ]
    assert "8 errors" in out


def test_a_device_that_is_not_there_is_one_error(check):
    code, out, _ = check("model.device=cuda:99")
    assert code == 2
    assert len(errors(out)) == 1
    assert "model.device='cuda:99': " in errors(out)[0]
    assert "this machine has auto, cpu" in errors(out)[0]


def test_a_wrong_key_is_said_as_train_says_it(check):
    code, out, err = check("optim.rl=1")
    assert (code, out) == (2, "")
    assert "unknown key 'optim.rl'" in err


def test_used_output_folders(check, tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "run.json").write_text("{}")
    code, out, _ = check(keep=["out"])
    assert code == 0
    assert "holds a run already" in warnings(out)[0]
    (out_dir / "run.json").rename(out_dir / "thesis.tex")
    code, out, _ = check(keep=["out"])
    assert code == 2
    assert "exists and is not empty" in errors(out)[0]
    assert [p.name for p in out_dir.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file, not a folder"):
        checking._output(out_dir / "thesis.tex" / "run")


def test_broken_pictures(check, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "a.txt").write_text("a red heart")
    code, out, _ = check(keep=["pictures"], regularize={"denoise": {"weight": 0.1, "images": "pictures"}})
    assert code == 2
    assert "regularize.denoise.images: 1 of 1 pictures cannot be opened: a.png" in out


# -- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """hub(answer): what the hub says to model_info, an exception is raised; the cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def put(answer):
        def model_info(self, repo, **_):
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return put


def test_without_network_it_is_a_warning(check, hub):
    hub(ConnectionError("Name or service not known"))
    code, out, _ = check(at="someone/a-model", reward="pickscore")
    assert (code, errors(out)) == (0, []), out
    assert [line.split(":")[0] for line in warnings(out)] == ["warning  reward pickscore", "warning  model"]
    assert "could not be checked: the hub cannot be reached" in warnings(out)[1]
    assert "hf download someone/a-model" in warnings(out)[1]
    last = "2 warnings: the run can start once these are reachable: reward pickscore, model"
    assert out.splitlines()[-1] == last


def test_a_controlnet_without_network_is_a_warning(hub, tmp_path, model):
    hub(ConnectionError("Name or service not known"))
    more = {"controlnet": "someone/a-control", "pipeline": "StableDiffusionControlNetPipeline"}
    config = load_config(write_run(tmp_path, model, **{"model": {"id": str(model)} | more}))
    with pytest.raises(checking.Unreachable, match="someone/a-control could not be checked"):
        checking._model(config)
    findings = checking.Findings(print)
    assert findings.attempt("model", lambda: checking._model(config)) is None
    assert (findings.exit_code, [each.level for each in findings.found]) == (0, ["warning"])


def test_float16_on_a_cpu_is_a_warning(check):
    _, out, _ = check("model.dtype=float16", "model.device=cpu")
    assert "float16 on a CPU is slow" in next(line for line in warnings(out) if "model.dtype" in line)


def test_offline_and_not_in_the_cache_is_an_error(check, hub, monkeypatch):
    hub(AssertionError("nobody asks the hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, _ = check(at="someone/a-model", reward="pickscore")
    assert (code, len(errors(out))) == (2, 2), out
    assert all("is not in the cache and HF_HUB_OFFLINE is set" in line for line in errors(out))


def test_unknown_to_the_hub(check, hub):
    from huggingface_hub.errors import RepositoryNotFoundError

    class UnknownError(RepositoryNotFoundError):
        """Without a response, whose library differs between versions of the client."""

        def __init__(self):
            pass

        def __str__(self):
            return "401 Client Error"

    hub(UnknownError())
    code, out, _ = check(at="someone/a-model")
    assert (code, len(errors(out))) == (2, 1), out
    assert "model: someone/a-model is not on the hub, or not for you" in errors(out)[0]


def test_another_kind_of_repository(check, hub):
    hub(type("Info", (), {"siblings": [type("File", (), {"rfilename": "config.json"})]}))
    code, out, _ = check(at="someone/a-model")
    assert code == 2
    assert "holds no model_index.json" in errors(out)[0]


def test_in_the_cache_nobody_is_asked(check, hub, monkeypatch):
    hub(AssertionError("nobody asks the hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/model_index.json")
    assert checking._resolve("a/b", revision=None, files=["model_index.json"]) == "a/b is in the cache"


# -- the dry run -----------------------------------------------------------------------------------------------------

PHASES = ("text encoding", "sampling", "decode + reward", "backward of the decoder", "backward of step", "optimiser")


def measured_run(monkeypatch):
    """Keeps what `measure` found, and its own clock around the update."""
    kept = {}
    real = dryrun.measure

    def measure(tuner, config, meter):
        update = tuner._update

        def timed(*arguments):
            started = time.perf_counter()
            record = update(*arguments)
            kept["update"] = time.perf_counter() - started
            kept["trained"] = record["trained"]
            return record

        tuner._update = timed
        kept["pipe"] = tuner.pipe
        kept["measured"] = real(tuner, config, meter)
        return kept["measured"]

    monkeypatch.setattr(dryrun, "measure", measure)
    return kept


@pytest.mark.parametrize("name", ["drtune", pytest.param("draft_lv", marks=pytest.mark.slow)])
def test_dry_run(name, check, monkeypatch):
    kept = measured_run(monkeypatch)
    options = {"drtune": {"K": 2, "m": 2}, "draft_lv": {"n": 2}}[name]
    code, out, _ = check(
        "--dry-run",
        method={"name": name, "options": options},
        optim=BASE["optim"] | {"batch": 4, "micro_batch": 2},
        regularize={"denoise": {"weight": 0.1, "count": 2}},
        memory={"cache_text": False},
    )
    assert code == 0, out
    for phase in (*PHASES, "denoising loss", "evaluation"):
        assert re.search(rf"^{re.escape(phase)}.* \d+\.\d\d +[\d.]+ [KMG]iB$", out, re.MULTILINE), phase
    phases = kept["measured"].phases
    assert [name for name in phases if name.startswith(dryrun.STEP)] == [
        f"backward of step {i}" for i in reversed(kept["trained"])
    ]
    total = sum(phase.seconds for name, phase in phases.items() if name != dryrun.EVALUATION)
    assert total == pytest.approx(kept["update"], rel=0.2)
    assert phases["sampling"].seconds > phases["optimiser"].seconds  # a chain of networks against a tiny AdamW
    for owner, word in ((kept["pipe"], "encode_prompt"), (kept["pipe"].scheduler, "set_timesteps")):
        assert word not in vars(owner)  # all is as it was


@pytest.mark.slow  # trains: seven seconds
def test_the_expected_time_and_size_are_those_of_a_real_run(check, tmp_path, model, monkeypatch):
    kept = measured_run(monkeypatch)
    changes = {
        "optim": BASE["optim"] | {"steps": 5, "batch": 4, "ema": 0.9},
        "eval": {"count": 4, "every": 2},
        "checkpoints": {"every": 5},
    }
    code, out, _ = check("--dry-run", **changes)
    assert code == 0, out
    config = load_config(str(tmp_path / "run.yaml"), [])
    expected = dryrun.expected_seconds(kept["measured"], config, prompts=3)

    looks = []
    look = Watch.look

    def timed(*arguments, **settings):
        started = time.perf_counter()
        try:
            return look(*arguments, **settings)
        finally:
            looks.append(time.perf_counter() - started)

    monkeypatch.setattr(Watch, "look", timed)
    assert main(["train", str(tmp_path / "run.yaml"), "checkpoints.best=null"]) == 0
    assert len(looks) == dryrun.evaluations(config)
    folder = tmp_path / "out"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    real = sum(record["seconds"] for record in records) + sum(looks)
    assert real / 2 < expected < real * 2
    files = [load_file(path) for path in (folder / "checkpoint-5").glob("*.safetensors")]
    assert len(files) == 4  # adapter, optimiser, average, LoRA
    assert kept["measured"].checkpoint == sum(tensor.nbytes for file in files for tensor in file.values())


def raises_in(monkeypatch, phase):
    """From the start of the dry run on, what belongs to `phase` runs out of memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    import rewardtune.panel
    from rewardtune.regularize import DenoisingLoss
    from rewardtune.rewards import Brightness

    owner, name, grad = {
        "text encoding": (CLIPTextModel, "forward", None),
        "sampling": (UNet2DConditionModel, "forward", False),
        "decode": (AutoencoderKL, "decode", False),
        "reward": (Brightness, "native", None),
        "backward of the decoder": (AutoencoderKL, "decode", True),
        "backward of step": (UNet2DConditionModel, "forward", True),
        "denoising loss": (DenoisingLoss, "add", None),
        "optimiser": (torch.optim.AdamW, "step", None),
        "evaluation": (rewardtune.panel, "sharpness", None),
    }[phase]
    real, measure = getattr(owner, name), dryrun.measure

    def full(*arguments, **settings):
        if grad is None or torch.is_grad_enabled() == grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(*arguments, **settings)

    def armed(*arguments):
        monkeypatch.setattr(owner, name, full)
        return measure(*arguments)

    monkeypatch.setattr(dryrun, "measure", armed)


SLOW = ("text encoding", "sampling", "decode", "backward of the decoder", "denoising loss", "optimiser", "evaluation")


@pytest.mark.parametrize(
    "phase", ["reward", "backward of step", *(pytest.param(phase, marks=pytest.mark.slow) for phase in SLOW)]
)
def test_out_of_memory_is_named_by_its_phase(phase, check, monkeypatch):
    raises_in(monkeypatch, phase)
    denoise = {"regularize": {"denoise": {"weight": 0.1, "count": 2}}} if phase == "denoising loss" else {}
    code, out, err = check("--dry-run", **denoise)
    named = {"decode": "decode + reward", "reward": "decode + reward"}.get(phase, phase)
    assert (code, err) == (3, ""), out
    (line,) = errors(out)
    assert line.startswith(f"error    dry run: out of memory in: {named}"), line
    assert "what helps, in this order" in line
    if phase == "backward of step":
        assert "optim.micro_batch=1" in line
        assert "memory.gradient_checkpointing=true" in line


def test_out_of_memory_before_the_dry_run(check, monkeypatch):
    from rewardtune.rewards import Brightness

    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Brightness, "native", full)
    code, out, _ = check("--dry-run")
    assert code == 3
    assert "gradient of brightness: out of memory" in errors(out)[0]
    assert "dry run: not made" in warnings(out)[0]


def test_nothing_is_left_on_after_an_error(check, monkeypatch):
    from rewardtune.engine.call import Call

    replay = Call.replay
    raises_in(monkeypatch, "backward of step")
    check("--dry-run")
    assert Call.replay is replay


def config_of(tmp_path, model, *overrides):
    return load_config(str(write_run(tmp_path, model)), list(overrides))


def test_advice_names_only_what_is_not_set(tmp_path, model):
    step = f"{dryrun.STEP} 3"
    plain = "\n".join(dryrun.advice(step, config_of(tmp_path, model, "model.device=cuda")))
    for word in (
        "micro_batch=1",
        "gradient_checkpointing=true",
        "dtype=bfloat16",
        "offload=[text_encoders, vae, reward]",
    ):
        assert word in plain
    assert "vae_dtype" not in plain
    assert "method.options.K" in plain
    done = ["optim.micro_batch=1", "memory.gradient_checkpointing=true", "model.dtype=bfloat16", "model.device=cuda"]
    done += ["memory.offload=[text_encoders, vae, reward]", "model.quantize=nf4"]
    rest = dryrun.advice(step, config_of(tmp_path, model, *done))
    assert [line.strip() for line in rest[1:-1]] == ["sampling.width and sampling.height smaller"]
    assert "memory.vae_dtype=bfloat16" in "\n".join(dryrun.advice(dryrun.DECODER, config_of(tmp_path, model)))
    assert "offload" not in "\n".join(dryrun.advice(step, config_of(tmp_path, model, "model.device=cpu")))
    full = dryrun.advice(dryrun.OPTIMISER, config_of(tmp_path, model, "adapter={kind: full}", "model.device=cuda"))
    assert "optim.optimizer=adamw8bit" in "\n".join(full)
    assert "adapter.kind=lora" in "\n".join(full)
    assert "micro_batch" not in "\n".join(full)


def test_a_peak_that_is_close_is_a_warning(check, monkeypatch):
    real = dryrun.measure

    def small_machine(*arguments):
        found = real(*arguments)
        return Measured(**{**vars(found), "total": round(found.peak[1] * 1.05)})

    monkeypatch.setattr(dryrun, "measure", small_machine)
    code, out, _ = check("--dry-run")
    assert code == 0
    assert warnings(out)[0].startswith("warning  dry run: one update made")
    assert "that is close; what helps, in this order:" in out
    assert "95% of" in out


def measured(**changes):
    settings = {
        "phases": {"sampling": Phase(1.0, 1)},
        "update": 2.0,
        "text": 0.5,
        "of_prompt": 0.1,
        "room": 1000,
        "pictures": 8,
        "evaluation": 3.0,
        "checkpoint": 1,
        "total": 2,
        "cuda": False,
    }
    return Measured(**settings | changes)


def test_the_sum_of_the_expected_time(tmp_path, model):
    """By hand: 10 updates of 1.5 s, 2 + 4 evaluations of 3 s, and 7 prompts, or as many as are seen, at 0.1 s."""
    config = config_of(tmp_path, model, "optim.steps=10", "eval.every=2")
    assert dryrun.evaluations(config) == 6
    assert dryrun.expected_seconds(measured(), config, prompts=7) == pytest.approx(15 + 18 + 0.7)
    assert dryrun.expected_seconds(measured(), config, prompts=500) == pytest.approx(15 + 18 + 2.0)
    assert dryrun.expected_seconds(measured(room=6), config, prompts=7) == pytest.approx(15 + 18 + 2.0)
    short = config_of(tmp_path, model, "optim.steps=10", "optim.max_seconds=6")
    assert dryrun.expected_seconds(measured(), short, prompts=7) == pytest.approx(6 + 6)
    watched = config_of(tmp_path, model, "optim.steps=10", "eval.every=2", "optim.max_seconds=1000")
    assert dryrun.expected_seconds(measured(), watched, prompts=7) == pytest.approx(15 + 18 + 0.7)


def test_the_meter_sees_a_peak_in_its_phase():
    """256 MB, alive in one phase only: in its peak, and in no other's."""
    meter = Meter(torch.device("cpu"))
    with meter.running():
        meter.mark("before")
        meter.mark("large")
        block = torch.ones(64 * 2**20)
        time.sleep(0.03)
        del block
        meter.mark("after")
        time.sleep(0.03)
    peaks = {name: phase.peak / 2**20 for name, phase in meter.phases.items()}
    assert peaks["large"] - peaks["before"] == pytest.approx(256, abs=32)
    assert peaks["after"] == pytest.approx(peaks["before"], abs=32)
    assert 0.03 <= meter.phases["large"].seconds < 1


def test_a_held_phase_is_not_left_by_a_mark():
    meter = Meter(torch.device("cpu"))
    with meter.running():
        with meter.holding("outer", then="next"):
            meter.mark("inner")
            with meter.holding("inner"):
                assert meter.current == "outer"
        assert meter.current == "next"
    assert "inner" not in meter.phases


def test_many_trained_steps_share_a_row():
    many = {f"{dryrun.STEP} {i}": Phase(1.0, i) for i in range(9)}
    assert dryrun._in_order(many) == {"backward of steps, all 9": Phase(9.0, 8)}
