"""Lines for people."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print lines that are wrapped between words: a path or an option is never cut, however narrow the terminal.

    Example:
        >>> from octavo.core.console import say
        >>> from rich.console import Console
        >>> say(Console(width=20), "written to a/rather/long/path.json")
        written to
        a/rather/long/path.json
    """
    for line in text.splitlines():
        wrapped = textwrap.fill(line, max(console.width, 20), break_long_words=False, break_on_hyphens=False)
        console.print(wrapped, soft_wrap=True, markup=False, highlight=False, style=style)
