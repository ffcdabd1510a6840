# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The native executor: runs a plan over the rows of one step, in one parallel region; an operation starts when the one before is
done.

`Engine` is told the plan operation by operation (`add_...`, in order) and then runs `step` after `step`. Buffers go by index.
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from .activation cimport activation_of
from .attention cimport Attention, Qkv, Segment, attend, attention_scratch
from .kernels cimport PE_LANES, PE_PAGE, pe_activation, pe_output
from .matmul cimport (
    BFLOAT16, FEW_ROWS, FLOAT32, LINEAR_SCRATCH, Input, NarrowRows, PackedMatrix, linear, linear_narrow, narrow_row, read_row,
)
from .memory cimport Block
from .pages cimport KV_BFLOAT16, KVLayout
from .parallel cimport MAX_THREADS, Share, Worker, claim_rows, pe_stop, pe_stopped, run, share_of
from .simd cimport kernels

from ..errors import ArgumentError, OutOfMemoryError, StepStopped

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object)
    # Not the declaration of cpython.exc: the exception is to stay set, until the region is left.
    int PyErr_CheckSignals() noexcept

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        int64_t tv_sec
        long tv_nsec
    int timespec_get(timespec *, int)
    enum: TIME_UTC

# How often a long step asks whether Ctrl-C was pressed.
cdef double SIGNAL_SECONDS = 0.05

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

cdef enum:
    SPARE_BYTES = 1 << 24  # the most of an array of logits that is kept
    OWN_ROWS = 2  # so few rows that each thread narrows them for itself
    ASK_OPS = 8  # operations of few rows between two looks at the clock

# One step: what the threads share.
cdef struct Step:
    void *engine
    const int32_t *token_ids
    const int32_t *picked
    const Segment *segments
    int64_t n_row, n_segment, n_picked
    double asked  # when signals were last looked at
    bint interrupted  # a signal's handler raised


cdef double now() noexcept nogil:
    cdef timespec t
    timespec_get(&t, TIME_UTC)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef int check_signals() noexcept with gil:
    return PyErr_CheckSignals()


cdef class Engine:
    """A plan, its packed weights and its activation buffers. Not to be used from two threads at once."""

    cdef int n_threads
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
    cdef list spare_logits
    cdef int64_t capacity, picked_capacity  # rows that the buffers have room for
    cdef int64_t vocab_size, max_seq_len
    cdef bint stopping

    def __cinit__(self, widths, KVLayout layout, int n_threads):
        if not 1 <= n_threads <= MAX_THREADS:
            raise ArgumentError(f"threads: expected 1..{MAX_THREADS}, got {n_threads}")
        self.n_threads, self.layout = n_threads, layout
        self.keep, self.blocks, self.spare_logits = [], [], []
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
        self.picking = True
        self._add(PICK_ROWS, src, out)
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
            elif op.kind == ATTEND and self.layout.layout.dtype == KV_BFLOAT16 and self.layout.layout.head_dim % PE_LANES == 0:
                if i and (op - 1).kind == LINEAR and (op - 1).out == op.src and (op - 1).residual < 0:
                    op.narrow_qkv = (op - 1).narrow_qkv = self._next_alone_reads(i - 1)
            elif op.kind == NORM and op.narrow:
                op.own_rows = (op + 1).own_rows = self._next_alone_reads(i)

    def _reserve(self, int64_t n_row, int64_t n_picked):
        """Makes room for so many rows in every buffer."""
        if n_row <= self.capacity and n_picked <= self.picked_capacity:
            return
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

    cdef void _place_picked(self, bint all_rows):
        """Where all rows are picked, they stay where they are."""
        cdef int i
        cdef Op *op
        for i in range(self.n_op):
            op = &self.ops[i]
            if op.kind == PICK_ROWS:
                self.buffers[op.out].data = self.buffers[op.src].data if all_rows else <float *>(<Block>self.blocks[op.out]).data

    def step(self, list parts):
        """Runs the plan over the rows of some sequences; returns the logits of those that want them, float32 [n, vocab_size].

        A part is (token_ids, pages, position, n_logits): int32 [n]; the addresses of the sequence's KV pages, uintp; the position
        of the first token; how many of the last rows want logits. Keys and values are stored, the caller keeps count.
        Raises what a signal's handler raises (KeyboardInterrupt), and StepStopped after `stop`; it can then be done again.
        """
        cdef int64_t n_segment = len(parts), n_row = 0, n_picked = 0, i, j, n, position, n_logits
        for part in parts:
            n_row += len(part[0])
            n_picked += part[3]
        cdef Block memory = Block(n_segment * sizeof(Segment) + (n_row + n_picked) * sizeof(int32_t), "step")
        cdef Segment *segments = <Segment *>memory.data
        cdef int32_t *token_ids = <int32_t *>(segments + n_segment)
        cdef int32_t *picked = token_ids + n_row
        cdef const int32_t[::1] ids
        cdef const uintptr_t[::1] pages
        n_row = n_picked = 0
        for i in range(n_segment):
            ids, pages, position, n_logits = parts[i]
            n = ids.shape[0]
            if n < 1 or not 0 <= n_logits <= n:
                raise ArgumentError(f"rows: expected at least one and logits of as many at most, got {n} and {n_logits}")
            if not 0 <= position <= min(self.max_seq_len, pages.shape[0] * PE_PAGE) - n:
                raise ArgumentError(f"position: expected less than {self.max_seq_len} and a page for each")
            for j in range(n):
                if not 0 <= ids[j] < self.vocab_size:
                    raise ArgumentError(f"token id: expected 0..{self.vocab_size - 1}, got {ids[j]}")
                token_ids[n_row + j] = ids[j]
            segments[i].row, segments[i].n_row, segments[i].position = n_row, n, position
            segments[i].pages = <void **>&pages[0]
            n_row += n
            for j in range(n_logits):
                picked[n_picked + j] = n_row - n_logits + j
            n_picked += n_logits
        cdef Buffer *last = &self.buffers[self.ops[self.n_op - 1].out]
        logits = self._room_for_logits(n_picked, last.stride)
        cdef float[:, ::1] view = logits
        cdef Step step
        if n_row:
            self._reserve(n_row, n_picked)
            last.data = &view[0, 0] if n_picked else NULL
            self._place_picked(n_picked == n_row)
            step.token_ids, step.picked, step.segments = token_ids, picked, segments
            step.n_row, step.n_picked, step.n_segment = n_row, n_picked, n_segment
            self._run(&step)
        return logits[:, : last.width]

    cdef object _room_for_logits(self, int64_t n, int64_t width):
        """float32 [n, width], unfilled: what an earlier step returned if nobody has it any more, since fresh memory is slow."""
        for array in self.spare_logits:
            if array.shape[0] == n and Py_REFCNT(array) == 2:  # the list and this name
                return array
        array = np.empty((n, width), np.float32)
        if array.nbytes <= SPARE_BYTES:
            self.spare_logits = [*self.spare_logits, array][len(self.spare_logits) // 2 :]  # two at most
        return array

    cdef int _run(self, Step *step) except -1:
        step.engine, step.asked, step.interrupted = <void *>self, now(), False
        run(self.n_threads, 2 * self.n_op, run_body, step)
        if step.interrupted:
            return -1  # the exception is the one that the signal's handler raised
        if self.stopping:
            self.stopping = False
            raise StepStopped("the step was stopped")
        return 0

    def stop(self):
        """Ends the step that runs, or else the next one, at its next operation; from another thread."""
        self.stopping = True


cdef void run_body(void *context, Worker *worker) noexcept nogil:
    cdef Step *step = <Step *>context
    run_ops(<Engine>step.engine, step, worker)


cdef void run_ops(Engine engine, Step *step, Worker *worker) noexcept nogil:
    cdef int i
    for i in range(engine.n_op):
        if not (engine.ops[i].on_picked and step.n_picked == 0):
            run_op(engine, &engine.ops[i], step, worker)
        if worker.index == 0 and engine.stopping:
            pe_stop(worker.team)
        if worker.index == 0 and (step.n_row > FEW_ROWS or i % ASK_OPS == 0) and now() - step.asked > SIGNAL_SECONDS:
            if check_signals():
                step.interrupted = True
                pe_stop(worker.team)
            step.asked = now()
        if pe_stopped(worker.team):
            return


cdef void run_op(Engine engine, Op *op, Step *step, Worker *worker) noexcept nogil:
    """This thread's share of an operation: one phase or two, or none where each thread does all of it for itself."""
    cdef Buffer *out = &engine.buffers[op.out]
    cdef Buffer *src = &engine.buffers[op.src] if op.src >= 0 else NULL
    cdef int64_t n_row = step.n_picked if op.on_picked else step.n_row
    cdef float *scratch
    cdef Qkv qkv
    if op.kind == EMBED:
        embed(op, out, step, worker)
    elif op.kind == NORM:
        norm(engine, op, src, out, n_row, worker)
    elif op.kind == LINEAR:
        product(engine, op, src, out, n_row, worker)
    elif op.kind == ATTEND:
        scratch = scratch_of(engine, worker)
        qkv.f32, qkv.bf16, qkv.stride = src.data, NULL, src.stride
        if op.narrow_qkv and n_row > FEW_ROWS:
            qkv.bf16, qkv.stride = engine.qkv.bf16, engine.qkv.q8.stride
        attend(worker, &op.attention, &qkv, step.segments, step.n_segment, scratch, out.data, out.stride)
    elif op.kind == PICK_ROWS:
        if out.data != src.data:
            pick_rows(src, out, step, worker)


cdef inline float *scratch_of(Engine engine, Worker *worker) noexcept nogil:
    return <float *>engine.scratch.data + worker.index * (engine.scratch.nbytes // sizeof(float) // engine.n_threads)


cdef void embed(Op *op, Buffer *out, Step *step, Worker *worker) noexcept nogil:
    cdef Share share = share_of(worker, step.n_row)
    cdef int64_t row, s = 0, i, position
    cdef float *values
    while claim_rows(worker, &share):
        for row in range(share.first, share.last):
            while row >= step.segments[s].row + step.segments[s].n_row:
                s += 1
            position = step.segments[s].position + row - step.segments[s].row
            values = out.data + row * out.stride
            read_row(<PackedMatrix>op.weight, step.token_ids[row], values)
            for i in range(out.width):
                values[i] = values[i] + op.gain[position * out.width + i]


cdef void norm(Engine engine, Op *op, Buffer *src, Buffer *out, int64_t n_row, Worker *worker) noexcept nogil:
    cdef Share share
    cdef int64_t row
    cdef float *to = scratch_of(engine, worker)
    if op.own_rows and n_row <= OWN_ROWS:
        for row in range(n_row):
            kernels().layer_norm(src.data + row * src.stride, src.width, op.gain, op.bias, op.eps, to)
            narrow_row(to, out.width, engine.narrow, worker.index * OWN_ROWS + row)
        return
    share = share_of(worker, n_row)
    while claim_rows(worker, &share):
        for row in range(share.first, share.last):
            if not op.own_rows:
                to = out.data + row * out.stride
            kernels().layer_norm(src.data + row * src.stride, src.width, op.gain, op.bias, op.eps, to)
            if op.narrow:
                narrow_row(to, out.width, engine.narrow, row)


cdef void product(Engine engine, Op *op, Buffer *src, Buffer *out, int64_t n_row, Worker *worker) noexcept nogil:
    cdef int64_t row, first_narrow = 0
    cdef Share share
    cdef void *narrow = <void *>engine.narrow
    cdef pe_output to
    # A thread that is late may narrow rows that are written anew meanwhile; then no unit of its product is left for it.
    if op.own_rows and n_row <= OWN_ROWS:
        first_narrow = worker.index * OWN_ROWS
        for row in range(n_row if op.narrow else 0):
            narrow_row(src.data + row * src.stride, src.width, <NarrowRows>narrow, first_narrow + row)
    elif op.narrow and (op - 1).narrow_out:
        narrow = <void *>engine.narrow_out
    elif op.narrow:
        share = share_of(worker, n_row)
        while claim_rows(worker, &share):
            for row in range(share.first, share.last):
                narrow_row(src.data + row * src.stride, src.width, <NarrowRows>narrow, row)
    if op.narrow_out and n_row > OWN_ROWS:
        linear_narrow(worker, <PackedMatrix>op.weight, <NarrowRows>narrow, n_row, op.bias, op.activation,
                      scratch_of(engine, worker), engine.narrow_out)
        return
    if op.narrow_qkv and n_row > FEW_ROWS:
        linear_narrow(worker, <PackedMatrix>op.weight, <NarrowRows>narrow, n_row, op.bias, op.activation,
                      scratch_of(engine, worker), engine.qkv)
        return
    memset(&to, 0, sizeof(to))
    to.bias, to.out, to.out_stride = op.bias, out.data, out.stride
    if op.residual >= 0:
        to.residual, to.residual_stride = engine.buffers[op.residual].data, engine.buffers[op.residual].stride
    linear(worker, <PackedMatrix>op.weight, src.data, src.stride, <NarrowRows>narrow, first_narrow, n_row, &to, op.activation)


cdef void pick_rows(Buffer *src, Buffer *out, Step *step, Worker *worker) noexcept nogil:
    cdef Share share = share_of(worker, step.n_picked)
    cdef int64_t row
    while claim_rows(worker, &share):
        for row in range(share.first, share.last):
            memcpy(out.data + row * out.stride, src.data + step.picked[row] * src.stride, src.width * sizeof(float))
