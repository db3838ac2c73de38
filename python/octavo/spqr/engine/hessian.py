"""The Hessian of a layer's squared output error, and the triangular factor that the quantizer works with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Hessian:
    """The mean of ``2 x x^T`` over input vectors x, in fp32 on their device: layers with the same input share one.

    Attributes:
        matrix: fp32 [k, k].
        count: vectors seen.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import Hessian
        >>> hessian = Hessian(2)
        >>> hessian.add(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> hessian.matrix, hessian.count
        (tensor([[1., 0.],
                [0., 9.]]), 2)
    """

    def __init__(self, k: int, device: torch.device | str = "cpu", name: str = "") -> None:
        self.matrix = torch.zeros(k, k, device=device)
        self.count, self.name = 0, name

    def add(self, x: Tensor) -> None:
        """Inputs [..., k] of any float dtype.

        Raises:
            ValueError: another k, or a NaN or Inf in x.
        """
        k = len(self.matrix)
        where = f"{self.name}: " if self.name else ""
        if x.shape[-1] != k:
            raise ValueError(f"{where}inputs must have {k} features, got shape {list(x.shape)}")
        rows = x.detach().reshape(-1, k).float()
        if not len(rows):
            return
        if bad := rows.numel() - int(torch.isfinite(rows).sum()):
            raise ValueError(f"{where}{bad} of {rows.numel()} calibration inputs are NaN or Inf")
        count = self.count + len(rows)
        self.matrix.addmm_(rows.T, rows, beta=self.count / count, alpha=2 / count)
        self.count = count


@dataclass(frozen=True, eq=False)
class Factor:
    """The factor of a Hessian that `quantize_weight` needs, made once for all layers that share it.

    Attributes:
        upper: fp32 [k, k] U, upper triangular: ``U^T U`` is the inverse of the damped Hessian over its mean diagonal,
            columns in the order `perm`.
        perm: int64 [k] or None.
        dead: bool [k]: inputs that were 0 in all of calibration.
        hessian: fp32 [k, k] as given.
    """

    upper: Tensor
    perm: Tensor | None
    dead: Tensor
    hessian: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool, name: str = "") -> Factor:
    """The Cholesky factor of the inverse, in fp32, or, where that fails, in float64.

    Raises:
        ValueError: a Hessian that is not square, has NaN or Inf, is 0, or is not positive definite under this damping:
            fewer independent inputs than features, which more damping or more calibration mends.

    Example:
        >>> import octavo, torch
        >>> from octavo.spqr import factorize
        >>> factor = factorize(torch.diag(torch.tensor([1.0, 3.0])), damping=0.0, act_order=True)
        >>> factor.upper.shape, factor.perm
        (torch.Size([2, 2]), tensor([1, 0]))
    """
    where = f"{name}: " if name else ""
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"{where}the Hessian must be square, got shape {list(hessian.shape)}")
    hessian = hessian.float()
    if bad := hessian.numel() - int(torch.isfinite(hessian).sum()):
        raise ValueError(f"{where}{bad} of {hessian.numel()} elements of the Hessian are NaN or Inf")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(f"{where}the Hessian's diagonal has negative elements, the least {float(diagonal.min()):g}")
    mean = float(diagonal.double().mean())
    if mean == 0.0:
        raise ValueError(f"{where}the Hessian is 0: all calibration inputs of the layer are 0")
    dead = diagonal == 0
    perm = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    upper = _inverse_factor(hessian, mean, damping, dead, perm)
    if upper is None:
        raise ValueError(
            f"{where}the Hessian of {len(dead)} inputs is not positive definite with damping {damping:g}: give more "
            f"damping (0.01 for GPTQ, 1 for SpQR), or more calibration than there are inputs"
        )
    return Factor(upper, perm, dead, hessian, damping)


def _inverse_factor(hessian: Tensor, mean: float, damping: float, dead: Tensor, perm: Tensor | None) -> Tensor | None:
    for dtype in (torch.float32, torch.float64):
        h = hessian.to(dtype, copy=True).div_(mean)
        h.diagonal().add_(damping)
        h.diagonal()[dead] = 1.0
        if perm is not None:
            h = h[perm][:, perm]
        lower, failed = torch.linalg.cholesky_ex(h)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        single: Tensor = upper.float()
        if not failed and bool(torch.isfinite(single).all()) and bool((single.diagonal() > 0).all()):
            return single
    return None
