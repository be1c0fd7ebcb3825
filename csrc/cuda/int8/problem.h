// What the int8 products compute, and their launchers.
#pragma once

#include <cstdint>

#include "../../bnb.h"

typedef struct CUstream_st* cudaStream_t;

namespace bnb {

// out [M, N] is A [M, K] times the transpose of B [N, K]: the int32 sums if row_stats is null, else those scaled by
// row_stats [M] * col_stats [N] / 127^2, plus bias [N] if there is one, as a value of dtype.
struct Int8Product {
    const int8_t* A;
    const int8_t* B;
    const float* row_stats;
    const float* col_stats;
    const void* bias;
    bnb_dtype bias_dtype;
    void* out;
    bnb_dtype dtype;
    int64_t M, N, K;
    bool after_quantization;  // the launch before this one wrote A and row_stats, and nothing else
    // With outlier_cols [K], what flagged columns lack is added, as int8_add_outliers does.
    const uint8_t* outlier_cols;
    const void* values;  // that A was quantized from, of dtype
    // Null, or how many they are, and of the first what is left of A and their weights (see int8_gather_outliers.cu).
    const int* outlier_count;
    const void* gathered_values;
    const void* gathered_weights;
};

constexpr int kGatheredOutliers = 128;  // columns, at most
constexpr int64_t kFewTokens = 64;      // for which gathering costs more than it saves

// Memory that a product of values that are yet to be quantized needs.
struct Int8Workspace {
    Int8Workspace(void* memory, int64_t M, int64_t N, int64_t K, bool outliers) {
        char* const base = static_cast<char*>(memory);
        const auto take = [&](int64_t size) {
            char* const piece = base + bytes;
            bytes += (size + 15) / 16 * 16;
            return piece;
        };
        codes = reinterpret_cast<int8_t*>(take(M * K));
        row_stats = reinterpret_cast<float*>(take(M * 4));
        if (!outliers || M <= kFewTokens) return;
        outlier_count = reinterpret_cast<int*>(take(sizeof(int)));
        gathered_values = take(M * kGatheredOutliers * 2);
        gathered_weights = take(N * kGatheredOutliers * 2);
    }

    int64_t bytes = 0;
    int8_t* codes = nullptr;
    float* row_stats = nullptr;
    int* outlier_count = nullptr;
    void* gathered_values = nullptr;
    void* gathered_weights = nullptr;
};

// Gathers the first outlier columns of a product of 16-bit values, if there is room, and tells the product.
void int8_gather_outliers(Int8Product& problem, const Int8Workspace& room, cudaStream_t stream);

// On compute capability 9.0; rows of 16 bytes, aligned. It adds outliers of 16-bit values.
bool can_multiply_int8_with_wgmma(const Int8Product& problem, int capability);
void int8_matmul_wgmma(const Int8Product& problem, cudaStream_t stream);

// Any problem, anywhere, without outliers.
void int8_matmul_mma(const Int8Product& problem, cudaStream_t stream);

}  // namespace bnb
