/* The vector primitives of AVX2 with FMA: two ymm registers are a vector. Meaning of each: ../kernels.inc.h. */
#include <immintrin.h>

typedef struct { __m256 l, h; } vf;
typedef struct { __m256i l, h; } vi;
typedef struct { __m256 l, h; } vm; /* all bits of a lane, or none */

#define PE_EACH(type, op, a) (type){op((a).l), op((a).h)}
#define PE_BOTH(type, op, a, b) (type){op((a).l, (b).l), op((a).h, (b).h)}
#define PE_ALL3(type, op, a, b, c) (type){op((a).l, (b).l, (c).l), op((a).h, (b).h, (c).h)}

PE_INLINE vf vi_bits(vi a) { return PE_EACH(vf, _mm256_castsi256_ps, a); }
PE_INLINE vi vf_bits(vf a) { return PE_EACH(vi, _mm256_castps_si256, a); }
PE_INLINE vm vm_first(int n)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i l = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    __m256i h = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
    return (vm){_mm256_castsi256_ps(l), _mm256_castsi256_ps(h)};
}
PE_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PE_INLINE void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a.l);
    _mm256_storeu_ps(p + 8, a.h);
}
PE_INLINE vf vf_load_part(const float *p, int n)
{
    vm m = vm_first(n);
    return (vf){_mm256_maskload_ps(p, _mm256_castps_si256(m.l)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.h))};
}
PE_INLINE void vf_store_part(float *p, vf a, int n)
{
    vm m = vm_first(n);
    _mm256_maskstore_ps(p, _mm256_castps_si256(m.l), a.l);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.h), a.h);
}
PE_INLINE vf vf_set(float a) { return (vf){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
PE_INLINE vf zip(__m256 a, __m256 b)
{
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b); /* of each half */
    return (vf){_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
PE_INLINE vf vf_zip_low(vf a, vf b) { return zip(a.l, b.l); }
PE_INLINE vf vf_zip_high(vf a, vf b) { return zip(a.h, b.h); }
PE_INLINE vf vf_add(vf a, vf b) { return PE_BOTH(vf, _mm256_add_ps, a, b); }
PE_INLINE vf vf_sub(vf a, vf b) { return PE_BOTH(vf, _mm256_sub_ps, a, b); }
PE_INLINE vf vf_mul(vf a, vf b) { return PE_BOTH(vf, _mm256_mul_ps, a, b); }
PE_INLINE vf vf_div(vf a, vf b) { return PE_BOTH(vf, _mm256_div_ps, a, b); }
PE_INLINE vf vf_min(vf a, vf b) { return PE_BOTH(vf, _mm256_min_ps, a, b); }
PE_INLINE vf vf_max(vf a, vf b) { return PE_BOTH(vf, _mm256_max_ps, a, b); }
PE_INLINE vf vf_fma(vf a, vf b, vf c) { return PE_ALL3(vf, _mm256_fmadd_ps, a, b, c); }
PE_INLINE vf vf_fnma(vf a, vf b, vf c) { return PE_ALL3(vf, _mm256_fnmadd_ps, a, b, c); }
PE_INLINE vf vf_mad(vf a, vf b, vf c) { return vf_fma(a, b, c); }
PE_INLINE vf vf_round(vf a)
{
    enum { MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return (vf){_mm256_round_ps(a.l, MODE), _mm256_round_ps(a.h, MODE)};
}
PE_INLINE vi vf_to_int(vf a) { return PE_EACH(vi, _mm256_cvtps_epi32, a); }
PE_INLINE vf vi_to_float(vi a) { return PE_EACH(vf, _mm256_cvtepi32_ps, a); }
PE_INLINE vi vi_set(int32_t a) { return (vi){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
PE_INLINE vi vi_add(vi a, vi b) { return PE_BOTH(vi, _mm256_add_epi32, a, b); }
PE_INLINE vi vi_sub(vi a, vi b) { return PE_BOTH(vi, _mm256_sub_epi32, a, b); }
PE_INLINE vi vi_mul(vi a, vi b) { return PE_BOTH(vi, _mm256_mullo_epi32, a, b); }
PE_INLINE vi vi_and(vi a, vi b) { return PE_BOTH(vi, _mm256_and_si256, a, b); }
PE_INLINE vi vi_or(vi a, vi b) { return PE_BOTH(vi, _mm256_or_si256, a, b); }
PE_INLINE vi vi_min(vi a, vi b) { return PE_BOTH(vi, _mm256_min_epi32, a, b); }
PE_INLINE vi vi_max(vi a, vi b) { return PE_BOTH(vi, _mm256_max_epi32, a, b); }
#define vi_shl(a, n) ((vi){_mm256_slli_epi32((a).l, n), _mm256_slli_epi32((a).h, n)})
#define vi_sra(a, n) ((vi){_mm256_srai_epi32((a).l, n), _mm256_srai_epi32((a).h, n)})
PE_INLINE vm vf_lt(vf a, vf b)
{
    return (vm){_mm256_cmp_ps(a.l, b.l, _CMP_LT_OQ), _mm256_cmp_ps(a.h, b.h, _CMP_LT_OQ)};
}
PE_INLINE vf vf_select(vm m, vf a, vf b) { return PE_ALL3(vf, _mm256_blendv_ps, b, a, m); }
PE_INLINE __m256 pick8(vf table, __m256i index)
{
    const __m256 low = _mm256_permutevar8x32_ps(table.l, index), high = _mm256_permutevar8x32_ps(table.h, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
PE_INLINE vf vf_pick(vf table, vi index) { return (vf){pick8(table, index.l), pick8(table, index.h)}; }
PE_INLINE vi vi_load_s16(const int16_t *p)
{
    return (vi){_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
#define vi_words vi_load_s16
PE_INLINE vi vi_mul16(vi a, int32_t b) { return vi_mul(a, vi_set(b)); }
PE_INLINE vi vi_load_s8(const int8_t *p)
{
    return (vi){_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
PE_INLINE __m256i words_of(vi a) /* packs works in 128-bit halves */
{
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.l, a.h), 0xd8);
}
PE_INLINE void vi_store_s16(int16_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, words_of(a)); }
PE_INLINE void vi_store_s8(int8_t *p, vi a)
{
    __m256i words = words_of(a);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}
PE_INLINE void vi_store_u8(uint8_t *p, vi a)
{
    __m256i words = words_of(a);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}

#define PE_TREE(name, op256, op128, ops)                                                                             \
    PE_INLINE float name(vf v)                                                                                       \
    {                                                                                                                \
        __m256 a = op256(v.l, v.h);                                                                                  \
        __m128 b = op128(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));                                    \
        b = op128(b, _mm_movehl_ps(b, b));                                                                           \
        return _mm_cvtss_f32(ops(b, _mm_movehdup_ps(b)));                                                            \
    }
PE_TREE(vf_sum, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
PE_TREE(vf_hmax, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
PE_TREE(vf_hmin, _mm256_min_ps, _mm_min_ps, _mm_min_ss)

#define PE_PIN(v) ((void)0)

/* As assembly, since gcc would overwrite a factor instead of adding to the accumulator. */
#if !PE_MSVC
PE_INLINE void mad_to(__m256 *acc, __m256 a, __m256 b) { __asm__("vfmadd231ps %2, %1, %0" : "+x"(*acc) : "x"(a), "x"(b)); }
PE_INLINE void vf_mad_to(vf *acc, vf a, vf b)
{
    mad_to(&acc->l, a.l, b.l);
    mad_to(&acc->h, a.h, b.h);
}
#define vf_mad_to vf_mad_to
#endif

/* 64 bytes as 2 x 64 values of a table of 16. */
PE_INLINE void nibbles(const uint8_t *p, const int8_t *table, vi *low, vi *high)
{
    const __m256i l = _mm256_loadu_si256((const __m256i *)p), h = _mm256_loadu_si256((const __m256i *)(p + 32));
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), mask = _mm256_set1_epi8(15);
    *low = (vi){_mm256_shuffle_epi8(entries, _mm256_and_si256(l, mask)),
                _mm256_shuffle_epi8(entries, _mm256_and_si256(h, mask))};
    *high = (vi){_mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(l, 4), mask)),
                 _mm256_shuffle_epi8(entries, _mm256_and_si256(_mm256_srli_epi16(h, 4), mask))};
}

/* Rows of a tile, by how many panels wide it is: two registers an accumulator, 16 registers in all. */
#define PE_F32_ROWS_1 6
#define PE_F32_ROWS_2 3
#define PE_F32_ROWS_4 1
#define PE_F32_MANY 1
#define PE_F32_FAR 16
#define PE_F32_UNROLL 4
#define PE_BF16_ROWS_1 4
#define PE_BF16_ROWS_2 1
#define PE_BF16_ROWS_4 1
#define PE_BF16_MANY 1
#define PE_BF16_FAR 0
#define PE_WIDE_BF16 12
