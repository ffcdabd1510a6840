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

PE_INLINE int read_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride,
                         float *panel)
{
    vf check = vf_set(0.0f);
    for (int64_t i = 0; i < k; i++) {
        float *row = panel + i * PE_LANES;
        for (int64_t j = 0; j < n; j++)
            row[j] = read_value(src, dtype, i * k_stride + j * n_stride);
        for (int64_t j = n; j < PE_LANES; j++)
            row[j] = 0.0f;
        check = vf_add(check, vf_mul(vf_load(row), vf_set(0.0f)));
    }
    return vf_sum(check) == 0.0f;
}

/* The usual cases with constants, so that the compiler makes vectors of them. */
static int load_panel(const void *src, pe_dtype dtype, int64_t k, int64_t k_stride, int64_t n, int64_t n_stride, float *panel)
{
    const int full = n == PE_LANES && n_stride == 1;
    switch (dtype) {
    case PE_F32:
        return full ? read_panel(src, PE_F32, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_F32, k, k_stride, n, n_stride, panel);
    case PE_F16:
        return full ? read_panel(src, PE_F16, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_F16, k, k_stride, n, n_stride, panel);
    default:
        return full ? read_panel(src, PE_BF16, k, k_stride, PE_LANES, 1, panel)
                    : read_panel(src, PE_BF16, k, k_stride, n, n_stride, panel);
    }
}

static void pack_q8(const float *panel, int64_t k, int8_t *q, float *scale, int16_t *column_sum)
{
    vf largest = vf_set(0.0f);
    for (int64_t i = 0; i < k; i++) {
        const vf v = vf_load(panel + i * PE_LANES);
        largest = vf_max(vf_max(v, vf_sub(vf_set(0.0f), v)), largest);
    }
    const vf zero_column = vf_set(1.0f);
    const vf step = vf_select(vf_lt(largest, vf_set(1e-35f)), zero_column, vf_div(largest, vf_set(127.0f)));
    const vf inverse = vf_div(vf_set(1.0f), step);
    vf_store(scale, step);
    for (int64_t start = 0; start < k; start += PE_GROUP, column_sum += PE_LANES) {
        const int64_t end = k - start < PE_GROUP ? k : start + PE_GROUP;
        vi sum = vi_set(0);
        for (int64_t i = start; i < end; i += 4, q += 4 * PE_LANES)
            for (int64_t r = 0; r < 4; r++) {
                vi value = vi_set(0);
                if (i + r < end)
                    value = vf_to_int(vf_mul(vf_load(panel + (i + r) * PE_LANES), inverse));
                sum = vi_add(sum, value);
                int32_t lanes[PE_LANES];
                memcpy(lanes, &value, sizeof lanes);
                for (int j = 0; j < PE_LANES; j++)
                    q[4 * j + r] = (int8_t)lanes[j];
            }
        int32_t lanes[PE_LANES];
        memcpy(lanes, &sum, sizeof lanes);
        for (int j = 0; j < PE_LANES; j++)
            column_sum[j] = (int16_t)lanes[j];
    }
}
