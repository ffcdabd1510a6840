/* Plain C, 16 floats in an array: the meaning of every primitive, and what runs where nothing better does. */
#include "../level.h"

/* gcc 12 for 64-bit Arm otherwise loads two decays of softmax_rows before they are there: it takes vectors that it made of
 * these structs for something else than their floats. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-strict-aliasing")
#endif

typedef struct { float x[PE_LANES]; } vf;
typedef struct { int32_t x[PE_LANES]; } vi;
typedef struct { int32_t x[PE_LANES]; } vm; /* 0 or 1 */

#define PE_FOR for (int i = 0; i < PE_LANES; i++)
#define PE_OP2(name, type, expression)                                                                               \
    PE_INLINE type name(type a, type b)                                                                              \
    {                                                                                                                \
        type r;                                                                                                      \
        PE_FOR r.x[i] = (expression);                                                                                \
        return r;                                                                                                    \
    }

PE_INLINE vf vf_set(float a)
{
    vf r;
    PE_FOR r.x[i] = a;
    return r;
}
PE_INLINE vm vm_first(int n)
{
    vm r;
    PE_FOR r.x[i] = i < n;
    return r;
}
PE_INLINE vf vf_load(const float *p)
{
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
PE_INLINE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
PE_OP2(vf_zip_low, vf, i % 2 ? b.x[i / 2] : a.x[i / 2])
PE_OP2(vf_zip_high, vf, i % 2 ? b.x[PE_LANES / 2 + i / 2] : a.x[PE_LANES / 2 + i / 2])
PE_INLINE vf vf_load_part(const float *p, int n)
{
    vf r = vf_set(0.0f);
    memcpy(&r, p, (size_t)n * sizeof *p);
    return r;
}
PE_INLINE void vf_store_part(float *p, vf a, int n) { memcpy(p, &a, (size_t)n * sizeof *p); }
PE_OP2(vf_add, vf, a.x[i] + b.x[i])
PE_OP2(vf_sub, vf, a.x[i] - b.x[i])
PE_OP2(vf_mul, vf, a.x[i] * b.x[i])
PE_OP2(vf_div, vf, a.x[i] / b.x[i])
PE_OP2(vf_min, vf, a.x[i] < b.x[i] ? a.x[i] : b.x[i])
PE_OP2(vf_max, vf, a.x[i] > b.x[i] ? a.x[i] : b.x[i])
/* The product of two floats is exact in double, so only the sum is rounded (twice, which shows once in 2^29 cases). */
PE_INLINE vf vf_fma(vf a, vf b, vf c)
{
    vf r;
    PE_FOR r.x[i] = (float)((double)a.x[i] * (double)b.x[i] + (double)c.x[i]);
    return r;
}
PE_INLINE vf vf_fnma(vf a, vf b, vf c)
{
    vf r;
    PE_FOR r.x[i] = (float)((double)c.x[i] - (double)a.x[i] * (double)b.x[i]);
    return r;
}
PE_INLINE vf vf_mad(vf a, vf b, vf c) { return vf_add(vf_mul(a, b), c); }
/* Adding and taking away 1.5 * 2^23 leaves the nearest even integer; exact for |x| < 2^22. */
PE_INLINE vf vf_round(vf a)
{
    vf magic = vf_set(12582912.0f);
    return vf_sub(vf_add(a, magic), magic);
}
PE_INLINE vi vf_to_int(vf a)
{
    vi r;
    PE_FOR r.x[i] = a.x[i] >= -2147483648.0f && a.x[i] < 2147483648.0f ? (int32_t)rintf(a.x[i]) : INT32_MIN;
    return r;
}
PE_INLINE vf vi_to_float(vi a)
{
    vf r;
    PE_FOR r.x[i] = (float)a.x[i];
    return r;
}
PE_INLINE vi vf_bits(vf a)
{
    vi r;
    memcpy(&r, &a, sizeof r);
    return r;
}
PE_INLINE vf vi_bits(vi a)
{
    vf r;
    memcpy(&r, &a, sizeof r);
    return r;
}
PE_INLINE vi vi_set(int32_t a)
{
    vi r;
    PE_FOR r.x[i] = a;
    return r;
}
/* Integers wrap, as registers do. */
PE_OP2(vi_add, vi, (int32_t)((uint32_t)a.x[i] + (uint32_t)b.x[i]))
PE_OP2(vi_sub, vi, (int32_t)((uint32_t)a.x[i] - (uint32_t)b.x[i]))
PE_OP2(vi_mul, vi, (int32_t)((uint32_t)a.x[i] * (uint32_t)b.x[i]))
PE_INLINE vi vi_mul16(vi a, int32_t b) { return vi_mul(a, vi_set(b)); }
PE_OP2(vi_and, vi, a.x[i] & b.x[i])
PE_OP2(vi_or, vi, a.x[i] | b.x[i])
PE_OP2(vi_min, vi, a.x[i] < b.x[i] ? a.x[i] : b.x[i])
PE_OP2(vi_max, vi, a.x[i] > b.x[i] ? a.x[i] : b.x[i])
PE_INLINE vi vi_shl(vi a, int n)
{
    vi r;
    PE_FOR r.x[i] = (int32_t)((uint32_t)a.x[i] << n);
    return r;
}
PE_INLINE vi vi_sra(vi a, int n)
{
    vi r;
    PE_FOR r.x[i] = a.x[i] >> n;
    return r;
}
PE_INLINE vm vf_lt(vf a, vf b)
{
    vm r;
    PE_FOR r.x[i] = a.x[i] < b.x[i];
    return r;
}
PE_INLINE vf vf_select(vm m, vf a, vf b)
{
    vf r;
    PE_FOR r.x[i] = m.x[i] ? a.x[i] : b.x[i];
    return r;
}
PE_INLINE vf vf_pick(vf table, vi index)
{
    vf r;
    PE_FOR r.x[i] = table.x[index.x[i]];
    return r;
}
PE_INLINE vi vi_load_s16(const int16_t *p)
{
    vi r;
    PE_FOR r.x[i] = p[i];
    return r;
}
PE_INLINE vi vi_words(const int16_t *p) { return vi_load_s16(p); }
PE_INLINE vi vi_load_s8(const int8_t *p)
{
    vi r;
    PE_FOR r.x[i] = p[i];
    return r;
}
PE_INLINE void vi_store_s16(int16_t *p, vi a)
{
    PE_FOR p[i] = (int16_t)(a.x[i] < INT16_MIN ? INT16_MIN : a.x[i] > INT16_MAX ? INT16_MAX : a.x[i]);
}
PE_INLINE void vi_store_s8(int8_t *p, vi a)
{
    PE_FOR p[i] = (int8_t)(a.x[i] < INT8_MIN ? INT8_MIN : a.x[i] > INT8_MAX ? INT8_MAX : a.x[i]);
}
PE_INLINE void vi_store_u8(uint8_t *p, vi a)
{
    PE_FOR p[i] = (uint8_t)(a.x[i] < 0 ? 0 : a.x[i] > 255 ? 255 : a.x[i]);
}

#define PE_TREE(name, expression)                                                                                    \
    PE_INLINE float name(vf v)                                                                                       \
    {                                                                                                                \
        for (int half = PE_LANES / 2; half > 0; half /= 2)                                                           \
            for (int i = 0; i < half; i++) {                                                                         \
                float a = v.x[i], b = v.x[i + half];                                                                 \
                v.x[i] = (expression);                                                                               \
            }                                                                                                        \
        return v.x[0];                                                                                               \
    }
PE_TREE(vf_sum, a + b)
PE_TREE(vf_hmax, a > b ? a : b)
PE_TREE(vf_hmin, a < b ? a : b)

typedef struct { int8_t x[PE_LANES][4]; } vq_w;
typedef struct { uint8_t x[4]; } vq_a;

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    vq_w r;
    memcpy(&r, p, sizeof r);
    return r;
}
PE_INLINE vq_a vq_activations(const uint8_t *p)
{
    vq_a r;
    memcpy(&r, p, sizeof r);
    return r;
}
PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    PE_FOR
        acc->x[i] += a.x[0] * w.x[i][0] + a.x[1] * w.x[i][1] + a.x[2] * w.x[i][2] + a.x[3] * w.x[i][3];
}
PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high)
{
    PE_FOR
        for (int j = 0; j < 4; j++) {
            low->x[i][j] = table[p[4 * i + j] & 15];
            high->x[i][j] = table[p[4 * i + j] >> 4];
        }
}
PE_INLINE void vq_sum(vi *acc, vq_w low, vq_w high)
{
    PE_FOR
        for (int j = 0; j < 4; j++)
            acc->x[i] += low.x[i][j] + high.x[i][j];
}

#define PE_PIN(v) ((void)0)
#define PE_Q8_ORIGIN 0
#define PE_F32_ROWS_1 1
#define PE_F32_ROWS_2 1
#define PE_F32_ROWS_4 1
#define PE_F32_MANY 1
#define PE_BF16_ROWS_1 1
#define PE_BF16_ROWS_2 1
#define PE_BF16_ROWS_4 1
#define PE_BF16_MANY 1
#define PE_Q8_ROWS_1 1
#define PE_Q8_ROWS_2 1
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 1
#define PE_Q4_ROWS_1 1
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(portable, 0, 0)
