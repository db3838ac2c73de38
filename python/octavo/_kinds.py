"""What is written about each quantized module beside its tensors, and read again: one class for each method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .nf4 import check_options
from .nn import Int8Linear, NF4Linear, SpQRLinear, check_state, check_threshold
from .nn_nf4 import TENSORS as NF4_TENSORS
from .nn_nf4 import check_nf4_state
from .nn_spqr import SpQROptions, check_spqr_state
from .spqr.weight import TENSORS

Config = Mapping[str, Any]


class Kind(ABC):
    """A method's module. A configuration always has ``in_features``, ``out_features`` and ``bias``.

    Attributes:
        module: its class.
        tensors: every tensor that its state may have.
        keys: of the configuration, with their types.
    """

    module: ClassVar[type[nn.Module]]
    tensors: ClassVar[tuple[str, ...]]
    keys: ClassVar[dict[str, Any]]

    @abstractmethod
    def describe(self, layer: Any) -> dict[str, Any]:
        """The configuration of a module, without what all have."""

    @abstractmethod
    def check_config(self, config: Config) -> None:
        """ValueError unless its numbers can be."""

    @abstractmethod
    def names(self, config: Config) -> set[str]:
        """The tensors that a module so configured has."""

    @abstractmethod
    def check(self, state: Mapping[str, Tensor], config: Config) -> list[str]:
        """What is wrong with the tensors of a module so configured, one line each."""

    @abstractmethod
    def build(self, config: Config, dtype: torch.dtype | None) -> nn.Module:
        """A module on the meta device; dtype is its bias's."""


class Int8Kind(Kind):
    module = Int8Linear
    tensors = ("weight", "weight_scale", "bias", "outlier_slot", "outlier_weight")
    keys: ClassVar[dict[str, Any]] = {"threshold": (int, float), "kept_columns": int}

    def describe(self, layer: Any) -> dict[str, Any]:
        return {"threshold": layer.threshold, "kept_columns": layer.kept_columns}

    def check_config(self, config: Config) -> None:
        check_threshold(config["threshold"])

    def names(self, config: Config) -> set[str]:
        kept = {"outlier_slot", "outlier_weight"} if config["kept_columns"] else set()
        return {"weight", "weight_scale"} | kept | ({"bias"} if config["bias"] else set())

    def check(self, state: Mapping[str, Tensor], config: Config) -> list[str]:
        errors = check_state(state, config["in_features"], config["out_features"])
        if not errors and "outlier_weight" in state and len(state["outlier_weight"]) != config["kept_columns"]:
            errors.append(f"has {len(state['outlier_weight'])} kept columns, not {config['kept_columns']}")
        return errors

    def build(self, config: Config, dtype: torch.dtype | None) -> nn.Module:
        n, k = config["out_features"], config["in_features"]
        return Int8Linear(k, n, config["bias"], config["threshold"], device="meta", dtype=dtype)


class SpQRKind(Kind):
    module = SpQRLinear
    tensors = (*TENSORS, "bias")
    keys: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(SpQROptions._fields, int),
        "bilevel": bool,
        "perm": bool,
        "outliers": int,
    }

    def describe(self, layer: Any) -> dict[str, Any]:
        found = {"bilevel": layer.second_order is not None, "perm": layer.perm is not None}
        return {**layer.options._asdict(), **found, "outliers": layer.outlier_count}

    def _options(self, config: Config) -> SpQROptions:
        return SpQROptions(*(config[name] for name in SpQROptions._fields))

    def check_config(self, config: Config) -> None:
        if min(config["in_features"], config["out_features"]) < 0:
            raise ValueError(f"in_features and out_features are {config['in_features']} and {config['out_features']}")
        self.build(config, None)  # which checks the options

    def names(self, config: Config) -> set[str]:
        optional = {"second_order": "bilevel", "perm": "perm", "bias": "bias"}
        return {name for name in self.tensors if name not in optional or config[optional[name]]}

    def check(self, state: Mapping[str, Tensor], config: Config) -> list[str]:
        errors = check_spqr_state(state, config["in_features"], config["out_features"], self._options(config))
        if not errors and len(state["outliers"]) != config["outliers"]:
            errors.append(f"has {len(state['outliers'])} outliers, not {config['outliers']}")
        return errors

    def build(self, config: Config, dtype: torch.dtype | None) -> nn.Module:
        n, k = config["out_features"], config["in_features"]
        return SpQRLinear(k, n, config["bias"], *self._options(config), device="meta", dtype=dtype)


class NF4Kind(Kind):
    module = NF4Linear
    tensors = (*NF4_TENSORS, "bias")
    keys: ClassVar[dict[str, Any]] = {"quant_type": str, "blocksize": int, "double_quant": bool, "weight_dtype": str}

    def describe(self, layer: Any) -> dict[str, Any]:
        options = {name: getattr(layer, name) for name in ("quant_type", "blocksize", "double_quant")}
        return options | {"weight_dtype": str(layer.weight_dtype).removeprefix("torch.")}

    def check_config(self, config: Config) -> None:
        if min(config["in_features"], config["out_features"]) < 0:
            raise ValueError(f"in_features and out_features are {config['in_features']} and {config['out_features']}")
        check_options(config["quant_type"], config["blocksize"])
        if config["weight_dtype"] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"weight_dtype is {config['weight_dtype']!r}")

    def names(self, config: Config) -> set[str]:
        nested = {"nested_absmax", "offset"} if config["double_quant"] else set()
        return {"weight", "absmax"} | nested | ({"bias"} if config["bias"] else set())

    def check(self, state: Mapping[str, Tensor], config: Config) -> list[str]:
        options = (config["quant_type"], config["blocksize"])
        return check_nf4_state(state, config["in_features"], config["out_features"], *options)

    def build(self, config: Config, dtype: torch.dtype | None) -> nn.Module:
        n, k = config["out_features"], config["in_features"]
        options = (config["quant_type"], config["blocksize"], config["double_quant"])
        layer = NF4Linear(k, n, config["bias"], *options, device="meta", dtype=dtype)
        layer.weight_dtype = getattr(torch, config["weight_dtype"])
        return layer


KINDS: dict[str, Kind] = {"int8": Int8Kind(), "nf4": NF4Kind(), "spqr": SpQRKind()}
MODULES = tuple(kind.module for kind in KINDS.values())


def method_of(module: nn.Module) -> str | None:
    """The method of a quantized module; None for any other."""
    return next((method for method, kind in KINDS.items() if isinstance(module, kind.module)), None)


def configuration(layer: Any) -> dict[str, Any]:
    """What `Kind.build` needs to make a module like `layer`."""
    method = method_of(layer)
    assert method is not None
    common = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    return common | KINDS[method].describe(layer)
