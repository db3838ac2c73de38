"""What the tests of `NF4Linear` share."""

from __future__ import annotations

from typing import Any

import torch
from octavo.nn import NF4Linear
from torch import Tensor, nn

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "double": {"double_quant": True},
    "fp4": {"quant_type": "fp4", "blocksize": 256},
    "nf3": {"quant_type": "nf3", "blocksize": 32, "double_quant": True},
}


def make(n: int = 37, k: int = 48, bias: bool = True, dtype: torch.dtype | None = None, **options: Any) -> NF4Linear:
    """Neither features nor their product are multiples of what a kernel would like."""
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **options)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype
        assert torch.equal(a[name], b[name]), name


def changed(state: dict[str, Tensor], change: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in (state | change).items() if value is not None}
