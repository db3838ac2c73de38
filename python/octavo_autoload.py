"""What other libraries know of octavo before anybody imports it. It imports the standard library only.

torch calls `register` whenever it is imported, by the entry point of the group ``torch.backends``. That makes
transformers know the quantization method "octavo", so that ``AutoModel.from_pretrained(directory)`` loads what octavo
wrote, in programs that never heard of octavo, too: `transformers serve`, pipelines, evaluation harnesses. octavo itself
is imported when such a directory is loaded. ``OCTAVO_AUTOLOAD=0`` turns it off; transformers then refuses these
directories, because the shapes of their tensors are not those of the model.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

_BRIDGE = "octavo.integrations.transformers"


def register() -> None:
    """The entry point: have transformers and diffusers know octavo's quantization method, unless it is turned off."""
    if os.environ.get("OCTAVO_AUTOLOAD", "1") != "0":
        connect()


def connect() -> None:
    """Add the method to the tables of transformers and diffusers, now or when they are imported."""
    for library, quantizer in (("transformers", "OctavoQuantizer"), ("diffusers", "OctavoDiffusersQuantizer")):
        bridge = f"octavo.integrations.{library}"
        when_imported(f"{library}.quantizers.auto", functools.partial(_add_method, quantizer, bridge))


def when_imported(name: str, call: Callable[[Any], object]) -> None:
    """Call `call(module)` once the module of this name has been imported; now if it has been."""
    module = sys.modules.get(name)
    if module is not None and not _half(module):
        call(module)
    else:
        _waiting.setdefault(name, []).append(call)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def _half(module: Any) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _imported(name: str) -> None:
    for call in _waiting.pop(name, ()):
        call(sys.modules[name])
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder:
    """Finds nothing itself: it lets the module's own loader say when it is done."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        # A module that was half imported when it was asked for is done by the time that others are.
        for half in [n for n in _waiting if n in sys.modules and not _half(sys.modules[n])]:
            _imported(half)
        if name not in _waiting:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is None:
                continue
            if hasattr(spec.loader, "exec_module"):
                _tell(spec.loader, name)
            return spec
        return None


def _tell(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        loader.exec_module = execute
        execute(module)
        _imported(name)

    loader.exec_module = exec_module


_waiting: dict[str, list[Callable[[Any], object]]] = {}  # name of a module: what to call when it is there
_finder: Any = _Finder()


class _Later:
    """A class of octavo's, by its name: octavo is imported when it is used."""

    def __init__(self, name: str, module: str = _BRIDGE) -> None:
        self._name, self._module = name, module

    def _class(self) -> Any:
        try:
            __import__(self._module)
        except Exception as error:
            raise ImportError(
                f"the model was quantized by octavo, which is installed and cannot be imported: {error}"
            ) from error
        return getattr(sys.modules[self._module], self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._class()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._class(), name)


def _add_method(quantizer: str, module: str, auto: Any) -> None:
    quantizers = getattr(auto, "AUTO_QUANTIZER_MAPPING", None)
    configs = getattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if isinstance(quantizers, dict) and isinstance(configs, dict):
        quantizers.setdefault("octavo", _Later(quantizer, module))
        configs.setdefault("octavo", _Later("OctavoConfig"))
