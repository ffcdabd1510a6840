# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The native executor: runs a program over the rows of a step, in one parallel region; an operation starts when the one before
is done. `step` takes any rows; `decode` goes on by itself for some steps, where nothing but logits says what comes next.
"""

import numpy as np

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t

from .attention cimport Segment
from .drawing cimport uniform_at
from .kernels cimport PE_PAGE
from .matmul cimport FEW_ROWS
from .memory cimport Block
from .operations cimport OP_PHASES, Batch, run_op
from .parallel cimport Worker, claim, pe_stop, pe_stopped, run, sync
from .program cimport Buffer, Program
from .sampling cimport Wish, Workspace, filters_of

from ..errors import ArgumentError, StepStopped

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

cdef enum:
    SPARE_BYTES = 1 << 24  # the most of an array of logits that is kept
    ASK_OPS = 8  # operations of few rows between two looks at the clock

# How a row's next token is drawn: see `decode`.
cdef struct Draw:
    Wish wish
    uint64_t seed, position
    uint32_t sample_index
    double logprob  # out: of the token

# One step: what the threads share.
cdef struct Step:
    void *engine
    Batch batch
    Draw *draws  # a token for each of the picked rows; NULL for none
    void **works
    double asked  # when signals were last looked at
    bint interrupted  # a signal's handler raised


cdef double now() noexcept nogil:
    cdef timespec t
    timespec_get(&t, TIME_UTC)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef int check_signals() noexcept with gil:
    return PyErr_CheckSignals()


cdef class Engine:
    """Runs a program. Not to be used from two threads at once."""

    cdef Program program
    cdef list spare_logits
    cdef bint stopping

    def __init__(self, Program program):
        self.program, self.spare_logits = program, []

    def step(self, list parts):
        """Runs the plan over the rows of some sequences; returns the logits of those that want them, float32 [n, vocab_size].

        A part is (token_ids, pages, position, n_logits): int32 [n]; the addresses of the sequence's KV pages, uintp; the position
        of the first token; how many of the last rows want logits. Keys and values are stored, the caller keeps count.
        Raises what a signal's handler raises (KeyboardInterrupt), and StepStopped after `stop`; it can then be done again.
        """
        cdef Step step
        cdef Block memory = self._place(parts, 1, &step.batch)
        cdef Buffer *last = self.program.logits()
        logits = self._room_for_logits(step.batch.n_picked, last.stride)
        if step.batch.n_row:
            step.draws, step.works = NULL, NULL
            self._run(&step, logits)
        return logits[:, : last.width]

    def decode(self, list parts, draws, int64_t n_step, double seconds, list works, urgent):
        """Up to n_step steps of a row of each sequence, where the token that is drawn after a row is the next step's row.

        parts are those of `step`, of one token each that wants its logits, with pages for n_step positions. A draw for each is
        (temperature, top_k, top_p, min_p, seed, sample_index, position, stop_ids): the first four as in `draw_rows`; the number
        is `uniform(seed, sample_index, position)`, of the token's position in the text; token ids that are the last.
        works are a `Workspace` for each thread.

        It ends before n_step steps after one that drew a stop id for any part, or had logits that can't be used; so that it takes
        no longer than `seconds`, of wall time; if `urgent()`, a callable, says that something waits; after `stop`.
        Returns for each step and part the token id and its log-probability, or -1 for unusable logits; and the last step's
        logits, float32 [parts, vocab_size]. Raises what `step` raises, as long as not one step is done.
        """
        cdef int64_t n_part = len(parts), i, n = 0
        cdef Step step
        cdef Block memory = self._place(parts, n_step, &step.batch)
        cdef Block drawing = Block(n_part * sizeof(Draw) + self.program.n_threads * sizeof(void *), "drawing")
        cdef Draw *draw = <Draw *>drawing.data
        cdef int32_t *token_ids = <int32_t *>step.batch.token_ids
        cdef Segment *segments = <Segment *>step.batch.segments
        cdef Buffer *last = self.program.logits()
        cdef double start = now()
        if not n_part or len(draws) != n_part or step.batch.n_row != n_part or step.batch.n_picked != n_part or n_step < 1:
            raise ArgumentError("decode: expected at least a step, of a row and a draw for each part, which wants its logits")
        step.draws, step.works = draw, <void **>(draw + n_part)
        self._tell_works(works, &step)
        for i in range(n_part):
            tell_draw(draws[i], &draw[i])
        stops = [one[7] for one in draws]
        logits = self._room_for_logits(n_part, last.stride)
        found = []
        while True:
            try:
                self._run(&step, logits)
            except StepStopped:
                if n == 0:
                    raise
                break
            n += 1
            drawn = [(draw[i].wish.token_ids[0], draw[i].logprob) for i in range(n_part)]
            found.append(drawn)
            if n == n_step or ends(drawn, stops) or (now() - start) * (n + 1) > seconds * n or urgent():
                break
            for i in range(n_part):
                token_ids[i] = draw[i].wish.token_ids[0]
                segments[i].position += 1
                draw[i].position += 1
        return found, logits[:, : last.width]

    cdef int _tell_works(self, list works, Step *step) except -1:
        cdef Workspace work
        if len(works) != self.program.n_threads:
            raise ArgumentError(f"works: expected one for each of {self.program.n_threads} threads, got {len(works)}")
        for i, work in enumerate(works):
            if work.vocab_size != self.program.logits().width:
                raise ArgumentError(f"works: expected them for {self.program.logits().width} logits, got {work.vocab_size}")
            step.works[i] = <void *>work
        return 0

    cdef Block _place(self, list parts, int64_t n_step, Batch *batch):
        """The rows of the parts, checked; the block holds what the batch points to."""
        cdef int64_t n_segment = len(parts), n_row = 0, n_picked = 0, n_wanted = 0, i, j, n, position, n_logits
        for part in parts:
            n_row += len(part[0])
            n_picked += part[3]
        cdef Block memory = Block(2 * n_segment * sizeof(Segment) + (n_row + n_picked) * sizeof(int32_t), "step")
        cdef Segment *segments = <Segment *>memory.data
        cdef Segment *wanted = segments + n_segment
        cdef int32_t *token_ids = <int32_t *>(wanted + n_segment)
        cdef int32_t *picked = token_ids + n_row
        cdef const int32_t[::1] ids
        cdef const uintptr_t[::1] pages
        cdef int64_t max_seq_len = self.program.max_seq_len, vocab_size = self.program.vocab_size
        n_row = n_picked = 0
        for i in range(n_segment):
            ids, pages, position, n_logits = parts[i]
            n = ids.shape[0]
            if n < 1 or not 0 <= n_logits <= n:
                raise ArgumentError(f"rows: expected at least one and logits of as many at most, got {n} and {n_logits}")
            if not 0 <= position <= min(max_seq_len, pages.shape[0] * PE_PAGE) - n - n_step + 1:
                raise ArgumentError(f"position: expected less than {max_seq_len} and a page for each")
            for j in range(n):
                if not 0 <= ids[j] < vocab_size:
                    raise ArgumentError(f"token id: expected 0..{vocab_size - 1}, got {ids[j]}")
                token_ids[n_row + j] = ids[j]
            segments[i].row, segments[i].n_row, segments[i].position = n_row, n, position
            segments[i].pages = <void **>&pages[0]
            n_row += n
            if n_logits:
                wanted[n_wanted].row, wanted[n_wanted].n_row = n_row - n_logits, n_logits
                wanted[n_wanted].position, wanted[n_wanted].pages = position + n - n_logits, segments[i].pages
                n_wanted += 1
            for j in range(n_logits):
                picked[n_picked + j] = n_row - n_logits + j
            n_picked += n_logits
        batch.token_ids, batch.picked, batch.segments = token_ids, picked, segments
        batch.n_row, batch.n_picked, batch.n_segment = n_row, n_picked, n_segment
        batch.wanted, batch.n_wanted = (segments, n_segment) if n_picked == n_row else (wanted, n_wanted)
        return memory

    cdef object _room_for_logits(self, int64_t n, int64_t width):
        """float32 [n, width], unfilled, on cache lines, since a store that straddles two costs a product a tenth of its time: what
        an earlier step returned if nobody has it any more, since fresh memory is slow."""
        for array in self.spare_logits:
            if array.shape[0] == n and Py_REFCNT(array) == 2:  # the list and this name
                return array
        array = np.ndarray((n, width), np.float32, Block(n * width * sizeof(float), "logits"))
        if array.nbytes <= SPARE_BYTES:
            self.spare_logits = [*self.spare_logits, array][len(self.spare_logits) // 2 :]  # two at most
        return array

    cdef int _run(self, Step *step, float[:, ::1] logits) except -1:
        self.program.reserve(step.batch.n_row, step.batch.n_picked)
        self.program.logits().data = &logits[0, 0] if step.batch.n_picked else NULL
        self.program.place_picked(step.batch.n_picked == step.batch.n_row)
        step.engine, step.asked, step.interrupted = <void *>self, now(), False
        run(self.program.n_threads, OP_PHASES * self.program.n_op + 1, run_body, step)
        if step.interrupted:
            return -1  # the exception is the one that the signal's handler raised
        if self.stopping:
            self.stopping = False
            raise StepStopped("the step was stopped")
        return 0

    def stop(self):
        """Ends the step that runs, or else the next one, at its next operation; from another thread."""
        self.stopping = True


cdef int tell_draw(asked, Draw *draw) except -1:
    temperature, top_k, top_p, min_p, draw.seed, draw.sample_index, draw.position, _ = asked
    draw.wish.filters = filters_of(temperature, top_k, top_p, min_p, 1)
    draw.wish.n_uniform, draw.wish.masking.bits, draw.wish.cut = 1, NULL, -INFINITY
    return 0


cdef bint ends(list found, list stops):
    """Whether a text ends with these tokens, or can't go on."""
    for (token_id, _), stop_ids in zip(found, stops):
        if token_id < 0 or token_id in stop_ids:
            return True
    return False


cdef void run_body(void *context, Worker *worker) noexcept nogil:
    cdef Step *step = <Step *>context
    if run_ops(<Engine>step.engine, (<Engine>step.engine).program, step, worker) and step.draws != NULL:
        draw_rows((<Engine>step.engine).program.logits(), step, worker)


cdef bint run_ops(Engine engine, Program program, Step *step, Worker *worker) noexcept nogil:
    """Returns whether it came to the end."""
    cdef int i
    for i in range(program.n_op):
        if not (program.ops[i].on_picked and step.batch.n_picked == 0):
            run_op(program, &program.ops[i], &step.batch, worker)
        if worker.index == 0 and engine.stopping:
            pe_stop(worker.team)
        if worker.index == 0 and (step.batch.n_row > FEW_ROWS or i % ASK_OPS == 0) and now() - step.asked > SIGNAL_SECONDS:
            if check_signals():
                step.interrupted = True
                pe_stop(worker.team)
            step.asked = now()
        if pe_stopped(worker.team):
            return False
    return True


cdef void draw_rows(const Buffer *logits, Step *step, Worker *worker) noexcept nogil:
    """A token from each row of logits."""
    cdef int64_t n = step.batch.n_picked, row = claim(worker, n)
    cdef const float *x
    cdef Draw *draw
    cdef double total
    while row >= 0:
        x = logits.data + row * logits.stride
        draw = &step.draws[row]
        draw.wish.uniforms[0] = uniform_at(draw.seed, draw.sample_index, draw.position, 0)
        total = (<Workspace>step.works[worker.index]).draw_row(x, &draw.wish)
        draw.logprob = x[draw.wish.token_ids[0]] - total if draw.wish.token_ids[0] >= 0 else 0.0
        row = claim(worker, n)
    sync(worker, n)
