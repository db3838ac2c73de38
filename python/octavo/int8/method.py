"""The method "int8": LLM.int8() for whole models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.checks import MAX_K
from ..core.method import Method, MethodSettings, Showcase, Trial, option, register
from ..core.progress import progress_bar
from ..core.report import LayerReport
from ..core.targets import Target, replace_each
from . import ops
from .linear import Int8Linear, check_threshold


@register("int8")
class Int8(Method):
    """LLM.int8() (arXiv 2208.07339): int8 weights and activations, outlier columns of the activations in 16 bit.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> report = octavo.quantize_model(model, "int8", threshold=4.0, progress=False)
        >>> type(model[0]).__name__, report.threshold
        ('Int8Linear', 4.0)
    """

    title = "LLM.int8(), arXiv 2208.07339"
    layer = Int8Linear
    widest = MAX_K
    in_stream = True

    @dataclass(frozen=True)
    class Settings(MethodSettings):
        """Settings of int8.

        Attributes:
            threshold: 0 or positive: |x| from which an activation's column is multiplied in 16 bit; the paper's is 6.0.
            keep_outliers: keep, beside the int8 ones, the unquantized weights of every column that was an outlier
                column when the calibration data ran through the model (the paper's form).
        """

        threshold: float = option(
            6.0,
            "|x| from which an activation's column is multiplied in 16 bit; 0: never; lower: more accurate, slower",
            metavar="X",
        )
        keep_outliers: bool = option(False, "keep the weights of outlier columns, found by calibration", command=None)

        def check(self) -> None:
            object.__setattr__(self, "threshold", check_threshold(self.threshold))

        def describe(self) -> str:
            return f"threshold {self.threshold:g}"

    showcase: ClassVar[tuple[Showcase, ...]] = (
        Showcase("int8, threshold 0", {"threshold": 0.0}, "every column in int8"),
        Showcase("int8, threshold 6", {"threshold": 6.0}, "LLM.int8()"),
        Showcase("int8, threshold 2", {"threshold": 2.0}, "most accurate"),
    )

    def check_calibration(self, settings: Settings, calibration: Any) -> None:
        if isinstance(calibration, str | os.PathLike):
            raise ValueError("calibration of method int8 must be batches, not the path of a text")
        keep = settings.keep_outliers
        if keep != (calibration is not None):
            given = "keep_outliers=True needs calibration data" if keep else "calibration needs keep_outliers=True"
            raise ValueError(f"{given}: the outlier columns to keep are found by running it through the model")
        if keep and settings.threshold == 0.0:
            raise ValueError(
                "keep_outliers=True needs a positive threshold: with threshold 0 there are no outlier columns"
            )

    def quantize(
        self, model: nn.Module, targets: list[Target], settings: Settings, calibration: Any, progress: bool
    ) -> tuple[list[LayerReport], dict[str, str]]:
        kept: dict[nn.Module, Tensor] = {}
        if calibration is not None:
            kept = _outlier_columns(model, [target.linear for target in targets], calibration, settings.threshold)

        def convert(target: Target) -> Int8Linear:
            return self.quantize_linear(target.linear, settings, kept.pop(target.linear, None))

        with progress_bar("quantizing", len(targets), progress) as done:
            return replace_each(model, targets, done, convert), {}

    def quantize_linear(self, linear: nn.Linear, settings: Settings, kept: Tensor | None = None) -> Int8Linear:
        return Int8Linear.from_linear(linear, settings.threshold, kept)

    def quantize_stored(self, weight: Tensor, settings: Settings) -> dict[str, Tensor]:
        codes, scale = ops.quantize_rowwise(weight)  # a row with a NaN or Inf gets the scale NaN
        return {"weight": codes, "weight_scale": scale}

    def layout_of_all(self) -> tuple[str, ...]:
        return ()  # the threshold is no property of the tensors: a checkpoint's is the one that its layers get

    def trial(self) -> Trial:
        plain = super().trial()
        return Trial(plain.model, plain.inputs, bound=0.03)


def _outlier_columns(
    model: nn.Module, layers: list[nn.Linear], calibration: Iterable[Any], threshold: float
) -> dict[nn.Module, Tensor]:
    """The columns of each layer's input that are outlier columns in any batch."""
    is_outlier: dict[nn.Module, Tensor] = {
        linear: torch.zeros(linear.in_features, dtype=torch.bool) for linear in layers
    }

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        columns, count = ops.find_outlier_columns(x.detach(), threshold)
        is_outlier[module][columns[: int(count)].long().cpu()] = True

    training = {module: module.training for module in model.modules()}
    handles = [linear.register_forward_pre_hook(watch, with_kwargs=True) for linear in layers]
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
    return {linear: found.nonzero().flatten() for linear, found in is_outlier.items()}
