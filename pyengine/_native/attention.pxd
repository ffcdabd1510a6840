from libc.stdint cimport int64_t, uint16_t

from .pages cimport PageLayout
from .parallel cimport Worker

# Consecutive rows of a step that continue one sequence: row `row` has position `position`, the next the next.
cdef struct Segment:
    int64_t row, n_row, position
    void **pages

# Queries, keys and values of all heads, a row for each of the step, `stride` apart: in float32, or already in bfloat16, for
# pages that are so too, with heads that fill whole vectors.
cdef struct Qkv:
    const float *f32
    const uint16_t *bf16  # NULL: they are in float32
    int64_t stride

cdef struct Attention:
    int64_t layer, n_head
    float scale
    PageLayout layout

cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil
cdef void attend(Worker *worker, const Attention *attention, const Qkv *qkv, const Segment *segments, int64_t n_segment,
                 const Segment *wanted, int64_t n_wanted, float *scratch, float *out, int64_t out_stride) noexcept nogil
