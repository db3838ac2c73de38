"""Saving and loading quantized models: a directory of safetensors and JSON. Nothing is ever unpickled.

``octavo.safetensors``
    The state dict; tensors that are tied are stored once.
``octavo.json``
    ``format_version``, ``octavo_version``; ``method``: "int8", "nf4", "spqr" or, for a model with several, "mixed";
    ``modules``: for every quantized module by its name ``method`` (where it is absent, the one above),
    ``in_features``, ``out_features``, ``bias``, ``compute_dtype`` (where it is not the bias's), and for int8
    ``threshold`` and ``kept_columns``, for nf4
    ``quant_type``, ``blocksize``, ``double_quant`` and ``weight_dtype``, for spqr ``bits``, ``group_size``,
    ``stats_group_size``, ``scale_bits``, ``zero_bits``, ``bilevel`` and ``perm`` (whether there are such tensors),
    ``outliers`` (how many); ``tied``: name of a tensor to the name that it is stored under; ``tensors``: ``bytes`` and
    ``sha256`` of the file above; ``model``: ``class``, and ``transformers``: whether that is a class of transformers;
    ``configs``: the SHA-256 of each of the files below (absent in files of octavo 0.1.0 and before).
``config.json``, ``generation_config.json``
    Of a transformers model.
``tokenizer.json`` and others
    Its tokenizer, where there is one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._version import __version__
from ..core.bridges import layers_changed
from ..core.checks import FLOATS, name_of_dtype
from ..core.files import read_json, sha256_of
from ..core.linears import is_conv1d, is_stored_transposed
from ..core.low_bit import LowBitLinear
from ..core.method import layer_class, stored_methods
from ..core.stored import MANIFEST, new_directory, put_back, tie
from ..core.targets import unwrapped
from ..lora.linear import LoRALinear
from ..switchback.linear import Int8Weight

FORMAT_VERSION = 1
FLOAT_NAMES = tuple(map(name_of_dtype, FLOATS))
# What tokenizers of transformers are stored in.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_TENSORS, _MANIFEST, _CONFIGS = "octavo.safetensors", MANIFEST, ("config.json", "generation_config.json")


# ---- writing -------------------------------------------------------------------------------------------------------


def save_quantized(
    model: nn.Module, directory: str | os.PathLike[str], overwrite: bool = False, tokenizer: Any = None
) -> None:
    """Write a model with quantized layers (`octavo.nn.Int8Linear` and its siblings), for `load_quantized`.

    It is written beside `directory` and renamed at the end: an interruption leaves nothing half-written. Tied tensors
    are stored once.

    Args:
        model: any module; for a transformers model its configuration is saved too.
        directory: must not exist, or be empty.
        overwrite: replace a directory that `save_quantized` wrote before.
        tokenizer: of transformers, saved beside the model, so that ``octavo chat`` and ``octavo eval`` find it. None:
            the files of the model's own, where the directory that it was loaded from has them.

    Raises:
        ValueError: no quantized module in the model, LoRA adapters, a tensor on the meta device, quantized state that
            is not sound (NaN or Inf, or what `octavo.spqr.SpQRWeight.validate` finds).
        FileExistsError, FileNotFoundError: see `directory`.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = octavo.quantize_model(model, progress=False)
        >>> octavo.save_quantized(model, "saved")
        >>> from pathlib import Path
        >>> sorted(path.name for path in Path("saved").iterdir())
        ['octavo.json', 'octavo.safetensors']
    """
    model = unwrapped(model)
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowBitLinear)}
    if not layers:
        names = " or ".join(layer.__name__ for layer in stored_methods().values())
        raise ValueError(f"{type(model).__name__} holds no octavo.nn.{names}; call octavo.quantize_model first")
    if adapted := [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]:
        raise ValueError(
            f"{adapted[0]} has LoRA adapters: octavo.save_adapter saves them; before saving the model itself, "
            "octavo.remove_lora takes them away, or octavo.merge_adapter(model, keep=False) puts one into the weights"
        )
    if "" in layers:
        itself = type(model).__name__
        raise ValueError(f"the model is itself a quantized layer, {itself}: save its state_dict, or a model with it")
    if prepared := [name for name, m in model.named_modules() if isinstance(m, Int8Weight) and m.prepared]:
        raise ValueError(
            f"{prepared[0]} was prepared for evaluation by prepare_for_eval: load_quantized does not make such layers. "
            "Save the model's state_dict"
        )
    tensors, tied = _tensors_to_write(model)
    modules = {name: {"method": layer.stored_as} | layer.configuration() for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.compute_dtype is not layer.default_dtype():
            modules[name]["compute_dtype"] = name_of_dtype(layer.compute_dtype)
    for name, layer in layers.items():
        if errors := layer.errors(layer.state_dict(), modules[name]):
            raise ValueError(f"{name}: {errors[0]}")
    methods = {config["method"] for config in modules.values()}
    transformers_model = _is_transformers_model(model)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    known = (_TENSORS, _MANIFEST, *_CONFIGS, *TOKENIZER_FILES)
    with new_directory(directory, overwrite, needed=needed, known=known) as path:
        save_file(tensors, path / _TENSORS, metadata={"format": "pt"})
        if transformers_model:
            _save_configs(model, path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        elif transformers_model:
            _copy_tokenizer(Path(model.name_or_path), path)  # type: ignore[arg-type]
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "octavo_version": __version__,
            "method": methods.pop() if len(methods) == 1 else "mixed",
            "model": {"class": type(model).__name__, "transformers": transformers_model},
            "tensors": {"bytes": (path / _TENSORS).stat().st_size, "sha256": sha256_of(path / _TENSORS)},
            "modules": modules,
            "tied": tied,
        }
        if configs := {name: sha256_of(path / name) for name in _CONFIGS if (path / name).exists()}:
            manifest["configs"] = configs
        (path / _MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _tensors_to_write(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state as safetensors can hold it, and the names of tensors that are the same as an earlier one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in the state of {type(model).__name__} is a {type(value).__name__}, not a tensor")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        tensor = value.detach()
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if (same := first.setdefault(place, name)) != name:
                tied[name] = same
                continue
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            if storage in storages:  # another view of memory that is written already
                tensor = tensor.clone()
            storages.add(storage)
        tensors[name] = tensor.cpu().contiguous()
    return tensors, tied


# ---- transformers models -------------------------------------------------------------------------------------------


def _is_transformers_model(model: nn.Module) -> bool:
    if not type(model).__module__.startswith("transformers."):
        return False
    import transformers

    return getattr(transformers, type(model).__name__, None) is type(model)


def _save_configs(model: Any, path: Path) -> None:
    model.config.save_pretrained(path)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)


def _copy_tokenizer(source: Path, path: Path) -> None:
    if source.parts and source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, path / name)


def _build_transformers_model(name: str, path: Path, hashes: dict[str, str]) -> nn.Module:
    """The model of ``config.json``, its parameters on the meta device; buffers, which are computed, are real."""
    import transformers

    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {name!r}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json, which a {name} needs")
    _check_configs(path, hashes)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        with _parameters_on_meta():
            model: Any = cls(config)
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises errors of every kind for what it cannot build
        raise ValueError(f"{path / 'config.json'} describes no {name}: {type(error).__name__}: {error}") from error
    return model.eval()  # type: ignore[no-any-return]


def _check_configs(path: Path, hashes: dict[str, str]) -> None:
    """What is beside the manifest is what was saved: with another configuration the model would be another one."""
    for name in _CONFIGS:
        file, saved = path / name, hashes.get(name)
        if saved is None:
            continue
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {_MANIFEST} names it")
        if (digest := sha256_of(file)) != saved:
            raise ValueError(
                f"{file} was changed: its SHA-256 is {digest}, {_MANIFEST} says {saved}. Load the model as it was "
                "saved, change model.config, and save it again"
            )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register have no memory, so that building a model costs no time or memory."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


# ---- reading -------------------------------------------------------------------------------------------------------


def load_quantized(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Read a model that `save_quantized` wrote.

    Everything is checked, the tensor file by its size and SHA-256, before `model` is changed.

    Args:
        directory: what was given to `save_quantized`.
        model: the unquantized model, or a function that makes it: its Linear layers are replaced in place and its
            parameters and buffers are those of the file, whatever they were (meta device included). None for a
            transformers model, which is built from its configuration.
        device: where the model will be.

    Returns:
        The model; in eval mode if it was built here.

    Raises:
        FileNotFoundError: the directory or a file in it is missing.
        ValueError: an unknown format version or method, a manifest or tensor file that is damaged or truncated or do
            not fit together or the model, scales that are NaN or Inf, SpQR tensors that kernels cannot trust.

    Example:
        >>> import octavo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = octavo.quantize_model(model, progress=False)
        >>> octavo.save_quantized(model, "quantized")
        >>> again = octavo.load_quantized("quantized", torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> type(again[0]).__name__, torch.equal(again[0].weight, model[0].weight)
        ('Int8Linear', True)
    """
    path = Path(directory)
    manifest = _read_manifest(path)
    tensors = _read_tensors(path, manifest, torch.device(device))
    _check_modules(path, manifest["modules"], tensors)
    if model is None:
        if not manifest["model"]["transformers"]:
            name = manifest["model"]["class"]
            raise ValueError(f"{path} holds a {name}, which is not a transformers model: pass model=, a {name}")
        model = _build_transformers_model(manifest["model"]["class"], path, manifest.get("configs", {}))
    elif not isinstance(model, nn.Module):
        model = model()
    given, model = model, unwrapped(model)
    _check_fit(path, model, manifest, tensors)

    layers: dict[nn.Module, nn.Module] = {}  # a shared module stays shared
    for name, config in manifest["modules"].items():
        current = model.get_submodule(name)
        if current not in layers:
            dtype = tensors[f"{name}.bias"].dtype if config["bias"] else None
            made = layer_class(config["method"]).from_configuration(config, dtype)
            own = config.get("compute_dtype")
            made.compute_dtype = getattr(torch, own) if own else made.default_dtype()
            made._octavo_transposed = is_conv1d(current) or is_stored_transposed(current)
            layers[current] = made.train(current.training)
        model.set_submodule(name, layers[current])
    model.load_state_dict(tensors, assign=True)
    tie(model, manifest["tied"])
    layers_changed(model)
    model.to(device)
    return given


def _read_manifest(path: Path) -> dict[str, Any]:
    put_back(path)
    for file in (path, path / _MANIFEST, path / _TENSORS):
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist; octavo.save_quantized writes a directory with it")
    where = path / _MANIFEST
    manifest = read_json(where)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} has format_version {version!r}; octavo {__version__} reads {FORMAT_VERSION}")
    known_methods = stored_methods()
    if str(method := manifest.get("method")) not in (*known_methods, "mixed"):
        known = ", ".join(map(repr, (*known_methods, "mixed")))
        raise ValueError(f"{where} has method {method!r}; octavo {__version__} knows {known}")
    _check_keys(where, "the manifest", manifest, {"model": dict, "tensors": dict, "modules": dict, "tied": dict})
    _check_keys(where, "model", manifest["model"], {"class": str, "transformers": bool})
    _check_keys(where, "tensors", manifest["tensors"], {"bytes": int, "sha256": str})
    keys = {"in_features": int, "out_features": int, "bias": bool}
    for name, config in manifest["modules"].items():
        _check_keys(where, f"module {name!r}", config, keys)
        if max(config["in_features"], config["out_features"]) >= 1 << 40:  # a product of both may leave int64
            sizes = (config["in_features"], config["out_features"])
            raise ValueError(f"{where}: module {name!r} has (in_features, out_features) = {sizes}")
        if str(config.setdefault("method", method)) not in known_methods:
            raise ValueError(f"{where}: module {name!r} has method = {config['method']!r}")
        if config.get("compute_dtype", "float32") not in FLOAT_NAMES:
            raise ValueError(f"{where}: module {name!r} has compute_dtype = {config['compute_dtype']!r}")
        kind = known_methods[config["method"]]
        _check_keys(where, f"module {name!r}", config, dict(kind.fields))
        try:
            kind.check_configuration(config)
        except ValueError as error:
            raise ValueError(f"{where}: module {name!r}: {error}") from None
    for key, what in (("tied", "name a tensor"), ("configs", "be a SHA-256")):
        if not isinstance(entries := manifest.get(key, {}), dict):
            raise ValueError(f"{where}: {key} must be an object, got {entries!r}")
        for name, value in entries.items():
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key} {name!r} must {what}, got {value!r}")
    return manifest


def _check_keys(where: Path, what: str, value: Any, keys: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {what} must be an object, got {value!r}")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind) or (kind is not bool and isinstance(value[key], bool)):
            raise ValueError(f"{where}: {what} has {key} = {value.get(key)!r}")


def _read_tensors(path: Path, manifest: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    where, wanted = path / _TENSORS, manifest["tensors"]
    if (size := where.stat().st_size) != wanted["bytes"]:
        state = "truncated" if size < wanted["bytes"] else "not the file that was saved"
        raise ValueError(f"{where} is {state}: it has {size} bytes, {_MANIFEST} says {wanted['bytes']}")
    if (digest := sha256_of(where)) != wanted["sha256"]:
        raise ValueError(f"{where} was changed: its SHA-256 is {digest}, {_MANIFEST} says {wanted['sha256']}")
    try:
        with safe_open(where, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from None
    for name, source in manifest["tied"].items():
        if source not in tensors or name in tensors:
            problem = f"{source!r} is missing" if source not in tensors else f"{name!r} is stored too"
            raise ValueError(f"{where}: {name!r} is tied to {source!r}, but {problem}")
    return tensors | {name: tensors[source] for name, source in manifest["tied"].items()}


def _layer_state(tensors: dict[str, Tensor], name: str, keys: Iterable[str]) -> dict[str, Tensor]:
    return {key: tensors[f"{name}.{key}"] for key in keys if f"{name}.{key}" in tensors}


def _check_modules(path: Path, modules: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Every quantized module's tensors are there, as the manifest describes them."""
    for name, config in modules.items():
        kind = layer_class(config["method"])
        state = _layer_state(tensors, name, (*kind.tensors, "bias"))
        wanted = kind.tensor_names(config)
        if wanted != set(state):
            errors = [f"has tensors {sorted(state)}, {_MANIFEST} says {sorted(wanted)}"]
        else:
            errors = kind.errors(state, config)
        if errors:
            raise ValueError(f"{path / _TENSORS}: {name}: {errors[0]}")


def _check_fit(path: Path, model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The model has the layers to replace, and the other tensors are its own, name by name and shape by shape."""
    mine = dict(model.state_dict())
    for name, config in manifest["modules"].items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{path} holds a layer {name}, which {type(model).__name__} does not have") from None
        saved = (config["in_features"], config["out_features"], config["bias"])
        if not isinstance(layer, (nn.Linear, LowBitLinear)) and not is_conv1d(layer):
            raise ValueError(f"{path}: {name} is a {type(layer).__name__} in {type(model).__name__}, not a Linear")
        sizes = (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)
        if (found := (*sizes, layer.bias is not None)) != saved:
            raise ValueError(f"{path}: {name} has (in_features, out_features, bias) = {saved}, the model's has {found}")
        for key in layer.state_dict():
            mine.pop(f"{name}.{key}", None)
    quantized = {f"{name}.{key}" for name, config in manifest["modules"].items() for key in _names(config)}
    for name in sorted((tensors.keys() - quantized) ^ mine.keys()):
        owner = f"{path / _TENSORS} has" if name in tensors else f"{type(model).__name__} has"
        other = type(model).__name__ if name in tensors else "the file"
        raise ValueError(f"{owner} {name}, which {other} does not")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in tensors:
            raise ValueError(f"buffer {name} of {type(model).__name__} is on the meta device and not in {path}")
    for name, tensor in mine.items():
        if tensor.shape != tensors[name].shape:
            saved_shape, shape = list(tensors[name].shape), list(tensor.shape)
            raise ValueError(f"{path / _TENSORS}: {name} has shape {saved_shape}, the model's has {shape}")


def _names(config: dict[str, Any]) -> set[str]:
    return layer_class(config["method"]).tensor_names(config)
