// The C names of earlier releases, each one line over bnb.h: programs bind some of them directly.
//
// Element types and formats are part of these names, sizes have 32 bits, and nothing is returned: a failure stays the
// last status and error of the thread, which the Python binding raises. Names without a stream use the default one. A
// name whose kernel bnb.h does not have is not here, so that probing for it gives an honest answer.

#include "../bnb.h"

#define BNB_LEGACY extern "C" BNB_API

// (de)quantize block-wise on the CPU, 8-bit with a map and 4-bit by name
#define BNB_CPU_BLOCKWISE(suffix, dtype)                                                             \
    BNB_LEGACY void cquantize_blockwise_cpu_##suffix(                                                \
        float* code, void* A, float* absmax, uint8_t* out, long long blocksize, long long n) {       \
        bnb_cpu_quantize_blockwise(code, A, dtype, out, absmax, n, blocksize, 0);                    \
    }                                                                                                \
    BNB_LEGACY void cdequantize_blockwise_cpu_##suffix(                                              \
        float* code, uint8_t* A, float* absmax, void* out, long long blocksize, long long n) {       \
        bnb_cpu_dequantize_blockwise(code, A, absmax, out, dtype, n, blocksize, 0);                  \
    }                                                                                                \
    BNB_LEGACY void cdequantize_blockwise_cpu_fp4_##suffix(                                          \
        uint8_t* A, const float* absmax, void* out, long long blocksize, long long m, long long n) { \
        bnb_cpu_dequantize_4bit(A, absmax, BNB_FORMAT_FP4, out, dtype, m * n, blocksize, 0);         \
    }                                                                                                \
    BNB_LEGACY void cdequantize_blockwise_cpu_nf4_##suffix(                                          \
        uint8_t* A, const float* absmax, void* out, long long blocksize, long long m, long long n) { \
        bnb_cpu_dequantize_4bit(A, absmax, BNB_FORMAT_NF4, out, dtype, m * n, blocksize, 0);         \
    }

BNB_CPU_BLOCKWISE(fp32, BNB_DTYPE_FLOAT32)
BNB_CPU_BLOCKWISE(fp16, BNB_DTYPE_FLOAT16)
BNB_CPU_BLOCKWISE(bf16, BNB_DTYPE_BFLOAT16)

// 4-bit times bfloat16 activations on the CPU, the weight in tiles
#define BNB_CPU_GEMV(name, format)                                                                       \
    BNB_LEGACY void gemv_4bit_inference_cpu_##name##_bf16(                                               \
        int64_t M, int64_t N, int64_t K, const void* x, const uint8_t* w, const void* absmax, void* out, \
        int64_t blocksize, int64_t x_stride, int64_t out_stride) {                                       \
        bnb_cpu_gemm_4bit_tiled(x, w, absmax, format, out, M, N, K, blocksize, x_stride, out_stride, 0); \
    }

BNB_CPU_GEMV(fp4, BNB_FORMAT_FP4)
BNB_CPU_GEMV(nf4, BNB_FORMAT_NF4)

BNB_LEGACY bool has_avx512f_cpu(void) { return bnb_cpu_has_avx512f(); }

BNB_LEGACY bool has_avx512bf16_cpu(void) { return bnb_cpu_has_avx512bf16(); }

#ifdef BNB_WITH_CUDA

// Dequantize block-wise on the GPU, 8-bit with a map and 4-bit by name (the map is then ignored)
#define BNB_CUDA_DEQUANTIZE(suffix, dtype)                                                                    \
    BNB_LEGACY void cdequantize_blockwise_##suffix(                                                           \
        float* code, uint8_t* A, float* absmax, void* out, int32_t blocksize, int32_t n, bnb_stream stream) { \
        bnb_cuda_dequantize_blockwise(code, A, absmax, out, dtype, n, blocksize, stream);                     \
    }                                                                                                         \
    BNB_LEGACY void cdequantize_blockwise_##suffix##_fp4(                                                     \
        float*, uint8_t* A, float* absmax, void* out, int32_t blocksize, int32_t n, bnb_stream stream) {      \
        bnb_cuda_dequantize_4bit(A, absmax, BNB_FORMAT_FP4, out, dtype, n, blocksize, stream);                \
    }                                                                                                         \
    BNB_LEGACY void cdequantize_blockwise_##suffix##_nf4(                                                     \
        float*, uint8_t* A, float* absmax, void* out, int32_t blocksize, int32_t n, bnb_stream stream) {      \
        bnb_cuda_dequantize_4bit(A, absmax, BNB_FORMAT_NF4, out, dtype, n, blocksize, stream);                \
    }

BNB_CUDA_DEQUANTIZE(fp32, BNB_DTYPE_FLOAT32)
BNB_CUDA_DEQUANTIZE(fp16, BNB_DTYPE_FLOAT16)
BNB_CUDA_DEQUANTIZE(bf16, BNB_DTYPE_BFLOAT16)

// Quantize block-wise on the GPU and the default stream, 8-bit with a map and 4-bit by name
#define BNB_CUDA_QUANTIZE(suffix, dtype)                                                      \
    BNB_LEGACY void cquantize_blockwise_##suffix(                                             \
        float* code, void* A, float* absmax, uint8_t* out, int32_t blocksize, int32_t n) {    \
        bnb_cuda_quantize_blockwise(code, A, dtype, out, absmax, n, blocksize, nullptr);      \
    }                                                                                         \
    BNB_LEGACY void cquantize_blockwise_##suffix##_fp4(                                       \
        float*, void* A, float* absmax, uint8_t* out, int32_t blocksize, int32_t n) {         \
        bnb_cuda_quantize_4bit(A, dtype, BNB_FORMAT_FP4, out, absmax, n, blocksize, nullptr); \
    }                                                                                         \
    BNB_LEGACY void cquantize_blockwise_##suffix##_nf4(                                       \
        float*, void* A, float* absmax, uint8_t* out, int32_t blocksize, int32_t n) {         \
        bnb_cuda_quantize_4bit(A, dtype, BNB_FORMAT_NF4, out, absmax, n, blocksize, nullptr); \
    }

BNB_CUDA_QUANTIZE(fp32, BNB_DTYPE_FLOAT32)
BNB_CUDA_QUANTIZE(fp16, BNB_DTYPE_FLOAT16)
BNB_CUDA_QUANTIZE(bf16, BNB_DTYPE_BFLOAT16)

// 4-bit matmuls on the GPU. The naive one multiplies one row of activations: m is the outputs, n is 1; leading
// dimensions say nothing new, since rows start on a new block.
#define BNB_CUDA_GEMM(suffix, dtype)                                                                                   \
    BNB_LEGACY void cgemm_4bit_inference_naive_##suffix(                                                               \
        int32_t m, int32_t, int32_t k, void* A, uint8_t* B, float* absmax, float* datatype, void* out, int32_t,        \
        int32_t, int32_t, int32_t blocksize, bnb_stream stream) {                                                      \
        bnb_cuda_gemm_4bit(                                                                                            \
            A, dtype, B, absmax, nullptr, nullptr, nullptr, datatype, BNB_FORMAT_NF4, nullptr, out, 1, m, k,           \
            blocksize, BNB_GEMM_FUSED, nullptr, stream);                                                               \
    }                                                                                                                  \
    BNB_LEGACY void cgemm_4bit_##suffix(                                                                               \
        void* A, uint8_t* B, float* absmax, uint8_t* absmax_8bit, float* absmax_code, float* absmax_offset, void* out, \
        void* bias, int32_t M, int32_t N, int32_t K, int32_t blocksize, int32_t quant_type, bnb_stream stream) {       \
        bnb_cuda_gemm_4bit(                                                                                            \
            A, dtype, B, absmax, absmax_8bit, absmax_code, absmax_offset, nullptr,                                     \
            static_cast<bnb_format>(quant_type), bias, out, M, N, K, blocksize, BNB_GEMM_FUSED, nullptr, stream);      \
    }

BNB_CUDA_GEMM(fp32, BNB_DTYPE_FLOAT32)
BNB_CUDA_GEMM(fp16, BNB_DTYPE_FLOAT16)
BNB_CUDA_GEMM(bf16, BNB_DTYPE_BFLOAT16)

// An opaque handle: no vendor library stands behind it, and functions that take one ignore it.
BNB_LEGACY void* get_context(void) {
    static char handle;
    return &handle;
}

BNB_LEGACY void* cget_managed_ptr(size_t bytes) {
    void* memory = nullptr;
    bnb_cuda_managed_alloc(&memory, static_cast<int64_t>(bytes));
    return memory;
}

BNB_LEGACY void cprefetch(void* memory, size_t bytes, int32_t device) {
    bnb_cuda_managed_prefetch(memory, static_cast<int64_t>(bytes), device, nullptr);
}

#endif
