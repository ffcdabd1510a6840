/* AVX-512 with VNNI: Cascade Lake, Ice Lake. */
#include "../level.h"

#if PE_X86
PE_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#include "avx512.inc.h"
#include "avx512_vnni.inc.h"

#define PE_BF16_ROWS_1 8
#define PE_BF16_ROWS_2 6
#define PE_BF16_ROWS_4 3
#define PE_BF16_MANY 2
#include "../kernels.inc.h"

PE_DEFINE_LEVEL(avx512_vnni, PE_CPU_AVX512 | PE_CPU_AVX512_VNNI | PE_CPU_AVX2_FMA, 40)
PE_TARGET_END
#else
PE_NO_LEVEL(avx512_vnni)
#endif
