"""GGUF files are parsed once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file for the configuration, the weights and the tokenizer each, which takes seconds;
    the last one that was parsed is kept."""
    try:
        import gguf
    except ImportError:  # `octavo.models` says so, when it is needed
        yield
        return
    parse = gguf.GGUFReader

    def read(path: Any, *arguments: Any, **options: Any) -> Any:
        if arguments or options:
            return parse(path, *arguments, **options)
        about = os.stat(path)
        return _parse(parse, os.path.realpath(path), (about.st_mtime_ns, about.st_size, about.st_ino))

    gguf.GGUFReader = read
    try:
        yield
    finally:
        gguf.GGUFReader = parse


@functools.lru_cache(maxsize=1)
def _parse(parse: Callable[[str], Any], path: str, version: tuple[int, ...]) -> Any:
    return parse(path)
