"""How long to fuzz: a fixed number of cases, always the same, or minutes with ever new ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

MINUTES = float(os.environ.get("OCTAVO_FUZZ_MINUTES", "0"))


def numbers(count: int, seconds: float) -> Iterator[int]:
    """The numbers of cases: 0 to count - 1, or in a long run as many as come in `seconds`, from another start each
    time."""
    if not MINUTES:
        yield from range(count)
        return
    begin, number = time.monotonic(), time.time_ns() // 1_000_000
    while time.monotonic() - begin < seconds:
        yield number
        number += 1
