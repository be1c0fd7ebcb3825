// What outlier columns lack in an int8 product is added to it: for each such column k, what quantization left of
// A[m, k], times B[n, k] * col_stats[n] / 127. So these columns count as if they had not been quantized.
//
// Every CTA collects the columns anew, which costs a read of K bytes from L2; without any, that is all that happens.
// Sums are float32.

#include "device.cuh"
#include "int8/outliers.cuh"
#include "int8/scaling.cuh"
#include "launchers.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;     // tokens, and weight rows, of a CTA
constexpr int kEach = 4;      // of both, of a thread
constexpr int kColumns = 16;  // that are gathered at a time

template <class T>
struct Outliers {
    const T* A;
    const int8_t* quantized;
    const float* row_stats;
    const int8_t* B;
    const float* col_stats;
    const uint8_t* flags;
    T* out;
    int64_t M, N, K;
};

template <class T>
__global__ void __launch_bounds__(kThreads) int8_add_outliers_kernel(const Outliers<T> p, int64_t row_tiles) {
    __shared__ OutlierChunk<kThreads> chunk;
    __shared__ float left[kColumns][kTile], weights[kColumns][kTile];
    const int64_t n0 = blockIdx.x % row_tiles * kTile, m0 = blockIdx.x / row_tiles * kTile;
    const int n1 = threadIdx.x % (kTile / kEach) * kEach, m1 = threadIdx.x / (kTile / kEach) * kEach;
    float sums[kEach][kEach] = {};
    bool any = false;
    for (int64_t start = 0; start < p.K; start += chunk.kColumns) {
        const int count = chunk.collect(p.flags, start, p.K, threadIdx.x, 0);
        any = any || count > 0;
        for (int c = 0; c < count; c += kColumns) {
            for (int i = threadIdx.x; i < kColumns * kTile; i += kThreads) {
                const int column = i % kColumns, at = i / kColumns;  // neighbours may share a sector
                const bool exists = c + column < count;
                const int64_t k = start + (exists ? chunk.columns[c + column] : 0), m = m0 + at, n = n0 + at;
                float rest = 0.0f, weight = 0.0f;
                if (exists && m < p.M) {
                    rest = left_of(widened(p.A[m * p.K + k]), p.quantized[m * p.K + k], __ldg(p.row_stats + m));
                }
                if (exists && n < p.N) weight = p.B[n * p.K + k];
                left[column][at] = rest;
                weights[column][at] = weight;
            }
            __syncthreads();
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
                const Pack<float, kEach> a = load_pack<float, kEach>(&left[column][m1]);
                const Pack<float, kEach> b = load_pack<float, kEach>(&weights[column][n1]);
#pragma unroll
                for (int i = 0; i < kEach; ++i) {
#pragma unroll
                    for (int j = 0; j < kEach; ++j) sums[i][j] = __fmaf_rn(a.values[i], b.values[j], sums[i][j]);
                }
            }
            __syncthreads();
        }
    }
    if (!any) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int64_t m = m0 + m1 + i;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int64_t n = n0 + n1 + j;
            if (m >= p.M || n >= p.N) continue;
            T& value = p.out[m * p.N + n];
            const float scale = __fmul_rn(__ldg(p.col_stats + n), kInt8Scale);
            value = round_to<T>(__fmaf_rn(sums[i][j], scale, widened(value)));
        }
    }
}

}  // namespace

void int8_add_outliers(
    const void* A, const int8_t* quantized, const float* row_stats, const int8_t* B, const float* col_stats,
    const uint8_t* outlier_cols, void* out, bnb_dtype dtype, int64_t M, int64_t N, int64_t K, cudaStream_t stream) {
    if (M == 0 || N == 0) return;
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const Outliers<T> p = {static_cast<const T*>(A), quantized, row_stats, B, col_stats, outlier_cols,
                               static_cast<T*>(out),     M,         N,         K};
        const int64_t row_tiles = (N + kTile - 1) / kTile, token_tiles = (M + kTile - 1) / kTile;
        int8_add_outliers_kernel<T><<<grid_size(row_tiles * token_tiles), kThreads, 0, stream>>>(p, row_tiles);
        check_launch("int8_add_outliers_kernel");
    });
}

}  // namespace bnb
