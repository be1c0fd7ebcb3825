// The warpgroup matrix instruction of sm_90a: 64 rows from registers times tokens from shared memory, k = 16.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/dtype.h"
#include "../warpgroup.cuh"

namespace bnb {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A matrix in shared memory whose rows are short runs of k: eight rows of 16 bytes lie together, `k_stride` bytes from
// such a core to the next along k, `row_stride` bytes to that of the next eight rows.
class MatrixInShared {
  public:
    __device__ __forceinline__ MatrixInShared(uint32_t address, uint32_t k_stride, uint32_t row_stride)
        : descriptor_(uint64_t(row_stride >> 4) << 32 | k_stride >> 4 << 16 | address >> 4) {}

    // The descriptor of the matrix so many bytes on.
    __device__ __forceinline__ uint64_t at(uint32_t bytes) const { return descriptor_ + (bytes >> 4); }

  private:
    uint64_t descriptor_;
};

// Keeps the compiler from using the results of products before they have been waited for.
template <int kCount>
__device__ __forceinline__ void products_are_there(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Lane (g, t) gives two values of row g of an 8 x 8 matrix and gets two of column g.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
    return pair;
}

#define BNB_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BNB_OUT_8(i) BNB_OUT_4(i), BNB_OUT_4(i + 4)
#define BNB_OUT_16(i) BNB_OUT_8(i), BNB_OUT_8(i + 8)
#define BNB_OUT_32(i) BNB_OUT_16(i), BNB_OUT_16(i + 16)
#define BNB_OUT_64(i) BNB_OUT_32(i), BNB_OUT_32(i + 32)
#define BNB_OUT_128(i) BNB_OUT_64(i), BNB_OUT_64(i + 64)

// One instruction; its operands are numbered after the outputs.
#define BNB_WGMMA(tokens, types, outputs, a0, a1, a2, a3, b)                                 \
    asm volatile(                                                                            \
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." types " {" BNB_LIST_##outputs \
        "}, "                                                                                \
        "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, 0;\n}"                  \
        : BNB_OUT_##outputs(0)                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix))

// d (64 rows, kTokens columns, half of them a thread's) is increased by a times the matrix.
template <class T, int kTokens>
__device__ __forceinline__ void multiply_tokens(float (&d)[kTokens / 2], const uint32_t* a, uint64_t matrix) {
    constexpr bool kBrain = std::is_same_v<T, BFloat16>;
    if constexpr (kTokens == 32 && kBrain) {
        BNB_WGMMA(32, "bf16.bf16", 16, 16, 17, 18, 19, 20);
    } else if constexpr (kTokens == 32) {
        BNB_WGMMA(32, "f16.f16", 16, 16, 17, 18, 19, 20);
    } else if constexpr (kTokens == 64 && kBrain) {
        BNB_WGMMA(64, "bf16.bf16", 32, 32, 33, 34, 35, 36);
    } else if constexpr (kTokens == 64) {
        BNB_WGMMA(64, "f16.f16", 32, 32, 33, 34, 35, 36);
    } else if constexpr (kTokens == 128 && kBrain) {
        BNB_WGMMA(128, "bf16.bf16", 64, 64, 65, 66, 67, 68);
    } else if constexpr (kTokens == 128) {
        BNB_WGMMA(128, "f16.f16", 64, 64, 65, 66, 67, 68);
    } else if constexpr (kTokens == 256 && kBrain) {
        BNB_WGMMA(256, "bf16.bf16", 128, 128, 129, 130, 131, 132);
    } else if constexpr (kTokens == 256) {
        BNB_WGMMA(256, "f16.f16", 128, 128, 129, 130, 131, 132);
    } else {
        static_assert(kTokens == 32, "a number of tokens that an instruction takes");
    }
}

#endif  // sm_90a

}  // namespace bnb
