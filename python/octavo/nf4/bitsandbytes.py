"""The 4-bit state of bitsandbytes, read and written to the byte; bitsandbytes itself is not needed.

A `Linear4bit` layer holds, beside ``bias``: ``weight`` uint8 [bytes, 1] (or the same bytes as another dtype, its
"quant_storage"), ``weight.absmax`` fp32 or, with double quantization, uint8 [blocks], ``weight.quant_map`` fp32 [16],
then also ``weight.nested_absmax`` fp32 and ``weight.nested_quant_map`` fp32 [256]; and
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``): uint8, the bytes of a JSON object.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.files import parse_json
from .weight import NESTED_BLOCKSIZE, NF4Weight, check_options, code_book

MARK = "weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_STORAGE = (torch.uint8, torch.int8, *_DTYPES.values(), torch.float64)  # all that transformers knows


class Header(NamedTuple):
    """The fields of the JSON object."""

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_offset: float | None


def is_linear4bit(state: dict[str, Tensor]) -> bool:
    """Whether the tensors of a layer, by their names in it, are those of bitsandbytes."""
    return any(name.startswith(MARK) for name in state)


def read_header(state: dict[str, Tensor]) -> Header:
    """The layer's description.

    Raises:
        ValueError: it is not what bitsandbytes writes; the message has the value in question.
    """
    marks = [name for name in state if name.startswith(MARK)]
    if len(marks) != 1:
        raise ValueError(f"there must be one {MARK}nf4 or fp4, got {', '.join(marks) or 'none'}")
    raw = state[marks[0]]
    if raw.dtype is not torch.uint8 or raw.dim() != 1:
        raise ValueError(f"{marks[0]} must be uint8 of one dimension, got {raw.dtype} {list(raw.shape)}")
    if raw.is_meta:
        raise ValueError(f"{marks[0]} is on the meta device: it must have its {len(raw)} values")
    text = bytes(raw.tolist())
    try:
        described = parse_json(text, marks[0], foreign=True)
    except ValueError as error:
        raise ValueError(f"{error}; it is {text[:80]!r}") from None

    def entry(name: str, kind: type | tuple[type, ...]) -> Any:
        value = described.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{marks[0]} has {name} = {value!r}")
        return value

    quant_type, blocksize = entry("quant_type", str), entry("blocksize", int)
    if quant_type not in ("nf4", "fp4") or marks[0] != MARK + quant_type:
        raise ValueError(f"{marks[0]} has quant_type = {quant_type!r}")
    check_options(quant_type, blocksize)
    dtype, shape = entry("dtype", str), entry("shape", list)
    if dtype not in _DTYPES:
        raise ValueError(f"{marks[0]} has dtype = {dtype!r}; known: {', '.join(_DTYPES)}")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
        raise ValueError(f"{marks[0]} has shape = {shape!r}")
    offset = None
    if "nested_blocksize" in described or "nested_offset" in described:
        if entry("nested_blocksize", int) != NESTED_BLOCKSIZE or entry("nested_dtype", str) != "float32":
            nested = (
                f"nested_blocksize = {described['nested_blocksize']!r}, nested_dtype = {described['nested_dtype']!r}"
            )
            raise ValueError(f"{marks[0]} has {nested}; {NESTED_BLOCKSIZE} and 'float32' can be read")
        offset = entry("nested_offset", (float, int))
        if not abs(offset) <= torch.finfo(torch.float32).max:  # nor NaN
            raise ValueError(f"{marks[0]} has nested_offset = {offset!r}")
    return Header(quant_type, blocksize, _DTYPES[dtype], tuple(shape), None if offset is None else float(offset))


def read_linear4bit(state: dict[str, Tensor]) -> tuple[Header, dict[str, Tensor]]:
    """The header, and the tensors by their names in `octavo.nn.NF4Linear`. Tensors are shared, not copied.

    Raises:
        ValueError: see `read_header`; a tensor that is missing, another code book.
    """
    header = read_header(state)
    nested = header.nested_offset is not None
    wanted = ["weight", "weight.absmax", "weight.quant_map"]
    wanted += ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
    if missing := [name for name in wanted if name not in state]:
        raise ValueError(f"{', '.join(missing)} missing beside {MARK}{header.quant_type}")
    if unknown := [n for n in state if n.startswith("weight.") and n not in wanted and not n.startswith(MARK)]:
        raise ValueError(f"unknown {', '.join(unknown)} beside {MARK}{header.quant_type}")
    maps = {"weight.quant_map": (f"code book of {header.quant_type}", code_book(header.quant_type))}
    if nested:
        maps["weight.nested_quant_map"] = "signed dynamic map", code_book("dynamic")
    for name, (what, values) in maps.items():
        given = state[name].detach()
        if given.dtype is not values.dtype or given.shape != values.shape:
            wanted_map, got = f"{values.dtype} {list(values.shape)}", f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"{name} must be the {what}, {wanted_map}, got {got}")
        if not given.is_meta and not torch.equal(given.cpu(), values):
            raise ValueError(f"{name} is not the {what}, got {given.flatten()[:4].tolist()} ...")
    packed = state["weight"].detach()
    if packed.dtype not in _STORAGE or packed.dim() == 0:
        raise ValueError(
            "weight must be bytes, stored as uint8, int8, float16, bfloat16, float32 or float64 of one dimension or "
            f"more, got {packed.dtype} {list(packed.shape)}"
        )
    if packed.dtype is not torch.uint8:
        packed = packed.contiguous().view(torch.uint8)
    out = {"weight": packed.flatten(), "absmax": state["weight.absmax"]}
    if nested:
        out["nested_absmax"] = state["weight.nested_absmax"]
        out["offset"] = torch.tensor([header.nested_offset], dtype=torch.float32, device=packed.device)
    if "bias" in state:
        out["bias"] = state["bias"]
    return header, out


def write_linear4bit(w: NF4Weight) -> dict[str, Tensor]:
    """The tensors of bitsandbytes for a weight, by their names in the layer, in its order.

    Raises:
        ValueError: a type that bitsandbytes has not.
    """
    if w.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"bitsandbytes has no quant_type {w.quant_type!r}; nf4 and fp4 can be written")
    device = w.packed.device
    described: dict[str, Any] = {
        "quant_type": w.quant_type,
        "blocksize": w.blocksize,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    out = {"weight": w.packed.view(-1, 1), "weight.absmax": w.absmax}
    out["weight.quant_map"] = (code_book(w.quant_type) + 0.0).to(device)  # fp4's -0 is 0 in its table
    if w.nested_absmax is not None and w.offset is not None:
        described |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        described["nested_offset"] = w.offset.item()
        out["weight.nested_absmax"] = w.nested_absmax
        out["weight.nested_quant_map"] = code_book("dynamic").to(device)
    text = json.dumps(described).encode()
    out[MARK + w.quant_type] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return out
