"""The contract (`contract.py`) on every pipeline of the zoo, and the table that is made of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import contract
import judge
import pipelines_table
import pytest
import tiny
import torch
import zoo

from rewardtune import adapters
from rewardtune.engine import count_steps, preflight, rollout
from rewardtune.engine.chain import signed_range
from rewardtune.errors import PreflightError
from rewardtune.listing import listing
from rewardtune.plan import Plan

TABLE = {row["pipeline"]: row for row in json.loads(pipelines_table.DATA.read_text())}
#: Families that `tiny` does not have, the cheap ones: run with the quick tests, with one method.
QUICK = [
    "Flux2Pipeline",
    "PixArtAlphaPipeline",
    "QwenImagePipeline",
    "CogView4Pipeline",
    "ZImagePipeline",
]
REFUSED = {
    "StableDiffusionAdapterPipeline": "returns ndarray for output_type='pt'",
    "Flux2KleinKVPipeline": "holds tensors (a cache): the call cannot be repeated from its arguments. Switch the cache",
}
EXACT = [name for name in zoo.PIPELINES if name not in REFUSED]


def as_json(row: contract.Row) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(row)))


@pytest.mark.parametrize("name", QUICK)
def test_contract_in_small(name: str) -> None:
    """One method and the LoRA's way; the whole row is compared by the slow test."""
    pipe, call = zoo.PIPELINES[name]()
    contract.check_gradient(pipe, call, "drtune", T=count_steps(pipe, **tiny.fresh(call)))
    contract.check_lora(name, pipe, call)
    assert TABLE[name]["status"] == "exact"
    assert TABLE[name]["denoiser"] == type(contract.denoiser_of(pipe)).__name__
    assert TABLE[name]["scheduler"] == type(pipe.scheduler).__name__
    assert TABLE[name]["lora"] == ("pipeline" if adapters.loads_lora(pipe) else "denoiser")


def test_a_whole_row() -> None:
    assert as_json(contract.row("PRXPipeline", methods=["drtune"], others=False)) == {
        **TABLE["PRXPipeline"],
        "schedulers": None,
    }


@pytest.mark.slow  # two seconds a pipeline
@pytest.mark.parametrize("name", EXACT)
def test_contract_of_every_pipeline(name: str) -> None:
    row = as_json(contract.row(name, others=TABLE[name]["schedulers"] is not None))
    assert row["status"] == "exact", row["reason"]
    assert row == TABLE[name]


@pytest.mark.parametrize(
    "name", [name if "3" in name else pytest.param(name, marks=pytest.mark.slow) for name in contract.IMG2IMG]
)
def test_chains_that_begin_with_a_picture(name: str) -> None:
    pipe, call = contract.image_to_image(name)
    T = preflight(pipe, **tiny.fresh(call)).T
    assert T in (4, 8)  # LCM makes all that it is asked for
    for method in contract.METHODS:
        contract.check_gradient(pipe, call, method, T=T)
    contract.check_left_as_it_was(pipe, call, T=T)


@pytest.mark.parametrize("name", contract.ROUNDED)
def test_what_some_differ_by_is_rounding(name: str) -> None:
    with contract.everywhere_double(*zoo.PIPELINES[name]()) as (pipe, call):
        T = count_steps(pipe, **tiny.fresh(call))
        assert contract.beside_the_oracle(pipe, call, judge.PLANS["draft-3"](T))[-1] < contract.DOUBLE


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    pipe, call = zoo.PIPELINES[name]()
    with pytest.raises(PreflightError) as refusal:
        preflight(pipe, **tiny.fresh(call))
    assert REFUSED[name] in str(refusal.value)
    assert TABLE[name]["status"] == "refused"
    assert TABLE[name]["reason"] == str(refusal.value)


def test_the_contract_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is told nothing of the gradient of its input, and an attribute that stays behind."""
    pipe, call = zoo.PIPELINES["SanaPipeline"]()
    T = count_steps(pipe, **tiny.fresh(call))
    kept = judge.PLANS["draft-3"]
    monkeypatch.setitem(judge.PLANS, "half", lambda T: dataclasses.replace(kept(T), input_gradient=0.5))
    honest = judge.engine_gradient

    def without(pipe, plan, call, **more):
        return honest(pipe, dataclasses.replace(plan, input_gradient=0.0), call, **more)

    monkeypatch.setattr(judge, "engine_gradient", without)
    with pytest.raises(AssertionError, match="half"):
        contract.check_gradient(pipe, call, "half", T=T)

    def leaves_something(pipe, plan, call, **more):
        pipe.transformer.left_behind = True
        return honest(pipe, plan, call, **more)

    monkeypatch.setattr(judge, "engine_gradient", leaves_something)
    with pytest.raises(AssertionError):
        contract.check_left_as_it_was(pipe, call, T=T)


# -- completeness ----------------------------------------------------------------------------------------------------


def test_every_text_to_image_pipeline_is_there_or_somebody_says_why() -> None:
    nobody = [name for name in contract.exported() if name not in zoo.PIPELINES and contract.why_not(name) is None]
    assert nobody == [], "build them in zoo.py, or say in contract.py why not"
    assert len(zoo.PIPELINES) >= 65


def test_nothing_is_left_out_that_is_there_or_does_not_exist() -> None:
    assert set(contract.LEFT_OUT) <= set(contract.exported())
    assert not set(contract.LEFT_OUT) & set(zoo.PIPELINES)
    assert set(zoo.PIPELINES) <= set(contract.exported())
    for name in ("BrandNewPipeline", "StableDiffusion9Pipeline", "FluxNextPipeline"):
        assert contract.why_not(name) is None, "the rules take whatever comes: the test above could not fail"


@pytest.mark.slow  # imports every pipeline of diffusers' own table
def test_the_table_of_diffusers_is_covered() -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    names = {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    missing = {name: contract.why_not(name) for name in names - set(zoo.PIPELINES)}
    assert set(missing) <= {
        "HeliosPipeline",  # moving pictures
        "HeliosPyramidPipeline",
        "KandinskyCombinedPipeline",
        "StableCascadeCombinedPipeline",
        "WuerstchenCombinedPipeline",
    }
    assert all(missing.values())


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_every_pipeline_and_the_page_is_made_of_it() -> None:
    assert list(TABLE) == list(zoo.PIPELINES)
    assert {name for name, row in TABLE.items() if row["status"] == "refused"} == set(REFUSED)
    assert sum(row["status"] == "exact" for row in TABLE.values()) >= 65
    made = pipelines_table.page(list(TABLE.values())).splitlines()
    there = pipelines_table.PAGE.read_text().splitlines()
    differ = [pair for pair in zip(made, there, strict=True) if pair[0] != pair[1]]
    assert all(re.search(r"torch \d+\.\d+", line) for pair in differ for line in pair), differ  # the versions may


def test_ls_models_shows_it() -> None:
    shown = " ".join(listing(["models"]).split())
    assert all(name in shown for name in zoo.PIPELINES)
    assert "refused: StableDiffusionAdapterPipeline returns ndarray" in shown


def test_light_pictures_are_in_the_range_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """IF leaves "pt" in [-1, 1]; where no picture has a value below 0 it does not look like it, and preflight knows."""
    pipe, call = zoo.PIPELINES["IFPipeline"]()
    step = pipe.scheduler.step

    @functools.wraps(step)
    def lightened(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        light = out[0].clamp(-1, 1) / 2 + 0.5
        return (light, *out[1:]) if isinstance(out, tuple) else type(out)(**{**out, "prev_sample": light})

    monkeypatch.setattr(pipe.scheduler, "step", lightened)
    facts = preflight(pipe, **tiny.fresh(call))
    other, plain = tiny.stable_diffusion()
    preflight(other, **tiny.fresh(plain))
    assert (signed_range[pipe], signed_range[other]) == (True, False)
    torch.manual_seed(0)
    expected = torch.as_tensor(pipe(**tiny.fresh(call), output_type="np")[0]).permute(0, 3, 1, 2)
    assert float(expected.min()) >= 0.5
    with rollout(pipe, Plan(T=facts.T, train=frozenset({facts.T - 1})), seed=0, **tiny.fresh(call)) as tape:
        assert torch.allclose(tape.images.detach(), expected, atol=1e-5)
