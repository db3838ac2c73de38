"""The command line: `octavo doctor`, `quantize`, `eval`, `analyze`, `bench`, `demo`, `generate`, `chat`, `finetune`."""

from __future__ import annotations

from . import finetune as _finetune  # noqa: F401  adds its command to the app
from . import generate as _generate  # noqa: F401
from .app import app, main

__all__ = ["app", "main"]
