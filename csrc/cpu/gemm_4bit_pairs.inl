// Products with a 4-bit weight in pairs of bfloat16, for blocks that hold a multiple of 64 codes of a row.
//
// Lanes hold neighbouring codes of one row, so codes are decoded in the order they lie in and nothing is transposed.
// Two blocks' values fit one table, already times their absmax, so no sum is ever scaled. Up to kDotRows activation
// rows meet the codes in registers (dot_codes), limited by decoding; more meet four rows decoded into the first-level
// cache (dot_panel), limited by the multiplier. Every lane sums its share of an output over a piece of the depth.
#pragma once

#include "gemm_4bit_activations.inl"
#include "gemm_4bit_panel.inl"

#ifdef BNB_HAVE_PAIRS

BNB_NAMESPACE_BEGIN

constexpr int64_t kScaledCodes = 64;    // codes that one scale serves
constexpr int64_t kBlockColumns = 64;   // columns that run over the whole depth before the next
constexpr int kDotWeights = 4;          // weight rows of a panel; times as many activations they fill the registers
constexpr int kDotRows = 6;             // activations that dot_codes takes at most
constexpr int64_t kMostPairRows = 256;  // activations whose piece of the depth stays in the second-level cache
constexpr int64_t kPanelDepth = 1024;   // codes of a row in a panel, which is then a sixth of the first-level cache
constexpr int kStepsOfVector = 4;       // steps of 32 codes in a vector of packed words
constexpr int64_t kStreamDepth = 4096;  // codes at a time for four activations, so that those stay in that cache

constexpr int dot_weights(int rows) { return rows <= 4 ? kDotWeights : 2; }
constexpr int64_t dot_depth(int64_t rows) {
    return rows <= 4 ? kStreamDepth * (4 / rows) : rows <= kDotRows ? kStreamDepth / 2 : kPanelDepth;
}

// Activations in pieces of the depth: [piece][group][vector][step][row of the group][kWidth words].
struct PairActivations {
    const uint32_t* words;
    int64_t rows, group, depth, piece;  // depth in whole vectors

    int64_t piece_at(int64_t k) const { return depth - k < piece ? depth - k : piece; }
    int64_t rows_at(int64_t row) const { return rows - row < group ? rows - row : group; }  // row: first of a group
    const uint32_t* at(int64_t k, int64_t row, int64_t vector) const {
        return words + offset(k, row) + vector * rows_at(row) * kVectorCodes / PairEngine::kDepth;
    }
    int64_t offset(int64_t k, int64_t row) const { return (k * rows + piece_at(k) * row) / PairEngine::kDepth; }
};

// Rows [first, last) of A, which begin and end with groups.
BNB_INLINE void pack_pairs(
    const BFloat16* A, int64_t depth, const PairActivations& a, uint32_t* words, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = r / a.group * a.group, stride = a.rows_at(begin) * kWidth;
        for (int64_t k = 0; k < a.depth; k += a.piece) {
            uint32_t* target = words + a.offset(k, begin) + (r - begin) * kWidth;
            const int64_t end = k + a.piece_at(k);
            for (int64_t at = k; at < end; at += kVectorCodes, target += kStepsOfVector * stride) {
                const BFloat16* values = A + r * depth + at;
                BFloat16 padded[kVectorCodes] = {};
                if (depth - at < kVectorCodes) {
                    memcpy(padded, values, static_cast<size_t>(depth - at) * sizeof(*values));
                    values = padded;
                }
                store_steps(values, target, stride);
            }
        }
    }
}

// sums [kWidth] += the sum of each vector's lanes.
template <int count>
BNB_INLINE void add_lanes(const F32 (&vectors)[count], float* sums) {
    static_assert(count <= kWidth);
    F32 all[kWidth];
    unrolled<kWidth>([&](auto i) {
        if constexpr (i.number < count) {
            all[i.number] = vectors[i.number];
        } else {
            all[i.number] = broadcast(0.0f);
        }
    });
    store(sums, load(sums) + sums_of_lanes(all));
}

// sums [kRows][weights] += products over `vectors` vectors of codes.
template <int kRows>
void dot_codes(
    const WeightRows<dot_weights(kRows)>& rows, const Table16& table, int64_t vectors, const uint32_t* activations,
    float* sums) {
    constexpr int kWeights = dot_weights(kRows);
    const WeightRows<kWeights> row = rows;
    const Table16 local = table;
    F32 sum[kWeights * kRows];
    unrolled<kWeights * kRows>([&](auto i) { sum[i.number] = broadcast(0.0f); });
    for (int64_t vector = 0; vector < vectors; ++vector) {
        const auto codes = [&](auto w) {
            const uint8_t* const source = row.packed[w.number] + vector * kVectorBytes;
            BNB_PREFETCH(row.next.at(w.number, vector));
            return ScaledCodes<>(local, load_words(source), row.scales[w.number] + 2 * vector);
        };
        const auto step = [&](const auto&... decoded) {
            unrolled<kStepsOfVector>([&](auto s) {
                const I32 weight[kWeights] = {scaled_pairs<s.number>(decoded)...};
                unrolled<kRows>([&](auto r) {
                    const I32 a = load_words(activations + (s.number * kRows + r.number) * kWidth);
                    unrolled<kWeights>([&](auto w) {
                        F32& target = sum[r.number * kWeights + w.number];
                        target = add_pair_products(target, weight[w.number], a);
                    });
                });
            });
        };
        if constexpr (kWeights == 4) {
            step(codes(Constant<0>{}), codes(Constant<1>{}), codes(Constant<2>{}), codes(Constant<3>{}));
        } else {
            static_assert(kWeights == 2);
            step(codes(Constant<0>{}), codes(Constant<1>{}));
        }
        activations += kStepsOfVector * kRows * kWidth;
    }
    add_lanes(sum, sums);
}

// panel [vectors][steps][kDotWeights][kWidth] of some weight rows.
BNB_INLINE void decode_panel(
    const WeightRows<kDotWeights>& rows, const Table16& table, int64_t vectors, uint32_t* panel) {
    const WeightRows<kDotWeights> row = rows;
    const Table16 local = table;
    for (int64_t vector = 0; vector < vectors; ++vector) {
        unrolled<kDotWeights>([&](auto w) {
            const I32 words = load_words(row.packed[w.number] + vector * kVectorBytes);
            const ScaledCodes<> codes(local, words, row.scales[w.number] + 2 * vector);
            unrolled<kStepsOfVector>([&](auto s) {
                store_words(panel + (s.number * kDotWeights + w.number) * kWidth, scaled_pairs<s.number>(codes));
            });
        });
        panel += kStepsOfVector * kDotWeights * kWidth;
    }
}

// sums [kRows][kDotWeights] += activations [vectors][steps][kRows] times a panel of as many steps. Meanwhile the memory
// of the rows that come next is fetched: a decoder that asked for all of it at once would wait.
template <int kRows>
void dot_panel(
    const uint32_t* panel, const uint32_t* activations, int64_t vectors, const WeightRows<kDotWeights>& rows,
    float* sums) {
    const WeightRows<kDotWeights> row = rows;
    F32 sum[kDotWeights * kRows];
    unrolled<kDotWeights * kRows>([&](auto i) { sum[i.number] = broadcast(0.0f); });
    for (int64_t vector = 0; vector < vectors; ++vector) {
        unrolled<kStepsOfVector>([&](auto s) {
            static_assert(kStepsOfVector == kDotWeights);
            BNB_PREFETCH(row.next.at(s.number, vector));
            I32 weight[kDotWeights];
            unrolled<kDotWeights>([&](auto w) { weight[w.number] = load_words(panel + w.number * kWidth); });
            unrolled<kRows>([&](auto r) {
                const I32 a = load_words(activations + r.number * kWidth);
                unrolled<kDotWeights>([&](auto w) {
                    F32& target = sum[r.number * kDotWeights + w.number];
                    target = add_pair_products(target, weight[w.number], a);
                });
            });
            panel += kDotWeights * kWidth;
            activations += kRows * kWidth;
        });
    }
    add_lanes(sum, sums);
}

// The half vector that some weight rows end with, and zeros behind it.
template <int kWeights>
class HalfVector {
  public:
    // From `vector` on of the rows.
    WeightRows<kWeights> of(const WeightRows<kWeights>& rows, int64_t vector) {
        WeightRows<kWeights> half;
        for (int w = 0; w < kWeights; ++w) {
            memcpy(packed_[w], rows.packed[w] + vector * kVectorBytes, kVectorBytes / 2);
            scales_[w][0] = rows.scales[w][vector * kVectorCodes / kScaledCodes];
            half.packed[w] = packed_[w];
            half.scales[w] = scales_[w];
        }
        return half;
    }

  private:
    static_assert(kVectorCodes == 2 * kScaledCodes);
    uint8_t packed_[kWeights][kVectorBytes] = {};
    float scales_[kWeights][2] = {};
};

// Vectors [first, first + count) of the piece of the depth that begins at k.
struct Vectors {
    int64_t k, first, count;
};

// Columns [first, last) of a product. kernel(rows, vectors, sums) adds the products of some weight rows, which begin
// at the first of the vectors, to sums [groups][kWidth].
template <int kWeights, class T, class Kernel>
void dot_range(
    const WordPanels<PairEngine>& source, const PairActivations& a, const Output<T>& output, int64_t first,
    int64_t last, const Kernel& kernel) {
    const int64_t segments = source.segments(), groups = (a.rows + a.group - 1) / a.group;
    const bool direct = source.segment == source.blocksize;
    const int64_t sums_size = kBlockColumns / kWeights * groups * kWidth;
    const int64_t spread_size = direct ? 0 : kBlockColumns * segments;
    const int64_t expanded_size = source.expanded_scales(kBlockColumns);
    const Scratch memory(static_cast<size_t>(sums_size + spread_size + expanded_size) * sizeof(float));
    float* const sums = memory.as<float>();
    float* const spread = sums + sums_size;
    HalfVector<kWeights> half;
    for (int64_t column = first; column < last; column += kBlockColumns) {
        const int64_t count = last - column < kBlockColumns ? last - column : kBlockColumns;
        memset(sums, 0, static_cast<size_t>(sums_size) * sizeof(float));
        const float* const blocks = source.block_scales(column, count, spread + spread_size);
        for (int64_t c = 0; c < count && !direct; ++c) {
            source.segment_scales(blocks, column, column + c, 0, spread + c * segments, 1);
        }
        const float* const scales = direct ? blocks : spread;
        for (int64_t k = 0; k < source.depth; k += a.piece) {
            const int64_t codes = source.depth - k < a.piece ? source.depth - k : a.piece;
            for (int64_t c = 0; c < count; c += kWeights) {
                WeightRows<kWeights> rows;
                rows.next = NextCodes::of(
                    source.row_at(column + c + kWeights) + k / 2, kWeights, source.depth / 2, codes == source.depth);
                for (int64_t w = 0; w < kWeights; ++w) {
                    const int64_t row = c + w < count ? c + w : count - 1;
                    rows.packed[w] = source.row_at(column + row) + k / 2;
                    rows.scales[w] = scales + row * segments + k / kScaledCodes;
                }
                float* const target = sums + c / kWeights * groups * kWidth;
                const int64_t whole = codes / kVectorCodes;
                if (whole) kernel(rows, Vectors{k, 0, whole}, target);
                if (codes % kVectorCodes) kernel(half.of(rows, whole), Vectors{k, whole, 1}, target);
            }
        }
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* const row = sums + r / a.group * kWidth + r % a.group * kWeights;
            float line[kBlockColumns];
            for (int64_t c = 0; c < kBlockColumns; c += kWeights) {
                memcpy(line + c, row + c / kWeights * groups * kWidth, kWeights * sizeof(float));
            }
            output.write(r, column, count, line);
        }
    }
}

template <class T>
void dot_range(
    const WordPanels<PairEngine>& source, const Table16& table, const PairActivations& a, const Output<T>& output,
    int64_t first, int64_t last) {
    if (a.rows <= kDotRows) {
        return with_constant<kDotRows>(a.rows, [&](auto rows) {
            constexpr int kWeights = dot_weights(rows.number);
            dot_range<kWeights>(
                source, a, output, first, last,
                [&](const WeightRows<kWeights>& weights, const Vectors& vectors, float* sums) {
                    dot_codes<rows.number>(weights, table, vectors.count, a.at(vectors.k, 0, vectors.first), sums);
                });
        });
    }
    const Scratch panel(static_cast<size_t>(kDotWeights * kPanelDepth) * sizeof(BFloat16));
    dot_range<kDotWeights>(
        source, a, output, first, last,
        [&](const WeightRows<kDotWeights>& weights, const Vectors& vectors, float* sums) {
            decode_panel(weights, table, vectors.count, panel.as<uint32_t>());
            for (int64_t r = 0; r < a.rows; r += a.group, sums += kWidth) {
                with_constant<kDotWeights>(a.rows_at(r), [&](auto rows) {
                    dot_panel<rows.number>(
                        panel.as<uint32_t>(), a.at(vectors.k, r, vectors.first), vectors.count, weights, sums);
                });
            }
        });
}

inline void multiply_pairs(const GemmProblem<BFloat16>& p, int32_t threads) {
    const WordPanels<PairEngine> shared{p.packed, p.scales, PairTable(p.code), p.N, p.K, p.blocksize, kScaledCodes};
    const int64_t passes = (p.M + kMostPairRows - 1) / kMostPairRows, most = (p.M + passes - 1) / passes;
    const int64_t depth = (p.K + kVectorCodes - 1) / kVectorCodes * kVectorCodes;
    const Scratch memory(static_cast<size_t>(most * depth) * sizeof(BFloat16));
    uint32_t* const words = memory.as<uint32_t>();
    for (int64_t m = 0; m < p.M; m += most) {
        const int64_t rows = p.M - m < most ? p.M - m : most, groups = (rows + kDotWeights - 1) / kDotWeights;
        const int64_t group = rows <= kDotRows ? rows : (rows + groups - 1) / groups;
        const PairActivations a{words, rows, group, depth, dot_depth(rows)};
        parallel_for(rows, (kTaskProducts / 8 / depth / group + 1) * group, threads, [&](int64_t first, int64_t last) {
            pack_pairs(p.A + m * p.K, p.K, a, words, first, last);
        });
        const Output<BFloat16> output{p.out + m * p.N, p.bias, p.N};
        const int64_t grain = (kTaskProducts / depth / rows / kBlockColumns + 1) * kBlockColumns;
        parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
            dot_range(shared, Table16(p.code), a, output, first, last);
        });
    }
}

BNB_NAMESPACE_END

#endif
