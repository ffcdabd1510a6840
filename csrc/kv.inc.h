/* Keys as KV pages store them, a position in a column; keys and values in int8, and back to float32. Included by kernels.inc.h,
 * behind pack.inc.h. */

static void turn_words(const void *src, int64_t stride, int64_t n, void *to)
{
    const float *from = src;
    float *out = to;
    int64_t i = 0;
    for (; i + PE_LANES <= n; i += PE_LANES) {
        vf rows[PE_LANES];
        PE_UNROLL
        for (int r = 0; r < PE_LANES; r++)
            rows[r] = vf_load(from + r * stride + i);
        transpose(rows);
        PE_UNROLL
        for (int r = 0; r < PE_LANES; r++)
            vf_store(out + (i + r) * PE_LANES, rows[r]);
    }
    for (; i < n; i++)
        for (int r = 0; r < PE_LANES; r++)
            memcpy(out + i * PE_LANES + r, from + r * stride + i, sizeof *out);
}

static float narrow_q8(const float *x, int64_t n, int8_t *q)
{
    vf largest = vf_set(0.0f), sum = largest;
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const vf v = load_or(x, i, n, 0.0f);
        largest = vf_max(vf_max(v, vf_sub(vf_set(0.0f), v)), largest);
        sum = vf_add(sum, vf_mul(v, vf_set(0.0f))); /* NaN if any value is NaN or infinite */
    }
    float scale = vf_hmax(largest) / 127.0f;
    scale = scale > 1e-30f ? scale : 1e-30f;
    const vf inverse = vf_set(1.0f / scale);
    for (int64_t i = 0; i < n; i += PE_LANES)
        vi_store_s8(q + i, vf_to_int(vf_mul(load_or(x, i, n, 0.0f), inverse)));
    return scale + vf_sum(sum);
}

static void widen_keys_q8(const int8_t *q, const float *scale, int64_t n_panel, int64_t head_dim, float *y)
{
    for (int64_t p = 0; p < n_panel; p++) {
        const vf scales = vf_load(scale + p * PE_LANES);
        for (int64_t i = p * head_dim; i < (p + 1) * head_dim; i++)
            vf_store(y + i * PE_LANES, vf_mul(vi_to_float(vi_load_s8(q + i * PE_LANES)), scales));
    }
}

static void widen_values_q8(const int8_t *q, const float *scale, int64_t n, int64_t n_panel, float *y)
{
    for (int64_t p = 0; p < n_panel; p++, q += PE_PAGE * PE_LANES, y += PE_PAGE * PE_LANES)
        for (int64_t i = 0; i < n; i++)
            vf_store(y + i * PE_LANES, vf_mul(vi_to_float(vi_load_s8(q + i * PE_LANES)), vf_set(scale[i])));
}
