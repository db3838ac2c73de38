"""Finished layers on disk, so that quantizing a model can be interrupted and go on: one file per layer, and a manifest.

Files are written beside themselves and renamed: one that exists is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .codes import SpQRCodes
from .config import SpQRConfig

FORMAT = 1
_MANIFEST = "spqr-layers.json"
_NUMBERS = ("n", "k", "bits", "group_size", "stats_group_size", "scale_bits", "zero_bits")
_MEASURED = ("tau", "damping", "loss", "error")
_TENSORS = (
    "codes",
    "unit",
    "row_offsets",
    "outlier_columns",
    "outlier_values",
    "perm",
    "scales",
    "zeros",
    "scale_codes",
    "zero_codes",
    "second_order",
)


def fingerprint(model: nn.Module, config: SpQRConfig, calibration: Iterable[Any] | None) -> dict[str, Any]:
    """A record of what must be the same for layers on disk to be of use: settings, weights, calibration."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        _update(weights, tensor)
    data = hashlib.sha256()
    for batch in calibration or ():
        for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
            data.update(f"{name} {list(value.shape) if isinstance(value, Tensor) else value}\n".encode())
            if isinstance(value, Tensor):
                _update(data, value)
    settings = {name: str(value) for name, value in config.to_dict().items()}
    return {"format": FORMAT, "settings": settings, "weights": weights.hexdigest(), "calibration": data.hexdigest()}


def _update(digest: Any, tensor: Tensor) -> None:
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Store:
    """The layers of one quantization in one directory.

    Raises:
        ValueError: the directory holds those of another model, calibration or setting, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], mark: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = self.path / _MANIFEST
        if not manifest.exists():
            if any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no {_MANIFEST}: name another directory")
            _write(manifest, lambda target: target.write_text(json.dumps(mark, indent=1), encoding="utf-8"))
            return
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            different = [key for key in mark if found.get(key) != mark[key]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{manifest} is damaged ({error}): remove {self.path} to begin anew") from None
        if "settings" in different and isinstance(found.get("settings"), dict):
            was, now = found["settings"], mark["settings"]
            changed = [f"{key} {was.get(key)} is now {now[key]}" for key in now if was.get(key) != now[key]]
            different[different.index("settings")] = f"settings ({', '.join(changed)})"
        if different:
            raise ValueError(
                f"{self.path} holds the layers of another quantization; different are its {', '.join(different)}: "
                f"use the same again, or another directory"
            )

    def _file(self, name: str) -> Path:
        return self.path / f"{quote(name, safe='')}.safetensors"

    def load(self, name: str, n: int, k: int) -> SpQRCodes | None:
        """The layer's codes; None where it is not finished.

        Raises:
            ValueError: its file is damaged.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata()
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            numbers = {key: int(metadata[key]) for key in _NUMBERS}
            measured = {key: float(metadata[key]) for key in _MEASURED}
            codes = SpQRCodes(**numbers, **measured, **tensors)  # type: ignore[arg-type]
            if tuple(codes.codes.shape) != (n, k):
                raise ValueError(f"it is of shape {list(codes.codes.shape)}, the layer of [{n}, {k}]")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it to quantize {name} again") from None
        return codes

    def save(self, name: str, codes: SpQRCodes) -> None:
        tensors = {key: getattr(codes, key) for key in _TENSORS}
        kept = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
        metadata = {key: repr(getattr(codes, key)) for key in (*_NUMBERS, *_MEASURED)}
        _write(self._file(name), lambda target: save_file(kept, target, metadata))


def _write(target: Path, write: Any) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
