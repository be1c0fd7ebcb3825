// The two inner kernels of a product with a 4-bit weight: codes straight from the packed bytes, and a panel of them.
//
// stream_rows decodes whole words of a few weight rows in registers, in the order they lie in memory, and is limited by
// memory for one activation row. multiply_tile multiplies up to kTileRows activation rows with a panel that lies in the
// first-level cache for all of them; its accumulators fill the register file, so it is limited by the multiplier.
// In both, the absmax scales the sum over a segment, the codes that no row's block border divides, or over part of it.
#pragma once

#include "gemm_4bit_engine.inl"

BNB_NAMESPACE_BEGIN

constexpr int kTileRows = kWidth >= 16 ? 8 : kByteTables ? 6 : 4;
constexpr int kTileVectors = 2;
constexpr int64_t kPanelColumns = kTileVectors * kWidth;
constexpr int kStreamRows = kWidth >= 16 ? 6 : kByteTables ? 8 : 4;  // activations that stream_rows takes at most
constexpr int64_t kWordCodes = 8;                                    // codes of one 32-bit word
constexpr int64_t kVectorCodes = kWordCodes * kWidth;                // codes of a row that are loaded together
constexpr int64_t kVectorBytes = kVectorCodes / 2;

// --- streaming -------------------------------------------------------------------------------------------------------

// Whether one weight row after the other is decoded, because what steps share of several would not fit.
constexpr bool kRegistersAreFew = kWidth < 16;

// Weight rows that stream_rows takes together: their sums fit the register file twice, or are those of one at a time.
constexpr int stream_weights(int rows) { return kByteTables || rows <= (kRegistersAreFew ? 1 : 2) ? 4 : 2; }

// Codes to fetch while those of some rows are read, a vector of each. Whoever reads whole rows fetches in the order of
// addresses, which memory serves faster than many rows at once.
struct NextCodes {
    const uint8_t* first = nullptr;
    int64_t row_stride = 0, vector_stride = 0;

    // `rows` rows of so many bytes, a part of each or all.
    static NextCodes of(const uint8_t* first, int64_t rows, int64_t bytes, bool whole) {
        return whole ? NextCodes{first, kVectorBytes, rows * kVectorBytes} : NextCodes{first, bytes, kVectorBytes};
    }
    BNB_INLINE const uint8_t* at(int64_t row, int64_t vector) const {
        return first + row * row_stride + vector * vector_stride;
    }
};

// Some weight rows: their packed codes, and the absmax of each segment.
template <int kWeights>
struct WeightRows {
    const uint8_t* packed[kWeights];
    const float* scales[kWeights];
    NextCodes next;
};

// total [kWeights][kRows] += products of vector `vector`, which is in segment `index`, one weight row after the other,
// so that sums and tables fit few registers. Sums end with the vector, and one activation row has two of them, since
// each addition waits for the last.
template <class Engine, int kRows, int kScales>
BNB_INLINE void add_vector(
    const WeightRows<stream_weights(kRows)>& row, const typename Engine::Table& table, int64_t index, int64_t vector,
    const uint32_t* activations, F32 (&total)[stream_weights(kRows) * kRows]) {
    constexpr int kSteps = int(kWordCodes / Engine::kDepth), kChains = kRows == 1 ? 2 : 1;
    unrolled<stream_weights(kRows)>([&](auto w) BNB_INLINE_BODY {
        const uint32_t* a = activations;
        BNB_HIDE(a);  // kept for the next row, activations would take the registers of tables
        F32 sum[kChains * kRows];
        unrolled<kChains * kRows>([&](auto i) { sum[i.number] = broadcast(0.0f); });
        const I32 words = load_words(row.packed[w.number] + vector * kVectorBytes);
        BNB_PREFETCH(row.next.at(w.number, vector));
        unrolled<kSteps>([&](auto step) BNB_INLINE_BODY {
            const auto weight = Engine::template decode<step.number>(table, words);
            unrolled<kRows>([&](auto r) BNB_INLINE_BODY {
                F32& target = sum[step.number % kChains * kRows + r.number];
                const auto value = Engine::load_weight(a + (step.number * kRows + r.number) * kWidth);
                target = Engine::add_product(target, weight, value);
            });
        });
        const F32 scale = repeat<kScales>(row.scales[w.number] + index * kScales);
        unrolled<kRows>([&](auto r) BNB_INLINE_BODY {
            const F32 all = kChains == 2 ? sum[r.number] + sum[kChains * kRows - 1] : sum[r.number];
            total[w.number * kRows + r.number] = fma(all, scale, total[w.number * kRows + r.number]);
        });
    });
}

// sums [kWeights][kRows] += products of weight and activation rows over `vectors` vectors of codes. A segment is
// kVectorCodes / kScales codes or, if kScales is 1, `segment` whole vectors.
template <class Engine, int kRows, int kScales>
void stream_rows(
    const WeightRows<stream_weights(kRows)>& rows, const typename Engine::Table& shared, int64_t segment,
    int64_t vectors, const uint32_t* activations, float* sums) {
    constexpr int kSteps = int(kWordCodes / Engine::kDepth), kWeights = stream_weights(kRows);
    const typename Engine::Table table = shared;
    const WeightRows<kWeights> row = rows;
    F32 total[kWeights * kRows];
    unrolled<kWeights * kRows>([&](auto i) { total[i.number] = broadcast(0.0f); });
    int64_t vector = 0, segments = 0;
    if constexpr (kRegistersAreFew) {
        for (int64_t left = segment; vector < vectors; ++vector) {
            add_vector<Engine, kRows, kScales>(row, table, segments, vector, activations, total);
            activations += kSteps * kRows * kWidth;
            if (--left == 0) left = segment, ++segments;
        }
    }
    while (!kRegistersAreFew && vector < vectors) {
        F32 sum[kWeights * kRows];
        unrolled<kWeights * kRows>([&](auto i) { sum[i.number] = broadcast(0.0f); });
        const int64_t stop = vectors - vector < segment ? vectors : vector + segment;
        for (; vector < stop; ++vector) {
            I32 words[kWeights];
            unrolled<kWeights>([&](auto w) {
                const uint8_t* const source = row.packed[w.number] + vector * kVectorBytes;
                words[w.number] = load_words(source);
                BNB_PREFETCH(row.next.at(w.number, vector));
            });
            const auto load_activation = [&](auto step, auto r) {
                return Engine::load_weight(activations + (step.number * kRows + r.number) * kWidth);
            };
            unrolled<kSteps>([&](auto step) {
                typename Engine::Weight weight[kWeights];
                unrolled<kWeights>(
                    [&](auto w) { weight[w.number] = Engine::template decode<step.number>(table, words[w.number]); });
                unrolled<kRows>([&](auto r) {
                    const auto a = load_activation(step, r);
                    unrolled<kWeights>([&](auto w) {
                        F32& target = sum[w.number * kRows + r.number];
                        target = Engine::add_product(target, weight[w.number], a);
                    });
                });
            });
            activations += kSteps * kRows * kWidth;
        }
        unrolled<kWeights>([&](auto w) {
            const F32 scale = repeat<kScales>(row.scales[w.number] + segments * kScales);
            unrolled<kRows>([&](auto r) {
                F32& target = total[w.number * kRows + r.number];
                target = fma(sum[w.number * kRows + r.number], scale, target);
            });
        });
        ++segments;
    }
    unrolled<kWeights * kRows>([&](auto i) { sums[i.number] += reduce_add(total[i.number]); });
}

// --- panels ----------------------------------------------------------------------------------------------------------

// sum += one of the steps that a row of a panel holds, for all activations and columns.
template <class Engine, int kRows, int step, class Panel>
BNB_INLINE void add_step(
    const Panel& panel, const uint32_t* words, const uint32_t* activations, F32 (&sum)[kRows * kTileVectors]) {
    typename Engine::Weight weight[kTileVectors];
    unrolled<kTileVectors>([&](auto v) { weight[v.number] = panel.template weight<step>(words + v.number * kWidth); });
    unrolled<kRows>([&](auto r) {
        const auto a = Engine::load_step(activations + step * kRows + r.number);
        unrolled<kTileVectors>([&](auto v) {
            F32& target = sum[r.number * kTileVectors + v.number];
            target = Engine::add_product(target, weight[v.number], a);
        });
    });
}

// sums [kRows][kPanelColumns] += activations [steps][kRows] times a panel, for the steps from `step` on;
// scales [segments][kPanelColumns] has the absmax of every `segment_steps` steps from 0 on.
template <class Engine, class Panel, int kRows>
void multiply_tile(
    const uint32_t* activations, const Panel& shared, int64_t step, int64_t steps, int64_t segment_steps,
    const float* scales, float* sums) {
    const Panel panel = shared;
    const uint32_t* words = panel.words;
    constexpr int kSums = kRows * kTileVectors;
    F32 total[kSums];
    unrolled<kSums>([&](auto i) { total[i.number] = broadcast(0.0f); });
    const int64_t end = step + steps;
    int64_t border = step / segment_steps * segment_steps;
    scales += step / segment_steps * kPanelColumns;
    while (step < end) {
        border += segment_steps;
        const int64_t stop = border < end ? border : end;
        F32 sum[kSums];
        unrolled<kSums>([&](auto i) { sum[i.number] = broadcast(0.0f); });
        for (; step < stop; step += Panel::kSteps) {
            panel.fetch((words - panel.words) / kPanelColumns);
            if constexpr (Panel::kSteps == 1) {  // a lambda in between would keep scalar vectors out of registers
                add_step<Engine, kRows, 0>(panel, words, activations, sum);
            } else {
                unrolled<Panel::kSteps>(
                    [&](auto s) { add_step<Engine, kRows, s.number>(panel, words, activations, sum); });
            }
            words += kPanelColumns;
            activations += Panel::kSteps * kRows;
        }
        unrolled<kTileVectors>([&](auto v) {
            const F32 scale = load(scales + v.number * kWidth);
            unrolled<kRows>([&](auto r) {
                F32& target = total[r.number * kTileVectors + v.number];
                target = fma(sum[r.number * kTileVectors + v.number], scale, target);
            });
        });
        scales += kPanelColumns;
    }
    unrolled<kSums>([&](auto i) {
        float* const target = sums + i.number * kWidth;
        store(target, load(target) + total[i.number]);
    });
}

BNB_NAMESPACE_END
