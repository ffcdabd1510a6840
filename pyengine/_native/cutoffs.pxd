from libc.stdint cimport int16_t, int32_t, int64_t

cdef enum:
    FEW = 64  # values that are sorted rather than divided again
    PEAK = 64  # values in a block of which only the maximum is looked at first

cdef void bounds(const float *x, int64_t n, float *top, float *low) noexcept nogil
cdef float cutoff(float *values, float *masses, int64_t n, double target) noexcept nogil
cdef int64_t coarse(const float *x, const float *weights, int64_t n, float top, double span, double target,
                    double *above, int16_t *buckets, float *values, float *masses) noexcept nogil
cdef int64_t gather(const float *x, int64_t n, const float *maxima, float low, float *values,
                    int32_t *token_ids) noexcept nogil
