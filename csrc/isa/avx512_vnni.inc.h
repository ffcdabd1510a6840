/* int8 by vpdpbusd, for the levels that have AVX-512 VNNI. Meaning of each: ../kernels.inc.h. */
typedef vi vq_a;
typedef vi vq_w;

PE_INLINE vq_w vq_weights(const int8_t *p) { return _mm512_loadu_si512(p); }
PE_INLINE vq_a vq_activations(const uint8_t *p) { return _mm512_set1_epi32(pe_load_i32(p)); }

/* As assembly, since gcc 12 keeps 24 accumulators of the intrinsic on the stack: a third of the speed. */
PE_INLINE void vq_dot(vi *acc, vq_a a, vq_w w)
{
#if PE_MSVC
    *acc = _mm512_dpbusd_epi32(*acc, a, w);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*acc) : "v"(a), "v"(w));
#endif
}

PE_INLINE void vq_nibbles(const uint8_t *p, const int8_t *table, vq_w *low, vq_w *high) { nibbles(p, table, low, high); }
PE_INLINE void vq_sum(vi *acc, vq_w low, vq_w high)
{
    vq_dot(acc, _mm512_set1_epi8(1), low);
    vq_dot(acc, _mm512_set1_epi8(1), high);
}

#define PE_Q8_ROWS_1 12
#define PE_Q8_ROWS_2 12
#define PE_Q8_ROWS_4 6
#define PE_Q8_MANY 2
#define PE_Q8_FAST 3
#define PE_Q4_ROWS_1 12
#define PE_Q4_ROWS_2 8
#define PE_Q4_ROWS_4 3
#define PE_Q4_MANY 2
#define PE_Q4_UNPACK 24
#define PE_Q4_UNPACKED_ROWS 6 /* 12 accumulators, and the 12 sums that they go to */
#define PE_Q4_UNPACKED_PANELS 2
