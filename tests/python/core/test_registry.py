"""What every operator must have, and what every build must keep."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import octavo
import pytest
import torch
from octavo import _C, ops, reference
from places import ROOT
from spqr_weights import random_weight

OPS = sorted(
    name.removeprefix("octavo::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("octavo::") and "." not in name
)


@functools.cache
def optimizer_lists() -> tuple[list[torch.Tensor], ...]:
    """Of two parameters with one 8-bit moment each. Kept: a table holds their addresses."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 200), (70,))
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    states = [torch.full(shape, 127, dtype=torch.uint8) for shape in shapes]
    return (
        params,
        grads,
        [torch.ones((), dtype=torch.float64) for _ in shapes],
        states,
        [torch.zeros(3), torch.zeros(1)],
    )


def spqr_arguments(name: str) -> tuple[object, ...]:
    weight = random_weight(n=20, k=48, group_size=16, outliers=0.05)
    if name == "spqr_dequantize":
        return (*weight.arguments(), 20, 48, torch.float16, 16)
    return (torch.randn(2, 3, 48), *weight.arguments(), torch.ones(20), 20, 16)


def sample(name: str) -> tuple[object, ...]:
    """Arguments for one call of each operator."""
    if name in ("optim_table", "optim_step", "optim_sums"):
        lists = optimizer_lists()
        table = torch.ops.octavo.optim_table(*lists, [], [0, 1])
        hyper = [0.0] * 15  # lr 0: a step changes nothing but the states
        last = {
            "optim_table": ([0, 1],),
            "optim_step": (torch.zeros(1, dtype=torch.int64), table, "lion", hyper),
            "optim_sums": (table, "lars", hyper),
        }
        return (*lists, [], *last[name])
    if name in ("spqr_linear", "spqr_dequantize"):
        return spqr_arguments(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 20, generator=generator)
    weight, scale = reference.quantize_rowwise(torch.randn(7, 20, generator=generator))
    codes, row_scale = reference.quantize_rowwise(x)
    columns, count = reference.find_outlier_columns(x, 2.0)
    slot = torch.full((20,), -1, dtype=torch.int32)
    csr = octavo.sparse.dense_to_csr(torch.randn(7, 20, generator=generator), 1.0)
    nested = octavo.quantize_4bit(torch.randn(7, 20, generator=generator), "nf3", 32, double_quant=True).tensors()
    rows = torch.randn(3, 5, 7, generator=generator)
    return {
        "spqr_quantize_columns": (x.view(15, 20), torch.eye(20), 0.05, 3, 10, 16, 3, 3),
        "quantize_blockwise": (x, 64, False),
        "dequantize_blockwise": (*reference.quantize_blockwise(x, 64), torch.bfloat16, 64),
        "nf4_quantize": (x, "fp4", 32),
        "nf4_dequantize": (*nested, [7, 20], torch.bfloat16, "nf3", 32),
        "nf4_linear": (x, *nested, torch.ones(7), 7, "nf3", 32),
        "nf4_linear_transposed": (rows, *nested, 20, "nf3", 32),
        "quantize_rowwise": (x, 2.0),
        "quantize_columnwise": (x,),
        "quantize_tensorwise": (x,),
        "quantize_rowwise_columnwise": (x,),
        "quantize_tensorwise_transpose": (x,),
        "quantize_columnwise_transpose": (x, torch.tensor([7])),
        "quantize_rowwise_columnwise_transpose": (x,),
        "dequantize_rowwise": (codes, row_scale, torch.bfloat16),
        "find_outlier_columns": (x, 2.0),
        "extract_columns": (x, columns, count),
        "extract_int8_columns": (weight, scale, columns[:4], count, torch.float16),
        "csr_matmul": (*csr, x, 7, torch.ones(7)),
        "csr_matmul_add": (rows, *csr, x),
        "csr_matmul_transposed": (*csr, rows, 20),
        "csr_grad_values": (*csr[1:], rows, x, torch.float16),
        "int8_mm": (codes, weight),
        "int8_gemm": (codes, weight, row_scale, scale, torch.ones(7), torch.float16),
        "int8_linear": (x, weight, scale, torch.ones(7), 2.0, slot, torch.ones(1, 7)),
    }[name]


def test_there_are_operators():
    assert len(OPS) >= 15


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_documented_referenced_and_tested(name: str):
    function, twin = getattr(ops, name), getattr(reference, name)
    schema = [argument.name for argument in getattr(torch.ops.octavo, name).default._schema.arguments]
    assert list(inspect.signature(function).parameters) == schema
    assert list(inspect.signature(twin).parameters) == schema
    assert function.__doc__
    assert len(function.__doc__) > 60
    if name in octavo.__all__:  # the differentiable one where there is one
        public = getattr(octavo, name)
        assert public is function or public.__module__.endswith(".functional")
    others = [path for path in (ROOT / "tests" / "python").rglob("test_*.py") if path.name != Path(__file__).name]
    tests = "".join(path.read_text() for path in others)
    assert f"ops.{name}(" in tests or f'"{name}"' in tests


CHECKS = ("test_autograd_registration", "test_faketensor", "test_schema", "test_aot_dispatch_dynamic")
# Some checks call the operator with copies of the arguments. A table has addresses: those of copies are others, and an
# operator refuses the table of other tensors.
OF_TABLES = {"optim_table": CHECKS[:3], "optim_step": CHECKS[:1], "optim_sums": CHECKS[:1]}


def opcheck(namespace: str, name: str) -> None:
    operator = getattr(getattr(torch.ops, namespace), name).default
    torch.library.opcheck(operator, sample(name), test_utils=OF_TABLES.get(name, CHECKS))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str):
    opcheck("octavo", name)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_the_cuda_source(name: str, simt_library: object):
    opcheck("octavo_simt", name)


def test_inputs_are_not_changed():
    for name in OPS:
        arguments = sample(name)
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        operator = getattr(torch.ops.octavo, name)
        operator(*arguments)
        schema = operator.default._schema.arguments[: len(arguments)]
        for argument, copy, declared in zip(arguments, copies, schema, strict=True):
            if declared.alias_info is not None and declared.alias_info.is_write:
                continue
            assert not isinstance(argument, torch.Tensor) or torch.equal(argument, copy)


def test_isa_can_be_forced_and_unknown_names_are_errors():
    before = _C.isa()
    for level in _C.available_isas():
        _C.set_isa(level)
        assert _C.isa() == level
    _C.set_isa(before)
    with pytest.raises(ValueError, match="unknown ISA 'sse9'"):
        _C.set_isa("sse9")
    assert _C.isa() == before
    missing = [isa for isa in ("avx2", "avx512", "amx") if isa not in _C.build_info()["isa"]]
    for isa in missing:
        with pytest.raises(ValueError, match=f"asks for {isa}"):
            _C.set_isa(isa)


@pytest.mark.parametrize(("value", "result"), [("portable", "Isa.portable"), ("sse9", "unknown ISA 'sse9'")])
def test_environment_forces_the_isa(value: str, result: str):
    code = "import octavo; print(octavo._C.isa())"
    environment = {"OCTAVO_CPU_ISA": value, "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result in run.stdout + run.stderr


def test_import_brings_in_no_heavy_package():
    heavy = ("transformers", "typer", "matplotlib", "accelerate")
    code = f"import sys, octavo; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_integrations_are_imported_by_their_use():
    code = """
        import sys, octavo
        assert not any(name.startswith("octavo.integrations") for name in sys.modules)
        octavo.integrations
        assert "octavo.integrations.spqr" not in sys.modules
        assert callable(octavo.integrations.bitsandbytes.load_bitsandbytes)
        try:
            octavo.integrations.nothing
        except AttributeError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "module 'octavo.integrations' has no attribute 'nothing'"


def test_no_word_of_a_device_in_schemas():
    for name in OPS:
        assert not any(word in name for word in ("cpu", "cuda", "float", "half"))
