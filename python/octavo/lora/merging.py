"""Merging a LoRA adapter into the weights of a whole model, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.bridges import layers_changed
from .adapters import list_adapters
from .layers import adapted_layers, linear_layers, unwrapped
from .linear import LoRALinear, MergedLayer


@dataclass(frozen=True)
class MergeReport:
    """The errors that `merge_adapter` caused, layer by layer; see `octavo.lora.linear.MergedLayer`.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> report = octavo.merge_adapter(model)
        >>> report.adapter, [layer.name for layer in report.layers]
        ('default', ['0'])
    """

    adapter: str
    layers: list[MergedLayer]

    @property
    def error(self) -> float:
        """The largest relative error of a layer's merged matrix."""
        return max(layer.error for layer in self.layers)

    @property
    def delta_error(self) -> float:
        """The largest error of a layer beside the norm of what the adapter changes there."""
        return max(layer.delta_error for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{layer.name:{width}}  {layer.method or 'linear':6}  error {layer.error:8.2e} of the matrix, "
            f"{layer.delta_error:8.2e} of the adapter's change"
            for layer in self.layers
        ]
        return "\n".join((f"adapter {self.adapter!r} merged into {len(self.layers)} layers", *lines))


def merge_adapter(
    model: nn.Module, requantize: bool = False, *, dtype: torch.dtype | None = None, keep: bool = True
) -> MergeReport:
    """Compute by the merged weights ``W + s * B @ A`` of the active adapter, in all layers that have it.

    Args:
        model: with an active adapter.
        requantize: False: merged layers are `torch.nn.Linear`, with the exact sum rounded once. True: they are
            quantized again as their base is, which can lose much of a small change: read the report.
        dtype: of `torch.nn.Linear` layers that take the place of quantized ones; None for that of the model's first
            float parameter outside of its linear layers.
        keep: keep bases and adapters beside the merged layers, for `unmerge_adapter`. False: the merged layers replace
            them for good, and the model is one without adapters, to save or to quantize.

    Returns:
        `MergeReport`: the errors, layer by layer.

    Raises:
        ValueError, RuntimeError: as of `octavo.nn.LoRALinear.merge`; the layer is named. Nothing is changed then.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> report = octavo.merge_adapter(model)
        >>> model[0].is_merged, report.adapter, len(report.layers)
        (True, 'default', 1)
    """
    model = unwrapped(model)
    layers = {layer: names for layer, names in adapted_layers(model).items() if layer.active_adapter is not None}
    if not layers:
        raise ValueError(f"no adapter is active; known: {', '.join(list_adapters(model))}")
    dtype = dtype or float_dtype(model)
    made: dict[LoRALinear, nn.Module] = {}
    reports = []
    for layer, names in layers.items():
        try:
            made[layer], report = layer.make_merged(requantize, None if type(layer.base_layer) is nn.Linear else dtype)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        reports.append(replace(report, name=names[0]))
    for layer, merged in made.items():
        if keep:
            layer.put_merged(merged)
        else:
            for name in layers[layer]:
                model.set_submodule(name, merged)
    if not keep:
        for name, layer in list(model.named_modules(remove_duplicate=False)):  # the active adapter is not in all
            if isinstance(layer, LoRALinear):
                model.set_submodule(name, layer.base_layer)
        layers_changed(model)
    return MergeReport(reports[0].adapter, reports)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`: bases and adapters are what they were, to the bit. RuntimeError if nothing is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> report = octavo.merge_adapter(model)
        >>> octavo.unmerge_adapter(model)
        >>> model[0].is_merged
        False
    """
    merged = [layer for layer in adapted_layers(unwrapped(model)) if layer.is_merged]
    if not merged:
        raise RuntimeError("no adapter is merged")
    for layer in merged:
        layer.unmerge()


def float_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that the model computes in: that of its first float parameter outside the linear layers."""
    linear = {id(p) for layer in linear_layers(model) for p in layer.parameters()}
    return next((p.dtype for p in model.parameters() if id(p) not in linear and p.dtype.is_floating_point), None)
