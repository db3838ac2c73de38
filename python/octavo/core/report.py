"""`quantize_model` returns a `Report`, which holds one `LayerReport` for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Figure(NamedTuple):
    """How a figure of layers is shown: its heading, one value as text, and whether the total is a sum or a mean."""

    heading: str
    text: Callable[[Any], str]
    sums: bool = False


# Figures that methods have of their layers. Others are shown by their names.
FIGURES: dict[str, Figure] = {
    "kept_columns": Figure("kept columns", str, True),
    "nominal_bits": Figure("bits by formula", "{:.3f}".format),
    "real_bits": Figure("bits stored", "{:.3f}".format),
    "outlier_share": Figure("outliers", "{:.2%}".format),
    "error": Figure("output error", "{:.3%}".format),
}


def _figure(name: str) -> Figure:
    return FIGURES.get(name) or Figure(name.replace("_", " "), "{:g}".format)


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. Its method's own figures are attributes, too.

    Attributes:
        name: its full name.
        shape: [out_features, in_features].
        bytes_before, bytes_after: of weight, scales, bias and whatever else is stored.
        figures: what the method has to say. int8: ``kept_columns``. Others: ``nominal_bits`` per weight by the paper's
            formula and ``real_bits`` as stored; of SpQR also the ``outlier_share`` of weights, and with calibration
            data the relative ``error`` of the layer's output on it.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        figures = self.__dict__.get("figures", {})
        if name in figures:
            return figures[name]
        if name in FIGURES:  # another method's: there is none
            return 0 if FIGURES[name].sums else None
        raise AttributeError(f"the report of a layer has no {name}; it has {', '.join(figures) or 'no figures'}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {"name": self.name, "shape": list(self.shape), **sizes, **self.figures}


@dataclass(frozen=True)
class Report:
    """The record of what `quantize_model` did. The method's settings are attributes, too.

    Attributes:
        method: its name.
        settings: its settings.
        description: these in one line.
        layers: the quantized ones, in the model's order.
        skipped: names of `torch.nn.Linear` layers that were left alone, to the reason.
        model_bytes_before, model_bytes_after: of the whole model.
    """

    method: str
    settings: Mapping[str, Any]
    description: str
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        raise AttributeError(f"a report of {self.__dict__.get('method')} has no {name}")

    def _mean(self, name: str) -> float | None:
        """The mean of one of the layers' figures, each layer counting as many times as it has weights."""
        total, weights = 0.0, 0
        for layer in self.layers:
            if (figure := layer.figures.get(name)) is None:
                return None
            count = layer.shape[0] * layer.shape[1]
            total, weights = total + float(figure) * count, weights + count
        return total / weights if self.layers else None

    @property
    def nominal_bits(self) -> float | None:
        """Bits per weight of the quantized layers, by the paper's formula; None where the method has no such figure."""
        return self._mean("nominal_bits")

    @property
    def real_bits(self) -> float | None:
        """Bits per weight of the quantized layers, everything that is stored for them counted; None likewise."""
        return self._mean("real_bits")

    @property
    def outlier_share(self) -> float | None:
        """The share of outliers among the weights of the quantized layers; None likewise."""
        return self._mean("outlier_share")

    @property
    def bytes_before(self) -> int:
        """The bytes of the quantized layers, before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The bytes of the quantized layers, after."""
        return sum(layer.bytes_after for layer in self.layers)

    def _totals(self) -> list[tuple[str, str]]:
        """Heading and text of each figure, over all layers; no text where a figure is not known."""
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.figures))
        totals = []
        for name in names:
            figure = _figure(name)
            value = sum(layer.figures.get(name, 0) for layer in self.layers) if figure.sums else self._mean(name)
            # An error is of one layer's output: a mean over layers would say nothing.
            totals.append((figure.heading, "" if value is None or name == "error" else figure.text(value)))
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Everything, totals included, as JSON can hold it."""
        totals: dict[str, Any] = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        names = ("nominal_bits", "real_bits", "outlier_share")
        totals |= {name: value for name in names if (value := getattr(self, name)) is not None}
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "description": self.description,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": dict(self.skipped),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            **totals,
        }

    def __str__(self) -> str:
        lines = [f"{self.method}, {self.description}: {len(self.layers)} layers quantized"]
        for layer in self.layers:
            size = _change(layer.bytes_before, layer.bytes_after)
            texts = [(_figure(name), value) for name, value in layer.figures.items() if value is not None]
            figures = "".join(f", {f.heading} {f.text(value)}" for f, value in texts if value or not f.sums)
            lines.append(f"  {layer.name} [{layer.shape[0]}, {layer.shape[1]}]: {size}{figures}")
        lines += [f"  {name}: left alone, {reason}" for name, reason in self.skipped.items()]
        figures = "".join(f", {heading} {text}" for heading, text in self._totals() if text not in ("", "0"))
        lines.append(f"quantized layers: {_change(self.bytes_before, self.bytes_after)}{figures}")
        lines.append(f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table

        caption = f"whole model: {_change(self.model_bytes_before, self.model_bytes_after)}"
        for name, reason in self.skipped.items():
            caption += f"\n{name}: left alone, {reason}"
        title = f"{self.method}, {self.description}"
        table = Table("layer", title=title, caption=caption, show_footer=True)
        table.columns[0].footer = f"{len(self.layers)} layers"
        sizes = [("shape", ""), ("before", _size(self.bytes_before)), ("after", _size(self.bytes_after))]
        for heading, footer in (*sizes, *self._totals()):
            table.add_column(heading, footer, justify="right")
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.figures))
        for layer in self.layers:
            before, after = _size(layer.bytes_before), _size(layer.bytes_after)
            values = [(_figure(name), layer.figures.get(name)) for name in names]
            texts = ("" if value is None else figure.text(value) for figure, value in values)
            table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", before, after, *texts)
        return table


def _size(count: int) -> str:
    for unit, bytes_in_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_in_it:
            return f"{count / bytes_in_it:.2f} {unit}"
    return f"{count} B"


def _change(before: int, after: int) -> str:
    return f"{_size(before)} -> {_size(after)} ({after / before:.1%})" if before else _size(after)
