// The shapes in which the tensor-core kernel for few tokens is compiled. plan.cpp chooses among them by position.
#pragma once

#include <cstdint>

#include "../../common/platform.h"

namespace bnb {

struct MmaTuning {
    int token_tiles;  // of 8 tokens
    int warps;        // of a CTA; they share out K, 256 each at a time
    int row_tiles;    // of 16 rows, between two reductions over the warps
    int stages;       // of a warp's ring of weights in flight
    int together;     // blocks that are decoded together, as far as registers suffice
};

constexpr MmaTuning kMmaTunings[] = {
    {1, 16, 7, 2, 2},  // 0
    {1, 8, 4, 2, 2},   // 1
    {2, 8, 7, 4, 4},   // 2
    {2, 8, 14, 3, 4},  // 3
    {2, 8, 3, 2, 4},   // 4
    {3, 8, 7, 4, 1},   // 5
    {4, 8, 6, 3, 1},   // 6
    {4, 8, 2, 3, 1},   // 7
};

constexpr int kMmaTuningCount = sizeof(kMmaTunings) / sizeof(kMmaTunings[0]);

constexpr int kMmaK = 256;              // of a warp and stage: one 128-byte line of a packed row
constexpr int kMmaRows = 16;            // of a tile
constexpr int kMmaBlocks = kMmaK / 64;  // scales of a row and stage
constexpr int kMmaLine = kMmaK / 2;     // bytes
constexpr int kPairs = 256;             // of 4-bit values: a byte
constexpr int kPairStride = 256;        // bytes between pairs in shared memory: its address is one byte permutation
constexpr int kMmaUnitBytes = kMmaRows * 8 * 4;  // of one tile's results for 8 tokens

// What lies in shared memory, in this order; sizes in bytes.
struct MmaShared {
    // A pair takes half of its stride, a line of a stage the other; the lines of further stages lie in pairs too.
    static constexpr int kTable = kPairs * kPairStride;
    static constexpr int kStagesBeside = kPairs / kMmaRows;

    int rings;         // of weights in flight, but for those beside the table
    int stage_scales;  // of a stage; nested: codes and factors
    int scales;        // of all stages
    int sums;          // of every warp
    int scale_code;    // of nested statistics

    BNB_HOST_DEVICE constexpr MmaShared(const MmaTuning& t, bool nested)
        : rings((t.warps * t.stages - kStagesBeside) * kMmaRows * kMmaLine),
          stage_scales(kMmaRows * kMmaBlocks * (nested ? 5 : 4)),
          scales(t.warps * t.stages * stage_scales),
          sums(t.row_tiles * t.token_tiles * t.warps * kMmaUnitBytes),
          scale_code(nested ? 256 * 4 : 0) {}

    BNB_HOST_DEVICE constexpr int scales_at() const { return kTable + rings; }
    BNB_HOST_DEVICE constexpr int sums_at() const { return scales_at() + scales; }
    BNB_HOST_DEVICE constexpr int scale_code_at() const { return sums_at() + sums; }
    BNB_HOST_DEVICE constexpr int bytes() const { return scale_code_at() + scale_code; }
};

// The shapes of the warpgroup kernel (sm_90a), which the plan counts after those above.
struct WgmmaTuning {
    int tokens;        // of a CTA: the width of one product
    int groups;        // of four warps, with 64 rows each
    int token_blocks;  // of 64 k in a slot of the ring of tokens

    BNB_HOST_DEVICE constexpr int rows() const { return groups * 64; }
    BNB_HOST_DEVICE constexpr int threads() const { return groups * 128; }
};

constexpr WgmmaTuning kWgmmaTunings[] = {
    {32, 4, 2},   // 0
    {64, 4, 2},   // 1
    {64, 3, 2},   // 2
    {128, 3, 1},  // 3
    {128, 2, 1},  // 4
    {256, 2, 1},  // 5
};

constexpr int kWgmmaTuningCount = sizeof(kWgmmaTunings) / sizeof(kWgmmaTunings[0]);

// What lies in shared memory, in this order; sizes in bytes.
struct WgmmaShared {
    static constexpr int kTokenSlots = 4;
    int table, tokens, barriers, scale_code;

    BNB_HOST_DEVICE constexpr WgmmaShared(const WgmmaTuning& t, bool nested)
        : table(kPairs * kPairStride),
          tokens(kTokenSlots * t.token_blocks * t.tokens * 128),
          barriers(kTokenSlots * 16),
          scale_code(nested ? 256 * 4 : 0) {}

    BNB_HOST_DEVICE constexpr int scale_code_at() const { return table + tokens + barriers; }
    BNB_HOST_DEVICE constexpr int bytes() const { return scale_code_at() + scale_code; }
};

// How the stages of all tiles, one tile after the other, are shared out among CTAs.
struct WgmmaSplit {
    int each, all;  // stages: of a CTA, and together
    void* parts;    // what CTAs leave of tiles they share
};

// The workspace of a problem: the arranged tokens, then the parts; sizes in bytes. Tiles of tokens and stages of K are
// filled up with zeros.
struct WgmmaWorkspace {
    int64_t token_tiles, of_tile;  // stages of K
    int64_t stages, each, ctas;
    int64_t arranged, parts;

    constexpr WgmmaWorkspace(const WgmmaTuning& t, int64_t M, int64_t N, int64_t K, int multiprocessors)
        : token_tiles((M + t.tokens - 1) / t.tokens),
          of_tile((K + kMmaK - 1) / kMmaK),
          stages((N + t.rows() - 1) / t.rows() * token_tiles * of_tile),
          each((stages + multiprocessors - 1) / multiprocessors),
          ctas((stages + each - 1) / each),
          arranged(token_tiles * t.tokens * of_tile * kMmaK * 2),
          parts(shares_tiles() ? ctas * 2 * t.rows() * t.tokens * 4 : 0) {}

    constexpr bool shares_tiles() const { return each % of_tile != 0; }
    constexpr int64_t bytes() const { return arranged + parts; }
};

}  // namespace bnb
