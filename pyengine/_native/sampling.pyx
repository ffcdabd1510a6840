# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""What sampling does over a whole vocabulary: check, penalise, filter, draw, rank. All of it in O(vocab_size).

Nothing is sorted but a few dozen entries. A filter is a cut-off: the lowest logit that stays. It is found by dividing
the range of logits into buckets, adding up what falls into each, and looking again inside the one bucket where the sum
passes the target. So tokens that tie with the cut-off stay, whatever their ids.

The draw inverts the cumulative distribution over ascending token ids; sums are float64 in a fixed order. What depends on
the SIMD level (`max`, `exp_sum`) gives the same bits at every level that has a fused multiply-add.
"""

from libc.math cimport INFINITY, log
from libc.stdint cimport int16_t, int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

from .simd cimport kernels

import numpy as np

from ..errors import ArgumentError, NonFiniteError

cdef enum:
    N_BUCKET = 2048
    FEW = 64  # entries that are sorted rather than divided again
    PEAK = 64  # logits in a block of which only the maximum is looked at first
    BLOCK = 512  # weights in one partial sum of the cumulative distribution
    LANES = 8  # partial sums side by side: one alone would wait for each addition

cdef float LOWEST = -3.4028234e38  # the lowest finite float32

ctypedef struct Entry:
    float value
    int32_t token_id


def uniform(uint64_t seed, uint32_t sample_index, uint64_t position) -> float:
    """A number in [0, 1) that depends on its arguments alone: Philox4x32-10 (Salmon et al. 2011), 53 bits of it."""
    cdef uint32_t words[4]
    words[0], words[1] = <uint32_t> position, <uint32_t> (position >> 32)
    words[2], words[3] = sample_index, 0
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


cdef class Workspace:
    """Scratch memory for rows of `vocab_size` logits, and what is done to such a row. For one thread at a time.

    Logits are float32 [vocab_size]. -inf is a probability of zero; NaN, +inf or only -inf raise `NonFiniteError`.
    """

    cdef readonly int64_t vocab_size
    cdef float[::1] adjusted, masked, kept, weights, values, masses, maxima
    cdef int32_t[::1] kept_ids, counts
    cdef int16_t[::1] buckets

    def __init__(self, int64_t vocab_size):
        if vocab_size < 1:
            raise ArgumentError(f"vocab_size: expected at least 1, got {vocab_size}")
        self.vocab_size = vocab_size
        self.adjusted = np.empty(vocab_size, np.float32)  # what `adjust` returns
        self.masked = np.empty(vocab_size, np.float32)  # what `mask` returns
        self.kept = np.empty(vocab_size, np.float32)  # the logits that top_k left, ascending in token id
        self.kept_ids = np.empty(vocab_size, np.int32)
        self.weights = np.empty(vocab_size, np.float32)  # the distribution that is drawn from, times a constant
        self.values = np.empty(vocab_size, np.float32)  # values, masses, buckets: scratch of a search for a cut-off
        self.masses = np.empty(vocab_size, np.float32)
        self.buckets = np.empty(vocab_size, np.int16)
        self.maxima = np.empty((vocab_size + PEAK - 1) // PEAK, np.float32)
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
        cdef const float *x = &logits[0]
        cdef int64_t i = 0
        with nogil:
            while x[i] != top:
                i += 1
        return i

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

    def adjust(self, const float[::1] logits, float shift, const int32_t[::1] prompt_ids,
               const int32_t[::1] generated_ids, float repetition_penalty, float presence_penalty,
               float frequency_penalty, const int32_t[::1] bias_ids, const float[::1] bias):
        """logits - shift after the penalties and the bias: float32 [vocab_size], valid until the next call of `adjust`.

        A token of the prompt or a generated one: logit / repetition_penalty where positive, times it where negative
        (Keskar et al. 2019). One generated n > 0 times: minus presence_penalty + n frequency_penalty. Then plus its bias.
        """
        self.check(logits)
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
        cdef int64_t n = self.vocab_size, n_word = n // 32 + 1, i
        self.check(logits)
        check_ids(end_ids, n)
        if bits.shape[0] != n_word:
            raise ArgumentError(f"bits: expected {n_word} words, got {bits.shape[0]}")
        cdef float *out = &self.masked[0]
        cdef const float *x = &logits[0]
        cdef bint ends = (bits[n // 32] >> (n % 32)) & 1
        with nogil:
            for i in range(n_word):
                where(bits[i], x + 32 * i, out + 32 * i, min(n - 32 * i, <int64_t> 32))
            for i in range(end_ids.shape[0]):
                out[end_ids[i]] = x[end_ids[i]] if ends else -INFINITY
        return np.asarray(self.masked)

    cdef int64_t keep_top(self, const float *x, int64_t k) noexcept nogil:
        """Moves the k largest logits, and those that tie with the k-th, to self.kept and self.kept_ids: how many.

        The k-th largest of the blocks' maxima can't exceed the k-th largest logit: blocks that stay below are skipped.
        """
        cdef float *values = &self.values[0]
        cdef float *maxima = &self.maxima[0]
        cdef int64_t n = self.vocab_size, n_block = self.maxima.shape[0], n_found, b
        cdef float low = LOWEST
        for b in range(n_block):
            maxima[b] = kernels().max(x + b * PEAK, min(n - b * PEAK, <int64_t> PEAK))
            values[b] = max(maxima[b], LOWEST)
        if k <= n_block:
            low = cutoff(values, NULL, n_block, k)
        n_found = gather(x, n, maxima, low, values, &self.kept_ids[0])
        low = cutoff(values, NULL, n_found, k)
        return gather(x, n, maxima, low, &self.kept[0], &self.kept_ids[0])

    cdef int64_t filter(self, const float[::1] logits, double temperature, int64_t top_k, double top_p,
                        double min_p) except -1:
        """Fills self.weights with exp((logit - max) / temperature), 0 for tokens that are filtered out.

        Returns how many there are: vocab_size, or fewer, whose ids are in self.kept_ids, if top_k has left only those.
        """
        cdef float top = self.maximum(logits)
        cdef const float *x = &logits[0]
        cdef float *weights = &self.weights[0]
        cdef int64_t n = self.vocab_size
        # Beyond these bounds 0 * inf could come up; within them, e^-88 and e^0 are long reached.
        cdef double scale = min(max(1.0 / temperature, 1e-30), 1e30)
        with nogil:
            if 0 < top_k < n:
                n = self.keep_top(x, top_k)
                x = &self.kept[0]
            kernels().exp_sum(x, n, top, <float> scale, weights)
            if top_p < 1.0:
                drop(weights, x, n, self.nucleus(x, n, top, scale, top_p))
            if min_p > 0.0:
                drop(weights, weights, n, <float> min_p)  # the largest weight is 1
        return n

    cdef float nucleus(self, const float *x, int64_t n, float top, double scale, double top_p) noexcept nogil:
        """The highest cut-off such that the entries with x >= cut-off have at least top_p of all the weight.

        Entries that weigh less than (1 - top_p) / n of all are not needed, even all together: so the buckets end there.
        """
        cdef const float *weights = &self.weights[0]
        cdef double mass = total(weights, n), target = top_p * mass, above = 0.0
        cdef double span = log(max(n / ((1.0 - top_p) * mass), 2.0)) / scale
        cdef int64_t n_found = n
        if n > FEW:
            n_found = coarse(x, weights, n, top, span, target, &above, &self.buckets[0], &self.values[0],
                             &self.masses[0])
        else:
            memcpy(&self.values[0], x, n * sizeof(float))
            memcpy(&self.masses[0], weights, n * sizeof(float))
        if n_found == 0:
            return LOWEST  # rounding left no entry where the sum reaches the target: all are needed
        return cutoff(&self.values[0], &self.masses[0], n_found, target - above)

    def probabilities(self, const float[::1] logits, double temperature, int64_t top_k, double top_p, double min_p):
        """What `draw` draws from: float64 [vocab_size], 0 for tokens that are filtered out."""
        cdef int64_t n = self.filter(logits, temperature, top_k, top_p, min_p)
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
        cdef int64_t n = self.filter(logits, temperature, top_k, top_p, min_p)
        cdef int64_t i
        with nogil:
            i = invert(&self.weights[0], n, uniform)
        return self.kept_ids[i] if n < self.vocab_size else i


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


cdef double log_sum_exp(const float *x, int64_t n) noexcept nogil:
    """NaN where the row can't be used."""
    cdef float top = kernels().max(x, n)
    if not -INFINITY < top < INFINITY:
        return <double> INFINITY - INFINITY
    return top + log(kernels().exp_sum(x, n, top, 1.0, NULL))


cdef void repeated(float *x, int32_t *seen, int32_t token_id, float penalty) noexcept nogil:
    if not seen[token_id]:
        seen[token_id] = 1
        x[token_id] = x[token_id] * penalty if x[token_id] < 0 else x[token_id] / penalty


cdef void where(uint32_t bits, const float *x, float *out, int64_t n) noexcept nogil:
    """out[i] = x[i] where bit i is 1, else -inf. Most words are all 0 or all 1."""
    cdef int64_t i
    if bits == 0xFFFFFFFFU:
        memcpy(out, x, n * sizeof(float))
        return
    for i in range(n):
        out[i] = -INFINITY
    if bits != 0:
        for i in range(n):
            if (bits >> i) & 1:
                out[i] = x[i]


cdef void drop(float *weights, const float *x, int64_t n, float low) noexcept nogil:
    """weights[i] = 0 where x[i] < low."""
    cdef int64_t i
    for i in range(n):
        weights[i] = 0.0 if x[i] < low else weights[i]


cdef double total(const float *weights, int64_t n) noexcept nogil:
    """The sum by blocks, in ascending order: what `invert` walks along."""
    cdef double mass = 0.0
    cdef int64_t b
    for b in range((n + BLOCK - 1) // BLOCK):
        mass += block_sum(weights, n, b)
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


cdef int64_t invert(const float *weights, int64_t n, double uniform) noexcept nogil:
    """The first index whose share of the cumulative weight exceeds `uniform`; if rounding leaves none, the last above 0."""
    cdef double target = uniform * total(weights, n), before = 0.0, mass = 0.0, block
    cdef int64_t i, b, chosen = 0, last = 0
    for b in range((n + BLOCK - 1) // BLOCK):
        block = block_sum(weights, n, b)
        if block > 0.0:
            chosen = b
            before, mass = mass, mass + block
            if mass > target:
                break
    for i in range(chosen * BLOCK, min(n, (chosen + 1) * BLOCK)):
        if weights[i] > 0.0:
            last = i
            before += weights[i]
            if before > target:
                break
    return last


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
    """`narrow` for a whole row: the buckets cover `span` below the top, and the last one takes all that lies lower.

    A bucket's sum waits for the one before if that was its own: so there are four sums for each.
    """
    cdef double sums[4][N_BUCKET]
    cdef float per_unit = <float> min((N_BUCKET - 1) / span, 1e38), position
    cdef int64_t i, j, n_found = 0
    cdef int16_t b = 0, hits
    memset(sums, 0, sizeof(sums))
    for i in range(n):
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
    for i in range(0, n, 16):  # most stretches have no entry of that bucket: one comparison of 16
        hits = 0
        if n - i >= 16:
            for j in range(16):
                hits |= buckets[i + j] == b
            if not hits:
                continue
        for j in range(i, min(n, i + 16)):
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


cdef int by_rank(const void *a, const void *b) noexcept nogil:
    """Descending values, then ascending ids."""
    cdef const Entry *p = <const Entry *> a
    cdef const Entry *q = <const Entry *> b
    if p.value != q.value:
        return -1 if p.value > q.value else 1
    return -1 if p.token_id < q.token_id else 1
