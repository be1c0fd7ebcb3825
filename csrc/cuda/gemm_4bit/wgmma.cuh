// 4-bit weights times tokens on the warpgroup instructions of sm_90a: out[m, n] = sum over k of A[m, k] * W[n, k].
//
// The weight is the operand in registers, its rows the 64 of an instruction; the tokens are the operand in shared
// memory, read once for four warps. A tile is a block of rows by some tokens, and its stages are 256 k each. The weight
// goes from memory straight to the registers of the lanes that decode it, so that no warp waits for another and shared
// memory, which limits this kernel, is left to the table of values and the tokens. Those travel through one ring for
// all, by bulk copies.
//
// The stages of all tiles, one after the other, are shared out evenly, so that every multiprocessor has work to the
// end. A CTA walks over its tiles from the last one down. Where a tile is shared, each CTA leaves its sums in the
// workspace, and a third kernel adds them up, in a fixed order.
//
// The kernel before this one arranges the tokens. It lets this one start when all that came before it has ended, so
// weights and scales may be read at once and only the tokens must be waited for.
//
// The plain layout needs no repacking, since k may be summed in any order. Of 128 consecutive k, lane t of a quad takes
// those from 32 t on, 16 bytes of a packed row that lie in one block; a unit is 8 of them, 64 k of 64 rows. The tokens
// are arranged in the order that this gives k. Rows trade places within a warp's 16, so that a lane ends up with four
// results side by side. While the tensor cores multiply one unit, the next is decoded: each byte gives a pair of
// values, which is scaled, and so rounded once more, before it is multiplied. Blocks are no shorter than 64.
#pragma once

#include "pair_table.cuh"
#include "problem.h"
#include "wgmma_instructions.cuh"

namespace bnb {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A CTA's stages, counted through all tiles: begin .. end, `of_tile` in each. Fewer than 2^31: each is 32 KB of weights
// or, of the same weights for more tokens, a millisecond's work.
struct WgmmaShare {
    int begin, end, of_tile;

    __device__ WgmmaShare(const Gemm4bit& p, const WgmmaSplit& split, int cta)
        : begin(cta * split.each),
          end(min(begin + split.each, split.all)),
          of_tile((p.K + kMmaK - 1) / kMmaK) {}

    __device__ int count() const { return end - begin; }
};

// Where in its share a CTA is: tile after tile from the last one down, in each stage after stage.
struct WgmmaWalk {
    int tile, stage, end;  // `end`: of this CTA's stages in the tile

    __device__ explicit WgmmaWalk(const WgmmaShare& share)
        : tile((share.end - 1) / share.of_tile),
          stage(max(0, share.begin - tile * share.of_tile)),
          end(share.end - tile * share.of_tile) {}

    __device__ __forceinline__ void next_tile(const WgmmaShare& share) {
        --tile;
        stage = max(0, share.begin - tile * share.of_tile);
        end = share.of_tile;
    }

    // Go on; returns whether another tile begins.
    __device__ __forceinline__ bool next(const WgmmaShare& share) {
        if (++stage < end) return false;
        next_tile(share);
        return true;
    }
};

template <int kTuning>
__device__ __forceinline__ int token_tiles_of(const Gemm4bit& p) {
    return (p.M + kWgmmaTunings[kTuning].tokens - 1) / kWgmmaTunings[kTuning].tokens;
}

// Where rows lie among a warp's 16: the four of a lane's results are side by side in the weight. Lane (g, t) decodes
// lines g and g + 8.
__device__ __forceinline__ int row_of_line(int line) { return line % 8 / 2 * 4 + line % 2 + line / 8 * 2; }

// Call body with each number below kCount as a constant.
template <int kCount, int kFrom = 0, class Body>
__device__ __forceinline__ void unroll(Body&& body) {
    if constexpr (kFrom < kCount) {
        body(std::integral_constant<int, kFrom>{});
        unroll<kCount, kFrom + 1>(body);
    }
}

// Read 16 bytes that are read once.
__device__ __forceinline__ void load_16_once(uint32_t (&to)[4], const void* from, uint64_t policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from), "l"(policy));
}

// The weights and scales that a lane reads ahead: half a stage, 128 k of two rows, at a time.
template <class T, bool kNested, int kTuning>
class WgmmaWeights {
    static constexpr WgmmaTuning t = kWgmmaTunings[kTuning];

  public:
    __device__ WgmmaWeights(const Gemm4bit& p, const WgmmaShare& share) : p_(p), share_(share), walk_(share) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once_));
        begin_tile();
    }

    // Start reading a half of the next stage, if there is one; the second half ends it.
    template <int kHalf>
    __device__ __forceinline__ void load(bool there) {
        if (there) {
            const int k = walk_.stage * kMmaK + kHalf * 128 + static_cast<int>(threadIdx.x) % 4 * 32;
            const int block = k >> p_.block_shift;  // of the row
            Half128& half = halves_[kHalf];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                half.absmax[i] = 0.0f;  // beyond K, where the tokens are 0, any finite weights will do
                if (k < p_.K) {
                    load_16_once(half.packed[i], from_[i] + kHalf * 64, once_);
                    if constexpr (kNested) {
                        half.codes[i] = __ldg(p_.scales.codes + (first_block_[i] + block));
                        half.absmax[i] = __ldg(p_.scales.absmax + (first_block_[i] + block >> 8));
                    } else {
                        half.absmax[i] = __ldg(absmax_[i] + block);
                    }
                }
            }
        }
        if (kHalf == 0) return;
        from_[0] += kMmaK / 2;
        from_[1] += kMmaK / 2;
        if (walk_.next(share_)) begin_tile();
    }

    // The operands of unit kBlock of the stage that has been read.
    template <int kBlock, class Table>
    __device__ __forceinline__ void decode(uint32_t (&a)[16], const Table& table, const float* code, float offset) {
        const Half128& half = halves_[kBlock / 2];
        if (kBlock % 2 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float scale = half.absmax[i];
                if constexpr (kNested) scale = __fadd_rn(__fmul_rn(code[half.codes[i]], scale), offset);
                scales_[i] = ScalePair<T>(scale);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t x = half.packed[0][kBlock % 2 * 2 + j / 2], y = half.packed[1][kBlock % 2 * 2 + j / 2];
            const bool odd = j % 2;
            a[4 * j] = odd ? table.template look_up<2>(x) : table.template look_up<0>(x);
            a[4 * j + 1] = odd ? table.template look_up<2>(y) : table.template look_up<0>(y);
            a[4 * j + 2] = odd ? table.template look_up<3>(x) : table.template look_up<1>(x);
            a[4 * j + 3] = odd ? table.template look_up<3>(y) : table.template look_up<1>(y);
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) a[j] = scales_[j % 2].scaled(a[j]);
    }

  private:
    struct Half128 {
        uint32_t packed[2][4];
        float absmax[2];
        uint8_t codes[2];
    };

    // Rows that do not exist are read as the last one is.
    __device__ __forceinline__ void begin_tile() {
        const int lane = threadIdx.x % 32;
        const int first = walk_.tile / token_tiles_of<kTuning>(p_) * t.rows() + threadIdx.x / 32 * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t row = min(first + row_of_line(lane / 4 + i * 8), p_.N - 1);
            from_[i] = p_.packed + (row * p_.K + walk_.stage * kMmaK) / 2 + lane % 4 * 16;
            first_block_[i] = row * (p_.K >> p_.block_shift);
            absmax_[i] = p_.scales.absmax + first_block_[i];
        }
    }

    const Gemm4bit& p_;
    const WgmmaShare& share_;
    WgmmaWalk walk_;  // what is read next
    uint64_t once_;
    const uint8_t* from_[2];  // of each line
    int64_t first_block_[2];
    const float* absmax_[2];
    Half128 halves_[2];
    ScalePair<T> scales_[2];
};

// The ring of slots of tokens, several to a stage or several stages' in all. One thread copies; every warp says when it
// has read a slot.
template <int kTuning>
class WgmmaTokens {
    static constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    static constexpr uint32_t kSlots = WgmmaShared::kTokenSlots, kBytes = t.token_blocks * t.tokens * 128;
    static constexpr uint32_t kOfStage = kMmaBlocks / t.token_blocks, kStages = kSlots / kOfStage;
    static_assert(kSlots % kOfStage == 0, "the ring holds whole stages");

  public:
    __device__ WgmmaTokens(const Gemm4bit& p, const WgmmaShare& share, uint32_t memory, uint32_t barriers)
        : memory_(memory),
          barriers_(barriers),
          p_(p),
          share_(share),
          walk_(share) {}

    // By one thread, before the CTA synchronizes.
    __device__ void prepare() const {
        for (uint32_t i = 0; i < kSlots; ++i) {
            make_barrier(barriers_ + i * 16, 1);
            make_barrier(barriers_ + i * 16 + 8, t.threads() / 32);
        }
        publish_barriers();
    }

    // By the thread that copies.
    __device__ void fill_first() {
        begin_tile();
        for (uint32_t s = 0; s < kStages && s < share_.count(); ++s) {
            for (uint32_t j = 0; j < kOfStage; ++j) copy(s, j);
        }
    }

    // Where the tokens of slot j of a stage are, once they are there.
    __device__ __forceinline__ uint32_t wait(uint32_t stage, uint32_t j) const {
        wait_for_barrier(filled(stage, j), stage / kStages % 2);
        return memory_ + index(stage, j) * kBytes;
    }

    // This warp has read that slot. The thread that copies refills it when all have, which is soon.
    __device__ __forceinline__ void release(uint32_t stage, uint32_t j) {
        if (threadIdx.x % 32 == 0) arrive_at_barrier(filled(stage, j) + 8);
        if (threadIdx.x == 0 && stage + kStages < share_.count()) {
            wait_for_barrier(filled(stage, j) + 8, stage / kStages % 2);
            copy(stage + kStages, j);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void release_before(uint32_t stage, uint32_t j) {
        if (j > 0) {
            release(stage, j - 1);
        } else if (stage > 0) {
            release(stage - 1, kOfStage - 1);
        }
    }

  private:
    static __device__ __forceinline__ uint32_t index(uint32_t stage, uint32_t j) {
        return stage % kStages * kOfStage + j;
    }

    // The barrier at which a slot's copy completes; 8 bytes on is that of its readers.
    __device__ __forceinline__ uint32_t filled(uint32_t stage, uint32_t j) const {
        return barriers_ + index(stage, j) * 16;
    }

    __device__ __forceinline__ void copy(uint32_t stage, uint32_t j) {
        expect_bytes(filled(stage, j), kBytes);
        copy_bulk_async(memory_ + index(stage, j) * kBytes, from_, kBytes, filled(stage, j));
        from_ += kBytes;
        if (j == kOfStage - 1 && walk_.next(share_)) begin_tile();
    }

    __device__ __forceinline__ void begin_tile() {
        const int64_t stage = int64_t(walk_.tile % token_tiles_of<kTuning>(p_)) * share_.of_tile + walk_.stage;
        from_ = static_cast<const char*>(p_.workspace) + stage * kOfStage * kBytes;
    }

    const uint32_t memory_, barriers_;
    const Gemm4bit& p_;
    const WgmmaShare& share_;
    WgmmaWalk walk_;  // what is copied next
    const char* from_;
};

// Four sums of a lane: rows line and line + 8 of a warp's tile of 16, tokens 2 * quad and the one after of eight.
// Lanes trade them for four rows of one token.
template <class T>
class WgmmaResults {
  public:
    __device__ WgmmaResults(const Gemm4bit& p, int first_row) : p_(p), row_(first_row + threadIdx.x % 4 * 4) {
        const T* const bias = static_cast<const T*>(p.bias);
        const int above = first_row + row_of_line(threadIdx.x % 32 / 4), below = above + 2;
        above_ = bias != nullptr && above < p.N ? to_float(bias[above]) : 0.0f;
        below_ = bias != nullptr && below < p.N ? to_float(bias[below]) : 0.0f;
        whole_ = p.N % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
    }

    __device__ __forceinline__ void write(int first_token, const float* sums) const {
        union {
            uint2 bits;
            Pack<T, 4> pack;
        } four;
        four.bits.x = transposed(pair_of<T>(sums[0] + above_, sums[1] + above_));
        four.bits.y = transposed(pair_of<T>(sums[2] + below_, sums[3] + below_));
        const int token = first_token + threadIdx.x % 32 / 4;
        if (token >= p_.M || row_ >= p_.N) return;
        T* const out = static_cast<T*>(p_.out) + int64_t(token) * p_.N + row_;
        if (whole_) {
            *reinterpret_cast<uint2*>(out) = four.bits;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (row_ + j < p_.N) out[j] = four.pack.values[j];
            }
        }
    }

  private:
    const Gemm4bit& p_;
    const int row_;
    float above_, below_;
    bool whole_;
};

// Where a lane's sums of a tile lie that CTAs share, four together. A CTA has two such tiles at most: its last one,
// with which it begins, and its first.
template <int kTuning>
__device__ __forceinline__ float4* part_of(const WgmmaSplit& split, int cta, bool last_tile, int warp) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    const int64_t part = (int64_t(cta) * 2 + !last_tile) * (t.threads() / 32) + warp;
    return static_cast<float4*>(split.parts) + part * (t.tokens / 8 * 32) + threadIdx.x % 32;
}

template <class T, int kTuning>
__device__ __forceinline__ void multiply_unit(
    float (&sums)[kWgmmaTunings[kTuning].tokens / 2], const uint32_t (&a)[16], uint32_t tokens) {
    const MatrixInShared matrix(tokens, 128, 1024);
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        multiply_tokens<T, kWgmmaTunings[kTuning].tokens>(sums, a + 4 * j, matrix.at(j * 256));
    }
    commit_products();
}

// A tile's sums are there: write them out, or leave them to be added to others'.
template <class T, int kTuning>
__device__ __forceinline__ void end_tile(
    const Gemm4bit& p, const WgmmaSplit& split, const WgmmaShare& share, const WgmmaWalk& at,
    float (&sums)[kWgmmaTunings[kTuning].tokens / 2]) {
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    products_are_there(sums);
    if (at.stage > 0 || at.end < share.of_tile) {
        const bool last_tile = (share.end - 1) / share.of_tile == at.tile;
        float4* to = part_of<kTuning>(split, blockIdx.x, last_tile, threadIdx.x / 32);
#pragma unroll
        for (int i = 0; i < t.tokens / 2; i += 4, to += 32) {
            __stcg(to, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
        }
        return;
    }
    const int token_tiles = token_tiles_of<kTuning>(p);
    const WgmmaResults<T> results(p, at.tile / token_tiles * t.rows() + threadIdx.x / 32 * 16);
#pragma unroll
    for (int i = 0; i < t.tokens / 2; i += 4) results.write(at.tile % token_tiles * t.tokens + i * 2, sums + i);
}

#endif  // sm_90a

constexpr int kArrangeThreads = 128;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Ask for what the CTAs of the product begin with to be brought into L2, which stays coherent: lines of 128 bytes, one
// of each row.
template <int kTuning>
__device__ __forceinline__ void prefetch_first_weights(const Gemm4bit& p, const WgmmaSplit& split) {
    constexpr int kRows = kWgmmaTunings[kTuning].rows();
    const int ctas = (split.all + split.each - 1) / split.each, step = gridDim.x * gridDim.y * kArrangeThreads;
    int i = (blockIdx.y * gridDim.x + blockIdx.x) * kArrangeThreads + threadIdx.x;
    for (; i < ctas * kRows; i += step) {
        const WgmmaWalk walk(WgmmaShare(p, split, i / kRows));
        const int row = walk.tile / token_tiles_of<kTuning>(p) * kRows + i % kRows;
        if (row < p.N) prefetch_line_to_l2(p.packed + (int64_t(row) * p.K + walk.stage * kMmaK) / 2);
    }
}

#endif  // sm_90a

// Tokens in the order that the products want them: for each tile of tokens and unit of 64 k, groups of eight tokens, in
// each eight cores of 8 k; outside of [M, K] there are zeros. A thread takes half of a token's unit. Row y of the grid
// is a tile of tokens.
template <int kTuning>
__global__ void __launch_bounds__(kArrangeThreads)
    arrange_tokens_kernel(const __grid_constant__ Gemm4bit p, const __grid_constant__ WgmmaSplit split, int64_t units) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kTokens = kWgmmaTunings[kTuning].tokens;
    const int64_t i = int64_t(blockIdx.x) * kArrangeThreads + threadIdx.x;
    const int64_t unit = i / (2 * kTokens);
    const int within = static_cast<int>(i % 8), half = static_cast<int>(i / 8 % 2);
    const int group = static_cast<int>(i / 16 % (kTokens / 8));
    const int64_t token = int64_t(blockIdx.y) * kTokens + group * 8 + within;
    const int64_t k = unit / 2 * 128 + unit % 2 * 16 + half * 8;  // of lane 0 of a quad; 32 further for each other
    const uint4* from = static_cast<const uint4*>(p.A) + (token * p.K + k) / 8;
    uint4* to = static_cast<uint4*>(p.workspace) +
                (((blockIdx.y * units + unit) * (kTokens / 8) + group) * 8 + half * 4) * 8 + within;
    prefetch_first_weights<kTuning>(p, split);
    wait_for_predecessor();
    let_successor_start();
    if (unit >= units) return;
    uint4 pieces[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (token < p.M && k + j * 32 < p.K) pieces[j] = __ldg(from + j * 4);
    }
    // A piece is pairs of k: one for each of four cores.
    to[0] = make_uint4(pieces[0].x, pieces[1].x, pieces[2].x, pieces[3].x);
    to[8] = make_uint4(pieces[0].y, pieces[1].y, pieces[2].y, pieces[3].y);
    to[16] = make_uint4(pieces[0].z, pieces[1].z, pieces[2].z, pieces[3].z);
    to[24] = make_uint4(pieces[0].w, pieces[1].w, pieces[2].w, pieces[3].w);
#endif
}

template <class T, bool kNested, int kTuning>
__global__ void __launch_bounds__(kWgmmaTunings[kTuning].threads(), 1)
    gemm_4bit_wgmma_kernel(const __grid_constant__ Gemm4bit p, const __grid_constant__ WgmmaSplit split) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    constexpr WgmmaShared kShared(t, kNested);
    const uint32_t memory = shared_address(mma_shared) + kShared.table;
    float* const scale_code = reinterpret_cast<float*>(mma_shared + kShared.scale_code_at());

    const WgmmaShare share(p, split, blockIdx.x);
    WgmmaTokens<kTuning> tokens(p, share, memory, memory + kShared.tokens);
    WgmmaWeights<T, kNested, kTuning> weights(p, share);
    PairTable<T> table;
    if (threadIdx.x == 0) tokens.prepare();
    float offset = 0.0f;
    if constexpr (kNested) {
        for (int i = threadIdx.x; i < 256; i += t.threads()) scale_code[i] = __ldg(p.scales.code + i);
        offset = __ldg(p.scales.offset);
    }
    weights.template load<0>(true);
    weights.template load<1>(true);
    if (threadIdx.x == 0) {  // nothing else is read of what the predecessor wrote
        wait_for_predecessor();
        tokens.fill_first();
    }
    __syncwarp();
    if (p.code == nullptr) {
        table.fill([&](int i) { return p.values[i]; });
    } else {
        table.fill([&](int i) { return __ldg(p.code + i); });
    }
    __syncthreads();

    uint32_t a[2][16];
    float sums[t.tokens / 2];
    weights.template decode<0>(a[0], table, scale_code, offset);
    const uint32_t stages = share.count();
    uint32_t s = 0;
    for (WgmmaWalk at(share); s < stages; at.next_tile(share)) {
#pragma unroll
        for (int i = 0; i < t.tokens / 2; ++i) sums[i] = 0.0f;
        for (const uint32_t end = s + (at.end - at.stage); s < end; ++s) {
            uint32_t held = 0;
            unroll<kMmaBlocks>([&](auto unit) {
                constexpr int u = decltype(unit)::value, slot = u / t.token_blocks, within = u % t.token_blocks;
                if (within == 0) held = tokens.wait(s, slot);
                multiply_unit<T, kTuning>(sums, a[u % 2], held + within * t.tokens * 128);
                wait_for_products<1>();  // those of the unit before
                if (within == 0) tokens.release_before(s, slot);
                if (u + 1 < kMmaBlocks || s + 1 < stages) {
                    weights.template decode<(u + 1) % kMmaBlocks>(a[(u + 1) % 2], table, scale_code, offset);
                }
                if (u == 0) weights.template load<0>(s + 1 < stages);
                if (u == 2) weights.template load<1>(s + 1 < stages);
            });
        }
        wait_for_products<0>();
        if (s == stages) let_successor_start();
        end_tile<T, kTuning>(p, split, share, at, sums);
    }
#endif
}

constexpr int kFinishThreads = 256, kFinishQuads = 2;  // of a lane, four sums each

// Add up what CTAs left of the tiles they share. Row y of the grid is a tile or, where there are more tiles, the border
// between two CTAs; the first in a tile stands for the tile. A warp takes a few of the sums that a warp left.
template <class T, int kTuning>
__global__ void __launch_bounds__(kFinishThreads)
    gemm_4bit_wgmma_finish_kernel(const __grid_constant__ Gemm4bit p, const __grid_constant__ WgmmaSplit split) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr WgmmaTuning t = kWgmmaTunings[kTuning];
    constexpr int kWarps = t.threads() / 32, kQuads = t.tokens / 8, kParts = kQuads / kFinishQuads;
    const int of_tile = (p.K + kMmaK - 1) / kMmaK;
    const bool all_tiles = gridDim.y * of_tile == split.all;
    const int border = static_cast<int>(blockIdx.y + 1) * split.each;
    const int tile = all_tiles ? static_cast<int>(blockIdx.y) : border / of_tile;
    const int begin = tile * of_tile, end = begin + of_tile;
    const int first_cta = begin / split.each, last_cta = (end - 1) / split.each;
    const int index = static_cast<int>(blockIdx.x) * (kFinishThreads / 32) + threadIdx.x / 32;
    const int quad = index % kParts * kFinishQuads, warp = index / kParts;
    const int token_tiles = token_tiles_of<kTuning>(p);
    const int first_row = tile / token_tiles * t.rows() + warp * 16;
    const int first_token = tile % token_tiles * t.tokens + quad * 8;
    wait_for_predecessor();
    let_successor_start();
    const bool first_border = border > begin && border - split.each <= begin;
    const bool shared = all_tiles ? first_cta < last_cta : first_border;
    if (!shared || warp >= kWarps || first_row >= p.N || first_token >= p.M) return;
    float sums[kFinishQuads][4] = {};
#pragma unroll 4
    for (int cta = first_cta; cta <= last_cta; ++cta) {
        const bool last_tile = (min((cta + 1) * split.each, split.all) - 1) / of_tile == tile;
        const float4* from = part_of<kTuning>(split, cta, last_tile, warp) + quad * 32;
#pragma unroll
        for (int q = 0; q < kFinishQuads; ++q) {
            const float4 part = __ldcg(from + q * 32);
            sums[q][0] += part.x;
            sums[q][1] += part.y;
            sums[q][2] += part.z;
            sums[q][3] += part.w;
        }
    }
    const WgmmaResults<T> results(p, first_row);
#pragma unroll
    for (int q = 0; q < kFinishQuads; ++q) results.write(first_token + q * 8, sums[q]);
#endif
}

}  // namespace bnb
