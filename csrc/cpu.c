/* What the CPU and its operating system can do, and the levels that were compiled in. */
#include "level.h"

#if PE_X86
#if PE_MSVC
#include <intrin.h>
static void cpuid(int leaf, int subleaf, uint32_t r[4]) { __cpuidex((int *)r, leaf, subleaf); }
static uint64_t enabled_state(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(int leaf, int subleaf, uint32_t r[4]) { __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]); }
static uint64_t enabled_state(void)
{
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}
#endif

static int has(uint32_t word, int bit) { return word >> bit & 1; }

uint32_t pe_cpu_features(void)
{
    uint32_t r[4], leaf1[4], features = 0;
    cpuid(0, 0, r);
    const uint32_t last = r[0];
    cpuid(1, 0, leaf1);
    if (last < 7 || !has(leaf1[2], 27)) /* OSXSAVE */
        return 0;
    const uint64_t state = enabled_state();
    const int ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6; /* the system saves these registers */
    cpuid(7, 0, r);
    if (ymm && has(leaf1[2], 12) && has(leaf1[2], 29) && has(r[1], 5)) /* FMA, F16C, AVX2 */
        features |= PE_CPU_AVX2_FMA;
    if (zmm && has(r[1], 16) && has(r[1], 17) && has(r[1], 30) && has(r[1], 31)) /* F, DQ, BW, VL */
        features |= PE_CPU_AVX512;
    if (zmm && has(r[2], 11))
        features |= PE_CPU_AVX512_VNNI;
    const uint32_t last_subleaf = r[0];
    if (last_subleaf >= 1) {
        cpuid(7, 1, r);
        if (zmm && has(r[0], 5))
            features |= PE_CPU_AVX512_BF16;
        if (ymm && has(r[0], 4))
            features |= PE_CPU_AVX_VNNI;
    }
    return features;
}

#elif PE_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#define PE_HWCAP_ASIMDDP (1 << 20)
uint32_t pe_cpu_features(void) { return getauxval(AT_HWCAP) & PE_HWCAP_ASIMDDP ? PE_CPU_NEON_DOT : 0; }

#elif PE_ARM64 && defined(__APPLE__)
uint32_t pe_cpu_features(void) { return PE_CPU_NEON_DOT; } /* every Apple silicon Mac has it */

#elif PE_ARM64 && defined(_WIN32)
#include <windows.h>
uint32_t pe_cpu_features(void)
{
    return IsProcessorFeaturePresent(43 /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */) ? PE_CPU_NEON_DOT : 0;
}

#else
uint32_t pe_cpu_features(void) { return 0; }
#endif

/* setup.py passes PE_LEVELS, PE_LEVEL(name) for each file isa/name.c; a level of another processor is NULL. */
#define PE_LEVEL(name) const pe_kernels *pe_level_##name(void);
PE_LEVELS
#undef PE_LEVEL

const pe_kernels *pe_level(int index)
{
#define PE_LEVEL(name) pe_level_##name,
    static const pe_kernels *(*const levels[])(void) = {PE_LEVELS 0};
#undef PE_LEVEL
    for (int i = 0; levels[i]; i++)
        if (levels[i]() && index-- == 0)
            return levels[i]();
    return 0;
}
