"""Which modules are linear layers, whatever their class is called, and those of transformers' GPT-2 as such."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .low_bit import LowBitLinear
from .transposed import is_stored_transposed as is_stored_transposed
from .transposed import store_transposed as store_transposed

_known: dict[type[nn.Module], bool] = {}  # whether a subclass's forward is Linear's


def is_linear(module: nn.Module) -> bool:
    """Whether it computes ``x @ weight.T + bias`` by a weight of its own, and nothing else: a `torch.nn.Linear`, or one
    of a subclass that adds neither tensors nor modules and whose forward gives the same (falcon's, timm's).

    Example:
        >>> import torch
        >>> from octavo.core.linears import is_linear
        >>> class Plain(torch.nn.Linear):
        ...     pass
        >>> class Doubled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> is_linear(Plain(4, 2)), is_linear(Doubled(4, 2)), is_linear(torch.nn.ReLU())
        (True, False, False)
    """
    cls = type(module)
    if cls is nn.Linear:
        return True
    # Of torch.nn.MultiheadAttention's output projection the owner reads the weight.
    strangers = (LowBitLinear, NonDynamicallyQuantizableLinear)
    if not isinstance(module, nn.Linear) or isinstance(module, strangers) or parametrize.is_parametrized(module):
        return False
    if cls not in _known:
        _known[cls] = _computes_the_same(cls)
    if not _known[cls] or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
        return False
    own = {name for name in vars(module) if not name.startswith("_")} - _ATTRIBUTES
    return not (own or module._modules or module._buffers) and module._parameters.keys() <= {"weight", "bias"}


_ATTRIBUTES = {"training", "in_features", "out_features", "forward"}  # of an instance: forward is accelerate's
_METHODS = {"forward", "extra_repr", "reset_parameters"}


def _computes_the_same(cls: type[nn.Module]) -> bool:
    between = cls.__mro__[: cls.__mro__.index(nn.Linear)]
    names = {name for c in between for name in vars(c) if not name.startswith("__")}
    if cls.__call__ is not nn.Module.__call__ or not names <= _METHODS:
        return False
    if cls.forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.device("cpu"):
            for n, k in ((2, 3), (16, 8)):
                probe: Any = cls.__new__(cls)
                nn.Module.__init__(probe)
                probe.in_features, probe.out_features = k, n
                probe.weight = nn.Parameter(torch.randn(n, k, generator=generator))
                some = nn.Parameter(torch.randn(n, generator=generator))
                for training in (True, False):
                    probe.training = training
                    for bias, shape in ((some, (2, k)), (None, (4, 3, k)), (some, (k,))):
                        probe.bias = bias
                        x = torch.randn(shape, generator=generator) * 10
                        if not torch.allclose(cls.forward(probe, x), F.linear(x, probe.weight, bias), atol=1e-4):
                            return False
    except Exception:  # what it needs besides is not there
        return False
    return True


# ---- transformers' Conv1D --------------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 and its kin, whose weight is stored [in, out]."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def from_conv1d(conv: Any) -> nn.Linear:
    """The `torch.nn.Linear` that a Conv1D is. It shares the weight's memory, and state dicts have it as before."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t(), conv.weight.requires_grad)
    linear.bias = conv.bias
    store_transposed(linear)
    return linear.train(conv.training)
