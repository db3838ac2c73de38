"""Every method rests on this package: the registry, `LowBitLinear`, the choice of layers, reports and checks.

Nothing here knows a method's name. :mod:`octavo.core.method` says how a method is added.
"""
