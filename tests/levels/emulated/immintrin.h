/* AVX-512 with VNNI and BF16, and VNNI on 256 bits, in plain C after Intel's definitions: what the levels use of them, for a
 * CPU that has AVX2. Stands in for the compiler's immintrin.h, in files that are compiled as for MSVC: no inline assembly.
 * gcc and clang let nobody but immintrin.h include its parts; the whole would define the same names. */
#ifndef PE_EMULATED_H
#define PE_EMULATED_H

#define _IMMINTRIN_H_INCLUDED
#define __IMMINTRIN_H
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>

#include <math.h>

/* Nothing that the CPU must have. */
#define PE_CPU_AVX512 0
#define PE_CPU_AVX512_VNNI 0
#define PE_CPU_AVX512_BF16 0
#define PE_CPU_AVX_VNNI 0

#define VECTOR(type, bytes) type __attribute__((vector_size(bytes), may_alias, aligned(bytes)))
typedef VECTOR(float, 64) __m512;
typedef VECTOR(long long, 64) __m512i;
typedef __m512i __m512bh;
typedef uint16_t __mmask16;
typedef VECTOR(int32_t, 64) dwords;
typedef VECTOR(uint32_t, 64) udwords;
typedef VECTOR(int16_t, 64) words;
typedef VECTOR(uint16_t, 64) uwords;
typedef VECTOR(int8_t, 64) bytes;
typedef VECTOR(uint8_t, 64) ubytes;
typedef VECTOR(int16_t, 32) words16;
typedef VECTOR(uint16_t, 32) uwords16;
typedef VECTOR(int8_t, 16) bytes16;

/* name(parameters): a result whose elements are each r[i] = value, in the type that says what r is made of. */
#define EACH(Result, Elements, name, parameters, value)                                                              \
    PE_INLINE Result name parameters                                                                                 \
    {                                                                                                                \
        Elements r;                                                                                                  \
        for (int i = 0; i < (int)(sizeof r / sizeof r[0]); i++)                                                      \
            r[i] = (value);                                                                                          \
        return (Result)r;                                                                                            \
    }
#define F32(name, parameters, value) EACH(__m512, __m512, name, parameters, value)
#define I32(name, parameters, value) EACH(__m512i, dwords, name, parameters, value)
#define I16(name, parameters, value) EACH(__m512i, words, name, parameters, value)
#define CLAMP(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))

PE_INLINE __m512 _mm512_loadu_ps(const void *p) { __m512 r; memcpy(&r, p, sizeof r); return r; }
PE_INLINE __m512i _mm512_loadu_si512(const void *p) { __m512i r; memcpy(&r, p, sizeof r); return r; }
PE_INLINE void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, sizeof a); }
F32(_mm512_maskz_loadu_ps, (__mmask16 m, const float *p), m >> i & 1 ? p[i] : 0.0f)
PE_INLINE void _mm512_mask_storeu_ps(float *p, __mmask16 m, __m512 a)
{
    for (int i = 0; i < 16; i++)
        if (m >> i & 1)
            p[i] = a[i];
}
PE_INLINE __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
PE_INLINE __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EACH(__m256, __m256, _mm512_castps512_ps256, (__m512 a), a[i])
EACH(__m256, __m256, _mm512_extractf32x8_ps, (__m512 a, int half), a[8 * half + i])
F32(_mm512_set1_ps, (float a), a)
I32(_mm512_set1_epi32, (int a), a)
I16(_mm512_set1_epi16, (short a), a)
EACH(__m512i, bytes, _mm512_set1_epi8, (char a), a)
#define _mm512_setr_epi32(...) ((__m512i)(dwords){__VA_ARGS__})
I32(_mm512_broadcast_i32x4, (__m128i a), ((VECTOR(int32_t, 16))a)[i % 4])
F32(_mm512_permutexvar_ps, (__m512i at, __m512 a), a[((dwords)at)[i] & 15])
F32(_mm512_permutex2var_ps, (__m512 a, __m512i at, __m512 b),
    (((dwords)at)[i] & 16 ? b : a)[((dwords)at)[i] & 15])
EACH(__m512i, bytes, _mm512_shuffle_epi8, (__m512i a, __m512i at),
     ((bytes)at)[i] < 0 ? 0 : ((bytes)a)[i / 16 * 16 + (((bytes)at)[i] & 15)])

PE_INLINE __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
PE_INLINE __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
PE_INLINE __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
PE_INLINE __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
F32(_mm512_min_ps, (__m512 a, __m512 b), a[i] < b[i] ? a[i] : b[i])
F32(_mm512_max_ps, (__m512 a, __m512 b), a[i] > b[i] ? a[i] : b[i])
F32(_mm512_abs_ps, (__m512 a), fabsf(a[i]))
F32(_mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), fmaf(a[i], b[i], c[i]))
F32(_mm512_fnmadd_ps, (__m512 a, __m512 b, __m512 c), fmaf(-a[i], b[i], c[i]))
#define _mm512_roundscale_ps(a, to_nearest) rounded(a)
F32(rounded, (__m512 a), nearbyintf(a[i]))
I32(_mm512_cvtps_epi32, (__m512 a), a[i] >= -0x1p31f && a[i] < 0x1p31f ? (int32_t)nearbyintf(a[i]) : INT32_MIN)
F32(_mm512_cvtepi32_ps, (__m512i a), (float)((dwords)a)[i])
F32(_mm512_mask_blend_ps, (__mmask16 m, __m512 a, __m512 b), m >> i & 1 ? b[i] : a[i])
F32(_mm512_maskz_mov_ps, (__mmask16 m, __m512 a), m >> i & 1 ? a[i] : 0.0f)
PE_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how)
{
    __mmask16 m = 0;
    for (int i = 0; i < 16; i++)
        m |= (__mmask16)((how == _CMP_LT_OQ ? a[i] < b[i] : /* _CMP_NLT_UQ */ !(a[i] < b[i])) << i);
    return m;
}

PE_INLINE __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((udwords)a + (udwords)b); }
PE_INLINE __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((udwords)a - (udwords)b); }
PE_INLINE __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((udwords)a * (udwords)b); }
PE_INLINE __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((uwords)a + (uwords)b); }
PE_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
PE_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
I32(_mm512_min_epi32, (__m512i a, __m512i b), ((dwords)a)[i] < ((dwords)b)[i] ? ((dwords)a)[i] : ((dwords)b)[i])
I32(_mm512_max_epi32, (__m512i a, __m512i b), ((dwords)a)[i] > ((dwords)b)[i] ? ((dwords)a)[i] : ((dwords)b)[i])
PE_INLINE __m512i _mm512_slli_epi32(__m512i a, int n) { return (__m512i)((udwords)a << n); }
PE_INLINE __m512i _mm512_srai_epi32(__m512i a, int n) { return (__m512i)((dwords)a >> n); }
PE_INLINE __m512i _mm512_slli_epi16(__m512i a, int n) { return (__m512i)((uwords)a << n); }
PE_INLINE __m512i _mm512_srli_epi16(__m512i a, int n) { return (__m512i)((uwords)a >> n); }
PE_INLINE __m512i _mm512_srai_epi16(__m512i a, int n) { return (__m512i)((words)a >> n); }
I32(_mm512_cvtepi16_epi32, (__m256i a), ((words16)a)[i])
I32(_mm512_cvtepu16_epi32, (__m256i a), ((uwords16)a)[i])
I32(_mm512_cvtepi8_epi32, (__m128i a), ((bytes16)a)[i])
EACH(__m256i, words16, _mm512_cvtsepi32_epi16, (__m512i a), (int16_t)CLAMP(((dwords)a)[i], INT16_MIN, INT16_MAX))
EACH(__m128i, bytes16, _mm512_cvtsepi32_epi8, (__m512i a), (int8_t)CLAMP(((dwords)a)[i], INT8_MIN, INT8_MAX))
EACH(__m128i, bytes16, _mm512_cvtepi32_epi8, (__m512i a), (int8_t)((dwords)a)[i])

#define PRODUCT(a, b, at) ((a)[at] * (b)[at])
I32(_mm512_madd_epi16, (__m512i a, __m512i b),
    PRODUCT((words)a, (words)b, 2 * i) + PRODUCT((words)a, (words)b, 2 * i + 1))
#define QUAD(a, b)                                                                                                   \
    (PRODUCT(a, b, 4 * i) + PRODUCT(a, b, 4 * i + 1) + PRODUCT(a, b, 4 * i + 2) + PRODUCT(a, b, 4 * i + 3))
I32(_mm512_dpbusd_epi32, (__m512i c, __m512i a, __m512i b), ((dwords)c)[i] + QUAD((ubytes)a, (bytes)b))
EACH(__m256i, VECTOR(int32_t, 32), _mm256_dpbusd_avx_epi32, (__m256i c, __m256i a, __m256i b),
     ((VECTOR(int32_t, 32))c)[i] + QUAD((VECTOR(uint8_t, 32))a, (VECTOR(int8_t, 32))b))

/* bfloat16: what is subnormal counts as 0, before and after each operation; products are added by FMA, the odd one first. */
PE_INLINE float flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0.0f, a) : a; }
PE_INLINE float wide(__m512i a, int i)
{
    const uint32_t value = (uint32_t)((uwords)a)[i] << 16;
    float r;
    memcpy(&r, &value, sizeof r);
    return flushed(r);
}
PE_INLINE float flushed_fma(float a, float b, float c) { return flushed(fmaf(a, b, flushed(c))); }
F32(_mm512_dpbf16_ps, (__m512 c, __m512bh a, __m512bh b),
    flushed_fma(wide(a, 2 * i), wide(b, 2 * i), flushed_fma(wide(a, 2 * i + 1), wide(b, 2 * i + 1), c[i])))
PE_INLINE uint16_t upper_half(float a) /* to nearest even; a NaN becomes a quiet one */
{
    uint32_t bits;
    a = flushed(a);
    memcpy(&bits, &a, sizeof bits);
    return (uint16_t)((a == a ? bits + 0x7fff + (bits >> 16 & 1) : bits | 1u << 22) >> 16);
}
EACH(__m256i, uwords16, _mm512_cvtneps_pbh, (__m512 a), upper_half(a[i]))

#endif
