"""Attention that trains in 8 bit: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autograd import int8_matmul
from .autograd_switchback import QuantizedWeight, switchback_linear
from .nn_switchback import Int8Weight


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
    `octavo.nn.SwitchBackLinear`. Made by `octavo.convert_linears`; parameters, state dict and arguments are those of
    torch, the attention between the projections is in the input's dtype.

    Not for keys or values of another width than the queries', `add_bias_kv` or `add_zero_attn`: `convert_linears`
    leaves such a module as it is. Rows of the mask that forbid everything are NaN, or as
    `torch.nn.functional.scaled_dot_product_attention` has them.
    """

    _weight_name = "in_proj_weight"
    _bias_name = "in_proj_bias"
    in_proj_weight_scale: Tensor

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # What torch's layers ask before they compute with in_proj_weight themselves: here they must not.
        return False

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for what is one tensor: three at once in self-attention."""
        width = self.embed_dim
        if query is key and key is value:
            return cast(tuple[Tensor, Tensor, Tensor], self._linear(query).chunk(3, -1))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        needs_grad = any(x.requires_grad for x in (query, key, value))
        quantized = None if self.prepared else self._quantized(transpose=needs_grad)

        def part(x: Tensor, begin: int, end: int) -> Tensor:
            own_bias = None if bias is None else bias[begin:end]
            if self.prepared:
                return int8_matmul(x, weight[begin:end], self.in_proj_weight_scale[begin:end], own_bias, 0.0)
            return switchback_linear(
                x,
                weight[begin:end],
                own_bias,
                self.variant,
                _rows_of(quantized, begin, end),
                k_split=self.k_split,
                stochastic_rounding=self.stochastic_rounding,
            )

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
        q, k, v = (x.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))

        mask = None
        if attn_mask is not None and not (is_causal and key_padding_mask is None and not need_weights):
            is_causal = False
            mask = _float_mask(attn_mask, q.dtype)
            if mask.dim() == 3:  # [batch * heads, length, keys], or one for all
                mask = mask.view(batch, self.num_heads, *mask.shape[1:]) if mask.shape[0] != 1 else mask[None]
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

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, bias={self.in_proj_bias is not None}"
        return f"{text}, batch_first={self.batch_first}{self._options_repr()}"
