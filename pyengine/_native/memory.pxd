cdef extern from "memory.h" nogil:
    void pe_prefetch(const char *, size_t)

cdef class Arena:
    cdef void **chunks
    cdef int n_chunk
    cdef char *next  # where the last chunk's free part starts
    cdef size_t n_left  # bytes of it
    cdef void *take(self, size_t nbytes) noexcept

# A block of memory that starts on a cache line and is not filled with anything.
cdef class Block:
    cdef void *data
    cdef Arena arena  # whose part it is, or None
    cdef bint own  # it is no part of an arena
    cdef readonly size_t nbytes
