// The tile layout that earlier releases rearranged CPU weights into, kept readable for programs that still hold it.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace bnb {

// Rewrite tiles of [N, K] codes as plain packed rows, and bfloat16 absmax [blocks, N] as float32 [N, blocks].
void untile_4bit(
    const uint8_t* tiles, const BFloat16* absmax, uint8_t* packed, float* flat_absmax, int64_t N, int64_t K,
    int64_t blocks);

}  // namespace bnb
