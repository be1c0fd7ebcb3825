// 8-bit block-wise quantization: the largest magnitude of each block, then the nearest entry of any ascending
// 256-entry map for every value; a tie takes the lower entry.
//
// Memory bound: sizeof(T) + 1 bytes per value. A lane owns chunks of 8 consecutive values and a warp a run of them, as
// in 4-bit quantization. The leading bits of a value (sign, exponent, six mantissa bits) choose a word of a table in
// shared memory: the first entry that they allow, and the remaining bits of the one midpoint that they may share. Where
// no two midpoints share them, as in the map in use, comparing the remaining bits ends the search; other maps walk up
// from there. The table is made once per CTA from the map itself, and the grid is persistent to pay for it once.

#include <cuda_fp16.h>

#include <algorithm>
#include <limits>

#include "device.cuh"
#include "launchers.h"
#include "scaled_blocks.cuh"

namespace bnb {
namespace {

template <class T, int kBlock>
struct Tuning {
    static constexpr int kThreads = 256;
    static constexpr int kHeld = BlockShare<kBlock>::kChunks * Chunk<T>::kWords;           // registers, of values
    static constexpr int kCtas = kHeld <= 16 ? 5 : kHeld <= 32 ? 4 : kHeld <= 64 ? 2 : 1;  // per multiprocessor
};

constexpr int kEntries = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kMantissaBits = 6;
constexpr int kRest = 23 - kMantissaBits;

// The midpoints of the map, which separate its entries; in shared memory, made by all threads of the CTA together.
class Midpoints {
  public:
    __device__ void make(const float* __restrict__ map) {
        for (int i = threadIdx.x; i < kEntries; i += blockDim.x) {
            of_[i] = i < kEntries - 1 ? midpoint(map[i], map[i + 1]) : kInfinity;
        }
        __syncthreads();
    }

    __device__ float operator[](int i) const { return of_[i]; }

    __device__ uint32_t entry_of(float scaled) const { return bucket_of(scaled, of_, kEntries - 1); }

  private:
    float of_[kEntries];  // the last is infinite
};

// The table of first entries.
class NearestEntry {
  public:
    // Made by all threads of the CTA together, from midpoints that are there. Returns whether find_at_once is right.
    __device__ bool make(const Midpoints& midpoints) {
        bool one_step = midpoints[kEntries - 2] < 1.0f;
        for (int i = threadIdx.x; i < 2 * kPerSign; i += blockDim.x) {
            const int key = i - kPerSign;
            int first = 0;  // midpoints with lower keys
            for (int step = kEntries / 2; step > 0; step /= 2) {
                if (key_of(order_of(midpoints[first + step - 1])) < key) first += step;
            }
            uint32_t word = ~0u << (32 - kRest) | first;
            if (key_of(order_of(midpoints[first])) == key) {
                word = rest_of(order_of(midpoints[first])) | first;
                const bool inexact = fabsf(midpoints[first]) < kLeast;
                const bool alone = first == kEntries - 2 || key_of(order_of(midpoints[first + 1])) != key;
                one_step = one_step && alone && !inexact;
            }
            words_[i] = word;
        }
        return __syncthreads_and(one_step);
    }

    // A word whose low byte is the entry for a value in [-1, 1].
    __device__ __forceinline__ uint32_t find_at_once(float scaled) const {
        const int32_t order = order_of(scaled);
        uint32_t word = words_[kPerSign + key_of(order)];
        // Left alone, the compiler computes both outcomes and selects.
        asm("{\n .reg .pred above;\n setp.gt.u32 above, %1, %0;\n @above add.u32 %0, %0, 1;\n}"
            : "+r"(word)
            : "r"(rest_of(order)));
        return word;
    }

    // The same for any map, and for infinity.
    __device__ __forceinline__ uint32_t walk(float scaled, const Midpoints& midpoints) const {
        uint32_t entry = words_[kPerSign + key_of(order_of(fminf(scaled, 1.0f)))] & 0xffu;
        while (entry < kEntries - 1 && scaled > midpoints[entry]) ++entry;
        return entry;
    }

  private:
    static constexpr float kLeast = 1.0f / (1 << 24);
    static constexpr int kPerSign = (25 << kMantissaBits) + 1;

    // An integer that ascends with the value, and strictly so from kLeast on: the bits of the magnitude over 2^102,
    // which makes one of kLeast's the smallest normal number, inverted for negative values.
    __device__ __forceinline__ static int32_t order_of(float x) {
        static_assert(kLeast == 0x1p-24f);
        return __float_as_int(__fmul_rn(fabsf(x), 0x1p-102f)) ^ __float_as_int(x) >> 31;
    }
    __device__ __forceinline__ static int32_t key_of(int32_t order) { return order >> kRest; }
    __device__ __forceinline__ static uint32_t rest_of(int32_t order) {
        return static_cast<uint32_t>(order) << (32 - kRest);
    }

    uint32_t words_[2 * kPerSign];
};

__device__ __forceinline__ uint32_t low_bytes(const uint32_t* four) {
    return __byte_perm(__byte_perm(four[0], four[1], 0x0040), __byte_perm(four[2], four[3], 0x0040), 0x5410);
}

// This warp's share of the whole blocks.
template <bool kOneStep, int kBlock, class T>
__device__ __forceinline__ void quantize_share(
    const NearestEntry& nearest, const Midpoints& midpoints, const T* __restrict__ values, uint8_t* __restrict__ codes,
    float* __restrict__ absmax, int64_t whole, bool aligned) {
    constexpr int kWarps = Tuning<T, kBlock>::kThreads / kLanes;
    constexpr int64_t kTurn = BlockShare<kBlock>::kValues;
    constexpr float kHighest = kOneStep ? 1.0f : kInfinity;
    const int64_t stride = int64_t(gridDim.x) * kWarps * kTurn;
    for (int64_t start = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes) * kTurn; start < whole;
         start += stride) {
        uint8_t* const target = codes + start + threadIdx.x % kLanes * kChunk;
        const auto quantize = [&](int at, const float (&scaled)[kChunk], bool exists) {
            uint32_t found[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                found[i] = kOneStep ? nearest.find_at_once(scaled[i]) : nearest.walk(scaled[i], midpoints);
            }
            if (exists)
                __stcs(reinterpret_cast<uint2*>(target + at), make_uint2(low_bytes(found), low_bytes(found + 4)));
        };
        scale_blocks<kBlock>(values, absmax, start, whole, aligned, kHighest, quantize);
    }
}

template <class T, int kBlock>
__global__ void __launch_bounds__(
    Tuning<T, kBlock>::kThreads, resident_ctas(Tuning<T, kBlock>::kCtas, Tuning<T, kBlock>::kThreads))
    quantize_blockwise_kernel(
        const T* __restrict__ values, const float* __restrict__ map, uint8_t* __restrict__ codes,
        float* __restrict__ absmax, int64_t whole, bool aligned) {
    __shared__ Midpoints midpoints;
    __shared__ NearestEntry nearest;
    midpoints.make(map);
    if (nearest.make(midpoints)) {
        quantize_share<true, kBlock>(nearest, midpoints, values, codes, absmax, whole, aligned);
    } else {
        quantize_share<false, kBlock>(nearest, midpoints, values, codes, absmax, whole, aligned);
    }
}

// Blocks of `count` values by a warp each, a byte at a time: the short one at the end, or whole ones whose codes are
// not aligned.
template <class T>
__global__ void quantize_blockwise_lone_kernel(
    const T* __restrict__ values, const float* __restrict__ map, uint8_t* __restrict__ codes,
    float* __restrict__ absmax, int count, bool whole) {
    __shared__ Midpoints midpoints;
    midpoints.make(map);
    const int64_t first = int64_t(blockIdx.x) * count;
    const LoneBlock<T> block(values + first, count, whole, absmax + blockIdx.x);
    for (int i = threadIdx.x; i < count; i += kLanes) {
        codes[first + i] = static_cast<uint8_t>(midpoints.entry_of(block.scaled(i, kInfinity)));
    }
}

template <class T>
void launch(
    const T* values, const float* map, uint8_t* codes, float* absmax, int64_t n, int64_t blocksize,
    cudaStream_t stream) {
    const int64_t whole = n - n % blocksize;
    const bool known = visit_blocksize(blocksize, [&](auto block) {
        if (whole == 0) return;
        if (reinterpret_cast<uintptr_t>(codes) % sizeof(uint2) != 0) {
            quantize_blockwise_lone_kernel<T><<<grid_size(whole / blocksize), kLanes, 0, stream>>>(
                values, map, codes, absmax, static_cast<int>(blocksize), true);
            return check_launch("quantize_blockwise");
        }
        using Tuning = Tuning<T, block()>;
        constexpr int64_t kPerCta = int64_t(Tuning::kThreads / kLanes) * BlockShare<block()>::kValues;
        const int64_t ctas =
            std::min<int64_t>((whole + kPerCta - 1) / kPerCta, Tuning::kCtas * current_device().multiprocessors);
        const bool aligned = reinterpret_cast<uintptr_t>(values) % 16 == 0;
        quantize_blockwise_kernel<T, block()>
            <<<grid_size(ctas), Tuning::kThreads, 0, stream>>>(values, map, codes, absmax, whole, aligned);
        check_launch("quantize_blockwise");
    });
    if (!known) {
        throw Error(BNB_STATUS_UNSUPPORTED, text("blocksize must be a power of two from 32 to 4096, got ", blocksize));
    }
    if (whole < n) {
        quantize_blockwise_lone_kernel<T><<<1, kLanes, 0, stream>>>(
            values + whole, map, codes + whole, absmax + whole / blocksize, static_cast<int>(n - whole), false);
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
