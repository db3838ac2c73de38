"""LoRA adapters of whole models: add, load, save and switch them. The base stays in 4, 8 or 16 bit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bridges import layers_changed
from ..core.checks import device_of
from ..core.linears import from_conv1d, is_conv1d
from ..core.low_bit import LowBitLinear
from ..core.stored import new_directory
from ..core.targets import SKIP, as_patterns, choose, hints, put
from . import peft_format
from .layers import Names, adapted_layers, linear_layers, unwrapped
from .linear import LoRAConfig, LoRALinear, check_adapter_name, check_dtype, new_adapter
from .watching import watch_gradients

# ---- the layers of a model -------------------------------------------------------------------------------------------


def _refuse_merged(layers: Iterable[nn.Module], what: str) -> None:
    for layer in layers:
        if isinstance(layer, LoRALinear):
            layer._refuse_merged(what)


def _is_sharded(module: nn.Module) -> bool:
    return any(type(p) is not nn.Parameter and hasattr(p, "full_tensor") for p in module.parameters())


def _wrap(model: nn.Module, layer: nn.Module, names: Sequence[str]) -> LoRALinear:
    if isinstance(layer, LoRALinear):
        return layer
    new = LoRALinear._without_adapter(from_conv1d(layer) if is_conv1d(layer) else layer)
    put(model, names, new)
    return new


def _freeze_all_but(model: nn.Module, adapter: str) -> None:
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and adapter in layer.adapters:
            layer.lora_A[adapter].requires_grad_(True)
            layer.lora_B[adapter].requires_grad_(True)


def _activate(model: nn.Module, adapter: str | None) -> None:
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active_adapter = adapter if adapter in layer.adapters else None


def _check_model(model: nn.Module) -> None:
    if type(model) is nn.Linear or isinstance(model, (LowBitLinear, LoRALinear)):
        raise ValueError(f"the model is itself a {type(model).__name__}; use octavo.nn.LoRALinear")
    if _is_sharded(model):
        raise ValueError(f"{type(model).__name__} is sharded: give it its adapters before fully_shard")


# ---- adding and removing ---------------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = 16,
    dropout: float = 0.05,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = SKIP,
    name: str = "default",
    dtype: torch.dtype | None = None,
    use_rslora: bool = False,
) -> list[str]:
    """Give the linear layers of a model, quantized or not, a new adapter to train (LoRA, arXiv 2106.09685).

    Every `torch.nn.Linear`, `Int8Linear`, `NF4Linear` and `SpQRLinear` is replaced, in place, by a `LoRALinear` with it
    as base. Everything else is frozen: only the new A and B require gradients. The new adapter is the active one, and
    changes nothing before it is trained.

    Args:
        model: any module; it may have other adapters already.
        rank, alpha, dropout, dtype, use_rslora: as of `octavo.nn.LoRALinear`. QLoRA (arXiv 2305.14314) adapts all
            linear layers, by rank 64, alpha 16 and dropout 0.1 (0.05 from 33B parameters on).
        include: patterns (as of `fnmatch`, or plain names) of full names, last components of names, or modules that
            contain the layers; None for all.
        exclude: patterns of layers to leave alone; by default the output layer.
        name: of the adapter.

    Returns:
        The names of the layers that have the adapter.

    Raises:
        ValueError: numbers or a name that cannot be, an adapter of that name, names of layers that are not there, no
            layers, a model that is sharded. Nothing is changed then.
        RuntimeError: an adapter is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> octavo.add_lora(model, rank=2)
        ['0', '2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        52
    """
    model = unwrapped(model)
    _check_model(model)
    config = LoRAConfig(rank, rank if alpha is None else alpha, dropout, use_rslora)
    check_adapter_name(name)
    config.check()
    layers = linear_layers(model)
    chosen = _choose(model, layers, include, exclude)
    if include is None and as_patterns("exclude", exclude) == SKIP:
        find = getattr(model, "get_output_embeddings", None)  # of transformers; some call it otherwise than lm_head
        head = find() if callable(find) else None
        chosen = [layer for layer in chosen if head is None or head not in (layer, getattr(layer, "base_layer", None))]
    for layer in chosen:
        if isinstance(layer, LoRALinear):
            layer.check_new(name, config)
    if name in list_adapters(model):
        raise ValueError(f"the model has an adapter {name!r} already; give another name, or delete_adapter it")
    _refuse_merged(layers, "add_lora")
    bases = {layer: layer.base_layer if isinstance(layer, LoRALinear) else layer for layer in chosen}
    bases = {layer: from_conv1d(base) if is_conv1d(base) else base for layer, base in bases.items()}
    made = {layer: new_adapter(base, rank, dtype) for layer, base in bases.items()}  # memory, before any change
    for layer, tensors in made.items():
        _wrap(model, layer, layers[layer])._insert(name, config, *tensors)
    _freeze_all_but(model, name)
    _activate(model, name)
    watch_gradients(model, name)
    layers_changed(model)
    return [layers[layer][0] for layer in chosen]


def _choose(model: nn.Module, layers: Names, include: Sequence[str] | None, exclude: Sequence[str]) -> list[nn.Module]:
    chosen, _ = choose(layers, include, exclude, f"linear layer of {type(model).__name__}")
    if not chosen:
        asked = f"include is {include}, exclude is {exclude}"
        why = "".join(f"; {name}: {hint}" for name, hint in hints(model)[:1])
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt ({asked}){why}")
    return chosen


def remove_lora(model: nn.Module) -> list[str]:
    """Take all adapters away: the base layers are where they were, with the same tensors, and stay frozen.

    Returns:
        The names of the layers that had adapters.

    Raises:
        ValueError: the model has no adapters.
        RuntimeError: an adapter is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> octavo.remove_lora(model)
        ['0']
        >>> type(model[0]).__name__
        'Linear'
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    _refuse_merged(layers, "remove_lora")
    for layer, names in layers.items():
        for name in names:
            model.set_submodule(name, layer.base_layer)
    layers_changed(model)
    return [names[0] for names in layers.values()]


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter away. If it was active, none is. Layers left without any adapter become bare again.

    Raises:
        ValueError: no layer has an adapter of this name.
        RuntimeError: an adapter is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> names = octavo.add_lora(model, rank=2, name="second")
        >>> octavo.lora.delete_adapter(model, "second")
        >>> list(octavo.lora.list_adapters(model))
        ['default']
    """
    model = unwrapped(model)
    layers = _having(model, name)
    _refuse_merged(layers, "delete_adapter")
    for layer, names in layers.items():
        layer.delete_adapter(name)
        if not layer.adapters:
            for n in names:
                model.set_submodule(n, layer.base_layer)
    layers_changed(model)


# ---- switching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model.

    Attributes:
        layers: names of the layers that have it.
        ranks: the different ranks of its layers, in ascending order.
        parameters: elements of its A and B, over all layers.
        active: whether it is in use.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> adapter = octavo.lora.list_adapters(model)["default"]
        >>> adapter.layers, adapter.ranks, adapter.parameters, adapter.active
        (['0'], [2], 32, True)
    """

    layers: list[str]
    ranks: list[int]
    parameters: int
    active: bool


def list_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name; empty if there are none.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> octavo.lora.list_adapters(model)
        {'default': Adapter(layers=['0'], ranks=[2], parameters=32, active=True)}
    """
    model = unwrapped(model)
    having: dict[str, list[tuple[str, LoRALinear]]] = {}
    for layer, names in linear_layers(model).items():
        if isinstance(layer, LoRALinear):
            for adapter in layer.adapters:
                having.setdefault(adapter, []).append((names[0], layer))
    return {
        adapter: Adapter(
            [name for name, _ in found],
            sorted({layer.adapters[adapter].rank for _, layer in found}),
            sum(layer.lora_A[adapter].numel() + layer.lora_B[adapter].numel() for _, layer in found),
            any(layer.active_adapter == adapter for _, layer in found),
        )
        for adapter, found in having.items()
    }


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to an adapter, or with None to the base alone. No tensor is loaded, moved or copied.

    Layers that the adapter does not have compute as the base. What requires gradients does not change.

    Raises:
        ValueError: no layer has an adapter of this name.
        RuntimeError: an adapter is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> names = octavo.add_lora(model, rank=4, name="second")
        >>> octavo.set_adapter(model, "default")
        >>> model[0].active_adapter
        'default'
    """
    model = unwrapped(model)
    if name is None:
        adapted_layers(model)
    else:
        _having(model, name)
    _refuse_merged(linear_layers(model), "set_adapter")
    _activate(model, name)


def _having(model: nn.Module, name: str) -> dict[LoRALinear, list[str]]:
    layers = {layer: names for layer, names in adapted_layers(model).items() if name in layer.adapters}
    if not layers:
        known = ", ".join(list_adapters(model))
        raise ValueError(f"{type(model).__name__} has no adapter {name!r}; known: {known}")
    return layers


# ---- files -----------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """Read an adapter that PEFT or `save_adapter` wrote, and make it the active one. The base is not touched.

    All is checked before anything is changed: the configuration, the tensors, and that the model has every layer of the
    adapter in the right shape, and the adapter every layer of the model that its configuration names.

    Args:
        model: with its layers quantized or not; it may have other adapters.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: for the adapter; None for the directory's last component, with "_" for what a name cannot have.
        trainable: go on training it; everything else is frozen then.
        dtype: of A and B; None for fp32 of a trainable one, and else as they are stored.

    Returns:
        The name.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        ValueError: a damaged file, an adapter that octavo cannot compute (DoRA, trained biases, modules_to_save, ...),
            or of another base: layers or shapes that the model does not have; an adapter of this name is there already,
            a model that is sharded.
        RuntimeError: an adapter is merged.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> octavo.save_adapter(model, "adapter")
        >>> other = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> octavo.load_adapter(other, "adapter", name="poems")
        'poems'
    """
    model = unwrapped(model)
    _check_model(model)
    path = Path(directory)
    saved = peft_format.read(path)
    if name is None:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", path.resolve().name)
    check_adapter_name(name)
    if name in list_adapters(model):
        raise ValueError(f"the model has an adapter {name!r} already; give another name, or delete_adapter it")
    layers = linear_layers(model)
    _refuse_merged(layers, "load_adapter")
    chosen = _fit(model, layers, saved)

    dtype = torch.float32 if dtype is None and trainable else dtype
    if dtype is not None:
        check_dtype(dtype)
    made = {}
    for layer, stored in chosen.items():  # the new tensors take memory, so they are made before anything is changed
        device = device_of(layer.base_layer if isinstance(layer, LoRALinear) else layer)
        if device.type == "meta":
            raise ValueError(f"{stored} is on the meta device: load the model before its adapters")
        made[layer] = [t.to(device, t.dtype if dtype is None else dtype) for t in saved.tensors[stored]]
    for layer, (a, b) in made.items():
        _wrap(model, layer, layers[layer])._insert(name, saved.settings(chosen[layer]), a, b, trainable)
    if trainable:
        _freeze_all_but(model, name)
    _activate(model, name)
    layers_changed(model)
    return name


def _fit(model: nn.Module, layers: Names, saved: peft_format.SavedAdapter) -> dict[nn.Module, str]:
    """The layer of the model for each layer of the adapter. ValueError unless they belong together."""
    where, kind = saved.path, _class_name(model)
    if saved.base_class is not None and saved.base_class != kind:
        raise ValueError(f"{where} is an adapter of a {saved.base_class}, the model is a {kind}")
    by_name: dict[str, Any] = {name: layer for layer, names in layers.items() for name in names}
    chosen: dict[nn.Module, str] = {}
    problems = []
    for stored, (a, b) in saved.tensors.items():
        layer = by_name.get(stored)
        if layer is None:
            problems.append(f"{stored}, which {_instead(model, stored)}")
        elif (theirs := [b.shape[0], a.shape[1]]) != (ours := _shape(layer)):
            problems.append(f"{stored} as a weight of {theirs}, which is {ours} in the model")
        else:
            chosen.setdefault(layer, stored)
    if problems:
        raise ValueError(f"{where} does not fit this {kind}: it adapts {_and_more(problems)}")
    lacking = [names[0] for layer, names in layers.items() if layer not in chosen and saved.targets(names[0])]
    if foreign := [stored for stored in chosen.values() if saved.targets(stored) is False]:
        wanted, unwanted = saved.config["target_modules"], saved.config.get("exclude_modules")
        but = f" without exclude_modules {unwanted}" if unwanted else ""
        raise ValueError(
            f"{where} holds tensors of {_and_more(foreign)}, which its target_modules {wanted}{but} do not name"
        )
    if lacking:
        wanted = saved.config["target_modules"]
        raise ValueError(
            f"{where} does not fit this {kind}: target_modules {wanted} name {_and_more(lacking)}, for which it has no "
            "tensors"
        )
    return chosen


def _shape(layer: Any) -> list[int]:
    return [layer.nf, layer.nx] if is_conv1d(layer) else [layer.out_features, layer.in_features]


def _instead(model: nn.Module, name: str) -> str:
    try:
        return f"is a {type(model.get_submodule(name)).__name__} in the model"
    except AttributeError:
        return "the model does not have"


def _and_more(entries: Sequence[str]) -> str:
    return entries[0] + (f" (and {len(entries) - 1} more)" if len(entries) > 1 else "")


def _class_name(model: nn.Module) -> str:
    """The name of the model's class, without the class that fully_shard derives from it."""
    kind = type(model)
    return kind.__bases__[1].__name__ if kind.__bases__[0].__name__ == "FSDPModule" else kind.__name__


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], name: str = "default", *, overwrite: bool = False
) -> None:
    """Write an adapter as PEFT stores it, which PEFT and `load_adapter` read.

    It is written beside `directory` and renamed at the end: an interruption leaves nothing half-written. If the model
    is sharded by ``fully_shard``, all processes must call this: they gather the tensors, and the first one writes them.

    Args:
        model: with the adapter.
        directory: must not exist, or be empty.
        name: of the adapter in the model.
        overwrite: replace a directory that holds an adapter and nothing else.

    Raises:
        ValueError: no layer has an adapter of this name; values that are NaN or Inf; use_rslora of some layers only.
        FileExistsError, FileNotFoundError: see `directory`.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> names = octavo.add_lora(model, rank=2)
        >>> octavo.save_adapter(model, "saved-adapter")
        >>> from pathlib import Path
        >>> sorted(path.name for path in Path("saved-adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    model = unwrapped(model)
    layers = _having(model, name)
    if overwrite and Path(directory).is_dir():
        others = sorted({p.name for p in Path(directory).iterdir()} - {*peft_format.FILES, "README.md"})
        if others:
            raise FileExistsError(f"{directory} holds more than an adapter: {_and_more(others)}; it is not overwritten")
    settings = {names[0]: layer.adapters[name] for layer, names in layers.items()}
    if len({s.use_rslora for s in settings.values()}) > 1:
        raise ValueError(f"adapter {name!r} has layers with and without use_rslora, which PEFT's format cannot say")
    made_on = base_quantization(model, name)
    sharded = any(_is_sharded(layer) for layer in layers)
    tensors = {names[0]: (_whole(layer.lora_A[name]), _whole(layer.lora_B[name])) for layer, names in layers.items()}
    for layer_name, pair in tensors.items():
        for letter, tensor in zip("AB", pair, strict=True):
            if bad := tensor.numel() - int(tensor.isfinite().sum()):
                count = tensor.numel()
                raise ValueError(f"{layer_name}: lora_{letter} has {bad} values of {count} that are NaN or Inf")
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    modules = [n for n, module in model.named_modules(remove_duplicate=False) if n and id(module) not in inner]
    config = getattr(model, "config", None)
    base_name = getattr(config, "_name_or_path", None) or None
    task = "CAUSAL_LM" if _class_name(model).endswith(("ForCausalLM", "LMHeadModel")) else None
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            with new_directory(directory, overwrite, peft_format.CONFIG) as path:
                about = {peft_format.BASE_CLASS: _class_name(model), peft_format.QUANTIZATION: made_on}
                peft_format.write(path, tensors, settings, modules, about, task, base_name)
    finally:
        if sharded:
            torch.distributed.barrier()


def base_quantization(model: nn.Module, name: str) -> str:
    """How the layers under an adapter are quantized: "none", "int8", "nf4", "nf4 double_quant", "fp4 blocksize=128",
    ...; where they differ, all of these, by ", "."""
    layers = (layer.base_layer for layer in _having(unwrapped(model), name))
    return ", ".join(sorted({b.describe() if isinstance(b, LowBitLinear) else "none" for b in layers}))


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach()
