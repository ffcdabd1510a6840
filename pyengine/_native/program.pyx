# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The plan as native operations: told one by one (`add_...`, in order), with the weights and the memory that they need."""

import numpy as np

from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from .activation cimport activation_of, coarse
from .attention cimport attention_scratch
from .kernels cimport PE_LANES
from .matmul cimport BFLOAT16, FLOAT32, LINEAR_SCRATCH, NarrowRows, PackedMatrix
from .memory cimport Block
from .pages cimport KV_BFLOAT16, KVLayout
from .parallel cimport MAX_THREADS

from ..errors import ArgumentError, OutOfMemoryError


cdef class Program:
    """A plan, its packed weights and its activation buffers. Not to be used from two threads at once."""

    def __cinit__(self, widths, KVLayout layout, int n_threads):
        if not 1 <= n_threads <= MAX_THREADS:
            raise ArgumentError(f"threads: expected 1..{MAX_THREADS}, got {n_threads}")
        self.n_threads, self.layout = n_threads, layout
        self.keep, self.blocks = [], []
        self.max_seq_len = 2**31
        self.n_buffer = len(widths)
        self.buffers = <Buffer *>realloc(NULL, self.n_buffer * sizeof(Buffer))
        if self.buffers == NULL:
            raise OutOfMemoryError("activation buffers: no memory")
        memset(self.buffers, 0, self.n_buffer * sizeof(Buffer))
        for i, width in enumerate(widths):
            self.buffers[i].width = width
            self.buffers[i].stride = (width + PE_LANES - 1) // PE_LANES * PE_LANES
            if self.buffers[i].stride // PE_LANES % 2 == 0:
                self.buffers[i].stride += PE_LANES  # rows at powers of 2 would share a few sets of the cache
            self.blocks.append(None)
        cdef int64_t most = max(LINEAR_SCRATCH, attention_scratch(&layout.layout), *widths)
        cdef int64_t thread_floats = (most + PE_LANES - 1) // PE_LANES * PE_LANES
        self.scratch = Block(n_threads * thread_floats * sizeof(float), "scratch of threads")

    def __dealloc__(self):
        free(self.buffers)
        free(self.ops)

    cdef Op *_add(self, Kind kind, int src, int out) except NULL:
        if not -1 <= src < self.n_buffer or not 0 <= out < self.n_buffer:
            raise ArgumentError(f"buffer: expected 0..{self.n_buffer - 1}, got {src} and {out}")
        cdef Op *ops = <Op *>realloc(self.ops, (self.n_op + 1) * sizeof(Op))
        if ops == NULL:
            raise OutOfMemoryError("plan: no memory for its operations")
        self.ops = ops
        self.n_op += 1
        cdef Op *op = &ops[self.n_op - 1]
        memset(op, 0, sizeof(Op))
        op.kind, op.src, op.out, op.residual, op.on_picked = kind, src, out, -1, self.picking
        return op

    cdef const float *_floats(self, array, int64_t n) except? NULL:
        """A float32 vector of the plan, followed by zeros up to a whole panel."""
        if array is None:
            return NULL
        if array.size != n:
            raise ArgumentError(f"vector: expected {n} values, got {array.size}")
        cdef Block block = Block(((n + PE_LANES - 1) // PE_LANES * PE_LANES) * sizeof(float), "vector")
        cdef const float[::1] values = np.ascontiguousarray(array, np.float32).reshape(-1)
        memset(block.data, 0, block.nbytes)
        memcpy(block.data, &values[0], n * sizeof(float))
        self.keep.append(block)
        return <const float *>block.data

    def add_embed(self, int out, PackedMatrix table, positions):
        """out = table[token_id] + positions[position]; positions is float32 [max_seq_len, width]."""
        cdef Op *op = self._add(EMBED, -1, out)
        if table.n_in != self.buffers[out].width or positions.shape[1] != table.n_in:
            raise ArgumentError(f"embed: expected tables {self.buffers[out].width} wide, got {table.n_in}, {positions.shape[1]}")
        op.weight, op.gain = <void *>table, self._floats(positions, positions.size)
        self.keep.append(table)
        self.vocab_size, self.max_seq_len = table.n_out, positions.shape[0]

    def add_norm(self, int src, int out, gain, bias, float eps):
        """out = LayerNorm(src)."""
        cdef Op *op = self._add(NORM, src, out)
        cdef int64_t n = self.buffers[src].width
        op.gain, op.bias, op.eps = self._floats(gain, n), self._floats(bias, n), eps

    def add_linear(self, int src, int out, PackedMatrix weight, bias=None, activation=None, int residual=-1):
        """out = activation(src W^T + bias) + residual."""
        if activation is not None and residual >= 0:
            raise ArgumentError("linear: an activation with a residual isn't provided for")
        if weight.n_in != self.buffers[src].width or weight.n_out != self.buffers[out].width:
            raise ArgumentError(
                f"linear: expected [{self.buffers[out].width}, {self.buffers[src].width}], got [{weight.n_out}, {weight.n_in}]")
        cdef Op *op = self._add(LINEAR, src, out)
        op.weight, op.bias, op.residual = <void *>weight, self._floats(bias, weight.n_out), residual
        op.activation = activation_of(activation)
        self.keep.append(weight)
        if self.max_width and weight.input != self.input:
            raise ArgumentError(f"linear: expected weights that take the same kind of rows, got {weight.dtype} among others")
        self.input = weight.input
        if weight.input != FLOAT32:
            self.max_width = max(self.max_width, weight.n_in)
            # A norm just before narrows its rows while they are hot.
            if self.n_op > 1 and (op - 1).kind == NORM and (op - 1).out == src:
                (op - 1).narrow = True
            else:
                op.narrow = True

    def add_attend(self, int src, int out, int64_t layer, int64_t n_head, float scale):
        """Appends src's keys and values to the cache of `layer`; out = attention of its queries."""
        cdef Op *op = self._add(ATTEND, src, out)
        op.attention.layer, op.attention.n_head, op.attention.scale = layer, n_head, scale
        op.attention.layout = self.layout.layout

    def add_pick_rows(self, int src, int out):
        """out = the rows of src whose logits are wanted; later operations run on these alone, and read src no more."""
        cdef int i = self.n_op - 1
        self.picking = True
        self._add(PICK_ROWS, src, out)
        while i >= 0 and self.ops[i].kind == PICK_ROWS:
            i -= 1
        if i >= 0 and self.ops[i].kind == ATTEND and self.ops[i].out == src:
            self.ops[i].for_picked = True
        if self.buffers[src].width != self.buffers[out].width:
            raise ArgumentError(f"pick_rows: expected {self.buffers[src].width} wide, got {self.buffers[out].width}")

    cdef bint _next_alone_reads(self, int i) noexcept:
        """Whether nobody after the next operation reads the output of operation i."""
        cdef int j, out = self.ops[i].out
        for j in range(i + 1, self.n_op):
            if self.ops[j].residual == out or (j > i + 1 and self.ops[j].src == out):
                return False
            if self.ops[j].out == out:
                break
        return True

    cdef void _find_own_rows(self) noexcept:
        """Who narrows rows, now that all operations are known: a thread for itself where one Linear alone reads them; a Linear
        its output where another Linear or attention alone reads it."""
        cdef int i
        cdef Op *op
        for i in range(self.n_op):
            op = &self.ops[i]
            if op.kind == LINEAR and op.narrow:
                op.own_rows = True
                if i and (op - 1).kind == LINEAR and (op - 1).out == op.src and (op - 1).residual < 0:
                    (op - 1).narrow_out = self._next_alone_reads(i - 1)
                    if (op - 1).narrow_out:
                        (op - 1).activation = coarse((op - 1).activation)
            elif op.kind == ATTEND and self.layout.layout.dtype == KV_BFLOAT16 and self.layout.layout.head_dim % PE_LANES == 0:
                if i and (op - 1).kind == LINEAR and (op - 1).out == op.src and (op - 1).residual < 0:
                    op.narrow_qkv = (op - 1).narrow_qkv = self._next_alone_reads(i - 1)
            elif op.kind == NORM and op.narrow:
                op.own_rows = (op + 1).own_rows = self._next_alone_reads(i)

    cdef Buffer *logits(self) noexcept nogil:
        """Where the last operation puts its rows: the caller's memory, when `data` points there."""
        return &self.buffers[self.ops[self.n_op - 1].out]

    cdef int reserve(self, int64_t n_row, int64_t n_picked) except -1:
        """Makes room for so many rows in every buffer."""
        if n_row <= self.capacity and n_picked <= self.picked_capacity:
            return 0
        n_row, n_picked = max(n_row, self.capacity), max(n_picked, self.picked_capacity)
        cdef int i, last = self.ops[self.n_op - 1].out
        cdef Block block
        cdef Buffer *buffer
        whole = {self.ops[i].out for i in range(self.n_op) if not self.ops[i].on_picked}
        for i in range(self.n_buffer):
            buffer = &self.buffers[i]
            rows = n_row if i in whole else n_picked
            if i != last:  # the logits are the caller's
                block = Block(rows * buffer.stride * sizeof(float), "activation buffers")
                self.blocks[i] = block
                buffer.data = <float *>block.data
        if self.max_width:
            self._find_own_rows()
            self.narrow = NarrowRows(max(n_row, n_picked, OWN_ROWS * self.n_threads), self.max_width, self.input)
            if any([self.ops[i].narrow_out for i in range(self.n_op)]):
                self.narrow_out = NarrowRows(max(n_row, n_picked), self.max_width, self.input)
            if any([self.ops[i].narrow_qkv for i in range(self.n_op)]):
                self.qkv = NarrowRows(n_row, max([self.buffers[self.ops[i].out].width for i in range(self.n_op)
                                                  if self.ops[i].narrow_qkv]), BFLOAT16)
        self.capacity, self.picked_capacity = n_row, n_picked  # only now: any of the blocks may have raised
        return 0

    cdef void place_picked(self, bint all_rows):
        """Where all rows are picked, they stay where they are."""
        cdef int i
        cdef Op *op
        for i in range(self.n_op):
            op = &self.ops[i]
            if op.kind == PICK_ROWS:
                self.buffers[op.out].data = self.buffers[op.src].data if all_rows else <float *>(<Block>self.blocks[op.out]).data
