"""What a checkpoint of transformers holds, by the names that its tensors will have in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..core.method import is_unquantized, layer_class, methods, stored_methods
from ..core.targets import linears_of

SAFETENSORS_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
Headers = Mapping[str, tuple[str, list[int]]]  # tensor name -> safetensors dtype, shape


def read_headers(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of the tensors of safetensors or pickled files; no tensor is read.

    Raises:
        ValueError: a safetensors file that is not whole.
    """
    headers: dict[str, tuple[str, list[int]]] = {}
    for path in map(str, files):
        if path.endswith((".bin", ".pt", ".pth")):
            found = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
            headers |= {n: (names.get(t.dtype, ""), list(t.shape)) for n, t in found.items() if isinstance(t, Tensor)}
            continue
        if path.endswith(".gguf"):
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    entry = file.get_slice(name)
                    headers[name] = (entry.get_dtype(), entry.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return headers


class Stored:
    """The tensors of a checkpoint as transformers will name them in `model`, whose layers are not replaced yet.

    Attributes:
        headers: by the names in the checkpoint; empty where nothing is known of it.
        tensors: by the names in the model.
        markers: patterns of tensors that say only that a layer is quantized.
    """

    def __init__(self, model: Any, headers: Headers) -> None:
        self.model, self.headers = model, headers
        self.markers: list[str] = []
        wanted = dict.fromkeys(model.state_dict(), True)
        for names in linears_of(model)[0].values():
            wanted |= dict.fromkeys((f"{name}.{leaf}" for name in names for leaf in _leaves()), True)
        self.tensors: dict[str, tuple[str, list[int]]] = {}
        self._converted: set[str] = set()  # made of several tensors, or parts of one
        renamings, converters = conversions(model)
        for key, entry in headers.items():
            prefix = model.base_model_prefix
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if pattern is None:
                self.tensors[name] = entry
            else:
                converter = next(c for c in converters if pattern in c.source_patterns)
                targets = converter.target_patterns
                self._converted |= {name.replace(targets[0], target) for target in targets}

    def has_weight(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the layer's float weight is there, as far as that is known, in this shape."""
        if not self.headers:
            return True
        found = self.tensors.get(f"{name}.weight")
        return f"{name}.weight" in self._converted if found is None else tuple(found[1]) == shape

    def state(self, name: str, leaves: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of a layer as the checkpoint has them, without their values."""
        return {leaf: tensor for leaf, tensor in state_of_headers(name, self.tensors).items() if leaf in leaves}

    def method_of(self, name: str, config: Any) -> str | None:
        """`recognized_method`, which remembers tensors that are only to mark a layer."""
        state = state_of_headers(name, self.tensors)
        method = recognized_method(name, state, config)
        if method is not None and layer_class(method).key != "weight" and "weight" in state:
            self.markers.append(f"{re.escape(name)}\\.weight$")
        return method


def _leaves() -> set[str]:
    return {leaf for layer in stored_methods().values() for leaf in (*layer.tensors, "weight", "bias")}


def state_of_headers(name: str, headers: Headers) -> dict[str, Tensor]:
    """All tensors that any method's layer of this name may have, without their values."""
    state = {}
    for leaf in _leaves():
        dtype, shape = headers.get(f"{name}.{leaf}", ("", []))
        if dtype:
            state[leaf] = torch.empty(shape, dtype=SAFETENSORS_DTYPES.get(dtype, torch.float64), device="meta")
    return state


def recognized_method(name: str, state: Mapping[str, Tensor], config: Any) -> str | None:
    """The method whose layer these tensors are: the checkpoint's own, or another; None for an unquantized one.

    Raises:
        ValueError: some of a layer's tensors are there without its codes.
    """
    dtypes = {leaf: tensor.dtype for leaf, tensor in state.items()}
    own: list[str] = [] if is_unquantized(config.method) else [config.method, *methods()[config.method].beside]
    for method in dict.fromkeys((*own, *stored_methods())):
        if layer_class(method).recognizes(dtypes):
            return method
    if own and not state.keys() <= {"weight", "bias"}:
        layer = layer_class(own[0])
        if layer.key not in state:
            raise ValueError(f"{name}: the checkpoint has no {name}.{layer.key}, but other tensors of it")
        dtype = str(dtypes[layer.key]).removeprefix("torch.")
        raise ValueError(f"{name}: {name}.{layer.key} is {dtype}, which codes of {own[0]} are not")
    return None


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """How transformers renames the tensors of files, and makes them of others, for this model."""
    found = get_model_conversion_mapping(model)
    renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in found if isinstance(entry, WeightConverter)]


def keep_whole(model: Any, names: Iterable[str]) -> None:
    """Have ``save_pretrained`` write these layers by their own names, neither cut nor joined."""
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = [c for c in get_model_conversion_mapping(model, add_legacy=False) if "Prefix" not in type(c).__name__]
    keys = [f"{name}.weight" for name in names]
    cut = [
        entry
        for entry in found
        if isinstance(entry, WeightConverter)
        and any(entry.reverse_transform().rename_source_key(key)[1] is not None for key in keys)
    ]
    if cut:
        model._weight_conversions = [entry for entry in found if entry not in cut]
