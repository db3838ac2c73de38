"""Whether the CUDA kernels are compiled, by which toolkit and for which architectures: what setup.py decides before it
compiles. Nothing here imports torch or runs a compiler but to ask what it can, so that the tests take the decisions
with made-up machines."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ARCHS = "7.5;8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX"
# The kernels ask __CUDA_ARCH__ only whether it is at least 800 (a test reads the sources), so nvcc's front end, which
# takes most of the time, need not run once for each architecture.
FRONT_ENDS = (80, 75)


@dataclass(frozen=True)
class Cuda:
    """What is compiled: `home` is the toolkit's folder, `codes` are architectures such as 86, `ptx` front ends."""

    home: str
    codes: tuple[int, ...]
    ptx: tuple[int, ...]

    @property
    def flags(self) -> list[str]:
        """For nvcc. torch's BuildExtension adds none of its own beside flags that name an arch."""
        flags = []
        for front in sorted(FRONT_ENDS):
            outputs = [f"sm_{code}" for code in self.codes if front_end(code) == front]
            outputs += [f"compute_{code}" for code in self.ptx if code == front]
            if outputs:
                code = outputs[0] if len(outputs) == 1 else f"[{','.join(outputs)}]"
                flags += ["-gencode", f"arch=compute_{front},code={code}"]
        return flags

    @property
    def word(self) -> str:
        """One word for the compilers' command lines, such as sm80_ptx80; module.cpp makes it readable again."""
        return "_".join([*(f"sm{code}" for code in self.codes), *(f"ptx{code}" for code in self.ptx)])


def front_end(code: int) -> int:
    return next(front for front in FRONT_ENDS if code >= front)


def visible_gpus(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> list[str]:
    """The capabilities of the GPUs that the driver shows, such as "8.6". torch is not asked: a CPU torch sees none."""
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), []
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR is 75, ..._MINOR is 76.
        if (
            driver.cuDeviceGet(ctypes.byref(device), index) == 0
            and driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device) == 0
            and driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device) == 0
        ):
            found.append(f"{major.value}.{minor.value}")
    return sorted(set(found), key=lambda name: tuple(map(int, name.split("."))))


def wanted_archs(environ: Mapping[str, str], torch_cuda: str | None, gpus: list[str]) -> tuple[str | None, str]:
    """The architectures to compile for, or None, and why. torch_cuda is torch.version.cuda."""
    wanted = environ.get("OCTAVO_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"OCTAVO_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "OCTAVO_CUDA=0"
    archs = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if archs and archs != "native":
        return archs, f"TORCH_CUDA_ARCH_LIST={archs}"
    if wanted == "1":
        return ARCHS, "OCTAVO_CUDA=1"
    if gpus:
        return ";".join(f"{gpu}+PTX" for gpu in gpus), f"a GPU of capability {', '.join(gpus)} is visible"
    if torch_cuda is not None:
        return ARCHS, f"torch is built for CUDA {torch_cuda}"
    return None, "no GPU is visible and torch is a CPU build"


def toolkit(environ: Mapping[str, str]) -> str | None:
    """The folder of a CUDA toolkit (nvcc, headers, static runtime), or None."""
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc", path=environ.get("PATH")):
        # This may be a wrapper script: nvcc itself knows where its toolkit is.
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        found = re.search(r"#\$ TOP=(\S+)", subprocess.run(dry_run, capture_output=True, text=True).stderr)
        homes.append(os.path.realpath(found.group(1)) if found else None)
    homes += ["/usr/local/cuda", *(os.path.join(path, "nvidia", "cu13") for path in sys.path)]
    for home in filter(None, homes):
        if os.path.exists(f"{home}/bin/nvcc") and os.path.exists(f"{home}/include/cuda_runtime.h"):
            return os.path.realpath(home)
    return None


def nvcc_codes(home: str) -> tuple[int, ...]:
    """The architectures that this nvcc compiles for, in order; none when it is too old for C++20 or does not run."""

    def ask(option: str) -> str:
        try:
            return subprocess.run([f"{home}/bin/nvcc", option], capture_output=True, text=True).stdout
        except OSError:
            return ""

    release = re.search(r"release (\d+)\.", ask("--version"))
    if release is None or int(release.group(1)) < 12:
        return ()
    return tuple(sorted({int(code) for code in re.findall(r"sm_(\d+)\s", ask("--list-gpu-code") + "\n")}))


def select(archs: str, known: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The codes and PTX for a list such as "8.0 9.0+PTX", without what nvcc does not know or no kernel runs on."""
    codes, ptx = set(), set()
    for name in archs.replace(" ", ";").replace(",", ";").split(";"):
        if not name:
            continue
        # The kernels use nothing that sm_90a has and sm_90 lacks.
        parts = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if parts is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be a list such as '8.0;9.0+PTX', got {name!r} in {archs!r}")
        code = int(parts.group(1) + parts.group(2))
        if code < min(FRONT_ENDS):
            continue
        if code in known:
            codes.add(code)
        if parts.group(3) and front_end(code) in known:
            ptx.add(front_end(code))  # the driver makes code for every later GPU of it
    return tuple(sorted(codes)), tuple(sorted(ptx))


def choose(
    environ: Mapping[str, str],
    torch_cuda: str | None,
    torch_hip: str | None,
    gpus: Callable[[], list[str]] = visible_gpus,
    find: Callable[[Mapping[str, str]], str | None] = toolkit,
) -> tuple[Cuda | None, str]:
    """What to compile, or None for CPU kernels only, and why. Only OCTAVO_CUDA=1 makes a lack an error."""
    archs, why = wanted_archs(environ, torch_cuda, gpus())
    if archs is None or torch_hip is not None:
        return None, why if torch_hip is None else f"torch is built for ROCm {torch_hip}"
    home = find(environ)
    if home is None:
        lack = "no CUDA toolkit was found: set CUDA_HOME to a folder with bin/nvcc and include/cuda_runtime.h"
    elif not (known := nvcc_codes(home)):
        lack = f"{home}/bin/nvcc does not run or is older than CUDA 12, the first with C++20: set CUDA_HOME to a later one"
    else:
        codes, ptx = select(archs, known)
        if codes or ptx:
            return Cuda(home, codes, ptx), why
        lack = f"{home}/bin/nvcc compiles for none of {archs} from 7.5 on, only for {', '.join(map(str, known))}"
    if environ.get("OCTAVO_CUDA") == "1":
        sys.exit(f"OCTAVO_CUDA=1, but {lack}; or leave OCTAVO_CUDA unset to build what can be built")
    return None, f"{why}, but {lack}"
