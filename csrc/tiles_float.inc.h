/* Tiles of float32 and bfloat16 weights. Included by tiles.inc.h. */

/* Rows of float32; with `decay` a tile starts at decay[row] * out[row], else at the bias. `k` may be less than the panels have. */
typedef struct {
    const float *x, *decay;
    int64_t stride, k;
} rows_f32;

PE_INLINE rows_f32 f32_from(const rows_f32 *x, int64_t row)
{
    return (rows_f32){x->x + row * x->stride, x->decay ? x->decay + row : 0, x->stride, x->k};
}

PE_INLINE int64_t f32_panel_bytes(const pe_weights_f32 *w) { return w->k * PE_LANES * (int64_t)sizeof(float); }

PE_INLINE void tile_f32(int rows, int panels, const rows_f32 *x, const pe_weights_f32 *w, int64_t panel, const pe_output *out,
                        int64_t ahead)
{
    const float *from = w->panels + panel * w->k * PE_LANES;
    vf acc[12][4];
    prefetch_tile(rows, panels, out);
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            if (x->decay)
                acc[r][p] = vf_mul(vf_set(x->decay[r]), vf_load(out->out + r * out->out_stride + p * PE_LANES));
            else
                acc[r][p] = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
        }
    for (int64_t i = 0; i < x->k; i++) {
        vf column[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            column[p] = vf_load(rows > 2 ? streamed(ahead, from + (p * w->k + i) * PE_LANES) : from + (p * w->k + i) * PE_LANES);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vf value = vf_set(x->x[r * x->stride + i]);
            PE_PIN(value);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                acc[r][p] = vf_mad(value, column[p], acc[r][p]);
        }
    }
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            store_tile(out, r, p, acc[r][p]);
}

PE_MATMUL(f32, F32, rows_f32, pe_weights_f32)

static void matmul_f32(const float *x, int64_t x_stride, int64_t n_row, const pe_weights_f32 *w, int64_t panel,
                       int64_t n_panel, const pe_output *out)
{
    const rows_f32 rows = {x, 0, x_stride, w->k};
    panels_f32(&rows, n_row, w, panel, n_panel, out);
}

static void accumulate_f32(const float *x, int64_t x_stride, int64_t n_row, int64_t k, const pe_weights_f32 *w,
                           int64_t n_panel, const float *decay, float *out, int64_t out_stride)
{
    const rows_f32 rows = {x, decay, x_stride, k};
    const pe_output to = {.out = out, .out_stride = out_stride};
    panels_f32(&rows, n_row, w, 0, n_panel, &to);
}

/* Rows of bfloat16, `stride` apart. */
typedef struct {
    const uint16_t *x;
    int64_t stride;
} rows_bf16;

PE_INLINE rows_bf16 bf16_from(const rows_bf16 *x, int64_t row)
{
    return (rows_bf16){x->x + row * x->stride, x->stride};
}

/* Two values along k, as vdpbf16ps takes them; where there is no such instruction, what it does, by FMA. */
#ifndef PE_BF16_DOT
typedef struct { vf even, odd; } vb;

PE_INLINE vb vb_split(vi pairs)
{
    return (vb){vi_bits(vi_shl(pairs, 16)), vi_bits(vi_and(pairs, vi_set((int32_t)0xffff0000)))};
}
PE_INLINE vb vb_weights(const uint16_t *p) { return vb_split(vf_bits(vf_load((const float *)(const void *)p))); }
PE_INLINE vb vb_activations(const uint16_t *p) { return vb_split(vi_set(pe_load_i32(p))); }
PE_INLINE void vb_dot(vf *acc, vb a, vb w) { *acc = vf_mad(a.even, w.even, vf_mad(a.odd, w.odd, *acc)); }
#endif

PE_INLINE int64_t bf16_panel_bytes(const pe_weights_bf16 *w) { return (w->k + 1) / 2 * 4 * PE_LANES; }

PE_INLINE void tile_bf16(int rows, int panels, const rows_bf16 *x, const pe_weights_bf16 *w, int64_t panel,
                         const pe_output *out, int64_t ahead)
{
    const int64_t n_pair = (w->k + 1) / 2;
    const uint16_t *from = w->panels + panel * n_pair * 2 * PE_LANES;
    vf acc[12][4];
    prefetch_tile(rows, panels, out);
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = vf_set(0.0f);
    for (int64_t i = 0; i < n_pair; i++) {
        vb column[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            column[p] = vb_weights(rows > 2 ? streamed(ahead, from + (p * n_pair + i) * 2 * PE_LANES)
                                            : from + (p * n_pair + i) * 2 * PE_LANES);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vb value = vb_activations(x->x + r * x->stride + 2 * i);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                vb_dot(&acc[r][p], value, column[p]);
        }
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        const vf bias = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            store_tile(out, r, p, vf_add(acc[r][p], bias));
    }
}

PE_MATMUL(bf16, BF16, rows_bf16, pe_weights_bf16)

static void matmul_bf16(const uint16_t *x, int64_t x_stride, int64_t n_row, const pe_weights_bf16 *w, int64_t panel,
                        int64_t n_panel, const pe_output *out)
{
    const rows_bf16 rows = {x, x_stride};
    panels_bf16(&rows, n_row, w, panel, n_panel, out);
}
