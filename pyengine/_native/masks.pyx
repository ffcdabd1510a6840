# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Masks of a vocabulary: bit i % 32 of word i // 32 is that of token i, and one more says whether the text may end."""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint32_t

from .logprobs cimport check_ids

from ..errors import ArgumentError

# Bit i alone: a table, since shifts by as many different counts can't be done side by side on every CPU.
cdef uint32_t[32] BIT
for _i in range(32):
    BIT[_i] = <uint32_t> 1 << _i


cdef int check_mask(const uint32_t[::1] bits, const int32_t[::1] end_ids, int64_t vocab_size) except -1:
    check_ids(end_ids, vocab_size)
    if bits.shape[0] != vocab_size // 32 + 1:
        raise ArgumentError(f"bits: expected {vocab_size // 32 + 1} words, got {bits.shape[0]}")
    return 0


cdef int64_t mask(const float *x, int64_t n, const uint32_t *bits, const int32_t *end_ids, int64_t n_end,
                  float *out) noexcept nogil:
    """out[i] = x[i] where its bit is 1, that of the end for end_ids, else -inf. Returns at least how many are left."""
    cdef int64_t n_left = n_end, i
    cdef bint ends = (bits[n // 32] >> (n % 32)) & 1
    for i in range(n // 32 + 1):
        where(bits[i], x + 32 * i, out + 32 * i, min(n - 32 * i, <int64_t> 32))
        n_left += n_ones(bits[i])
    for i in range(n_end):
        out[end_ids[i]] = x[end_ids[i]] if ends else -INFINITY
    return n_left


cdef void where(uint32_t bits, const float *x, float *out, int64_t n) noexcept nogil:
    """out[i] = x[i] where bit i is 1, else -inf."""
    cdef int64_t i
    cdef float value
    for i in range(n):
        value = x[i]
        out[i] = value if bits & BIT[i] else -INFINITY


cdef int64_t n_ones(uint32_t bits) noexcept nogil:
    """How many bits are 1: sums of pairs, of fours, of eights, and of all (Warren 2012, section 5-1)."""
    bits -= (bits >> 1) & 0x55555555U
    bits = (bits & 0x33333333U) + ((bits >> 2) & 0x33333333U)
    return (((bits + (bits >> 4)) & 0x0F0F0F0FU) * 0x01010101U) >> 24
