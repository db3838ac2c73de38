"""States of octavo.optim: saved and loaded exactly, read from torch.optim and bitsandbytes, refused when they do not
fit; and what is refused before a step changes anything."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import octavo
import pytest
import torch
from octavo import optim, reference
from torch import Tensor
from training import OPTIMIZERS, one, parameters, train


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: optim.Optimizer8bit, b: optim.Optimizer8bit) -> None:
    """Parameters and states equal to the bit."""
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert set(a.state[p]) == set(b.state[q])
        for key, value in a.state[p].items():
            assert value.dtype is b.state[q][key].dtype and torch.equal(value, b.state[q][key]), key


@pytest.mark.parametrize("options", [{}, {"bits": 32}, {"rounding": "kahan"}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_exact(kind: type[optim.Optimizer8bit], options: dict[str, Any]):
    params = [*parameters()[:2], *parameters(dtype=torch.bfloat16)[:4]]
    optimizer = kind(params, lr=1e-2, **options)
    train(optimizer, params, 3)
    fresh = copy.deepcopy(params)
    resumed = kind(fresh)  # its options come with the state
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    same(optimizer, resumed)
    train(optimizer, params, 2, seed=5)
    train(resumed, fresh, 2, seed=5)
    same(optimizer, resumed)


def test_state_dict_holds_plain_tensors_and_its_version():
    params = [one(5000), torch.nn.Parameter(torch.ones(16, 512))]
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 1)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["format_version"] == 1
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in state["state"][0].items()}
    assert shapes == {
        "exp_avg": (torch.uint8, (5000,)),
        "exp_avg_absmax": (torch.float32, (20,)),
        "exp_avg_sq_root": (torch.uint8, (5000,)),
        "exp_avg_sq_root_absmax": (torch.float32, (20,)),
        "step": (torch.float64, ()),
    }
    assert state["state"][1]["exp_avg_absmax"].shape == (16, 2)  # whole blocks in each row


def test_loading_copies():
    """What was loaded from stays as it is."""
    params = parameters()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    optimizer.load_state_dict(given)
    train(optimizer, params, 2)
    for index, entry in saved["state"].items():
        assert all(torch.equal(value, given["state"][index][key]) for key, value in entry.items())


def test_bits_can_change_on_loading():
    params = parameters()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 3)
    eight = optimizer.state_dict()
    wide = copy.deepcopy(eight)
    wide["param_groups"][0]["bits"] = 32
    other = optim.AdamW8bit(copy.deepcopy(params))
    other.load_state_dict(wide)
    state = other.state[other.param_groups[0]["params"][0]]
    codes, absmax = eight["state"][0]["exp_avg_sq_root"], eight["state"][0]["exp_avg_sq_root_absmax"]
    root = reference.dequantize_blockwise(codes, absmax, torch.float32, 256, False)
    torch.testing.assert_close(state["exp_avg_sq"], root * root, rtol=1e-6, atol=0.0)
    again = copy.deepcopy(other.state_dict())
    again["param_groups"][0]["bits"] = 8
    other.load_state_dict(again)
    back = other.state[other.param_groups[0]["params"][0]]
    assert float((back["exp_avg"] != eight["state"][0]["exp_avg"]).float().mean()) < 0.01
    assert bool((back["exp_avg_sq_root"][codes > 0] > 0).all())


def test_hooks_run():
    params = parameters()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 1)
    seen: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after load"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("after save"))

    def rename(_: object, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {int(key): value for key, value in state["state"].items()}}

    optimizer.register_load_state_dict_pre_hook(rename)
    state = optimizer.state_dict()
    state["state"] = {str(key): value for key, value in state["state"].items()}
    optimizer.load_state_dict(state)
    assert seen == ["after save", "before load", "after load"] and len(optimizer.state) == len(params)


# ---- torch.optim -----------------------------------------------------------------------------------------------------

TORCH = [
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {"fused": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9}),
    ("Adagrad", {"lr_decay": 0.1}),
]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "options"), TORCH, ids=str)
def test_states_of_torch(name: str, options: dict[str, Any], bits: int):
    theirs = parameters()
    start = [p.detach().clone() for p in theirs]
    reference_optimizer = getattr(torch.optim, name)(theirs, **options)
    train(reference_optimizer, theirs, 5)
    ours = copy.deepcopy(theirs)
    optimizer = getattr(optim, f"{name}8bit")(ours, bits=bits)
    optimizer.load_state_dict(through_a_file(reference_optimizer.state_dict()))
    assert optimizer.param_groups[0]["bits"] == bits and optimizer.param_groups[0]["format_version"] == 1
    for key in options:
        assert optimizer.param_groups[0][key] == reference_optimizer.param_groups[0][key]
    train(reference_optimizer, theirs, 3, seed=9)
    train(optimizer, ours, 3, seed=9)
    for p, q, s in zip(ours, theirs, start, strict=True):
        if bits == 32:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float((p - q).norm() / (q - s).norm()) < 0.03


def test_states_of_torch_in_16_bits_and_without_a_buffer():
    params = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))]
    theirs = torch.optim.AdamW(params)
    train(theirs, params, 2)
    assert theirs.state[params[0]]["exp_avg"].dtype is torch.bfloat16
    optimizer = optim.AdamW8bit(params)
    optimizer.load_state_dict(theirs.state_dict())
    assert float(optimizer.state[params[0]]["step"]) == 2.0
    sgd = optim.SGD8bit(params, momentum=0.9)
    state = torch.optim.SGD(params, momentum=0.9).state_dict()
    state["state"] = {0: {"momentum_buffer": None}}
    sgd.load_state_dict(state)
    assert float(sgd.state[params[0]]["step"]) == 0.0 and not sgd.state[params[0]]["momentum_buffer_absmax"].any()


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


def theirs_of(values: Tensor, signed: bool, blocksize: int, k: int, parts: int = 1) -> dict[str, Tensor]:
    """A state as bitsandbytes has it: codes of the value itself (also of a second moment), its map and its absmax."""
    made = [reference.quantize_blockwise(part, blocksize, signed) for part in values.reshape(parts, -1)]
    codes = torch.stack([codes for codes, _ in made]).reshape(values.shape)
    absmax = torch.stack([absmax for _, absmax in made])
    absmax = absmax if parts > 1 else absmax[0]
    return {f"state{k}": codes, f"qmap{k}": reference.dynamic_map(signed), f"absmax{k}": absmax}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [256, 2048])
@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.Lion8bit, optim.RMSprop8bit, optim.AdEMAMix8bit])
def test_states_of_bitsandbytes(
    kind: type[optim.Optimizer8bit], blocksize: int, nested: bool, generator: torch.Generator
):
    shape = (70, 100)
    moment = torch.randn(shape, generator=generator) * 1e-3
    slow = torch.randn(shape, generator=generator) * 1e-4
    second = torch.rand(shape, generator=generator) * 1e-6 + 1e-7
    if kind is optim.AdEMAMix8bit:
        quantized = theirs_of(torch.stack([moment, slow]), True, blocksize, 1, 2) | theirs_of(
            second, False, blocksize, 2
        )
        wanted = {"exp_avg": moment, "exp_avg_slow": slow, "exp_avg_sq_root": second.sqrt()}
    elif kind is optim.RMSprop8bit:
        quantized = theirs_of(second, False, blocksize, 1)
        wanted = {"square_avg_root": second.sqrt()}
    elif kind is optim.Lion8bit:
        quantized = theirs_of(moment, True, blocksize, 1)
        wanted = {"exp_avg": moment}
    else:
        quantized = theirs_of(moment, True, blocksize, 1) | theirs_of(second, False, blocksize, 2)
        wanted = {"exp_avg": moment, "exp_avg_sq_root": second.sqrt()}
    inner = {"__bnb_optimizer_quant_state__": quantized} if nested else quantized
    small = {"step": 7, "state1": torch.ones(10), "state2": torch.ones(10) * 4}
    if kind is optim.AdEMAMix8bit:
        small["state1"] = torch.ones(2, 10)
    group = {"lr": 3e-4, "betas": (0.8, 0.9, 0.99)[: 3 if kind is optim.AdEMAMix8bit else 2], "eps": 1e-6}
    saved = {"state": {0: {"step": 7, **inner}, 1: small}, "param_groups": [{**group, "params": [0, 1]}]}
    params = [torch.nn.Parameter(torch.ones(shape)), one(10)]
    optimizer = kind(params)
    optimizer.load_state_dict(through_a_file(saved))
    assert optimizer.param_groups[0]["lr"] == 3e-4
    state = optimizer.state[params[0]]
    assert float(state["step"]) == 7.0 and state["step"].dtype is torch.float64
    for name, values in wanted.items():
        assert state[name].dtype is torch.uint8
        read = octavo.dequantize_blockwise(state[name], state[f"{name}_absmax"], signed="root" not in name)
        assert float((read - values).norm() / values.norm()) < 0.03
    plain = optimizer.state[params[1]]
    last = [value for key, value in plain.items() if key.endswith(("sq", "square_avg"))]
    assert all(value.dtype is torch.float32 and value.shape == (10,) for value in plain.values() if value.dim())
    assert kind in (optim.Lion8bit, optim.RMSprop8bit) or bool((last[0] == 4).all())
    train(optimizer, params, 1)
    assert all(bool(p.isfinite().all()) for p in params)


def test_file_of_bitsandbytes(tmp_path: Path):
    """By itself, where it is installed."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [one(70_000), one(100)]
    theirs = bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
    try:
        train(theirs, params, 3)
    except Exception as error:  # its CPU support varies
        pytest.skip(f"bitsandbytes cannot step here: {error}")
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    optimizer = optim.AdamW8bit(params)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
    assert float(optimizer.state[params[0]]["step"]) == 3.0
    assert optimizer.state[params[0]]["exp_avg"].dtype is torch.uint8


# ---- what does not fit -----------------------------------------------------------------------------------------------


def edit(state: dict[str, Any], **values: object) -> dict[str, Any]:
    state["state"][0].update(values)
    return state


def pop(state: dict[str, Any], key: str) -> dict[str, Any]:
    state["state"][0].pop(key)
    return state


def group(state: dict[str, Any], **values: object) -> dict[str, Any]:
    state["param_groups"][0].update(values)
    return state


QMAP = torch.linspace(-1, 1, 256)
BAD = [
    (lambda s: group(s, format_version=2), "format_version 2, this octavo reads up to 1"),
    (lambda s: {**s, "param_groups": s["param_groups"] * 2}, "has 2 parameter groups, the optimizer 1"),
    (lambda s: group(s, params=[0]), "has 1 parameters, that of the optimizer 2"),
    (lambda s: group(s, amsgrad=True), "amsgrad=True is not supported"),
    (lambda s: group(s, bits=4), "bits must be 8 or 32, got 4"),
    (lambda s: group(s, lr=-1.0), "lr must be 0 or positive, got -1.0"),
    (lambda s: edit(s, exp_avg=torch.zeros(9, dtype=torch.uint8)), r"uint8 \[70, 100\], got uint8 \[9\]"),
    (lambda s: edit(s, exp_avg=torch.zeros(70, 99)), r"floating-point \[70, 100\], got float32 \[70, 99\]"),
    (lambda s: edit(s, exp_avg=torch.zeros(70, 100).int()), r"exp_avg must be uint8 \[70, 100\], got int32"),
    (lambda s: edit(s, exp_avg_absmax=torch.zeros(27)), r"float32 \[28\] or \[70, 1\], got float32 \[27\]"),
    (lambda s: edit(s, exp_avg_absmax=torch.zeros(28).half()), "got float16"),
    (lambda s: pop(s, "exp_avg"), "lacks exp_avg; it has exp_avg_absmax, exp_avg_sq_root"),
    (lambda s: edit(s, step=torch.ones(2)), "step must be one number"),
    (lambda s: edit(s, step=-1), "step must be one number, 0 or positive, got -1"),
    (lambda s: edit(s, exp_avg="x"), "exp_avg must be a tensor, got 'x'"),
    (lambda s: edit(s, state1=torch.zeros(5, dtype=torch.uint8)), "absmax1 must be a tensor, got None"),
    (
        lambda s: edit(s, state1=torch.zeros(7000, dtype=torch.uint8), qmap1=QMAP, absmax1=torch.ones(3)),
        r"absmax1 of shape \[3\] fits no blocksize of state1 with 7000 elements",
    ),
    (
        lambda s: edit(s, state1=torch.zeros(700, dtype=torch.uint8), qmap1=QMAP, absmax1=torch.ones(3)),
        r"state1 must be uint8 \[70, 100\], got uint8 \[700\]",
    ),
    (lambda s: edit(s, state1=torch.zeros(7000, dtype=torch.uint8), max1=torch.ones(1)), "block_wise=False"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_states_change_nothing(change: Any, message: str):
    params = [("first.weight", torch.nn.Parameter(torch.ones(70, 100))), ("second", one(10))]
    plain = [p for _, p in params]
    optimizer = optim.AdamW8bit(params)
    train(optimizer, plain, 2)
    before = copy.deepcopy(optimizer.state_dict())
    state = change(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(state)
    assert str(error.value).startswith("AdamW8bit: ")
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entry.items())


def test_errors_name_the_parameter():
    params = [("first.weight", torch.nn.Parameter(torch.ones(70, 100))), ("second", one(10))]
    optimizer = optim.AdamW8bit(params)
    train(optimizer, [p for _, p in params], 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["exp_avg"] = torch.zeros(11)
    with pytest.raises(ValueError, match=r"AdamW8bit: parameter 1 \('second'\): .* float.* \[10\], got float32 \[11\]"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be 0 or positive, got -0.001"),
        ({"lr": math.nan}, "lr must be 0 or positive, got nan"),
        ({"lr": torch.ones(2)}, r"lr must be one number, got a tensor of shape \[2\]"),
        ({"lr": torch.tensor(-1.0)}, "lr must be 0 or positive"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] must lie in"),
        ({"eps": -1e-8}, "eps must be 0 or positive, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or positive"),
        ({"bits": 4}, "bits must be 8 or 32, got 4"),
        ({"min_8bit_size": -1}, "min_8bit_size must be 0 or a positive whole number, got -1"),
        ({"min_8bit_size": 1.5}, "got 1.5"),
        ({"rounding": "up"}, "rounding must be 'nearest', 'stochastic' or 'kahan', got 'up'"),
        ({"seed": 0.5}, "seed must be a whole number of 64 bits, got 0.5"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or positive, got -1.0"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        optim.AdamW8bit([one()], **options)
    optimizer = optim.AdamW8bit([one()])
    with pytest.raises(ValueError, match=f"parameter group 1: .*{message}|{message}"):
        optimizer.add_param_group({"params": [one()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: optim.RMSprop8bit(p, centered=True), ValueError, "centered=True is not supported"),
        (lambda p: optim.SGD8bit(p, nesterov=True), ValueError, "nesterov needs a momentum and no dampening"),
        (lambda p: optim.SGD8bit(p, momentum=-1), ValueError, "momentum must be 0 or positive, got -1"),
        (lambda p: optim.AdEMAMix8bit(p, betas=(0.9, 0.9)), ValueError, "betas must be 3 numbers"),
        (lambda p: optim.AdEMAMix8bit(p, betas=(0.0, 0.9, 0.9), t_beta3=5), ValueError, "t_beta3 needs positive"),
        (lambda p: optim.AdamW8bit(p, block_wise=True), TypeError, "no option block_wise; .* has maximize, foreach"),
        (
            lambda p: optim.AdamW8bit([one().data.double().requires_grad_()]),
            ValueError,
            r"parameter 0 must be .* got float64 \[4096\]",
        ),
        (
            lambda p: optim.AdamW8bit([*p, torch.ones(3, dtype=torch.cfloat, requires_grad=True)]),
            ValueError,
            "parameter 1 .* complex64",
        ),
        (
            lambda p: optim.AdamW8bit([one(9, dtype=torch.float16)], rounding="stochastic"),
            ValueError,
            r"'stochastic' is for bfloat16, got float16 \[9\]",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call([one()])


def resized(optimizer: optim.Optimizer8bit, p: torch.nn.Parameter) -> None:
    p.data, p.grad = torch.ones(5000), torch.ones(5000)


def on_another_device(optimizer: optim.Optimizer8bit, p: torch.nn.Parameter) -> None:
    state = optimizer.state[p]
    state["exp_avg"] = state["exp_avg"].to("meta")


def sparse(optimizer: optim.Optimizer8bit, p: torch.nn.Parameter) -> None:
    p.grad = torch.ones(4096).to_sparse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sparse, "parameter 1 has a gradient of layout torch.sparse_coo"),
        (resized, r"parameter 1 has shape \[5000\] but its exp_avg \[4096\]: it was resized"),
        (on_another_device, "parameter 1 is on cpu but its exp_avg on meta"),
    ],
)
def test_what_changed_since_the_first_step_is_refused(change: Any, message: str):
    """Before anything moves, although the first parameter is in a group of its own, which comes first."""
    params = [one(), one()]
    optimizer = optim.AdamW8bit([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 1)
    before = params[0].detach().clone()
    change(optimizer, params[1])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(params[0], before) and float(optimizer.state[params[0]]["step"]) == 1.0


def test_a_state_of_the_wrong_size_is_refused():
    p = one()
    optimizer = optim.AdamW8bit([p])
    train(optimizer, [p], 1)
    optimizer.state[p]["exp_avg_absmax"] = torch.zeros(15)
    with pytest.raises(RuntimeError, match=r"absmax\[0\] has shape \[15\], which does not fit .* 4096 elements"):
        optimizer.step()
