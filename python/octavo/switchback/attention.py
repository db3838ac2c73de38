"""Attention that trains in 8 bit: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..int8.functional import int8_matmul
from .functional import QuantizedWeight, check_options, switchback_weight
from .linear import Int8Weight, SwitchBackLinear, check_weight_dtype

_Attention = TypeVar("_Attention", bound="SwitchBackMultiheadAttention")


def _rows_of(quantized: QuantizedWeight | None, begin: int, end: int) -> QuantizedWeight | None:
    """The int8 form of some rows of a weight."""
    if quantized is None:
        return None
    codes, scale, transposed, transposed_scale = quantized
    part = None if transposed is None else transposed[:, begin:end].contiguous()
    return QuantizedWeight(codes[begin:end], scale[begin:end] if scale.dim() else scale, part, transposed_scale)


def _float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores; a boolean one forbids where it is true, as in `torch.nn.MultiheadAttention`."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class SwitchBackMultiheadAttention(Int8Weight, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its fused query-key-value projection and its output projection in int8: see
    `octavo.nn.SwitchBackLinear`. `octavo.convert_linears` makes it of torch's; parameters, state dict and what a call
    takes are those of torch, the attention between the projections is in the input's dtype.

    Keys and values have the queries' width; there is no `add_bias_kv` and no `add_zero_attn`. In fp8, parts of the
    fused projection that are computed apart, for keys that are not the queries, have a scale each. Rows of the mask
    that forbid everything are NaN, or as `torch.nn.functional.scaled_dot_product_attention` has them.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as in torch.
        variant, k_split, stochastic_rounding: as in `octavo.nn.SwitchBackLinear`, of both projections.

    Example:
        >>> import octavo, torch
        >>> attention = octavo.nn.SwitchBackMultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.ones(1, 5, 8)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([1, 5, 8])
    """

    _weight_name = "in_proj_weight"
    _bias_name = "in_proj_bias"
    in_proj_weight_scale: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        variant: str = "switchback",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        k_split: int | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        check_options(variant, k_split, stochastic_rounding)
        check_weight_dtype(dtype)
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self._set_options(variant, k_split, stochastic_rounding)

    def _set_options(self, variant: str, k_split: int | None, stochastic_rounding: bool) -> None:
        super()._set_options(variant, k_split, stochastic_rounding)
        out_proj: Any = self.out_proj
        out_proj.__class__ = SwitchBackLinear
        out_proj._set_options(variant, k_split, stochastic_rounding)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # What torch's layers ask before they compute with in_proj_weight themselves: here they must not. torch's
        # constructor asks, too, and gets the truth.
        return "_cache" not in self.__dict__

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value  # for the module that this may be turned back into

    def _reset_parameters(self) -> None:
        cache = self.__dict__.pop("_cache", None)  # see _qkv_same_embed_dim
        try:
            super()._reset_parameters()
        finally:
            if cache is not None:
                self.__dict__["_cache"] = cache

    def check_preparable(self) -> None:
        super().check_preparable()
        out_proj: Any = self.out_proj
        if not isinstance(out_proj, SwitchBackLinear):
            raise ValueError(f"out_proj is a {type(out_proj).__name__}, which has no int8 weight: turn this back first")
        try:
            out_proj.check_preparable()
        except ValueError as error:
            raise ValueError(f"out_proj: {error}") from None

    def prepare_for_eval(self: _Attention) -> _Attention:
        """Prepare both projections as `SwitchBackLinear.prepare_for_eval` does."""
        super().prepare_for_eval()
        out_proj: Any = self.out_proj
        out_proj.prepare_for_eval()
        return self

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for what is one tensor: three at once in self-attention."""
        width = self.embed_dim
        if query is key and key is value:
            return cast(tuple[Tensor, Tensor, Tensor], self._linear(query).chunk(3, -1))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        needs_grad = any(x.requires_grad for x in (query, key, value))
        quantized = None
        if not self.prepared and self.variant != "fp8":
            # Whole, so that its parts have the scale that they have together.
            quantized = self._quantized(weight, needs_grad) or switchback_weight(weight, self.variant, needs_grad)

        def part(x: Tensor, begin: int, end: int) -> Tensor:
            own_bias = None if bias is None else bias[begin:end]
            if self.prepared:
                return int8_matmul(x, weight[begin:end], self.in_proj_weight_scale[begin:end], own_bias, 0.0)
            return self._product(x, weight[begin:end], own_bias, _rows_of(quantized, begin, end))

        if key is value:
            k, v = part(key, width, 3 * width).chunk(2, -1)
            return part(query, 0, width), k, v
        return part(query, 0, width), part(key, width, 2 * width), part(value, 2 * width, 3 * width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        q, k, v = self._project(query, key, value)
        batched = q.dim() == 3
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        batch, length, width = q.shape
        q, k, v = (x.reshape(batch, x.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))

        mask = None
        if attn_mask is not None and not (is_causal and key_padding_mask is None and not need_weights):
            is_causal = False
            mask = _float_mask(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.reshape(batch, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _float_mask(key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding

        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """RuntimeError unless shapes and dtypes are those that torch's module takes."""

        def fail(text: str) -> None:
            raise RuntimeError(f"{type(self).__name__}: {text}")

        shapes = [list(t.shape) for t in (query, key, value)]
        if len({t.dim() for t in (query, key, value)}) != 1 or query.dim() not in (2, 3):
            fail(f"query, key and value must all have 3 dimensions, or 2 without a batch, got shapes {shapes}")
        if {t.shape[-1] for t in (query, key, value)} != {self.embed_dim} or key.shape != value.shape:
            fail(f"query, key and value must have {self.embed_dim} features, key and value one shape, got {shapes}")
        at = 0 if query.dim() == 2 or not self.batch_first else 1  # the dimension of the positions
        batch = None if query.dim() == 2 else query.shape[1 - at]
        if batch is not None and key.shape[1 - at] != batch:
            fail(f"query and key differ in their batch: shapes {shapes}")
        pair = (query.shape[at], key.shape[at])
        heads = self.num_heads * (1 if batch is None else batch)
        padding = (pair[1],) if batch is None else (batch, pair[1])
        for name, mask, allowed in (
            ("attn_mask", attn_mask, (pair, (heads, *pair))),
            ("key_padding_mask", key_padding_mask, (padding,)),
        ):
            if mask is None:
                continue
            if mask.dtype is not torch.bool and not mask.is_floating_point():
                fail(f"{name} must be of a boolean or float dtype, got {str(mask.dtype).removeprefix('torch.')}")
            if tuple(mask.shape) not in allowed:
                wanted = " or ".join(str(list(shape)) for shape in allowed)
                fail(f"{name} must have shape {wanted}, got {list(mask.shape)}")

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, bias={self.in_proj_bias is not None}"
        return f"{text}, batch_first={self.batch_first}{self._options_repr()}"
