# cython: language_level=3, freethreading_compatible=True
"""Picks the SIMD level when it is imported: the best that the CPU can run, or the one that PYENGINE_ISA names.

The only module that links csrc.
"""

import os

from .kernels cimport (
    PE_CPU_AVX2_FMA, PE_CPU_AVX512, PE_CPU_AVX512_BF16, PE_CPU_AVX512_VNNI, PE_CPU_AVX_VNNI, PE_CPU_NEON_DOT, pe_cpu_features,
    pe_kernels, pe_level,
)

from ..errors import ArgumentError

FEATURES = {
    "avx2+fma": PE_CPU_AVX2_FMA,
    "avx512f/bw/vl/dq": PE_CPU_AVX512,
    "avx_vnni": PE_CPU_AVX_VNNI,
    "avx512_vnni": PE_CPU_AVX512_VNNI,
    "avx512_bf16": PE_CPU_AVX512_BF16,
    "neon dotprod": PE_CPU_NEON_DOT,
}

cdef const pe_kernels *_level = NULL


cdef const pe_kernels *kernels() noexcept nogil:
    return _level


cdef dict _compiled():
    cdef int i = 0
    cdef const pe_kernels *level = pe_level(0)
    found = {}
    while level != NULL:
        found[level.name.decode()] = (level.priority, i, level.requires)
        i += 1
        level = pe_level(i)
    return found


def features():
    """What this CPU can do of what the levels ask for: a list of names."""
    return [name for name, bit in FEATURES.items() if pe_cpu_features() & bit]


def levels():
    """The SIMD levels that this CPU can run, best first."""
    can = pe_cpu_features()
    runs = [(priority, name) for name, (priority, _, requires) in _compiled().items() if requires & ~can == 0]
    return [name for _, name in sorted(runs, reverse=True)]


def multiplies_bfloat16():
    """Whether the level in use has an instruction that multiplies bfloat16."""
    return _level.requires & PE_CPU_AVX512_BF16 != 0


def active():
    """The name of the SIMD level in use."""
    return _level.name.decode()


def use(name, source="SIMD level"):
    """Makes `name` the SIMD level of every call from now on; returns the name of the level that was in use.

    `source` is what an error names.
    Raises ArgumentError where it is unknown or this CPU can't run it. Not while another thread computes.
    """
    global _level
    compiled = _compiled()
    if name not in compiled:
        raise ArgumentError(f"{source}: expected one of {', '.join(levels())}, got {name!r}")
    if name not in levels():
        raise ArgumentError(f"{source}: {name} can't run on this CPU, which has {', '.join(levels())}")
    before = active() if _level != NULL else name
    _level = pe_level(compiled[name][1])
    return before


use(os.environ.get("PYENGINE_ISA") or levels()[0], "PYENGINE_ISA")
