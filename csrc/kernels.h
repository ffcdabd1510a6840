/* The contract between the loops (pyengine/_native, Cython) and the tiles (csrc/isa): one `pe_kernels` is one SIMD level.
 *
 * Who may call: pyengine/_native alone, from any thread. Kernels start no thread, allocate nothing, print nothing and can't
 * fail; the caller has checked every size. They take up to 112 KB of the stack. Kernels of different threads may share inputs, never
 * an output.
 *
 * Numerics. A vector is 16 lanes at every level, whatever the registers' width, and a kernel is the same sequence of
 * operations on those lanes at every level. So all levels that have a fused multiply-add (all but `portable`) give the same
 * bits. Lanes hold different outputs; an output accumulates over K in ascending order; what must cross lanes (a sum, a
 * maximum) goes through one fixed tree. A row's result doesn't depend on the rows computed beside it.
 *
 * Alignment. Packed weights start on 64 bytes. Activations may start anywhere; their rows are written in whole vectors, so
 * an output row must have room for its width rounded up to 16 floats.
 */
#ifndef PE_KERNELS_H
#define PE_KERNELS_H

#include <stdint.h>

#define PE_LANES 16  /* floats in a vector, and output columns in a panel of packed weights */
#define PE_GROUP 128 /* values along K that share one scale and zero point of int8 activations */
#define PE_Q4_GROUP 32 /* values along K that share one scale of int4 weights */
#define PE_SPIN 12   /* accumulators of spin_f32, spin_bf16 and spin_q8 */
#define PE_PAGE 64   /* positions in a KV page, and keys in a block of the attention softmax */

/* What a CPU can do, and what a level needs: bits of pe_cpu_features() and of pe_kernels.requires. */
enum {
    PE_CPU_AVX2_FMA = 1 << 0,    /* AVX2, FMA, F16C */
    PE_CPU_AVX512 = 1 << 1,      /* AVX-512 F, BW, VL, DQ */
    PE_CPU_AVX512_VNNI = 1 << 2, /* AVX-512 VNNI */
    PE_CPU_NEON_DOT = 1 << 3,    /* Advanced SIMD with the dot product extension */
    PE_CPU_AVX512_BF16 = 1 << 4, /* AVX-512 BF16 */
    PE_CPU_AVX_VNNI = 1 << 5     /* VNNI in its VEX form: 256 bits, without AVX-512 */
};

typedef enum {
    PE_ACT_NONE,
    PE_ACT_GELU_TANH,    /* x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) = gelu_new (Hendrycks & Gimpel 2016) */
    PE_ACT_GELU_ERF,     /* x Phi(x), Phi the normal distribution */
    PE_ACT_GELU_SIGMOID, /* x sigmoid(1.702 x) = quick_gelu */
    PE_ACT_RELU,
    PE_ACT_SILU, /* x sigmoid(x) */
    PE_ACT_TANH,
    PE_ACT_GELU_TANH_COARSE /* PE_ACT_GELU_TANH for a result that becomes bfloat16 or int8: at most 2^-12 of it off, or 2^-45 */
} pe_activation;

/* The number formats of a checkpoint's tensors. */
typedef enum { PE_F32, PE_F16, PE_BF16 } pe_dtype;

/* Packed float32 weights: panels[n / 16][k][n % 16], zeros in the columns past n_out. `next`: NULL, or panels of the same shape
 * that are read soon: with one or two rows each line of them is asked for when the one in its place here is read. */
typedef struct {
    const float *panels;
    int64_t k;
    const void *next;
} pe_weights_f32;

/* Packed bfloat16 weights: W[n][k] = panels[n / 16][k / 2][n % 16][k % 2]; zeros past n_out and past k. `next` as
 * above. */
typedef struct {
    const uint16_t *panels;
    int64_t k;
    const void *next;
} pe_weights_bf16;

/* Packed int8 weights: W[n][k] = scale[n] * panels[n / 16][k / 4][n % 16][k % 4]; zeros past n_out and past k.
 * column_sum[panel][group][16] is the sum of a column's int8 values over one group of PE_GROUP values of k: what the
 * activations' zero point is multiplied with. Values lie in -127..127. */
typedef struct {
    const int8_t *panels;
    const int16_t *column_sum;
    const float *scale;
    int64_t k;
} pe_weights_q8;

/* Packed int4 weights: W[n][k] = scale[n / 16][k / 32][n % 16] * PE_Q4_CODEBOOK[code], scale in bfloat16, and code the 4 bits
 * panels[n / 16][k / 8][n % 16][k % 4] >> 4 * (k / 4 % 2). Past n_out and past k, up to a whole group, lie zeros (PE_Q4_ZERO).
 * weight_sum[panel][group][16] is what the zero point of a group of activations is multiplied with: the sum over the groups of
 * weights in it of scale * (sum of the code's values), by FMA, ascending from 0. A level reads it or adds it up again. */
typedef struct {
    const uint8_t *panels;
    const uint16_t *scale;
    const float *weight_sum;
    int64_t k;
} pe_weights_q4;

/* The 16 values of a 4-bit weight, in units of its group's scale: those that lose least for groups of 32 values, half of them
 * normal, half with the longer tails of Student's t, each with its best scale (Lloyd 1982; 0 is held). The largest is 64, so that
 * 16 bits hold two products with activations, which saves AVX2 every fourth instruction. A scale may be negative. Found by
 * bench/codebook.py. */
#define PE_Q4_CODEBOOK {-64, -50, -39, -31, -23, -17, -11, -5, 0, 5, 11, 17, 24, 31, 41, 53}
#define PE_Q4_ZERO 8

/* int8 activations: x[row][k] = scale[row][group] * (q[row][k] + offset[row][group]), group = k / PE_GROUP: the offset is minus
 * the zero point. Rows of q are `stride` bytes apart, a multiple of PE_GROUP; rows of scale and offset stride / PE_GROUP. */
typedef struct {
    const uint8_t *q;
    const float *scale;
    const int32_t *offset;
    int64_t stride;
} pe_rows_q8;

/* Where a product goes: out[row][n] = (product + bias[n]) + residual[row][n]. bias and residual may be NULL; residual may be
 * out. bias has whole panels. Strides in floats. */
typedef struct {
    const float *bias;
    const float *residual;
    int64_t residual_stride;
    float *out;
    int64_t out_stride;
} pe_output;

/* One SIMD level. */
typedef struct pe_kernels {
    const char *name;
    uint32_t requires; /* PE_CPU_* bits */
    int priority;      /* the highest that the CPU can run is chosen */

    /* Panels [panel, panel + n_panel) of out = x W^T + bias + residual for n_row rows of x, `x_stride` floats apart.
     * The accumulator starts at the bias (or 0) and adds x[k] W[n][k] by FMA, k ascending. */
    void (*matmul_f32)(const float *x, int64_t x_stride, int64_t n_row, const pe_weights_f32 *w, int64_t panel,
                       int64_t n_panel, const pe_output *out);

    /* The same with int8: integers are exact; groups are added by FMA in ascending order, accumulator = scale[row][group] *
     * (sum over the group of (q + offset) * w) + accumulator, from 0; then product = accumulator * w.scale[n] + bias[n] (FMA). */
    void (*matmul_q8)(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q8 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out);

    /* The same with bfloat16: accumulator = FMA of the odd k, then of the even k, pair by pair in ascending order, from 0; then
     * product = accumulator + bias[n]. That is vdpbf16ps. It flushes what is subnormal, but weights and activations are 0 or at
     * least 2^-50, so no sum can be. Rows of x are x_stride apart, and 0 at an odd k. */
    void (*matmul_bf16)(const uint16_t *x, int64_t x_stride, int64_t n_row, const pe_weights_bf16 *w, int64_t panel,
                        int64_t n_panel, const pe_output *out);

    /* The same with int4: integers are exact; part = sum over the groups of weights in a group of activations of
     * w.scale * (sum of q * code's value), by FMA, ascending from 0; accumulator = x.scale * (part + x.offset * w.weight_sum) +
     * accumulator, two FMA; then product = accumulator + bias[n]. */
    void (*matmul_q4)(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q4 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out);

    /* out[row][n] = decay[row] * out[row][n] + sum over k of x[row][k] W[n][k], k ascending, by FMA: attention's weighted sum of
     * values, with w.k keys in a panel (panels[n / 16][w.k][16]), of which row r meets the first k + r * step; step is 0 or 1. */
    void (*accumulate_f32)(const float *x, int64_t x_stride, int64_t n_row, int64_t k, int64_t step, const pe_weights_f32 *w,
                           int64_t n_panel, const float *decay, float *out, int64_t out_stride);

    /* The same of bfloat16, with sums as in matmul_bf16. What decay leaves below 2^-80 counts as 0. With an odd k the pair's
     * other value of x is 0, as is x for keys that a row doesn't see; their values are finite. */
    void (*accumulate_bf16)(const uint16_t *x, int64_t x_stride, int64_t n_row, int64_t k, const pe_weights_bf16 *w,
                            int64_t n_panel, const float *decay, float *out, int64_t out_stride);

    /* One row of n floats to int8, group by group: scale = (max - min) / 255 over the group, but at least max |x| / 32640 and
     * 1e-30; offset = -round(-min / scale), so |offset| <= 32640: 16 bits hold it; q = clamp(round(x / scale) - offset, 0, 255).
     * The scale of a group with NaN or infinity is NaN. q is written in whole vectors. */
    void (*quantize_q8)(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *offset);

    /* n floats to bfloat16: to the nearest, ties to even; 0 where |x| < 2^-50. Infinity and NaN stay what they are. Written in
     * whole vectors, zeros past n. */
    void (*narrow_bf16)(const float *x, int64_t n, uint16_t *y);

    /* One row: y = (x - mean) / sqrt(variance + eps) * gain + bias; variance is that of the population, in two passes. */
    void (*layer_norm)(const float *x, int64_t n, const float *gain, const float *bias, float eps, float *y);

    /* x = activation(x), n floats in place (written in whole vectors). At most 2 ULP off, 4 where |result| < 1e-30. */
    void (*activate)(pe_activation kind, float *x, int64_t n);

    /* One step of the online softmax (Milakov & Gimelshein 2018) for up to PE_LANES queries and one block of PE_PAGE keys, of
     * which row r sees the first n + r * step, 1 <= n: scores[row][PE_PAGE] become weights, exp(scale * (score - max')), 0 for
     * those not seen; max' = the maximum so far; scale > 0. `state` is [max by row: PE_LANES floats][a row's sum of weights by
     * lane: PE_LANES floats] for each row; a new row's max is -inf, its sums 0. decay (whole vectors) gets exp(scale * (max -
     * max')) of each row, which earlier weights are multiplied with. With `narrow` weights go there, in bfloat16; then they and
     * their sums are at most 2^-13 off before that rounding, and 0 below 2^-49; `scores` is left undefined. */
    void (*softmax_rows)(float *scores, int64_t n_row, int64_t n, int64_t step, float scale, float *state, float *decay,
                         uint16_t *narrow);

    /* out[0..n) *= 1 / (sum of the 16 lanes of a row's `sums`): ends the online softmax. Written in whole vectors. */
    void (*softmax_end)(const float *sums, float *out, int64_t n);

    /* y = exp(x - max) / sum of them: the softmax of one row, for those who look inside. */
    void (*softmax)(const float *x, int64_t n, float *y);

    /* The maximum of n > 0 floats; NaN where any of them is NaN. */
    float (*row_max)(const float *x, int64_t n);

    /* y[i] = exp(scale * (x[i] - offset)); returns their sum, as exact as the terms are; y may be NULL. */
    double (*exp_sum)(const float *x, int64_t n, float offset, float scale, float *y);

    /* The limits of the machine, for those who measure: n rounds of PE_SPIN multiply-adds of vectors that depend on nothing but
     * their own accumulator, in float32, bfloat16 and int8; and one read of n bytes (a multiple of 256, 64-byte aligned). The
     * results mean nothing. */
    float (*spin_f32)(int64_t n);
    float (*spin_bf16)(int64_t n);
    int32_t (*spin_q8)(int64_t n);
    float (*read)(const void *p, int64_t n);

    /* Reads 16 columns of a checkpoint's matrix as one float32 panel: panel[i][j] = src[i * k_stride + j * n_stride] * in_scale[i]
     * * out_scale[j] for i < k, j < n, in this order; zeros in columns n..15. A scale may be NULL. Strides in elements. Returns 0
     * if any value of src is NaN or infinite, else 1. */
    int (*load_panel)(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride,
                      const float *in_scale, const float *out_scale, float *panel);

    /* The largest |src[i][j]| of rows of a checkpoint's matrix, [n_row][n]: of each row i, or of each column j if by_column. Without
     * meaning where a value is NaN. */
    void (*largest)(const void *src, pe_dtype dtype, int64_t n_row, int64_t n, int by_column, float *out);

    /* sums[j] = the sum of panel[i][j]^2, i ascending from 0, each product and each sum rounded. */
    void (*panel_squares)(const float *panel, int64_t k, float *sums);

    /* A float32 panel [k][16] to int8: scale[j] = max |column j| / 127 (1 for a zero column), q = round(panel / scale) in the
     * layout of pe_weights_q8, column_sum[group][16]. */
    void (*pack_q8)(const float *panel, int64_t k, int8_t *q, float *scale, int16_t *column_sum);

    /* A float32 panel [k][16] to bfloat16, rounded as narrow_bf16 does, in the layout of pe_weights_bf16. */
    void (*pack_bf16)(const float *panel, int64_t k, uint16_t *to);

    /* A float32 panel [k][16] to int4 in the layout of pe_weights_q4. The scale of a group is begun with the value largest in
     * size at 1.05 or 0.95 times the lowest or the highest entry of the codebook; each time the scale that is best for the
     * nearest entries is found; the one of the four with the least squared error is refitted once more. */
    void (*pack_q4)(const float *panel, int64_t k, uint8_t *q, uint16_t *scale, float *weight_sum);

    /* PE_LANES rows of n words of 4 bytes, `stride` words apart, become n rows of PE_LANES: to[i][r] = src[r][i], whatever the
     * words mean. */
    void (*turn_words)(const void *src, int64_t stride, int64_t n, void *to);

    /* n floats to int8 with one scale, which it returns: max |x| / 127, at least 1e-30; q = round(x / scale). The scale is NaN
     * where any of them is NaN or infinite. Written in whole vectors, zeros past n. */
    float (*narrow_q8)(const float *x, int64_t n, int8_t *q);

    /* Panels of 16 keys [n_panel][head_dim][16] to float32: y = q * scale, a scale for each key. */
    void (*widen_keys_q8)(const int8_t *q, const float *scale, int64_t n_panel, int64_t head_dim, float *y);

    /* The first n positions of panels of values [n_panel][PE_PAGE][16] to float32: y = q * scale, a scale for each position. */
    void (*widen_values_q8)(const int8_t *q, const float *scale, int64_t n, int64_t n_panel, float *y);

    /* One query x [head_dim] and panels of keys in int8: out [n_panel][16] is what matmul_f32 gives for what widen_keys_q8 gives.
     * Meanwhile as many panels are asked for from `next` on, or none where it is NULL. */
    void (*score_q8)(const float *x, int64_t head_dim, const int8_t *q, const float *scale, int64_t n_panel, const void *next,
                     float *out);

    /* Its softmax's weights x [k] and panels of values in int8: out [n_panel][16] is what accumulate_f32 gives for what
     * widen_values_q8 gives. `next` as in score_q8. */
    void (*accumulate_q8)(const float *x, int64_t k, const int8_t *q, const float *scale, int64_t n_panel, const void *next,
                          float decay, float *out);
} pe_kernels;

/* cpu.c: what this CPU and its operating system can do, as PE_CPU_* bits. */
uint32_t pe_cpu_features(void);

/* cpu.c: the levels that were compiled in for this kind of processor, in no order; NULL from the last index on. */
const pe_kernels *pe_level(int index);

#endif
