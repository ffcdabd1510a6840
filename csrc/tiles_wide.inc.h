/* Products of many rows with int4 weights at a level that multiplies 16-bit integers. Included by tiles_int.inc.h where there are
 * PE_WIDE_ROWS.
 *
 * All is widened before it is multiplied: a group of the weights of some panels once for a block of rows, a group of a tile's
 * rows once for these panels. What is left to do most often is to load, to multiply and to add. */

enum {
    WIDE_BLOCK = 96, /* rows that share a widened group: with two panels it takes 8 KB, and the rows' sums 12 KB */
    WIDE_PANELS = 2,
    WIDE_PAIRS = PE_GROUP / 2, /* of a row in a group: those of all quads' values 0 and 2, then those of their values 1 and 3 */
    WIDE_PARTS = PE_GROUP / PE_Q4_GROUP
};

/* A group of a panel. */
typedef struct {
    PE_ALIGNED int16_t weights[PE_GROUP * PE_LANES];
    int64_t n_quad;
    vf scale[WIDE_PARTS], weight_sum;
} wide_group;

static void widen_q4(const pe_weights_q4 *w, int64_t panel, int64_t group, wide_group *to)
{
    enum { BYTES = PE_Q4_GROUP_BYTES };
    const int64_t n_part = (w->k + PE_Q4_GROUP - 1) / PE_Q4_GROUP, first = group * WIDE_PARTS;
    const int64_t n = n_part - first < WIDE_PARTS ? n_part - first : WIDE_PARTS;
    const uint8_t *nibbles = w->panels + (panel * n_part + first) * BYTES;
    const uint16_t *scale = w->scale + (panel * n_part + first) * PE_LANES;
    to->n_quad = n * (PE_Q4_GROUP / 4);
    to->weight_sum = vf_load(w->weight_sum + (panel * ((n_part + WIDE_PARTS - 1) / WIDE_PARTS) + group) * PE_LANES);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i * BYTES; j < (i + 1) * BYTES; j += 4 * PE_LANES) {
            vq_w low, high;
            PE_PREFETCH_FAR(nibbles + WIDE_PANELS * q4_panel_bytes(w) + j);
            vq_nibbles(nibbles + j, pe_q4_codebook, &low, &high);
            vq_store_wide(to->weights + 2 * j, low);
            vq_store_wide(to->weights + 2 * j + 4 * PE_LANES, high);
        }
        to->scale[i] = from_bf16s(scale + i * PE_LANES);
    }
}

/* acc[r] += the sum of q * w over n_quad > 0 quads, exact. */
PE_INLINE void dot_wide(int rows, const int32_t *pairs, const int16_t *weights, int64_t n_quad, vi acc[PE_WIDE_ROWS])
{
    const int16_t *end = weights + n_quad * 4 * PE_LANES;
    do {
        PE_UNROLL
        for (int half = 0; half < 2; half++) {
            const vi column = vq_wide(weights + half * 2 * PE_LANES);
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                vq_dot_wide(&acc[r], pairs[r * WIDE_PAIRS + half * (WIDE_PAIRS / 2)], column);
        }
        pairs++;
        weights += 4 * PE_LANES;
    } while (weights != end);
}

/* A tile adds a group to the sums of its rows; x starts at this group. */
PE_INLINE void wide_tile_q4(int rows, const pe_rows_q8 *x, const int32_t *pairs, const wide_group *w, float *sums)
{
    enum { QUADS = PE_Q4_GROUP / 4, WEIGHTS = PE_Q4_GROUP * PE_LANES };
    const int64_t x_groups = x->stride / PE_GROUP;
    PE_ALIGNED float parts[PE_WIDE_ROWS * PE_LANES];
    for (int r = 0; r < rows; r++)
        vf_store(parts + r * PE_LANES, vf_set(0.0f));
    for (int64_t i = 0; i < w->n_quad / QUADS; i++) {
        vi acc[PE_WIDE_ROWS];
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            acc[r] = vi_set(0);
        dot_wide(rows, pairs + i * QUADS, w->weights + i * WEIGHTS, QUADS, acc);
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            float *part = parts + r * PE_LANES;
            vf_store(part, vf_mad(w->scale[i], vi_to_float(acc[r]), vf_load(part)));
        }
    }
    for (int r = 0; r < rows; r++) {
        float *sum = sums + r * PE_LANES;
        const vf scale = vf_set(x->scale[r * x_groups]), offset = vf_set((float)x->offset[r * x_groups]);
        vf_store(sum, vf_mad(scale, vf_mad(offset, w->weight_sum, vf_load(parts + r * PE_LANES)), vf_load(sum)));
    }
}

/* At most WIDE_PANELS panels of at most WIDE_BLOCK rows; `out` begins there. */
static void wide_q4(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q4 *w, int64_t panel, int64_t n_panel, const pe_output *out)
{
    const int64_t n_tile = (n_row + PE_WIDE_ROWS - 1) / PE_WIDE_ROWS;
    wide_group groups[WIDE_PANELS];
    PE_ALIGNED int32_t pairs[PE_WIDE_ROWS * WIDE_PAIRS];
    PE_ALIGNED float sums[WIDE_PANELS][WIDE_BLOCK * PE_LANES];
    for (int64_t p = 0; p < n_panel; p++)
        for (int64_t r = 0; r < n_row; r++)
            vf_store(sums[p] + r * PE_LANES, vf_set(0.0f));
    for (int64_t g = 0; g < (w->k + PE_GROUP - 1) / PE_GROUP; g++) {
        for (int64_t p = 0; p < n_panel; p++)
            widen_q4(w, panel + p, g, &groups[p]);
        for (int64_t t = 0, row = 0; t < n_tile; t++) {
            const int64_t n = (n_row - row) / (n_tile - t);
            pe_rows_q8 from = q8_from(x, row);
            from.q += g * PE_GROUP, from.scale += g, from.offset += g;
            for (int64_t r = 0; r < n; r++)
                vq_widen_row(from.q + r * x->stride, pairs + r * WIDE_PAIRS);
            for (int64_t p = 0; p < n_panel; p++)
                PE_FOR_ROWS(n, PE_WIDE_ROWS, wide_tile_q4(rows, &from, pairs, &groups[p], sums[p] + row * PE_LANES))
            row += n;
        }
    }
    for (int64_t r = 0; r < n_row; r++) {
        const pe_output to = output_at(out, r, 0);
        for (int p = 0; p < n_panel; p++) {
            const vf bias = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
            store_tile(&to, 0, p, vf_add(vf_load(sums[p] + r * PE_LANES), bias));
        }
    }
}

static void many_q4(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q4 *w, int64_t panel, int64_t n_panel, const pe_output *out)
{
    for (int64_t row = 0; row < n_row; row += WIDE_BLOCK)
        for (int64_t p = panel; p < panel + n_panel; p += WIDE_PANELS) {
            const int64_t left = n_row - row, panels = panel + n_panel - p;
            const pe_rows_q8 from = q8_from(x, row);
            const pe_output to = output_at(out, row, p);
            wide_q4(&from, left < WIDE_BLOCK ? left : WIDE_BLOCK, w, p, panels < WIDE_PANELS ? panels : WIDE_PANELS, &to);
        }
}
