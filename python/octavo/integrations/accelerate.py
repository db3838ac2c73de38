"""octavo's layers under accelerate's hooks, which move tensors between devices and disk by their names.

accelerate looks at a tensor that it replaces through the module's attribute of its name. That of a low-bit layer's
codes is ``weight``, which reads as a float tensor of another shape; while accelerate works on such a layer, it reads as
what is stored. This module is imported as soon as accelerate is.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from ..core.low_bit import LowBitLinear

_NAME = "set_module_tensor_to_device"


def connect() -> None:
    """Let accelerate's `set_module_tensor_to_device`, wherever it was imported, see what low-bit layers store."""
    from accelerate.utils import modeling

    original: Any = modeling.set_module_tensor_to_device
    if getattr(original, "_of_octavo", False):
        return

    @functools.wraps(original)
    def set_module_tensor_to_device(module: nn.Module, tensor_name: str, *args: Any, **kwargs: Any) -> Any:
        owner = module.get_submodule(tensor_name.rpartition(".")[0])
        if not isinstance(owner, LowBitLinear):
            return original(module, tensor_name, *args, **kwargs)
        leaf = tensor_name.rpartition(".")[2]
        if (value := kwargs.get("value")) is not None:  # from a file, where codes may be flat
            kwargs["value"] = owner.unflattened({leaf: value}, owner.configuration())[leaf]
        with owner.as_stored():
            return original(module, tensor_name, *args, **kwargs)

    set_module_tensor_to_device._of_octavo = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "accelerate" and vars(module).get(_NAME) is original:
            setattr(module, _NAME, set_module_tensor_to_device)


connect()
