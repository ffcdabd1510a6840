from .kernels cimport pe_activation

# The activation of that name; raises ArgumentError for another. None is none.
cdef pe_activation activation_of(name) except *
