"""Which layers of a model are meant: one grammar of names for quantizing, converting and adapting.

A pattern is one of `fnmatch` (a plain name is one, too). It means a layer if it matches the layer's full dotted name,
the last component of it, or either of these of a module that the layer is in: "model.layers.0" and "self_attn" mean
all layers below. A pattern that means no layer is an error, but for "lm_head", which defaults name on any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import check_weight, module_bytes
from .linears import from_conv1d, is_conv1d, is_linear, is_stored_transposed
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
    module: nn.Module  # that the model has: the layer itself, or the Conv1D that it stands for


def add_hint(applies: Callable[[nn.Module], bool], hint: str) -> None:
    """Say `hint` where a model has no layer to quantize or adapt, and has modules that `applies` is true of."""
    _hints.append((applies, hint))


def hints(model: nn.Module) -> list[tuple[str, str]]:
    """Names of modules that stand in the way, with what to do."""
    return [(name, hint) for name, m in model.named_modules() for applies, hint in _hints if applies(m)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's module, DataParallel and DistributedDataParallel: its names are those in
    files."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


# ---- patterns --------------------------------------------------------------------------------------------------------


def as_patterns(what: str, patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """One pattern or several, as a tuple. ValueError for anything else."""
    if not isinstance(patterns, str | Iterable | None):
        raise ValueError(f"{what} must be a list of patterns, got {patterns!r}")
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
    """The linear layers to quantize, checked, and all other weights of matrix products, with why they are left alone.

    Args:
        skip: patterns of layers to leave alone. By default also the output layer of a transformers model, and the
            head that it has for a task, which is new where a checkpoint is trained for another one.
        widest: the largest in_features.

    Raises:
        ValueError: the model is itself a layer, a pattern means no layer, there is no layer to quantize, or a weight
            cannot be quantized; the layer is named.
    """
    patterns = as_patterns("skip", skip)
    if is_linear(model) or is_conv1d(model):
        raise ValueError(
            f"the model is itself a {type(model).__name__}; use from_linear of octavo.nn.Int8Linear or NF4Linear, or "
            "octavo.spqr.quantize_weight"
        )
    found, others = linears_of(model)
    named = {**found, **{module: [name] for name, module in model.named_modules() if name in others}}
    check_patterns("skip", patterns, named.values(), f"linear layer of {type(model).__name__}")
    reasons = _left_by_transformers(model, by_default=patterns == SKIP)
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(module)
    fused = read_by_torch(model)
    targets, skipped = [], {}
    for module, names in found.items():
        weight = module._parameters.get("weight")
        width = weight.shape[0 if is_conv1d(module) else 1] if weight is not None else 0
        if any(matches(names, pattern) for pattern in patterns):
            why = "as asked"
        elif weight is None:
            why = "its weight is not a parameter"
        elif len(owners[weight]) > 1:
            why = "its weight is shared with another module"
        elif id(module) in fused:
            why = "torch's TransformerEncoderLayer reads its weight itself"
        elif _has_hooks(module):
            why = "it has hooks, which a new module would lose"
        elif named_by := next((reasons[name] for name in names if name in reasons), ""):
            why = named_by
        elif widest is not None and width > widest:
            why = f"in_features {width} is more than {widest}"
        else:
            targets.append(Target(names, from_conv1d(module) if is_conv1d(module) else cast(nn.Linear, module), module))
            continue
        skipped[names[0]] = why
    if not targets:
        left = skipped | others | dict(hints(model))
        said = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize{said and ':'}{said}")
    for target in targets:
        check_weight(target.linear, target.names[0])
    return targets, skipped | others


def linears_of(model: nn.Module) -> tuple[dict[nn.Module, list[str]], dict[str, str]]:
    """The linear layers of a model, with all their names, and its other weights of matrix products, with a reason."""
    found: dict[nn.Module, list[str]] = {}
    others: dict[str, str] = {}
    adapters = parts_of_adapters(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in adapters:
            continue
        if is_linear(module) or is_conv1d(module):
            found.setdefault(module, []).append(name)
        elif not isinstance(module, LowBitLinear) and (reason := _other_product(module)):
            others[name] = reason
    return found, others


def parts_of_adapters(model: nn.Module) -> set[int]:
    """The ids of modules that are an adapter's, of PEFT say, and not of the layer that it adapts."""
    parts: set[int] = set()
    for module in model.modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Module):
            parts |= {id(m) for m in module.modules()} - {id(m) for m in base.modules()} - {id(module)}
    return parts


def _other_product(module: nn.Module) -> str:
    """Why a module is left alone that multiplies by weights of its own; "" for one that does not."""
    size = sum(p.nbytes for p in module._parameters.values() if p is not None)
    kept = f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{size} B"
    kind = type(module).__name__
    if parametrize.is_parametrized(module) and hasattr(module, "weight"):
        return f"its weight is computed by a parametrization of its {kind}"
    if isinstance(module, nn.Linear):
        return f"what its class {kind} does beside a product would be lost, {kept}"
    if isinstance(module, nn.MultiheadAttention):
        return f"torch.nn.MultiheadAttention multiplies by its input projection itself, {kept}"
    if isinstance(module, nn.Bilinear | nn.RNNBase | nn.RNNCellBase):
        return f"no method knows a {kind}, {kept}"
    if any(p is not None and p.dim() == 3 and min(p.shape) > 1 for p in module._parameters.values()) and not isinstance(
        module, nn.modules.conv._ConvNd
    ):
        return f"its weights are 3-D (experts), which no method knows yet, {kept}"
    return ""


def _left_by_transformers(model: Any, by_default: bool) -> dict[str, str]:
    """Layers that transformers leaves alone in a model of its own, with the reason."""
    if not hasattr(model, "all_tied_weights_keys") or not hasattr(model, "_keep_in_fp32_modules"):
        return {}
    reasons: dict[str, str] = {}
    names = [name for name, module in model.named_modules() if is_linear(module) or is_conv1d(module)]
    kept = {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name in names:
        if any(matches((name,), pattern) for pattern in kept):
            reasons[name] = "transformers keeps it in fp32"
    if getattr(getattr(model, "config", None), "model_type", "") == "rwkv":
        rescaled = ("*.attention.output", "*.feed_forward.value")
        found = [name for name in names if any(matches((name,), pattern) for pattern in rescaled)]
        reasons |= dict.fromkeys(found, "rwkv rescales its weight in place")
    if by_default:
        if names and hasattr(model, "get_output_embeddings") and (head := model.get_output_embeddings()) is not None:
            reasons |= {name: "it is the output layer" for name in names if model.get_submodule(name) is head}
        for name in _of_task(model, names):
            reasons.setdefault(name, "it is of the task's head, which another task trains anew")
    tied: Mapping[str, str] = model.all_tied_weights_keys or {}
    for key in (*tied.keys(), *tied.values()):
        reasons[key.removesuffix(".weight")] = "its weight is shared with another module"
    return reasons


def _of_task(model: Any, names: Sequence[str]) -> list[str]:
    """The layers outside of the base model, where a model for a task has one that is most of it."""
    prefix: str = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, prefix, None) is None:
        return []
    outside = [name for name in names if not name.startswith(f"{prefix}.")]
    return outside if 2 * len(outside) < len(names) else []


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
        new._octavo_transposed = is_stored_transposed(target.linear)
        put(model, target.names, new)
        layers.append(report_of(target.names[0], new, before))
        done(target.names[0])
    return layers


def report_of(name: str, layer: LowBitLinear, bytes_before: int, **figures: Any) -> LayerReport:
    """The report of one layer, with the figures that its class has, and others."""
    shape = (layer.out_features, layer.in_features)
    return LayerReport(name, shape, bytes_before, module_bytes(layer), {**layer.figures(), **figures})
