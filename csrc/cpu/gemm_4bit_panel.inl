// Panels of weights for multiply_tile, made from the packed layout: decoded once for all activations, or only
// transposed where the tiles can decode while the multiplier works.
//
// A source says how: `columns` and `depth` of the product, load_scales for the columns of a panel, and load_panel for
// some of its steps. WordPanels keeps the codes' own values and leaves the absmax to the tile, and so does
// PackedPanels; they need whole words between two blocks. RowPanels takes any shape and ColumnPanels the transposed
// weight; both scale while they decode.
#pragma once

#include "gemm_4bit_tile.inl"

BNB_NAMESPACE_BEGIN

constexpr int64_t kPanelSteps = 128;  // a panel is then a third of the first-level cache

// Whether PackedPanels is faster. What looks up a pair of bfloat16 competes with what multiplies it.
template <class Engine>
constexpr bool kPacksPanels = kLooksUpInTiles && Engine::kDepth == 1;

// [steps][kPanelColumns] vectors of the engine.
template <class Engine>
struct DecodedPanel {
    static constexpr int kSteps = 1;  // of one row of the panel

    const uint32_t* words;

    template <int step>
    BNB_INLINE typename Engine::Weight weight(const uint32_t* row) const {
        return Engine::load_weight(row);
    }
    BNB_INLINE void fetch(int64_t) const {}
};

// Packed codes, a word of each column in a row: [steps / kSteps][kPanelColumns].
template <class Engine>
struct PackedPanel {
    static constexpr int kSteps = int(kWordCodes / Engine::kDepth);

    const uint32_t* words;
    typename Engine::Table table;
    const uint8_t* next;  // codes of a panel that comes soon
    int64_t stride;       // bytes between its columns

    template <int step>
    BNB_INLINE typename Engine::Weight weight(const uint32_t* row) const {
        return Engine::template decode<step>(table, load_words(row));
    }

    // Ask for a part of the memory of `next` with each row: who asked for all of it at once would wait.
    BNB_INLINE void fetch(int64_t row) const {
        constexpr int64_t kColumns = kPanelColumns * kSteps / kPanelSteps;
        for (int64_t c = 0; c < kColumns; ++c) BNB_PREFETCH(next + (row * kColumns + c) * stride);
    }
};

BNB_INLINE int64_t greatest_common_divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// The scale of each block, expanded where the statistics are quantized themselves.
BNB_INLINE void expand_scales(const BlockScales& scales, int64_t first, int64_t last, float* target) {
    int64_t b = first;
    const F32 offset = broadcast(*scales.offset);
    while (b < last) {
        const int64_t block = b / kNestedBlocksize;
        const int64_t stop = last < (block + 1) * kNestedBlocksize ? last : (block + 1) * kNestedBlocksize;
        const F32 factor = broadcast(scales.absmax[block]);
        for (; b + kWidth <= stop; b += kWidth, target += kWidth) {
            store(target, gather(scales.code, load_u8(scales.absmax_8bit + b)) * factor + offset);
        }
        for (; b < stop; ++b) *target++ = scales.code[scales.absmax_8bit[b]] * scales.absmax[block] + *scales.offset;
    }
}

// The scales of a weight in float32, made once where they are quantized themselves.
class ExpandedScales {
  public:
    template <class T>
    ExpandedScales(const GemmProblem<T>& p, int32_t threads)
        : memory_(p.scales.absmax_8bit ? static_cast<size_t>(blocks(p)) * sizeof(float) : 0),
          absmax(p.scales.absmax_8bit ? memory_.template as<float>() : p.scales.absmax) {
        if (!p.scales.absmax_8bit) return;
        parallel_for(blocks(p), 1 << 15, threads, [&](int64_t first, int64_t last) {
            expand_scales(p.scales, first, last, memory_.template as<float>() + first);
        });
    }

  private:
    template <class T>
    static int64_t blocks(const GemmProblem<T>& p) {
        return (p.N * p.K + p.blocksize - 1) / p.blocksize;
    }

    Scratch memory_;

  public:
    const float* const absmax;
};

// Segments are what no row's block border divides.
template <class Engine>
struct WordPanels {
    const uint8_t* packed;
    BlockScales scales;
    typename Engine::Table table;
    int64_t columns, depth, blocksize, segment;

    int64_t segments() const { return depth / segment; }

    // Floats that block_scales needs for so many rows.
    int64_t expanded_scales(int64_t rows = kWidth) const {
        return scales.absmax_8bit ? rows * depth / blocksize + 2 : 0;
    }

    // Absmax of `rows` weight rows from `column` on, one a block, from the block of the first row's first value on.
    const float* block_scales(int64_t column, int64_t rows, float* expanded) const {
        const int64_t first = column * depth / blocksize;
        if (!scales.absmax_8bit || depth == 0) return scales.absmax + first;
        expand_scales(scales, first, ((column + rows) * depth - 1) / blocksize + 1, expanded);
        return expanded;
    }

    // One row's absmax a segment, `stride` floats apart, from a segment on.
    void segment_scales(
        const float* blocks, int64_t column, int64_t row, int64_t from, float* target, int64_t stride) const {
        const int64_t begin = row * depth + from * segment;
        int64_t block = begin / blocksize, inside = begin - block * blocksize;
        block -= column * depth / blocksize;
        for (int64_t s = from; s < segments(); ++s) {
            target[s * stride] = blocks[block];
            inside += segment;
            if (inside == blocksize) inside = 0, ++block;
        }
    }

    // The same of kWidth rows in lanes: target [segments], `stride` floats apart. Rows past the last repeat it.
    void load_scales(int64_t column, int64_t rows, float* target, int64_t stride, float* expanded) const {
        const float* const blocks = block_scales(column, rows, expanded);
        int64_t done = 0;
        if (segment == blocksize && rows == kWidth) {
            const void* row[kWidth];
            for (int r = 0; r < kWidth; ++r) row[r] = blocks + r * segments();
            for (; done + kWidth <= segments(); done += kWidth) {
                I32 words[kWidth];
                load_transposed(row, done * int64_t(sizeof(float)), words);
                for (int i = 0; i < kWidth; ++i) store_words(target + (done + i) * stride, words[i]);
            }
        }
        for (int64_t r = 0; r < kWidth && done < segments(); ++r) {
            segment_scales(blocks, column, column + (r < rows ? r : rows - 1), done, target + r, stride);
        }
    }

    const uint8_t* row_at(int64_t row) const { return packed + (row < columns ? row : columns - 1) * (depth / 2); }

    // Some steps of the words of kWidth columns at a time: target = body(words, target), from the panel's first row on.
    template <bool kFetch, class Body>
    BNB_INLINE void for_words(
        int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel, const Body& body) const {
        const int64_t first = step * Engine::kDepth, stop = (step + steps) * Engine::kDepth;
        for (int64_t v = 0; v * kWidth < count; ++v) {
            uint32_t* target = panel + v * kWidth;
            const void* row[kWidth];
            for (int r = 0; r < kWidth; ++r) row[r] = row_at(column + v * kWidth + r);
            uint8_t padded[kWidth][kVectorBytes];
            for (int64_t k = first; k < stop; k += kVectorCodes) {
                int64_t offset = k / 2, words_left = kWidth;
                if (stop - k < kVectorCodes) {
                    words_left = (stop - k) / kWordCodes;
                    for (int r = 0; r < kWidth; ++r) {
                        memcpy(
                            padded[r], static_cast<const uint8_t*>(row[r]) + offset,
                            static_cast<size_t>(4 * words_left));
                        row[r] = padded[r];
                    }
                    offset = 0;
                } else if (kFetch) {
                    for (int r = 0; r < kWidth; ++r)
                        BNB_PREFETCH(static_cast<const uint8_t*>(row[r]) + offset + 2 * kVectorBytes);
                }
                I32 words[kWidth];
                load_codes(row, offset, words);
                for (int64_t i = 0; i < words_left; ++i) target = body(words[i], target);
            }
        }
    }

    DecodedPanel<Engine> load_panel(int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel) const {
        constexpr int kSteps = int(kWordCodes / Engine::kDepth);
        const typename Engine::Table local = table;
        for_words<true>(column, count, step, steps, panel, [&](const I32& word, uint32_t* target) {
            unrolled<kSteps>([&](auto s) {
                Engine::store_weight(target + s.number * kPanelColumns, Engine::template decode<s.number>(local, word));
            });
            return target + kSteps * kPanelColumns;
        });
        return {panel};
    }
};

// The same for tiles that decode.
template <class Engine>
struct PackedPanels : WordPanels<Engine> {
    PackedPanel<Engine> load_panel(int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel) const {
        this->template for_words<false>(column, count, step, steps, panel, [](const I32& word, uint32_t* target) {
            store_words(target, word);
            return target + kPanelColumns;
        });
        const int64_t ahead = (step + steps + kPanelSteps) * Engine::kDepth, over = ahead - this->depth;
        const uint8_t* const next =
            over < 0 ? this->row_at(column) + ahead / 2 : this->row_at(column + kPanelColumns) + over / 2;
        return {panel, this->table, next, this->depth / 2};
    }
};

// Weights in float32, rows of any length and parity.
struct DecodedWeight {
    const uint8_t* packed;
    const float* absmax;
    Table16 table;
    int64_t N, K, blocksize;

    // values [count] of row n from column k on; zeros beyond the weight.
    BNB_INLINE void decode(int64_t n, int64_t k, int64_t count, float* values) const {
        const int64_t inside = n < N ? (K - k < count ? K - k : count) : 0;
        dequantize_4bit_range(packed, absmax, table, values, n * K + k, n * K + k + inside, blocksize);
        for (int64_t i = inside; i < count; ++i) values[i] = 0.0f;
    }
};

template <class Engine>
struct RowPanels {
    DecodedWeight weight;
    int64_t columns, depth, segment;

    int64_t segments() const { return 1; }
    int64_t expanded_scales() const { return 0; }

    void load_scales(int64_t, int64_t, float* target, int64_t, float*) const { store(target, broadcast(1.0f)); }

    DecodedPanel<Engine> load_panel(int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel) const {
        constexpr int64_t kMost = kPanelSteps * Engine::kDepth;
        float values[kWidth][kMost];
        const int64_t first = step * Engine::kDepth, wanted = (steps * Engine::kDepth + kWidth - 1) / kWidth * kWidth;
        for (int64_t v = 0; v * kWidth < count; ++v) {
            for (int64_t r = 0; r < kWidth; ++r) weight.decode(column + v * kWidth + r, first, wanted, values[r]);
            const void* row[kWidth];
            for (int r = 0; r < kWidth; ++r) row[r] = values[r];
            for (int64_t k = 0; k < wanted; k += kWidth) {
                I32 words[kWidth];
                load_transposed(row, k * int64_t(sizeof(float)), words);
                F32 transposed[kWidth];
                for (int i = 0; i < kWidth; ++i) transposed[i] = from_bits(words[i]);
                for (int64_t i = 0; i < kWidth && k + i < steps * Engine::kDepth; i += Engine::kDepth) {
                    Engine::store_weight(
                        panel + (k + i) / Engine::kDepth * kPanelColumns + v * kWidth, Engine::join(transposed + i));
                }
            }
        }
        return {panel};
    }
};

// The transposed weight: columns are k, the sum runs over n. A vector of columns has one absmax if blocks are a
// multiple of vectors; then it is decoded in registers.
template <class Engine>
struct ColumnPanels {
    DecodedWeight weight;
    int64_t columns, depth, segment;

    int64_t segments() const { return 1; }
    int64_t expanded_scales() const { return 0; }

    void load_scales(int64_t, int64_t, float* target, int64_t, float*) const { store(target, broadcast(1.0f)); }

    DecodedPanel<Engine> load_panel(int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel) const {
        const bool whole = count == kPanelColumns && weight.K % kWidth == 0 && weight.blocksize % kWidth == 0;
        const int64_t paired = depth / Engine::kDepth;  // steps without padding
        const int64_t fast = !whole ? 0 : paired - step < steps ? (paired < step ? 0 : paired - step) : steps;
        const DecodedWeight local = weight;
        F32 lanes[kTileVectors][Engine::kDepth];
        for (int64_t s = 0; s < fast; ++s) {
            unrolled<int(Engine::kDepth)>([&](auto d) {
                const int64_t begin = ((step + s) * Engine::kDepth + d.number) * local.K + column;
                BNB_PREFETCH(local.packed + begin / 2 + kColumnPrefetchRows * local.K / 2);
                unrolled<kTileVectors>([&](auto v) {
                    const int64_t first = begin + v.number * kWidth;
                    const F32 scale = broadcast(local.absmax[uint64_t(first) / uint64_t(local.blocksize)]);
                    lanes[v.number][d.number] = lookup(local.table, unpack_4bit(local.packed + first / 2)) * scale;
                });
            });
            store_step(lanes, panel + s * kPanelColumns);
        }
        for (int64_t s = fast; s < steps; ++s) {
            float values[kPanelColumns];
            for (int64_t d = 0; d < Engine::kDepth; ++d) {
                local.decode((step + s) * Engine::kDepth + d, column, kPanelColumns, values);
                for (int v = 0; v < kTileVectors; ++v) lanes[v][d] = load(values + v * kWidth);
            }
            store_step(lanes, panel + s * kPanelColumns);
        }
        return {panel};
    }

  private:
    static constexpr int64_t kColumnPrefetchRows = 16;

    static BNB_INLINE void store_step(const F32 (&lanes)[kTileVectors][Engine::kDepth], uint32_t* target) {
        unrolled<kTileVectors>(
            [&](auto v) { Engine::store_weight(target + v.number * kWidth, Engine::join(lanes[v.number])); });
    }
};

BNB_NAMESPACE_END
