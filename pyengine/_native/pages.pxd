from libc.stdint cimport int64_t, uint16_t

from .memory cimport pe_prefetch

# How keys and values are stored; the value is the bytes of a number.
cdef enum KVDtype:
    KV_INT8 = 1
    KV_BFLOAT16 = 2
    KV_FLOAT32 = 4

# How a page of 64 positions lies in memory: for each layer and kv head, keys, values, then, for int8 alone, float32 scales of
# the keys [64] and of the values [64].
#   float32, int8: keys [4][head_dim][16 positions], values [value_width / 16][64 positions][16]
#   bfloat16:      keys [4][key_width / 2][16 positions][2], values [value_width / 16][32][16][2 positions]
# So keys and values are panels of packed weights, and attention is matrix products. key_width is head_dim rounded up to 2 for
# bfloat16, value_width is head_dim rounded up to 16.
cdef struct PageLayout:
    int64_t n_layer, n_kv_head, head_dim, key_width, value_width
    KVDtype dtype

# The layout as an object, for those who own pages.
cdef class KVLayout:
    cdef PageLayout layout

cdef int64_t page_bytes(const PageLayout *layout) noexcept nogil
cdef int64_t store_scratch(const PageLayout *layout) noexcept nogil
cdef void store(const PageLayout *layout, void *page, int64_t layer, int64_t head, int64_t slot, const float *k, const float *v,
                int64_t stride, int64_t n, float *scratch) noexcept nogil
cdef void store_bf16(const PageLayout *layout, void *page, int64_t layer, int64_t head, int64_t slot, const uint16_t *k,
                     const uint16_t *v, int64_t stride, int64_t n) noexcept nogil

# Of a page, a layer and a head:


cdef inline int64_t key_bytes(const PageLayout *layout) noexcept nogil:
    return 64 * layout.key_width * layout.dtype


cdef inline int64_t value_bytes(const PageLayout *layout) noexcept nogil:
    return 64 * layout.value_width * layout.dtype


cdef inline int64_t head_bytes(const PageLayout *layout) noexcept nogil:
    return key_bytes(layout) + value_bytes(layout) + (2 * 64 * 4 if layout.dtype == KV_INT8 else 0)


cdef inline char *keys_of(const PageLayout *layout, void *page, int64_t layer, int64_t head) noexcept nogil:
    return <char *>page + (layer * layout.n_kv_head + head) * head_bytes(layout)


cdef inline char *values_of(const PageLayout *layout, char *keys) noexcept nogil:
    return keys + key_bytes(layout)


cdef inline float *scales_of(const PageLayout *layout, char *keys) noexcept nogil:
    return <float *>(keys + key_bytes(layout) + value_bytes(layout))


cdef inline void prefetch_scales(const PageLayout *layout, const char *keys) noexcept nogil:
    pe_prefetch(keys + key_bytes(layout) + value_bytes(layout), 2 * 64 * 4)


cdef inline void prefetch(const PageLayout *layout, const char *keys, int64_t n) noexcept nogil:
    """Asks for the keys and values of the first n positions, and for the scales."""
    cdef int64_t panel
    pe_prefetch(keys, (n + 15) // 16 * 16 * layout.key_width * layout.dtype)
    for panel in range(layout.value_width // 16):
        pe_prefetch(keys + key_bytes(layout) + panel * 64 * 16 * layout.dtype, n * 16 * layout.dtype)
    if layout.dtype == KV_INT8:
        prefetch_scales(layout, keys)
