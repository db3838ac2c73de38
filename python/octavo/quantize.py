"""`quantize_model`: the Linear layers of a model, in place, to low-bit modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .nn import Int8Linear, check_threshold, check_weight

if TYPE_CHECKING:
    from rich.table import Table

METHODS = ("int8",)
_MAX_K = 131071  # csrc/int8/gemm.h: beyond it a sum of int8 products can leave int32


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: shape is [out_features, in_features]; bytes count weight, scales, bias, kept columns."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    kept_columns: int = 0


@dataclass(frozen=True)
class Report:
    """What `quantize_model` did. `skipped` maps the names of Linear layers that were left alone to the reason."""

    method: str
    threshold: float
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

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
        return asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def __str__(self) -> str:
        lines = [f"{self.method}, threshold {self.threshold:g}: {len(self.layers)} layers quantized"]
        for layer in self.layers:
            kept = f", {layer.kept_columns} columns kept" if layer.kept_columns else ""
            size = _change(layer.bytes_before, layer.bytes_after)
            lines.append(f"  {layer.name} [{layer.shape[0]}, {layer.shape[1]}]: {size}{kept}")
        lines += [f"  {name}: left alone, {reason}" for name, reason in self.skipped.items()]
        lines.append(f"quantized layers: {_change(self.bytes_before, self.bytes_after)}")
        lines.append(f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table

        caption = f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}"
        for name, reason in self.skipped.items():
            caption += f"\n{name}: left alone, {reason}"
        table = Table("layer", title=f"{self.method}, threshold {self.threshold:g}", caption=caption, show_footer=True)
        table.columns[0].footer = f"{len(self.layers)} layers"
        kept = sum(layer.kept_columns for layer in self.layers)
        for header, footer in (
            ("shape", ""),
            ("before", _size(self.bytes_before)),
            ("after", _size(self.bytes_after)),
            ("kept columns", str(kept)),
        ):
            table.add_column(header, footer, justify="right")
        for layer in self.layers:
            before, after = _size(layer.bytes_before), _size(layer.bytes_after)
            table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", before, after, str(layer.kept_columns))
        return table


@dataclass
class _Target:
    names: list[str]  # a shared module has several
    linear: nn.Linear
    keep: Tensor | None = None


def quantize_model(
    model: nn.Module,
    method: str = "int8",
    skip: Sequence[str] = ("lm_head",),
    threshold: float = 6.0,
    progress: bool = True,
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    keep_outliers: bool = False,
) -> Report:
    """Replace the `torch.nn.Linear` modules of `model` by `octavo.nn.Int8Linear`, in place (LLM.int8(), 2208.07339).

    Only modules whose type is exactly `torch.nn.Linear` are replaced: what a subclass adds would be lost. A module
    that appears under several names is converted once and stays shared. Left alone, and named in the report: layers in
    `skip`, layers whose weight is also used elsewhere (a head tied to its embedding), layers with hooks, layers wider
    than 131071. Everything is checked before anything is changed; then the layers are converted one by one, each
    freed before the next.

    Args:
        model: weights fp32, fp16 or bf16, on any device.
        method: "int8".
        skip: full dotted names, or last components of names, of layers to leave alone.
        threshold: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; 6.0 in the paper.
        progress: show a progress bar.
        calibration: batches for `keep_outliers`: tensors, fed as ``model(batch)``, or mappings, as ``model(**batch)``.
        keep_outliers: run `calibration` through the model and keep the unquantized weights of every column that was an
            outlier column there, next to the int8 ones (the paper's form).

    Returns:
        A `Report`: bytes before and after, per layer and in total.

    Raises:
        ValueError: an unknown method, a bad threshold, NaN or Inf weights or weights of another dtype (the layer is
            named), no layer to convert, `keep_outliers` without calibration data or with threshold 0.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    threshold = check_threshold(threshold)
    if keep_outliers != (calibration is not None):
        given = "keep_outliers=True needs calibration data" if keep_outliers else "calibration needs keep_outliers=True"
        raise ValueError(f"{given}: the outlier columns to keep are found by running it through the model")
    if keep_outliers and threshold == 0.0:
        raise ValueError("keep_outliers=True needs a positive threshold: with threshold 0 there are no outlier columns")
    targets, skipped = _find_targets(model, (skip,) if isinstance(skip, str) else tuple(skip))
    for target in targets:
        check_weight(target.linear, target.names[0])
    bytes_before = _bytes(model)
    if calibration is not None:
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


def _find_targets(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[_Target], dict[str, str]]:
    if type(model) is nn.Linear:
        raise ValueError("the model is itself a Linear; use octavo.nn.Int8Linear.from_linear")
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
        elif module.in_features > _MAX_K:
            skipped[names[0]] = f"in_features {module.in_features} is more than {_MAX_K}"
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
    calibration: Iterable[Tensor | Mapping[str, Any]],
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
