"""NF4 weights: quantizing, dequantizing and the products, beside 16 bits and others' 4-bit products."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from octavo import ops, quantize_4bit
from rich.console import Console
from torch import Tensor

from . import blockwise, cases, int8, products
from .common import Record
from .int8 import Build, Method, Problem, Setting
from .spqr import int4pack, llama_cpp

BLOCKSIZE = 64


def octavo_nf4(double_quant: bool) -> Build:
    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        w = quantize_4bit(weight, "nf4", BLOCKSIZE, double_quant)
        return functools.partial(
            ops.nf4_linear, problem.inputs["plain"], *w.tensors(), None, problem.n, "nf4", BLOCKSIZE
        )

    return build


def _grad(problem: Problem) -> Tensor:
    """Some gradient [m, n] of the layer's output."""
    make = torch.Generator().manual_seed(problem.m + problem.n)
    return torch.randn(problem.m, problem.n, generator=make).to(problem.device, problem.dtype)


def octavo_transposed(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    w = quantize_4bit(weight, "nf4", BLOCKSIZE, True)
    arguments = (*w.tensors(), problem.k, "nf4", BLOCKSIZE)
    return functools.partial(ops.nf4_linear_transposed, _grad(problem), *arguments)


def torch_transposed(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    return functools.partial(torch.matmul, _grad(problem), weight.to(problem.dtype))


def bitsandbytes_linear4bit(training: bool) -> Build:
    """As it is used: in training it dequantizes the weight at every call; in eval on CPUs with AVX512-BF16 it packs it
    anew at the first call, and has a kernel for that."""

    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        import bitsandbytes

        n, k = weight.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = bitsandbytes.nn.Linear4bit(
                k, n, bias=False, compute_dtype=problem.dtype, compress_statistics=True, quant_type="nf4", device="meta"
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                weight.to(problem.dtype), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            made = layer.to(weight.device).train(training)
        return functools.partial(made, problem.inputs["plain"])

    return build


DEFAULT = "octavo NF4"
_DOUBLE = (4 + 8 / BLOCKSIZE + 32 / (256 * BLOCKSIZE)) / 8  # bytes of a weight
_CPU: dict[str, Any] = {"kind": None, "dtypes": int8.BF16, "devices": ("cpu",)}
METHODS = (
    Method(DEFAULT, octavo_nf4(False), (4 + 32 / BLOCKSIZE) / 8, "torch bf16", kind=None, dtypes=int8.BF16),
    Method("octavo NF4, double quant.", octavo_nf4(True), _DOUBLE, "torch bf16", kind=None, dtypes=int8.BF16),
    Method("torch bf16", int8.torch_linear(torch.bfloat16), 2, kind=None, dtypes=int8.BF16),
    Method("bitsandbytes NF4, eval", bitsandbytes_linear4bit(False), _DOUBLE, DEFAULT, kind=None, dtypes=int8.BF16),
    Method("bitsandbytes NF4, train", bitsandbytes_linear4bit(True), _DOUBLE, DEFAULT, kind=None, dtypes=int8.BF16),
    Method("torch int4pack g32", int4pack, 4.5 / 8 + 0.5, DEFAULT, **_CPU),
    Method("llama.cpp Q4_0", llama_cpp("Q4_0"), 4.5 / 8, DEFAULT, **_CPU),
    Method("octavo NF4, dX", octavo_transposed, _DOUBLE, "torch bf16, dX", kind=None, dtypes=int8.BF16, compare=False),
    Method("torch bf16, dX", torch_transposed, 2, kind=None, dtypes=int8.BF16, compare=False),
)


def contenders(x: Tensor, skipped: dict[str, str]) -> tuple[dict[str, blockwise.Call], dict[str, blockwise.Call]]:
    """Quantizing x to NF4, and dequantizing what came out."""
    packed, absmax = ops.nf4_quantize(x, "nf4", BLOCKSIZE)
    back = (packed, absmax, None, None, x.shape, x.dtype, "nf4", BLOCKSIZE)
    quantize: dict[str, blockwise.Call] = {"octavo": functools.partial(ops.nf4_quantize, x, "nf4", BLOCKSIZE)}
    dequantize: dict[str, blockwise.Call] = {"octavo": functools.partial(ops.nf4_dequantize, *back)}
    try:
        import bitsandbytes.functional as peer

        theirs, state = peer.quantize_4bit(x, blocksize=BLOCKSIZE, quant_type="nf4")
        quantize["bitsandbytes"] = functools.partial(peer.quantize_4bit, x, blocksize=BLOCKSIZE, quant_type="nf4")
        dequantize["bitsandbytes"] = functools.partial(peer.dequantize_4bit, theirs, state)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        skipped["bitsandbytes"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return quantize, dequantize


def bench_conversion(console: Console, record: Record, setting: Setting, quick: bool) -> None:
    both = blockwise.Directions(("quantize_4bit", "dequantize_4bit"), contenders, 0.5 + 4 / BLOCKSIZE)
    sizes = cases.BLOCKWISE_QUICK_SIZES if quick else cases.BLOCKWISE_BENCH_SIZES
    blockwise.bench_all(console, record, setting, both, sizes, (torch.float32, torch.bfloat16))


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON and PNG into `out` when it is given."""
    return products.run("nf4", METHODS, console, quick, out, threads, device, bench_conversion)
