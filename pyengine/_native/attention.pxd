from libc.stdint cimport int64_t

from .parallel cimport Worker

# How keys and values are stored; the value is the bytes of a number.
cdef enum KVDtype:
    KV_INT8 = 1
    KV_BFLOAT16 = 2
    KV_FLOAT32 = 4

# How a page of 64 positions lies in memory: for each layer and kv head, keys [4][head_dim][16 positions], then values
# [value_width / 16][64 positions][16], then, for int8 alone, float32 scales of the keys [64] and of the values [64]. In float32,
# keys and values are panels of packed weights, so attention is matrix products.
cdef struct PageLayout:
    int64_t n_layer, n_kv_head, head_dim, value_width  # value_width = head_dim rounded up to 16
    KVDtype dtype

# Consecutive rows of a step that continue one sequence: row `row` has position `position`, the next the next.
cdef struct Segment:
    int64_t row, n_row, position
    void **pages

cdef struct Attention:
    int64_t layer, n_head
    float scale
    PageLayout layout

cdef int64_t page_bytes(const PageLayout *layout) noexcept nogil
cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil
cdef void attend(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                 int64_t n_segment, float *scratch, float *out, int64_t out_stride) noexcept nogil

# The layout as an object, for those who own pages.
cdef class KVLayout:
    cdef PageLayout layout
