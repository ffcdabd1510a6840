from libc.stdint cimport int32_t, int64_t

from .attention cimport Segment
from .parallel cimport Worker
from .program cimport Op, Program

# The rows of a step.
cdef struct Batch:
    const int32_t *token_ids  # [n_row]
    const int32_t *picked  # [n_picked], ascending: the rows whose logits are wanted
    const Segment *segments  # [n_segment], in order
    const Segment *wanted  # [n_wanted]: the picked rows of these; the segments themselves if all rows are picked
    int64_t n_row, n_segment, n_wanted, n_picked

cdef enum: OP_PHASES = 2  # of an operation, at most

# This thread's share of an operation: one phase or two, or none where each thread does all of it for itself.
cdef void run_op(Program program, Op *op, const Batch *batch, Worker *worker) noexcept nogil
