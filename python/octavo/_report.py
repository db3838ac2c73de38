"""What `quantize_model` gives back: a `Report`, of one `LayerReport` for each layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: shape is [out_features, in_features]; bytes count weight, scales, bias, kept columns.

    Of methods other than int8, besides: `nominal_bits` per weight by the paper's formula and `real_bits` as stored; of
    those with calibration data also the `outlier_share` of weights, and the relative `error` of the layer's output on
    the calibration inputs.
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
        """Of the weights of the quantized layers; None for int8 and nf4."""
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
        totals: dict[str, Any] = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        names = ("nominal_bits", "real_bits", "outlier_share")
        totals |= {name: value for name in names if (value := getattr(self, name)) is not None}
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
    bits = [
        ("bits by formula", f"{what.nominal_bits:.3f}"),
        ("bits stored", "" if what.real_bits is None else f"{what.real_bits:.3f}"),
    ]
    if what.outlier_share is None:  # nf4: no outliers, no calibration inputs
        return bits
    error = what.error if isinstance(what, LayerReport) else None
    return [
        *bits,
        ("outliers", f"{what.outlier_share:.2%}"),
        ("output error", "" if error is None else f"{error:.3%}"),
    ]


def _size(count: int) -> str:
    for unit, bytes_in_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_in_it:
            return f"{count / bytes_in_it:.2f} {unit}"
    return f"{count} B"


def _change(before: int, after: int) -> str:
    return f"{_size(before)} -> {_size(after)} ({after / before:.1%})" if before else _size(after)
