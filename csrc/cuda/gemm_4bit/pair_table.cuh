// Decoding 4-bit codes to operands of tensor cores: a table of pairs of values in shared memory, indexed by a byte.
#pragma once

#include <type_traits>

#include "../async.cuh"
#include "../mma_instructions.cuh"
#include "../vector_io.cuh"
#include "tuning.h"

namespace bnb {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

extern __shared__ __align__(1024) char mma_shared[];

// A factor for pairs of values, in two parts, so that a product is rounded but the factor is not.
template <class T>
struct ScalePair {
    uint32_t high, low;

    ScalePair() = default;

    __device__ __forceinline__ explicit ScalePair(float scale) {
        float part;
        if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of the bits, without a conversion
            const uint32_t bits = __float_as_uint(scale);
            part = __uint_as_float(bits & 0xffff0000u);
            high = __byte_perm(bits, bits, 0x3232);
        } else {
            part = to_float(round_to<T>(scale));
            high = pair_of<T>(scale, scale);
        }
        const float rest = __fsub_rn(scale, part);
        low = pair_of<T>(rest, rest);
    }

    __device__ __forceinline__ uint32_t scaled(uint32_t pair) const {
        uint32_t product;
        if constexpr (std::is_same_v<T, BFloat16>) {
            asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(low));
            asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(product) : "r"(pair), "r"(high));
        } else {
            asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(low));
            asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(product) : "r"(pair), "r"(high));
        }
        return product;
    }
};

// It lies at the beginning of shared memory and does not change once filled.
template <class T>
class PairTable {
  public:
    __device__ explicit PairTable(int lane = threadIdx.x % 32) : base_(shared_address(mma_shared)), lane4_(lane * 4) {
        asm("" : "+r"(base_), "+r"(lane4_));  // or the compiler would compute them anew at each use
    }

    // Entry b holds the values of the high and the low nibble of b, 32 times. Whole warps call this: each lane reads
    // one value, as a read of constant memory at different places is slow, and two lanes write an entry.
    template <class Value>
    __device__ __forceinline__ void fill(const Value& value) {
        const float mine = value(threadIdx.x % 16);
        for (int first = 0; first < kPairs * 2; first += blockDim.x) {
            const int i = first + threadIdx.x, pair = i / 2 % kPairs;
            const float high = __shfl_sync(~0u, mine, pair >> 4), low = __shfl_sync(~0u, mine, pair & 15);
            const uint32_t bits = pair_of<T>(high, low);
            char* const half = mma_shared + pair * kPairStride + i % 2 * 64;
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // in such an order that eight lanes meet in no bank
                const int piece = (j + pair) % 4;
                if (i < kPairs * 2) *reinterpret_cast<uint4*>(half + piece * 16) = make_uint4(bits, bits, bits, bits);
            }
        }
    }

    template <int kByte>
    __device__ __forceinline__ uint32_t look_up(uint32_t packed) const {
        static_assert(kPairStride == 256, "a byte of the address is the pair");
        const uint32_t offset = __byte_perm(packed, lane4_, 0x5504 | kByte << 4);
        uint32_t pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(base_ + offset));
        return pair;
    }

  private:
    uint32_t base_, lane4_;
};

#endif  // sm_80

}  // namespace bnb
