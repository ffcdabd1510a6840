# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Log-probabilities of rows of logits, and the checks of what comes from outside."""

from libc.math cimport INFINITY, log
from libc.stdint cimport int32_t, int64_t

from .simd cimport kernels

import numpy as np

from ..errors import ArgumentError, NonFiniteError


def token_logprobs(const float[:, :] logits, const int32_t[::1] token_ids):
    """log softmax(logits[i])[token_ids[i]] for each row: float64 [n]; logits float32 [n, vocab_size], rows may be padded.

    Raises `NonFiniteError` for a row with NaN or +inf, `ArgumentError` for a token id outside the vocabulary.
    """
    cdef int64_t n = logits.shape[0], vocab_size = logits.shape[1], i
    if token_ids.shape[0] != n:
        raise ArgumentError(f"token_ids: expected {n}, one for each row of logits, got {token_ids.shape[0]}")
    if vocab_size > 1 and logits.strides[1] != sizeof(float):
        raise ArgumentError(f"logits: expected rows without gaps, got a stride of {logits.strides[1]} bytes")
    check_ids(token_ids, vocab_size)
    out = np.empty(n, np.float64)
    cdef double[::1] logprobs = out
    cdef double total
    for i in range(n):
        with nogil:
            total = log_sum_exp(&logits[i, 0], vocab_size)
        if total != total:
            raise unusable(logits[i])
        logprobs[i] = logits[i, token_ids[i]] - total
    return out


cdef double log_sum_exp(const float *x, int64_t n) noexcept nogil:
    """NaN where the row can't be used."""
    cdef float top = kernels().row_max(x, n)
    if not -INFINITY < top < INFINITY:
        return <double> INFINITY - INFINITY
    return top + log(kernels().exp_sum(x, n, top, 1.0, NULL))


cdef int check_ids(const int32_t[::1] token_ids, int64_t vocab_size) except -1:
    cdef int64_t i
    for i in range(token_ids.shape[0]):
        if not 0 <= token_ids[i] < vocab_size:
            raise ArgumentError(f"token_ids[{i}]: expected 0 to {vocab_size - 1}, got {token_ids[i]}")
    return 0


def unusable(logits):
    """The `NonFiniteError` for this row."""
    row = np.asarray(logits)
    bad = np.flatnonzero(np.isnan(row) | (row == np.inf))
    if len(bad) == 0:
        return NonFiniteError("logits: every one is -inf, so no token has a probability above zero")
    return NonFiniteError(
        f"logits: expected finite numbers or -inf, got {len(bad)} of {len(row)} NaN or +inf, "
        f"the first at token id {bad[0]} ({row[bad[0]]})"
    )
