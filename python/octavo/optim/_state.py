"""The states that an optimizer keeps for one parameter: names, shapes, and the 8-bit format.

State of a rule, in the order of the kernels: its moments, then its second moment. In 32 bit these are torch.optim's:
fp32 tensors of the parameter's shape, `exp_avg`, `exp_avg_sq` and so on. In 8 bit each is uint8 codes of the
parameter's shape and, under the same name with `_absmax`, fp32: one number per block of 256 elements. Of a second
moment the root is kept, under its name with `_root`.

Blocks are counted over the flattened parameter (absmax [blocks]), or over each row where rows are the slices along
dimension 0 (absmax [rows, blocks of a row]). Rows are used where they hold whole blocks anyway, and for sharded
parameters (DTensor), whose shards then hold whole blocks whatever the number of processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from ..blockwise.ops import dequantize_blockwise, quantize_blockwise

BLOCK = 256
MIN_SHARDED_ROW = 64  # elements: in shorter rows, one absmax each, too little would be saved
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
State: TypeAlias = dict[str, Any]


class Names(NamedTuple):
    """The keys of a rule's states; `plain` is torch.optim's, `codes` that of 8 bit."""

    plain: tuple[str, ...]
    codes: tuple[str, ...]
    absmax: tuple[str, ...]
    signed: tuple[bool, ...]


def _names(moments: tuple[str, ...], second: str | None) -> Names:
    plain = moments if second is None else (*moments, second)
    codes = moments if second is None else (*moments, f"{second}_root")
    signed = tuple(name in moments for name in plain)
    return Names(plain, codes, tuple(f"{name}_absmax" for name in codes), signed)


RULES = {
    "sgd": _names((), None),
    "momentum": _names(("momentum_buffer",), None),
    "adam": _names(("exp_avg",), "exp_avg_sq"),
    "rmsprop": _names((), "square_avg"),
    "rmsprop_momentum": _names(("momentum_buffer",), "square_avg"),
    "adagrad": _names((), "sum"),
    "lion": _names(("exp_avg",), None),
    "ademamix": _names(("exp_avg", "exp_avg_slow"), "exp_avg_sq"),
    "lamb": _names(("exp_avg",), "exp_avg_sq"),
    "lars": _names(("momentum_buffer",), None),
    "stable_adamw": _names(("exp_avg",), "exp_avg_sq"),
}


WITH_SUMS = ("lamb", "lars", "stable_adamw")  # over whole parameters: `octavo.ops.optim_sums`


def read(
    state: State, names: Names, with_compensation: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """A parameter's step, states, absmax (none in 32 bit) and compensation; KeyError where one is missing."""
    quantized = bool(names.absmax) and names.absmax[0] in state
    values = [state[key] for key in (names.codes if quantized else names.plain)]
    absmax = [state[key] for key in names.absmax] if quantized else []
    return state["step"], values, absmax, state["compensation"] if with_compensation else None


# ---- sharded tensors -----------------------------------------------------------------------------------------------


def dtensor_type() -> Any:
    """DTensor, or None where nobody has imported it: then no tensor is one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(t: Tensor) -> bool:
    kind = dtensor_type()
    return kind is not None and isinstance(t, kind)


def local_of(t: Tensor) -> Tensor:
    """The part of t that is here."""
    if not is_dtensor(t):
        return t
    local = cast(Any, t).to_local()
    wait = getattr(local, "wait", None)  # a local part may come of a collective that is still under way
    return cast(Tensor, local if wait is None else wait())


def like(local: Tensor, param: Tensor, shape: tuple[int, ...]) -> Tensor:
    """local as the part of a tensor of this shape that is distributed as the parameter is."""
    if not is_dtensor(param):
        return local
    p, stride = cast(Any, param), [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * max(shape[i], 1)
    made = dtensor_type().from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
    return cast(Tensor, made)


def whole_of(t: Tensor) -> Tensor:
    """All of t, on every process."""
    return cast(Tensor, cast(Any, t).full_tensor()) if is_dtensor(t) else t


def shard_of(value: Tensor, param: Tensor) -> Tensor:
    """The part of a whole or distributed tensor that belongs beside the local part of the parameter."""
    if not is_dtensor(param):
        return whole_of(value)
    from torch.distributed.tensor import distribute_tensor

    p = cast(Any, param)
    if is_dtensor(value):
        v = cast(Any, value)
        if v.device_mesh == p.device_mesh:
            return local_of(v if v.placements == p.placements else v.redistribute(placements=p.placements))
        value = v.full_tensor()
    return local_of(distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None))


# ---- layout --------------------------------------------------------------------------------------------------------


def row_of(param: Tensor) -> int:
    """Elements of a slice along dimension 0; 0 where there are none."""
    return param.numel() // param.shape[0] if param.dim() >= 2 and param.shape[0] else 0


def blocks_of(count: int) -> int:
    return (count + BLOCK - 1) // BLOCK


def _in_rows(param: Tensor) -> bool:
    row = row_of(param)
    return row > 0 and (row % BLOCK == 0 or is_dtensor(param))


def absmax_shape(param: Tensor, rows: bool | None = None) -> tuple[int, ...]:
    """The shape of the absmax of a whole parameter."""
    if _in_rows(param) if rows is None else rows:
        return (param.shape[0], blocks_of(row_of(param)))
    return (blocks_of(param.numel()),)


def shards_by_rows(param: Tensor) -> bool:
    """Whether the shards of a DTensor hold whole rows."""
    return all(p.is_replicate() or p.is_shard(0) or _strided(p) for p in cast(Any, param).placements)


def _strided(placement: Any) -> bool:  # how torch shards dimension 0 by tensor and data parallelism at once
    return type(placement).__name__ == "_StridedShard" and placement.dim == 0


def wants_8bit(group: dict[str, Any], param: Tensor) -> bool:
    """Whether a new state of this parameter is in 8 bit."""
    if group["bits"] != 8 or getattr(param, "octavo_state_bits", 8) != 8 or param.numel() < group["min_8bit_size"]:
        return False
    return not is_dtensor(param) or (row_of(param) >= MIN_SHARDED_ROW and shards_by_rows(param))


# ---- making states -------------------------------------------------------------------------------------------------


# Makes a tensor of a shape and dtype where the state belongs; its values are arbitrary.
Make: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]


def beside(param: Tensor) -> Make:
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=local_of(param).device)


def _local_absmax_shape(local: Tensor, param: Tensor) -> tuple[int, ...]:
    shape = absmax_shape(param)
    return shape if len(shape) == 1 else (local.shape[0] if local.dim() == param.dim() else 0, shape[1])


def add_state(
    state: State,
    param: Tensor,
    names: Names,
    quantized: bool,
    i: int,
    fill: float = 0.0,
    make: Make | None = None,
) -> None:
    """Give `state` the rule's i-th state, all of it `fill` (0, or positive for a second moment)."""
    local, make = local_of(param), beside(param) if make is None else make
    if not quantized:
        state[names.plain[i]] = like(make(local.shape, torch.float32).fill_(fill), param, tuple(param.shape))
        return
    code = 255 if fill else 127 if names.signed[i] else 0
    codes = make(local.shape, torch.uint8).fill_(code)
    absmax = make(_local_absmax_shape(local, param), torch.float32).fill_(math.sqrt(fill))
    state[names.codes[i]] = like(codes, param, tuple(param.shape))
    state[names.absmax[i]] = like(absmax, param, absmax_shape(param))


def add_compensation(state: State, param: Tensor, make: Make | None = None) -> None:
    local, make = local_of(param), beside(param) if make is None else make
    state["compensation"] = like(make(local.shape, local.dtype).zero_(), param, tuple(param.shape))


def bytes_of(param: Tensor, names: Names, quantized: bool, kahan: bool, aligned: Callable[[int], int]) -> int:
    """The bytes that a new state takes here, without its step, with each tensor aligned."""
    local = local_of(param)
    if local.numel() == 0:
        return 0
    blocks = math.prod(_local_absmax_shape(local, param))
    each = aligned(local.numel()) + aligned(4 * blocks) if quantized else aligned(4 * local.numel())
    return each * len(names.plain) + (aligned(local.nbytes) if kahan else 0)


def new_step(param: Tensor, value: float = 0.0) -> Tensor:
    """A step counter: in float64, which counts on where fp32 stops, at 2**24; torch.optim loads it."""
    return torch.full((), value, dtype=torch.float64, device=param.device)


# ---- conversion ----------------------------------------------------------------------------------------------------


def set_from_values(
    state: State, param: Tensor, names: Names, quantized: bool, i: int, values: Tensor, make: Make
) -> None:
    """Give `state` the rule's i-th state from the local part of its fp32 values (of a second moment: itself)."""
    if not quantized:
        state[names.plain[i]] = like(make(values.shape, torch.float32).copy_(values), param, tuple(param.shape))
        return
    if not bool(values.isfinite().all()) or (not names.signed[i] and bool((values < 0).any())):
        wanted = "finite" if names.signed[i] else "finite and not negative"
        shape = list(param.shape)
        raise ValueError(f"{names.plain[i]} must be {wanted} to be kept in 8 bit, for a parameter of shape {shape}")
    values = values.float() if names.signed[i] else values.float().sqrt()
    codes, absmax = _quantize(values.contiguous(), row_of(param) if _in_rows(param) else 0, names.signed[i])
    state[names.codes[i]] = like(make(codes.shape, codes.dtype).copy_(codes), param, tuple(param.shape))
    if _in_rows(param):
        absmax = absmax.view(-1, blocks_of(row_of(param)))
    state[names.absmax[i]] = like(make(absmax.shape, absmax.dtype).copy_(absmax), param, absmax_shape(param))


def _quantize(values: Tensor, row: int, signed: bool) -> tuple[Tensor, Tensor]:
    padding = -row % BLOCK if row else 0
    if padding:
        padded = torch.nn.functional.pad(values.view(-1, row), (0, padding))
        codes, absmax = quantize_blockwise(padded, BLOCK, signed)
        codes = codes[:, :row].reshape(values.shape)
    else:
        codes, absmax = quantize_blockwise(values, BLOCK, signed)
    if not signed:  # a root above 0 is never divided by as 0: at least code 1
        codes = torch.where((values > 0) & (codes == 0), 1, codes).to(torch.uint8)
    return codes, absmax


def values_of(codes: Tensor, absmax: Tensor, signed: bool, second: bool) -> Tensor:
    """fp32 values of a state in 8 bit, whole or local; of a second moment itself, not the root."""
    if absmax.dim() == 2 and codes.numel():
        row = codes.numel() // absmax.shape[0]
        padded = torch.nn.functional.pad(codes.reshape(-1, row), (0, -row % BLOCK))
        values = dequantize_blockwise(padded, absmax.reshape(-1), torch.float32, BLOCK, signed)
        values = values[:, :row].reshape(codes.shape)
    else:
        values = dequantize_blockwise(codes, absmax.reshape(-1), torch.float32, BLOCK, signed)
    return values.square() if second else values
