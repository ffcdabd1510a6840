/* AVX2 with FMA: Haswell, Zen and later. A vector is two ymm registers. int8 goes through 16-bit multiplies, since
 * vpmaddubsw saturates. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx2,fma")
#include "avx2.inc.h"

/* 4 values along k of 16 columns, split into even and odd k as 16-bit integers for vpmaddwd. */
typedef struct { vi even, odd; } vq_w;
typedef struct { __m256i even, odd; } vq_a;

PE_INLINE vq_w widened(__m256i l, __m256i h)
{
    return (vq_w){
        {_mm256_srai_epi16(_mm256_slli_epi16(l, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(h, 8), 8)},
        {_mm256_srai_epi16(l, 8), _mm256_srai_epi16(h, 8)},
    };
}

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    return widened(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32)));
}

PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high)
{
    vi l, h;
    nibbles(p, table, &l, &h);
    *low = widened(l.l, l.h);
    *high = widened(h.l, h.h);
}

PE_INLINE void vq_sum(vi *acc, vq_w w)
{
    const __m256i ones = _mm256_set1_epi16(1);
    *acc = vi_add(*acc, (vi){_mm256_madd_epi16(_mm256_add_epi16(w.even.l, w.odd.l), ones),
                             _mm256_madd_epi16(_mm256_add_epi16(w.even.h, w.odd.h), ones)});
}

PE_INLINE vq_a vq_activations(const uint8_t *p)
{
    __m256i a = _mm256_set1_epi32(pe_load_i32(p));
    __m256i low = _mm256_set1_epi32(0x00ff00ff);
    return (vq_a){_mm256_and_si256(a, low), _mm256_and_si256(_mm256_srli_epi16(a, 8), low)};
}

PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    __m256i l = _mm256_add_epi32(_mm256_madd_epi16(a.even, w.even.l), _mm256_madd_epi16(a.odd, w.odd.l));
    __m256i h = _mm256_add_epi32(_mm256_madd_epi16(a.even, w.even.h), _mm256_madd_epi16(a.odd, w.odd.h));
    add_to(&acc->l, l);
    add_to(&acc->h, h);
}

#define PE_Q8_ROWS_1 5
#define PE_Q8_ROWS_2 1
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 1

/* Several rows are widened before they are multiplied, once for a group: an activation is then one load, and most of what a
 * tile does is vpmaddwd and vpaddd. wide[r][0][i] is values 0 and 2 of quad i, wide[r][1][i] values 1 and 3. */
#define PE_OWN_GROUP_Q8
PE_INLINE void group_q8(int rows, int panels, const uint8_t *q, int64_t stride, const int8_t *quads, int64_t panel_stride,
                        int64_t n_quad, const int8_t *next, int64_t pace, vi acc[12][4])
{
    PE_ALIGNED int32_t wide[PE_Q8_ROWS_1][2][PE_GROUP / 4];
    for (int r = 0; r < rows && rows > 1; r++)
        for (int i = 0; i < PE_GROUP / 4; i += 8) {
            const __m256i a = _mm256_loadu_si256((const __m256i *)(q + r * stride + 4 * i));
            _mm256_storeu_si256((__m256i *)(wide[r][0] + i), _mm256_and_si256(a, _mm256_set1_epi32(0x00ff00ff)));
            _mm256_storeu_si256((__m256i *)(wide[r][1] + i), _mm256_srli_epi16(a, 8));
        }
    for (int64_t i = 0; i < n_quad; i++) {
        vq_w column[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            column[p] = vq_weights(quads + p * panel_stride + i * 4 * PE_LANES);
            PE_PREFETCH(next + p * panel_stride + i * pace);
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            const vq_a value = rows == 1 ? vq_activations(q + 4 * i)
                                         : (vq_a){_mm256_set1_epi32(wide[r][0][i]), _mm256_set1_epi32(wide[r][1][i])};
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                vq_dot(&acc[r][p], value, column[p]);
        }
    }
}

#define PE_Q4_ROWS_1 3
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1

/* With more rows, what tiles_wide.inc.h does: 6 rows take 12 accumulators, which leaves registers for a vector of weights, an
 * activation and a product. */
#define PE_WIDE_ROWS 6
#define PE_WIDE_Q8 11
#define PE_WIDE_Q4 4

PE_INLINE void vq_store_wide(int16_t *p, vq_w w)
{
    _mm256_store_si256((__m256i *)p, w.even.l);
    _mm256_store_si256((__m256i *)(p + 16), w.even.h);
    _mm256_store_si256((__m256i *)(p + 32), w.odd.l);
    _mm256_store_si256((__m256i *)(p + 48), w.odd.h);
}

PE_INLINE void vq_widen_row(const uint8_t *q, int32_t *pairs)
{
    for (int i = 0; i < PE_GROUP / 4; i += 8) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(q + 4 * i));
        _mm256_store_si256((__m256i *)(pairs + i), _mm256_and_si256(a, _mm256_set1_epi32(0x00ff00ff)));
        _mm256_store_si256((__m256i *)(pairs + PE_GROUP / 4 + i), _mm256_srli_epi16(a, 8));
    }
}

PE_INLINE vi vq_wide(const int16_t *p)
{
    return (vi){_mm256_load_si256((const __m256i *)p), _mm256_load_si256((const __m256i *)(p + 16))};
}

/* As assembly, since gcc would take more registers than there are. */
PE_INLINE void vq_dot_wide(vi *acc, int32_t pair, vi w)
{
    __m256i a = _mm256_set1_epi32(pair);
#if PE_MSVC
    *acc = vi_add(*acc, (vi){_mm256_madd_epi16(a, w.l), _mm256_madd_epi16(a, w.h)});
#else
    __m256i product;
    __asm__("vpmaddwd %4, %2, %3\n\tvpmaddwd %5, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
            : "+x"(acc->l), "+x"(acc->h), "+x"(a), "=&x"(product) : "x"(w.l), "x"(w.h));
#endif
}
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx2, PE_CPU_AVX2_FMA, 20)
PE_TARGET_END
#else
PE_NO_LEVEL(avx2)
#endif
