"""What a layer's ``weight`` must be to code that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def assert_reads_as_a_weight(layer: Any) -> None:
    """It reads as the float matrix that the layer multiplies by, and every way to write to it raises."""
    exact = layer.dequantize(torch.float32).weight
    assert isinstance(layer, nn.Linear) and layer.weight.dtype is torch.float32
    assert layer.weight.shape == (layer.out_features, layer.in_features) and not layer.weight.requires_grad
    assert torch.equal(layer.weight.clone(), exact)
    assert torch.equal(layer.weight.bfloat16(), exact.bfloat16())
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (grad,) = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).sum(), x)
    torch.testing.assert_close(grad, exact.sum(0).expand(3, -1))
    writes = (
        lambda w: w.data.mul_(2),
        lambda w: w.add_(1),
        lambda w: nn.init.zeros_(w),
        lambda w: w.requires_grad_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.copy_(torch.zeros_like(w)),
        lambda w: setattr(w, "data", torch.zeros(w.shape)),
        lambda w: setattr(layer, "weight", nn.Parameter(torch.zeros(w.shape))),
    )
    for write in writes:
        with pytest.raises(RuntimeError, match="weight is read from quantized codes"):
            write(layer.weight)
