"""In a build without CUDA kernels an operator answers a CUDA tensor with an error that says how to build them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .. import _C

CUDA_BUILT = bool(_C.build_info()["cuda"])
# pip would otherwise take its cached wheel, the one without CUDA kernels.
REBUILD = "rebuild with: OCTAVO_CUDA=1 pip install --force-reinstall --no-cache-dir --no-deps ."
# The registrations last as long as this object.
_library = torch.library.Library("octavo", "IMPL")  # type: ignore[no-untyped-call]


def refuse_cuda(name: str) -> None:
    """Register a kernel for CUDA tensors under op `name` that only raises a RuntimeError with the command."""

    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"octavo::{name}: this octavo was built without CUDA kernels (no GPU was visible and torch was a CPU "
            f"build, there was no usable nvcc, or OCTAVO_CUDA=0); {REBUILD}"
        )

    _library.impl(name, refuse, "CUDA")  # type: ignore[no-untyped-call]
