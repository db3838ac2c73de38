"""The console, the errors and the arguments that all commands share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Expected errors become one line on stderr and exit code 1; set OCTAVO_TRACEBACK=1 to see where they are from."""
    try:
        yield
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        console(stderr=True).print(f"[bold red]octavo: error:[/bold red] {escape(message)}", soft_wrap=True)
        raise typer.Exit(1) from None


def use_threads(count: int | None) -> int | None:
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


def known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DTYPES)}")
    return name


Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", callback=use_threads, show_default="PyTorch's choice", help="CPU threads."),
]
SOURCE_HELP = "A transformers directory, a GGUF file, OWNER/NAME on the hub, or smollm2."
MODEL_HELP = "A transformers directory, one that octavo wrote, or a GGUF file."
