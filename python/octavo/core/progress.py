"""The one progress display of long work: on a terminal a bar for each part of it, elsewhere a line as each begins.

A part that begins while another is shown joins its display, so that two never draw over one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_open: list[Progress] = []
_hidden = 0


class Bar:
    """One part of the work: call it as a thing is done."""

    def __init__(self, progress: Progress | None, what: str, total: int | None, unit: str = "") -> None:
        self.what, self._progress = what, progress
        if progress is None:
            return
        self._task = progress.add_task(what, total=total, unit=unit)
        if progress.disable and what:
            count = f" ({total})" if total and not unit else ""
            progress.console.print(f"octavo: {what}{count}", soft_wrap=True, markup=False)

    def __call__(self, about: str = "", count: int = 1) -> None:
        """`count` more are done; `about` says of what, or how it stands."""
        self.show(about)
        if self._progress is not None:
            self._progress.advance(self._task, count)

    def show(self, about: str = "", completed: int | None = None, total: int | None = None) -> None:
        """Say what runs, and set the counts that are given."""
        if self._progress is not None:
            text = f"{self.what} {about}".strip()
            self._progress.update(self._task, description=text, completed=completed, total=total)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bars."""
        if self._progress is not None:
            self._progress.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.remove_task(self._task)
            self._progress = None


@contextmanager
def hidden_progress(wanted: bool = True) -> Iterator[None]:
    """No progress is shown in this block, whoever asks for it: `--quiet`."""
    global _hidden
    _hidden += wanted
    try:
        yield
    finally:
        _hidden -= wanted


@contextmanager
def progress_bar(
    what: str, total: int | None, show: bool = True, console: Console | None = None, unit: str = ""
) -> Iterator[Bar]:
    """Gives the bar of a part of the work while the block runs.

    Args:
        what: the part, as a participle: "quantizing".
        total: how many things it has; None if that is not known.
        show: False: nothing is drawn.
        console: to draw on, standard error by default, unless a display is there already.
        unit: "B" where the things are bytes.
    """
    if not show or _hidden:
        yield Bar(None, what, total)
        return
    if _open:
        bar = Bar(_open[-1], what, total, unit)
        try:
            yield bar
        finally:
            bar.close()
        return
    with _display(console) as progress:
        yield Bar(progress, what, total, unit)


@contextmanager
def _display(console: Console | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Counts(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text("")
            if task.fields["unit"] == "B":
                return Text(f"{task.completed / 1e6:.0f}/{task.total / 1e6:.0f} MB")
            return Text(f"{task.completed:.0f}/{task.total:.0f}")

    console = Console(stderr=True, highlight=False) if console is None else console
    # A name that is too long is cut, so that a bar is a line of any terminal.
    name = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"), markup=False)
    columns = (name, BarColumn(12), Counts(), TimeRemainingColumn(compact=True))
    # The display draws in the background and takes time from what is measured, so it draws seldom.
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
        disable=not console.is_terminal,
    )
    _open.append(progress)
    try:
        with progress:
            yield progress
    finally:
        _open.remove(progress)
