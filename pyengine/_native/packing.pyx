# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""From a checkpoint's matrices to packed weights. A unit of work is a piece of a matrix, which one thread reads and goes through
while it is in that core's cache; no thread waits for another.
"""

import numpy as np

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from .kernels cimport PE_BF16, PE_F16, PE_F32, PE_LANES, pe_dtype, pe_kernels
from .matmul cimport PackedMatrix, pack_panel, room_for_panel, touch_share, whole
from .memory cimport PE_HUGE_PAGE, PE_SMALL_PAGE, Arena, Block
from .parallel cimport Worker, claim, run, sync
from .simd cimport kernels

from ..errors import ArgumentError, CheckpointFileError

TENSOR_DTYPES = {"F32": (PE_F32, 4), "F16": (PE_F16, 2), "BF16": (PE_BF16, 2)}

cdef extern from "files.h" nogil:
    bint pe_read(int, char *, int64_t, int64_t)

cdef enum:
    BUFFER_BYTES = 1 << 28  # the most memory of all threads' pieces; fewer threads read where a piece is large


cdef class StoredMatrix:
    """A matrix [n_out, n_in] as it is stored: in an open file from byte `offset` on, or in memory. str(what) names it in errors."""

    cdef object what
    cdef int fd
    cdef const uint8_t[::1] memory
    cdef readonly int64_t n_out, n_in
    cdef readonly bint in_out
    cdef int64_t offset, itemsize
    cdef pe_dtype dtype

    def __init__(self, source, int64_t offset, str dtype, str layout, int64_t n_out, int64_t n_in, what="tensor"):
        self.what, self.offset, self.n_out, self.n_in, self.in_out = what, offset, n_out, n_in, layout == "in_out"
        self.dtype, self.itemsize = TENSOR_DTYPES[dtype]
        if isinstance(source, int):
            self.fd, self.memory = source, None
        else:
            self.fd, self.memory = -1, source
            if self.memory.shape[0] != offset + n_out * n_in * self.itemsize:
                raise ArgumentError(f"{what}: expected {n_out * n_in * self.itemsize} bytes, got {self.memory.shape[0] - offset}")


cdef enum Work:
    PACK
    LARGEST
    SQUARES

cdef struct Piece:  # some rows of a tensor as it lies
    int64_t index  # of the tensor
    int fd
    const char *memory
    int64_t offset, nbytes, itemsize
    pe_dtype dtype
    int64_t n_row, n_value  # rows, and what a row has
    bint in_out  # its rows are inputs
    int64_t k, k_stride, first, n_column, n_stride  # PACK, SQUARES: see load_panel
    const float *in_scale
    const float *out_scale
    void *matrix  # PACK: where it goes
    float *out  # LARGEST: of each input; SQUARES: of each output, in whole panels

cdef struct Task:
    Work work
    Piece *pieces
    int64_t n_piece
    char *buffers  # of all threads: a panel [most_k][PE_LANES], a piece
    int64_t buffer_bytes, most_k
    int64_t unread, not_finite  # a tensor, any of several, or -1

cdef struct Touch:
    void **matrices
    int64_t n_matrix


cdef class Loader:
    """Reads matrices on `threads` threads, in pieces of some `piece_bytes`, but an "in_out" one as a whole where each output needs
    all of its weights.
    """

    cdef int threads
    cdef int64_t piece_bytes
    cdef Block buffers  # used again by the next pass: the first touch of memory takes longer than reading into it

    def __init__(self, int threads=1, int64_t piece_bytes=1 << 20):
        self.threads, self.piece_bytes = threads, piece_bytes

    def pack(self, jobs):
        """Packs weights: (tensor, its PackedMatrix, in_scale, out_scale) of each. Row k of a weight is multiplied with in_scale[k],
        column n with out_scale[n] (float32 [n_in] and [n_out], or None).

        Returns the index of one that has a NaN or an infinity, or -1. Raises CheckpointFileError for a file that can't be read.
        """
        cdef PackedMatrix matrix
        for _, matrix, in_scale, _ in jobs:
            matrix.unscale = None if in_scale is None else 1 / np.asarray(in_scale)
        return self._run(PACK, jobs)

    def touch(self, matrices):
        """Each thread touches what it reads in decoding of matrices that are not packed yet: a system with several memory nodes puts
        that near it. Packing shares work otherwise, so that a matrix would lie as a whole where one thread is.
        """
        cdef Touch task
        cdef int64_t i
        cdef Block memory = Block(len(matrices) * sizeof(void *), "matrices")
        task.matrices, task.n_matrix = <void **>memory.data, len(matrices)
        for i in range(task.n_matrix):
            task.matrices[i] = <void *>matrices[i]
        run(self.threads, 1, touch_shares, &task)

    def largest_by_input(self, tensors):
        """The size of the largest weight that each input meets: float32 [n_in] for each tensor."""
        outs = [np.empty((1 if tensor.in_out else self._n_piece(LARGEST, tensor), tensor.n_in), np.float32)
                for tensor in tensors]
        self._run(LARGEST, [(tensor, out, None, None) for tensor, out in zip(tensors, outs, strict=True)])
        return [out.max(axis=0) for out in outs]

    def output_norms(self, jobs):
        """The Euclidean norm of each output's weights, row k multiplied with in_scale[k]: float32 [n_out] for each (tensor,
        in_scale).
        """
        outs = [np.empty(whole(tensor.n_out, PE_LANES), np.float32) for tensor, _ in jobs]
        self._run(SQUARES, [(tensor, out, in_scale, None) for (tensor, in_scale), out in zip(jobs, outs, strict=True)])
        return [np.sqrt(out[: tensor.n_out]) for (tensor, _), out in zip(jobs, outs, strict=True)]

    cdef int64_t _rows(self, Work work, StoredMatrix tensor):
        """How many rows a piece has."""
        cdef int64_t columns = tensor.n_out if tensor.in_out else tensor.n_in
        if tensor.in_out and work != LARGEST:
            return tensor.n_in
        return max(self.piece_bytes // (columns * tensor.itemsize) // PE_LANES, <int64_t>1) * PE_LANES

    cdef int64_t _n_piece(self, Work work, StoredMatrix tensor):
        cdef int64_t rows = self._rows(work, tensor)
        return ((tensor.n_in if tensor.in_out else tensor.n_out) + rows - 1) // rows

    cdef int64_t _run(self, Work work, jobs) except -2:
        """One pass over tensors: (tensor, what it goes to, in_scale, out_scale) of each."""
        cdef Task task
        cdef StoredMatrix tensor
        cdef int64_t i, n_piece = sum([self._n_piece(work, job[0]) for job in jobs])
        cdef int64_t most = 0
        cdef Block memory = Block(n_piece * sizeof(Piece), "pieces")
        memset(&task, 0, sizeof(task))
        task.work, task.pieces, task.unread, task.not_finite = work, <Piece *>memory.data, -1, -1
        # Large pieces first, so that in the end no thread is left with one.
        for _, i in sorted([(self._n_piece(work, job[0]) > 1, i) for i, job in enumerate(jobs)]):
            self._add(&task, i, jobs[i])
        if not n_piece:
            return -1
        for i in range(n_piece):
            task.most_k = max(task.most_k, task.pieces[i].k)
            most = max(most, task.pieces[i].nbytes)
        task.buffer_bytes = whole(task.most_k * PE_LANES * sizeof(float) + most, 64)
        cdef int threads = min(self.threads, max(BUFFER_BYTES // task.buffer_bytes, <int64_t>1))
        if self.buffers is None or <int64_t>self.buffers.nbytes < threads * task.buffer_bytes:
            self.buffers = None  # gives the old ones back first
            self.buffers = Block(threads * task.buffer_bytes, "pieces of weights", Arena())
        task.buffers = <char *>self.buffers.data
        run(threads, 1, do_pieces, &task)
        if task.unread >= 0:
            tensor = jobs[task.unread][0]
            raise CheckpointFileError(f"{tensor.what}: it can't be read, or the file was truncated since")
        return task.not_finite

    cdef int _add(self, Task *task, int64_t index, job) except -1:
        """Adds the pieces of a job's tensor."""
        cdef StoredMatrix tensor = job[0]
        target = job[1]
        cdef const float[::1] ins = job[2]
        cdef const float[::1] outs = job[3]
        cdef float[::1] out
        cdef PackedMatrix matrix
        cdef Piece piece
        cdef int64_t rows = self._rows(task.work, tensor), n_row = tensor.n_in if tensor.in_out else tensor.n_out
        cdef int64_t row_bytes = tensor.itemsize * (tensor.n_out if tensor.in_out else tensor.n_in), n, first
        memset(&piece, 0, sizeof(piece))
        piece.index, piece.fd, piece.dtype, piece.itemsize = index, tensor.fd, tensor.dtype, tensor.itemsize
        piece.in_out, piece.n_value, piece.k = tensor.in_out, row_bytes // tensor.itemsize, tensor.n_in
        piece.k_stride = tensor.n_out if tensor.in_out else 1
        piece.n_stride = 1 if tensor.in_out else tensor.n_in
        if ins is not None and ins.shape[0] != tensor.n_in or outs is not None and outs.shape[0] != tensor.n_out:
            raise ArgumentError(f"scales: expected [{tensor.n_in}] and [{tensor.n_out}]")
        piece.in_scale = &ins[0] if ins is not None else NULL
        if task.work == PACK:
            matrix = target
            if (matrix.n_out, matrix.n_in) != (tensor.n_out, tensor.n_in):
                raise ArgumentError(f"tensor: expected [{matrix.n_out}, {matrix.n_in}], got [{tensor.n_out}, {tensor.n_in}]")
            piece.matrix = <void *>matrix
        else:
            out = target.reshape(-1)
        for first in range(0, n_row, rows):
            n = min(rows, n_row - first)
            piece.offset, piece.nbytes = tensor.offset + first * row_bytes, n * row_bytes
            piece.memory = <const char *>&tensor.memory[piece.offset] if tensor.memory is not None else NULL
            piece.n_row = n
            if task.work == LARGEST:
                piece.out = &out[first if tensor.in_out else first // rows * tensor.n_in]
            else:
                piece.first, piece.n_column = first, tensor.n_out if tensor.in_out else n
                piece.out_scale = &outs[first] if outs is not None else NULL
                piece.out = &out[first] if task.work == SQUARES else NULL
            task.pieces[task.n_piece] = piece
            task.n_piece += 1
        return 0


cdef void touch_shares(void *context, Worker *worker) noexcept nogil:
    cdef Touch *task = <Touch *>context
    cdef int64_t i
    # A huge page is whose share has its start, not whoever comes first to some of it. Where there are none, the small ones follow.
    for i in range(task.n_matrix):
        touch_share(worker, <PackedMatrix>task.matrices[i], PE_HUGE_PAGE)
    worker.n_claimed = 1
    sync(worker, worker.n_threads)
    for i in range(task.n_matrix):
        touch_share(worker, <PackedMatrix>task.matrices[i], PE_SMALL_PAGE)


cdef void do_pieces(void *context, Worker *worker) noexcept nogil:
    cdef Task *task = <Task *>context
    cdef Piece *piece
    cdef float *panel = <float *>(task.buffers + worker.index * task.buffer_bytes)
    cdef char *buffer = <char *>(panel + task.most_k * PE_LANES)
    cdef const char *values
    cdef int64_t unit = claim(worker, task.n_piece)
    while unit >= 0 and task.unread < 0:
        piece = &task.pieces[unit]
        values = piece.memory
        if values == NULL:
            if not pe_read(piece.fd, buffer, piece.nbytes, piece.offset):
                task.unread = piece.index
                return
            values = buffer
        if task.work == PACK:
            if not pack_piece(<PackedMatrix>piece.matrix, piece, values, panel):
                task.not_finite = piece.index
        elif task.work == LARGEST:
            kernels().largest(values, piece.dtype, piece.n_row, piece.n_value, not piece.in_out, piece.out)
        else:
            square_piece(piece, values, panel)
        unit = claim(worker, task.n_piece)


cdef inline int64_t panels_of(const Piece *piece) noexcept nogil:
    return (piece.n_column + PE_LANES - 1) // PE_LANES


cdef bint pack_piece(PackedMatrix matrix, const Piece *piece, const char *values, float *panel) noexcept nogil:
    """False where a value is NaN or infinite."""
    cdef int64_t i, first = piece.first // PE_LANES
    cdef bint finite = True
    for i in range(panels_of(piece)):
        finite &= load_columns(piece, values, i * PE_LANES, room_for_panel(matrix, first + i, panel))
        pack_panel(matrix, panel, first + i)
    return finite


cdef void square_piece(const Piece *piece, const char *values, float *panel) noexcept nogil:
    cdef int64_t i
    for i in range(panels_of(piece)):
        load_columns(piece, values, i * PE_LANES, panel)
        kernels().panel_squares(panel, piece.k, piece.out + i * PE_LANES)


cdef inline bint load_columns(const Piece *piece, const char *values, int64_t column, float *panel) noexcept nogil:
    """The panel of the piece's columns from `column` on, scaled."""
    return kernels().load_panel(
        values + column * piece.n_stride * piece.itemsize, piece.dtype, piece.k, piece.k_stride,
        min(<int64_t>PE_LANES, piece.n_column - column), piece.n_stride, piece.in_scale,
        piece.out_scale + column if piece.out_scale != NULL else NULL, panel)
