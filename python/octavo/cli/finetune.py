"""`octavo finetune`: QLoRA on a model and a text."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.method import method_of_description
from ..core.progress import progress_bar
from ..lora.peft_format import read_quantization
from .app import app
from .options import Calibration, method_option, method_options, options_of
from .shared import (
    SOURCE_HELP,
    AsJson,
    Quiet,
    Threads,
    console,
    one_line_errors,
    print_json,
    say,
    show_command,
)

if TYPE_CHECKING:
    from types import FrameType

    from ..finetune import Result, Settings, Watcher


@app.command()
@method_options(without=("context", "samples", "resume"), training=True)
def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=SOURCE_HELP)],
    text: Annotated[
        Path, typer.Option(metavar="FILE", show_default=False, help="Plain text, UTF-8; its end is held out.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where everything goes: new, or empty, or with --resume a run's."),
    ] = Path("octavo-finetune"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR, if there is one: with the same options.")
    ] = False,
    method: method_option("The base's.", unquantized=True) = "nf4",  # type: ignore[valid-type]
    calibration: Calibration = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="What adapters add is scaled by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Of the adapters' inputs, in training.")] = 0.05,
    init: Annotated[
        str | None,
        typer.Option(
            show_default="nf4, fp4: residual",
            help="Of adapters. residual: begin with what quantization lost (QERA, 2410.06040); zero: as in the paper.",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="paged_adamw8bit, adamw8bit, paged_lion8bit, lion8bit; with fp32 states paged_adamw, adamw (torch's)."
        ),
    ] = "paged_adamw8bit",
    page_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default="memory", help="Paged, on the CPU: states in a file in DIR."),
    ] = None,
    device_budget: Annotated[
        int | None,
        typer.Option(metavar="BYTES", show_default="128 MiB", help="Paged: states that stay beside the adapters."),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate, constant after the warm-up.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="The share of the steps in which it grows from 0.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of the adapters.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to it.")] = 0.3,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens per window; windows do not overlap.")] = 512,
    batch: Annotated[int, typer.Option(metavar="N", help="Windows at once.")] = 4,
    accumulate: Annotated[int, typer.Option(metavar="N", help="Batches per step. The paper's steps see 16.")] = 1,
    epochs: Annotated[float, typer.Option(help="How often to go through the text.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", show_default=False, help="How many steps, in place of --epochs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32: products, and what is not quantized.")] = "bf16",
    keep_activations: Annotated[
        bool, typer.Option("--keep-activations", help="No gradient checkpointing: a third faster, far more memory.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", hidden=True)
    ] = True,
    held_out: Annotated[float, typer.Option(help="The share of the text to judge by.")] = 0.1,
    eval_every: Annotated[
        int | None, typer.Option(metavar="N", show_default="a quarter of all", help="Steps between perplexities.")
    ] = None,
    eval_windows: Annotated[int, typer.Option(metavar="N", help="Windows held out to judge by, at most.")] = 64,
    save_every: Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints; two are kept.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the adapters, the order of windows and dropout.")] = 0,
    device: Annotated[str | None, typer.Option(show_default="cuda, or else cpu", help="cpu or cuda.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Begin anew in DIR: what a run made there is removed, nothing else."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    threads: Threads = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Fine-tune MODEL on a text by QLoRA (arXiv 2305.14314): the base in 4 bits, LoRA adapters on all linear layers.

    DIR gets `adapter` (PEFT's format), `losses.jsonl`, `losses.png` and `finetune.json`. On SIGTERM or Ctrl-C the step
    is finished and a checkpoint written (exit code 143 or 130; a second signal ends it at once); the same command with
    --resume goes on, and losses and adapter are those of a run that was never interrupted.

    ```sh
    octavo finetune smollm2 --text novel.txt --out emma --context 256 --steps 100 --lr 5e-4
    octavo finetune smollm2 --text novel.txt --out emma --context 256 --steps 100 --lr 5e-4 --resume
    octavo finetune ./Llama-3.1-8B --text corpus.txt --rank 64 --accumulate 4 --optimizer paged_adamw
    octavo generate smollm2 --adapter emma/adapter --dtype bf16 --prompt "Emma was"
    ```
    """
    from ..finetune import Settings
    from ..finetune import finetune as run

    with one_line_errors(quiet), _usage():
        recipe = Settings(
            method=str(method),
            quantization=settings or {},
            calibration=None if calibration is None else str(calibration),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            init=init,
            optimizer=optimizer,
            page_dir=None if page_dir is None else str(page_dir),
            device_budget=device_budget,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            batch=batch,
            accumulate=accumulate,
            context=context,
            epochs=epochs,
            steps=steps,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing and not keep_activations,
            held_out=held_out,
            eval_every=eval_every,
            eval_windows=eval_windows,
            save_every=save_every,
            seed=seed,
            device=device,
        )
        recipe.check()
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with what --overwrite would remove", param_hint="--overwrite")
    with one_line_errors(quiet):
        signals = _Signals()
        with signals.installed(), _progress(console(stderr=True, quiet=quiet), signals) as watcher:
            result = run(
                model, text, out, recipe, resume=resume, overwrite=overwrite, watcher=watcher, stop=signals.received
            )
    if as_json:
        print_json(_as_json(out, result))
    else:
        _print(console(), result)
    if result.adapter is not None and not (as_json or quiet):
        say(console(), "to try it:")
        show_command(console(), generate_command(model, result.adapter, recipe))
    if not result.finished:
        assert signals.number is not None
        say(
            console(stderr=True),
            f"stopped by {signal.Signals(signals.number).name} after step {result.steps} of {result.total}; a "
            f"checkpoint is in {out}. To go on: the same command with --resume",
        )
        raise typer.Exit(128 + signals.number)


@contextmanager
def _usage() -> Iterator[None]:
    """What a setting cannot be is wrong usage: exit code 2, as for an option that does not exist."""
    from ..finetune import Settings

    try:
        yield
    except ValueError as error:
        name = str(error).split(" ", 1)[0]
        known = {field.name for field in dataclasses.fields(Settings)}
        hint = f"--{name.replace('_', '-')}" if name in known else None
        raise typer.BadParameter(str(error), param_hint=hint) from None


def _as_json(out: Path, result: Result) -> dict[str, Any]:
    return {
        "directory": str(out),
        "adapter": None if result.adapter is None else str(result.adapter),
        "finished": result.finished,
        "steps": result.steps,
        "total": result.total,
        "perplexities": result.perplexities,
        "tokens_per_s": result.tokens_per_s,
    }


def generate_command(model: str, adapter: Path, settings: Settings) -> list[str]:
    """The command that loads the base as it was trained on, with this adapter, which records what it can."""
    words = ["octavo", "generate", model, "--adapter", str(adapter), "--dtype", settings.dtype]
    if settings.base is None:
        return words
    method, given = settings.base
    options = options_of(settings.method, given)
    recorded = method_of_description(read_quantization(adapter) or "")
    if settings.calibration is not None:
        options += ["--calibration", settings.calibration]
    elif recorded is not None and recorded[0] is method and method.settings(recorded[1]) == method.settings(given):
        return words
    return [*words, "--method", settings.method, *options]


class _Signals:
    """SIGTERM and Ctrl-C: in training they wait for the end of a step; before it, and the second time, they end it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.training = False

    def received(self) -> bool:
        return self.number is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training or self.number is not None:
            sys.exit(128 + number)  # unwinds
        self.number = number
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _progress(console: Console, signals: _Signals) -> Iterator[Watcher]:
    from ..finetune import Watcher

    with progress_bar("", None, console=console) as bar:

        class Shown(Watcher):
            def __init__(self) -> None:
                self.loss = self.perplexity = self.rate = math.nan

            def stage(self, what: str) -> None:
                bar.show(what)

            def begin(self, total: int, history: Any) -> None:
                signals.training = True
                bar.show("training", len(history.steps), total)
                if history.steps:
                    console.print(f"going on after step {len(history.steps)} of {total}")

            def describe(self, more: str = "", completed: int | None = None) -> None:
                text = "training" if math.isnan(self.loss) else f"loss {self.loss:.3f}, {self.rate:.0f} tokens/s"
                text += "" if math.isnan(self.perplexity) else f", perplexity {self.perplexity:.2f}"
                bar.show(text + more, completed)

            def step(self, line: Mapping[str, float]) -> None:
                self.loss, self.rate = line["loss"], line["tokens"] / max(line["seconds"], 1e-9)
                self.describe(completed=int(line["step"]))

            def evaluating(self, window: int, windows: int) -> None:
                self.describe(f", window {window} of {windows}")

            def evaluated(self, step: int, perplexity: float) -> None:
                self.perplexity = perplexity
                about = "" if math.isnan(self.loss) else f", loss {self.loss:.4f}, {self.rate:.0f} tokens/s"
                console.print(f"step {step}: held-out perplexity {perplexity:.3f}{about}")
                self.describe()

            def note(self, text: str) -> None:
                say(console, f"note: {text}")

        yield Shown()


def _print(console: Console, result: Result) -> None:
    from ..finetune.memory import as_table

    perplexities = result.perplexities
    if len(perplexities) > 1:
        first, *_, last = perplexities
        before, after = perplexities[first], perplexities[last]
        change = after / before - 1.0
        console.print(
            f"held-out perplexity {before:.3f} after {first} steps, {after:.3f} after {last} ({change:+.1%}); "
            f"{result.tokens_per_s:.0f} tokens/s"
        )
    if result.steps:
        console.print(as_table(result.memory))
    if result.adapter is not None:
        say(console, f"written: {result.adapter}, and beside it losses.jsonl, losses.png, finetune.json")
