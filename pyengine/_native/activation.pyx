# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""GELU and the other activations by name, and exp."""

import numpy as np

from libc.stdint cimport int64_t

from .kernels cimport (
    PE_ACT_GELU_ERF, PE_ACT_GELU_SIGMOID, PE_ACT_GELU_TANH, PE_ACT_GELU_TANH_COARSE, PE_ACT_NONE, PE_ACT_RELU, PE_ACT_SILU,
    PE_ACT_TANH, PE_LANES, pe_activation,
)
from .parallel cimport Worker, claim, run
from .simd cimport kernels

from ..errors import ArgumentError

ACTIVATIONS = {
    None: PE_ACT_NONE,
    "gelu_tanh": PE_ACT_GELU_TANH,
    "gelu_erf": PE_ACT_GELU_ERF,
    "gelu_sigmoid": PE_ACT_GELU_SIGMOID,
    "relu": PE_ACT_RELU,
    "silu": PE_ACT_SILU,
    "tanh": PE_ACT_TANH,
}

cdef enum:
    UNIT = 64 * PE_LANES

cdef struct ActivateTask:
    pe_activation kind
    float *x
    int64_t n


cdef pe_activation activation_of(name) except *:
    if name not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {', '.join(filter(None, ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]


cdef pe_activation coarse(pe_activation kind) noexcept nogil:
    return PE_ACT_GELU_TANH_COARSE if kind == PE_ACT_GELU_TANH else kind


cdef void activate_body(void *context, Worker *worker) noexcept nogil:
    cdef ActivateTask *task = <ActivateTask *>context
    cdef int64_t n_unit = (task.n + UNIT - 1) // UNIT, unit = claim(worker, n_unit)
    while unit >= 0:
        kernels().activate(task.kind, task.x + unit * UNIT, min(<int64_t>UNIT, task.n - unit * UNIT))
        unit = claim(worker, n_unit)


def activate(kind, const float[::1] x, int threads=1, bint narrow=False):
    """The activation `kind` of each value, as it is computed where it becomes bfloat16 or int8 if `narrow`: float32 [n] → [n].
    Formulas: csrc/kernels.h."""
    cdef int64_t n = x.shape[0]
    out = np.zeros((n + PE_LANES - 1) // PE_LANES * PE_LANES, np.float32)
    out[:n] = x
    cdef float[::1] view = out
    cdef ActivateTask task
    task.kind, task.n = activation_of(kind), n
    if narrow:
        task.kind = coarse(task.kind)
    if n:
        task.x = &view[0]
        run(threads, 1, activate_body, &task)
    return out[:n]


def exp(const float[::1] x):
    """e to the power of each value, as softmax and the activations compute it: float32 [n] → [n]."""
    out = np.empty(x.shape[0], np.float32)
    cdef float[::1] view = out
    if x.shape[0]:
        kernels().exp_sum(&x[0], x.shape[0], 0.0, 1.0, &view[0])
    return out
