"""`SwitchBackLinear` as a module: its cache of the int8 weight, autocast, compilation, evaluation, FSDP2."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import octavo
import pytest
import torch
from distributed import full, in_two_processes
from octavo.nn import Int8Linear, LayerScale, SwitchBackLinear
from octavo.switchback import linear as nn_switchback
from octavo.switchback.functional import INT8_VARIANTS, VARIANTS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextmanager
def quantizations() -> Iterator[list[bool]]:
    """Whether each quantization of a weight transposed it."""
    calls: list[bool] = []
    original = nn_switchback.switchback_weight

    def counted(weight: Tensor, variant: str, transpose: bool) -> Any:
        calls.append(transpose)
        return original(weight, variant, transpose)

    nn_switchback.switchback_weight = counted
    try:
        yield calls
    finally:
        nn_switchback.switchback_weight = original


def step(layer: nn.Module, x: Tensor) -> None:
    layer(x).square().mean().backward()


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_one_quantization_for_each_version_of_the_weight(variant: str):
    layer = SwitchBackLinear(20, 12, variant=variant)
    x = torch.randn(6, 20, requires_grad=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with quantizations() as calls:
        for _ in range(3):  # micro-batches
            step(layer, x)
        assert calls == [True]
        optimizer.step()
        step(layer, x)
        step(layer, x)
        assert calls == [True] * 2
        with torch.no_grad():
            layer.weight.mul_(0.5)
        step(layer, x)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        step(layer, x)
        layer.load_state_dict(layer.state_dict())
        step(layer, x)
        layer.to(torch.bfloat16).to(torch.float32)
        step(layer, x)
        assert calls == [True] * 6


def test_each_of_these_changes_reaches_the_product():
    """The cache never answers for another weight: after every change the layer equals one without a cache."""
    layer = SwitchBackLinear(20, 12)
    x = torch.randn(6, 20, requires_grad=True)

    def check() -> None:
        want = octavo.switchback_linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), want)

    check()
    for optimizer in (
        torch.optim.AdamW(layer.parameters()),
        octavo.optim.AdamW8bit(layer.parameters(), min_8bit_size=0),
    ):
        step(layer, x)
        optimizer.step()
        check()

    class Raw(torch.optim.Optimizer):  # as optimizers do that write through pointers, or through .data
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.5)

    version = layer.weight._version
    Raw(layer.parameters()).step()
    assert layer.weight._version == version
    check()
    nn.init.normal_(layer.weight)
    check()
    torch.nn.utils.vector_to_parameters(torch.randn(20 * 12 + 12), layer.parameters())
    check()
    other = {"weight": torch.randn(12, 20), "bias": torch.zeros(12)}
    got = torch.func.functional_call(layer, other, (x,))
    assert torch.equal(got, octavo.switchback_linear(x, other["weight"], other["bias"]))
    check()


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_a_loop_that_writes_data_by_hand_trains(variant: str):
    """No optimizer, no new version of the weight: its gradient that was set to None tells."""
    layer = SwitchBackLinear(8, 8, bias=False, variant=variant)
    x, target = torch.randn(32, 8), torch.randn(32, 8)
    losses = []
    with quantizations() as calls:
        for _ in range(10):
            for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):  # micro-batches
                loss = (layer(part) - wanted).square().mean()
                loss.backward()
                losses.append(float(loss.detach()))
            layer.weight.data.sub_(0.3 * layer.weight.grad)
            layer.weight.grad = None
        assert len(calls) == 10
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


def test_evaluation_drops_the_codes():
    layer = SwitchBackLinear(20, 12)
    step(layer, torch.randn(6, 20, requires_grad=True))
    assert layer._cache.value is not None
    layer.eval()
    assert layer._cache.value is None


def test_a_computed_weight_is_read_once():
    layer = torch.nn.utils.parametrizations.spectral_norm(SwitchBackLinear(20, 12))
    calls = []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(6, 20, requires_grad=True)
    for number in (1, 2):
        step(layer, x)
        assert len(calls) == number
    assert layer._cache.value is None


def test_without_gradients_nothing_is_kept():
    layer = SwitchBackLinear(20, 12).eval()
    x = torch.randn(6, 20)
    with torch.no_grad():
        first = layer(x)
        layer.weight.data.mul_(2)  # unseen by versions
        assert torch.allclose(layer(x) - layer.bias, 2 * (first - layer.bias))
    with torch.inference_mode():
        SwitchBackLinear(4, 4)(torch.randn(2, 4))  # the weight has no version here
    assert layer._cache.value is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_mode_in_training_leaves_no_trace(variant: str):
    model = nn.Sequential(SwitchBackLinear(20, 12, variant=variant), SwitchBackLinear(12, 4, variant=variant))
    x = torch.randn(6, 20)
    step(model, x)
    model.zero_grad()
    with torch.inference_mode():
        model(x)
    step(model, x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_function(variant: str):
    layer = SwitchBackLinear(20, 12, variant=variant)
    x = torch.randn(2, 3, 20, requires_grad=True)
    grad = torch.randn(2, 3, 12)
    layer(x).backward(grad)
    want = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
    octavo.switchback_linear(*want, variant).backward(grad)
    for got, exact in zip((x, layer.weight, layer.bias), want, strict=True):
        assert torch.equal(got.grad, exact.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str):
    layer = SwitchBackLinear(20, 12, variant=variant)
    x = torch.randn(6, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype is torch.float32 and layer.weight.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer.eval()(x), out)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters(variant: str, dtype: torch.dtype):
    layer = SwitchBackLinear(20, 12, variant=variant, dtype=dtype)
    x = torch.randn(6, 20, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert {out.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype} == {dtype}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(variant: str, reentrant: bool):
    layer = SwitchBackLinear(20, 20, variant=variant)
    x = torch.randn(6, 20, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    want = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    with quantizations() as calls:
        out = checkpoint(lambda x: layer(layer(x)), x, use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(x.grad, want[0]) and torch.equal(layer.weight.grad, want[1])
        for _ in range(3):  # micro-batches
            checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert len(calls) == (0 if variant == "fp8" else 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile_is_one_graph(variant: str):
    layer = SwitchBackLinear(20, 12, variant=variant)
    options = {"k_split": 4, "stochastic_rounding": True} if variant == "all_int8" else {}
    layer.k_split, layer.stochastic_rounding = options.get("k_split"), options.get("stochastic_rounding", False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (6, 6, 8):
        x = torch.randn(rows, 20, requires_grad=True)
        out = compiled(x)
        out.square().sum().backward()
        got = x.grad.clone()
        x.grad = None
        layer(x).square().sum().backward()
        if variant != "all_int8":
            assert torch.equal(got, x.grad)
        assert (got - x.grad).norm() < 0.1 * x.grad.norm()
        with torch.no_grad():
            layer.weight.mul_(1.5)  # the graph must not hold the old weight's codes
    assert counter.frame_count <= 3


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_quantize_once_under_compile(variant: str):
    model = nn.Sequential(
        SwitchBackLinear(20, 16, variant=variant), nn.GELU(), SwitchBackLinear(16, 12, variant=variant)
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        with quantizations() as calls, octavo.switchback.quantize_once(model):
            assert calls == [True] * 2
            for _ in range(3):
                out = compiled(x)
                out.square().sum().backward()
            assert calls == [True] * 2
        got, gradients = out.detach(), [p.grad / 3 for p in model.parameters()]
        optimizer.zero_grad()
        want = model(x)
        want.square().sum().backward()
        assert torch.equal(got, want)
        for gradient, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()  # the next codes must be new ones
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert all(layer._held is None for layer in (model[0], model[2]))


def test_quantize_once_sees_changes_and_ends():
    layer = SwitchBackLinear(4, 4)
    with octavo.switchback.quantize_once(layer):
        layer(torch.randn(2, 4))
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="weight was changed inside of octavo"):
            layer(torch.randn(2, 4))
    assert layer._held is None
    layer(torch.randn(2, 4))
    changes = [
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda: setattr(layer.weight, "data", torch.zeros(4, 4)),
    ]
    for change in changes:
        with octavo.switchback.quantize_once(layer):
            layer(torch.randn(2, 4))
            change()
            with pytest.raises(RuntimeError, match="weight was changed inside of octavo"):
                layer(torch.randn(2, 4))
    model = nn.Sequential(layer)
    with octavo.switchback.quantize_once(model):
        outer = layer._held
        with octavo.switchback.quantize_once(layer):
            assert layer._held is not outer
        assert layer._held is outer
        assert "_held" not in copy.deepcopy(layer).__getstate__()
        octavo.convert_linears(model, nn.Linear)
    assert layer.__dict__.keys() == nn.Linear(4, 4).__dict__.keys()
    computed = torch.nn.utils.parametrizations.weight_norm(SwitchBackLinear(4, 4))
    with octavo.switchback.quantize_once(computed):
        computed(torch.randn(2, 4))
    again = nn.Sequential(nn.Linear(4, 4))
    octavo.convert_linears(again)
    with octavo.switchback.quantize_once(again):
        with octavo.switchback.quantize_once(again):
            octavo.convert_linears(again, nn.Linear)
            octavo.convert_linears(again, variant="vectorwise")
        assert again[0]._held is None  # not the codes of the other variant
    others = nn.Sequential(
        SwitchBackLinear(4, 4, variant="fp8"), SwitchBackLinear(4, 4).prepare_for_eval(), nn.Linear(4, 4)
    )
    with octavo.switchback.quantize_once(others):
        others(torch.randn(2, 4))


def test_copies_pickles_and_state_dicts():
    layer = SwitchBackLinear(20, 12, variant="vectorwise")
    x = torch.randn(6, 20, requires_grad=True)
    step(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert other.variant == "vectorwise" and other._cache is not layer._cache and other._cache.value is None
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(x), other.bias.expand(6, 12)) and not torch.equal(layer(x), other(x))
    assert list(layer.state_dict()) == ["weight", "bias"]
    plain = nn.Linear(20, 12)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert str(layer) == "SwitchBackLinear(in_features=20, out_features=12, bias=True, variant='vectorwise')"
    assert isinstance(SwitchBackLinear(4, 3, device="meta").to_empty(device="cpu"), SwitchBackLinear)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", INT8_VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_prepare_for_eval_keeps_int8_only(variant: str, bias: bool):
    layer = SwitchBackLinear(20, 12, bias, variant=variant).eval()
    x = torch.randn(3, 20)
    with torch.no_grad():
        before = layer(x)
    assert not layer.prepared
    assert layer.prepare_for_eval() is layer and layer.prepared
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    kept = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert kept.pop("bias", None) == ((torch.float32, (12,)) if bias else None)
    assert kept == {"weight": (torch.int8, (12, 20)), "weight_scale": (torch.float32, (12,))}
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])
    same = Int8Linear(20, 12, bias, threshold=0.0)
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(x), before)
    assert layer.prepare_for_eval() is layer  # again: nothing happens
    assert layer.to(torch.bfloat16).weight_scale.dtype is torch.float32 and layer.weight.dtype is torch.int8
    y = x.bfloat16().requires_grad_()
    layer.train()(y).sum().backward()
    assert y.grad is not None
    assert "prepared for evaluation" in str(copy.deepcopy(layer))


def test_prepared_and_trained_states_do_not_mix():
    trained, prepared = SwitchBackLinear(20, 12), SwitchBackLinear(20, 12).prepare_for_eval()
    before = prepared.weight.clone()
    with pytest.raises(RuntimeError, match="loaded weight is float32, but this layer was prepared for evaluation"):
        prepared.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(prepared.weight, before)
    with pytest.raises(RuntimeError, match="loaded weight is int8, but this layer trains"):
        trained.load_state_dict(prepared.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="loaded weight is int32, but this layer was prepared"):
        prepared.load_state_dict({**prepared.state_dict(), "weight": before.int()})
    other = SwitchBackLinear(20, 12).prepare_for_eval()
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(other.weight, prepared.weight) and torch.equal(other.weight_scale, prepared.weight_scale)


def test_what_cannot_be_prepared():
    with pytest.raises(ValueError, match="variant fp8 is a simulation"):
        SwitchBackLinear(4, 3, variant="fp8").prepare_for_eval()
    layer = SwitchBackLinear(4, 3)
    with torch.no_grad():
        layer.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 12 weights are NaN or Inf"):
        layer.prepare_for_eval()
    assert layer.weight.dtype is torch.float32 and not layer.prepared


def test_errors():
    with pytest.raises(ValueError, match="unknown variant 'int7'"):
        SwitchBackLinear(4, 3, variant="int7")
    with pytest.raises(ValueError, match="k_split is of the weight gradient in int8"):
        SwitchBackLinear(4, 3, k_split=7)
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got float64"):
        SwitchBackLinear(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 5\] and weight of shape \[3, 4\] do not make a product"):
        SwitchBackLinear(4, 3)(torch.randn(2, 5))


def test_layer_scale():
    scale = LayerScale(6)
    x = torch.randn(2, 6, dtype=torch.bfloat16, requires_grad=True)
    out = scale(x)
    assert out.dtype is torch.bfloat16 and (out == 0).all()
    out.backward(torch.ones(2, 6))
    assert torch.allclose(scale.gamma.grad, x.detach().float().sum(0), atol=0.05)
    assert torch.equal(LayerScale(6, 0.5)(x), x * 0.5)


# ---- distributed -----------------------------------------------------------------------------------------------------


def _train(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for x in batches:
        for part in x.chunk(2):  # micro-batches
            loss = model(part).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    first, second = SwitchBackLinear(16, 32), SwitchBackLinear(32, 8, variant="vectorwise")
    return nn.Sequential(first, nn.GELU(), second)


def _batches() -> list[Tensor]:
    return [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def _alone() -> tuple[nn.Sequential, list[float]]:
    model = _model()
    return model, _train(model, _batches(), torch.optim.SGD(model.parameters(), lr=0.5))


def _assert_trained_alike(model: nn.Module, losses: list[float]) -> None:
    alone, wanted = _alone()
    assert losses == pytest.approx(wanted, rel=1e-3)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=2e-3, atol=2e-4)


def _fsdp2(rank: int, world: int) -> None:
    for reshard in (True, False):
        model = _model()
        for layer in (model[0], model[2]):
            fully_shard(layer, reshard_after_forward=reshard)
        fully_shard(model)
        losses = _train(model, _batches(), torch.optim.SGD(model.parameters(), lr=0.5))
        _assert_trained_alike(model, losses)
        assert model[0]._sharded and model[0]._cache.value is None  # no rank keeps a whole layer
        with pytest.raises(ValueError, match="the weight is sharded"):
            model[0].prepare_for_eval()


def _ddp(rank: int, world: int) -> None:
    model = nn.parallel.DistributedDataParallel(_model())
    losses = _train(model, _batches(), torch.optim.SGD(model.parameters(), lr=0.5))
    _assert_trained_alike(model, losses)


@pytest.mark.parametrize("body", [_fsdp2, _ddp])
def test_two_processes_train_like_one(body: Any):
    """FSDP2 gathers the weight into the same tensor without a new version: codes that were kept would be stale."""
    in_two_processes(body)
