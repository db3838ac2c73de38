"""`quantize_model`: the Linear layers of a model, in place, to low-bit modules."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.bridges import layers_changed
from ..core.checks import module_bytes
from ..core.method import find_method, is_unquantized, method_names
from ..core.report import Report
from ..core.targets import SKIP, find_targets, put, unwrapped


def quantize_model(
    model: nn.Module,
    method: str = "int8",
    skip: str | Iterable[str] = SKIP,
    *,
    calibration: str | os.PathLike[str] | Iterable[Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Quantize the `torch.nn.Linear` modules of `model`, in place.

    Method "int8" replaces them by `octavo.nn.Int8Linear` (LLM.int8(), 2208.07339) and "nf4" by `octavo.nn.NF4Linear`
    (QLoRA, 2305.14314: 4 bits; "fp4" is its other code book); they need no data. "spqr" (SpQR, 2306.03078: 2 to 4 bits,
    and outliers), "gptq" (2210.17323) and "rtn" (round to nearest) make `octavo.nn.SpQRLinear` modules. They go block
    by block, each on what the quantized blocks before make of the calibration data; rtn needs none, and only reports
    errors with it. An error or interruption then leaves the blocks before it quantized: load the model anew, and with
    `resume` go on.

    Replaced are `torch.nn.Linear` modules, those of subclasses that compute the same (falcon's, timm's), and
    transformers' Conv1D (GPT-2). A module that appears under several names is converted once and stays shared. Left
    alone, and named in the report: layers in `skip`, layers whose weight is also used elsewhere (a head tied to its
    embedding), layers with hooks, for int8 layers wider than 131071, what transformers keeps in fp32, the head that a
    transformers model has for a task (unless `skip` is given), weights of other modules. Weights and settings are
    checked before anything is changed; then the layers are converted one by one, each freed before the next.

    Args:
        model: weights fp32, fp16 or bf16, on any device.
        method: "int8", "nf4", "fp4", "spqr", "gptq" or "rtn", or what another package has registered.
        skip: layers to leave alone: patterns (as of `fnmatch`, or plain names) of full names, last components of names,
            or modules that contain the layers.
        calibration: batches: tensors, fed as ``model(batch)``, or mappings, as ``model(**batch)``. For int8, of
            `keep_outliers`; none for nf4. For the others also token ids [tokens], or the path of a text, which
            `tokenizer` reads.
        progress: show a progress bar.
        settings: of the method, see its ``Settings``. int8: ``threshold``, ``keep_outliers``
            (`octavo.int8.Int8.Settings`); nf4: ``quant_type``, ``blocksize``, ``double_quant``
            (`octavo.nf4.NF4.Settings`); spqr, gptq and rtn: ``bits``, ``group_size``, ``config``, ``samples``,
            ``context``, ``tokenizer``, ``resume``, ``simulate``, and of spqr alone ``tau`` and ``outlier_fraction``
            (`octavo.spqr.SpQR.Settings`).

    Returns:
        A `Report`: bytes before and after, per layer and in total, and the method's own figures.

    Raises:
        ValueError: an unknown method, a bad setting or one that the method does not have, NaN or Inf in weights or
            calibration inputs or weights of another dtype (the layer is named), a pattern that means no layer, no layer
            to convert, `keep_outliers` without calibration data or with threshold 0; no calibration data, too short a
            text, columns that the group size does not divide, a Hessian that is 0 or not positive definite, a `resume`
            directory of another quantization.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
        >>> print(octavo.quantize_model(model, "nf4", skip="2", progress=False))
        nf4, nf4 codes in blocks of 64: 1 layers quantized
          0 [256, 64]: 66.56 kB -> 10.24 kB (15.4%), bits by formula 4.500, bits stored 4.500
          2: left alone, as asked
        quantized layers: 66.56 kB -> 10.24 kB (15.4%), bits by formula 4.500, bits stored 4.500
        whole model: 74.78 kB -> 18.46 kB (24.7%)
    """
    model = unwrapped(model)
    if is_unquantized(method):
        raise ValueError(f"method {method!r} leaves the model as it is; the others: {', '.join(method_names())}")
    found, given = find_method(method, settings)
    chosen = found.settings(given)
    found.check_calibration(chosen, calibration)
    targets, skipped = find_targets(model, skip, found.widest)
    bytes_before = module_bytes(model)
    stand_ins = [target for target in targets if target.linear is not target.module]
    for target in stand_ins:
        put(model, target.names, target.linear)
    try:
        layers, left = found.quantize(model, targets, chosen, calibration, progress)
    finally:
        for target in stand_ins:
            if model.get_submodule(target.names[0]) is target.linear:
                put(model, target.names, target.module)
        layers_changed(model)
    described = (found.name, chosen.to_dict(), chosen.describe())
    return Report(*described, layers, skipped | left, bytes_before, module_bytes(model))
