"""How the package is built, in figures, each with what it was and must be: ``python tests/helpers/figures.py``.

``tests/python/core/test_structure.py`` holds the package to them.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "octavo"
# A family's room is where its method's name may be asked for.
FAMILIES = ("int8", "nf4", "spqr", "blockwise", "sparse", "optim", "switchback", "lora")

# Modules that are no Python files of the package's folder.
BESIDE = ("octavo._C", "octavo.bench")
# Names of methods that mean something else where they are asked for.
OTHERS = {
    "integrations/__init__.py": "a module of the room is called spqr",
    "integrations/spqr.py": "the quant_method of files that the authors' own program wrote",
}


class Import(NamedTuple):
    """One import of a module of the package by another."""

    source: str
    target: str
    line: int
    lazy: bool


# ---- imports ---------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """The Python modules of the package by their full names; a package stands for its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("octavo", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports under a node, without those for type checkers; whether a function has to run for them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(ast.Module([other], []), lazy)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _statements(child, lazy or is_function)


def imports() -> list[Import]:
    """All imports of the package's own modules, ``from . import x`` as one of the submodule x where there is one."""
    known = modules()
    found = []
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, lazy in _statements(parse(path)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *([node.module] if node.module else [])])
                names = (f"{base}.{alias.name}" for alias in node.names)
                targets = [name if name in known or name in BESIDE else base for name in names]
            for target in dict.fromkeys(targets):
                if target in known and target != name:
                    found.append(Import(name, target, node.lineno, lazy))
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def module_circles() -> list[list[str]]:
    graph: dict[str, set[str]] = {}
    for entry in imports():
        graph.setdefault(entry.source, set()).add(entry.target)
    return circles(graph)


def room_of(module: str) -> str:
    """The package directly in octavo that a module is in; modules that are in none are rooms of their own."""
    return ".".join(module.split(".")[:2])


def room_circles() -> list[list[str]]:
    graph: dict[str, set[str]] = {}
    for entry in imports():
        if (source := room_of(entry.source)) != (target := room_of(entry.target)):
            graph.setdefault(source, set()).add(target)
    return circles(graph)


def lazy_imports() -> list[Import]:
    return [entry for entry in imports() if entry.lazy]


# ---- names of methods ------------------------------------------------------------------------------------------------


def comparisons_in(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    """Where code asks for one of the names: by a comparison, `in`, match, or a dictionary of them that is indexed."""

    def has(node: ast.AST | None) -> bool:
        parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
        return any(isinstance(part, ast.Constant) and part.value in names for part in parts)

    def keyed(node: ast.AST) -> bool:
        return isinstance(node, ast.Dict) and any(has(key) for key in node.keys)

    constants = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        and (has(node.value) or keyed(node.value))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        hit = False
        if isinstance(node, ast.Compare):
            among = [node.left, *node.comparators]
            hit = any(has(part) or keyed(part) for part in among)
            hit |= any(
                isinstance(op, (ast.In, ast.NotIn)) and isinstance(part, ast.Name) and part.id in constants
                for op, part in zip(node.ops, node.comparators, strict=True)
            )
        elif isinstance(node, ast.MatchValue):
            hit = has(node.value)
        elif isinstance(node, ast.Subscript):
            looked_up = isinstance(node.value, ast.Name) and node.value.id in constants
            hit = keyed(node.value) or (looked_up and not isinstance(node.slice, (ast.Constant, ast.Slice)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                hit = any(has(argument) for argument in node.args)
            elif node.func.attr == "get":
                value = node.func.value
                hit = keyed(value) or (isinstance(value, ast.Name) and value.id in constants)
        if hit:
            found.append((node.lineno, ast.unparse(node)))
    return found


def comparisons() -> list[str]:
    """Comparisons with the names of methods outside of the families' rooms, in the package."""
    names = set(import_module("octavo.core.method").method_names())
    found = []
    for name, path in modules().items():
        where = path.relative_to(PACKAGE).as_posix()
        if room_of(name).rpartition(".")[2] not in FAMILIES and where not in OTHERS:
            found += [f"{where}:{line}: {text}" for line, text in comparisons_in(parse(path), names)]
    return found


# ---- what else is counted --------------------------------------------------------------------------------------------


def flat_modules() -> list[str]:
    """`python -m octavo` reads __main__.py: it is no module to import."""
    return sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__main__.py")


def public_names() -> list[str]:
    return list(import_module("octavo").__all__)


def quantize_parameters() -> list[str]:
    parameters = inspect.signature(import_module("octavo").quantize_model).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]


def readme() -> list[str]:
    return (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def first_command() -> int:
    """The line of the first fence in the README."""
    return next(number for number, line in enumerate(readme(), 1) if line.startswith("```"))


def test_entries() -> list[str]:
    entries = (path.name for path in (ROOT / "tests").iterdir())
    return sorted(name for name in entries if not name.startswith(".") and name != "__pycache__")


def naming(room: str) -> set[str]:
    """Files outside of a family's room that import or list it."""
    asks = re.compile(
        rf'^ *(?:from|import) [.\w]*\b{room}\b|^from \. import .*\b{room}\b|"octavo\.{room}"|\b{room}/', re.M
    )
    standing = [*PACKAGE.rglob("*.py"), *(ROOT / name for name in ("pyproject.toml", "CMakeLists.txt", "setup.py"))]
    standing += [path for kind in ("*.cpp", "*.h", "*.cu") for path in (ROOT / "csrc").rglob(kind)]
    files = {path.relative_to(ROOT): path for path in standing}
    return {
        where.as_posix()
        for where, path in files.items()
        if room not in where.parts and asks.search(path.read_text(encoding="utf-8"))
    }


def standing_files() -> list[str]:
    """Files that a new method must be named in: those that import or list the room of every method that there is."""
    return sorted(set.intersection(*(naming(room) for room in ("int8", "nf4", "spqr"))))


def examples() -> tuple[list[str], int]:
    """Public functions and classes whose docstring has no example, and how many there are."""
    octavo = import_module("octavo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objects = {name: getattr(octavo, name) for name in octavo.__all__ if name not in ("nn", "ops", "optim")}
    nn, optim = import_module("octavo.nn"), import_module("octavo.optim")
    objects |= {f"{m.__name__}.{name}": getattr(m, name) for m in (nn, optim) for name in m.__all__}
    called = {name: value for name, value in objects.items() if callable(value)}
    return [name for name, value in called.items() if ">>>" not in (inspect.getdoc(value) or "")], len(called)


class Figure(NamedTuple):
    """What is counted, what it was at b64c9c8, how it is counted now, and the range that it must be in."""

    name: str
    before: str
    now: Callable[[], int]
    least: int
    most: int


FIGURES = (
    Figure("standing files that name a family", "42", lambda: len(standing_files()), 0, 6),
    Figure("comparisons with a method's name", "31", lambda: len(comparisons()), 0, 0),
    Figure("circles of modules", "5", lambda: len(module_circles()), 0, 0),
    Figure("circles of rooms", "", lambda: len(room_circles()), 0, 0),
    Figure("modules directly in octavo", "39", lambda: len(flat_modules()), 0, 5),
    Figure("public names", "70", lambda: len(public_names()), 25, 40),
    Figure("lazy imports of the package's own", "46", lambda: len(lazy_imports()), 0, 15),
    Figure("parameters of quantize_model", "20", lambda: len(quantize_parameters()), 5, 5),
    Figure("lines of the README", "487", lambda: len(readme()), 0, 90),
    Figure("line of the first command", "248", first_command, 0, 15),
    Figure("public docstrings without example", "43 of 43", lambda: len(examples()[0]), 0, 0),
    Figure("entries of tests", "83", lambda: len(test_entries()), 0, 12),
)


def main() -> None:
    print(f"{'figure':36} {'b64c9c8':>9} {'now':>5} {'target':>9}")
    for figure in FIGURES:
        now = figure.now()
        target = str(figure.most) if figure.least == figure.most else f"{figure.least} to {figure.most}"
        missed = "" if figure.least <= now <= figure.most else "  missed"
        print(f"{figure.name:36} {figure.before:>9} {now:>5} {target:>9}{missed}")


if __name__ == "__main__":
    main()
