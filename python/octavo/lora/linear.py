"""`LoRALinear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.checks import FLOATS, device_of, is_number
from ..core.linears import is_stored_transposed, store_transposed
from ..core.low_bit import LowBitLinear
from ..core.method import method_of
from ..core.weight_view import SumView, WeightView


class LoRAConfig(NamedTuple):
    """The settings of one adapter of a layer; its tensors are not among them."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """s of ``s * B @ A``: alpha / rank, or alpha / sqrt(rank) of a rank-stabilized adapter (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def check(self) -> None:
        """ValueError unless the numbers can be."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer of 1 or more, got {self.rank!r}")
        if not is_number(self.alpha) or not 0.0 < self.alpha <= sys.float_info.max:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}")
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be True or False, got {self.use_rslora!r}")


@dataclass(frozen=True)
class MergedLayer:
    """The errors that merging one layer caused. Norms are Frobenius norms; W + D is the merged matrix in fp32, D = s *
    B @ A.

    Attributes:
        name: of the layer in its model; "" from `LoRALinear.merge`.
        adapter: that was merged.
        method: "int8", "nf4", ... that the merged layer is quantized by, or None where it is a `torch.nn.Linear`.
        error: ``||W' - (W + D)|| / ||W + D||``, W' the matrix that the merged layer multiplies by.
        delta_error: ``||W' - (W + D)|| / ||D||``: the same error beside what the adapter changes. At 1 it is as large
            as the adapter's whole effect; 0 where both are 0.
    """

    name: str
    adapter: str
    method: str | None
    error: float
    delta_error: float


def check_adapter_name(name: str) -> None:
    """ValueError unless an adapter can have this name: letters, digits, "_" and "-", no attribute of a module."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"an adapter's name has letters, digits, '_' and '-' only, got {name!r}")
    if hasattr(nn.ParameterDict, name) or name == "training":
        raise ValueError(f"{name!r} cannot be the name of an adapter: torch.nn.ParameterDict has an attribute of it")


def check_dtype(dtype: torch.dtype) -> None:
    """ValueError unless an adapter can be in it."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")


def new_adapter(base: Any, rank: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A and B of an adapter that changes nothing yet. ValueError unless dtype is one of fp32, fp16, bf16 and None."""
    dtype = torch.float32 if dtype is None else dtype
    check_dtype(dtype)
    device = device_of(base)
    a = torch.empty(rank, base.in_features, dtype=dtype, device=device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(base.out_features, rank, dtype=dtype, device=device)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a layer that `LoRALinear` can adapt: a `torch.nn.Linear` or one of octavo's quantized ones."""
    return isinstance(module, (nn.Linear, LowBitLinear))


class AdapterTensors(nn.ParameterDict):
    """A or B of the adapters of a layer. It is called for one, so that accelerate's hooks bring what is offloaded.

    Example:
        >>> import octavo, torch
        >>> layer = octavo.nn.LoRALinear(torch.nn.Linear(4, 2), rank=1)
        >>> layer.lora_A("default") is layer.lora_A["default"]
        True
    """

    __call__ = nn.Module.__call__  # torch.nn.ParameterDict's raises

    def forward(self, name: str) -> Tensor:
        """The tensor of an adapter."""
        return self[name]  # type: ignore[no-any-return]


class LoRALinear(nn.Module):
    """A frozen linear layer, in 4, 8 or 16 bit, with low-rank adapters (LoRA, arXiv 2106.09685; QLoRA, 2305.14314).

    ``y = base_layer(x) + alpha / rank * dropout(x) @ A.T @ B.T``, with A [rank, in_features] and B [out_features, rank]
    of the active adapter; without an active one ``y = base_layer(x)``. x is [..., in_features] as the base takes it.
    Both products are in the dtype of base_layer(x) (x's, or autocast's): A and B are rounded to it, and their gradients
    come back in their own dtype. Differentiable in x, A and B.

    A layer may hold several adapters, of which `set_adapter` makes one active. A new one has A as `torch.nn.Linear`
    would have it (Kaiming uniform) and B = 0, so that it changes nothing before it is trained.

    Args:
        base: `torch.nn.Linear`, `Int8Linear`, `NF4Linear` or `SpQRLinear`. It is kept, not copied, and its parameters
            are set not to require gradients.
        rank: of A and B, 1 or more.
        alpha: the product's scale is alpha / rank. None: rank, the scale is 1.
        dropout: probability in [0, 1) that an element of x is dropped in training, for the adapter alone.
        adapter: the name of the adapter.
        dtype: of A and B; None for fp32, which is what training wants: updates are too small for 16 bit.
        use_rslora: the scale is alpha / sqrt(rank) (arXiv 2312.03732).

    Attributes:
        base_layer: the layer.
        lora_A, lora_B: A and B by the name of their adapter, `torch.nn.ParameterDict`.
        active_adapter: the name of the one in use, or None.

    Raises:
        ValueError: a rank, alpha, dropout or name that cannot be.
        TypeError: a base that is no linear layer, or has adapters already.

    Example:
        >>> import octavo, torch
        >>> base = octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 32))
        >>> layer = octavo.nn.LoRALinear(base, rank=4, alpha=8)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(layer(x), base(x))  # before training B is 0
        True
        >>> layer.lora_A["default"].shape, layer.lora_B["default"].shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
    """

    base_layer: Any
    lora_A: AdapterTensors
    lora_B: AdapterTensors
    active_adapter: str | None
    _configs: dict[str, LoRAConfig]
    _merged: tuple[nn.Module, str] | None  # in a tuple, it is no part of the module tree or its state

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        adapter: str = "default",
        dtype: torch.dtype | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self._set_base(base)
        self.add_adapter(adapter, rank, alpha, dropout, dtype=dtype, use_rslora=use_rslora)
        base.requires_grad_(False)
        self.active_adapter = adapter

    @classmethod
    def _without_adapter(cls, base: nn.Module) -> LoRALinear:
        out = cls.__new__(cls)
        nn.Module.__init__(out)
        out._set_base(base)
        base.requires_grad_(False)
        return out

    @classmethod
    def on_meta(cls, base: nn.Module, adapters: Mapping[str, Mapping[str, Any]], active: str | None) -> LoRALinear:
        """A layer with adapters of these settings, all on the meta device: their values are in a state dict.

        Raises:
            ValueError: settings or a name that cannot be, an active adapter that is not there.
            TypeError: a base that is no linear layer.
        """
        out = cls._without_adapter(base)
        for name, settings in adapters.items():
            config = LoRAConfig(**settings)
            out.check_new(name, config)
            a = torch.empty(config.rank, out.in_features, device="meta")
            out._insert(name, config, a, torch.empty(out.out_features, config.rank, device="meta"))
        out.set_adapter(active)
        return out

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B of all adapters."""
        return [*self.lora_A.values(), *self.lora_B.values()]

    def _set_base(self, base: nn.Module) -> None:
        if not is_linear(base):
            hint = ": give it another by add_adapter" if isinstance(base, LoRALinear) else ""
            raise TypeError(f"base must be a torch.nn.Linear or a layer of octavo.nn, got {type(base).__name__}{hint}")
        self.base_layer = base
        self.lora_A, self.lora_B = AdapterTensors(), AdapterTensors()
        self._configs = {}
        self._merged = None
        self.active_adapter = None
        self.train(base.training)

    # ---- what it looks like to a model -------------------------------------------------------------------------------

    @property
    def in_features(self) -> int:
        return int(self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base_layer.out_features)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies by, for code that reads it past the forward (mamba's): with an active adapter the
        sum, see `octavo.core.weight_view.SumView`."""
        if self._merged is not None:
            return self._merged[0].weight  # type: ignore[return-value]
        base: Tensor = self.base_layer.weight
        if self.active_adapter is None:
            return base
        return self.summed_weight() if torch.compiler.is_compiling() else SumView(self, base)

    def summed_weight(self) -> Tensor:
        """``W + s * B @ A`` of the active adapter in the dtype of W, differentiable in A and B."""
        base: Tensor = self.base_layer.weight
        base = base.dequantized() if isinstance(base, WeightView) else base
        if (name := self.active_adapter) is None:
            return base
        a, b = self.lora_A(name), self.lora_B(name)
        return torch.addmm(base, b.to(base.dtype), a.to(base.dtype), alpha=self._configs[name].scaling)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's."""
        return self.base_layer.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self._merged is not None:
            layer, name = self._merged
            if self.training and torch.is_grad_enabled() and self.lora_A[name].requires_grad:
                raise RuntimeError(f"adapter {name!r} is merged and would not learn: call unmerge() before training")
            return layer(x)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x)
        name_or_none = self.active_adapter
        if name_or_none is None:
            return y
        config = self._configs[name_or_none]
        a, b = self.lora_A(name_or_none), self.lora_B(name_or_none)
        x = x.to(y.dtype)
        if config.dropout and self.training:
            x = F.dropout(x, config.dropout)
        h = F.linear(x, a.to(y.dtype)).reshape(-1, config.rank)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), h, b.to(y.dtype).t(), alpha=config.scaling)
        if y.dim() == 2:
            return out
        whole: Tensor = torch.ops.aten._unsafe_view(out, y.shape)  # not a view to autograd: FSDP2 warns of such outputs
        return whole

    def extra_repr(self) -> str:
        active = "none active" if self.active_adapter is None else f"active={self.active_adapter}"
        merged = ", merged" if self.is_merged else ""
        described = (
            f"{name}: rank={c.rank}, alpha={c.alpha:g}"
            + (f", dropout={c.dropout:g}" if c.dropout else "")
            + (", rslora" if c.use_rslora else "")
            for name, c in self._configs.items()
        )
        return f"{'; '.join(described) or 'no adapters'}; {active}{merged}"

    # ---- adapters ----------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, LoRAConfig]:
        """The adapters by name: rank, alpha, dropout, use_rslora and the scaling that follows."""
        return dict(self._configs)

    def add_adapter(
        self,
        name: str,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        use_rslora: bool = False,
    ) -> None:
        """Add an adapter, beside those that there are; which one is active does not change. Arguments as of the class.

        Raises:
            ValueError: there is one of this name, or a number or name cannot be.
            RuntimeError: an adapter is merged.
        """
        config = LoRAConfig(rank, rank if alpha is None else alpha, dropout, use_rslora)
        self.check_new(name, config)
        self._insert(name, config, *new_adapter(self.base_layer, rank, dtype))

    def check_new(self, name: str, config: LoRAConfig) -> None:
        """Raises what `add_adapter` would, and changes nothing."""
        check_adapter_name(name)
        if name in self._configs:
            raise ValueError(f"there is an adapter {name!r} already; known: {', '.join(self._configs)}")
        config.check()
        self._refuse_merged("add_adapter")

    def _insert(self, name: str, config: LoRAConfig, a: Tensor, b: Tensor, requires_grad: bool = True) -> None:
        self.lora_A[name] = nn.Parameter(a, requires_grad)
        self.lora_B[name] = nn.Parameter(b, requires_grad)
        self._configs[name] = config

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter the active one; None for the base alone. Nothing is loaded, moved or copied.

        Raises:
            ValueError: there is no adapter of this name.
            RuntimeError: an adapter is merged.
        """
        if name is not None:
            self._check_known(name)
        self._refuse_merged("set_adapter")
        self.active_adapter = name

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was the active one, none is.

        Raises:
            ValueError: there is no adapter of this name.
            RuntimeError: an adapter is merged.
        """
        self._check_known(name)
        self._refuse_merged("delete_adapter")
        del self.lora_A[name], self.lora_B[name], self._configs[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def delta(self, name: str | None = None) -> Tensor:
        """``s * B @ A`` of an adapter, by default the active one: what it adds to the weight, fp32 [out, in]."""
        name = self.active_adapter if name is None else name
        if name is None:
            raise ValueError("no adapter is active; give the name of one")
        self._check_known(name)
        a, b = self.lora_A[name].detach().float(), self.lora_B[name].detach().float()
        return torch.mul(b @ a, self._configs[name].scaling)

    def _check_known(self, name: str) -> None:
        if name not in self._configs:
            raise ValueError(f"there is no adapter {name!r}; known: {', '.join(self._configs) or 'none'}")

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"{what}: adapter {self._merged[1]!r} is merged; call unmerge() first")

    # ---- merging -----------------------------------------------------------------------------------------------------

    @property
    def is_merged(self) -> bool:
        return self._merged is not None

    @property
    def merged_layer(self) -> nn.Module | None:
        """The layer that stands for base and adapter while they are merged."""
        return None if self._merged is None else self._merged[0]

    def merge(self, requantize: bool = False, dtype: torch.dtype | None = None) -> MergedLayer:
        """Compute by one layer with the weight ``W + s * B @ A`` of base and active adapter, until `unmerge`.

        The sum is in fp32. The base and its adapters stay in memory as they are: `unmerge` brings them back to the bit.
        The merged layer is no part of `state_dict`, and refuses to train.

        Args:
            requantize: False: a `torch.nn.Linear`, the sum rounded once to `dtype`: the exact matrix. True: the sum is
                quantized again as the base is, by its `from_linear`; read the errors that come back.
            dtype: of the `torch.nn.Linear`; None for that of the base's unquantized weight if it is known, or its
                bias's, or the default dtype.

        Returns:
            `MergedLayer`: the relative error that the rounding or quantization left.

        Raises:
            ValueError: no adapter is active; a base that cannot be quantized without calibration data; a sum with NaN
                or Inf, in fp32 or in `dtype`; parameters that are sharded. Nothing is changed then.
            RuntimeError: it is merged already.
        """
        layer, report = self.make_merged(requantize, dtype)
        self.put_merged(layer)
        return report

    def unmerge(self) -> None:
        """Compute by base and adapter again. RuntimeError if nothing is merged."""
        if self._merged is None:
            raise RuntimeError("no adapter is merged")
        self._merged = None

    def make_merged(self, requantize: bool = False, dtype: torch.dtype | None = None) -> tuple[nn.Module, MergedLayer]:
        """The layer that `merge` would put in place, and its report; nothing is changed."""
        self._refuse_merged("merge")
        name = self.active_adapter
        if name is None:
            raise ValueError("no adapter is active: there is nothing to merge")
        if type(self.lora_A[name]) is not nn.Parameter:
            raise ValueError(f"adapter {name!r} is sharded ({type(self.lora_A[name]).__name__}): gather it to merge it")
        if getattr(self.base_layer, "prepared", False):
            raise ValueError("its base was prepared for evaluation, and is int8 without its float weight: merge first")
        base, delta = self.base_layer, self.delta(name)
        merged: Any
        merged, whole, weight = merged_linear(base, delta, dtype or dtype_of(base), repr(name))
        if requantize and method_of(base):
            merged = base.quantize_like(_linear(whole, base.bias))
            weight = merged.dequantize(torch.float32).weight.detach()
        lost = float(torch.linalg.vector_norm(weight - whole))
        norms = (float(torch.linalg.vector_norm(t)) for t in (whole, delta))
        errors = (0.0 if lost == 0.0 else lost / norm if norm else math.inf for norm in norms)
        merged.requires_grad_(False).train(self.training)
        if is_stored_transposed(base):
            store_transposed(merged) if type(merged) is nn.Linear else setattr(merged, "_octavo_transposed", True)
        return merged, MergedLayer("", name, method_of(merged), *errors)

    def put_merged(self, layer: nn.Module) -> None:
        """The second half of `merge`: compute by a layer that `make_merged` made."""
        self._refuse_merged("merge")
        assert self.active_adapter is not None
        self._merged = (layer, self.active_adapter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._merged is not None:
            self._merged[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def dtype_of(base: Any) -> torch.dtype:
    """The dtype of a linear layer's unquantized form: see `LowBitLinear.float_dtype`."""
    return base.float_dtype() if isinstance(base, LowBitLinear) else base.weight.dtype


def merged_linear(base: Any, delta: Tensor, dtype: torch.dtype, adapter: str) -> tuple[nn.Linear, Tensor, Tensor]:
    """A `torch.nn.Linear` in `dtype` with the sum of the base's weight and delta [out, in].

    Returns:
        The layer, the sum in fp32, and the layer's weight in fp32.

    Raises:
        ValueError: the sum has NaN or Inf, in fp32 or in `dtype`. `adapter` is named.
    """
    whole = exact_weight(base, adapter) + delta
    linear = rounded_linear(whole, base.bias, dtype, adapter)
    return linear, whole, linear.weight.detach().float()


def exact_weight(base: Any, adapter: str) -> Tensor:
    """A base's weight in fp32. ValueError where it is not there; `adapter` is named."""
    if any(t.is_meta for t in (*base.parameters(), *base.buffers())):
        raise ValueError(f"adapter {adapter}: the base is offloaded, or on the meta device, and cannot be merged")
    linear = base.dequantize(torch.float32) if method_of(base) else base
    return linear.weight.detach().float()  # type: ignore[no-any-return]


def rounded_linear(whole: Tensor, bias: Tensor | None, dtype: torch.dtype, adapter: str) -> nn.Linear:
    """A frozen `torch.nn.Linear` in `dtype`. ValueError if that has NaN or Inf; `adapter` is named."""
    rounded = whole.to(dtype)
    if bad := whole.numel() - int(torch.isfinite(rounded).sum()):
        raise ValueError(f"adapter {adapter}: {bad} of {whole.numel()} merged weights are NaN or Inf in {dtype}")
    return _linear(rounded, None if bias is None else bias.detach().to(dtype))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `torch.nn.Linear` of these tensors; the bias is copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
