# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""What sampling does over a whole vocabulary: check, penalise, filter, draw, rank. All of it in O(vocab_size).

A filter is a cut-off (`cutoffs`): the lowest logit that stays. So tokens that tie with it stay, whatever their ids. What
depends on the SIMD level (`max`, `exp_sum`) gives the same bits at every level that has a fused multiply-add.
"""

from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, log
from libc.stdint cimport int16_t, int32_t, int64_t, uint32_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy

from .cutoffs cimport FEW, PEAK, bounds, coarse, cutoff, gather
from .drawing cimport BLOCK, add_up, invert, race
from .logprobs cimport check_ids, log_sum_exp
from .masks cimport check_mask, mask
from .memory cimport Block
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

import numpy as np

from ..errors import ArgumentError
from .logprobs import unusable

ctypedef struct Entry:
    float value
    int32_t token_id

# What tokens are drawn from: see `Workspace.draw`.
cdef struct Filters:
    double temperature, top_p, min_p
    int64_t top_k, n_least


cdef class Workspace:
    """Scratch memory for rows of `vocab_size` logits, and what is done to such a row. For one thread at a time.

    Logits are float32 [vocab_size]. -inf is a probability of zero; NaN, +inf or only -inf raise `NonFiniteError`.
    """

    cdef readonly int64_t vocab_size
    cdef int64_t n_left  # the most tokens that the last `mask` can have left
    cdef float[::1] adjusted, masked, kept, weights, values, masses, maxima
    cdef double[::1] sums
    cdef int32_t[::1] kept_ids, counts
    cdef int16_t[::1] buckets

    def __init__(self, int64_t vocab_size):
        if vocab_size < 1:
            raise ArgumentError(f"vocab_size: expected at least 1, got {vocab_size}")
        self.vocab_size = vocab_size
        self.adjusted = np.empty(vocab_size, np.float32)  # what `adjust` returns
        self.masked = np.empty(vocab_size, np.float32)  # what `mask` returns
        self.n_left = vocab_size
        self.kept = np.empty(vocab_size, np.float32)  # the logits that top_k left, ascending in token id
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
        cdef float top = kernels().max(&logits[0], self.vocab_size)
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

    def argmax(self, const float[::1] logits) -> int:
        """The token id of the largest logit, the lowest of those that tie."""
        cdef float top = self.maximum(logits)
        return first_of(&logits[0], top)

    def top(self, const float[::1] logits, int64_t k):
        """The k largest logits, descending, ties by ascending token id: token_ids int32 [k], logits float32 [k].

        Tokens of probability zero are left out, so there may be fewer.
        """
        self.maximum(logits)
        k = min(k, self.vocab_size)
        if k < 1:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        cdef int64_t n, i, n_tied, n_found = 0
        cdef float top, low
        with nogil:
            n = self.keep_top(&logits[0], k)
            bounds(&self.kept[0], n, &top, &low)
            n_tied = k  # how many of those that tie with the lowest there is room for
            for i in range(n):
                n_tied -= self.kept[i] > low
        out = np.empty(min(k, n), np.dtype([("value", np.float32), ("token_id", np.int32)]))
        cdef Entry[::1] entries = out
        with nogil:
            for i in range(n):
                if self.kept[i] == low:
                    n_tied -= 1
                    if n_tied < 0:
                        continue
                entries[n_found].value, entries[n_found].token_id = self.kept[i], self.kept_ids[i]
                n_found += 1
            qsort(&entries[0], n_found, sizeof(Entry), by_rank)
        return out["token_id"].copy(), out["value"].copy()

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
            self.mask_row(&logits[0], &bits[0], &end_ids[0] if end_ids.shape[0] else NULL, end_ids.shape[0])
        return np.asarray(self.masked)

    cdef void mask_row(self, const float *x, const uint32_t *bits, const int32_t *end_ids, int64_t n_end) noexcept nogil:
        """What `mask` does, to self.masked."""
        self.n_left = mask(x, self.vocab_size, bits, end_ids, n_end, &self.masked[0])

    cdef int64_t keep_top(self, const float *x, int64_t k) noexcept nogil:
        """Moves the k largest logits, and those that tie with the k-th, to self.kept and self.kept_ids: how many.

        The k-th largest of the blocks' maxima can't exceed the k-th largest logit: blocks that stay below are skipped.
        """
        cdef float *values = &self.values[0]
        cdef float *maxima = &self.maxima[0]
        cdef int64_t n = self.vocab_size, n_block = self.maxima.shape[0], n_found, b
        cdef float low = -FLT_MAX
        for b in range(n_block):
            maxima[b] = kernels().max(x + b * PEAK, min(n - b * PEAK, <int64_t> PEAK))
            values[b] = max(maxima[b], -FLT_MAX)
        if k <= n_block:
            low = cutoff(values, NULL, n_block, k)
        n_found = gather(x, n, maxima, low, values, &self.kept_ids[0])
        low = cutoff(values, NULL, n_found, k)
        return gather(x, n, maxima, low, &self.kept[0], &self.kept_ids[0])

    cdef int64_t filter(self, const float *x, float top, const Filters *f) noexcept nogil:
        """Fills self.weights with exp((logit - top) / temperature), 0 for tokens that are filtered out; top is the maximum.

        The n_least largest stay whatever the filters say. Returns how many there are: vocab_size, or fewer, whose ids
        are in self.kept_ids, if top_k has left only those.
        """
        cdef float *weights = &self.weights[0]
        cdef int64_t n = self.vocab_size, top_k = f.top_k, i
        cdef float least = INFINITY, low  # the lowest logit that stays in any case; the lowest weight
        cdef double scale = inverse(f.temperature)
        if f.n_least > 1 and (f.top_p < 1.0 or f.min_p > 0.0):
            bounds(&self.kept[0], self.keep_top(x, f.n_least), &top, &least)
        if x == &self.masked[0] and self.n_left < n // 8:  # those few: the others would weigh nothing
            top_k = min(top_k, self.n_left) if top_k else self.n_left
        if top_k > 0 and max(top_k, f.n_least) < n:
            n = self.keep_top(x, max(top_k, f.n_least))
            x = &self.kept[0]
        kernels().exp_sum(x, n, top, <float> scale, weights)
        if f.top_p < 1.0:
            drop(weights, x, n, min(self.nucleus(x, n, top, scale, f.top_p), least))
        if f.min_p > 0.0:
            low = <float> f.min_p  # the largest weight is 1
            for i in range(n):
                weights[i] = 0.0 if (weights[i] < low) & (x[i] < least) else weights[i]
        return n

    cdef int64_t draw_from(self, const float *x, float top, const Filters *f, double uniform) noexcept nogil:
        """What `draw` does, for logits that can be used."""
        cdef int64_t n = self.filter(x, top, f), i
        i = invert(&self.weights[0], n, &self.sums[0], uniform * add_up(&self.weights[0], n, &self.sums[0]))
        return self.kept_ids[i] if n < self.vocab_size else i

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
        """What `draw` draws from: float64 [vocab_size], 0 for tokens that are filtered out."""
        cdef Filters f = filters_of(temperature, top_k, top_p, min_p, n_least)
        cdef int64_t n = self.filter(&logits[0], self.maximum(logits), &f)
        weights = np.asarray(self.weights[:n], np.float64)
        probs = np.zeros(self.vocab_size)
        probs[np.asarray(self.kept_ids[:n]) if n < self.vocab_size else slice(None)] = weights / weights.sum()
        return probs

    def draw(self, const float[::1] logits, double temperature, int64_t top_k, double top_p, double min_p,
             double uniform) -> int:
        """One token id: the first whose cumulative probability, over ascending ids, exceeds `uniform` in [0, 1).

        The distribution is softmax(logits / temperature), of which only these tokens stay, in this order: the top_k
        largest (0: all); the fewest largest whose mass reaches top_p (Holtzman et al. 2019); those of at least min_p times
        the largest probability. temperature > 0, 0 < top_p <= 1, 0 <= min_p < 1.
        """
        cdef Filters f = filters_of(temperature, top_k, top_p, min_p, 1)
        cdef float top = self.maximum(logits)
        cdef int64_t token_id
        with nogil:
            token_id = self.draw_from(&logits[0], top, &f, uniform)
        return token_id

    def race(self, const float[::1] logits, double temperature, int64_t top_k, double top_p, double min_p,
             int64_t n_least, const double[::1] uniforms):
        """Token ids that arrive in a race, the first first, and the logs of their times: int32 [n], float64 [n].

        A token that the filters of `draw` leave, or one of the n_least largest, arrives at a rate of
        exp(logit / temperature). So the first n of one row, or of several rows together, are a draw of n tokens without
        replacement, in proportion to these rates (Efraimidis and Spirakis 2006). uniforms in [0, 1) are two for each
        that may arrive; fewer arrive where no more are left.
        """
        cdef Filters f = filters_of(temperature, top_k, top_p, min_p, n_least)
        cdef int64_t n = self.filter(&logits[0], self.maximum(logits), &f)
        cdef int64_t n_draw = min(uniforms.shape[0] // 2, n), n_drawn = 0
        indices, log_times = np.empty(n_draw, np.int32), np.empty(n_draw, np.float64)
        cdef int32_t[::1] index = indices
        cdef double[::1] log_time = log_times
        if n_draw:
            with nogil:
                n_drawn = race(&self.weights[0], n, n_draw, &uniforms[0], &self.sums[0], &index[0], &log_time[0])
        token_ids = np.asarray(self.kept_ids)[indices[:n_drawn]] if n < self.vocab_size else indices[:n_drawn]
        return token_ids, log_times[:n_drawn] - kernels().max(&logits[0], self.vocab_size) * inverse(temperature)


# One row of many that are drawn from at once.
cdef struct Row:
    const float *x
    const uint32_t *bits  # what `Workspace.mask` takes, or NULL
    const int32_t *end_ids
    int64_t n_end
    Filters filters
    double uniform
    double total  # the logits' logsumexp, NaN where they can't be used
    int64_t token_id

cdef struct DrawTask:
    void **works
    Row *rows
    int64_t n_row


def draw_rows(list works, list logits, const double[:, ::1] asked, list masks=None):
    """The next tokens of many samples, on a thread for each of `works`, which are of one vocab_size.

    logits are float32 [vocab_size] each; asked is float64 [n, 5]: temperature (0 for the largest logit), top_k, top_p,
    min_p, uniform, as `Workspace.draw` has them; masks are bits and end_ids of each, as `Workspace.mask` has them. Returns
    token ids, int64 [n], -1 where there is none, and the logits' logsumexp, float64 [n], NaN where a row can't be used.
    """
    cdef int64_t n = len(logits), i
    cdef Block pointers = Block(len(works) * sizeof(void *), "sampling"), rows = Block(n * sizeof(Row), "sampling")
    cdef DrawTask task
    cdef Workspace work
    cdef const float[::1] x
    cdef const uint32_t[::1] bits
    cdef const int32_t[::1] end_ids
    cdef Row *row
    task.works, task.rows, task.n_row = <void **>pointers.data, <Row *>rows.data, n
    for i, work in enumerate(works):
        task.works[i] = <void *>work
    for i in range(n):
        x, row = logits[i], &task.rows[i]
        work.check(x)
        row.x, row.uniform, row.bits = &x[0], asked[i, 4], NULL
        if masks is not None:
            bits, end_ids = masks[i]
            check_mask(bits, end_ids, work.vocab_size)
            row.bits, row.n_end = &bits[0], end_ids.shape[0]
            row.end_ids = &end_ids[0] if row.n_end else NULL
        row.filters = filters_of(asked[i, 0], <int64_t>asked[i, 1], asked[i, 2], asked[i, 3], 1)
    run(len(works), 1, draw_body, &task)
    token_ids, totals = np.empty(n, np.int64), np.empty(n, np.float64)
    for i in range(n):
        token_ids[i], totals[i] = task.rows[i].token_id, task.rows[i].total
    return token_ids, totals


cdef void draw_body(void *context, Worker *worker) noexcept nogil:
    cdef DrawTask *task = <DrawTask *>context
    cdef int64_t unit = claim(worker, task.n_row)
    while unit >= 0:
        draw_row(<Workspace>task.works[worker.index], &task.rows[unit])
        unit = claim(worker, task.n_row)
    sync(worker, task.n_row)


cdef void draw_row(Workspace work, Row *row) noexcept nogil:
    cdef const float *x = row.x
    cdef float top
    row.total, row.token_id = log_sum_exp(x, work.vocab_size), -1
    if row.total != row.total:
        return
    if row.bits:
        work.mask_row(x, row.bits, row.end_ids, row.n_end)
        x = &work.masked[0]
    top = kernels().max(x, work.vocab_size)
    if top > -INFINITY:
        row.token_id = work.draw_from(x, top, &row.filters, row.uniform) if row.filters.temperature else first_of(x, top)


cdef Filters filters_of(double temperature, int64_t top_k, double top_p, double min_p, int64_t n_least) noexcept nogil:
    cdef Filters f
    f.temperature, f.top_k, f.top_p, f.min_p, f.n_least = temperature, top_k, top_p, min_p, n_least
    return f


cdef int64_t first_of(const float *x, float value) noexcept nogil:
    """Where x has a value that it is known to have."""
    cdef int64_t i = 0
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
