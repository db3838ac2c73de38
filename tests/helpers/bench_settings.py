"""What the tests of benches share: limits and settings that need no measuring."""

from __future__ import annotations

from octavo.bench import common, limits
from octavo.bench import int8 as family


def limits_of(read, **peaks):
    return limits.Limits(1, "avx2", read, read, peaks)


def setting(names, effort=None):
    effort = effort or common.Effort(sample_s=0.0, budget_s=0.0, min_rounds=2, max_rounds=2)
    methods = [method for method in family.METHODS if method.name in names]
    return family.Setting(effort, limits_of(read=1e9, int8=1e9, fma=1e9), 1, "cpu", methods)
