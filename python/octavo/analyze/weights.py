"""Which weights a model cannot lose precision in, and where they lie (SpQR, arXiv 2306.03078, sections 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sites import Site, forward, watching

DAMPING = 0.01  # this share of the mean of diag(H) is added to the diagonal before inversion
BINS = 32  # along the order of quantization
_CELLS = 96  # the largest side of a map
_MEMORY = 1 << 30  # bytes of H held at once; more layers mean more passes
_BLOCK = 128  # columns whose errors are spread within before the rest of the matrix sees them
_LOG = (-24.0, 12.0, 14400)  # decades and bins of the histograms of sensitivity
_LIFT = 2.0  # times the outliers elsewhere that make a row, a column, a head stand out,
_CHANCE = 1e-3  # where chance would give as many to no line at all with this much certainty


@dataclass(frozen=True)
class Heads:
    """How a weight is divided among attention heads: blocks of `size` rows (q, k, v) or of columns (o).

    `rotary`: rows i and i + size / 2 of each head are one rotary frequency.
    """

    size: int
    rows: bool
    rotary: bool


def find_heads(config: Any, name: str, shape: torch.Size) -> Heads | None:
    """The heads of the Linear layer `name` of weight `shape`, None where it belongs to no attention."""
    count, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    size = getattr(config, "head_dim", None) or (hidden // count if count and hidden else None)
    if size is None or "att" not in name.rpartition(".")[0].lower():
        return None
    last = name.rpartition(".")[2]
    rows = last in ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv_proj", "query_key_value")
    if shape[0 if rows else 1] % size:
        return None
    rope = any(getattr(config, key, None) for key in ("rope_theta", "rope_parameters", "rope_scaling"))
    return Heads(size, rows, bool(rope) and last in ("q_proj", "k_proj", "query", "key") and size % 2 == 0)


# ---- what the papers define ------------------------------------------------------------------------------------------


def round_groups(w: Tensor, bits: int, group_size: int) -> Tensor:
    """w [n, k] rounded to 2^bits levels between the smallest and the largest of every `group_size` columns of a row."""
    parts = []
    for part in torch.split(w, group_size, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        parts.append(((part - low) / step).round() * step + low)
    return torch.cat(parts, dim=1)


def invert(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """``(H + damping * mean(diag H) * I)^-1`` of H = X X^T / tokens [k, k]; inputs that are always 0 count as 1."""
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[hessian.diagonal() == 0] = 1.0
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def sensitivity(w: Tensor, inverse: Tensor, bits: int, group_size: int) -> Tensor:
    """``s[i, j] = (w[i, j] - quant(w[i, j]))^2 / (2 * inverse[j, j])`` (section 3 of SpQR), [n, k].

    What rounding this one weight costs in the layer's squared output per token, if all others could make up for it.
    """
    difference = w - round_groups(w, bits, group_size)
    return difference.square() / (2 * inverse.diagonal())


def gptq(w: Tensor, inverse: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """GPTQ (2210.17323) through the columns of w [n, k] from left to right: the rounded weights, and each one's cost.

    A column's error is made up for by the columns not yet rounded; a group's levels are chosen when its first column
    is met. The cost ``((w' - quant(w')) / U[j, j])^2 / 2``, of weights w' moved so far, is what `sensitivity` is for
    weights not yet moved: it adds up to the layer's squared output error per token, halved.
    """
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, rounded, cost = w.clone(), torch.empty_like(w), torch.empty_like(w)
    columns = w.shape[1]
    low, step = w[:, 0], w[:, 0]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(w.shape[0], end - begin, dtype=w.dtype, device=w.device)
        for j in range(begin, end):
            if j % group_size == 0:
                group = w[:, j : j + group_size]
                if j + group_size > end:  # the rest of it has not seen this block's errors yet
                    group = group.clone()
                    group[:, end - j :] -= errors[:, : j - begin] @ upper[begin:j, end : j + group_size]
                low, high = group.amin(1), group.amax(1)
                step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
            rounded[:, j] = (((w[:, j] - low) / step).round().clamp(0, 2**bits - 1)) * step + low
            error = (w[:, j] - rounded[:, j]) / upper[j, j]
            cost[:, j] = error.square() / 2
            errors[:, j - begin] = error
            w[:, j + 1 : end].addr_(error, upper[j, j + 1 : end], alpha=-1)
        w[:, end:] -= errors @ upper[begin:end, end:]
    return rounded, cost


def relative_error(w: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """``|(W - W') X|^2 / |W X|^2``, from H = X X^T."""
    difference = w - rounded
    exact = float(((w @ hessian) * w).sum())
    return float(((difference @ hessian) * difference).sum()) / exact if exact > 0 else math.nan


# ---- where outliers lie ----------------------------------------------------------------------------------------------


def structure(outliers: Tensor, heads: Heads | None = None) -> dict[str, Any]:
    """Attribute the outliers, bool [n, k], to what they belong to: shares of them that add up to 1, and which rows,
    columns, heads.

    Rows come first, then columns; then, among the weights in none of these, heads, then rotary frequencies; the rest is
    unstructured. A row (column, ...) counts if its rate of outliers is at least twice that of the other weights, and if
    chance would make no row of the matrix have so many in 999 of 1000 matrices (a Poisson tail, times the rows).
    """
    n, k = outliers.shape
    total = int(outliers.sum())
    free = torch.ones_like(outliers)
    shares, found = {}, {}

    def take(kind: str, lines: Tensor, line_of: Tensor) -> None:
        taken = lines[line_of] & free
        shares[kind] = int((taken & outliers).sum()) / max(1, total)
        found[kind] = lines.nonzero().flatten().tolist()
        free.logical_and_(~taken)

    row, column = torch.arange(n)[:, None].expand(n, k), torch.arange(k)[None].expand(n, k)
    rows, columns = _stand_out(outliers, free, row), _stand_out(outliers, free, column)
    take("rows", rows, row)
    take("columns", columns, column)
    if heads is not None:
        head = (row if heads.rows else column) // heads.size
        take("heads", _stand_out(outliers, free, head), head)
        if heads.rotary:
            frequency = row % (heads.size // 2)
            take("rotary", _stand_out(outliers, free, frequency), frequency)
    shares["unstructured"] = int((outliers & free).sum()) / max(1, total)
    return {"shares": shares, "lines": found}


def _stand_out(outliers: Tensor, free: Tensor, line_of: Tensor) -> Tensor:
    """Which lines hold more outliers than the others, bool [lines]; only `free` weights count."""
    lines = int(line_of.max()) + 1
    index = line_of[free]
    cells = torch.bincount(index, minlength=lines).double()
    counts = torch.bincount(index[outliers[free]], minlength=lines).double()
    elsewhere = (counts.sum() - counts) / (cells.sum() - cells).clamp_min(1.0)
    expected = cells * counts.sum() / cells.sum().clamp_min(1.0)
    # P(N >= c) of a Poisson variable is the lower incomplete gamma function; a binomial tail is thinner than it.
    chance: Tensor = torch.special.gammainc(counts.clamp_min(1.0), expected.clamp_min(1e-300))
    more: Tensor = (counts > 0) & (counts >= _LIFT * elsewhere * cells)
    return more & (chance * lines < _CHANCE)


# ---- a model ---------------------------------------------------------------------------------------------------------


def hessians(
    model: Any, sites: Sequence[Site], ids: Tensor, done: Callable[[], object]
) -> Iterator[tuple[Site, Tensor]]:
    """Each site with ``X X^T / tokens`` [k, k] over the windows, fp32; `done` is called after each window."""
    for part in passes(sites):
        sums = [torch.zeros(site.features, site.features) for site in part]
        counts = [0] * len(part)

        def see(index: int, sums: list[Tensor] = sums, counts: list[int] = counts) -> Callable[[Tensor], None]:
            def look(x: Tensor) -> None:
                flat = x.detach().reshape(-1, x.shape[-1]).float().cpu()
                sums[index].addmm_(flat.T, flat)
                counts[index] += len(flat)

            return look

        with watching([(see(index), site.leader) for index, site in enumerate(part)]):
            for window in ids:
                forward(model, window)
                done()
        sums.reverse()
        for site, count in zip(part, counts, strict=True):
            yield site, sums.pop() / max(1, count)


def passes(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites in runs whose matrices H fit into memory together."""
    parts: list[list[Site]] = []
    used = _MEMORY
    for site in sites:
        size = 4 * site.features**2
        if used + size > _MEMORY and (not parts or parts[-1]):
            parts.append([])
            used = 0
        parts[-1].append(site)
        used += size
    return parts


@dataclass(frozen=True)
class Settings:
    """How weights are rounded and what counts as an outlier.

    Example:
        >>> from octavo.analyze import Settings
        >>> Settings(bits=4).group_size
        16
    """

    bits: int = 3
    group_size: int = 16
    share: float = 0.01  # the share of a layer's weights that are its outliers
    order: str = "act"  # the order of the columns: act (by falling diag H), or identity

    def to_dict(self) -> dict[str, Any]:
        names = ("bits", "group_size", "share", "order")
        return {name: getattr(self, name) for name in names} | {"damping": DAMPING}


def examine(
    config: Any, name: str, site: Site, hessian: Tensor, settings: Settings, mapped: bool
) -> tuple[dict[str, Any], Tensor]:
    """Everything about one weight, and the histogram of its log sensitivity for comparison with other layers."""
    w = site.linears[name].weight.detach().float().cpu()
    n, k = w.shape
    inverse = invert(hessian)
    s = sensitivity(w, inverse, settings.bits, settings.group_size)
    outliers = top(s, settings.share)
    heads = find_heads(config, name, w.shape)
    order = torch.arange(k)
    if settings.order == "act":
        order = hessian.diagonal().argsort(descending=True, stable=True)
    rounded, cost = gptq(w[:, order], inverse[order][:, order], settings.bits, settings.group_size)
    moved = top(cost, settings.share)
    entry = {
        "name": name,
        "projection": name.split(f"{site.depth}.", 1)[-1],
        "depth": site.depth,
        "shape": [n, k],
        "mean_sensitivity": float(s.mean()),
        "share_of_sensitivity": float(s[outliers].sum() / s.sum()) if float(s.sum()) > 0 else 0.0,
        "error_rounding": relative_error(w, round_groups(w, settings.bits, settings.group_size), hessian),
        "error_gptq": relative_error(w[:, order], rounded, hessian[order][:, order]),
        "heads": None if heads is None else {"size": heads.size, "along": "rows" if heads.rows else "columns"},
        **structure(outliers, heads),
        "outliers_of_row": outliers.sum(1).tolist(),
        "outliers_of_column": outliers.sum(0).tolist(),
        "along_order": {
            "sensitivity": _binned(s[:, order].mean(0)),
            "cost": _binned(cost.mean(0)),
            "outliers": _binned(moved.float().mean(0)),
        },
    }
    if mapped:
        entry["map"] = _map(s)
    low, high, bins = _LOG
    histogram = torch.histc(s.clamp_min(10.0**low).log10().clamp(low, high), bins, low, high)
    return entry, histogram


def top(values: Tensor, share: float) -> Tensor:
    """The largest `share` of the values, as bool of their shape: no fewer than one, and none that is 0."""
    count = max(1, round(share * values.numel()))
    cut = values.flatten().kthvalue(values.numel() - count + 1).values
    return (values >= cut) & (values > 0)


def shares_of_model(histograms: Sequence[Tensor], share: float) -> list[float]:
    """For each layer, return the share of its weights that are among the model's `share` most sensitive ones, to within
    a bin."""
    falling = torch.stack(list(histograms)).double().flip(1).cumsum(1)  # [layers, bins]: weights at or above each bin
    whole = falling[:, -1]
    at = int(((falling.sum(0) - share * whole.sum()).abs()).argmin())
    return (falling[:, at] / whole).tolist()


def _binned(values: Tensor) -> list[float]:
    """Means of consecutive parts of [k], BINS of them where there are so many."""
    return [float(part.double().mean()) for part in values.tensor_split(min(BINS, len(values)))]


def _map(s: Tensor) -> dict[str, Any]:
    """log10 of the mean sensitivity of each cell over that of the layer, [rows][columns], to two decimals."""
    cells = (min(_CELLS, s.shape[0]), min(_CELLS, s.shape[1]))
    pooled = torch.nn.functional.adaptive_avg_pool2d(s[None, None].double(), cells)[0, 0]
    relative = (pooled / pooled.mean().clamp_min(1e-300)).clamp_min(1e-6).log10()
    return {"log10_over_mean": [[round(value, 2) for value in row] for row in relative.tolist()]}
