// An int32 product scaled to values: by its row's and its column's statistic, plus a bias, rounded once.
//
// Memory bound: 4 + sizeof(T) bytes per value. A thread takes four neighbouring columns, where they are whole vectors.

#include "device.cuh"
#include "int8/scaling.cuh"
#include "launchers.h"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;

template <class T>
__global__ void __launch_bounds__(kThreads) int8_mm_dequant_kernel(
    const int* __restrict__ sums, const float* __restrict__ row_stats, const float* __restrict__ col_stats,
    const void* __restrict__ bias, bnb_dtype bias_dtype, T* __restrict__ out, int64_t chunks, int64_t of_row, int64_t N,
    bool whole) {
    const int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (chunk >= chunks) return;
    const int64_t m = chunk / of_row, n = (chunk - m * of_row) * kEach, i = m * N + n;
    const float scale = row_scale(__ldg(row_stats + m));
    Pack<int, kEach> from = {};
    if (whole) {
        from = load_pack<int, kEach>(sums + i);
    } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (n + j < N) from.values[j] = sums[i + j];
        }
    }
    Pack<T, kEach> to;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        if (n + j >= N) break;
        float value = scaled(from.values[j], scale, __ldg(col_stats + n + j));
        if (bias) value = __fadd_rn(value, bias_value(bias, bias_dtype, n + j));
        to.values[j] = round_to<T>(value);
    }
    if (whole) {
        store_pack(out + i, to);
    } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (n + j < N) out[i + j] = to.values[j];
        }
    }
}

}  // namespace

void int8_mm_dequant(
    const int* sums, const float* row_stats, const float* col_stats, const void* bias, bnb_dtype bias_dtype, void* out,
    bnb_dtype dtype, int64_t M, int64_t N, cudaStream_t stream) {
    if (M == 0 || N == 0) return;
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        T* const values = static_cast<T*>(out);
        const int64_t of_row = (N + kEach - 1) / kEach, chunks = M * of_row;
        const bool whole = N % kEach == 0 && is_aligned<int, kEach>(sums) && is_aligned<T, kEach>(values);
        int8_mm_dequant_kernel<T><<<grid_size((chunks + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
            sums, row_stats, col_stats, bias, bias_dtype, values, chunks, of_row, N, whole);
        check_launch("int8_mm_dequant_kernel");
    });
}

}  // namespace bnb
