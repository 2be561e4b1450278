"""Optimisers, schedules and the moving average against their closed forms."""

import importlib.util
import math

import pytest
import torch

from rewardtune.errors import ConfigError
from rewardtune.optimizers import SCHEDULES, Ema, make_optimizer, make_schedule


def parameters(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(count)]


def test_adamw_makes_the_step_of_its_paper():
    """First step of Loshchilov and Hutter: theta - lr * weight_decay * theta - lr * g / (|g| + eps)."""
    (theta,) = parameters(1)
    before, gradient = theta.detach().clone(), torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 4.0]], dtype=torch.float64)
    theta.grad = gradient.clone()
    make_optimizer("adamw", [theta], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2).step()
    expected = before * (1 - 0.1 * 0.2) - 0.1 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(theta.detach(), expected, rtol=0, atol=1e-12)


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'adamW'.*did you mean 'adamw'.*legal are adamw, adamw8bit, prodigy"):
        make_optimizer("adamW", parameters(), lr=0.1)


@pytest.mark.parametrize(("name", "module"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_extra_says_what_to_install(name, module, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=rf"{name} needs {module}.*pip install 'rewardtune\[optim"):
        make_optimizer(name, parameters(), lr=1.0)


def test_prodigy_wants_its_own_lr(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: object())
    with pytest.raises(ConfigError, match=r"optim.lr=2e-05 with prodigy.*use lr=1.0"):
        make_optimizer("prodigy", parameters(), lr=2e-5)


def test_adamw8bit_is_for_cuda(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: object())
    with pytest.raises(ConfigError, match=r"adamw8bit is for CUDA"):
        make_optimizer("adamw8bit", parameters(), lr=1e-4)


def test_prodigy_descends():
    pytest.importorskip("prodigyopt")
    (x,) = parameters(1)
    optimizer = make_optimizer("prodigy", [x], lr=1.0)
    first = float(x.square().sum())
    for _ in range(150):  # the first fifty find the step size, from 1e-6 up
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    assert float(x.square().sum()) < 0.01 * first


def rates(name, *, warmup, steps, lr=2.0):
    (x,) = parameters(1)
    optimizer = make_optimizer("adamw", [x], lr=lr)
    schedule = make_schedule(name, optimizer, warmup=warmup, steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        x.grad = torch.ones_like(x)
        optimizer.step()
        schedule.step()
    return found


CLOSED_FORMS = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "polynomial": lambda share: 1 - share + share * 1e-7 / 2.0,  # power 1, down to lr_end = 1e-7
    "cosine_with_restarts": lambda share: 0.5 * (1 + math.cos(math.pi * share)),  # one cycle
}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_formulas(name, warmup):
    steps = 20
    expected = [
        2.0 * (k / warmup if k < warmup else CLOSED_FORMS[name]((k - warmup) / (steps - warmup))) for k in range(steps)
    ]
    assert rates(name, warmup=warmup, steps=steps) == pytest.approx(expected, abs=1e-12)


def test_schedule_mistakes():
    optimizer = make_optimizer("adamw", parameters(), lr=1.0)
    with pytest.raises(ConfigError, match=r"'cosin'.*did you mean 'cosine'"):
        make_schedule("cosin", optimizer, steps=10)
    with pytest.raises(ConfigError, match=r"optim.warmup=10: must be at least 0 and less than optim.steps=10"):
        make_schedule("linear", optimizer, warmup=10, steps=10)


def test_a_schedule_resumes_where_it_was():
    """Its state and the optimiser's give the same rates as the run that was never stopped."""
    (x,) = parameters(1)
    optimizer = make_optimizer("adamw", [x], lr=2.0)
    schedule = make_schedule("cosine", optimizer, warmup=3, steps=12)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    again = make_optimizer("adamw", [x], lr=2.0)
    resumed = make_schedule("cosine", again, warmup=3, steps=12)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(7):
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for each in (optimizer, schedule, again, resumed):
            each.step()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_is_the_closed_form_from_the_first_update(decay):
    """a_n = d^n p_0 + (1 - d) sum_k d^(n-k) p_k: no ramp. EMAModel's own decay would copy p_1 at the first update."""
    theta = parameters()
    ema, history = Ema(theta, decay=decay), [[p.detach().clone() for p in theta]]
    generator = torch.Generator().manual_seed(1)
    for n in range(1, 13):
        for p in theta:
            p.data += torch.randn(p.shape, generator=generator, dtype=p.dtype)
        ema.update()
        history.append([p.detach().clone() for p in theta])
        for index, average in ema.state().items():
            past = [each[int(index)] for each in history]
            expected = decay**n * past[0] + (1 - decay) * sum(decay ** (n - k) * past[k] for k in range(1, n + 1))
            assert torch.allclose(average, expected, rtol=0, atol=1e-12)


def test_ema_is_applied_and_taken_back_also_after_an_error():
    theta = parameters()
    ema = Ema(theta, decay=0.9)
    for p in theta:
        p.data += 1
    ema.update()
    own = [p.detach().clone() for p in theta]
    with ema.applied():
        for p, value, average in zip(theta, own, ema.state().values(), strict=True):
            assert torch.equal(p.detach(), average)
            assert (value - average).abs().max() > 0.5
    assert all(torch.equal(p.detach(), value) for p, value in zip(theta, own, strict=True))
    with pytest.raises(RuntimeError, match="stop"), ema.applied():
        raise RuntimeError("stop")
    assert all(torch.equal(p.detach(), value) for p, value in zip(theta, own, strict=True))


def test_ema_goes_on_from_its_saved_state_bit_for_bit():
    theta = parameters()
    ema = Ema(theta, decay=0.9)

    def advance(averages):
        for p in theta:
            p.data = p.data * 0.9 + 1
        for each in averages:
            each.update()

    advance([ema])
    saved = ema.state()
    resumed = Ema(theta, decay=0.9)
    resumed.load_state(saved)
    advance([ema, resumed])
    assert all(torch.equal(a, b) for a, b in zip(ema.state().values(), resumed.state().values(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ema.state().values(), saved.values(), strict=True))


def test_ema_mistakes():
    with pytest.raises(ConfigError, match=r"optim.ema=1.0: must lie between 0 and 1"):
        Ema(parameters(), decay=1.0)
    with pytest.raises(ConfigError, match="not those of the trained parameters"):
        Ema(parameters(3), decay=0.9).load_state(Ema(parameters(2), decay=0.9).state())
