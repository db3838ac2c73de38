"""The text of a run: windows to train on in an order that depends on the seed alone, and windows held out."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..models import evaluate
from .settings import MAX_STEPS, Settings


class Text:
    """Token ids cut into windows [n, context].

    Attributes:
        train: from the beginning of the text.
        held_out: from its end.
        sha256: of all token ids.
        total: how many steps the settings ask for.
        tokenizer: that made the ids.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Any, settings: Settings) -> None:
        """Read a file.

        Raises:
            OSError, ValueError: it cannot be read, is not UTF-8, or is too short; the message says by how much.
        """
        self.settings, self.tokenizer = settings, tokenizer
        ids = torch.tensor(models.tokens_of(tokenizer, Path(path)), dtype=torch.long)
        self.sha256 = hashlib.sha256(ids.numpy().data).hexdigest()
        self.largest = int(ids.max()) if len(ids) else 0
        context, per_step = settings.context, settings.batch * settings.accumulate
        end = len(ids) - math.ceil(settings.held_out * len(ids))
        for name, part, wanted in (("train on", ids[:end], per_step), ("hold out", ids[end:], 1)):
            if len(part) < wanted * context:
                of = f"{wanted} windows of {context}" if wanted > 1 else f"a window of {context}"
                raise ValueError(
                    f"{path} has {len(ids)} tokens, of which {len(part)} are to {name}: fewer than {of}; give a longer "
                    f"text, a smaller context{', batch' if wanted > 1 else ''} or another share to hold out"
                )
        self.train = evaluate.windows(ids[:end], context)
        self.held_out = evaluate.windows(ids[end:], context, settings.eval_windows)
        steps = float(settings.epochs) * len(self.train) / per_step
        if settings.steps is None and steps > MAX_STEPS:
            raise ValueError(f"epochs {settings.epochs!r} of {len(self.train)} windows are more than {MAX_STEPS} steps")
        self.total = max(1, math.ceil(steps)) if settings.steps is None else settings.steps
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._orders: list[Tensor] = []

    def batches(self, step: int) -> Tensor:
        """The windows of a step [accumulate, batch, context]: each epoch goes through all of them in a new order."""
        batch, accumulate, count = self.settings.batch, self.settings.accumulate, len(self.train)
        first = step * batch * accumulate
        numbers = [self._order(at // count)[at % count] for at in range(first, first + batch * accumulate)]
        return self.train[torch.stack(numbers)].reshape(accumulate, batch, -1)

    def _order(self, epoch: int) -> Tensor:
        while len(self._orders) <= epoch:  # of all epochs before, so that a run that goes on has the same
            self._orders.append(torch.randperm(len(self.train), generator=self._generator))
        return self._orders[epoch]
