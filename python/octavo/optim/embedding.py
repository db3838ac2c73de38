"""`StableEmbedding`: an embedding that trains with 8-bit optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` followed by layer normalization (arXiv 2110.02861, section 2.3): for stable training with
    8-bit optimizers.

    ``y = layer_norm(weight[ids])``, the weight drawn from the Xavier uniform distribution, whose values are smaller
    than those of a normal one. The gradient of an embedding is uneven (rows come up as often as their words), so
    octavo's optimizers keep fp32 states for the weight: it carries the attribute ``octavo_state_bits = 32``, which
    survives copies, moves, `load_state_dict` and FSDP2's sharding.

    Attributes:
        weight: [num_embeddings, embedding_dim], as in torch; so are the arguments.
        norm: `torch.nn.LayerNorm` over embedding_dim.

    Example:
        >>> import octavo, torch
        >>> embedding = octavo.nn.StableEmbedding(10, 4)
        >>> embedding(torch.tensor([1, 2])).shape, embedding.weight.octavo_state_bits
        (torch.Size([2, 4]), 32)
    """

    norm: nn.LayerNorm

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()
        if "norm" in self._modules:
            self.norm.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.norm(super().forward(input)))

    # The mark belongs to a Parameter, and these are the ways in which a module gets another one.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def _mark(self) -> None:
        if (weight := self._parameters.get("weight")) is not None:
            weight.octavo_state_bits = 32  # type: ignore[attr-defined]
