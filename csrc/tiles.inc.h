/* Matrix products: register tiles, and the loops over rows and panels around them. Included by kernels.inc.h.
 *
 * A kind of tile is a function tile_KIND(rows, panels, apart, x, w, panel, out, ahead) of `rows` x `panels` accumulators, where
 * `rows` and `panels` are constants once it is inlined, so that loops unroll and arrays become registers; its panels are `panel` and
 * each `apart`-th after that; KIND_from(x, row), its input from a row on; KIND_panel_bytes(w); and PE_KIND_ROWS_1 2 4, PE_KIND_MANY.
 * PE_MATMUL makes the loops.
 *
 * `ahead` says which weights a tile asks for while it computes (level.h). */

/* With so few rows, products wait for the weights. One panel after the other is one stream from memory, which comes faster than
 * four. Floats stay with four panels: a single panel's sums, which must go on in order, would wait for each other. */
#ifndef PE_Q8_STREAM
#define PE_Q8_STREAM 12
#endif
#define PE_Q4_STREAM 12
#define PE_F32_STREAM 0
#define PE_BF16_STREAM 0

/* With so few rows, what tiles ask for comes into the L2 cache alone (level.h). */
#ifndef PE_F32_FAR
#define PE_F32_FAR 12
#endif
#ifndef PE_BF16_FAR
#define PE_BF16_FAR 12
#endif
#ifndef PE_Q8_FAR
#define PE_Q8_FAR 12
#endif
#ifndef PE_Q4_FAR
#define PE_Q4_FAR 12
#endif

/* The rows of a large output lie far apart and in no cache: a tile asks for its lines before it needs them. */
PE_INLINE void prefetch_tile(int rows, int panels, int64_t apart, const pe_output *out)
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            PE_PREFETCH_WRITE(out->out + r * out->out_stride + p * apart * PE_LANES);
}

/* A tile's sums in memory become 0. As one loop it would be gcc's `rep stos`, whose start costs more than the rest. */
PE_INLINE void clear_tile(int rows, int panels, float *sums)
{
    PE_UNROLL
    for (int r = 0; r < rows; r++)
        PE_UNROLL
        for (int p = 0; p < panels; p++)
            vf_store(sums + (r * panels + p) * PE_LANES, vf_set(0.0f));
}

/* A finished vector of a tile, p panels on: the residual is added, and it is stored. */
PE_INLINE void store_tile(const pe_output *out, int64_t r, int64_t p, vf y)
{
    if (out->residual)
        y = vf_add(y, vf_load(out->residual + r * out->residual_stride + p * PE_LANES));
    vf_store(out->out + r * out->out_stride + p * PE_LANES, y);
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

/* Tiles `panels` wide down n_row rows, as even in height as they can be: no thin tile at the end. What they ask for
 * comes into `into`, L1 or L2. */
#define PE_TILES(kind, max_rows, panels, into, Rows, Weights)                                                        \
    static void rows_##kind##_##panels##_##into(const Rows *x, int64_t n_row, const Weights *w, int64_t panel,       \
                                                const pe_output *out)                                                \
    {                                                                                                                \
        const int64_t n_tile = (n_row + (max_rows) - 1) / (max_rows);                                                \
        for (int64_t t = 0, row = 0; t < n_tile; t++) {                                                              \
            const int64_t n = (n_row - row) / (n_tile - t);                                                          \
            const pe_output to = output_at(out, row, 0);                                                             \
            const Rows from = kind##_from(x, row);                                                                   \
            const pe_ahead ahead = pe_ahead_of(PE_##into, t, n_tile, panels, kind##_panel_bytes(w));                 \
            PE_FOR_ROWS(n, max_rows, tile_##kind(rows, panels, 1, &from, w, panel, &to, ahead))                      \
            row += n;                                                                                                \
        }                                                                                                            \
    }

/* Tiles `panels` wide of few rows, which one tile holds. They wait for memory, and their panels are streams that the processor
 * follows: they lie STREAM_PANELS apart, if there are so many, so that each goes on where it was when the next tile begins. Side by
 * side, all would have to be found again for each tile. Returns how many panels it did. */
enum {
    STREAM_PANELS = 4,
    STREAM_ROWS = 8, /* more take longer than memory, and nothing is gained */
    STREAM_ALONE = 4 /* so few rows need no line asked for */
};
PE_INLINE pe_ahead stream_ahead(int rows, int panels, int64_t panel_bytes)
{
    return pe_ahead_of(rows > STREAM_ALONE ? PE_L2 : PE_NOWHERE, 0, 1, rows <= STREAM_ROWS ? 1 : panels, panel_bytes);
}
#define PE_STREAMS(kind, max_rows, panels, Rows, Weights)                                                            \
    static int64_t streams_##kind##_##panels(const Rows *x, int64_t n_row, const Weights *w, int64_t panel,          \
                                             int64_t n_panel, const pe_output *out)                                  \
    {                                                                                                                \
        const int64_t most = n_row <= STREAM_ROWS ? STREAM_PANELS : 1;                                               \
        const int64_t apart = n_panel / (panels) < most ? n_panel / (panels) : most;                                 \
        for (int64_t p = panel; p < panel + apart; p++) {                                                            \
            const pe_output to = output_at(out, 0, p);                                                               \
            PE_FOR_ROWS(n_row, max_rows,                                                                             \
                        tile_##kind(rows, panels, apart, x, w, p, &to,                                               \
                                    stream_ahead(rows, panels, kind##_panel_bytes(w))))                              \
        }                                                                                                            \
        return apart * (panels);                                                                                     \
    }

/* All panels from `panel` on, by the widest tiles that hold all rows, else by those meant for many rows. */
#define PE_MATMUL(kind, KIND, Rows, Weights)                                                                         \
    PE_TILES(kind, PE_##KIND##_ROWS_1, 1, L1, Rows, Weights)                                                         \
    PE_TILES(kind, PE_##KIND##_ROWS_1, 1, L2, Rows, Weights)                                                         \
    PE_TILES(kind, PE_##KIND##_ROWS_2, 2, L1, Rows, Weights)                                                         \
    PE_TILES(kind, PE_##KIND##_ROWS_4, 4, L1, Rows, Weights)                                                         \
    PE_TILES(kind, PE_##KIND##_ROWS_4, 4, L2, Rows, Weights)                                                         \
    PE_STREAMS(kind, PE_##KIND##_ROWS_2, 2, Rows, Weights)                                                           \
    PE_STREAMS(kind, PE_##KIND##_ROWS_4, 4, Rows, Weights)                                                           \
    static void panels_##kind(const Rows *x, int64_t n_row, const Weights *w, int64_t panel, int64_t n_panel,        \
                              const pe_output *out)                                                                  \
    {                                                                                                                \
        const int64_t end = panel + n_panel;                                                                         \
        while (panel < end) {                                                                                        \
            const int64_t left = end - panel;                                                                        \
            const pe_output to = output_at(out, 0, panel);                                                           \
            const int wide = n_row > PE_##KIND##_STREAM;                                                             \
            if (wide && left >= 4 && n_row <= PE_##KIND##_ROWS_4) {                                                  \
                panel += streams_##kind##_4(x, n_row, w, panel, left, out);                                          \
            } else if (wide && left >= 4 && PE_##KIND##_MANY >= 4) {                                                 \
                if (n_row <= PE_##KIND##_FAR)                                                                        \
                    rows_##kind##_4_L2(x, n_row, w, panel, &to);                                                     \
                else                                                                                                 \
                    rows_##kind##_4_L1(x, n_row, w, panel, &to);                                                     \
                panel += 4;                                                                                          \
            } else if (wide && left >= 2 && n_row <= PE_##KIND##_ROWS_2) {                                           \
                panel += streams_##kind##_2(x, n_row, w, panel, left, out);                                          \
            } else if (wide && left >= 2 && PE_##KIND##_MANY >= 2) {                                                 \
                rows_##kind##_2_L1(x, n_row, w, panel, &to);                                                         \
                panel += 2;                                                                                          \
            } else if (n_row <= PE_##KIND##_FAR) {                                                                   \
                rows_##kind##_1_L2(x, n_row, w, panel++, &to);                                                       \
            } else {                                                                                                 \
                rows_##kind##_1_L1(x, n_row, w, panel++, &to);                                                       \
            }                                                                                                        \
        }                                                                                                            \
    }

#include "tiles_float.inc.h"
#include "tiles_int8.inc.h"
#include "tiles_int4.inc.h"
