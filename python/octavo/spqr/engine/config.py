"""`SpQRConfig`: what the quantizer is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

GROUP_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class SpQRConfig:
    """Settings of SpQR (arXiv 2306.03078), of which GPTQ and round-to-nearest are special cases: see `gptq` and `rtn`.

    Attributes:
        bits: of a code: 2, 3 or 4.
        group_size: columns that share a scale and a zero point (the paper's beta1): 16, 32, 64, or 128, which no
            packed format holds.
        stats_group_size: rows whose scales, and zero points, are quantized together (beta2): a multiple of 16.
        scale_bits, zero_bits: of the codes of scales and zero points, 1 to 4.
        bilevel: quantize scales and zero points; else they are fp16.
        tau: weights whose squared error, divided by the inverse Hessian's diagonal, is above ``tau`` times its mean
            over the layer (of the weights' variance in place of the error) are outliers: the lower, the more. The
            paper's recipe is 0.2. inf: no outliers.
        outlier_fraction: in place of `tau`: the share of weights to keep as outliers; tau is found by search.
        leave_one_out: fit a group without its likely outliers; False is the simpler search of the paper's ablation.
        act_order: quantize columns in the order of their inputs' squared sum, the largest first.
        damping: what is added to the Hessian's diagonal, in units of the diagonal's mean. The authors' recipes have
            1.0; 0.1 lowered the divergence of SmolLM2-135M and all-MiniLM-L6-v2 by a quarter at the same bits.
        propagate: correct later columns for the errors of earlier ones (GPTQ); False needs no calibration.

    Raises:
        ValueError: a setting outside these ranges.

    Example:
        >>> from octavo.spqr import SpQRConfig
        >>> print(SpQRConfig())
        3 bits, groups of 16 x 16, two-level statistics, tau 0.2
        >>> print(SpQRConfig.gptq(bits=3))
        3 bits, groups of 64, fp16 statistics, no outliers
    """

    bits: int = 3
    group_size: int = 16
    stats_group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    bilevel: bool = True
    tau: float = 0.2
    outlier_fraction: float | None = None
    leave_one_out: bool = True
    act_order: bool = True
    damping: float = 0.1
    propagate: bool = True

    def __post_init__(self) -> None:
        def check(right: bool, name: str, wanted: str) -> None:
            if not right:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

        for name in ("bits", "group_size", "stats_group_size", "scale_bits", "zero_bits"):
            check(isinstance(getattr(self, name), int), name, "an integer")
        for name in ("tau", "damping", "outlier_fraction"):
            value = getattr(self, name)
            check(isinstance(value, int | float) or (name == "outlier_fraction" and value is None), name, "a number")
        check(self.bits in (2, 3, 4), "bits", "2, 3 or 4")
        check(self.group_size in GROUP_SIZES, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}")
        rows = self.stats_group_size
        check(16 <= rows <= 1024 and rows % 16 == 0, "stats_group_size", "a multiple of 16 up to 1024")
        check(1 <= self.scale_bits <= 4, "scale_bits", "1 to 4")
        check(1 <= self.zero_bits <= 4, "zero_bits", "1 to 4")
        check(self.tau >= 0.0, "tau", "0 or positive (inf: no outliers)")
        share = self.outlier_fraction
        check(share is None or 0.0 <= share <= 0.5, "outlier_fraction", "from 0 to 0.5")
        check(0.0 <= self.damping < math.inf, "damping", "0 or positive, and finite")

    @classmethod
    def gptq(cls, bits: int = 4, group_size: int = 64, **settings: Any) -> SpQRConfig:
        """GPTQ (arXiv 2210.17323): fp16 scales and zero points per group, no outliers, damping 0.01."""
        return cls(bits, group_size, **{"bilevel": False, "tau": math.inf, "damping": 0.01, **settings})

    @classmethod
    def rtn(cls, bits: int = 4, group_size: int = 64, **settings: Any) -> SpQRConfig:
        """Round to nearest: every group on its own, by its minimum and maximum; no calibration."""
        return cls.gptq(bits, group_size, **{"propagate": False, "act_order": False, **settings})

    @property
    def has_outliers(self) -> bool:
        return self.outlier_fraction != 0.0 if self.outlier_fraction is not None else self.tau < math.inf

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        kind = "two-level statistics" if self.bilevel else "fp16 statistics"
        outliers = "no outliers"
        if self.has_outliers:
            share = self.outlier_fraction
            outliers = f"tau {self.tau:g}" if share is None else f"{share:.2%} outliers"
        rows = f" x {self.stats_group_size}" if self.bilevel else ""
        return f"{self.bits} bits, groups of {self.group_size}{rows}, {kind}, {outliers}"
