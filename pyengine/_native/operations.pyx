# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""What the operations of a plan do with the rows of a step: each thread its share."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from .attention cimport Qkv, attend
from .kernels cimport pe_output
from .matmul cimport FEW_ROWS, NarrowRows, PackedMatrix, linear, linear_narrow, narrow_row, read_row
from .parallel cimport Share, Worker, claim_rows, share_of
from .program cimport ATTEND, EMBED, LINEAR, NORM, OWN_ROWS, PICK_ROWS, Buffer, Op, Program
from .simd cimport kernels


cdef void run_op(Program program, Op *op, const Batch *batch, Worker *worker) noexcept nogil:
    cdef Buffer *out = &program.buffers[op.out]
    cdef Buffer *src = &program.buffers[op.src] if op.src >= 0 else NULL
    cdef int64_t n_row = batch.n_picked if op.on_picked else batch.n_row
    cdef float *scratch
    cdef Qkv qkv
    if op.kind == EMBED:
        embed(op, out, batch, worker)
    elif op.kind == NORM:
        norm(program, op, src, out, n_row, worker)
    elif op.kind == LINEAR:
        product(program, op, src, out, n_row, worker)
    elif op.kind == ATTEND:
        scratch = scratch_of(program, worker)
        qkv.f32, qkv.bf16, qkv.stride = src.data, NULL, src.stride
        if op.narrow_qkv and n_row > FEW_ROWS:
            qkv.bf16, qkv.stride = program.qkv.bf16, program.qkv.q8.stride
        attend(worker, &op.attention, &qkv, batch.segments, batch.n_segment,
               batch.wanted if op.for_picked else batch.segments, batch.n_wanted if op.for_picked else batch.n_segment,
               scratch, out.data, out.stride)
    elif op.kind == PICK_ROWS:
        if out.data != src.data:
            pick_rows(src, out, batch, worker)


cdef inline float *scratch_of(Program program, Worker *worker) noexcept nogil:
    return <float *>program.scratch.data + worker.index * (program.scratch.nbytes // sizeof(float) // program.n_threads)


cdef void embed(Op *op, Buffer *out, const Batch *batch, Worker *worker) noexcept nogil:
    cdef Share share = share_of(worker, batch.n_row)
    cdef int64_t row = 0, s = 0, i, position
    cdef float *values
    while claim_rows(worker, &share):
        if row > share.first:  # rows of a share that lies before
            s = 0
        for row in range(share.first, share.last):
            while row >= batch.segments[s].row + batch.segments[s].n_row:
                s += 1
            position = batch.segments[s].position + row - batch.segments[s].row
            values = out.data + row * out.stride
            read_row(<PackedMatrix>op.weight, batch.token_ids[row], values)
            for i in range(out.width):
                values[i] = values[i] + op.gain[position * out.width + i]


cdef void norm(Program program, Op *op, Buffer *src, Buffer *out, int64_t n_row, Worker *worker) noexcept nogil:
    cdef Share share
    cdef int64_t row
    cdef float *to = scratch_of(program, worker)
    if op.own_rows and n_row <= OWN_ROWS:
        for row in range(n_row):
            kernels().layer_norm(src.data + row * src.stride, src.width, op.gain, op.bias, op.eps, to)
            narrow_row(to, out.width, program.narrow, worker.index * OWN_ROWS + row)
        return
    share = share_of(worker, n_row)
    while claim_rows(worker, &share):
        for row in range(share.first, share.last):
            if not op.own_rows:
                to = out.data + row * out.stride
            kernels().layer_norm(src.data + row * src.stride, src.width, op.gain, op.bias, op.eps, to)
            if op.narrow:
                narrow_row(to, out.width, program.narrow, row)


cdef void product(Program program, Op *op, Buffer *src, Buffer *out, int64_t n_row, Worker *worker) noexcept nogil:
    cdef int64_t row, first_narrow = 0
    cdef Share share
    cdef void *narrow = <void *>program.narrow
    cdef pe_output to
    # A thread that is late may narrow rows that are written anew meanwhile; then no unit of its product is left for it.
    if op.own_rows and n_row <= OWN_ROWS:
        first_narrow = worker.index * OWN_ROWS
        for row in range(n_row if op.narrow else 0):
            narrow_row(src.data + row * src.stride, src.width, <NarrowRows>narrow, first_narrow + row)
    elif op.narrow and (op - 1).narrow_out:
        narrow = <void *>program.narrow_out
    elif op.narrow:
        share = share_of(worker, n_row)
        while claim_rows(worker, &share):
            for row in range(share.first, share.last):
                narrow_row(src.data + row * src.stride, src.width, <NarrowRows>narrow, row)
    if op.narrow_out and n_row > OWN_ROWS:
        linear_narrow(worker, <PackedMatrix>op.weight, <NarrowRows>narrow, n_row, op.bias, op.activation,
                      scratch_of(program, worker), program.narrow_out)
        return
    if op.narrow_qkv and n_row > FEW_ROWS:
        linear_narrow(worker, <PackedMatrix>op.weight, <NarrowRows>narrow, n_row, op.bias, op.activation,
                      scratch_of(program, worker), program.qkv)
        return
    memset(&to, 0, sizeof(to))
    to.bias, to.out, to.out_stride = op.bias, out.data, out.stride
    if op.residual >= 0:
        to.residual, to.residual_stride = program.buffers[op.residual].data, program.buffers[op.residual].stride
    linear(worker, <PackedMatrix>op.weight, src.data, src.stride, <NarrowRows>narrow, first_narrow, n_row, &to, op.activation)


cdef void pick_rows(Buffer *src, Buffer *out, const Batch *batch, Worker *worker) noexcept nogil:
    cdef Share share = share_of(worker, batch.n_picked)
    cdef int64_t row
    while claim_rows(worker, &share):
        for row in range(share.first, share.last):
            memcpy(out.data + row * out.stride, src.data + batch.picked[row] * src.stride, src.width * sizeof(float))
