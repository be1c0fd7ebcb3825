// int8 quantization by rows: the largest magnitude of each row, then every value rounded to 127 / that.
//
// Memory bound: sizeof(T) + 1 bytes per value. A CTA holds its row in registers between the two passes; rows beyond
// what fits, or that are no whole vectors, are read again, from cache. Outliers are rare: a lane that meets one sets
// its column's flag, and the same byte may be written by many. A kernel before that clears the flags: cudaMemsetAsync
// would keep everything from starting early, which costs three microseconds.

#include <algorithm>
#include <type_traits>

#include "async.cuh"
#include "launch.cuh"
#include "launchers.h"
#include "vector_io.cuh"

namespace bnb {
namespace {

constexpr int kMostThreads = 512;
constexpr int64_t kManyRows = 512;
constexpr int kVectorBytes = 16;
constexpr int kClearThreads = 128;

template <class T>
struct Row {
    const T* values;
    int8_t* quantized;
    uint8_t* outlier_cols;  // null without a threshold
    float threshold;
    bool all_flags;  // the row writes the flags of all columns, as there is no other row

    __device__ __forceinline__ bool is_outlier(float value) const { return fabsf(value) >= threshold; }

    // The bits of a magnitude, which order as magnitudes do, NaN last. Zero for an outlier, which is flagged.
    __device__ __forceinline__ uint32_t counted(float value, int64_t column) const {
        if (outlier_cols == nullptr || !is_outlier(value)) return __float_as_uint(fabsf(value));
        if (!all_flags) outlier_cols[column] = 1;
        return 0;
    }

    // An outlier becomes zero, as does what is no number.
    __device__ __forceinline__ int8_t rounded(float value, float factor) const {
        if (outlier_cols != nullptr && is_outlier(value)) return 0;
        const float product = __fmul_rn(value, factor);
        if (isnan(product)) return 0;
        return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(product, -127.0f), 127.0f)));
    }
};

// The largest over a CTA of as many threads as a row needs.
__device__ __forceinline__ uint32_t largest(uint32_t value) {
    __shared__ uint32_t of_warps[kMostThreads / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(~0u, value, step));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; ++w) value = max(value, of_warps[w]);
    return value;
}

// In two roundings, as torch divides a number by a tensor; published checkpoints hold it.
__device__ __forceinline__ float factor_of(float statistic) {
    return statistic == 0.0f ? 0.0f : __fmul_rn(__fdiv_rn(1.0f, statistic), 127.0f);
}

__global__ void __launch_bounds__(kClearThreads) clear_flags_kernel(uint8_t* flags, int64_t count) {
    wait_for_predecessor();
    let_successor_start();
    const int64_t first = (int64_t(blockIdx.x) * kClearThreads + threadIdx.x) * kVectorBytes;
    if (first + kVectorBytes <= count && reinterpret_cast<uintptr_t>(flags) % kVectorBytes == 0) {
        *reinterpret_cast<uint4*>(flags + first) = make_uint4(0, 0, 0, 0);
    } else {
        for (int64_t i = first; i < first + kVectorBytes && i < count; ++i) flags[i] = 0;
    }
}

void clear_flags(uint8_t* flags, int64_t count, cudaStream_t stream) {
    static std::atomic<uint64_t> allowed{0};
    const int64_t of_cta = kClearThreads * kVectorBytes;
    const Launch how = {
        "clear_flags_kernel", dim3(grid_size((count + of_cta - 1) / of_cta)), kClearThreads, 0, allowed};
    launch_early(clear_flags_kernel, how, current_device(), stream, flags, count);
}

// kVectors of a row a thread, or with zero any row.
template <class T, int kVectors>
__global__ void __launch_bounds__(kMostThreads, 2) int8_vectorwise_quant_kernel(
    const T* __restrict__ A, int8_t* __restrict__ quantized, float* __restrict__ row_stats, uint8_t* outlier_cols,
    int64_t cols, float threshold) {
    wait_for_predecessor();
    let_successor_start();  // after all that came before is over, so that the successor may rely on it
    constexpr int kEach = kVectorBytes / sizeof(T);
    const int64_t begin = int64_t(blockIdx.x) * cols;
    const bool all_flags = outlier_cols != nullptr && gridDim.x == 1;
    const Row<T> row = {A + begin, quantized + begin, outlier_cols, threshold, all_flags};
    uint32_t best = 0;
    if constexpr (kVectors > 0) {
        Pack<T, kEach> held[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = (int64_t(v) * blockDim.x + threadIdx.x) * kEach;
            if (column < cols) held[v] = load_pack<T, kEach>(row.values + column);
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = (int64_t(v) * blockDim.x + threadIdx.x) * kEach;
            if (column >= cols) continue;
#pragma unroll
            for (int i = 0; i < kEach; ++i) best = max(best, row.counted(widened(held[v].values[i]), column + i));
        }
        const float statistic = __uint_as_float(largest(best)), factor = factor_of(statistic);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = (int64_t(v) * blockDim.x + threadIdx.x) * kEach;
            if (column >= cols) continue;
            Pack<int8_t, kEach> codes;
#pragma unroll
            for (int i = 0; i < kEach; ++i) codes.values[i] = row.rounded(widened(held[v].values[i]), factor);
            store_pack(row.quantized + column, codes);
            if (!all_flags) continue;
            Pack<uint8_t, kEach> flags;
#pragma unroll
            for (int i = 0; i < kEach; ++i) flags.values[i] = row.is_outlier(widened(held[v].values[i]));
            store_pack(outlier_cols + column, flags);
        }
        if (threadIdx.x == 0) row_stats[blockIdx.x] = statistic;
    } else {
        for (int64_t i = threadIdx.x; i < cols; i += blockDim.x)
            best = max(best, row.counted(widened(row.values[i]), i));
        const float statistic = __uint_as_float(largest(best)), factor = factor_of(statistic);
        for (int64_t i = threadIdx.x; i < cols; i += blockDim.x) {
            row.quantized[i] = row.rounded(widened(row.values[i]), factor);
            if (all_flags) outlier_cols[i] = row.is_outlier(widened(row.values[i]));
        }
        if (threadIdx.x == 0) row_stats[blockIdx.x] = statistic;
    }
}

template <class T>
void launch(
    const T* A, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows, int64_t cols, float threshold,
    cudaStream_t stream) {
    constexpr int kEach = kVectorBytes / sizeof(T);
    const int64_t vectors = (cols + kEach - 1) / kEach;
    const bool whole = cols % kEach == 0 && is_aligned<T, kEach>(A) && is_aligned<int8_t, kEach>(quantized) &&
                       is_aligned<uint8_t, kEach>(outlier_cols);
    const auto with = [&](auto each) {
        constexpr int kVectors = decltype(each)::value;
        const int64_t wanted = kVectors > 0 ? (vectors + kVectors - 1) / kVectors : vectors;
        const int threads = static_cast<int>(std::min<int64_t>((wanted + 31) / 32 * 32, kMostThreads));
        static std::atomic<uint64_t> allowed{0};
        const Launch how = {"int8_vectorwise_quant_kernel", dim3(grid_size(rows)), std::max(threads, 32), 0, allowed};
        launch_early(
            int8_vectorwise_quant_kernel<T, kVectors>, how, current_device(), stream, A, quantized, row_stats,
            outlier_cols, cols, threshold);
    };
    // Small CTAs overlap better; if rows are few, as many lanes as possible share one.
    const int64_t threads = rows >= kManyRows ? kMostThreads / 2 : kMostThreads;
    if (whole && vectors <= threads) {
        with(std::integral_constant<int, 1>{});
    } else if (whole && vectors <= 2 * threads) {
        with(std::integral_constant<int, 2>{});
    } else if (whole && vectors <= 4 * threads) {
        with(std::integral_constant<int, 4>{});
    } else if (whole && vectors <= 8 * kMostThreads) {
        with(std::integral_constant<int, 8>{});
    } else {
        with(std::integral_constant<int, 0>{});
    }
}

}  // namespace

void int8_vectorwise_quant(
    const void* A, bnb_dtype dtype, int8_t* quantized, float* row_stats, uint8_t* outlier_cols, int64_t rows,
    int64_t cols, float threshold, cudaStream_t stream) {
    if (threshold == 0.0f) outlier_cols = nullptr;
    if (outlier_cols && cols > 0 && rows != 1) clear_flags(outlier_cols, cols, stream);  // one row writes them all
    if (rows == 0) return;
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        // Magnitudes are compared as values of A's dtype.
        const float limit = to_float(from_float<T>(threshold));
        launch(static_cast<const T*>(A), quantized, row_stats, outlier_cols, rows, cols, limit, stream);
    });
}

}  // namespace bnb
