# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Drawing: numbers that depend on their place alone, and indices in proportion to weights.

Weights are added up in blocks, in float64 and in a fixed order. An index is the one where the cumulative weight, over
ascending indices, passes a number.
"""

from libc.math cimport log, log1p
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

cdef enum:
    LANES = 8  # partial sums side by side: one alone would wait for each addition


def uniform(uint64_t seed, uint32_t sample_index, uint64_t position, uint32_t attempt=0) -> float:
    """A number in [0, 1) that depends on its arguments alone: Philox4x32-10 (Salmon et al. 2011), 53 bits of it."""
    return uniform_at(seed, sample_index, position, attempt)


cdef double uniform_at(uint64_t seed, uint32_t sample_index, uint64_t position, uint32_t attempt) noexcept nogil:
    cdef uint32_t words[4]
    words[0], words[1] = <uint32_t> position, <uint32_t> (position >> 32)
    words[2], words[3] = sample_index, attempt
    philox(words, <uint32_t> seed, <uint32_t> (seed >> 32))
    cdef uint64_t bits = (<uint64_t> words[1] << 32) | words[0]
    return <double> (bits >> 11) * (1.0 / 9007199254740992.0)  # 2^-53


def philox4x32(counter, key) -> tuple[int, int, int, int]:
    """The generator under `uniform`, for its published test vectors: counter (4 words), key (2) to 4 words."""
    cdef uint32_t words[4]
    words[0], words[1], words[2], words[3] = counter
    philox(words, key[0], key[1])
    return words[0], words[1], words[2], words[3]


cdef void philox(uint32_t *words, uint32_t key_0, uint32_t key_1) noexcept nogil:
    """Ten rounds, in place."""
    cdef uint64_t a, b
    cdef uint32_t old_1, old_3
    cdef int r
    for r in range(10):
        a = <uint64_t> 0xD2511F53 * words[0]
        b = <uint64_t> 0xCD9E8D57 * words[2]
        old_1, old_3 = words[1], words[3]
        words[0] = <uint32_t> (b >> 32) ^ old_1 ^ key_0
        words[1] = <uint32_t> b
        words[2] = <uint32_t> (a >> 32) ^ old_3 ^ key_1
        words[3] = <uint32_t> a
        key_0 += <uint32_t> 0x9E3779B9
        key_1 += <uint32_t> 0xBB67AE85


cdef double add_up(const float *weights, int64_t n, double *sums) noexcept nogil:
    """Puts the sum of each block in sums; returns the sum of all."""
    cdef double mass = 0.0
    cdef int64_t b
    for b in range((n + BLOCK - 1) // BLOCK):
        sums[b] = block_sum(weights, n, b)
        mass += sums[b]
    return mass


cdef double block_sum(const float *weights, int64_t n, int64_t b) noexcept nogil:
    """The sum of block b of the n weights."""
    cdef double lanes[LANES]
    cdef double mass = 0.0
    cdef int64_t i, j, n_left = min(n - b * BLOCK, <int64_t> BLOCK)
    weights += b * BLOCK
    memset(lanes, 0, sizeof(lanes))
    for i in range(n_left // LANES):
        for j in range(LANES):
            lanes[j] += weights[i * LANES + j]
    for i in range(n_left - n_left % LANES, n_left):
        lanes[0] += weights[i]
    for j in range(LANES):
        mass += lanes[j]
    return mass


cdef int64_t invert(const float *weights, int64_t n, const double *sums, double target) noexcept nogil:
    """The first index where the cumulative weight exceeds target; if rounding leaves none, the last weight above 0."""
    cdef double before = 0.0, mass = 0.0
    cdef int64_t i, b, chosen = 0, last = 0
    for b in range((n + BLOCK - 1) // BLOCK):
        if sums[b] > 0.0:
            chosen = b
            before, mass = mass, mass + sums[b]
            if mass > target:
                break
    for i in range(chosen * BLOCK, min(n, (chosen + 1) * BLOCK)):
        if weights[i] > 0.0:
            last = i
            before += weights[i]
            if before > target:
                break
    return last


cdef int64_t race(float *weights, int64_t n, int64_t n_draw, const double *uniforms, double *sums, int32_t *indices,
                  double *log_times) noexcept nogil:
    """Indices arrive in a race, each at a rate of its weight: the first n_draw, and the logs of their times.

    What is left arrives after an exponential time of the rate that is left, and which one it is doesn't depend on that
    time: so there are two uniforms for each, one for the index and one for the time. Weights that have arrived become
    0; with no weight left the race is over. Returns how many arrived.
    """
    cdef double mass = add_up(weights, n, sums), time = 0.0
    cdef int64_t i, b, n_drawn = 0
    while n_drawn < n_draw and mass > 0.0:
        i = invert(weights, n, sums, uniforms[2 * n_drawn] * mass)
        time -= log1p(-uniforms[2 * n_drawn + 1]) / mass
        indices[n_drawn], log_times[n_drawn] = <int32_t> i, log(time)
        n_drawn += 1
        weights[i] = 0.0
        sums[i // BLOCK] = block_sum(weights, n, i // BLOCK)
        mass = 0.0
        for b in range((n + BLOCK - 1) // BLOCK):
            mass += sums[b]
    return n_drawn
