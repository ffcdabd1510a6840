from libc.stdint cimport int64_t

from .pages cimport PageLayout
from .parallel cimport Worker

# Consecutive rows of a step that continue one sequence: row `row` has position `position`, the next the next.
cdef struct Segment:
    int64_t row, n_row, position
    void **pages

cdef struct Attention:
    int64_t layer, n_head
    float scale
    PageLayout layout

cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil
cdef void attend(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                 int64_t n_segment, float *scratch, float *out, int64_t out_stride) noexcept nogil
