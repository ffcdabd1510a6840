/* 64-bit Arm with Advanced SIMD and the dot product extension: Neoverse, Cortex-A75 and later, Apple silicon. A vector
 * is four q registers. sdot multiplies signed by signed bytes, so activations become q - 128 (PE_Q8_ORIGIN). */
#include "../level.h"

#if PE_ARM64
#if defined(__clang__)
PE_TARGET_BEGIN("dotprod")
#elif defined(__ARM_FEATURE_DOTPROD)
PE_TARGET_BEGIN("+dotprod") /* -march has it already, and may have more */
#else
PE_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

typedef struct { float32x4_t a, b, c, d; } vf;
typedef struct { int32x4_t a, b, c, d; } vi;
typedef struct { uint32x4_t a, b, c, d; } vm; /* all bits of a lane, or none */

#define PE_ALL0(type, value) (type){value, value, value, value}
#define PE_EACH(type, op, x) (type){op((x).a), op((x).b), op((x).c), op((x).d)}
#define PE_BOTH(type, op, x, y) (type){op((x).a, (y).a), op((x).b, (y).b), op((x).c, (y).c), op((x).d, (y).d)}
#define PE_ALL3(type, op, x, y, z)                                                                                   \
    (type){op((x).a, (y).a, (z).a), op((x).b, (y).b, (z).b), op((x).c, (y).c, (z).c), op((x).d, (y).d, (z).d)}

PE_INLINE vi vf_bits(vf x) { return PE_EACH(vi, vreinterpretq_s32_f32, x); }
PE_INLINE vf vi_bits(vi x) { return PE_EACH(vf, vreinterpretq_f32_s32, x); }
PE_INLINE vf vf_set(float x) { return PE_ALL0(vf, vdupq_n_f32(x)); }
PE_INLINE vi vi_set(int32_t x) { return PE_ALL0(vi, vdupq_n_s32(x)); }
PE_INLINE vf vf_load(const float *p)
{
    return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
PE_INLINE void vf_store(float *p, vf x)
{
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
PE_INLINE vf vf_zip_low(vf x, vf y)
{
    return (vf){vzip1q_f32(x.a, y.a), vzip2q_f32(x.a, y.a), vzip1q_f32(x.b, y.b), vzip2q_f32(x.b, y.b)};
}
PE_INLINE vf vf_zip_high(vf x, vf y)
{
    return (vf){vzip1q_f32(x.c, y.c), vzip2q_f32(x.c, y.c), vzip1q_f32(x.d, y.d), vzip2q_f32(x.d, y.d)};
}
PE_INLINE vf vf_load_part(const float *p, int n)
{
    float lanes[PE_LANES] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vf_load(lanes);
}
PE_INLINE void vf_store_part(float *p, vf x, int n)
{
    float lanes[PE_LANES];
    vf_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
PE_INLINE vm vm_first(int n)
{
    static const int32_t first[4] = {0, 1, 2, 3};
    int32x4_t lane = vld1q_s32(first);
    return (vm){vcltq_s32(lane, vdupq_n_s32(n)), vcltq_s32(lane, vdupq_n_s32(n - 4)),
                vcltq_s32(lane, vdupq_n_s32(n - 8)), vcltq_s32(lane, vdupq_n_s32(n - 12))};
}
PE_INLINE vm vf_lt(vf x, vf y) { return PE_BOTH(vm, vcltq_f32, x, y); }
PE_INLINE vf vf_select(vm m, vf x, vf y) { return PE_ALL3(vf, vbslq_f32, m, x, y); }

PE_INLINE vf vf_add(vf x, vf y) { return PE_BOTH(vf, vaddq_f32, x, y); }
PE_INLINE vf vf_sub(vf x, vf y) { return PE_BOTH(vf, vsubq_f32, x, y); }
PE_INLINE vf vf_mul(vf x, vf y) { return PE_BOTH(vf, vmulq_f32, x, y); }
PE_INLINE vf vf_div(vf x, vf y) { return PE_BOTH(vf, vdivq_f32, x, y); }
/* Not fmin and fmax: those give NaN where either is. */
PE_INLINE float32x4_t min4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
PE_INLINE float32x4_t max4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
PE_INLINE vf vf_min(vf x, vf y) { return PE_BOTH(vf, min4, x, y); }
PE_INLINE vf vf_max(vf x, vf y) { return PE_BOTH(vf, max4, x, y); }
PE_INLINE vf vf_fma(vf x, vf y, vf z) { return PE_ALL3(vf, vfmaq_f32, z, x, y); }
PE_INLINE vf vf_fnma(vf x, vf y, vf z) { return PE_ALL3(vf, vfmsq_f32, z, x, y); }
PE_INLINE vf vf_mad(vf x, vf y, vf z) { return vf_fma(x, y, z); }
PE_INLINE vf vf_round(vf x) { return PE_EACH(vf, vrndnq_f32, x); }
/* fcvtns saturates; a second comparison gives INT32_MIN for all that doesn't fit. */
PE_INLINE int32x4_t to_int4(float32x4_t x)
{
    return vbslq_s32(vcaltq_f32(x, vdupq_n_f32(2147483648.0f)), vcvtnq_s32_f32(x), vdupq_n_s32(INT32_MIN));
}
PE_INLINE vi vf_to_int(vf x) { return PE_EACH(vi, to_int4, x); }
PE_INLINE vf vi_to_float(vi x) { return PE_EACH(vf, vcvtq_f32_s32, x); }

PE_INLINE vi vi_add(vi x, vi y) { return PE_BOTH(vi, vaddq_s32, x, y); }
PE_INLINE vi vi_sub(vi x, vi y) { return PE_BOTH(vi, vsubq_s32, x, y); }
PE_INLINE vi vi_mul(vi x, vi y) { return PE_BOTH(vi, vmulq_s32, x, y); }
PE_INLINE vi vi_mul16(vi x, int32_t y) { return vi_mul(x, vi_set(y)); }
PE_INLINE vi vi_and(vi x, vi y) { return PE_BOTH(vi, vandq_s32, x, y); }
PE_INLINE vi vi_or(vi x, vi y) { return PE_BOTH(vi, vorrq_s32, x, y); }
PE_INLINE vi vi_min(vi x, vi y) { return PE_BOTH(vi, vminq_s32, x, y); }
PE_INLINE vi vi_max(vi x, vi y) { return PE_BOTH(vi, vmaxq_s32, x, y); }
#define PE_SHIFT(op, x, n) ((vi){op((x).a, n), op((x).b, n), op((x).c, n), op((x).d, n)})
#define vi_shl(x, n) PE_SHIFT(vshlq_n_s32, x, n)
#define vi_sra(x, n) PE_SHIFT(vshrq_n_s32, x, n)
PE_INLINE float32x4_t pick4(uint8x16x4_t table, int32x4_t index)
{
    const int32x4_t bytes = vmlaq_s32(vdupq_n_s32(0x03020100), index, vdupq_n_s32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_s32(bytes)));
}
PE_INLINE vf vf_pick(vf x, vi index)
{
    const uint8x16x4_t table = {
        {vreinterpretq_u8_f32(x.a), vreinterpretq_u8_f32(x.b), vreinterpretq_u8_f32(x.c), vreinterpretq_u8_f32(x.d)}};
    return (vf){pick4(table, index.a), pick4(table, index.b), pick4(table, index.c), pick4(table, index.d)};
}
PE_INLINE vi vi_load_s16(const int16_t *p)
{
    int16x8_t l = vld1q_s16(p), h = vld1q_s16(p + 8);
    return (vi){vmovl_s16(vget_low_s16(l)), vmovl_high_s16(l), vmovl_s16(vget_low_s16(h)), vmovl_high_s16(h)};
}
PE_INLINE vi vi_words(const int16_t *p) { return vi_load_s16(p); }
PE_INLINE vi vi_load_s8(const int8_t *p)
{
    int8x16_t v = vld1q_s8(p);
    int16x8_t l = vmovl_s8(vget_low_s8(v)), h = vmovl_high_s8(v);
    return (vi){vmovl_s16(vget_low_s16(l)), vmovl_high_s16(l), vmovl_s16(vget_low_s16(h)), vmovl_high_s16(h)};
}
PE_INLINE int16x8_t words_of(int32x4_t x, int32x4_t y) { return vqmovn_high_s32(vqmovn_s32(x), y); }
PE_INLINE void vi_store_s16(int16_t *p, vi x)
{
    vst1q_s16(p, words_of(x.a, x.b));
    vst1q_s16(p + 8, words_of(x.c, x.d));
}
PE_INLINE void vi_store_s8(int8_t *p, vi x)
{
    vst1q_s8(p, vqmovn_high_s16(vqmovn_s16(words_of(x.a, x.b)), words_of(x.c, x.d)));
}
PE_INLINE void vi_store_u8(uint8_t *p, vi x)
{
    vst1q_u8(p, vqmovun_high_s16(vqmovun_s16(words_of(x.a, x.b)), words_of(x.c, x.d)));
}

#define PE_TREE(name, op)                                                                                            \
    PE_INLINE float name(vf x)                                                                                       \
    {                                                                                                                \
        float32x4_t y = op(op(x.a, x.c), op(x.b, x.d));                                                              \
        y = op(y, vextq_f32(y, y, 2));                                                                               \
        return vgetq_lane_f32(op(y, vextq_f32(y, y, 1)), 0);                                                         \
    }
PE_TREE(vf_sum, vaddq_f32)
PE_TREE(vf_hmax, max4)
PE_TREE(vf_hmin, min4)

typedef struct { int8x16_t a, b, c, d; } vq_w;
typedef int8x16_t vq_a;

PE_INLINE vq_w vq_weights(const int8_t *p)
{
    return (vq_w){vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)};
}
PE_INLINE vq_a vq_activations(const uint8_t *p)
{
    return vreinterpretq_s8_s32(vdupq_n_s32(pe_load_i32(p) ^ (int32_t)0x80808080));
}
PE_INLINE int32x4_t dot4(int32x4_t acc, int8x16_t a, int8x16_t w)
{
#if defined(__clang__) /* before version 16 it declares the intrinsic for -march alone, not for a target region */
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(w));
    return acc;
#else
    return vdotq_s32(acc, a, w);
#endif
}
PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high)
{
    const int8x16_t entries = vld1q_s8(table);
    const uint8x16_t mask = vdupq_n_u8(15), a = vld1q_u8(p), b = vld1q_u8(p + 16), c = vld1q_u8(p + 32), d = vld1q_u8(p + 48);
    *low = (vq_w){vqtbl1q_s8(entries, vandq_u8(a, mask)), vqtbl1q_s8(entries, vandq_u8(b, mask)),
                  vqtbl1q_s8(entries, vandq_u8(c, mask)), vqtbl1q_s8(entries, vandq_u8(d, mask))};
    *high = (vq_w){vqtbl1q_s8(entries, vshrq_n_u8(a, 4)), vqtbl1q_s8(entries, vshrq_n_u8(b, 4)),
                   vqtbl1q_s8(entries, vshrq_n_u8(c, 4)), vqtbl1q_s8(entries, vshrq_n_u8(d, 4))};
}
PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
    *acc = (vi){dot4(acc->a, a, w.a), dot4(acc->b, a, w.b), dot4(acc->c, a, w.c), dot4(acc->d, a, w.d)};
}
PE_INLINE void vq_sum(vi *acc, vq_w low, vq_w high)
{
    vq_dot(acc, vdupq_n_s8(1), low);
    vq_dot(acc, vdupq_n_s8(1), high);
}

#define PE_PIN(v) ((void)0)
#define PE_Q8_ORIGIN 128

/* Rows of a tile, by how many panels wide it is: four registers an accumulator, 32 registers in all, of which compilers
 * want a few for themselves. For many rows of int8, two panels share what it costs to spread an activation. */
#define PE_F32_ROWS_1 5
#define PE_F32_ROWS_2 2
#define PE_F32_ROWS_4 1
#define PE_F32_MANY 1
#define PE_F32_FAR 0
#define PE_BF16_ROWS_1 4
#define PE_BF16_ROWS_2 1
#define PE_BF16_ROWS_4 1
#define PE_BF16_MANY 1
#define PE_BF16_FAR 0
#define PE_Q8_ROWS_1 4
#define PE_Q8_ROWS_2 2
#define PE_Q8_ROWS_4 1
#define PE_Q8_MANY 2
#define PE_Q4_ROWS_1 3
#define PE_Q4_ROWS_2 1
#define PE_Q4_ROWS_4 1
#define PE_Q4_MANY 1
#define PE_Q4_FAR 0
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(neon, PE_CPU_NEON_DOT, 20)
PE_TARGET_END
#else
PE_NO_LEVEL(neon)
#endif
