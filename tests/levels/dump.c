/* dump SEED: runs every kernel of every SIMD level that this CPU has on made-up inputs and hashes each result's bits,
 * in lines "level kernel size hash". Inputs come from integers alone: all machines make the same; NaN is one NaN. */
#include "kernels.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))
#define EACH(name, list) (int at_##name = 0, name; at_##name < COUNT(list) && (name = list[at_##name], 1); at_##name++)

#define HASH_START UINT64_C(0xcbf29ce484222325) /* FNV-1a */
enum { N = 1 << 17 };
static _Alignas(64) float x[N], w[N], y[N], extra[N];
static _Alignas(64) int8_t packed[N];
static uint8_t bytes[N];
static int16_t sums[N];
static uint16_t halves[N], half_weights[N], half_scales[N];
static uint8_t nibbles[N];
static int32_t zeros[N];
static uint32_t source[N], random_state;
static float scales[N], column_scales[N], weight_sums[N];
static uint64_t hash = HASH_START;
static const pe_kernels *level;

static uint32_t next(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

/* offset + scale * [-1, 1) */
static void fill(float *to, int64_t n, float scale, float offset)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = (float)((int32_t)(next() >> 8) - (1 << 23)) * 0x1p-23f * scale + offset;
}

static void hash_bytes(const void *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        hash = (hash ^ ((const uint8_t *)from)[i]) * UINT64_C(0x100000001b3);
}

static void hash_floats(const float *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float value = from[i] == from[i] ? from[i] : NAN;
        hash_bytes(&value, sizeof value);
    }
}

/* Of what was hashed since the last line. */
static void line(const char *kernel, int a, int b, int c)
{
    printf("%s %s %dx%dx%d %016" PRIx64 "\n", level->name, kernel, a, b, c, hash);
    hash = HASH_START;
}

static const int ROWS[] = {1, 2, 3, 4, 5, 6, 7, 11, 13, 26}, PANELS[] = {1, 2, 3, 4, 7, 19};
static const int LENGTHS[] = {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 300, 1025};

/* Bias or none, residual or none take turns. The first panel is left out. */
static pe_output output(int turn, int64_t stride)
{
    fill(y, N / 8, 1, 0);
    return (pe_output){turn & 1 ? extra : 0, turn & 2 ? extra + 999 : 0, stride + 1, y, stride};
}

/* bfloat16 and int4, of the values in x and w. */
static void matmuls_narrow(int n_row, int n_panel, int k, const pe_rows_q8 *rows, const pe_output *to)
{
    const int64_t pairs = (k + 1) / 2 * 2 * PE_LANES, n_group = (k + PE_Q4_GROUP - 1) / PE_Q4_GROUP;
    const pe_weights_bf16 weights = {half_weights, k};
    const int64_t n_sum = (k + PE_GROUP - 1) / PE_GROUP;
    const pe_weights_q4 weights_q4 = {nibbles, half_scales, weight_sums, k};
    const int64_t stride = rows->stride + 16;
    for (int p = 0; p <= n_panel; p++) {
        level->pack_bf16(w + (int64_t)p * k * PE_LANES, k, half_weights + p * pairs);
        level->pack_q4(w + (int64_t)p * k * PE_LANES, k, nibbles + p * n_group * PE_Q4_GROUP / 2 * PE_LANES,
                       half_scales + p * n_group * PE_LANES, weight_sums + p * n_sum * PE_LANES);
    }
    for (int r = 0; r < n_row; r++)
        level->narrow_bf16(x + r * k, k, halves + 1 + r * stride);
    level->matmul_bf16(halves + 1, stride, n_row, &weights, 1, n_panel, to);
    hash_floats(y, n_row * to->out_stride);
    line("matmul_bf16", n_row, n_panel, k);
    fill(y, n_row * (int)to->out_stride, 2e-24f, 0); /* about what counts as 0; the first row adds nothing */
    memset(halves + 1, 0, (size_t)k * sizeof *halves);
    level->accumulate_bf16(halves + 1, stride, n_row, k, &weights, n_panel, extra, y, to->out_stride);
    hash_floats(y, n_row * to->out_stride);
    line("accumulate_bf16", n_row, n_panel, k);
    level->matmul_q4(rows, n_row, &weights_q4, 1, n_panel, to);
    hash_floats(y, n_row * to->out_stride);
    line("matmul_q4", n_row, n_panel, k);
}

static void matmuls(void)
{
    static const int DEPTHS[] = {1, 3, 4, 127, 128, 130, 300};
    int turn = 0;
    fill(extra, N, 2, 0);
    for EACH(n_panel, PANELS) for EACH(n_row, ROWS) for EACH(k, DEPTHS) {
        const int64_t n_group = (k + PE_GROUP - 1) / PE_GROUP;
        const int64_t stride = (n_panel + 1) * PE_LANES, n_out = n_row * stride;
        const pe_weights_f32 weights = {w, k};
        const pe_weights_q8 weights_q8 = {packed, sums, column_scales, k};
        const pe_rows_q8 rows = {bytes + 1, scales, zeros, n_group * PE_GROUP};
        const pe_output to = output(turn++, stride);
        fill(x, n_row * k + 1, 1, turn % 3 ? 0 : 50);
        fill(w, k * stride, 1, 0);
        level->matmul_f32(x + 1, k, n_row, &weights, 1, n_panel, &to);
        hash_floats(y, n_out);
        line("matmul_f32", n_row, n_panel, k);
        const int half = (k + 1) / 2, step = half + n_row - 1 <= k;
        level->accumulate_f32(x, k, n_row, half, step, &weights, n_panel, extra, y, stride);
        hash_floats(y, n_out);
        line("accumulate_f32", n_row, n_panel, k);
        for (int p = 0; p <= n_panel; p++)
            level->pack_q8(w + (int64_t)p * k * PE_LANES, k, packed + p * ((k + 3) / 4 * 4 * PE_LANES),
                           column_scales + p * PE_LANES, sums + p * n_group * PE_LANES);
        for (int r = 0; r < n_row; r++)
            level->quantize_q8(x + r * k, k, bytes + 1 + r * rows.stride, scales + r * n_group, zeros + r * n_group);
        level->matmul_q8(&rows, n_row, &weights_q8, 1, n_panel, &to);
        hash_floats(y, n_out);
        line("matmul_q8", n_row, n_panel, k);
        matmuls_narrow(n_row, n_panel, k, &rows, &to);
    }
}

/* Rows of many sizes, then one that steps through all bit patterns: zeros, subnormals, infinities, NaN. */
static void activations(void)
{
    for (int kind = PE_ACT_NONE; kind <= PE_ACT_GELU_TANH_COARSE; kind++) {
        for EACH(n, LENGTHS) {
            fill(y, n, (float)(1 + n % 16), 0);
            level->activate((pe_activation)kind, y, n);
            hash_floats(y, n);
            line("activate", kind, n, 0);
        }
        for (uint32_t i = 0; i < 1 << 15; i++) {
            const uint32_t bits = (i << 17) + (i % 5 ? next() & 0xffff : 0);
            memcpy(&y[i], &bits, sizeof bits);
        }
        level->activate((pe_activation)kind, y, 1 << 15);
        hash_floats(y, 1 << 15);
        line("activate", kind, 1 << 15, 1);
    }
}

/* Kernels of one row: usual values, a far mean, tiny, huge, one constant, and one NaN or infinity among them. */
static void rows(void)
{
    static const float SCALES[] = {1, 1, 1e-38f, 3e38f, 0, 10, 10}, OFFSETS[] = {0, 1000, 0, 0, 5, 0, 0};
    for (int kind = 0; kind < COUNT(SCALES); kind++) for EACH(n, LENGTHS) {
        fill(x, n, SCALES[kind], OFFSETS[kind]);
        if (kind >= 5)
            x[n / 2] = kind == 5 ? NAN : -INFINITY;
        fill(w, n + 1, 1, 1);
        level->quantize_q8(x, n, bytes, scales, zeros);
        hash_bytes(bytes, n);
        hash_floats(scales, (n + PE_GROUP - 1) / PE_GROUP);
        hash_bytes(zeros, (n + PE_GROUP - 1) / PE_GROUP * 4);
        line("quantize_q8", n, kind, 0);
        level->layer_norm(x, n, w, w + 1, 1e-5f, y);
        hash_floats(y, n);
        line("layer_norm", n, kind, 0);
        level->softmax(x, n, y);
        hash_floats(y, n);
        line("softmax", n, kind, 0);
        y[0] = level->row_max(x, n);
        hash_floats(y, 1);
        line("row_max", n, kind, 0);
        const double sum = level->exp_sum(x, n, OFFSETS[kind], 0.7f, y), canonical = sum == sum ? sum : NAN;
        hash_bytes(&canonical, sizeof canonical);
        hash_floats(y, n);
        line("exp_sum", n, kind, 0);
    }
    for (int n = 1; n <= PE_PAGE; n++) {
        const int n_row = 1 + n % PE_LANES, step = n + n_row - 1 <= PE_PAGE;
        float state[(1 + PE_LANES) * PE_LANES] = {0}, decay[PE_LANES];
        for (int i = 0; i < PE_LANES; i++)
            state[i] = -INFINITY;
        for (int block = 0; block < 4; block++) {
            uint16_t *narrow = block >= 2 ? halves : NULL;
            fill(x, n_row * PE_PAGE, 30, 0);
            level->softmax_rows(x, n_row, block % 2 ? n : PE_PAGE, block % 2 ? step : 0, 0.3f, state, decay, narrow);
            if (narrow)
                hash_bytes(halves, (size_t)n_row * PE_PAGE * 2);
            else
                hash_floats(x, n_row * PE_PAGE);
            hash_floats(decay, n_row);
        }
        hash_floats(state + PE_LANES, n_row * PE_LANES);
        line("softmax_rows", n, n_row, step);
        level->softmax_end(state + PE_LANES, x, n);
        hash_floats(x, n);
        line("softmax_end", n, 0, 0);
    }
}

static void packing(void)
{
    for EACH(k, LENGTHS) for (int kind = 0; kind < 6; kind++) {
        const int dtype = kind % 3, part = kind / 3; /* all 16 columns, or 5 that lie the other way */
        for (int64_t i = 0; i < k * PE_LANES; i++)
            source[i] = next() & (i % 7 ? 0xbf7fbf7f : UINT32_MAX); /* most of them finite */
        w[k * PE_LANES] = (float)(part ? level->load_panel(source, (pe_dtype)dtype, k, 1, 5, k, NULL, NULL, w)
                                       : level->load_panel(source, (pe_dtype)dtype, k, PE_LANES, PE_LANES, 1, NULL, NULL, w));
        hash_floats(w, k * PE_LANES + 1);
        line("load_panel", k, dtype, part);
        level->load_panel(source, (pe_dtype)dtype, k, 1, PE_LANES, k, NULL, NULL, w);
        hash_floats(w, k * PE_LANES);
        line("load_panel", k, dtype, 2 + part);
        level->largest(source, (pe_dtype)dtype, part ? 5 : k, part ? k : 5, part, scales);
        hash_floats(scales, k);
        line("largest", k, dtype, part);
        fill(w, k * PE_LANES, dtype == 1 ? 1e-33f : 3, 0);
        level->panel_squares(w, k, scales);
        hash_floats(scales, PE_LANES);
        line("panel_squares", k, dtype, part);
        for (int64_t i = 0; i < k && part; i++)
            w[i * PE_LANES + 3] = 0;
        level->pack_q8(w, k, packed, scales, sums);
        hash_bytes(packed, (k + 3) / 4 * 4 * PE_LANES);
        hash_floats(scales, PE_LANES);
        hash_bytes(sums, (k + PE_GROUP - 1) / PE_GROUP * PE_LANES * 2);
        line("pack_q8", k, dtype, part);
        level->pack_bf16(w, k, half_weights);
        hash_bytes(half_weights, (k + 1) / 2 * 2 * PE_LANES * 2);
        line("pack_bf16", k, dtype, part);
        level->pack_q4(w, k, nibbles, half_scales, weight_sums);
        hash_bytes(nibbles, (k + PE_Q4_GROUP - 1) / PE_Q4_GROUP * PE_Q4_GROUP / 2 * PE_LANES);
        hash_bytes(half_scales, (k + PE_Q4_GROUP - 1) / PE_Q4_GROUP * PE_LANES * 2);
        hash_floats(weight_sums, (k + PE_GROUP - 1) / PE_GROUP * PE_LANES);
        line("pack_q4", k, dtype, part);
    }
}

/* Keys and values: usual ones, tiny ones, then any bit patterns, infinities and NaN among them. */
static void key_values(void)
{
    for EACH(n, LENGTHS) for (int kind = 0; kind < 3; kind++) {
        fill(x, n, kind ? 1e-37f : 3, 0);
        for (int64_t i = 0; i < n && kind == 2; i++) {
            const uint32_t bits = next();
            memcpy(&x[i], &bits, sizeof bits);
        }
        level->narrow_bf16(x, n, halves);
        hash_bytes(halves, 2 * n);
        line("narrow_bf16", n, kind, 0);
        for (int64_t i = 0; i < PE_LANES * (n + 1); i++)
            source[i] = next();
        level->turn_words(source, n + 1, n, y);
        hash_bytes(y, 4 * PE_LANES * n);
        line("turn_words", n, kind, 0);
        y[0] = level->narrow_q8(x, n, packed);
        hash_floats(y, 1);
        hash_bytes(packed, n);
        line("narrow_q8", n, kind, 0);
        for (int64_t i = 0; i < 2 * PE_LANES * n || i < 3 * PE_PAGE * PE_LANES; i++)
            packed[i] = (int8_t)next();
        fill(scales, PE_PAGE, kind == 1 ? 1e-37f : 3, 0);
        scales[n % PE_LANES] = kind == 2 ? NAN : 1;
        level->widen_keys_q8(packed, scales, 2, n, y);
        hash_floats(y, 2 * PE_LANES * n);
        line("widen_keys_q8", n, kind, 0);
        const int64_t n_position = n < PE_PAGE ? n : PE_PAGE;
        level->widen_values_q8(packed, scales, n_position, 3, y);
        for (int p = 0; p < 3; p++)
            hash_floats(y + p * PE_PAGE * PE_LANES, n_position * PE_LANES);
        line("widen_values_q8", n, kind, 0);
        for (int panels = 1; panels <= 3; panels++) {
            if (panels < 3) {
                level->score_q8(x, n, packed, scales, panels, packed, y);
                hash_floats(y, panels * PE_LANES);
                line("score_q8", n, kind, panels);
            }
            level->accumulate_q8(x, n_position, packed, scales, panels, NULL, 0.75f, y);
            hash_floats(y, panels * PE_LANES);
            line("accumulate_q8", n, kind, panels);
        }
    }
}

int main(int argc, char **argv)
{
    for (int i = 0; (level = pe_level(i)) != 0; i++) {
        if (level->requires & ~pe_cpu_features())
            continue;
        random_state = (uint32_t)atoi(argv[argc - 1]);
        matmuls();
        activations();
        rows();
        packing();
        key_values();
    }
    return 0;
}
