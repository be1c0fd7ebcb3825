// The operands of the grouped products, and the shapes in which the tensor-core kernel for them is compiled.
#pragma once

#include <cstdint>

#include "../../common/platform.h"
#include "../block_scales.h"

namespace bnb {

// Rows are sorted by expert; those of expert e end at offsets[e]. Transposed: A is [R, N], out is [R, K].
struct GroupedGemm4bit {
    const void* A;           // [R, K]
    const uint8_t* packed;   // [E, N, K] codes, two a byte
    BlockScales scales;      // of the flattened stack
    float values[16];        // of the codes
    const int32_t* offsets;  // [E]
    const void* bias;        // [E, N] or null
    void* out;               // [R, N]
    int E, R, N, K;
    int block_shift;  // the block size is 1 << block_shift
};

// Outputs are rows of the weight, or its columns if it is multiplied transposed; the other are summed over.
struct GroupedTuning {
    int token_tiles;   // of 8 rows of A
    int output_warps;  // of a CTA, 32 outputs each
    int split;         // warps that share out what is summed over, 64 each at a time
    int stages;        // of the ring of weights and rows in flight
    int ctas;          // that a multiprocessor holds

    BNB_HOST_DEVICE constexpr int tokens() const { return 8 * token_tiles; }
    BNB_HOST_DEVICE constexpr int outputs() const { return 32 * output_warps; }
    BNB_HOST_DEVICE constexpr int depth() const { return 64 * split; }
    BNB_HOST_DEVICE constexpr int threads() const { return 32 * output_warps * split; }
};

// Few rows: CTAs small enough that a handful of experts fills the device. Many: each decoded weight meets all of them.
constexpr GroupedTuning kGroupedTunings[] = {
    {1, 1, 4, 4, 3},  // 0
    {2, 2, 2, 3, 3},  // 1
    {4, 4, 1, 4, 3},  // 2
    {8, 4, 1, 3, 3},  // 3
};
constexpr GroupedTuning kGroupedTransposedTunings[] = {
    {2, 4, 1, 4, 3},  // 0
    {8, 4, 1, 3, 3},  // 1
};

// One stage of the ring in shared memory; sizes in bytes.
struct GroupedStage {
    int token_stride;  // an odd number of 16 bytes: what a quarter of a warp reads at once meets in no bank
    int lines;         // packed rows of the weight, or pieces of such
    int line_bytes;
    int line_stride;
    int scale_stride;  // of the scales that outputs have in common, transposed: as above for pieces of a line
    int scales;        // float32

    BNB_HOST_DEVICE constexpr GroupedStage(const GroupedTuning& t, bool transposed)
        : token_stride(2 * t.depth() + 16),
          lines(transposed ? t.depth() : t.outputs()),
          line_bytes((transposed ? t.outputs() : t.depth()) / 2),
          line_stride(line_bytes + (!transposed && t.split % 2 == 0 ? 32 : 0)),
          scale_stride(transposed ? t.depth() + 8 : t.outputs()),
          scales(scale_stride * (transposed ? t.output_warps : t.split)) {}

    BNB_HOST_DEVICE constexpr int lines_at(const GroupedTuning& t) const { return t.tokens() * token_stride; }
    BNB_HOST_DEVICE constexpr int scales_at(const GroupedTuning& t) const { return lines_at(t) + lines * line_stride; }
    BNB_HOST_DEVICE constexpr int unit_at(const GroupedTuning& t) const { return scales_at(t) + scales * 4; }
    BNB_HOST_DEVICE constexpr int bytes(const GroupedTuning& t) const { return (unit_at(t) + 16 + 63) / 64 * 64; }
};

// What lies in shared memory, in this order; sizes in bytes.
struct GroupedShared {
    int table;  // of pairs of values
    int ring;
    int reduce;  // sums of the warps that share out what is summed over

    BNB_HOST_DEVICE constexpr GroupedShared(const GroupedTuning& t, bool transposed)
        : table(256 * 128),
          ring(t.stages * GroupedStage(t, transposed).bytes(t)),
          reduce((t.split - 1) * t.outputs() * t.tokens() * 4) {}

    BNB_HOST_DEVICE constexpr int bytes() const { return table + ring + reduce; }
};

}  // namespace bnb
