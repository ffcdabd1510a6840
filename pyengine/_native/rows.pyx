# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""What is asked of many rows of logits in a step, on all threads: to draw from each, or the largest of each.

A thread for each of `works`, which are of one vocab_size. Rows are taken one by one: none waits for another.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from .logprobs cimport log_sum_exp
from .memory cimport Block
from .parallel cimport Worker, claim, run, sync
from .sampling cimport N_UNIFORM, Entry, Wish, Workspace, filters_of, masking_of

import numpy as np

from ..errors import ArgumentError
from .sampling import ENTRY


cdef struct Row:
    const float *x
    double total  # out: the logits' logsumexp, NaN where they can't be used
    Wish wish  # of draw_rows
    Entry *entries  # out, of top_rows, or NULL
    int64_t n_entry  # the most, and how many came

cdef struct Task:
    void **works
    Row *rows
    int64_t n_row


def draw_rows(list works, list logits, list asked, list masks=None):
    """Tokens drawn from each row: the first whose cumulative probability, over ascending ids, exceeds a number in [0, 1).

    logits are float32 [vocab_size] each. What is asked is (temperature, top_k, top_p, min_p, uniforms): up to 4 numbers are
    drawn by, from softmax(logits / temperature), of which only these tokens stay, in this order: the top_k largest (0: all);
    the fewest largest whose mass reaches top_p (Holtzman et al. 2019); those of at least min_p times the largest probability.
    temperature >= 0, where 0 is for the largest logit, the lowest id of those that tie; 0 < top_p <= 1, 0 <= min_p < 1.

    masks are bits and end_ids of `Workspace.mask`, and a cut. Then what the filters left, the logits from the cut up, is
    drawn from as far as it is allowed. If nothing of it is, the filters see what is allowed instead.

    Returns a list of token ids for each row, all -1 where there are none; the logits' logsumexp, float64 [n], NaN where they
    can't be used, and with masks; of rows with several numbers the cut, the lowest logit that the filters leave.
    """
    cdef int64_t n = len(logits), i, j
    cdef Block rows = rows_of(works, logits)
    cdef Row *row = <Row *>rows.data
    cdef Wish *wish
    for i in range(n):
        wish = &row[i].wish
        temperature, top_k, top_p, min_p, uniforms = asked[i]
        wish.filters = filters_of(temperature, top_k, top_p, min_p, 1)
        if len(uniforms) > N_UNIFORM:
            raise ArgumentError(f"uniforms: expected at most {N_UNIFORM}, got {len(uniforms)}")
        wish.n_uniform = len(uniforms)
        for j in range(wish.n_uniform):
            wish.uniforms[j] = uniforms[j]
        if masks is not None:
            bits, end_ids, wish.cut = masks[i]
            masking_of(&wish.masking, (bits, end_ids), (<Workspace>works[0]).vocab_size)
    run_rows(works, rows, n)
    token_ids = [[row[i].wish.token_ids[j] for j in range(row[i].wish.n_uniform)] for i in range(n)]
    return token_ids, [row[i].total for i in range(n)], [row[i].wish.cut for i in range(n)]


def top_rows(list works, list logits, int64_t k):
    """What `Workspace.top` gives for each row, k > 0, and the logits' logsumexp, float64 [n], NaN where it can't be used."""
    cdef int64_t n = len(logits), n_entry = min(k, (<Workspace>works[0]).vocab_size), i
    cdef Block rows = rows_of(works, logits)
    cdef Row *row = <Row *>rows.data
    out = np.empty((n, n_entry), ENTRY)
    cdef Entry[:, ::1] entries = out
    for i in range(n):
        row[i].entries, row[i].n_entry = &entries[i, 0], n_entry
    run_rows(works, rows, n)
    found = [(out["token_id"][i, : row[i].n_entry], out["value"][i, : row[i].n_entry]) for i in range(n)]
    return found, np.array([row[i].total for i in range(n)])


cdef Block rows_of(list works, list logits):
    cdef Block rows = Block(len(logits) * sizeof(Row), "sampling")
    cdef Row *row = <Row *>rows.data
    cdef const float[::1] x
    cdef int64_t i
    for i in range(len(logits)):
        x = logits[i]
        (<Workspace>works[0]).check(x)
        row[i].x, row[i].wish.masking.bits, row[i].entries = &x[0], NULL, NULL
        row[i].wish.cut = -INFINITY
    return rows


cdef int run_rows(list works, Block rows, int64_t n_row) except -1:
    cdef Block pointers = Block(len(works) * sizeof(void *), "sampling")
    cdef Task task
    cdef Workspace work
    task.works, task.rows, task.n_row = <void **>pointers.data, <Row *>rows.data, n_row
    for i, work in enumerate(works):
        task.works[i] = <void *>work
    return run(len(works), 1, body, &task)


cdef void body(void *context, Worker *worker) noexcept nogil:
    cdef Task *task = <Task *>context
    cdef int64_t unit = claim(worker, task.n_row)
    while unit >= 0:
        answer(<Workspace>task.works[worker.index], &task.rows[unit])
        unit = claim(worker, task.n_row)
    sync(worker, task.n_row)


cdef void answer(Workspace work, Row *row) noexcept nogil:
    if row.entries == NULL:
        row.total = work.draw_row(row.x, &row.wish)
        return
    row.total = log_sum_exp(row.x, work.vocab_size)
    row.n_entry = work.top_row(row.x, &row.wish.masking, row.n_entry, row.entries) if row.total == row.total else 0
