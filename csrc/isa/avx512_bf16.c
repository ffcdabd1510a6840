/* AVX-512 with VNNI and BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")
#include "avx512.inc.h"
#include "avx512_vnni.inc.h"

#define PE_BF16_DOT
typedef vi vb;

PE_INLINE vb vb_weights(const uint16_t *p) { return _mm512_loadu_si512(p); }
PE_INLINE vb vb_activations(const uint16_t *p) { return _mm512_set1_epi32(pe_load_i32(p)); }

/* As assembly for the same reason as vq_dot. */
PE_INLINE void vb_dot(vf *acc, vb a, vb w)
{
#if PE_MSVC
    *acc = _mm512_dpbf16_ps(*acc, a, w);
#else
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(*acc) : "v"(a), "v"(w));
#endif
}

/* vcvtneps2bf16 rounds as to_bf16 does. */
#if PE_MSVC
#define narrowed(a) _mm512_cvtneps_pbh(a) /* integers already, and it casts no vectors */
#else
#define narrowed(a) (__m256i)_mm512_cvtneps_pbh(a)
#endif
PE_INLINE void vf_store_bf16(uint16_t *p, vf a)
{
    const vm counts = _mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(0x1p-50f), _CMP_NLT_UQ);
    _mm256_storeu_si256((__m256i *)p, narrowed(_mm512_maskz_mov_ps(counts, a)));
}
PE_INLINE void vf_store_bf16_normal(uint16_t *p, vf a) { _mm256_storeu_si256((__m256i *)p, narrowed(a)); }

#define PE_BF16_ROWS_1 12
#define PE_BF16_ROWS_2 12
#define PE_BF16_ROWS_4 6
#define PE_BF16_MANY 4
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx512_bf16, PE_CPU_AVX512 | PE_CPU_AVX512_VNNI | PE_CPU_AVX512_BF16 | PE_CPU_AVX2_FMA, 50)
PE_TARGET_END
#else
PE_NO_LEVEL(avx512_bf16)
#endif
