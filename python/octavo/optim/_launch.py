"""The arguments of one call of `octavo.ops.optim_step` or of `optim_sums`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._paging import Page

# The mesh and placements of parameters that are DTensors.
Shards: TypeAlias = tuple[Any, tuple[Any, ...]] | None


@dataclass
class Launch:
    """The lists of one call: the parameters of one group on one device that have gradients and, where states are paged,
    have them in one page, or in none. Under a rule with sums over whole parameters, also distributed in one way."""

    group: dict[str, Any]
    index: int
    rule: str
    device: torch.device
    page: Page | None = None
    shards: Shards = None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    absmax: list[Tensor] = field(default_factory=list)
    compensation: list[Tensor] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    table: Tensor | None = None
    hyper: list[float] = field(default_factory=list)
    lr: Tensor | None = None

    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.params, self.grads, self.steps, self.states, self.absmax, self.compensation

    def key(self) -> tuple[object, ...]:
        """Equal only for tensors of the same sizes and dtypes at the same places."""
        addresses = tuple(address for tensors in self.lists() for address in map(Tensor.data_ptr, tensors))
        sizes = [t.shape for tensors in (self.params, self.grads, self.states, self.absmax) for t in tensors]
        dtypes = [t.dtype for tensors in (self.params, self.grads, self.states) for t in tensors]
        return addresses, tuple(sizes), tuple(dtypes), tuple(self.ids)
