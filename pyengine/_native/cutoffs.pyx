# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Cut-offs: the highest value such that those from there up are so many, or weigh so much. In O(n).

The range of values is divided into buckets, what falls into each is added up, and the one bucket where the sum passes
the target is divided again: nothing is sorted but a few dozen values. Those that tie with the cut-off stay, wherever
they are.
"""

from libc.stdint cimport int16_t, int32_t, int64_t
from libc.string cimport memset

cdef enum:
    N_BUCKET = 2048
    LANES = 8  # comparisons side by side: one alone would wait for each


cdef int64_t gather(const float *x, int64_t n, const float *maxima, float low, float *values,
                    int32_t *token_ids) noexcept nogil:
    """Moves the entries x >= low to values and their indices to token_ids; blocks with a lower maximum are skipped."""
    cdef int64_t b, i, n_found = 0
    for b in range((n + PEAK - 1) // PEAK):
        if maxima[b] >= low:
            for i in range(b * PEAK, min(n, (b + 1) * PEAK)):
                values[n_found], token_ids[n_found] = x[i], <int32_t> i
                n_found += x[i] >= low
    return n_found


cdef int64_t coarse(const float *x, const float *weights, int64_t n, float top, double span, double target,
                    double *above, int16_t *buckets, float *values, float *masses) noexcept nogil:
    """`narrow` for a whole row: the buckets cover `span` below the top. Returns 0 where the sum doesn't reach `target` in them.

    A bucket's sum waits for the one before if that was its own: so there are four sums for each, and what lies lower than
    `span`, which is most, is spread over LANES buckets from the last one on.
    """
    cdef double sums[4][N_BUCKET + LANES]
    cdef float ends[LANES]
    cdef float per_unit = <float> min((N_BUCKET - 1) / span, 1e38), position
    cdef int64_t i, j, n_found = 0
    cdef int16_t b = 0, hits
    memset(sums, 0, sizeof(sums))
    for j in range(LANES):
        ends[j] = N_BUCKET - 1 + j
    for i in range(n // LANES):
        for j in range(LANES):
            position = (top - x[LANES * i + j]) * per_unit
            buckets[LANES * i + j] = <int16_t> <int32_t> (position if position < ends[j] else ends[j])
    for i in range(n - n % LANES, n):
        position = (top - x[i]) * per_unit
        buckets[i] = <int16_t> <int32_t> (position if position < N_BUCKET - 1 else N_BUCKET - 1)
    for i in range(n // 4):
        for j in range(4):
            sums[j][buckets[4 * i + j]] += weights[4 * i + j]
    for i in range(n - n % 4, n):
        sums[0][buckets[i]] += weights[i]
    for i in range(N_BUCKET):
        sums[0][i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])
    while b < N_BUCKET - 1 and above[0] + sums[0][b] < target:
        above[0] += sums[0][b]
        b += 1
    if b == N_BUCKET - 1:
        return 0
    for i in range((n + PEAK - 1) // PEAK):  # most have no entry of that bucket
        hits = 0
        if n - i * PEAK >= PEAK:
            for j in range(PEAK):
                hits |= buckets[i * PEAK + j] == b
            if not hits:
                continue
        for j in range(i * PEAK, min(n, (i + 1) * PEAK)):
            if buckets[j] == b:
                values[n_found], masses[n_found] = x[j], weights[j]
                n_found += 1
    return n_found


cdef float cutoff(float *values, float *masses, int64_t n, double target) noexcept nogil:
    """The highest cut-off such that the values >= cut-off weigh at least `target`, or the lowest value where none does.

    Without masses each value weighs 1. n > 0 finite values; they are used up.
    """
    cdef double above = 0.0
    cdef float top, low
    cdef int64_t i
    while n > FEW:
        bounds(values, n, &top, &low)
        if top == low:
            return top
        n = narrow(values, masses, n, top, low, target, &above)
    sort_descending(values, masses, n)
    for i in range(n):
        above += masses[i] if masses else 1.0
        if above >= target:
            return values[i]
    return values[n - 1]


cdef int64_t narrow(float *values, float *masses, int64_t n, float top, float low, double target,
                    double *above) noexcept nogil:
    """Divides low..top into buckets and keeps the entries of the one where the sum from the top reaches `target`.

    Returns how many: fewer than n, since top and low never share a bucket. What lies above them is added to `above`.
    """
    cdef double sums[N_BUCKET]
    cdef double per_unit = (N_BUCKET - 1) / (<double> top - low)
    cdef float value
    cdef int64_t i, n_found = 0
    cdef int b = 0, last = bucket(low, top, per_unit)
    memset(sums, 0, sizeof(sums))
    if masses:
        for i in range(n):
            sums[bucket(values[i], top, per_unit)] += masses[i]
    else:
        for i in range(n):
            sums[bucket(values[i], top, per_unit)] += 1.0
    while b < last and above[0] + sums[b] < target:
        above[0] += sums[b]
        b += 1
    for i in range(n):
        value = values[i]
        values[n_found] = value
        if masses:
            masses[n_found] = masses[i]
        n_found += bucket(value, top, per_unit) == b
    return n_found


cdef inline int bucket(float value, float top, double per_unit) noexcept nogil:
    """0 at the top, N_BUCKET - 1 at the bottom."""
    return <int> ((<double> top - value) * per_unit)


cdef void bounds(const float *x, int64_t n, float *top, float *low) noexcept nogil:
    """The largest and the lowest of n > 0 values."""
    cdef float tops[LANES]
    cdef float lows[LANES]
    cdef int64_t i, j
    for j in range(LANES):
        tops[j] = lows[j] = x[max(n - 1 - j, <int64_t> 0)]  # those that are left over at the end
    for i in range(n // LANES):
        for j in range(LANES):
            tops[j] = x[i * LANES + j] if x[i * LANES + j] > tops[j] else tops[j]
            lows[j] = x[i * LANES + j] if x[i * LANES + j] < lows[j] else lows[j]
    top[0], low[0] = tops[0], lows[0]
    for j in range(1, LANES):
        top[0], low[0] = max(top[0], tops[j]), min(low[0], lows[j])


cdef void sort_descending(float *values, float *masses, int64_t n) noexcept nogil:
    """By insertion: n is at most FEW."""
    cdef int64_t i, j
    cdef float value, mass = 0.0
    for i in range(1, n):
        value = values[i]
        if masses:
            mass = masses[i]
        j = i
        while j > 0 and values[j - 1] < value:
            values[j] = values[j - 1]
            if masses:
                masses[j] = masses[j - 1]
            j -= 1
        values[j] = value
        if masses:
            masses[j] = mass
