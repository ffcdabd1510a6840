# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Measures the limits of this machine: what memory delivers, and what the multiply units of the SIMD level in use do.

More threads than there are CPUs for them count as so many.
"""

import time

from libc.stdint cimport int64_t
from libc.string cimport memset

from .kernels cimport PE_LANES, PE_SPIN
from .memory cimport Arena, Block
from .parallel cimport Worker, run, team_size
from .simd cimport kernels

cdef enum Kind:
    FILL
    READ
    SPIN_F32
    SPIN_BF16
    SPIN_Q8

cdef struct LimitTask:
    Kind kind
    char *data
    int64_t n, n_threads
    float sink


cdef void limit_body(void *context, Worker *worker) noexcept nogil:
    cdef LimitTask *task = <LimitTask *>context
    cdef int64_t share = task.n // task.n_threads // 256 * 256
    if task.kind == FILL:
        memset(task.data + worker.index * share, 0, share)
    elif task.kind == READ:
        task.sink = kernels().read(task.data + worker.index * share, share)
    elif task.kind == SPIN_F32:
        task.sink = kernels().spin_f32(task.n)
    elif task.kind == SPIN_BF16:
        task.sink = kernels().spin_bf16(task.n)
    else:
        task.sink = <float>kernels().spin_q8(task.n)


cdef double _fastest(LimitTask *task, int threads, int rounds):
    task.n_threads = threads
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run(threads, 0, limit_body, task)
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(int threads, int64_t nbytes=256 << 20, int rounds=5):
    """Bytes a second that `threads` threads read from a buffer of `nbytes`: the fastest of `rounds`. It lies where weights
    do, in huge pages.
    """
    cdef Block block = Block(nbytes, "buffer for measuring", Arena())
    cdef LimitTask task
    threads = team_size(threads)
    task.kind, task.data, task.n = FILL, <char *>block.data, nbytes
    _fastest(&task, threads, 1)
    task.kind = READ
    return nbytes / _fastest(&task, threads, rounds)


def peak_float32(int threads, int rounds=5):
    """Floating point operations a second of `threads` threads; a fused multiply-add is two."""
    cdef LimitTask task
    threads = team_size(threads)
    task.kind, task.n = SPIN_F32, 1 << 19
    return 2.0 * threads * task.n * PE_SPIN * PE_LANES / _fastest(&task, threads, rounds)


def peak_bfloat16(int threads, int rounds=5):
    """bfloat16 operations a second of `threads` threads; a multiplication and an addition are two."""
    cdef LimitTask task
    threads = team_size(threads)
    task.kind, task.n = SPIN_BF16, 1 << 19
    return 2.0 * threads * task.n * PE_SPIN * PE_LANES * 2 / _fastest(&task, threads, rounds)


def peak_int8(int threads, int rounds=5):
    """int8 operations a second of `threads` threads; a multiplication and an addition are two."""
    cdef LimitTask task
    threads = team_size(threads)
    task.kind, task.n = SPIN_Q8, 1 << 19
    return 2.0 * threads * task.n * PE_SPIN * PE_LANES * 4 / _fastest(&task, threads, rounds)
