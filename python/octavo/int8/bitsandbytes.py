"""The int8 state of bitsandbytes, read without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import dtype_name


def read_linear8bit(state: dict[str, Tensor]) -> list[str]:
    """Turn the int8 state of bitsandbytes, if it is that, into ours in place: weight * SCB / 127 is the weight."""
    layouts = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}
    layout = state.pop("weight_format", None)
    if layout is not None and (code := int(layout)) != 0:
        return [
            f"weight_format is {code} ({layouts.get(code, 'unknown')}); only 0 (row) can be read. Load the checkpoint "
            "with the bitsandbytes that wrote it and save it again in row format"
        ]
    if "SCB" in state and "weight_scale" not in state:
        scb = state.pop("SCB")
        if scb.dtype is not torch.float32:
            return [f"SCB must be float32, got {dtype_name(scb)} {list(scb.shape)}"]
        state["weight_scale"] = scb / 127.0
    return []
