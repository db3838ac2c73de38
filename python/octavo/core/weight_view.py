"""`WeightView`: a low-bit layer's ``weight``, for code that reads it past the layer's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class WeightView(Tensor):
    """What ``layer.weight`` is of a low-bit layer: [n, k] in the layer's `compute_dtype`, dequantized when it is used.

    Asking for its dtype, device or shape costs nothing; an operation on it sees the weight that the layer multiplies
    by, which is not kept. It is for reading only: what is written into it would be lost, and raises.

    Raises:
        RuntimeError: it is written to, or made to require a gradient.

    Example:
        >>> import octavo, torch
        >>> layer = octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 32))
        >>> layer.weight.dtype, tuple(layer.weight.shape), layer.codes.dtype
        (torch.float32, (32, 64), torch.uint8)
        >>> torch.equal(layer.weight @ torch.eye(64), layer.dequantize().weight)
        True
        >>> layer.weight.data.mul_(2)
        Traceback (most recent call last):
        RuntimeError: NF4Linear.weight is read from quantized codes, what is written to it would be lost: dequantize() \
gives a torch.nn.Linear, merge_adapter puts an adapter into the weights
    """

    _layer: Any

    @staticmethod
    def __new__(cls, layer: Any) -> WeightView:
        shape = (layer.out_features, layer.in_features)
        codes = layer.codes
        view: WeightView = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=layer.compute_dtype, device=codes.device
        )
        view._layer = layer
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would fill a new weight
        return view

    def dequantized(self) -> Tensor:
        """The weight as a tensor like any other."""
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        found: Tensor = self._layer._dequantized(self.dtype)
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.dequantized())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantized()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantized().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _WRITES or (func in _GRADIENTS and (args[1:] or (True,))[0]):
            raise read_only(args[0]._layer if isinstance(args[0], WeightView) else None)
        with torch._C.DisableTorchFunctionSubclass():  # results are tensors like any other
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, WeightView) and argument.alias_info is not None and argument.alias_info.is_write:
                raise read_only(value._layer)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return WeightView(args[0]._layer)
        args, kwargs = tree_map_only(WeightView, WeightView.dequantized, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)


_SLOTS: Mapping[str, Any] = vars(torch._C.TensorBase)
_WRITES = (_SLOTS["data"].__set__, _SLOTS["grad"].__set__, Tensor.set_)
_GRADIENTS = (_SLOTS["requires_grad"].__set__, Tensor.requires_grad_)


def read_only(layer: Any) -> RuntimeError:
    """The error of who writes to a low-bit layer's weight."""
    name = "this" if layer is None else type(layer).__name__
    return RuntimeError(
        f"{name}.weight is read from quantized codes, what is written to it would be lost: dequantize() gives a "
        "torch.nn.Linear, merge_adapter puts an adapter into the weights"
    )
