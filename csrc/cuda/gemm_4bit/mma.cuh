// 4-bit weights times few tokens on tensor cores (sm_80 and later): out[m, n] = sum over k of A[m, k] * W[n, k].
//
// Memory bound: the packed weight is read once, everything else is small. A CTA owns a run of 16-row tiles for all of
// K; its warps share out K, 256 at a time, which is one 128-byte line of each packed row. A line travels through the
// warp's own ring in shared memory, so no warp waits for another before the one reduction at the end of a chunk of
// tiles. Until then each warp's sums lie in shared memory too, which leaves registers for the tokens. The order of the
// sums is fixed: results do not change from run to run. Tokens that a tuning has no room for take another launch.
//
// The plain layout needs no repacking: inside 64 consecutive k, lane t of a quad takes the packed bytes 8t .. 8t + 7
// of its row, and the tokens in the same order, k = 16t .. 16t + 15. Every byte is then one pair of operands, which a
// table in shared memory holds, once for each lane so that no two lanes meet in a bank. The 64 products are summed
// before they are scaled in float32: blocks are no shorter than 64.
//
// With programmatic launch (sm_90) a CTA starts as soon as a multiprocessor is free. Until the kernel's predecessor has
// ended it only asks for weights to be moved into L2, which stays coherent. Then it asks for the first of them before
// all else: the table is filled while they are on their way.
#pragma once

#include "../mma_instructions.cuh"
#include "pair_table.cuh"
#include "problem.h"
#include "tuning.h"

namespace bnb {

// How the host divides the work: each CTA takes tiles_each tiles of rows, the first `more` of them one more.
struct MmaSplit {
    int tiles_each, more;
    int chunk_tiles;  // between two reductions, at most
    int groups;       // of kMmaK
    int passes;       // groups of a warp, at most
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// ---- what a CTA works on ----

struct MmaRows {
    int first_tile, end_tile;

    __device__ explicit MmaRows(const MmaSplit& split) {
        const int cta = blockIdx.x;
        first_tile = split.tiles_each * cta + min(cta, split.more);
        end_tile = first_tile + split.tiles_each + (cta < split.more);
    }
};

// Who a thread is, held in registers: the compiler would rather read its number again and again.
struct Lane {
    int lane, warp;

    __device__ Lane() : lane(threadIdx.x % 32), warp(__shfl_sync(~0u, threadIdx.x / 32, 0)) { asm("" : "+r"(lane)); }

    __device__ int g() const { return lane / 4; }
    __device__ int t() const { return lane % 4; }
};

// The scales of a lane's two rows, g and g + 8. Nested ones are expanded once in a quad: by lane t those of block t.
template <bool kNested>
struct RowScales {
    float values[kNested ? 1 : kMmaBlocks][2];

    __device__ __forceinline__ float of(int block, int half) const {
        if constexpr (kNested) {
            return __shfl_sync(~0u, values[0][half], block, 4);
        } else {
            return values[block][half];
        }
    }
};

// Codes of nested scales that cannot be copied four at a time: those of row lane / 2, blocks 2 * (lane % 2) and the one
// after, from the lane that fetches them.
struct ScaleCodes {
    uint8_t two[2];
};

// Where a stage lies in shared memory: 16 lines, 256 bytes apart like the entries of the table, and their scales.
struct StageSlot {
    int lines, scales;
};

// A warp's ring: which stage comes next, and copying it. Tiles of a chunk come first, then passes over K, then chunks.
template <bool kNested, int kTuning>
class WeightRing {
    static constexpr MmaTuning t = kMmaTunings[kTuning];
    static constexpr MmaShared kShared{t, kNested};
    static constexpr int kStageSpan = kMmaRows * kPairStride;
    static_assert(MmaShared::kStagesBeside % t.warps == 0 && t.warps * t.stages >= MmaShared::kStagesBeside);

  public:
    __device__ WeightRing(const Gemm4bit& p, const MmaSplit& split, MmaRows rows, Lane at)
        : p_(p),
          split_(split),
          rows_(rows),
          at_(at),
          chunk_(rows.first_tile) {
        row_bytes_ = p.K / 2;
        const uintptr_t scales = reinterpret_cast<uintptr_t>(kNested ? (const void*)p.scales.codes : p.scales.absmax);
        scales_in_vectors_ = p.block_shift == 6 && p.K % kMmaK == 0 && scales % (kNested ? 4 : 8) == 0;
        const int line = at.lane / 8, piece = at.lane % 8 * 16;
        to_ = line * kPairStride + (piece ^ line * 32);  // or the reads of eight rows would meet in a bank
        tile_blocks_ = p.K / 64 * kMmaRows;
        const bool codes = at.lane < kMmaRows;
        scales_from_ =
            codes ? reinterpret_cast<const char*>(p.scales.codes) : reinterpret_cast<const char*>(p.scales.absmax);
        to_factor_ = codes ? 0 : 8;
        factor_shift_ = codes ? 0 : 2;
        factor_ = scales_in_vectors_ ? at.g() : at.lane;
        factor_below_ = scales_in_vectors_ ? 8 : 32;
        enter_pass();
    }

    __device__ __forceinline__ StageSlot slot(int i) const {
        constexpr int kBeside = MmaShared::kStagesBeside / t.warps;  // of this warp's
        const int lines = i < kBeside ? (i * t.warps + at_.warp) * kStageSpan + kMmaLine
                                      : MmaShared::kTable + at_.warp / 2 * kStageSpan + at_.warp % 2 * kMmaLine +
                                            (i - kBeside) * (t.warps * kStageSpan / 2);
        return {lines, kShared.scales_at() + (at_.warp * t.stages + i) * kShared.stage_scales};
    }

    // Start the copies of the next stage into a slot. `fetched` is for finish().
    __device__ __forceinline__ void start(StageSlot slot, ScaleCodes& fetched) {
        const uint32_t base = shared_address(mma_shared);
        if (simple_) {
            const uint32_t to = base + slot.lines + to_;
#pragma unroll
            for (int j = 0; j < kMmaRows / 4; ++j) {
                copy_16_async(to + 4 * j * kPairStride, from_ + int64_t(4 * j) * row_bytes_, true);
            }
            if constexpr (kNested) {
                copy_4_async(base + slot.scales + at_.lane * 4, nested_scales(block_));
            } else {
                copy_8_async(base + slot.scales + at_.lane * 8, p_.scales.absmax + block_);
            }
        } else if (live_) {
            const int row = (chunk_ + tile_) * kMmaRows;
            copy_lines(base + slot.lines + to_, row);
            copy_scales(base + slot.scales, row, fetched);
        }
        commit_copies();
        from_ += int64_t(kMmaRows) * row_bytes_;
        block_ += tile_blocks_;
        if (++tile_ == tiles_) {
            if (++pass_ == split_.passes) {
                pass_ = 0;
                chunk_ += split_.chunk_tiles;
            }
            enter_pass();
        }
    }

    // Put codes that a lane fetched into their slot, before the warp next synchronizes.
    __device__ __forceinline__ void finish(StageSlot slot, const ScaleCodes& fetched) const {
        if constexpr (kNested) {
            if (!scales_in_vectors_) reinterpret_cast<ScaleCodes*>(mma_shared + slot.scales)[at_.lane] = fetched;
        }
    }

    // Nested: the codes lie in front, then a factor for each row, or for each block.
    __device__ __forceinline__ RowScales<kNested> scales(StageSlot slot, const float* code, float offset) const {
        const char* const all = mma_shared + slot.scales;
        RowScales<kNested> scales;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at_.g() + 8 * half;
            if constexpr (kNested) {
                const float value = code[reinterpret_cast<const uint8_t*>(all)[row * 4 + at_.t()]];
                const float factor = reinterpret_cast<const float*>(all + kMmaRows * 4)[factor_ + half * factor_below_];
                scales.values[0][half] = __fadd_rn(__fmul_rn(value, factor), offset);
            } else {
                const float4 four = reinterpret_cast<const float4*>(all)[row];
                scales.values[0][half] = four.x, scales.values[1][half] = four.y;
                scales.values[2][half] = four.z, scales.values[3][half] = four.w;
            }
        }
        return scales;
    }

    // Ask for the beginning of this CTA's share to be brought into L2.
    __device__ void prefetch() const {
        constexpr int64_t kLimit = 128 * 1024;  // of packed bytes; L2 holds as much for every multiprocessor twice
        const int first_row = rows_.first_tile * kMmaRows, end_row = min(p_.N, rows_.end_tile * kMmaRows);
        const int64_t bytes = min(int64_t(end_row - first_row) * row_bytes_, kLimit);
        const int64_t first = int64_t(first_row) * row_bytes_;
        const int64_t block = (2 * first) >> p_.block_shift, blocks = (2 * bytes) >> p_.block_shift;
        prefetch_to_l2(p_.packed + first, bytes);
        if constexpr (kNested) {
            prefetch_to_l2(p_.scales.codes + block, blocks);
        } else {
            prefetch_to_l2(p_.scales.absmax + block, 4 * blocks);
        }
    }

  private:
    // 16 lanes copy the codes of a row each, 16 its factor.
    __device__ __forceinline__ const char* nested_scales(int64_t block) const {
        return scales_from_ + ((block >> to_factor_) << factor_shift_);
    }

    __device__ __forceinline__ void enter_pass() {
        tile_ = 0;
        tiles_ = min(split_.chunk_tiles, rows_.end_tile - chunk_);
        const int group = pass_ * t.warps + at_.warp;
        live_ = tiles_ > 0 && group < split_.groups;
        simple_ = live_ && scales_in_vectors_ && (chunk_ + tiles_) * kMmaRows <= p_.N;
        k_ = group * kMmaK;
        const int64_t row = int64_t(chunk_) * kMmaRows;
        from_ = p_.packed + (row + at_.lane / 8) * row_bytes_ + k_ / 2 + at_.lane % 8 * 16;
        block_ =
            (row + (kNested ? at_.lane % 16 : at_.lane / 2)) * (p_.K / 64) + k_ / 64 + (kNested ? 0 : at_.lane % 2 * 2);
    }

    __device__ __forceinline__ void copy_lines(uint32_t to, int row) const {
        const bool wanted = k_ / 2 + at_.lane % 8 * 16 < row_bytes_;
#pragma unroll
        for (int j = 0; j < kMmaRows / 4; ++j) {
            const bool inside = wanted && row + at_.lane / 8 + 4 * j < p_.N;
            const uint8_t* source = inside ? from_ + int64_t(4 * j) * row_bytes_ : p_.packed;
            copy_16_async(to + 4 * j * kPairStride, source, inside);
        }
    }

    __device__ __forceinline__ void copy_scales(uint32_t to, int row, ScaleCodes& fetched) const {
        if (scales_in_vectors_) {
            const int64_t block = int64_t(min(row + at_.lane % 16, p_.N - 1)) * (p_.K / 64) + k_ / 64;
            if constexpr (kNested) {
                copy_4_async(to + at_.lane * 4, nested_scales(block));
            } else {
                copy_8_async(to + at_.lane % 16 * 16 + at_.lane / 16 * 8, p_.scales.absmax + block + at_.lane / 16 * 2);
            }
            return;
        }
        const int64_t start = int64_t(min(row + at_.lane / 2, p_.N - 1)) * p_.K;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int in_row = min(k_ + (at_.lane % 2 * 2 + i) * 64, p_.K - 64);
            const int64_t block = (start + in_row) >> p_.block_shift;
            if constexpr (kNested) {
                fetched.two[i] = __ldg(p_.scales.codes + block);
                copy_4_async(to + kMmaRows * 4 + at_.lane * 8 + i * 4, p_.scales.absmax + (block >> 8));
            } else {
                copy_4_async(to + at_.lane * 8 + i * 4, p_.scales.absmax + block);
            }
        }
    }

    const Gemm4bit& p_;
    const MmaSplit& split_;
    const MmaRows rows_;
    const Lane at_;
    int row_bytes_, tile_blocks_;
    int to_;  // where this lane's piece of the first four lines goes
    bool scales_in_vectors_;
    const char* scales_from_;  // nested: the codes, or the factors
    int to_factor_, factor_shift_;
    int factor_, factor_below_;  // nested: where the factors of this lane's rows are in a stage
    const uint8_t* from_;        // this lane's part of the next stage's lines,
    int64_t block_;              // and of its scales
    bool live_, simple_;         // the pass has work for this warp; all of it is whole tiles with scales in vectors
    int k_, tiles_, chunk_, pass_ = 0, tile_ = 0;
};

// ---- the inner loop ----

// The tokens of one warp's 256 k: lane (g, t) holds k = 64 b + 16 t .. + 15 of token 8 n + g.
template <int kTokenTiles>
struct Tokens {
    uint4 halves[kTokenTiles][kMmaBlocks][2];

    __device__ __forceinline__ void load_block(const Gemm4bit& p, int group, Lane at, int block) {
        const int k = group * kMmaK + block * 64 + at.t() * 16;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
            const int token = n * 8 + at.g();
            const bool there = token < p.M && k < p.K;
            const uint16_t* const row = static_cast<const uint16_t*>(p.A) + int64_t(token) * p.K;
            const uint4* const from = reinterpret_cast<const uint4*>(row + k);
            halves[n][block][0] = there ? __ldg(from) : make_uint4(0, 0, 0, 0);
            halves[n][block][1] = there ? __ldg(from + 1) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void load(const Gemm4bit& p, int group, Lane at) {
#pragma unroll
        for (int b = 0; b < kMmaBlocks; ++b) load_block(p, group, at, b);
    }
};

// One stage: 16 rows times 256 k times the tokens, added to `sums`. kTogether blocks are decoded together, so that
// products do not wait for one another; done(b) is called once the tokens of block b are no longer needed.
template <int kTogether, class T, int kTokenTiles, bool kNested, class Done>
__device__ __forceinline__ void multiply_stage(
    int lines, Lane at, const PairTable<T>& table, const RowScales<kNested>& scales, const Tokens<kTokenTiles>& tokens,
    float (&sums)[kTokenTiles][4], Done&& done) {
    const int first_line = lines + at.g() * kPairStride + at.t() * 8 + at.g() % 4 * 32;
#pragma unroll
    for (int first = 0; first < kMmaBlocks; first += kTogether) {
        uint2 above[kTogether], below[kTogether];
        float blocks[kTogether][kTokenTiles][4] = {};
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const char* const from = mma_shared + (first_line ^ (first + u) * 32);
            above[u] = *reinterpret_cast<const uint2*>(from);
            below[u] = *reinterpret_cast<const uint2*>(from + 8 * kPairStride);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                const uint32_t x = j < 2 ? above[u].x : above[u].y, y = j < 2 ? below[u].x : below[u].y;
                const bool odd = j % 2;
                const uint32_t a[4] = {
                    odd ? table.template look_up<2>(x) : table.template look_up<0>(x),
                    odd ? table.template look_up<2>(y) : table.template look_up<0>(y),
                    odd ? table.template look_up<3>(x) : table.template look_up<1>(x),
                    odd ? table.template look_up<3>(y) : table.template look_up<1>(y)};
#pragma unroll
                for (int n = 0; n < kTokenTiles; ++n) {
                    const uint4& half = tokens.halves[n][first + u][j / 2];
                    multiply_add<T>(blocks[u][n], a, odd ? half.z : half.x, odd ? half.w : half.y);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            done(first + u);
            const float upper = scales.of(first + u, 0), lower = scales.of(first + u, 1);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                sums[n][0] = fmaf(upper, blocks[u][n][0], sums[n][0]);
                sums[n][1] = fmaf(upper, blocks[u][n][1], sums[n][1]);
                sums[n][2] = fmaf(lower, blocks[u][n][2], sums[n][2]);
                sums[n][3] = fmaf(lower, blocks[u][n][3], sums[n][3]);
            }
        }
    }
}

// ---- results ----

// A warp's sums of a tile lie in shared memory between those of the other warps, for each tile of tokens.
template <int kWarps, int kTokenTiles>
__device__ __forceinline__ void load_sums(float (&sums)[kTokenTiles][4], const float4* held) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        const float4 four = held[n * kWarps * 32];
        sums[n][0] = four.x, sums[n][1] = four.y, sums[n][2] = four.z, sums[n][3] = four.w;
    }
}

template <int kWarps, int kTokenTiles>
__device__ __forceinline__ void store_sums(const float (&sums)[kTokenTiles][4], float4* held) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        held[n * kWarps * 32] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
}

template <class T>
__device__ __forceinline__ void store_result(const Gemm4bit& p, int token, int row, float sum) {
    if (token >= p.M || row >= p.N) return;
    if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.N + row] = round_to<T>(sum);
}

// Add up the warps' sums of a chunk and store them.
template <class T, int kTuning>
__device__ __forceinline__ void store_chunk(
    const Gemm4bit& p, const float4* memory, int first_tile, int tiles, Lane at) {
    constexpr MmaTuning t = kMmaTunings[kTuning];
    for (int unit = at.warp; unit < tiles * t.token_tiles; unit += t.warps) {
        const int row = (first_tile + unit / t.token_tiles) * kMmaRows + at.g();
        const int token = unit % t.token_tiles * 8 + at.t() * 2;
        if (token >= p.M) continue;
        const float4* const from = memory + unit * t.warps * 32 + at.lane;
        float4 sum = from[0];
#pragma unroll
        for (int w = 1; w < t.warps; ++w) {
            const float4 more = from[w * 32];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        store_result<T>(p, token, row, sum.x);
        store_result<T>(p, token + 1, row, sum.y);
        store_result<T>(p, token, row + 8, sum.z);
        store_result<T>(p, token + 1, row + 8, sum.w);
    }
}

#endif  // sm_80

// ---- the kernel ----

template <class T, bool kNested, int kTuning>
__global__ void __launch_bounds__(kMmaTunings[kTuning].warps * 32)
    gemm_4bit_mma_kernel(const __grid_constant__ Gemm4bit p, const __grid_constant__ MmaSplit split) {
#if __CUDA_ARCH__ >= 800
    constexpr MmaTuning t = kMmaTunings[kTuning];
    constexpr MmaShared kShared(t, kNested);
    static_assert(t.warps * 32 >= 256, "a thread for every value of the scales' code");
    float* const scale_code = reinterpret_cast<float*>(mma_shared + kShared.scale_code_at());
    float4* const sums_of_warps = reinterpret_cast<float4*>(mma_shared + kShared.sums_at());
    const Lane at;
    const MmaRows rows(split);
    WeightRing<kNested, kTuning> ring(p, split, rows, at);
    PairTable<T> table(at.lane);
    if (threadIdx.x == 0) ring.prefetch();
    wait_for_predecessor();
    let_successor_start();

    // What the first stage waits for longest comes first; the weights would hold up what is asked for after them.
    float code_value = 0.0f, offset = 0.0f;
    if constexpr (kNested) {
        code_value = __ldg(p.scales.code + threadIdx.x % 256);
        offset = __ldg(p.scales.offset);
    }
    ScaleCodes first[t.stages - 1] = {};
    ring.start(ring.slot(0), first[0]);
    table.fill([&](int i) { return p.code != nullptr ? __ldg(p.code + i) : p.values[i]; });
    Tokens<t.token_tiles> tokens;
    tokens.load(p, at.warp, at);
#pragma unroll
    for (int s = 1; s < t.stages - 1; ++s) ring.start(ring.slot(s), first[s]);
    if constexpr (kNested) scale_code[threadIdx.x % 256] = code_value;
    __syncthreads();
#pragma unroll
    for (int s = 0; s < t.stages - 1; ++s) ring.finish(ring.slot(s), first[s]);

    int stage = 0;
    StageSlot slot = ring.slot(0), free = ring.slot(t.stages - 1);  // to read and to fill next
    bool sums_in_use = false;  // other warps may not have read those of the last chunk
    for (int chunk = rows.first_tile; chunk < rows.end_tile; chunk += split.chunk_tiles) {
        const int tiles = min(split.chunk_tiles, rows.end_tile - chunk);
        const bool last_chunk = chunk + tiles == rows.end_tile;
        for (int pass = 0; pass < split.passes; ++pass) {
            const int group = pass * t.warps + at.warp;
            const bool last_pass = pass + 1 == split.passes;
            const bool other_tokens = split.passes > 1 && !(last_pass && last_chunk);
            const int next_group = last_pass ? at.warp : group + t.warps;
            float4* held = sums_of_warps + at.warp * 32 + at.lane;
            const auto one_tile = [&](auto last_tile) {
                wait_for_copies<t.stages - 2>();
                __syncwarp();
                ScaleCodes fetched{};
                ring.start(free, fetched);
                float sums[t.token_tiles][4] = {};
                if (pass > 0) load_sums<t.warps>(sums, held);
                const auto done = [&](int block) {
                    if (decltype(last_tile)::value && other_tokens) tokens.load_block(p, next_group, at, block);
                };
                if (group < split.groups) {
                    multiply_stage<t.together>(
                        slot.lines, at, table, ring.scales(slot, scale_code, offset), tokens, sums, done);
                } else {
#pragma unroll
                    for (int b = 0; b < kMmaBlocks; ++b) done(b);
                }
                ring.finish(free, fetched);
                if (sums_in_use) __syncthreads();
                sums_in_use = false;
                store_sums<t.warps>(sums, held);
                held += t.token_tiles * t.warps * 32;
                if (++stage == t.stages) stage = 0;
                free = slot;
                slot = ring.slot(stage);
            };
            for (int i = 1; i < tiles; ++i) one_tile(std::false_type{});
            one_tile(std::true_type{});
        }
        __syncthreads();
        store_chunk<T, kTuning>(p, sums_of_warps, chunk, tiles, at);
        sums_in_use = true;
    }
#endif
}

}  // namespace bnb
