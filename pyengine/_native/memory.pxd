cdef extern from "memory.h" nogil:
    void pe_prefetch(const char *, size_t)

# A block of memory that starts on a cache line and is not filled with anything.
cdef class Block:
    cdef void *data
    cdef readonly size_t nbytes
