"""The options that all optimizers share, and their checks."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._paging import Options as PagingOptions


class Options(PagingOptions, total=False):
    """Options of every optimizer and, but for those of paging, parameter group, beside those of its rule."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    bits: int
    min_8bit_size: int
    rounding: str
    seed: int
    max_grad_norm: float | None


DEFAULTS = Options(
    maximize=False,
    foreach=None,
    capturable=False,
    differentiable=False,
    fused=None,
    bits=8,
    min_8bit_size=4096,
    rounding="nearest",
    seed=0,
    max_grad_norm=None,
)
OF_PAGING = tuple(PagingOptions.__annotations__)
# These options have to be 0 or positive where a group has them.
NOT_NEGATIVE = (
    *("weight_decay", "eps", "momentum", "alpha", "lr_decay", "initial_accumulator_value", "trust_coefficient"),
    *("t_alpha", "t_beta3", "max_grad_norm"),
)


def check_group(group: dict[str, Any], where: str, betas_wanted: int) -> None:
    """ValueError where an option is not what it may be."""

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"{where}: {name} must be {wanted}, got {group[name]!r}")

    def number(name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{where}: {name} must be a number, got {value!r}") from None

    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr must be one number, got a tensor of shape {list(lr.shape)}")
    on_device = isinstance(lr, Tensor) and lr.device.type == "cuda"  # reading it would wait for the device
    if not on_device and not 0.0 <= number("lr", lr) < math.inf:
        refuse("lr", "0 or positive")
    for name in NOT_NEGATIVE:
        optional = name not in group or (name == "max_grad_norm" and group[name] is None)
        optional = optional or (name in ("t_alpha", "t_beta3") and group[name] is None)
        if not optional and not 0.0 <= number(name, group[name]) < math.inf:
            refuse(name, "0 or positive")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != betas_wanted:
            refuse("betas", f"{betas_wanted} numbers")
        for i, beta in enumerate(betas):
            if not 0.0 <= number(f"betas[{i}]", beta) < 1.0:
                raise ValueError(f"{where}: betas[{i}] must lie in [0, 1), got {betas!r}")
    if group["bits"] not in (8, 32):
        refuse("bits", "8 or 32")
    if isinstance(size := group["min_8bit_size"], bool) or not isinstance(size, int) or size < 0:
        refuse("min_8bit_size", "0 or a positive whole number")
    if group["rounding"] not in ("nearest", "stochastic", "kahan"):
        refuse("rounding", "'nearest', 'stochastic' or 'kahan'")
    if isinstance(seed := group["seed"], bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        refuse("seed", "a whole number of 64 bits")
    if group.get("differentiable"):
        raise ValueError(f"{where}: differentiable=True is not supported: the kernels have no derivative")
    if group.get("amsgrad"):
        raise ValueError(f"{where}: amsgrad=True is not supported: there is no rule that keeps a maximum")
    for name in OF_PAGING:
        if name in group:
            raise ValueError(f"{where}: {name} is an option of the optimizer, not of a group, got {group[name]!r}")
