"""What 8-bit optimizers get wrong elsewhere, or got wrong here: each of these was seen."""

from __future__ import annotations

import copy

import octavo
import pytest
import torch
from octavo import optim
from training import OPTIMIZERS, give_gradients, one


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_gradient_no_drift(kind: type[optim.Optimizer8bit], device: str):
    """Half of a block's gradients are always 0: these parameters must not move in 200 steps."""
    p = torch.nn.Parameter(torch.ones(4096, device=device))
    optimizer = kind([p], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p.grad = torch.randn(4096, generator=generator).to(device)
        p.grad[::2] = 0.0
        optimizer.step()
    assert bool((p[::2] == 1).all()) and float((p[1::2] == 1).float().mean()) < 0.1


@pytest.mark.parametrize(
    "kind", [optim.Adam8bit, optim.AdEMAMix8bit, optim.RMSprop8bit, optim.LAMB8bit, optim.StableAdamW8bit]
)
def test_a_rare_small_gradient_does_not_blow_up(kind: type[optim.Optimizer8bit], device: str):
    """One small gradient, then zeros, beside a block mate whose gradients are 1e4 times bigger: the second moment of
    the first must not become 0 under a first moment that is not."""
    p, wide = (torch.nn.Parameter(torch.zeros(4096, device=device)) for _ in range(2))
    if kind is optim.LAMB8bit:
        p.data[1], wide.data[1] = 1.0, 1.0  # so that it has a norm
    optimizers = [kind([p], lr=1.0, weight_decay=0.0), kind([wide], lr=1.0, weight_decay=0.0, bits=32)]
    for number in range(5):
        for q, optimizer in zip((p, wide), optimizers, strict=True):
            before = q.detach().clone()
            q.grad = torch.zeros(4096, device=device)
            q.grad[1], q.grad[0] = 1.0, 1e-4 if number == 0 else 0.0
            optimizer.step()
            largest = float((q - before)[0].abs())
        assert abs(float((p - wide).detach()[0])) < 1.0 and largest < 12.0
    assert abs(float(p.detach()[0])) < 12.0


def test_second_moments_do_not_lag():
    """Gradients that are mostly 0, beside one that never is: between them a second moment falls by 0.05 % a step, less
    than half the distance of two codes. The nearest code would stay, and the roots end 1.67 times too large."""
    generator = torch.Generator().manual_seed(0)
    small, full = one(8192, 0.0), one(8192, 0.0)
    in_8, in_32 = optim.Adam8bit([small], lr=0.0), torch.optim.Adam([full], lr=0.0)
    for _ in range(300):
        grad = torch.randn(8192, generator=generator) * (torch.rand(8192, generator=generator) < 0.05)
        grad[::256] = 1.0
        small.grad, full.grad = grad, grad.clone()
        in_8.step()
        in_32.step()
    state = in_8.state[small]
    absmax = state["exp_avg_sq_root_absmax"].flatten()
    root = octavo.dequantize_blockwise(state["exp_avg_sq_root"], absmax, torch.float32, 256, signed=False)
    wanted = in_32.state[full]["exp_avg_sq"].sqrt()
    ratio = (root / wanted)[wanted > 0.02 * wanted.max()]
    assert 0.97 < float(ratio.mean()) < 1.02
    assert float(ratio.std()) < 0.1


def test_a_parameter_resized_in_place_is_not_written_past_its_end():
    """At the same address with fewer elements: the table of addresses of the step before must not be used."""
    memory, other = torch.zeros(512), one(512, 0.0)
    param, grad = torch.nn.Parameter(memory[:]), torch.ones(512)
    optimizer = optim.SGD8bit([param, other], lr=1.0)
    param.grad, other.grad = grad, torch.ones(512)
    optimizer.step()
    param.grad = None
    param.data = memory[:100]
    param.grad = grad[:100]
    optimizer.step()
    assert bool((memory[:100] == -2).all()) and bool((memory[100:] == -1).all())
    assert bool((other == -2).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [("betas", (0.9,)), ("betas", "ab"), ("lr", "a"), ("lr", torch.ones(2)), ("eps", None), ("max_grad_norm", "x")],
)
def test_options_spoiled_after_the_first_step_change_nothing(name: str, value: object):
    params = [one(), one()]
    optimizer = optim.AdamW8bit([{"params": [p]} for p in params], lr=0.1)
    give_gradients(params, torch.Generator().manual_seed(0))
    optimizer.step()
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], old) for key, old in before[1][index].items())


@pytest.mark.parametrize("make", [lambda p: optim.SGD8bit(p, 0.0, 0.99), lambda p: optim.Lion8bit(p, 0.0)])
def test_moments_of_either_sign_are_the_same(make):
    """The signed map has no -1: the largest of a block must not be damped when it is negative."""
    up, down = one(4096, 0.0), one(4096, 0.0)
    optimizers = [make([up]), make([down])]
    for _ in range(500):
        up.grad, down.grad = torch.ones(4096), -torch.ones(4096)
        for optimizer in optimizers:
            optimizer.step()
    key = "momentum_buffer" if "momentum_buffer" in optimizers[0].state[up] else "exp_avg"
    values = [
        octavo.dequantize_blockwise(o.state[p][key], o.state[p][f"{key}_absmax"].flatten())
        for o, p in zip(optimizers, (up, down), strict=True)
    ]
    torch.testing.assert_close(values[1], -values[0], rtol=1e-4, atol=0.0)


def test_moments_that_cannot_be_kept_are_refused_when_loaded():
    param = one()
    full = torch.optim.AdamW([param], lr=1e-3)
    param.grad = torch.ones(4096)
    full.step()
    for spoiled in (float("nan"), -1.0):
        state = copy.deepcopy(full.state_dict())
        state["state"][0]["exp_avg_sq"][3] = spoiled
        with pytest.raises(ValueError, match="exp_avg_sq must be finite and not negative"):
            optim.AdamW8bit([param], lr=1e-3).load_state_dict(state)
