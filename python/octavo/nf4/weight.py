"""`NF4Weight`: a tensor in 4 bits (or 2, 3, 8), and its making: `quantize_4bit`, `dequantize_4bit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..blockwise.ops import quantize_blockwise
from . import ops
from .ops import BITS, packed_bytes

NESTED_BLOCKSIZE = 256
TENSORS = ("packed", "absmax", "nested_absmax", "offset")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def code_book(name: str) -> Tensor:
    """The values of a code book by their codes, fp32: of a quant_type, or "dynamic", the map of 8-bit blocks."""
    return torch.tensor(_C.codebook(name))


def check_options(quant_type: str, blocksize: int) -> None:
    """ValueError unless the operators know these."""
    if not isinstance(quant_type, str) or quant_type not in BITS:
        raise ValueError(f"quant_type must be one of {', '.join(BITS)}, got {quant_type!r}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, got {blocksize!r}")


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor as `quantize_4bit` stores it (QLoRA, arXiv 2305.14314): ``value[code] * absmax`` of its block.

    It holds the tensors that it is given: no copies.

    Attributes:
        packed: uint8 [ceil(numel * bits / 8)], codes as `octavo.ops.nf4_quantize` packs them.
        absmax: fp32 [ceil(numel / blocksize)]; with double quantization uint8.
        nested_absmax: fp32 [ceil(blocks / 256)], or None without double quantization.
        offset: fp32 [1], or None: the mean of absmax.
        shape: of the tensor.
        dtype: that it had.
        quant_type: "nf4", "fp4", "nf2", "nf3" or "nf8".
        blocksize: elements that share an absmax.

    Example:
        >>> import octavo, torch
        >>> w = octavo.quantize_4bit(torch.eye(8, 64).bfloat16())
        >>> w.shape, w.dtype, w.quant_type, w.blocksize
        (torch.Size([8, 64]), torch.bfloat16, 'nf4', 64)
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    blocksize: int = 64

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """packed, absmax, nested_absmax, offset: in the order in which the operators take them."""
        return self.packed, self.absmax, self.nested_absmax, self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, rounded once to `dtype`; by default to the dtype that it had."""
        return ops.nf4_dequantize(*self.tensors(), self.shape, dtype or self.dtype, self.quant_type, self.blocksize)

    def map(self, function: Callable[[Tensor], Tensor]) -> NF4Weight:
        """The same weight with `function` applied to each tensor, for moves between devices."""
        tensors = dict(zip(TENSORS, self.tensors(), strict=True))
        moved: dict[str, Any] = {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

    def to(self, device: torch.device | str) -> NF4Weight:
        return self.map(lambda tensor: tensor.to(device))

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """The bits per weight as stored, with everything counted."""
        return 8 * self.bytes / max(1, self.shape.numel())

    @property
    def nominal_bits(self) -> float:
        """The bits per weight by the paper's formula: ``bits + 32 / blocksize``; with double quantization ``bits + 8 /
        blocksize + 32 / (256 * blocksize)``."""
        if self.nested_absmax is None:
            return BITS[self.quant_type] + 32 / self.blocksize
        return BITS[self.quant_type] + 8 / self.blocksize + 32 / (NESTED_BLOCKSIZE * self.blocksize)


def quantize_4bit(x: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantize a tensor to 4 bits, or 2, 3 or 8, block by block (QLoRA, arXiv 2305.14314, section 3).

    See `octavo.ops.nf4_quantize` for the codes, ties and special values. With double quantization the absmax of blocks
    are kept in 8 bits: ``offset = mean(absmax)`` (summed in float64), and ``absmax - offset`` goes to
    `octavo.quantize_blockwise` with the signed dynamic map and blocks of 256: 4.127 bits a weight instead of 4.5 with
    blocks of 64.

    Args:
        x: any shape, fp32, fp16 or bf16.
        quant_type: "nf4" or "fp4", as published; "nf2", "nf3" or "nf8", the normal float of other widths (as LQ-LoRA,
            2311.12023, defines them).
        blocksize: a power of two from 32 to 4096.
        double_quant: quantize the absmax, too.

    Returns:
        The `NF4Weight`, on x's device.

    Raises:
        ValueError: an unknown quant_type or blocksize.
        RuntimeError: another dtype.

    Example:
        >>> import octavo, torch
        >>> w = octavo.quantize_4bit(torch.eye(8, 64), double_quant=True)
        >>> w.packed.shape, w.absmax.dtype, w.shape
        (torch.Size([256]), torch.uint8, torch.Size([8, 64]))
    """
    check_options(quant_type, blocksize)
    if not isinstance(double_quant, bool):
        raise ValueError(f"double_quant must be True or False, got {double_quant!r}")
    packed, absmax = ops.nf4_quantize(x, quant_type, blocksize)
    if not double_quant:
        return NF4Weight(packed, absmax, None, None, x.shape, x.dtype, quant_type, blocksize)
    # float64, and so the same on every machine whatever the order of the sum
    offset = absmax.double().mean().float().view(1) if absmax.numel() else absmax.new_zeros(1)
    codes, nested_absmax = quantize_blockwise(absmax - offset, NESTED_BLOCKSIZE, True)
    return NF4Weight(packed, codes, nested_absmax, offset, x.shape, x.dtype, quant_type, blocksize)


def dequantize_4bit(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `quantize_4bit` made `w` of, but for the error: see `octavo.ops.nf4_dequantize`.

    Args:
        w: the weight.
        dtype: fp32, fp16 or bf16; by default the dtype that was quantized.

    Raises:
        RuntimeError: tensors of w whose lengths, dtypes or devices do not fit together.

    Example:
        >>> import octavo, torch
        >>> w = octavo.quantize_4bit(torch.eye(8, 64))
        >>> torch.equal(octavo.dequantize_4bit(w), torch.eye(8, 64))
        True
    """
    return w.dequantize(dtype)


def check_low_bit_state(
    state: dict[str, Tensor], count: int, quant_type: str, blocksize: int, packed: str = "packed"
) -> list[str]:
    """List the errors of the tensors of a weight of `count` elements, one line each: missing, dtype, length, values.

    Args:
        state: by the names of `TENSORS`; packed codes under the name `packed`.
    """
    blocks = -(-count // blocksize)
    nested = "nested_absmax" in state or "offset" in state
    wanted: dict[str, tuple[torch.dtype, int]] = {
        packed: (torch.uint8, packed_bytes(count, quant_type)),
        "absmax": (torch.uint8 if nested else torch.float32, blocks),
    }
    if nested:
        wanted |= {"nested_absmax": (torch.float32, -(-blocks // NESTED_BLOCKSIZE)), "offset": (torch.float32, 1)}
    errors = [f"{name} is missing" for name in wanted if name not in state]
    for name, (dtype, length) in wanted.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype is not dtype or tuple(tensor.shape) != (length,):
            name_of = str(dtype).removeprefix("torch.")
            errors.append(f"{name} must be {name_of} [{length}], got {kind} {list(tensor.shape)}")
        elif dtype is torch.float32 and not tensor.is_meta and (bad := length - int(tensor.isfinite().sum())):
            errors.append(f"{name} has {bad} non-finite values of {length}")
        elif name == "absmax" and dtype is torch.float32 and not tensor.is_meta and bool((tensor < 0).any()):
            errors.append(f"absmax has negative values, the least {tensor.min().item()}")
    return errors
