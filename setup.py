"""Builds the native modules: pyengine/_native/*.pyx by Cython, csrc/ into the one that picks the SIMD level."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
WINDOWS = sys.platform == "win32"
LEVELS = sorted(path.stem for path in (ROOT / "csrc" / "isa").glob("*.c"))

# -ffp-contract=off: a product and a sum are fused where the code says so and nowhere else, so that all levels give
# the same bits. -fno-math-errno: sqrtf is one instruction. No -march: the baseline runs everywhere; each level's file
# opens its own target.
COMPILE = ["/O2"] if WINDOWS else ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
COMPILE += os.environ.get("PYENGINE_CFLAGS", "").split()
LINK = os.environ.get("PYENGINE_CFLAGS", "").split()
if sys.platform.startswith("linux"):
    LINK += ["-Wl,-s"] if not os.environ.get("PYENGINE_CFLAGS") else []


def openmp() -> tuple[list[str], list[str]]:
    """Compiler and linker flags of OpenMP; PYENGINE_OPENMP=0 builds without, for one thread."""
    if os.environ.get("PYENGINE_OPENMP") == "0":
        return [], []
    if WINDOWS:
        return ["/openmp"], []
    if sys.platform == "darwin":
        prefix = os.environ.get("LIBOMP_PREFIX", "/opt/homebrew/opt/libomp")
        return ["-Xpreprocessor", "-fopenmp", f"-I{prefix}/include"], [f"-L{prefix}/lib", "-lomp"]
    return ["-fopenmp"], ["-fopenmp"]


def extension(path: Path) -> Extension:
    """One native module."""
    name = path.stem
    compile_args, link_args = list(COMPILE), list(LINK)
    sources = [path.relative_to(ROOT).as_posix()]
    macros = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
    if name == "simd":
        sources += ["csrc/cpu.c", *(f"csrc/isa/{level}.c" for level in LEVELS)]
        macros += [("PE_LEVELS", " ".join(f"PE_LEVEL({level})" for level in LEVELS))]
    if name == "parallel":
        flags = openmp()
        compile_args, link_args = compile_args + flags[0], link_args + flags[1]
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "pyengine" / "_native").glob("*.h")]
    return Extension(
        f"pyengine._native.{name}",
        sources,
        include_dirs=["csrc", "pyengine/_native"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        depends=[path.relative_to(ROOT).as_posix() for path in headers],
    )


setup(
    ext_modules=cythonize(
        [extension(path) for path in sorted((ROOT / "pyengine" / "_native").glob("*.pyx"))],
        build_dir="build/cython",
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
