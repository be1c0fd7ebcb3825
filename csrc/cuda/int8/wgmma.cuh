// The int8 product on sm_90a: weights are the 64-row operand of a warpgroup, tokens the other one, both in shared
// memory.
//
// A tile is 64 or 128 weight rows by kTokens tokens. One warp copies stages of 128 values of k for both by tensor maps;
// a warpgroup for each 64 rows multiplies. For few tokens there may be too few tiles for all multiprocessors: then CTAs
// form clusters, take a part of k each, and add their sums up through each other's shared memory, exactly, as sums are
// integers. Results are scaled in registers, turned in shared memory and leave in whole lines. Tiles are walked in an
// order that keeps what the CTAs read together in L2.
//
// With outliers, three warps fetch the first 16 columns of a tile while it is multiplied, so that those cost next to
// nothing; the warpgroups fetch further ones themselves. They are added to the scaled sums by the 16-bit instruction,
// whose operands lie in registers as the warpgroups' sums do.
//
// Bound by memory (weights once) up to about 200 tokens, then by the tensor cores: 4096 products a clock. Two CTAs that
// copy half of the tokens each to both, which halves what L2 delivers, are slower: they wait for each other.
#pragma once

#include <algorithm>

#include "../mma_instructions.cuh"
#include "outliers.cuh"
#include "problem.h"
#include "scaling.cuh"
#include "wgmma_instructions.cuh"

namespace bnb {

constexpr int kInt8Depth = 128;  // values of k in a stage, which are as many bytes
constexpr int kInt8Group = 8;    // tokens whose sums a warp holds in four registers each

// A CTA's shape and shared memory. Matrices are aligned to 1024 bytes for the swizzle.
template <int kRows, int kTokens>
struct Int8Shape {
    static constexpr int kGroups = kTokens / kInt8Group;
    static constexpr int kConsumers = kRows * 2;
    static constexpr int kThreads = kConsumers + 128;
    static constexpr int kGatherers = 96;
    static constexpr int kCtas = kRows == 64 ? 2 : 1;  // of a multiprocessor
    static constexpr bool kMoveRegisters = kTokens > 64;

    static constexpr int kStage = (kRows + kTokens) * kInt8Depth;
    static constexpr int kTurned = std::min(kTokens, 64);  // tokens of which a warpgroup turns the results at a time
    static constexpr int kTurnedRow = 64 * 2 + 16;         // bytes; the pad spreads rows over the banks
    static constexpr int kSums = kTokens <= 128 ? kRows * kTokens * 4 : 0;  // for the other CTAs of a cluster
    static constexpr int kBatch = (kTokens + kRows) * kOutliersAtOnce * 2;
    static constexpr int kOutliers = kBatch + sizeof(OutlierChunk<kConsumers>);
    static constexpr int kCount = 32;  // bytes: the number of outlier columns, two barriers
    static constexpr int kFirstOutliers = kBatch + kCount + sizeof(OutlierList<kGatherers, kOutliersAtOnce>);
    // Adding up comes first, then outliers, then turning, all in one place.
    static constexpr int kResults = std::max({kSums, kOutliers, kConsumers / 128 * kTurned * kTurnedRow});
    static constexpr int kStats = kTokens * 4;
    static constexpr int kMost = (227 * 1024 - (kCtas - 1) * 1024) / kCtas;
    static constexpr int kBesides = 1024 + kResults + kStats + kFirstOutliers;
    static constexpr int kStages = std::min((kMost - kBesides) / (kStage + 16), 8);
    static constexpr int kBytes = kBesides + kStages * (kStage + 16);
    static_assert(kStages >= 3, "copies run ahead");
};

// What the CTAs of a launch do.
struct Int8Work {
    int row_tiles, token_tiles;
    int parts;     // of k, a CTA of the cluster each
    int together;  // tiles of rows that are walked for one tile of tokens before the next
};

struct Int8Tile {
    int row, token;  // numbers of tiles
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ Int8Tile tile_of(const Int8Work& work, int i) {
    const int of_band = work.together * work.token_tiles;
    const int band = i / of_band, rest = i - band * of_band;
    const int first = band * work.together;
    const int rows = min(work.together, work.row_tiles - first);
    return {first + rest % rows, rest / rows};
}

// Two neighbouring tokens of a row side by side become two rows of a token: 8 x 8 matrices, transposed on the way.
__device__ __forceinline__ void store_turned(uint32_t to, uint32_t upper, uint32_t lower) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(upper), "r"(lower)
                 : "memory");
}

// Turns the sums of a tile into results. All consumers call it together, after row statistics of the tile's tokens came
// to shared memory; `room` is shared by them.
template <class T, int kRows, int kTokens>
class Int8Results {
  public:
    using Shape = Int8Shape<kRows, kTokens>;

    __device__ Int8Results(
        const Int8Product& problem, char* room, const float* row_stats, const OutlierBatch<T>& first_outliers,
        int outliers, int row, int token)
        : p_(problem),
          room_(room),
          row_stats_(row_stats),
          first_outliers_(first_outliers),
          outliers_(outliers),
          row_(row),
          token_(token) {
        if constexpr (!kSumsOnly) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t n = row_ + my_row() + 8 * i;
                col_stat_[i] = n < p_.N ? __ldg(p_.col_stats + n) : 0.0f;
                bias_[i] = p_.bias && n < p_.N ? bias_value(p_.bias, p_.bias_dtype, n) : 0.0f;
            }
        }
    }

    // Groups [first, last) of tokens, at most kCount. Of a group a thread has rows r and r + 8 of two tokens each.
    template <int kCount>
    __device__ __forceinline__ void put(const int (&sums)[kCount][4], int first, int last) {
        if constexpr (sizeof(T) == 2) {
            if (outliers_ > 0) {
                put_with_outliers(sums, first, last);
                return;
            }
        }
        if constexpr (kSumsOnly) {
#pragma unroll
            for (int g = 0; g < kCount; ++g) {
                if (first + g < last) store(first + g, sums[g]);
            }
        } else {
            put_each<kCount>(first, last, [&](int g, float (&four)[4]) {
                const float* const stats = row_stats_ + (first + g) * kInt8Group + my_token();
#pragma unroll
                for (int i = 0; i < 4; ++i) four[i] = scaled(sums[g][i], row_scale(stats[i % 2]), col_stat_[i / 2]);
            });
        }
    }

  private:
    template <int kCount>
    __device__ __forceinline__ void put_with_outliers(const int (&sums)[kCount][4], int first, int last) {
        float values[kCount][4];
#pragma unroll
        for (int g = 0; g < kCount; ++g) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float stat = row_stats_[min(first + g, last - 1) * kInt8Group + my_token() + i % 2];
                values[g][i] = __fmul_rn(__int2float_rn(sums[g][i]), __fmul_rn(stat, kInt8Scale));
            }
        }
        add_batch(
            values, first, last, first_outliers_.left + first * kInt8Group * kOutliersAtOnce, first_outliers_.weights);
        if (outliers_ > kOutliersAtOnce) add_others(values, first, last);
        put_each<kCount>(first, last, [&](int g, float (&four)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = __fmul_rn(values[g][i], __fmul_rn(col_stat_[i / 2], kInt8Scale));
        });
    }

    static constexpr bool kSumsOnly = std::is_same_v<T, int>;
    static constexpr int kTurnedGroups = Shape::kTurned / kInt8Group;

    // Where in the tile, and in a group of tokens, a thread's first value is.
    __device__ __forceinline__ static int my_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
    __device__ __forceinline__ static int my_token() { return threadIdx.x % 4 * 2; }

    // value_of(g, four) gives what group first + g holds before the bias.
    template <int kCount, class ValueOf>
    __device__ __forceinline__ void put_each(int first, int last, ValueOf&& value_of) {
#pragma unroll
        for (int g = 0; g < kCount; ++g) {
            if (first + g < last) {
                float values[4];
                value_of(g, values);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (p_.bias) values[i] = __fadd_rn(values[i], bias_[i / 2]);
                }
                if constexpr (sizeof(T) == 4) {
                    store(first + g, values);
                } else {
                    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
                    const int token = g % kTurnedGroups * kInt8Group + lane % 8;
                    store_turned(
                        shared_address(turned()) + token * Shape::kTurnedRow + (warp * 16 + lane / 8 % 2 * 8) * 2,
                        pair_of<T>(values[0], values[1]), pair_of<T>(values[2], values[3]));
                }
            }
            if constexpr (sizeof(T) == 2) {
                if ((g + 1) % kTurnedGroups == 0 || g + 1 == kCount) {
                    const int begin = first + g / kTurnedGroups * kTurnedGroups;
                    flush(begin, min(first + g + 1, last));
                }
            }
        }
    }

    // What a warpgroup turned, of groups [begin, end), goes to memory in whole lines.
    __device__ __forceinline__ void flush(int begin, int end) {
        const int half = threadIdx.x / 128;
        synchronize_threads(2 + half, 128);
        const bool whole = p_.N % 8 == 0 && reinterpret_cast<uintptr_t>(p_.out) % 16 == 0;
        for (int i = threadIdx.x % 128; i < (end - begin) * kInt8Group * 8; i += 128) {
            const int token = i / 8, part = i % 8 * 8;
            const int64_t m = token_ + begin * kInt8Group + token, n = row_ + half * 64 + part;
            if (m >= p_.M || n >= p_.N) continue;
            const T* const from = reinterpret_cast<const T*>(turned() + token * Shape::kTurnedRow) + part;
            T* const to = static_cast<T*>(p_.out) + m * p_.N + n;
            if (whole) {
                store_pack(to, load_pack<T, 8>(from));
            } else {
                for (int j = 0; j < 8 && n + j < p_.N; ++j) to[j] = from[j];
            }
        }
        synchronize_threads(2 + half, 128);
    }

    // values, still to be scaled by the columns of the result, are increased by what a batch of outlier columns lacks.
    template <int kCount>
    __device__ __forceinline__ void add_batch(
        float (&values)[kCount][4], int first, int last, const T* left, const T* weights) {
        const int lane = threadIdx.x % 32;
        const auto pairs_of = [&](const T* rows, int row) {
            return *reinterpret_cast<const uint2*>(rows + row * kOutliersAtOnce + lane % 4 * 4);
        };
        const uint2 upper = pairs_of(weights, my_row()), lower = pairs_of(weights, my_row() + 8);
        const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
        for (int g = 0; g < kCount; ++g) {
            if (first + g >= last) continue;
            const uint2 b = pairs_of(left, g * kInt8Group + lane / 4);
            multiply_add<T>(values[g], a, b.x, b.y);
        }
    }

    // All batches but the first.
    template <int kCount>
    __device__ __forceinline__ void add_others(float (&values)[kCount][4], int first, int last) {
        using Chunk = OutlierChunk<Shape::kConsumers>;
        T* const left = reinterpret_cast<T*>(room_);
        const OutlierBatch<T> batch = {left, left + kTokens * kOutliersAtOnce};
        Chunk& chunk = *reinterpret_cast<Chunk*>(batch.weights + kRows * kOutliersAtOnce);
        const int thread = threadIdx.x, column = thread % kOutliersAtOnce;
        const int64_t m = int64_t(token_) + first * kInt8Group;
        const int tokens = (last - first) * kInt8Group;
        const auto add = [&] {
            synchronize_threads(1, Shape::kConsumers);
            add_batch(values, first, last, batch.left, batch.weights);
            synchronize_threads(1, Shape::kConsumers);
        };
        int done = kOutliersAtOnce;
        if (p_.outlier_count) {
            for (; done < outliers_ && done < kGatheredOutliers; done += kOutliersAtOnce) {
                batch.template copy<Shape::kConsumers>(p_, done / kOutliersAtOnce, m, tokens, row_, kRows, thread);
                add();
            }
        }
        if (done >= outliers_) return;
        int seen = 0;
        for (int64_t start = 0; start < p_.K; start += Chunk::kColumns) {
            const int count = chunk.collect(p_.outlier_cols, start, p_.K, thread, 1);
            for (int c = max(done - seen, 0); c < count; c += kOutliersAtOnce) {
                const bool exists = c + column < count;
                batch.template gather<Shape::kConsumers, 4>(
                    p_, m, tokens, row_, kRows, thread, exists, start + (exists ? chunk.columns[c + column] : 0));
                add();
            }
            seen += count;
        }
    }

    __device__ __forceinline__ char* turned() const {
        return room_ + threadIdx.x / 128 * Shape::kTurned * Shape::kTurnedRow;
    }

    template <class Value>
    __device__ __forceinline__ void store(int group, const Value (&values)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t m = token_ + group * kInt8Group + my_token() + i % 2, n = row_ + my_row() + i / 2 * 8;
            if (m < p_.M && n < p_.N) static_cast<Value*>(p_.out)[m * p_.N + n] = values[i];
        }
    }

    const Int8Product& p_;
    char* const room_;
    const float* const row_stats_;
    const OutlierBatch<T> first_outliers_;
    const int outliers_;  // columns
    const int row_, token_;
    float col_stat_[2], bias_[2];
};

#endif  // sm_90a

template <class T, int kRows, int kTokens>
__global__ void __launch_bounds__(Int8Shape<kRows, kTokens>::kThreads, Int8Shape<kRows, kTokens>::kCtas)
    int8_matmul_wgmma_kernel(
        const __grid_constant__ Int8Product p, const __grid_constant__ CUtensorMap weights,
        const __grid_constant__ CUtensorMap tokens, const Int8Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Shape = Int8Shape<kRows, kTokens>;
    constexpr int kStages = Shape::kStages, kConsumers = Shape::kConsumers, kGroups = Shape::kGroups;
    extern __shared__ char raw[];
    char* const base = raw + (-shared_address(raw) & 1023);
    char* const results = base + kStages * Shape::kStage;
    float* const row_stats = reinterpret_cast<float*>(results + Shape::kResults);
    const uint32_t stages = shared_address(base);
    const uint32_t full = shared_address(row_stats) + Shape::kStats, empty = full + kStages * 8;
    char* const outliers = reinterpret_cast<char*>(row_stats) + Shape::kStats + 2 * kStages * 8;
    const OutlierBatch<T> first_outliers = {
        reinterpret_cast<T*>(outliers), reinterpret_cast<T*>(outliers) + kTokens * kOutliersAtOnce};
    int& outlier_count = *reinterpret_cast<int*>(outliers + Shape::kBatch);
    // Between those who gather outliers and those who add them: gathered, and added.
    const uint32_t outliers_full = shared_address(outliers) + Shape::kBatch + 8, outliers_empty = outliers_full + 8;
    const bool has_outliers = sizeof(T) == 2 && p.outlier_cols != nullptr;
    // The kernel that gathers outliers has let this one start when quantization had ended: only they must be waited
    // for.
    const bool gathered = has_outliers && p.outlier_count != nullptr;

    const int parts = work.parts, part = parts > 1 ? cluster_rank() : 0;
    const int first_tile = blockIdx.x / parts, step = gridDim.x / parts;
    const int tiles = work.row_tiles * work.token_tiles;
    const int depth = static_cast<int>((p.K + kInt8Depth - 1) / kInt8Depth);
    const int k_begin = int(int64_t(depth) * part / parts), k_end = int(int64_t(depth) * (part + 1) / parts);

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            make_barrier(full + 8 * s, 1);
            make_barrier(empty + 8 * s, kConsumers / 128);
        }
        make_barrier(outliers_full, Shape::kGatherers);
        make_barrier(outliers_empty, kConsumers);
        publish_barriers();
    }
    __syncthreads();

    if (threadIdx.x >= kConsumers) {
        if constexpr (Shape::kMoveRegisters) release_registers<88>();
        if (threadIdx.x == kConsumers) {
            prefetch_map(&weights);
            prefetch_map(&tokens);
            const auto copy_weights = [&](int s, int k, const Int8Tile& tile) {
                expect_bytes(full + 8 * s, Shape::kStage);
                copy_box_async(stages + s * Shape::kStage, &weights, k * kInt8Depth, tile.row * kRows, full + 8 * s);
            };
            // Nobody wrote the weights just now, if the launches before this one only quantized the tokens.
            int early = 0;
            if (p.after_quantization && first_tile < tiles) {
                const Int8Tile tile = tile_of(work, first_tile);
                for (; early < kStages && k_begin + early < k_end; ++early) copy_weights(early, k_begin + early, tile);
            }
            if (!gathered) wait_for_predecessor();
            int s = 0, round = 0;
            for (int i = first_tile; i < tiles; i += step) {
                const Int8Tile tile = tile_of(work, i);
                for (int k = k_begin; k < k_end; ++k) {
                    if (round > 0) wait_for_barrier(empty + 8 * s, (round - 1) & 1);
                    if (early > 0) {
                        --early;
                    } else {
                        copy_weights(s, k, tile);
                    }
                    copy_box_async(
                        stages + s * Shape::kStage + kRows * kInt8Depth, &tokens, k * kInt8Depth, tile.token * kTokens,
                        full + 8 * s);
                    if (++s == kStages) s = 0, ++round;
                }
            }
        }
        if constexpr (sizeof(T) == 2) {
            const int thread = threadIdx.x - kConsumers - 32;
            if (thread >= 0 && has_outliers) {
                using List = OutlierList<Shape::kGatherers, kOutliersAtOnce>;
                List& list = *reinterpret_cast<List*>(outliers + Shape::kBatch + Shape::kCount);
                wait_for_predecessor();
                const int column = thread % kOutliersAtOnce;
                uint32_t phase = 1;  // of a barrier that nobody has to wait for yet
                const int count = gathered ? *p.outlier_count : list.collect(p.outlier_cols, p.K, thread, 4);
                const int64_t k = !gathered && column < count ? list.columns[column] : 0;
                if (thread == 0) outlier_count = count;
                for (int i = first_tile; i < tiles; i += step) {
                    const Int8Tile tile = tile_of(work, i);
                    wait_for_barrier(outliers_empty, phase);
                    phase ^= 1;
                    if (count > 0 && gathered) {
                        first_outliers.template copy<Shape::kGatherers>(
                            p, 0, int64_t(tile.token) * kTokens, kTokens, int64_t(tile.row) * kRows, kRows, thread);
                    } else if (count > 0) {
                        first_outliers.template gather<Shape::kGatherers, 8>(
                            p, int64_t(tile.token) * kTokens, kTokens, int64_t(tile.row) * kRows, kRows, thread,
                            column < count, k);
                    }
                    arrive_at_barrier(outliers_full);
                }
            }
        }
        __syncwarp();
        if (parts > 1) synchronize_cluster(), synchronize_cluster();
        return;
    }

    if constexpr (Shape::kMoveRegisters) acquire_registers<208>();
    if (!gathered) wait_for_predecessor();
    const int half = threadIdx.x / 128;
    int s = 0;
    uint32_t phase = 0, outliers_phase = 0;
    const auto release = [&](int stage) {
        if (threadIdx.x % 128 == 0) arrive_at_barrier(empty + 8 * stage);
    };
    for (int i = first_tile; i < tiles; i += step) {
        const Int8Tile tile = tile_of(work, i);
        int sums[kGroups * 4] = {};
        int before = -1;
        for (int k = k_begin; k < k_end; ++k) {
            wait_for_barrier(full + 8 * s, phase);
            const uint64_t rows = swizzled_matrix(stages + s * Shape::kStage + half * 64 * kInt8Depth);
            const uint64_t columns = swizzled_matrix(stages + s * Shape::kStage + kRows * kInt8Depth);
            begin_products();
#pragma unroll
            for (int j = 0; j < kInt8Depth / 32; ++j) {
                multiply_int8<kTokens>(sums, rows + 2 * j, columns + 2 * j);
            }
            commit_products();
            wait_for_products<1>();
            if (before >= 0) release(before);
            before = s;
            if (++s == kStages) s = 0, phase ^= 1;
        }
        wait_for_products<0>();
        if (before >= 0) release(before);

        const int token = tile.token * kTokens;
        if constexpr (!std::is_same_v<T, int>) {
            for (int j = threadIdx.x; j < kTokens; j += kConsumers) {
                row_stats[j] = token + j < p.M ? __ldg(p.row_stats + token + j) : 0.0f;
            }
        }
        if (has_outliers) {
            wait_for_barrier(outliers_full, outliers_phase);
            outliers_phase ^= 1;
        }
        Int8Results<T, kRows, kTokens> to(
            p, results, row_stats, first_outliers, has_outliers ? outlier_count : 0, tile.row * kRows, token);
        if (parts == 1) {
            synchronize_threads(1, kConsumers);  // statistics are there
            int of_groups[kGroups][4];
#pragma unroll
            for (int j = 0; j < kGroups * 4; ++j) of_groups[j / 4][j % 4] = sums[j];
            to.put(of_groups, 0, kGroups);
            synchronize_threads(1, kConsumers);  // and have been read
            if (has_outliers) arrive_at_barrier(outliers_empty);
        } else if constexpr (Shape::kSums > 0) {
            // A cluster has one tile. Each CTA adds up some groups of tokens, of all.
            const uint32_t place = shared_address(results) + 4 * threadIdx.x;
#pragma unroll
            for (int j = 0; j < kGroups * 4; ++j) {
                asm volatile("st.shared.s32 [%0], %1;" ::"r"(place + 4 * kConsumers * j), "r"(sums[j]) : "memory");
            }
            synchronize_cluster();
            const int begin = kGroups * part / parts, end = kGroups * (part + 1) / parts;
            constexpr int kMine = (kGroups + 1) / 2;
            int mine[kMine][4] = {};
#pragma unroll
            for (int g = 0; g < kMine; ++g) {
                if (begin + g >= end) break;
                for (int other = 0; other < parts; ++other) {
                    const uint32_t from = address_in(place + 16 * kConsumers * (begin + g), other);
#pragma unroll
                    for (int j = 0; j < 4; ++j) mine[g][j] += load_of_cluster(from + 4 * kConsumers * j);
                }
            }
            synchronize_cluster();  // sums have been read; nobody leaves before
            if (begin < end) to.put(mine, begin, end);
        }
    }
#endif  // sm_90a
}

}  // namespace bnb
