"""One random call of an operator, and what must hold of it: see test_operators.py."""

from __future__ import annotations

import ctypes
import mmap
import random
from typing import Any

import torch
from cases import CASES, Draw, spoil
from octavo import _C
from torch import Tensor
from torch.utils import _pytree as pytree

# Refusals that need a tensor's values, which a fake does not have.
OF_VALUES = ("row_offsets must", "code must", "the diagonal of factor", "it has other addresses", "the table does not")
OF_MEMORY = ("allocate", "Storage size calculation overflowed", "numel: integer multiplication overflow")
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory whose end, or beginning, lies at a page that must not be touched."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def copy(self, t: Tensor, at_end: bool) -> Tensor:
        """The tensor as it is laid out, its storage at an edge."""
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        )
        count, page = span * t.element_size(), mmap.PAGESIZE
        pages = -(-count // page)
        area = mmap.mmap(-1, (pages + 2) * page)
        self.maps.append(area)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for edge in (start, start + (pages + 1) * page):
            assert _libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
        if count == 0:
            return t
        first = start + page + (pages * page - count if at_end else 0)
        flat = torch.frombuffer((ctypes.c_char * count).from_address(first), dtype=t.dtype)
        made = flat.as_strided(t.shape, t.stride())
        made.copy_(t)
        return made


def outcome(function: Any, call: dict[str, Any]) -> tuple[str | None, Any]:
    try:
        return None, function(**call)
    except (RuntimeError, NotImplementedError) as error:
        return str(error), None


def described(value: Any) -> list[tuple[Any, ...]]:
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return [(tuple(t.shape), t.dtype) for t in tensors]


def on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits: NaN is NaN, and -0 is not 0."""
    return a.shape == b.shape and torch.equal(*(torch.stack([t]).view(-1).view(torch.uint8) for t in (a, b)))


def run_case(name: str, number: int) -> None:
    draw = Draw(random.Random(f"{name} {number}").randrange(1 << 62))
    call, how = CASES[name](draw), "valid"
    if draw.chance(0.5):
        call, how = spoil(draw, call)
    memory, at_end = Guarded(), draw.chance(0.7)
    packet = getattr(torch.ops.octavo, name).default
    fitted = pytree.tree_map(lambda v: memory.copy(v, at_end) if isinstance(v, Tensor) else v, call)
    if "table" in call and "table" not in how:  # it has the addresses of these very tensors
        lists = [fitted[key] for key in ("params", "grads", "steps", "states", "absmax", "compensation")]
        error, table = outcome(lambda: torch.ops.octavo.optim_table(*lists, list(range(len(lists[0])))), {})
        if error is None:
            fitted["table"] = table
    before = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, fitted)
    _C.set_isa(draw.one(*_C.build_info()["isa"]))
    error, made = outcome(packet, fitted)
    if error is not None and any(text in error for text in OF_MEMORY):
        return
    meta = pytree.tree_map(lambda v: on_meta(v) if isinstance(v, Tensor) else v, fitted)
    fake_error, faked = outcome(packet, meta)
    if error is None:
        assert fake_error is None, f"{how}: the fake refuses: {fake_error}"
        assert described(made) == described(faked), f"{how}: {described(made)}, the fake says {described(faked)}"
    elif not any(text in error for text in OF_VALUES):
        assert fake_error is not None, f"{how}: the fake takes what is refused: {error}"
    mutable = {a.name for a in packet._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for key, value in before.items():
        if key in mutable and error is None:
            continue
        for old, new in zip(pytree.tree_leaves(value), pytree.tree_leaves(fitted[key]), strict=True):
            assert not isinstance(old, Tensor) or same(old, new), f"{how}: {key} was changed (refused: {error})"
