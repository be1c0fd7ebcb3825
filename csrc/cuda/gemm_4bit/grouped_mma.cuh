// Grouped 4-bit products on tensor cores (sm_80 and later): the rows of each expert times its weight, or times the
// weight transposed, which is the gradient.
//
// Few rows: bound by the packed bytes of the experts that have any. Many: by decoding and by tensor cores. CTAs take
// units (grouped_units.cuh) in turn; a ring in shared memory, filled across units, keeps weights, scales and rows in
// flight. A warp has 32 outputs as two 16-row operands, which it decodes once from the plain packed layout and
// multiplies with all rows of the unit, 8 at a time. Sums are added up in a fixed order: results do not change.
//
// Inside 64 values of what is summed over, lane t of a quad takes 16t .. 16t + 15, of weights and rows alike, so that
// it reads both in vectors. Outputs are permuted, too: lane group g computes 4g .. 4g + 3 and stores them at once.
//
// Forward, every packed byte is a pair of operands, which a table holds; 64 products share a scale and are summed
// before they are scaled in float32. Transposed, the scale changes along the sum: values are scaled in float32 and
// rounded once, as dequantization does.
#pragma once

#include <type_traits>

#include "../async.cuh"
#include "../mma_instructions.cuh"
#include "../vector_io.cuh"
#include "grouped_units.cuh"

namespace bnb {

template <bool kTransposed, int kTuning>
struct GroupedShape {
    static constexpr GroupedTuning t = kTransposed ? kGroupedTransposedTunings[kTuning] : kGroupedTunings[kTuning];
    static constexpr GroupedStage stage{t, kTransposed};
    static constexpr int kTokens = t.tokens(), kOutputs = t.outputs(), kDepth = t.depth(), kThreads = t.threads();
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

extern __shared__ __align__(1024) char grouped_shared[];

// A pair of values for each byte at the beginning of shared memory, 128 bytes of copies: lanes meet in no bank. A copy
// is 4 bytes, or 8 for the lanes of half a warp.
template <class Pair>
class ByteTable {
  public:
    __device__ ByteTable() : lane_(shared_address(grouped_shared) + threadIdx.x % (128 / sizeof(Pair)) * sizeof(Pair)) {
        asm("" : "+r"(lane_));  // or it would be computed anew at each use
    }

    // pair(high, low) is the entry of a byte with these nibbles.
    template <class MakePair>
    __device__ __forceinline__ void fill(const MakePair& pair) {
        for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {
            const Pair one = pair(i / 8 >> 4, i / 8 & 15);
#pragma unroll
            for (int j = 0; j < 16 / sizeof(Pair); ++j) reinterpret_cast<Pair*>(grouped_shared + i * 16)[j] = one;
        }
    }

    template <int kByte>
    __device__ __forceinline__ Pair look_up(uint32_t packed) const {
        const uint32_t address = __byte_perm(packed, 0, 0x4440 | kByte) * 128 + lane_;
        Pair pair;
        if constexpr (sizeof(Pair) == 4) {
            asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(address));
        } else {
            asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
        }
        return pair;
    }

  private:
    uint32_t lane_;
};

// ---- the ring ----

// Line l of a stage holds output output_of_line(l) of the unit: those that a lane group reads together lie 8 lines
// apart, lane groups next to one another.
__device__ constexpr int output_of_line(int line) { return line / 32 * 32 + line % 8 * 4 + line % 32 / 8; }

// Copies of what the next stages need; every thread has its own share of each.
template <class T, bool kTransposed, int kTuning>
class GroupedRing {
    using Shape = GroupedShape<kTransposed, kTuning>;
    static constexpr int kThreads = Shape::kThreads, kDepth = Shape::kDepth;
    static constexpr int kTokenPieces = kDepth / 8;  // of 16 bytes and a row
    static constexpr int kTokenRows = kThreads / kTokenPieces;
    static constexpr int kTokenTurns = Shape::kTokens / kTokenRows;
    static constexpr int kLinePieces = Shape::stage.line_bytes / 16;
    static constexpr int kLineRows = kThreads / kLinePieces;
    static constexpr int kLineTurns = Shape::stage.lines / kLineRows;
    static constexpr int kScaleTurns = kTransposed ? kLineTurns : Shape::kOutputs * Shape::t.split / kThreads;
    static_assert(kTokenRows * kTokenTurns == Shape::kTokens && kLineRows * kLineTurns == Shape::stage.lines);
    static_assert(kTransposed || kScaleTurns * kThreads == Shape::kOutputs * Shape::t.split);
    static_assert(kTransposed ? kLinePieces == 4 && kLineRows == 32 : kLineRows % 8 == 0);
    static_assert(kThreads % Shape::kOutputs == 0);
    static constexpr int kStageBytes = Shape::stage.bytes(Shape::t);

  public:
    // Nested scales between start() and finish().
    struct Held {
        int slot;
        uint8_t codes[kScaleTurns];
        float absmax[kScaleTurns];
    };

    __device__ GroupedRing(const GroupedGemm4bit& p, char* memory)
        : p_(p),
          memory_(memory),
          units_(p, kTransposed ? p.K : p.N),
          depths_(kTransposed ? p.N : p.K),
          nested_(p.scales.codes != nullptr),
          slot_address_(shared_address(memory)) {
        const int line = threadIdx.x / kLinePieces, part = threadIdx.x % kLinePieces;
        // Transposed, the lanes of a quad read lines 16 apart: the pieces of those change places.
        const int place = kTransposed ? part ^ line / 16 % 4 : part;
        line_to_ = Shape::stage.lines_at(Shape::t) + line * Shape::stage.line_stride + place * 16;
        token_to_ = threadIdx.x / kTokenPieces * Shape::stage.token_stride + threadIdx.x % kTokenPieces * 16;
        asm("" : "+r"(line_to_), "+r"(token_to_));  // or they would be computed anew at each use
    }

    // Start the copies of the next stage.
    __device__ __forceinline__ void start(Held& held) {
        held.slot = slot_;
        if (depth_ == 0) {
            unit_ = units_.next();
            begin();
            char* const stage = memory_ + slot_ * kStageBytes;
            if (threadIdx.x == 0) *reinterpret_cast<GroupedUnit*>(stage + Shape::stage.unit_at(Shape::t)) = unit_;
        }
        if (unit_.rows > 0) {
            const uint32_t to = slot_address_ + slot_ * kStageBytes;
            copy_tokens(to + token_to_);
            copy_lines(to + line_to_);
            copy_scales(to + Shape::stage.scales_at(Shape::t) + scale_place() * 4, held);
        }
        commit_copies();
        if (++slot_ == Shape::t.stages) slot_ = 0;
        depth_ += kDepth;
        if (depth_ >= depths_) depth_ = 0;
    }

    // Expand nested scales, before the CTA next synchronizes.
    __device__ __forceinline__ void finish(const Held& held) const {
        if (!nested_ || unit_.rows == 0) return;
        char* const stage = memory_ + held.slot * kStageBytes;
        float* const to = reinterpret_cast<float*>(stage + Shape::stage.scales_at(Shape::t)) + scale_place();
        const float offset = __ldg(p_.scales.offset);
#pragma unroll
        for (int i = 0; i < kScaleTurns; ++i) {
            const float value = __ldg(p_.scales.code + held.codes[i]);
            to[i * kScaleStep] = __fadd_rn(__fmul_rn(value, held.absmax[i]), offset);
        }
    }

  private:
    // Addresses of this thread's shares of a unit, and how far they go.
    __device__ __forceinline__ void begin() {
        const int row = threadIdx.x / kTokenPieces, piece = threadIdx.x % kTokenPieces;
        tokens_ = static_cast<const char*>(p_.A) + (int64_t(unit_.first_row + row) * depths_ + piece * 8) * 2;
        token_depths_ = depths_ - piece * 8;
        token_rows_ = unit_.rows - row;
        const int line = threadIdx.x / kLinePieces, part = threadIdx.x % kLinePieces;
        const int64_t expert = int64_t(unit_.expert) * p_.N * p_.K;
        if constexpr (kTransposed) {
            static_assert(!kTransposed || kLinePieces == Shape::t.output_warps, "a piece has one scale for each line");
            const int output = unit_.first_output + part * 32;
            lines_ = p_.packed + (expert + int64_t(line) * p_.K + output) / 2;
            line_depths_ = output < p_.K ? p_.N - line : 0;
            scale_ = expert + int64_t(line) * p_.K + output;
        } else {
            const int output = unit_.first_output + output_of_line(line);
            const int mine = unit_.first_output + output_of_line(threadIdx.x % Shape::kOutputs);
            const int depth = threadIdx.x / Shape::kOutputs * 64;
            lines_ = p_.packed + (expert + int64_t(output) * p_.K + part * 32) / 2;
            line_depths_ = p_.K - part * 32;
            line_outputs_ = p_.N - output;
            scale_ = expert + int64_t(mine) * p_.K + depth;
            scale_depths_ = mine < p_.N ? p_.K - depth : 0;
        }
    }

    __device__ __forceinline__ void copy_tokens(uint32_t to) {
        const bool wanted = depth_ < token_depths_;
        const int64_t step = int64_t(kTokenRows) * depths_ * 2;
#pragma unroll
        for (int i = 0; i < kTokenTurns; ++i) {  // of rows that do not exist the sums are not stored
            if (i * kTokenRows < token_rows_) {
                copy_16_async(to + i * kTokenRows * Shape::stage.token_stride, tokens_ + i * step, wanted);
            }
        }
        tokens_ += kDepth * 2;
    }

    __device__ __forceinline__ void copy_lines(uint32_t to) {
        const int64_t row_bytes = p_.K / 2;
#pragma unroll
        for (int i = 0; i < kLineTurns; ++i) {
            const int further = kTransposed ? i * kLineRows : output_of_line(i * kLineRows);
            const bool wanted =
                kTransposed ? depth_ + further < line_depths_ : depth_ < line_depths_ && further < line_outputs_;
            // An even number of turns of 16 lines changes the place of a piece; both are among the same 64 bytes.
            const uint32_t turned = kTransposed && i % 2 ? to ^ 32 : to;
            copy_16_async(turned + i * kLineRows * Shape::stage.line_stride, lines_ + further * row_bytes, wanted);
        }
        lines_ += kTransposed ? kDepth * row_bytes : kDepth / 2;
    }

    // Scales of [64 of what is summed over][outputs], by line; transposed, of [32 outputs][lines], those of the lines
    // that this thread copies.
    __device__ __forceinline__ void copy_scales(uint32_t to, Held& held) {
#pragma unroll
        for (int i = 0; i < kScaleTurns; ++i) {
            constexpr int kTurn = kTransposed ? kLineRows : kThreads / Shape::kOutputs * 64;
            const bool wanted = depth_ + i * kTurn < (kTransposed ? line_depths_ : scale_depths_);
            const int64_t block = (scale_ + int64_t(i * kTurn) * (kTransposed ? p_.K : 1)) >> p_.block_shift;
            if (!nested_) {
                copy_4_async(to + i * kScaleStep * 4, p_.scales.absmax + block, wanted);
            } else {
                held.codes[i] = wanted ? __ldg(p_.scales.codes + block) : 0;
                held.absmax[i] = wanted ? __ldg(p_.scales.absmax + (block >> 8)) : 0.0f;
            }
        }
        scale_ += kTransposed ? int64_t(kDepth) * p_.K : kDepth;
    }

    // Where this thread's first scale lies among those of a stage, and how far on the next.
    static constexpr int kScaleStep = kTransposed ? kLineRows : kThreads;
    __device__ __forceinline__ static int scale_place() {
        return kTransposed ? threadIdx.x % kLinePieces * Shape::stage.scale_stride + threadIdx.x / kLinePieces
                           : threadIdx.x;
    }

    const GroupedGemm4bit& p_;
    char* const memory_;
    GroupedUnits<Shape::kTokens, Shape::kOutputs> units_;
    GroupedUnit unit_;
    const int depths_;
    const bool nested_;
    const uint32_t slot_address_;
    int depth_ = 0, slot_ = 0;
    uint32_t token_to_, line_to_;  // of this thread's first share within a stage
    // This thread's first shares of the next stage, and up to which depth, row and output there are any.
    const char* tokens_;
    const uint8_t* lines_;
    int64_t scale_;  // the value whose scale it is
    int token_depths_, line_depths_, scale_depths_;
    int token_rows_, line_outputs_;
};

// ---- the inner loop ----

// A warp's 32 outputs times some of the four steps through 64 of what is summed over: a[i][j] is step j of outputs
// 4g + 2i and 4g + 2i + 1.
template <int kSteps>
struct WeightOperands {
    uint32_t a[2][kSteps][4];
};

template <class T, class Shape>
__device__ __forceinline__ void decode(
    const char* stage, const ByteTable<uint32_t>& table, int outputs, int part, WeightOperands<4>& operands,
    float (&scales)[2][2]) {
    constexpr GroupedStage s = Shape::stage;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char* const lines = stage + s.lines_at(Shape::t) + (outputs + g) * s.line_stride + part * 32 + t * 8;
    const float* const its = reinterpret_cast<const float*>(stage + s.scales_at(Shape::t)) + part * Shape::kOutputs;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint2 packed = *reinterpret_cast<const uint2*>(lines + (2 * i + h) * 8 * s.line_stride);
            scales[i][h] = its[outputs + (2 * i + h) * 8 + g];
            operands.a[i][0][h] = table.template look_up<0>(packed.x);
            operands.a[i][0][2 + h] = table.template look_up<1>(packed.x);
            operands.a[i][1][h] = table.template look_up<2>(packed.x);
            operands.a[i][1][2 + h] = table.template look_up<3>(packed.x);
            operands.a[i][2][h] = table.template look_up<0>(packed.y);
            operands.a[i][2][2 + h] = table.template look_up<1>(packed.y);
            operands.a[i][3][h] = table.template look_up<2>(packed.y);
            operands.a[i][3][2 + h] = table.template look_up<3>(packed.y);
        }
    }
}

template <class T, class Shape>
__device__ __forceinline__ void decode_transposed(
    const char* stage, const ByteTable<float2>& table, int outputs, int part, int half, WeightOperands<2>& operands) {
    constexpr GroupedStage s = Shape::stage;
    static_assert(s.line_stride == 64, "pieces are exchanged within 64 bytes");
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char* const lines =
        stage + s.lines_at(Shape::t) + (part * 64 + 16 * t + 8 * half) * 64 + (outputs / 32 ^ t) * 16 + g * 2;
    const char* const its =
        stage + s.scales_at(Shape::t) + (outputs / 32 * s.scale_stride + part * 64 + 16 * t + 8 * half) * 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float4 four = *reinterpret_cast<const float4*>(its + j * 16);
        const float scales[4] = {four.x, four.y, four.z, four.w};
        float2 values[4][2];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint32_t packed = *reinterpret_cast<const uint16_t*>(lines + (4 * j + n) * 64);
            values[n][0] = table.look_up<0>(packed);
            values[n][1] = table.look_up<1>(packed);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                values[n][i].x = __fmul_rn(values[n][i].x, scales[n]);
                values[n][i].y = __fmul_rn(values[n][i].y, scales[n]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            operands.a[i][j][0] = pair_of<T>(values[0][i].x, values[1][i].x);
            operands.a[i][j][1] = pair_of<T>(values[0][i].y, values[1][i].y);
            operands.a[i][j][2] = pair_of<T>(values[2][i].x, values[3][i].x);
            operands.a[i][j][3] = pair_of<T>(values[2][i].y, values[3][i].y);
        }
    }
}

// Add the products with the first `live` tiles of 8 rows, of the steps from first_step on.
template <class T, class Shape, bool kScaled, int kSteps>
__device__ __forceinline__ void multiply(
    const char* stage, const WeightOperands<kSteps>& operands, const float (&scales)[2][2], int part, int first_step,
    int live, float (&sums)[Shape::t.token_tiles][2][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char* const tokens = stage + g * Shape::stage.token_stride + part * 128 + t * 32 + first_step * 8;
#pragma unroll
    for (int n = 0; n < Shape::t.token_tiles; ++n) {
        if (n >= live) break;
        uint4 rows[kSteps / 2];
#pragma unroll
        for (int j = 0; j < kSteps / 2; ++j) {
            rows[j] = *reinterpret_cast<const uint4*>(tokens + n * 8 * Shape::stage.token_stride + j * 16);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float block[4] = {};
            float (&to)[4] = kScaled ? block : sums[n][i];
#pragma unroll
            for (int j = 0; j < kSteps / 2; ++j) {
                multiply_add<T>(to, operands.a[i][2 * j], rows[j].x, rows[j].y);
                multiply_add<T>(to, operands.a[i][2 * j + 1], rows[j].z, rows[j].w);
            }
            if constexpr (kScaled) {
#pragma unroll
                for (int c = 0; c < 4; ++c) sums[n][i][c] = fmaf(scales[i][c / 2], block[c], sums[n][i][c]);
            }
        }
    }
}

// ---- results ----

// Outputs first .. first + 3 of the rows that this lane holds.
template <class T, bool kTransposed, int kTokenTiles>
__device__ __forceinline__ void store_results(
    const GroupedGemm4bit& p, const GroupedUnit& unit, int first, const float (&sums)[kTokenTiles][2][4]) {
    const int outputs = kTransposed ? p.K : p.N;
    const int count = min(4, outputs - first);
    if (count <= 0) return;
    float bias[4] = {};
    if (!kTransposed && p.bias != nullptr) {
        const T* const from = static_cast<const T*>(p.bias) + int64_t(unit.expert) * outputs + first;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j < count) bias[j] = to_float(from[j]);
        }
    }
    const bool whole = outputs % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = n * 8 + threadIdx.x % 4 * 2 + c;
            if (row >= unit.rows) continue;
            T* const to = static_cast<T*>(p.out) + int64_t(unit.first_row + row) * outputs + first;
            Pack<T, 4> four;
#pragma unroll
            for (int j = 0; j < 4; ++j) four.values[j] = round_to<T>(sums[n][j / 2][c + j % 2 * 2] + bias[j]);
            if (whole) {
                store_pack(to, four);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (j < count) to[j] = four.values[j];
                }
            }
        }
    }
}

// The sums of the warps that share out a unit, in the first of them. The CTA synchronizes before it uses `memory` anew.
template <class Shape>
__device__ __forceinline__ void reduce_over_parts(
    float4* memory, int output_warp, int part, float (&sums)[Shape::t.token_tiles][2][4]) {
    constexpr int kEach = Shape::t.token_tiles * 2 * 32;
    float4* const mine = memory + output_warp * kEach + threadIdx.x % 32;
    constexpr int kStep = Shape::t.output_warps * kEach;
#pragma unroll
    for (int i = 0; i < Shape::t.token_tiles * 2; ++i) {
        const float (&from)[4] = sums[i / 2][i % 2];
        if (part > 0) mine[(part - 1) * kStep + i * 32] = make_float4(from[0], from[1], from[2], from[3]);
    }
    __syncthreads();
    if (part > 0) return;
#pragma unroll
    for (int i = 0; i < Shape::t.token_tiles * 2; ++i) {
#pragma unroll
        for (int other = 0; other < Shape::t.split - 1; ++other) {
            const float4 more = mine[other * kStep + i * 32];
            sums[i / 2][i % 2][0] += more.x;
            sums[i / 2][i % 2][1] += more.y;
            sums[i / 2][i % 2][2] += more.z;
            sums[i / 2][i % 2][3] += more.w;
        }
    }
}

#endif  // sm_80

// ---- the kernel ----

template <class T, bool kTransposed, int kTuning>
__global__ void __launch_bounds__(
    GroupedShape<kTransposed, kTuning>::kThreads, GroupedShape<kTransposed, kTuning>::t.ctas)
    gemm_4bit_grouped_mma_kernel(const __grid_constant__ GroupedGemm4bit p) {
#if __CUDA_ARCH__ >= 800
    using Shape = GroupedShape<kTransposed, kTuning>;
    using Ring = GroupedRing<T, kTransposed, kTuning>;
    constexpr GroupedTuning t = Shape::t;
    constexpr GroupedShared kShared(t, kTransposed);
    char* const memory = grouped_shared + kShared.table;
    float4* const reduced = reinterpret_cast<float4*>(memory + kShared.ring);
    const int warp = threadIdx.x / 32, output_warp = warp / t.split, part = warp % t.split;
    const int depths = kTransposed ? p.N : p.K;

    ByteTable<std::conditional_t<kTransposed, float2, uint32_t>> table;
    table.fill([&](int high, int low) {
        if constexpr (kTransposed) {
            return make_float2(p.values[high], p.values[low]);
        } else {
            return pair_of<T>(p.values[high], p.values[low]);
        }
    });
    wait_for_predecessor();
    let_successor_start();
    zero_rows_of_none<T>(p, kTransposed ? p.K : p.N);

    Ring ring(p, memory);
    typename Ring::Held held;
#pragma unroll
    for (int s = 0; s < t.stages - 1; ++s) {
        ring.start(held);
        ring.finish(held);
    }
    for (int slot = 0;;) {
        GroupedUnit unit;
        float sums[t.token_tiles][2][4] = {};
        for (int depth = 0; depth < depths; depth += Shape::kDepth) {
            wait_for_copies<t.stages - 2>();
            __syncthreads();
            const char* const stage = memory + slot * Shape::stage.bytes(t);
            if (depth == 0) unit = *reinterpret_cast<const GroupedUnit*>(stage + Shape::stage.unit_at(t));
            if (unit.rows == 0) return;
            ring.start(held);
            if (depth + part * 64 < depths) {
                const int outputs = output_warp * 32, live = (unit.rows + 7) / 8;
                float scales[2][2];
                if constexpr (kTransposed) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        WeightOperands<2> operands;
                        decode_transposed<T, Shape>(stage, table, outputs, part, half, operands);
                        multiply<T, Shape, false>(stage, operands, scales, part, 2 * half, live, sums);
                    }
                } else {
                    WeightOperands<4> operands;
                    decode<T, Shape>(stage, table, outputs, part, operands, scales);
                    multiply<T, Shape, true>(stage, operands, scales, part, 0, live, sums);
                }
            }
            ring.finish(held);
            if (++slot == t.stages) slot = 0;
        }
        if constexpr (t.split > 1) reduce_over_parts<Shape>(reduced, output_warp, part, sums);
        if (part == 0) {
            const int first = unit.first_output + output_warp * 32 + threadIdx.x % 32 / 4 * 4;
            store_results<T, kTransposed, t.token_tiles>(p, unit, first, sums);
        }
    }
#endif
}

}  // namespace bnb
