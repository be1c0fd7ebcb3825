// The LLM.int8() kernels as a table of their own: they are compiled for one more instruction set than the others
// (VNNI).
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace bnb {

// Row and column quantization of A [rows, cols]. Optional: outlier_cols [cols], zero on entry; the column results.
template <class T>
struct Int8Quantization {
    const T* A;
    int8_t* by_row;
    float* row_stats;
    int8_t* by_column;
    float* col_stats;
    uint8_t* outlier_cols;
    int64_t rows, cols;
    float threshold;
};

// sums [M, N] = A [M, K] times the transpose of B [N, K].
struct Int8Product {
    const int8_t* A;
    const int8_t* B;
    int64_t M, N, K;
};

// What turns sums into values: sums * row_stats [M] * col_stats [N] / 127^2 + an optional bias [N].
template <class T>
struct Int8Scaling {
    const float* row_stats;
    const float* col_stats;
    const float* bias;
    T* out;
    int64_t M, N;
};

// out [M, N] = A [M, K], quantized on the way, times the transpose of B [N, K] with row scales col_stats. Columns of A
// with a magnitude of at least threshold are flagged in outlier_cols [K], zero on entry, and not quantized; null is
// none.
template <class T>
struct Int8Linear {
    const T* A;
    const int8_t* B;
    const float* col_stats;
    const float* bias;
    T* out;
    uint8_t* outlier_cols;
    int64_t M, N, K;
    float threshold;
};

template <class T>
struct TypedInt8Kernels {
    void (*quantize)(const Int8Quantization<T>& problem, int32_t threads);
    void (*linear)(const Int8Linear<T>& problem, int32_t threads);
    void (*scaled_mm)(const Int8Product& product, const Int8Scaling<T>& scaling, int32_t threads);
    void (*mm_dequant)(const int32_t* sums, const Int8Scaling<T>& scaling, int32_t threads);
};

struct Int8Kernels {
    const char* name;
    TypedInt8Kernels<float> float32;
    TypedInt8Kernels<Half> float16;
    TypedInt8Kernels<BFloat16> bfloat16;
    void (*linear_matmul)(const Int8Product& product, int32_t* sums, int32_t threads);
    void (*vectorwise_dequant)(
        const int8_t* codes, const float* row_stats, float* values, int64_t rows, int64_t cols, int32_t threads);

    const TypedInt8Kernels<float>& of(TypeTag<float>) const { return float32; }
    const TypedInt8Kernels<Half>& of(TypeTag<Half>) const { return float16; }
    const TypedInt8Kernels<BFloat16>& of(TypeTag<BFloat16>) const { return bfloat16; }
};

// The chosen table: that of the chosen instruction set, or with VNNI where an AVX-512 set is chosen and this machine
// has it. BNB_CPU_ISA=avx512 is the set without.
const Int8Kernels& int8_kernels();    // throws if BNB_CPU_ISA cannot be honoured
const char* int8_variant() noexcept;  // its name; null then

}  // namespace bnb
