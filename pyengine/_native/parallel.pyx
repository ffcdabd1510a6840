# cython: language_level=3, freethreading_compatible=True
"""Parallel regions: the only module that knows OpenMP."""

import os

import numpy as np

from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ..errors import OutOfMemoryError

MOST_THREADS = MAX_THREADS

# OpenMP's threads don't survive a fork: a region entered by the child's main thread would wait for them for ever. A fresh
# thread has none yet. So in a process forked from one that has run a region, all regions are entered from one such thread.
_process = None  # the process that has run the first region
_entrance = None  # (process, the thread that enters its regions)

cdef extern from "team.h" nogil:
    int pe_team_size()  # of a region, from inside; of one thread where OpenMP is not compiled in
    int pe_cpus()

cdef struct Region:
    int n_threads
    Worker *workers
    pe_team team
    Body body
    void *context


cdef int run(int n_threads, int64_t n_phase, Body body, void *context) except -1:
    cdef Region region
    memset(&region, 0, sizeof(region))
    n_threads = team_size(n_threads)
    region.n_threads, region.body, region.context = n_threads, body, context
    region.workers = <Worker *>calloc(n_threads, sizeof(Worker))
    region.team.phases = <pe_phase *>calloc(n_phase + 1, sizeof(pe_phase))
    region.team.n_phase = n_phase
    region.team.shares = <pe_share *>calloc(n_threads * n_phase + 1, sizeof(pe_share))
    try:
        if region.workers == NULL or region.team.phases == NULL or region.team.shares == NULL:
            raise OutOfMemoryError("a parallel region: no memory to share its work")
        if _is_forked():
            _enter_from_thread(&region)
        else:
            with nogil:
                enter(&region)
    finally:
        free(region.workers)
        free(region.team.phases)
        free(region.team.shares)
    return 0


cdef int team_size(int n_threads) except -1:
    if n_threads == 1:
        return 1
    cpus = usable_cpus()
    return min(n_threads, cpus)


cdef void enter(Region *region) noexcept nogil:
    cdef Worker *worker = NULL
    if region.n_threads == 1:  # a region of another size than the last costs OpenMP a new team, and the next one again
        region.workers[0].n_threads, region.workers[0].team = 1, &region.team
        region.body(region.context, &region.workers[0])
        return
    with parallel(num_threads=region.n_threads):
        worker = &region.workers[threadid()]
        worker.index = threadid()
        worker.n_threads = pe_team_size()  # OpenMP may give fewer
        worker.team = &region.team
        region.body(region.context, worker)


def usable_cpus():
    """How many CPUs this thread may use; where OpenMP binds threads (OMP_PROC_BIND), it and those that OpenMP starts."""
    return pe_cpus()


cdef bint _is_forked():
    global _process
    if _process is None:
        _process = os.getpid()
    return os.getpid() != _process


cdef int _enter_from_thread(Region *region) except -1:
    global _entrance
    from concurrent.futures import ThreadPoolExecutor, wait  # slow to import, and seldom needed

    if _entrance is None or _entrance[0] != os.getpid():
        _entrance = (os.getpid(), ThreadPoolExecutor(1))
    done = _entrance[1].submit(_enter, <size_t>region)
    try:
        wait([done])
    except BaseException:  # Ctrl-C; the region must be over before its memory is
        pe_stop(&region.team)
        while not done.done():
            wait([done])
        raise
    return 0


def _enter(size_t address):
    cdef Region *region = <Region *>address
    with nogil:
        enter(region)


cdef struct Taken:
    int64_t n_phase, n_unit
    int64_t n_late  # threads that come when all is done
    int64_t *counts  # [n_phase, n_unit]


cdef void take_units(void *context, Worker *worker) noexcept nogil:
    cdef Taken *taken = <Taken *>context
    cdef pe_phase *last = &worker.team.phases[taken.n_phase - 1]
    cdef int64_t phase, unit
    if worker.index >= worker.n_threads - taken.n_late:
        pe_finish(worker.team, last, 0, taken.n_unit)
    for phase in range(taken.n_phase):
        unit = claim(worker, taken.n_unit)
        while unit >= 0:
            taken.counts[phase * taken.n_unit + unit] += 1
            unit = claim(worker, taken.n_unit)
        sync(worker, taken.n_unit)


def taken(int threads, int64_t n_phase, int64_t n_unit, int64_t n_late):
    """How often each unit of each phase was taken: int64 [n_phase, n_unit]. For tests of `team.h`.

    n_late of more than one thread come when the others have done everything.
    """
    counts = np.zeros((n_phase, n_unit), np.int64)
    cdef int64_t[:, ::1] view = counts
    cdef Taken task
    task.n_phase, task.n_unit, task.n_late, task.counts = n_phase, n_unit, n_late, &view[0, 0]
    run(threads, n_phase, take_units, &task)
    return counts
