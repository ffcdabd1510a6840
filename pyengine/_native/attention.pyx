# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Scaled causal self-attention over KV pages: the loops over sequences, heads, tiles of queries and blocks of keys.

A query meets the keys in blocks of 64 at absolute positions, in order, and the online softmax (Milakov & Gimelshein 2018)
merges them. So its result doesn't depend on the queries beside it: a prompt gives the same bits in one piece, in chunks, and
token by token. A page may hold bfloat16 or int8; a block of it is widened to float32 before a query meets it.
"""

import numpy as np

from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int64_t, uint16_t, uintptr_t
from libc.string cimport memcpy, memset

from .kernels cimport PE_LANES, PE_PAGE, pe_kernels, pe_output, pe_weights_f32
from .memory cimport Block, pe_prefetch
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

from ..errors import ArgumentError

KV_DTYPES = ("float32", "bfloat16", "int8")

ctypedef fused Number:  # what a page holds
    float
    uint16_t
    int8_t

cdef enum:
    UNITS_PER_THREAD = 16
    TILE = 16  # positions: queries that share a pass over the keys, and keys in a panel
    STATE = 2 * PE_LANES


cdef inline int64_t key_bytes(const PageLayout *layout) noexcept nogil:
    """Of a page, layer and head, as those below."""
    return PE_PAGE * layout.head_dim * layout.dtype


cdef inline int64_t value_bytes(const PageLayout *layout) noexcept nogil:
    return PE_PAGE * layout.value_width * layout.dtype


cdef inline int64_t head_bytes(const PageLayout *layout) noexcept nogil:
    cdef int64_t scale_bytes = 2 * PE_PAGE * sizeof(float) if layout.dtype == KV_INT8 else 0
    return key_bytes(layout) + value_bytes(layout) + scale_bytes


cdef inline char *keys_of(const Attention *a, void *page, int64_t head) noexcept nogil:
    return <char *>page + (a.layer * a.layout.n_kv_head + head) * head_bytes(&a.layout)


cdef inline float *scales_of(const PageLayout *layout, char *keys) noexcept nogil:
    return <float *>(keys + key_bytes(layout) + value_bytes(layout))


cdef int64_t page_bytes(const PageLayout *layout) noexcept nogil:
    return layout.n_layer * layout.n_kv_head * head_bytes(layout)


cdef inline int64_t widened_floats(const PageLayout *layout) noexcept nogil:
    return 0 if layout.dtype == KV_FLOAT32 else PE_PAGE * layout.value_width


cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil:
    """Floats that a thread needs: keys or values of a block unless they are float32 already, then weights, outputs, states and
    decays of one tile."""
    return widened_floats(layout) + TILE * (PE_PAGE + layout.value_width + STATE + 1)


cdef void store_rows(const Attention *a, const float *qkv, int64_t stride, const Segment *segment, int64_t first,
                     int64_t n, int64_t head, int64_t n_head, float *scratch) noexcept nogil:
    """Appends the keys and values of n_head kv heads of n rows of a segment, from position `first` on, which lie in one tile."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t d = a.layout.head_dim, width = a.layout.value_width, slot = first % PE_PAGE, h, r
    cdef const float *k = qkv + (segment.row + first - segment.position) * stride + (a.n_head + head) * d
    cdef const float *v = k + a.layout.n_kv_head * d
    cdef uint16_t *k_bf16 = <uint16_t *>scratch  # [TILE, value_width]
    cdef uint16_t *v_bf16 = k_bf16 + TILE * width
    cdef int8_t *k_q8 = <int8_t *>scratch
    cdef int8_t *v_q8 = k_q8 + TILE * width
    cdef char *keys
    cdef float *scales
    for h in range(head, head + n_head):
        keys = keys_of(a, segment.pages[first // PE_PAGE], h)
        if a.layout.dtype == KV_FLOAT32:
            place(&a.layout, <float *>keys, slot, k, v, stride, n)
        elif a.layout.dtype == KV_BFLOAT16:
            for r in range(n):
                simd.narrow_bf16(k + r * stride, d, k_bf16 + r * width)
                simd.narrow_bf16(v + r * stride, d, v_bf16 + r * width)
            place(&a.layout, <uint16_t *>keys, slot, <const uint16_t *>k_bf16, <const uint16_t *>v_bf16, width, n)
        else:
            scales = scales_of(&a.layout, keys) + slot
            for r in range(n):
                scales[r] = simd.narrow_q8(k + r * stride, d, k_q8 + r * width)
                scales[PE_PAGE + r] = simd.narrow_q8(v + r * stride, d, v_q8 + r * width)
            place(&a.layout, <int8_t *>keys, slot, <const int8_t *>k_q8, <const int8_t *>v_q8, width, n)
        k += d
        v += d


cdef void place(const PageLayout *layout, Number *keys, int64_t slot, const Number *k, const Number *v, int64_t stride,
                int64_t n) noexcept nogil:
    """Puts n rows of keys and values of one head into a page from position `slot` on; `keys` is where the head's begin."""
    cdef int64_t d = layout.head_dim, i, r, part
    cdef Number *values = keys + PE_PAGE * d + slot * PE_LANES
    cdef Number *value
    keys += slot // PE_LANES * d * PE_LANES + slot % PE_LANES
    for i in range(d):
        for r in range(n):
            keys[i * PE_LANES + r] = k[r * stride + i]
    for r in range(n):
        for i in range(layout.value_width // PE_LANES):
            part = min(<int64_t>PE_LANES, d - i * PE_LANES)
            value = values + (i * PE_PAGE + r) * PE_LANES
            memcpy(value, v + r * stride + i * PE_LANES, part * sizeof(Number))
            memset(value + part, 0, (PE_LANES - part) * sizeof(Number))


cdef void store_kv(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                   int64_t n_segment, float *scratch) noexcept nogil:
    """One phase: appends the rows' keys and values to the cache. A unit is a tile of positions."""
    cdef int64_t n_unit = 0, unit, s, before = 0, first, last
    for s in range(n_segment):
        n_unit += n_tile_of(&segments[s])
    s = 0
    unit = claim(worker, n_unit)
    while unit >= 0:
        while unit - before >= n_tile_of(&segments[s]):
            before += n_tile_of(&segments[s])
            s += 1
        bounds(&segments[s], unit - before, &first, &last)
        store_rows(attention, qkv, stride, &segments[s], first, last - first + 1, 0, attention.layout.n_kv_head, scratch)
        unit = claim(worker, n_unit)
    sync(worker, n_unit)


cdef inline int64_t n_tile_of(const Segment *segment) noexcept nogil:
    """Tiles start at multiples of TILE positions, so none crosses a block's border."""
    return (segment.position + segment.n_row - 1) // TILE - segment.position // TILE + 1


cdef inline void bounds(const Segment *segment, int64_t tile, int64_t *first, int64_t *last) noexcept nogil:
    """The first and last position of a segment's tile."""
    first[0] = max(segment.position, (segment.position // TILE + tile) * TILE)
    last[0] = min(segment.position + segment.n_row, (segment.position // TILE + tile + 1) * TILE) - 1


cdef bint each_stores_its_own(const Attention *attention, const Segment *segments, int64_t n_segment) noexcept nogil:
    """Whether each unit of `attend` can append the key and value that nobody else reads in this step: in decoding."""
    cdef int64_t s
    for s in range(n_segment):
        if segments[s].n_row > 1:
            return False
    return attention.n_head == attention.layout.n_kv_head


cdef void attend(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                 int64_t n_segment, float *scratch, float *out, int64_t out_stride) noexcept nogil:
    """One or two phases: appends keys and values, then attention. A unit is a tile of queries and some heads."""
    cdef int64_t n_tile = 0, unit, s, before = 0, n, tile, head, n_head, parts
    cdef bint storing = each_stores_its_own(attention, segments, n_segment)
    if not storing:
        store_kv(worker, attention, qkv, stride, segments, n_segment, scratch)
    for s in range(n_segment):
        n_tile += n_tile_of(&segments[s])
    n_head = min(max(n_tile * attention.n_head // (UNITS_PER_THREAD * worker.n_threads), <int64_t>1), attention.n_head)
    parts = (attention.n_head + n_head - 1) // n_head  # units of a tile
    s = 0
    unit = claim(worker, n_tile * parts)
    while unit >= 0:
        n = n_tile_of(&segments[s])
        while unit - before >= n * parts:
            before += n * parts
            s += 1
            n = n_tile_of(&segments[s])
        # The last tiles of a prompt have the most keys: they go first, so that no thread ends with one.
        tile = n - 1 - (unit - before) // parts
        head = (unit - before) % parts * n_head
        for head in range(head, min(head + n_head, attention.n_head)):
            if storing:
                store_rows(attention, qkv, stride, &segments[s], segments[s].position, 1, head, 1, scratch)
            attend_tile(attention, qkv, stride, &segments[s], tile, head, scratch, out, out_stride)
        unit = claim(worker, n_tile * parts)
    sync(worker, n_tile * parts)


cdef const float *keys_in_float32(const PageLayout *layout, char *keys, int64_t n, float *scratch) noexcept nogil:
    """The first n of a block's keys, as a matrix in packed float32; in scratch, unless the page has it."""
    cdef int64_t n_panel = (n + PE_LANES - 1) // PE_LANES
    if layout.dtype == KV_FLOAT32:
        return <const float *>keys
    if layout.dtype == KV_BFLOAT16:
        kernels().widen_bf16(<const uint16_t *>keys, n_panel * layout.head_dim * PE_LANES, scratch)
    else:
        kernels().widen_keys_q8(<const int8_t *>keys, scales_of(layout, keys), n_panel, layout.head_dim, scratch)
    return scratch


cdef const float *values_in_float32(const PageLayout *layout, char *keys, int64_t n, float *scratch) noexcept nogil:
    """The same of the values that belong to these keys."""
    cdef char *values = keys + key_bytes(layout)
    cdef int64_t n_panel = layout.value_width // PE_LANES, i
    if layout.dtype == KV_FLOAT32:
        return <const float *>values
    if layout.dtype == KV_BFLOAT16:
        for i in range(n_panel):
            kernels().widen_bf16(<const uint16_t *>values + i * PE_PAGE * PE_LANES, n * PE_LANES,
                                 scratch + i * PE_PAGE * PE_LANES)
    else:
        kernels().widen_values_q8(<const int8_t *>values, scales_of(layout, keys) + PE_PAGE, n, n_panel, scratch)
    return scratch


cdef void attend_tile(const Attention *a, const float *qkv, int64_t stride, const Segment *segment, int64_t tile, int64_t head,
                      float *scratch, float *out, int64_t out_stride) noexcept nogil:
    """One head of the queries whose positions lie in one tile."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t d = a.layout.head_dim, width = a.layout.value_width
    cdef int64_t first, last
    bounds(segment, tile, &first, &last)
    cdef int64_t n_query = last - first + 1, row = segment.row + first - segment.position
    cdef int64_t kv_head = head // (a.n_head // a.layout.n_kv_head)
    cdef const float *q = qkv + row * stride + head * d  # [n_query, head_dim], `stride` apart
    cdef float *weights = scratch + widened_floats(&a.layout)  # [TILE, 64]
    cdef float *sums = weights + TILE * PE_PAGE  # [TILE, value_width]
    cdef float *states = sums + TILE * width  # [TILE, 32]
    cdef float *decay = states + TILE * STATE  # [TILE]
    cdef pe_weights_f32 keys, values
    cdef pe_output scores
    cdef char *head_keys
    cdef int64_t block, n_block = first // PE_PAGE + 1, n_key = 0, n_seen, i
    memset(sums, 0, n_query * width * sizeof(float))
    memset(states, 0, n_query * STATE * sizeof(float))
    memset(&scores, 0, sizeof(scores))
    scores.out, scores.out_stride = weights, PE_PAGE
    keys.k, values.k = d, PE_PAGE
    for i in range(n_query):
        states[i * STATE] = -INFINITY
    for block in range(n_block):
        head_keys = keys_of(a, segment.pages[block], kv_head)
        n_key = min(<int64_t>PE_PAGE, first + 1 - block * PE_PAGE)  # what the first query sees; in the last block others see more
        n_seen = min(<int64_t>PE_PAGE, last + 1 - block * PE_PAGE)
        keys.panels = keys_in_float32(&a.layout, head_keys, n_seen, scratch)
        if n_query == 1:  # decoding waits for memory: what comes next is fetched meanwhile
            pe_prefetch(head_keys + key_bytes(&a.layout), value_bytes(&a.layout))
        simd.matmul_f32(q, stride, n_query, &keys, 0, (n_seen + PE_LANES - 1) // PE_LANES, &scores)
        for i in range(n_query):
            decay[i] = simd.softmax_block(weights + i * PE_PAGE, min(<int64_t>PE_PAGE, first + i + 1 - block * PE_PAGE), a.scale,
                                          states + i * STATE, weights + i * PE_PAGE)
        values.panels = values_in_float32(&a.layout, head_keys, n_seen, scratch)  # keys are no longer needed
        if n_query == 1 and block + 1 < n_block:
            pe_prefetch(keys_of(a, segment.pages[block + 1], kv_head), key_bytes(&a.layout))
        simd.accumulate_f32(weights, PE_PAGE, n_query, n_key, &values, width // PE_LANES, decay, sums, width)
    # The rest of the last block, key by key as if the sum had gone on: a query sees one key more than the one before it.
    decay[0] = 1.0
    values.panels = values.panels + n_key * PE_LANES
    for i in range(1, n_query):
        simd.accumulate_f32(weights + i * PE_PAGE + n_key, PE_PAGE, 1, i, &values, width // PE_LANES, decay,
                            sums + i * width, width)
    for i in range(n_query):
        simd.softmax_end(states + i * STATE, sums + i * width, width)
        memcpy(out + (row + i) * out_stride + head * d, sums + i * width, d * sizeof(float))


cdef class KVLayout:
    """What a KV page of a model with these dimensions looks like."""

    page_positions = PE_PAGE

    def __cinit__(self, int64_t n_layer, int64_t n_kv_head, int64_t head_dim, dtype):
        if dtype not in KV_DTYPES:
            raise ArgumentError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {dtype!r}")
        self.layout.dtype = {"float32": KV_FLOAT32, "bfloat16": KV_BFLOAT16, "int8": KV_INT8}[dtype]
        self.layout.n_layer, self.layout.n_kv_head, self.layout.head_dim = n_layer, n_kv_head, head_dim
        self.layout.value_width = (head_dim + PE_LANES - 1) // PE_LANES * PE_LANES

    @property
    def page_nbytes(self):
        """The memory of one page."""
        return page_bytes(&self.layout)

    def copy(self, Block src, Block dst, int64_t n):
        """Copies the first n positions of a page to another page."""
        cdef size_t nbytes = self.page_nbytes
        if not 0 <= n <= PE_PAGE or src.nbytes < nbytes or dst.nbytes < nbytes:
            raise ArgumentError(f"n: expected 0..{PE_PAGE} positions of pages of {nbytes} bytes, got {n}")
        cdef int64_t row = PE_LANES * self.layout.dtype  # bytes of a panel's row
        cdef int64_t key_rows = (n + PE_LANES - 1) // PE_LANES * self.layout.head_dim, i, at
        cdef int64_t keys = key_bytes(&self.layout), values = value_bytes(&self.layout), head = head_bytes(&self.layout)
        cdef char *a = <char *>src.data
        cdef char *b = <char *>dst.data
        with nogil:
            for _ in range(self.layout.n_layer * self.layout.n_kv_head):
                memcpy(b, a, key_rows * row)
                for i in range(self.layout.value_width // PE_LANES):
                    at = keys + i * PE_PAGE * row
                    memcpy(b + at, a + at, n * row)
                memcpy(b + keys + values, a + keys + values, head - keys - values)  # the scales, if any
                a += head
                b += head


cdef struct AttendTask:
    Attention attention
    Segment segment
    const float *qkv
    int64_t stride
    float *scratch
    float *out
    int64_t out_stride


cdef void attend_body(void *context, Worker *worker) noexcept nogil:
    cdef AttendTask *task = <AttendTask *>context
    cdef float *scratch = task.scratch + worker.index * attention_scratch(&task.attention.layout)
    attend(worker, &task.attention, task.qkv, task.stride, &task.segment, 1, scratch, task.out, task.out_stride)


def attention(const float[:, ::1] qkv, int64_t n_head, int64_t n_kv_head, int64_t head_dim, float scale, int threads=1,
              kv_dtype="float32"):
    """Causal self-attention of one whole sequence, as the engine computes it.

    qkv is float32 [n_rows, (n_head + 2 n_kv_head) head_dim]; returns float32 [n_rows, n_head head_dim].
    """
    cdef KVLayout layout = KVLayout(1, n_kv_head, head_dim, kv_dtype)
    cdef int64_t n_row = qkv.shape[0], n_page = (n_row + PE_PAGE - 1) // PE_PAGE
    if n_row == 0 or n_head % n_kv_head or qkv.shape[1] != (n_head + 2 * n_kv_head) * head_dim:
        raise ArgumentError(f"qkv: expected [n_rows, {(n_head + 2 * n_kv_head) * head_dim}], got [{n_row}, {qkv.shape[1]}]")
    pages = [Block(layout.page_nbytes, "KV page") for _ in range(n_page)]
    table = np.array([page.address for page in pages], np.uintp)
    cdef uintptr_t[::1] addresses = table
    out = np.empty((n_row, n_head * head_dim), np.float32)
    cdef float[:, ::1] view = out
    cdef Block scratch = Block(threads * attention_scratch(&layout.layout) * sizeof(float), "scratch for attention")
    cdef AttendTask task
    task.attention.layer, task.attention.n_head, task.attention.scale = 0, n_head, scale
    task.attention.layout = layout.layout
    task.segment.row, task.segment.n_row, task.segment.position = 0, n_row, 0
    task.segment.pages = <void **>&addresses[0]
    task.qkv, task.stride, task.scratch = &qkv[0, 0], qkv.shape[1], <float *>scratch.data
    task.out, task.out_stride = &view[0, 0], view.shape[1]
    run(threads, 2, attend_body, &task)
    return out
