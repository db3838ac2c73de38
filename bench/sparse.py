"""Products with sparse matrices in compressed rows, beside PyTorch's (MKL) and scipy's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from octavo import ops, sparse
from rich.console import Console
from torch import Tensor

from . import cases, common, limits
from .common import Record, Row

Call = Callable[[], Any]


def matrix(n: int, k: int, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normal values at random places, fp32, with int32 columns, as the peers take them."""
    generator = torch.Generator().manual_seed(n + k)
    dense = torch.randn(n, k, generator=generator)
    values, columns, offsets = sparse.dense_to_csr(dense, mask=torch.rand(n, k, generator=generator) < density)
    return values, columns.to(torch.int32), offsets


def contenders(csr: tuple[Tensor, Tensor, Tensor], x: Tensor, n: int, skipped: dict[str, str]) -> dict[str, Call]:
    """Calls that give x @ S.T; the peers' give its transpose, [n, m], and are not asked to turn it."""
    values, columns, offsets = csr
    narrow = columns.to(torch.uint16)
    half = values.to(torch.float16)
    calls: dict[str, Call] = {
        "octavo": functools.partial(ops.csr_matmul, values, columns, offsets, x, n),
        "octavo, fp16 and uint16": functools.partial(ops.csr_matmul, half, narrow, offsets, x, n),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "CSR tensor support is in beta state"
        theirs = torch.sparse_csr_tensor(offsets, columns, values, (n, x.shape[-1]))
    calls["torch.sparse.mm"] = lambda: torch.sparse.mm(theirs, x.t())
    if x.is_cuda:
        return calls
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        skipped["scipy"] = str(error)
        return calls
    other = csr_matrix((values.numpy(), columns.numpy(), offsets.numpy()), shape=(n, x.shape[-1]))
    array = x.numpy()
    calls["scipy"] = lambda: other @ array.T
    return calls


def bench(
    shape: cases.Shape,
    density: float,
    effort: common.Effort,
    measured: limits.Limits,
    device: str,
    skipped: dict[str, str],
) -> list[Row]:
    """Rows of one case. Matrices come from the cache where one alone fits, as the few outliers of a layer may."""
    m, n, k = shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device)
    csr = tuple(t.to(device) for t in matrix(n, k, density))
    calls = contenders(csr, x, n, skipped)  # type: ignore[arg-type]
    exact = x.double() @ sparse.csr_to_dense(*csr, k).double().t()
    nnz = len(csr[0])
    timings = common.time_paired({name: [call] for name, call in calls.items()}, effort, common.clock_for(device))
    rows = []
    for name, timing in timings.items():
        result = calls[name]()
        result = result if isinstance(result, Tensor) else torch.from_numpy(result)
        result = result if name.startswith("octavo") else result.t()
        entry = 4 if name == "octavo, fp16 and uint16" else 8
        rows.append(
            Row(
                f"csr_matmul {density:.1%}",
                shape,
                "fp32",
                name,
                measured.threads,
                **common.timed(timing, timings, None if name == "octavo" else "octavo"),
                ops=2.0 * m * nnz,
                bytes=entry * nnz + 4.0 * (n + 1 + m * k + m * n),
                copies=1,
                from_memory=False,
                error=common.relative_error(result, exact),
            )
        )
    return rows


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON into `out` when it is given."""
    before = torch.get_num_threads()
    record = Record("sparse", common.describe_machine(device))
    effort = common.QUICK if quick else common.FULL
    layers = cases.QUICK_LAYERS if quick else cases.SPARSE_LAYERS
    try:
        for thread_count in list(threads) or [before]:
            torch.set_num_threads(thread_count)
            measured = limits.measure(thread_count, device)
            record.limits.append(measured.to_dict())
            limits.print_limits(console, measured)
            with torch.inference_mode():
                for shape in cases.gemm_shapes(cases.SPARSE_ROWS, layers):
                    for density in cases.SPARSE_DENSITIES:
                        rows = bench(shape, density, effort, measured, device, record.skipped)
                        record.rows += rows
                        common.print_rows(console, rows)
    finally:
        torch.set_num_threads(before)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)}")
    return record
