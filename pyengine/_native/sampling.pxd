from libc.stdint cimport int16_t, int32_t, int64_t, uint32_t

ctypedef struct Entry:
    float value
    int32_t token_id

# What tokens are drawn from: see `draw_rows`.
cdef struct Filters:
    double temperature, top_p, min_p
    int64_t top_k, n_least

# What `Workspace.mask` takes, or NULL for bits.
cdef struct Masking:
    const uint32_t *bits
    const int32_t *end_ids
    int64_t n_end

cdef enum: N_UNIFORM = 4

# Tokens to draw, each from the same.
cdef struct Wish:
    Filters filters
    double uniforms[N_UNIFORM]
    int32_t token_ids[N_UNIFORM]  # out: -1 for none
    int64_t n_uniform
    Masking masking
    float cut  # the lowest logit that the filters leave, before a mask

cdef class Workspace:
    cdef readonly int64_t vocab_size
    cdef float[::1] adjusted, masked, kept, weights, values, masses, maxima
    cdef double[::1] sums
    cdef int32_t[::1] kept_ids, counts
    cdef uint32_t[::1] allowed
    cdef int16_t[::1] buckets
    cdef float cut
    cdef int check(self, const float[::1] logits) except -1
    cdef float maximum(self, const float[::1] logits) except? -1.0
    cdef int64_t top_row(self, const float *x, const Masking *m, int64_t k, Entry *entries) noexcept nogil
    cdef int64_t restrict(self, const float **x, const Masking *m) noexcept nogil
    cdef int64_t keep_top(self, const float *x, int64_t k) noexcept nogil
    cdef int64_t keep_fewer(self, int64_t n, int64_t k) noexcept nogil
    cdef int64_t filter(self, const float *x, int64_t n, float top, const Filters *f, bint weighed) noexcept nogil
    cdef double draw_row(self, const float *x, Wish *wish) noexcept nogil
    cdef float nucleus(self, const float *x, int64_t n, float top, double scale, double top_p) noexcept nogil

cdef Filters filters_of(double temperature, int64_t top_k, double top_p, double min_p, int64_t n_least) noexcept nogil
cdef int masking_of(Masking *m, masking, int64_t vocab_size) except -1
