/* A checkpoint's numbers → packed weights. Included by kernels.inc.h. */

PE_INLINE float from_f16(uint16_t h)
{
    /* Exponent and fraction move up by 13 bits; the product with 2^112 corrects the exponent's bias, subnormals included. */
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0; /* infinity and NaN */
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign | special;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PE_INLINE float from_bf16(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PE_INLINE float read_value(const void *src, pe_dtype dtype, int64_t i)
{
    switch (dtype) {
    case PE_F16: return from_f16(((const uint16_t *)src)[i]);
    case PE_BF16: return from_bf16(((const uint16_t *)src)[i]);
    default: return ((const float *)src)[i];
    }
}

/* 16 values that lie side by side. */
PE_INLINE vf read_vector(const void *src, pe_dtype dtype, int64_t i)
{
    if (dtype == PE_F32)
        return vf_load((const float *)src + i);
    PE_ALIGNED float values[PE_LANES];
    for (int j = 0; j < PE_LANES; j++)
        values[j] = read_value(src, dtype, i + j);
    return vf_load(values);
}

/* Rows become columns. A round moves all bits of an element's place, row and column, up by one and the highest to the end. */
PE_INLINE void transpose(vf *rows)
{
    PE_UNROLL
    for (int round = 0; round < 4; round++) {
        vf zipped[PE_LANES];
        PE_UNROLL
        for (int i = 0; i < PE_LANES / 2; i++) {
            zipped[2 * i] = vf_zip_low(rows[i], rows[i + PE_LANES / 2]);
            zipped[2 * i + 1] = vf_zip_high(rows[i], rows[i + PE_LANES / 2]);
        }
        PE_UNROLL
        for (int i = 0; i < PE_LANES; i++)
            rows[i] = zipped[i];
    }
}

/* A row of a panel, scaled. Returns 0 times the row: NaN where a value isn't finite. */
PE_INLINE vf put_row(vf row, const float *in_scale, vf out_scale, int64_t i, float *panel)
{
    vf_store(panel + i * PE_LANES, vf_mul(vf_mul(row, vf_set(in_scale ? in_scale[i] : 1.0f)), out_scale));
    return vf_mul(row, vf_set(0.0f));
}

PE_INLINE int read_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride,
                         const float *in_scale, const float *out_scale, float *panel)
{
    const vf outs = out_scale ? vf_load_part(out_scale, (int)n) : vf_set(1.0f);
    vf check = vf_set(0.0f);
    int64_t i = 0;
    if (n == PE_LANES && n_stride == 1) {
        for (; i < k; i++)
            check = vf_add(check, put_row(read_vector(src, dtype, i * k_stride), in_scale, outs, i, panel));
    } else if (n == PE_LANES && k_stride == 1) {
        for (; i + PE_LANES <= k; i += PE_LANES) {
            vf rows[PE_LANES];
            PE_UNROLL
            for (int j = 0; j < PE_LANES; j++)
                rows[j] = read_vector(src, dtype, j * n_stride + i);
            transpose(rows);
            PE_UNROLL
            for (int j = 0; j < PE_LANES; j++)
                check = vf_add(check, put_row(rows[j], in_scale, outs, i + j, panel));
        }
    }
    for (; i < k; i++) {
        PE_ALIGNED float values[PE_LANES] = {0};
        for (int64_t j = 0; j < n; j++)
            values[j] = read_value(src, dtype, i * k_stride + j * n_stride);
        check = vf_add(check, put_row(vf_load(values), in_scale, outs, i, panel));
    }
    return vf_sum(check) == 0.0f;
}

static int load_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride,
                      const float *in_scale, const float *out_scale, float *panel)
{
    switch (dtype) { /* constants: the compiler makes a loop for each */
    case PE_F32: return read_panel(src, PE_F32, k, k_stride, n, n_stride, in_scale, out_scale, panel);
    case PE_F16: return read_panel(src, PE_F16, k, k_stride, n, n_stride, in_scale, out_scale, panel);
    default: return read_panel(src, PE_BF16, k, k_stride, n, n_stride, in_scale, out_scale, panel);
    }
}

/* Sizes are compared as integers, which are ordered as they are. */
PE_INLINE vi larger(vi size, const void *src, pe_dtype dtype, int64_t i)
{
    return vi_max(size, vi_and(vf_bits(read_vector(src, dtype, i)), vi_set(0x7fffffff)));
}

PE_INLINE float larger_value(float size, const void *src, pe_dtype dtype, int64_t i)
{
    const float value = read_value(src, dtype, i), other = value < 0.0f ? -value : value;
    return size < other ? other : size;
}

PE_INLINE void largest_of(const void *src, pe_dtype dtype, int64_t n_row, int64_t n, int by_column, float *out)
{
    if (by_column)
        memset(out, 0, (size_t)n * sizeof *out);
    for (int64_t row = 0; row < n_row; row++) {
        const int64_t first = row * n;
        int64_t i = 0;
        if (by_column) {
            for (; i + PE_LANES <= n; i += PE_LANES)
                vf_store(out + i, vi_bits(larger(vf_bits(vf_load(out + i)), src, dtype, first + i)));
            for (; i < n; i++)
                out[i] = larger_value(out[i], src, dtype, first + i);
        } else {
            vi a = vi_set(0), b = a;
            for (; i + 2 * PE_LANES <= n; i += 2 * PE_LANES) {
                a = larger(a, src, dtype, first + i);
                b = larger(b, src, dtype, first + i + PE_LANES);
            }
            out[row] = vf_hmax(vi_bits(vi_max(a, b)));
            for (; i < n; i++)
                out[row] = larger_value(out[row], src, dtype, first + i);
        }
    }
}

static void largest(const void *src, pe_dtype dtype, int64_t n_row, int64_t n, int by_column, float *out)
{
    switch (dtype) {
    case PE_F32: largest_of(src, PE_F32, n_row, n, by_column, out); break;
    case PE_F16: largest_of(src, PE_F16, n_row, n, by_column, out); break;
    default: largest_of(src, PE_BF16, n_row, n, by_column, out);
    }
}

static void panel_squares(const float *panel, int64_t k, float *sums)
{
    vf sum = vf_set(0.0f);
    for (int64_t i = 0; i < k * PE_LANES; i += PE_LANES)
        sum = vf_add(sum, vf_mul(vf_load(panel + i), vf_load(panel + i)));
    vf_store(sums, sum);
}

/* 1 / x; 1 where |x| is next to nothing, so that a column of zeros divides nothing by 0. */
PE_INLINE vf inverse_of(vf x)
{
    const vf size = vf_max(x, vf_sub(vf_set(0.0f), x));
    return vf_div(vf_set(1.0f), vf_select(vf_lt(size, vf_set(1e-35f)), vf_set(1.0f), x));
}

static void pack_q8(const float *panel, int64_t k, int8_t *q, float *scale, int16_t *column_sum)
{
    vf largest = vf_set(0.0f);
    for (int64_t i = 0; i < k; i++) {
        const vf v = vf_load(panel + i * PE_LANES);
        largest = vf_max(vf_max(v, vf_sub(vf_set(0.0f), v)), largest);
    }
    const vf step = vf_select(vf_lt(largest, vf_set(1e-35f)), vf_set(1.0f), vf_div(largest, vf_set(127.0f)));
    const vf inverse = vf_div(vf_set(1.0f), step);
    vf_store(scale, step);
    for (int64_t start = 0; start < k; start += PE_GROUP, column_sum += PE_LANES) {
        const int64_t end = k - start < PE_GROUP ? k : start + PE_GROUP;
        vi sum = vi_set(0);
        for (int64_t i = start; i < end; i += 4, q += 4 * PE_LANES) {
            vi value[4];
            PE_UNROLL
            for (int r = 0; r < 4; r++) {
                value[r] = i + r < end ? vf_to_int(vf_mul(vf_load(panel + (i + r) * PE_LANES), inverse)) : vi_set(0);
                sum = vi_add(sum, value[r]);
                value[r] = vi_and(value[r], vi_set(0xff));
            }
            const vi low = vi_or(value[0], vi_shl(value[1], 8)), high = vi_or(vi_shl(value[2], 16), vi_shl(value[3], 24));
            vf_store((float *)(void *)q, vi_bits(vi_or(low, high)));
        }
        vi_store_s16(column_sum, sum);
    }
}

static void pack_bf16(const float *panel, int64_t k, uint16_t *to)
{
    for (int64_t i = 0; i < k; i += 2, to += 2 * PE_LANES) {
        const vi even = vi_and(to_bf16(vf_load(panel + i * PE_LANES)), vi_set(0xffff));
        const vi odd = i + 1 < k ? to_bf16(vf_load(panel + (i + 1) * PE_LANES)) : vi_set(0);
        vf_store((float *)(void *)to, vi_bits(vi_or(even, vi_shl(odd, 16))));
    }
}

/* The entries of the codebook, and the border between each and the one before it. */
typedef struct {
    vf entry, border;
} codebook_q4;

static codebook_q4 load_codebook_q4(void)
{
    float entry[PE_LANES], border[PE_LANES] = {0};
    for (int i = 0; i < PE_LANES; i++)
        entry[i] = pe_q4_codebook[i];
    for (int i = 1; i < PE_LANES; i++)
        border[i] = (entry[i - 1] + entry[i]) * 0.5f;
    return (codebook_q4){vf_load(entry), vf_load(border)};
}

/* The index of the nearest entry: a binary search. */
PE_INLINE vi nearest_q4(vf x, const codebook_q4 *book)
{
    vi index = vi_set(0);
    PE_UNROLL
    for (int half = 8; half > 0; half /= 2) {
        const vi upper = vi_add(index, vi_set(half));
        index = vf_bits(vf_select(vf_lt(x, vf_pick(book->border, upper)), vi_bits(index), vi_bits(upper)));
    }
    return index;
}

/* The scale that is best for the entries nearest to panel / scale; `gain` is what it takes off the sum of squares. */
PE_INLINE vf refit_q4(const float *panel, int64_t n, vf scale, const codebook_q4 *book, vf *gain)
{
    const vf inverse = inverse_of(scale);
    vf product = vf_set(0.0f), square = product;
    for (int64_t i = 0; i < n; i++) {
        const vf v = vf_load(panel + i * PE_LANES), entry = vf_pick(book->entry, nearest_q4(vf_mul(v, inverse), book));
        product = vf_fma(v, entry, product);
        square = vf_fma(entry, entry, square);
    }
    const vf best = vf_mul(product, inverse_of(square));
    *gain = vf_mul(product, best);
    return best;
}

/* A scale for n values of each of 16 columns, in bfloat16. */
static vf scale_q4(const float *panel, int64_t n, const codebook_q4 *book)
{
    static const float starts[] = {0.95f, 1.05f};
    vf largest = vf_set(0.0f), size = largest, scale = largest, gain = vf_set(-1.0f);
    for (int64_t i = 0; i < n; i++) {
        const vf v = vf_load(panel + i * PE_LANES), s = vf_max(v, vf_sub(vf_set(0.0f), v));
        largest = vf_select(vf_lt(size, s), v, largest);
        size = vf_max(size, s);
    }
    for (int end = 0; end < 16; end += 15)
        for (int i = 0; i < 2; i++) {
            vf g;
            const vf s = refit_q4(panel, n, vf_mul(largest, vf_set(starts[i] / pe_q4_codebook[end])), book, &g);
            const vm better = vf_lt(gain, g);
            scale = vf_select(better, s, scale);
            gain = vf_select(better, g, gain);
        }
    return vi_bits(vi_shl(to_bf16(refit_q4(panel, n, scale, book, &gain)), 16));
}

static void pack_q4(const float *panel, int64_t k, uint8_t *q, uint16_t *scale, float *weight_sum)
{
    const codebook_q4 book = load_codebook_q4();
    vf sum = vf_set(0.0f);
    for (int64_t start = 0; start < k; start += PE_Q4_GROUP, scale += PE_LANES) {
        const int64_t end = k - start < PE_Q4_GROUP ? k : start + PE_Q4_GROUP;
        const vf step = scale_q4(panel + start * PE_LANES, end - start, &book), inverse = inverse_of(step);
        vf column_sum = vf_set(0.0f); /* of small integers: exact */
        vi_store_s16((int16_t *)scale, vi_sra(vf_bits(step), 16));
        for (int64_t i = start; i < start + PE_Q4_GROUP; i += 8, q += 4 * PE_LANES) {
            vi bits = vi_set(0);
            PE_UNROLL
            for (int r = 0; r < 8; r++) {
                vi code = vi_set(PE_Q4_ZERO);
                if (i + r < end) {
                    code = nearest_q4(vf_mul(vf_load(panel + (i + r) * PE_LANES), inverse), &book);
                    column_sum = vf_add(column_sum, vf_pick(book.entry, code));
                }
                bits = vi_or(bits, vi_shl(code, r % 4 * 8 + r / 4 * 4));
            }
            vf_store((float *)(void *)q, vi_bits(bits));
        }
        sum = vf_fma(step, column_sum, sum);
        if ((start + PE_Q4_GROUP) % PE_GROUP == 0 || start + PE_Q4_GROUP >= k) {
            vf_store(weight_sum, sum);
            weight_sum += PE_LANES;
            sum = vf_set(0.0f);
        }
    }
}
