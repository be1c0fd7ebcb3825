// 4-bit weights times tokens on the warpgroup instructions of sm_90a: out[m, n] = sum over k of A[m, k] * W[n, k].
//
// The weight is the operand in registers, its rows the 64 of an instruction; the tokens are the operand in shared
// memory, read once for four warps. A CTA owns a block of rows, a tile of tokens and a part of K. Each warp copies and
// decodes its own rows, 256 k at a time, through its own ring, so that no warp waits for another; the tokens travel
// through one ring for all, by bulk copies. The CTAs of a cluster share out K and add up their parts through one
// another's shared memory, in a fixed order.
//
// The kernel before this one arranges the tokens. It lets this one start when all that came before it has ended, so
// weights and scales may be read at once and only the tokens must be waited for.
//
// The plain layout needs no repacking: inside 64 consecutive k, lane t of a quad takes the packed bytes 8t .. 8t + 7 of
// its row, and the tokens are arranged in the order that this gives k. While the tensor cores multiply one unit of 64
// rows and 64 k, the next is decoded. For few tokens the 64 products are summed before they are scaled in float32; for
// many the weights are scaled before they are multiplied. Blocks are no shorter than 64.
#pragma once

#include "pair_table.cuh"
#include "problem.h"
#include "wgmma_instructions.cuh"

namespace bnb {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a CTA multiplies: rows first_row .. of the weight, one tile of tokens, stages of K.
struct WgmmaPlace {
    int first_row, token_tile;
    int first_stage, stages;

    template <int kTuning>
    __device__ static WgmmaPlace of(const Gemm4bit& p, int rank, int cluster) {
        constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
        const int token_tiles = (p.M + t.tokens - 1) / t.tokens;
        const int tile = blockIdx.x / cluster;
        const int all = (p.K + kMmaK - 1) / kMmaK;
        WgmmaPlace place;
        place.first_row = tile / token_tiles * t.rows();
        place.token_tile = tile % token_tiles;
        place.first_stage = static_cast<int>(int64_t(all) * rank / cluster);
        place.stages = static_cast<int>(int64_t(all) * (rank + 1) / cluster) - place.first_stage;
        return place;
    }
};

// The first row of a warp's tile of 16, within the CTA.
template <int kTuning>
__device__ __forceinline__ int row_of_tile(int tile) {
    return (tile * kWgmmaTunings[kTuning].groups + threadIdx.x / 128) * 64 + threadIdx.x / 32 % 4 * 16;
}

// Call body with each number below kCount as a constant.
template <int kCount, int kFrom = 0, class Body>
__device__ __forceinline__ void unroll(Body&& body) {
    if constexpr (kFrom < kCount) {
        body(std::integral_constant<int, kFrom>{});
        unroll<kCount, kFrom + 1>(body);
    }
}

// The 16-byte pieces of a line of weights change places with its row, so that eight rows' 8-byte reads meet in no bank.
__device__ __forceinline__ int swizzled(int piece, int row) { return piece ^ row % 4 * 2; }

// A warp's ring of weights and scales.
template <bool kNested, int kTuning>
class WgmmaWeights {
    static constexpr WgmmaTuning t = kWgmmaTunings[kTuning];

  public:
    // What a lane fetches of a tile's nested scales: those of row lane if they can be had at once, else of row lane / 2
    // the blocks lane % 2 * 2 and the one after.
    struct Nested {
        uint32_t codes[kNested ? t.row_tiles : 1];
        float absmax[kNested ? t.row_tiles * 2 : 1];
    };

    __device__ WgmmaWeights(const Gemm4bit& p, const WgmmaPlace& place, uint32_t memory)
        : p_(p),
          first_row_(place.first_row),
          memory_(memory + threadIdx.x / 32 * t.stages * kStage),
          k_(place.first_stage * kMmaK),
          end_((place.first_stage + place.stages) * kMmaK),
          slot_(memory_) {
        const int lane = threadIdx.x % 32, line = lane / 8;
        from_ = p.packed + (int64_t(place.first_row + row_of_tile<kTuning>(0) + line) * p.K + k_) / 2 + lane % 8 * 16;
        to_ = line * kLine + swizzled(lane % 8, line) * 16;
        const uintptr_t scales = reinterpret_cast<uintptr_t>(kNested ? (const void*)p.scales.codes : p.scales.absmax);
        scales_in_vectors_ = p.block_shift == 6 && p.K % kMmaK == 0 && scales % (kNested ? 4 : 16) == 0;
    }

    __device__ uint32_t first() const { return memory_; }

    __device__ __forceinline__ uint32_t after(uint32_t slot) const {
        slot += kStage;
        return slot == memory_ + t.stages * kStage ? memory_ : slot;
    }

    // Ask for the beginning of this CTA's weights to be brought into L2.
    __device__ void prefetch() const {
        constexpr int kLimit = 512;  // bytes of a row; more would compete with what is running
        for (int i = threadIdx.x; i < t.rows(); i += t.threads()) {
            const int bytes = min((min(end_, p_.K) - k_) / 2, kLimit);
            if (first_row_ + i < p_.N && bytes > 0) {
                prefetch_to_l2(p_.packed + (int64_t(first_row_ + i) * p_.K + k_) / 2, bytes);
            }
        }
    }

    // Start the copies of the next stage and return its slot; `nested` receives what finish() needs.
    __device__ __forceinline__ uint32_t start(Nested& nested) {
        const uint32_t slot = slot_;
        if (k_ < end_) {
#pragma unroll
            for (int tile = 0; tile < t.row_tiles; ++tile) {
                copy_lines(slot + tile * kTile, tile);
                copy_scales(slot + tile * kTile + kMmaRows * kLine, tile, nested);
            }
        }
        commit_copies();
        k_ += kMmaK;
        from_ += kMmaK / 2;
        slot_ = after(slot);
        return slot;
    }

    // Expand nested scales into their slot, before the warp next synchronizes.
    __device__ __forceinline__ void finish(uint32_t slot, const Nested& nested, const float* code, float offset) {
        if constexpr (kNested) {
            const int lane = threadIdx.x % 32;
            const auto scale = [&](int tile, int i, float absmax) {
                return __fadd_rn(__fmul_rn(code[nested.codes[tile] >> 8 * i & 255], absmax), offset);
            };
#pragma unroll
            for (int tile = 0; tile < t.row_tiles; ++tile) {
                const uint32_t to = slot + tile * kTile + kMmaRows * kLine;
                const float* absmax = nested.absmax + tile * 2;
                if (!scales_in_vectors_) {
                    store_2(to + lane * 8, scale(tile, 0, absmax[0]), scale(tile, 1, absmax[1]));
                } else if (lane < kMmaRows) {
                    store_2(to + lane * 16, scale(tile, 0, absmax[0]), scale(tile, 1, absmax[0]));
                    store_2(to + lane * 16 + 8, scale(tile, 2, absmax[0]), scale(tile, 3, absmax[0]));
                }
            }
        }
    }

  private:
    static constexpr int kLine = WgmmaShared::kLine, kTile = WgmmaShared::kTile;
    static constexpr int kStage = t.row_tiles * kTile;

    __device__ __forceinline__ void copy_lines(uint32_t to, int tile) const {
        const int lane = threadIdx.x % 32;
        const int left = p_.N - first_row_ - row_of_tile<kTuning>(tile) - lane / 8;
        const bool there = k_ + lane % 8 * 32 < p_.K;
        const uint8_t* from = from_ + int64_t(tile * t.groups * 64) * (p_.K / 2);
#pragma unroll
        for (int i = 0; i < kMmaRows / 4; ++i) {
            copy_16_async(to + to_ + i * 4 * kLine, from, there && i * 4 < left);
            from += 4 * int64_t(p_.K / 2);
        }
    }

    static __device__ __forceinline__ void store_2(uint32_t to, float a, float b) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
    }

    // Scales outside of K are finite, since what they scale is 0.
    __device__ __forceinline__ void copy_scales(uint32_t to, int tile, Nested& nested) const {
        const int lane = threadIdx.x % 32, first = first_row_ + row_of_tile<kTuning>(tile);
        const int blocks = p_.K >> p_.block_shift;  // of a row
        if (scales_in_vectors_) {
            if (lane < kMmaRows) {
                const int64_t at = int64_t(min(first + lane, p_.N - 1)) * blocks + k_ / 64;
                if constexpr (kNested) {
                    nested.codes[tile] = __ldg(reinterpret_cast<const uint32_t*>(p_.scales.codes + at));
                    nested.absmax[tile * 2] = __ldg(p_.scales.absmax + (at >> 8));
                } else {
                    copy_16_async(to + lane * 16, p_.scales.absmax + at, true);
                }
            }
            return;
        }
        const int64_t start = int64_t(min(first + lane / 2, p_.N - 1)) * blocks;
        if constexpr (kNested) nested.codes[tile] = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int k = k_ + (lane % 2 * 2 + i) * 64;
            const bool wanted = k < p_.K;
            const int64_t block = start + (k >> p_.block_shift);
            if constexpr (kNested) {
                if (wanted) nested.codes[tile] |= uint32_t(__ldg(p_.scales.codes + block)) << 8 * i;
                nested.absmax[tile * 2 + i] = wanted ? __ldg(p_.scales.absmax + (block >> 8)) : 0.0f;
            } else {
                copy_4_async(to + lane * 8 + i * 4, p_.scales.absmax + block, wanted);
            }
        }
    }

    const Gemm4bit& p_;
    const int first_row_;
    const uint32_t memory_;
    int k_;
    const int end_;
    uint32_t slot_;
    const uint8_t* from_;  // what this lane copies first in the next stage
    uint32_t to_;          // and where to, within a tile
    bool scales_in_vectors_;
};

// The ring of four slots of tokens. One thread copies; every warp says when it has read a slot. Slots are counted from
// the first stage on.
template <int kTuning>
class WgmmaTokens {
    static constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static constexpr uint32_t kSlots = WgmmaShared::kTokenSlots, kBytes = t.token_blocks * t.tokens * 128;

  public:
    static constexpr uint32_t kOfStage = kMmaBlocks / t.token_blocks;

    __device__ WgmmaTokens(const Gemm4bit& p, const WgmmaPlace& place, uint32_t memory, uint32_t barriers)
        : memory_(memory),
          barriers_(barriers),
          count_(place.stages * kOfStage) {
        const int64_t all = (p.K + kMmaK - 1) / kMmaK * kOfStage;
        from_ = static_cast<const char*>(p.arranged) +
                (place.token_tile * all + place.first_stage * kOfStage) * int64_t(kBytes);
    }

    // By one thread, before the CTA synchronizes.
    __device__ void prepare() const {
        for (uint32_t i = 0; i < kSlots; ++i) {
            make_barrier(filled(i), 1);
            make_barrier(emptied(i), t.threads() / 32);
        }
        publish_barriers();
    }

    // By the thread that copies.
    __device__ void fill_first() const {
        for (uint32_t i = 0; i < kSlots && i < count_; ++i) copy(i);
    }

    // Where the tokens of slot i are, once they are there.
    __device__ __forceinline__ uint32_t wait(uint32_t i) const {
        wait_for_barrier(filled(i), i / kSlots % 2);
        return memory_ + i % kSlots * kBytes;
    }

    // This warp has read slot i. The thread that copies refills the one before, which all have read soon.
    __device__ __forceinline__ void release(uint32_t i) const {
        if (threadIdx.x % 32 == 0) arrive_at_barrier(emptied(i));
        if (threadIdx.x == 0 && i > 0 && i - 1 + kSlots < count_) {
            wait_for_barrier(emptied(i - 1), (i - 1) / kSlots % 2);
            copy(i - 1 + kSlots);
        }
        __syncwarp();
    }

  private:
    __device__ __forceinline__ uint32_t filled(uint32_t i) const { return barriers_ + i % kSlots * 16; }
    __device__ __forceinline__ uint32_t emptied(uint32_t i) const { return barriers_ + i % kSlots * 16 + 8; }

    __device__ __forceinline__ void copy(uint32_t i) const {
        expect_bytes(filled(i), kBytes);
        copy_bulk_async(memory_ + i % kSlots * kBytes, from_ + int64_t(i) * kBytes, kBytes, filled(i));
    }

    const uint32_t memory_, barriers_;
    const uint32_t count_;  // to be read in all
    const char* from_;
};

// A warp's share of the rows, as part of its warpgroup. Units of 64 rows and 64 k take turns in two sets of operands:
// one is multiplied while the next is decoded.
template <class T, bool kNested, int kTuning>
class WgmmaUnits {
    static constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static constexpr WgmmaShared kShared{t, kNested};

  public:
    __device__ WgmmaUnits() {
        const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
        line_ = g * WgmmaShared::kLine + swizzled(quad / 2, g) * 16 + quad % 2 * 8;
    }

    // Fetch the operands of a tile of rows and a block of 64 k, after which the stage is no longer needed.
    template <int kSet, class Table>
    __device__ __forceinline__ void decode(int tile, int block, uint32_t stage, const Table& table) {
        stage += tile * WgmmaShared::kTile;
        // Piece 2 * block + quad / 2, swizzled: an exclusive or of its bits.
        const uint32_t line = stage + (line_ ^ block * 32);
        const uint32_t scales = stage + kMmaRows * WgmmaShared::kLine + threadIdx.x % 32 / 4 * 16 + block * 4;
        uint2 above, below;
        float scale_above, scale_below;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(above.x), "=r"(above.y) : "r"(line));
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];"
                     : "=r"(below.x), "=r"(below.y)
                     : "r"(line), "n"(8 * WgmmaShared::kLine));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale_above) : "r"(scales));
        asm volatile("ld.shared.f32 %0, [%1 + 128];" : "=f"(scale_below) : "r"(scales));
        uint32_t (&a)[16] = a_[kSet];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t x = j < 2 ? above.x : above.y, y = j < 2 ? below.x : below.y;
            const bool odd = j % 2;
            a[4 * j] = odd ? table.template look_up<2>(x) : table.template look_up<0>(x);
            a[4 * j + 1] = odd ? table.template look_up<2>(y) : table.template look_up<0>(y);
            a[4 * j + 2] = odd ? table.template look_up<3>(x) : table.template look_up<1>(x);
            a[4 * j + 3] = odd ? table.template look_up<3>(y) : table.template look_up<1>(y);
        }
        if constexpr (t.scaled_operands) {
            const ScalePair<T> pair_above(scale_above), pair_below(scale_below);
#pragma unroll
            for (int j = 0; j < 16; ++j) a[j] = j % 2 == 0 ? pair_above.scaled(a[j]) : pair_below.scaled(a[j]);
        } else {
            scales_[kSet][0] = scale_above;
            scales_[kSet][1] = scale_below;
        }
    }

    template <int kSet>
    __device__ __forceinline__ void multiply(int tile, uint32_t tokens) {
        const uint64_t matrix = matrix_descriptor(tokens, 128, 1024);
        begin_products();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (t.scaled_operands) {
                multiply_tokens<T, t.tokens>(sums_[tile], a_[kSet] + 4 * j, matrix + (j * 256 >> 4), true);
            } else {
                multiply_tokens<T, t.tokens>(block_, a_[kSet] + 4 * j, matrix + (j * 256 >> 4), j > 0);
            }
        }
        commit_products();
    }

    // After the products of that set are there.
    template <int kSet>
    __device__ __forceinline__ void add(int tile) {
        if constexpr (!t.scaled_operands) {
            float (&sums)[t.tokens / 2] = sums_[tile];
#pragma unroll
            for (int i = 0; i < t.tokens / 2; ++i) {
                sums[i] = fmaf(scales_[kSet][i / 2 % 2], block_[i], sums[i]);
            }
        }
    }

    // The sums as [tokens, rows], each row of them sums_stride long.
    __device__ __forceinline__ void store(float* to) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < t.row_tiles; ++r) {
#pragma unroll
            for (int i = 0; i < t.tokens / 2; ++i) {
                const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
                to[token * kShared.sums_stride + row_of_tile<kTuning>(r) + lane / 4 + i / 2 % 2 * 8] = sums_[r][i];
            }
        }
    }

  private:
    uint32_t line_;  // of this lane's first eight bytes in a tile
    uint32_t a_[2][16];
    float scales_[2][2];
    float sums_[t.row_tiles][t.tokens / 2] = {};
    float block_[t.scaled_operands ? 1 : t.tokens / 2] = {};
};

// Add up what the CTAs of the cluster hold and write it out; each takes its share of the tokens' runs of eight rows.
template <class T, bool kNested, int kTuning>
__device__ void write_sums(const Gemm4bit& p, const WgmmaPlace& place, const float* sums, int rank, int cluster) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    constexpr WgmmaShared kShared(t, kNested);
    constexpr int kRuns = t.rows() / 8;
    const bool whole = p.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    const int tokens = min(t.tokens, p.M - place.token_tile * t.tokens);
    for (int i = rank * t.threads() + threadIdx.x; i < tokens * kRuns; i += cluster * t.threads()) {
        const int row = place.first_row + i % kRuns * 8;
        if (row >= p.N) continue;
        const float* mine = sums + i / kRuns * kShared.sums_stride + i % kRuns * 8;
        float sum[8] = {};
        for (int peer = 0; peer < cluster; ++peer) {
            float part[8];
            read_8_of_peer(part, mine, peer);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j] += part[j];
        }
        T* out = static_cast<T*>(p.out) + (int64_t(place.token_tile) * t.tokens + i / kRuns) * p.N + row;
        Pack<T, 8> pack;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (p.bias != nullptr && row + j < p.N) sum[j] += to_float(static_cast<const T*>(p.bias)[row + j]);
            pack.values[j] = round_to<T>(sum[j]);
        }
        if (whole) {
            store_pack<T, 8>(out, pack);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (row + j < p.N) out[j] = pack.values[j];
            }
        }
    }
}

#endif  // sm_90a

// Tokens in the order that the products want them: for each tile of tokens and block of 64 k, groups of eight tokens,
// in each eight cores of 8 k; outside of [M, K] there are zeros. A thread takes half of a token's block.
template <int kTokens>
__global__ void __launch_bounds__(256)
    arrange_tokens_kernel(const uint4* A, uint4* arranged, int M, int K, int64_t count) {
#if __CUDA_ARCH__ >= 900
    wait_for_predecessor();
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i >= count) return;
    const int within = static_cast<int>(i % 8), half = static_cast<int>(i / 8 % 2);
    const int group = static_cast<int>(i / 16 % (kTokens / 8));
    const int64_t rest = i / 16 / (kTokens / 8);
    const int blocks = (K + kMmaK - 1) / kMmaK * kMmaBlocks;
    const int block = static_cast<int>(rest % blocks);
    const int64_t token = rest / blocks * kTokens + group * 8 + within;
    uint4 pieces[4] = {};
    if (token < M && block * 64 < K) {
        const uint4* from = A + (token * K + block * 64) / 8 + half;
#pragma unroll
        for (int j = 0; j < 4; ++j) pieces[j] = __ldg(from + 2 * j);
    }
    // Piece j holds pairs of k of lane j of a quad: one for each of four cores.
    uint4* to = arranged + ((rest * (kTokens / 8) + group) * 8 + half * 4) * 8 + within;
    to[0] = make_uint4(pieces[0].x, pieces[1].x, pieces[2].x, pieces[3].x);
    to[8] = make_uint4(pieces[0].y, pieces[1].y, pieces[2].y, pieces[3].y);
    to[16] = make_uint4(pieces[0].z, pieces[1].z, pieces[2].z, pieces[3].z);
    to[24] = make_uint4(pieces[0].w, pieces[1].w, pieces[2].w, pieces[3].w);
#endif
}

template <class T, bool kNested, int kTuning>
__global__ void __launch_bounds__(kWgmmaTunings[kTuning].threads(), 1)
    gemm_4bit_wgmma_kernel(const __grid_constant__ Gemm4bit p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    constexpr WgmmaShared kShared(t, kNested);
    static_assert(t.tokens * kShared.sums_stride * 4 <= kShared.tokens + kShared.weights, "the sums have room");
    using Weights = WgmmaWeights<kNested, kTuning>;
    const uint32_t memory = shared_address(mma_shared) + kShared.table;
    float* const sums = reinterpret_cast<float*>(mma_shared + kShared.table);
    float* const scale_code = reinterpret_cast<float*>(mma_shared + kShared.scale_code_at());
    const int rank = rank_in_cluster(), cluster = size_of_cluster();

    const WgmmaPlace place = WgmmaPlace::of<kTuning>(p, rank, cluster);
    WgmmaTokens<kTuning> tokens(p, place, memory, memory + kShared.tokens + kShared.weights);
    Weights weights(p, place, memory + kShared.tokens);
    PairTable<T, WgmmaShared::kTableStride> table;
    if (threadIdx.x == 0) tokens.prepare();
    typename Weights::Nested nested[t.stages];
#pragma unroll
    for (int s = 0; s < t.stages; ++s) weights.start(nested[s]);
    weights.prefetch();
    if (p.code == nullptr) {
        table.fill([&](int i) { return p.values[i]; });
    } else {
        table.fill([&](int i) { return __ldg(p.code + i); });
    }
    float offset = 0.0f;
    if constexpr (kNested) {
        for (int i = threadIdx.x; i < 256; i += t.threads()) scale_code[i] = __ldg(p.scales.code + i);
        offset = __ldg(p.scales.offset);
    }
    wait_for_predecessor();
    __syncthreads();
    if (threadIdx.x == 0) tokens.fill_first();
    uint32_t stage = weights.first(), started = stage;
#pragma unroll
    for (int s = 0; s < t.stages; ++s) {
        weights.finish(started, nested[s], scale_code, offset);
        started = weights.after(started);
    }
    wait_for_copies<t.stages - 1>();
    __syncwarp();

    constexpr int kUnits = kMmaBlocks * t.row_tiles;
    WgmmaUnits<T, kNested, kTuning> units;
    units.template decode<0>(0, 0, stage, table);
    const uint32_t stages = place.stages;
    for (uint32_t s = 0; s < stages; ++s) {
        uint32_t held = 0;
        unroll<kUnits>([&](auto unit) {
            constexpr int u = decltype(unit)::value, tile = u % t.row_tiles, block = u / t.row_tiles;
            constexpr int within = block % t.token_blocks;
            const uint32_t slot = s * tokens.kOfStage + block / t.token_blocks;
            if (tile == 0 && within == 0) held = tokens.wait(slot);
            units.template multiply<u % 2>(tile, held + within * t.tokens * 128);
            if (t.scaled_operands) wait_for_products<1>();  // those of the unit before
            if (tile == 0 && within == 0 && slot > 0) tokens.release(slot - 1);
            if constexpr (u + 1 < kUnits) {
                units.template decode<(u + 1) % 2>((u + 1) % t.row_tiles, (u + 1) / t.row_tiles, stage, table);
            } else if (s + 1 < stages) {
                if (s > 0) weights.finish(started, nested[0], scale_code, offset);
                wait_for_copies<t.stages - 2>();
                __syncwarp();
                started = weights.start(nested[0]);
                stage = weights.after(stage);
                units.template decode<0>(0, 0, stage, table);
            }
            if (!t.scaled_operands) {
                wait_for_products<0>();
                units.template add<u % 2>(tile);
            }
        });
    }
    wait_for_products<0>();
    wait_for_copies<0>();
    __syncthreads();
    units.store(sums);
    if (cluster > 1) {
        arrive_at_cluster();
        wait_for_cluster();
    } else {
        __syncthreads();
    }
    write_sums<T, kNested, kTuning>(p, place, sums, rank, cluster);
    if (cluster > 1) {  // no CTA may end while another reads its memory
        arrive_at_cluster();
        wait_for_cluster();
    }
#endif
}

}  // namespace bnb
