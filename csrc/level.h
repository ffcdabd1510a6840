/* What every level's file (isa/NAME.c) opens with: how a compiler is told of a target, and how a level's table is defined.
 *
 * A level's file: PE_TARGET_BEGIN, its headers, the primitives that kernels.inc.h lists, the sizes of its tiles, kernels.inc.h,
 * PE_DEFINE_LEVEL, PE_TARGET_END; PE_NO_LEVEL for other processors. setup.py finds the file by its name. */
#ifndef PE_LEVEL_H
#define PE_LEVEL_H

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define PE_X86 1
#else
#define PE_X86 0
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
#define PE_ARM64 1
#else
#define PE_ARM64 0
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define PE_MSVC 1 /* no inline assembly on 64-bit targets, no target regions: it takes every intrinsic anywhere */
#else
#define PE_MSVC 0
#endif

#define PE_STRING(x) #x
#if PE_MSVC
#define PE_INLINE static __forceinline
#define PE_UNROLL
#define PE_TARGET_BEGIN(features)
#define PE_TARGET_END
#elif defined(__clang__)
#define PE_INLINE static inline __attribute__((always_inline, unused))
#define PE_UNROLL _Pragma("clang loop unroll(full)") /* not "unroll": that is done before inlining makes the counts known */
#define PE_TARGET_BEGIN(features) _Pragma(PE_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define PE_TARGET_END _Pragma("clang attribute pop")
#else
#define PE_INLINE static inline __attribute__((always_inline, unused))
#define PE_UNROLL _Pragma("GCC unroll 16")
#define PE_TARGET_BEGIN(features) _Pragma("GCC push_options") _Pragma(PE_STRING(GCC target(features)))
#define PE_TARGET_END _Pragma("GCC pop_options")
#endif

/* A local array on cache lines: a vector that straddles two costs twice. */
#if PE_MSVC
#define PE_ALIGNED __declspec(align(64))
#else
#define PE_ALIGNED __attribute__((aligned(64)))
#endif

/* Makes the compiler believe that v has changed: for loops that only measure. */
#if PE_MSVC
#define PE_FORGET(v) ((void)(v))
#else
#define PE_FORGET(v) __asm__ volatile("" : "+m"(v))
#endif

/* Makes the compiler forget how a pointer came to be, so that it doesn't keep a copy for each offset. */
#if PE_MSVC
#define PE_HIDE(p) ((void)0)
#else
#define PE_HIDE(p) __asm__("" : "+r"(p))
#endif

/* Fetches the cache line of p, to be written, or to be read; FAR: into the L2 cache alone. PE_AHEAD: bytes between a read of
 * weights and what is fetched; PE_STREAM_AHEAD where the processor's own prefetching leads. */
#define PE_AHEAD 8192
#define PE_STREAM_AHEAD 4096
#if PE_MSVC
#define PE_PREFETCH_WRITE(p) ((void)(p))
#define PE_PREFETCH(p) ((void)(p))
#define PE_PREFETCH_FAR(p) ((void)(p))
#else
#define PE_PREFETCH_WRITE(p) __builtin_prefetch((p), 1)
#define PE_PREFETCH(p) __builtin_prefetch(p)
#define PE_PREFETCH_FAR(p) __builtin_prefetch((p), 0, 2)
#endif

/* Which weights a tile asks for while it computes, since processors alone fetch too late: with line i of a panel (64 bytes), the one
 * at the panel's start + bytes + i * pace. `into` is a constant. A tile of many rows has time, and finds them in the L1 cache. One of
 * few waits for memory: lines on their way to the L1 cache would take up what its own loads wait in, so the L2 cache is as near as
 * they come; with very few rows the processor's own prefetching does better. */
enum { PE_NOWHERE, PE_L1, PE_L2 };
typedef struct {
    int64_t bytes, pace;
    int into;
} pe_ahead;
#define PE_PREFETCH_WEIGHTS(into, p)                                                                                 \
    do {                                                                                                             \
        if ((into) == PE_L1)                                                                                         \
            PE_PREFETCH(p);                                                                                          \
        else if ((into) == PE_L2)                                                                                    \
            PE_PREFETCH_FAR(p);                                                                                      \
    } while (0)

/* A panel that one tile goes through alone is a stream: it asks for what is a little further on. Else the panels after these are asked
 * for, by all tiles that lie below each other, each a share, at such a pace that the bus is never asked for more than it brings. */
PE_INLINE pe_ahead pe_ahead_of(int into, int64_t tile, int64_t n_tile, int64_t panels, int64_t panel_bytes)
{
    if (n_tile == 1 && panels == 1)
        return (pe_ahead){PE_AHEAD, 64, into};
    return (pe_ahead){panels * panel_bytes + tile * panel_bytes / n_tile, (64 + n_tile - 1) / n_tile, into};
}

static const int8_t pe_q4_codebook[16] = PE_Q4_CODEBOOK;

/* Four bytes as they lie, from any address. */
PE_INLINE int32_t pe_load_i32(const void *p)
{
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* The level's table, by a function of its name: NULL where the file is for another processor. */
#define PE_NO_LEVEL(level)                                                                                           \
    const pe_kernels *pe_level_##level(void);                                                                        \
    const pe_kernels *pe_level_##level(void) { return 0; }

#define PE_DEFINE_LEVEL(level, features, rank)                                                                       \
    const pe_kernels *pe_level_##level(void);                                                                        \
    const pe_kernels *pe_level_##level(void)                                                                         \
    {                                                                                                                \
        static const pe_kernels table = {                                                                            \
            .name = #level,                                                                                          \
            .requires = (features),                                                                                  \
            .priority = (rank),                                                                                      \
            .matmul_f32 = matmul_f32,                                                                                \
            .matmul_q8 = matmul_q8,                                                                                  \
            .matmul_bf16 = matmul_bf16,                                                                              \
            .matmul_q4 = matmul_q4,                                                                                  \
            .accumulate_f32 = accumulate_f32,                                                                        \
            .accumulate_bf16 = accumulate_bf16,                                                                      \
            .quantize_q8 = quantize_q8,                                                                              \
            .narrow_bf16 = narrow_bf16,                                                                              \
            .layer_norm = layer_norm,                                                                                \
            .activate = activate,                                                                                    \
            .softmax_rows = softmax_rows,                                                                            \
            .softmax_end = softmax_end,                                                                              \
            .softmax = softmax,                                                                                      \
            .row_max = row_max,                                                                                      \
            .exp_sum = exp_sum,                                                                                      \
            .spin_f32 = spin_f32,                                                                                    \
            .spin_bf16 = spin_bf16,                                                                                  \
            .spin_q8 = spin_q8,                                                                                      \
            .read = read_bytes,                                                                                      \
            .load_panel = load_panel,                                                                                \
            .largest = largest,                                                                                      \
            .panel_squares = panel_squares,                                                                          \
            .pack_q8 = pack_q8,                                                                                      \
            .pack_bf16 = pack_bf16,                                                                                  \
            .pack_q4 = pack_q4,                                                                                      \
            .turn_words = turn_words,                                                                                \
            .narrow_q8 = narrow_q8,                                                                                  \
            .widen_keys_q8 = widen_keys_q8,                                                                          \
            .widen_values_q8 = widen_values_q8,                                                                      \
            .score_q8 = score_q8,                                                                                    \
            .accumulate_q8 = accumulate_q8,                                                                          \
        };                                                                                                           \
        return &table;                                                                                               \
    }

#endif
