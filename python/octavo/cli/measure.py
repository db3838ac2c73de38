"""`octavo eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import models
from ..core.method import UNQUANTIZED
from ..models import evaluate


def measure(
    console: Console,
    model: Path,
    text: Path,
    context: int,
    limit: int | None,
    dtype: str | None,
    method: str = UNQUANTIZED[0],
    calibration: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that `octavo eval` prints; progress goes to `console`.

    Raises:
        ModelError, OSError, ValueError: the model or the text cannot be read, or the text is too short.
    """
    source = models.find_source(model)
    tokenizer = models.load_tokenizer(source)
    ids = evaluate.windows(models.tokens_of(tokenizer, text), context, limit)
    of_torch = None if dtype is None else getattr(torch, dtype)
    network = models.load_base(source, method, of_torch, calibration=calibration, training=False, **(settings or {}))
    models.check_context(network, context, model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("perplexity", total=len(ids))

        def show(score: evaluate.Score) -> None:
            bar.update(task, advance=1, description=f"perplexity {score.perplexity:.3f}")

        score = evaluate.perplexity(network, ids, show)
        rounds = 3
        turns = bar.add_task("speed", total=rounds)
        (speed,) = evaluate.speed(
            [network],
            ids[0],
            rounds=rounds,
            begin=lambda turn, _: bar.update(turns, completed=turn, description=f"speed, round {turn} of {rounds}"),
        )
    return {
        "model": str(model),
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
