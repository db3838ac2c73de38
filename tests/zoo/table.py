"""The table of the zoo, as a page of the documentation: ``python tests/zoo/table.py docs/measured/zoo``.

It runs every check of every family and method (half an hour on two cores), and says of each family which share of the
weights of its matrix products is quantized, by octavo and, where it is installed, by bitsandbytes.
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from checks import CHECKS, METHODS, check
from families import FAMILIES, Family
from octavo.core.machine import describe_machine
from torch import nn


def row_of(name: str, family: Family) -> tuple[list[str], list[str]]:
    """The cells of a family, and what failed."""
    failed, cells = [], [name]
    for method in METHODS:
        found = []
        for what in CHECKS:
            try:
                found.append(check(family, method, what))
            except Exception as error:  # the table is to have all of them
                kind = "WRONG" if str(error).startswith("WRONG") else "CRASH"
                failed.append(f"{name}, {method}, {what}: {kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
                found.append(kind)
        words = [word for word in found if word in ("WRONG", "CRASH")]
        cells.append(", ".join(words) or found[0])
    return [*cells, bitsandbytes_share(family)], failed


def bitsandbytes_share(family: Family) -> str:
    """The share that bitsandbytes quantizes of the same model while transformers loads it; "" without it."""
    import tempfile

    try:
        import bitsandbytes
    except ImportError:
        return ""
    model = family.make()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            config = transformers.BitsAndBytesConfig(load_in_4bit=True)
            read = type(model).from_pretrained(folder, quantization_config=config)
        except Exception as error:
            return type(error).__name__
    done = sum(m.in_features * m.out_features for m in read.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    return f"{done / matmul_weights(model):.0%}"


def matmul_weights(model: nn.Module) -> int:
    """The weights of matrix products of a model that nothing is quantized in."""
    from octavo.core.linears import is_conv1d

    whole = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            whole += module.weight.numel()  # type: ignore[union-attr, operator]
        elif not isinstance(module, nn.modules.conv._ConvNd | nn.Embedding):
            whole += sum(p.numel() for p in module._parameters.values() if p is not None and p.dim() == 3)
    return max(1, whole)


def main(folder: Path) -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, failed = [], []
    for name, family in FAMILIES.items():
        if family.known():
            cells, bad = row_of(name, family)
            rows.append(cells)
            failed += bad
            print(" | ".join(cells), *bad, sep="\n  ", flush=True)
    machine = describe_machine()
    versions = {p: machine["versions"].get(p) for p in ("torch", "transformers", "peft", "bitsandbytes")}
    data: dict[str, Any] = {
        "title": f"{len(rows)} families",
        "text": "Tiny models with random weights, made by their configurations. A cell is the share of the weights of\n"
        "matrix products that is quantized; it stands there if all checks hold: " + ", ".join(CHECKS) + ".\n"
        "What is left: the output layer, the head for a task, and experts that are one tensor for all.",
        "machine": {"cpu": machine["cpu"], "isa": machine["isa"], "threads": 1, "versions": versions},
        "command": "python tests/zoo/table.py docs/measured/zoo",
        "date": datetime.date.today().isoformat(),
        "columns": ["family", *METHODS, "bitsandbytes, 4 bits"],
        "rows": rows,
        "notes": "\n".join(f"- {line}" for line in failed) or "No check failed.",
    }
    folder.mkdir(parents=True, exist_ok=True)
    head = {"title": "Any model", "text": "Which models run, are saved, loaded and trained in low bits."}
    (folder / "page.json").write_text(json.dumps(head, indent=1) + "\n")
    (folder / "01-families.json").write_text(json.dumps(data, indent=1) + "\n")
    return len(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(1, main(Path(sys.argv[1]))))
