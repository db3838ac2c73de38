"""Builds octavo._C: the CPU kernels always, the CUDA kernels when an nvcc toolkit is found.

OCTAVO_CUDA=0 builds without CUDA, OCTAVO_CUDA=1 insists on it; OCTAVO_DEBUG=1 builds with -O0 -g; MAX_JOBS limits the
parallel compilations; TORCH_CUDA_ARCH_LIST replaces the default architectures.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup

ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
DEBUG = os.environ.get("OCTAVO_DEBUG", "0") == "1"
OPTIMIZE = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
# One meaning on every machine: no contraction into fma, no fast-math; where fma is meant, it is written.
CXX_FLAGS = [
    *OPTIMIZE,
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    f"-fmacro-prefix-map={os.path.abspath('.')}/=",  # errors name csrc/..., not the folder of the build
    # g++ 12 takes the undefined lanes of its own AVX-512 intrinsics for a mistake.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
NVCC_FLAGS = ["-O0", "-g"] if DEBUG else ["-O3"]
NVCC_FLAGS += ["-std=c++20", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def cuda_toolkit() -> str | None:
    """The folder of a CUDA toolkit: nvcc, headers, static runtime. None when there is none, or CUDA is off."""
    wanted = os.environ.get("OCTAVO_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"OCTAVO_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # possibly a wrapper script: nvcc itself knows where its toolkit is
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        found = re.search(r"#\$ TOP=(\S+)", subprocess.run(dry_run, capture_output=True, text=True).stderr)
        homes.append(os.path.realpath(found.group(1)) if found else None)
    homes += ["/usr/local/cuda", *(os.path.join(path, "nvidia", "cu13") for path in sys.path)]
    for home in filter(None, homes):
        if os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime.h"):
            return os.path.realpath(home)
    if wanted == "1":
        sys.exit(
            "OCTAVO_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to a folder with bin/nvcc and "
            "include/cuda_runtime.h, or leave OCTAVO_CUDA unset to build for the CPU only"
        )
    return None


def extension():
    import pybind11
    import torch
    from torch.utils import cpp_extension

    # The stable ABI of torch 2.13: https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html
    macros = [("TORCH_TARGET_VERSION", "0x020D000000000000")]
    sources = [
        path
        for path in glob("csrc/**/*.cpp", recursive=True)
        if not path.endswith("_simt.cpp") and not path.startswith("csrc/simt/")
    ]
    includes, options = [os.path.abspath("csrc"), pybind11.get_include()], {}
    home = cuda_toolkit()
    if home and torch.version.hip is None:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHS)
        cpp_extension.CUDA_HOME = home  # BuildExtension compiles .cu by this nvcc, with a CPU torch too
        sources += glob("csrc/**/*.cu", recursive=True)
        # One word for the compilers' command lines, "sm75_sm80_ptx"; module.cpp makes it readable again.
        names = archs.replace("+PTX", ";ptx").replace(".", "").replace(" ", ";").split(";")
        word = "_".join(name if name == "ptx" else f"sm{name}" for name in names)
        macros += [("OCTAVO_WITH_CUDA", None), ("OCTAVO_CUDA_ARCHS", word)]
        includes.append(f"{home}/include")
        library = next(path for path in (f"{home}/lib64", f"{home}/lib") if os.path.isdir(path))
        options = {"libraries": ["cudart_static", "rt", "dl", "pthread"], "library_dirs": [library]}
        print(f"octavo: CUDA kernels for {archs} by {home}")
    else:
        print("octavo: CPU kernels only (no CUDA toolkit, or OCTAVO_CUDA=0)")
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    module = cpp_extension.CppExtension(
        "octavo._C",
        sorted(sources),
        include_dirs=includes,
        define_macros=macros,
        depends=glob("csrc/**/*.h", recursive=True),
        extra_compile_args=flags,
        **options,
    )
    return module, cpp_extension.BuildExtension


with open("python/octavo/_version.py") as file:
    version = re.search(r'__version__ = "(.+)"', file.read()).group(1)
modules, commands = [], {}
if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # metadata needs no torch
    module, build_ext = extension()
    modules, commands = [module], {"build_ext": build_ext}
setup(version=version, ext_modules=modules, cmdclass=commands)
