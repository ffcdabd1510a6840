/* Products of many rows with bfloat16 weights at a level that has none of its own. Included by tiles_float.inc.h where there is
 * PE_WIDE_BF16.
 *
 * All becomes float32 before it is multiplied: a group of the weights of some panels once for a block of rows, a group of a tile's
 * rows once for these panels. What is left is a tile of float32. */

enum {
    WIDE_BF16_BLOCK = 96, /* rows that share a widened group: with two panels it takes 16 KB, and the rows' sums 12 KB */
    WIDE_BF16_PANELS = 2,
    WIDE_BF16_PAIRS = 64 /* of a group */
};

/* n pairs of a panel: of each pair first the odd value, which is added first. */
static void widen_panel_bf16(const uint16_t *pairs, int64_t n, const char *next, float *to)
{
    for (int64_t i = 0; i < n; i++) {
        const vb pair = vb_weights(pairs + i * 2 * PE_LANES);
        PE_PREFETCH_FAR(next + i * 4 * PE_LANES);
        vf_store(to + 2 * i * PE_LANES, pair.odd);
        vf_store(to + (2 * i + 1) * PE_LANES, pair.even);
    }
}

/* n pairs of a row: all odd values, then from WIDE_BF16_PAIRS on the even ones. */
static void widen_row_bf16(const uint16_t *pairs, int64_t n, float *to)
{
    for (int64_t i = 0; i < n; i += PE_LANES) {
        const float *from = (const float *)(const void *)(pairs + 2 * i);
        const vf bits = n - i >= PE_LANES ? vf_load(from) : vf_load_part(from, (int)(n - i));
        const vb pair = vb_split(vf_bits(bits));
        vf_store(to + i, pair.odd);
        vf_store(to + WIDE_BF16_PAIRS + i, pair.even);
    }
}

/* Adds n pairs to the sums of some rows and one panel. */
PE_INLINE void wide_tile_bf16(int rows, const float *values, const float *weights, int64_t n, float *sums)
{
    vf acc[PE_F32_ROWS_1];
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        acc[r] = vf_load(sums + r * PE_LANES);
    for (int64_t i = 0; i < n; i++, values++, weights += 2 * PE_LANES) {
        PE_UNROLL
        for (int even = 0; even < 2; even++) {
            const vf column = vf_load(weights + even * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                vf_mad_to(&acc[r], vf_set(values[(2 * r + even) * WIDE_BF16_PAIRS]), column);
        }
    }
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        vf_store(sums + r * PE_LANES, acc[r]);
}

/* At most WIDE_BF16_PANELS panels of at most WIDE_BF16_BLOCK rows; `out` begins there. */
static void wide_bf16(const rows_bf16 *x, int64_t n_row, const pe_weights_bf16 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out)
{
    const int64_t n_tile = (n_row + PE_F32_ROWS_1 - 1) / PE_F32_ROWS_1, n_pair = (x->k + 1) / 2;
    PE_ALIGNED float weights[WIDE_BF16_PANELS][2 * WIDE_BF16_PAIRS * PE_LANES];
    PE_ALIGNED float values[PE_F32_ROWS_1 * 2 * WIDE_BF16_PAIRS];
    PE_ALIGNED float sums[WIDE_BF16_PANELS][WIDE_BF16_BLOCK * PE_LANES];
    for (int64_t p = 0; p < n_panel; p++)
        for (int64_t r = 0; r < n_row; r++)
            vf_store(sums[p] + r * PE_LANES, first_sum_bf16(x, out, r, p));
    for (int64_t first = 0; first < n_pair; first += WIDE_BF16_PAIRS) {
        const int64_t n = n_pair - first < WIDE_BF16_PAIRS ? n_pair - first : WIDE_BF16_PAIRS;
        for (int64_t p = 0; p < n_panel; p++) {
            const char *from = (const char *)w->panels + (panel + p) * bf16_panel_bytes(w) + first * 4 * PE_LANES;
            widen_panel_bf16((const uint16_t *)from, n, from + WIDE_BF16_PANELS * bf16_panel_bytes(w), weights[p]);
        }
        for (int64_t t = 0, row = 0; t < n_tile; t++) {
            const int64_t rows_here = (n_row - row) / (n_tile - t);
            for (int64_t r = 0; r < rows_here; r++)
                widen_row_bf16(x->x + (row + r) * x->stride + 2 * first, n, values + r * 2 * WIDE_BF16_PAIRS);
            for (int64_t p = 0; p < n_panel; p++)
                PE_FOR_ROWS(rows_here, PE_F32_ROWS_1, wide_tile_bf16(rows, values, weights[p], n, sums[p] + row * PE_LANES))
            row += rows_here;
        }
    }
    for (int64_t r = 0; r < n_row; r++)
        for (int p = 0; p < n_panel; p++) {
            const vf bias = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
            store_tile(out, r, p, vf_add(vf_load(sums[p] + r * PE_LANES), bias));
        }
}

static void many_bf16(const rows_bf16 *x, int64_t n_row, const pe_weights_bf16 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out)
{
    for (int64_t row = 0; row < n_row; row += WIDE_BF16_BLOCK)
        for (int64_t p = panel; p < panel + n_panel; p += WIDE_BF16_PANELS) {
            const int64_t left = n_row - row, panels = panel + n_panel - p;
            const rows_bf16 from = bf16_from(x, row);
            const pe_output to = output_at(out, row, p);
            wide_bf16(&from, left < WIDE_BF16_BLOCK ? left : WIDE_BF16_BLOCK, w, p,
                      panels < WIDE_BF16_PANELS ? panels : WIDE_BF16_PANELS, &to);
        }
}
