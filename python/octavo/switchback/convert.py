"""`convert_linears`: the linear layers of a model to modules that train in 8 bit, where they stand, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.bridges import layers_changed
from ..core.checks import FLOATS, MAX_K, dtype_name
from ..core.linears import from_conv1d, is_conv1d, is_linear
from ..core.low_bit import LowBitLinear
from ..core.targets import SKIP, add_hint, choose, put, unwrapped
from .attention import SwitchBackMultiheadAttention
from .functional import check_options
from .linear import Int8Weight, SwitchBackLinear

_OPTIONS: dict[str, Any] = {"variant": "switchback", "k_split": None, "stochastic_rounding": False}
_CONVERTED = (SwitchBackLinear, SwitchBackMultiheadAttention)
add_hint(
    lambda module: isinstance(module, Int8Weight),
    "it trains in int8; octavo.convert_linears(model, torch.nn.Linear) turns it back",
)


@dataclass(frozen=True)
class Conversion:
    """The record of what `convert_linears` did.

    Attributes:
        converted: names of the modules that are of another class now.
        left: names of the modules that were asked for and stay what they are, with the reason.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> done = octavo.convert_linears(model, exclude=["1"])
        >>> done.converted
        ['0']
    """

    converted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def convert_linears(
    model: nn.Module,
    cls: type[nn.Linear] = SwitchBackLinear,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = SKIP,
    **options: Any,
) -> Conversion:
    """Turn linear layers into `octavo.nn.SwitchBackLinear`, and attention into
    `octavo.nn.SwitchBackMultiheadAttention`, or back.

    Modules change their class where they stand: parameters, hooks, names, training mode and whatever else refers to
    them stay as they are, so that it makes no difference whether the optimizer was made before or after. A call with
    `torch.nn.Linear` undoes one with `SwitchBackLinear`.

    Converted are modules whose type is exactly `torch.nn.Linear` (also a fused query-key-value projection) or
    `torch.nn.MultiheadAttention`, whose projections are converted together. All is checked before anything is changed.
    Parameters that are frozen or shared with another module stay so. Layers that are converted already, with the same
    options, are left; modules may be on several devices. For evaluation torch's encoder layers have a kernel that takes
    weights past the modules: it is switched off where a part of the layer is converted, so convert the layer, or a
    model around it, and not its parts one by one.

    Args:
        model: converted in place; it may be such a module itself.
        cls: `SwitchBackLinear`, or `torch.nn.Linear` to go back.
        include: patterns (as of `fnmatch`, or plain names) of full names, last components of names, or modules that
            contain the layers; None: all.
        exclude: patterns of layers to leave alone. The projections of an attention go with it.
        options: of `SwitchBackLinear`: variant, k_split, stochastic_rounding.

    Returns:
        The names of what was converted, and of what was left and why.

    Raises:
        ValueError: unknown options or variant, patterns that match nothing (but "lm_head"), no layer to convert, a
            weight of another dtype or wider than 131071, layers that have other options already, or, going back, were
            prepared for evaluation.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> octavo.convert_linears(model, exclude=["2"]).converted
        ['0']
        >>> type(model[0]).__name__
        'SwitchBackLinear'
    """
    model = unwrapped(model)
    backwards = cls is nn.Linear
    if not backwards and cls is not SwitchBackLinear:
        raise ValueError(f"cls must be octavo.nn.SwitchBackLinear, or torch.nn.Linear to go back, got {cls!r}")
    if unknown := [name for name in options if backwards or name not in _OPTIONS]:
        known = "none for torch.nn.Linear" if backwards else ", ".join(_OPTIONS)
        raise ValueError(f"unknown option {unknown[0]!r}; known: {known}")
    settings = _OPTIONS | options
    check_options(**settings)
    result = Conversion()
    chosen: list[nn.Module] = []
    matching, excluded = _matching(model, include, exclude)
    done = False
    for module, name in matching:
        is_done = type(module) in _CONVERTED
        done |= is_done
        if backwards:
            if not isinstance(module, _CONVERTED):
                continue
            if not is_done:
                result.left[name] = f"its type is {type(module).__name__}: what a subclass adds would be lost"
                continue
            out_proj: Any = module.out_proj if isinstance(module, nn.MultiheadAttention) else None
            if isinstance(out_proj, Int8Weight) and type(out_proj) is not SwitchBackLinear:
                result.left[name] = f"its output projection is a {type(out_proj).__name__}"
                continue
            if module.prepared:
                raise ValueError(f"{name!r} was prepared for evaluation: its float weight is gone. Load the model anew")
        elif is_done:
            _check_same(module, name, settings)
            result.left[name] = "converted already"
            continue
        elif reason := _unsuited(module):
            result.left[name] = reason
            continue
        else:
            _check(module, name)
        chosen.append(module)
        result.converted.append(name)
    if not result.converted and (backwards or not done):
        _set_fast_path(model)  # parts may have been turned back one by one
        why = "".join(f"; {name or 'it'}: {reason}" for name, reason in result.left.items())
        why += f"; excluded: {', '.join(excluded)}" if excluded else ""
        what = "SwitchBackLinear" if backwards else "torch.nn.Linear or torch.nn.MultiheadAttention"
        raise ValueError(f"there is no {what} to convert in {type(model).__name__}{why}")
    for module in chosen:
        if is_conv1d(module):
            names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
            put(model, names, module := from_conv1d(module))
        _turn_back(module) if backwards else _turn(module, settings)
    _set_fast_path(model)
    return result


def prepare_for_eval(model: nn.Module) -> list[str]:
    """`octavo.nn.SwitchBackLinear.prepare_for_eval` for all such layers, attention included: only int8 weights stay.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no such layer; one that cannot be prepared. Nothing is changed then.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(octavo.nn.SwitchBackLinear(4, 8)).eval()
        >>> octavo.prepare_for_eval(model)
        ['0']
        >>> model[0].weight.dtype
        torch.int8
    """
    model = unwrapped(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Weight)}
    if not layers:
        raise ValueError(f"there is no SwitchBackLinear in {type(model).__name__}: convert_linears makes them")
    for name, layer in layers.items():
        try:
            layer.check_preparable()
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
    for layer in layers.values():
        layer.prepare_for_eval()
    _set_fast_path(model)
    layers_changed(model)
    return list(layers)


def _matching(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[tuple[nn.Module, str]], list[str]]:
    """Linear layers and attentions that the patterns choose, with their first names, and names that they exclude."""
    names: dict[nn.Module, list[str]] = {}
    inside: set[nn.Module] = set()  # output projections belong to their attention
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.add(module.out_proj)
    for name, module in model.named_modules(remove_duplicate=False):
        product = isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_conv1d(module)
        if product and module not in inside and not isinstance(module, LowBitLinear):
            names.setdefault(module, []).append(name)
    of = (
        f"linear layer or attention of {type(model).__name__} (the projections of a torch.nn.MultiheadAttention go "
        "with it)"
    )
    chosen, excluded = choose(names, include, exclude, of)
    return [(module, names[module][0]) for module in chosen], [names[module][0] for module in excluded]


def _unsuited(module: nn.Module) -> str | None:
    """Why a module stays what it is."""
    if is_linear(module) or is_conv1d(module):
        return None
    if type(module) is not nn.MultiheadAttention:
        return f"its type is {type(module).__name__}: what a subclass adds would be lost"
    if module.in_proj_weight is None:
        return "its keys or values have another width than its queries"
    if module.bias_k is not None or module.add_zero_attn:
        return "it has add_bias_kv or add_zero_attn"
    if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
        return f"its output projection is a {type(module.out_proj).__name__}"
    return None


def _check(module: Any, name: str) -> None:
    weights = {"weight": module.weight, "bias": module.bias} if isinstance(module, nn.Linear) else {}
    if isinstance(module, nn.MultiheadAttention):
        weights = {"in_proj_weight": module.in_proj_weight, "in_proj_bias": module.in_proj_bias}
        weights |= {"out_proj.weight": module.out_proj.weight, "out_proj.bias": module.out_proj.bias}
    for what, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype not in FLOATS:
            raise ValueError(f"{name}: {what} must be float32, float16 or bfloat16, got {dtype_name(weight)}")
        if max(weight.shape) > MAX_K and weight.dim() == 2:
            raise ValueError(
                f"{name}: {what} of shape {list(weight.shape)} is wider than {MAX_K}, where a sum of int8 products "
                "can leave int32: exclude it"
            )


def _check_same(module: Any, name: str, settings: dict[str, Any]) -> None:
    own = {option: getattr(module, option) for option in _OPTIONS}
    if own != settings:
        was = ", ".join(f"{key}={value!r}" for key, value in own.items() if value != settings[key])
        raise ValueError(
            f"{name!r} is converted already, with {was}: go back by convert_linears(model, nn.Linear) first"
        )


def _turn(module: Any, settings: dict[str, Any]) -> None:
    module.__class__ = SwitchBackMultiheadAttention if isinstance(module, nn.MultiheadAttention) else SwitchBackLinear
    module._set_options(**settings)


def _turn_back(module: Any) -> None:
    module._clear_options()
    if isinstance(module, nn.MultiheadAttention):
        if isinstance(module.out_proj, SwitchBackLinear):  # else it was turned back, or replaced, by itself
            out_proj: Any = module.out_proj
            out_proj._clear_options()
            out_proj.__class__ = NonDynamicallyQuantizableLinear
        module.__class__ = nn.MultiheadAttention
    else:
        module.__class__ = nn.Linear


# Attributes of torch's encoders that allow a kernel for evaluation, which takes the weights of their modules and leaves
# these out. Where one of them computes in int8 they are off, and kept under the other name.
_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def _set_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        for kind, attribute in _FAST_PATHS.items():
            own, kept = module.__dict__, f"_octavo_{attribute}"
            if not isinstance(module, kind) or (attribute not in own and kept not in own):
                continue
            int8 = any(isinstance(part, Int8Weight) for part in module.modules())
            if int8 and kept not in own:
                own[kept], own[attribute] = own[attribute], type(own[attribute])(0)
            elif not int8 and kept in own:
                own[attribute] = own.pop(kept)
