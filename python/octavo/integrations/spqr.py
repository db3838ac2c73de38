"""Weights that the SpQR authors' programs quantized (github.com/Vahe1994/SpQR), as octavo's::

    checkpoint = octavo.integrations.spqr.read_official("saved-by-main.py")      # checkpoint.layers: name -> SpQRWeight
    octavo.integrations.spqr.load_official("saved-by-main.py", model)            # into the unquantized model

Both of their formats are read: what ``main.py --save`` writes (`import_legacy_layer` for one layer) and what their
kernel reads (`import_compressed_layer`). Nothing in a file is ever run: pickles are opened with ``weights_only=True``.
What is imported is the weight that their quantizer chose::

    W[i, perm[j]] = outlier[i, j] if there is one else s(i, g) * (code[i, j] - z(i, g))

Their files hold an outlier's whole value, ours what is missing to it. (Their kernel adds the whole value to what the
code beside it gives, so that its product is another than the quantizer's; the imported weight does not have this.)

Exactly represented: codes, permutation, statistics of the second order that are fp16 or bf16 and normal in fp16 once
divided by `unit`, a power of two. Rounded: statistics in fp32, or scales and zero points that were not quantized, to
fp16 (2**-11 of their value); outliers, by at most 2**-11 of what they differ from what the code beside them gives.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.files import check_regular, read_json
from ..spqr.linear import SpQRLinear
from ..spqr.weight import SpQRWeight
from ._spqr_layers import import_compressed_layer, import_legacy_layer

__all__ = ["OfficialCheckpoint", "import_compressed_layer", "import_legacy_layer", "load_official", "read_official"]

_PARTS = ("dense_weights", "row_offsets", "col_vals", "in_perm")


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The layers and tensors that `read_official` found.

    Attributes:
        layers: the quantized weights by name: the layer's full name in a checkpoint of transformers, and for
            directories with a file for each layer "<index>.<name within the block>".
        tensors: everything else, by its full name in the model.

    Example:
        >>> from octavo.integrations import spqr
        >>> spqr.OfficialCheckpoint().layers
        {}
    """

    layers: dict[str, SpQRWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def load_official(path: str | os.PathLike[str], model: nn.Module, strict: bool = True) -> nn.Module:
    """Put a checkpoint of the SpQR authors' programs into the unquantized model, in place.

    The Linear layers that the checkpoint has become `octavo.nn.SpQRLinear` on their devices; the other tensors are
    loaded. Everything is read and checked before the model is changed. Save it with `octavo.save_quantized`.

    Args:
        path: see `read_official`.
        model: with the names that it had when it was quantized; its unquantized parameters may be on the meta device.
        strict: the checkpoint must have every parameter that the model has.

    Returns:
        The model.

    Raises:
        ValueError: as for `read_official`; layers or tensors that the model does not have or that have another shape,
            parameters that the checkpoint does not have.

    Example:
        >>> from octavo.integrations import spqr
        >>> spqr.load_official("Llama-2-7b-SPQR-3Bit-16x16", model)  # doctest: +SKIP
    """
    found = read_official(path, model)
    names = {layer: _name_in(model, layer) for layer in found.layers}
    rest = dict(found.tensors)
    new: dict[str, SpQRLinear] = {}
    for layer, weight in found.layers.items():
        linear: Any = model.get_submodule(names[layer])
        shape = (linear.out_features, linear.in_features)
        if shape != (weight.n, weight.k):
            raise ValueError(f"{path}: {layer} is [{weight.n}, {weight.k}], {names[layer]} of the model {list(shape)}")
        rest.pop(f"{names[layer]}.weight", None)
        device = linear.weight.device if not linear.weight.is_meta else weight.codes.device
        bias = rest.pop(f"{names[layer]}.bias", None if strict else linear.bias)
        if bias is None and linear.bias is not None:
            raise ValueError(f"{path} does not have {names[layer]}.bias of {type(model).__name__}")
        if bias is not None:
            old = linear.bias
            bias = bias.detach().to(device, bias.dtype if old is None or old.is_meta else old.dtype)
            bias = bias.requires_grad_(old is not None and old.requires_grad)
        made = SpQRLinear.from_weight(weight.to(device), bias, linear.weight.dtype)
        new[names[layer]] = made.train(linear.training)
    mine = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in new}
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    if strange := sorted(rest.keys() - mine.keys()):
        raise ValueError(f"{path} has {', '.join(strange)}, which {type(model).__name__} does not")
    missing = [same[0] for same in tied.values() if mine.keys() & set(same) and not rest.keys() & set(same)]
    if strict and missing:
        raise ValueError(
            f"{path} does not have {', '.join(missing)} of {type(model).__name__}; strict=False leaves them"
        )
    for name, tensor in rest.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, the model's {list(mine[name].shape)}")
    for name, module in new.items():
        model.set_submodule(name, module)
    model.load_state_dict(rest, strict=False, assign=any(mine[name].is_meta for name in rest))
    if callable(tie := getattr(model, "tie_weights", None)):  # of transformers; assigned tensors are no longer one
        tie()
    return model


def _name_in(model: nn.Module, layer: str) -> str:
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fitting = [name for name in names if name == layer] or [name for name in names if name.endswith(f".{layer}")]
    if len(fitting) != 1:
        found = f"has {len(fitting)}: {', '.join(fitting)}" if fitting else "has none"
        raise ValueError(f"{type(model).__name__} must have one Linear layer {layer}, and {found}")
    return fitting[0]


def read_official(path: str | os.PathLike[str], model: nn.Module | None = None) -> OfficialCheckpoint:
    """Read a checkpoint of the SpQR authors' programs, layer by layer, on the CPU.

    Args:
        path: one of

            - a directory that ``main.py --save`` or the converter's ``--save_per_layer`` wrote: ``args.pt``,
              ``not_quantized_weights.pt``, and ``<index>/<layer>`` for each layer;
            - a directory with ``config.json`` (its ``quantization_config`` has ``quant_method`` "spqr") and safetensors
              files, as transformers has them;
            - a safetensors file, or a pickled state dict, with compressed layers. A model pickled whole cannot be read
              without running what is in it: save its ``state_dict()``.
        model: only its layers' shapes are looked at: for compressed layers whose tensors fit two shapes.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file or layer is named: damaged files, pickles of more than tensors, bits and groups that octavo
            or the format does not have, and as for `import_legacy_layer` and `import_compressed_layer`.

    Example:
        >>> from octavo.integrations import spqr
        >>> spqr.read_official("Llama-2-7b-SPQR-3Bit-16x16", model).layers  # doctest: +SKIP
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"{where} does not exist")
    if where.is_dir() and (where / "args.pt").is_file():
        return _read_layer_files(where, model)
    files = _files_of_transformers(where) if where.is_dir() else [where]
    out = OfficialCheckpoint()
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for name, tensor in _tensors(file):
            layer, _, leaf = name.rpartition(".")
            if leaf in _PARTS:  # the tensors of a layer may be in several files
                parts.setdefault(layer, {})[leaf] = tensor
            else:
                out.tensors[name] = tensor
    if not parts:
        raise ValueError(f"{where} holds no compressed SpQR layer (no tensor is named ...dense_weights)")
    for layer in list(parts):
        out.layers[layer] = _compressed(where, layer, parts.pop(layer), model)
    return out


def _read_layer_files(where: Path, model: nn.Module | None) -> OfficialCheckpoint:
    args = _load(where / "args.pt")
    if not isinstance(args, dict):
        raise ValueError(f"{where / 'args.pt'} must hold the arguments of main.py, got a {type(args).__name__}")
    bits = [args.get(key) or 3 for key in ("wbits", "qq_scale_bits", "qq_zero_bits")]  # None: not quantized
    if not all(isinstance(count, int) for count in bits):
        raise ValueError(f"{where / 'args.pt'}: wbits, qq_scale_bits and qq_zero_bits must be integers, got {bits}")
    out = OfficialCheckpoint()
    folders = sorted((d for d in where.iterdir() if d.is_dir() and d.name.isdigit()), key=lambda d: int(d.name))
    for file in (file for folder in folders for file in sorted(folder.iterdir())):
        name, layer = f"{file.parent.name}.{file.name}", _load(file)
        if isinstance(layer, _PickledLayer):
            _check_compressed_bits(file, {key: vars(layer).get(key) for key in ("bits", "beta1", "beta2")})
            out.layers[name] = _compressed(file, name, layer.tensors(), model, vars(layer))
        elif isinstance(layer, dict):
            try:
                out.layers[name] = import_legacy_layer(layer, *bits)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        else:
            raise ValueError(f"{file} must hold a layer, got a {type(layer).__name__}")
    if not out.layers:
        raise ValueError(f"{where} has args.pt, but no layer: no file <index>/<name>")
    if (others := where / "not_quantized_weights.pt").is_file():
        out.tensors.update(_tensors(others))
    return out


def _compressed(
    where: Path, layer: str, tensors: dict[str, Tensor], model: nn.Module | None, known: Mapping[str, Any] | None = None
) -> SpQRWeight:
    n, k = (size if isinstance(size := (known or {}).get(key), int) else None for key in ("m", "n"))
    if model is not None:
        linear: Any = model.get_submodule(_name_in(model, layer))
        n, k = linear.out_features, linear.in_features
    try:
        return import_compressed_layer(tensors, n, k)
    except ValueError as error:
        raise ValueError(f"{where}: {layer}: {error}") from None


def _files_of_transformers(where: Path) -> list[Path]:
    config_path = where / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{where} has neither args.pt (of main.py --save) nor config.json (of transformers)")
    quantization = read_json(config_path, foreign=True).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "spqr":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(f"{config_path}: quantization_config must have quant_method 'spqr', got {method!r}")
    _check_compressed_bits(config_path, quantization)
    files = sorted(where.glob("*.safetensors")) or sorted(where.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{where} has no safetensors files")
    return files


def _check_compressed_bits(where: Path, config: Mapping[str, Any]) -> None:
    for key, wanted in (("bits", 3), ("beta1", 16), ("beta2", 16)):
        if (value := config.get(key, wanted)) != wanted:
            raise ValueError(f"{where}: {key} is {value!r}; the compressed format has {wanted} only")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        check_regular(file)
        try:
            with safe_open(file, framework="pt") as stored:
                for name in list(stored.keys()):
                    yield name, stored.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
        return
    state = _load(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a state dict, got a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor.detach()


class _PickledLayer:
    """Stands for a pickled layer of the authors' class: it has the attributes, without the class and its code."""

    def tensors(self) -> dict[str, Tensor]:
        held = {**(vars(self).get("_parameters") or {}), **(vars(self).get("_buffers") or {})}
        return {name: t.detach() for name, t in held.items() if isinstance(t, Tensor)}


_KNOWN = [(_PickledLayer, f"{module}.QuantizedLinear") for module in ("spqr_quant.inference", "inference")]


def _load(file: Path) -> Any:
    check_regular(file)
    known = torch.serialization.safe_globals(_KNOWN)  # type: ignore[arg-type]
    checked = torch.sparse.check_sparse_tensor_invariants()  # type: ignore[no-untyped-call]
    try:
        with open(file, "rb") as stream, known, checked:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # on damaged files pickle and its readers raise what comes
        if isinstance(error, OSError) and error.filename is not None:  # not of the file's content
            raise
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(
                f"{file} holds {found[1]}, and octavo runs nothing from a file: save the state_dict() of what is in it"
            ) from None
        reason = text.strip().splitlines()[-1].strip() if text.strip() else type(error).__name__
        raise ValueError(f"{file} is damaged or not of torch.save: {reason}") from None
