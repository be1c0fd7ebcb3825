// The scales of a tensor's blocks as they are stored: float32, or 8-bit codes with a float32 scale for 256 of them.
#pragma once

#include <cstdint>

namespace bnb {

// Block b is scaled by absmax[b], or with codes by code[codes[b]] * absmax[b / 256] + *offset.
struct BlockScales {
    const float* absmax;
    const uint8_t* codes;  // null if not nested; then so are the other two
    const float* code;     // 256 entries
    const float* offset;
};

// The exponent of a power of two; -1 for other block sizes, which have to divide.
inline int shift_of(int64_t blocksize) {
    if ((blocksize & (blocksize - 1)) != 0) return -1;
    int shift = 0;
    while (int64_t(1) << shift < blocksize) ++shift;
    return shift;
}

#ifdef __CUDACC__

__device__ __forceinline__ int64_t block_of(int64_t i, int64_t blocksize, int shift) {
    return shift >= 0 ? i >> shift : i / blocksize;
}

// Nested scales are expanded where they are used, so that their float32 form never exists in memory.
template <bool kNested>
__device__ __forceinline__ float scale_of(const BlockScales& scales, int64_t block) {
    if constexpr (!kNested) return __ldg(scales.absmax + block);
    const float value = __ldg(scales.code + __ldg(scales.codes + block));
    return __fadd_rn(__fmul_rn(value, __ldg(scales.absmax + block / 256)), __ldg(scales.offset));
}

#endif

}  // namespace bnb
