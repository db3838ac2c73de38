"""The console, the errors and the arguments that all commands share."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.console import say as say
from ..core.progress import hidden_progress
from .foreign import muted

DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What a function says of its arguments, as the command line has them.
_SPELLINGS = {"pass overwrite=True to": "give --overwrite to", "resume it,": "give --resume to go on,"}


def console(stderr: bool = False, quiet: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, quiet=quiet)


def show_command(console: Console, words: Sequence[str]) -> None:
    """Print a command to copy: an option and its value to a line where one line does not hold all."""
    quoted = [shlex.quote(word) for word in words]
    line = "  " + " ".join(quoted)
    if len(line) > console.width:
        parts: list[str] = []
        for word in quoted:
            joins = parts and not word.startswith("--") and len(parts[-1]) + len(word) < console.width - 8
            parts = [*parts[:-1], f"{parts[-1]} {word}"] if joins else [*parts, word]
        line = "  " + " \\\n      ".join(parts)
    console.print(line, soft_wrap=True, markup=False)


def print_json(value: Any, indent: int | None = 1) -> None:
    """JSON on standard output; what is no number in it, NaN and infinity, is null."""
    print(json.dumps(_numbers(value), indent=indent, allow_nan=False))


def _numbers(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _numbers(entry) for key, entry in value.items()}
    return [_numbers(entry) for entry in value] if isinstance(value, list | tuple) else value


@contextmanager
def one_line_errors(quiet: bool = False) -> Iterator[None]:
    """Expected errors become one sentence on stderr and exit code 1, and other libraries print nothing; set
    OCTAVO_TRACEBACK=1 to see where errors are from, and what they print.

    Args:
        quiet: show no progress.
    """
    try:
        with muted(), hidden_progress(quiet):
            yield
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        say(console(stderr=True), f"octavo: error: {_sentence(error)}", style="red")
        raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        missing = isinstance(error, FileNotFoundError)
        text = f"{error.filename} does not exist" if missing else f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno is not None:
        text = error.strerror or text
    for spoken, typed in _SPELLINGS.items():
        text = text.replace(spoken, typed)
    return " ".join(text.split()) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


def use_threads(count: int | None) -> int | None:
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


def known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DTYPES)}")
    return name


def torch_dtype(name: str) -> Any:
    """The dtype of torch that an option names; None for auto."""
    import torch

    return None if DTYPES[name] is None else getattr(torch, str(DTYPES[name]))


Dtype = Annotated[
    str, typer.Option(callback=known_dtype, help="auto (as stored), fp32, bf16 or fp16: of what is not quantized.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", callback=use_threads, show_default="PyTorch's choice", help="CPU threads."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no hints.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
SOURCE_HELP = "A transformers directory, one that octavo wrote, a GGUF file, OWNER/NAME on the hub, or smollm2."
