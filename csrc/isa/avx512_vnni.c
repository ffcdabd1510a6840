/* AVX-512 with VNNI: Cascade Lake, Ice Lake, Zen 4 and later. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#include "avx512.inc.h"

typedef vi vq_a;
typedef vi vq_w;

PE_INLINE vq_w vq_weights(const int8_t *p) { return _mm512_loadu_si512(p); }
PE_INLINE vq_a vq_activations(const uint8_t *p) { return _mm512_set1_epi32(pe_load_i32(p)); }

/* As assembly, since gcc 12 keeps 24 accumulators of the intrinsic on the stack: a third of the speed. */
PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
#if PE_MSVC
    *acc = _mm512_dpbusd_epi32(*acc, a, w);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*acc) : "v"(a), "v"(w));
#endif
}

#define PE_Q8_ROWS_1 12
#define PE_Q8_ROWS_2 12
#define PE_Q8_ROWS_4 6
#define PE_Q8_MANY_PANELS 2
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx512_vnni, PE_CPU_AVX512 | PE_CPU_AVX512_VNNI | PE_CPU_AVX2_FMA, 40)
PE_TARGET_END
#else
PE_NO_LEVEL(avx512_vnni)
#endif
