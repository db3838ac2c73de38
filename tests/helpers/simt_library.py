"""The operators over the CUDA sources compiled as C++: a library in build/simt, never part of a wheel.

``python tests/helpers/simt_library.py`` builds it; the tests do so themselves where it is missing or older than its
sources.
"""

from __future__ import annotations

import ctypes
import fcntl

from octavo import ops
from places import ROOT
from torch.utils import cpp_extension


def load() -> ctypes.CDLL:
    """Build the library unless it is there, and load it. Of several processes one builds, and the others wait."""
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    families = [path.with_name(path.name.replace("_simt", "")) for path in csrc.glob("*/*_simt.cpp")]
    operators = [path for path in families if path.exists()]  # decompose_simt.cpp, for one, has no operator of its own
    sources = [csrc / "ops.cpp", *operators, *csrc.glob("*/*_simt.cpp"), *csrc.glob("simt/*.cpp")]
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-DOCTAVO_SIMT"]
    with open(folder / "octavo.lock", "w") as lock:  # the system lets go of it when its process dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's own, which would stay behind a build that was killed
        path = cpp_extension.load(
            "octavo_simt",
            sorted(map(str, sources)),
            extra_include_paths=[str(csrc)],
            build_directory=str(folder),
            extra_cflags=[*flags, "-DTORCH_TARGET_VERSION=0x020D000000000000"],
            is_python_module=False,
        )
    ops.register_fakes("octavo_simt")
    return ctypes.CDLL(path or str(folder / "octavo_simt.so"))


if __name__ == "__main__":
    load()
