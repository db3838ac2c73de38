"""Random calls of every operator, half of them spoiled, on memory that ends at a page nobody may touch: no call ends
the process, what is refused is refused by a RuntimeError and by the fake as well, what is not changes its arguments
only where its schema says so, and returns what its fake says.

A case is `operator, number`; the same numbers are the same calls. ``OCTAVO_FUZZ_MINUTES=10 python -m pytest
tests/fuzz`` runs longer, with new numbers, and divides that time among the files.
"""

from __future__ import annotations

import ctypes
import signal
import threading

import pytest
import torch
from budget import MINUTES, numbers
from calls import OF_MEMORY, Guarded, outcome, run_case
from cases import CASES, Draw
from children import in_child
from octavo import _C


@pytest.mark.parametrize("name", CASES)
def test_random_calls(name: str):
    problem, number = in_child(lambda n: run_case(name, n), numbers(400, MINUTES * 60 * 0.5 / len(CASES)))
    assert not problem, f"case {number}: {problem}"


def test_every_operator_has_cases():
    assert {name for name in _operators()} == set(CASES)


def _operators() -> set[str]:
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.removeprefix("octavo::") for name in names if name.startswith("octavo::")}


def test_what_the_guard_catches():
    """A read beyond the end ends the process, and is reported with its case."""

    def run(number: int) -> None:
        memory = Guarded()
        t = memory.copy(torch.ones(5), True)
        ctypes.string_at(t.data_ptr(), 20 if number < 8 else 24)

    assert in_child(run, iter((7, 8, 9))) == ("ended by SIGSEGV", 8)


def test_levels_that_change_meanwhile():
    """An op asks the level for the size of a workspace and later for the loops that fill it: another thread may set
    another level in between."""

    def run(number: int) -> None:
        levels, done = _C.build_info()["isa"], threading.Event()

        def change() -> None:
            while not done.is_set():
                for level in levels:
                    _C.set_isa(level)

        thread = threading.Thread(target=change)
        thread.start()
        for at in range(300):
            name = ("nf4_linear", "nf4_linear_transposed", "spqr_linear", "csr_matmul", "csr_grad_values")[at % 5]
            outcome(getattr(torch.ops.octavo, name).default, CASES[name](Draw(at)))
        done.set()
        thread.join()

    assert in_child(run, iter((0,))) == ("", 0)


@pytest.mark.parametrize("name", sorted({"find_outlier_columns", *(n for n in CASES if n.startswith("quantize_"))}))
def test_rows_without_columns(name: str):
    """2**40 rows of nothing: an operator that looped over them would not come back; one that returns something for each
    row needs more memory than there is."""

    def run(number: int) -> None:
        signal.alarm(60)
        options = {"threshold": 6.0} if name == "find_outlier_columns" else {}
        error, _ = outcome(getattr(torch.ops.octavo, name).default, {"x": torch.empty(2**40, 0), **options})
        assert error is None or any(text in error for text in OF_MEMORY), error

    assert in_child(run, iter((0,))) == ("", 0)
