// The operands of out = A @ W.T + bias, W in 4 bits, as every kernel for it takes them.
#pragma once

#include <cstdint>

#include "../block_scales.h"

namespace bnb {

struct Gemm4bit {
    const void* A;          // [M, K]
    const uint8_t* packed;  // [N, K] codes, two a byte
    BlockScales scales;     // of the flattened weight
    const float* code;      // 16 values on the device, or null for `values`
    float values[16];
    const void* bias;  // [N] or null
    void* out;         // [M, N]
    void* workspace;   // of the warpgroup kernel alone: it begins with the arranged tokens
    int M, N, K;
    int block_shift;  // the block size is 1 << block_shift
};

}  // namespace bnb
