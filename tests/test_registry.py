"""What every operator must have, and what every build must keep."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import octavo
import pytest
import torch
from conftest import ROOT
from octavo import _C, ops, reference

OPS = sorted(
    name.removeprefix("octavo::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("octavo::") and "." not in name
)


def sample(name: str) -> tuple[object, ...]:
    """Arguments for one call of each operator."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 20, generator=generator)
    weight, scale = reference.quantize_rowwise(torch.randn(7, 20, generator=generator))
    codes, row_scale = reference.quantize_rowwise(x)
    columns, count = reference.find_outlier_columns(x, 2.0)
    slot = torch.full((20,), -1, dtype=torch.int32)
    return {
        "quantize_rowwise": (x, 2.0),
        "quantize_columnwise": (x,),
        "quantize_tensorwise": (x,),
        "quantize_rowwise_columnwise": (x,),
        "dequantize_rowwise": (codes, row_scale, torch.bfloat16),
        "find_outlier_columns": (x, 2.0),
        "extract_columns": (x, columns, count),
        "extract_int8_columns": (weight, scale, columns[:4], count, torch.float16),
        "int8_mm": (codes, weight),
        "int8_gemm": (codes, weight, row_scale, scale, torch.ones(7), torch.float16),
        "int8_linear": (x, weight, scale, torch.ones(7), 2.0, slot, torch.ones(1, 7)),
    }[name]


def test_there_are_operators():
    assert len(OPS) >= 11


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_documented_referenced_and_tested(name: str):
    function, twin = getattr(ops, name), getattr(reference, name)
    schema = [argument.name for argument in getattr(torch.ops.octavo, name).default._schema.arguments]
    assert list(inspect.signature(function).parameters) == schema
    assert list(inspect.signature(twin).parameters) == schema
    assert function.__doc__
    assert len(function.__doc__) > 60
    assert getattr(octavo, name) is function
    others = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name]
    tests = "".join(path.read_text() for path in others)
    assert f"ops.{name}(" in tests or f'"{name}"' in tests


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str):
    torch.library.opcheck(getattr(torch.ops.octavo, name).default, sample(name))


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_the_cuda_source(name: str, simt_library: object):
    torch.library.opcheck(getattr(torch.ops.octavo_simt, name).default, sample(name))


def test_inputs_are_not_changed():
    for name in OPS:
        arguments = sample(name)
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(torch.ops.octavo, name)(*arguments)
        for argument, copy in zip(arguments, copies, strict=True):
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


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("nm") is None, reason="needs c++ and nm")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*/*_a[vm][x2]*.cpp")), ids=lambda path: path.name)
def test_isa_objects_hold_no_weak_symbols(source: Path, tmp_path: Path):
    """A weak symbol compiled for AVX-512 is one that the linker may hand to an older CPU."""
    target = tmp_path / "object.o"
    command = ["c++", "-O2", "-std=c++20", "-w", "-fPIC", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    assert " T " in symbols or " R " in symbols or " D " in symbols
    assert re.findall(r"^\S* +[WVu] .*$", symbols, re.MULTILINE) == []


def test_import_brings_in_no_heavy_package():
    heavy = ("transformers", "typer", "matplotlib", "accelerate")
    code = f"import sys, octavo; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_word_of_a_device_in_schemas():
    for name in OPS:
        assert not any(word in name for word in ("cpu", "cuda", "float", "half"))
