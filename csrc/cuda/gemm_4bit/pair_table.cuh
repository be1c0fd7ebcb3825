// Decoding 4-bit codes to operands of tensor cores: a table of pairs of values in shared memory, indexed by a byte.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "../vector_io.cuh"
#include "async.cuh"
#include "tuning.h"

namespace bnb {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

extern __shared__ __align__(1024) char mma_shared[];

template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
    const T pair[2] = {round_to<T>(low), round_to<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return bits;
}

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
template <class T, int kStride>
class PairTable {
  public:
    __device__ PairTable() : base_(shared_address(mma_shared)), lane4_(threadIdx.x % 32 * 4) {
        asm("" : "+r"(base_));  // or the compiler would compute it anew at each use, with a divergent register
    }

    // Entry b holds the values of the high and the low nibble of b, 32 times.
    template <class Value>
    __device__ __forceinline__ void fill(const Value& value) {
        for (int i = threadIdx.x; i < kPairs * 8; i += blockDim.x) {
            const int pair = i / 8;
            const uint32_t bits = pair_of<T>(value(pair >> 4), value(pair & 15));
            *reinterpret_cast<uint4*>(mma_shared + pair * kStride + i % 8 * 16) = make_uint4(bits, bits, bits, bits);
        }
    }

    template <int kByte>
    __device__ __forceinline__ uint32_t look_up(uint32_t packed) const {
        uint32_t offset;
        if constexpr (kStride == 256) {
            offset = __byte_perm(packed, lane4_, 0x5504 | kByte << 4);
        } else {
            static_assert(kStride == 128, "an entry for each of 32 lanes");
            const uint32_t shifted = kByte == 0 ? packed << 7 : packed >> (8 * kByte - 7);
            asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(offset) : "r"(shifted), "r"(0x7f80), "r"(lane4_));
        }
        uint32_t pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(base_ + offset));
        return pair;
    }

  private:
    uint32_t base_, lane4_;
};

#endif  // sm_80

}  // namespace bnb
