"""Modules that train in 8 bit (SwitchBack, arXiv 2304.13013): see :mod:`octavo.nn`, which exports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.checks import FLOATS, dtype_name
from ..core.low_bit import FrozenBuffers
from ..int8.functional import int8_matmul
from .functional import QuantizedWeight, check_options, switchback_weight, training_linear

_Layer = TypeVar("_Layer", bound="Int8Weight")


class _Steps:
    """Counts the steps of all optimizers: some write weights without telling autograd (`p.data`, raw pointers), so that
    a tensor's version alone does not say that it is the one that was quantized."""

    def __init__(self) -> None:
        self.count = 0
        self.watching = False

    def now(self) -> int:
        if not self.watching:
            register_optimizer_step_post_hook(self._stepped)
            self.watching = True
        return self.count

    def _stepped(self, *arguments: Any) -> None:
        self.count += 1


_steps = _Steps()


class WeightCache:
    """The int8 form of a weight, quantized once for each version of it: for all micro-batches of a step, and for the
    second forward pass of a checkpoint. Belongs to a module, and is no part of its state.

    Attributes:
        used: whether a gradient of the weight was computed from `value`. Once that gradient is gone from
            ``weight.grad`` a step may have been taken, also by a loop that writes ``weight.data``.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.value: QuantizedWeight | None = None
        self.used = False

    def drop(self) -> None:
        self.key, self.value, self.used = None, None, False

    def get(self, weight: Tensor, variant: str, transpose: bool) -> QuantizedWeight | None:
        """None for what has no version that says when it changed, is computed anew for every pass, or could not be
        saved for a backward pass later."""
        if weight.is_inference() or torch.is_inference_mode_enabled() or not isinstance(weight, nn.Parameter):
            return None
        if self.used and weight.grad is None:
            self.drop()
        # The weight itself is in the key, so that no other one can have its id.
        key = (weight, weight._version, weight.data_ptr(), weight.device, weight.dtype, variant, _steps.now())
        same = self.key is not None and self.key[0] is weight and self.key[1:] == key[1:]
        if not same or self.value is None or (transpose and self.value.transposed is None):
            self.key, self.value, self.used = key, switchback_weight(weight, variant, transpose), False
        return self.value


def _identity(weight: Tensor) -> tuple[int, int, int]:
    """A key that changes with the weight, as far as Python can see."""
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _is_sharded(weight: Any) -> bool:
    return type(weight).__name__ == "DTensor"


class Int8Weight(FrozenBuffers):
    """One float weight, used in int8 products: its cache, and what takes its place for evaluation. `_weight_name` and
    `_bias_name` say which; a subclass has the other attributes."""

    _weight_name = "weight"
    _bias_name = "bias"
    variant: str
    k_split: int | None
    stochastic_rounding: bool
    _cache: WeightCache
    _sharded: bool
    _held: QuantizedWeight | None
    _held_key: tuple[int, int, int] | None

    def _set_options(self, variant: str, k_split: int | None, stochastic_rounding: bool) -> None:
        check_options(variant, k_split, stochastic_rounding)
        self.variant, self.k_split, self.stochastic_rounding = variant, k_split, stochastic_rounding
        self.__dict__ |= {"_cache": WeightCache(), "_held": None, "_held_key": None}
        self.__dict__["_sharded"] = _is_sharded(getattr(self, self._weight_name, None))

    def _clear_options(self) -> None:
        for name in ("variant", "k_split", "stochastic_rounding", "_cache", "_held", "_held_key", "_sharded"):
            del self.__dict__[name]

    @property
    def prepared(self) -> bool:
        """Whether `prepare_for_eval` was called: then the weight is int8."""
        return self._weight_name in self._buffers

    def _quantized(self, weight: Tensor, transpose: bool) -> QuantizedWeight | None:
        """The weight's int8 form, where it can be kept: in training, and where Python sees every call."""
        if self._held is not None:
            if not torch.compiler.is_compiling() and self._held_key != _identity(weight):
                raise RuntimeError(
                    f"{self._weight_name} was changed inside of octavo.switchback.quantize_once, and codes are stale"
                )
            return self._held
        if self.variant == "fp8" or not self.training or torch.compiler.is_compiling():
            return None
        if self._sharded:  # by FSDP2, the weight is here for the time of the pass only, and nothing of it is kept
            return switchback_weight(weight, self.variant, transpose=False)
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the graph must quantize what the weight is when it is replayed
        # Without gradients in training it may be a checkpoint's first pass: the second will need the transpose.
        return self._cache.get(weight, self.variant, transpose or not torch.is_grad_enabled())

    def _linear(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self, self._weight_name), getattr(self, self._bias_name)
        if self.prepared:
            return int8_matmul(x, weight, self._buffers[f"{self._weight_name}_scale"], bias, 0.0)  # type: ignore[arg-type]
        quantized = self._quantized(weight, x.requires_grad)
        return self._product(x, weight, bias, quantized)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: QuantizedWeight | None) -> Tensor:
        watcher = None if torch.compiler.is_compiling() else self._cache
        return training_linear(
            x, weight, bias, self.variant, quantized, self.k_split, self.stochastic_rounding, watcher
        )

    def check_preparable(self) -> None:
        """ValueError, as of `prepare_for_eval`, unless it would succeed."""
        if self.prepared:
            return
        weight = self._parameters.get(self._weight_name)
        if weight is None:
            raise ValueError(
                f"{self._weight_name} is no parameter but computed, by weight_norm, pruning or a parametrization: "
                "remove that first"
            )
        if self.variant == "fp8":
            raise ValueError("variant fp8 is a simulation: there is no int8 weight to keep. Convert it to another one")
        if _is_sharded(weight):
            raise ValueError("the weight is sharded: gather it into a model without FSDP2 and prepare that")
        if not weight.is_meta and (bad := weight.numel() - int(torch.isfinite(weight).sum())):
            raise ValueError(f"{bad} of {weight.numel()} weights are NaN or Inf")

    def prepare_for_eval(self: _Layer) -> _Layer:
        """Keep only the int8 weight, a byte an element, and its scale: `weight` (int8, now a buffer) and `weight_scale`
        (fp32, one a row), as in `octavo.nn.Int8Linear` with threshold 0. It cannot be undone, and the weight no longer
        trains; y and the gradient of x are as before, but for the weight's scale in the backward pass.

        Its state dict loads into a layer that was prepared likewise: make the model, convert it, prepare it, then load.

        Raises:
            ValueError: variant fp8, which has no int8 weight; NaN or Inf in the weight; a weight that is sharded by
                FSDP2 or computed by a parametrization. Nothing is changed then.
        """
        self.check_preparable()
        if self.prepared:
            return self
        name = self._weight_name
        codes, scale, *_ = switchback_weight(getattr(self, name), self.variant, transpose=False)
        del self._parameters[name]
        self.register_buffer(name, codes)
        self.register_buffer(f"{name}_scale", scale.expand(codes.shape[0]).contiguous())
        self._cache.drop()
        return self

    def train(self: _Layer, mode: bool = True) -> _Layer:
        if not mode:
            self._cache.drop()  # in evaluation the weight is quantized at every call, or once and for all
        return super().train(mode)

    # Another weight, or the same one elsewhere, must not meet the old one's codes.

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets the weight whenever it shards or gathers it: never through the version of a tensor.
        if name == self._weight_name and "_cache" in self.__dict__:
            self._cache.drop()
            self.__dict__["_sharded"] = self._sharded or _is_sharded(value)
        super().__setattr__(name, value)

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        self._cache.drop()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_held", "_held_key")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__ |= {"_cache": WeightCache(), "_held": None, "_held_key": None}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loaded = state_dict.get(prefix + self._weight_name)
        fits = loaded is None or (loaded.dtype is torch.int8 if self.prepared else loaded.is_floating_point())
        if loaded is not None and not fits:
            which = (
                "was prepared for evaluation and holds int8: load the weights before prepare_for_eval()"
                if self.prepared
                else "trains: call prepare_for_eval() before loading the state of a layer that was prepared"
            )
            error_msgs.append(
                f"{type(self).__name__} {prefix[:-1]!r}: the loaded {self._weight_name} is {dtype_name(loaded)}, but "
                f"this layer {which}"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _options_repr(self) -> str:
        text = f", variant={self.variant!r}"
        if self.k_split is not None:
            text += f", k_split={self.k_split}"
        if self.stochastic_rounding:
            text += ", stochastic_rounding=True"
        return text + (", prepared for evaluation" if self.prepared else "")


@contextmanager
def quantize_once(model: nn.Module) -> Iterator[None]:
    """Quantize all weights of `model` that its int8 layers train, once, for every forward pass in the ``with``:

        with octavo.switchback.quantize_once(model):
            for batch in micro_batches:
                loss(compiled(batch)).backward()
        optimizer.step()

    Without torch.compile the layers see by themselves when a weight is new. A compiled graph does not, and quantizes at
    every call: here it takes the codes as inputs. Layers that are sharded by FSDP2, prepared for evaluation or in fp8,
    and those whose weight a parametrization computes, are left to themselves.

    Raises:
        RuntimeError: from a forward pass, that a weight was changed inside: not seen by a compiled one, nor where it is
            written through ``weight.data``.

    Example:
        >>> import octavo, torch
        >>> model = octavo.nn.SwitchBackLinear(4, 3)
        >>> with octavo.switchback.quantize_once(model):
        ...     for micro_batch in torch.ones(2, 2, 4):
        ...         model(micro_batch).sum().backward()
        >>> model.weight.grad.shape
        torch.Size([3, 4])
    """
    put: list[tuple[Int8Weight, QuantizedWeight, dict[str, Any]]] = []
    try:
        for module in model.modules():
            if not isinstance(module, Int8Weight) or module.prepared or module._sharded or module.variant == "fp8":
                continue
            weight = module._parameters.get(module._weight_name)
            if weight is None:  # a parametrization computes it, another one each time
                continue
            quantized = switchback_weight(weight, module.variant, transpose=True)
            put.append((module, quantized, {"_held": module._held, "_held_key": module._held_key}))
            module.__dict__ |= {"_held": quantized, "_held_key": _identity(weight)}
        yield
    finally:
        for module, quantized, before in put:
            if module.__dict__.get("_held") is quantized:  # else it was turned into something else inside
                module.__dict__ |= before


def check_weight_dtype(dtype: torch.dtype | None) -> None:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")


class SwitchBackLinear(Int8Weight, nn.Linear):
    """`torch.nn.Linear` whose products are int8 in training, but that of the weight's gradient (SwitchBack, arXiv
    2304.13013): see `octavo.switchback_linear` for the formulas, the variants and special values.

    In training the weight is quantized, and transposed for the backward pass, once for each of its versions: anew when
    it was changed in place, replaced or moved, after a step of any optimizer, and once ``weight.grad`` was set to None
    after a backward pass. So a loop that writes ``weight.data`` by hand is seen where it sets gradients to None after
    that and before the next forward pass, and not where it zeroes them, or resets them later. Outside of training,
    under torch.compile (but for `quantize_once`), while a CUDA graph is captured and with FSDP2 it is quantized at
    every call. Parameters, their initialisation and the state dict are those of `torch.nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in torch; weight and bias are fp32, fp16 or bf16.
        variant: "switchback", "memory_efficient" (keeps x in int8), "vectorwise" (a scale for each row of the weight),
            "all_int8" (the weight's gradient in int8, too: LLM.int8()'s way, a baseline) or "fp8" (simulated).
        k_split: of "all_int8": rows of the batch that share a column's scale in the weight's gradient.
        stochastic_rounding: of "all_int8": round the operands of the weight's gradient at random.

    Raises:
        ValueError: an unknown variant, an option of another variant, another dtype.

    Example:
        >>> import octavo, torch
        >>> layer = octavo.nn.SwitchBackLinear(4, 3)
        >>> layer
        SwitchBackLinear(in_features=4, out_features=3, bias=True, variant='switchback')
        >>> layer(torch.ones(2, 4)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        variant: str = "switchback",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        k_split: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        check_options(variant, k_split, stochastic_rounding)
        check_weight_dtype(dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_options(variant, k_split, stochastic_rounding)

    def forward(self, input: Tensor) -> Tensor:
        return self._linear(input)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._options_repr()


class LayerScale(nn.Module):
    """``gamma * x``, gamma [width] initialised to `init` (arXiv 2304.13013, section 2.3, after 2103.17239).

    At the end of each residual branch, ``x + layer_scale(branch(x))``, and initialised to zero it keeps features small
    from the start, without which fp8 training with one scale for a tensor diverges.

    Args:
        width: of the last dimension of x.
        init: of gamma; zero in the paper's fp8 training.

    Example:
        >>> import octavo, torch
        >>> octavo.nn.LayerScale(3, init=0.5)(torch.ones(1, 3)).detach()
        tensor([[0.5000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        width: int,
        init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((width,), init, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, init={self.init}"
