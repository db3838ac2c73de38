"""The command line: `octavo doctor`, `quantize`, `eval`, `analyze`, `bench`, `demo`."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
