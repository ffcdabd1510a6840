from libc.stdint cimport int32_t, int64_t, uint8_t

from .kernels cimport pe_activation, pe_output, pe_rows_q8, pe_weights_f32, pe_weights_q8
from .memory cimport Block
from .parallel cimport Worker

cdef class PackedMatrix:
    cdef readonly str dtype
    cdef readonly int64_t n_out, n_in
    cdef bint quantized
    cdef pe_weights_f32 f32
    cdef pe_weights_q8 q8
    cdef Block panels, column_sum, scale
    cdef float[::1] unscale  # what undoes the in_scale that it was packed with

# int8 copies of activation rows: room for as many rows as a step has.
cdef class QuantizedRows:
    cdef pe_rows_q8 rows
    cdef Block q, scale, zero

# Row n as float32: a token's embedding.
cdef void read_row(PackedMatrix matrix, int64_t n, float *out) noexcept nogil
cdef void quantize_row(const float *x, int64_t n, pe_rows_q8 *rows, int64_t row) noexcept nogil
cdef void linear(Worker *worker, PackedMatrix weight, const float *x, int64_t x_stride, const pe_rows_q8 *q, int64_t n_row,
                 const pe_output *out, pe_activation activation) noexcept nogil
