/* The vector primitives of AVX-512 (F, BW, VL, DQ): one zmm register is a vector. Meaning of each: ../kernels.inc.h. */
#include <immintrin.h>

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

PE_INLINE vm vm_first(int n) { return (vm)((1u << n) - 1); }
PE_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
PE_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
PE_INLINE vf vf_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(vm_first(n), p); }
PE_INLINE void vf_store_part(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, vm_first(n), a); }
PE_INLINE vf vf_set(float a) { return _mm512_set1_ps(a); }
PE_INLINE vf vf_zip_low(vf a, vf b)
{
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
PE_INLINE vf vf_zip_high(vf a, vf b)
{
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}
PE_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
PE_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
PE_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
PE_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
PE_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
PE_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
PE_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
PE_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
PE_INLINE vf vf_mad(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
PE_INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PE_INLINE vi vf_to_int(vf a) { return _mm512_cvtps_epi32(a); }
PE_INLINE vf vi_to_float(vi a) { return _mm512_cvtepi32_ps(a); }
PE_INLINE vi vf_bits(vf a) { return _mm512_castps_si512(a); }
PE_INLINE vf vi_bits(vi a) { return _mm512_castsi512_ps(a); }
PE_INLINE vi vi_set(int32_t a) { return _mm512_set1_epi32(a); }
PE_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
PE_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
PE_INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
PE_INLINE vi vi_words(const int16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
PE_INLINE vi vi_mul16(vi a, int32_t b) { return _mm512_madd_epi16(a, _mm512_set1_epi32(b)); } /* 0 times the upper half of b */
PE_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
PE_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
PE_INLINE vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
PE_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
#define vi_shl(a, n) _mm512_slli_epi32(a, n)
#define vi_sra(a, n) _mm512_srai_epi32(a, n)
PE_INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
PE_INLINE vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
PE_INLINE vf vf_pick(vf table, vi index) { return _mm512_permutexvar_ps(index, table); }
PE_INLINE vi vi_load_s16(const int16_t *p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
PE_INLINE vi vi_load_s8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
PE_INLINE void vi_store_s16(int16_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(a)); }
PE_INLINE void vi_store_s8(int8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a)); }
PE_INLINE void vi_store_u8(uint8_t *p, vi a)
{
    vi inside = vi_min(vi_max(a, vi_set(0)), vi_set(255));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(inside));
}

/* 64 bytes as 2 x 64 values of a table of 16. */
PE_INLINE void nibbles(const uint8_t *p, const int8_t *table, vi *low, vi *high)
{
    const vi bytes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    const vi entries = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    *low = _mm512_shuffle_epi8(entries, _mm512_and_si512(bytes, mask));
    *high = _mm512_shuffle_epi8(entries, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
}

#define PE_TREE(name, type, op256, op128, ops)                                                                       \
    PE_INLINE float name(vf v)                                                                                       \
    {                                                                                                                \
        __m256 a = op256(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));                                   \
        __m128 b = op128(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));                                    \
        b = op128(b, _mm_movehl_ps(b, b));                                                                           \
        return _mm_cvtss_f32(ops(b, _mm_movehdup_ps(b)));                                                            \
    }
PE_TREE(vf_sum, float, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
PE_TREE(vf_hmax, float, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
PE_TREE(vf_hmin, float, _mm256_min_ps, _mm_min_ps, _mm_min_ss)
#undef PE_TREE

/* A float32 tile's broadcast stays in a register: gcc would fold it into each of its uses as a memory operand. */
#if PE_MSVC
#define PE_PIN(v) ((void)0)
#else
#define PE_PIN(v) __asm__("" : "+v"(v))
#endif

#define PE_Q8_ORIGIN 0

/* Rows of a tile, by how many panels wide it is: accumulators, weights and broadcast fit 32 registers. */
#define PE_F32_ROWS_1 12
#define PE_F32_ROWS_2 12
#define PE_F32_ROWS_4 6
#define PE_F32_MANY 2
