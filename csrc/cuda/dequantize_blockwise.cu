// 8-bit block-wise dequantization: a 256-entry table look-up and a scale per block.
//
// Memory bound: one byte in and sizeof(T) bytes out per value. Codes are as good as random, so lanes that share a table
// in shared memory would meet in its banks; each lane has its own column of one instead, and the grid is persistent to
// pay for filling it once. A thread takes as many codes at a time as fill one 16-byte store, several times, while those
// before are decoded. Where such codes could straddle a block's border (its size is any positive number) or a pointer
// is not aligned, another kernel takes one value at a time.

#include <algorithm>

#include "block_scales.h"
#include "device.cuh"
#include "launchers.h"
#include "vector_io.cuh"

namespace bnb {

namespace {

template <class T>
struct DequantizeBlockwiseTuning {
    static constexpr int kThreads = 512;
    static constexpr int kCtas = 2;                 // per multiprocessor
    static constexpr int kValues = 16 / sizeof(T);  // per access
    static constexpr int kRounds = 4;
};

constexpr int kEntries = 256;
constexpr int kColumns = 32;  // one per lane and bank

// The value of code i of four in a word: shift and mask make the offset of its row, 128 bytes long.
__device__ __forceinline__ float value_of(const float* table, uint32_t codes, int i, int column) {
    static_assert(kColumns * sizeof(float) == 1 << 7);
    const uint32_t row = i == 0 ? codes << 7 : codes >> (8 * i - 7);
    const uint32_t offset = (row & 0x7f80u) | static_cast<uint32_t>(column * sizeof(float));
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset);
}

// The codes of a few accesses of a thread, `step` values apart, and their scales.
template <class T, int kRounds>
struct Accesses {
    static constexpr int kValues = DequantizeBlockwiseTuning<T>::kValues;
    uint32_t codes[kRounds][kValues / 4];
    float scale[kRounds];

    __device__ __forceinline__ void load(
        const uint8_t* __restrict__ from, const float* __restrict__ absmax, int64_t first, int64_t step, int shift) {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int64_t i = first + round * step;
            using Words = std::conditional_t<kValues == 8, uint2, uint32_t>;
            const Words words = __ldcs(reinterpret_cast<const Words*>(from + i));
            memcpy(codes[round], &words, sizeof(words));
            scale[round] = __ldg(absmax + (i >> shift));
        }
    }

    __device__ __forceinline__ void decode(
        const float* table, int column, T* __restrict__ values, int64_t first, int64_t step) const {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            Pack<T, kValues> result;
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                const float value = value_of(table, codes[round][j / 4], j % 4, column);
                result.values[j] = round_to<T>(__fmul_rn(value, scale[round]));
            }
            uint4 words;
            memcpy(&words, &result, sizeof(words));
            __stcs(reinterpret_cast<uint4*>(values + first + round * step), words);
        }
    }
};

// Every block holds 2^shift values, a multiple of what an access takes.
template <class T>
__global__ void __launch_bounds__(
    DequantizeBlockwiseTuning<T>::kThreads,
    resident_ctas(DequantizeBlockwiseTuning<T>::kCtas, DequantizeBlockwiseTuning<T>::kThreads))
    dequantize_blockwise_kernel(
        const float* __restrict__ code, const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
        T* __restrict__ values, int64_t n, int shift) {
    using Tuning = DequantizeBlockwiseTuning<T>;
    constexpr int kValues = Tuning::kValues;
    constexpr int kRounds = Tuning::kRounds;
    __shared__ float table[kEntries * kColumns];
    for (int i = threadIdx.x; i < kEntries * kColumns / 4; i += Tuning::kThreads) {
        const float value = __ldg(code + i / (kColumns / 4));
        reinterpret_cast<float4*>(table)[i] = make_float4(value, value, value, value);
    }
    __syncthreads();

    const int column = threadIdx.x % kColumns;
    const int64_t step = int64_t(gridDim.x) * Tuning::kThreads * kValues;
    const int64_t turn = kRounds * step;
    const int64_t whole = n - (kRounds - 1) * step - kValues;  // the last place of a whole turn
    int64_t i = (int64_t(blockIdx.x) * Tuning::kThreads + threadIdx.x) * kValues;
    Accesses<T, kRounds> next;
    if (i <= whole) next.load(codes, absmax, i, step, shift);
    for (; i <= whole; i += turn) {
        const Accesses<T, kRounds> now = next;
        if (i + turn <= whole) next.load(codes, absmax, i + turn, step, shift);
        now.decode(table, column, values, i, step);
    }
    for (; i + kValues <= n; i += step) {
        Accesses<T, 1> now;
        now.load(codes, absmax, i, step, shift);
        now.decode(table, column, values, i, step);
    }
    for (int64_t at = i; at < n && at < i + kValues; ++at) {
        values[at] = round_to<T>(__fmul_rn(value_of(table, codes[at], 0, column), __ldg(absmax + (at >> shift))));
    }
}

template <class T>
__global__ void dequantize_blockwise_any_kernel(
    const float* __restrict__ code, const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
    T* __restrict__ values, int64_t n, int64_t blocksize) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) values[i] = round_to<T>(__fmul_rn(__ldg(code + codes[i]), __ldg(absmax + i / blocksize)));
}

}  // namespace

template <class T>
void dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, T* values, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    using Tuning = DequantizeBlockwiseTuning<T>;
    if (n == 0) return;
    const int shift = shift_of(blocksize);
    if (shift >= 0 && blocksize % Tuning::kValues == 0 && is_aligned<uint8_t, Tuning::kValues>(codes) &&
        is_aligned<T, Tuning::kValues>(values)) {
        constexpr int64_t kPerCta = int64_t(Tuning::kThreads) * Tuning::kValues;
        const int64_t ctas =
            std::min<int64_t>((n + kPerCta - 1) / kPerCta, Tuning::kCtas * current_device().multiprocessors);
        dequantize_blockwise_kernel<T>
            <<<grid_size(ctas), Tuning::kThreads, 0, stream>>>(code, codes, absmax, values, n, shift);
    } else {
        dequantize_blockwise_any_kernel<T><<<grid_size((n + kEntries - 1) / kEntries), kEntries, 0, stream>>>(
            code, codes, absmax, values, n, blocksize);
    }
    check_launch("dequantize_blockwise");
}

template void dequantize_blockwise<float>(
    const float*, const uint8_t*, const float*, float*, int64_t, int64_t, cudaStream_t);
template void dequantize_blockwise<Half>(
    const float*, const uint8_t*, const float*, Half*, int64_t, int64_t, cudaStream_t);
template void dequantize_blockwise<BFloat16>(
    const float*, const uint8_t*, const float*, BFloat16*, int64_t, int64_t, cudaStream_t);

}  // namespace bnb
