# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""What sampling does over a whole vocabulary: check, penalise, filter, draw, rank. All of it in O(vocab_size).

A filter is a cut-off (`cutoffs`): the lowest logit that stays. So tokens that tie with it stay, whatever their ids. What
depends on the SIMD level (`max`, `exp_sum`) gives the same bits at every level that has a fused multiply-add.
"""

from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, log
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy

from .cutoffs cimport FEW, PEAK, bounds, coarse, cutoff, gather
from .drawing cimport BLOCK, add_up, invert, race
from .logprobs cimport check_ids, log_sum_exp
from .masks cimport check_mask, mask, gather_allowed, token_bits
from .simd cimport kernels

import numpy as np

from ..errors import ArgumentError
from .logprobs import unusable

ENTRY = np.dtype([("value", np.float32), ("token_id", np.int32)])


cdef class Workspace:
    """Scratch memory for rows of `vocab_size` logits, and what is done to such a row. For one thread at a time.

    Logits are float32 [vocab_size]. -inf is a probability of zero; NaN, +inf or only -inf raise `NonFiniteError`.
    """

    def __init__(self, int64_t vocab_size):
        if vocab_size < 1:
            raise ArgumentError(f"vocab_size: expected at least 1, got {vocab_size}")
        self.vocab_size = vocab_size
        self.adjusted = np.empty(vocab_size, np.float32)  # what `adjust` returns
        self.masked = np.empty(vocab_size, np.float32)  # what `mask` returns
        self.allowed = np.empty(vocab_size // 32 + 1, np.uint32)  # a mask's bits, those of the end at its tokens
        self.kept = np.empty(vocab_size, np.float32)  # the logits that a mask or top_k left, ascending in token id
        self.kept_ids = np.empty(vocab_size, np.int32)
        self.weights = np.empty(vocab_size, np.float32)  # the distribution that is drawn from, times a constant
        self.values = np.empty(vocab_size, np.float32)  # values, masses, buckets: scratch of a search for a cut-off
        self.masses = np.empty(vocab_size, np.float32)
        self.buckets = np.empty(vocab_size, np.int16)
        self.maxima = np.empty((vocab_size + PEAK - 1) // PEAK, np.float32)
        self.sums = np.empty((vocab_size + BLOCK - 1) // BLOCK, np.float64)  # of blocks of weights
        self.counts = np.zeros(vocab_size, np.int32)  # all 0 between calls

    cdef int check(self, const float[::1] logits) except -1:
        if logits.shape[0] != self.vocab_size:
            raise ArgumentError(f"logits: expected {self.vocab_size} (vocab_size), got {logits.shape[0]}")
        return 0

    cdef float maximum(self, const float[::1] logits) except? -1.0:
        self.check(logits)
        cdef float top = kernels().row_max(&logits[0], self.vocab_size)
        if not -INFINITY < top < INFINITY:
            raise unusable(logits)
        return top

    def logsumexp(self, const float[::1] logits) -> float:
        """log of the sum of exp(logits): what is subtracted from a logit to make it a log-probability."""
        self.check(logits)
        cdef double total
        with nogil:
            total = log_sum_exp(&logits[0], self.vocab_size)
        if total != total:
            raise unusable(logits)
        return total

    def top(self, const float[::1] logits, int64_t k, masking=None):
        """The k largest logits, descending, ties by ascending token id: token_ids int32 [k], logits float32 [k].

        Of those that `masking` allows, the bits and end_ids of `mask`. Tokens of probability zero are left out, so there may
        be fewer.
        """
        cdef Masking m
        cdef int64_t n = 0
        self.check(logits)
        masking_of(&m, masking, self.vocab_size)
        out = np.empty(max(min(k, self.vocab_size), 0), ENTRY)
        cdef Entry[::1] entries = out
        if len(out):
            with nogil:
                n = self.top_row(&logits[0], &m, entries.shape[0], &entries[0])
        if n < 0:
            raise unusable(logits)
        return out["token_id"][:n], out["value"][:n]

    cdef int64_t top_row(self, const float *x, const Masking *m, int64_t k, Entry *entries) noexcept nogil:
        """What `top` does, for 0 < k <= vocab_size. Returns how many, -1 if the logits can't be used."""
        cdef int64_t n = self.restrict(&x, m), n_tied = k, n_found = 0, i
        cdef float top = kernels().row_max(x, n) if n else -INFINITY, low
        if not top < INFINITY or (top == -INFINITY and not m.bits):
            return -1
        if top == -INFINITY:
            return 0
        n = self.keep_top(x, k) if n == self.vocab_size else self.keep_fewer(n, k)
        bounds(&self.kept[0], n, &top, &low)
        for i in range(n):  # how many of those that tie with the lowest there is room for
            n_tied -= self.kept[i] > low
        for i in range(n):
            if self.kept[i] == low:
                n_tied -= 1
                if n_tied < 0:
                    continue
            entries[n_found].value, entries[n_found].token_id = self.kept[i], self.kept_ids[i]
            n_found += 1
        qsort(entries, n_found, sizeof(Entry), by_rank)
        return n_found

    def adjust(self, const float[::1] logits, float shift, const int32_t[::1] taken_ids, float diversity_penalty,
               const int32_t[::1] prompt_ids, const int32_t[::1] generated_ids, float repetition_penalty, float presence_penalty,
               float frequency_penalty, const int32_t[::1] bias_ids, const float[::1] bias):
        """logits - shift after the penalties and the bias: float32 [vocab_size], valid until the next call of `adjust`.

        Each time a token is among taken_ids: minus diversity_penalty (Vijayakumar et al. 2016). One of the prompt or a
        generated one: logit / repetition_penalty where positive, times it where negative
        (Keskar et al. 2019). One generated n > 0 times: minus presence_penalty + n frequency_penalty. Then plus its bias.
        """
        self.check(logits)
        check_ids(taken_ids, self.vocab_size)
        check_ids(prompt_ids, self.vocab_size)
        check_ids(generated_ids, self.vocab_size)
        check_ids(bias_ids, self.vocab_size)
        cdef float *x = &self.adjusted[0]
        cdef int32_t *count = &self.counts[0]
        cdef int64_t i
        cdef int32_t token_id
        with nogil:
            for i in range(self.vocab_size):
                x[i] = logits[i] - shift
            for i in range(taken_ids.shape[0]):
                x[taken_ids[i]] -= diversity_penalty
            if repetition_penalty != 1.0:
                for i in range(prompt_ids.shape[0]):
                    repeated(x, count, prompt_ids[i], repetition_penalty)
                for i in range(generated_ids.shape[0]):
                    repeated(x, count, generated_ids[i], repetition_penalty)
                for i in range(prompt_ids.shape[0]):
                    count[prompt_ids[i]] = 0
                for i in range(generated_ids.shape[0]):
                    count[generated_ids[i]] = 0
            if presence_penalty != 0.0 or frequency_penalty != 0.0:
                for i in range(generated_ids.shape[0]):
                    count[generated_ids[i]] += 1
                for i in range(generated_ids.shape[0]):
                    token_id = generated_ids[i]
                    if count[token_id]:
                        x[token_id] -= presence_penalty + frequency_penalty * count[token_id]
                        count[token_id] = 0
            for i in range(bias_ids.shape[0]):
                x[bias_ids[i]] += bias[i]
        return np.asarray(self.adjusted)

    def mask(self, const float[::1] logits, const uint32_t[::1] bits, const int32_t[::1] end_ids):
        """The logits whose bit is 1, -inf for the others: float32 [vocab_size], valid until the next call of `mask`.

        Bit i % 32 of word i // 32 is that of token i; for the tokens of `end_ids` it is the bit after the last token's.
        """
        self.check(logits)
        check_mask(bits, end_ids, self.vocab_size)
        with nogil:
            token_bits(&bits[0], self.vocab_size, first_id(end_ids), end_ids.shape[0], &self.allowed[0])
            mask(&logits[0], self.vocab_size, &self.allowed[0], &self.masked[0])
        return np.asarray(self.masked)

    cdef int64_t restrict(self, const float **x, const Masking *m) noexcept nogil:
        """Points x to what a mask leaves of it: vocab_size logits, or fewer, which are all but -inf: those in self.kept."""
        cdef int64_t n = self.vocab_size, n_left
        if not m.bits:
            return n
        n_left = token_bits(m.bits, n, m.end_ids, m.n_end, &self.allowed[0])
        if n_left < n // 8:  # the others needn't be looked at
            n = gather_allowed(x[0], n, &self.allowed[0], &self.kept[0], &self.kept_ids[0])
            x[0] = &self.kept[0]
        else:
            mask(x[0], n, &self.allowed[0], &self.masked[0])
            x[0] = &self.masked[0]
        return n

    cdef int64_t keep_top(self, const float *x, int64_t k) noexcept nogil:
        """Moves the k largest logits, and those that tie with the k-th, to self.kept and self.kept_ids: how many.

        The k-th largest of the blocks' maxima can't exceed the k-th largest logit: blocks that stay below are skipped.
        """
        cdef float *values = &self.values[0]
        cdef float *maxima = &self.maxima[0]
        cdef int64_t n = self.vocab_size, n_block = self.maxima.shape[0], n_found, b
        cdef float low = -FLT_MAX
        for b in range(n_block):
            maxima[b] = kernels().row_max(x + b * PEAK, min(n - b * PEAK, <int64_t> PEAK))
            values[b] = max(maxima[b], -FLT_MAX)
        if k <= n_block:
            low = cutoff(values, NULL, n_block, k)
        n_found = gather(x, n, maxima, low, values, &self.kept_ids[0])
        self.cut = cutoff(values, NULL, n_found, k)
        return gather(x, n, maxima, self.cut, &self.kept[0], &self.kept_ids[0])

    cdef int64_t keep_fewer(self, int64_t n, int64_t k) noexcept nogil:
        """What `keep_top` does, for the n logits that are in self.kept already."""
        cdef float value
        cdef int64_t n_found = 0, i
        if n <= k:
            return n
        memcpy(&self.values[0], &self.kept[0], n * sizeof(float))
        self.cut = cutoff(&self.values[0], NULL, n, k)
        for i in range(n):
            value = self.kept[i]
            self.kept[n_found], self.kept_ids[n_found] = value, self.kept_ids[i]
            n_found += value >= self.cut
        return n_found

    cdef int64_t filter(self, const float *x, int64_t n, float top, const Filters *f, bint weighed) noexcept nogil:
        """Fills self.weights with exp((logit - top) / temperature), 0 for tokens that are filtered out; top is the maximum.

        x are all logits, or the n that are in self.kept; `weighed`: the weights at a temperature of 1 are there. The
        n_least largest stay whatever the filters say. Returns how many weights there are: vocab_size, or fewer, whose ids
        are in self.kept_ids, if a mask or top_k has left only those. self.cut is the lowest logit that top_k and top_p leave.
        """
        cdef float *weights = &self.weights[0]
        cdef int64_t i
        cdef float least = INFINITY, low  # the lowest logit that stays in any case; the lowest weight
        cdef double scale = inverse(f.temperature)
        if f.n_least > 1 and (f.top_p < 1.0 or f.min_p > 0.0):
            bounds(&self.kept[0], self.keep_top(x, f.n_least), &top, &least)
        self.cut = -INFINITY
        if f.top_k > 0 and max(f.top_k, f.n_least) < n:
            n = self.keep_top(x, max(f.top_k, f.n_least)) if n == self.vocab_size else self.keep_fewer(n, f.top_k)
            x, weighed = &self.kept[0], False
        if not (weighed and scale == 1.0):
            kernels().exp_sum(x, n, top, <float> scale, weights)
        if f.top_p < 1.0:
            self.cut = max(self.cut, min(self.nucleus(x, n, top, scale, f.top_p), least))
            drop(weights, x, n, self.cut)
        if f.min_p > 0.0:
            low = <float> f.min_p  # the largest weight is 1
            for i in range(n):
                weights[i] = 0.0 if (weights[i] < low) & (x[i] < least) else weights[i]
        return n

    cdef double draw_row(self, const float *x, Wish *wish) noexcept nogil:
        """What `draw_rows` does for a row. Returns the logits' logsumexp, NaN with a mask and where they can't be used."""
        cdef Filters filters = wish.filters
        cdef int64_t n = self.restrict(&x, &wish.masking), i, j
        cdef bint whole = wish.masking.bits == NULL
        cdef float top = kernels().row_max(x, n) if n else -INFINITY
        cdef double sum = 0.0, mass
        for j in range(wish.n_uniform):
            wish.token_ids[j] = -1
        if not -INFINITY < top < INFINITY:
            return <double> INFINITY - INFINITY
        if whole:
            sum = kernels().exp_sum(x, n, top, 1.0, &self.weights[0] if filters.temperature else NULL)
        elif wish.cut > -INFINITY and top >= wish.cut:  # what the filters leave isn't masked altogether
            filters.top_k, filters.top_p, filters.min_p = 0, 1.0, 0.0
        if filters.temperature == 0.0 or (whole and stands_alone(&filters, 1.0 / sum)):
            wish.cut, i = top, first_of(x, n, top)
            for j in range(wish.n_uniform):
                wish.token_ids[j] = self.kept_ids[i] if n < self.vocab_size else i
        else:
            n = self.filter(x, n, top, &filters, whole)
            if n < self.vocab_size:
                x = &self.kept[0]
            if whole and filters.min_p > 0.0 and wish.n_uniform > 1:
                wish.cut = lowest(x, &self.weights[0], n)
            elif whole:
                wish.cut = self.cut
            elif top >= wish.cut > -INFINITY:
                drop(&self.weights[0], x, n, wish.cut)
            mass = add_up(&self.weights[0], n, &self.sums[0])
            for j in range(wish.n_uniform):
                i = invert(&self.weights[0], n, &self.sums[0], wish.uniforms[j] * mass)
                wish.token_ids[j] = self.kept_ids[i] if n < self.vocab_size else i
        return top + log(sum) if whole else <double> INFINITY - INFINITY

    cdef float nucleus(self, const float *x, int64_t n, float top, double scale, double top_p) noexcept nogil:
        """The highest cut-off such that the entries with x >= cut-off have at least top_p of all the weight.

        Entries that weigh less than (1 - top_p) / n of all are not needed, even all together: so the buckets end there.
        """
        cdef const float *weights = &self.weights[0]
        cdef double mass = add_up(weights, n, &self.sums[0]), target = top_p * mass, above = 0.0
        cdef double span = log(max(n / ((1.0 - top_p) * mass), 2.0)) / scale
        cdef int64_t n_found = n
        if n > FEW:
            n_found = coarse(x, weights, n, top, span, target, &above, &self.buckets[0], &self.values[0],
                             &self.masses[0])
        else:
            memcpy(&self.values[0], x, n * sizeof(float))
            memcpy(&self.masses[0], weights, n * sizeof(float))
        if n_found == 0:
            return -FLT_MAX  # rounding left no entry where the sum reaches the target: all are needed
        return cutoff(&self.values[0], &self.masses[0], n_found, target - above)

    def probabilities(self, const float[::1] logits, double temperature, int64_t top_k, double top_p, double min_p,
                      int64_t n_least=1):
        """What `draw_rows` draws from: float64 [vocab_size], 0 for tokens that are filtered out."""
        cdef Filters f = filters_of(temperature, top_k, top_p, min_p, n_least)
        cdef int64_t n = self.filter(&logits[0], self.vocab_size, self.maximum(logits), &f, False)
        weights = np.asarray(self.weights[:n], np.float64)
        probs = np.zeros(self.vocab_size)
        probs[np.asarray(self.kept_ids[:n]) if n < self.vocab_size else slice(None)] = weights / weights.sum()
        return probs

    def race(self, const float[::1] logits, double temperature, int64_t top_k, double top_p, double min_p,
             int64_t n_least, const double[::1] uniforms):
        """Token ids that arrive in a race, the first first, and the logs of their times: int32 [n], float64 [n].

        A token that the filters of `draw_rows` leave, or one of the n_least largest, arrives at a rate of
        exp(logit / temperature). So the first n of one row, or of several rows together, are a draw of n tokens without
        replacement, in proportion to these rates (Efraimidis and Spirakis 2006). uniforms in [0, 1) are two for each
        that may arrive; fewer arrive where no more are left.
        """
        cdef Filters f = filters_of(temperature, top_k, top_p, min_p, n_least)
        cdef int64_t n = self.filter(&logits[0], self.vocab_size, self.maximum(logits), &f, False)
        cdef int64_t n_draw = min(uniforms.shape[0] // 2, n), n_drawn = 0
        indices, log_times = np.empty(n_draw, np.int32), np.empty(n_draw, np.float64)
        cdef int32_t[::1] index = indices
        cdef double[::1] log_time = log_times
        if n_draw:
            with nogil:
                n_drawn = race(&self.weights[0], n, n_draw, &uniforms[0], &self.sums[0], &index[0], &log_time[0])
        token_ids = np.asarray(self.kept_ids)[indices[:n_drawn]] if n < self.vocab_size else indices[:n_drawn]
        return token_ids, log_times[:n_drawn] - kernels().row_max(&logits[0], self.vocab_size) * inverse(temperature)


cdef int masking_of(Masking *m, masking, int64_t vocab_size) except -1:
    """`masking` is bits and end_ids, which must be kept alive, or None."""
    cdef const uint32_t[::1] bits
    cdef const int32_t[::1] end_ids
    m.bits, m.end_ids, m.n_end = NULL, NULL, 0
    if masking is not None:
        bits, end_ids = masking
        check_mask(bits, end_ids, vocab_size)
        m.bits, m.end_ids, m.n_end = &bits[0], first_id(end_ids), end_ids.shape[0]
    return 0


cdef const int32_t *first_id(const int32_t[::1] ids) noexcept nogil:
    return &ids[0] if ids.shape[0] else NULL


cdef Filters filters_of(double temperature, int64_t top_k, double top_p, double min_p, int64_t n_least) noexcept nogil:
    cdef Filters f
    f.temperature, f.top_k, f.top_p, f.min_p, f.n_least = temperature, top_k, top_p, min_p, n_least
    return f


cdef bint stands_alone(const Filters *f, double p) noexcept nogil:
    """Whether they leave the most probable token alone, which has a probability of p at a temperature of 1.

    At a lower one it has more. At more than a half none ties with it.
    """
    cdef bint enough = (p >= f.top_p and f.top_p < 1.0) or 1.0 - p < f.min_p * p
    return p > 0.5 and (f.top_k == 1 or (enough and f.temperature <= 1.0))


cdef float lowest(const float *x, const float *weights, int64_t n) noexcept nogil:
    """The lowest that weighs anything. In lanes: one comparison alone would wait for each."""
    cdef float lows[16]
    cdef float low = INFINITY, value
    cdef int64_t i, j
    for j in range(16):
        lows[j] = INFINITY
    for i in range(n // 16):
        for j in range(16):
            value = x[16 * i + j] if weights[16 * i + j] > 0.0 else <float> INFINITY
            lows[j] = value if value < lows[j] else lows[j]
    for i in range(n - n % 16, n):
        lows[i % 16] = min(lows[i % 16], x[i]) if weights[i] > 0.0 else lows[i % 16]
    for j in range(16):
        low = min(low, lows[j])
    return low


cdef int64_t first_of(const float *x, int64_t n, float value) noexcept nogil:
    """Where x first has a value that it is known to have. Blocks are passed over as a whole."""
    cdef int64_t i = 0, j
    cdef int hits = 0
    while n - i >= PEAK:
        for j in range(PEAK):
            hits |= x[i + j] == value
        if hits:
            break
        i += PEAK
    while x[i] != value:
        i += 1
    return i


cdef double inverse(double temperature) noexcept nogil:
    """1 / temperature. Beyond the bounds 0 * inf could come up; within them, e^-88 and e^0 are long reached."""
    return min(max(1.0 / temperature, 1e-30), 1e30)


cdef void repeated(float *x, int32_t *seen, int32_t token_id, float penalty) noexcept nogil:
    if not seen[token_id]:
        seen[token_id] = 1
        x[token_id] = x[token_id] * penalty if x[token_id] < 0 else x[token_id] / penalty


cdef void drop(float *weights, const float *x, int64_t n, float low) noexcept nogil:
    """weights[i] = 0 where x[i] < low."""
    cdef int64_t i
    for i in range(n):
        weights[i] = 0.0 if x[i] < low else weights[i]


cdef int by_rank(const void *a, const void *b) noexcept nogil:
    """Descending values, then ascending ids."""
    cdef const Entry *p = <const Entry *> a
    cdef const Entry *q = <const Entry *> b
    if p.value != q.value:
        return -1 if p.value > q.value else 1
    return -1 if p.token_id < q.token_id else 1
