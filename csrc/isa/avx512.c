/* AVX-512 (F, BW, VL, DQ) without VNNI: Skylake-X. int8 goes through 16-bit multiplies, which can't saturate. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "avx512.inc.h"

/* 4 values along k of 16 columns, split into even and odd k as 16-bit integers for vpmaddwd. */
typedef struct { vi even, odd; } vq;

PE_INLINE vq widened(vi w) { return (vq){_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)}; }
PE_INLINE vq vq_weights(const int8_t *p) { return widened(_mm512_loadu_si512(p)); }
PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq *low, vq *high)
{
    vi l, h;
    nibbles(p, table, &l, &h);
    *low = widened(l);
    *high = widened(h);
}

PE_INLINE vq vq_activations(const uint8_t *p)
{
    __m512i a = _mm512_set1_epi32(pe_load_i32(p));
    __m512i low = _mm512_set1_epi32(0x00ff00ff);
    return (vq){_mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16(a, 8), low)};
}

PE_INLINE void vq_dot(vi *acc, vq a, vq w)
{
    *acc = vi_add(*acc, vi_add(_mm512_madd_epi16(a.even, w.even), _mm512_madd_epi16(a.odd, w.odd)));
}

PE_INLINE void vq_sum(vi *acc, vq low, vq high)
{
    const vi words = _mm512_add_epi16(_mm512_add_epi16(low.even, low.odd), _mm512_add_epi16(high.even, high.odd));
    *acc = vi_add(*acc, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
}

typedef vq vq_a;
typedef vq vq_w;
#define PE_Q8_ROWS_1 8
#define PE_Q8_ROWS_2 8
#define PE_Q8_ROWS_4 4
#define PE_Q8_MANY 2
#define PE_Q4_ROWS_1 6
#define PE_Q4_ROWS_2 4
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 2
#define PE_BF16_ROWS_1 8
#define PE_BF16_ROWS_2 6
#define PE_BF16_ROWS_4 3
#define PE_BF16_MANY 2
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx512, PE_CPU_AVX512 | PE_CPU_AVX2_FMA, 30)
PE_TARGET_END
#else
PE_NO_LEVEL(avx512)
#endif
