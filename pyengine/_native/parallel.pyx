# cython: language_level=3, freethreading_compatible=True
"""Parallel regions: the only module that knows OpenMP."""

from cython.parallel cimport parallel, threadid
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ..errors import OutOfMemoryError

MOST_THREADS = MAX_THREADS


cdef int run(int n_threads, int64_t n_phase, Body body, void *context) except -1:
    cdef pe_team team
    cdef Worker *worker = NULL
    cdef Worker *workers = <Worker *>calloc(n_threads, sizeof(Worker))
    memset(&team, 0, sizeof(team))
    team.phases = <pe_phase *>calloc(n_phase + 1, sizeof(pe_phase))
    if workers == NULL or team.phases == NULL:
        free(workers)
        free(team.phases)
        raise OutOfMemoryError("a parallel region: no memory to share its work")
    with nogil, parallel(num_threads=n_threads):  # OpenMP may give fewer
        worker = &workers[threadid()]
        worker.index = threadid()
        worker.team = &team
        body(context, worker)
    free(workers)
    free(team.phases)
    return 0
