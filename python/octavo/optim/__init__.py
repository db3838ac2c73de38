"""Optimizers with 8-bit states (arXiv 2110.02861): drop-in for those of torch.optim, on the CPU and on GPUs.

Each is a `torch.optim.Optimizer` with torch's arguments and meaning, and the options of `Optimizer8bit`.
Those called Paged keep states on the host. StableAdamW and those called Paged without 8bit have fp32 states.
"""

from ._base import Optimizer8bit
from ._paged import (
    PagedAdagrad8bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedLAMB8bit,
    PagedLARS8bit,
    PagedLion,
    PagedLion8bit,
    PagedRMSprop8bit,
    PagedSGD8bit,
    PagedStableAdamW,
    PagedStableAdamW8bit,
)
from ._rules import Adagrad8bit, Adam8bit, AdamW8bit, AdEMAMix8bit, Lion8bit, RMSprop8bit, SGD8bit
from ._rules_sums import LAMB8bit, LARS8bit, StableAdamW, StableAdamW8bit

__all__ = [
    "AdEMAMix8bit",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion8bit",
    "Optimizer8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdagrad8bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLAMB8bit",
    "PagedLARS8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedRMSprop8bit",
    "PagedSGD8bit",
    "PagedStableAdamW",
    "PagedStableAdamW8bit",
    "RMSprop8bit",
    "SGD8bit",
    "StableAdamW",
    "StableAdamW8bit",
]
