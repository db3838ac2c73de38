"""`octavo analyze`: what LLM.int8() and SpQR look at in a model before they quantize it, as JSON and PNG.

Activations: the dimensions that reach 6.0, in which share of layers and positions, against perplexity (2208.07339,
section 4). Weights: which are sensitive, and whether they lie in rows, columns, attention heads, rotary frequencies, or
nowhere in particular; how error grows with depth and along the order of GPTQ (2306.03078, sections 3 and 4).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import models
from .._version import __version__
from ..core.console import say
from ..core.files import read_json
from ..core.progress import progress_bar
from ..core.stored import check_fillable
from ..models import evaluate
from . import activations, plots, weights
from .sites import find_sites
from .weights import Settings

__all__ = ["Settings", "analyze", "run"]

_FILES = ("analyze.json", "activations.png", "weights.png", "maps.png")


def run(
    console: Console,
    model: str,
    text: Path,
    out: Path,
    context: int = 512,
    windows: int = 8,
    threshold: float = 6.0,
    settings: Settings | None = None,
    beside: Sequence[Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Analyze the model called `model` on the beginning of a text; write JSON and pictures into the folder `out`.

    Args:
        console: for progress and the summary.
        model: a path, "smollm2", or a name on the Hugging Face hub.
        text: a file of plain text.
        out: a directory, to be made.
        context: tokens per window.
        windows: how many of them.
        threshold: from which an activation is large.
        settings: of the weights' analysis.
        beside: analyze.json of other models, to draw beside this one.
        overwrite: `out` may hold the files of an earlier run, which are replaced.

    Raises:
        FileExistsError: `out` is there already.
        ModelError, OSError, ValueError: the model or a file cannot be read, the text is too short, no Linear layer.

    Example:
        >>> from pathlib import Path
        >>> from octavo.analyze import run
        >>> from rich.console import Console
        >>> record = run(Console(), "smollm2", Path("novel.txt"), Path("analysis"))  # doctest: +SKIP
    """
    begin = time.perf_counter()
    plots.need_matplotlib()
    check_fillable(out, _FILES, overwrite)
    others = [read_record(path) for path in beside]
    source = models.resolve(model)
    ids = text_windows(models.load_tokenizer(source), text, context, windows)
    network = models.load_model(source, torch.float32)
    models.check_context(network, context, model)
    record = {
        "schema": 1,
        "octavo": __version__,
        "model": model,
        "text": str(text),
        "context": context,
        "threads": torch.get_num_threads(),
        **analyze(console, network, ids, threshold, settings or Settings()),
    }
    out.mkdir(parents=True, exist_ok=True)
    plots.activations(record, others, out / "activations.png")
    plots.weights(record, out / "weights.png")
    plots.maps(record, out / "maps.png")
    record["seconds"] = time.perf_counter() - begin
    (out / "analyze.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    _print(console, record, out)
    return record


def analyze(console: Console, model: Any, ids: Tensor, threshold: float, settings: Settings) -> dict[str, Any]:
    """Both analyses of a causal language model on the windows [n, context], in numbers that JSON can hold.

    Example:
        >>> import torch, transformers
        >>> from octavo.analyze import Settings, analyze
        >>> from rich.console import Console
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()
        >>> record = analyze(Console(quiet=True), model, torch.arange(64).reshape(2, 32), 6.0, Settings())
        >>> sorted(record)
        ['activations', 'perplexity', 'tokens', 'weights', 'windows']
    """
    sites = find_sites(model, ids[0, :16])
    names = [(name, site) for site in sites for name in site.linears]
    depths = sorted({site.depth for site in sites})
    drawn = {depths[0], depths[len(depths) // 2], depths[-1]}
    with progress_bar("activations", len(ids)) as bar:
        seen = activations.watch(model, sites, ids, threshold, lambda score: bar(f"perplexity {score.perplexity:.2f}"))
    layers, histograms = [], []
    windows = len(ids) * len(weights.passes(sites))
    with progress_bar("weights", len(names)) as each, progress_bar("inputs of layers", windows) as inputs:
        for site, hessian in weights.hessians(model, sites, ids, inputs):
            for name in site.linears:
                each.show(name)
                mapped = site.depth in drawn
                entry, histogram = weights.examine(model.config, name, site, hessian, settings, mapped)
                layers.append(entry)
                histograms.append(histogram)
                each(name)
    for entry, share in zip(layers, weights.shares_of_model(histograms, settings.share), strict=True):
        entry["share_among_most_sensitive"] = share
    return {
        "windows": len(ids),
        "tokens": seen.score.tokens,
        "perplexity": seen.score.perplexity,
        "activations": seen.to_dict(),
        "weights": {"settings": settings.to_dict(), "layers": layers},
    }


def text_windows(tokenizer: Any, path: Path, context: int, limit: int) -> Tensor:
    """The first windows of a text.

    Raises:
        ValueError: not UTF-8, or fewer tokens than one window.
    """
    tokens = models.tokens_of(tokenizer, path)
    try:
        return evaluate.windows(tokens, context, limit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a longer text or a smaller --context") from None


def read_record(path: Path) -> dict[str, Any]:
    """Read the record that an earlier run wrote.

    Raises:
        OSError, ValueError: there is no such file, or it holds something else.
    """
    if path.is_dir():
        path = path / _FILES[0]
    try:
        record = read_json(path, foreign=True)
    except ValueError as error:
        raise ValueError(f"{path} is no {_FILES[0]} that `octavo analyze` wrote: {error}") from None
    if {"model", "perplexity", "activations"} <= record.keys():
        return record
    raise ValueError(f"{path} is no {_FILES[0]} that `octavo analyze` wrote")


def _print(console: Console, record: dict[str, Any], out: Path) -> None:
    seen = record["activations"]
    table = Table(
        title=f"{record['model']}: perplexity {record['perplexity']:.2f} on {record['windows']} x {record['context']} "
        f"tokens of {Path(record['text']).name}",
        box=SIMPLE_HEAD,
    )
    table.add_column("input of")
    for heading in ("dimensions", f"reach {seen['threshold']:g}\nanywhere", "outlier\nfeatures", "positions\naffected"):
        table.add_column(heading, justify="right")
    names = plots.short([entry["projection"] for entry in seen["projections"]])
    for entry in seen["projections"]:
        layers = [layer["positions_share"] for layer in seen["layers"] if layer["projection"] == entry["projection"]]
        table.add_row(
            names[entry["projection"]],
            str(entry["features"]),
            str(len(entry["dimensions"])),
            str(entry["outlier_features"]),
            f"{sum(layers) / len(layers):.1%}",
        )
    console.print(table)
    console.print(
        f"outlier features: in at least {activations.LAYERS:.0%} of layers and {activations.POSITIONS:.0%} of "
        "positions. positions affected: mean over layers.",
        style="dim",
    )
    settings, table = record["weights"]["settings"], Table(box=SIMPLE_HEAD, collapse_padding=True)
    table.title = (
        f"the {settings['share']:.1%} most sensitive weights of each layer, {settings['bits']} bits, groups of "
    )
    table.title += str(settings["group_size"])
    kinds = tuple(plots.KINDS)
    table.add_column("projection", no_wrap=True)
    headings = [kind if len(kind) < 10 else "no\nstructure" for kind in kinds]
    for heading in (*headings, "of\ntotal", "error,\nrounding", "error,\nGPTQ"):
        table.add_column(heading, justify="right")
    for projection, layers in plots.by_projection(record["weights"]["layers"]).items():

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        shares = [[layer["shares"].get(kind) for layer in layers] for kind in kinds]
        figures = [mean([layer[key] for layer in layers]) for key in plots.FIGURES]
        table.add_row(
            projection,
            *("" if None in values else f"{mean(values):.0%}" for values in shares),
            *(f"{figure:.1%}" for figure in figures),
        )
    console.print(table)
    console.print(
        "of total: what they carry of the sensitivity of all weights. error: of the layer's output, squared, relative. "
        "Means over layers.",
        style="dim",
    )
    say(console, f"written to {out}: {', '.join(_FILES)}; {record['seconds']:.0f} s")
