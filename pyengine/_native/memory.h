/* Memory on cache lines: what packed weights and activation buffers live in. */
#ifndef PE_MEMORY_H
#define PE_MEMORY_H

#include <stddef.h>
#include <stdlib.h>

#define PE_ALIGNMENT 64

#if defined(_WIN32)
#include <malloc.h>
static inline void *pe_allocate(size_t size) { return _aligned_malloc(size ? size : 1, PE_ALIGNMENT); }
static inline void pe_free(void *p) { _aligned_free(p); }
#else
static inline void *pe_allocate(size_t size)
{
    void *p = NULL;
    return posix_memalign(&p, PE_ALIGNMENT, size ? size : 1) ? NULL : p;
}
static inline void pe_free(void *p) { free(p); }
#endif

/* The same in huge pages where the system has them: weights are more memory than a processor remembers small pages of, and each
 * look-up of one holds up the stream. */
#if defined(__linux__)
#include <sys/mman.h>
#define PE_HUGE_PAGE ((size_t)1 << 21)
static inline void *pe_allocate_huge(size_t size)
{
    void *p = NULL;
    if (posix_memalign(&p, PE_HUGE_PAGE, size))
        return NULL;
    madvise(p, size, MADV_HUGEPAGE);
    return p;
}
#else
static inline void *pe_allocate_huge(size_t size) { return pe_allocate(size); }
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PE_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#else
#define PE_PREFETCH(p) ((void)(p))
#endif

/* Asks for `size` bytes that are soon to be read. */
static inline void pe_prefetch(const char *p, size_t size)
{
    for (size_t i = 0; i < size; i += PE_ALIGNMENT)
        PE_PREFETCH(p + i);
}

#endif
