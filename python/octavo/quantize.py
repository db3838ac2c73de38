"""`quantize_model`: the Linear layers of a model, in place, to low-bit modules."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .nn import Int8Linear, check_threshold, check_weight

if TYPE_CHECKING:
    from rich.table import Table

    from .spqr import SpQRCodes, SpQRConfig

METHODS = ("int8",)  # what needs the weights alone, one at a time
BLOCK_METHODS = ("spqr", "gptq", "rtn")  # what runs the model, or may
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: shape is [out_features, in_features]; bytes count weight, scales, bias, kept columns.

    Of methods other than int8, besides: `nominal_bits` per weight by the paper's formula and `real_bits` as stored,
    the `outlier_share` of weights, and the relative `error` of the layer's output on the calibration inputs.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    kept_columns: int = 0
    nominal_bits: float | None = None
    real_bits: float | None = None
    outlier_share: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Report:
    """What `quantize_model` did. `skipped` maps the names of Linear layers that were left alone to the reason."""

    method: str
    threshold: float
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    settings: str = ""  # of methods other than int8

    def _mean(self, name: str) -> float | None:
        """Of one of the layers' figures, each layer counting as many times as it has weights."""
        figures = [(getattr(layer, name), layer.shape[0] * layer.shape[1]) for layer in self.layers]
        if any(figure is None for figure, _ in figures) or not figures:
            return None
        return float(sum(figure * count for figure, count in figures)) / sum(count for _, count in figures)

    @property
    def nominal_bits(self) -> float | None:
        """Per weight of the quantized layers, by the paper's formula; None for int8."""
        return self._mean("nominal_bits")

    @property
    def real_bits(self) -> float | None:
        """Per weight of the quantized layers, everything that is stored for them counted; None for int8."""
        return self._mean("real_bits")

    @property
    def outlier_share(self) -> float | None:
        """Of the weights of the quantized layers; None for int8."""
        return self._mean("outlier_share")

    @property
    def _title(self) -> str:
        return f"{self.method}, {self.settings or f'threshold {self.threshold:g}'}"

    @property
    def bytes_before(self) -> int:
        """Of the quantized layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of the quantized layers."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, totals included, as JSON can hold it."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        if self.nominal_bits is not None:
            totals |= {name: getattr(self, name) for name in ("nominal_bits", "real_bits", "outlier_share")}
        return asdict(self) | totals

    def __str__(self) -> str:
        lines = [f"{self._title}: {len(self.layers)} layers quantized"]
        for layer in self.layers:
            kept = f", {layer.kept_columns} columns kept" if layer.kept_columns else ""
            size = _change(layer.bytes_before, layer.bytes_after)
            figures = "".join(f", {header} {text}" for header, text in _figures(layer) if text)
            lines.append(f"  {layer.name} [{layer.shape[0]}, {layer.shape[1]}]: {size}{kept}{figures}")
        lines += [f"  {name}: left alone, {reason}" for name, reason in self.skipped.items()]
        figures = "".join(f", {header} {text}" for header, text in _figures(self) if text)
        lines.append(f"quantized layers: {_change(self.bytes_before, self.bytes_after)}{figures}")
        lines.append(f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table

        caption = f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}"
        for name, reason in self.skipped.items():
            caption += f"\n{name}: left alone, {reason}"
        table = Table("layer", title=self._title, caption=caption, show_footer=True)
        table.columns[0].footer = f"{len(self.layers)} layers"
        kept = sum(layer.kept_columns for layer in self.layers)
        last = [("kept columns", str(kept))] if self.nominal_bits is None else _figures(self)
        sizes = [("shape", ""), ("before", _size(self.bytes_before)), ("after", _size(self.bytes_after))]
        for header, footer in (*sizes, *last):
            table.add_column(header, footer, justify="right")
        for layer in self.layers:
            before, after = _size(layer.bytes_before), _size(layer.bytes_after)
            figures = [text for _, text in _figures(layer)] or [str(layer.kept_columns)]
            table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", before, after, *figures)
        return table


def _figures(what: LayerReport | Report) -> list[tuple[str, str]]:
    """Heading and text of what int8 does not have; no text where a figure is not known."""
    if what.nominal_bits is None:
        return []
    error = what.error if isinstance(what, LayerReport) else None
    return [
        ("bits by formula", f"{what.nominal_bits:.3f}"),
        ("bits stored", "" if what.real_bits is None else f"{what.real_bits:.3f}"),
        ("outliers", "" if what.outlier_share is None else f"{what.outlier_share:.2%}"),
        ("output error", "" if error is None else f"{error:.3%}"),
    ]


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
) -> Report:
    """Quantize the `torch.nn.Linear` modules of `model`, in place.

    Method "int8" replaces them by `octavo.nn.Int8Linear` (LLM.int8(), 2208.07339) and needs no data. "spqr" (SpQR,
    2306.03078: 2 to 4 bits, and outliers), "gptq" (2210.17323) and "rtn" (round to nearest) make
    `octavo.nn.SpQRLinear` modules. They go block by block, each on what the quantized blocks before make of the
    calibration data; rtn needs none, and only reports errors with it. An error or interruption then leaves the blocks
    before it quantized: load the model anew, and with `resume` go on.

    Only modules whose type is exactly `torch.nn.Linear` are replaced: what a subclass adds would be lost. A module
    that appears under several names is converted once and stays shared. Left alone, and named in the report: layers in
    `skip`, layers whose weight is also used elsewhere (a head tied to its embedding), layers with hooks, for int8
    layers wider than 131071. Weights and settings are checked before anything is changed; then the layers are converted
    one by one, each freed before the next.

    Args:
        model: weights fp32, fp16 or bf16, on any device.
        method: "int8", "spqr", "gptq" or "rtn".
        skip: full dotted names, or last components of names, of layers to leave alone.
        threshold: of int8: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; by default
            6.0, the paper's.
        progress: show a progress bar.
        calibration: batches: tensors, fed as ``model(batch)``, or mappings, as ``model(**batch)``. For int8, of
            `keep_outliers`. For the others also token ids [tokens], or the path of a text, which `tokenizer` reads.
        keep_outliers: run `calibration` through the model and keep the unquantized weights of every column that was an
            outlier column there, next to the int8 ones (the paper's form).
        bits: 2, 3 or 4: by default 3 of spqr, 4 of gptq and rtn. This and all below are of methods other than int8.
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
    of_int8 = {"keep_outliers": keep_outliers, "threshold": threshold is not None}
    if method != "int8":
        if foreign := [name for name, given in of_int8.items() if given]:
            raise ValueError(f"{foreign[0]} is of method int8, not of {method}")
        return _quantize_blocks(model, method, skip, progress, calibration, 128 if samples is None else samples, others)
    if foreign := [name for name, value in others.items() if value is not None and value is not False]:
        raise ValueError(f"method int8 takes no {', '.join(foreign)}")
    threshold = check_threshold(6.0 if threshold is None else threshold)
    if keep_outliers != (calibration is not None):
        given = "keep_outliers=True needs calibration data" if keep_outliers else "calibration needs keep_outliers=True"
        raise ValueError(f"{given}: the outlier columns to keep are found by running it through the model")
    if keep_outliers and threshold == 0.0:
        raise ValueError("keep_outliers=True needs a positive threshold: with threshold 0 there are no outlier columns")
    targets, skipped = _find_targets(model, skip, _MAX_K)
    for target in targets:
        check_weight(target.linear, target.names[0])
    bytes_before = _bytes(model)
    if calibration is not None:
        if isinstance(calibration, str | os.PathLike):
            raise ValueError("calibration of method int8 must be batches, not the path of a text")
        _find_columns_to_keep(model, targets, calibration, threshold)

    layers = []
    with _progress_bar(len(targets), progress) as done:
        targets.reverse()
        while targets:
            target = targets.pop()  # the last reference to the layer, but for the model's
            name, linear = target.names[0], target.linear
            new = Int8Linear.from_linear(linear, threshold, target.keep)
            for alias in target.names:
                model.set_submodule(alias, new)
            shape = (new.out_features, new.in_features)
            layers.append(LayerReport(name, shape, _bytes(linear), _bytes(new), new.kept_columns))
            done(name)
    return Report(method, threshold, layers, skipped, bytes_before, _bytes(model))


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
    targets, skipped = _find_targets(model, skip, None)
    for target in targets:
        check_weight(target.linear, target.names[0])
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
            "the model is itself a Linear; use octavo.nn.Int8Linear.from_linear, or octavo.spqr.quantize_weight"
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


def _size(count: int) -> str:
    for unit, bytes_in_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_in_it:
            return f"{count / bytes_in_it:.2f} {unit}"
    return f"{count} B"


def _change(before: int, after: int) -> str:
    return f"{_size(before)} -> {_size(after)} ({after / before:.1%})" if before else _size(after)
