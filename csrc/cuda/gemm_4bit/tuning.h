// The shapes in which the tensor-core kernel for few tokens is compiled. plan.cpp chooses among them by position.
#pragma once

#include "../../common/platform.h"

namespace bnb {

struct MmaTuning {
    int token_tiles;   // of 8 tokens
    int warps;         // of a CTA; they share out K, 256 each at a time
    int row_tiles;     // of 16 rows, accumulated between two reductions over the warps
    int stages;        // of a warp's ring of weights in flight
    int table_stride;  // bytes from one pair of values to the next: at 256 its address is one byte permutation
    int cluster;       // CTAs that share out K; 1 where clusters do not exist
};

constexpr MmaTuning kMmaTunings[] = {
    {1, 16, 7, 2, 128, 1},  // 0
    {1, 16, 7, 3, 256, 1},  // 1
    {1, 8, 4, 2, 128, 1},   // 2
    {2, 8, 4, 3, 128, 1},   // 3
    {2, 8, 7, 4, 256, 1},   // 4
    {2, 8, 4, 2, 128, 1},   // 5
    {4, 8, 2, 3, 128, 1},   // 6
    {2, 8, 7, 3, 256, 2},   // 7
};

constexpr int kMmaTuningCount = sizeof(kMmaTunings) / sizeof(kMmaTunings[0]);

constexpr int kMmaK = 256;                   // of a warp and stage: one 128-byte line of a packed row
constexpr int kMmaRows = 16;                 // of a tile
constexpr int kMmaBlocks = kMmaK / 64;       // scales of a row and stage
constexpr int kLineStride = kMmaK / 2 + 32;  // eight rows' 8-byte reads meet in no bank
constexpr int kScalesAt = kMmaRows * kLineStride;
constexpr int kStageBytes = kScalesAt + kMmaRows * kMmaBlocks * 4;
constexpr int kPairs = 256;
constexpr int kMmaTileFloats = kMmaRows * 8;  // of one tile's results for 8 tokens
constexpr int kReducedTiles = 2;              // that go through shared memory at once

// What lies in shared memory, in this order; sizes in bytes.
struct MmaShared {
    int table;       // of pairs of values
    int rings;       // of weights in flight
    int reduce;      // the warps' sums
    int shares;      // clusters: the CTAs' sums
    int scale_code;  // of nested statistics

    BNB_HOST_DEVICE constexpr MmaShared(const MmaTuning& t, bool nested)
        : table(kPairs * t.table_stride),
          rings(t.warps * t.stages * kStageBytes),
          reduce(kReducedTiles * t.token_tiles * t.warps * kMmaTileFloats * 4),
          shares(t.cluster > 1 ? 2 * t.row_tiles * t.token_tiles * kMmaTileFloats * 4 : 0),
          scale_code(nested ? 256 * 4 : 0) {}

    BNB_HOST_DEVICE constexpr int bytes() const { return table + rings + reduce + shares + scale_code; }
};

}  // namespace bnb
