from .kernels cimport pe_activation

# The activation of that name; raises ArgumentError for another. None is none.
cdef pe_activation activation_of(name) except *

# The one to use where the result becomes bfloat16 or int8.
cdef pe_activation coarse(pe_activation kind) noexcept nogil
