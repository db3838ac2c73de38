"""What every method rests on: the registry, `LowBitLinear`, the choice of layers, reports and checks.

Nothing here knows a method's name. :mod:`octavo.core.method` says how a method is added.
"""
