from libc.stdint cimport int32_t, int64_t, uint32_t

# Raises ArgumentError for masks that aren't of this vocabulary.
cdef int check_mask(const uint32_t[::1] bits, const int32_t[::1] end_ids, int64_t vocab_size) except -1
cdef int64_t token_bits(const uint32_t *bits, int64_t n, const int32_t *end_ids, int64_t n_end, uint32_t *out) noexcept nogil
cdef void mask(const float *x, int64_t n, const uint32_t *bits, float *out) noexcept nogil
cdef int64_t gather_allowed(const float *x, int64_t n, const uint32_t *bits, float *values, int32_t *token_ids) noexcept nogil
