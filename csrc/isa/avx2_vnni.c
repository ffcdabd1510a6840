/* AVX2 with VNNI on 256 bits: Alder Lake, Zen 5 and later, without a need for AVX-512. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx2,fma")
#include "avx2.inc.h"

#define PE_Q8_ORIGIN 0

typedef __m256i vq_a;
typedef vi vq_w;

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    return (vi){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
PE_INLINE vq_a vq_activations(const uint8_t *p) { return _mm256_set1_epi32(pe_load_i32(p)); }

/* As assembly, since not every compiler knows the VEX form. */
PE_INLINE void dot(__m256i *acc, __m256i a, __m256i w)
{
#if PE_MSVC
    *acc = _mm256_dpbusd_avx_epi32(*acc, a, w);
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*acc) : "x"(a), "x"(w));
#endif
}

PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    dot(&acc->l, a, w.l);
    dot(&acc->h, a, w.h);
}

PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high) { nibbles(p, table, low, high); }
PE_INLINE void vq_sum(vi *acc, vq_w low, vq_w high)
{
    vq_dot(acc, _mm256_set1_epi8(1), low);
    vq_dot(acc, _mm256_set1_epi8(1), high);
}

#define PE_Q8_ROWS_1 6
#define PE_Q8_ROWS_2 2
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 1
#define PE_Q8_FAR 0
#define PE_Q4_ROWS_1 4
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1
#define PE_Q4_FAR 0
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx2_vnni, PE_CPU_AVX_VNNI | PE_CPU_AVX2_FMA, 25)
PE_TARGET_END
#else
PE_NO_LEVEL(avx2_vnni)
#endif
