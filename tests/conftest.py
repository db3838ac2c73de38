"""One test body, every machine: the `ops` fixture is the operators on a CPU ISA level, on the host SIMT machine (the
CUDA sources compiled as C++) and on a GPU. What this machine lacks is skipped, and said."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import octavo
import pytest
import simt_library as library_of_simt
import torch
from backends import ALL_ORDERS, BACKENDS, Ops, missing, order_of
from octavo import _C

# With pytest-xdist every core has a worker.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    lacking = [f"{backend} ({why})" for backend in BACKENDS if (why := missing(backend))]
    orders = "all thread orders of simt" if ALL_ORDERS else "one thread order of simt a case (OCTAVO_ALL_ORDERS=1: all)"
    return [
        f"octavo {octavo.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {orders}",
        f"octavo backends skipped here: {', '.join(lacking) or 'none'}",
    ]


@pytest.fixture(scope="session")
def simt_library() -> ctypes.CDLL:
    return library_of_simt.load()


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    backend: str = request.param
    if why := missing(backend):
        pytest.skip(why)
    kind, _, detail = backend.partition("-")
    if kind == "cuda":
        yield Ops(backend, "octavo")
    elif kind == "simt":
        library = request.getfixturevalue("simt_library")
        order = detail or order_of(request.node.nodeid)
        assert library.octavo_simt_set_order(order.encode())
        yield Ops(f"simt-{order}", "octavo_simt")
        assert library.octavo_simt_set_order(b"forward")
    else:
        before = _C.isa()
        _C.set_isa(detail)
        yield Ops(backend, "octavo")
        _C.set_isa(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where an optimizer's parameters are."""
    if request.param == "cuda" and (why := missing("cuda")):
        pytest.skip(why)
    return str(request.param)
