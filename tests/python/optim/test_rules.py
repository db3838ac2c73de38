"""octavo.optim: parity with torch.optim in 32 bit, 8 bit within its error, and what training asks of an optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from octavo import nn, optim
from octavo.optim import ops as optim_ops
from torch import Tensor
from training import give_gradients, one, parameters, train

# ---- parity --------------------------------------------------------------------------------------------------------

PARITY = [
    ("Adam", {}),
    ("Adam", {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": torch.tensor(1e-2), "weight_decay": 0.3, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("RMSprop", {}),
    ("RMSprop", {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.01}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), PARITY, ids=str)
def test_32_bits_are_torchs(name: str, options: dict[str, object], device: str):
    """Within rtol 1e-5: each of 20 steps rounds a few times in fp32 (6e-8), in another order than torch's."""
    ours, theirs = parameters(device), parameters(device)
    train(getattr(optim, f"{name}8bit")(ours, bits=32, **options), ours, 20)
    train(getattr(torch.optim, name)(theirs, **options), theirs, 20)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), PARITY, ids=str)
def test_8_bits_are_near(name: str, options: dict[str, object], device: str):
    """The distance to torch's result is a small part of the way gone: codes are within 1/14 of their value, mostly
    within 1/100, and errors of different steps cancel."""
    ours, theirs, start = parameters(device), parameters(device), parameters(device)
    optimizer = getattr(optim, f"{name}8bit")(ours, **options)
    train(optimizer, ours, 20)
    train(getattr(torch.optim, name)(theirs, **options), theirs, 20)
    for p, q, s in zip(ours[:2], theirs[:2], start[:2], strict=True):
        assert float((p - q).norm() / (q - s).norm()) < 0.03
        states = [v for key, v in optimizer.state[p].items() if key != "step" and not key.endswith("absmax")]
        assert all(v.dtype is torch.uint8 and v.shape == p.shape for v in states)
    states = [v for p in ours[2:] for key, v in optimizer.state[p].items() if key != "step"]
    assert all(v.dtype is torch.float32 for v in states)


@pytest.mark.parametrize(
    "kind", [optim.Lion8bit, optim.LAMB8bit, optim.LARS8bit, optim.AdEMAMix8bit, optim.StableAdamW8bit]
)
def test_8_bits_are_near_32(kind: type[optim.Optimizer8bit], device: str):
    ours, wide, start = parameters(device), parameters(device), parameters(device)
    train(kind(ours, lr=1e-2), ours, 10)
    train(kind(wide, lr=1e-2, bits=32), wide, 10)
    bound = 0.15 if kind is optim.Lion8bit else 0.03  # the sign of an average near 0 flips
    for p, q, s in zip(ours[:2], wide[:2], start[:2], strict=True):
        assert float((p - q).norm() / (q - s).norm()) < bound


def test_rules_beyond_torch_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    start, g = torch.randn(50, generator=generator), torch.randn(50, generator=generator)

    def after(kind: type[optim.Optimizer8bit], steps: int = 2, **options: object) -> Tensor:
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.1, **options)
        for _ in range(steps):
            p.grad = g.clone()
            optimizer.step()
        return p.detach()

    m = v = slow = torch.zeros(50)
    lion, lamb, lars, mixed, buffer = start, start, start, start, torch.zeros(50)
    for t in (1, 2):
        lion = lion * (1 - 0.1 * 0.2) - 0.1 * (0.9 * m + 0.1 * g).sign()
        m = 0.9 * m + 0.1 * g
        v, slow = 0.999 * v + 0.001 * g * g, 0.9999 * slow + 0.0001 * g
        first, root = m / (1 - 0.9**t), (v / (1 - 0.999**t)).sqrt()
        u = first / (root + 1e-6) + 0.2 * lamb
        lamb = lamb - 0.1 * lamb.norm() / u.norm() * u
        mixed = mixed * (1 - 0.1 * 0.2) - 0.1 * (first + 5 * slow) / (root + 1e-8)
        trust = 0.01 * lars.norm() / (g.norm() + 0.2 * lars.norm() + 1e-8)
        buffer = 0.9 * buffer + trust * (g + 0.2 * lars)
        lars = lars - 0.1 * buffer
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(after(optim.Lion8bit, betas=(0.9, 0.9), weight_decay=0.2), lion, **close)
    torch.testing.assert_close(after(optim.LAMB8bit, weight_decay=0.2), lamb, **close)
    torch.testing.assert_close(after(optim.AdEMAMix8bit, weight_decay=0.2), mixed, **close)
    torch.testing.assert_close(after(optim.LARS8bit, weight_decay=0.2, trust_coefficient=0.01), lars, **close)
    # With schedules, AdEMAMix starts as Adam does: alpha = 0, beta3 = beta1.
    gentle = after(optim.AdEMAMix8bit, 1, t_alpha=10**6, t_beta3=10**6, weight_decay=0.0)
    torch.testing.assert_close(gentle, after(optim.Adam8bit, 1), rtol=1e-4, atol=1e-5)


# ---- rounding, clipping, AMP -----------------------------------------------------------------------------------------


def test_stochastic_rounding_is_reproducible_and_unbiased(device: str):
    def run(seed: int, steps: int = 1) -> Tensor:
        p = torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16, device=device))
        optimizer = optim.SGD8bit([p], lr=1e-3, rounding="stochastic", seed=seed)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float()

    # The step is 0.256 of the distance 2^-8 to the next lower number: nearest would never move.
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert abs(float(run(0).double().mean()) - 0.999) < 4 * 2**-8 * 0.44 / 100_000**0.5
    assert abs(float(run(3, 20).double().mean()) - 0.98) < 1e-4
    assert run(0).unique().tolist() == [1 - 2**-8, 1.0]


def test_random_numbers_differ_between_parameters(device: str):
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    optimizer = optim.SGD8bit(params, lr=1e-3, rounding="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kahan_keeps_what_rounding_cuts_off(dtype: torch.dtype, device: str):
    errors = {}
    exact = parameters(device, dtype, [(100, 100)])[0].detach().float()
    reference = torch.nn.Parameter(exact.clone())
    train(torch.optim.AdamW([reference], lr=1e-4), [reference], 100)
    for rounding in ("nearest", "kahan"):
        params = parameters(device, dtype, [(100, 100)])
        optimizer = optim.AdamW8bit(params, lr=1e-4, rounding=rounding)
        train(optimizer, params, 100)
        kept = optimizer.state[params[0]].get("compensation", torch.zeros((), device=device))
        errors[rounding] = float((params[0].float() + kept.float() - reference).norm())
        errors[f"{rounding}, the parameter alone"] = float((params[0].float() - reference).norm())
    assert kept.dtype is dtype and errors["kahan"] < errors["nearest"] / 5
    assert errors["kahan, the parameter alone"] < errors["nearest"]


def clip_by_torch(params: list[torch.nn.Parameter], most: float) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(params, most)


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_is_torchs(most: float, device: str):
    """Over all groups that ask for it, as clip_grad_norm_ over their parameters."""
    ours, theirs = parameters(device), parameters(device)
    groups = [{"params": ours[:2]}, {"params": ours[2:4]}, {"params": ours[4:], "max_grad_norm": None}]
    optimizer = optim.SGD8bit(groups, lr=0.1, max_grad_norm=most)
    reference = torch.optim.SGD(theirs, lr=0.1)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3):
        give_gradients(ours, generators[0])
        give_gradients(theirs, generators[1])
        norm = clip_by_torch(theirs[:4], most)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_leaves_everything_alone(bad: float):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = optim.AdamW8bit(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[1, 1] = bad
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.nonfinite_count() == sum(p.numel() for p in params)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler(clip: float | None, device: str):
    """As without a scaler; a step with an Inf changes nothing, not even the count of steps."""
    ours, plain = parameters(device), parameters(device)
    optimizer = optim.AdamW8bit(ours, lr=1e-2, max_grad_norm=clip)
    reference = optim.AdamW8bit(plain, lr=1e-2, max_grad_norm=clip)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        give_gradients(plain, generator)
        for p, q in zip(ours, plain, strict=True):
            p.grad = q.grad * scaler.get_scale()
        scaler.scale(torch.zeros((), device=device))  # as a loss would
        if number == 2:
            state = copy.deepcopy(optimizer.state_dict()["state"])
            before = [p.detach().clone() for p in ours]
            ours[1].grad[7] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
            assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
            assert scaler.get_scale() == 512.0
            continue
        if number == 3:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        reference.step()
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q)
    assert not hasattr(optimizer, "found_inf")


def test_nonfinite_elements_are_counted(device: str):
    params = parameters(device)
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, 2)
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[3, 5:8] = float("nan")
    params[1].grad[2] = -float("inf")
    optimizer.step()
    assert optimizer.nonfinite_count() == 4
    assert torch.equal(params[0][3, 5:8], before[3, 5:8]) and float((params[0] != before).float().mean()) > 0.9
    optimizer.reset_nonfinite_count()
    train(optimizer, params, 1)
    assert optimizer.nonfinite_count() == 0 and all(bool(p.isfinite().all()) for p in params)


# ---- torch.optim's ways ----------------------------------------------------------------------------------------------


def test_closure_and_hooks():
    p = one()
    optimizer, calls = optim.AdamW8bit([p], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[0] == 4096.0
    assert calls == ["before", "after"] * 5
    assert optim.SGD8bit([one()]).step() is None  # no gradient at all


def test_lr_tensor_and_schedulers(device: str):
    ours, theirs = parameters(device), parameters(device)
    optimizer = optim.Adam8bit(ours, lr=torch.tensor(1e-2, device=device))
    reference = optim.Adam8bit(theirs, lr=1e-2)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, reference)]
    for seed in range(3):
        train(optimizer, ours, 1, seed)
        train(reference, theirs, 1, seed)
        for schedule in schedules:
            schedule.step()
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(ours, theirs, strict=True))
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    torch.optim.lr_scheduler.OneCycleLR(optim.SGD8bit([one()], lr=0.1, momentum=0.9), 0.1, 10).step()


def test_groups_have_their_own_options():
    params = [one(), one(), one(), one(100)]
    groups = [
        {"params": params[:1], "bits": 32},
        {"params": params[1:2], "lr": 0.0},
        {"params": params[2:], "min_8bit_size": 10, "betas": (0.5, 0.5)},
    ]
    optimizer = optim.AdamW8bit(groups, lr=1e-2, weight_decay=0.0)
    train(optimizer, params, 2)
    kinds = [{v.dtype for key, v in optimizer.state[p].items() if key != "step"} for p in params]
    assert [torch.uint8 in kind for kind in kinds] == [False, True, True, True]
    assert bool((params[1] == 1).all()) and not bool((params[0] == 1).any())


def test_parameters_may_come_and_go():
    params = parameters()
    optimizer = optim.AdamW8bit(params[:3])
    train(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": params[3:], "lr": 1.0})
    train(optimizer, params, 2)
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 4, 2, 2, 2]
    params[0].requires_grad_(False)
    optimizer.zero_grad()
    train(optimizer, params[1:], 1)
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 5, 3, 3, 3]


def test_gradients_of_another_dtype_and_layout():
    base, other = one(6000).data.view(60, 100), one(6000).data.view(60, 100)
    ours, theirs = torch.nn.Parameter(base.clone()), torch.nn.Parameter(other.clone())
    ours.grad_dtype = None
    generator = torch.Generator().manual_seed(0)
    a, b = optim.AdamW8bit([ours]), optim.AdamW8bit([theirs])
    for _ in range(3):
        grad = torch.randn(100, 60, generator=generator).bfloat16()
        ours.grad, theirs.grad = grad.t(), grad.t().float().contiguous()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_parameters_that_are_not_contiguous(layout: str, rounding: str):
    """As for contiguous ones: blocks follow the logical order, and memory keeps its layout."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, 3, 3, generator=generator).bfloat16()
    change = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    }[layout]
    ours, theirs = torch.nn.Parameter(change(x.clone())), torch.nn.Parameter(x.clone())
    assert not ours.is_contiguous()
    a, b = optim.AdamW8bit([ours], rounding=rounding), optim.AdamW8bit([theirs], rounding=rounding)
    for _ in range(3):
        theirs.grad = torch.randn(x.shape, generator=generator).bfloat16()
        ours.grad = change(theirs.grad)
        version = ours._version
        a.step()
        b.step()
        assert ours._version > version
    assert torch.equal(ours, theirs) and ours.stride() == change(x).stride()


def test_in_place_changes_are_seen_by_autograd():
    p = one()
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    optim.SGD8bit([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_new_gradients_at_other_addresses():
    """Tables hold addresses: gradients that move, also back and forth, are followed."""
    p, q = one(), one()
    a, b = optim.Adam8bit([p]), optim.Adam8bit([q])
    pool = [torch.empty(4096) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        q.grad = torch.randn(4096, generator=generator)
        p.grad = pool[number * 7 % 3].copy_(q.grad) if number % 5 else q.grad.clone()
        a.step()
        b.step()
        if number == 20:  # states may be replaced by their owner
            a.state[p] = {key: value.clone() for key, value in a.state[p].items()}
    assert torch.equal(p, q)


def test_empty_and_scalar_parameters():
    params = [torch.nn.Parameter(torch.empty(0, 5)), torch.nn.Parameter(torch.tensor(2.0))]
    optimizer = optim.LAMB8bit(params, min_8bit_size=0, max_grad_norm=1.0)
    train(optimizer, params, 2)
    assert float(params[1].detach()) != 2.0 and optimizer.state[params[1]]["exp_avg"].dtype is torch.uint8


def test_copies_and_pickles_go_on_alone():
    params = parameters()
    optimizer = optim.AdamW8bit(params, rounding="nearest")
    train(optimizer, params, 2)
    for duplicate in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        other = duplicate(optimizer)
        theirs = other.param_groups[0]["params"]
        again = copy.deepcopy(optimizer)
        train(other, theirs, 2)
        train(again, again.param_groups[0]["params"], 2)
        for p, q in zip(theirs, again.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)


def test_stable_embedding_keeps_32_bits():
    layer = nn.StableEmbedding(100, 64, padding_idx=3)
    bound = (6 / (100 + 64)) ** 0.5
    assert float(layer.weight.abs().max()) <= bound and not layer.weight[3].any()
    ids = torch.tensor([[1, 3], [5, 99]])
    expected = torch.nn.functional.layer_norm(layer.weight[ids], (64,))
    assert torch.allclose(layer(ids), expected, atol=1e-6)
    assigned = nn.StableEmbedding(100, 64)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    built = nn.StableEmbedding(100, 64, device="meta").to_empty(device="cpu")
    for module in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), assigned, built):
        optimizer = optim.AdamW8bit(module.parameters())
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        assert optimizer.state[module.weight]["exp_avg"].dtype is torch.float32
    assert type(layer.from_pretrained(torch.ones(5, 4))) is nn.StableEmbedding


def test_steps_inside_compiled_functions():
    """The step itself is not traced."""
    p, q = one(), one()
    optimizers = [optim.AdamW8bit([p], lr=0.1), optim.AdamW8bit([q], lr=0.1)]

    def step(x: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        (x * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        compiled(p, optimizers[0])
        step(q, optimizers[1])
    assert torch.equal(p, q) and float(p.detach()[0]) < 1.0


def test_many_parameters_take_one_call_per_group(monkeypatch: pytest.MonkeyPatch):
    params = parameters() + parameters(dtype=torch.bfloat16) + parameters(dtype=torch.float16)
    optimizer = optim.AdamW8bit([{"params": params[:7]}, {"params": params[7:]}])
    calls = []
    step = optim_ops.optim_step
    monkeypatch.setattr(optim_ops, "optim_step", lambda *a: (calls.append(len(a[0])), step(*a)))
    train(optimizer, params, 2)
    assert calls == [7, 8, 7, 8]
