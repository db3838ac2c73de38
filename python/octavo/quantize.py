"""`quantize_model`: the Linear layers of a model, in place, to low-bit modules."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from ._report import LayerReport as LayerReport
from ._report import Report as Report
from .nf4 import check_options
from .nn import Int8Linear, NF4Linear, check_threshold, check_weight
from .nn_switchback import Int8Weight

if TYPE_CHECKING:
    from .spqr import SpQRCodes, SpQRConfig

METHODS = ("int8", "nf4")  # what needs the weights alone, one at a time
BLOCK_METHODS = ("spqr", "gptq", "rtn")  # what runs the model, or may
# Settings that one method has alone.
_OWNERS = {"threshold": "int8", "keep_outliers": "int8"} | dict.fromkeys(
    ("quant_type", "blocksize", "double_quant"), "nf4"
)
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32


@dataclass
class _Target:
    names: list[str]  # a shared module has several
    linear: nn.Linear
    keep: Tensor | None = None


def quantize_model(
    model: nn.Module,
    method: str = "int8",
    skip: Sequence[str] = ("lm_head",),
    threshold: float | None = None,
    progress: bool = True,
    calibration: str | os.PathLike[str] | Iterable[Any] | None = None,
    keep_outliers: bool = False,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    tau: float | None = None,
    outlier_fraction: float | None = None,
    config: SpQRConfig | None = None,
    samples: int | None = None,
    context: int | None = None,
    tokenizer: Any = None,
    resume: str | os.PathLike[str] | None = None,
    simulate: bool = False,
    quant_type: str | None = None,
    blocksize: int | None = None,
    double_quant: bool = False,
) -> Report:
    """Quantize the `torch.nn.Linear` modules of `model`, in place.

    Method "int8" replaces them by `octavo.nn.Int8Linear` (LLM.int8(), 2208.07339) and "nf4" by `octavo.nn.NF4Linear`
    (QLoRA, 2305.14314: 4 bits); they need no data. "spqr" (SpQR, 2306.03078: 2 to 4 bits, and outliers), "gptq"
    (2210.17323) and "rtn" (round to nearest) make `octavo.nn.SpQRLinear` modules. They go block by block, each on what
    the quantized blocks before make of the calibration data; rtn needs none, and only reports errors with it. An error
    or interruption then leaves the blocks before it quantized: load the model anew, and with `resume` go on.

    Only modules whose type is exactly `torch.nn.Linear` are replaced: what a subclass adds would be lost. A module
    that appears under several names is converted once and stays shared. Left alone, and named in the report: layers in
    `skip`, layers whose weight is also used elsewhere (a head tied to its embedding), layers with hooks, for int8
    layers wider than 131071. Weights and settings are checked before anything is changed; then the layers are converted
    one by one, each freed before the next.

    Args:
        model: weights fp32, fp16 or bf16, on any device.
        method: "int8", "nf4", "spqr", "gptq" or "rtn".
        skip: full dotted names, or last components of names, of layers to leave alone.
        threshold: of int8: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; by default
            6.0, the paper's.
        progress: show a progress bar.
        calibration: batches: tensors, fed as ``model(batch)``, or mappings, as ``model(**batch)``. For int8, of
            `keep_outliers`; none for nf4. For the others also token ids [tokens], or the path of a text, which
            `tokenizer` reads.
        keep_outliers: run `calibration` through the model and keep the unquantized weights of every column that was an
            outlier column there, next to the int8 ones (the paper's form).
        bits: 2, 3 or 4: by default 3 of spqr, 4 of gptq and rtn. This and all until `simulate` are of these methods.
        group_size: columns that share a scale: by default 16 of spqr, 64 of gptq and rtn.
        tau: of spqr: relative threshold of outliers, 0.2 by default; the lower, the more.
        outlier_fraction: of spqr, in place of tau: the share of each layer's weights to keep as outliers.
        config: an `octavo.spqr.SpQRConfig` with all settings, in place of these four.
        samples: sequences of `calibration` to use, at most: by default 128.
        context: tokens of a sequence; by default 2048, or the model's own limit, of a text, and all of other data.
        tokenizer: of the model, for a text.
        resume: a directory for finished layers, made if it is not there. With the same model, data and settings, those
            in it are not quantized again. With another number of threads torch's products, and so the codes of later
            layers, differ in the last places.
        simulate: keep `torch.nn.Linear` modules, with the weights that the quantized ones stand for.
        quant_type: of nf4: "nf4" (the default) or "fp4"; "nf2", "nf3" or "nf8". See `octavo.quantize_4bit` for this
            and both below.
        blocksize: of nf4: weights that share a scale, a power of two from 32 to 4096; 64 by default.
        double_quant: of nf4: quantize the scales, too: 4.127 bits a weight instead of 4.5.

    Returns:
        A `Report`: bytes before and after, per layer and in total.

    Raises:
        ValueError: an unknown method, a bad threshold or setting, NaN or Inf in weights or calibration inputs or
            weights of another dtype (the layer is named), no layer to convert, `keep_outliers` without calibration data
            or with threshold 0; no calibration data, too short a text, columns that the group size does not divide, a
            Hessian that is 0 or not positive definite, a `resume` directory of another quantization.
    """
    if method not in METHODS + BLOCK_METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS + BLOCK_METHODS)}")
    others: dict[str, Any] = {"bits": bits, "group_size": group_size, "tau": tau, "outlier_fraction": outlier_fraction}
    others |= {"config": config, "context": context, "tokenizer": tokenizer, "resume": resume, "simulate": simulate}
    others["samples"] = samples
    of_one: dict[str, Any] = {"threshold": threshold, "keep_outliers": keep_outliers, "quant_type": quant_type}
    of_one |= {"blocksize": blocksize, "double_quant": double_quant}
    if foreign := [name for name in _given(of_one) if _OWNERS[name] != method]:
        raise ValueError(f"{foreign[0]} is of method {_OWNERS[foreign[0]]}, not of {method}")
    if method in BLOCK_METHODS:
        return _quantize_blocks(model, method, skip, progress, calibration, 128 if samples is None else samples, others)
    if method == "nf4":
        others["calibration"] = calibration
    if foreign := _given(others):
        raise ValueError(f"method {method} takes no {', '.join(foreign)}")
    if method == "nf4":
        return _quantize_nf4(model, skip, progress, quant_type, blocksize, double_quant)
    return _quantize_int8(
        model, skip, progress, check_threshold(6.0 if threshold is None else threshold), calibration, keep_outliers
    )


def _given(settings: Mapping[str, Any]) -> list[str]:
    return [name for name, value in settings.items() if value is not None and value is not False]


def _quantize_int8(
    model: nn.Module,
    skip: Sequence[str],
    progress: bool,
    threshold: float,
    calibration: str | os.PathLike[str] | Iterable[Any] | None,
    keep_outliers: bool,
) -> Report:
    if keep_outliers != (calibration is not None):
        given = "keep_outliers=True needs calibration data" if keep_outliers else "calibration needs keep_outliers=True"
        raise ValueError(f"{given}: the outlier columns to keep are found by running it through the model")
    if keep_outliers and threshold == 0.0:
        raise ValueError("keep_outliers=True needs a positive threshold: with threshold 0 there are no outlier columns")
    targets, skipped = _checked_targets(model, skip, _MAX_K)
    bytes_before = _bytes(model)
    if calibration is not None:
        if isinstance(calibration, str | os.PathLike):
            raise ValueError("calibration of method int8 must be batches, not the path of a text")
        _find_columns_to_keep(model, targets, calibration, threshold)

    def convert(target: _Target) -> tuple[nn.Module, dict[str, Any]]:
        new = Int8Linear.from_linear(target.linear, threshold, target.keep)
        return new, {"kept_columns": new.kept_columns}

    layers = _replace_each(model, targets, progress, convert)
    return Report("int8", threshold, layers, skipped, bytes_before, _bytes(model))


def _quantize_nf4(
    model: nn.Module,
    skip: Sequence[str],
    progress: bool,
    quant_type: str | None,
    blocksize: int | None,
    double_quant: bool,
) -> Report:
    quant_type, blocksize = "nf4" if quant_type is None else quant_type, 64 if blocksize is None else blocksize
    check_options(quant_type, blocksize)
    targets, skipped = _checked_targets(model, skip, None)
    bytes_before = _bytes(model)

    def convert(target: _Target) -> tuple[nn.Module, dict[str, Any]]:
        new = NF4Linear.from_linear(target.linear, quant_type, blocksize, double_quant)
        weight = new.packed_weight
        return new, {"nominal_bits": weight.nominal_bits, "real_bits": weight.bits_per_weight}

    layers = _replace_each(model, targets, progress, convert)
    settings = f"{quant_type} codes in blocks of {blocksize}{', double quantization' if double_quant else ''}"
    return Report("nf4", 0.0, layers, skipped, bytes_before, _bytes(model), settings=settings)


def _checked_targets(model: nn.Module, skip: Sequence[str], widest: int | None) -> tuple[list[_Target], dict[str, str]]:
    targets, skipped = _find_targets(model, skip, widest)
    for target in targets:
        check_weight(target.linear, target.names[0])
    return targets, skipped


def _replace_each(
    model: nn.Module,
    targets: list[_Target],
    progress: bool,
    convert: Callable[[_Target], tuple[nn.Module, dict[str, Any]]],
) -> list[LayerReport]:
    """Put what `convert` makes in the place of each target, freeing it; it also gives more for the layer's report."""
    layers = []
    with _progress_bar(len(targets), progress) as done:
        targets.reverse()
        while targets:
            target = targets.pop()  # the last reference to the layer, but for the model's
            name, linear = target.names[0], target.linear
            new, more = convert(target)
            for alias in target.names:
                model.set_submodule(alias, new)
            shape = (linear.out_features, linear.in_features)
            layers.append(LayerReport(name, shape, _bytes(linear), _bytes(new), **more))
            done(name)
    return layers


def _quantize_blocks(
    model: nn.Module,
    method: str,
    skip: Sequence[str],
    progress: bool,
    calibration: str | os.PathLike[str] | Iterable[Any] | None,
    samples: int,
    given: Mapping[str, Any],
) -> Report:
    from .spqr import calibration as data
    from .spqr.model import quantize_layers
    from .spqr.store import Store, fingerprint

    config = _spqr_config(method, given)
    if config.group_size > 64 and not given["simulate"]:
        raise ValueError(
            f"group_size {config.group_size} has no packed form: 16, 32 and 64 have, or give simulate=True"
        )
    if config.propagate and calibration is None:
        raise ValueError(f"method {method} needs calibration data")
    if calibration is None and (idle := [name for name in ("samples", "context") if given[name] is not None]):
        raise ValueError(f"{', '.join(idle)} without calibration data")
    targets, skipped = _checked_targets(model, skip, None)
    if unfit := [t for t in targets if t.linear.in_features % config.group_size]:
        first = ", ".join(f"{target.names[0]} ({target.linear.in_features})" for target in unfit[:4])
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        raise ValueError(
            f"group_size {config.group_size} does not divide the in_features of {first}{more}: give another, "
            f"or skip them"
        )
    batches = None
    if calibration is not None:
        batches = data.prepare(calibration, samples, given["context"], given["tokenizer"], model)
    store = None
    if given["resume"] is not None:
        store = Store(given["resume"], fingerprint(model, config, batches))
    bytes_before = _bytes(model)
    names = {target.linear: target.names for target in targets}
    layers: list[LayerReport] = []
    with _progress_bar(len(targets), progress) as done:

        def measured(linear: nn.Linear, codes: SpQRCodes) -> None:
            share = f", {codes.outlier_share:.2%} outliers" if config.has_outliers else ""
            error = "" if math.isnan(codes.error) else f", error {codes.error:.2%}"  # known with calibration data only
            done(f"{names[linear][0]}: {codes.nominal_bits:.2f} bits{share}{error}")

        def finished(linear: nn.Linear, codes: SpQRCodes) -> None:
            before = _bytes(linear)
            new = linear if given["simulate"] else _replace_by_spqr(model, names[linear], linear, codes)
            error = None if math.isnan(codes.error) else codes.error
            figures = (codes.nominal_bits, _stored_bits(codes), codes.outlier_share, error)
            layers.append(LayerReport(names[linear][0], (codes.n, codes.k), before, _bytes(new), 0, *figures))

        calls = {linear: aliases[0] for linear, aliases in names.items()}
        skipped |= quantize_layers(model, calls, config, batches, store, measured, finished)
    order = {target.names[0]: i for i, target in enumerate(targets)}
    layers.sort(key=lambda layer: order[layer.name])
    return Report(method, 0.0, layers, skipped, bytes_before, _bytes(model), settings=str(config))


def _spqr_config(method: str, given: Mapping[str, Any]) -> SpQRConfig:
    from .spqr import SpQRConfig

    settings = {
        name: given[name] for name in ("bits", "group_size", "tau", "outlier_fraction") if given[name] is not None
    }
    if given["config"] is not None:
        if settings:
            raise ValueError(f"config holds all settings: give {', '.join(settings)} in it, or no config")
        config = given["config"]
        if not isinstance(config, SpQRConfig):
            raise ValueError(f"config must be a SpQRConfig, got {type(config).__name__}")
        return config
    if "tau" in settings and "outlier_fraction" in settings:
        raise ValueError("give tau or outlier_fraction, not both")
    if method == "spqr":
        return SpQRConfig(**settings)
    if outliers := [name for name in ("tau", "outlier_fraction") if name in settings]:
        raise ValueError(f"method {method} takes no {outliers[0]}: it has no outliers")
    return SpQRConfig.gptq(**settings) if method == "gptq" else SpQRConfig.rtn(**settings)


def _replace_by_spqr(model: nn.Module, names: Sequence[str], linear: nn.Linear, codes: SpQRCodes) -> nn.Module:
    """Put the packed module in the place of `linear`, under all its names."""
    from .nn import SpQRLinear
    from .spqr import SpQRWeight

    packed = SpQRWeight.pack(codes).to(linear.weight.device)
    new = SpQRLinear.from_weight(packed, linear.bias)
    for name in names:
        model.set_submodule(name, new)
    return new


def _stored_bits(codes: SpQRCodes) -> float:
    """Bits per weight of the packed form, from the shapes of its tensors alone."""
    from .spqr import SpQRWeight

    tensors = {name: value.to("meta") for name, value in vars(codes).items() if isinstance(value, Tensor)}
    return SpQRWeight.pack(replace(codes, **tensors)).real_bits  # type: ignore[arg-type]


def _find_targets(model: nn.Module, skip: Sequence[str], widest: int | None) -> tuple[list[_Target], dict[str, str]]:
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    if type(model) is nn.Linear:
        raise ValueError(
            "the model is itself a Linear; use from_linear of octavo.nn.Int8Linear or NF4Linear, or "
            "octavo.spqr.quantize_weight"
        )
    found: dict[nn.Module, list[str]] = {}
    owners: dict[Tensor, set[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            found.setdefault(module, []).append(name)
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    unknown = [
        entry
        for entry in skip
        if entry != "lm_head" and not any(entry in (n, n.rpartition(".")[2]) for names in found.values() for n in names)
    ]
    if unknown:
        raise ValueError(f"skip names no torch.nn.Linear of {type(model).__name__}: {', '.join(unknown)}")
    # Their fast path in inference reads the weights of its Linear layers, past their forward.
    fused = {
        id(child)
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer)
        for child in (layer.linear1, layer.linear2)
    }
    targets, skipped = [], {}
    for module, names in found.items():
        assert isinstance(module, nn.Linear)
        if any(name in skip or name.rpartition(".")[2] in skip for name in names):
            skipped[names[0]] = "as asked"
        elif module._parameters.get("weight") is None:
            skipped[names[0]] = "its weight is not a parameter"
        elif len(owners[module.weight]) > 1:
            skipped[names[0]] = "its weight is shared with another module"
        elif id(module) in fused:
            skipped[names[0]] = "torch's TransformerEncoderLayer reads its weight itself"
        elif _has_hooks(module):
            skipped[names[0]] = "it has hooks, which a new module would lose"
        elif widest is not None and module.in_features > widest:
            skipped[names[0]] = f"in_features {module.in_features} is more than {widest}"
        else:
            targets.append(_Target(names, module))
    if not targets:
        for name, module in model.named_modules():
            if isinstance(module, Int8Weight):
                skipped[name] = "it trains in int8; octavo.convert_linears(model, torch.nn.Linear) turns it back"
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize{reasons and ':'}{reasons}")
    return targets, skipped


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")  # accelerate replaces forward


def _find_columns_to_keep(
    model: nn.Module,
    targets: list[_Target],
    calibration: Iterable[Any],
    threshold: float,
) -> None:
    """Set `keep` of every target to the columns that are outlier columns of its input in any batch."""
    is_outlier: dict[nn.Module, Tensor] = {
        target.linear: torch.zeros(target.linear.in_features, dtype=torch.bool) for target in targets
    }

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        columns, count = ops.find_outlier_columns(x.detach(), threshold)
        is_outlier[module][columns[: int(count)].long().cpu()] = True

    training = {module: module.training for module in model.modules()}
    handles = [target.linear.register_forward_pre_hook(watch, with_kwargs=True) for target in targets]
    batches = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                batches += 1
                if isinstance(batch, Tensor):
                    model(batch)
                elif isinstance(batch, Mapping):
                    model(**batch)
                else:
                    raise ValueError(f"calibration batches must be tensors or mappings, got {type(batch).__name__}")
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if batches == 0:
        raise ValueError("calibration has no batches")
    for target in targets:
        target.keep = is_outlier[target.linear].nonzero().flatten()


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with the name of each layer when it is done."""
    if not show:
        yield lambda name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    layer = TextColumn("{task.fields[layer]}")
    with Progress(TextColumn("quantize"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), layer) as bar:
        task = bar.add_task("quantize", total=total, layer="")
        yield lambda name: bar.update(task, advance=1, layer=name)


def _bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each counted once however many modules share it."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
