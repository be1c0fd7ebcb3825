// bnb_cuda_int8_*: as cuda.cu, for the LLM.int8() kernels.

#include "../bnb.h"
#include "../common/dtype.h"
#include "../cuda/check.cuh"
#include "../cuda/device.cuh"
#include "../cuda/launchers.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {

namespace {

void check_sizes(int64_t M, int64_t N, int64_t K) {
    require(M >= 0 && N >= 0 && K >= 0, "M, N, K must not be negative, got ", M, ", ", N, ", ", K);
}

void check_quantization(
    const void* A, bnb_dtype dtype, const int8_t* quantized, const float* row_stats, const uint8_t* outlier_cols,
    int64_t rows, int64_t cols, float threshold) {
    check_dtype(dtype);
    require(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, ", ", cols);
    require(threshold >= 0.0f, "threshold must not be negative, got ", threshold);
    require(rows == 0 || row_stats, "null pointer for row_stats");
    require(rows * cols == 0 || (A && quantized), "null pointer for A or quantized");
    require(threshold == 0.0f || cols == 0 || outlier_cols, "outlier_cols is required with a threshold");
}

void check_scaling(
    const float* row_stats, const float* col_stats, const void* bias, bnb_dtype bias_dtype, const void* out,
    bnb_dtype dtype, int64_t M, int64_t N) {
    check_dtype(dtype);
    if (bias) check_dtype(bias_dtype);
    require(M * N == 0 || (row_stats && col_stats && out), "null pointer for statistics or out");
}

bool is_for_wgmma(const Int8Product& product) {
    return can_multiply_int8_with_wgmma(product, current_device().capability);
}

void multiply(const Int8Product& product, bnb_stream stream) {
    if (product.M == 0 || product.N == 0) return;
    require(product.K == 0 || (product.A && product.B), "null pointer for A or B");
    if (is_for_wgmma(product)) {
        int8_matmul_wgmma(product, as_stream(stream));
    } else {
        int8_matmul_mma(product, as_stream(stream));
    }
}

}  // namespace

}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cuda_int8_vectorwise_quant(
    const void* A, bnb_dtype dtype, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows,
    int64_t cols, float threshold, bnb_stream stream) {
    return guarded("bnb_cuda_int8_vectorwise_quant", [&] {
        check_quantization(A, dtype, quantized, row_stats, outlier_cols, rows, cols, threshold);
        int8_vectorwise_quant(A, dtype, quantized, row_stats, outlier_cols, rows, cols, threshold, as_stream(stream));
    });
}

bnb_status bnb_cuda_int8_linear_matmul(
    const int8_t* A, const int8_t* B, int32_t* out, int64_t M, int64_t N, int64_t K, bnb_stream stream) {
    return guarded("bnb_cuda_int8_linear_matmul", [&] {
        check_sizes(M, N, K);
        require(M * N == 0 || out, "null pointer for out");
        Int8Product product{};
        product.A = A, product.B = B, product.out = out;
        product.M = M, product.N = N, product.K = K;
        multiply(product, stream);
    });
}

bnb_status bnb_cuda_int8_scaled_mm(
    const int8_t* A, const int8_t* B, const float* row_stats, const float* col_stats, const void* bias,
    bnb_dtype bias_dtype, void* out, bnb_dtype dtype, int64_t M, int64_t N, int64_t K, bnb_stream stream) {
    return guarded("bnb_cuda_int8_scaled_mm", [&] {
        check_sizes(M, N, K);
        check_scaling(row_stats, col_stats, bias, bias_dtype, out, dtype, M, N);
        multiply({A, B, row_stats, col_stats, bias, bias_dtype, out, dtype, M, N, K, false}, stream);
    });
}

bnb_status bnb_cuda_int8_mm_dequant(
    const int32_t* A, const float* row_stats, const float* col_stats, const void* bias, bnb_dtype bias_dtype, void* out,
    bnb_dtype dtype, int64_t M, int64_t N, bnb_stream stream) {
    return guarded("bnb_cuda_int8_mm_dequant", [&] {
        check_sizes(M, N, 0);
        check_scaling(row_stats, col_stats, bias, bias_dtype, out, dtype, M, N);
        require(M * N == 0 || A, "null pointer for A");
        int8_mm_dequant(A, row_stats, col_stats, bias, bias_dtype, out, dtype, M, N, as_stream(stream));
    });
}

bnb_status bnb_cuda_int8_add_outliers(
    const void* A, bnb_dtype dtype, const int8_t* quantized, const float* row_stats, const int8_t* B,
    const float* col_stats, const uint8_t* outlier_cols, void* out, int64_t M, int64_t N, int64_t K,
    bnb_stream stream) {
    return guarded("bnb_cuda_int8_add_outliers", [&] {
        check_sizes(M, N, K);
        check_scaling(row_stats, col_stats, nullptr, dtype, out, dtype, M, N);
        require(M * N * K == 0 || (A && quantized && B && outlier_cols), "null pointer for an input");
        int8_add_outliers(A, quantized, row_stats, B, col_stats, outlier_cols, out, dtype, M, N, K, as_stream(stream));
    });
}

bnb_status bnb_cuda_int8_linear(
    const void* A, bnb_dtype dtype, const int8_t* B, const float* col_stats, const void* bias, bnb_dtype bias_dtype,
    void* out, uint8_t* outlier_cols, int64_t M, int64_t N, int64_t K, float threshold, void* workspace,
    bnb_stream stream) {
    return guarded("bnb_cuda_int8_linear", [&] {
        check_sizes(M, N, K);
        const Int8Workspace room(workspace, M, N, K, threshold > 0.0f);
        require(room.bytes == 0 || (workspace && is_aligned_16(workspace)), "workspace must be aligned to 16 bytes");
        check_quantization(A, dtype, room.codes, room.row_stats, outlier_cols, M, K, threshold);
        check_scaling(room.row_stats, col_stats, bias, bias_dtype, out, dtype, M, N);
        require(M * N * K == 0 || B, "null pointer for B");
        uint8_t* const flags = threshold > 0.0f && K > 0 ? outlier_cols : nullptr;
        int8_vectorwise_quant(A, dtype, room.codes, room.row_stats, flags, M, K, threshold, as_stream(stream));
        Int8Product product = {room.codes, B, room.row_stats, col_stats, bias, bias_dtype, out, dtype, M, N, K, true};
        product.outlier_cols = flags;
        product.values = A;
        const bool adds_outliers = dtype != BNB_DTYPE_FLOAT32 && is_for_wgmma(product);
        if (flags && adds_outliers) int8_gather_outliers(product, room, as_stream(stream));
        multiply(product, stream);
        if (!flags || adds_outliers) return;
        int8_add_outliers(A, room.codes, room.row_stats, B, col_stats, flags, out, dtype, M, N, K, as_stream(stream));
    });
}

}  // extern "C"
