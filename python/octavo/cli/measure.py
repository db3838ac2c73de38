"""`octavo eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..core.method import UNQUANTIZED
from ..core.progress import progress_bar
from ..models import evaluate


def measure(
    model: str,
    text: Path,
    context: int,
    limit: int | None,
    dtype: torch.dtype | None,
    method: str = UNQUANTIZED[0],
    calibration: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that `octavo eval` prints.

    Raises:
        ModelError, OSError, ValueError: the model or the text cannot be read, or the text is too short.
    """
    source = models.resolve(model)
    tokenizer = models.load_tokenizer(source)
    ids = evaluate.windows(models.tokens_of(tokenizer, text), context, limit)
    network = models.load_base(source, method, dtype, calibration=calibration, training=False, **(settings or {}))
    models.check_context(network, context, model)
    with progress_bar("perplexity", len(ids)) as bar:
        score = evaluate.perplexity(network, ids, lambda score: bar(f"{score.perplexity:.3f}"))
    rounds = 3
    with progress_bar("speed, round", rounds) as bar:
        (speed,) = evaluate.speed(
            [network], ids[0], rounds=rounds, begin=lambda turn, _: bar.show(f"{turn} of {rounds}", turn - 1)
        )
    return {
        "model": model,
        "text": str(text),
        "context": context,
        "windows": len(ids),
        "tokens": score.tokens,
        "perplexity": score.perplexity,
        "prefill_tokens_per_s": speed.prefill,
        "decode_tokens_per_s": speed.decode,
        "model_bytes": evaluate.model_bytes(network),
        "peak_memory": evaluate.peak_memory(),
        "threads": torch.get_num_threads(),
    }
