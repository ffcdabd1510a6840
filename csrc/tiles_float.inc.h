/* Tiles of float32 and bfloat16 weights. Included by tiles.inc.h. */

/* Rows of float32; with `decay` a tile starts at decay[row] * out[row], else at the bias. Row r meets the first k + r * step
 * values of the panels, which may have more. */
typedef struct {
    const float *x, *decay;
    int64_t stride, k, step;
} rows_f32;

PE_INLINE rows_f32 f32_from(const rows_f32 *x, int64_t row)
{
    return (rows_f32){x->x + row * x->stride, x->decay ? x->decay + row : 0, x->stride, x->k + row * x->step, x->step};
}

PE_INLINE int64_t f32_panel_bytes(const pe_weights_f32 *w) { return w->k * PE_LANES * (int64_t)sizeof(float); }

/* The first line that a tile asks for, and `ahead` for those after it: w->next with one or two rows, if there is one, else what
 * comes next in the panels. */
PE_INLINE const char *first_line(int rows, const void *next, int64_t offset, const char *from, pe_ahead *ahead)
{
    if (rows > 2 || !next)
        return from + ahead->bytes;
    ahead->pace = 64;
    return (const char *)next + offset;
}

/* Asks for a line while a tile computes: with one or two rows one of w->next, if there is one, else one of what comes next in the
 * panels. */
PE_INLINE void ask(int rows, const void *next, const char *line, pe_ahead ahead)
{
    if (rows > 2)
        PE_PREFETCH_WEIGHTS(ahead.into, line);
    else if (next)
        PE_PREFETCH_FAR(line);
}

/* How many values of k a tile of many rows adds between two steps of its pointers: where a row takes few instructions, those would
 * be many beside it. With up to BY_MEMORY rows a tile waits for memory, which is best asked for a line of each panel at a time. */
enum { BY_MEMORY = 3 };
#ifndef PE_F32_UNROLL
#define PE_F32_UNROLL 1
#endif
#ifndef vf_mad_to
#define vf_mad_to(acc, a, b) (*(acc) = vf_mad(a, b, *(acc)))
#endif

/* Moves the pointers to rows on by n values of k. Every third row has one, as in group_q8: one for each would not fit the
 * registers. */
PE_INLINE void step_f32(int rows, const float *third[4], int n)
{
    PE_UNROLL
    for (int r = 0; r < rows; r += 3) {
        third[r / 3] += n;
        PE_HIDE(third[r / 3]);
    }
}

/* Adds the value of k that lies `back` before the pointers to the sums of all rows but the first `skip`. */
PE_INLINE void add_f32(int rows, int panels, int64_t skip, const float *third[4], int64_t *stride, int back, const float *from,
                       int64_t panel_stride, vf acc[12][4])
{
    vf column[4];
    PE_UNROLL
    for (int p = 0; p < panels; p++)
        column[p] = vf_load(from + p * panel_stride);
    PE_HIDE(*stride); /* so that its multiples stay parts of addresses */
    PE_UNROLL
    for (int r = 0; r < rows; r++) {
        if (r < skip)
            continue;
        vf value = vf_set(third[r / 3][r % 3 * *stride - back]);
        PE_PIN(value);
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            if (rows > BY_MEMORY)
                vf_mad_to(&acc[r][p], value, column[p]);
            else
                acc[r][p] = vf_mad(value, column[p], acc[r][p]);
    }
}

PE_INLINE void tile_f32(int rows, int panels, int64_t apart, const rows_f32 *x, const pe_weights_f32 *w, int64_t panel,
                        const pe_output *out, pe_ahead ahead)
{
    const int unroll = rows > BY_MEMORY ? PE_F32_UNROLL : 1;
    const int64_t panel_stride = apart * w->k * PE_LANES, bytes_apart = apart * f32_panel_bytes(w);
    int64_t stride = x->stride;
    const float *from = w->panels + panel * w->k * PE_LANES, *third[4];
    const char *line = first_line(rows, w->next, panel * f32_panel_bytes(w), (const char *)from, &ahead);
    vf acc[12][4];
    prefetch_tile(rows, panels, apart, out);
    PE_UNROLL
    for (int r = 0; r < rows; r += 3)
        third[r / 3] = x->x + r * stride;
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            if (x->decay)
                acc[r][p] = vf_mul(vf_set(x->decay[r]), vf_load(out->out + r * out->out_stride + p * apart * PE_LANES));
            else
                acc[r][p] = out->bias ? vf_load(out->bias + p * apart * PE_LANES) : vf_set(0.0f);
        }
    int64_t left = x->k;
    for (; left >= unroll; left -= unroll, from += unroll * PE_LANES, line += unroll * ahead.pace) {
        step_f32(rows, third, unroll);
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            ask(rows, w->next, line + p * bytes_apart, ahead);
        if (unroll > 1 && ahead.pace > 64 / unroll) /* else it is the same line */
            PE_UNROLL
            for (int i = panels; i < unroll * panels; i++)
                ask(rows, w->next, line + i % panels * bytes_apart + i / panels * ahead.pace, ahead);
        PE_UNROLL
        for (int i = 0; i < unroll; i++)
            add_f32(rows, panels, 0, third, &stride, unroll - i, from + i * PE_LANES, panel_stride, acc);
    }
    const int64_t end = left + x->step * (rows - 1);
    for (int64_t i = 0; i < end; i++, from += PE_LANES) {
        step_f32(rows, third, 1);
        add_f32(rows, panels, i < left ? 0 : i - left + 1, third, &stride, 1, from, panel_stride, acc);
    }
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            store_tile(out, r, p * apart, acc[r][p]);
}

PE_MATMUL(f32, F32, rows_f32, pe_weights_f32)

static void matmul_f32(const float *x, int64_t x_stride, int64_t n_row, const pe_weights_f32 *w, int64_t panel,
                       int64_t n_panel, const pe_output *out)
{
    const rows_f32 rows = {x, 0, x_stride, w->k, 0};
    panels_f32(&rows, n_row, w, panel, n_panel, out);
}

static void accumulate_f32(const float *x, int64_t x_stride, int64_t n_row, int64_t k, int64_t step, const pe_weights_f32 *w,
                           int64_t n_panel, const float *decay, float *out, int64_t out_stride)
{
    const rows_f32 rows = {x, decay, x_stride, k, step};
    const pe_output to = {.out = out, .out_stride = out_stride};
    panels_f32(&rows, n_row, w, 0, n_panel, &to);
}

/* The same of bfloat16, without steps. */
typedef struct {
    const uint16_t *x;
    const float *decay;
    int64_t stride, k;
} rows_bf16;

PE_INLINE rows_bf16 bf16_from(const rows_bf16 *x, int64_t row)
{
    return (rows_bf16){x->x + row * x->stride, x->decay ? x->decay + row : 0, x->stride, x->k};
}

/* decay * a, 0 below 2^-80: then no sum with products of bfloat16 can be subnormal. */
PE_INLINE vf decayed(vf a, float decay)
{
    const vf y = vf_mul(vf_set(decay), a), size = vi_bits(vi_and(vf_bits(y), vi_set(0x7fffffff)));
    return vf_select(vf_lt(size, vf_set(0x1p-80f)), vf_set(0.0f), y);
}

/* What a sum starts with. */
PE_INLINE vf first_sum_bf16(const rows_bf16 *x, const pe_output *out, int64_t r, int64_t p)
{
    return x->decay ? decayed(vf_load(out->out + r * out->out_stride + p * PE_LANES), x->decay[r]) : vf_set(0.0f);
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

PE_INLINE void tile_bf16(int rows, int panels, int64_t apart, const rows_bf16 *x, const pe_weights_bf16 *w, int64_t panel,
                         const pe_output *out, pe_ahead ahead)
{
    const int64_t n_pair = (w->k + 1) / 2;
    const uint16_t *from = w->panels + panel * n_pair * 2 * PE_LANES;
    const char *line = first_line(rows, w->next, panel * bf16_panel_bytes(w), (const char *)from, &ahead);
    vf acc[12][4];
    prefetch_tile(rows, panels, apart, out);
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            acc[r][p] = first_sum_bf16(x, out, r, p * apart);
    const int64_t stride = x->stride;
    const uint16_t *third[4]; /* as in group_q8 */
    PE_UNROLL
    for (int r = 0; r < rows; r += 3)
        third[r / 3] = x->x + r * stride;
    for (int64_t i = 0; i < (x->k + 1) / 2; i++, line += ahead.pace) {
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            ask(rows, w->next, line + p * apart * n_pair * 4 * PE_LANES, ahead);
        vb column[4];
        const vb first = vb_activations(third[0]);
        PE_UNROLL
        for (int p = 0; p < panels; p++) {
            column[p] = vb_weights(from + (p * apart * n_pair + i) * 2 * PE_LANES);
            vb_dot(&acc[0][p], first, column[p]); /* at once: four panels would not fit the registers of AVX2 */
        }
        PE_UNROLL
        for (int r = 1; r < rows; r++) {
            const vb value = vb_activations(third[r / 3] + r % 3 * stride);
            PE_UNROLL
            for (int p = 0; p < panels; p++)
                vb_dot(&acc[r][p], value, column[p]);
        }
        PE_UNROLL
        for (int r = 0; r < rows; r += 3) {
            third[r / 3] += 2;
            PE_HIDE(third[r / 3]);
        }
    }
    PE_UNROLL
    for (int p = 0; p < panels; p++) {
        const vf bias = out->bias ? vf_load(out->bias + p * apart * PE_LANES) : vf_set(0.0f);
        PE_UNROLL
        for (int r = 0; r < rows; r++)
            store_tile(out, r, p * apart, vf_add(acc[r][p], bias));
    }
}

PE_MATMUL(bf16, BF16, rows_bf16, pe_weights_bf16)

#ifdef PE_WIDE_BF16
#include "tiles_wide_bf16.inc.h"
#define PE_BF16_BY_ROWS (n_row < PE_WIDE_BF16 ? panels_bf16 : many_bf16)
#else
#define PE_BF16_BY_ROWS panels_bf16
#endif

static void matmul_bf16(const uint16_t *x, int64_t x_stride, int64_t n_row, const pe_weights_bf16 *w, int64_t panel,
                        int64_t n_panel, const pe_output *out)
{
    const rows_bf16 rows = {x, 0, x_stride, w->k};
    PE_BF16_BY_ROWS(&rows, n_row, w, panel, n_panel, out);
}

static void accumulate_bf16(const uint16_t *x, int64_t x_stride, int64_t n_row, int64_t k, const pe_weights_bf16 *w,
                            int64_t n_panel, const float *decay, float *out, int64_t out_stride)
{
    const rows_bf16 rows = {x, decay, x_stride, k};
    const pe_output to = {.out = out, .out_stride = out_stride};
    PE_BF16_BY_ROWS(&rows, n_row, w, 0, n_panel, &to);
}
