/* What the machine can do at most. Included by kernels.inc.h. */

/* As many accumulators as the level's tiles of one panel have: fewer would wait for each other, more would not fit. All
 * lanes and weights differ and the activations are forgotten, or a compiler would compute only once what is the same. */
static float spin_f32(int64_t n)
{
    enum { LIVE = PE_F32_ROWS_1 < PE_SPIN ? PE_F32_ROWS_1 : PE_SPIN };
    float lanes[PE_LANES];
    for (int i = 0; i < PE_LANES; i++)
        lanes[i] = (float)i;
    vf acc[LIVE], a = vf_set(0.999f), b = vf_set(1e-3f);
    PE_UNROLL
    for (int i = 0; i < LIVE; i++)
        acc[i] = vf_add(vf_load(lanes), vf_set((float)(i * PE_LANES)));
    for (int64_t r = 0; r < n * PE_SPIN / LIVE; r++) {
        PE_UNROLL
        for (int i = 0; i < LIVE; i++)
            acc[i] = vf_mad(a, b, acc[i]);
    }
    PE_UNROLL
    for (int i = 1; i < LIVE; i++)
        acc[0] = vf_add(acc[0], acc[i]);
    return vf_sum(acc[0]);
}

static float spin_bf16(int64_t n)
{
    enum { LIVE = PE_BF16_ROWS_1 < PE_SPIN ? PE_BF16_ROWS_1 : PE_SPIN };
    uint16_t values[2 * PE_LANES];
    for (int i = 0; i < 2 * PE_LANES; i++)
        values[i] = (uint16_t)(0x3f80 + i);
    const vb w = vb_weights(values);
    vb a = vb_activations(values);
    vf acc[LIVE];
    PE_UNROLL
    for (int i = 0; i < LIVE; i++)
        acc[i] = vf_set((float)i);
    for (int64_t r = 0; r < n * PE_SPIN / LIVE; r++) {
        PE_FORGET(a);
        PE_UNROLL
        for (int i = 0; i < LIVE; i++)
            vb_dot(&acc[i], a, w);
    }
    PE_UNROLL
    for (int i = 1; i < LIVE; i++)
        acc[0] = vf_add(acc[0], acc[i]);
    return vf_sum(acc[0]);
}

#ifndef vq_peak_dot
#define vq_peak_dot vq_dot
#endif

static int32_t spin_q8(int64_t n)
{
    enum { LIVE = PE_Q8_ROWS_1 < PE_SPIN ? PE_Q8_ROWS_1 : PE_SPIN };
    int8_t bytes[4 * PE_LANES];
    for (int i = 0; i < 4 * PE_LANES; i++)
        bytes[i] = (int8_t)i;
    vq_w w = vq_weights(bytes);
    vq_a a = vq_activations((const uint8_t *)bytes);
    vi acc[LIVE];
    PE_UNROLL
    for (int i = 0; i < LIVE; i++)
        acc[i] = vi_set(i);
    for (int64_t r = 0; r < n * PE_SPIN / LIVE; r++) {
        PE_UNROLL
        for (int i = 0; i < LIVE; i++) {
            PE_FORGET(a);
            vq_peak_dot(&acc[i], a, w);
        }
    }
    PE_UNROLL
    for (int i = 1; i < LIVE; i++)
        acc[0] = vi_add(acc[0], acc[i]);
    return (int32_t)vf_sum(vi_to_float(acc[0])); /* all lanes, or the others would not be computed */
}

static float read_bytes(const void *p, int64_t n)
{
    vi acc[4];
    PE_UNROLL
    for (int i = 0; i < 4; i++)
        acc[i] = vi_set(0);
    const float *x = p;
    for (int64_t i = 0; i < n / 4; i += 4 * PE_LANES)
        PE_UNROLL
        for (int j = 0; j < 4; j++)
            acc[j] = vi_or(acc[j], vf_bits(vf_load(x + i + j * PE_LANES)));
    return vf_sum(vi_to_float(vi_or(vi_or(acc[0], acc[1]), vi_or(acc[2], acc[3]))));
}
