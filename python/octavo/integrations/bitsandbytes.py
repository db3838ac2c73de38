"""The checkpoints of bitsandbytes, read and written without it: layers in int8 and in 4 bits.

``Linear8bitLt`` holds ``weight`` int8 [n, k], ``SCB`` fp32 [n] (the absmax of each row: the weight is ``weight * SCB[:,
None] / 127``), ``weight_format`` uint8 [] = 0 for row-major, and ``bias``. For ``Linear4bit`` see
`octavo.nf4.bitsandbytes`. The ``load_state_dict`` of `octavo.nn.Int8Linear` and `NF4Linear` reads them, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.files import check_regular, indexed_files
from ..core.stored import tie
from ..int8.bitsandbytes import read_linear8bit
from ..int8.linear import Int8Linear
from ..nf4.bitsandbytes import MARK, Header, read_linear4bit, write_linear4bit
from ..nf4.linear import NF4Linear

# ---- writing ---------------------------------------------------------------------------------------------------------


def to_bitsandbytes_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of an `Int8Linear` or `NF4Linear`, or of a model that holds some, with the keys of bitsandbytes.

    For `NF4Linear` ("nf4" and "fp4") it is what bitsandbytes writes for the same weight, to the byte, and in its order.
    For `Int8Linear` ``SCB = weight_scale * 127``; kept outlier columns have no counterpart there and are left out
    (their int8 weights are in `weight`), and so is the threshold, which bitsandbytes takes from its configuration.
    Everything else is as in ``module.state_dict()``. Tensors are shared with the module, not copied.

    Raises:
        ValueError: there is no such layer in it, or one of a type that bitsandbytes has not ("nf2", "nf3", "nf8").

    Example:
        >>> import octavo, torch
        >>> from octavo.integrations import bitsandbytes
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> sorted(bitsandbytes.to_bitsandbytes_state(model))
        ['0.bias', '0.weight', '0.weight.absmax', '0.weight.quant_map', '0.weight.quant_state.bitsandbytes__nf4']
    """
    children = module.named_modules(remove_duplicate=False)  # a shared layer is in the state under each of its names
    layers = {f"{name}." if name else "": m for name, m in children if isinstance(m, (Int8Linear, NF4Linear))}
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no octavo.nn.Int8Linear or NF4Linear")
    out: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        prefix = f"{owner}." if owner else ""
        if prefix not in layers:
            out[key] = tensor
        elif leaf == "weight":
            out |= {prefix + name: value for name, value in _layer_state(layers[prefix], owner).items()}
    return out


def _layer_state(layer: Int8Linear | NF4Linear, name: str) -> dict[str, Tensor]:
    if isinstance(layer, Int8Linear):
        out = {"weight": layer.codes, "SCB": layer.weight_scale * 127.0}
        out["weight_format"] = torch.zeros((), dtype=torch.uint8, device=layer.codes.device)
    else:
        try:
            out = write_linear4bit(layer.packed_weight.map(Tensor.detach))
        except ValueError as error:
            raise ValueError(f"{name or type(layer).__name__}: {error}") from None
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    return {"weight": out.pop("weight"), **bias, **out}


# ---- reading ---------------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """Tensors by the names of octavo; of the layers in 4 bits, what bitsandbytes says of them; those in int8.

    Example:
        >>> import octavo, torch
        >>> from octavo.integrations import bitsandbytes
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> checkpoint = bitsandbytes.convert(bitsandbytes.to_bitsandbytes_state(model))
        >>> list(checkpoint.headers), checkpoint.int8
        (['0'], [])
    """

    tensors: dict[str, Tensor]
    headers: dict[str, Header]
    int8: list[str]


def load_bitsandbytes(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A model with the layers that bitsandbytes quantized as `octavo.nn.NF4Linear` and `Int8Linear`, to the bit.

    Everything is checked before `model` is changed.

    Args:
        source: a state dict, a safetensors file, or a directory of them.
        model: the unquantized model: its `torch.nn.Linear` layers that the source has in 4 bits or int8 are replaced in
            place, and its parameters and buffers are those of the source, whatever they were (meta device included).
            None for a directory that transformers wrote, which is built from its ``config.json``.
        dtype: of what is not quantized in a model that is built here; None for the stored one.

    Returns:
        The model; in eval mode if it was built here. Its own ``save_pretrained`` then writes octavo's format.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or a quantization state that is damaged, a block size, type or layout that octavo does not
            know, tensors that do not fit together or the model.

    Example:
        >>> import octavo, torch
        >>> from octavo.integrations import bitsandbytes
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> state = bitsandbytes.to_bitsandbytes_state(model)
        >>> again = bitsandbytes.load_bitsandbytes(state, torch.nn.Sequential(torch.nn.Linear(64, 64)))
        >>> torch.equal(again[0].weight, model[0].weight)
        True
    """
    if dtype is not None and model is not None:
        raise ValueError(f"load_bitsandbytes: dtype={dtype} is for a model that is built here, and model= is given")
    if isinstance(source, Mapping):
        if model is None:
            raise ValueError("load_bitsandbytes: a state dict needs model=, the unquantized model")
        state = dict(source)
    else:
        state = read_tensors(Path(source))
    try:
        checkpoint = convert(state)
    except ValueError as error:
        raise error if isinstance(source, Mapping) else ValueError(f"{source}: {error}") from None
    if model is None:
        from ._bitsandbytes_models import build

        return build(Path(str(source)), checkpoint, dtype)
    return _load_into(model, checkpoint)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the files in a directory: mapped, not read.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from octavo.integrations import bitsandbytes
        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.ones(2, 3)}, "model.safetensors")
        >>> bitsandbytes.read_tensors(Path("model.safetensors"))["weight"].shape
        torch.Size([2, 3])
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = indexed_files(path) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} holds no safetensors file; others are not read: they can run code")
    tensors = {}
    for file in files:
        check_regular(file)
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in list(opened.keys())})
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    return tensors


def convert(state: Mapping[str, Tensor]) -> Checkpoint:
    """Rename and check what bitsandbytes has of quantized layers; tensors are shared.

    Raises:
        ValueError: no quantized layer, or one that cannot be read; it is named.

    Example:
        >>> import octavo, torch
        >>> from octavo.integrations import bitsandbytes
        >>> model = torch.nn.Sequential(octavo.nn.NF4Linear.from_linear(torch.nn.Linear(64, 64)))
        >>> bitsandbytes.convert(bitsandbytes.to_bitsandbytes_state(model)).headers["0"].quant_type
        'nf4'
    """
    four_bit = {name.partition(MARK)[0] for name in state if MARK in name}
    int8 = {name.removesuffix("SCB") for name in state if name == "SCB" or name.endswith(".SCB")}
    layers: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in sorted(four_bit | int8)}
    if not layers:
        raise ValueError(f"no layer of bitsandbytes in it: there is no {MARK}nf4 or fp4, and no SCB")
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        starts = (i + 1 for i in range(-1, len(key)) if i < 0 or key[i] == ".")
        prefix = next((key[:start] for start in starts if key[:start] in layers), None)
        if prefix is None:
            out[key] = tensor
        else:
            layers[prefix][key.removeprefix(prefix)] = tensor
    headers = {}
    for prefix, layer in layers.items():
        try:
            if prefix in four_bit:
                header, tensors = read_linear4bit(layer)
                headers[prefix.removesuffix(".")] = header
                out |= {prefix + name: tensor for name, tensor in _checked_4bit(layer, header, tensors).items()}
            else:
                out |= {prefix + name: tensor for name, tensor in _checked_int8(layer).items()}
        except ValueError as error:
            raise ValueError(f"{prefix[:-1]}: {error}" if prefix else str(error)) from None
    return Checkpoint(out, headers, [prefix.removesuffix(".") for prefix in sorted(int8)])


def _checked_4bit(layer: dict[str, Tensor], header: Header, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if unknown := [name for name in layer if name not in ("weight", "bias") and not name.startswith("weight.")]:
        raise ValueError(f"unknown {', '.join(unknown)}")
    if len(header.shape) != 2:
        raise ValueError(f"{MARK}{header.quant_type} has shape = {list(header.shape)}, not that of a matrix")
    n, k = header.shape
    described = {"in_features": k, "out_features": n, "quant_type": header.quant_type, "blocksize": header.blocksize}
    if errors := NF4Linear.tensor_errors(tensors, described):
        raise ValueError("; ".join(errors))
    return tensors


def _checked_int8(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    if unknown := [name for name in layer if name not in ("weight", "bias", "SCB", "weight_format")]:
        raise ValueError(f"unknown {', '.join(unknown)}")
    if (weight := layer.get("weight")) is None or weight.dim() != 2:
        raise ValueError(f"weight must be a matrix, got {'none' if weight is None else list(weight.shape)}")
    tensors = dict(layer)
    n, k = weight.shape
    if errors := read_linear8bit(tensors) or Int8Linear.tensor_errors(tensors, {"in_features": k, "out_features": n}):
        raise ValueError("; ".join(errors))
    return tensors


def _load_into(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Replace the layers and load the tensors, all of which are found to fit first."""
    new = {name: _new_layer(model, name, checkpoint) for name in (*checkpoint.headers, *checkpoint.int8)}
    tensors = dict(checkpoint.tensors)
    mine = dict(model.state_dict())
    of_layers = {f"{name}.{key}" for name in new for key in model.get_submodule(name).state_dict()}
    expected = {name: tensor for name, tensor in mine.items() if name not in of_layers}
    given = {name for name in tensors if name.rpartition(".")[0] not in new}
    tied = _tied(model)
    for name in sorted(expected.keys() - given):
        same = next((other for other in tied.get(name, ()) if other in given), None)
        if same is None:
            raise ValueError(f"{type(model).__name__} has {name}, which the checkpoint does not")
        tensors[name] = tensors[same]
    if unexpected := sorted(given - expected.keys()):
        raise ValueError(f"the checkpoint has {unexpected[0]}, which {type(model).__name__} does not")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            found, shape = list(tensors[name].shape), list(tensor.shape)
            raise ValueError(f"{name} has shape {found} in the checkpoint, {shape} in {type(model).__name__}")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in tensors and name.rpartition(".")[0] not in new:
            raise ValueError(f"buffer {name} of {type(model).__name__} is on the meta device and not in the checkpoint")
    for name, tensor in tensors.items():
        current = mine.get(name, mine.get(f"{name.rpartition('.')[0]}.weight"))
        tensors[name] = tensor if current is None or current.is_meta else tensor.to(current.device)

    old: dict[nn.Module, nn.Module] = {}  # a shared module stays shared
    for name, layer in new.items():
        layer = old.setdefault(model.get_submodule(name), layer)
        model.set_submodule(name, layer)
    model.load_state_dict(tensors, assign=True)
    tie(model, {name: same[0] for name, same in tied.items() if name in expected and name != same[0]})
    return model


def _new_layer(model: nn.Module, name: str, checkpoint: Checkpoint) -> nn.Module:
    if not name:
        raise ValueError(f"the model is itself a {type(model).__name__}: use load_state_dict of octavo.nn.NF4Linear")
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the checkpoint has a layer {name}, which {type(model).__name__} does not") from None
    if not isinstance(layer, (nn.Linear, Int8Linear, NF4Linear)):
        raise ValueError(f"{name} is a {type(layer).__name__}, not a Linear")
    header, has_bias = checkpoint.headers.get(name), f"{name}.bias" in checkpoint.tensors
    n, k = checkpoint.tensors[f"{name}.weight"].shape if header is None else header.shape
    found = (k, n, has_bias)
    if (mine := (layer.in_features, layer.out_features, layer.bias is not None)) != found:
        raise ValueError(
            f"{name} has (in_features, out_features, bias) = {found} in the checkpoint, {mine} in the model"
        )
    new: nn.Module
    if header is None:
        new = Int8Linear(k, n, has_bias, getattr(layer, "threshold", 6.0), device="meta")
    else:
        nested = header.nested_offset is not None
        new = NF4Linear(k, n, has_bias, header.quant_type, header.blocksize, nested, device="meta", dtype=header.dtype)
    return new.train(layer.training)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has several, by each of them."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}
