# cython: language_level=3, freethreading_compatible=True
"""Aligned memory, and checksums of memory."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from ..errors import OutOfMemoryError

cdef extern from "memory.h" nogil:
    void *pe_allocate(size_t)
    void *pe_allocate_pages(size_t, bint)
    void pe_free(void *)
    enum: PE_ALIGNMENT


cdef enum:
    CHUNK = 1 << 25  # what an arena asks the system for at once; of that, only what is filled takes memory


cdef class Arena:
    """Memory in huge pages, of which blocks are parts. It is given back when the last of them is gone.

    Where threads on several memory nodes share a block, one that has less than two huge pages a node lies in small ones: a page is on
    one node, so that of huge ones some threads would have none nearby. Reading small ones takes 1.06 to 1.11 of the time.
    """

    def __cinit__(self, int nodes=1):
        self.least_huge = 0 if nodes == 1 else 2 * nodes * PE_HUGE_PAGE

    def __dealloc__(self):
        for i in range(self.n_chunk):
            pe_free(self.chunks[i])
        free(self.chunks)

    cdef void *take(self, size_t nbytes) noexcept:
        """A part that starts on a cache line, or NULL where there is no memory."""
        cdef void **chunks
        cdef void *part
        cdef bint huge = nbytes >= self.least_huge
        nbytes = (nbytes + PE_ALIGNMENT - 1) // PE_ALIGNMENT * PE_ALIGNMENT
        if nbytes > self.n_left[huge]:
            chunks = <void **>realloc(self.chunks, (self.n_chunk + 1) * sizeof(void *))
            if chunks == NULL:
                return NULL
            self.chunks = chunks
            part = pe_allocate_pages(max(nbytes, <size_t>CHUNK), huge)
            if part == NULL:
                return NULL
            self.chunks[self.n_chunk] = self.next[huge] = <char *>part
            self.n_chunk += 1
            self.n_left[huge] = max(nbytes, <size_t>CHUNK)
        part = self.next[huge]
        self.next[huge] += nbytes
        self.n_left[huge] -= nbytes
        return part


cdef class Block:
    """`nbytes` of memory, aligned to a cache line, unfilled, or a part of an arena; `what` names it in the error when there is not
    enough.

    It is a buffer: memoryview(block) are its bytes.
    """

    def __cinit__(self, size_t nbytes, what="memory", Arena arena=None):
        self.arena, self.own = arena, arena is None
        self.data = pe_allocate(nbytes) if arena is None else arena.take(nbytes)
        if self.data == NULL:
            raise OutOfMemoryError(f"{what}: {nbytes:,} bytes can't be allocated")
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.data != NULL and self.own:  # the garbage collector may have cleared `arena`
            pe_free(self.data)

    @property
    def address(self):
        """Where the block starts."""
        return <size_t>self.data

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, 0, flags)


cdef enum:
    N_LANE = 8


def checksum(const uint8_t[::1] data not None):
    """64 bytes that change with any byte of `data`: 8 lanes of 64 bits, as fast as memory is read.

    Against accidents: who wants to can find other data with the same checksum. A word enters its lane by operations that
    each can be undone, so data that differ in one word alone never have the same.
    """
    cdef uint64_t lanes[N_LANE]
    cdef uint64_t words[N_LANE]
    cdef size_t n = data.shape[0], i, n_left = n % sizeof(words)
    cdef int j
    cdef const uint8_t *at = &data[0] if n else NULL
    with nogil:
        for j in range(N_LANE):
            lanes[j] = n + j
        for i in range(n // sizeof(words)):
            memcpy(words, at + i * sizeof(words), sizeof(words))
            mix(lanes, words)
        if n_left:
            memset(words, 0, sizeof(words))
            memcpy(words, at + n - n_left, n_left)
            mix(lanes, words)
    return (<const uint8_t *>lanes)[:sizeof(lanes)]


cdef inline void mix(uint64_t *lanes, const uint64_t *words) noexcept nogil:
    """The round of XXH64 (Collet 2012), whose top bits reach others too before the next word comes."""
    cdef int j
    for j in range(N_LANE):
        lanes[j] += words[j] * <uint64_t>0xc2b2ae3d27d4eb4f
        lanes[j] = (lanes[j] << 31 | lanes[j] >> 33) * <uint64_t>0x9e3779b185ebca87
