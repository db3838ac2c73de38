"""Finished layers on disk, so that quantizing a model can be interrupted and go on: one file per layer, and a manifest.

Files are written beside themselves, made durable and renamed: one that exists is whole, and has the hash of its
tensors, in case the disk changed it.
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

from ...core.files import check_regular, is_left_over, read_json, replace_file
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
        for left in self.path.iterdir():
            if is_left_over(left.name):
                left.unlink(missing_ok=True)
        if not manifest.exists():
            if any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no {_MANIFEST}: name another directory")
            text = json.dumps(mark, indent=1)
            replace_file(manifest, lambda target: target.write_text(text, encoding="utf-8"))
            return
        try:
            found = read_json(manifest)
        except ValueError as error:
            raise ValueError(f"{manifest} is damaged ({error}): remove {self.path} to begin anew") from None
        different = [key for key in mark if found.get(key) != mark[key]]
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
            check_regular(file)
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            numbers = {key: int(metadata[key]) for key in _NUMBERS}
            measured = {key: float(metadata[key]) for key in _MEASURED}
            if metadata.get("sha256", now := _digest(tensors, metadata)) != now:
                raise ValueError("it is not what was written")
            codes = SpQRCodes(**numbers, **measured, **tensors)  # type: ignore[arg-type]
            if tuple(codes.codes.shape) != (n, k):
                raise ValueError(f"it is of shape {list(codes.codes.shape)}, the layer of [{n}, {k}]")
            _check(codes)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it to quantize {name} again") from None
        return codes

    def save(self, name: str, codes: SpQRCodes) -> None:
        tensors = {key: getattr(codes, key) for key in _TENSORS}
        kept = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
        metadata = {key: repr(getattr(codes, key)) for key in (*_NUMBERS, *_MEASURED)}
        metadata["sha256"] = _digest(kept, metadata)
        replace_file(self._file(name), lambda target: save_file(kept, target, metadata))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted((*_NUMBERS, *_MEASURED)):
        digest.update(f"{key} {metadata.get(key)}\n".encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}\n".encode())
        _update(digest, tensors[key])
    return digest.hexdigest()


def _check(codes: SpQRCodes) -> None:
    """ValueError where tensors do not fit together, or a statistic is NaN or Inf."""
    if (codes.n, codes.k) != tuple(codes.codes.shape):
        raise ValueError(f"it says [{codes.n}, {codes.k}], and its codes are of shape {list(codes.codes.shape)}")
    if min(codes.group_size, codes.stats_group_size) < 1 or codes.k % codes.group_size:
        raise ValueError(f"it has group_size {codes.group_size} and stats_group_size {codes.stats_group_size}")
    groups, outliers = codes.k // codes.group_size, len(codes.outlier_columns)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (codes.n, codes.k)),
        "unit": (torch.float32, (1,)),
        "row_offsets": (torch.int32, (codes.n + 1,)),
        "outlier_columns": (torch.int32, (outliers,)),
        "outlier_values": (torch.float16, (outliers,)),
        "perm": (torch.int32, (codes.k,)),
        **{key: (torch.float16, (codes.n, groups)) for key in ("scales", "zeros")},
        **{key: (torch.uint8, (codes.n, groups)) for key in ("scale_codes", "zero_codes")},
        "second_order": (torch.float16, (-(-codes.n // codes.stats_group_size), groups, 4)),
    }
    bilevel = codes.second_order is not None
    for key, (dtype, shape) in wanted.items():
        tensor: Tensor | None = getattr(codes, key)
        if tensor is None:
            if key in (("scale_codes", "zero_codes") if bilevel else ("scales", "zeros")):
                raise ValueError(f"it has no {key}")
        elif (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"its {key} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"its {key} has {int((~tensor.isfinite()).sum())} values that are NaN or Inf")
    offsets = codes.row_offsets.long()
    if int(offsets[0]) != 0 or int(offsets[-1]) != outliers or bool((offsets.diff() < 0).any()):
        raise ValueError("its row_offsets do not rise from 0 to the number of outliers")
    if outliers and not 0 <= int(codes.outlier_columns.min()) <= int(codes.outlier_columns.max()) < codes.k:
        raise ValueError(f"its outlier_columns are not all below {codes.k}")
    if codes.perm is not None and not torch.equal(codes.perm.long().sort().values, torch.arange(codes.k)):
        raise ValueError("its perm is no order of the columns")
