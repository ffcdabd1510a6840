/* How the threads of a parallel region share work. The work is a row of phases; a phase is a number of units, of which each thread
 * has a share, side by side: it takes them from the front, one by one. So it goes through memory in one piece, which is what
 * prefetching counts on, and through the same one in each step. Who is done with its own helps others, from the end of theirs.
 * A phase is over when all its units are done, whoever did them: a thread that the system has put aside holds up nobody, unless
 * it was put aside in the middle of a unit. */
#ifndef PE_TEAM_H
#define PE_TEAM_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#define pe_team_size() omp_get_num_threads()
#define pe_cpus() omp_get_num_procs()
#else
#define pe_team_size() 1
#define pe_cpus() 1
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#include <windows.h>
typedef volatile LONG64 pe_atomic;
#define pe_atomic_load(p) InterlockedOr64((p), 0)
#define pe_atomic_store(p, v) InterlockedExchange64((p), (v))
#define pe_atomic_add(p, n) InterlockedExchangeAdd64((p), (n))
#define pe_pause() YieldProcessor()
#define pe_yield() SwitchToThread()
#else
typedef int64_t pe_atomic;
#define pe_atomic_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define pe_atomic_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define pe_atomic_add(p, n) __atomic_fetch_add((p), (n), __ATOMIC_ACQ_REL)
#if defined(_WIN32)
#include <windows.h>
#define pe_yield() SwitchToThread()
#else
#include <sched.h>
#define pe_yield() sched_yield()
#endif
#if defined(__x86_64__)
#define pe_pause() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pe_pause() __asm__ volatile("yield")
#else
#define pe_pause() ((void)0)
#endif
#endif

#define PE_SPINS 2000 /* some 50 us of waiting before the core is offered to others */

/* Done units of a phase, on a cache line of its own: those who wait read it. */
typedef struct {
    pe_atomic done;
    char pad[56];
} pe_phase;

/* What is taken of a thread's share of a phase: by itself, from the front, in the low half; by others, from the end, in the high
 * one. Each thread's lie side by side, so that as a rule nobody else has touched the line. */
typedef pe_atomic pe_share;

typedef struct {
    pe_phase *phases; /* zeros at first */
    pe_share *shares; /* [threads][n_phase], zeros at first */
    int64_t n_phase;
    pe_atomic stopped; /* not 0: all threads leave, work undone */
} pe_team;

/* The first unit of a thread's share, of n_thread of them. */
static inline int64_t pe_share_first(int64_t thread, int64_t n_thread, int64_t n_unit)
{
    return (thread * n_unit + n_thread - 1) / n_thread;
}

/* The next unit of a thread's share, of n_thread of them, for itself or another; -1 when there is none left. */
static inline int64_t pe_take(pe_share *share, int64_t thread, int64_t n_thread, int64_t n_unit, int own)
{
    const int64_t first = pe_share_first(thread, n_thread, n_unit);
    const int64_t size = pe_share_first(thread + 1, n_thread, n_unit) - first;
    const int64_t other = (int64_t)1 << 32;
    int64_t taken = own ? 0 : pe_atomic_load(share);
    if (size == 0 || taken % other + taken / other >= size)
        return -1;
    taken = pe_atomic_add(share, own ? 1 : other);
    if (taken % other + taken / other >= size)
        return -1;
    return own ? first + taken % other : first + size - 1 - taken / other;
}

/* The next unit of a phase for a thread: of its own share, then of the others', from that after its own on; helped: in how many it
 * has found nothing left, 0 when the phase begins. -1 when nothing is left at all. */
static inline int64_t pe_claim(pe_team *team, int64_t phase, int64_t thread, int64_t n_thread, int64_t n_unit, int64_t *helped)
{
    for (; *helped < n_thread; ++*helped) {
        const int64_t owner = (thread + *helped) % n_thread;
        const int64_t unit = pe_take(team->shares + owner * team->n_phase + phase, owner, n_thread, n_unit, *helped == 0);
        if (unit >= 0)
            return unit;
    }
    return -1;
}

static inline void pe_stop(pe_team *team) { pe_atomic_store(&team->stopped, 1); }
static inline int pe_stopped(pe_team *team) { return pe_atomic_load(&team->stopped) != 0; }

/* Reports n units done, and waits until the phase is over. */
static inline void pe_finish(pe_team *team, pe_phase *phase, int64_t n, int64_t n_unit)
{
    if (n)
        pe_atomic_add(&phase->done, n);
    for (int spins = 0; pe_atomic_load(&phase->done) < n_unit && !pe_stopped(team); spins++) {
        if (spins < PE_SPINS)
            pe_pause();
        else
            pe_yield();
    }
}

#endif
