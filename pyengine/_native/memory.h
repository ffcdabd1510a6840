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

#define PE_SMALL_PAGE ((size_t)1 << 12)
#define PE_HUGE_PAGE ((size_t)1 << 21)

/* The same in huge pages where the system has them, or in small ones: weights are more memory than a processor remembers small
 * pages of, and each look-up of one holds up the stream. */
#if defined(__linux__)
#include <sys/mman.h>
static inline void *pe_allocate_pages(size_t size, int huge)
{
    void *p = NULL;
    if (posix_memalign(&p, PE_HUGE_PAGE, size))
        return NULL;
    madvise(p, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return p;
}
#else
static inline void *pe_allocate_pages(size_t size, int huge) { return (void)huge, pe_allocate(size); }
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PE_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#else
#define PE_PREFETCH(p) ((void)(p))
#endif

/* Writes to each page that starts in this memory, which nobody has filled yet: the system makes it of memory near the thread that
 * touches it first. */
static inline void pe_touch(char *p, size_t size, size_t page)
{
    for (size_t i = (page - (size_t)p % page) % page; i < size; i += page)
        *(volatile char *)(p + i) = 0;
}

/* Asks for `size` bytes that are soon to be read. */
static inline void pe_prefetch(const char *p, size_t size)
{
    for (size_t i = 0; i < size; i += PE_ALIGNMENT)
        PE_PREFETCH(p + i);
}

#endif
