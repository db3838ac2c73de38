"""Paged optimizers (arXiv 2305.14314, section 3): those of `_rules` with other defaults.

Names are bitsandbytes': without 8bit, states are fp32, as in the QLoRA recipe.
"""

from __future__ import annotations

from ._options import Options
from ._rules import Adagrad8bit, Adam8bit, AdamW8bit, AdEMAMix8bit, Lion8bit, RMSprop8bit, SGD8bit
from ._rules_sums import LAMB8bit, LARS8bit, StableAdamW8bit

_PAGED = Options(paged=True)
_PAGED_32 = Options(paged=True, bits=32)


class PagedAdagrad8bit(Adagrad8bit):
    """`Adagrad8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdagrad8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedAdam8bit(Adam8bit):
    """`Adam8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdam8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdamW8bit([weight], lr=0.01, weight_decay=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """`AdEMAMix8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdEMAMix8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedLAMB8bit(LAMB8bit):
    """`LAMB8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedLAMB8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedLARS8bit(LARS8bit):
    """`LARS8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedLARS8bit([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedLion8bit(Lion8bit):
    """`Lion8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedLion8bit([weight], lr=0.001)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedRMSprop8bit(RMSprop8bit):
    """`RMSprop8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedRMSprop8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedSGD8bit(SGD8bit):
    """`SGD8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedSGD8bit([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedStableAdamW8bit(StableAdamW8bit):
    """`StableAdamW8bit` with ``paged=True``: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedStableAdamW8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED


class PagedAdam(Adam8bit):
    """`Adam8bit` with ``paged=True`` and ``bits=32``: fp32 states, see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdam([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED_32


class PagedAdamW(AdamW8bit):
    """`AdamW8bit` with ``paged=True`` and ``bits=32``: fp32 states, see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdamW([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED_32


class PagedAdEMAMix(AdEMAMix8bit):
    """`AdEMAMix8bit` with ``paged=True`` and ``bits=32``: fp32 states, see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedAdEMAMix([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED_32


class PagedLion(Lion8bit):
    """`Lion8bit` with ``paged=True`` and ``bits=32``: fp32 states, see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedLion([weight], lr=0.001)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED_32


class PagedStableAdamW(StableAdamW8bit):
    """`StableAdamW8bit` with ``paged=True`` and ``bits=32``: fp32 states, see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.PagedStableAdamW([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = _PAGED_32
