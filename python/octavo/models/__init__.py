"""Whole models: quantized, saved and loaded, read from where users have them, and judged."""

from . import evaluate
from .directory import quantize_to_directory
from .quantize import quantize_model
from .saved import load_quantized, save_quantized
from .sources import (
    ModelError,
    Source,
    check_context,
    check_unquantized,
    find_source,
    load_base,
    load_model,
    load_tokenizer,
    resolve,
    smollm2,
    tokens_of,
)

__all__ = [
    "ModelError",
    "Source",
    "check_context",
    "check_unquantized",
    "evaluate",
    "find_source",
    "load_base",
    "load_model",
    "load_quantized",
    "load_tokenizer",
    "quantize_model",
    "quantize_to_directory",
    "resolve",
    "save_quantized",
    "smollm2",
    "tokens_of",
]
