"""The machines that one test body runs on, and what this machine lacks."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from octavo import _C
from octavo.core.checks import cuda_built
from torch import Tensor

ISAS = ("portable", "avx2", "avx512", "amx")
ORDERS = ("forward", "reverse", "random:1")
# Every case runs in one thread order of the SIMT machine, another one for another case. ctest, and this variable, run
# them in all three.
ALL_ORDERS = os.environ.get("OCTAVO_ALL_ORDERS") == "1"
SIMT = tuple(f"simt-{order}" for order in ORDERS) if ALL_ORDERS else ("simt",)
BACKENDS = (*(f"cpu-{isa}" for isa in ISAS), *SIMT, "cuda")


def missing(backend: str) -> str | None:
    """Why this machine cannot run a backend; None when it can."""
    kind, _, detail = backend.partition("-")
    if kind == "cuda":
        if not cuda_built():
            return "octavo was built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device"
    return f"this machine or build has no {detail}" if kind == "cpu" and detail not in _C.build_info()["isa"] else None


def order_of(case: str) -> str:
    """The thread order of a case, by its name: the same one in every run."""
    return ORDERS[zlib.crc32(case.encode()) % len(ORDERS)]


@dataclass
class Ops:
    """The operators of one backend: ``ops.int8_mm(a, b)`` takes and returns CPU tensors."""

    backend: str
    namespace: str

    def __getattr__(self, name: str) -> Callable[..., object]:
        packet = getattr(getattr(torch.ops, self.namespace), name)
        device = "cuda" if self.backend == "cuda" else "cpu"

        def call(*args: object, **kwargs: object) -> object:
            def move(value: object, to: str) -> object:
                return value.to(to) if isinstance(value, Tensor) else value

            out = packet(*(move(a, device) for a in args), **{k: move(v, device) for k, v in kwargs.items()})
            return tuple(move(o, "cpu") for o in out) if isinstance(out, (tuple, list)) else move(out, "cpu")

        return call
