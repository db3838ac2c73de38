"""Double quantization of NF4 and its siblings, and the weight that carries it."""

from __future__ import annotations

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_bits
from octavo import reference
from octavo.nf4.ops import BITS
from torch import Tensor

TYPES = tuple(BITS)


# ---- double quantization ---------------------------------------------------------------------------------------------


def double_quantized(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the definition, in the order that the operators take."""
    packed, absmax = reference.nf4_quantize(x, quant_type, blocksize)
    offset = absmax.double().mean().float().view(1)
    codes, nested = reference.quantize_blockwise(absmax - offset, 256, True)
    return packed, codes, nested, offset


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize(("shape", "blocksize"), [((3, 100), 32), ((1, 1), 64), ((70, 257), 64), ((40, 512), 32)])
def test_double_quantization(
    ops: Ops, shape: tuple[int, int], blocksize: int, quant_type: str, generator: torch.Generator
):
    x = torch.randn(shape, generator=generator) * torch.linspace(0.5, 2, shape[0])[:, None]
    expected = double_quantized(x, quant_type, blocksize)
    for dtype in FLOATS:
        arguments = (*expected, shape, dtype, quant_type, blocksize)
        assert_bits(ops.nf4_dequantize(*arguments), reference.nf4_dequantize(*arguments))
    if ops.backend.startswith("cpu"):
        weight = octavo.quantize_4bit(x, quant_type, blocksize, double_quant=True)
        for a, e in zip(weight.tensors(), expected, strict=True):
            assert a is not None
            assert_bits(a, e)
        back = reference.nf4_dequantize(*expected, shape, x.dtype, quant_type, blocksize)
        assert_bits(octavo.dequantize_4bit(weight), back)


def test_double_quantization_reads_every_code(ops: Ops, generator: torch.Generator):
    count = 600 * 32 - 5
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=generator)
    codes = torch.arange(600).to(torch.uint8)
    for dtype in FLOATS:
        arguments = (packed, codes, torch.tensor([0.5, 3.0, 1e-3]), torch.tensor([0.75]), (count,), dtype, "nf4", 32)
        assert_bits(ops.nf4_dequantize(*arguments), reference.nf4_dequantize(*arguments))


def test_double_quantization_costs_what_the_paper_says(generator: torch.Generator):
    x = torch.randn(512, 1024, generator=generator)
    plain, nested = (octavo.quantize_4bit(x, double_quant=double) for double in (False, True))
    assert plain.bits_per_weight == 4.5
    assert nested.bits_per_weight == pytest.approx(4.127, abs=2e-4)
    errors = [float((weight.dequantize() - x).norm() / x.norm()) for weight in (plain, nested)]
    assert 0.08 < errors[0] < 0.1
    assert errors[1] < errors[0] * 1.01


def test_double_quantization_of_equal_blocks_and_of_none():
    weight = octavo.quantize_4bit(torch.full((1000,), -0.3), double_quant=True)
    assert_bits(weight.dequantize(), torch.full((1000,), -0.3))
    assert weight.nested_absmax is not None and weight.offset is not None
    assert weight.nested_absmax.tolist() == [0.0] and set(weight.absmax.tolist()) == {127}
    empty = octavo.quantize_4bit(torch.empty(0, 5).half(), double_quant=True)
    assert [len(t) for t in empty.tensors() if t is not None] == [0, 0, 0, 1]
    assert empty.dequantize().shape == (0, 5) and empty.dequantize().dtype is torch.float16


# ---- the weight ------------------------------------------------------------------------------------------------------


def test_a_weight_remembers_what_it_was_made_of(generator: torch.Generator):
    x = torch.randn(3, 5, 7, generator=generator).bfloat16()
    weight = octavo.quantize_4bit(x, "nf3", 32)
    assert (weight.shape, weight.dtype, weight.quant_type, weight.blocksize) == ((3, 5, 7), torch.bfloat16, "nf3", 32)
    assert octavo.dequantize_4bit(weight).dtype is torch.bfloat16
    assert octavo.dequantize_4bit(weight, torch.float32).dtype is torch.float32
    assert weight.bytes == sum(t.numel() * t.element_size() for t in weight.tensors() if t is not None) == 40 + 16
    moved = weight.to("meta")
    assert all(t is None or t.is_meta for t in moved.tensors())
    assert moved.dequantize().shape == (3, 5, 7)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_the_bytes_are_those_of_bitsandbytes(quant_type: str, blocksize: int, generator: torch.Generator):
    functional = pytest.importorskip("bitsandbytes").functional
    for dtype in FLOATS:
        x = torch.randn(129, 65, generator=generator).to(dtype)
        packed, state = functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        weight = octavo.quantize_4bit(x, quant_type, blocksize)
        assert_bits(weight.absmax, state.absmax)
        if quant_type == "nf4":  # its fp4 on the CPU has other thresholds than its CUDA kernels, which are ours
            assert_bits(weight.packed, packed.flatten())
