"""Builds octavo._C: the CPU kernels always, the CUDA kernels when a GPU is visible, torch is a CUDA build or
TORCH_CUDA_ARCH_LIST names architectures (_build/cuda_kernels.py).

OCTAVO_CUDA=0 builds without CUDA, OCTAVO_CUDA=1 insists on it; OCTAVO_DEBUG=1 builds with -O0 -g; MAX_JOBS limits the
parallel compilations.
"""

import os
import re
import sys
from glob import glob

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "_build"))
import cuda_kernels

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


class BuildPy(build_py):
    """Without the modules that an earlier checkout left in the build folder, which setuptools would package."""

    def run(self):
        if not self.editable_mode:
            for path in glob(f"{self.build_lib}/octavo/**/*.py", recursive=True):
                os.remove(path)
        super().run()


def extension():
    import torch
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            # torch refuses an nvcc of another major version than its own CUDA, for the sake of libraries that octavo
            # does not link: it brings its own CUDA runtime and calls torch by the stable ABI alone.
            check, cpp_extension._check_cuda_version = cpp_extension._check_cuda_version, lambda *_: None
            try:
                super().build_extensions()
            finally:
                cpp_extension._check_cuda_version = check

    # The stable ABI of torch 2.13: https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html
    macros = [("TORCH_TARGET_VERSION", "0x020D000000000000")]
    sources = [
        path
        for path in glob("csrc/**/*.cpp", recursive=True)
        if not path.endswith("_simt.cpp") and not path.startswith("csrc/simt/")
    ]
    # No path of pip's build environment, which has another name each time, may get into the commands: ninja would
    # compile everything again. pybind11 is the one in torch/include.
    includes, options = [os.path.abspath("csrc")], {}
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    chosen, why = cuda_kernels.choose(os.environ, torch.version.cuda, torch.version.hip)
    if chosen is not None:
        cpp_extension.CUDA_HOME = chosen.home  # BuildExtension compiles .cu by this nvcc, with a CPU torch too
        sources += glob("csrc/**/*.cu", recursive=True)
        macros += [("OCTAVO_WITH_CUDA", None), ("OCTAVO_CUDA_ARCHS", chosen.word)]
        flags["nvcc"] = NVCC_FLAGS + chosen.flags
        includes.append(f"{chosen.home}/include")
        library = next(path for path in (f"{chosen.home}/lib64", f"{chosen.home}/lib") if os.path.isdir(path))
        options = {"libraries": ["cudart_static", "rt", "dl", "pthread"], "library_dirs": [library]}
        print(f"octavo: CUDA kernels for {chosen.word.replace('_', ' ')} by {chosen.home} ({why})")
    else:
        print(f"octavo: CPU kernels only ({why}); OCTAVO_CUDA=1 builds the CUDA kernels")
    module = cpp_extension.CppExtension(
        "octavo._C",
        sorted(sources),
        include_dirs=includes,
        define_macros=macros,
        depends=glob("csrc/**/*.h", recursive=True),
        extra_compile_args=flags,
        **options,
    )
    return module, BuildExtension


with open("python/octavo/_version.py") as file:
    version = re.search(r'__version__ = "(.+)"', file.read()).group(1)
modules, commands = [], {"build_py": BuildPy}
if not {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # metadata needs no torch
    module, build_ext = extension()
    modules, commands["build_ext"] = [module], build_ext
setup(version=version, ext_modules=modules, cmdclass=commands)
