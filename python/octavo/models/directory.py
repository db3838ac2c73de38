"""Quantizing a model from where it is stored into a directory that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..core.low_bit import LowBitLinear
from ..core.method import find_method, is_unquantized, method_names
from ..core.stored import new_directory
from ..core.targets import SKIP, as_patterns, matches
from .quantize import quantize_model
from .saved import TOKENIZER_FILES
from .sources import (
    Source,
    check_unquantized,
    find_source,
    has_tokenizer,
    load_model,
    load_tokenizer,
    need_transformers,
)

_WRITTEN = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES)


def quantize_to_directory(
    source: Source,
    target: str | os.PathLike[str],
    method: str = "int8",
    skip: str | Iterable[str] = SKIP,
    *,
    calibration: str | os.PathLike[str] | None = None,
    progress: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Quantize the model at `source` into a directory that transformers loads: weights, configuration, tokenizer.

    With methods that need one weight at a time, a transformers directory is quantized tensor by tensor while it is
    read; a GGUF file is unpacked first. The others read the whole model and go through `octavo.quantize_model`.
    `target` is written beside itself and renamed at the end: a failure or an interruption leaves nothing, and finished
    layers only where settings name a directory to `resume` from.

    Args:
        source: from `find_source` or `resolve`.
        target: must not exist, or be empty.
        method, skip, calibration, progress, settings: as of `octavo.quantize_model`; calibration is a text.
        overwrite: `target` may also be a model that octavo quantized, which is replaced at the end.
        dtype: of what is not quantized; None: as it is stored (fp32 for GGUF, which is unpacked).

    Returns:
        "method" and its settings' "description", "layers" quantized, bytes of the files: "bytes_before" and
        "bytes_after", and what all weights take in 16 bit, "bytes_16_bit"; bits per weight by the paper's formula,
        "nominal_bits", and as stored, "real_bits"; "left_alone": the names of what was not quantized, with the reason;
        "rest_bytes" and "rest_dtype" of what is in no quantized layer.

    Raises:
        ModelError: `source` cannot be read, or is quantized already.
        FileExistsError, FileNotFoundError: `target` exists, or the directory that it is to be in does not.
        ValueError: as of `octavo.quantize_model`.

    Example:
        >>> from octavo import models
        >>> source = models.resolve("smollm2")  # doctest: +SKIP
        >>> models.quantize_to_directory(source, "smollm2-nf4", "nf4")  # doctest: +SKIP
    """
    check_unquantized(source)
    if is_unquantized(method):
        raise ValueError(f"method {method!r} leaves the model as it is; the others: {', '.join(method_names())}")
    found, given = find_method(method, settings)
    chosen = found.settings(given)
    found.check_calibration(chosen, calibration)
    need_transformers()
    from ..integrations.transformers import OctavoConfig, mark_quantized

    config = OctavoConfig(found.stored, skip=skip, **found.layout(chosen))
    if overwrite:
        _check_replaceable(source, Path(target))
    # Nothing becomes smaller than an eighth: 2 bits of 16.
    needed = source.bytes // 8
    with new_directory(target, overwrite, marker="config.json", needed=needed, known=_WRITTEN) as path:
        tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
        reasons: dict[str, str] = {}
        if found.in_stream and source.kind == "transformers":
            model = load_model(source, dtype, config)
        else:
            model = load_model(source, dtype)
            if calibration is not None and "tokenizer" in found.setting_names():
                given = {**given, "tokenizer": tokenizer}
            report = quantize_model(model, found.name, config.skip, calibration=calibration, progress=progress, **given)
            reasons = {name: reason for name, reason in report.skipped.items() if reason != "as asked"}
            mark_quantized(model, config)
        model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        bytes_after = find_source(path).bytes
    layers = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    bits = {
        name: sum(getattr(layer, name) * count for layer, count in zip(layers, weights, strict=True)) / sum(weights)
        for name in ("nominal_bits", "real_bits")
    }
    quantized = {id(tensor) for layer in layers for tensor in layer.state_dict(keep_vars=True).values()}
    rest = [p for p in model.parameters() if id(p) not in quantized]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in rest})
    plain = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    embedding, asked = model.get_input_embeddings(), as_patterns("skip", skip)

    def why(name: str) -> str:
        if reasons.get(name):
            return reasons[name]
        if embedding is not None and model.get_submodule(name).weight is embedding.weight:
            return "its weight is the embedding's"
        return "as --skip says" if any(matches((name,), pattern) for pattern in asked) else "it cannot be quantized"

    sizes = {
        "layers": len(layers),
        "bytes_before": source.bytes,
        "bytes_after": bytes_after,
        "bytes_16_bit": 2 * (sum(weights) + sum(p.numel() for p in rest)),
        "left_alone": {name: why(name) for name in plain},
        "rest_bytes": sum(p.nbytes for p in rest),
        "rest_dtype": ", ".join(dtypes),
    }
    return {"method": method, "description": chosen.describe(), **sizes, **bits}


def _is_in(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _check_replaceable(source: Source, target: Path) -> None:
    """FileExistsError where a directory would be lost that octavo cannot make again."""
    if target.exists() and _is_in(source.path, target):
        raise FileExistsError(f"{target} holds the model that is to be quantized: name another directory")
    if (target / "config.json").is_file() and find_source(target).quantization != "octavo":
        raise FileExistsError(f"{target} holds a model that octavo did not quantize: name another directory")
