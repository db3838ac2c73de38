"""8-bit blocks in plain PyTorch: see :mod:`octavo.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import dynamic_map, thresholds

_MIN_BLOCK_ABSMAX = 2.0**-126


def _code_of(values: Tensor, code: Tensor) -> Tensor:
    return torch.searchsorted(thresholds(code), values.double().contiguous())


def quantize_blockwise(
    x: Tensor, blocksize: int = 256, signed: bool = True, code: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    book = dynamic_map(signed).to(x.device) if code is None else code
    flat = x.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = torch.where(blocks.isfinite(), blocks.abs(), 0.0).amax(1)
    absmax = torch.where(absmax < _MIN_BLOCK_ABSMAX, 0.0, absmax)
    inverse = torch.where(absmax == 0, 0.0, torch.div(torch.tensor(1.0), absmax))
    scaled = blocks * inverse[:, None]
    zero = _code_of(torch.zeros(1, device=x.device), book)
    codes = torch.where(scaled.isnan(), zero, _code_of(scaled.nan_to_num(nan=0.0, posinf=3e38, neginf=-3e38), book))
    return codes.flatten()[: len(flat)].view(x.shape).to(torch.uint8), absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 256,
    signed: bool = True,
    code: Tensor | None = None,
) -> Tensor:
    book = dynamic_map(signed).to(codes.device) if code is None else code
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return (book[codes.long()] * scale.view(codes.shape)).to(dtype)
