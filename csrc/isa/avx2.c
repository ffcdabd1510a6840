/* AVX2 with FMA: Haswell, Zen and later. A vector is two ymm registers. Integers go through vpmaddubsw, which saturates at 16 bits.
 * int4's values are small enough for it: 2 * 255 * 64. For int8, |q - 128| * (the weight, its bits flipped where q < 128) is at most
 * 128 * 127 and no less than 128 * -128, so two of them fit. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx2,fma")
#include "avx2.inc.h"

#define PE_Q8_ORIGIN 128
#define PE_Q4_ORIGIN 0
#define PE_Q4_READS_SUMS 1

typedef __m256i vq_a;
typedef vi vq_w;

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    return (vi){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
PE_INLINE vq_a vq_activations(const uint8_t *p) { return _mm256_set1_epi32(pe_load_i32(p)); }

/* As assembly, since gcc would copy each accumulator to and fro. */
PE_INLINE void dot(__m256i *acc, __m256i a, __m256i w)
{
    const __m256i one = _mm256_set1_epi16(1);
#if PE_MSVC
    *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), one));
#else
    __m256i product;
    __asm__("vpmaddubsw %2, %3, %1\n\tvpmaddwd %1, %4, %1\n\tvpaddd %1, %0, %0"
            : "+x"(*acc), "=&x"(product) : "x"(w), "x"(a), "x"(one));
#endif
}

/* Of int4. */
PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    dot(&acc->l, a, w.l);
    dot(&acc->h, a, w.h);
}

/* The same with weights that come from memory each time and take no registers. */
PE_INLINE void vq_dot_at(vi *acc, vq_a a, const int8_t *quads)
{
    const __m256i *w = (const __m256i *)quads;
#if PE_MSVC
    vq_dot(acc, a, (vi){_mm256_loadu_si256(w), _mm256_loadu_si256(w + 1)});
#else
    const __m256i one = _mm256_set1_epi16(1);
    __m256i product;
    __asm__("vpmaddubsw %3, %5, %2\n\tvpmaddwd %2, %6, %2\n\tvpaddd %2, %0, %0\n\t"
            "vpmaddubsw %4, %5, %2\n\tvpmaddwd %2, %6, %2\n\tvpaddd %2, %1, %1"
            : "+x"(acc->l), "+x"(acc->h), "=&x"(product) : "m"(w[0]), "m"(w[1]), "x"(a), "x"(one));
#endif
}

/* What the peak of int8 is measured with: as many instructions as its products take (dot_flipped). */
PE_INLINE void peak_dot(vi *acc, vq_a a, vq_w w) { vq_dot(acc, a, (vi){_mm256_xor_si256(w.l, a), _mm256_xor_si256(w.h, a)}); }
#define vq_peak_dot peak_dot

PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high) { nibbles(p, table, low, high); }

#define PE_Q8_ROWS_1 3
#define PE_Q8_ROWS_2 3 /* 12 accumulators, a size, what flips, the ones and a product take all registers */
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 2
#define PE_Q8_STREAM 0 /* one row goes four panels at a time */
#define PE_Q8_FAR 6
#define PE_Q4_ROWS_1 4
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1
#define PE_Q4_FAR 0
#define PE_Q4_UNPACK 24
#define PE_Q4_UNPACKED_ROWS 3
#define PE_Q4_UNPACKED_PANELS 1

/* int8 activations are made ready once for many panels (tiles_int8.inc.h): each is then two loads. They are less 128, and the bits
 * of weights are flipped where that is negative: |a| * ~w = a * w - |a|; `flipped` is the sum of these |a|. */
#define PE_OWN_GROUP
typedef struct {
    PE_ALIGNED int32_t size[PE_Q8_ROWS_1][PE_GROUP / 4], flip[PE_Q8_ROWS_1][PE_GROUP / 4];
    int32_t flipped[PE_Q8_ROWS_1];
} vq_group_q8;

PE_INLINE void vq_make_ready(vq_group_q8 *group, int rows, const uint8_t *q, int64_t stride, int64_t n_quad)
{
    const __m256i zero = _mm256_setzero_si256(), index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int r = 0; r < rows; r++) {
        __m256i sums = zero;
        for (int i = 0; i < PE_GROUP / 4; i += 8) {
            const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n_quad - i), index);
            const __m256i a = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(q + r * stride + 4 * i)), _mm256_set1_epi8(-128));
            const __m256i size = _mm256_abs_epi8(a), flip = _mm256_and_si256(_mm256_cmpgt_epi8(zero, a), there);
            _mm256_store_si256((__m256i *)(group->size[r] + i), size);
            _mm256_store_si256((__m256i *)(group->flip[r] + i), flip);
            sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_and_si256(size, flip), zero));
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

PE_INLINE void quad_q8(int rows, int panels, const vq_group_q8 *x, const int8_t *quads, int64_t panel_stride, int64_t i,
                       vi acc[12][4])
{
    PE_UNROLL
    for (int r = 0; r < rows; r++) {
        const __m256i size = _mm256_set1_epi32(x->size[r][i]), flip = _mm256_set1_epi32(x->flip[r][i]);
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            dot_flipped(&acc[r][p], size, flip, quads + p * panel_stride + i * 4 * PE_LANES);
    }
}

/* Where many tiles ask for the same panels, each asks for its few lines beforehand: asking with each quad is one instruction in
 * thirty. */
PE_INLINE void group_q8(int rows, int panels, const vq_group_q8 *x, const int8_t *quads, int64_t panel_stride, int64_t n_quad,
                        const int8_t *next, pe_ahead ahead, vi acc[12][4])
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = vi_add(acc[r][p], vi_set(x->flipped[r]));
    if (ahead.pace >= 16) {
        for (int64_t i = 0; i < n_quad; i++) {
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                PE_PREFETCH_WEIGHTS(ahead.into, next + p * panel_stride + i * ahead.pace);
            quad_q8(rows, panels, x, quads, panel_stride, i, acc);
        }
    } else {
        for (int64_t i = 0; i < n_quad * ahead.pace; i += 64)
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                PE_PREFETCH_WEIGHTS(ahead.into, next + p * panel_stride + i);
        for (int64_t i = 0; i < n_quad; i++)
            quad_q8(rows, panels, x, quads, panel_stride, i, acc);
    }
}

#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx2, PE_CPU_AVX2_FMA, 20)
PE_TARGET_END
#else
PE_NO_LEVEL(avx2)
#endif
