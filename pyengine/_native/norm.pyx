# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""LayerNorm and softmax over rows."""

import numpy as np

from libc.stdint cimport int64_t

from .kernels cimport PE_LANES
from .parallel cimport Worker, claim, run
from .simd cimport kernels

from ..errors import ArgumentError

cdef struct RowsTask:
    const float *x
    const float *gain  # NULL: a softmax
    const float *bias
    float *y
    int64_t n_row, n, y_stride
    float eps


cdef void rows_body(void *context, Worker *worker) noexcept nogil:
    cdef RowsTask *task = <RowsTask *>context
    cdef int64_t row = claim(worker, task.n_row)
    while row >= 0:
        if task.gain != NULL:
            kernels().layer_norm(task.x + row * task.n, task.n, task.gain, task.bias, task.eps, task.y + row * task.y_stride)
        else:
            kernels().softmax(task.x + row * task.n, task.n, task.y + row * task.y_stride)
        row = claim(worker, task.n_row)


cdef object _rows(const float[:, ::1] x, const float[::1] gain, const float[::1] bias, float eps, int threads):
    cdef int64_t n_row = x.shape[0], n = x.shape[1]
    out = np.empty((n_row, (n + PE_LANES - 1) // PE_LANES * PE_LANES), np.float32)
    cdef float[:, ::1] view = out
    cdef RowsTask task
    if n_row and n:
        task.x, task.y, task.n_row, task.n, task.y_stride, task.eps = &x[0, 0], &view[0, 0], n_row, n, view.shape[1], eps
        task.gain = &gain[0] if gain is not None else NULL
        task.bias = &bias[0] if bias is not None else NULL
        run(threads, 1, rows_body, &task)
    return out[:, :n]


def layer_norm(const float[:, ::1] x, const float[::1] gain, const float[::1] bias, float eps, int threads=1):
    """(x - mean) / sqrt(variance + eps) * gain + bias for each row (Ba et al. 2016): float32 [n_rows, n] → [n_rows, n]."""
    if gain.shape[0] != x.shape[1] or bias.shape[0] != x.shape[1]:
        raise ArgumentError(f"gain, bias: expected [{x.shape[1]}], got [{gain.shape[0]}], [{bias.shape[0]}]")
    return _rows(x, gain, bias, eps, threads)


def softmax(const float[:, ::1] x, int threads=1):
    """exp(x - max) / sum for each row: float32 [n_rows, n] → [n_rows, n]."""
    return _rows(x, None, None, 0, threads)
