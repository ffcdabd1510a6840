/* Every kernel of a level, written once over the primitives that the level's file (isa/NAME.c) defines before this:
 *
 * vf, vi, vm          16 floats, 16 int32, a mask of 16 lanes
 * vf_load vf_store    any address; vf_load_part(p, n) the first n lanes, zeros behind; vf_store_part(p, a, n)
 * vf_set vi_set       one value in all lanes; vm_first(n) the first n lanes
 * vf_add sub mul div  lane by lane, correctly rounded; vi_add sub mul and or min max wrap
 * vf_min vf_max       the second operand where either is NaN
 * vf_fma vf_fnma      a * b + c and c - a * b with one rounding, at every level
 * vf_mad              a * b + c, fused where the level has FMA: for long sums
 * vf_round vf_to_int  to the nearest integer, ties to even, INT32_MIN for NaN and what doesn't fit; vi_to_float
 * vf_bits vi_bits     reinterpret; vi_shl vi_sra by a constant
 * vf_lt vf_select     (a < b) as a mask; mask ? a : b
 * vf_sum hmax hmin    across the lanes by the fixed tree (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1)
 * vi_load_s16         16 int16; vi_store_u8(p, a) 16 bytes, clamped to 0..255
 * vq_w vq_weights     64 bytes of packed int8 weights, made ready; vq_a vq_activations 4 bytes of a row, in all lanes
 * PE_Q8_ORIGIN        what vq_activations takes away from each value: 0, or 128 where a product needs them signed
 * vq_dot(&acc, a, w)  acc += the sum of the 4 products, exact
 * PE_PIN(v)           keeps v in a register, where a compiler would not
 * PE_F32_ROWS_1 2 4   the most rows of a float32 tile 1, 2, 4 panels wide; PE_MANY_PANELS the width for many rows; PE_Q8_… */

#include "vecmath.inc.h"

/* A tile: `rows` x `panels` accumulators. `rows` and `panels` are constants once this is inlined, so the loops unroll and the
 * arrays become registers. With `decay` it starts at decay * out, else at the bias. */
PE_INLINE void tile_f32(int rows, int panels, const float *x, int64_t x_stride, const float *w, int64_t panel_stride,
                        int64_t k, const float *decay, const pe_output *out)
{
    vf acc[12][4];
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            if (decay)
                acc[r][p] = vf_mul(vf_set(decay[r]), vf_load(out->out + r * out->out_stride + p * PE_LANES));
            else
                acc[r][p] = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
        }
    for (int64_t i = 0; i < k; i++) {
        vf column[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            column[p] = vf_load(w + p * panel_stride + i * PE_LANES);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vf value = vf_set(x[r * x_stride + i]);
            PE_PIN(value);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                acc[r][p] = vf_mad(value, column[p], acc[r][p]);
        }
    }
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            vf y = acc[r][p];
            if (out->residual)
                y = vf_add(y, vf_load(out->residual + r * out->residual_stride + p * PE_LANES));
            vf_store(out->out + r * out->out_stride + p * PE_LANES, y);
        }
}

PE_INLINE void tile_q8(int rows, int panels, const pe_rows_q8 *x, const pe_weights_q8 *w, int64_t panel,
                       const pe_output *out)
{
    const int64_t n_quad = (w->k + 3) / 4, n_group = (w->k + PE_GROUP - 1) / PE_GROUP;
    const int64_t x_groups = x->stride / PE_GROUP;
    float sums[12 * 4 * PE_LANES]; /* in memory, since the integers take the registers */
    for (int i = 0; i < rows * panels; i++)
        vf_store(sums + i * PE_LANES, vf_set(0.0f));
    for (int64_t g = 0; g < n_group; g++) {
        vi acc[12][4];
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            vi column_sum = vi_load_s16(w->column_sum + ((panel + p) * n_group + g) * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][p] = vi_mul(vi_set(PE_Q8_ORIGIN - x->zero[r * x_groups + g]), column_sum);
        }
        const int64_t first = g * (PE_GROUP / 4);
        const int64_t last = first + PE_GROUP / 4 < n_quad ? first + PE_GROUP / 4 : n_quad;
        const int8_t *quads = w->panels + panel * n_quad * 4 * PE_LANES;
        for (int64_t i = first; i < last; i++) {
            vq_w column[4];
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                column[p] = vq_weights(quads + (p * n_quad + i) * 4 * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++) {
                vq_a value = vq_activations(x->q + r * x->stride + 4 * i);
                PE_UNROLL
                for (int p = 0; p < panels; p++)
                    vq_dot(&acc[r][p], value, column[p]);
            }
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vf scale = vf_set(x->scale[r * x_groups + g]);
            PE_UNROLL
            for (int p = 0; p < panels; p++) {
                float *sum = sums + (r * panels + p) * PE_LANES;
                vf_store(sum, vf_mad(scale, vi_to_float(acc[r][p]), vf_load(sum)));
            }
        }
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        vf scale = vf_load(w->scale + (panel + p) * PE_LANES);
        vf bias = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vf y = vf_mad(scale, vf_load(sums + (r * panels + p) * PE_LANES), bias);
            if (out->residual)
                y = vf_add(y, vf_load(out->residual + r * out->residual_stride + p * PE_LANES));
            vf_store(out->out + r * out->out_stride + p * PE_LANES, y);
        }
    }
}

/* `out` for a tile that starts at this row and panel. */
PE_INLINE pe_output output_at(const pe_output *out, int64_t row, int64_t panel)
{
    return (pe_output){
        .bias = out->bias ? out->bias + panel * PE_LANES : 0,
        .residual = out->residual ? out->residual + row * out->residual_stride + panel * PE_LANES : 0,
        .residual_stride = out->residual_stride,
        .out = out->out + row * out->out_stride + panel * PE_LANES,
        .out_stride = out->out_stride,
    };
}

/* A switch that turns a number of rows known at run time into one known to the compiler. */
#define PE_CASE(n, max, call) case n: if (n <= (max)) { enum { rows = n <= (max) ? n : 1 }; call; } break;
#define PE_FOR_ROWS(n, max, call)                                                                                    \
    switch (n) {                                                                                                     \
        PE_CASE(1, max, call) PE_CASE(2, max, call) PE_CASE(3, max, call) PE_CASE(4, max, call)                      \
        PE_CASE(5, max, call) PE_CASE(6, max, call) PE_CASE(7, max, call) PE_CASE(8, max, call)                      \
        PE_CASE(9, max, call) PE_CASE(10, max, call) PE_CASE(11, max, call) PE_CASE(12, max, call)                   \
    }

/* Tiles `panels` wide down n_row rows, as even in height as they can be: no thin tile at the end. */
#define PE_ROWS_F32(panels)                                                                                          \
    static void rows_f32_##panels(const float *x, int64_t x_stride, int64_t n_row, const float *w,                   \
                                  int64_t panel_stride, int64_t k, const float *decay, const pe_output *out)         \
    {                                                                                                                \
        const int64_t n_tile = (n_row + PE_F32_ROWS_##panels - 1) / PE_F32_ROWS_##panels;                            \
        for (int64_t t = 0, row = 0; t < n_tile; t++) {                                                              \
            const int64_t n = (n_row - row) / (n_tile - t);                                                          \
            const pe_output to = output_at(out, row, 0);                                                             \
            const float *from = x + row * x_stride;                                                                  \
            const float *fade = decay ? decay + row : 0;                                                             \
            PE_FOR_ROWS(n, PE_F32_ROWS_##panels,                                                                     \
                        tile_f32(rows, panels, from, x_stride, w, panel_stride, k, fade, &to))                       \
            row += n;                                                                                                \
        }                                                                                                            \
    }
PE_ROWS_F32(1)
PE_ROWS_F32(2)
PE_ROWS_F32(4)

#define PE_ROWS_Q8(panels)                                                                                           \
    static void rows_q8_##panels(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q8 *w, int64_t panel,          \
                                 const pe_output *out)                                                               \
    {                                                                                                                \
        const int64_t n_tile = (n_row + PE_Q8_ROWS_##panels - 1) / PE_Q8_ROWS_##panels;                              \
        for (int64_t t = 0, row = 0; t < n_tile; t++) {                                                              \
            const int64_t n = (n_row - row) / (n_tile - t), group = row * (x->stride / PE_GROUP);                    \
            const pe_output to = output_at(out, row, 0);                                                             \
            const pe_rows_q8 from = {x->q + row * x->stride, x->scale + group, x->zero + group, x->stride};          \
            PE_FOR_ROWS(n, PE_Q8_ROWS_##panels, tile_q8(rows, panels, &from, w, panel, &to))                         \
            row += n;                                                                                                \
        }                                                                                                            \
    }
PE_ROWS_Q8(1)
PE_ROWS_Q8(2)
PE_ROWS_Q8(4)

/* How many panels the next tiles take: the widest tile that holds all rows, else the one meant for many rows. */
PE_INLINE int64_t tile_width(int64_t n_row, int64_t n_panel, int rows_4, int rows_2, int many)
{
    if (n_row <= rows_4 && n_panel >= 4)
        return 4;
    if (n_panel >= 2 && (n_row <= rows_2 || many >= 2))
        return 2;
    return 1;
}

static void matmul_f32(const float *x, int64_t x_stride, int64_t n_row, const pe_weights_f32 *w, int64_t panel,
                       int64_t n_panel, const pe_output *out)
{
    const int64_t stride = w->k * PE_LANES, end = panel + n_panel;
    while (panel < end) {
        const int64_t width = tile_width(n_row, end - panel, PE_F32_ROWS_4, PE_F32_ROWS_2, PE_MANY_PANELS);
        const float *from = w->panels + panel * stride;
        const pe_output to = output_at(out, 0, panel);
        (width == 4 ? rows_f32_4 : width == 2 ? rows_f32_2 : rows_f32_1)(x, x_stride, n_row, from, stride, w->k, 0, &to);
        panel += width;
    }
}

static void accumulate_f32(const float *x, int64_t x_stride, int64_t n_row, int64_t k, const pe_weights_f32 *w,
                           int64_t n_panel, const float *decay, float *out, int64_t out_stride)
{
    const int64_t stride = w->k * PE_LANES;
    const pe_output base = {.out = out, .out_stride = out_stride};
    for (int64_t panel = 0; panel < n_panel;) {
        const int64_t width = tile_width(n_row, n_panel - panel, PE_F32_ROWS_4, PE_F32_ROWS_2, PE_MANY_PANELS);
        const float *from = w->panels + panel * stride;
        const pe_output to = output_at(&base, 0, panel);
        (width == 4 ? rows_f32_4 : width == 2 ? rows_f32_2 : rows_f32_1)(x, x_stride, n_row, from, stride, k, decay, &to);
        panel += width;
    }
}

static void matmul_q8(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q8 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out)
{
    const int64_t end = panel + n_panel;
    while (panel < end) {
        const int64_t width = tile_width(n_row, end - panel, PE_Q8_ROWS_4, PE_Q8_ROWS_2, PE_Q8_MANY_PANELS);
        const pe_output to = output_at(out, 0, panel);
        (width == 4 ? rows_q8_4 : width == 2 ? rows_q8_2 : rows_q8_1)(x, n_row, w, panel, &to);
        panel += width;
    }
}

/* The vector of x that starts at i; lanes at n and beyond are `fill`. */
PE_INLINE vf load_or(const float *x, int64_t i, int64_t n, float fill)
{
    if (n - i >= PE_LANES)
        return vf_load(x + i);
    const int left = (int)(n - i);
    return vf_select(vm_first(left), vf_load_part(x + i, left), vf_set(fill));
}

/* A group of at most PE_GROUP floats. NaN and infinity make the scale NaN, so that they show in the result. */
PE_INLINE void quantize_group(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *zero)
{
    vf low = vf_set(x[0]), high = low, sum = vf_set(0.0f);
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, x[0]);
        low = vf_min(low, v);
        high = vf_max(high, v);
        sum = vf_add(sum, vf_mul(v, vf_set(0.0f)));
    }
    const float min = vf_hmin(low), max = vf_hmax(high);
    const float largest = -min > max ? -min : max;
    float step = (max - min) * (1.0f / 255);
    step = step > largest * (1.0f / 32768) ? step : largest * (1.0f / 32768); /* bounds the zero point */
    step = step > 1e-30f ? step : 1e-30f;
    const vf inverse = vf_set(1.0f / step);
    const vi origin = vf_to_int(vf_mul(vf_set(-min), inverse));
    *scale = step + vf_sum(sum);
    int32_t lanes[PE_LANES];
    memcpy(lanes, &origin, sizeof lanes);
    *zero = lanes[0];
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, 0.0f);
        vi_store_u8(q + i, vi_add(vf_to_int(vf_mul(v, inverse)), origin));
    }
}

static void quantize_q8(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *zero)
{
    for (int64_t i = 0, g = 0; i < n; i += PE_GROUP, g++)
        quantize_group(x + i, n - i < PE_GROUP ? n - i : PE_GROUP, q + i, scale + g, zero + g);
}

/* The mean of d^2 is taken about a rounded mean; `shift`, the mean of d, corrects both. So a row far from 0 loses nothing. */
static void layer_norm(const float *x, int64_t n, const float *gain, const float *bias, float eps, float *y)
{
    vf sum = vf_set(0.0f);
    for (int64_t i = 0; i < n; i += PE_LANES)
        sum = vf_add(sum, load_or(x, i, n, 0.0f));
    const float mean = vf_sum(sum) / (float)n;
    vf sum_d = vf_set(0.0f), sum_dd = sum_d;
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf d = vf_sub(load_or(x, i, n, mean), vf_set(mean));
        sum_d = vf_add(sum_d, d);
        sum_dd = vf_mad(d, d, sum_dd);
    }
    const float shift = vf_sum(sum_d) / (float)n;
    const float variance = vf_sum(sum_dd) / (float)n - shift * shift;
    const vf inverse = vf_set(1.0f / sqrtf((variance > 0.0f ? variance : 0.0f) + eps));
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf d = vf_sub(vf_sub(load_or(x, i, n, 0.0f), vf_set(mean)), vf_set(shift));
        vf_store(y + i, vf_mad(vf_mul(d, inverse), load_or(gain, i, n, 0.0f), load_or(bias, i, n, 0.0f)));
    }
}

#define PE_MAP(function)                                                                                             \
    for (int64_t i = 0; i < n; i += PE_LANES)                                                                        \
        vf_store(x + i, function(load_or(x, i, n, 0.0f)));                                                           \
    break

static void activate(pe_activation kind, float *x, int64_t n)
{
    switch (kind) {
    case PE_ACT_NONE: break;
    case PE_ACT_GELU_TANH: PE_MAP(vm_gelu_tanh);
    case PE_ACT_GELU_ERF: PE_MAP(vm_gelu_erf);
    case PE_ACT_GELU_SIGMOID: PE_MAP(vm_gelu_sigmoid);
    case PE_ACT_RELU: PE_MAP(vm_relu);
    case PE_ACT_SILU: PE_MAP(vm_silu);
    case PE_ACT_TANH: PE_MAP(vm_tanh);
    }
}

static float softmax_block(const float *scores, int64_t n, float scale, float *state, float *weights)
{
    enum { VECTORS = PE_PAGE / PE_LANES };
    vf s[VECTORS], largest = vf_set(state[0]);
    PE_UNROLL
    for (int i = 0; i < VECTORS; i++) {
        const int64_t visible = n - i * PE_LANES;
        const int first = (int)(visible < 0 ? 0 : visible > PE_LANES ? PE_LANES : visible);
        const vf scaled = vf_mul(vf_set(scale), vf_load(scores + i * PE_LANES));
        s[i] = vf_select(vm_first(first), scaled, vf_set(-INFINITY));
        largest = vf_max(s[i], largest);
    }
    const float max = vf_hmax(largest);
    float decay[PE_LANES];
    vf_store(decay, vm_exp_neg(vf_set(state[0] - max)));
    PE_UNROLL
    for (int i = 0; i < VECTORS; i++) {
        s[i] = vm_exp_neg(vf_sub(s[i], vf_set(max)));
        vf_store(weights + i * PE_LANES, s[i]);
    }
    const vf sum = vf_add(vf_add(s[0], s[1]), vf_add(s[2], s[3]));
    state[0] = max;
    vf_store(state + PE_LANES, vf_mad(vf_load(state + PE_LANES), vf_set(decay[0]), sum));
    return decay[0];
}

static void softmax_end(const float *state, float *out, int64_t n)
{
    const vf sum = vf_set(vf_sum(vf_load(state + PE_LANES)));
    for (int64_t i = 0; i < n; i += PE_LANES)
        vf_store(out + i, vf_div(vf_load(out + i), sum));
}

static float row_max(const float *x, int64_t n)
{
    vf largest = vf_set(x[0]), check = vf_set(0.0f);
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, x[0]);
        largest = vf_max(v, largest);
        check = vf_add(check, vf_min(vf_set(1.0f), vf_max(vf_set(-1.0f), v))); /* NaN stays NaN, infinity doesn't become it */
    }
    const float nan = vf_sum(check);
    return nan == nan ? vf_hmax(largest) : nan;
}

/* Each lane's sum carries its rounding errors along (Knuth's TwoSum), and the lanes are added in double. */
static double exp_sum(const float *x, int64_t n, float offset, float scale, float *y)
{
    vf sum = vf_set(0.0f), error = sum;
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf e = vm_exp(vf_mul(vf_set(scale), vf_sub(load_or(x, i, n, -INFINITY), vf_set(offset))));
        if (y && n - i >= PE_LANES)
            vf_store(y + i, e);
        else if (y)
            vf_store_part(y + i, e, (int)(n - i));
        const vf next = vf_add(sum, e), part = vf_sub(next, sum);
        error = vf_add(error, vf_add(vf_sub(sum, vf_sub(next, part)), vf_sub(e, part)));
        sum = next;
    }
    float sums[PE_LANES], errors[PE_LANES];
    vf_store(sums, sum);
    vf_store(errors, error);
    double total = 0.0;
    for (int i = 0; i < PE_LANES; i++)
        total += (double)sums[i] + (double)errors[i];
    return total;
}

static void softmax(const float *x, int64_t n, float *y)
{
    const vf sum = vf_set((float)exp_sum(x, n, row_max(x, n), 1.0f, y));
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const int left = (int)(n - i < PE_LANES ? n - i : PE_LANES);
        vf_store_part(y + i, vf_div(vf_load_part(y + i, left), sum), left);
    }
}

/* As many accumulators as the level's tiles of one panel have: fewer would wait for each other, more would not fit. All
 * lanes and weights differ and the activations are forgotten, or a compiler would compute only once what is the same. */
static float spin_f32(int64_t n)
{
    enum { LIVE = PE_F32_ROWS_1 < PE_SPIN ? PE_F32_ROWS_1 : PE_SPIN };
    float lanes[PE_LANES];
    for (int i = 0; i < PE_LANES; i++)
        lanes[i] = (float)i;
    vf acc[LIVE], a = vf_set(0.999f), b = vf_set(1e-3f);
    PE_UNROLL
    for (int i = 0; i < LIVE; i++)
        acc[i] = vf_add(vf_load(lanes), vf_set((float)(i * PE_LANES)));
    for (int64_t r = 0; r < n * PE_SPIN / LIVE; r++) {
        PE_UNROLL
        for (int i = 0; i < LIVE; i++)
            acc[i] = vf_mad(a, b, acc[i]);
    }
    PE_UNROLL
    for (int i = 1; i < LIVE; i++)
        acc[0] = vf_add(acc[0], acc[i]);
    return vf_sum(acc[0]);
}

static int32_t spin_q8(int64_t n)
{
    enum { LIVE = PE_Q8_ROWS_1 < PE_SPIN ? PE_Q8_ROWS_1 : PE_SPIN };
    int8_t bytes[4 * PE_LANES];
    for (int i = 0; i < 4 * PE_LANES; i++)
        bytes[i] = (int8_t)i;
    vq_w w = vq_weights(bytes);
    vq_a a = vq_activations((const uint8_t *)bytes);
    vi acc[LIVE];
    PE_UNROLL
    for (int i = 0; i < LIVE; i++)
        acc[i] = vi_set(i);
    for (int64_t r = 0; r < n * PE_SPIN / LIVE; r++) {
        PE_UNROLL
        for (int i = 0; i < LIVE; i++) {
            PE_FORGET(a);
            vq_dot(&acc[i], a, w);
        }
    }
    PE_UNROLL
    for (int i = 1; i < LIVE; i++)
        acc[0] = vi_add(acc[0], acc[i]);
    return (int32_t)vf_sum(vi_to_float(acc[0])); /* all lanes, or the others would not be computed */
}

static float read_bytes(const void *p, int64_t n)
{
    vi acc[4];
    PE_UNROLL
    for (int i = 0; i < 4; i++)
        acc[i] = vi_set(0);
    const float *x = p;
    for (int64_t i = 0; i < n / 4; i += 4 * PE_LANES)
        PE_UNROLL
        for (int j = 0; j < 4; j++)
            acc[j] = vi_or(acc[j], vf_bits(vf_load(x + i + j * PE_LANES)));
    return vf_sum(vi_to_float(vi_or(vi_or(acc[0], acc[1]), vi_or(acc[2], acc[3]))));
}

PE_INLINE float from_f16(uint16_t h)
{
    /* Exponent and fraction move up by 13 bits; the product with 2^112 corrects the exponent's bias, subnormals included. */
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0; /* infinity and NaN */
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign | special;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PE_INLINE float from_bf16(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PE_INLINE float read_value(const void *src, pe_dtype dtype, int64_t i)
{
    switch (dtype) {
    case PE_F16: return from_f16(((const uint16_t *)src)[i]);
    case PE_BF16: return from_bf16(((const uint16_t *)src)[i]);
    default: return ((const float *)src)[i];
    }
}

PE_INLINE int read_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride,
                         float *panel)
{
    vf check = vf_set(0.0f);
    for (int64_t i = 0; i < k; i++) {
        float *row = panel + i * PE_LANES;
        for (int64_t j = 0; j < n; j++)
            row[j] = read_value(src, dtype, i * k_stride + j * n_stride);
        for (int64_t j = n; j < PE_LANES; j++)
            row[j] = 0.0f;
        check = vf_add(check, vf_mul(vf_load(row), vf_set(0.0f)));
    }
    return vf_sum(check) == 0.0f;
}

/* The usual cases with constants, so that the compiler makes vectors of them. */
static int load_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride, float *panel)
{
    const int full = n == PE_LANES && n_stride == 1;
    switch (dtype) {
    case PE_F32:
        return full ? read_panel(src, PE_F32, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_F32, k, k_stride, n, n_stride, panel);
    case PE_F16:
        return full ? read_panel(src, PE_F16, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_F16, k, k_stride, n, n_stride, panel);
    default:
        return full ? read_panel(src, PE_BF16, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_BF16, k, k_stride, n, n_stride, panel);
    }
}

static void pack_q8(const float *panel, int64_t k, int8_t *q, float *scale, int16_t *column_sum)
{
    vf largest = vf_set(0.0f);
    for (int64_t i = 0; i < k; i++) {
        const vf v = vf_load(panel + i * PE_LANES);
        largest = vf_max(vf_max(v, vf_sub(vf_set(0.0f), v)), largest);
    }
    const vf zero_column = vf_set(1.0f);
    const vf step = vf_select(vf_lt(largest, vf_set(1e-35f)), zero_column, vf_div(largest, vf_set(127.0f)));
    const vf inverse = vf_div(vf_set(1.0f), step);
    vf_store(scale, step);
    for (int64_t start = 0; start < k; start += PE_GROUP, column_sum += PE_LANES) {
        const int64_t end = k - start < PE_GROUP ? k : start + PE_GROUP;
        vi sum = vi_set(0);
        for (int64_t i = start; i < end; i += 4, q += 4 * PE_LANES)
            for (int64_t r = 0; r < 4; r++) {
                vi value = vi_set(0);
                if (i + r < end)
                    value = vf_to_int(vf_mul(vf_load(panel + (i + r) * PE_LANES), inverse));
                sum = vi_add(sum, value);
                int32_t lanes[PE_LANES];
                memcpy(lanes, &value, sizeof lanes);
                for (int j = 0; j < PE_LANES; j++)
                    q[4 * j + r] = (int8_t)lanes[j];
            }
        int32_t lanes[PE_LANES];
        memcpy(lanes, &sum, sizeof lanes);
        for (int j = 0; j < PE_LANES; j++)
            column_sum[j] = (int16_t)lanes[j];
    }
}
