"""The package is built as it was meant to be: the figures of tests/helpers/figures.py, and what they rest on."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from importlib import import_module

import figures
import octavo
import pytest


def listed(title, entries):
    return "\n  ".join((title, *map(str, entries)))


def test_only_a_family_asks_for_the_name_of_its_method():
    found = figures.comparisons()
    assert not found, listed("ask the registry, or a property of the method, in place of:", found)


@pytest.mark.parametrize(
    "code",
    [
        "method == 'nf4'",
        "'nf4' != method",
        "method in ('int8', 'none')",
        "NAMES = ('gptq', 'rtn')\nif method in NAMES: pass",
        "match method:\n    case 'fp4': pass",
        "{'spqr': 3}[method]",
        "BITS = {'spqr': 3, 'int8': 8}\nbits = BITS[method]",
        "BITS = {'spqr': 3, 'int8': 8}\nbits = BITS.get(method, 16)",
        "method.startswith('nf4')",
    ],
)
def test_comparisons_are_found(code):
    assert figures.comparisons_in(ast.parse(code), {"int8", "nf4", "fp4", "spqr", "gptq", "rtn"})


@pytest.mark.parametrize("code", ["FAMILIES = ['int8', 'nf4']", "quantize(model, 'nf4')", "dtype == 'int4'"])
def test_data_is_no_comparison(code):
    assert not figures.comparisons_in(ast.parse(code), {"int8", "nf4"})


def test_no_circles():
    found = [*figures.module_circles(), *figures.room_circles()]
    assert not found, listed("these import each other:", found)
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"d"}}
    assert figures.circles(graph) == [["a", "b", "c"]]


def test_imports_are_seen():
    """The graph has the imports that are known to be there, in each of their forms."""
    pairs = {(entry.source, entry.target): entry.lazy for entry in figures.imports()}
    assert pairs["octavo", "octavo.nn"] is False  # from . import nn
    assert pairs["octavo.nf4.method", "octavo.core.method"] is False  # from ..core.method import
    assert pairs["octavo.int8.method", "octavo.int8.ops"] is False  # from . import ops
    assert pairs["octavo.cli.app", "octavo.models"] is True  # in a function
    assert ("octavo", "octavo.integrations.transformers") not in pairs  # for type checkers


def test_few_imports_wait():
    found = figures.lazy_imports()
    why = "imports in functions, each of which must save the import of something heavy:"
    assert len(found) <= 15, listed(why, (f"{e.source}:{e.line} imports {e.target}" for e in found))


def test_importing_octavo_imports_nothing_heavy():
    heavy = ("transformers", "typer", "matplotlib", "accelerate", "rich", "peft", "gguf")
    program = f"import sys, octavo; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.name.replace(" ", "-"))
def test_figures(figure):
    if figure.before.endswith("of 43"):
        pytest.skip("the docstrings are counted, and run by doctest where they have examples")
    assert figure.least <= figure.now() <= figure.most


def test_a_new_method_is_named_in_few_lists():
    found = figures.standing_files()
    assert "python/octavo/__init__.py" in found and "pyproject.toml" in found
    assert len(found) <= 6, listed("files that name every method's room:", found)


def test_public_names_are_there():
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None


@pytest.mark.parametrize("name", sorted(octavo._MOVED))
def test_old_names_say_where_they_are(name):
    module, _, leaf = octavo._MOVED[name].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"octavo.{name} is {octavo._MOVED[name]} now") as caught:
        old = getattr(octavo, name)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert old is getattr(import_module(module), leaf)
    assert name not in octavo.__all__


def test_the_parameters_of_quantize_model():
    assert figures.quantize_parameters() == ["model", "method", "skip", "calibration", "progress"]


def python_files():
    folders = ("python", "bench", "tests", "examples", "_build")
    return [p for folder in folders for p in sorted((figures.ROOT / folder).rglob("*.py"))] + [
        figures.ROOT / "setup.py"
    ]


def test_no_file_is_long():
    lengths = {path.relative_to(figures.ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    found = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > 500]
    assert not found, listed("over 500 lines:", found)


def test_no_test_imports_another():
    """What tests share is in tests/helpers."""
    found = []
    for path in (figures.ROOT / "tests").rglob("*.py"):
        for node in ast.walk(figures.parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [name for name in names if name.rpartition(".")[2].startswith("test_") or "conftest" in name]
            found += [f"{path.name}:{node.lineno} imports {name}" for name in bad]
    assert not found, listed("tests that import tests:", found)


def test_modules_of_before_are_found_and_say_where_they_are():
    import importlib

    from octavo.core import moved

    for old, new in moved.MODULES.items():
        pytest.importorskip("transformers")
        sys.modules.pop(f"octavo.{old}", None)
        with pytest.warns(DeprecationWarning, match=f"octavo.{old} is octavo.{new} now"):
            module = importlib.import_module(f"octavo.{old}")
        names = [name for name in vars(importlib.import_module(f"octavo.{new}")) if not name.startswith("__")]
        assert all(hasattr(module, name) for name in names)
