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

    __device__ void load(const T* from, bool aligned) {
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
                words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
            }
        } else {
            T values[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) values[i] = from[i];
            memcpy(words, values, sizeof(words));
        }
    }

    // The largest magnitude, as the bits of a float. Those of 16-bit types are compared two at a time.
    __device__ uint32_t largest() const {
        if constexpr (sizeof(T) == 4) {
            uint32_t bits = 0;
#pragma unroll
            for (int i = 0; i < kWords; ++i) bits = max(bits, words[i] & 0x7fffffffu);
            return bits;
        } else {
            uint32_t pair = 0;
#pragma unroll
            for (int i = 0; i < kWords; ++i) pair = __vmaxu2(pair, words[i] & 0x7fff7fffu);
            return __float_as_uint(to_float(T{static_cast<uint16_t>(max(pair >> 16, pair & 0xffffu))}));
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

// The largest of a group of lanes (a power of two), in all of them.
template <int kGroup>
__device__ inline uint32_t largest_in_group(uint32_t bits) {
#pragma unroll
    for (int distance = kGroup / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(~0u, bits, distance));
    }
    return bits;
}

// How a warp shares out blocks of kBlock values.
template <int kBlock>
struct BlockShare {
    static constexpr bool kWarpPerBlock = kBlock > kWarpChunk;
    static constexpr int kChunks = kWarpPerBlock ? kBlock / kWarpChunk : kChunksInFlight;
    static constexpr int kGroup = kWarpPerBlock ? kLanes : kBlock / kChunk;
    static constexpr int kValues = kChunks * kWarpChunk;  // per warp and turn
};

// Scale the kValues values from `start` on (of `whole`, a multiple of kBlock), write their blocks' absmax, and call
// body(index of the first value, eight scaled values) for each of this lane's chunks; all lanes call it together,
// those past the end with an index of -1.
template <int kBlock, class T, class Body>
__device__ void scale_blocks(
    const T* __restrict__ values, float* __restrict__ absmax, int64_t start, int64_t whole, bool aligned, Body&& body) {
    using Share = BlockShare<kBlock>;
    const int lane = threadIdx.x % kLanes;
    const int64_t first = start + lane * kChunk;

    Chunk<T> chunks[Share::kChunks];
#pragma unroll
    for (int c = 0; c < Share::kChunks; ++c) {
        chunks[c] = {};
        if (first + c * kWarpChunk < whole) chunks[c].load(values + first + c * kWarpChunk, aligned);
    }

    uint32_t largest[Share::kChunks] = {};
#pragma unroll
    for (int c = 0; c < Share::kChunks; ++c) {
        uint32_t& mine = largest[Share::kWarpPerBlock ? 0 : c];
        mine = max(mine, chunks[c].largest());
    }

    float reciprocal = 0.0f;
#pragma unroll
    for (int c = 0; c < Share::kChunks; ++c) {
        const int64_t at = first + c * kWarpChunk;
        if (!Share::kWarpPerBlock || c == 0) {
            const float block_max = __uint_as_float(largest_in_group<Share::kGroup>(largest[c]));
            if (lane % Share::kGroup == 0 && at < whole) absmax[at / kBlock] = block_max;
            reciprocal = 1.0f / floored_absmax(block_max);
        }
        float scaled[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) scaled[i] = __fmul_rn(chunks[c].get(i), reciprocal);
        body(at < whole ? at : -1, scaled);
    }
}

// The scale of the short block at the end, for one warp: kept as its absmax, and divided by.
template <class T>
__device__ float scale_of_tail(const T* __restrict__ values, int count) {
    uint32_t bits = 0;
    for (int i = threadIdx.x % kLanes; i < count; i += kLanes) bits = max(bits, magnitude_bits(to_float(values[i])));
    return floored_absmax(__uint_as_float(largest_in_group<kLanes>(bits)));
}

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
