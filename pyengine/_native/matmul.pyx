# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""Matrix products with packed weights: packing, and the loops over threads, rows and panels."""

import numpy as np

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t
from libc.string cimport memset

from .kernels cimport (
    PE_ACT_NONE, PE_BF16, PE_F16, PE_F32, PE_GROUP, PE_LANES, pe_activation, pe_dtype, pe_kernels, pe_output, pe_rows_q8,
)
from .memory cimport Block
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

from ..errors import ArgumentError

DTYPES = ("float32", "int8")
TENSOR_DTYPES = {"F32": (PE_F32, 4), "F16": (PE_F16, 2), "BF16": (PE_BF16, 2)}

# A unit of work: so many columns of all rows, or of a block of rows where there are many. With few rows a product is cut into
# some units a thread, at least 4 panels each: taking a unit costs what a core takes to hear from another.
cdef enum:
    FEW_ROWS = 48
    BLOCK_ROWS = 96
    BLOCK_PANELS = 8
    UNITS_PER_THREAD = 8
    TILE_PANELS = 4


cdef struct PackTask:
    void *matrix
    const char *src
    pe_dtype dtype
    int64_t itemsize, k_stride, n_stride, first, n_column
    const float *in_scale
    const float *out_scale
    float *scratch
    int64_t bad_panel


cdef class PackedMatrix:
    """A weight [n_out, n_in] in panels of 16 output columns, as csrc/kernels.h lays them out; `dtype` is float32 or int8."""

    def __cinit__(self, int64_t n_out, int64_t n_in, str dtype):
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.n_out, self.n_in, self.dtype = n_out, n_in, dtype
        self.quantized = dtype == "int8"
        cdef int64_t n_panel = self.n_panel, n_group = (n_in + PE_GROUP - 1) // PE_GROUP
        what = f"weight [{n_out}, {n_in}] in {dtype}"
        if self.quantized:
            self.panels = Block(n_panel * PE_LANES * ((n_in + 3) // 4) * 4, what)
            self.column_sum = Block(n_panel * PE_LANES * n_group * sizeof(int16_t), what)
            self.scale = Block(n_panel * PE_LANES * sizeof(float), what)
            self.q8.panels = <const int8_t *>self.panels.data
            self.q8.column_sum = <const int16_t *>self.column_sum.data
            self.q8.scale = <const float *>self.scale.data
            self.q8.k = n_in
        else:
            self.panels = Block(n_panel * PE_LANES * n_in * sizeof(float), what)
            self.f32.panels = <const float *>self.panels.data
            self.f32.k = n_in

    @property
    def n_panel(self):
        """How many panels the columns fill."""
        return (self.n_out + PE_LANES - 1) // PE_LANES

    @property
    def nbytes(self):
        """The memory of the packed weight."""
        extra = self.column_sum.nbytes + self.scale.nbytes if self.quantized else 0
        return self.panels.nbytes + extra

    def pack(self, const uint8_t[::1] src, str tensor_dtype, str layout, int64_t first=0, in_scale=None, out_scale=None,
             int threads=1):
        """Packs columns from `first` on: `src` holds whole rows of an "out_in" tensor, or all of an "in_out" one.

        Row k of the weight is multiplied with in_scale[k], column n with out_scale[n] (float32, [n_in] and [n_out]). Returns
        the first output column near which a value is NaN or infinite, or -1.
        """
        cdef PackTask task
        dtype, itemsize = TENSOR_DTYPES[tensor_dtype]
        cdef int64_t n_value = src.shape[0] // itemsize
        if n_value * itemsize != src.shape[0] or n_value % self.n_in or first % PE_LANES:
            raise ArgumentError(f"src: expected whole rows of {self.n_in} values from a multiple of 16, got {src.shape[0]} bytes")
        task.n_column = n_value // self.n_in
        if first < 0 or first + task.n_column > self.n_out or (layout == "in_out" and task.n_column != self.n_out):
            raise ArgumentError(f"src: expected at most {self.n_out} columns, got {first} + {task.n_column}")
        task.matrix = <void *>self
        task.src = <const char *>&src[0]
        task.dtype, task.itemsize, task.first, task.bad_panel = dtype, itemsize, first, -1
        task.k_stride = 1 if layout == "out_in" else self.n_out
        task.n_stride = self.n_in if layout == "out_in" else 1
        cdef const float[::1] ins = in_scale
        cdef const float[::1] outs = out_scale
        if ins is not None and ins.shape[0] != self.n_in or outs is not None and outs.shape[0] != self.n_out:
            raise ArgumentError(f"scales: expected [{self.n_in}] and [{self.n_out}]")
        task.in_scale = &ins[0] if ins is not None else NULL
        task.out_scale = &outs[0] if outs is not None else NULL
        self.unscale = None if ins is None else 1 / np.asarray(ins)
        cdef Block scratch = Block(threads * self.n_in * PE_LANES * sizeof(float), "scratch for packing")
        task.scratch = <float *>scratch.data
        run(threads, 1, pack_panels, &task)
        return task.bad_panel * PE_LANES if task.bad_panel >= 0 else -1

    def row(self, int64_t n):
        """Row n of the weight as it is computed with, in_scale undone: float32 [n_in]."""
        if not 0 <= n < self.n_out:
            raise ArgumentError(f"row: expected 0..{self.n_out - 1}, got {n}")
        out = np.empty(self.n_in, np.float32)
        cdef float[::1] view = out
        read_row(self, n, &view[0])
        return out


cdef void pack_panels(void *context, Worker *worker) noexcept nogil:
    cdef PackTask *task = <PackTask *>context
    pack_panels_of(<PackedMatrix>task.matrix, task, worker)


cdef void pack_panels_of(PackedMatrix matrix, PackTask *task, Worker *worker) noexcept nogil:
    cdef const pe_kernels *simd = kernels()
    cdef int64_t k = matrix.n_in, n_quad = (k + 3) // 4, n_group = (k + PE_GROUP - 1) // PE_GROUP
    cdef int64_t n_panel = (task.n_column + PE_LANES - 1) // PE_LANES
    cdef int64_t unit = claim(worker, n_panel), column, panel, n, i, j
    cdef float *values
    while unit >= 0:
        column = unit * PE_LANES
        panel = task.first // PE_LANES + unit
        n = min(<int64_t>PE_LANES, task.n_column - column)
        if matrix.quantized:
            values = task.scratch + worker.index * k * PE_LANES
        else:
            values = <float *>matrix.f32.panels + panel * k * PE_LANES
        if not simd.load_panel(task.src + column * task.n_stride * task.itemsize, task.dtype, k, task.k_stride, n,
                               task.n_stride, values):
            task.bad_panel = panel  # any of several will do
        if task.in_scale != NULL:
            for i in range(k):
                for j in range(PE_LANES):
                    values[i * PE_LANES + j] = values[i * PE_LANES + j] * task.in_scale[i]
        if task.out_scale != NULL:
            for i in range(k):
                for j in range(n):
                    values[i * PE_LANES + j] = values[i * PE_LANES + j] * task.out_scale[panel * PE_LANES + j]
        if matrix.quantized:
            simd.pack_q8(values, k, <int8_t *>matrix.q8.panels + panel * n_quad * 4 * PE_LANES,
                         <float *>matrix.q8.scale + panel * PE_LANES,
                         <int16_t *>matrix.q8.column_sum + panel * n_group * PE_LANES)
        unit = claim(worker, n_panel)


cdef void read_row(PackedMatrix matrix, int64_t n, float *out) noexcept nogil:
    cdef int64_t k = matrix.n_in, i, n_quad = (k + 3) // 4, panel = n // PE_LANES, lane = n % PE_LANES
    cdef const float *values
    cdef const int8_t *quads
    cdef float scale
    if matrix.quantized:
        quads = matrix.q8.panels + panel * n_quad * 4 * PE_LANES + 4 * lane
        scale = matrix.q8.scale[n]
        for i in range(k):
            out[i] = scale * quads[(i // 4) * 4 * PE_LANES + i % 4]
    else:
        values = matrix.f32.panels + panel * k * PE_LANES + lane
        for i in range(k):
            out[i] = values[i * PE_LANES]
    if matrix.unscale is not None:
        for i in range(k):
            out[i] = out[i] * matrix.unscale[i]


cdef class QuantizedRows:
    """Room for the int8 copies of `n_row` rows of up to `width` values."""

    def __cinit__(self, int64_t n_row, int64_t width):
        cdef int64_t n_group = (width + PE_GROUP - 1) // PE_GROUP
        self.q = Block(n_row * n_group * PE_GROUP, "int8 activations")
        self.scale = Block(n_row * n_group * sizeof(float), "int8 activations")
        self.zero = Block(n_row * n_group * sizeof(int32_t), "int8 activations")
        memset(self.q.data, 0, self.q.nbytes)
        self.rows.q = <const uint8_t *>self.q.data
        self.rows.scale = <const float *>self.scale.data
        self.rows.zero = <const int32_t *>self.zero.data
        self.rows.stride = n_group * PE_GROUP


cdef void quantize_row(const float *x, int64_t n, pe_rows_q8 *rows, int64_t row) noexcept nogil:
    cdef int64_t group = row * (rows.stride // PE_GROUP)
    kernels().quantize_q8(x, n, <uint8_t *>rows.q + row * rows.stride, <float *>rows.scale + group, <int32_t *>rows.zero + group)


cdef void linear(Worker *worker, PackedMatrix weight, const float *x, int64_t x_stride, const pe_rows_q8 *q, int64_t n_row,
                 const pe_output *out, pe_activation activation) noexcept nogil:
    """One phase: out = activation(x W^T + bias) + residual. `q` is x in int8, for int8 weights."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t n_panel = (weight.n_out + PE_LANES - 1) // PE_LANES
    cdef int64_t block_rows = n_row if n_row <= FEW_ROWS else BLOCK_ROWS
    cdef int64_t share = n_panel // (UNITS_PER_THREAD * worker.n_threads) // TILE_PANELS * TILE_PANELS
    cdef int64_t block_panels = max(<int64_t>TILE_PANELS, share) if n_row <= FEW_ROWS else BLOCK_PANELS
    cdef int64_t row_blocks = (n_row + block_rows - 1) // block_rows
    cdef int64_t n_unit = row_blocks * ((n_panel + block_panels - 1) // block_panels)
    cdef int64_t unit = claim(worker, n_unit), row, panel, rows, panels, r
    cdef pe_rows_q8 from_q
    cdef pe_output to = out[0]
    while unit >= 0:
        panel = unit // row_blocks * block_panels
        row = unit % row_blocks * block_rows
        panels = min(block_panels, n_panel - panel)
        rows = min(block_rows, n_row - row)
        to.out = out.out + row * out.out_stride
        if out.residual != NULL:
            to.residual = out.residual + row * out.residual_stride
        if weight.quantized:
            from_q.stride = q.stride
            from_q.q = q.q + row * q.stride
            from_q.scale = q.scale + row * (q.stride // PE_GROUP)
            from_q.zero = q.zero + row * (q.stride // PE_GROUP)
            simd.matmul_q8(&from_q, rows, &weight.q8, panel, panels, &to)
        else:
            simd.matmul_f32(x + row * x_stride, x_stride, rows, &weight.f32, panel, panels, &to)
        if activation != PE_ACT_NONE:
            for r in range(rows):
                simd.activate(activation, to.out + r * out.out_stride + panel * PE_LANES, panels * PE_LANES)
        unit = claim(worker, n_unit)
    sync(worker, n_unit)


cdef struct MatmulTask:
    void *weight
    const float *x
    int64_t n_row
    pe_rows_q8 *q
    pe_output out


cdef void matmul_body(void *context, Worker *worker) noexcept nogil:
    cdef MatmulTask *task = <MatmulTask *>context
    matmul_share(<PackedMatrix>task.weight, task, worker)


cdef void matmul_share(PackedMatrix weight, MatmulTask *task, Worker *worker) noexcept nogil:
    cdef int64_t row
    if weight.quantized:
        row = claim(worker, task.n_row)
        while row >= 0:
            quantize_row(task.x + row * weight.n_in, weight.n_in, task.q, row)
            row = claim(worker, task.n_row)
        sync(worker, task.n_row)
    linear(worker, weight, task.x, weight.n_in, task.q, task.n_row, &task.out, PE_ACT_NONE)


def matmul(const float[:, ::1] x, PackedMatrix weight, int threads=1):
    """x W^T with a packed weight: float32 [n_rows, n_in] → float32 [n_rows, n_out], as the engine computes it."""
    if x.shape[1] != weight.n_in:
        raise ArgumentError(f"x: expected [n_rows, {weight.n_in}], got [{x.shape[0]}, {x.shape[1]}]")
    out = np.empty((x.shape[0], weight.n_panel * PE_LANES), np.float32)
    if x.shape[0] == 0:
        return out[:, : weight.n_out]
    cdef float[:, ::1] view = out
    cdef QuantizedRows q = QuantizedRows(x.shape[0] if weight.quantized else 0, weight.n_in)
    cdef MatmulTask task
    memset(&task, 0, sizeof(task))
    task.weight, task.x, task.n_row, task.q = <void *>weight, &x[0, 0], x.shape[0], &q.rows
    task.out.out, task.out.out_stride = &view[0, 0], view.shape[1]
    run(threads, 2, matmul_body, &task)
    return out[:, : weight.n_out]


def quantize(const float[:, ::1] x):
    """Rows in int8, as the engine quantises activations: x is about scale (q - zero), by groups of 128 values.

    float32 [n_rows, n] → (uint8 [n_rows, n], float32 [n_rows, n_groups], int32 [n_rows, n_groups]).
    """
    cdef int64_t n_row = x.shape[0], n = x.shape[1], n_group = (n + PE_GROUP - 1) // PE_GROUP, row
    q = np.zeros((n_row, n_group * PE_GROUP), np.uint8)
    scale = np.empty((n_row, n_group), np.float32)
    zero = np.empty((n_row, n_group), np.int32)
    cdef uint8_t[:, ::1] q_view = q
    cdef float[:, ::1] scale_view = scale
    cdef int32_t[:, ::1] zero_view = zero
    for row in range(n_row if n else 0):
        kernels().quantize_q8(&x[row, 0], n, &q_view[row, 0], &scale_view[row, 0], &zero_view[row, 0])
    return q[:, :n], scale, zero
