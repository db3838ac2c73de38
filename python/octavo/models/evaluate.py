"""Judging a language model: perplexity, distance to another model, tokens per second, memory."""

from __future__ import annotations

import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.calibration import windows as windows


@dataclass
class Score:
    """Sums over tokens, so that windows can be added one by one."""

    tokens: int = 0  # with a next token to predict
    nats: float = 0.0  # the total surprise at them
    positions: int = 0  # compared with the reference
    divergence: float = 0.0  # sum over them of KL(reference || model), in nats

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise at the next token."""
        mean = self.nats / self.tokens if self.tokens else math.nan
        return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN

    @property
    def kl(self) -> float:
        """Mean over positions of KL(reference || model), in nats per token; NaN without a reference."""
        return self.divergence / self.positions if self.positions else math.nan

    def add(self, log_probs: Tensor, ids: Tensor, reference: Tensor | None = None) -> None:
        """Add a window: log probabilities [context, vocabulary], token ids [context], the reference's probabilities."""
        self.nats -= float(log_probs[:-1].gather(-1, ids[1:, None].to(log_probs.device)).double().sum())
        self.tokens += len(ids) - 1
        if reference is not None:
            # Position by position: a sum over all of them at once would need another [context, vocabulary].
            terms = [torch.dot(r.exp(), r - p).double() for r, p in zip(reference, log_probs, strict=True)]
            self.divergence += float(torch.stack(terms).sum())
            self.positions += len(ids)


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """fp32 log probabilities [context, vocabulary] of every next token of a window of token ids."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(ids[None].to(device), use_cache=False).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def perplexity(model: Any, ids: Tensor, done: Callable[[Score], object] | None = None) -> Score:
    """Score the windows [n, context] one by one; `done` is called after each with the score so far."""
    score = Score()
    for window in ids:
        score.add(log_probabilities(model, window), window)
        if done is not None:
            done(score)
    return score


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass
class Speed:
    """Seconds of repeated runs of the same work; the medians are what to report."""

    prefill_tokens: int
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # one token each

    @property
    def prefill(self) -> float:
        """Tokens per second through the whole prompt at once."""
        return self.prefill_tokens / statistics.median(self.prefill_seconds)

    @property
    def decode(self) -> float:
        """Tokens per second one by one, with a cache."""
        return 1.0 / statistics.median(self.step_seconds)


def speed(
    models: Iterable[Any],
    prompt: Tensor,
    steps: int = 16,
    rounds: int = 3,
    warm: bool = False,
    begin: Callable[[int, int], object] | None = None,
) -> list[Speed]:
    """Prefill and greedy decoding of several models, interleaved, so that all meet the same state of the machine.

    Args:
        models: causal language models of transformers.
        prompt: token ids [context].
        steps: tokens to decode after it in each round.
        rounds: to measure.
        warm: the models have run already; else one more round comes first and is not counted.
        begin: called before each turn with the round (0 is the one that is not counted) and the model's index.
    """
    models = list(models)
    speeds = [Speed(len(prompt)) for _ in models]
    for counted in range(warm, rounds + 1):
        for index, (model, result) in enumerate(zip(models, speeds, strict=True)):
            if begin is not None:
                begin(counted, index)
            seconds, step_seconds, _ = generate(model, prompt, steps)
            if counted:
                result.prefill_seconds.append(seconds)
                result.step_seconds += step_seconds
    return speeds


def generate(model: Any, prompt: Tensor, steps: int, stop: Iterable[int] = ()) -> tuple[float, list[float], list[int]]:
    """Greedy decoding: seconds for the prompt, seconds of each further step, the ids (`steps`, or up to a stop id)."""
    device = next(model.parameters()).device
    stops, ids, seconds = set(stop), prompt[None].to(device), []
    chosen: list[int] = []
    cache: dict[str, Any] = {}
    with torch.inference_mode():
        while len(chosen) < steps:
            begin = _now(device)
            out = model(ids, **cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            seconds.append(_now(device) - begin)
            cache = cache_of(model, out)
            chosen.append(int(ids))
            if chosen[-1] in stops:
                break
    return seconds[0], seconds[1:], chosen


def cache_of(model: Any, output: Any) -> dict[str, Any]:
    """The key-value cache in a causal model's output, as the keyword argument that continues from it.

    transformers 5.0 calls it `past_key_values`, later releases `cache`, and warn of the other name.
    """
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    older = not hasattr(output, "cache") or "past_key_values" in inspect.signature(model.forward).parameters
    return {"past_key_values" if older else "cache": cache}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- memory ----------------------------------------------------------------------------------------------------------


def model_bytes(model: torch.nn.Module) -> int:
    """The bytes of all parameters and buffers; tied ones count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_memory() -> int | None:
    """The peak of this process's resident memory, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
