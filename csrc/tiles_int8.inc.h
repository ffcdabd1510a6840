/* Tiles of int8 weights and int8 activations. Included by tiles.inc.h. */

PE_INLINE pe_rows_q8 q8_from(const pe_rows_q8 *x, int64_t row)
{
    const int64_t group = row * (x->stride / PE_GROUP);
    return (pe_rows_q8){x->q + row * x->stride, x->scale + group, x->offset + group, x->stride};
}

/* Activations of a group of PE_GROUP: where they lie. For int8 a level may make them ready beforehand instead. */
typedef struct {
    const uint8_t *q;
    int64_t stride;
} vq_group;
PE_INLINE vq_a vq_ready(const vq_group *group, int r, int64_t quad)
{
    return vq_activations(group->q + r * group->stride + 4 * quad);
}
#ifndef PE_OWN_GROUP
#define vq_group_q8 vq_group
PE_INLINE void vq_make_ready(vq_group *group, int rows, const uint8_t *q, int64_t stride, int64_t n_quad)
{
    (void)rows, (void)n_quad;
    *group = (vq_group){q, stride};
}
#endif

/* A whole group of one panel for at most PE_Q8_FAST rows, which a core multiplies faster than memory brings the weights. Then so
 * many loads are under way at once that the processor's own prefetching leads, and brings more than lines asked for one by one:
 * each of those holds one of the few places for misses of the L1 cache until memory answers. A line in four is a hint enough. */
#ifdef PE_Q8_FAST
PE_INLINE void stream_q8(int rows, const vq_group *x, const int8_t *quads, vi acc[12][4])
{
    for (int i = 0; i < PE_GROUP / 4; i += 4) {
        PE_PREFETCH_FAR(quads + PE_STREAM_AHEAD + i * 4 * PE_LANES);
        PE_UNROLL
        for (int j = i; j < i + 4; j++) {
            const vq_w column = vq_weights(quads + j * 4 * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                vq_dot(&acc[r][0], vq_ready(x, r, j), column);
        }
    }
}
#endif

/* One group of int8 weights: acc[r][p] += the sum of q * w over n_quad > 0 quads, exact. A pointer for each row would not fit the
 * registers: each third row has one, and addressing adds one or two strides to it for nothing. */
#ifndef PE_OWN_GROUP
PE_INLINE void group_q8(int rows, int panels, const vq_group *x, const int8_t *quads, int64_t panel_stride, int64_t n_quad,
                        const int8_t *next, pe_ahead ahead, vi acc[12][4])
{
    const int64_t stride = x->stride;
    const int8_t *end = quads + n_quad * 4 * PE_LANES;
    const uint8_t *third[4];
    PE_UNROLL
    for (int r = 0; r < rows; r += 3)
        third[r / 3] = x->q + r * stride;
    do {
        vq_w column[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            column[p] = vq_weights(quads + p * panel_stride);
            PE_PREFETCH_WEIGHTS(ahead.into, next + p * panel_stride);
        }
        next += ahead.pace;
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vq_a value = vq_activations(third[r / 3] + r % 3 * stride);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                vq_dot(&acc[r][p], value, column[p]);
        }
        PE_UNROLL
        for (int r = 0; r < rows; r += 3) {
            third[r / 3] += 4;
            PE_HIDE(third[r / 3]);
        }
        quads += 4 * PE_LANES;
    } while (quads != end);
}
#endif

PE_INLINE int64_t q8_panel_bytes(const pe_weights_q8 *w) { return (w->k + 3) / 4 * 4 * PE_LANES; }

/* `ready`: its groups, if they are made ready already. */
PE_INLINE void tile_q8_of(int rows, int panels, int64_t apart, const pe_rows_q8 *x, const vq_group_q8 *ready, const pe_weights_q8 *w,
                          int64_t panel, const pe_output *out, pe_ahead ahead)
{
    const int64_t n_quad = (w->k + 3) / 4, n_group = (w->k + PE_GROUP - 1) / PE_GROUP;
    const int64_t x_groups = x->stride / PE_GROUP, panel_bytes = q8_panel_bytes(w);
    const int8_t *quads = w->panels + panel * panel_bytes;
    PE_ALIGNED float sums[12 * 4 * PE_LANES]; /* in memory, since the integers take the registers */
    prefetch_tile(rows, panels, apart, out);
    clear_tile(rows, panels, sums);
    const float *scales[4];
    const int32_t *offsets[4];
    PE_UNROLL
    for (int r = 0; r < rows; r += 3)
        scales[r / 3] = x->scale + r * x_groups, offsets[r / 3] = x->offset + r * x_groups;
    for (int64_t g = 0; g < n_group; g++) {
        PE_UNROLL
        for (int r = 0; r < rows; r += 3) {
            PE_HIDE(scales[r / 3]);
            PE_HIDE(offsets[r / 3]);
        }
        const int64_t first = g * (PE_GROUP / 4);
        const int64_t last = first + PE_GROUP / 4 < n_quad ? first + PE_GROUP / 4 : n_quad;
        vq_group_q8 own;
        if (!ready)
            vq_make_ready(&own, rows, x->q + 4 * first, x->stride, last - first);
        const vq_group_q8 *group = ready ? ready + g : &own;
        vi acc[12][4];
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            const vi column_sum = vi_words(w->column_sum + ((panel + p * apart) * n_group + g) * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][p] = vi_mul16(column_sum, PE_Q8_ORIGIN + offsets[r / 3][r % 3 * x_groups + g]);
        }
#ifdef PE_Q8_FAST
        if (rows <= PE_Q8_FAST && panels == 1 && last - first == PE_GROUP / 4)
            stream_q8(rows, group, quads + first * 4 * PE_LANES, acc);
        else
#endif
            group_q8(rows, panels, group, quads + first * 4 * PE_LANES, apart * panel_bytes, last - first,
                     quads + ahead.bytes + first * ahead.pace, ahead, acc);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            const vf scale = vf_set(scales[r / 3][r % 3 * x_groups + g]);
            PE_UNROLL
            for (int p = 0; p < panels; p++) {
                float *sum = sums + (r * panels + p) * PE_LANES;
                vf_store(sum, vf_mad(scale, vi_to_float(acc[r][p]), vf_load(sum)));
            }
        }
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        vf scale = vf_load(w->scale + (panel + p * apart) * PE_LANES);
        vf bias = out->bias ? vf_load(out->bias + p * apart * PE_LANES) : vf_set(0.0f);
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            store_tile(out, r, p * apart, vf_mad(scale, vf_load(sums + (r * panels + p) * PE_LANES), bias));
    }
}

PE_INLINE void tile_q8(int rows, int panels, int64_t apart, const pe_rows_q8 *x, const pe_weights_q8 *w, int64_t panel,
                       const pe_output *out, pe_ahead ahead)
{
    tile_q8_of(rows, panels, apart, x, 0, w, panel, out, ahead);
}

PE_MATMUL(q8, Q8, pe_rows_q8, pe_weights_q8)

/* Making activations ready takes a tenth of a tile's time, so it is done once for many panels. Few rows, which wait for memory, have
 * all of it done first and then go panel by panel. Of many rows a tile's are made ready, and go by as many panels as the L2 cache
 * holds for the next ones: more activations than that would come from there at twice their size. */
#ifdef PE_OWN_GROUP
enum {
    READY_FEW = 4, /* tiles */
    READY_GROUPS = READY_FEW * 24,
    READY_BYTES = 384 << 10,
    READY_PANELS = 6 /* with fewer it isn't worth it */
};

PE_INLINE int64_t q8_groups(const pe_weights_q8 *w) { return (w->k + PE_GROUP - 1) / PE_GROUP; }
PE_INLINE int64_t q8_tiles(int64_t n_row) { return (n_row + PE_Q8_ROWS_2 - 1) / PE_Q8_ROWS_2; }

PE_INLINE int worth_ready(int64_t n_row, const pe_weights_q8 *w)
{
    return n_row > 1 && (q8_tiles(n_row) <= READY_FEW ? q8_tiles(n_row) * q8_groups(w) <= READY_GROUPS
                                                      : READY_PANELS * q8_panel_bytes(w) <= READY_BYTES);
}

/* Rows [row, row + n), n at most a tile's. */
static void make_ready_q8(const pe_rows_q8 *x, int64_t row, int64_t n, const pe_weights_q8 *w, vq_group_q8 *ready)
{
    for (int64_t k = 0; k < w->k; k += PE_GROUP) {
        const int64_t left = (w->k - k + 3) / 4;
        vq_make_ready(ready++, (int)n, x->q + row * x->stride + k, x->stride, left < PE_GROUP / 4 ? left : PE_GROUP / 4);
    }
}

#define READY_TILE(panels, into)                                                                                     \
    tile_q8_of(rows, panels, 1, &from, made, w, panel + p, &to, pe_ahead_of(into, t, n_tile, until_next, q8_panel_bytes(w)))
static void panels_ready(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q8 *w, int64_t panel, int64_t n_panel,
                         const pe_output *out)
{
    const int64_t n_tile = q8_tiles(n_row), together = n_tile <= READY_FEW ? n_tile : 1;
    const int64_t fit = together == n_tile ? n_panel : READY_BYTES / q8_panel_bytes(w) / 2 * 2;
    vq_group_q8 ready[READY_GROUPS];
    for (int64_t done = 0; done < n_panel; done += fit) {
        const int64_t end = n_panel - done < fit ? n_panel : done + fit;
        for (int64_t first = 0; first < n_tile; first += together) {
            for (int64_t t = first; t < first + together; t++) {
                const int64_t row = t * n_row / n_tile, n = (t + 1) * n_row / n_tile - row;
                make_ready_q8(x, row, n, w, ready + (t - first) * q8_groups(w));
            }
            for (int64_t p = done; p < end; p += 2)
                for (int64_t t = first; t < first + together; t++) {
                    const int64_t row = t * n_row / n_tile, n = (t + 1) * n_row / n_tile - row;
                    const pe_rows_q8 from = q8_from(x, row);
                    const pe_output to = output_at(out, row, panel + p);
                    const vq_group_q8 *made = ready + (t - first) * q8_groups(w);
                    const int64_t until_next = together == n_tile ? 2 : end - done; /* panels */
                    if (p + 1 == n_panel)
                        PE_FOR_ROWS(n, PE_Q8_ROWS_1, READY_TILE(1, PE_L1))
                    else if (n_row <= PE_Q8_FAR)
                        PE_FOR_ROWS(n, PE_Q8_ROWS_2, READY_TILE(2, PE_L2))
                    else
                        PE_FOR_ROWS(n, PE_Q8_ROWS_2, READY_TILE(2, PE_L1))
                }
        }
    }
}
#endif

static void matmul_q8(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q8 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out)
{
#ifdef PE_OWN_GROUP
    if (worth_ready(n_row, w)) {
        panels_ready(x, n_row, w, panel, n_panel, out);
        return;
    }
#endif
    panels_q8(x, n_row, w, panel, n_panel, out);
}
