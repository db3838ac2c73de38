"""The methods "spqr", "gptq" and "rtn": weights in 2 to 4 bits, calibrated, for whole models."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.calibration import prepare
from ..core.checks import module_bytes
from ..core.linears import is_stored_transposed
from ..core.method import Method, MethodSettings, Showcase, Trial, option, register
from ..core.progress import progress_bar
from ..core.report import LayerReport
from ..core.targets import Target, put, report_of
from .engine.blocks import quantize_layers
from .engine.codes import SpQRCodes
from .engine.config import SpQRConfig
from .engine.store import Store, fingerprint
from .linear import SpQRLinear, SpQROptions
from .weight import SpQRWeight

_SAMPLES = 128


@dataclass(frozen=True)
class _Settings(MethodSettings, ABC):
    """Settings that spqr, gptq and rtn have alike.

    Attributes:
        bits: of a code: 2, 3 or 4.
        group_size: columns that share a scale: 16, 32 or 64.
        config: an `octavo.spqr.SpQRConfig` with all settings, in place of these.
        samples: sequences of the calibration data to use, at most: by default 128.
        context: tokens of a sequence; by default 2048, or the model's own limit, of a text, and all of other data.
        tokenizer: the model's, for a text.
        resume: a directory for finished layers, made if it is not there. With the same model, data and settings, those
            in it are not quantized again. With another number of threads torch's products, and so the codes of later
            layers, differ in the last places.
        simulate: keep `torch.nn.Linear` modules, with the weights that the quantized ones stand for.
    """

    bits: int | None = option(None, "bits of a code", least=2, most=4, metavar="N", shown="spqr: 3, else 4")
    group_size: int | None = option(
        None, "columns that share a scale: 16, 32 or 64", metavar="N", shown="spqr: 16, else 64"
    )
    config: SpQRConfig | None = option(None, "all settings of the quantizer", command=None)
    samples: int | None = option(None, "sequences to calibrate on, at most", least=1, metavar="N", shown="128")
    context: int | None = option(
        None, "tokens of each sequence", least=2, metavar="N", shown="2048 or the model's limit"
    )
    tokenizer: Any = option(None, "reads a text", command=None)
    resume: str | os.PathLike[str] | None = option(
        None, "keep finished layers here, and go on from them", metavar="DIR"
    )
    simulate: bool = option(False, "keep torch.nn.Linear modules", command=None)

    @abstractmethod
    def preset(self, **given: Any) -> SpQRConfig:
        """The quantizer's settings where `config` is None."""

    def chosen(self) -> dict[str, Any]:
        """The given ones of those that `config` replaces."""
        names = ("bits", "group_size", "tau", "outlier_fraction")
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}

    def check(self) -> None:
        given = self.chosen()
        if self.config is not None:
            if given:
                raise ValueError(f"config holds all settings: give {', '.join(given)} in it, or no config")
            if not isinstance(self.config, SpQRConfig):
                raise ValueError(f"config must be a SpQRConfig, got {type(self.config).__name__}")
        if "tau" in given and "outlier_fraction" in given:
            raise ValueError("give tau or outlier_fraction, not both")
        config = self.quantizer()
        if config.group_size > 64 and not self.simulate:
            raise ValueError(
                f"group_size {config.group_size} has no packed form: 16, 32 and 64 have, or give simulate=True"
            )

    def quantizer(self) -> SpQRConfig:
        """The configuration that the quantizer gets."""
        return self.config or self.preset(**self.chosen())

    def describe(self) -> str:
        return str(self.quantizer())

    def to_dict(self) -> dict[str, Any]:
        more = {"samples": self.samples, "context": self.context, "simulate": self.simulate}
        found = {**self.quantizer().to_dict(), **more}
        return {name: None if value == math.inf else value for name, value in found.items()}  # JSON has no inf


class _Calibrated(Method):
    """The base of spqr, gptq and rtn, which all go through the model block by block."""

    layer = SpQRLinear
    stored = "spqr"
    beside = ("int8",)

    def check_calibration(self, settings: Any, calibration: Any) -> None:
        if calibration is None and settings.quantizer().propagate:
            raise ValueError(
                f"method {self.name} needs calibration data: a text of a few hundred kilobytes or more, or batches"
            )
        idle = [name for name in ("samples", "context") if getattr(settings, name) is not None]
        if calibration is None and idle:
            raise ValueError(f"{', '.join(idle)} without calibration data")

    def quantize_linear(self, linear: nn.Linear, settings: Any, kept: Any = None) -> SpQRLinear:
        raise ValueError(f"{self.name} goes through whole models: use octavo.spqr.quantize_weight for one weight")

    def quantize(
        self, model: nn.Module, targets: list[Target], settings: Any, calibration: Any, progress: bool
    ) -> tuple[list[LayerReport], dict[str, str]]:
        config = settings.quantizer()
        unfit = [target for target in targets if target.linear.in_features % config.group_size]
        if len(unfit) == len(targets):
            first = ", ".join(f"{target.names[0]} ({target.linear.in_features})" for target in unfit[:4])
            more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
            raise ValueError(
                f"group_size {config.group_size} does not divide the in_features of {first}{more}: give another"
            )
        undivided = f"group_size {config.group_size} does not divide its in_features"
        left = {target.names[0]: f"{undivided} {target.linear.in_features}" for target in unfit}
        targets = [target for target in targets if target not in unfit]
        batches = None
        if calibration is not None:
            samples = _SAMPLES if settings.samples is None else settings.samples
            batches = prepare(calibration, samples, settings.context, settings.tokenizer, model)
        store = None
        if settings.resume is not None:
            store = Store(settings.resume, fingerprint(model, config, batches))
        names = {target.linear: target.names for target in targets}
        layers: list[LayerReport] = []
        with progress_bar("quantizing", len(targets), progress) as done:

            def measured(linear: nn.Linear, codes: SpQRCodes) -> None:
                share = f", {codes.outlier_share:.2%} outliers" if config.has_outliers else ""
                error = "" if math.isnan(codes.error) else f", error {codes.error:.2%}"  # known with data only
                done(f"{names[linear][0]}: {codes.nominal_bits:.2f} bits{share}{error}")

            def finished(linear: nn.Linear, codes: SpQRCodes) -> None:
                layers.append(_replace(model, names[linear], linear, codes, settings.simulate))

            calls = {linear: aliases[0] for linear, aliases in names.items()}
            skipped = quantize_layers(model, calls, config, batches, store, measured, finished)
        order = {target.names[0]: i for i, target in enumerate(targets)}
        layers.sort(key=lambda layer: order[layer.name])
        return layers, left | skipped

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def layout_defaults(self) -> dict[str, Any]:
        return SpQROptions()._asdict()

    def check_layout(self, layout: Mapping[str, Any]) -> dict[str, Any]:
        options = SpQROptions(**layout)
        options.check()
        return options._asdict()

    def layout(self, settings: Any) -> dict[str, Any]:
        config = settings.quantizer()
        return {name: getattr(config, name) for name in SpQROptions._fields}

    def settings_of(self, description: str) -> dict[str, Any] | None:
        return None  # an adapter's file does not say with which settings and data

    def trial(self) -> Trial:
        plain = super().trial()

        def batches() -> list[Tensor]:
            generator = torch.Generator().manual_seed(2)
            return [torch.randn(64, 64, generator=generator) for _ in range(4)]

        return Trial(plain.model, plain.inputs, {"bits": 4, "group_size": 16}, batches, bound=0.2)


def _replace(model: nn.Module, names: list[str], linear: nn.Linear, codes: SpQRCodes, simulate: bool) -> LayerReport:
    before = module_bytes(linear)
    error = None if math.isnan(codes.error) else codes.error
    if simulate:
        figures = {"nominal_bits": codes.nominal_bits, "real_bits": _stored_bits(codes)}
        figures["outlier_share"] = codes.outlier_share
        return LayerReport(names[0], (codes.n, codes.k), before, before, {**figures, "error": error})
    packed = SpQRWeight.pack(codes).to(linear.weight.device)
    new = SpQRLinear.from_weight(packed, linear.bias, linear.weight.dtype)
    new._octavo_transposed = is_stored_transposed(linear)
    put(model, names, new)
    return report_of(names[0], new, before, error=error)


def _stored_bits(codes: SpQRCodes) -> float:
    """Bits per weight of the packed form, from the shapes of its tensors alone."""
    tensors = {name: value.to("meta") for name, value in vars(codes).items() if isinstance(value, Tensor)}
    return SpQRWeight.pack(replace(codes, **tensors)).real_bits  # type: ignore[arg-type]


@register("spqr")
class SpQR(_Calibrated):
    """SpQR (arXiv 2306.03078): 2 to 4 bits with quantized statistics, and about 1 % of the weights as outliers.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> data = [torch.randn(256, 64)]
        >>> report = octavo.quantize_model(model, "spqr", bits=4, calibration=data, progress=False)
        >>> type(model[0]).__name__
        'SpQRLinear'
    """

    title = "SpQR, arXiv 2306.03078, 2 to 4 bits"
    needs_calibration = True

    @dataclass(frozen=True)
    class Settings(_Settings):
        __doc__ = (
            (_Settings.__doc__ or "")
            + """
        tau: relative threshold of outliers, 0.2 by default; the lower, the more.
        outlier_fraction: in place of tau: the share of each layer's weights to keep as outliers.
    """
        )

        tau: float | None = option(None, "outlier threshold; the lower, the more", least=0.0, metavar="X", shown="0.2")
        outlier_fraction: float | None = option(
            None, "the share of outliers, in place of tau", least=0.0, most=0.5, command="outliers", metavar="X"
        )

        def preset(self, **given: Any) -> SpQRConfig:
            return SpQRConfig(**given)

    showcase: ClassVar[tuple[Showcase, ...]] = (Showcase("SpQR, 3 bits", {"bits": 3, "group_size": 16}),)


@register("gptq")
class GPTQ(_Calibrated):
    """GPTQ (arXiv 2210.17323): SpQR's loop with fp16 statistics and no outliers.

    Example:
        >>> from octavo.core.method import find_method
        >>> method, settings = find_method("gptq", {"bits": 3})
        >>> method.settings(settings).describe()
        '3 bits, groups of 64, fp16 statistics, no outliers'
    """

    title = "GPTQ, arXiv 2210.17323"
    needs_calibration = True

    @dataclass(frozen=True)
    class Settings(_Settings):
        __doc__ = _Settings.__doc__

        def preset(self, **given: Any) -> SpQRConfig:
            return SpQRConfig.gptq(**given)


@register("rtn")
class RTN(_Calibrated):
    """Round to nearest: every group on its own, by its minimum and maximum; calibration data only measures errors.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> octavo.quantize_model(model, "rtn", progress=False).description
        '4 bits, groups of 64, fp16 statistics, no outliers'
    """

    title = "round to nearest, the baseline of both"

    @dataclass(frozen=True)
    class Settings(_Settings):
        __doc__ = _Settings.__doc__

        def preset(self, **given: Any) -> SpQRConfig:
            return SpQRConfig.rtn(**given)

    showcase: ClassVar[tuple[Showcase, ...]] = (
        Showcase(
            "RTN, 3 bits", {"bits": 3, "group_size": 16}, "round to nearest, groups of 16: what SpQR is up against"
        ),
    )
