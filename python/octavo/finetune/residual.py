"""Adapters that begin with what quantization lost: the low-rank matrix that is closest to it on the model's own inputs.

Of a layer with weight W, quantized to Q, the outputs ``(Q + C) x`` are closest to ``W x`` in the mean square over its
inputs x, among all C of rank r, for ``C = SVD_r((W - Q) S) S^-1`` with S any square root of ``R = E[x x^T]`` (QERA,
arXiv 2410.06040, theorem 1). Here S is R's Cholesky factor. The base stays the one that `octavo.quantize_model` makes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..analyze.sites import find_sites
from ..analyze.weights import hessians
from .settings import Settings

_TOKENS = 8192  # tokens of the text to measure inputs on
_DAMPING = 1e-3  # this share of R's mean diagonal is added to it, because R is singular after few tokens
_OVERSAMPLING, _ITERATIONS = 16, 4  # parameters of the randomized SVD
Start = dict[str, tuple[Tensor, Tensor]]  # A and B of layers by name


def reconstruct(model: Any, windows: Tensor, settings: Settings) -> Start:
    """A and B for the linear layers of a model that is not quantized yet, and stays so.

    Args:
        model: a causal language model.
        windows: of the text to train on [n, context]; about 8192 tokens of it are used, evenly spread.
        settings: the method, one whose adapters may begin so, and what adapters are.
    """
    count = min(len(windows), max(1, _TOKENS // settings.context))
    windows = windows[torch.linspace(0, len(windows) - 1, count).round().long()]
    found: Start = {}
    training = model.training
    model.eval()
    for site, moment in hessians(model, find_sites(model, windows[0, :16]), windows, lambda: None):
        factor = square_root(moment.to(site.leader.weight.device))
        for name, linear in site.linears.items():
            found[name] = start_of(linear, factor, settings)
    model.train(training)
    return found


def start_of(linear: nn.Linear, factor: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """A and B with ``s * B @ A = C``, fp32. factor: S [k, k], lower triangular.

    Each of the r components has the same norm in A as in B: Adam moves both by as much.
    """
    assert settings.base is not None
    method, given = settings.base
    quantized = method.quantize_linear(linear, method.settings(given)).dequantize(torch.float32)
    lost = linear.weight.detach().float() - quantized.weight.detach()
    rank = min(settings.rank, *lost.shape)
    wider = min(rank + _OVERSAMPLING, *lost.shape)
    u, s, v = torch.svd_lowrank(lost @ factor, wider, _ITERATIONS)
    right = torch.linalg.solve_triangular(factor, v[:, :rank].T, upper=False, left=False)
    norms = right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (s[:rank] * settings.rank / settings.alpha / norms).sqrt()
    a = torch.zeros(settings.rank, lost.shape[1], device=lost.device)  # a rank beyond the layer's is left at 0
    b = torch.zeros(lost.shape[0], settings.rank, device=lost.device)
    a[:rank] = right * scale[:, None]
    b[:, :rank] = u[:, :rank] * (scale * norms)
    return a, b


def square_root(moment: Tensor) -> Tensor:
    """The Cholesky factor of ``E[x x^T]`` [k, k], damped; in fp32, or where that fails in float64."""
    mean = float(moment.diagonal().double().mean()) or 1.0
    for dtype in (torch.float32, torch.float64):
        damped = moment.to(dtype, copy=True)
        damped.diagonal().add_(_DAMPING * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            single: Tensor = factor.float()
            return single
    raise ValueError("the inputs of a layer have NaN or Inf")


def begin_with(model: nn.Module, start: Start, adapter: str) -> None:
    """Copy A and B into an adapter of the model."""
    with torch.no_grad():
        for name, (a, b) in start.items():
            layer: Any = model.get_submodule(name)
            layer.lora_A[adapter].copy_(a)
            layer.lora_B[adapter].copy_(b)
