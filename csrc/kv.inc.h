/* Keys as KV pages store them, a position in a column; keys and values in int8, back to float32, and met as they are by one query.
 * Included by kernels.inc.h, behind pack.inc.h. */

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

/* One query waits for memory, so it meets what lies there as it comes: the two above and a float32 tile, but in registers. Up to four
 * panels at once, since each sum waits for itself. */
enum { KV_PANELS = 4 };

/* A line holds four values of K of one panel, so with each value, i, a line of one panel is asked for: of panel i % 4, if there is one,
 * of those from `next` on. None where that is NULL. */
PE_INLINE void ask_q8(int panels, const int8_t *next, int64_t panel_bytes, int64_t i)
{
    if (next && i % 4 < panels)
        PE_PREFETCH_FAR(next + i % 4 * panel_bytes + i / 4 * 64);
}

PE_INLINE void score_panels_q8(int panels, const float *x, const int8_t *q, const float *scale, int64_t n, const int8_t *next,
                               float *out)
{
    vf acc[KV_PANELS], scales[KV_PANELS];
    PE_UNROLL
    for (int p = 0; p < panels; p++)
        acc[p] = vf_set(0.0f), scales[p] = vf_load(scale + p * PE_LANES);
    for (int64_t i = 0; i < n; i++) {
        const vf value = vf_set(x[i]);
        ask_q8(panels, next, n * PE_LANES, i);
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[p] = vf_mad(value, vf_mul(vi_to_float(vi_load_s8(q + (p * n + i) * PE_LANES)), scales[p]), acc[p]);
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++)
        vf_store(out + p * PE_LANES, acc[p]);
}

PE_INLINE void accumulate_panels_q8(int panels, const float *x, int64_t k, const int8_t *q, const float *scale, const int8_t *next,
                                    float decay, float *out)
{
    vf acc[KV_PANELS];
    PE_UNROLL
    for (int p = 0; p < panels; p++)
        acc[p] = vf_mul(vf_set(decay), vf_load(out + p * PE_LANES));
    for (int64_t i = 0; i < k; i++) {
        const vf value = vf_set(x[i]), scales = vf_set(scale[i]);
        ask_q8(panels, next, PE_PAGE * PE_LANES, i);
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[p] = vf_mad(value, vf_mul(vi_to_float(vi_load_s8(q + (p * PE_PAGE + i) * PE_LANES)), scales), acc[p]);
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++)
        vf_store(out + p * PE_LANES, acc[p]);
}

#define PE_FOR_KV_PANELS(n, call)                                                                                    \
    switch (n) {                                                                                                     \
    case 1: { enum { panels = 1 }; call; } break;                                                                    \
    case 2: { enum { panels = 2 }; call; } break;                                                                    \
    case 3: { enum { panels = 3 }; call; } break;                                                                    \
    default: { enum { panels = 4 }; call; }                                                                          \
    }

PE_INLINE const int8_t *at_or_null(const void *p, int64_t n) { return p ? (const int8_t *)p + n : 0; }

static void score_q8(const float *x, int64_t head_dim, const int8_t *q, const float *scale, int64_t n_panel, const void *next,
                     float *out)
{
    for (int64_t p = 0; p < n_panel; p += KV_PANELS) {
        const int64_t at = p * head_dim * PE_LANES;
        PE_FOR_KV_PANELS(n_panel - p, score_panels_q8(panels, x, q + at, scale + p * PE_LANES, head_dim, at_or_null(next, at),
                                                      out + p * PE_LANES))
    }
}

static void accumulate_q8(const float *x, int64_t k, const int8_t *q, const float *scale, int64_t n_panel, const void *next,
                          float decay, float *out)
{
    for (int64_t p = 0; p < n_panel; p += KV_PANELS) {
        const int64_t at = p * PE_PAGE * PE_LANES;
        PE_FOR_KV_PANELS(n_panel - p, accumulate_panels_q8(panels, x, k, q + at, scale, at_or_null(next, at), decay,
                                                           out + p * PE_LANES))
    }
}
