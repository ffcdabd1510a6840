from libc.stdint cimport int64_t

cdef extern from "team.h" nogil:
    ctypedef struct pe_phase:
        pass
    ctypedef int64_t pe_share
    ctypedef struct pe_team:
        pe_phase *phases
        pe_share *shares
        int64_t n_phase
    int64_t pe_share_first(int64_t, int64_t, int64_t)
    int64_t pe_claim(pe_team *, int64_t, int64_t, int64_t, int64_t, int64_t *)
    void pe_finish(pe_team *, pe_phase *, int64_t, int64_t)
    void pe_stop(pe_team *)
    bint pe_stopped(pe_team *)

# One thread of a parallel region. The work of a phase is shared like this, with the same n_unit on all threads:
#     unit = claim(worker, n_unit)
#     while unit >= 0:
#         ...
#         unit = claim(worker, n_unit)
#     sync(worker, n_unit)
# After sync the work of all threads can be read. A thread's units come in ascending order as long as they are of its own share;
# then those of others, from the end of each: a loop that walks along must be able to go back.
ctypedef struct Worker:
    int index
    int n_threads  # of the region
    pe_team *team
    int64_t phase
    int64_t n_claimed  # units of this phase
    int64_t n_helped  # shares of this phase in which nothing is left, its own first

# One thread alone counts for itself: weights have driven a phase's memory out of its caches by the time it comes.
cdef inline int64_t claim(Worker *worker, int64_t n_unit) noexcept nogil:
    cdef int64_t unit
    if worker.n_threads > 1:
        unit = pe_claim(worker.team, worker.phase, worker.index, worker.n_threads, n_unit, &worker.n_helped)
    else:
        unit = worker.n_claimed if worker.n_claimed < n_unit else -1
    worker.n_claimed += unit >= 0
    return unit

cdef inline void sync(Worker *worker, int64_t n_unit) noexcept nogil:
    if worker.n_threads > 1:
        pe_finish(worker.team, &worker.team.phases[worker.phase], worker.n_claimed, n_unit)
    worker.phase += 1
    worker.n_claimed = worker.n_helped = 0

# A phase over rows, of which each is little work: several are taken at once.
#     share = share_of(worker, n_row)
#     while claim_rows(worker, &share):
#         for row in range(share.first, share.last): ...
cdef enum: UNIT_ROWS = 8

cdef struct Share:
    int64_t first, last, n_row, unit_rows

cdef inline Share share_of(Worker *worker, int64_t n_row) noexcept nogil:
    cdef Share share
    share.first = share.last = 0
    share.n_row = n_row
    share.unit_rows = UNIT_ROWS if n_row >= 4 * UNIT_ROWS * worker.n_threads else 1
    return share

cdef inline bint claim_rows(Worker *worker, Share *share) noexcept nogil:
    """The next rows; when there are none left, waits until all are done."""
    cdef int64_t n_unit = (share.n_row + share.unit_rows - 1) // share.unit_rows, unit = claim(worker, n_unit)
    if unit < 0:
        sync(worker, n_unit)
        return False
    share.first = unit * share.unit_rows
    share.last = min(share.first + share.unit_rows, share.n_row)
    return True

ctypedef void (*Body)(void *context, Worker *worker) noexcept nogil

# How many of n_threads a region gets: no more than there are CPUs for them, where they would only take each other's place.
cdef int team_size(int n_threads) except -1

# Runs body(context, worker) on up to team_size(n_threads) threads at once, and waits for all. n_phase: how often a body syncs, at
# most. Called with the GIL, which it releases. Raises OutOfMemoryError.
cdef int run(int n_threads, int64_t n_phase, Body body, void *context) except -1

# The most threads of a region.
cdef enum: MAX_THREADS = 1024
