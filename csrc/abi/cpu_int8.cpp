// bnb_cpu_int8_*: as cpu.cpp, for the LLM.int8() kernels.

#include "../bnb.h"
#include "../common/dtype.h"
#include "../cpu/int8_kernels.h"
#include "../cpu/parallel.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {

namespace {

void check_sizes(int64_t M, int64_t N, int64_t K) {
    require(M >= 0 && N >= 0 && K >= 0, "M, N, K must not be negative, got ", M, ", ", N, ", ", K);
}

void check_quantization(bnb_dtype dtype, int64_t rows, int64_t cols, float threshold, bool pointers, bool flags) {
    check_dtype(dtype);
    require(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, ", ", cols);
    require(threshold >= 0.0f, "threshold must not be negative, got ", threshold);
    require(rows * cols == 0 || pointers, "null pointer for A or a result");
    require(threshold == 0.0f || cols == 0 || flags, "outlier_cols is required with a threshold");
}

// Magnitudes are compared as values of A's dtype, so the threshold is rounded to it.
template <class T>
float threshold_in(float threshold) {
    return to_float(from_float<T>(threshold));
}

// A bias as float32, which every 16-bit value is exactly; null stays null.
class FloatBias {
  public:
    FloatBias(const void* bias, bnb_dtype dtype, int64_t N)
        : converted_(bias && dtype != BNB_DTYPE_FLOAT32 ? static_cast<size_t>(N) * sizeof(float) : 0),
          values_(static_cast<const float*>(bias)) {
        if (!bias || dtype == BNB_DTYPE_FLOAT32) return;
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            for (int64_t n = 0; n < N; ++n) converted_.as<float>()[n] = to_float(static_cast<const T*>(bias)[n]);
        });
        values_ = converted_.as<float>();
    }

    const float* values() const { return values_; }

  private:
    const Scratch converted_;
    const float* values_;
};

}  // namespace

}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cpu_int8_vectorwise_quant(
    const void* A, bnb_dtype dtype, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows,
    int64_t cols, float threshold, int32_t threads) {
    return guarded("bnb_cpu_int8_vectorwise_quant", [&] {
        check_quantization(dtype, rows, cols, threshold, A && quantized, outlier_cols);
        require(rows == 0 || row_stats, "null pointer for row_stats");
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            int8_kernels().of(tag).quantize(
                {static_cast<const T*>(A), quantized, row_stats, nullptr, nullptr,
                 threshold > 0.0f ? outlier_cols : nullptr, rows, cols, threshold_in<T>(threshold)},
                threads);
        });
    });
}

bnb_status bnb_cpu_int8_double_quant(
    const void* A, bnb_dtype dtype, int8_t* by_row, int8_t* by_column, float* row_stats, float* col_stats,
    uint8_t* outlier_cols, int64_t rows, int64_t cols, float threshold, int32_t threads) {
    return guarded("bnb_cpu_int8_double_quant", [&] {
        check_quantization(dtype, rows, cols, threshold, A && by_row && by_column, outlier_cols);
        require((rows == 0 || row_stats) && (cols == 0 || col_stats), "null pointer for row_stats or col_stats");
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            int8_kernels().of(tag).quantize(
                {static_cast<const T*>(A), by_row, row_stats, by_column, col_stats,
                 threshold > 0.0f ? outlier_cols : nullptr, rows, cols, threshold_in<T>(threshold)},
                threads);
        });
    });
}

bnb_status bnb_cpu_int8_vectorwise_dequant(
    const int8_t* codes, const float* row_stats, float* values, int64_t rows, int64_t cols, int32_t threads) {
    return guarded("bnb_cpu_int8_vectorwise_dequant", [&] {
        require(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, ", ", cols);
        require(rows * cols == 0 || (codes && row_stats && values), "null pointer for ", rows * cols, " values");
        int8_kernels().vectorwise_dequant(codes, row_stats, values, rows, cols, threads);
    });
}

bnb_status bnb_cpu_int8_linear_matmul(
    const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, int32_t threads) {
    return guarded("bnb_cpu_int8_linear_matmul", [&] {
        check_sizes(M, N, K);
        require(M * N == 0 || (out && (K == 0 || (A && B))), "null pointer for A, B or out");
        int8_kernels().linear_matmul({A, B, M, N, K}, out, threads);
    });
}

bnb_status bnb_cpu_int8_scaled_mm(
    const int8_t* A, const int8_t* B, const float* row_stats, const float* col_stats, const void* bias,
    bnb_dtype bias_dtype, void* out, bnb_dtype dtype, int64_t M, int64_t N, int64_t K, int32_t threads) {
    return guarded("bnb_cpu_int8_scaled_mm", [&] {
        check_sizes(M, N, K);
        require(M * N == 0 || (out && row_stats && col_stats && (K == 0 || (A && B))), "null pointer");
        const FloatBias added(bias, bias_dtype, N);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            int8_kernels().of(tag).scaled_mm(
                {A, B, M, N, K}, {row_stats, col_stats, added.values(), static_cast<T*>(out), M, N}, threads);
        });
    });
}

bnb_status bnb_cpu_int8_mm_dequant(
    const int32_t* A, const float* row_stats, const float* col_stats, const void* bias, bnb_dtype bias_dtype, void* out,
    bnb_dtype dtype, int64_t M, int64_t N, int32_t threads) {
    return guarded("bnb_cpu_int8_mm_dequant", [&] {
        check_sizes(M, N, 0);
        require(M * N == 0 || (A && row_stats && col_stats && out), "null pointer for ", M * N, " values");
        const FloatBias added(bias, bias_dtype, N);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            int8_kernels().of(tag).mm_dequant(
                A, {row_stats, col_stats, added.values(), static_cast<T*>(out), M, N}, threads);
        });
    });
}

bnb_status bnb_cpu_int8_linear(
    const void* A, bnb_dtype dtype, const int8_t* B, const float* col_stats, const void* bias, bnb_dtype bias_dtype,
    void* out, uint8_t* outlier_cols, int64_t M, int64_t N, int64_t K, float threshold, int32_t threads) {
    return guarded("bnb_cpu_int8_linear", [&] {
        check_sizes(M, N, K);
        check_quantization(dtype, M, K, threshold, A, outlier_cols);
        require(M * N == 0 || (out && col_stats && (K == 0 || B)), "null pointer for B, col_stats or out");
        const FloatBias added(bias, bias_dtype, N);
        visit_or_refuse(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            int8_kernels().of(tag).linear(
                {static_cast<const T*>(A), B, col_stats, added.values(), static_cast<T*>(out),
                 threshold > 0.0f ? outlier_cols : nullptr, M, N, K, threshold_in<T>(threshold)},
                threads);
        });
    });
}

bnb_status bnb_cpu_int8_linear_with(const bnb_int8_linear_arguments* a) {
    if (!a) return guarded("bnb_cpu_int8_linear_with", [] { require(false, "null pointer for the arguments"); });
    return bnb_cpu_int8_linear(
        a->A, a->dtype, a->B, a->col_stats, a->bias, a->bias_dtype, a->out, a->outlier_cols, a->M, a->N, a->K,
        a->threshold, a->threads);
}

}  // extern "C"
