"""Bars of tqdm count on octavo's display while a command runs, and are their own again afterwards."""

from __future__ import annotations

import logging
import warnings

import pytest

pytest.importorskip("tqdm")

from octavo.cli.foreign import muted
from octavo.core import progress
from tqdm import tqdm


def test_bars(capsys):
    with muted():
        assert [*tqdm(range(3), "Loading weights")] == [0, 1, 2]
        bar = tqdm(total=5, desc="mine")
        bar.update(2)
        assert bar.n == 2
        left_open = tqdm(total=7, desc="never closed")
        warnings.warn("foreign", stacklevel=1)
        logging.getLogger("foreign").warning("a line")
    assert not progress._open and logging.root.manager.disable == 0
    left_open.close()
    bar.close()
    said = capsys.readouterr().err
    assert said == "octavo: reading weights (3)\noctavo: mine (5)\noctavo: never closed (7)\n"
    assert [*tqdm(range(2), desc="again")] == [0, 1]
    assert "again: 100%" in capsys.readouterr().err
