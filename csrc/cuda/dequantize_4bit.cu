// 4-bit dequantization: two codes per byte, high nibble first.
//
// Memory bound: half a byte in and sizeof(T) bytes out per value, so all that matters is the width of the accesses. A
// thread takes as many codes at a time as fill one 16-byte store, and a warp's accesses are contiguous. Blocks hold a
// multiple of 16 values, so those of one store never meet two scales. Only the thread at the end can be short, and it
// alone takes the scalar tail, as does everything if a pointer is not aligned.

#include "device.cuh"
#include "launchers.h"
#include "vector_io.cuh"

namespace bnb {

namespace {

template <class T>
struct Dequantize4bitTuning {
    static constexpr int kThreads = 256;
    static constexpr int kValues = 16 / sizeof(T);  // per access
    static constexpr int kRounds = 32 / kValues;    // accesses per thread, all loads in flight before the first store
};

__constant__ FourBitFormat device_nf4 = kNf4;
__constant__ FourBitFormat device_fp4 = kFp4;

// The codes of up to four bytes; value 2j is the high nibble of byte j.
__device__ __forceinline__ int code_of(uint32_t bytes, int position) {
    return (bytes >> (8 * (position / 2) + (position % 2 ? 0 : 4))) & 15;
}

template <class T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(Dequantize4bitTuning<T>::kThreads) dequantize_4bit_kernel(
    const uint8_t* __restrict__ packed, const BlockScales scales, bool nf4, T* __restrict__ values, int64_t n,
    int64_t blocksize, int block_shift) {
    using Tuning = Dequantize4bitTuning<T>;
    constexpr int kValues = Tuning::kValues;
    __shared__ float table[16];  // lanes read different entries, which constant memory would serialise
    if (threadIdx.x < 16) table[threadIdx.x] = nf4 ? device_nf4.values[threadIdx.x] : device_fp4.values[threadIdx.x];
    __syncthreads();

    const int64_t first = (int64_t(blockIdx.x) * Tuning::kRounds * Tuning::kThreads + threadIdx.x) * kValues;
    uint32_t bytes[Tuning::kRounds];
    float scale[Tuning::kRounds];
#pragma unroll
    for (int round = 0; round < Tuning::kRounds; ++round) {
        const int64_t i = first + int64_t(round) * Tuning::kThreads * kValues;
        if (i >= n) continue;
        scale[round] = scale_of<kNested>(scales, block_of(i, blocksize, block_shift));
        if (kAligned && i + kValues <= n) {
            using Codes = std::conditional_t<kValues == 8, uint32_t, uint16_t>;
            bytes[round] = __ldg(reinterpret_cast<const Codes*>(packed + i / 2));
        } else {
            bytes[round] = 0;
            for (int j = 0; j < kValues / 2 && i + 2 * j < n; ++j)
                bytes[round] |= uint32_t(packed[i / 2 + j]) << (8 * j);
        }
    }
#pragma unroll
    for (int round = 0; round < Tuning::kRounds; ++round) {
        const int64_t i = first + int64_t(round) * Tuning::kThreads * kValues;
        if (i >= n) continue;
        Pack<T, kValues> result;
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            result.values[j] = round_to<T>(__fmul_rn(table[code_of(bytes[round], j)], scale[round]));
        }
        if (kAligned && i + kValues <= n) {
            store_pack(values + i, result);
        } else {
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                if (i + j < n) values[i + j] = result.values[j];
            }
        }
    }
}

template <class T, bool kNested>
void launch(
    const uint8_t* packed, const BlockScales& scales, bnb_format format, T* values, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    using Tuning = Dequantize4bitTuning<T>;
    constexpr int64_t kPerBlock = int64_t(Tuning::kThreads) * Tuning::kValues * Tuning::kRounds;
    const bool aligned = is_aligned<uint8_t, 4>(packed) && is_aligned<T, Tuning::kValues>(values);
    const auto kernel = aligned ? dequantize_4bit_kernel<T, kNested, true> : dequantize_4bit_kernel<T, kNested, false>;
    kernel<<<grid_size((n + kPerBlock - 1) / kPerBlock), Tuning::kThreads, 0, stream>>>(
        packed, scales, format == BNB_FORMAT_NF4, values, n, blocksize, shift_of(blocksize));
    check_launch("dequantize_4bit_kernel");
}

}  // namespace

void dequantize_4bit(
    const uint8_t* packed, const BlockScales& scales, bnb_format format, void* values, bnb_dtype dtype, int64_t n,
    int64_t blocksize, cudaStream_t stream) {
    if (n == 0) return;
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (scales.codes != nullptr) {
            launch<T, true>(packed, scales, format, static_cast<T*>(values), n, blocksize, stream);
        } else {
            launch<T, false>(packed, scales, format, static_cast<T*>(values), n, blocksize, stream);
        }
    });
}

}  // namespace bnb
