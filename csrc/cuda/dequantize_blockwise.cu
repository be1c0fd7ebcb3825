// 8-bit block-wise dequantization: a 256-entry table look-up and a scale per block.
//
// Memory bound: one byte in and sizeof(T) bytes out per value. A thread takes as many codes at a time as fill one
// 16-byte store, several times before the first look-up; the table sits in shared memory. The block size is any
// positive number: if those codes can straddle a border, each value finds its own scale.

#include "block_scales.h"
#include "device.cuh"
#include "launchers.h"
#include "vector_io.cuh"

namespace bnb {

namespace {

template <class T>
struct DequantizeBlockwiseTuning {
    static constexpr int kThreads = 256;            // one per table entry
    static constexpr int kValues = 16 / sizeof(T);  // per access
    static constexpr int kRounds = 32 / kValues;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(DequantizeBlockwiseTuning<T>::kThreads) dequantize_blockwise_kernel(
    const float* __restrict__ code, const uint8_t* __restrict__ codes, const float* __restrict__ absmax,
    T* __restrict__ values, int64_t n, int64_t blocksize, int block_shift) {
    using Tuning = DequantizeBlockwiseTuning<T>;
    constexpr int kValues = Tuning::kValues;
    constexpr int64_t kStride = int64_t(Tuning::kThreads) * kValues;
    __shared__ float table[256];
    table[threadIdx.x] = __ldg(code + threadIdx.x);

    const int64_t first = int64_t(blockIdx.x) * Tuning::kRounds * kStride + threadIdx.x * kValues;
    Pack<uint8_t, kValues> held[Tuning::kRounds];
    float scale[Tuning::kRounds];
    if constexpr (kAligned) {
#pragma unroll
        for (int round = 0; round < Tuning::kRounds; ++round) {
            const int64_t i = first + round * kStride;
            if (i + kValues > n) continue;
            held[round] = load_pack<uint8_t, kValues>(codes + i);
            scale[round] = __ldg(absmax + block_of(i, blocksize, block_shift));
        }
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < Tuning::kRounds; ++round) {
        const int64_t i = first + round * kStride;
        if (kAligned && i + kValues <= n) {
            Pack<T, kValues> result;
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                result.values[j] = round_to<T>(__fmul_rn(table[held[round].values[j]], scale[round]));
            }
            store_pack(values + i, result);
        } else {
            for (int64_t at = i; at < i + kValues && at < n; ++at) {
                const float its_scale = __ldg(absmax + block_of(at, blocksize, block_shift));
                values[at] = round_to<T>(__fmul_rn(table[codes[at]], its_scale));
            }
        }
    }
}

}  // namespace

template <class T>
void dequantize_blockwise(
    const float* code, const uint8_t* codes, const float* absmax, T* values, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    using Tuning = DequantizeBlockwiseTuning<T>;
    if (n == 0) return;
    constexpr int64_t kPerBlock = int64_t(Tuning::kThreads) * Tuning::kValues * Tuning::kRounds;
    const unsigned blocks = grid_size((n + kPerBlock - 1) / kPerBlock);
    const bool aligned = blocksize % Tuning::kValues == 0 && is_aligned<uint8_t, Tuning::kValues>(codes) &&
                         is_aligned<T, Tuning::kValues>(values);
    const auto kernel = aligned ? dequantize_blockwise_kernel<T, true> : dequantize_blockwise_kernel<T, false>;
    kernel<<<blocks, Tuning::kThreads, 0, stream>>>(code, codes, absmax, values, n, blocksize, shift_of(blocksize));
    check_launch("dequantize_blockwise_kernel");
}

template void dequantize_blockwise<float>(
    const float*, const uint8_t*, const float*, float*, int64_t, int64_t, cudaStream_t);
template void dequantize_blockwise<Half>(
    const float*, const uint8_t*, const float*, Half*, int64_t, int64_t, cudaStream_t);
template void dequantize_blockwise<BFloat16>(
    const float*, const uint8_t*, const float*, BFloat16*, int64_t, int64_t, cudaStream_t);

}  // namespace bnb
