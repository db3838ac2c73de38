"""Outlier features of activations (LLM.int8(), arXiv 2208.07339, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import evaluate
from .sites import Site, watching

LAYERS = 0.25  # the share of the layers, and below
POSITIONS = 0.06  # that of the positions, in which a dimension must reach the threshold to be an outlier feature
_TOP = 32  # dimensions whose layers are listed one by one


class _Seen:
    """The activations seen at one site, over all positions."""

    def __init__(self, features: int) -> None:
        self.positions = 0
        self.affected = 0  # positions with any dimension at the threshold
        self.reached = torch.zeros(features, dtype=torch.int64)  # positions of each dimension
        self.low = torch.zeros(features)
        self.high = torch.zeros(features)


class _Kind:
    """The outliers that the sites of one projection have in common: the same dimensions, layer after layer."""

    def __init__(self, features: int) -> None:
        self.positions = torch.zeros(features, dtype=torch.int64)  # with the threshold reached in any layer
        self.any_layer: Tensor | None = None  # [positions of the window, features]
        self.layers = torch.zeros(features, dtype=torch.int64)  # of the window


@dataclass(frozen=True)
class Activations:
    """What `watch` measured; `to_dict` has it in plain numbers."""

    threshold: float
    score: evaluate.Score
    windows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    projections: list[dict[str, Any]]

    @property
    def outlier_features(self) -> int:
        """Dimensions, over all projections, that meet both shares."""
        return sum(entry["outlier_features"] for entry in self.projections)

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "criterion": {"layers": LAYERS, "positions": POSITIONS},
            "outlier_features": self.outlier_features,
            "windows": self.windows,
            "projections": self.projections,
            "layers": self.layers,
        }


def watch(
    model: Any, sites: Sequence[Site], ids: Tensor, threshold: float, done: Callable[[evaluate.Score], object]
) -> Activations:
    """Run the windows [n, context] and count where ``|x| >= threshold`` at the inputs of the layers.

    A dimension counts as an *outlier feature* of a projection if it reaches the threshold in at least 25 % of the
    layers and, in one layer or another, at no less than 6 % of all positions. `done` is called after each window.
    """
    seen = [_Seen(site.features) for site in sites]
    kinds: dict[str, _Kind] = {}
    for site in sites:
        kinds.setdefault(site.projection, _Kind(site.features))

    def see(site: Site, at: _Seen) -> Callable[[Tensor], None]:
        kind = kinds[site.projection]

        def look(x: Tensor) -> None:
            flat = x.detach().reshape(-1, site.features).float().cpu()
            hit = flat.abs() >= threshold
            reached = hit.sum(0)
            at.positions += len(flat)
            at.affected += int(hit.any(1).sum())
            at.reached += reached
            torch.maximum(at.high, flat.amax(0), out=at.high)
            torch.minimum(at.low, flat.amin(0), out=at.low)
            kind.layers += reached > 0
            if kind.any_layer is None:
                kind.any_layer = hit
            elif kind.any_layer.shape == hit.shape:  # else tokens were routed: their positions are unknown here
                kind.any_layer |= hit

        return look

    blocks = {kind: sum(site.projection == kind for site in sites) for kind in kinds}
    score, windows = evaluate.Score(), []
    with watching([(see(site, at), site.leader) for site, at in zip(sites, seen, strict=True)]):
        for window in ids:
            alone = evaluate.Score()
            alone.add(evaluate.log_probabilities(model, window), window)
            score.tokens += alone.tokens
            score.nats += alone.nats
            counts = {}
            for name, kind in kinds.items():
                positions = torch.zeros_like(kind.positions) if kind.any_layer is None else kind.any_layer.sum(0)
                kind.positions += positions
                counts[name] = int(_features(kind.layers / blocks[name], positions / len(window)).sum())
                kind.any_layer = None
                kind.layers.zero_()
            windows.append({"perplexity": alone.perplexity, "outlier_features": counts})
            done(score)
    total = ids.numel()
    layers = [_layer(site, at) for site, at in zip(sites, seen, strict=True)]
    projections = [
        _projection(
            name, [(s.depth, at) for s, at in zip(sites, seen, strict=True) if s.projection == name], kind, total
        )
        for name, kind in kinds.items()
    ]
    return Activations(threshold, score, windows, layers, projections)


def _features(layers: Tensor, positions: Tensor) -> Tensor:
    return (layers >= LAYERS) & (positions >= POSITIONS)


def _layer(site: Site, at: _Seen) -> dict[str, Any]:
    count = max(1, at.positions)
    return {
        "names": list(site.linears),
        "projection": site.projection,
        "depth": site.depth,
        "features": site.features,
        "positions": at.positions,
        "dimensions_reaching": int((at.reached > 0).sum()),
        "dimensions_in_share_of_positions": int((at.reached >= POSITIONS * count).sum()) if at.positions else 0,
        "positions_share": at.affected / count,
        "elements_share": int(at.reached.sum()) / (count * site.features),
        "largest": float(torch.maximum(at.high, -at.low).max()),
    }


def _projection(name: str, seen: list[tuple[int, _Seen]], kind: _Kind, positions: int) -> dict[str, Any]:
    reached = torch.stack([at.reached for _, at in seen])  # [layers, features]
    rows = torch.tensor([max(1, at.positions) for _, at in seen])[:, None]
    layers_share = (reached > 0).double().mean(0)
    positions_share = kind.positions.double() / positions
    low = torch.stack([at.low for _, at in seen]).amin(0)
    high = torch.stack([at.high for _, at in seen]).amax(0)
    is_feature = _features(layers_share, positions_share)
    order = torch.argsort(layers_share * (1 + positions_share), descending=True, stable=True)
    order = order[layers_share[order] > 0]
    top = order[:_TOP]
    return {
        "projection": name,
        "layers": len(seen),
        "features": reached.shape[1],
        "outlier_features": int(is_feature.sum()),
        "dimensions": [  # that reach the threshold at all
            {
                "dimension": j,
                "layers_share": float(layers_share[j]),
                "positions_share": float(positions_share[j]),
                "elements_share": float(reached[:, j].sum() / rows.sum()),
                "low": float(low[j]),
                "high": float(high[j]),
                "outlier_feature": bool(is_feature[j]),
            }
            for j in order.tolist()
        ],
        "top": {  # share of the positions, [layer][dimension]
            "depths": [depth for depth, _ in seen],
            "dimensions": top.tolist(),
            "positions_share": (reached[:, top] / rows).tolist(),
        },
    }
