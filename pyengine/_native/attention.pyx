# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Scaled causal self-attention over KV pages: the loops over sequences, heads, tiles of queries and blocks of keys.

A query meets the keys in blocks of 64 at absolute positions, in order, and the online softmax (Milakov & Gimelshein 2018)
merges them. So its result doesn't depend on the queries beside it: a prompt gives the same bits in one piece, in chunks, and
token by token.
"""

import numpy as np

from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy, memset

from .kernels cimport PE_LANES, PE_PAGE, pe_kernels, pe_output, pe_weights_f32
from .memory cimport Block
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

from ..errors import ArgumentError

cdef enum:
    TILE = 16  # positions: queries that share a pass over the keys, and keys in a panel
    STATE = 2 * PE_LANES


cdef int64_t page_floats(const PageLayout *layout) noexcept nogil:
    return layout.n_layer * layout.n_kv_head * PE_PAGE * (layout.head_dim + layout.value_width)


cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil:
    """Floats that a thread needs: weights, outputs, states and decays of one tile."""
    return TILE * (PE_PAGE + layout.value_width + STATE + 1)


cdef inline float *keys_of(const Attention *a, float *page, int64_t head) noexcept nogil:
    return page + (a.layer * a.layout.n_kv_head + head) * PE_PAGE * (a.layout.head_dim + a.layout.value_width)


cdef void store_rows(const Attention *a, const float *qkv, int64_t stride, const Segment *segment, int64_t first,
                     int64_t n) noexcept nogil:
    """Appends the keys and values of n rows of a segment, from position `first` on, which lie in one tile."""
    cdef int64_t d = a.layout.head_dim, width = a.layout.value_width, slot = first % PE_PAGE, h, i, r, part
    cdef float *page = segment.pages[first // PE_PAGE]
    cdef const float *k = qkv + (segment.row + first - segment.position) * stride + a.n_head * d
    cdef const float *v = k + a.layout.n_kv_head * d
    cdef float *keys
    cdef float *values
    cdef float *value
    for h in range(a.layout.n_kv_head):
        keys = keys_of(a, page, h)
        values = keys + PE_PAGE * d + slot * PE_LANES
        keys += slot // PE_LANES * d * PE_LANES + slot % PE_LANES
        for i in range(d):
            for r in range(n):
                keys[i * PE_LANES + r] = k[r * stride + h * d + i]
        for r in range(n):
            for i in range(width // PE_LANES):
                part = min(<int64_t>PE_LANES, d - i * PE_LANES)
                value = values + (i * PE_PAGE + r) * PE_LANES
                memcpy(value, v + r * stride + h * d + i * PE_LANES, part * sizeof(float))
                memset(value + part, 0, (PE_LANES - part) * sizeof(float))


cdef void store_kv(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                   int64_t n_segment) noexcept nogil:
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
        store_rows(attention, qkv, stride, &segments[s], first, last - first + 1)
        unit = claim(worker, n_unit)
    sync(worker, n_unit)


cdef inline int64_t n_tile_of(const Segment *segment) noexcept nogil:
    """Tiles start at multiples of TILE positions, so none crosses a block's border."""
    return (segment.position + segment.n_row - 1) // TILE - segment.position // TILE + 1


cdef inline void bounds(const Segment *segment, int64_t tile, int64_t *first, int64_t *last) noexcept nogil:
    """The first and last position of a segment's tile."""
    first[0] = max(segment.position, (segment.position // TILE + tile) * TILE)
    last[0] = min(segment.position + segment.n_row, (segment.position // TILE + tile + 1) * TILE) - 1


cdef void attend(Worker *worker, const Attention *attention, const float *qkv, int64_t stride, const Segment *segments,
                 int64_t n_segment, float *scratch, float *out, int64_t out_stride) noexcept nogil:
    """One phase: attention, once all keys and values are stored. A unit is a tile of queries and a head."""
    cdef int64_t n_unit = 0, unit, s, before = 0, n, tile, head
    for s in range(n_segment):
        n_unit += n_tile_of(&segments[s]) * attention.n_head
    s = 0
    unit = claim(worker, n_unit)
    while unit >= 0:
        n = n_tile_of(&segments[s])
        while unit - before >= n * attention.n_head:
            before += n * attention.n_head
            s += 1
            n = n_tile_of(&segments[s])
        # The last tiles of a prompt have the most keys: they go first, so that no thread ends with one.
        tile = n - 1 - (unit - before) // attention.n_head
        head = (unit - before) % attention.n_head
        attend_tile(attention, qkv, stride, &segments[s], tile, head, scratch, out, out_stride)
        unit = claim(worker, n_unit)
    sync(worker, n_unit)


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
    cdef float *weights = scratch  # [TILE, 64]
    cdef float *sums = weights + TILE * PE_PAGE  # [TILE, value_width]
    cdef float *states = sums + TILE * width  # [TILE, 32]
    cdef float *decay = states + TILE * STATE  # [TILE]
    cdef pe_weights_f32 keys, values
    cdef pe_output scores
    cdef int64_t block, n_block = first // PE_PAGE + 1, n_key = 0, i
    memset(sums, 0, n_query * width * sizeof(float))
    memset(states, 0, n_query * STATE * sizeof(float))
    memset(&scores, 0, sizeof(scores))
    scores.out, scores.out_stride = weights, PE_PAGE
    keys.k, values.k = d, PE_PAGE
    for i in range(n_query):
        states[i * STATE] = -INFINITY
    for block in range(n_block):
        keys.panels = keys_of(a, segment.pages[block], kv_head)
        values.panels = keys.panels + PE_PAGE * d
        n_key = min(<int64_t>PE_PAGE, first + 1 - block * PE_PAGE)  # what the first query sees; in the last block others see more
        simd.matmul_f32(q, stride, n_query, &keys, 0, PE_PAGE // PE_LANES, &scores)
        for i in range(n_query):
            decay[i] = simd.softmax_block(weights + i * PE_PAGE, min(<int64_t>PE_PAGE, first + i + 1 - block * PE_PAGE), a.scale,
                                          states + i * STATE, weights + i * PE_PAGE)
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

    def __cinit__(self, int64_t n_layer, int64_t n_kv_head, int64_t head_dim):
        self.layout.n_layer, self.layout.n_kv_head, self.layout.head_dim = n_layer, n_kv_head, head_dim
        self.layout.value_width = (head_dim + PE_LANES - 1) // PE_LANES * PE_LANES

    @property
    def page_nbytes(self):
        """The memory of one page."""
        return page_floats(&self.layout) * sizeof(float)

    def copy(self, Block src, Block dst, int64_t n):
        """Copies the first n positions of a page to another page."""
        cdef size_t nbytes = self.page_nbytes
        if not 0 <= n <= PE_PAGE or src.nbytes < nbytes or dst.nbytes < nbytes:
            raise ArgumentError(f"n: expected 0..{PE_PAGE} positions of pages of {nbytes} bytes, got {n}")
        cdef int64_t keys = PE_PAGE * self.layout.head_dim, values = PE_PAGE * self.layout.value_width, i
        cdef int64_t key_floats = (n + PE_LANES - 1) // PE_LANES * PE_LANES * self.layout.head_dim
        cdef float *a = <float *>src.data
        cdef float *b = <float *>dst.data
        with nogil:
            for _ in range(self.layout.n_layer * self.layout.n_kv_head):
                memcpy(b, a, key_floats * sizeof(float))
                for i in range(self.layout.value_width // PE_LANES):
                    memcpy(b + keys + i * PE_PAGE * PE_LANES, a + keys + i * PE_PAGE * PE_LANES, n * PE_LANES * sizeof(float))
                a += keys + values
                b += keys + values


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
    store_kv(worker, &task.attention, task.qkv, task.stride, &task.segment, 1)
    attend(worker, &task.attention, task.qkv, task.stride, &task.segment, 1,
           task.scratch + worker.index * attention_scratch(&task.attention.layout), task.out, task.out_stride)


def attention(const float[:, ::1] qkv, int64_t n_head, int64_t n_kv_head, int64_t head_dim, float scale, int threads=1):
    """Causal self-attention of one whole sequence, as the engine computes it.

    qkv is float32 [n_rows, (n_head + 2 n_kv_head) head_dim]; returns float32 [n_rows, n_head head_dim].
    """
    cdef KVLayout layout = KVLayout(1, n_kv_head, head_dim)
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
    task.segment.pages = <float **>&addresses[0]
    task.qkv, task.stride, task.scratch = &qkv[0, 0], qkv.shape[1], <float *>scratch.data
    task.out, task.out_stride = &view[0, 0], view.shape[1]
    run(threads, 2, attend_body, &task)
    return out
