"""What other libraries print while a command runs. Warnings and log lines are for who programs with them, and are left
out; what their bars count is shown on octavo's display."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..core.progress import progress_bar

_WORDS = {
    "Loading weights": "reading weights",
    "Loading checkpoint shards": "reading weights",
    "Converting and de-quantizing GGUF tensors...": "unpacking GGUF tensors",
    "Writing model shards": "writing",
}


@contextmanager
def muted() -> Iterator[None]:
    """No line of another library is printed in this block; with OCTAVO_TRACEBACK=1 all are."""
    if os.environ.get("OCTAVO_TRACEBACK"):
        yield
        return
    before = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"octavo(\.|$)")
        logging.disable(logging.WARNING)
        stack.callback(logging.disable, before)
        _take_over_tqdm(stack)
        yield


def _take_over_tqdm(stack: ExitStack) -> None:
    """Bars of tqdm, which transformers and the hub draw, count on octavo's display instead."""
    try:
        from tqdm.std import tqdm
    except ImportError:
        return
    begin, close = tqdm.__init__, tqdm.close

    @functools.wraps(begin)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        wanted = not options.get("disable")
        begin(self, *arguments, **{**options, "disable": True})
        name = str(options.get("desc") or (arguments[1:2] or [""])[0] or "")
        self.octavo = ExitStack()
        stack.callback(self.octavo.close)  # also of a bar that nobody closes
        if wanted:
            what = _WORDS.get(name, name.rstrip(":. "))
            total = None if self.total is None else int(self.total)
            # A length that is not known, or is 1, says nothing.
            shown = progress_bar(what, total, bool(what) and total != 1, unit=options.get("unit", ""))
            self.octavo_bar = self.octavo.enter_context(shown)

    def update(self: Any, n: float | None = 1) -> None:
        self.n += n or 0
        if bar := getattr(self, "octavo_bar", None):
            bar(count=int(n or 0))

    def __iter__(self: Any) -> Iterator[Any]:
        try:
            for thing in self.iterable:
                yield thing
                update(self, 1)
        finally:
            self.close()

    def finish(self: Any) -> None:
        if shown := getattr(self, "octavo", None):
            self.octavo_bar = None
            shown.close()
        close(self)

    methods: dict[str, Callable[..., Any]] = {"__init__": __init__, "update": update, "__iter__": __iter__}
    for name, method in {**methods, "close": finish}.items():
        stack.callback(setattr, tqdm, name, getattr(tqdm, name))
        setattr(tqdm, name, method)
