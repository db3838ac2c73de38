"""StableAdamW against Algorithm 2 of arXiv 2304.13013, written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import octavo
import pytest
import torch
from octavo import optim
from torch import Tensor
from training import give_gradients, one, parameters, train

KINDS = [optim.StableAdamW, optim.StableAdamW8bit]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


class Plain:
    """Algorithm 2, of one parameter."""

    def __init__(self, p: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.p, self.lr, self.betas, self.eps, self.weight_decay = (
            p.detach().cpu().double(),
            lr,
            betas,
            eps,
            weight_decay,
        )
        self.v, self.u, self.t, self.rms = torch.zeros_like(self.p), torch.zeros_like(self.p), 0, 0.0

    def step(self, g: Tensor) -> None:
        g, self.t = g.detach().cpu().double(), self.t + 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        self.v = b1 * self.v + (1 - b1) * g
        self.u = b2 * self.u + (1 - b2) * g * g
        self.rms = float((g * g / self.u.clamp(min=self.eps**2)).mean().sqrt())
        eta = self.lr / max(1.0, self.rms)
        self.p = self.p - eta * self.weight_decay * self.p - eta * self.v / (self.u.sqrt() + self.eps)


def growing(params: list[torch.nn.Parameter], number: int, generator: torch.Generator) -> None:
    """Gradients that grow at another time in each parameter, so that each has its own rms."""
    give_gradients(params, generator)
    for i, p in enumerate(params):
        if number >= 3 + 2 * i:
            p.grad *= 30


@pytest.mark.parametrize("change", [{}, {"eps": 0.5}, {"betas": (0.0, 0.5)}, {"weight_decay": 0.0}], ids=str)
def test_is_algorithm_2(change: dict[str, Any], device: str):
    """Within rtol 1e-5: each of 16 steps rounds a few times in fp32."""
    hyper: dict[str, Any] = {**HYPER, **change}
    params = parameters(device)
    optimizer = optim.StableAdamW(params, **hyper)
    plain, generator = [Plain(p, **hyper) for p in params], torch.Generator().manual_seed(2)
    clipped = 0
    for number in range(16):
        growing(params, number, generator)
        optimizer.step()
        for p, q, rms in zip(params, plain, optimizer.rms(), strict=True):
            q.step(p.grad)
            assert float(rms) == pytest.approx(q.rms, rel=1e-5)
            clipped += q.rms > 1.5
            torch.testing.assert_close(p.detach().cpu().double(), q.p, rtol=1e-5, atol=1e-6)
    assert clipped >= len(params) or "betas" in change or "eps" in change
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind", KINDS)
def test_first_step(kind: type[optim.StableAdamW], device: str):
    """Its averages are the gradient and its square: rms is 1, and nearly every element goes by lr."""
    p = parameters(device)[0]
    start = p.detach().clone()
    optimizer = kind([p], lr=0.1, weight_decay=0.2)
    give_gradients([p], torch.Generator().manual_seed(0), 1e-3)
    optimizer.step()
    u = p.grad / (p.grad.abs() + 1e-8)
    torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.2) - 0.1 * u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.rms()[0], torch.ones((), device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_clipped_with_the_step(kind: type[optim.StableAdamW], device: str):
    """Elements without a gradient show the decay alone."""
    p = torch.nn.Parameter(torch.ones(8192, device=device))
    optimizer = kind([p], lr=0.1, weight_decay=0.5)
    wanted = 1.0
    for scale in (1e-3, 1e-3, 1.0):
        p.grad = torch.full_like(p, scale)
        p.grad[::2] = 0.0
        optimizer.step()
        wanted *= 1 - 0.1 * 0.5 / max(1.0, float(optimizer.rms()[0]))
    # Of the third step of three, the new second moment has a third: rms is sqrt(3 / 2), half of the elements being 0.
    assert float(optimizer.rms()[0]) == pytest.approx(1.5**0.5, rel=0.01)
    torch.testing.assert_close(p.detach()[::2], torch.full((4096,), wanted, device=device))


def test_debiased_averages_are_adams(device: str):
    """Where gradients shrink, rms stays below 1, and with eps = 0 the steps are those of AdamW with bias correction."""
    hyper: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1}
    ours, theirs = parameters(device), parameters(device)
    double = [torch.nn.Parameter(p.detach().double()) for p in theirs]
    plain = [Plain(p, **hyper) for p in theirs]
    optimizers = [optim.StableAdamW(ours, **hyper), *(torch.optim.AdamW(q, **hyper) for q in (theirs, double))]
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        for p, *others in zip(ours, theirs, double, plain, strict=True):
            p.grad = (torch.rand(p.shape, generator=generator) + 0.5 - 0.02 * number).to(device) * 0.6**number
            others[0].grad, others[1].grad = p.grad.clone(), p.grad.double()
            others[2].step(p.grad)
            assert others[2].rms <= 1 + 1e-12
        for optimizer in optimizers:
            optimizer.step()
    for p, q, r, s in zip(ours, theirs, double, plain, strict=True):
        torch.testing.assert_close(s.p, r.detach().cpu(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_every_parameter_has_its_own_rms(device: str):
    """Kernels take fp32 parameters before those of 16 bits, and empty ones not at all."""
    kinds = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32]
    shapes = [(64, 300), (5000,), (16, 8, 3, 3), (0, 4), (7,), ()]
    params = [parameters(device, kind, [shape])[0] for kind, shape in zip(kinds, shapes, strict=True)]
    optimizer = optim.StableAdamW([{"params": params[:4]}, {"params": params[4:]}], **HYPER)
    plain, generator = [Plain(p, **HYPER) for p in params], torch.Generator().manual_seed(2)
    for number in range(14):
        growing(params, number, generator)
        optimizer.step()
        for p, q in zip(params, plain, strict=True):
            q.step(p.grad)
    assert optimizer.rms()[3] == 0 and len({round(q.rms, 2) for q in plain}) == 6
    for p, q, rms in zip(params, plain, optimizer.rms(), strict=True):
        assert p.numel() == 0 or float(rms) == pytest.approx(q.rms, rel=1e-5)
        assert p.numel() == 0 or float((p.detach().cpu() - q.p).abs().max()) < (1e-5 if q.p.dtype is p.dtype else 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients(kind: type[optim.StableAdamW], device: str):
    """Only decay, and an rms of 0."""
    p = torch.nn.Parameter(torch.ones(4096, device=device))
    optimizer = kind([p], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95**3))
    assert optimizer.rms()[0] == 0 and optimizer.nonfinite_count() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_elements_are_left_out(kind: type[optim.StableAdamW], device: str):
    """They add nothing to the sum, but to the number of elements, and keep parameter and state."""
    p = parameters(device)[0]
    optimizer = kind([p])
    train(optimizer, [p], 2)
    before = p.detach().clone()
    give_gradients([p], torch.Generator().manual_seed(3))
    bad = torch.zeros_like(p, dtype=torch.bool)
    bad[:32] = True
    finite = copy.deepcopy([p])
    finite[0].grad = torch.where(bad, 0.0, p.grad)
    p.grad[:16], p.grad[16:31], p.grad[31] = float("nan"), float("inf"), 1e30  # of the last, the square is Inf
    other = kind(finite)
    other.load_state_dict(optimizer.state_dict())
    optimizer.step()
    other.step()
    assert float(optimizer.rms()[0]) == pytest.approx(float(other.rms()[0]), rel=1e-6)
    assert torch.equal(p[bad], before[bad]) and float((p[~bad] != before[~bad]).float().mean()) > 0.999
    torch.testing.assert_close(p[~bad], finite[0][~bad])
    assert optimizer.nonfinite_count() == int(bad.sum())


@pytest.mark.parametrize("bits", [8, 32])
def test_a_late_second_moment_does_not_throw_parameters(bits: int):
    """What the method is for: after many small gradients a large one moves AdamW by many times lr, and this by less."""
    ways = {}
    for kind in (optim.AdamW8bit, optim.StableAdamW8bit):
        p = one(4096, 0.0)
        optimizer = kind([p], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0, bits=bits)
        for scale in [1e-3] * 500 + [1.0]:
            p.grad = torch.full_like(p, scale)
            before = p.detach().clone()
            optimizer.step()
        ways[kind] = float((p.detach() - before).norm() / 64)
    assert ways[optim.AdamW8bit] > 2 and ways[optim.StableAdamW8bit] < 0.2


# ---- rms -------------------------------------------------------------------------------------------------------------


def test_rms_of_the_last_step(device: str):
    params = parameters(device)
    optimizer = optim.StableAdamW8bit([{"params": params[:2]}, {"params": params[2:]}])
    assert optimizer.rms() == [None] * 5 and optimizer.named_rms() == {}
    train(optimizer, params, 2)
    values = optimizer.rms()
    assert all(v.shape == () and v.dtype is torch.float32 and v.device == params[0].device for v in values)
    assert list(optimizer.named_rms()) == ["0.0", "0.1", "1.0", "1.1", "1.2"]
    params[1].grad = None
    optimizer.step()
    assert [v is None for v in optimizer.rms()] == [False, True, False, False, False]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.rms() == [None] * 5


def test_rms_by_name():
    model = torch.nn.Linear(3, 4)
    optimizer = optim.StableAdamW(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.named_rms() == {"weight": torch.tensor(1.0), "bias": torch.tensor(1.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step(kind: type[optim.StableAdamW], device: str):
    params = parameters(device)
    optimizer = kind(params)
    train(optimizer, params, 2)
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.ones((), device=device)
    train(optimizer, params, 1)
    assert [float(v) for v in optimizer.rms()] == [0.0] * 5
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][i][key]) for key, v in state.items())


def test_scale_lr_tensor_and_clipping_do_not_change_rms(device: str):
    """A factor of all gradients, the same in each step, cancels but for eps."""
    ours, theirs = parameters(device), parameters(device)
    mine = optim.StableAdamW(ours, lr=torch.tensor(1e-2, device=device), eps=0.0, capturable=True)
    other = optim.StableAdamW(theirs, lr=1e-2, eps=0.0, max_grad_norm=1e6)
    mine.grad_scale, mine.found_inf = torch.tensor(64.0, device=device), torch.zeros((), device=device)
    for number in range(6):
        generators = [torch.Generator().manual_seed(number) for _ in range(2)]
        growing(ours, number, generators[0])
        growing(theirs, number, generators[1])
        mine.step()
        other.step()
    for p, q in zip([*ours, *mine.rms()], [*theirs, *other.rms()], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- states and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_adamw(kind: type[optim.StableAdamW]):
    """Steps and moments go on; options come along, as from any state."""
    params = parameters()
    theirs = torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.98))
    train(theirs, params, 4)
    optimizer = kind(copy.deepcopy(params))
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (
        group["lr"] == 3e-3 and group["betas"] == (0.9, 0.98) and group["bits"] == (8 if "8" in kind.__name__ else 32)
    )
    for p, q in zip(params, group["params"], strict=True):
        assert float(optimizer.state[q]["step"]) == 4
        if optimizer.state[q]["exp_avg"].dtype is torch.float32:
            assert all(torch.equal(optimizer.state[q][key], theirs.state[p][key]) for key in theirs.state[p])
    train(optimizer, group["params"], 1)
    assert all(bool(p.isfinite().all()) for p in group["params"])


def test_between_8_and_32_bits():
    params = parameters()
    narrow = optim.StableAdamW8bit(params)
    train(narrow, params, 4)
    saved = copy.deepcopy(narrow.state_dict())
    saved["param_groups"][0]["bits"] = 32
    wide = optim.StableAdamW(copy.deepcopy(params))
    wide.load_state_dict(saved)
    copies = wide.param_groups[0]["params"]
    assert all(wide.state[p]["exp_avg_sq"].dtype is torch.float32 for p in copies)
    train(wide, copies, 1, 7)
    train(narrow, params, 1, 7)
    for p, q, mine, other in zip(params, copies, narrow.rms(), wide.rms(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # from the same state, before it is rounded again
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=0.0)


def test_errors():
    for options, message in (
        ({"betas": (0.9, 1.0)}, r"StableAdamW: parameter group 0: betas\[1\] must lie in \[0, 1\)"),
        ({"eps": -1.0}, "eps must be 0 or positive, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or positive, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.StableAdamW([one()], **options)


def test_errors_of_sums():
    p, state = torch.ones(300), [torch.zeros(300), torch.zeros(300)]
    lists = ([p], [p.clone()], [torch.ones((), dtype=torch.float64)], state, [torch.empty(0)] * 2, [])
    table, count = octavo.ops.optim_table(*lists, [0]), torch.zeros(1, dtype=torch.int64)
    hyper = [0.0] * 15
    with pytest.raises(RuntimeError, match="optim_sums: rule 'adam' needs no sums over whole tensors"):
        octavo.ops.optim_sums(*lists, table, "adam", hyper)
    with pytest.raises(RuntimeError, match="optim_step: rule 'adam' needs no sums over whole tensors"):
        octavo.ops.optim_step(*lists, count, table, "adam", hyper, sums=torch.ones(1, 2, dtype=torch.float64))
    for sums, message in (
        (torch.ones(2, 2, dtype=torch.float64), r"sums must be contiguous \[1, 2\], got shape \[2, 2\]"),
        (torch.ones(1, 2), "sums must be float64, got float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            octavo.ops.optim_step(*lists, count, table, "stable_adamw", hyper, sums=sums)
    assert octavo.ops.optim_sums([], [], [], [], [], [], table[:0], "lamb", hyper).shape == (0, 2)
