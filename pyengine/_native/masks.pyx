# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Masks of a vocabulary: bit i % 32 of word i // 32 is that of token i, and one more says whether the text may end."""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.string cimport memcpy

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


cdef int64_t token_bits(const uint32_t *bits, int64_t n, const int32_t *end_ids, int64_t n_end, uint32_t *out) noexcept nogil:
    """A bit for each token alone, [n // 32 + 1] words: for end_ids that of the end. Returns how many are 1."""
    cdef int64_t n_word = n // 32 + 1, n_left = 0, i
    cdef bint ends = (bits[n // 32] >> (n % 32)) & 1
    memcpy(out, bits, n_word * sizeof(uint32_t))
    for i in range(n_end):
        out[end_ids[i] // 32] &= ~BIT[end_ids[i] % 32]
        out[end_ids[i] // 32] |= BIT[end_ids[i] % 32] if ends else 0
    out[n // 32] &= BIT[n % 32] - 1  # tokens before the last
    for i in range(n_word):
        n_left += n_ones(out[i])
    return n_left


cdef void mask(const float *x, int64_t n, const uint32_t *bits, float *out) noexcept nogil:
    """out[i] = x[i] where its bit is 1, else -inf."""
    cdef int64_t i
    for i in range(n // 32 + 1):
        where(bits[i], x + 32 * i, out + 32 * i, min(n - 32 * i, <int64_t> 32))


cdef void where(uint32_t bits, const float *x, float *out, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef float value
    for i in range(n):
        value = x[i]
        out[i] = value if bits & BIT[i] else -INFINITY


cdef int64_t gather_allowed(const float *x, int64_t n, const uint32_t *bits, float *values, int32_t *token_ids) noexcept nogil:
    """Moves the entries whose bit is 1, but for -inf, to values and their indices to token_ids: how many."""
    cdef int64_t i, j, n_found = 0
    cdef uint32_t word
    for i in range(n // 32 + 1):
        word = bits[i]
        while word:
            j = 32 * i + n_ones((word & (~word + 1)) - 1)  # as many zeros as there are below the lowest 1
            word &= word - 1
            values[n_found], token_ids[n_found] = x[j], <int32_t> j
            n_found += x[j] > -INFINITY
    return n_found


cdef int64_t n_ones(uint32_t bits) noexcept nogil:
    """How many bits are 1: sums of pairs, of fours, of eights, and of all (Warren 2012, section 5-1)."""
    bits -= (bits >> 1) & 0x55555555U
    bits = (bits & 0x33333333U) + ((bits >> 2) & 0x33333333U)
    return (((bits + (bits >> 4)) & 0x0F0F0F0FU) * 0x01010101U) >> 24
