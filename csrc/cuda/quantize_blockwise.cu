// 8-bit block-wise quantization: the largest magnitude of each block, then the nearest entry of any ascending
// 256-entry map for every value; a tie takes the lower entry.
//
// Memory bound: sizeof(T) + 1 bytes per value. A lane owns chunks of 8 consecutive values and a warp a run of them, as
// in 4-bit quantization. The search for the nearest entry starts at the first entry that a value's leading bits (sign,
// exponent, six mantissa bits) allow. Where no two of the map's midpoints share those bits, as in the maps in use, one
// comparison ends it; other maps walk up from there. That table of starting points is made once per CTA from the map
// itself, and the grid is persistent to pay for it once.

#include <cuda_fp16.h>

#include <algorithm>

#include "device.cuh"
#include "launchers.h"
#include "scaled_blocks.cuh"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kEntries = 256;
constexpr int kMantissaBits = 6;  // of the bits that choose a starting point
constexpr int kDropped = 23 - kMantissaBits;
constexpr uint32_t kLowest = (127u - 24u) << kMantissaBits;           // magnitudes below 2^-24 share one
constexpr uint32_t kPerSign = (127u << kMantissaBits) - kLowest + 1;  // up to and including 1

// Midpoints of the map and where to start looking, in shared memory.
class NearestEntry {
  public:
    struct Storage {
        float midpoints[kEntries];  // the last is infinite
        uint8_t start[2 * kPerSign];
    };

    // Made by all threads of the CTA together.
    __device__ NearestEntry(Storage& storage, const float* __restrict__ map) : storage_(storage) {
        for (int i = threadIdx.x; i < kEntries; i += blockDim.x) {
            storage_.midpoints[i] = i < kEntries - 1 ? midpoint(map[i], map[i + 1]) : __int_as_float(0x7f800000);
        }
        __syncthreads();
        bool one_step = true;
        for (uint32_t key = threadIdx.x; key < 2 * kPerSign; key += blockDim.x) {
            const int lowest = bucket_of(bound_of(key, false), storage_.midpoints, kEntries - 1);
            const int highest = bucket_of(bound_of(key, true), storage_.midpoints, kEntries - 1);
            storage_.start[key] = lowest;
            one_step = one_step && highest - lowest <= 1 && (key != kPerSign - 1 || lowest == kEntries - 1);
        }
        one_step_ = __syncthreads_and(one_step);
    }

    // Whether every search ends after one comparison, and NaN's at the highest entry without any.
    __device__ bool one_step() const { return one_step_; }

    template <bool kOneStep>
    __device__ __forceinline__ uint32_t find(float scaled) const {
        uint32_t code = storage_.start[key_of(scaled)];
        if constexpr (kOneStep) {
            if (scaled > storage_.midpoints[code]) ++code;
        } else {
            const float x = scaled > 1.0f ? 1.0f : scaled;  // NaN stays, and walks to the highest entry
            while (code < kEntries - 1 && is_above(x, storage_.midpoints[code])) ++code;
        }
        return code;
    }

  private:
    __device__ __forceinline__ static uint32_t key_of(float x) {
        const uint32_t bits = __float_as_uint(x);
        const uint32_t leading = min(max((bits & 0x7fffffffu) >> kDropped, kLowest), kLowest + kPerSign - 1) - kLowest;
        return leading + (bits >> 31) * kPerSign;
    }

    // No value in [-1, 1] with this key is smaller, or none is larger.
    __device__ static float bound_of(uint32_t key, bool upper) {
        const bool negative = key >= kPerSign;
        const uint32_t leading = negative ? key - kPerSign : key;
        const bool away_from_zero = upper != negative;
        if (leading == 0 && !away_from_zero) return 0.0f;
        const uint32_t edge = min(leading + away_from_zero, kPerSign - 1);
        const float magnitude = __uint_as_float((kLowest + edge) << kDropped);
        return negative ? -magnitude : magnitude;
    }

    Storage& storage_;
    bool one_step_;
};

template <bool kOneStep, int kBlock, class T>
__device__ __forceinline__ void quantize_turn(
    const NearestEntry& nearest, const T* __restrict__ values, uint8_t* __restrict__ codes, float* __restrict__ absmax,
    int64_t start, int64_t whole, bool aligned) {
    scale_blocks<kBlock>(values, absmax, start, whole, aligned, [&](int64_t at, const float (&scaled)[kChunk]) {
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < kChunk; ++i) words[i / 4] |= nearest.find<kOneStep>(scaled[i]) << (8 * (i % 4));
        if (at >= 0) __stcs(reinterpret_cast<uint2*>(codes + at), make_uint2(words[0], words[1]));
    });
}

template <class T, int kBlock>
__global__ void __launch_bounds__(kThreads) quantize_blockwise_kernel(
    const T* __restrict__ values, const float* __restrict__ map, uint8_t* __restrict__ codes,
    float* __restrict__ absmax, int64_t whole, bool aligned) {
    __shared__ NearestEntry::Storage storage;
    const NearestEntry nearest(storage, map);
    constexpr int kWarps = kThreads / kLanes;
    constexpr int64_t kTurn = BlockShare<kBlock>::kValues;
    const int64_t stride = int64_t(gridDim.x) * kWarps * kTurn;
    for (int64_t start = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kTurn; start < whole;
         start += stride) {
        if (nearest.one_step()) {
            quantize_turn<true, kBlock>(nearest, values, codes, absmax, start, whole, aligned);
        } else {
            quantize_turn<false, kBlock>(nearest, values, codes, absmax, start, whole, aligned);
        }
    }
}

// The short block at the end, by one warp.
template <class T>
__global__ void quantize_blockwise_tail_kernel(
    const T* __restrict__ values, const float* __restrict__ map, uint8_t* __restrict__ codes,
    float* __restrict__ absmax, int count) {
    __shared__ NearestEntry::Storage storage;
    const NearestEntry nearest(storage, map);
    const float scale = scale_of_tail(values, count);
    if (threadIdx.x == 0) *absmax = scale;
    for (int i = threadIdx.x; i < count; i += kLanes) {
        codes[i] = static_cast<uint8_t>(nearest.find<false>(__fdiv_rn(to_float(values[i]), scale)));
    }
}

template <class T>
void launch(
    const T* values, const float* map, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    const int64_t whole = n - n % blocksize;
    const bool known = visit_blocksize(blocksize, [&](auto block) {
        if (whole == 0) return;
        constexpr int64_t kPerCta = int64_t(kThreads / kLanes) * BlockShare<block()>::kValues;
        const int64_t ctas = std::min<int64_t>((whole + kPerCta - 1) / kPerCta, 8 * current_device().multiprocessors);
        const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
        quantize_blockwise_kernel<T, block()>
            <<<grid_size(ctas), kThreads, 0, stream>>>(values, map, codes, absmax, whole, aligned);
        check_launch("quantize_blockwise");
    });
    if (!known) {
        throw Error(BNB_STATUS_UNSUPPORTED, text("blocksize must be a power of two from 32 to 4096, got ", blocksize));
    }
    if (whole < n) {
        quantize_blockwise_tail_kernel<T><<<1, kLanes, 0, stream>>>(
            values + whole, map, codes + whole, absmax + whole / blocksize, static_cast<int>(n - whole));
        check_launch("quantize_blockwise");
    }
}

}  // namespace

void quantize_blockwise(
    const void* values, bnb_dtype dtype, const float* map, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(static_cast<const T*>(values), map, codes, absmax, n, blocksize, stream);
    });
}

}  // namespace bnb
