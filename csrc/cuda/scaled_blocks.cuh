// Values over their block's largest magnitude: the half that 4-bit and 8-bit quantization share.
//
// A lane owns chunks of 8 consecutive values (16-byte loads) and a warp several chunks at once, so that enough loads
// are in flight to cover memory's latency. A block of up to 256 values belongs to a group of lanes, a larger one to a
// whole warp: shuffles alone find its absmax, and no barrier is needed. Magnitudes are compared as integers, whose
// order is the floats' order with NaN on top, so a NaN makes its block's absmax NaN as on every other device.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/encode.h"

namespace bnb {

constexpr int kLanes = 32;
constexpr int kChunk = 8;                    // values a lane loads at once
constexpr int kWarpChunk = kLanes * kChunk;  // 256
constexpr int kChunksInFlight = 4;           // for blocks of up to 256 values

// Eight consecutive values as they lie in memory.
template <class T>
struct Chunk {
    static constexpr int kWords = kChunk * sizeof(T) / sizeof(uint32_t);
    uint32_t words[kWords];

    __device__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }

    __device__ void load_unaligned(const T* from) {
        T values[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[i] = from[i];
        memcpy(words, values, sizeof(words));
    }

    // The largest magnitude so far, and of two such. 16-bit types have it in halves, each of every other value.
    __device__ uint32_t largest() const {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) bits = larger(bits, words[i] & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu));
        return bits;
    }

    __device__ static uint32_t larger(uint32_t a, uint32_t b) { return sizeof(T) == 4 ? max(a, b) : __vmaxu2(a, b); }

    __device__ static float magnitude(uint32_t largest) {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(largest);
        } else {
            const Chunk one{max(largest >> 16, largest & 0xffffu)};
            return one.get(0);
        }
    }

    __device__ float get(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[i]);
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        } else {
            return __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))));
        }
    }
};

__device__ inline uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// How a warp shares out blocks of kBlock values.
template <int kBlock>
struct BlockShare {
    static constexpr bool kWarpPerBlock = kBlock > kWarpChunk;
    static constexpr int kChunks = kWarpPerBlock ? kBlock / kWarpChunk : kChunksInFlight;
    static constexpr int kGroup = kWarpPerBlock ? kLanes : kBlock / kChunk;
    static constexpr int kValues = kChunks * kWarpChunk;  // per warp and turn
};

// The largest of a group of kGroup lanes, in all of them, where every group of kFrom has it already.
template <class T, int kGroup, int kFrom = 1>
__device__ inline uint32_t largest_in_group(uint32_t bits) {
#pragma unroll
    for (int distance = kGroup / 2; distance >= kFrom; distance /= 2) {
        bits = Chunk<T>::larger(bits, __shfl_xor_sync(~0u, bits, distance));
    }
    return bits;
}

// Of the four numbers of every lane, the maxima over each group of lanes: those of number c in the lanes whose low two
// bits are keeper_of(c), and the other way round. Each step halves the numbers that a lane still has, so that four cost
// little more than one.
__device__ constexpr int keeper_of(int number) { return number / 2 + number % 2 * 2; }

template <class T, int kGroup>
__device__ inline uint32_t largest_of_four(const uint32_t (&bits)[4], int lane) {
    static_assert(kGroup >= 4);
    const bool odd = lane & 1, upper = lane & 2;
    uint32_t pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(~0u, odd ? bits[i] : bits[2 + i], 1);
        pair[i] = Chunk<T>::larger(odd ? bits[2 + i] : bits[i], other);
    }
    const uint32_t other = __shfl_xor_sync(~0u, upper ? pair[0] : pair[1], 2);
    return largest_in_group<T, kGroup, 4>(Chunk<T>::larger(upper ? pair[1] : pair[0], other));
}

// Scale the kValues values from `start` on (of `whole`, a multiple of kBlock), write their blocks' absmax, and call
// body(c * kWarpChunk, eight scaled values, whether they exist) for each chunk c of this lane, whose first begins at
// start + lane * kChunk; all lanes call it together. Scaled values lie in [-1, 1], but NaN becomes `highest`.
template <int kBlock, class T, class Body>
__device__ __forceinline__ void scale_blocks(
    const T* __restrict__ values, float* __restrict__ absmax, int64_t start, int64_t whole, bool aligned, float highest,
    Body&& body) {
    using Share = BlockShare<kBlock>;
    const int lane = threadIdx.x % kLanes;
    const int left = static_cast<int>(min(whole - start, int64_t(Share::kValues))) - lane * kChunk;
    const T* mine = values + start + lane * kChunk;

    Chunk<T> chunks[Share::kChunks];
    if (aligned && whole - start >= Share::kValues) {
#pragma unroll
        for (int c = 0; c < Share::kChunks; ++c) chunks[c].load(mine + c * kWarpChunk);
    } else {
#pragma unroll
        for (int c = 0; c < Share::kChunks; ++c) {
            chunks[c] = {};
            if (c * kWarpChunk < left) chunks[c].load_unaligned(mine + c * kWarpChunk);
        }
    }

    float block_max;
    if constexpr (Share::kWarpPerBlock) {
        uint32_t largest = 0;
#pragma unroll
        for (int c = 0; c < Share::kChunks; ++c) largest = Chunk<T>::larger(largest, chunks[c].largest());
        block_max = Chunk<T>::magnitude(largest_in_group<T, kLanes>(largest));
        if (lane == 0 && left > 0) absmax[start / kBlock] = block_max;
    } else {
        static_assert(Share::kChunks == 4);
        uint32_t largest[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) largest[c] = chunks[c].largest();
        block_max = Chunk<T>::magnitude(largest_of_four<T, Share::kGroup>(largest, lane));
        const int at = keeper_of(lane % 4) * kWarpChunk;
        if (lane % Share::kGroup < 4 && at < left) absmax[start / kBlock + (at + lane * kChunk) / kBlock] = block_max;
    }
    const bool finite = __all_sync(~0u, magnitude_bits(block_max) < 0x7f800000u);
    const float reciprocal = 1.0f / floored_absmax(block_max);

#pragma unroll
    for (int c = 0; c < Share::kChunks; ++c) {
        const float its = Share::kWarpPerBlock ? reciprocal : __shfl_sync(~0u, reciprocal, keeper_of(c), 4);
        float scaled[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) scaled[i] = __fmul_rn(chunks[c].get(i), its);
        if (!finite) {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) scaled[i] = fminf(scaled[i], highest);
        }
        body(c * kWarpChunk, scaled, c * kWarpChunk < left);
    }
}

// A block that one warp scales, whatever its address. A short one is divided by its absmax, which has a floor; a whole
// one is multiplied by the reciprocal, as above.
template <class T>
class LoneBlock {
  public:
    // All lanes call it together; one writes the absmax.
    __device__ LoneBlock(const T* __restrict__ values, int count, bool whole, float* absmax)
        : values_(values),
          count_(count),
          whole_(whole) {
        uint32_t bits = 0;
        for (int i = threadIdx.x % kLanes; i < count; i += kLanes)
            bits = max(bits, magnitude_bits(to_float(values[i])));
        const float largest = __uint_as_float(largest_in_group<float, kLanes>(bits));
        divisor_ = floored_absmax(largest);
        reciprocal_ = 1.0f / divisor_;
        if (threadIdx.x % kLanes == 0) *absmax = whole ? largest : divisor_;
    }

    // NaN becomes `highest`; past the end there are zeros.
    __device__ float scaled(int i, float highest) const {
        if (i >= count_) return 0.0f;
        const float value = to_float(values_[i]);
        return fminf(whole_ ? __fmul_rn(value, reciprocal_) : __fdiv_rn(value, divisor_), highest);
    }

  private:
    const T* values_;
    int count_;
    bool whole_;
    float divisor_, reciprocal_;
};

// Call body(std::integral_constant<int, blocksize>{}) for a block size these kernels have; false otherwise.
template <class Body>
bool visit_blocksize(int64_t blocksize, Body&& body) {
    switch (blocksize) {
        case 32: body(std::integral_constant<int, 32>{}); return true;
        case 64: body(std::integral_constant<int, 64>{}); return true;
        case 128: body(std::integral_constant<int, 128>{}); return true;
        case 256: body(std::integral_constant<int, 256>{}); return true;
        case 512: body(std::integral_constant<int, 512>{}); return true;
        case 1024: body(std::integral_constant<int, 1024>{}); return true;
        case 2048: body(std::integral_constant<int, 2048>{}); return true;
        case 4096: body(std::integral_constant<int, 4096>{}); return true;
        default: return false;
    }
}

}  // namespace bnb
