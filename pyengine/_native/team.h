/* How the threads of a parallel region share work. The work is a row of phases; a phase is a number of units, which threads
 * take one by one. A phase is over when all its units are done, whoever did them: no thread waits for one that holds no unit.
 * So a thread that the system has put aside holds up nobody, unless it was put aside in the middle of a unit. */
#ifndef PE_TEAM_H
#define PE_TEAM_H

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#define pe_team_size() omp_get_num_threads()
#else
#define pe_team_size() 1
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

/* Taken and done are on cache lines of their own: those who wait read one, those who work write the other. */
typedef struct {
    pe_atomic taken;
    char pad1[56];
    pe_atomic done;
    char pad2[56];
} pe_phase;

typedef struct {
    pe_phase *phases; /* zeros at first */
    pe_atomic stopped; /* not 0: all threads leave, work undone */
} pe_team;

/* The next unit of a phase of n_unit: 0, 1, 2 ... for whoever asks first; -1 when there is none left. */
static inline int64_t pe_take(pe_phase *phase, int64_t n_unit)
{
    const int64_t unit = pe_atomic_add(&phase->taken, 1);
    return unit < n_unit ? unit : -1;
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
