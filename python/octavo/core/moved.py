"""Modules of octavo 0.1.0 that are elsewhere now: an import of one, or a pickle that names one, works and says so."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

MODULES = {
    "_kinds": "core.method",
    "_linear4bit": "nf4.bitsandbytes",
    "_peft_format": "lora.peft_format",
    "_report": "core.report",
    "adapters": "lora.adapters",
    "autograd": "int8.functional",
    "autograd_switchback": "switchback.functional",
    "convert": "switchback.convert",
    "demo": "cli.demo",
    "evaluate": "models.evaluate",
    "merging": "lora.merging",
    "nn_attention": "switchback.attention",
    "nn_lora": "lora.linear",
    "nn_nf4": "nf4.linear",
    "nn_spqr": "spqr.linear",
    "nn_switchback": "switchback.linear",
    "quantize": "models.quantize",
    "serialization": "models.saved",
    "spqr.calibration": "core.calibration",
    "spqr.chain": "spqr.engine.chain",
    "spqr.codes": "spqr.engine.codes",
    "spqr.config": "spqr.engine.config",
    "spqr.hessian": "spqr.engine.hessian",
    "spqr.model": "spqr.engine.blocks",
    "spqr.store": "spqr.engine.store",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != "octavo" or rest not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = f"octavo.{MODULES[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = types.ModuleType(spec.name, f"See {new}.")
        module.__dict__.update({k: v for k, v in vars(importlib.import_module(new)).items() if k[:2] != "__"})
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to do: the names are there."""


def install() -> None:
    """Let the old names be found, after all that are really there."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
