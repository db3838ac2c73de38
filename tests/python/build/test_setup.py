"""What setup.py decides before it compiles: with made-up toolkits, drivers and versions of torch."""

import importlib.util
import re
import stat
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.py").exists())
spec = importlib.util.spec_from_file_location("cuda_kernels", ROOT / "_build" / "cuda_kernels.py")
cuda = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cuda  # dataclass looks its module up
spec.loader.exec_module(cuda)

ALL = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)  # of nvcc 13.0


@pytest.fixture
def toolkit(tmp_path):
    """Makes a toolkit whose nvcc answers for these architectures."""

    def make(codes=ALL, release="13.0"):
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
        listed = "\\n".join(f"sm_{code}" for code in codes)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "Cuda compilation tools, release {release}, V";;\n'
            f'--list-gpu-code) printf "{listed}\\n";;\n'
            f'--dryrun) echo "#$ TOP={home}" >&2;; esac\n'
        )
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        return home

    return make


def choose(home, environ=None, torch_cuda=None, hip=None, gpus=()):
    environ = {"CUDA_HOME": str(home), "PATH": ""} | (environ or {})
    return cuda.choose(environ, torch_cuda, hip, lambda: list(gpus))


def test_cpu_torch_without_a_gpu_compiles_none_though_nvcc_is_there(toolkit):
    assert choose(toolkit()) == (None, "no GPU is visible and torch is a CPU build")


@pytest.mark.parametrize(
    ("environ", "torch_cuda", "gpus", "codes"),
    [
        ({"OCTAVO_CUDA": "1"}, None, [], (75, 80, 86, 89, 90, 100, 120)),
        ({"OCTAVO_CUDA": "1"}, None, ["8.6"], (75, 80, 86, 89, 90, 100, 120)),
        ({}, "13.0", [], (75, 80, 86, 89, 90, 100, 120)),
        ({}, "12.6", [], (75, 80, 86, 89, 90, 100, 120)),  # another major version than nvcc's
        ({}, None, ["8.6"], (86,)),
        ({}, "13.0", ["7.5", "9.0"], (75, 90)),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 8.9+PTX"}, None, [], (80, 89)),
        ({"TORCH_CUDA_ARCH_LIST": "6.1;9.0a"}, None, ["8.6"], (90,)),
        ({"TORCH_CUDA_ARCH_LIST": "native"}, None, ["12.1"], (121,)),
    ],
)
def test_what_asks_for_cuda(toolkit, environ, torch_cuda, gpus, codes):
    chosen, _ = choose(toolkit(), environ, torch_cuda, gpus=gpus)
    assert chosen.codes == codes


@pytest.mark.parametrize("environ", [{"OCTAVO_CUDA": "0"}, {"OCTAVO_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}])
def test_zero_means_never(toolkit, environ):
    assert choose(toolkit(), environ, "13.0", gpus=["8.6"]) == (None, "OCTAVO_CUDA=0")


def test_rocm_gets_cpu_kernels(toolkit):
    assert choose(toolkit(), {}, None, "6.4", gpus=["9.0"]) == (None, "torch is built for ROCm 6.4")


def test_flags(toolkit):
    chosen, _ = choose(toolkit(), {"OCTAVO_CUDA": "1"})
    assert chosen.flags == [
        "-gencode", "arch=compute_75,code=sm_75",
        "-gencode", "arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80]",
    ]  # fmt: skip
    assert chosen.word == "sm75_sm80_sm86_sm89_sm90_sm100_sm120_ptx80"


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("9.0+PTX", ["-gencode", "arch=compute_80,code=[sm_90,compute_80]"]),
        ("8.6", ["-gencode", "arch=compute_80,code=sm_86"]),
        ("7.5+PTX", ["-gencode", "arch=compute_75,code=[sm_75,compute_75]"]),
    ],
)
def test_flags_of_a_list(toolkit, archs, flags):
    assert choose(toolkit(), {"TORCH_CUDA_ARCH_LIST": archs})[0].flags == flags


def test_an_older_nvcc_leaves_out_what_it_does_not_know(toolkit):
    home = toolkit((75, 80, 86, 89, 90), "12.4")
    assert choose(home, {"OCTAVO_CUDA": "1"})[0].codes == (75, 80, 86, 89, 90)
    # For a GPU that is newer than nvcc, the driver compiles the PTX.
    assert choose(home, gpus=["12.0"])[0].flags == ["-gencode", "arch=compute_80,code=compute_80"]


@pytest.mark.parametrize(
    ("codes", "release", "environ", "gpus", "words"),
    [
        (ALL, "11.8", {}, ["8.6"], "older than CUDA 12"),
        ((), "13.0", {}, ["8.6"], "does not run or is older"),
        ((75, 80), "12.0", {"TORCH_CUDA_ARCH_LIST": "9.0"}, [], "compiles for none of 9.0"),
        (ALL, "13.0", {}, ["6.1"], "compiles for none of 6.1+PTX"),
    ],
)
def test_what_nvcc_cannot_do_is_an_error_only_for_one(toolkit, codes, release, environ, gpus, words):
    home = toolkit(codes, release)
    chosen, why = choose(home, environ, gpus=gpus)
    assert chosen is None and words in why
    if "none of" not in words:
        with pytest.raises(SystemExit, match="OCTAVO_CUDA=1, but"):
            choose(home, environ | {"OCTAVO_CUDA": "1"}, gpus=gpus)


def test_no_toolkit():
    chosen, why = cuda.choose({}, "13.0", None, list, lambda environ: None)
    assert chosen is None and "set CUDA_HOME" in why
    with pytest.raises(SystemExit, match="set CUDA_HOME"):
        cuda.choose({"OCTAVO_CUDA": "1"}, None, None, list, lambda environ: None)


@pytest.mark.parametrize(
    ("environ", "words"),
    [({"OCTAVO_CUDA": "yes"}, "0, 1 or auto, got 'yes'"), ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "got 'Hopper'")],
)
def test_bad_settings(toolkit, environ, words):
    with pytest.raises(SystemExit, match=words):
        choose(toolkit(), environ)


def test_the_toolkit_is_what_a_wrapper_names(toolkit, monkeypatch):
    home = toolkit()
    assert cuda.toolkit({"PATH": f"{home}/bin:/bin:/usr/bin"}) == str(home.resolve())


class Driver:
    def __init__(self, capabilities, status=0):
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[device.value][{75: 0, 76: 1}[attribute]]
        return 0


def test_visible_gpus():
    def missing(name):
        raise OSError(name)

    assert cuda.visible_gpus(lambda name: Driver([(12, 0), (8, 6), (8, 6)])) == ["8.6", "12.0"]
    assert cuda.visible_gpus(lambda name: Driver([(8, 6)], status=100)) == []  # CUDA_ERROR_NO_DEVICE
    assert cuda.visible_gpus(missing) == []


def test_kernels_ask_the_architecture_only_for_800():
    """Two front ends, compute_75 and compute_80, serve all architectures as long as this holds."""
    allowed = re.compile(r"__CUDA_ARCH__\s*>=\s*800\b|defined\(__CUDA_ARCH__\)|#\s*ifn?def __CUDA_ARCH__")
    found = []
    for path in sorted((*(ROOT / "csrc").rglob("*"), *(ROOT / "tests" / "cpp").rglob("*"))):
        if path.suffix in (".h", ".cu", ".cpp"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search("__CUDA_ARCH", allowed.sub("", line.split("//")[0])):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line}")
    assert not found
