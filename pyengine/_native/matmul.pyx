# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Matrix products with packed weights: what these look like, and the loops over threads, rows and panels."""

import numpy as np

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from .kernels cimport (
    PE_ACT_NONE, PE_GROUP, PE_LANES, PE_Q4_GROUP, pe_activation, pe_kernels, pe_output, pe_rows_q8,
)
from .memory cimport Arena, Block, pe_touch
from .parallel cimport Share, Worker, claim, claim_rows, pe_share_first, run, share_of, sync
from .simd cimport kernels

from ..errors import ArgumentError

DTYPES = ("float32", "bfloat16", "int8", "int4")

# A unit of work: so many columns of all rows, or of a block of rows where there are many. With at most FEW_ROWS a product is cut
# into some units a thread, of at least 4 panels and UNIT_BYTES: what others can help it with at the end. Smaller ones gain nothing.
cdef enum:
    BLOCK_ROWS = 96  # at most
    TILE_ROWS = 12  # blocks but the last have whole tiles
    BAND_ROWS = 64  # at least
    BLOCK_PANELS = 8
    UNITS_PER_THREAD = 8
    UNIT_BYTES = 32768
    TILE_PANELS = 4

# How a product is cut into units. Many rows are bands first, one for each thread: the thread that normalised them, or multiplied them
# before, so that it finds them in its own caches. Within a band all blocks of rows meet some panels before the next ones.
cdef struct Blocks:
    int64_t n_row, n_panel, rows, panels  # of all, and of a block
    int64_t band_rows, row_blocks, band_units, n_unit

# What a unit computes.
cdef struct Part:
    int64_t row, rows, panel, panels


cdef extern from *:
    """static const int8_t pe_codebook[16] = PE_Q4_CODEBOOK;"""
    const int8_t *CODEBOOK "pe_codebook"


cdef class PackedMatrix:
    """A weight [n_out, n_in] in panels of 16 output columns, as csrc/kernels.h lays them out; `dtype` is one of DTYPES."""

    def __cinit__(self, int64_t n_out, int64_t n_in, str dtype, Arena arena=None):
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.n_out, self.n_in, self.dtype, self.unscale = n_out, n_in, dtype, None
        cdef int64_t columns = self.n_panel * PE_LANES
        what = f"weight [{n_out}, {n_in}] in {dtype}"
        if dtype == "float32":
            self.format, self.input = F32, FLOAT32
            self.panels = Block(columns * n_in * sizeof(float), what, arena)
            self.f32.panels, self.f32.k = <const float *>self.panels.data, n_in
        elif dtype == "bfloat16":
            self.format, self.input = BF16, BFLOAT16
            self.panels = Block(columns * whole(n_in, 2) * sizeof(uint16_t), what, arena)
            self.bf16.panels, self.bf16.k = <const uint16_t *>self.panels.data, n_in
        elif dtype == "int8":
            self.format, self.input = Q8, INT8
            self.panels = Block(columns * whole(n_in, 4), what, arena)
            self.column_sum = Block(columns * (whole(n_in, PE_GROUP) // PE_GROUP) * sizeof(int16_t), what, arena)
            self.scale = Block(columns * sizeof(float), what, arena)
            self.q8.panels, self.q8.k = <const int8_t *>self.panels.data, n_in
            self.q8.column_sum, self.q8.scale = <const int16_t *>self.column_sum.data, <const float *>self.scale.data
        else:
            self.format, self.input = Q4, INT8
            self.panels = Block(columns * whole(n_in, PE_Q4_GROUP) // 2, what, arena)
            self.scale = Block(columns * (whole(n_in, PE_Q4_GROUP) // PE_Q4_GROUP) * sizeof(uint16_t), what, arena)
            self.q4.panels, self.q4.k = <const uint8_t *>self.panels.data, n_in
            self.weight_sum = Block(columns * (whole(n_in, PE_GROUP) // PE_GROUP) * sizeof(float), what, arena)
            self.q4.scale, self.q4.weight_sum = <const uint16_t *>self.scale.data, <const float *>self.weight_sum.data

    @property
    def n_panel(self):
        """How many panels the columns fill."""
        return (self.n_out + PE_LANES - 1) // PE_LANES

    @property
    def nbytes(self):
        """The memory of the packed weight."""
        return sum(part.nbytes for part in (self.panels, self.column_sum, self.weight_sum, self.scale) if part is not None)

    @property
    def parts(self):
        """All memory that a product or a row depends on, as buffers of bytes; without weight_sum, which follows from the rest."""
        unscale = None if self.unscale is None else np.asarray(self.unscale).view(np.uint8)
        return [part for part in (self.panels, self.column_sum, self.scale, unscale) if part is not None]

    def row(self, int64_t n):
        """Row n of the weight as it is computed with, in_scale undone: float32 [n_in]."""
        if not 0 <= n < self.n_out:
            raise ArgumentError(f"row: expected 0..{self.n_out - 1}, got {n}")
        out = np.empty(self.n_in, np.float32)
        cdef float[::1] view = out
        read_row(self, n, &view[0])
        return out


cdef float *room_for_panel(PackedMatrix matrix, int64_t panel, float *scratch) noexcept nogil:
    """Where to put a float32 panel [n_in][16] for pack_panel: in float32 that is its place."""
    return <float *>matrix.f32.panels + panel * matrix.n_in * PE_LANES if matrix.format == F32 else scratch


cdef void pack_panel(PackedMatrix matrix, const float *values, int64_t panel) noexcept nogil:
    """Puts a float32 panel, from where room_for_panel said, into the matrix."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t k = matrix.n_in, columns = panel * PE_LANES
    if matrix.format == BF16:
        simd.pack_bf16(values, k, <uint16_t *>matrix.bf16.panels + columns * whole(k, 2))
    elif matrix.format == Q8:
        simd.pack_q8(values, k, <int8_t *>matrix.q8.panels + columns * whole(k, 4), <float *>matrix.q8.scale + columns,
                     <int16_t *>matrix.q8.column_sum + columns * (whole(k, PE_GROUP) // PE_GROUP))
    elif matrix.format == Q4:
        simd.pack_q4(values, k, <uint8_t *>matrix.q4.panels + columns * whole(k, PE_Q4_GROUP) // 2,
                     <uint16_t *>matrix.q4.scale + columns * (whole(k, PE_Q4_GROUP) // PE_Q4_GROUP),
                     <float *>matrix.q4.weight_sum + columns * (whole(k, PE_GROUP) // PE_GROUP))


cdef void touch_share(Worker *worker, PackedMatrix matrix, size_t page) noexcept nogil:
    cdef int64_t n_panel = (matrix.n_out + PE_LANES - 1) // PE_LANES
    cdef Blocks all = few_rows(matrix, 1, n_panel, worker.n_threads)
    cdef int64_t first = min(n_panel, all.panels * pe_share_first(worker.index, worker.n_threads, all.n_unit))
    cdef int64_t last = min(n_panel, all.panels * pe_share_first(worker.index + 1, worker.n_threads, all.n_unit))
    touch_panels(matrix.panels, n_panel, first, last, page)
    if matrix.scale is not None:
        touch_panels(matrix.scale, n_panel, first, last, page)
    if matrix.column_sum is not None:
        touch_panels(matrix.column_sum, n_panel, first, last, page)
    if matrix.weight_sum is not None:
        touch_panels(matrix.weight_sum, n_panel, first, last, page)


cdef inline void touch_panels(Block part, int64_t n_panel, int64_t first, int64_t last, size_t page) noexcept nogil:
    cdef int64_t panel_bytes = part.nbytes // n_panel
    pe_touch(<char *>part.data + first * panel_bytes, (last - first) * panel_bytes, page)


cdef inline float from_bf16(uint16_t value) noexcept nogil:
    cdef uint32_t bits = <uint32_t>value << 16
    cdef float result
    memcpy(&result, &bits, sizeof(result))
    return result


cdef void read_row(PackedMatrix matrix, int64_t n, float *out) noexcept nogil:
    cdef int64_t k = matrix.n_in, i, panel = n // PE_LANES, lane = n % PE_LANES
    cdef const float *values
    cdef const uint16_t *pairs
    cdef const int8_t *quads
    cdef float scale
    if matrix.format == F32:
        values = matrix.f32.panels + panel * k * PE_LANES + lane
        for i in range(k):
            out[i] = values[i * PE_LANES]
    elif matrix.format == BF16:
        pairs = matrix.bf16.panels + panel * PE_LANES * whole(k, 2) + 2 * lane
        for i in range(k):
            out[i] = from_bf16(pairs[i // 2 * 2 * PE_LANES + i % 2])
    elif matrix.format == Q8:
        quads = matrix.q8.panels + panel * PE_LANES * whole(k, 4) + 4 * lane
        scale = matrix.q8.scale[n]
        for i in range(k):
            out[i] = scale * quads[i // 4 * 4 * PE_LANES + i % 4]
    else:
        read_row_q4(&matrix.q4, panel, lane, out)
    if matrix.unscale is not None:
        for i in range(k):
            out[i] = out[i] * matrix.unscale[i]


cdef void read_row_q4(const pe_weights_q4 *w, int64_t panel, int64_t lane, float *out) noexcept nogil:
    cdef int64_t n_group = whole(w.k, PE_Q4_GROUP) // PE_Q4_GROUP, i
    cdef const uint8_t *octets = w.panels + panel * PE_LANES * n_group * PE_Q4_GROUP // 2 + 4 * lane
    cdef const uint16_t *scale = w.scale + panel * PE_LANES * n_group + lane
    cdef int code
    for i in range(w.k):
        code = octets[i // 8 * 4 * PE_LANES + i % 4] >> (i // 4 % 2 * 4) & 15
        out[i] = from_bf16(scale[i // PE_Q4_GROUP * PE_LANES]) * CODEBOOK[code]


cdef class NarrowRows:
    """Room for copies of `n_row` rows of up to `width` values, in int8 or bfloat16; none for float32."""

    def __cinit__(self, int64_t n_row, int64_t width, Input input):
        self.input = input
        if input == FLOAT32:
            return
        self.q8.stride = whole(width, PE_GROUP)
        cdef int64_t n_group = n_row * (self.q8.stride // PE_GROUP)
        self.values = Block(n_row * self.q8.stride * (2 if input == BFLOAT16 else 1), "narrow activations")
        memset(self.values.data, 0, self.values.nbytes)
        self.bf16, self.q8.q = <const uint16_t *>self.values.data, <const uint8_t *>self.values.data
        if input == INT8:
            self.scale = Block(n_group * sizeof(float), "narrow activations")
            self.offset = Block(n_group * sizeof(int32_t), "narrow activations")
            self.q8.scale, self.q8.offset = <const float *>self.scale.data, <const int32_t *>self.offset.data


cdef void narrow_row(const float *x, int64_t n, NarrowRows rows, int64_t row) noexcept nogil:
    narrow_part(x, n, rows, row, 0)


cdef void narrow_part(const float *x, int64_t n, NarrowRows rows, int64_t row, int64_t column) noexcept nogil:
    """Values of a row from a column on, which is a multiple of PE_GROUP."""
    cdef int64_t at = row * rows.q8.stride + column, group = at // PE_GROUP
    if rows.input == BFLOAT16:
        kernels().narrow_bf16(x, n, <uint16_t *>rows.bf16 + at)
    else:
        kernels().quantize_q8(x, n, <uint8_t *>rows.q8.q + at, <float *>rows.q8.scale + group, <int32_t *>rows.q8.offset + group)


cdef void block_product(PackedMatrix weight, const float *x, int64_t x_stride, NarrowRows narrow, int64_t first_narrow,
                        int64_t row, int64_t n_row, int64_t panel, int64_t n_panel, const pe_output *out) noexcept nogil:
    """Some panels of some rows, from `row` on; `out` starts there."""
    cdef const pe_kernels *simd = kernels()
    cdef pe_rows_q8 q8
    cdef int64_t narrow_row = first_narrow + row
    if weight.input == INT8:
        q8.stride = narrow.q8.stride
        q8.q = narrow.q8.q + narrow_row * q8.stride
        q8.scale = narrow.q8.scale + narrow_row * (q8.stride // PE_GROUP)
        q8.offset = narrow.q8.offset + narrow_row * (q8.stride // PE_GROUP)
    if weight.format == F32:
        simd.matmul_f32(x + row * x_stride, x_stride, n_row, &weight.f32, panel, n_panel, out)
    elif weight.format == BF16:
        simd.matmul_bf16(narrow.bf16 + narrow_row * narrow.q8.stride, narrow.q8.stride, n_row, &weight.bf16, panel, n_panel, out)
    elif weight.format == Q8:
        simd.matmul_q8(&q8, n_row, &weight.q8, panel, n_panel, out)
    else:
        simd.matmul_q4(&q8, n_row, &weight.q4, panel, n_panel, out)


cdef int64_t few_row_panels(PackedMatrix weight, int64_t n_panel, int64_t n_threads) noexcept nogil:
    """Panels of a unit where there are few rows: all if there is nobody to share them with."""
    if n_threads == 1:
        return n_panel
    cdef int64_t panels = max(n_panel // (UNITS_PER_THREAD * n_threads), UNIT_BYTES * n_panel // <int64_t>weight.panels.nbytes)
    return max(min(panels, n_panel // n_threads) // TILE_PANELS, <int64_t>1) * TILE_PANELS


cdef Blocks few_rows(PackedMatrix weight, int64_t n_row, int64_t n_panel, int64_t n_threads) noexcept nogil:
    cdef Blocks all
    all.n_row = all.rows = all.band_rows = n_row
    all.n_panel, all.panels, all.row_blocks = n_panel, few_row_panels(weight, n_panel, n_threads), 1
    all.n_unit = all.band_units = (n_panel + all.panels - 1) // all.panels
    return all


cdef Blocks many_rows(int64_t n_row, int64_t n_panel, int64_t n_threads) noexcept nogil:
    cdef Blocks all
    cdef int64_t n_band = max(<int64_t>1, min(n_threads, n_row // BAND_ROWS))
    all.n_row, all.n_panel, all.panels = n_row, n_panel, BLOCK_PANELS
    all.band_rows = (n_row + n_band - 1) // n_band
    cdef int64_t row_blocks = (all.band_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    all.rows = whole((all.band_rows + row_blocks - 1) // row_blocks, TILE_ROWS)
    all.row_blocks = (all.band_rows + all.rows - 1) // all.rows
    all.band_units = all.row_blocks * ((n_panel + BLOCK_PANELS - 1) // BLOCK_PANELS)
    all.n_unit = n_band * all.band_units
    return all


cdef Part part_of(const Blocks *all, int64_t unit) noexcept nogil:
    """What a unit computes; in the last band, which may be thinner, perhaps nothing."""
    cdef Part part
    cdef int64_t band = unit // all.band_units * all.band_rows
    unit = unit % all.band_units
    part.row, part.panel = band + unit % all.row_blocks * all.rows, unit // all.row_blocks * all.panels
    part.rows = max(<int64_t>0, min(all.rows, min(band + all.band_rows, all.n_row) - part.row))
    part.panels = min(all.panels, all.n_panel - part.panel)
    return part


cdef void linear(Worker *worker, PackedMatrix weight, const float *x, int64_t x_stride, NarrowRows narrow,
                 int64_t first_narrow, int64_t n_row, const pe_output *out, pe_activation activation) noexcept nogil:
    """One phase: out = activation(x W^T + bias) + residual. `narrow` is x as weight.input wants it, from row first_narrow on."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t n_panel = (weight.n_out + PE_LANES - 1) // PE_LANES, r
    cdef Blocks all = few_rows(weight, n_row, n_panel, worker.n_threads) if n_row <= FEW_ROWS else \
        many_rows(n_row, n_panel, worker.n_threads)
    cdef int64_t unit = claim(worker, all.n_unit)
    cdef Part part
    cdef pe_output to = out[0]
    while unit >= 0:
        part = part_of(&all, unit)
        to.out = out.out + part.row * out.out_stride
        if out.residual != NULL:
            to.residual = out.residual + part.row * out.residual_stride
        block_product(weight, x, x_stride, narrow, first_narrow, part.row, part.rows, part.panel, part.panels, &to)
        if activation != PE_ACT_NONE:
            for r in range(part.rows):
                simd.activate(activation, to.out + r * out.out_stride + part.panel * PE_LANES, part.panels * PE_LANES)
        unit = claim(worker, all.n_unit)
    sync(worker, all.n_unit)


cdef void linear_narrow(Worker *worker, PackedMatrix weight, NarrowRows narrow, int64_t n_row, const float *bias,
                        pe_activation activation, float *scratch, NarrowRows out) noexcept nogil:
    """One phase: out = activation(x W^T + bias), narrowed while it is in the cache, for a product that takes it so. A unit's
    columns are whole groups."""
    cdef int64_t n_panel = (weight.n_out + PE_LANES - 1) // PE_LANES
    cdef Blocks all = many_rows(n_row, n_panel, worker.n_threads)
    cdef int64_t unit = claim(worker, all.n_unit), r, columns
    cdef Part part
    cdef pe_output to
    memset(&to, 0, sizeof(to))
    to.bias, to.out_stride = bias, BLOCK_PANELS * PE_LANES
    while unit >= 0:
        part = part_of(&all, unit)
        to.out = scratch - part.panel * PE_LANES
        block_product(weight, NULL, 0, narrow, 0, part.row, part.rows, part.panel, part.panels, &to)
        columns = min(part.panels * PE_LANES, weight.n_out - part.panel * PE_LANES)
        for r in range(part.rows):
            kernels().activate(activation, scratch + r * to.out_stride, columns)
        for r in range(part.rows):
            narrow_part(scratch + r * to.out_stride, columns, out, part.row + r, part.panel * PE_LANES)
        unit = claim(worker, all.n_unit)
    sync(worker, all.n_unit)


cdef struct MatmulTask:
    void *weight
    void *narrow
    const float *x
    int64_t n_row
    pe_output out


cdef void matmul_body(void *context, Worker *worker) noexcept nogil:
    cdef MatmulTask *task = <MatmulTask *>context
    matmul_share(<PackedMatrix>task.weight, <NarrowRows>task.narrow, task, worker)


cdef void matmul_share(PackedMatrix weight, NarrowRows narrow, MatmulTask *task, Worker *worker) noexcept nogil:
    cdef int64_t row
    cdef Share share = share_of(worker, task.n_row)
    if weight.input != FLOAT32:
        while claim_rows(worker, &share):
            for row in range(share.first, share.last):
                narrow_row(task.x + row * weight.n_in, weight.n_in, narrow, row)
    linear(worker, weight, task.x, weight.n_in, narrow, 0, task.n_row, &task.out, PE_ACT_NONE)


def matmul(const float[:, ::1] x, PackedMatrix weight, int threads=1):
    """x W^T with a packed weight: float32 [n_rows, n_in] → float32 [n_rows, n_out], as the engine computes it."""
    if x.shape[1] != weight.n_in:
        raise ArgumentError(f"x: expected [n_rows, {weight.n_in}], got [{x.shape[0]}, {x.shape[1]}]")
    out = np.empty((x.shape[0], weight.n_panel * PE_LANES), np.float32)
    if x.shape[0] == 0:
        return out[:, : weight.n_out]
    cdef float[:, ::1] view = out
    cdef NarrowRows narrow = NarrowRows(x.shape[0], weight.n_in, weight.input)
    cdef MatmulTask task
    memset(&task, 0, sizeof(task))
    task.weight, task.narrow, task.x, task.n_row = <void *>weight, <void *>narrow, &x[0, 0], x.shape[0]
    task.out.out, task.out.out_stride = &view[0, 0], view.shape[1]
    run(threads, 2, matmul_body, &task)
    return out[:, : weight.n_out]


def quantize(const float[:, ::1] x):
    """Rows in int8, as the engine quantises activations: x is about scale (q + offset), by groups of 128 values.

    float32 [n_rows, n] → (uint8 [n_rows, n], float32 [n_rows, n_groups], int32 [n_rows, n_groups]).
    """
    cdef int64_t n_row = x.shape[0], n = x.shape[1], n_group = (n + PE_GROUP - 1) // PE_GROUP, row
    q = np.zeros((n_row, n_group * PE_GROUP), np.uint8)
    scale = np.empty((n_row, n_group), np.float32)
    offset = np.empty((n_row, n_group), np.int32)
    cdef uint8_t[:, ::1] q_view = q
    cdef float[:, ::1] scale_view = scale
    cdef int32_t[:, ::1] offset_view = offset
    for row in range(n_row if n else 0):
        kernels().quantize_q8(&x[row, 0], n, &q_view[row, 0], &scale_view[row, 0], &offset_view[row, 0])
    return q[:, :n], scale, offset
