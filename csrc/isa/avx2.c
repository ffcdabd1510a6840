/* AVX2 with FMA: Haswell, Zen and later. A vector is two ymm registers. int8 goes through vpmaddubsw, which saturates at 16 bits:
 * |q - 128| * (the weight, its bits flipped where q < 128) is at most 128 * 127 and no less than 128 * -128, so two of them fit. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx2,fma")
#include "avx2.inc.h"

#define PE_Q8_ORIGIN 128

/* 4 activations less 128, in all lanes: their sizes, and themselves for their signs. */
typedef struct { __m256i size, sign; } vq_a;
typedef vi vq_w;

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    return (vi){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}

PE_INLINE vq_a signed_bytes(__m256i a)
{
    a = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
    return (vq_a){_mm256_abs_epi8(a), a};
}
PE_INLINE vq_a vq_activations(const uint8_t *p) { return signed_bytes(_mm256_set1_epi32(pe_load_i32(p))); }

/* What the peak is measured with (limits.inc.h); matrix products go by dot_flipped, as many instructions. */
PE_INLINE void dot(__m256i *acc, vq_a a, __m256i w)
{
    const __m256i pairs = _mm256_maddubs_epi16(a.size, _mm256_sign_epi8(w, a.sign));
    add_to(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    dot(&acc->l, a, w.l);
    dot(&acc->h, a, w.h);
}

PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high) { nibbles(p, table, low, high); }

#define PE_Q8_ROWS_1 3
#define PE_Q8_ROWS_2 3 /* 12 accumulators, a size, what flips, the ones and a product take all registers */
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 2
#define PE_Q8_STREAM 0 /* one row goes four panels at a time */
#define PE_Q4_ROWS_1 2
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1

/* Activations are made ready once for a group, not once for each panel: each is then two loads. For int8 a is less 128, and the bits
 * of weights are flipped where it is negative: |a| * ~w = a * w - |a|, and `flipped` is the sum of these |a|. For int4 they are
 * their lower and their upper 4 bits. */
#define PE_OWN_GROUP
typedef struct {
    PE_ALIGNED int32_t size[PE_Q8_ROWS_1][PE_GROUP / 4], flip[PE_Q8_ROWS_1][PE_GROUP / 4];
    int32_t flipped[PE_Q8_ROWS_1];
} vq_group;
typedef struct {
    PE_ALIGNED int32_t lower[PE_Q4_ROWS_1][PE_GROUP / 4], upper[PE_Q4_ROWS_1][PE_GROUP / 4];
} vq_group_q4;

PE_INLINE void vq_make_ready(vq_group *group, int rows, const uint8_t *q, int64_t stride, int64_t n_quad)
{
    const __m256i zero = _mm256_setzero_si256(), index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int r = 0; r < rows; r++) {
        __m256i sums = zero;
        for (int i = 0; i < PE_GROUP / 4; i += 8) {
            const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n_quad - i), index);
            const vq_a a = signed_bytes(_mm256_loadu_si256((const __m256i *)(q + r * stride + 4 * i)));
            const __m256i flip = _mm256_and_si256(_mm256_cmpgt_epi8(zero, a.sign), there);
            _mm256_store_si256((__m256i *)(group->size[r] + i), a.size);
            _mm256_store_si256((__m256i *)(group->flip[r] + i), flip);
            sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_and_si256(a.size, flip), zero));
        }
        const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        group->flipped[r] = _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
    }
}

/* As assembly, so that weights come from memory each time and take no registers. */
PE_INLINE void dot_flipped(vi *acc, __m256i size, __m256i flip, const int8_t *quads)
{
    const __m256i one = _mm256_set1_epi16(1), *w = (const __m256i *)quads;
#if PE_MSVC
    const vi flipped = {_mm256_xor_si256(flip, _mm256_loadu_si256(w)), _mm256_xor_si256(flip, _mm256_loadu_si256(w + 1))};
    const vi pairs = {_mm256_maddubs_epi16(size, flipped.l), _mm256_maddubs_epi16(size, flipped.h)};
    *acc = vi_add(*acc, (vi){_mm256_madd_epi16(pairs.l, one), _mm256_madd_epi16(pairs.h, one)});
#else
    __m256i product;
    __asm__("vpxor %3, %6, %2\n\tvpmaddubsw %2, %5, %2\n\tvpmaddwd %2, %7, %2\n\tvpaddd %2, %0, %0\n\t"
            "vpxor %4, %6, %2\n\tvpmaddubsw %2, %5, %2\n\tvpmaddwd %2, %7, %2\n\tvpaddd %2, %1, %1"
            : "+x"(acc->l), "+x"(acc->h), "=&x"(product) : "m"(w[0]), "m"(w[1]), "x"(size), "x"(flip), "x"(one));
#endif
}

/* One row goes by four panels, four streams, which the processor follows by itself: lines asked for would only be in its way. */
PE_INLINE void group_q8(int rows, int panels, const vq_group *x, const int8_t *quads, int64_t panel_stride, int64_t n_quad,
                        const int8_t *next, int64_t pace, vi acc[12][4])
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = vi_add(acc[r][p], vi_set(x->flipped[r]));
    for (int64_t i = 0; i < n_quad; i++) {
        if (panels < 4)
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                PE_PREFETCH(next + p * panel_stride + i * pace);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            const __m256i size = _mm256_set1_epi32(x->size[r][i]), flip = _mm256_set1_epi32(x->flip[r][i]);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                dot_flipped(&acc[r][p], size, flip, quads + p * panel_stride + i * 4 * PE_LANES);
        }
    }
}

PE_INLINE void vq_make_ready_q4(vq_group_q4 *group, int rows, const uint8_t *q, int64_t stride, int64_t n_quad)
{
    (void)n_quad;
    const __m256i mask = _mm256_set1_epi8(15);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < PE_GROUP / 4; i += 8) {
            const __m256i a = _mm256_loadu_si256((const __m256i *)(q + r * stride + 4 * i));
            _mm256_storeu_si256((__m256i *)(group->lower[r] + i), _mm256_and_si256(a, mask));
            _mm256_storeu_si256((__m256i *)(group->upper[r] + i), _mm256_and_si256(_mm256_srli_epi16(a, 4), mask));
        }
}

/* acc += pairs of products, in 16 bits, or the first of them. As assembly, since gcc would add them up as a tree, for which it
 * spills them all. */
PE_INLINE void add_pairs(int first, __m256i *acc, __m256i a, __m256i w)
{
    const __m256i pairs = _mm256_maddubs_epi16(a, w);
    if (first)
        *acc = pairs;
    else
#if PE_MSVC
        *acc = _mm256_add_epi16(*acc, pairs);
#else
        __asm__("vpaddw %1, %0, %0" : "+x"(*acc) : "x"(pairs));
#endif
}

/* The lower and the upper 4 bits of activations apart: 16 bits hold the sums of a whole group, at most 16 * 15 * 127. So nothing
 * is widened until its end, activations stay unsigned, and no product needs the sums of the columns. */
#define PE_Q4_READS_SUMS 1
PE_INLINE void group_q4(int rows, int panels, const vq_group_q4 *x, int64_t quad, const uint8_t *octets, int64_t panel_stride,
                        const uint8_t *next, int64_t pace, vi acc[12][4], vi column_sum[4])
{
    (void)column_sum;
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        vi lower[PE_Q4_ROWS_1], upper[PE_Q4_ROWS_1];
        PE_UNROLL
        for (int i = 0; i < PE_Q4_GROUP / 8; i++) {
            vi w[2];
            nibbles(octets + p * panel_stride + i * 4 * PE_LANES, pe_q4_codebook, &w[0], &w[1]);
            PE_PREFETCH(next + p * panel_stride + i * pace);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                PE_UNROLL
                for (int j = 0; j < 2; j++) {
                    const __m256i low = _mm256_set1_epi32(x->lower[r][quad + 2 * i + j]);
                    const __m256i high = _mm256_set1_epi32(x->upper[r][quad + 2 * i + j]);
                    add_pairs(i + j == 0, &lower[r].l, low, w[j].l);
                    add_pairs(i + j == 0, &lower[r].h, low, w[j].h);
                    add_pairs(i + j == 0, &upper[r].l, high, w[j].l);
                    add_pairs(i + j == 0, &upper[r].h, high, w[j].h);
                }
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
            const vi a = {_mm256_madd_epi16(lower[r].l, one), _mm256_madd_epi16(lower[r].h, one)};
            const vi b = {_mm256_madd_epi16(upper[r].l, sixteen), _mm256_madd_epi16(upper[r].h, sixteen)};
            acc[r][p] = vi_add(a, b);
        }
    }
}

/* int4 with more rows, what tiles_wide.inc.h does: 6 rows take 12 accumulators, which leaves registers for a vector of weights, an
 * activation and a product. */
#define PE_WIDE_ROWS 6
#define PE_WIDE_Q4 4

PE_INLINE void vq_store_wide(int16_t *p, vq_w w)
{
    _mm256_store_si256((__m256i *)p, _mm256_srai_epi16(_mm256_slli_epi16(w.l, 8), 8));
    _mm256_store_si256((__m256i *)(p + 16), _mm256_srai_epi16(_mm256_slli_epi16(w.h, 8), 8));
    _mm256_store_si256((__m256i *)(p + 32), _mm256_srai_epi16(w.l, 8));
    _mm256_store_si256((__m256i *)(p + 48), _mm256_srai_epi16(w.h, 8));
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
