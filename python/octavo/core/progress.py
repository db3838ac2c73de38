"""One progress bar for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with a word about each of `total` things when it is done; it shows nothing unless
    `show`."""
    if not show:
        yield lambda about: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    layer = TextColumn("{task.fields[layer]}")
    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), layer) as bar:
        task = bar.add_task(what, total=total, layer="")
        yield lambda about: bar.update(task, advance=1, layer=about)
