"""llama.cpp's products with k-quants, through the C interface of ggml: a peer for low-bit weights on a CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"Q3_K": 11, "Q4_0": 2, "Q4_K": 12}  # enum ggml_type
_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):  # ggml_cplan; what newer versions append fits the reserve
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


def _files() -> tuple[Path, Path]:
    """The libraries with the functions of ggml-base and of ggml-cpu: from OCTAVO_GGML, xllamacpp or llama-cpp-python.

    OCTAVO_GGML is a folder with both, or one library with all of ggml, as xllamacpp has it in its Python module.
    """
    if given := os.environ.get("OCTAVO_GGML"):
        folder = Path(given)
        if folder.is_file():
            return folder, folder
    elif (package := _package("xllamacpp")) is not None:
        modules = sorted(package.glob("xllamacpp*.so"))
        if not modules:
            raise ImportError(f"{package} holds no xllamacpp*.so: set OCTAVO_GGML, or pip install xllamacpp")
        return modules[0], modules[0]
    elif (package := _package("llama_cpp")) is not None:
        folder = package / "lib"
    else:
        raise ImportError(
            "needs ggml: pip install xllamacpp, or set OCTAVO_GGML to a folder with libggml-base.so and libggml-cpu.so"
        )
    return folder / "libggml-base.so", folder / "libggml-cpu.so"


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@functools.cache
def _library() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    base_file, cpu_file = _files()
    # The two libraries of a folder find each other's symbols; one that holds all must not lend its own to others.
    mode = ctypes.RTLD_LOCAL if base_file == cpu_file else ctypes.RTLD_GLOBAL
    try:
        base, cpu = ctypes.CDLL(str(base_file), mode=mode), ctypes.CDLL(str(cpu_file), mode=mode)
    except OSError as error:
        raise ImportError(f"cannot load ggml: {error}") from None
    for library, name, result, arguments in (
        (base, "ggml_init", c_void_p, [_InitParams]),
        (base, "ggml_free", None, [c_void_p]),
        (base, "ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        (base, "ggml_mul_mat", c_void_p, [c_void_p, c_void_p, c_void_p]),
        (base, "ggml_get_data", c_void_p, [c_void_p]),
        (base, "ggml_nbytes", c_size_t, [c_void_p]),
        (base, "ggml_new_graph", c_void_p, [c_void_p]),
        (base, "ggml_build_forward_expand", None, [c_void_p, c_void_p]),
        (base, "ggml_quantize_chunk", c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        (cpu, "ggml_cpu_init", None, []),
        (cpu, "ggml_graph_plan", _Plan, [c_void_p, c_int, c_void_p]),
        (cpu, "ggml_graph_compute", c_int, [c_void_p, POINTER(_Plan)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


class Product:
    """``x @ dequantized weight.T`` in fp32, as llama.cpp computes it: x is quantized to 8 bits inside."""

    def __init__(self, kind: str, weight: Tensor, x: Tensor, threads: int) -> None:
        base, cpu = _library()
        self._base, self._cpu = base, cpu
        (n, k), m = weight.shape, x.shape[0]
        weight, x = weight.float().contiguous(), x.float().contiguous()
        self._context = base.ggml_init(_InitParams(n * k + 8 * m * (n + k) + (8 << 20), None, False))
        a = base.ggml_new_tensor_2d(self._context, TYPES[kind], k, n)
        b = base.ggml_new_tensor_2d(self._context, _F32, k, m)
        base.ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), base.ggml_get_data(a), 0, n, k, None)
        self.weight_bytes = int(base.ggml_nbytes(a))
        ctypes.memmove(base.ggml_get_data(b), x.data_ptr(), 4 * m * k)
        y = base.ggml_mul_mat(self._context, a, b)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, y)
        self._plan = cpu.ggml_graph_plan(self._graph, threads, None)
        self._work = (c_char * max(1, self._plan.work_size))()
        self._plan.work_data = ctypes.cast(self._work, c_void_p)
        out = (c_float * (m * n)).from_address(base.ggml_get_data(y))
        self._out = torch.frombuffer(out, dtype=torch.float32).view(m, n)

    def __call__(self) -> Tensor:
        if status := self._cpu.ggml_graph_compute(self._graph, byref(self._plan)):
            raise RuntimeError(f"ggml_graph_compute: status {status}")
        return self._out

    def __del__(self) -> None:
        if context := getattr(self, "_context", None):
            self._base.ggml_free(context)


def linear(kind: str, threads: int) -> Callable[[Tensor, Tensor], Product]:
    """Builds the product of a weight and x."""
    return lambda weight, x: Product(kind, weight, x, threads)
