/* Tiles of int4 weights, with int8 activations. Included by tiles.inc.h, behind those of int8. */

#define q4_from q8_from

#ifndef PE_Q4_READS_SUMS
#define PE_Q4_READS_SUMS 0
#endif
#ifndef PE_Q4_ORIGIN
#define PE_Q4_ORIGIN PE_Q8_ORIGIN
#endif

/* One group of 4-bit weights: its integers into acc, the sums of its columns into column_sum, unless they are read; quad: its first
 * in `x`. */
PE_INLINE void group_q4(int rows, int panels, const vq_group *x, int64_t quad, const uint8_t *nibbles, int64_t panel_stride,
                        const uint8_t *next, pe_ahead ahead, vi acc[12][4], vi column_sum[4])
{
    enum { OCTETS = PE_Q4_GROUP / 8 };
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        column_sum[p] = vi_set(0);
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            acc[r][p] = vi_set(0);
    }
    for (int i = 0; i < OCTETS; i++) {
        vq_w low[4], high[4];
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            vq_nibbles(nibbles + p * panel_stride + i * 4 * PE_LANES, pe_q4_codebook, &low[p], &high[p]);
            PE_PREFETCH_WEIGHTS(ahead.into, next + p * panel_stride + i * ahead.pace);
#if !PE_Q4_READS_SUMS
            vq_sum(&column_sum[p], low[p], high[p]);
#endif
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++) {
            vq_a first = vq_ready(x, r, quad + 2 * i), second = vq_ready(x, r, quad + 2 * i + 1);
            PE_UNROLL
            for (int p = 0; p < panels; p++) {
                vq_dot(&acc[r][p], first, low[p]);
                vq_dot(&acc[r][p], second, high[p]);
            }
        }
    }
    if (PE_Q4_ORIGIN)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            PE_UNROLL
            for (int r = 0; r < rows; r++)
                acc[r][p] = vi_add(acc[r][p], vi_mul(vi_set(PE_Q4_ORIGIN), column_sum[p]));
}

enum { PE_Q4_GROUP_BYTES = PE_Q4_GROUP / 2 * PE_LANES };

PE_INLINE int64_t q4_panel_bytes(const pe_weights_q4 *w)
{
    return (w->k + PE_Q4_GROUP - 1) / PE_Q4_GROUP * PE_Q4_GROUP_BYTES;
}

/* Adds what a group of activations gives a row: `part`, its products with the weights, and its zero point times their sum; `at`: its
 * scale and offset in x. */
PE_INLINE void add_group_q4(const pe_rows_q8 *x, int64_t at, vf weight_sum, vf part, float *sum)
{
    const vf centred = vf_mad(vf_set((float)x->offset[at]), weight_sum, part);
    vf_store(sum, vf_mad(vf_set(x->scale[at]), centred, vf_load(sum)));
}

PE_INLINE void end_q4(int rows, int panels, const float *sums, const pe_output *out)
{
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        const vf bias = out->bias ? vf_load(out->bias + p * PE_LANES) : vf_set(0.0f);
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            store_tile(out, r, p, vf_add(vf_load(sums + (r * panels + p) * PE_LANES), bias));
    }
}

_Static_assert(PE_Q4_STREAM >= STREAM_ROWS && PE_Q4_STREAM >= PE_Q4_ROWS_4, "few rows of int4 go panel by panel");
PE_INLINE void tile_q4(int rows, int panels, int64_t apart, const pe_rows_q8 *x, const pe_weights_q4 *w, int64_t panel,
                       const pe_output *out, pe_ahead ahead)
{
    (void)apart; /* 1 */
    enum { PARTS = PE_GROUP / PE_Q4_GROUP, BYTES = PE_Q4_GROUP_BYTES };
    const int64_t n_group = (w->k + PE_Q4_GROUP - 1) / PE_Q4_GROUP, x_groups = x->stride / PE_GROUP;
    const int64_t n_sum = (n_group + PARTS - 1) / PARTS;
    const uint8_t *nibbles = w->panels + panel * n_group * BYTES;
    const float *weight_sums = w->weight_sum + panel * n_sum * PE_LANES;
    PE_ALIGNED float sums[12 * 4 * PE_LANES];
    prefetch_tile(rows, panels, 1, out);
    clear_tile(rows, panels, sums);
    for (int64_t first = 0; first < n_group; first += PARTS) { /* groups that share a scale of the activations */
        const int64_t last = first + PARTS < n_group ? first + PARTS : n_group, g = first / PARTS;
        PE_ALIGNED float part[12 * 4 * PE_LANES];
        vf weight_sum[4];
        const vq_group at = {x->q + g * PE_GROUP, x->stride};
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            weight_sum[p] = PE_Q4_READS_SUMS ? vf_load(weight_sums + (p * n_sum + g) * PE_LANES) : vf_set(0.0f);
        clear_tile(rows, panels, part);
        for (int64_t i = first; i < last; i++) {
            vi acc[12][4], column_sum[4];
            group_q4(rows, panels, &at, (i - first) * (PE_Q4_GROUP / 4), nibbles + i * BYTES, n_group * BYTES,
                     nibbles + ahead.bytes + i * (BYTES / 64) * ahead.pace, ahead, acc, column_sum);
            PE_UNROLL
            for (int p = 0; p < panels; p++) {
                const vf scale = from_bf16s(w->scale + ((panel + p) * n_group + i) * PE_LANES);
                if (!PE_Q4_READS_SUMS)
                    weight_sum[p] = vf_mad(scale, vi_to_float(column_sum[p]), weight_sum[p]);
                PE_UNROLL
                for (int r = 0; r < rows; r++) {
                    float *sum = part + (r * panels + p) * PE_LANES;
                    vf_store(sum, vf_mad(scale, vi_to_float(acc[r][p]), vf_load(sum)));
                }
            }
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                add_group_q4(x, r * x_groups + g, weight_sum[p], vf_load(part + (r * panels + p) * PE_LANES),
                             sums + (r * panels + p) * PE_LANES);
    }
    end_q4(rows, panels, sums, out);
}

PE_MATMUL(q4, Q4, pe_rows_q8, pe_weights_q4)

/* Many rows have some panels unpacked once, into the L2 cache. What is left are tiles much like those of int8; they are small enough to
 * have the sums of a group of activations in registers, too. */
#ifdef PE_Q4_UNPACK
enum { UNPACKED_BYTES = 96 << 10 };

PE_INLINE int64_t unpacked_bytes(const pe_weights_q4 *w) { return 2 * q4_panel_bytes(w); }

/* n lines of packed weights. */
static void unpack_q4(const uint8_t *octets, int64_t n, int8_t *quads)
{
    for (int64_t i = 0; i < n; i++, octets += 4 * PE_LANES, quads += 8 * PE_LANES) {
        vq_w low, high;
        vq_nibbles(octets, pe_q4_codebook, &low, &high);
        vf_store((float *)(void *)quads, vi_bits(low));
        vf_store((float *)(void *)(quads + 4 * PE_LANES), vi_bits(high));
    }
}

/* The integers of a group of unpacked weights, by the tile of int8 if that takes activations as they lie; else it is one panel, whose
 * weights stay in memory. */
PE_INLINE void unpacked_q4(int rows, int panels, const vq_group *x, const int8_t *quads, int64_t panel_stride, vi acc[12][4])
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = vi_set(0);
#ifdef PE_OWN_GROUP
    (void)panel_stride;
    for (int i = 0; i < PE_Q4_GROUP / 4; i++)
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            vq_dot_at(&acc[r][0], vq_ready(x, r, i), quads + i * 4 * PE_LANES);
#else
    int64_t n_quad = PE_Q4_GROUP / 4;
    PE_HIDE(n_quad); /* unrolled, gcc spills */
    /* what it asks for is what it reads: what comes next isn't unpacked yet */
    group_q8(rows, panels, x, quads, panel_stride, n_quad, quads, (pe_ahead){0, 64, PE_L1}, acc);
#endif
}

/* [next, next_end): packed weights that are unpacked next, asked for evenly while the tile computes. */
PE_INLINE void tile_unpacked(int rows, int panels, const pe_rows_q8 *x, const pe_weights_q4 *w, int64_t panel, const int8_t *quads,
                             const uint8_t *next, const uint8_t *next_end, const pe_output *out)
{
    enum { PARTS = PE_GROUP / PE_Q4_GROUP };
    const int64_t n_group = (w->k + PE_Q4_GROUP - 1) / PE_Q4_GROUP, x_groups = x->stride / PE_GROUP;
    const int64_t n_sum = (n_group + PARTS - 1) / PARTS, panel_stride = n_group * PE_Q4_GROUP * PE_LANES;
    const float *weight_sums = w->weight_sum + panel * n_sum * PE_LANES;
    PE_ALIGNED float sums[12 * 4 * PE_LANES];
    const int64_t pace = (next_end - next + n_sum - 1) / n_sum;
    prefetch_tile(rows, panels, 1, out);
    clear_tile(rows, panels, sums);
    for (int64_t g = 0; g < n_sum; g++, next += pace) {
        for (const uint8_t *line = next; line < next + pace; line += 4 * PE_LANES)
            PE_PREFETCH_FAR(line);
        vf part[12][4];
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                part[r][p] = vf_set(0.0f);
        const int64_t end = (g + 1) * PARTS < n_group ? (g + 1) * PARTS : n_group;
        for (int64_t i = g * PARTS; i < end; i++) {
            vi acc[12][4];
            const vq_group at = {x->q + i * PE_Q4_GROUP, x->stride};
            unpacked_q4(rows, panels, &at, quads + i * PE_Q4_GROUP * PE_LANES, panel_stride, acc);
            PE_UNROLL
            for (int p = 0; p < panels; p++) {
                const vf scale = from_bf16s(w->scale + ((panel + p) * n_group + i) * PE_LANES);
                PE_UNROLL
                for (int r = 0; r < rows; r++)
                    part[r][p] = vf_mad(scale, vi_to_float(acc[r][p]), part[r][p]);
            }
        }
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                add_group_q4(x, r * x_groups + g, vf_load(weight_sums + (p * n_sum + g) * PE_LANES), part[r][p],
                             sums + (r * panels + p) * PE_LANES);
    }
    end_q4(rows, panels, sums, out);
}

static void panels_unpacked(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q4 *w, int64_t panel, int64_t n_panel,
                            const pe_output *out)
{
    const int64_t n_tile = (n_row + PE_Q4_UNPACKED_ROWS - 1) / PE_Q4_UNPACKED_ROWS, bytes = q4_panel_bytes(w);
    const int64_t wide = PE_Q4_UNPACKED_PANELS * unpacked_bytes(w) <= UNPACKED_BYTES ? PE_Q4_UNPACKED_PANELS : 1;
    PE_ALIGNED int8_t unpacked[UNPACKED_BYTES];
    for (int64_t p = panel, width; p < panel + n_panel; p += width) {
        width = panel + n_panel - p < wide ? 1 : wide;
        unpack_q4(w->panels + p * bytes, width * bytes / (4 * PE_LANES), unpacked);
        for (int64_t t = 0; t < n_tile; t++) {
            const int64_t row = t * n_row / n_tile, n = (t + 1) * n_row / n_tile - row;
            const pe_rows_q8 from = q8_from(x, row);
            const pe_output to = output_at(out, row, p);
            const uint8_t *next = w->panels + (p + width) * bytes + t * width * bytes / n_tile;
            const uint8_t *end = w->panels + (p + width) * bytes + (t + 1) * width * bytes / n_tile;
            if (width == PE_Q4_UNPACKED_PANELS)
                PE_FOR_ROWS(n, PE_Q4_UNPACKED_ROWS,
                            tile_unpacked(rows, PE_Q4_UNPACKED_PANELS, &from, w, p, unpacked, next, end, &to))
            else
                PE_FOR_ROWS(n, PE_Q4_UNPACKED_ROWS, tile_unpacked(rows, 1, &from, w, p, unpacked, next, end, &to))
        }
    }
}
#endif

static void matmul_q4(const pe_rows_q8 *x, int64_t n_row, const pe_weights_q4 *w, int64_t panel, int64_t n_panel,
                      const pe_output *out)
{
#ifdef PE_Q4_UNPACK
    if (n_row >= PE_Q4_UNPACK && unpacked_bytes(w) <= UNPACKED_BYTES) {
        panels_unpacked(x, n_row, w, panel, n_panel, out);
        return;
    }
#endif
    panels_q4(x, n_row, w, panel, n_panel, out);
}
