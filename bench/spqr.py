"""SpQR weights: the product at 2 to 4 bits beside 16 bits and others' low-bit products, on the same inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from octavo.ops import spqr_linear
from octavo.spqr import SpQRConfig, SpQRWeight, packing, quantize_weight
from rich.console import Console
from torch import Tensor

from . import ggml, int8, products
from .common import Record
from .int8 import Build, Method, Problem

OUTLIERS = 0.01


@functools.lru_cache(maxsize=1)
def weights(problem: Problem, bits: tuple[int, ...]) -> dict[int, SpQRWeight]:
    """The problem's weight, rounded to nearest in groups of 16 x 16 with 1 % outliers; columns in a random order, as
    act-order leaves them. For speed: a calibrated weight has the same form."""
    made = {}
    for count in bits:
        config = SpQRConfig(count, propagate=False, act_order=False, outlier_fraction=OUTLIERS)
        weight = SpQRWeight.pack(quantize_weight(problem.weight.cpu(), None, config)).to(problem.device)
        perm = torch.randperm(problem.k, generator=torch.Generator().manual_seed(0))
        made[count] = dataclasses.replace(weight, perm=packing.pack_perm(perm).to(problem.device))
    return made


BITS = (3, 4)


def octavo_spqr(bits: int) -> Build:
    def build(problem: Problem, _: Tensor) -> Callable[[], Tensor]:
        weight = weights(problem, BITS)[bits].map(Tensor.clone)  # an own copy, as all contenders have
        x = problem.inputs["plain"]
        inverse = packing.unpack_perm(weight.perm, problem.k).argsort()  # type: ignore[arg-type]
        return functools.partial(
            spqr_linear, x[:, inverse].contiguous(), *weight.arguments(), None, weight.n, weight.group_size
        )

    return build


def int4pack(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    """torch's own 4-bit product: groups of 32, a scale and a zero point in bf16 each."""
    n, k, group = problem.n, problem.k, 32
    parts = weight.view(n, k // group, group)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-9)
    codes = ((parts - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.stack((scale, low + 8 * scale), -1).transpose(0, 1).contiguous().to(problem.dtype)
    return functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, problem.inputs["plain"], packed, group, scales)


def llama_cpp(kind: str) -> Build:
    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        return ggml.Product(kind, weight, problem.inputs["plain"], torch.get_num_threads())

    return build


DEFAULT = "octavo SpQR 3 bits"
METHODS = (
    Method(DEFAULT, octavo_spqr(3), (3.625 + 32 * OUTLIERS) / 8, "torch bf16", kind=None, dtypes=int8.BF16),
    Method(
        "octavo SpQR 4 bits", octavo_spqr(4), (4.625 + 32 * OUTLIERS) / 8, "torch bf16", kind=None, dtypes=int8.BF16
    ),
    Method("octavo int8, t=0", int8.octavo_linear("plain", 0.0), 1, "torch bf16", dtypes=int8.BF16),
    Method("torch bf16", int8.torch_linear(torch.bfloat16), 2, kind=None, dtypes=int8.BF16),
    Method("torch int4pack g32", int4pack, 4.5 / 8 + 0.5, DEFAULT, kind=None, dtypes=int8.BF16, devices=("cpu",)),
    Method("llama.cpp Q3_K", llama_cpp("Q3_K"), 3.4375 / 8, DEFAULT, kind=None, dtypes=int8.BF16, devices=("cpu",)),
    Method("llama.cpp Q4_K", llama_cpp("Q4_K"), 4.5 / 8, DEFAULT, kind=None, dtypes=int8.BF16, devices=("cpu",)),
)


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON and PNG into `out` when it is given."""
    return products.run("spqr", METHODS, console, quick, out, threads, device)
