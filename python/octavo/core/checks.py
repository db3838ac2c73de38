"""The checks that all families share, and the wording of their messages."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C

WIDE_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # which no codes are in
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32


def cuda_built() -> bool:
    """Whether this build has the CUDA kernels."""
    return bool(_C.build_info()["cuda"])


def name_of_dtype(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype."""
    return name_of_dtype(tensor.dtype)


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_weight(linear: nn.Linear, name: str = "") -> None:
    """ValueError unless `linear` can be quantized: weight and bias fp32, fp16 or bf16, the weight all finite."""
    where = f"{name}: {linear}" if name else str(linear)
    weight = linear.weight.detach()
    if weight.dtype not in FLOATS:
        raise ValueError(f"{where}: the weight must be float32, float16 or bfloat16, got {dtype_name(weight)}")
    if linear.bias is not None and linear.bias.dtype not in FLOATS:
        raise ValueError(f"{where}: the bias must be float32, float16 or bfloat16, got {dtype_name(linear.bias)}")
    if not weight.is_meta and (bad := weight.numel() - int(torch.isfinite(weight).sum())):
        raise ValueError(f"{where}: {bad} of {weight.numel()} weights are NaN or Inf")


def bias_errors(bias: Tensor | None, out_features: int) -> list[str]:
    """List the errors of a layer's bias; the list is empty for a sound one."""
    if bias is None or (bias.dtype in FLOATS and tuple(bias.shape) == (out_features,)):
        return []
    found = f"{dtype_name(bias)} {list(bias.shape)}"
    return [f"bias must be float32, float16 or bfloat16 [{out_features}], got {found}"]


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on: that of its first parameter or buffer, or where accelerate will put it."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def module_bytes(module: nn.Module) -> int:
    """The bytes of parameters and buffers, each counted once however many modules share it."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
