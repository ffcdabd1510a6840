from .kernels cimport pe_kernels

# The SIMD level in use. The other modules reach csrc through this pointer alone.
cdef const pe_kernels *kernels() noexcept nogil
