"""Calibration data: batches of a model's inputs, cut from a text file or taken as given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]
_CONTEXT = 2048


def windows(ids: Sequence[int] | Tensor, context: int, limit: int | None = None) -> Tensor:
    """Token ids cut into whole windows [n, context], in order, none overlapping; the rest is dropped.

    Raises:
        ValueError: context below 2 or limit below 1, or fewer tokens than one window.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of windows must be at least 1, got {limit}")
    count = len(ids) // context
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {context}")
    count = count if limit is None else min(count, limit)
    return torch.as_tensor(ids[: count * context]).reshape(count, context)


def prepare(
    calibration: str | os.PathLike[str] | Iterable[Any],
    samples: int,
    context: int | None,
    tokenizer: Any,
    model: nn.Module,
) -> list[Batch]:
    """Up to `samples` sequences as batches, on the model's device. A text is cut into windows of `context` tokens, of
    which as many as wanted are taken, evenly spread; of token ids, those beyond `context` are dropped. A tensor of ids
    of one dimension is one sequence. Mappings and batches of floats are taken as they are.

    Raises:
        ValueError: no sequence, or one shorter than `context`; a context that cannot be, or for batches that have none;
            a text without a tokenizer; batches of another kind.
    """
    for name, value in (("samples", samples), ("context", context)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an integer, at least 1, got {value!r}")
    if isinstance(calibration, Tensor) and calibration.dim() == 1 and not calibration.is_floating_point():
        calibration = [calibration]
    if not isinstance(calibration, (str, os.PathLike, Iterable)):
        raise ValueError(f"calibration must be batches or the path of a text, got {type(calibration).__name__}")
    if isinstance(calibration, (str, os.PathLike)):
        batches = _from_text(Path(calibration), samples, context, tokenizer, model)
    else:
        batches, count = [], 0
        for i, batch in enumerate(calibration):
            batches.append(_checked(batch, i, context))
            count += _first_size(batches[-1])
            if count >= samples:
                break
    if not batches:
        raise ValueError("calibration has no sequences")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return [_to(batch, device) for batch in batches]


def _from_text(path: Path, samples: int, context: int | None, tokenizer: Any, model: nn.Module) -> list[Batch]:
    if tokenizer is None:
        raise ValueError(f"calibration from the text {path} needs tokenizer=, the model's tokenizer")
    if context is None:
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or _CONTEXT
        context = min(_CONTEXT, int(longest))
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    try:
        cut = windows(ids, context)
    except ValueError as error:
        raise ValueError(f"calibration from {path}: {error}") from None
    if len(cut) > samples:
        cut = cut[torch.linspace(0, len(cut) - 1, samples).round().long()]
    return [window[None] for window in cut]


def _checked(batch: Any, i: int, context: int | None) -> Batch:
    if isinstance(batch, Mapping):
        if not any(isinstance(value, Tensor) and value.numel() for value in batch.values()):
            raise ValueError(f"calibration batch {i} holds no tensor with elements: {sorted(batch)}")
        _refuse_context(context, i, "a mapping")
        return batch
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(item, int) for item in batch):
        batch = torch.tensor(batch)
    if not isinstance(batch, Tensor):
        raise ValueError(f"calibration batches must be tensors or mappings, got {type(batch).__name__}")
    if not batch.numel() or not batch.dim():
        raise ValueError(f"calibration batch {i} is empty or a single number: shape {list(batch.shape)}")
    if batch.is_floating_point():
        _refuse_context(context, i, "of floats")
        return batch
    ids: Tensor = batch[None] if batch.dim() == 1 else batch
    if context is not None:
        if ids.shape[-1] < context:
            raise ValueError(f"calibration sequence {i} has {ids.shape[-1]} tokens, fewer than context {context}")
        ids = ids[..., :context]
    return ids


def _refuse_context(context: int | None, i: int, what: str) -> None:
    if context is not None:
        raise ValueError(f"context {context} is for token ids, but calibration batch {i} is {what}: cut it yourself")


def _first_size(batch: Batch) -> int:
    tensors = [batch] if isinstance(batch, Tensor) else [v for v in batch.values() if isinstance(v, Tensor)]
    return next((len(tensor) for tensor in tensors if tensor.dim()), 1)


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
