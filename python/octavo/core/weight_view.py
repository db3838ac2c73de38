"""`WeightView` and `SumView`: the ``weight`` of low-bit and of adapted layers, for code that reads it past their
forward."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_reading = threading.local()  # the layers whose weight this thread is dequantizing


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
        view: WeightView = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.compute_dtype, device=codes.device)
        view._layer = layer
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would fill a new weight
        view._is_param = isinstance(codes, torch.nn.Parameter)  # for get_parameter
        return view

    def dequantized(self) -> Tensor:
        """The weight as a tensor like any other."""
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        layers: set[int] = _reading.__dict__.setdefault("layers", set())
        if id(self._layer) in layers:
            kind = type(self._layer).__name__
            raise RuntimeError(f"{kind}._dequantized reads {kind}.weight, which it makes: its codes are {kind}.codes")
        layers.add(id(self._layer))
        try:
            found: Tensor = self._layer._dequantized(self.dtype)
        finally:
            layers.discard(id(self._layer))
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dequantized())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantized()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantized().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _WRITES or (func in _GRADIENTS and (args[1:] or (True,))[0]):
            raise read_only(next((a._layer for a in args if isinstance(a, WeightView)), None))
        with torch._C.DisableTorchFunctionSubclass():  # results are tensors like any other
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return WeightView(args[0]._layer)
        layer = next((a._layer for a in args if isinstance(a, WeightView)), None)
        args, kwargs = tree_map_only(WeightView, WeightView.dequantized, (tuple(args), dict(kwargs)))
        return _Part.of(func, func(*args, **kwargs), layer)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, WeightView | _Part):
                    raise read_only(tensor._layer)


class _Part(Tensor):
    """A view of a dequantized weight, which cannot be written to either: ``layer.weight[0]``."""

    _layer: Any
    _tensor: Tensor

    @staticmethod
    def of(func: Any, result: Any, layer: Any) -> Any:
        """The result of an operation; as such where it is a view of its input."""
        if layer is None or not any(r.alias_info is not None for r in func._schema.returns):
            return result
        return tree_map_only(Tensor, lambda t: _Part(t, layer), result)

    @staticmethod
    def __new__(cls, tensor: Tensor, layer: Any) -> _Part:
        part: _Part = Tensor._make_wrapper_subclass(
            cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        part._tensor, part._layer = tensor, layer
        return part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._tensor.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._tensor.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        layer = next((a._layer for a in args if isinstance(a, _Part)), None)
        args, kwargs = tree_map_only(_Part, lambda p: p._tensor, (tuple(args), dict(kwargs)))
        args, kwargs = tree_map_only(WeightView, WeightView.dequantized, (args, kwargs))
        return _Part.of(func, func(*args, **kwargs), layer)


class SumView(Tensor):
    """What ``layer.weight`` is of a layer with adapters: base and active adapter summed up when it is used, and
    differentiable in the adapter. Asking for dtype, device or shape sums up nothing; writing to it raises.

    Example:
        >>> import octavo, torch
        >>> layer = octavo.nn.LoRALinear(torch.nn.Linear(4, 2), rank=1)
        >>> (layer.weight @ torch.ones(4)).sum().backward()
        >>> layer.lora_B["default"].grad is not None
        True
    """

    _layer: Any

    @staticmethod
    def __new__(cls, layer: Any, like: Tensor) -> SumView:
        view: SumView = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        view._layer = layer
        view._is_hf_initialized = True  # type: ignore[attr-defined]
        return view

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._layer.summed_weight())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = name in ("__set__", "__setitem__") or name.startswith("__i") or (name[-1:] == "_" != name[-2:-1])
        if isinstance(args[0] if args else None, SumView) and writes and name != "__invert__":
            raise read_only(args[0]._layer)
        if func == _SLOTS["data"].__get__:
            return args[0]
        args, kwargs = tree_map_only(SumView, lambda v: v._layer.summed_weight(), (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(
            SumView, lambda v: v._layer.summed_weight().detach(), (tuple(args), dict(kwargs or {}))
        )
        return func(*args, **kwargs)


_SLOTS: Mapping[str, Any] = vars(torch._C.TensorBase)
_WRITES = (_SLOTS["data"].__set__, _SLOTS["grad"].__set__, Tensor.set_, Tensor.__setitem__)
_SHAPES = {
    *(_SLOTS[name].__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point),
}
_GRADIENTS = (_SLOTS["requires_grad"].__set__, Tensor.requires_grad_)


def read_only(layer: Any) -> RuntimeError:
    """The error of who writes to a weight that is computed when it is read."""
    name = "this" if layer is None else type(layer).__name__
    made = "from base and adapter" if hasattr(layer, "summed_weight") else "from quantized codes"
    return RuntimeError(
        f"{name}.weight is read {made}, what is written to it would be lost: dequantize() gives a "
        "torch.nn.Linear, merge_adapter puts an adapter into the weights"
    )
