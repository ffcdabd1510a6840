cdef extern from "memory.h" nogil:
    void pe_prefetch(const char *, size_t)
    void pe_touch(char *, size_t, size_t)
    const size_t PE_SMALL_PAGE, PE_HUGE_PAGE

cdef class Arena:
    cdef void **chunks
    cdef int n_chunk
    cdef size_t least_huge  # what a block in huge pages has at least
    cdef char *next[2]  # where the free part of the last chunk in small pages starts, and of that in huge ones
    cdef size_t n_left[2]  # bytes of it
    cdef void *take(self, size_t nbytes) noexcept

# A block of memory that starts on a cache line and is not filled with anything.
cdef class Block:
    cdef void *data
    cdef Arena arena  # whose part it is, or None
    cdef bint own  # it is no part of an arena
    cdef readonly size_t nbytes
