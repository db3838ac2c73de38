"""`octavo finetune`: QLoRA (arXiv 2305.14314) from a model and a text to an adapter, with checkpoints and resume.

The base is quantized to 4 (or 8) bits and frozen; LoRA adapters on all its linear layers are trained by an optimizer
with 8-bit, paged states. `finetune` is what the command calls; `Settings` has the paper's recipe as its defaults.
"""

from .memory import MemoryRow, memory_table
from .run import NonFiniteError, Result, Watcher, finetune
from .settings import OPTIMIZERS, Settings

__all__ = [
    "OPTIMIZERS",
    "MemoryRow",
    "NonFiniteError",
    "Result",
    "Settings",
    "Watcher",
    "finetune",
    "memory_table",
]
