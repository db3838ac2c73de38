"""Which layers of a model are meant: one grammar of names for quantizing, converting and adapting.

A pattern is one of `fnmatch` (a plain name is one, too). It means a layer if it matches the layer's full dotted name,
the last component of it, or either of these of a module that the layer is in: "model.layers.0" and "self_attn" mean
all layers below. A pattern that means no layer is an error, but for "lm_head", which defaults name on any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .checks import check_weight, module_bytes
from .low_bit import LowBitLinear
from .report import LayerReport

HEAD = "lm_head"  # the output layer of most language models
SKIP = (HEAD,)
# For layers that another part of octavo made there is a line that says what to do: (how to tell them, the line).
_hints: list[tuple[Callable[[nn.Module], bool], str]] = []


@dataclass
class Target:
    """A layer to quantize, with all names that it has in its model."""

    names: list[str]
    linear: nn.Linear


def add_hint(applies: Callable[[nn.Module], bool], hint: str) -> None:
    """Say `hint` where a model has no layer to quantize or adapt, and has modules that `applies` is true of."""
    _hints.append((applies, hint))


def hints(model: nn.Module) -> list[tuple[str, str]]:
    """Names of modules that stand in the way, with what to do."""
    return [(name, hint) for name, m in model.named_modules() for applies, hint in _hints if applies(m)]


# ---- patterns --------------------------------------------------------------------------------------------------------


def as_patterns(what: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """One pattern or several, as a tuple. ValueError for anything else."""
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"{what} must be a list of patterns, got {patterns!r}")
    return found


def matches(names: Iterable[str], pattern: str) -> bool:
    """Whether a pattern means a layer with these full names.

    Example:
        >>> from octavo.core.targets import matches
        >>> matches(["model.layers.0.mlp.up_proj"], "up_proj"), matches(["model.layers.0.mlp.up_proj"], "*.0.mlp")
        (True, True)
    """
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if fnmatchcase(".".join(parts[:end]), pattern) or fnmatchcase(parts[end - 1], pattern):
                return True
    return False


def check_patterns(what: str, patterns: Sequence[str], names: Iterable[Sequence[str]], of: str) -> None:
    """ValueError if a pattern means none of the layers, each given by its names."""
    layers = list(names)
    if unknown := [p for p in patterns if p != HEAD and not any(matches(own, p) for own in layers)]:
        raise ValueError(f"{what} names no {of}: {', '.join(unknown)}")


def choose(
    layers: Mapping[nn.Module, Sequence[str]],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str],
    of: str,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers that are included, all by default, and not excluded; and those that are excluded.

    Raises:
        ValueError: a pattern that means no layer; `of` says what they are layers of.
    """
    included, excluded = as_patterns("include", include), as_patterns("exclude", exclude)
    check_patterns("include", included, layers.values(), of)
    check_patterns("exclude", excluded, layers.values(), of)
    asked = [m for m, names in layers.items() if include is None or any(matches(names, p) for p in included)]
    out = [m for m in asked if any(matches(layers[m], p) for p in excluded)]
    return [module for module in asked if module not in out], out


# ---- the layers of a model -------------------------------------------------------------------------------------------


def read_by_torch(model: nn.Module) -> set[int]:
    """The ids of layers whose weights torch's encoder layers read for evaluation, past their forward."""
    return {
        id(child)
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer)
        for child in (layer.linear1, layer.linear2)
    }


def find_targets(
    model: nn.Module, skip: str | Iterable[str] = SKIP, widest: int | None = None
) -> tuple[list[Target], dict[str, str]]:
    """The `torch.nn.Linear` layers to quantize, checked, and those that are left alone, with the reason.

    Args:
        skip: patterns of layers to leave alone.
        widest: the largest in_features.

    Raises:
        ValueError: the model is itself a layer, a pattern means no layer, there is no layer to quantize, or a weight
            cannot be quantized; the layer is named.
    """
    patterns = as_patterns("skip", skip)
    if type(model) is nn.Linear:
        raise ValueError(
            "the model is itself a Linear; use from_linear of octavo.nn.Int8Linear or NF4Linear, or "
            "octavo.spqr.quantize_weight"
        )
    found: dict[nn.Module, list[str]] = {}
    owners: dict[Tensor, set[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            found.setdefault(module, []).append(name)
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    check_patterns("skip", patterns, found.values(), f"torch.nn.Linear of {type(model).__name__}")
    fused = read_by_torch(model)
    targets, skipped = [], {}
    for module, names in found.items():
        assert isinstance(module, nn.Linear)
        if any(matches(names, pattern) for pattern in patterns):
            skipped[names[0]] = "as asked"
        elif module._parameters.get("weight") is None:
            skipped[names[0]] = "its weight is not a parameter"
        elif len(owners[module.weight]) > 1:
            skipped[names[0]] = "its weight is shared with another module"
        elif id(module) in fused:
            skipped[names[0]] = "torch's TransformerEncoderLayer reads its weight itself"
        elif _has_hooks(module):
            skipped[names[0]] = "it has hooks, which a new module would lose"
        elif widest is not None and module.in_features > widest:
            skipped[names[0]] = f"in_features {module.in_features} is more than {widest}"
        else:
            targets.append(Target(names, module))
    if not targets:
        skipped |= dict(hints(model))
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize{reasons and ':'}{reasons}")
    for target in targets:
        check_weight(target.linear, target.names[0])
    return targets, skipped


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")  # accelerate replaces forward


def put(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Make `new` the module of all these names."""
    for name in names:
        model.set_submodule(name, new)


def replace_each(
    model: nn.Module,
    targets: list[Target],
    done: Callable[[str], None],
    convert: Callable[[Target], LowBitLinear],
) -> list[LayerReport]:
    """Put what `convert` makes in the place of each target, freeing the target before the next one is made."""
    layers = []
    targets.reverse()
    while targets:
        target = targets.pop()  # the last reference to the layer, but for the model's
        before = module_bytes(target.linear)
        new = convert(target)
        put(model, target.names, new)
        layers.append(report_of(target.names[0], new, before))
        done(target.names[0])
    return layers


def report_of(name: str, layer: LowBitLinear, bytes_before: int, **figures: Any) -> LayerReport:
    """The report of one layer, with the figures that its class has, and others."""
    shape = (layer.out_features, layer.in_features)
    return LayerReport(name, shape, bytes_before, module_bytes(layer), {**layer.figures(), **figures})
