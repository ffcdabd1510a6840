# csrc/kernels.h for Cython; what each entry means stands there.
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t

cdef extern from "kernels.h" nogil:
    enum: PE_LANES
    enum: PE_GROUP
    enum: PE_PAGE
    enum: PE_Q4_GROUP
    enum: PE_SPIN
    enum:
        PE_CPU_AVX2_FMA
        PE_CPU_AVX512
        PE_CPU_AVX512_VNNI
        PE_CPU_NEON_DOT
        PE_CPU_AVX512_BF16
        PE_CPU_AVX_VNNI

    ctypedef enum pe_activation:
        PE_ACT_NONE
        PE_ACT_GELU_TANH
        PE_ACT_GELU_ERF
        PE_ACT_GELU_SIGMOID
        PE_ACT_RELU
        PE_ACT_SILU
        PE_ACT_TANH
        PE_ACT_GELU_TANH_COARSE

    ctypedef enum pe_dtype:
        PE_F32
        PE_F16
        PE_BF16

    ctypedef struct pe_weights_f32:
        const float *panels
        int64_t k
        const void *next

    ctypedef struct pe_weights_bf16:
        const uint16_t *panels
        int64_t k
        const void *next

    ctypedef struct pe_weights_q4:
        const uint8_t *panels
        const uint16_t *scale
        const float *weight_sum
        int64_t k

    ctypedef struct pe_weights_q8:
        const int8_t *panels
        const int16_t *column_sum
        const float *scale
        int64_t k

    ctypedef struct pe_rows_q8:
        const uint8_t *q
        const float *scale
        const int32_t *offset
        int64_t stride

    ctypedef struct pe_output:
        const float *bias
        const float *residual
        int64_t residual_stride
        float *out
        int64_t out_stride

    ctypedef struct pe_kernels:
        const char *name
        uint32_t requires
        int priority
        void (*matmul_f32)(const float *, int64_t, int64_t, const pe_weights_f32 *, int64_t, int64_t, const pe_output *) noexcept nogil
        void (*matmul_q8)(const pe_rows_q8 *, int64_t, const pe_weights_q8 *, int64_t, int64_t, const pe_output *) noexcept nogil
        void (*matmul_bf16)(const uint16_t *, int64_t, int64_t, const pe_weights_bf16 *, int64_t, int64_t, const pe_output *) noexcept nogil
        void (*matmul_q4)(const pe_rows_q8 *, int64_t, const pe_weights_q4 *, int64_t, int64_t, const pe_output *) noexcept nogil
        void (*accumulate_f32)(const float *, int64_t, int64_t, int64_t, int64_t, const pe_weights_f32 *, int64_t,
                               const float *, float *, int64_t) noexcept nogil
        void (*accumulate_bf16)(const uint16_t *, int64_t, int64_t, int64_t, const pe_weights_bf16 *, int64_t,
                                const float *, float *, int64_t) noexcept nogil
        void (*quantize_q8)(const float *, int64_t, uint8_t *, float *, int32_t *) noexcept nogil
        void (*narrow_bf16)(const float *, int64_t, uint16_t *) noexcept nogil
        void (*layer_norm)(const float *, int64_t, const float *, const float *, float, float *) noexcept nogil
        void (*activate)(pe_activation, float *, int64_t) noexcept nogil
        void (*softmax_rows)(float *, int64_t, int64_t, int64_t, float, float *, float *, uint16_t *) noexcept nogil
        void (*softmax_end)(const float *, float *, int64_t) noexcept nogil
        void (*softmax)(const float *, int64_t, float *) noexcept nogil
        float (*row_max)(const float *, int64_t) noexcept nogil
        double (*exp_sum)(const float *, int64_t, float, float, float *) noexcept nogil
        float (*spin_f32)(int64_t) noexcept nogil
        float (*spin_bf16)(int64_t) noexcept nogil
        int32_t (*spin_q8)(int64_t) noexcept nogil
        float (*read)(const void *, int64_t) noexcept nogil
        int (*load_panel)(const void *, pe_dtype, int64_t, int64_t, int64_t, int64_t, const float *, const float *,
                          float *) noexcept nogil
        void (*largest)(const void *, pe_dtype, int64_t, int64_t, bint, float *) noexcept nogil
        void (*panel_squares)(const float *, int64_t, float *) noexcept nogil
        void (*pack_q8)(const float *, int64_t, int8_t *, float *, int16_t *) noexcept nogil
        void (*pack_bf16)(const float *, int64_t, uint16_t *) noexcept nogil
        void (*pack_q4)(const float *, int64_t, uint8_t *, uint16_t *, float *) noexcept nogil
        void (*turn_words)(const void *, int64_t, int64_t, void *) noexcept nogil
        float (*narrow_q8)(const float *, int64_t, int8_t *) noexcept nogil
        void (*widen_keys_q8)(const int8_t *, const float *, int64_t, int64_t, float *) noexcept nogil
        void (*widen_values_q8)(const int8_t *, const float *, int64_t, int64_t, float *) noexcept nogil
        void (*score_q8)(const float *, int64_t, const int8_t *, const float *, int64_t, const void *, float *) noexcept nogil
        void (*accumulate_q8)(const float *, int64_t, const int8_t *, const float *, int64_t, const void *, float,
                              float *) noexcept nogil

    uint32_t pe_cpu_features()
    const pe_kernels *pe_level(int)
