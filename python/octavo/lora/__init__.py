"""LoRA adapters (arXiv 2106.09685) on layers in 4, 8 or 16 bit."""

from .adapters import (
    Adapter,
    add_lora,
    delete_adapter,
    list_adapters,
    load_adapter,
    remove_lora,
    save_adapter,
    set_adapter,
)
from .linear import LoRALinear
from .merging import MergeReport, merge_adapter, unmerge_adapter

__all__ = [
    "Adapter",
    "LoRALinear",
    "MergeReport",
    "add_lora",
    "delete_adapter",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
