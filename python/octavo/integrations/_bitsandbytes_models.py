"""A directory that transformers wrote with bitsandbytes, as a model with octavo's layers: see `load_bitsandbytes`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ..core.checks import is_number
from ..core.files import read_json
from ..int8.method import Int8
from ..nf4.linear import NF4Linear
from ..nf4.method import NF4
from ._checkpoint import SAFETENSORS_DTYPES
from .transformers import OctavoConfig, mark_quantized

if TYPE_CHECKING:
    from .bitsandbytes import Checkpoint


class _InMemory(OctavoConfig):
    """Tells the quantizer what the checkpoint has, where there is no file in octavo's format to look into."""

    headers: dict[str, tuple[str, list[int]]]

    def get(self, name: str, default: Any = None) -> Any:  # transformers takes configurations for dictionaries, too
        return getattr(self, name, default)


def build(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The model of ``config.json`` with these tensors, ready to be saved in octavo's format."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json of transformers: pass model=, the unquantized model")
    where = path / "config.json"
    described = read_json(where, foreign=True)
    names, quantization = described.get("architectures"), described.get("quantization_config")
    if not isinstance(names, list | None) or not isinstance(quantization, dict | None):
        raise ValueError(f"{where} has architectures = {names!r}, quantization_config = {quantization!r}")
    architecture = (names or [None])[0]
    cls: Any = getattr(transformers, str(architecture), None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model class {architecture!r}")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    options = _options(path, checkpoint, quantization or {})
    config.quantization_config = _InMemory(skip=(), **options)
    names = {torch_dtype: name for name, torch_dtype in SAFETENSORS_DTYPES.items()}
    tensors = checkpoint.tensors
    config.quantization_config.headers = {
        name: (names.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)) for name, tensor in tensors.items()
    }
    model = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype or "auto").eval()
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    model.name_or_path = model.config.name_or_path = str(path)
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear) and name in checkpoint.headers:
            layer.weight_dtype = checkpoint.headers[name].dtype
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    mark_quantized(model, OctavoConfig(skip=left, **options))
    return model


def _options(path: Path, checkpoint: Checkpoint, described: dict[str, Any]) -> dict[str, Any]:
    given = described.get("llm_int8_threshold")
    if given is not None and not is_number(given):
        raise ValueError(f"{path / 'config.json'} has llm_int8_threshold = {given!r}")
    threshold = {"threshold": 6.0 if given is None else float(given)}
    if not checkpoint.headers:
        return {"method": Int8.name, **threshold}
    found = {(header.quant_type, header.blocksize) for header in checkpoint.headers.values()}
    if len(found) > 1:
        raise ValueError(f"{path} has layers of several kinds, (quant_type, blocksize): {sorted(found)}")
    quant_type, blocksize = found.pop()
    nested = any(header.nested_offset is not None for header in checkpoint.headers.values())
    options = {"method": NF4.name, "quant_type": quant_type, "blocksize": blocksize, "double_quant": nested}
    return options | threshold
