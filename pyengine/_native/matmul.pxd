from libc.stdint cimport int64_t, uint16_t

from .kernels cimport pe_activation, pe_output, pe_rows_q8, pe_weights_bf16, pe_weights_f32, pe_weights_q4, pe_weights_q8
from .memory cimport Block
from .parallel cimport Worker

cdef enum Format:  # of packed weights
    F32
    BF16
    Q8
    Q4

cdef enum Input:  # what a product takes its rows in
    FLOAT32
    BFLOAT16
    INT8

cdef class PackedMatrix:
    cdef readonly str dtype
    cdef readonly int64_t n_out, n_in
    cdef Format format
    cdef Input input
    cdef pe_weights_f32 f32
    cdef pe_weights_bf16 bf16
    cdef pe_weights_q8 q8
    cdef pe_weights_q4 q4
    cdef Block panels, column_sum, weight_sum, scale
    cdef float[::1] unscale  # what undoes the in_scale that it was packed with

# Copies of activation rows in bfloat16 or int8: room for as many rows as a step has.
cdef class NarrowRows:
    cdef Input input
    cdef pe_rows_q8 q8
    cdef const uint16_t *bf16  # q8.stride apart
    cdef Block values, scale, offset

cdef inline int64_t whole(int64_t n, int64_t size) noexcept nogil:
    """n rounded up to a multiple of size."""
    return (n + size - 1) // size * size

cdef float *room_for_panel(PackedMatrix matrix, int64_t panel, float *scratch) noexcept nogil
cdef void pack_panel(PackedMatrix matrix, const float *values, int64_t panel) noexcept nogil
# Touches pages of what this thread reads of the matrix in decoding, before anybody has: so they come to lie near that thread.
cdef void touch_share(Worker *worker, PackedMatrix matrix, size_t page) noexcept nogil
# Row n as float32: a token's embedding.
cdef void read_row(PackedMatrix matrix, int64_t n, float *out) noexcept nogil
cdef void narrow_row(const float *x, int64_t n, NarrowRows rows, int64_t row) noexcept nogil
cdef void linear(Worker *worker, PackedMatrix weight, const float *x, int64_t x_stride, NarrowRows narrow,
                 int64_t first_narrow, int64_t n_row, const pe_output *out, pe_activation activation) noexcept nogil
cdef void linear_narrow(Worker *worker, PackedMatrix weight, NarrowRows narrow, int64_t n_row, const float *bias,
                        pe_activation activation, float *scratch, NarrowRows out) noexcept nogil

cdef enum: FEW_ROWS = 48  # with no more rows, a unit of a product has all of them
cdef enum: LINEAR_SCRATCH = 96 * 8 * 16  # floats that linear_narrow needs of a thread
