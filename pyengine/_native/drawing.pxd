from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef enum: BLOCK = 512  # weights in one partial sum of the cumulative distribution

# What `uniform` is.
cdef double uniform_at(uint64_t seed, uint32_t sample_index, uint64_t position, uint32_t attempt) noexcept nogil
# Before `invert`: sums has a place for each block of weights.
cdef double add_up(const float *weights, int64_t n, double *sums) noexcept nogil
cdef int64_t invert(const float *weights, int64_t n, const double *sums, double target) noexcept nogil
cdef int64_t race(float *weights, int64_t n, int64_t n_draw, const double *uniforms, double *sums, int32_t *indices,
                  double *log_times) noexcept nogil
