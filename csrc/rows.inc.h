/* Kernels over the values of one row: quantisation, norms, activations, softmax. Included by kernels.inc.h. */

/* The vector of x that starts at i; lanes at n and beyond are `fill`. */
PE_INLINE vf load_or(const float *x, int64_t i, int64_t n, float fill)
{
    if (n - i >= PE_LANES)
        return vf_load(x + i);
    const int left = (int)(n - i);
    return vf_select(vm_first(left), vf_load_part(x + i, left), vf_set(fill));
}

/* A group of at most PE_GROUP floats. NaN and infinity make the scale NaN, so that they show in the result. */
PE_INLINE void quantize_group(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *offset)
{
    vf low = vf_set(x[0]), high = low, sum = vf_set(0.0f);
    PE_UNROLL
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, x[0]);
        low = vf_min(low, v);
        high = vf_max(high, v);
        sum = vf_mad(v, vf_set(0.0f), sum);
    }
    const float min = vf_hmin(low), max = vf_hmax(high);
    const float largest = -min > max ? -min : max;
    float step = (max - min) * (1.0f / 255);
    step = step > largest * (1.0f / 32640) ? step : largest * (1.0f / 32640); /* bounds the zero point */
    step = step > 1e-30f ? step : 1e-30f;
    const vf inverse = vf_set(1.0f / step);
    const vi origin = vf_to_int(vf_mul(vf_set(-min), inverse));
    *scale = step + vf_sum(sum);
    int32_t lanes[PE_LANES];
    memcpy(lanes, &origin, sizeof lanes);
    *offset = (int32_t)(0u - (uint32_t)lanes[0]); /* INT32_MIN, where there is NaN, stays what it is */
    PE_UNROLL
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, 0.0f);
        vi_store_u8(q + i, vi_add(vf_to_int(vf_mul(v, inverse)), origin));
    }
}

static void quantize_q8(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *offset)
{
    const int64_t whole = n / PE_GROUP;
    for (int64_t g = 0; g < whole; g++)
        quantize_group(x + g * PE_GROUP, PE_GROUP, q + g * PE_GROUP, scale + g, offset + g);
    if (whole * PE_GROUP < n)
        quantize_group(x + whole * PE_GROUP, n % PE_GROUP, q + whole * PE_GROUP, scale + whole, offset + whole);
}

/* Floats as bfloat16, in int16: to nearest, ties to even, 0 below 2^-50. Rounds by an addition that carries into the upper
 * half. Infinity and NaN are doubled instead, which makes NaN a quiet one: its upper half is NaN too, whatever its lower half
 * was. */
PE_INLINE vi to_bf16(vf x)
{
    const vi bits = vf_bits(x), odd = vi_and(vi_sra(bits, 16), vi_set(1));
    const vf rounded = vi_bits(vi_add(bits, vi_add(odd, vi_set(0x7fff))));
    const vf size = vi_bits(vi_and(bits, vi_set(0x7fffffff)));
    const vf normal = vf_select(vf_lt(size, vf_set(0x1p-50f)), vf_set(0.0f), rounded);
    return vi_sra(vf_bits(vf_select(vf_lt(size, vf_set(INFINITY)), normal, vf_add(x, x))), 16);
}

PE_INLINE vf from_bf16s(const uint16_t *p) { return vi_bits(vi_shl(vi_load_s16((const int16_t *)p), 16)); }

/* The same of values that are 0 or at least 2^-50, and finite, or NaN whose lower half is 0: what arithmetic makes. */
PE_INLINE vi normal_to_bf16(vf x)
{
    const vi bits = vf_bits(x), odd = vi_and(vi_sra(bits, 16), vi_set(1));
    return vi_sra(vi_add(bits, vi_add(odd, vi_set(0x7fff))), 16);
}

#ifndef PE_BF16_DOT
PE_INLINE void vf_store_bf16(uint16_t *p, vf a) { vi_store_s16((int16_t *)p, to_bf16(a)); }
PE_INLINE void vf_store_bf16_normal(uint16_t *p, vf a) { vi_store_s16((int16_t *)p, normal_to_bf16(a)); }
#endif

static void narrow_bf16(const float *x, int64_t n, uint16_t *y)
{
    for (int64_t i = 0; i < n; i += PE_LANES)
        vf_store_bf16(y + i, load_or(x, i, n, 0.0f));
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
    case PE_ACT_GELU_TANH_COARSE: PE_MAP(vm_gelu_tanh_coarse);
    }
}

/* The largest of the first `visible` of PE_PAGE scores; those behind become -inf. */
PE_INLINE float visible_max(float *scores, int64_t visible)
{
    enum { VECTORS = PE_PAGE / PE_LANES };
    vf s[VECTORS];
    PE_UNROLL
    for (int i = 0; i < VECTORS; i++)
        s[i] = vf_load(scores + i * PE_LANES);
    if (visible < PE_PAGE)
        PE_UNROLL
        for (int i = 0; i < VECTORS; i++) {
            const int64_t left = visible - i * PE_LANES;
            const int first = (int)(left < 0 ? 0 : left > PE_LANES ? PE_LANES : left);
            s[i] = vf_select(vm_first(first), s[i], vf_set(-INFINITY));
            vf_store(scores + i * PE_LANES, s[i]);
        }
    return vf_hmax(vf_max(vf_max(s[0], s[1]), vf_max(s[2], s[3])));
}

/* Maxima first, of all rows, then exponentials: what one row waits for, others fill, and one exponential gives all decays. */
static void softmax_rows(float *scores, int64_t n_row, int64_t n, int64_t step, float scale, float *state, float *decay,
                         uint16_t *narrow)
{
    enum { VECTORS = PE_PAGE / PE_LANES };
    PE_ALIGNED float max[PE_LANES];
    const vf before = vf_load(state), rate = vf_set(narrow ? scale * 0x1.715476p+0f : scale); /* log2(e) */
    vf_store(max, before);
    for (int64_t r = 0; r < n_row; r++)
        max[r] = visible_max(scores + r * PE_PAGE, n + r * step);
    const vf after = vf_max(before, vf_load(max));
    vf_store(max, after);
    vf_store(state, after);
    vf_store(decay, vm_exp_neg(vf_mul(vf_set(scale), vf_sub(before, after))));
    for (int64_t r = 0; r < n_row; r++) {
        const vf largest = vf_set(max[r]);
        vf w[VECTORS];
        PE_UNROLL
        for (int i = 0; i < VECTORS; i++) {
            const vf x = vf_mul(rate, vf_sub(vf_load(scores + r * PE_PAGE + i * PE_LANES), largest));
            w[i] = narrow ? vm_exp2_weight(x) : vm_exp_neg(x);
            if (narrow)
                vf_store_bf16_normal(narrow + r * PE_PAGE + i * PE_LANES, w[i]);
            else
                vf_store(scores + r * PE_PAGE + i * PE_LANES, w[i]);
        }
        float *sums = state + (1 + r) * PE_LANES;
        vf_store(sums, vf_mad(vf_load(sums), vf_set(decay[r]), vf_add(vf_add(w[0], w[1]), vf_add(w[2], w[3]))));
    }
}

static void softmax_end(const float *sums, float *out, int64_t n)
{
    const vf sum = vf_set(vf_sum(vf_load(sums)));
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

/* What exp_sum does with n of its values, at most EXPS vectors of them; their sum, in which a vector that isn't there is 0. Where n is
 * known to the compiler, nothing asks whether a vector is there, or whole. */
enum { EXPS = 4 };
PE_INLINE vf exps(const float *x, int64_t n, float offset, float scale, float *y)
{
    vf e[EXPS];
    PE_UNROLL
    for (int i = 0; i < EXPS; i++) {
        e[i] = vf_set(0.0f);
        if (n <= i * PE_LANES)
            continue;
        e[i] = vm_exp(vf_mul(vf_set(scale), vf_sub(load_or(x, i * PE_LANES, n, -INFINITY), vf_set(offset))));
        if (y && n - i * PE_LANES >= PE_LANES)
            vf_store(y + i * PE_LANES, e[i]);
        else if (y)
            vf_store_part(y + i * PE_LANES, e[i], (int)(n - i * PE_LANES));
    }
    return vf_add(vf_add(e[0], e[1]), vf_add(e[2], e[3]));
}

/* Each lane's sum carries its rounding errors along (Knuth's TwoSum), of four vectors at a time, and the lanes are added in double. */
static double exp_sum(const float *x, int64_t n, float offset, float scale, float *y)
{
    vf sum = vf_set(0.0f), error = sum;
    for (int64_t i = 0; i < n; i += EXPS * PE_LANES) {
        const vf e = n - i >= EXPS * PE_LANES ? exps(x + i, EXPS * PE_LANES, offset, scale, y ? y + i : 0)
                                              : exps(x + i, n - i, offset, scale, y ? y + i : 0);
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
