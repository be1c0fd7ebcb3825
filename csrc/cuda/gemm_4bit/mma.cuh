// 4-bit weights times few tokens on tensor cores (sm_80 and later): out[m, n] = sum over k of A[m, k] * W[n, k].
//
// Memory bound: the packed weight is read once, everything else is small. A CTA (or a cluster of them) owns a run of
// 16-row tiles for all of K; its warps share out K, 256 at a time, which is one 128-byte line of each packed row. A
// line travels through the warp's own ring in shared memory, so no warp waits for another before the one reduction
// at the end of a chunk of tiles. The order of the sums is fixed: results do not change from run to run.
//
// The plain layout needs no repacking: inside 64 consecutive k, lane t of a quad takes the packed bytes 8t .. 8t + 7
// of its row, and the tokens in the same order, k = 16t .. 16t + 15. Every byte is then one pair of operands, which a
// table in shared memory holds, once for each lane so that no two lanes meet in a bank. The 64 products are summed
// before they are scaled in float32: blocks are no shorter than 64.
//
// With programmatic launch (sm_90) the kernel starts before its predecessor has ended. Until that has, it only fills
// its table from its own arguments and asks for weights to be moved into L2, which stays coherent.
#pragma once

#include "pair_table.cuh"
#include "problem.h"
#include "tuning.h"

namespace bnb {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// ---- instructions ----

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// ---- what a CTA works on ----

// Rows and K of this CTA, in tiles and stages.
struct MmaShare {
    int first_tile, end_tile;
    int first_group, groups;  // of kMmaK; this CTA's share of K
    int passes;               // groups of each warp

    template <int kTuning>
    __device__ static MmaShare of(const Gemm4bit& p, int rank) {
        constexpr MmaTuning t = kMmaTunings[kTuning];
        const int tiles = (p.N + kMmaRows - 1) / kMmaRows;
        const int all = (p.K + kMmaK - 1) / kMmaK;
        const int cluster = blockIdx.x / t.cluster, clusters = gridDim.x / t.cluster;
        const int each = (all + t.cluster - 1) / t.cluster;
        MmaShare share;
        share.first_tile = static_cast<int>(int64_t(tiles) * cluster / clusters);
        share.end_tile = static_cast<int>(int64_t(tiles) * (cluster + 1) / clusters);
        share.first_group = rank * each;
        share.groups = max(0, min(all, share.first_group + each) - share.first_group);
        share.passes = (each + t.warps - 1) / t.warps;
        return share;
    }
};

// Nested scales that cannot be copied four at a time: what a lane fetches of a stage, those of row lane / 2, blocks
// 2 * (lane % 2) and the one after.
struct NestedScales {
    uint8_t codes[2];
    float absmax[2];
};

// A warp's ring: which stage comes next, and copying it. Tiles of a chunk come first, then passes over K, then chunks.
template <bool kNested, int kTuning>
class WeightRing {
    static constexpr MmaTuning t = kMmaTunings[kTuning];

  public:
    __device__ WeightRing(const Gemm4bit& p, const MmaShare& share, char* memory)
        : p_(p),
          share_(share),
          memory_(memory),
          chunk_(share.first_tile) {
        row_bytes_ = p.K / 2;
        const uintptr_t scales = reinterpret_cast<uintptr_t>(kNested ? (const void*)p.scales.codes : p.scales.absmax);
        scales_in_vectors_ = p.block_shift == 6 && p.K % kMmaK == 0 && scales % (kNested ? 4 : 16) == 0;
    }

    // Start the copies of the next stage; returns its slot. `nested` receives what finish() needs.
    __device__ __forceinline__ int start(NestedScales& nested) {
        const int slot = slot_;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int group = pass_ * t.warps + warp;
        if (chunk_ < share_.end_tile && group < share_.groups) {
            const int row = (chunk_ + tile_) * kMmaRows;
            const int k = (share_.first_group + group) * kMmaK;
            copy_lines(shared_address(memory_ + slot * kStageBytes), row, k, lane);
            copy_scales(shared_address(memory_ + slot * kStageBytes + kScalesAt), row, k, lane, nested);
        }
        commit_copies();
        if (++slot_ == t.stages) slot_ = 0;
        if (++tile_ >= min(t.row_tiles, share_.end_tile - chunk_)) {
            tile_ = 0;
            if (++pass_ >= share_.passes) {
                pass_ = 0;
                chunk_ += t.row_tiles;
            }
        }
        return slot;
    }

    // Expand nested scales into their slot, before the warp next synchronizes: those that a lane fetched, soon after
    // start(), and those that were copied, once the stage has arrived.
    __device__ __forceinline__ void finish(int slot, const NestedScales& nested, const float* code, float offset) {
        if constexpr (kNested) {
            if (scales_in_vectors_) return;
            float2* to = reinterpret_cast<float2*>(memory_ + slot * kStageBytes + kScalesAt);
            to[threadIdx.x % 32] = make_float2(
                __fadd_rn(__fmul_rn(code[nested.codes[0]], nested.absmax[0]), offset),
                __fadd_rn(__fmul_rn(code[nested.codes[1]], nested.absmax[1]), offset));
        }
    }

    __device__ __forceinline__ void expand(int slot, const float* code, float offset) {
        if constexpr (kNested) {
            const int lane = threadIdx.x % 32;
            if (!scales_in_vectors_ || lane >= kMmaRows) return;
            char* const at = memory_ + slot * kStageBytes + kScalesAt + lane * 16;
            const uint2 copied = *reinterpret_cast<const uint2*>(at);
            const float absmax = __uint_as_float(copied.y);
            const auto scale = [&](int i) {
                return __fadd_rn(__fmul_rn(code[copied.x >> 8 * i & 255], absmax), offset);
            };
            *reinterpret_cast<float4*>(at) = make_float4(scale(0), scale(1), scale(2), scale(3));
        }
    }

    // Ask for the beginning of this CTA's share to be brought into L2.
    __device__ void prefetch(int rank) const {
        constexpr int64_t kLimit = 128 * 1024;  // of packed bytes; more would compete with what is running
        const int rows = min(p_.N, share_.end_tile * kMmaRows) - share_.first_tile * kMmaRows;
        const int64_t first = int64_t(share_.first_tile) * kMmaRows * p_.K;
        const int64_t part = min(int64_t(rows) * row_bytes_ / t.cluster, kLimit) & ~int64_t(127);
        const int64_t from = first + rank * part * 2;
        prefetch_to_l2(p_.packed + from / 2, part);
        if constexpr (kNested) {
            prefetch_to_l2(p_.scales.codes + (from >> p_.block_shift), (2 * part) >> p_.block_shift);
        } else {
            prefetch_to_l2(p_.scales.absmax + (from >> p_.block_shift), (8 * part) >> p_.block_shift);
        }
    }

  private:
    __device__ __forceinline__ void copy_lines(uint32_t to, int row, int k, int lane) const {
        const int line = lane / 8, piece = lane % 8 * 16;
        const bool wanted = k / 2 + piece < row_bytes_;
        const uint8_t* from = p_.packed + int64_t(row + line) * row_bytes_ + (wanted ? k / 2 + piece : 0);
        to += line * kLineStride + piece;
        if (row + kMmaRows <= p_.N) {
#pragma unroll
            for (int j = 0; j < kMmaRows / 4; ++j) {
                copy_16_async(to + 4 * j * kLineStride, from + int64_t(4 * j) * row_bytes_, wanted);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kMmaRows / 4; ++j) {
                const bool inside = row + line + 4 * j < p_.N;
                const uint8_t* source = inside ? from + int64_t(4 * j) * row_bytes_ : p_.packed;
                copy_16_async(to + 4 * j * kLineStride, source, wanted && inside);
            }
        }
    }

    __device__ __forceinline__ void copy_scales(uint32_t to, int row, int k, int lane, NestedScales& nested) const {
        if (scales_in_vectors_) {
            if (lane < kMmaRows) {
                const int64_t at = int64_t(min(row + lane, p_.N - 1)) * (p_.K / 64) + k / 64;
                if constexpr (kNested) {
                    copy_4_async(to + lane * 16, p_.scales.codes + at);
                    copy_4_async(to + lane * 16 + 4, p_.scales.absmax + (at >> 8));
                } else {
                    copy_16_async(to + lane * 16, p_.scales.absmax + at, true);
                }
            }
            return;
        }
        const int64_t start = int64_t(min(row + lane / 2, p_.N - 1)) * p_.K;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int in_row = min(k + (lane % 2 * 2 + i) * 64, p_.K - 64);
            const int64_t block = (start + in_row) >> p_.block_shift;
            if constexpr (kNested) {
                nested.codes[i] = __ldg(p_.scales.codes + block);
                nested.absmax[i] = __ldg(p_.scales.absmax + (block >> 8));
            } else {
                copy_4_async(to + lane * 8 + i * 4, p_.scales.absmax + block);
            }
        }
    }

    const Gemm4bit& p_;
    const MmaShare share_;
    char* const memory_;
    int row_bytes_;
    bool scales_in_vectors_;
    int chunk_, pass_ = 0, tile_ = 0, slot_ = 0;
};

// ---- the inner loop ----

// The tokens of one warp's 256 k: lane (g, t) holds k = 64 b + 16 t .. + 15 of token 8 n + g.
template <int kTokenTiles>
struct Tokens {
    uint4 halves[kTokenTiles][kMmaBlocks][2];

    __device__ __forceinline__ void load(const Gemm4bit& p, int group, bool live) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
            for (int b = 0; b < kMmaBlocks; ++b) {
                const int token = n * 8 + lane / 4;
                const int k = group * kMmaK + b * 64 + lane % 4 * 16;
                const bool there = live && token < p.M && k < p.K;
                const uint16_t* row = static_cast<const uint16_t*>(p.A) + int64_t(token) * p.K + k;
                const uint4* from = reinterpret_cast<const uint4*>(row);
                halves[n][b][0] = there ? __ldg(from) : make_uint4(0, 0, 0, 0);
                halves[n][b][1] = there ? __ldg(from + 1) : make_uint4(0, 0, 0, 0);
            }
        }
    }
};

// One stage: 16 rows times 256 k times the tokens, added to `sums`.
template <class T, int kStride, int kTokenTiles>
__device__ __forceinline__ void multiply_stage(
    const char* stage, const PairTable<T, kStride>& table, const Tokens<kTokenTiles>& tokens,
    float (&sums)[kTokenTiles][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float4* scales = reinterpret_cast<const float4*>(stage + kScalesAt);
    const float4 upper = scales[g], lower = scales[g + 8];
    const float upper_scale[kMmaBlocks] = {upper.x, upper.y, upper.z, upper.w};
    const float lower_scale[kMmaBlocks] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
    for (int b = 0; b < kMmaBlocks; ++b) {
        const char* line = stage + g * kLineStride + b * 32 + t * 8;
        const uint2 above = *reinterpret_cast<const uint2*>(line);
        const uint2 below = *reinterpret_cast<const uint2*>(line + 8 * kLineStride);
        float block[kTokenTiles][4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t x = j < 2 ? above.x : above.y, y = j < 2 ? below.x : below.y;
            const bool odd = j % 2;
            const uint32_t a[4] = {
                odd ? table.template look_up<2>(x) : table.template look_up<0>(x),
                odd ? table.template look_up<2>(y) : table.template look_up<0>(y),
                odd ? table.template look_up<3>(x) : table.template look_up<1>(x),
                odd ? table.template look_up<3>(y) : table.template look_up<1>(y)};
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) {
                const uint4& half = tokens.halves[n][b][j / 2];
                multiply_add<T>(block[n], a, odd ? half.z : half.x, odd ? half.w : half.y);
            }
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
            sums[n][0] = fmaf(upper_scale[b], block[n][0], sums[n][0]);
            sums[n][1] = fmaf(upper_scale[b], block[n][1], sums[n][1]);
            sums[n][2] = fmaf(lower_scale[b], block[n][2], sums[n][2]);
            sums[n][3] = fmaf(lower_scale[b], block[n][3], sums[n][3]);
        }
    }
}

// ---- results ----

// Element i of a chunk's results: tile by tile, in each 8 tokens by 16 rows for every tile of tokens.
template <class T, int kTokenTiles>
__device__ __forceinline__ void store_result(const Gemm4bit& p, int first_tile, int i, float sum) {
    const int tile = i / kMmaTileFloats, within = i % kMmaTileFloats;
    const int row = (first_tile + tile / kTokenTiles) * kMmaRows + within % kMmaRows;
    const int token = tile % kTokenTiles * 8 + within / kMmaRows;
    if (token >= p.M || row >= p.N) return;
    if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
    static_cast<T*>(p.out)[int64_t(token) * p.N + row] = round_to<T>(sum);
}

// Add up the warps' sums of a chunk's tiles, a few at a time, and call body(i, sum) for each result.
template <int kTuning, class Body>
__device__ __forceinline__ void reduce_over_warps(
    const float (&sums)[kMmaTunings[kTuning].row_tiles][kMmaTunings[kTuning].token_tiles][4], int tiles, float* memory,
    Body&& body) {
    constexpr MmaTuning t = kMmaTunings[kTuning];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < t.row_tiles; r += kReducedTiles) {
        if (r >= tiles) break;
#pragma unroll
        for (int i = r; i < r + kReducedTiles && i < t.row_tiles; ++i) {
            if (i >= tiles) break;
#pragma unroll
            for (int n = 0; n < t.token_tiles; ++n) {
                const int at = (((i - r) * t.token_tiles + n) * t.warps + warp) * 32 + lane;
                reinterpret_cast<float4*>(memory)[at] =
                    make_float4(sums[i][n][0], sums[i][n][1], sums[i][n][2], sums[i][n][3]);
            }
        }
        __syncthreads();
        const int count = min(kReducedTiles, tiles - r) * t.token_tiles * kMmaTileFloats;
        for (int i = threadIdx.x; i < count; i += t.warps * 32) {
            const int row = i % kMmaRows, token = i % kMmaTileFloats / kMmaRows;
            const int holder = row % 8 * 4 + token / 2, element = row / 8 * 2 + token % 2;
            const float* from = memory + (i / kMmaTileFloats * t.warps * 32 + holder) * 4 + element;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < t.warps; ++w) sum += from[w * kMmaTileFloats];
            body(r * t.token_tiles * kMmaTileFloats + i, sum);
        }
        __syncthreads();
    }
}

// The CTAs of a cluster add up their shares of K through one another's shared memory. That of one chunk lies open to
// the peers while the next is computed, hence two of them.
template <class T, int kTuning>
class ClusterSums {
    static constexpr MmaTuning t = kMmaTunings[kTuning];
    static constexpr int kChunkFloats = t.row_tiles * t.token_tiles * kMmaTileFloats;

  public:
    __device__ ClusterSums(const Gemm4bit& p, const MmaShare& share, float* memory, int rank)
        : p_(p),
          end_tile_(share.end_tile),
          memory_(memory),
          rank_(rank) {}

    __device__ __forceinline__ void put(int i, float sum) { memory_[turn_ * kChunkFloats + i] = sum; }

    __device__ __forceinline__ void publish(int chunk) {
        arrive_at_cluster();
        open_chunk_ = chunk;
        turn_ ^= 1;
    }

    // Store the results of the chunk published last, of which every CTA takes a part.
    __device__ __forceinline__ void collect() {
        if (open_chunk_ < 0) return;
        wait_for_cluster();
        const float* open = memory_ + (turn_ ^ 1) * kChunkFloats;
        const int count = min(t.row_tiles, end_tile_ - open_chunk_) * t.token_tiles * kMmaTileFloats;
        for (int i = rank_ * t.warps * 32 + threadIdx.x; i < count; i += t.cluster * t.warps * 32) {
            float sum = 0.0f;
#pragma unroll
            for (int peer = 0; peer < t.cluster; ++peer) sum += read_of_peer(open + i, peer);
            store_result<T, t.token_tiles>(p_, open_chunk_, i, sum);
        }
    }

    // No CTA may end while another reads its memory.
    __device__ __forceinline__ void finish() {
        collect();
        arrive_at_cluster();
        wait_for_cluster();
    }

  private:
    const Gemm4bit& p_;
    const int end_tile_;
    float* const memory_;
    const int rank_;
    int turn_ = 0, open_chunk_ = -1;
};

#endif  // sm_80

// ---- the kernel ----

template <class T, bool kNested, int kTuning>
__global__ void __launch_bounds__(kMmaTunings[kTuning].warps * 32)
    gemm_4bit_mma_kernel(const __grid_constant__ Gemm4bit p) {
#if __CUDA_ARCH__ >= 800
    constexpr MmaTuning t = kMmaTunings[kTuning];
    constexpr MmaShared kShared(t, kNested);
    char* const rings = mma_shared + kShared.table;
    float* const reduced = reinterpret_cast<float*>(rings + kShared.rings);
    float* const shares = reduced + kShared.reduce / 4;
    float* const scale_code = shares + kShared.shares / 4;
    const int warp = threadIdx.x / 32, rank = t.cluster > 1 ? rank_in_cluster() : 0;

    const MmaShare share = MmaShare::of<kTuning>(p, rank);
    char* const memory = rings + warp * t.stages * kStageBytes;
    WeightRing<kNested, kTuning> ring(p, share, memory);
    PairTable<T, t.table_stride> table;

    if (threadIdx.x == 0) ring.prefetch(rank);
    if (p.code == nullptr) table.fill([&](int i) { return p.values[i]; });
    wait_for_predecessor();
    let_successor_start();

    NestedScales first[t.stages - 1] = {};
#pragma unroll
    for (int s = 0; s < t.stages - 1; ++s) ring.start(first[s]);
    Tokens<t.token_tiles> tokens;
    tokens.load(p, share.first_group + warp, warp < share.groups);
    if (p.code != nullptr) table.fill([&](int i) { return __ldg(p.code + i); });
    float offset = 0.0f;
    if constexpr (kNested) {
        for (int i = threadIdx.x; i < 256; i += t.warps * 32) scale_code[i] = __ldg(p.scales.code + i);
        offset = __ldg(p.scales.offset);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < t.stages - 1; ++s) ring.finish(s, first[s], scale_code, offset);

    int slot = 0, held = 0;  // the slot to read next; the pass whose tokens are held
    ClusterSums<T, kTuning> cluster(p, share, shares, rank);
    for (int chunk = share.first_tile; chunk < share.end_tile; chunk += t.row_tiles) {
        const int tiles = min(t.row_tiles, share.end_tile - chunk);
        float sums[t.row_tiles][t.token_tiles][4] = {};
        for (int pass = 0; pass < share.passes; ++pass) {
            const int group = pass * t.warps + warp;
            if (pass != held) tokens.load(p, share.first_group + group, group < share.groups);
            held = pass;
#pragma unroll
            for (int i = 0; i < t.row_tiles; ++i) {
                if (i < tiles) {
                    wait_for_copies<t.stages - 2>();
                    ring.expand(slot, scale_code, offset);
                    __syncwarp();
                    NestedScales nested{};
                    const int next = ring.start(nested);
                    if (group < share.groups) multiply_stage(memory + slot * kStageBytes, table, tokens, sums[i]);
                    ring.finish(next, nested, scale_code, offset);
                    if (++slot == t.stages) slot = 0;
                }
            }
        }
        if constexpr (t.cluster == 1) {
            reduce_over_warps<kTuning>(
                sums, tiles, reduced, [&](int i, float sum) { store_result<T, t.token_tiles>(p, chunk, i, sum); });
        } else {
            cluster.collect();
            reduce_over_warps<kTuning>(sums, tiles, reduced, [&](int i, float sum) { cluster.put(i, sum); });
            cluster.publish(chunk);
        }
    }
    if constexpr (t.cluster > 1) cluster.finish();
#endif
}

}  // namespace bnb
