"""Moments that change by less than half a code a step: they follow their gradients on the average, as in 32 bit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from octavo import optim
from octavo.optim import ops as optim_ops

# Class, options: beta1 or the beta of Lion's moment over what people use, beside the classes' own.
SLOW: list[tuple[str, dict[str, Any]]] = [
    *(("Lion8bit", {"betas": (0.9, beta)}) for beta in (0.9, 0.95, 0.98, 0.99, 0.999)),
    *(
        (name, {"betas": (beta, 0.999)})
        for name in ("AdamW8bit", "LAMB8bit", "StableAdamW8bit")
        for beta in (0.9, 0.95, 0.98, 0.99, 0.999)
    ),
    *(("AdEMAMix8bit", {"betas": (beta, 0.999, 0.9999), "alpha": 2.0}) for beta in (0.9, 0.99)),
    *(("SGD8bit", {"momentum": beta, "dampening": beta}) for beta in (0.9, 0.99, 0.999)),
    *(("RMSprop8bit", {"momentum": beta, "lr": 1e-3 * (1 - beta)}) for beta in (0.9, 0.99)),
]


def losses(name: str, bits: int, options: dict[str, Any], share: float = 1.0) -> list[float]:
    """Mean squares of 4096 parameters after 500, 1000, 1500 steps of loss p**2 / 2, a part of the gradient a step."""
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(4096, generator=generator) * 3)
    optimizer = getattr(optim, name)([p], **{"lr": 2e-3, **options}, bits=bits, min_8bit_size=0)
    found = []
    for step in range(1500):
        p.grad = p.detach().clone()
        if share < 1:
            p.grad *= torch.rand(len(p), generator=generator) < share
        optimizer.step()
        if step % 500 == 499:
            found.append(float(p.detach().square().mean()))
    return found


@pytest.mark.parametrize(("name", "options"), SLOW, ids=str)
def test_a_quadratic_falls_as_in_32_bit(name: str, options: dict[str, Any]):
    """With nearest codes Lion ends at 2.5 of 0.7, AdamW(.99) at 3.1 of 1.7, LAMB(.99) at 3.7 of 0.05."""
    for ours, theirs in zip(losses(name, 8, options), losses(name, 32, options), strict=True):
        assert abs(ours - theirs) <= 0.05 * theirs + 0.02, (ours, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Lion8bit", {}), ("AdamW8bit", {}), ("AdamW8bit", {"betas": (0.99, 0.999)}), ("SGD8bit", {"momentum": 0.9})],
    ids=str,
)
def test_gradients_that_come_one_step_in_ten(name: str, options: dict[str, Any]):
    """In between a moment decays towards 0, by less than half a code where it is small."""
    options = {**options, "lr": 2e-2} if name == "SGD8bit" else options
    for ours, theirs in zip(losses(name, 8, options, 0.1), losses(name, 32, options, 0.1), strict=True):
        assert abs(ours - theirs) <= 0.08 * theirs + 0.02, (ours, theirs)


@pytest.mark.parametrize("name", ["Lion8bit", "AdamW8bit", "LAMB8bit", "SGD8bit", "AdEMAMix8bit", "RMSprop8bit"])
def test_zero_stays_zero_and_what_decays_reaches_it(name: str):
    options = {"momentum": 0.9} if name in ("SGD8bit", "RMSprop8bit") else {}
    p = torch.nn.Parameter(torch.ones(512))
    optimizer = getattr(optim, name)([p], lr=1e-3, weight_decay=0.0, min_8bit_size=0, **options)
    gradient = torch.zeros(512)
    gradient[::2] = 1.0
    key = "momentum_buffer" if "momentum" in options else "exp_avg"
    for step in range(400):
        p.grad = gradient * (step < 5)
        p.grad[256] = 1.0  # its block's absmax does not fall
        optimizer.step()
        codes = optimizer.state[p][key]
        assert bool((codes[1::2] == 127).all())
    if name not in ("Lion8bit", "AdEMAMix8bit"):  # 0.9 to the power of 395 of the absmax is far below the map's 5e-7
        assert bool((codes[258::2] == 127).all())


def test_the_same_bits_again():
    runs = [losses("Lion8bit", 8, {"betas": (0.9, 0.99)}) for _ in range(2)]
    assert runs[0] == runs[1]


# ---- the step counter ----------------------------------------------------------------------------------------------


def test_steps_are_counted_beyond_2_to_the_24():
    """The random numbers of rounding depend on the step: where it stops, each step rounds the same elements up."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = optim.SGD8bit([p], lr=1e-4, momentum=0.9, rounding="stochastic", min_8bit_size=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state, rounded = optimizer.state[p], []
    state["step"].fill_(2.0**24)
    for _ in range(2):
        with torch.no_grad():
            p.fill_(1.0)
        state["momentum_buffer_absmax"].fill_(1.0)
        state["momentum_buffer"].fill_(127)
        optimizer.step()
        rounded.append(p.detach() != 1)
    assert float(state["step"]) == 2.0**24 + 2
    assert not torch.equal(*rounded)


@pytest.mark.parametrize("foreach", [False, True])
def test_torch_loads_the_step_and_counts_on(foreach: bool):
    p = torch.nn.Parameter(torch.ones(64, 64))
    ours = optim.Adam8bit([p], bits=32)
    p.grad = torch.ones_like(p)
    ours.step()
    theirs = torch.optim.Adam([p], foreach=foreach)
    saved = ours.state_dict()
    kept = {key: value for key, value in theirs.state_dict()["param_groups"][0].items() if key != "params"}
    theirs.load_state_dict({"state": saved["state"], "param_groups": [{**saved["param_groups"][0], **kept}]})
    theirs.step()
    assert float(theirs.state[p]["step"]) == 2


def test_a_step_of_fp32_loads():
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = optim.Adam8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = saved["state"][0]["step"].float()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype is torch.float64 and float(optimizer.state[p]["step"]) == 2
    optimizer.state[p]["step"] = torch.tensor(2.0)  # as octavo 0.1.0 had it, and pickled it
    again = pickle.loads(pickle.dumps(optimizer))
    (q,) = again.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    again.step()
    assert float(again.state[q]["step"]) == 3


# ---- what is left alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "RMSprop8bit", "Adagrad8bit", "LAMB8bit", "StableAdamW8bit"])
def test_no_eps_and_no_gradient(name: str, bits: int):
    """0 / 0 is no direction: the element is left alone, and counted."""
    p = torch.nn.Parameter(torch.ones(512))
    optimizer = getattr(optim, name)([p], lr=1e-2, eps=0.0, weight_decay=0.0, bits=bits, min_8bit_size=0)
    p.grad = torch.ones(512)
    p.grad[:100] = 0
    optimizer.step()
    assert bool((p[:100] == 1).all()) and bool((p[100:] < 1).all())
    assert optimizer.nonfinite_count() == 100


@pytest.mark.parametrize("bits", [8, 32])
def test_a_weight_that_is_infinite(bits: int):
    p = torch.nn.Parameter(torch.ones(512))
    with torch.no_grad():
        p[7] = torch.inf
    optimizer = optim.LAMB8bit([p], lr=1e-2, weight_decay=0.1, bits=bits, min_8bit_size=0)
    p.grad = torch.ones(512)
    optimizer.step()
    assert float(p.detach()[7]) == torch.inf and optimizer.nonfinite_count() == 1
    assert bool((p[:7] < 1).all()) and bool((p[8:] < 1).all())


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["optim_step", "optim_sums"])
def test_a_table_of_something_else_is_refused(op: str):
    def lists() -> list[list[torch.Tensor]]:
        steps = [torch.ones((), dtype=torch.float64)]
        states, absmax = [torch.full((5000,), 127, dtype=torch.uint8)], [torch.zeros(20)]
        return [[torch.ones(5000)], [torch.ones(5000)], steps, states, absmax, []]

    own, others = lists(), lists()
    table = optim_ops.optim_table(*own, [0])
    spread = torch.zeros(2 * len(table), dtype=torch.int64)
    spread[::2] = table
    flipped = table.clone()
    flipped[3] ^= 1 << 40
    chunk = table.clone()
    chunk[-2] += 1
    hyper = [0.1] + [0.0] * 14
    for wrong, words in {
        torch.zeros_like(table): "does not belong",
        optim_ops.optim_table(*others, [0]): "does not belong",
        flipped: "does not belong",
        chunk: "does not belong",
        spread[::2]: "contiguous",
        table[:-1]: f"has {len(table) - 1} words instead of {len(table)}",
    }.items():
        counter = [torch.zeros(1, dtype=torch.int64)] if op == "optim_step" else []
        with pytest.raises(RuntimeError, match=words):
            getattr(optim_ops, op)(*own, *counter, wrong, "lars", hyper)
    assert bool((own[0][0] == 1).all()) and bool((others[0][0] == 1).all())
    optim_ops.optim_step(*own, torch.zeros(1, dtype=torch.int64), table, "momentum", hyper)
    assert bool((own[0][0] < 1).all())
