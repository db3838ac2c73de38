"""One test body, every machine: the `ops` fixture is the operators on a CPU ISA level, on the host SIMT machine (the
CUDA sources compiled as C++, in three thread orders) and on a GPU. What this machine lacks is skipped, and said."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import octavo
import pytest
import torch
from backends import BACKENDS, Ops, missing
from octavo import _C

ROOT = Path(__file__).parent.parent
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    lacking = [f"{backend} ({why})" for backend in BACKENDS if (why := missing(backend))]
    return [
        f"octavo {octavo.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"octavo backends skipped here: {', '.join(lacking) or 'none'}",
    ]


@pytest.fixture(scope="session")
def simt_library() -> ctypes.CDLL:
    """The operators over the CUDA sources compiled as C++: built once into build/simt, never part of a wheel."""
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"  # left by a build that was killed, it would make the next one wait for ever
    if lock.exists() and time.time() - lock.stat().st_mtime > 600:
        lock.unlink()
    csrc = ROOT / "csrc"
    families = [path.with_name(path.name.replace("_simt", "")) for path in csrc.glob("*/*_simt.cpp")]
    operators = [path for path in families if path.exists()]  # decompose_simt.cpp, for one, has no operator of its own
    sources = [csrc / "ops.cpp", *operators, *csrc.glob("*/*_simt.cpp"), *csrc.glob("simt/*.cpp")]
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-DOCTAVO_SIMT"]
    path = cpp_extension.load(
        "octavo_simt",
        sorted(map(str, sources)),
        extra_include_paths=[str(csrc)],
        build_directory=str(folder),
        extra_cflags=[*flags, "-DTORCH_TARGET_VERSION=0x020D000000000000"],
        is_python_module=False,
    )
    octavo.ops.register_fakes("octavo_simt")
    return ctypes.CDLL(path or str(folder / "octavo_simt.so"))


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
        assert library.octavo_simt_set_order(detail.encode())
        yield Ops(backend, "octavo_simt")
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
