"""Markdown tables of measured figures, made from JSON files of two kinds.

One kind is what ``octavo bench FAMILY --out DIR`` writes: see `octavo.bench.common.Record`. The other is a table as it
is shown, with ``title``, ``text``, ``machine``, ``command``, ``columns``, ``rows`` and ``notes``::

    python -m octavo.bench.tables results/*.json           # print the tables of some files
    python -m octavo.bench.tables docs/measured            # write docs/measured/PAGE.md from the folders PAGE in it
    python -m octavo.bench.tables docs/measured --check    # exit with 1 if a page is not what its JSON files give

It needs nothing but Python: ``python bench/tables.py`` does the same where octavo is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GENERATED = "<!-- python -m octavo.bench.tables docs/measured makes this page from the JSON files beside it. -->"
HEADINGS = ("contender", "median ms", "best ms", "TOP/s", "GB/s", "of limit", "error", "time over", "quartiles", "cpu")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. A cell that is None is empty.

    Raises:
        ValueError: a row that has not as many cells as there are columns.

    Example:
        >>> from octavo.bench.tables import table
        >>> print(table(["method", "ms"], [["octavo", 1.5], ["none", None]]))
        | method | ms |
        |---|---|
        | octavo | 1.5 |
        | none | |
    """
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return "|" + "".join(" |" if cell in (None, "") else f" {cell} |" for cell in cells)


def shown(data: dict[str, Any]) -> str:
    """The Markdown of one JSON file.

    Raises:
        ValueError: it is of neither kind.
    """
    if "family" in data and "rows" in data:
        return _record(data)
    if missing := [name for name in ("title", "machine", "command", "columns", "rows") if name not in data]:
        raise ValueError(f"neither a record of octavo bench nor a table: it has no {', '.join(missing)}")
    parts = [f"## {data['title']}", data.get("text"), _provenance(data)]
    parts += [table(data["columns"], data["rows"]), data.get("notes")]
    return "\n\n".join(part for part in parts if part)


def _provenance(data: dict[str, Any]) -> str:
    """Who measured what: the machine, the versions, the command and the date, as far as they are known."""
    machine = data["machine"]
    threads = machine.get("threads")
    words = [machine["cpu"], machine.get("isa"), machine.get("gpu")]
    words.append(None if threads is None else f"{threads} thread{'s' if threads != 1 else ''}")
    words += [f"{package} {version}" for package, version in machine.get("versions", {}).items() if version]
    lines = [f"*Machine:* {', '.join(word for word in words if word)}."]
    if machine.get("state"):
        lines.append(machine["state"])
    lines.append(f"*Command:* `{data['command']}`.")
    if data.get("date"):
        commit = f", commit {data['commit']}" if data.get("commit") else ""
        lines.append(f"*Entered:* {data['date']}{commit}.")
    return "\n".join(lines)


def _record(data: dict[str, Any]) -> str:
    """The tables of a run of ``octavo bench``, one a case."""
    machine = data["machine"]
    isa = machine.get("isa")
    about = {"cpu": machine["cpu"], "isa": isa, "gpu": machine.get("gpu"), "threads": None}
    about |= {"versions": machine.get("versions", {})}
    if machine.get("load") is not None:
        about["state"] = f"Load when it began: {machine['load']}; {machine['cores']} cores."
    command = f"octavo bench {data['family']}"
    head = {"machine": about, "command": command}
    parts = [f"## {command}", _provenance(head), f"*Begun:* {data['started']}."]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in data["rows"]:
        cases.setdefault((row["section"], tuple(row["shape"]), row["dtype"], row["threads"]), []).append(row)
    for (section, shape, dtype, threads), rows in cases.items():
        sizes = f"m = {shape[0]}, {shape[1]} x {shape[2]}" if len(shape) == 3 else " x ".join(map(str, shape))
        parts += [f"### {section}, {sizes}, {dtype}, threads: {threads}", table(HEADINGS, map(_cells, rows))]
    if data["skipped"]:
        parts.append("\n".join(f"- {name} was skipped: {reason}" for name, reason in data["skipped"].items()))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells under HEADINGS."""
    share, error, ratio, busy = (row.get(name) for name in ("limit_share", "error", "ratio", "busy_ratio"))
    return [
        row["method"],
        f"{row['median_s'] * 1e3:.4g}",
        f"{row['best_s'] * 1e3:.4g}",
        f"{row['tops']:.3f}" if row["ops"] else "",
        f"{row['gbs']:.1f}",
        "" if share is None else f"{share:.0%} {row['limit']}",
        "" if error is None else f"{error:.2e}",
        "" if ratio is None else f"{ratio[1]:.2f} {row['versus']}",
        "" if ratio is None else f"{ratio[0]:.2f}-{ratio[2]:.2f}",
        "" if busy is None else f"{busy[1]:.2f}",
    ]


def page(folder: Path) -> str:
    """The page of the JSON files of a folder, in the order of their names, after its text in ``page.json``."""
    head = json.loads((folder / "page.json").read_text())
    parts = [f"# {head['title']}", GENERATED, head["text"]]
    for path in sorted(folder.glob("*.json")):
        if path.name != "page.json":
            try:
                parts.append(shown(json.loads(path.read_text())))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return "\n\n".join(parts) + "\n"


def pages(root: Path) -> dict[Path, str]:
    """What every page under a folder should be, by its path."""
    return {head.parent.with_suffix(".md"): page(head.parent) for head in sorted(root.glob("*/page.json"))}


def main(words: Sequence[str] | None = None) -> int:
    """The command. Its exit status: 1 where a page differs."""
    parser = argparse.ArgumentParser(description="Markdown tables from the JSON files of octavo bench and of docs/.")
    parser.add_argument("paths", nargs="+", type=Path, help="JSON files to print, or a folder of pages to write")
    parser.add_argument("--check", action="store_true", help="write nothing: compare the pages with their files")
    given = parser.parse_args(words)
    differing = []
    for path in given.paths:
        if not path.is_dir():
            print(shown(json.loads(path.read_text())) + "\n")
            continue
        for target, text in pages(path).items():
            if given.check:
                differing += [target] if not target.exists() or target.read_text() != text else []
            else:
                target.write_text(text)
                print(f"wrote {target}")
    for target in differing:
        print(f"{target} is not what its JSON files give: python -m octavo.bench.tables {target.parent}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
