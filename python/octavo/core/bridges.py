"""Libraries that hear of it when octavo changes the layers of a model; none of them is imported here."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from octavo_autoload import connect as connect_methods
from octavo_autoload import when_imported as when_imported
from torch import nn


def layers_changed(model: nn.Module) -> None:
    """Tell models of transformers and diffusers that their layers are others now: ``save_pretrained`` writes that."""
    models = sys.modules.get("transformers.modeling_utils")
    if hasattr(models, "PreTrainedModel"):
        importlib.import_module("octavo.integrations.transformers").mark_all(model)
    diffusers: Any = sys.modules.get("diffusers.models.modeling_utils")
    if hasattr(diffusers, "ModelMixin"):
        for module in model.modules():
            if isinstance(module, diffusers.ModelMixin):
                importlib.import_module("octavo.integrations.diffusers").mark(module)


def connect() -> None:
    """Have other libraries know octavo's method and layers, as soon as they are imported."""
    connect_methods()
    for name in ("peft", "accelerate"):  # importing the bridge connects them
        when_imported(name, lambda module: importlib.import_module(f"octavo.integrations.{module.__name__}"))
