"""Calls of every operator, drawn at random: valid ones, and the same with one argument spoiled."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from spqr_weights import random_weight
from torch import Tensor

Call = dict[str, Any]  # the arguments by name
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
QUANT_TYPES = {"nf2": 2, "nf3": 3, "nf4": 4, "nf8": 8, "fp4": 4}
RULES = {
    "sgd": 0, "momentum": 1, "adam": 2, "rmsprop": 1, "rmsprop_momentum": 2, "adagrad": 1, "lion": 1, "ademamix": 3,
    "lamb": 2, "lars": 1, "stable_adamw": 2,
}  # fmt: skip
WITH_SUMS = ("lamb", "lars", "stable_adamw")


class Draw:
    """Random numbers of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int = 70) -> int:
        return int(self.one(0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, self.random.randint(0, most)))

    def sizes(self, last: int | None = None) -> tuple[int, ...]:
        leading = [self.size(9) for _ in range(self.one(0, 1, 1, 1, 2))]
        return (*leading, self.size() if last is None else last)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Values of every magnitude; sometimes zeros, NaN, Inf; sometimes a view that is not contiguous."""
        x = torch.randn(shape, generator=self.generator) * 10.0 ** self.random.randint(-8, 8)
        if self.chance(0.3) and x.numel():
            x.view(-1)[self.random.randrange(x.numel())] = self.one(0.0, -0.0, float("nan"), float("inf"), 1e-45, 3e38)
        x = x.to(self.one(*FLOATS) if dtype is None else dtype)
        if self.chance(0.2) and x.dim() >= 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.chance(0.1):
            return torch.stack((x, x), -1)[..., 0]
        return x

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)

    def codes(self, *shape: int) -> Tensor:
        return self.integers(-127, 128, shape, torch.int8)


def _gemm(d: Draw) -> tuple[int, int, Tensor, Tensor]:
    n, k = d.size(), d.size(300)
    x = d.codes(*d.sizes(k))
    return n, k, x, d.codes(n, k)


def int8_mm(d: Draw) -> Call:
    _, _, a, b = _gemm(d)
    return {"a": a, "b": b}


def int8_gemm(d: Draw) -> Call:
    n, _, a, b = _gemm(d)
    dtype = d.one(*FLOATS)
    scales = d.floats(a.shape[:-1], torch.float32), d.floats((n,), torch.float32)
    bias = d.one(None, d.floats((n,), dtype))
    return {"a": a, "b": b, "a_scale": scales[0], "b_scale": scales[1], "bias": bias, "out_dtype": dtype}


def int8_linear(d: Draw) -> Call:
    n, k, _, weight = _gemm(d)
    x = d.floats(d.sizes(k))
    bias = d.one(None, d.floats((n,), x.dtype))
    threshold = float(d.one(0.0, 1e-3, 6.0))
    return {"x": x, "weight": weight, "weight_scale": d.floats((n,), torch.float32).abs(), "bias": bias,
            "threshold": threshold}  # fmt: skip


def _x(d: Draw) -> Call:
    return {"x": d.floats(d.sizes())}


def quantize_rowwise(d: Draw) -> Call:
    return {**_x(d), "threshold": float(d.one(0.0, 0.0, 6.0, 1e-46))}


def seeded(d: Draw) -> Call:
    return {**_x(d), "seed": d.one(None, torch.tensor(d.random.randint(-9, 9)))}


def dequantize_rowwise(d: Draw) -> Call:
    codes = d.codes(*d.sizes())
    return {"codes": codes, "scale": d.floats(tuple(codes.shape[:-1]), torch.float32), "dtype": d.one(*FLOATS)}


def find_outlier_columns(d: Draw) -> Call:
    return {**_x(d), "threshold": float(d.one(1e-46, 1e-3, 6.0))}


def _columns(d: Draw, k: int) -> Call:
    capacity = d.size(20)
    return {
        "columns": d.integers(-2, k + 2, (capacity,), torch.int32),
        "count": torch.tensor([d.random.randint(-1, capacity + 2)], dtype=torch.int32),
    }


def extract_columns(d: Draw) -> Call:
    call = _x(d)
    return {**call, **_columns(d, call["x"].shape[-1])}


def extract_int8_columns(d: Draw) -> Call:
    n, k, _, weight = _gemm(d)
    scale = d.floats((n,), torch.float32)
    return {"weight": weight, "weight_scale": scale, **_columns(d, k), "dtype": d.one(*FLOATS)}


def _code(d: Draw) -> Tensor | None:
    return d.one(None, None, d.floats((256,), torch.float32).nan_to_num(0.0).contiguous().sort().values.cumsum(0))


def quantize_blockwise(d: Draw) -> Call:
    return {**_x(d), "blocksize": d.one(64, 256, 4096), "signed": d.chance(0.5), "code": _code(d)}


def dequantize_blockwise(d: Draw) -> Call:
    codes, blocksize = d.integers(0, 256, d.sizes(), torch.uint8), d.one(64, 256, 4096)
    absmax = d.floats((-(-codes.numel() // blocksize),), torch.float32)
    return {"codes": codes, "absmax": absmax, "dtype": d.one(*FLOATS), "blocksize": blocksize,
            "signed": d.chance(0.5), "code": _code(d)}  # fmt: skip


def nf4_quantize(d: Draw) -> Call:
    return {**_x(d), "quant_type": d.one(*QUANT_TYPES), "blocksize": d.one(32, 64, 4096)}


def _low_bit(d: Draw, count: int) -> Call:
    quant_type, blocksize = d.one(*QUANT_TYPES), d.one(32, 64, 256)
    blocks = -(-count // blocksize)
    packed = d.integers(0, 256, (-(-count * QUANT_TYPES[quant_type] // 8),), torch.uint8)
    nested = d.chance(0.4)
    absmax = d.integers(0, 256, (blocks,), torch.uint8) if nested else d.floats((blocks,), torch.float32).abs()
    return {
        "packed": packed,
        "absmax": absmax,
        "nested_absmax": d.floats((-(-blocks // 256),), torch.float32).abs() if nested else None,
        "offset": d.floats((1,), torch.float32) if nested else None,
        "quant_type": quant_type,
        "blocksize": blocksize,
    }


def nf4_dequantize(d: Draw) -> Call:
    size = d.sizes()
    count = 1
    for each in size:
        count *= each
    return {**_low_bit(d, count), "size": list(size), "dtype": d.one(*FLOATS)}


def nf4_linear(d: Draw) -> Call:
    n, k = d.size(), d.size(300)
    x = d.floats(d.sizes(k))
    return {"x": x, **_low_bit(d, n * k), "bias": d.one(None, d.floats((n,), x.dtype)), "n": n}


def nf4_linear_transposed(d: Draw) -> Call:
    n, k = d.size(), d.size(300)
    return {"g": d.floats(d.sizes(n)), **_low_bit(d, n * k), "k": k}


def _csr(d: Draw, n: int, k: int) -> Call:
    mask = torch.rand((n, k), generator=d.generator) < d.one(0.0, 0.1, 0.5)
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0)
    if d.chance(0.1) and n:
        offsets[d.random.randrange(n + 1)] += d.one(-1, 1, 1000)
    columns = mask.nonzero()[:, 1].to(d.one(torch.int32, torch.uint16))
    return {"columns": columns, "row_offsets": offsets.to(d.one(torch.int32, torch.int64))}


def csr_matmul(d: Draw) -> Call:
    n, k = d.size(), d.size(300)
    csr = _csr(d, n, k)
    values = d.floats((len(csr["columns"]),))
    x = d.floats(d.sizes(k))
    return {"values": values, **csr, "x": x, "n": n, "bias": d.one(None, d.floats((n,), values.dtype))}


def csr_matmul_add(d: Draw) -> Call:
    n, k = d.size(), d.size(300)
    csr, m = _csr(d, n, k), d.size(20)
    dtype = d.one(*FLOATS)
    x = d.floats((m, k), dtype)
    return {"out": d.floats((m, n), dtype).contiguous(), "values": d.floats((len(csr["columns"]),)), **csr, "x": x}


def csr_matmul_transposed(d: Draw) -> Call:
    n, k = d.size(), d.size(300)
    csr = _csr(d, n, k)
    return {"values": d.floats((len(csr["columns"]),)), **csr, "g": d.floats(d.sizes(n)), "k": k}


def csr_grad_values(d: Draw) -> Call:
    n, k, m, dtype = d.size(), d.size(300), d.size(20), d.one(*FLOATS)
    return {**_csr(d, n, k), "g": d.floats((m, n), dtype), "x": d.floats((m, k), dtype), "dtype": d.one(*FLOATS)}


def spqr_linear(d: Draw) -> Call:
    call = spqr_dequantize(d)
    n, k = call["n"], call.pop("k")
    x = d.floats(d.sizes(k), call.pop("dtype"))
    return {"x": x, **call, "bias": d.one(None, d.floats((n,), x.dtype))}


def spqr_dequantize(d: Draw) -> Call:
    group = d.one(16, 32, 64)
    w = random_weight(
        d.size(), group * d.random.randint(0, 5), d.one(2, 3, 4), group, d.one(16, 32), d.random.randint(1, 4),
        d.random.randint(1, 4), d.chance(0.7), d.one(0.0, 0.02), d.chance(0.5), seed=d.random.randrange(1 << 30),
    )  # fmt: skip
    names = ("codes", "statistics", "second_order", "unit", "outliers", "row_offsets", "perm", "n", "k")
    names += ("group_size", "stats_group_size", "scale_bits", "zero_bits")
    return {**{name: getattr(w, name) for name in names}, "dtype": d.one(*FLOATS)}


def spqr_quantize_columns(d: Draw) -> Call:
    group, n = d.one(2, 16, 32), d.size()
    k = group * d.random.randint(0, 4)
    factor = torch.randn((k, k), generator=d.generator).triu() * 0.1
    factor += torch.diag(torch.rand(k, generator=d.generator) + 0.5)
    second = d.one((0, 0), (3, 3), (1, 4))
    weight = torch.randn((n, k), generator=d.generator) * d.one(1e-3, 1.0, 100.0)
    return {
        "weight": weight, "factor": factor, "threshold": float(d.one(0.0, 0.3, float("inf"))), "bits": d.one(2, 3, 8),
        "group_size": group, "stats_group_size": d.one(16, 32), "scale_bits": second[0], "zero_bits": second[1],
        "leave_one_out": d.chance(0.5),
    }  # fmt: skip


def _lists(d: Draw, rule: str) -> Call:
    call: Call = {name: [] for name in ("params", "grads", "steps", "states", "absmax", "compensation")}
    kahan = d.chance(0.2)
    for _ in range(d.random.randint(1, 4)):
        shape = d.sizes()
        param = d.floats(shape).contiguous()
        count, quantized = param.numel(), d.chance(0.7)
        call["params"].append(param)
        call["grads"].append(d.floats(shape).contiguous())
        call["steps"].append(torch.tensor(float(d.random.randint(1, 5)), dtype=torch.float64))
        for _ in range(RULES[rule]):
            state = d.integers(0, 256, shape, torch.uint8) if quantized else d.floats(shape, torch.float32).contiguous()
            call["states"].append(state)
            blocks = -(-count // 256) if quantized else 0
            call["absmax"].append(d.floats((blocks,), torch.float32).abs().contiguous())
        if kahan:
            wide = param.dtype is torch.float32
            call["compensation"].append(torch.empty(0) if wide else d.floats(shape, param.dtype).contiguous())
    return call


def optim_table(d: Draw) -> Call:
    call = _lists(d, d.one(*RULES))
    return {**call, "ids": [d.random.randrange(1 << 32) for _ in call["params"]]}


def _hyper(d: Draw) -> list[float]:
    betas = (0.9, 0.99, 0.9999)
    return [1e-2, d.one(0.0, 0.1), d.one(0.0, 1e-8), *betas, 0.0, 2.0, 0.0, 0.0, 0.0, 1e-3, d.one(0.0, 1.0), 0.0, 1.0]


def optim_step(d: Draw) -> Call:
    rule = d.one(*RULES)
    call = _lists(d, rule)
    table = torch.ops.octavo.optim_table(*call.values(), list(range(len(call["params"]))))
    return {**call, "nonfinite": torch.zeros(1, dtype=torch.int64), "table": table, "rule": rule, "hyper": _hyper(d),
            "stochastic": d.chance(0.3), "seed": d.random.randint(-5, 5)}  # fmt: skip


def optim_sums(d: Draw) -> Call:
    rule = d.one(*WITH_SUMS)
    call = _lists(d, rule)
    table = torch.ops.octavo.optim_table(*call.values(), list(range(len(call["params"]))))
    return {**call, "table": table, "rule": rule, "hyper": _hyper(d)}


CASES: dict[str, Callable[[Draw], Call]] = {
    "quantize_columnwise": _x,
    "quantize_tensorwise": _x,
    "quantize_rowwise_columnwise": _x,
    "quantize_tensorwise_transpose": _x,
    "quantize_columnwise_transpose": seeded,
    "quantize_rowwise_columnwise_transpose": seeded,
    **{
        function.__name__: function
        for function in (
            quantize_rowwise, dequantize_rowwise, find_outlier_columns, extract_columns, extract_int8_columns, int8_mm,
            int8_gemm, int8_linear, quantize_blockwise, dequantize_blockwise, nf4_quantize, nf4_dequantize, nf4_linear,
            nf4_linear_transposed, csr_matmul, csr_matmul_add, csr_matmul_transposed, csr_grad_values, spqr_linear,
            spqr_dequantize, spqr_quantize_columns, optim_table, optim_step, optim_sums,
        )
    },
}  # fmt: skip


# ---- spoiled -------------------------------------------------------------------------------------------------------


def spoil(d: Draw, call: Call) -> tuple[Call, str]:
    """The call with one argument changed, and what was done to it."""
    name = d.one(*call)
    value = call[name]
    if isinstance(value, list) and value:
        at = d.random.randrange(len(value))
        changed, how = _spoiled(d, value[at])
        made: Any = [*value[:at], changed, *value[at + 1 :]]
        if d.chance(0.2):
            made, how = value[:-1], "one fewer"
    else:
        made, how = _spoiled(d, value)
    return {**call, name: made}, f"{name}: {how}"


def _spoiled(d: Draw, value: Any) -> tuple[Any, str]:
    if isinstance(value, bool):
        return not value, "other"
    if isinstance(value, int):
        changed = d.one(-1, 0, 1, 3, value + 1, value - 1, 2 * value, 1 << 31, 1 << 40, -(1 << 63))
        return changed, f"{changed}"
    if isinstance(value, float):
        changed = d.one(-1.0, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300)
        return changed, f"{changed}"
    if isinstance(value, str):
        changed = d.one("", "no such", value.upper(), "nf4", "adam")
        return changed, changed
    if isinstance(value, torch.dtype):
        changed = d.one(*DTYPES)
        return changed, str(changed)
    if value is None:
        return torch.zeros(d.size(9)), "a tensor"
    if not isinstance(value, Tensor):
        return value, "as it is"
    kind = d.one(
        "dtype", "longer", "shorter", "flat", "unsqueezed", "scalar", "empty", "first", "strided", "transposed"
    )
    if kind == "dtype":
        return value.nan_to_num(0.0, 0.0, 0.0).to(d.one(*DTYPES)), kind
    if kind == "longer" and value.dim():
        return torch.cat((value, value[:1] if len(value) else value.new_zeros((1, *value.shape[1:])))), kind
    if kind == "shorter" and value.dim() and len(value):
        return value[:-1], kind
    if kind == "flat":
        return value.reshape(-1), kind
    if kind == "scalar":
        return value.new_zeros(()), kind
    if kind == "empty":
        return value.new_empty(0), kind
    if kind == "first" and value.dim() and value.shape[-1] > 1:
        return value[..., :-1], kind
    if kind == "strided" and value.dim():
        return torch.stack((value, value), -1)[..., 0], kind
    if kind == "transposed" and value.dim() >= 2:
        return value.transpose(0, 1), kind
    return value[None], "unsqueezed"
