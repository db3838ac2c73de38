"""What every method rests on: the registry, `LowBitLinear`, the choice of layers, reports and checks.

Nothing here knows a method's name. :mod:`octavo.core.method` says how a method is added.
"""

from .low_bit import LowBitLinear
from .method import Method, MethodSettings, option, register

__all__ = ["LowBitLinear", "Method", "MethodSettings", "option", "register"]
