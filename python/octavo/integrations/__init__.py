"""Bridges to other libraries. None of them is imported by `import octavo`, each by its first use."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("accelerate", "bitsandbytes", "diffusers", "peft", "spqr", "transformers")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
