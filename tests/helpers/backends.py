"""The machines that every operator's tests run on, and the operators of one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import octavo
import torch
from octavo import _C
from torch import Tensor

ISAS = ("portable", "avx2", "avx512", "amx")
ORDERS = ("forward", "reverse", "random:1")
BACKENDS = (*(f"cpu-{isa}" for isa in ISAS), *(f"simt-{order}" for order in ORDERS), "cuda")


def missing(backend: str) -> str | None:
    """Why this machine cannot run a backend; None when it can."""
    kind, _, detail = backend.partition("-")
    if kind == "cuda":
        if not octavo.core.checks.cuda_built():
            return "octavo was built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device"
    return f"this machine or build has no {detail}" if kind == "cpu" and detail not in _C.build_info()["isa"] else None


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
