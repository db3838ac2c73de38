"""LoRA adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing is unpickled.

Tensors are ``base_model.model.<module>.lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank]. The metadata of
files that octavo writes names the class of the model, ``octavo_base_class``, and how the layers under the adapter were
quantized, ``octavo_base_quantization`` (`octavo.lora.adapters.base_quantization`), which PEFT does not look at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.checks import FLOATS, dtype_name
from ..core.files import read_json
from .linear import LoRAConfig

FILES = CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
BASE_CLASS, QUANTIZATION = "octavo_base_class", "octavo_base_quantization"  # in the metadata of tensors
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
# These entries do not change the product that is computed, or are read below. All others must be absent or off.
_INERT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal")  # initializations that leave the base as it was


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of a directory: configuration and tensors, checked against each other and not yet against a
    model."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[Tensor, Tensor]]  # module name -> A, B
    base_class: str | None

    def settings(self, module: str) -> LoRAConfig:
        """Rank, alpha and dropout of one layer."""
        return _settings(self.config, module)

    def targets(self, module: str) -> bool | None:
        """Whether the configuration names this layer; None where octavo cannot say."""
        wanted, unwanted = self.config.get("target_modules"), self.config.get("exclude_modules")
        if wanted is None or wanted == "all-linear" or self.config.get("layers_to_transform") is not None:
            return None
        return _named(wanted, module) and not (unwanted and _named(unwanted, module))


def _named(entries: str | Iterable[str], module: str) -> bool:
    """PEFT's rule: a string is a regular expression of the whole name, others are names or ends of names."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return any(module == entry or module.endswith(f".{entry}") for entry in entries)


def _settings(config: Mapping[str, Any], module: str) -> LoRAConfig:
    def of(pattern: str, default: str) -> Any:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return config[default]

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return LoRAConfig(rank, alpha, config.get("lora_dropout") or 0.0, bool(config.get("use_rslora")))


# ---- reading -------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA adapter that octavo can compute.

    Raises:
        FileNotFoundError: the directory or the file is missing.
        ValueError: it is no such adapter; the message has the value that says so.
    """
    where = directory / CONFIG
    if not where.is_file():
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} does not exist; give a directory with {CONFIG} and {TENSORS}")
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
        hint = f"; its directories {', '.join(inside)} do: name one of them" if inside else ""
        raise FileNotFoundError(f"{directory} holds no adapter in PEFT's format: it has no {CONFIG}{hint}")
    config = read_json(where, foreign=True)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{where} has peft_type {kind!r}; octavo reads 'LORA'")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"{where} has bias {bias!r}: octavo trains no biases of the base and reads 'none'")
    if (init := config.get("init_lora_weights", True)) not in BASE_KEPT:
        raise ValueError(f"{where} has init_lora_weights {init!r}, which also changes the base's weights: convert it")
    known = _INERT | {"bias", "init_lora_weights"}
    if others := {key: value for key, value in config.items() if key not in known and value}:
        found = ", ".join(f"{key} = {value!r}" for key, value in others.items())
        raise ValueError(f"{where} has {found}, which octavo does not compute")
    names, pattern = (list, str, type(None)), (dict, type(None))
    wanted: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
    wanted |= {"target_modules": names, "exclude_modules": names, "rank_pattern": pattern, "alpha_pattern": pattern}
    wanted |= {"lora_dropout": (int, float, type(None)), "layers_pattern": names}
    wanted |= {"layers_to_transform": (int, list, type(None)), "use_rslora": (bool, type(None))}
    for key, kinds in wanted.items():
        value = config.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where} has {key} = {value!r}")
        entries = value if isinstance(value, list) else ()
        if not all(type(entry) is (int if key == "layers_to_transform" else str) for entry in entries):
            raise ValueError(f"{where} has {key} = {value!r}")
    for key, kind in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        for name, value in (config.get(key) or {}).items():
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{where} has {key}[{name!r}] = {value!r}")
    try:
        _settings({**config, "rank_pattern": None, "alpha_pattern": None}, "").check()
        for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
            entries = config.get(key) or ()
            for entry in (entries,) if isinstance(entries, str) else entries:
                re.compile(entry)
    except (ValueError, TypeError, re.error) as error:
        raise ValueError(f"{where}: {error}") from None
    return config


def read(directory: Path) -> SavedAdapter:
    """A whole adapter; see `read_config`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, tensors are not those of the configuration, or not finite.
    """
    config = read_config(directory)
    where = directory / TENSORS
    if not where.is_file():
        other = directory / "adapter_model.bin"
        hint = (
            f": {other.name} is a pickle, which octavo does not open; save it again by PEFT" if other.exists() else ""
        )
        raise FileNotFoundError(f"{where} does not exist{hint}")
    try:
        with safe_open(where, framework="pt") as file:
            base_class = (file.metadata() or {}).get(BASE_CLASS)
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file: {error}") from None
    return SavedAdapter(directory, config, _pairs(where, config, tensors), base_class)


def read_quantization(directory: Path) -> str | None:
    """How the base was quantized that the adapter was saved from; None where the file does not say."""
    where = directory / TENSORS
    if not where.is_file():
        return None  # `read` says what is wrong
    try:
        with safe_open(where, framework="pt") as file:
            found: str | None = (file.metadata() or {}).get(QUANTIZATION)
            return found
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file: {error}") from None


def _pairs(where: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(
                f"{where} holds {key} {list(tensor.shape)}, which is no lora_A or lora_B of a linear layer"
            )
        if tensor.dtype not in FLOATS or tensor.dim() != 2:
            shape = list(tensor.shape)
            raise ValueError(f"{where}: {key} must be a matrix in a float dtype, got {dtype_name(tensor)} {shape}")
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            raise ValueError(f"{where}: {key} has {bad} values of {tensor.numel()} that are NaN or Inf")
        found.setdefault(match["module"], {})[match["letter"]] = tensor
    if not found:
        raise ValueError(f"{where} holds no tensors")
    pairs = {}
    for module, letters in found.items():
        if len(letters) != 2:
            raise ValueError(f"{where}: {module} has lora_{next(iter(letters))} and no lora_{'AB'.strip(*letters)}")
        a, b = letters["A"], letters["B"]
        settings = _settings(config, module)
        try:
            settings.check()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where.parent / CONFIG}: {module}: {error}") from None
        if a.shape[0] != settings.rank or b.shape[1] != settings.rank:
            shapes = f"lora_A is {list(a.shape)} and lora_B is {list(b.shape)}"
            raise ValueError(f"{where}: {module}: {shapes}, but {CONFIG} says rank {settings.rank}")
        pairs[module] = a, b
    return pairs


# ---- writing -------------------------------------------------------------------------------------------------------


def write(
    directory: Path,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    settings: Mapping[str, LoRAConfig],
    modules: Iterable[str],
    about: Mapping[str, str],
    task_type: str | None,
    base_name: str | None,
) -> None:
    """The two files. `modules` are the names of all modules of the model, by which target_modules is kept short;
    `about` goes to the metadata of the tensors."""
    rank = Counter(s.rank for s in settings.values()).most_common(1)[0][0]
    alpha = Counter(s.alpha for s in settings.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": max(s.dropout for s in settings.values()),
        "use_rslora": next(iter(settings.values())).use_rslora,
        "rank_pattern": {re.escape(name): s.rank for name, s in settings.items() if s.rank != rank},
        "alpha_pattern": {re.escape(name): _number(s.alpha) for name, s in settings.items() if s.alpha != alpha},
        "target_modules": shortest(set(settings), modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    state = {}
    for name, pair in tensors.items():
        for letter, tensor in zip("AB", pair, strict=True):
            state[f"{_PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    save_file(state, directory / TENSORS, metadata={"format": "pt", **about})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value  # PEFT's alpha is an int


def shortest(names: set[str], modules: Iterable[str]) -> list[str]:
    """Last components of names, if they name these modules and no others; else the names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    return last if {name for name in modules if _named(last, name)} == names else sorted(names)
