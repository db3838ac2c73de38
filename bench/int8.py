"""LLM.int8(): octavo's operators and everyone else's way to an 8-bit linear layer, on the same inputs."""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from octavo import ops
from rich.console import Console
from torch import Tensor

from . import cases, common, limits, memory, plot
from .common import Effort, Record, Row

THRESHOLD = 6.0
ERROR_ROWS = 64  # rows are independent, and the float64 product is the slow part


@dataclass(eq=False)  # a key by identity
class Problem:
    """One linear layer's operands. `plain` has no |x| >= 6; `outliers` is the same with a few columns of 8 to 60."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: str = "cpu"
    weight: Tensor = field(init=False)  # fp32 [n, k]: what every contender quantizes or rounds for itself
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.m * 31 + self.n * 17 + self.k)
        self.weight = (torch.randn(self.n, self.k, generator=make) / self.k**0.5).to(self.device)
        plain = torch.randn(self.m, self.k, generator=make).clamp(-5.5, 5.5)
        outliers = plain.clone()
        columns = torch.randperm(self.k, generator=make)[: cases.OUTLIER_COLUMNS]
        magnitude = 8 + 52 * torch.rand(self.m, len(columns), generator=make)
        outliers[:, columns] = magnitude * torch.sign(torch.rand(len(columns), generator=make) - 0.5)
        self.inputs = {
            "plain": plain.to(self.device, self.dtype),
            "outliers": outliers.to(self.device, self.dtype),
        }

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """The float64 product of each input, as it stands, with the fp32 weight."""
        weight = self.weight.cpu().double()
        return {name: x[:ERROR_ROWS].cpu().double() @ weight.T for name, x in self.inputs.items()}


Build = Callable[[Problem, Tensor], Callable[[], Tensor]]  # with one copy of the fp32 weight


@dataclass(frozen=True)
class Method:
    """A contender: how it prepares one copy of the weight (not timed) and the call that is timed."""

    name: str
    build: Build
    weight_bytes: float  # per element, as the call reads it
    versus: str | None = None  # the contender that its time is divided by
    input: str = "plain"
    kind: str | None = "int8"  # whose compute peak bounds it
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # problems that it takes part in
    devices: tuple[str, ...] = ("cpu", "cuda")
    compare: bool = True  # whether its result is the layer's output


# ---- octavo --------------------------------------------------------------------------------------------------------


def octavo_linear(input: str, threshold: float) -> Build:
    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        codes, scale = ops.quantize_rowwise(weight)
        return functools.partial(ops.int8_linear, problem.inputs[input], codes, scale, None, threshold)

    return build


def octavo_gemm(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    codes, scale = ops.quantize_rowwise(weight)
    x_codes, x_scale = ops.quantize_rowwise(problem.inputs["plain"])
    return functools.partial(ops.int8_gemm, x_codes, codes, x_scale, scale, None, problem.dtype)


# ---- peers ---------------------------------------------------------------------------------------------------------


def torch_linear(dtype: torch.dtype) -> Build:
    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        return functools.partial(F.linear, problem.inputs["plain"].to(dtype), weight.to(dtype))

    return build


def torch_int_mm(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    codes, x_codes = ops.quantize_rowwise(weight)[0], ops.quantize_rowwise(problem.inputs["plain"])[0]
    if problem.device != "cpu" and problem.m <= 16:
        raise NotImplementedError("torch._int_mm on CUDA takes m > 16 only")
    return functools.partial(torch._int_mm, x_codes, codes.t())


def torch_quantize_dynamic(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the int8 that torch itself brings for a CPU
        model = torch.ao.quantization.quantize_dynamic(_float_layer(weight), {torch.nn.Linear}, dtype=torch.qint8)
    return functools.partial(model, problem.inputs["plain"].float())


def bitsandbytes_linear(input: str, threshold: float) -> Build:
    def build(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
        return functools.partial(bitsandbytes_layer(weight, threshold), problem.inputs[input])

    return build


def bitsandbytes_layer(weight: Tensor, threshold: float) -> torch.nn.Module:
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line per call, which would be timed
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
    layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    made: torch.nn.Module = layer.to(weight.device).eval()  # quantizes it
    return made


def torchao_linear(problem: Problem, weight: Tensor) -> Callable[[], Tensor]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = _float_layer(weight.to(problem.dtype))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return functools.partial(model, problem.inputs["plain"])


def _float_layer(weight: Tensor) -> torch.nn.Sequential:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return torch.nn.Sequential(layer).eval()


DEFAULT = "octavo t=6"
BF16 = (torch.bfloat16,)
METHODS = (
    Method("octavo t=0", octavo_linear("plain", 0.0), 1, DEFAULT),
    Method(DEFAULT, octavo_linear("plain", THRESHOLD), 1),
    Method("octavo t=6, outliers", octavo_linear("outliers", THRESHOLD), 1, "octavo t=0", input="outliers"),
    Method("octavo int8_gemm", octavo_gemm, 1, DEFAULT),
    Method("torch fp32", torch_linear(torch.float32), 4, DEFAULT, kind="fma"),
    Method("torch bf16", torch_linear(torch.bfloat16), 2, DEFAULT, kind=None, dtypes=BF16),
    Method("torch._int_mm", torch_int_mm, 1, "octavo int8_gemm", compare=False),
    Method("quantize_dynamic (fp32 x)", torch_quantize_dynamic, 1, DEFAULT, devices=("cpu",)),
    Method("bitsandbytes t=0", bitsandbytes_linear("plain", 0.0), 1, "octavo t=0"),
    Method("bitsandbytes t=6", bitsandbytes_linear("plain", THRESHOLD), 1, DEFAULT),
    Method(
        "bitsandbytes t=6, outliers",
        bitsandbytes_linear("outliers", THRESHOLD),
        1,
        "octavo t=6, outliers",
        input="outliers",
    ),
    Method("torchao int8 dynamic", torchao_linear, 1, DEFAULT),
)


# ---- sections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    effort: Effort
    limits: limits.Limits
    threads: int
    device: str
    methods: Sequence[Method] = METHODS


def prepare(problem: Problem, setting: Setting, skipped: dict[str, str]) -> dict[str, list[Callable[[], Tensor]]]:
    """Each method's calls, one per copy of its weight; a method that cannot take part says why in `skipped`."""
    calls: dict[str, list[Callable[[], Tensor]]] = {}
    cache = common.last_level_cache()
    for method in setting.methods:
        if problem.dtype not in method.dtypes or torch.device(problem.device).type not in method.devices:
            continue
        copies = common.copies_for(int(problem.n * problem.k * method.weight_bytes), cache)
        try:
            made = [method.build(problem, problem.weight.clone()) for _ in range(copies)]
            made[0]()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            if method.name.startswith("octavo"):
                raise
            skipped[method.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        calls[method.name] = made
    return calls


def bench_linear(problem: Problem, setting: Setting, skipped: dict[str, str]) -> list[Row]:
    calls = prepare(problem, setting, skipped)
    timings = common.time_paired(calls, setting.effort, common.clock_for(setting.device))
    m, n, k = problem.m, problem.n, problem.k
    rows = []
    for method in setting.methods:
        if method.name not in timings:
            continue
        timing, first = timings[method.name], calls[method.name][0]()
        weight_bytes = n * k * method.weight_bytes
        moved = weight_bytes + m * k * problem.inputs["plain"].element_size() + m * n * first.element_size()
        limit, bound_s = setting.limits.bound(2.0 * m * n * k, moved, method.kind)
        error = common.relative_error(first[:ERROR_ROWS], problem.exact[method.input]) if method.compare else None
        copies = len(calls[method.name])
        rows.append(
            Row(
                "linear",
                (m, n, k),
                common.dtype_name(problem.dtype),
                method.name,
                setting.threads,
                **common.timed(timing, timings, method.versus),
                ops=2.0 * m * n * k,
                bytes=moved,
                copies=copies,
                from_memory=copies * weight_bytes >= 2 * common.last_level_cache(),
                limit=limit,
                limit_share=bound_s / timing.median if limit else None,
                error=error,
            )
        )
    return rows


def torch_quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_rowwise at threshold 0 as one would write it in PyTorch."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(x / scale).clamp_(-127, 127).to(torch.int8), scale


def bench_quantize(
    rows: int, cols: int, dtype: torch.dtype, cold: bool, setting: Setting, skipped: dict[str, str]
) -> list[Row]:
    """quantize_rowwise: bytes are one read of x, one write of the codes and the scales. Cold: x comes from memory."""
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols)).to(setting.device, dtype)
    moved = x.numel() * (x.element_size() + 1) + 4 * rows
    copies = common.copies_for(x.numel() * x.element_size(), common.last_level_cache()) if cold else 1
    functions: dict[str, Callable[[Tensor], Any]] = {
        "octavo t=0": ops.quantize_rowwise,
        "octavo t=6": functools.partial(ops.quantize_rowwise, threshold=THRESHOLD),
        "torch, op by op": torch_quantize_rowwise,
    }
    if dtype == torch.float16:
        try:
            import bitsandbytes.functional

            functions["bitsandbytes"] = bitsandbytes.functional.int8_vectorwise_quant
        except ImportError as error:
            skipped["bitsandbytes"] = str(error)
    inputs = [x.clone() for _ in range(copies)]
    calls = {name: [functools.partial(function, each) for each in inputs] for name, function in functions.items()}
    timings = common.time_paired(calls, setting.effort, common.clock_for(setting.device))
    return [
        Row(
            "quantize_rowwise",
            (rows, cols),
            common.dtype_name(dtype),
            name,
            setting.threads,
            **common.timed(timing, timings, "octavo t=0"),
            ops=0.0,
            bytes=float(moved),
            copies=copies,
            from_memory=cold,
            limit="memory" if cold else None,
            limit_share=moved / setting.limits.read / timing.median if cold else None,
        )
        for name, timing in timings.items()
    ]


def problems(quick: bool) -> list[tuple[int, int, int, torch.dtype]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        return [(*shape, bf16) for shape in cases.gemm_shapes(cases.QUICK_ROWS, cases.QUICK_LAYERS)]
    found = [(*shape, bf16) for shape in cases.gemm_shapes(cases.BENCH_ROWS, cases.BENCH_LAYERS)]
    found += [(*shape, fp32) for shape in cases.gemm_shapes(cases.BENCH_ROWS, cases.QUICK_LAYERS)]
    return found + [(*shape, bf16) for shape in cases.gemm_shapes(cases.QUICK_ROWS, cases.SMALL_LAYERS)]


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON and PNG into `out` when it is given."""
    counts = list(threads) or [torch.get_num_threads()]
    before = torch.get_num_threads()
    record = Record("int8", common.describe_machine(device))
    effort = common.QUICK if quick else common.FULL
    try:
        for count in counts:
            torch.set_num_threads(count)
            with torch.inference_mode():
                _run_threads(console, record, effort, count, device, quick)
    finally:
        torch.set_num_threads(before)
    record.memory = memory.measure_all(device)
    memory.print_table(console, record.memory)
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)} and {plot.speed(record, out)}")
    return record


def _run_threads(console: Console, record: Record, effort: Effort, threads: int, device: str, quick: bool) -> None:
    measured = limits.measure(threads, device)
    record.limits.append(measured.to_dict())
    limits.print_limits(console, measured)
    setting = Setting(effort, measured, threads, device)
    for rows, cols, cold in cases.QUANTIZE_BENCH_SHAPES[1:] if quick else cases.QUANTIZE_BENCH_SHAPES:
        for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16, torch.float16):
            done = bench_quantize(rows, cols, dtype, cold, setting, record.skipped)
            record.rows += done
            common.print_rows(console, done)
    for m, n, k, dtype in problems(quick):
        done = bench_linear(Problem(m, n, k, dtype, device), setting, record.skipped)
        record.rows += done
        common.print_rows(console, done)


def measure_memory(name: str, device: str) -> dict[str, Any]:
    """What one contender takes in this process, as `memory.measure_all` collects it."""
    m, n, k = memory.SHAPE
    problem = Problem(m, n, k, torch.bfloat16, device)
    chosen = next(candidate for candidate in METHODS if candidate.name == name)
    with torch.inference_mode():
        extra = memory.extra(chosen.build(problem, problem.weight), device)
    return {"method": name, "shape": memory.SHAPE, "extra_bytes": extra, "extra_per_mk": extra / (m * k)}


if __name__ == "__main__":
    print(json.dumps(measure_memory(*sys.argv[1:])))
