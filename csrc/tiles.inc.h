/* Matrix products: register tiles, and the loops over rows and panels around them. Included by kernels.inc.h. */

/* The rows of a large output lie far apart and in no cache: a tile asks for its lines before it needs them. */
PE_INLINE void prefetch_tile(int rows, int panels, const pe_output *out)
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            PE_PREFETCH_WRITE(out->out + r * out->out_stride + p * PE_LANES);
}

/* A tile: `rows` x `panels` accumulators. `rows` and `panels` are constants once this is inlined, so the loops unroll and the
 * arrays become registers. With `decay` it starts at decay * out, else at the bias. */
PE_INLINE void tile_f32(int rows, int panels, const float *x, int64_t x_stride, const float *w, int64_t panel_stride,
                        int64_t k, const float *decay, const pe_output *out)
{
    vf acc[12][4];
    prefetch_tile(rows, panels, out);
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
    prefetch_tile(rows, panels, out);
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
