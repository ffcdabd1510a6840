# cython: language_level=3, freethreading_compatible=True
"""Aligned memory."""

from ..errors import OutOfMemoryError

cdef extern from "memory.h" nogil:
    void *pe_allocate(size_t)
    void pe_free(void *)


cdef class Block:
    """`nbytes` of memory, aligned to a cache line, unfilled; `what` names it in the error when there is not enough."""

    def __cinit__(self, size_t nbytes, what="memory"):
        self.data = pe_allocate(nbytes)
        if self.data == NULL:
            raise OutOfMemoryError(f"{what}: {nbytes:,} bytes can't be allocated")
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.data != NULL:
            pe_free(self.data)

    @property
    def address(self):
        """Where the block starts."""
        return <size_t>self.data
