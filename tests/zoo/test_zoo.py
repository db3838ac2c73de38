"""The zoo: a sample of its checks, the same each time; all with ``OCTAVO_ZOO=1 python -m pytest tests/zoo``."""

from __future__ import annotations

import hashlib
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from checks import CHECKS, METHODS, check
from families import FAMILIES

SAMPLE = 16  # one case of so many


def cases():
    every = [(family, method, name) for family in FAMILIES for method in METHODS for name in CHECKS]
    if os.environ.get("OCTAVO_ZOO") == "1":
        return every
    return [case for case in every if hashlib.sha256(" ".join(case).encode()).digest()[0] % SAMPLE == 0]


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize(("family", "method", "name"), cases())
def test_zoo(family, method, name):
    if not FAMILIES[family].known():
        pytest.skip(f"this transformers has no {FAMILIES[family].kind}")
    assert check(FAMILIES[family], method, name)


def test_the_zoo_is_large():
    assert len(FAMILIES) >= 60
    assert {name for _, _, name in cases()} == set(CHECKS) and {method for _, method, _ in cases()} == set(METHODS)
