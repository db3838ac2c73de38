"""SpQR's quantizer as the paper's engine has it (arXiv 2306.03078, Algorithm 1), in plain PyTorch and fp32: no fp16
statistics, outliers replace the dense value exactly, no fallback for degenerate groups. What octavo's is judged by."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _fit(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    flat = low == high
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    scale = (high - low) / most
    return scale, -low / scale


def _round(x: Tensor, scale: Tensor, zero: Tensor, most: float) -> Tensor:
    return scale * ((x / scale.clamp_min(1e-9) + zero).round().clamp(0, most) - zero)


def _second(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(-1, 16)
    scale, zero = _fit(groups, 2.0**bits - 1)
    return _round(groups, scale, zero, 2.0**bits - 1).reshape(x.shape)


def paper_engine(
    weight: Tensor, hessian: Tensor, bits: int, group: int, tau: float, bilevel: bool, damping: float, order: bool
) -> tuple[Tensor, float]:
    """The quantized weight in fp32, and the share of outliers."""
    w, h, most = weight.clone(), hessian.clone(), 2.0**bits - 1
    k = w.shape[1]
    perm = h.diagonal().argsort(descending=True, stable=True) if order else torch.arange(k)
    w, h = w[:, perm], h[perm][:, perm]
    h += damping * h.diagonal().mean() * torch.eye(k)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    d = upper.diagonal()
    threshold = tau * float((w.var(0) / d.square()).mean())
    out = torch.empty_like(w)
    count = 0
    for j in range(k):
        if j % group == 0:
            g, dg = w[:, j : j + group].clone(), d[j : j + group]
            if threshold < math.inf:
                base = ((g - _round(g, *_fit(g, most), most)) / dg).square().sum(1)
                likely = torch.zeros_like(g, dtype=torch.bool)
                for left in range(group):
                    keep = [i for i in range(group) if i != left]
                    loss = ((g[:, keep] - _round(g[:, keep], *_fit(g[:, keep], most), most)) / dg[keep]).square()
                    likely[:, left] = base - loss.sum(1) > threshold
                others = (~likely).float()
                mean = (g * others).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp_min(1)
                g = torch.where(likely, mean, g)
            scale, zero = _fit(g, most)
            if bilevel:
                scale, zero = _second(scale, 3), _second(zero, 3)
        x = w[:, j : j + 1]
        value = _round(x, scale, zero, most)
        is_outlier = ((x - value) / d[j]).square() > threshold
        count += int(is_outlier.sum())
        value = torch.where(is_outlier, x, value)
        error = (x - value) / d[j]
        out[:, j : j + 1] = value
        w[:, j + 1 :] -= error @ upper[j : j + 1, j + 1 :]
    return out[:, perm.argsort()], count / out.numel()
