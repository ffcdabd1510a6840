from libc.stdint cimport int64_t

from .attention cimport Attention
from .kernels cimport pe_activation
from .matmul cimport Input, NarrowRows
from .memory cimport Block
from .pages cimport KVLayout

cdef enum Kind:
    EMBED
    NORM
    LINEAR
    ATTEND
    PICK_ROWS

cdef struct Buffer:
    float *data
    int64_t width, stride  # in floats

cdef struct Op:
    Kind kind
    int src, out, residual  # buffers; -1 for none
    bint on_picked  # runs on the rows whose logits are wanted, not on all
    bint for_picked  # an Attend: of its output only these rows are read
    bint narrow  # a Norm: its output is wanted in int8 or bfloat16; a Linear: its input isn't yet
    bint own_rows  # nobody else wants what is narrowed: with few rows, each thread does it for itself, and nobody waits
    bint narrow_out  # a Linear: the next operation, another, alone reads its output
    bint narrow_qkv  # a Linear, and an Attend that alone reads its output: many rows go from one to the other in bfloat16
    void *weight  # a PackedMatrix
    const float *gain  # a norm's gain, or the table of positions
    const float *bias
    float eps
    pe_activation activation
    Attention attention

cdef enum: OWN_ROWS = 2  # so few rows that each thread narrows them for itself

# A plan as it was told, operation by operation, its packed weights and its activation buffers, which go by index.
cdef class Program:
    cdef readonly int n_threads
    cdef readonly int64_t vocab_size, max_seq_len
    cdef list keep  # the objects that the operations point into
    cdef list blocks  # the buffers' memory
    cdef Buffer *buffers
    cdef int n_buffer
    cdef Op *ops
    cdef int n_op
    cdef bint picking
    cdef KVLayout layout
    cdef NarrowRows narrow, narrow_out  # the input of a product, and the output of one that the next takes in
    cdef NarrowRows qkv  # queries, keys and values in bfloat16
    cdef Input input  # what the products take their rows in: one for all
    cdef int64_t max_width  # of an input of a product
    cdef Block scratch
    cdef int64_t capacity, picked_capacity  # rows that the buffers have room for
    cdef Op *_add(self, Kind kind, int src, int out) except NULL
    cdef const float *_floats(self, array, int64_t n) except? NULL
    cdef bint _next_alone_reads(self, int i) noexcept
    cdef void _find_own_rows(self) noexcept
    cdef Buffer *logits(self) noexcept nogil
    cdef int reserve(self, int64_t n_row, int64_t n_picked) except -1
    cdef void place_picked(self, bint all_rows)
