"""The documentation's examples run: those of docstrings, of the README and docs/, and the command lines of both."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import octavo
import pytest
import torch
import typer
from octavo.bench import tables
from octavo.core.method import methods

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted({info.name for info in pkgutil.walk_packages(octavo.__path__, "octavo.")} - {"octavo._C"})
OPTIONAL = ("transformers", "accelerate", "gguf", "peft", "diffusers", "matplotlib")
# What users import from: all that these modules export, or, without `__all__`, define.
PUBLIC = (
    *("octavo", "octavo.nn", "octavo.optim", "octavo.ops", "octavo.core.method", "octavo.int8", "octavo.nf4"),
    *("octavo.spqr", "octavo.blockwise", "octavo.sparse", "octavo.switchback", "octavo.lora", "octavo.models"),
    *("octavo.finetune", "octavo.analyze", "octavo.integrations.bitsandbytes", "octavo.integrations.peft"),
    *("octavo.integrations.spqr", "octavo.integrations.transformers"),
)


def module_of(name: str) -> ModuleType:
    """The module; the test is skipped where the module needs an optional package that is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OPTIONAL:
            pytest.skip(f"{name} needs {error.name}")
        raise


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Examples run on one thread, and the methods that they register are gone afterwards."""
    threads, known = torch.get_num_threads(), dict(methods())
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in methods().keys() - known.keys():
        del methods()[name]


# ---- docstrings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name, tmp_path, monkeypatch):
    module = module_of(name)
    examples = [test for test in doctest.DocTestFinder().find(module, name, globs={}) if test.examples]
    source = "\n".join(example.source for test in examples for example in test.examples)
    for package in OPTIONAL:
        if re.search(rf"\b{package}\b", source):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    for test in examples:
        torch.manual_seed(0)
        runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    module = module_of(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        everything = name == "octavo.ops"  # which only gathers what the families define
        exported = [n for n, v in vars(module).items() if everything or getattr(v, "__module__", None) == name]
    if name == "octavo" and "transformers" not in {n for n in OPTIONAL if _installed(n)}:
        exported = [n for n in exported if n != "OctavoConfig"]
    values = {n: getattr(module, n) for n in exported if not n.startswith("_")}
    documented = {n: v for n, v in values.items() if inspect.isfunction(v) or inspect.isclass(v)}
    lacking = [n for n, v in documented.items() if not doctest.DocTestParser().get_examples(v.__doc__ or "")]
    assert documented
    assert lacking == []


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- pages ---------------------------------------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The code blocks of a language, each with the number of its first line; indented ones without their indent."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, re.S | re.M)
    return [(text[: m.start()].count("\n") + 2, textwrap.dedent(m[2])) for m in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=lambda p: p.name)
def test_python_of_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # what other tests compiled counts against a limit
    names: dict[str, Any] = {"__name__": page.stem}
    for line, code in blocks(page.read_text(), "python"):
        if code.startswith("# doctest: needs"):
            continue
        for package in OPTIONAL:
            if re.search(rf"^ *(import|from) {package}\b|integrations\.{package}\b", code, re.M):
                pytest.importorskip(package)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), names)


def test_measured_pages_are_what_their_files_give():
    for path, text in tables.pages(ROOT / "docs" / "measured").items():
        assert path.read_text() == text, path


def test_headline_figures_of_the_readme_are_measured():
    measured = json.loads((ROOT / "docs" / "measured" / "models" / "01-demo.json").read_text())
    wanted = [measured["columns"].index(n) for n in ("model MB", "perplexity", "prefill tok/s", "decode tok/s")]
    text = (ROOT / "README.md").read_text()
    table = text.split("| method | model MB | perplexity | prefill tok/s | decode tok/s |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert len(rows) == 4
    for title, *figures in rows:
        found = [row for row in measured["rows"] if row[0] == title or row[0].startswith(f"{title} (")]
        assert [[row[i] for i in wanted] for row in found] == [figures], title


# ---- command lines -------------------------------------------------------------------------------------------------


def group() -> Any:
    from octavo.cli import app

    return typer.main.get_command(app)


def command_lines(text: str) -> list[str]:
    """The `octavo ...` lines of the sh and bash blocks of a page or a help text."""
    joined = (code.replace("\\\n", " ") for _, code in blocks(text, "(?:sh|bash)"))
    lines = (line.split(" #")[0].strip() for code in joined for line in code.splitlines())
    return [line for line in lines if line.startswith("octavo ")]


def check_line(line: str) -> None:
    """Parse a command line as the command would, without running it."""
    words = shlex.split(re.split(r"[|>&;]", line)[0])[1:]
    root = group()
    if words[0].startswith("-"):
        return
    with root.make_context("octavo", [words[0]], resilient_parsing=True) as context:
        command = root.get_command(context, words[0])
        assert command is not None, f"{line}: no command {words[0]}"
        command.make_context(words[0], words[1:], parent=context)


def test_every_command_has_examples_that_parse():
    commands = group().commands
    for name, command in commands.items():
        lines = command_lines(inspect.cleandoc(command.callback.__doc__))
        assert any(line.split()[1] == name for line in lines), name
        for line in lines:
            check_line(line)
    assert commands


@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p.read_text())], ids=lambda p: p.name)
def test_command_lines_of_page_parse(page):
    for line in command_lines(page.read_text()):
        check_line(line)
