"""Base and tuned model mixed in sampling: the limits are one of the two bit for bit, the middle is the formula."""

import math

import pytest
import tiny
import torch

from rewardtune.engine import count_steps
from rewardtune.engine.call import adapters_off
from rewardtune.errors import ConfigError
from rewardtune.mixing import Mix, mixed

FAMILIES = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
}


def pictures(pipe, call):
    return pipe(**tiny.fresh(call), output_type="pt").images


def both(pipe, call):
    """(base, tuned)."""
    with adapters_off(tiny.denoiser_of(pipe)):
        base = pictures(pipe, call)
    tuned = pictures(pipe, call)
    assert not torch.equal(base, tuned)
    return base, tuned


def mix_of(pipe, call, mix, steps=None, **options):
    with mixed(pipe, mix, steps=steps or count_steps(pipe, **call), **options):
        return pictures(pipe, call)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_base_and_tuned_bit_for_bit(family):
    pipe, call = FAMILIES[family](steps=4)
    base, tuned = both(pipe, call)
    for mix, expected in [
        (Mix(base_steps=0), tuned),
        (Mix(base_steps=4), base),
        (Mix(base_steps=99), base),
        (Mix(aig=0.0), tuned),
        (Mix(aig=math.inf), base),
    ]:
        assert torch.equal(mix_of(pipe, call, mix), expected), mix
    assert torch.equal(pictures(pipe, call), tuned)  # and the pipeline is as before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_middle_is_neither_and_lies_nearer_to_the_end_it_nears(family):
    pipe, call = FAMILIES[family](steps=4)
    base, tuned = both(pipe, call)
    near, far = (mix_of(pipe, call, Mix(aig=p)) for p in (1e-4, 1e4))
    # (i / T)^p: at p = 1e-4 only the first step is the base's, at p = 1e4 every step is
    torch.testing.assert_close(near, mix_of(pipe, call, Mix(base_steps=1)), rtol=0, atol=1e-3)
    torch.testing.assert_close(far, base, rtol=0, atol=1e-6)
    middle = mix_of(pipe, call, Mix(base_steps=2))
    assert not torch.equal(middle, base)
    assert not torch.equal(middle, tuned)


@pytest.mark.parametrize("mix", [Mix(base_steps=2), Mix(aig=0.7), Mix(aig=2.0)])
def test_it_is_the_formula_in_a_sampling_loop_written_out(mix):
    """The oracle: DDIM without guidance by hand, both networks called at each step."""
    pipe, call = tiny.stable_diffusion(steps=5)
    call = {**call, "guidance_scale": 1.0}
    text = pipe.encode_prompt(call["prompt"], "cpu", 1, False)[0]
    generator = tiny.fresh(call)["generator"]
    pipe.scheduler.set_timesteps(5)
    with torch.no_grad():
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=each) for each in generator])
        for i, t in enumerate(pipe.scheduler.timesteps):
            tuned = pipe.unet(x, t, encoder_hidden_states=text).sample
            with adapters_off(pipe.unet):
                base = pipe.unet(x, t, encoder_hidden_states=text).sample
            w = float(i < 2) if mix.aig is None else 1 - (i / 5) ** mix.aig
            x = pipe.scheduler.step(w * base + (1 - w) * tuned, t, x).prev_sample
    found = pipe_latents(pipe, call, mix)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def pipe_latents(pipe, call, mix):
    with mixed(pipe, mix, steps=5):
        return pipe(**tiny.fresh(call), output_type="latent").images


def test_steps_are_counted_as_the_scheduler_takes_them():
    """Heun takes 2n - 1 steps: base_steps = 2n - 1 is the base alone, one less is not. Two calls, two counts."""
    pipe, call = tiny.stable_diffusion(steps=3)
    tiny.set_scheduler(pipe, "HeunDiscreteScheduler")
    base, _ = both(pipe, call)
    assert count_steps(pipe, **call) == 5
    with mixed(pipe, Mix(base_steps=5), steps=5):
        assert torch.equal(pictures(pipe, call), base)
        assert torch.equal(pictures(pipe, call), base)
    assert not torch.equal(mix_of(pipe, call, Mix(base_steps=4)), base)


def test_a_base_network_of_its_own_for_full_fine_tuning():
    pipe, call = tiny.stable_diffusion(lora=False)
    untuned = tiny.unet(seed=99)
    tuned = pictures(pipe, call)
    own, pipe.unet = pipe.unet, untuned
    base, pipe.unet = pictures(pipe, call), own
    assert torch.equal(mix_of(pipe, call, Mix(base_steps=4), base=untuned), base)
    assert torch.equal(mix_of(pipe, call, Mix(base_steps=0), base=untuned), tuned)
    with pytest.raises(ConfigError, match=r"carries no adapter"):
        mix_of(pipe, call, Mix(base_steps=1))


def test_everything_is_put_back_after_an_error():
    pipe, call = tiny.stable_diffusion()
    before = pictures(pipe, call)
    with pytest.raises(ZeroDivisionError), mixed(pipe, Mix(base_steps=1), steps=4):
        raise ZeroDivisionError
    assert "step" not in pipe.scheduler.__dict__
    assert "set_timesteps" not in pipe.scheduler.__dict__
    assert pipe.unet._compiled_call_impl is None
    assert torch.equal(pictures(pipe, call), before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "nothing given"),
        ({"base_steps": 1, "aig": 1.0}, "both given"),
        ({"base_steps": -1}, "0 or more"),
        ({"aig": -0.5}, "0 or more"),
        ({"aig": math.nan}, "0 or more"),
    ],
)
def test_what_is_no_mix(given, words):
    with pytest.raises(ConfigError, match=words):
        Mix(**given)
