// Who computes what of a grouped product: where experts' rows end is known on the device alone.
//
// A unit is up to kTokens rows of one expert times kOutputs outputs. CTAs take units in turn, whatever their number.
// Units of the same weights follow one another, so that these are read from memory once and from L2 after that.
#pragma once

#include <cstdint>

#include "grouped.h"

namespace bnb {

struct alignas(16) GroupedUnit {
    int expert;
    int first_row, rows;  // no rows: there are no more units
    int first_output;
};

// Where the last expert's rows end. No offset counts that leaves the rows there are.
__device__ __forceinline__ int end_of_rows(const GroupedGemm4bit& p) {
    return p.E == 0 ? 0 : min(max(__ldg(p.offsets + p.E - 1), 0), p.R);
}

// The units of this CTA. A whole warp calls, each for itself; lane i holds expert base_ + i.
template <int kTokens, int kOutputs>
class GroupedUnits {
  public:
    __device__ GroupedUnits(const GroupedGemm4bit& p, int outputs)
        : p_(p),
          last_(end_of_rows(p)),
          blocks_((outputs + kOutputs - 1) / kOutputs),
          next_(blockIdx.x) {
        load();
    }

    __device__ __forceinline__ GroupedUnit next() {
        while (base_ < p_.E && next_ - first_ >= all_tiles_ * blocks_) {
            first_ += all_tiles_ * blocks_;
            base_ += 32;
            load();
        }
        if (base_ >= p_.E) return {0, 0, 0, 0};
        const int local = next_ - first_;
        next_ += gridDim.x;
        const int lane = __ffs(__ballot_sync(~0u, tiles_through_ * blocks_ > local)) - 1;
        const int begin = __shfl_sync(~0u, begin_, lane), end = __shfl_sync(~0u, end_, lane);
        const int through = __shfl_sync(~0u, tiles_through_, lane);
        const int tiles = (end - begin + kTokens - 1) / kTokens;
        const int within = local - (through - tiles) * blocks_;
        const int block = within / tiles, first_row = begin + (within - block * tiles) * kTokens;
        return {base_ + lane, first_row, min(kTokens, end - first_row), block * kOutputs};
    }

  private:
    // Offsets that decrease count as the largest before them: every row up to the last end has one expert.
    __device__ __forceinline__ void load() {
        const int lane = threadIdx.x % 32, expert = base_ + lane;
        end_ = expert < p_.E ? min(max(__ldg(p_.offsets + expert), 0), last_) : 0;
        end_ = max(end_, carried_);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(~0u, end_, distance);
            if (lane >= distance) end_ = max(end_, before);
        }
        begin_ = __shfl_up_sync(~0u, end_, 1);
        if (lane == 0) begin_ = carried_;
        carried_ = __shfl_sync(~0u, end_, 31);
        tiles_through_ = (end_ - begin_ + kTokens - 1) / kTokens;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(~0u, tiles_through_, distance);
            if (lane >= distance) tiles_through_ += before;
        }
        all_tiles_ = __shfl_sync(~0u, tiles_through_, 31);
    }

    const GroupedGemm4bit& p_;
    const int last_, blocks_;
    int next_;                         // unit, counted through all experts
    int base_ = 0, first_ = 0;         // expert of lane 0, and its first unit
    int carried_ = 0;                  // where the rows before end
    int begin_, end_, tiles_through_;  // of this lane's expert; its tiles and those of the lanes before
    int all_tiles_;
};

// Rows that belong to no expert are zero.
template <class T>
__device__ __forceinline__ void zero_rows_of_none(const GroupedGemm4bit& p, int outputs) {
    const int64_t begin = int64_t(end_of_rows(p)) * outputs, count = int64_t(p.R) * outputs - begin;
    T* const from = static_cast<T*>(p.out) + begin;
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    constexpr int kVector = 16 / sizeof(T);
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && count % kVector == 0) {
        for (int64_t i = first; i < count / kVector; i += step) {
            reinterpret_cast<uint4*>(from)[i] = make_uint4(0, 0, 0, 0);
        }
    } else {
        for (int64_t i = first; i < count; i += step) from[i] = T{};
    }
}

// An upper bound of the units, from what the host knows.
inline int64_t most_grouped_units(const GroupedGemm4bit& p, int tokens, int units_of_outputs, int outputs) {
    const int64_t tiles = int64_t(p.E < p.R ? p.E : p.R) + p.R / tokens;
    return tiles * ((outputs + units_of_outputs - 1) / units_of_outputs);
}

}  // namespace bnb
