# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Scaled causal self-attention over KV pages: the loops over sequences, heads, tiles of queries and blocks of keys.

A query meets the keys in blocks of 64 at absolute positions, in order, and the online softmax (Milakov & Gimelshein 2018)
merges them. So its result doesn't depend on the queries beside it: a prompt gives the same bits in one piece, in chunks, and
token by token. With pages in bfloat16, queries and the softmax's weights are rounded to it too, and products are those of
bfloat16; a block of a page in int8 is widened to float32 before a query meets it, in memory for many queries, in registers for one.
"""

import numpy as np

from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int64_t, uint16_t, uintptr_t
from libc.string cimport memcpy, memset

from .kernels cimport PE_LANES, PE_PAGE, pe_output, pe_weights_bf16, pe_weights_f32
from .memory cimport Block
from .pages cimport (
    KV_BFLOAT16, KV_INT8, KVLayout, PageLayout, keys_of, prefetch, prefetch_scales, scales_of, store, store_bf16,
    store_scratch, values_of,
)
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

from ..errors import ArgumentError

cdef enum:
    UNITS_PER_THREAD = 16
    TILE = 32  # queries that share a pass over the keys
    GROUP = PE_LANES  # of these, as many as go through the softmax together, and meet the keys of their own block
    AHEAD = 8  # at most so many blocks between the one that a query meets and the one that is fetched: they lie in the L2 cache
    STATE = (1 + GROUP) * PE_LANES  # what a group's online softmax remembers: maxima, sums of weights

# What one head of one tile of queries works with; arrays are parts of the thread's scratch.
cdef struct Tile:
    const float *q  # [n_query, head_dim], `stride` apart
    const uint16_t *q_bf16  # the same in bfloat16, q_bf16_stride apart
    int64_t stride, q_bf16_stride, n_query
    float *block  # [64, value_width]: keys or values of a page in int8, widened
    uint16_t *narrowed  # [TILE, value_width]: where queries become bfloat16
    uint16_t *weights_bf16  # [TILE, 64]
    float *weights  # [TILE, 64]: scores, then the softmax's weights, unless they are in bfloat16
    float *sums  # [TILE, value_width]
    float *states  # [TILE / GROUP, STATE]
    float *decay  # [TILE]
    char *next  # keys of the block that is fetched while this one is met, or NULL

# A head of a sequence that decodes.
cdef struct Head:
    const Segment *segment  # NULL: none
    int64_t kv_head


cdef int64_t attention_scratch(const PageLayout *layout) noexcept nogil:
    """Floats that a thread needs."""
    cdef int64_t narrow = TILE * (layout.value_width + PE_PAGE) if layout.dtype == KV_BFLOAT16 else 0
    cdef int64_t block = PE_PAGE * layout.value_width if layout.dtype == KV_INT8 else 0
    cdef int64_t floats = TILE * (PE_PAGE + layout.value_width + 1) + TILE // GROUP * STATE
    return max(store_scratch(layout), block + narrow // 2 + floats)


cdef Tile tile_in(const PageLayout *layout, float *scratch) noexcept nogil:
    cdef Tile tile
    cdef int64_t width = layout.value_width
    memset(&tile, 0, sizeof(tile))
    if layout.dtype == KV_INT8:
        tile.block = scratch
        scratch += PE_PAGE * width
    elif layout.dtype == KV_BFLOAT16:
        tile.narrowed = <uint16_t *>scratch
        tile.weights_bf16 = tile.narrowed + TILE * width
        scratch += TILE * (width + PE_PAGE) // 2
    tile.weights = scratch
    tile.sums = tile.weights + TILE * PE_PAGE
    tile.states = tile.sums + TILE * width
    tile.decay = tile.states + TILE // GROUP * STATE
    return tile


cdef inline int64_t kv_head_of(const Attention *attention, int64_t head) noexcept nogil:
    return head // (attention.n_head // attention.layout.n_kv_head)


cdef inline int64_t n_tile_of(const Segment *segment) noexcept nogil:
    """Tiles start at multiples of TILE positions, so none crosses a block's border."""
    return (segment.position + segment.n_row - 1) // TILE - segment.position // TILE + 1


cdef inline void bounds(const Segment *segment, int64_t tile, int64_t *first, int64_t *end) noexcept nogil:
    """The first position of a segment's tile, and the one after its last."""
    first[0] = max(segment.position, (segment.position // TILE + tile) * TILE)
    end[0] = min(segment.position + segment.n_row, (segment.position // TILE + tile + 1) * TILE)


cdef void store_rows(const Attention *a, const Qkv *qkv, const Segment *segment, int64_t first, int64_t n, int64_t head,
                     float *scratch) noexcept nogil:
    """Appends a kv head's keys and values of n rows of a segment, from position `first` on, which lie in one panel."""
    cdef int64_t d = a.layout.head_dim, to_values = a.layout.n_kv_head * d
    cdef int64_t at = (segment.row + first - segment.position) * qkv.stride + (a.n_head + head) * d
    cdef void *page = segment.pages[first // PE_PAGE]
    if qkv.bf16 != NULL:
        store_bf16(&a.layout, page, a.layer, head, first % PE_PAGE, qkv.bf16 + at, qkv.bf16 + at + to_values, qkv.stride, n)
    else:
        store(&a.layout, page, a.layer, head, first % PE_PAGE, qkv.f32 + at, qkv.f32 + at + to_values, qkv.stride, n, scratch)


cdef void store_all(Worker *worker, const Attention *attention, const Qkv *qkv, const Segment *segments, int64_t n_segment,
                    float *scratch) noexcept nogil:
    """One phase: appends the rows' keys and values to the cache. A unit is a tile of positions."""
    cdef int64_t n_unit = 0, unit, s, before = 0, first, end, next, head
    for s in range(n_segment):
        n_unit += n_tile_of(&segments[s])
    s = 0
    unit = claim(worker, n_unit)
    while unit >= 0:
        if unit < before:  # of a share that lies before
            s = before = 0
        while unit - before >= n_tile_of(&segments[s]):
            before += n_tile_of(&segments[s])
            s += 1
        bounds(&segments[s], unit - before, &first, &end)
        while first < end:
            next = min((first // PE_LANES + 1) * PE_LANES, end)
            for head in range(attention.layout.n_kv_head):
                store_rows(attention, qkv, &segments[s], first, next - first, head, scratch)
            first = next
        unit = claim(worker, n_unit)
    sync(worker, n_unit)


cdef bint each_stores_its_own(const Attention *attention, const Segment *segments, int64_t n_segment) noexcept nogil:
    """Whether `attend` can append the key and value that nobody else reads in this step with each head: in decoding."""
    cdef int64_t s
    for s in range(n_segment):
        if segments[s].n_row > 1:
            return False
    return attention.n_head == attention.layout.n_kv_head


cdef Head head_of(const Attention *attention, const Segment *segments, int64_t n_segment, int64_t item) noexcept nogil:
    """What an item is, counted from the first of these segments on, if it decodes."""
    cdef Head result
    cdef int64_t s = 0
    result.segment, result.kv_head = NULL, 0
    while s < n_segment and item >= n_tile_of(&segments[s]) * attention.n_head:
        item -= n_tile_of(&segments[s]) * attention.n_head
        s += 1
    if s < n_segment and segments[s].n_row == 1:
        result.segment, result.kv_head = &segments[s], kv_head_of(attention, item)
    return result


cdef void attend(Worker *worker, const Attention *attention, const Qkv *qkv, const Segment *segments, int64_t n_segment,
                 const Segment *wanted, int64_t n_wanted, float *scratch, float *out, int64_t out_stride) noexcept nogil:
    """One or two phases: appends the segments' keys and values, then attention for those rows of them that are `wanted`. An item
    is one head of one tile of queries; a unit is some items that follow each other: of one sequence and one head first, so that
    its keys are still in the cache."""
    cdef int64_t n_item = 0, unit, run, item, s, before = 0, n, head, tile
    cdef Head then
    cdef bint storing = wanted == segments and each_stores_its_own(attention, segments, n_segment)
    if not storing:
        store_all(worker, attention, qkv, segments, n_segment, scratch)
    for s in range(n_wanted):
        n_item += n_tile_of(&wanted[s]) * attention.n_head
    run = max(n_item // (UNITS_PER_THREAD * worker.n_threads), <int64_t>1)
    s = 0
    unit = claim(worker, (n_item + run - 1) // run)
    while unit >= 0:
        for item in range(unit * run, min((unit + 1) * run, n_item)):
            if item < before:  # of a share that lies before
                s = before = 0
            n = n_tile_of(&wanted[s])
            while item - before >= n * attention.n_head:
                before += n * attention.n_head
                s += 1
                n = n_tile_of(&wanted[s])
            head = (item - before) // n
            tile = n - 1 - (item - before) % n  # the last tiles have the most keys: they go first
            if storing:
                store_rows(attention, qkv, &wanted[s], wanted[s].position, 1, head, scratch)
            then = head_of(attention, wanted + s, n_wanted - s, item + 1 - before)
            attend_tile(attention, qkv, &wanted[s], tile, head, &then, scratch, out, out_stride)
        unit = claim(worker, (n_item + run - 1) // run)
    sync(worker, (n_item + run - 1) // run)


cdef void score(const PageLayout *layout, const Tile *tile, char *keys, int64_t n) noexcept nogil:
    """tile.weights = the products of the queries with the first n keys of a block."""
    cdef int64_t n_panel = (n + PE_LANES - 1) // PE_LANES
    cdef pe_weights_bf16 keys_bf16
    cdef pe_weights_f32 keys_f32
    cdef pe_output out
    if layout.dtype == KV_INT8 and tile.n_query == 1:
        kernels().score_q8(tile.q, layout.head_dim, <const int8_t *>keys, scales_of(layout, keys), n_panel, tile.next, tile.weights)
        return
    memset(&out, 0, sizeof(out))
    out.out, out.out_stride = tile.weights, PE_PAGE
    keys_bf16.next = keys_f32.next = tile.next
    if layout.dtype == KV_BFLOAT16:
        keys_bf16.panels, keys_bf16.k = <const uint16_t *>keys, layout.key_width
        kernels().matmul_bf16(tile.q_bf16, tile.q_bf16_stride, tile.n_query, &keys_bf16, 0, n_panel, &out)
        return
    keys_f32.panels, keys_f32.k = <const float *>keys, layout.head_dim
    if layout.dtype == KV_INT8:
        kernels().widen_keys_q8(<const int8_t *>keys, scales_of(layout, keys), n_panel, layout.head_dim, tile.block)
        keys_f32.panels = tile.block
    kernels().matmul_f32(tile.q, tile.stride, tile.n_query, &keys_f32, 0, n_panel, &out)


cdef void add_values(const PageLayout *layout, const Tile *tile, char *keys, int64_t n_first, int64_t step) noexcept nogil:
    """tile.sums = tile.decay * tile.sums + the weighted values of a block. The first query sees n_first of them, and each next
    one `step` more."""
    cdef int64_t n_panel = layout.value_width // PE_LANES, n_last = n_first + step * (tile.n_query - 1)
    cdef char *at = values_of(layout, keys)
    cdef const char *next = values_of(layout, tile.next) if tile.next != NULL else NULL
    cdef pe_weights_bf16 values_bf16
    cdef pe_weights_f32 values_f32
    if layout.dtype == KV_INT8 and tile.n_query == 1:
        kernels().accumulate_q8(tile.weights, n_first, <const int8_t *>at, scales_of(layout, keys) + PE_PAGE, n_panel, next,
                                tile.decay[0], tile.sums)
        return
    values_bf16.next = values_f32.next = next
    if layout.dtype == KV_BFLOAT16:
        values_bf16.panels, values_bf16.k = <const uint16_t *>at, PE_PAGE
        kernels().accumulate_bf16(tile.weights_bf16, PE_PAGE, tile.n_query, n_last, &values_bf16, n_panel, tile.decay, tile.sums,
                                  layout.value_width)
        return
    values_f32.panels, values_f32.k = <const float *>at, PE_PAGE
    if layout.dtype == KV_INT8:
        kernels().widen_values_q8(<const int8_t *>at, scales_of(layout, keys) + PE_PAGE, n_last, n_panel, tile.block)
        values_f32.panels = tile.block
    kernels().accumulate_f32(tile.weights, PE_PAGE, tile.n_query, n_first, step, &values_f32, n_panel, tile.decay, tile.sums,
                             layout.value_width)


cdef Tile part_of(const PageLayout *layout, const Tile *tile, int64_t first, int64_t n) noexcept nogil:
    """n queries of a tile, from `first` on, a multiple of GROUP."""
    cdef Tile part = tile[0]
    part.n_query = n
    part.q += first * tile.stride
    if tile.weights_bf16 != NULL:
        part.q_bf16 += first * tile.q_bf16_stride
        part.weights_bf16 += first * PE_PAGE
    part.weights += first * PE_PAGE
    part.sums += first * layout.value_width
    part.states += first // GROUP * STATE
    part.decay += first
    return part


cdef inline void reset(float *state, int64_t n) noexcept nogil:
    """The state of n queries that have met no key."""
    cdef int64_t i
    for i in range(GROUP):
        state[i] = -INFINITY
    memset(state + GROUP, 0, n * PE_LANES * sizeof(float))


cdef void meet(const Attention *a, const Tile *tile, char *keys, int64_t n_first, int64_t step) noexcept nogil:
    """The tile's queries meet a block: the first query sees n_first of its keys, and each next one `step` more."""
    cdef int64_t i = 0
    score(&a.layout, tile, keys, n_first + step * (tile.n_query - 1))
    while i < tile.n_query:
        kernels().softmax_rows(
            tile.weights + i * PE_PAGE, min(<int64_t>GROUP, tile.n_query - i), n_first + step * i, step, a.scale,
            tile.states + i // GROUP * STATE, tile.decay + i,
            tile.weights_bf16 + i * PE_PAGE if tile.weights_bf16 != NULL else NULL)
        i += GROUP
    add_values(&a.layout, tile, keys, n_first, step)


cdef inline int64_t n_seen(const Segment *segment, int64_t block) noexcept nogil:
    """How many keys of a block the only query of a segment sees."""
    return min(<int64_t>PE_PAGE, segment.position + 1 - block * PE_PAGE)


cdef void fetch_ahead(const Attention *a, Tile *tile, const Segment *segment, int64_t kv_head, const Head *then,
                      int64_t block) noexcept nogil:
    """Decoding waits for memory: what this thread will meet is fetched while a query meets a block. Tiles ask for a line whenever
    they read one: asked for all at once, lines come no faster, and then memory idles while the tiles compute. So it is done only
    where blocks aren't as long; with few blocks, the same one of the next head is."""
    cdef int64_t n_block = segment.position // PE_PAGE + 1, ahead = block + min(n_block, <int64_t>AHEAD), n = n_seen(segment, block)
    cdef char *keys
    tile.next = NULL
    if segment.n_row > 1:
        return
    if ahead >= n_block:
        segment, kv_head, ahead = then.segment, then.kv_head, ahead - n_block
        if segment == NULL or n_seen(segment, ahead) <= 0:
            return
    keys = keys_of(&a.layout, segment.pages[ahead], a.layer, kv_head)
    if (n_seen(segment, ahead) + PE_LANES - 1) // PE_LANES == (n + PE_LANES - 1) // PE_LANES:
        tile.next = keys
        if a.layout.dtype == KV_INT8:
            prefetch_scales(&a.layout, keys)
    else:
        prefetch(&a.layout, keys, n_seen(segment, ahead))


cdef void attend_tile(const Attention *a, const Qkv *qkv, const Segment *segment, int64_t index, int64_t head,
                      const Head *then, float *scratch, float *out, int64_t out_stride) noexcept nogil:
    """One head of the queries whose positions lie in one tile. `then`: what this thread does next."""
    cdef const PageLayout *layout = &a.layout
    cdef int64_t d = layout.head_dim, width = layout.value_width, first, end, block, i, start
    bounds(segment, index, &first, &end)
    cdef int64_t row = segment.row + first - segment.position, last_block = first // PE_PAGE
    cdef int64_t kv_head = kv_head_of(a, head)
    cdef Tile tile = tile_in(layout, scratch), part
    tile.q, tile.stride, tile.n_query = qkv.f32 + row * qkv.stride + head * d, qkv.stride, end - first
    tile.q_bf16, tile.q_bf16_stride = tile.narrowed, width
    if qkv.bf16 != NULL:
        tile.q_bf16, tile.q_bf16_stride = qkv.bf16 + row * qkv.stride + head * d, qkv.stride
    elif layout.dtype == KV_BFLOAT16:
        for i in range(tile.n_query):
            kernels().narrow_bf16(tile.q + i * tile.stride, d, tile.narrowed + i * width)
    memset(tile.sums, 0, tile.n_query * width * sizeof(float))
    for i in range((tile.n_query + GROUP - 1) // GROUP):
        reset(tile.states + i * STATE, min(<int64_t>GROUP, tile.n_query - i * GROUP))
    for block in range(last_block):
        fetch_ahead(a, &tile, segment, kv_head, then, block)
        meet(a, &tile, keys_of(layout, segment.pages[block], a.layer, kv_head), PE_PAGE, 0)
    fetch_ahead(a, &tile, segment, kv_head, then, last_block)
    start = first - last_block * PE_PAGE
    i = 0
    while i < tile.n_query:  # few at a time, since they don't see what lies behind them
        part = part_of(layout, &tile, i, min(<int64_t>GROUP, tile.n_query - i))
        meet(a, &part, keys_of(layout, segment.pages[last_block], a.layer, kv_head), start + i + 1, 1)
        i += GROUP
    for i in range(tile.n_query):
        kernels().softmax_end(tile.states + i // GROUP * STATE + (1 + i % GROUP) * PE_LANES, tile.sums + i * width, width)
        memcpy(out + (row + i) * out_stride + head * d, tile.sums + i * width, d * sizeof(float))


cdef struct AttendTask:
    Attention attention
    Segment segment
    Qkv qkv
    float *scratch
    float *out
    int64_t out_stride


cdef void attend_body(void *context, Worker *worker) noexcept nogil:
    cdef AttendTask *task = <AttendTask *>context
    cdef float *scratch = task.scratch + worker.index * attention_scratch(&task.attention.layout)
    attend(worker, &task.attention, &task.qkv, &task.segment, 1, &task.segment, 1, scratch, task.out, task.out_stride)


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
    task.qkv.f32, task.qkv.bf16, task.qkv.stride, task.scratch = &qkv[0, 0], NULL, qkv.shape[1], <float *>scratch.data
    task.out, task.out_stride = &view[0, 0], view.shape[1]
    run(threads, 2, attend_body, &task)
    return out
