"""Quantizing one weight: SpQR (arXiv 2306.03078, Algorithm 1), and GPTQ and round-to-nearest by the same loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from .codes import SpQRCodes
from .config import GROUP_SIZES, SpQRConfig
from .hessian import Factor, factorize

_BLOCK = 128  # columns quantized before their errors reach all later ones in one product
_SAMPLE_ROWS = 256  # that tau is searched on
Columns = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | Factor | None,
    config: SpQRConfig,
    name: str = "",
    columns: Columns = ops.spqr_quantize_columns,
) -> SpQRCodes:
    """Quantize a weight [n, k] so that its product with the calibration inputs changes least.

    The weight is divided by ``unit``, the power of two that takes its largest magnitude into [2048, 4096), so that fp16
    statistics and outliers are normal numbers whatever its scale. Columns whose inputs were 0 in calibration become 0,
    as in GPTQ. The compiled loop runs on the CPU: a weight or Hessian elsewhere is copied there, the result is there.

    With ``config.outlier_fraction`` tau is found by bisection, on up to 256 rows spread evenly over the weight: rows do
    not depend on each other (but for statistics), so that their share is the whole's up to sampling.

    Args:
        weight: fp32, fp16 or bf16.
        hessian: from `Hessian`, fp32 [k, k], or its factor with this config's damping and order. None only without
            ``config.propagate``; there a Hessian serves to report the error.
        config: the settings.
        name: of the layer, for messages.
        columns: `octavo.spqr_quantize_columns`, or its reference.

    Raises:
        ValueError: NaN or Inf in the weight, k that the group size does not divide, a missing or unusable Hessian
            (see `factorize`), errors that grow beyond fp16 while they are propagated.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import SpQRConfig, SpQRWeight, quantize_weight
        >>> settings = SpQRConfig.rtn(bits=4, group_size=16)
        >>> weight = torch.arange(16.0).repeat(16, 2)
        >>> codes = quantize_weight(weight, None, settings)
        >>> codes.codes[0, :4]
        tensor([0, 1, 2, 3], dtype=torch.uint8)
    """
    where = f"{name}: " if name else ""
    _check(weight, config, where)
    n, k = weight.shape
    factor = hessian if isinstance(hessian, Factor) else None
    if config.propagate:
        if hessian is None:
            raise ValueError(f"{where}quantizing with error propagation needs a Hessian, from calibration")
        if factor is None:
            assert isinstance(hessian, Tensor)
            factor = factorize(hessian, config.damping, config.act_order, name)
        if len(factor.upper) != k:
            raise ValueError(f"{where}the Hessian is of {len(factor.upper)} inputs, the weight has {k}")
    exact = weight.detach().to("cpu", torch.float32)
    unit = _unit(exact)
    w = exact / unit
    upper, perm = None, None
    if config.propagate:
        assert factor is not None
        w[:, factor.dead.cpu()] = 0.0
        upper = factor.upper.cpu()
        if factor.perm is not None:
            perm = factor.perm.cpu()
            w = w[:, perm]
    diagonal = torch.ones(k) if upper is None else upper.diagonal()
    variance = w.var(0) if n > 1 else w.square().flatten()
    spread = float((variance.double() / diagonal.double().square()).mean())
    tau = config.tau if config.has_outliers else math.inf
    if config.has_outliers and config.outlier_fraction is not None:
        tau = _find_tau(w, upper, spread, config, columns, config.outlier_fraction)
    parts, loss = _quantize(w, upper, tau * spread if tau < math.inf else math.inf, config, columns, where)
    codes = _assemble(n, k, config, parts, unit, perm, tau, loss / spread if spread else 0.0)
    matrix = factor.hessian if factor is not None else hessian
    if isinstance(matrix, Tensor):
        return replace(codes, error=_output_error(exact, codes.dequantize(), matrix.cpu()))
    return codes


def _check(weight: Tensor, config: SpQRConfig, where: str) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{where}the weight must be [n, k] and not empty, got shape {list(weight.shape)}")
    k = weight.shape[1]
    if k % config.group_size:
        fitting = [str(size) for size in GROUP_SIZES if k % size == 0]
        better = f"; {', '.join(fitting)} would" if fitting else f", nor does any other of {GROUP_SIZES}"
        raise ValueError(f"{where}group_size {config.group_size} does not divide the {k} columns{better}")
    if bad := weight.numel() - int(torch.isfinite(weight).sum()):
        raise ValueError(f"{where}{bad} of {weight.numel()} weights are NaN or Inf")


def _unit(weight: Tensor) -> Tensor:
    largest = float(weight.abs().max())
    return torch.tensor([math.ldexp(1.0, max(math.frexp(largest)[1] - 12, -126)) if largest else 1.0])


def _quantize(
    w: Tensor, upper: Tensor | None, threshold: float, config: SpQRConfig, columns: Columns, where: str
) -> tuple[list[tuple[Tensor, ...]], float]:
    """Return the results of the loop for each block of columns, and the sum of squared errors. w is overwritten."""
    k = w.shape[1]
    second = (config.scale_bits, config.zero_bits) if config.bilevel else (0, 0)
    parts, loss = [], 0.0
    for begin in range(0, k, _BLOCK):
        end = min(begin + _BLOCK, k)
        block = torch.eye(end - begin) if upper is None else upper[begin:end, begin:end]
        *results, error = columns(
            w[:, begin:end].contiguous(), block, threshold, config.bits, config.group_size, config.stats_group_size,
            *second, config.leave_one_out,
        )  # fmt: skip
        loss += float(error.square().sum(dtype=torch.float64))
        if not math.isfinite(loss):
            raise ValueError(f"{where}errors grow beyond fp16 while they are propagated: give more damping")
        if upper is not None and end < k:
            w[:, end:].addmm_(error, upper[begin:end, end:], alpha=-1.0)
        parts.append(tuple(results))
    return parts, loss


def _assemble(
    n: int,
    k: int,
    config: SpQRConfig,
    parts: list[tuple[Tensor, ...]],
    unit: Tensor,
    perm: Tensor | None,
    tau: float,
    loss: float,
) -> SpQRCodes:
    codes, scales, zeros, second_order = (torch.cat([part[i] for part in parts], 1) for i in range(4))
    found = [(part[4] != 0).nonzero() for part in parts]
    rows = torch.cat([at[:, 0] for at in found])
    ids = torch.cat([at[:, 1] + i * _BLOCK for i, at in enumerate(found)]).int()
    values = torch.cat([part[4][at[:, 0], at[:, 1]] for part, at in zip(parts, found, strict=True)])
    order = torch.argsort(rows, stable=True)  # columns ascend: blocks did
    offsets = torch.zeros(n + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return SpQRCodes(
        n,
        k,
        config.bits,
        config.group_size,
        config.stats_group_size,
        config.scale_bits,
        config.zero_bits,
        codes=codes,
        unit=unit,
        row_offsets=offsets,
        outlier_columns=ids[order],
        outlier_values=values[order],
        perm=None if perm is None else perm.int(),
        tau=tau,
        damping=config.damping,
        loss=loss,
        scales=None if config.bilevel else scales,
        zeros=None if config.bilevel else zeros,
        scale_codes=scales if config.bilevel else None,
        zero_codes=zeros if config.bilevel else None,
        second_order=second_order if config.bilevel else None,
    )


def _find_tau(
    w: Tensor, upper: Tensor | None, spread: float, config: SpQRConfig, columns: Columns, wanted: float
) -> float:
    """tau for a share of outliers, to 1 % of it on the sample where it can be had: share falls as tau rises."""
    tile = config.stats_group_size if config.bilevel else 16
    tiles = -(-len(w) // tile)
    chosen = torch.linspace(0, tiles - 1, max(1, min(tiles, _SAMPLE_ROWS // tile))).round().long()
    rows = (chosen[:, None] * tile + torch.arange(tile)).flatten()
    sample = w[rows[rows < len(w)]]

    def share(log_tau: float) -> float:
        parts, _ = _quantize(sample.clone(), upper, math.exp(log_tau) * spread, config, columns, "")
        return sum(int((part[4] != 0).sum()) for part in parts) / sample.numel()

    at = math.log(0.2)
    low, high = math.log(1e-8), math.log(1e8)  # more outliers than wanted, fewer
    log_low = log_high = None
    for _ in range(24):
        now = share(at)
        if abs(now - wanted) <= 0.01 * wanted or high - low < 1e-4:
            break
        if now > wanted:
            low, log_low = at, math.log(now)
        else:
            high, log_high = at, math.log(max(now, 0.1 / sample.numel()))
        if log_low is None or log_high is None:  # not yet between two
            at = at + 1.5 if now > wanted else at - 1.5
            at = min(max(at, math.log(1e-8)), math.log(1e8))
            if at in (low, high):
                break
        else:  # where a line through both, log over log, has the share; not too near the ends
            part = (log_low - math.log(wanted)) / (log_low - log_high)
            at = low + min(max(part, 0.1), 0.9) * (high - low)
    return math.exp(at)


def _output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)), D the difference: the outputs' root mean square error over their own."""
    wrong = total = 0.0
    for begin in range(0, len(weight), 1024):
        w = weight[begin : begin + 1024]
        d = w - quantized[begin : begin + 1024]
        wrong += float(((d @ hessian) * d).sum(dtype=torch.float64))
        total += float(((w @ hessian) * w).sum(dtype=torch.float64))
    return math.sqrt(max(wrong, 0.0) / total) if total > 0 else 0.0
