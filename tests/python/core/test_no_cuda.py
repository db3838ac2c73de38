"""A build without CUDA kernels tells a CUDA tensor how to get them. Dispatch keys are given by hand, without a GPU."""

import pytest
import torch
from octavo.core import fakes, no_cuda

COMMAND = "OCTAVO_CUDA=1 pip install --force-reinstall --no-cache-dir --no-deps ."
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

pytestmark = pytest.mark.skipif(no_cuda.CUDA_BUILT, reason="this build has CUDA kernels")


def test_error_names_the_operator_and_the_command():
    a = torch.zeros(2, 4, dtype=torch.int8)
    with pytest.raises(RuntimeError) as error:
        torch.ops.octavo.int8_mm.default.redispatch(CUDA, a, a)
    assert str(error.value).startswith("octavo::int8_mm: this octavo was built without CUDA kernels")
    assert COMMAND in str(error.value)


def test_every_operator_refuses():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("octavo::")}
    assert names == set(fakes._registered)
    missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"octavo::{name}", "CUDA")]
    assert not missing


def test_the_cpu_is_not_refused():
    a = torch.ones(2, 4, dtype=torch.int8)
    assert torch.ops.octavo.int8_mm(a, a).tolist() == [[4, 4], [4, 4]]


def test_doctor_says_the_same_command():
    from octavo.cli import app
    from typer.testing import CliRunner

    assert no_cuda.REBUILD.endswith(COMMAND)
    output = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"}).output
    assert COMMAND in output
