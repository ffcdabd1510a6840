/* All kernels of a level, written once over the primitives that the level's file (isa/NAME.c) defines before this:
 *
 * vf, vi, vm          16 floats, 16 int32, a mask of 16 lanes
 * vf_load vf_store    any address; vf_load_part(p, n) the first n lanes, zeros behind; vf_store_part(p, a, n)
 * vf_set vi_set       one value in all lanes; vm_first(n) the first n lanes
 * vf_zip_low high     a0 b0 a1 b1 ... of the lower 8 lanes, of the higher ones
 * vf_add sub mul div  lane by lane, correctly rounded; vi_add sub mul and or min max wrap
 * vi_words vi_mul16   16 int16, made ready; their products with one number of 16 bits
 * vf_min vf_max       the second operand where either is NaN
 * vf_fma vf_fnma      a * b + c and c - a * b with one rounding, at every level
 * vf_mad              a * b + c, fused where the level has FMA: for long sums
 * vf_round vf_to_int  to the nearest integer, ties to even, INT32_MIN for NaN and what doesn't fit; vi_to_float
 * vf_bits vi_bits     reinterpret; vi_shl vi_sra by a constant
 * vf_lt vf_select     (a < b) as a mask; mask ? a : b; vf_pick(table, i) the table's lanes i, 0 to 15
 * vf_sum hmax hmin    across the lanes by the fixed tree (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1)
 * vi_load_s16 s8      16 int16, 16 int8; vi_store_s16 s8 u8 (p, a) 16 integers, clamped to what they can be
 * vq_w vq_weights     64 bytes of packed int8 weights, made ready; vq_a vq_activations 4 bytes of a row, in all lanes
 * PE_Q8_ORIGIN        what vq_activations takes away from each value: 0, or 128 where a product needs them signed; PE_Q4_ORIGIN for
 *                     int4, if it is another
 * vq_dot(&acc, a, w)  acc += the sum of the 4 products, exact. vq_peak_dot, what int8 takes, where it is another
 * vq_nibbles(p, table, &low, &high)  64 bytes as 2 x 64 weights: table[4 low bits], table[4 high bits] of each byte
 * vq_sum(&acc, low, high)  acc += the sum of the 4 weights of each, for at most a group of int4; not where PE_Q4_READS_SUMS
 * PE_Q4_READS_SUMS    1 where a level reads weight_sum of int4, since it computes for longer than that takes to come; 0 if not
 *                     defined: then it adds weights up on the way. With 1, PE_Q4_ORIGIN is 0, since nothing else would correct it
 * PE_OWN_GROUP        defined where a level makes int8 activations of a group ready for all panels: vq_group_q8, vq_make_ready,
 *                     group_q8 (tiles_int8.inc.h)
 * PE_Q4_UNPACK        the fewest rows for which int4 weights are unpacked to memory first, where a level does that, with
 *                     PE_Q4_UNPACKED_ROWS and PANELS of a tile of these; PE_Q4_ORIGIN is 0. With PE_OWN_GROUP it is one panel, and
 *                     there is vq_dot_at(&acc, a, p), vq_dot of 64 bytes of int8 weights as they lie
 * PE_BF16_DOT         defined where the level has vdpbf16ps, with vb, vb_weights, vb_activations, vb_dot (tiles_float.inc.h), and
 *                     vf_store_bf16, vf_store_bf16_normal (rows.inc.h)
 * PE_PIN(v)           keeps v in a register, where a compiler would not; vf_mad_to(&acc, a, b) acc = vf_mad(a, b, acc) likewise, if
 *                     a level defines it
 * PE_F32_ROWS_1 2 4   the most rows of a float32 tile 1, 2, 4 panels wide; PE_F32_MANY the width for many rows; PE_BF16_,
 *                     PE_Q8_ and PE_Q4_ likewise
 * PE_F32_UNROLL       how many values of k a float32 tile of many rows adds between two steps of its pointers; 1 if not defined
 * PE_WIDE_BF16        the fewest rows of a product of tiles_wide_bf16.inc.h, where a level has those
 * PE_Q8_STREAM        up to how many rows int8 goes panel by panel; 12 if not defined
 * PE_F32_FAR          up to how many rows the lines that a tile of float32 asks for come into the L2 cache alone, not into the L1
 *                     cache; PE_BF16_, PE_Q8_ and PE_Q4_ likewise; 12 if not defined. PE_STREAMS has a rule of its own
 * PE_Q8_FAST          the most rows that int8 weights from memory meet without waiting for them, where a level streams these */

#include "vecmath.inc.h"
#include "rows.inc.h"
#include "tiles.inc.h"
#include "pack.inc.h"
#include "kv.inc.h"
#include "limits.inc.h"
