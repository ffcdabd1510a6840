/* Elementary functions on the 16-lane primitives. A level's file includes this once it has defined them.
 *
 * Contract: at most 2 ULP from the exact real-number value (ULP: the spacing of float32 there), 4 where |result| <
 * 1e-30, with gradual underflow; NaN gives NaN, an infinity gives the limit. No branches, no libc, one sequence of
 * operations at every level; to be compiled with -ffp-contract=off and without -ffast-math, and run without flushing
 * subnormals to zero. vf_min(a, b) and vf_max(a, b) must give NaN where b is NaN.
 *
 * How: every exponential is 2^w with w = r +- m, m whole, |r| <= 1/2. r is had by FMA from w in two floats: its error
 * of about 2^-26 costs 0.17 * 2^-24 of the result, where w = 100 in one float would cost 44 * 2^-24. x sigmoid and x
 * Phi are computed for a = |x| only, z = a sigmoid(-a), without cancellation and with the scaling by 2^-m put off to
 * the end, where it rounds once; then f(x) = -z for x < 0 and x - z for x > 0. Rounding errors on the way are
 * carried along where the bound needs it: every product, sum or low part here that looks idle is one of those.
 */

#define VM_ROUND 0x1.8p23f /* added to |v| < 2^22: rounds to a whole number and leaves that in the low bits */

/* 2^(k + bias) for k = the whole number in the low bits of v's pattern, v = VM_ROUND + k. */
static inline vf vm_pow2(vi v, const int bias) {
    return vi_bits(vi_add(vi_shl(v, 23), vi_set((127 + bias) << 23)));
}

/* 2^r - 1 + low, |r| <= 1/2, |low| <= 2^-24: degree 6, minimax (Remez) for (2^r - 1 - p(r)) / 2^r on [-0.5003, 0.5005]
 * with p(0) = 0, the linear coefficient in two floats, coefficients rounded one by one and the rest refitted:
 * 0.06 * 2^-24. */
static inline vf vm_exp2m1_plus(vf r, vf low) {
    vf p = vf_fma(r, vf_set(0x1.42c7b4p-13f), vf_set(0x1.5f4f30p-10f));
    p = vf_fma(r, p, vf_set(0x1.3b2acap-7f));
    p = vf_fma(r, p, vf_set(0x1.c6aeacp-5f));
    p = vf_fma(r, p, vf_set(0x1.ebfbe2p-3f));
    p = vf_fma(r, p, vf_set(0x1.1851eap-25f));
    return vf_fma(r, vf_set(0x1.62e430p-1f), vf_fma(r, p, low));
}

/* e^x = 2^m (1 + t): the parts that vm_exp and vm_exp_neg put together. *v gets VM_ROUND + m. */
static inline vf vm_exp_parts(vf x, vf *v) {
    vf log2e = vf_set(0x1.715476p+0f), log2e_low = vf_set(0x1.4ae0c0p-26f);
    *v = vf_fma(log2e, x, vf_set(VM_ROUND));
    vf r = vf_fma(log2e, x, vf_sub(vf_set(VM_ROUND), *v));
    return vm_exp2m1_plus(vf_fma(log2e_low, x, r), vf_set(0));
}

/* e^x. 2^m goes into two factors, since m runs from -151 to 128. */
static inline vf vm_exp(vf x) {
    vf v;
    vf t = vm_exp_parts(vf_min(vf_set(89), vf_max(vf_set(-105), x)), &v);
    vi half = vi_sra(vf_bits(v), 1); /* of VM_ROUND's own pattern vm_pow2 still keeps only zeros */
    vf scale = vm_pow2(half, 0), rest = vm_pow2(vi_sub(vf_bits(v), half), 0);
    return vf_mul(vf_fma(t, scale, scale), rest);
}

/* e^x for x <= 0, with 0 for x < -87.3: for softmax. */
static inline vf vm_exp_neg(vf x) {
    vf v;
    vf t = vm_exp_parts(x, &v), scale = vm_pow2(vf_bits(v), 0);
    return vf_select(vf_lt(x, vf_set(-87.3f)), vf_set(0), vf_fma(t, scale, scale));
}

/* 2^x for -100 < x <= 0, at most 2^-13 off relatively: degree 3, minimax for the relative error on [-0.5, 0.5] with p(0) = 1,
 * found as vm_exp2m1_plus was. */
static inline vf vm_exp2_coarse(vf x) {
    vf v = vf_add(x, vf_set(VM_ROUND)), r = vf_sub(x, vf_sub(v, vf_set(VM_ROUND)));
    vf p = vf_fma(r, vf_set(0x1.c2a14ep-5f), vf_set(0x1.f00d22p-3f));
    p = vf_fma(r, vf_fma(r, p, vf_set(0x1.62f602p-1f)), vf_set(1));
    return vi_bits(vi_add(vf_bits(p), vi_shl(vf_bits(v), 23)));
}

/* The same for all x <= 0, 0 for x < -49: for weights that become bfloat16. */
static inline vf vm_exp2_weight(vf x) { return vf_select(vf_lt(x, vf_set(-49)), vf_set(0), vm_exp2_coarse(x)); }

/* a / (1 + 2^(m + r)) for a >= 0, 0 <= m <= 190, v = VM_ROUND - m, as a 2^-m / (2^-m + 2^r). */
static inline vf vm_gate(vf a, vf v, vf r) {
    vf scale = vm_pow2(vf_bits(v), 64); /* 2^(64 - m) stays a normal number, so only the last product can underflow */
    vf unscale = vf_set(0x1p-64f), one = vf_set(1);
    vf base = vf_fma(scale, unscale, one); /* 1 + 2^-m, exact up to m = 23; what it loses above is added below */
    vf d = vf_add(base, vm_exp2m1_plus(r, vf_fma(scale, unscale, vf_sub(one, base))));
    return vf_mul(vf_div(vf_mul(a, scale), d), unscale);
}

/* |x|, at most `limit`: the clamp keeps the exponent in range where the result has long become x or 0. */
static inline vf vm_abs(vf x, float limit) {
    return vf_min(vf_set(limit), vi_bits(vi_and(vf_bits(x), vi_set(0x7fffffff))));
}

/* x with all bits but its sign cleared. */
static inline vf vm_sign(vf x) { return vi_bits(vi_and(vf_bits(x), vi_set(INT32_MIN))); }

/* f(x) from z = -f(-|x|), for f with f(x) - f(-x) = x. The sign is taken from x because clang 14 makes a maximum of
 * `x < 0 ? -0.0 : x`, which turns f(0) into -0. */
static inline vf vm_unfold(vf x, vf z) { return vf_sub(vf_select(vf_lt(x, vf_set(0)), vm_sign(x), x), z); }

/* a / (1 + e^(k a)), k log2(e) = rate + rate_low. */
static inline vf vm_logistic(vf num, vf a, float rate, float rate_low) {
    vf v = vf_fnma(vf_set(rate), a, vf_set(VM_ROUND));
    vf r = vf_fma(vf_set(rate), a, vf_sub(v, vf_set(VM_ROUND)));
    return vm_gate(num, v, vf_fma(vf_set(rate_low), a, r));
}

/* x sigmoid(x) */
static inline vf vm_silu(vf x) {
    vf a = vm_abs(x, 112);
    return vm_unfold(x, vm_logistic(a, a, 0x1.715476p+0f, 0x1.4ae0c0p-26f));
}

/* x sigmoid(1.702 x) */
static inline vf vm_gelu_sigmoid(vf x) {
    vf a = vm_abs(x, 66);
    return vm_unfold(x, vm_logistic(a, a, 0x1.3a4cbep+1f, -0x1.c08ecap-26f));
}

/* x sigmoid(c (x + k x^3)), k = 0.044715, c = 2 sqrt(2 / pi): the exponent is C m with C = c k log2(e) and
 * m = |x| (x^2 + 1 / k) in two floats. */
static inline vf vm_gelu_tanh(vf x) {
    vf a = vm_abs(x, 11);
    vf inv_k = vf_set(0x1.65d26p+4f), c = vf_set(0x1.a5a7d0p-4f); /* 1 / k to 21 bits: inv_k - q is exact */
    vf q = vf_fma(a, a, inv_k);
    vf q_low = vf_add(vf_fma(a, a, vf_sub(inv_k, q)), vf_set(-0x1.226128p-20f));
    vf m = vf_mul(a, q);
    vf minus_low = vf_fnma(a, q_low, vf_fnma(a, q, m));
    minus_low = vf_fnma(vf_set(-0x1.507a18p-26f), m, minus_low); /* C's own low part, in units of c */
    vf v = vf_fnma(c, m, vf_set(VM_ROUND));
    vf r = vf_fma(c, m, vf_sub(v, vf_set(VM_ROUND)));
    return vm_unfold(x, vm_gate(a, v, vf_fnma(c, minus_low, r)));
}

/* The same, at most 2^-12 off relatively, or 2^-45: for what becomes bfloat16 or int8. */
static inline vf vm_gelu_tanh_coarse(vf x) {
    vf a = vm_abs(x, 6.8125f), rate = vf_fma(vf_mul(a, a), vf_set(-0x1.a5a7d0p-4f), vf_set(-0x1.26aec2p+1f));
    vf e = vm_exp2_coarse(vf_mul(a, rate));
    return vf_sub(vf_max(vf_set(0), x), vf_div(vf_mul(a, e), vf_add(vf_set(1), e)));
}

/* x Phi(x). Phi(-a) = e^(-a^2 / 2) / D(a), D = 2 + a (2 + s(a)). s runs from -0.40 (a = 0) through 0 (a = 2.2) to
 * sqrt(2 pi) - 2 = 0.51, so that its own rounding errors hardly matter: P4(a) / Q4(a) on [0, 14.6], minimax (Lawson's
 * iteration) for the relative error of D, with half the weight above 11.7, coefficients rounded one by one and the rest
 * refitted: 0.18 * 2^-24. 2 + s, D and a / D are carried in two floats. */
static inline vf vm_gelu_erf(vf x) {
    vf a = vm_abs(x, 14.5f), two = vf_set(2);
    vf p = vf_fma(a, vf_set(0x1.0d73bep-8f), vf_set(0x1.928b74p-6f));
    p = vf_fma(a, p, vf_set(0x1.64d51ap-5f));
    p = vf_fma(a, p, vf_set(-0x1.47672ep-4f));
    p = vf_fma(a, p, vf_set(-0x1.9dee8ep-2f));
    vf q = vf_fma(a, vf_set(0x1.09f18cp-7f), vf_set(0x1.49c2acp-4f));
    q = vf_fma(a, q, vf_set(0x1.7500c0p-2f));
    q = vf_fma(a, q, vf_set(0x1.bf51ccp-1f));
    q = vf_fma(a, q, vf_set(1));
    vf s = vf_div(p, q), slope = vf_add(two, s), slope_low = vf_sub(s, vf_sub(slope, two));
    vf d = vf_fma(a, slope, two), d_low = vf_fma(a, slope_low, vf_fma(a, slope, vf_sub(two, d)));

    vf inv_d = vf_div(vf_set(1), d), y = vf_mul(a, inv_d);
    vf y_low = vf_mul(inv_d, vf_fnma(y, d_low, vf_fnma(y, d, a)));

    vf rate = vf_set(0x1.715476p-1f), a2 = vf_mul(a, a); /* 2^-(rate a^2), a^2 in two floats */
    vf v = vf_fma(rate, a2, vf_set(VM_ROUND));
    vf r = vf_fnma(rate, a2, vf_sub(v, vf_set(VM_ROUND)));
    vf minus_low = vf_fnma(vf_set(0x1.cab1b8p-27f), a2, vf_fnma(a, a, a2)); /* and rate's low part, in units of rate */
    vf t = vm_exp2m1_plus(vf_fma(rate, minus_low, r), vf_set(0));

    vf z = vf_add(y, vf_fma(y, t, vf_fma(y_low, t, y_low)));
    vf scale = vm_pow2(vi_sub(vi_set(0), vf_bits(v)), 64);
    return vm_unfold(x, vf_mul(vf_mul(z, scale), vf_set(0x1p-64f)));
}

/* tanh(x) = 1 - 2 / (1 + e^(2 |x|)) with x's sign; below 0.625, where that cancels, x + x^3 p(x^2): p of degree 4,
 * minimax (Remez) for the relative error of tanh on [0.01, 0.626], coefficients rounded one by one and the rest
 * refitted: 0.08 * 2^-24. */
static inline vf vm_tanh(vf x) {
    vf a = vm_abs(x, 10);
    vf far = vf_sub(vf_set(1), vm_logistic(vf_set(2), a, 0x1.715476p+1f, 0x1.4ae0c0p-25f));
    vf x2 = vf_mul(a, a);
    vf p = vf_fma(x2, vf_set(-0x1.750ce2p-8f), vf_set(0x1.51f8cep-6f));
    p = vf_fma(x2, p, vf_set(-0x1.b835a4p-5f));
    p = vf_fma(x2, p, vf_set(0x1.1106f6p-3f));
    p = vf_fma(x2, p, vf_set(-0x1.555532p-2f));
    vf near = vf_fma(vf_mul(a, x2), p, a);
    vf y = vf_select(vf_lt(a, vf_set(0.625f)), near, far);
    return vi_bits(vi_or(vf_bits(y), vf_bits(vm_sign(x))));
}

/* max(x, 0), with NaN for NaN at every level. */
static inline vf vm_relu(vf x) { return vf_select(vf_lt(x, vf_set(0)), vf_set(0), x); }
