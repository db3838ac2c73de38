"""A warning where adapters learn nothing."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .linear import LoRALinear


def watch_gradients(model: nn.Module, adapter: str) -> None:
    """Warn after the first backward pass of adapters that it did not reach: their layers were not called."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and adapter in m.adapters}
    tensors = {name: layer.lora_B[adapter] for name, layer in layers.items()}  # A has a zero gradient at first
    handles: list[Any] = []

    def check() -> None:
        if dead := [name for name, tensor in tensors.items() if tensor.grad is None and tensor.requires_grad]:
            where = dead[0] + (f" (and {len(dead) - 1} more)" if len(dead) > 1 else "")
            warnings.warn(
                f"adapter {adapter!r} got no gradient in {where}: the layers were not called, and the "
                "adapter learns nothing there",
                stacklevel=2,
            )

    def first(_: Tensor) -> None:
        if handles:
            for handle in handles:
                handle.remove()
            handles.clear()
            torch.autograd.Variable._execution_engine.queue_callback(check)

    handles.extend(tensor.register_post_accumulate_grad_hook(first) for tensor in tensors.values())
