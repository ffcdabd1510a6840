from libc.stdint cimport int32_t, int64_t

# Raises ArgumentError for a token id outside the vocabulary.
cdef int check_ids(const int32_t[::1] token_ids, int64_t vocab_size) except -1
# NaN where the row can't be used.
cdef double log_sum_exp(const float *x, int64_t n) noexcept nogil
