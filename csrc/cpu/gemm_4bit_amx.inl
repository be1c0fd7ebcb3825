// Products with a 4-bit weight in tiles, for blocks that hold a multiple of 64 codes of a row.
//
// Panels of weights are decoded into tiles, already times the absmax, as in gemm_4bit_pairs.inl. Weight rows are the
// first operand, because codes are decoded in the order they lie in; the sum is the transpose.
//
// Up to 32 activations the sums stay in registers and a vector of codes is decoded while another is multiplied. More
// meet panels that lie in the first-level cache, beside the sums, piece by piece of the depth.
#pragma once

#include "fetch_lines.inl"
#include "gemm_4bit_amx_tiles.inl"

#ifdef BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int64_t kMostAmxRows = 256;  // activations of a pass
constexpr int64_t kAmxSpan = 2048;     // depth over which so many stay in the second-level cache
constexpr int64_t kAmxColumns = 256;   // columns that take turns at the spans, and most of a task
constexpr int64_t kTasksOfThread = 4;  // at least, if there are columns: what a task fetches last is the next one's

// Activations from which on tiles are faster than what streams or multiplies in float32.
constexpr int64_t least_amx_rows(int parts) { return parts == 1 ? 2 : parts == 2 ? 5 : 10; }

// Depth of a panel, by the parts of its values: with two tiles of rows a third of the first-level cache; with three
// parts there are so many products that those of the second are as fast, and sums are needed less often.
constexpr int64_t amx_piece(int parts) { return parts == 3 ? 1024 : 256; }

// Depth over which all activations of a pass stay in the second-level cache, in pieces.
template <int kParts>
int64_t span_of(const AmxActivations<kParts>& a) {
    const int64_t pieces = kMostAmxRows * kAmxSpan / kParts / a.rows / a.piece;
    return pieces > 1 ? pieces * a.piece : a.piece;
}

// A vector of codes of 16 activations into tiles whose rows are pairs in the order of decoded codes.
BNB_INLINE void pack_amx_codes(const BFloat16* const (&values)[kAmxRows], uint32_t* target) {
    uint32_t steps[kAmxVectorTiles][kAmxRows][kAmxRows];
    for (int i = 0; i < kAmxRows; ++i) store_steps(values[i], steps[0][i], kAmxTile);
    for (int64_t s = 0; s < kAmxVectorTiles; ++s) {
        const void* row[kWidth];
        for (int i = 0; i < kAmxRows; ++i) row[i] = steps[s][i];
        I32 words[kWidth];
        load_transposed(row, 0, words);
        for (int i = 0; i < kAmxRows; ++i) store_words(target + s * kAmxTile + i * kAmxRows, words[i]);
    }
}

// One vector of `count` weight rows from `first` on, each into one row of the tiles of its steps, from row `line` on.
// Parts of tiles are `part_size` words apart, and so many parts are those of 16 rows.
template <int kParts, bool kFetch, int kRows>
BNB_INLINE void decode_tiles(
    const WeightRows<kRows>& rows, const Table16& table, int64_t vector, int first, int count, int line,
    uint32_t* target, int64_t part_size) {
    for (int i = 0; i < count; ++i) {
        const int r = first + i, to = line + i;
        const uint8_t* const source = rows.packed[r] + vector * kVectorBytes;
        if constexpr (kFetch) BNB_PREFETCH_FAR(rows.next.at(r, vector));
        const ScaledCodes<kParts> codes(table, load_words(source), rows.scales[r] + 2 * vector);
        uint32_t* const words = target + to / kAmxRows * kParts * part_size + to % kAmxRows * kAmxRows;
        unrolled<kParts>([&](auto part) {
            unrolled<int(kAmxVectorTiles)>([&](auto s) {
                store_words(
                    words + part.number * part_size + s.number * kAmxTile, scaled_pairs<s.number, part.number>(codes));
            });
        });
    }
}

// Tiles of weights times so many tiles of activations. With one part decoding limits, and 16 rows that follow each
// other in memory are decoded fastest; more parts share the loads of activations.
constexpr int few_tiles(int groups, int parts) { return parts == 1 ? groups : 4 / groups; }

// Tiles of weights that are decoded together, while those before them are multiplied: parts need as much more of the
// first-level cache, which has to hold the activations that they share besides.
constexpr int tiles_together(int tiles, int parts) { return parts == 1 ? tiles : 1; }

// sums [kTiles][kGroups] = weight rows times activations that fit the registers for the whole depth.
template <int kTiles, int kGroups, int kParts>
void multiply_few(
    const WeightRows<kTiles * kAmxRows>& rows, const Table16& table, int64_t depth, const AmxActivations<kParts>& a,
    uint32_t* panel, float* sums) {
    constexpr int kRows = kTiles * kAmxRows, kTogether = tiles_together(kTiles, kParts), kTurns = kTiles / kTogether;
    constexpr int kTurnRows = kTogether * kAmxRows, kShare = kTurnRows / int(kAmxVectorTiles);
    constexpr int64_t kPart = kAmxVectorTiles * kAmxTile, kPanel = kTogether * kParts * kPart;
    const Table16 local = table;
    const int64_t whole = depth / kVectorCodes, vectors = a.depth / kVectorCodes;
    HalfVector<kRows> memory;
    const WeightRows<kRows> half = whole < vectors ? memory.of(rows, whole) : rows;
    const auto panel_at = [&](int64_t turn) { return panel + turn % 2 * kPanel; };
    const auto decode = [&](int64_t vector, int turn, int line, int count) {
        uint32_t* const target = panel_at(vector * kTurns + turn);
        const int first = turn * kTurnRows + line;
        if (vector < whole) {
            decode_tiles<kParts, true>(rows, local, vector, first, count, line, target, kPart);
        } else if (vector < vectors) {
            decode_tiles<kParts, false>(half, local, 0, first, count, line, target, kPart);
        }
    };
    unrolled<kTiles * kGroups>([](auto i) { amx_zero<i.number>(); });
    decode(0, 0, 0, kTurnRows);
    for (int64_t vector = 0; vector < vectors; ++vector) {
        const uint32_t* const activations = a.at(vector * kVectorCodes, 0);
        unrolled<kTurns>([&](auto turn) {
            constexpr bool kLast = turn.number + 1 == kTurns;
            constexpr int kSum = turn.number * kTogether * kGroups;
            const uint32_t* const weight = panel_at(vector * kTurns + turn.number);
            unrolled<int(kAmxVectorTiles)>([&](auto s) {
                decode(kLast ? vector + 1 : vector, kLast ? 0 : turn.number + 1, s.number * kShare, kShare);
                add_tile_step<kParts, kTogether, kGroups, kSum>(
                    weight + s.number * kAmxTile, activations + s.number * kAmxTile, kPart);
            });
        });
    }
    unrolled<kTiles * kGroups>([&](auto i) { amx_store<i.number>(sums + i.number * kAmxTile); });
}

// sums [two tiles][groups] += weight rows times any number of activations over `codes` of a piece of the depth, which
// begins at k. Meanwhile as many codes are fetched.
template <int kParts>
void multiply_many(
    const WeightRows<2 * kAmxRows>& rows, const Table16& table, int64_t codes, int64_t k,
    const AmxActivations<kParts>& a, FetchLines& fetch, uint32_t* panel, float* sums) {
    constexpr int kRows = 2 * kAmxRows;
    const Table16 local = table;
    const int64_t whole = codes / kVectorCodes, vectors = a.piece_at(k) / kVectorCodes, groups = a.groups();
    const int64_t steps = vectors * kAmxVectorTiles;
    for (int64_t vector = 0; vector < whole; ++vector) {
        uint32_t* const target = panel + vector * kAmxVectorTiles * kAmxTile;
        decode_tiles<kParts, false>(rows, local, vector, 0, kRows, 0, target, steps * kAmxTile);
    }
    if (whole < vectors) {
        HalfVector<kRows> half;
        uint32_t* const target = panel + whole * kAmxVectorTiles * kAmxTile;
        decode_tiles<kParts, false>(half.of(rows, whole), local, 0, 0, kRows, 0, target, steps * kAmxTile);
    }
    const int64_t turns = (groups + 1) / 2 * steps;
    fetch.share = (vectors * kRows + turns - 1) / turns;
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2) {
        add_tile_products<kParts, 2, 2>(panel, a.at(k, g), steps, sums + g * kAmxTile, groups, fetch);
    }
    if (g < groups) add_tile_products<kParts, 2, 1>(panel, a.at(k, g), steps, sums + g * kAmxTile, groups, fetch);
}

// The weight rows of a task's columns [first, last), and their scales.
class TiledRows {
  public:
    TiledRows(const WordPanels<PairEngine>& source, int64_t first, int64_t last)
        : source_(source),
          first_(first),
          last_(last),
          direct_(source.segment == source.blocksize),
          spread_size_(direct_ ? 0 : (last - first) * source.segments()),
          memory_(static_cast<size_t>(spread_size_ + source.expanded_scales(last - first)) * sizeof(float)) {
        float* const spread = memory_.as<float>();
        const float* const blocks = source.block_scales(first, last - first, spread + spread_size_);
        for (int64_t row = first; row < last && !direct_; ++row) {
            source.segment_scales(blocks, first, row, 0, spread + (row - first) * source.segments(), 1);
        }
        scales_ = direct_ ? blocks : spread;
    }

    // kRows rows from `column` on, from code k on; past the last they repeat it.
    template <int kRows>
    WeightRows<kRows> at(int64_t column, int64_t k) const {
        WeightRows<kRows> rows;
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = column + r < last_ ? column + r : last_ - 1;
            rows.packed[r] = source_.row_at(row) + k / 2;
            rows.scales[r] = scales_ + (row - first_) * source_.segments() + k / kScaledCodes;
        }
        rows.next = NextCodes::of(rows.packed[0] + kRows * source_.depth / 2, kRows, source_.depth / 2, true);
        return rows;
    }

    const WordPanels<PairEngine>& source() const { return source_; }

  private:
    const WordPanels<PairEngine>& source_;
    const int64_t first_, last_;
    const bool direct_;
    const int64_t spread_size_;
    const Scratch memory_;
    const float* scales_;
};

// Columns [first, last) of a product whose activations fit the registers. panel: two vectors of kTiles tiles.
template <int kTiles, int kGroups, int kParts>
void multiply_columns(
    const TiledRows& weight, const Table16& table, const AmxActivations<kParts>& a, int64_t first, int64_t last,
    uint32_t* panel, float* sums) {
    constexpr int kRows = kTiles * kAmxRows;
    for (int64_t column = first; column < last; column += kRows) {
        float* const target = sums + (column - first) * a.rows;
        multiply_few<kTiles, kGroups>(weight.at<kRows>(column, 0), table, weight.source().depth, a, panel, target);
    }
}

// The same for any number of activations; sums are zero on entry.
template <int kParts>
void multiply_columns(
    const TiledRows& weight, const Table16& table, const AmxActivations<kParts>& a, int64_t first, int64_t last,
    uint32_t* panel, float* sums) {
    constexpr int kRows = 2 * kAmxRows;
    const int64_t depth = weight.source().depth, span = span_of(a);
    for (int64_t from = 0; from < a.depth; from += span) {
        const int64_t to = a.depth - from < span ? a.depth : from + span;
        for (int64_t column = first; column < last; column += kRows) {
            FetchLines fetch{weight.source().row_at(column + kRows) + from / 2, depth / 2, (to - from) / kVectorCodes};
            for (int64_t k = from; k < to; k += a.piece) {
                const int64_t codes = depth - k < a.piece ? depth - k : a.piece;
                float* const target = sums + (column - first) * a.rows;
                multiply_many(weight.at<kRows>(column, k), table, codes, k, a, fetch, panel, target);
            }
        }
    }
}

// Rows of the output from tiles of its transpose: [columns / 16][groups] tiles. Returns whether they are finite.
template <class T>
bool write_tiles(
    const float* sums, int64_t groups, const Output<T>& output, int64_t rows, int64_t first, int64_t last) {
    FiniteSums<kPartsOf<T>> finite;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t column = first; column < last; column += kAmxRows) {
            const float* const tile = sums + ((column - first) / kAmxRows * groups + g) * kAmxTile;
            const void* row[kWidth];
            for (int i = 0; i < kAmxRows; ++i) row[i] = tile + i * kAmxRows;
            I32 values[kWidth];
            load_transposed(row, 0, values);
            const int64_t count = last - column < kAmxRows ? last - column : kAmxRows;
            for (int64_t i = 0; i < kAmxRows && g * kAmxRows + i < rows; ++i) {
                float line[kWidth];
                store_words(line, values[i]);
                finite.look_at(from_bits(values[i]));
                output.write(g * kAmxRows + i, column, count, line);
            }
        }
    }
    return finite.all();
}

// Returns false where the product has to be computed another way.
template <class T>
bool multiply_amx(const GemmProblem<T>& p, int32_t threads) {
    constexpr int kParts = kPartsOf<T>;
    constexpr int64_t kPanelRows = 4 * kAmxRows;  // at most
    constexpr int kTiles = few_tiles(1, kParts), kTilesOfTwo = few_tiles(2, kParts);
    constexpr int64_t kFewRows = tiles_together(kTilesOfTwo, kParts) * kAmxRows, kManyRows = 2 * kAmxRows;
    if (kParts > 1 && !splits(p.code)) return false;
    const WordPanels<PairEngine> source{p.packed, p.scales, PairTable(p.code), p.N, p.K, p.blocksize, kScaledCodes};
    const Table16 table(p.code);
    const bool few = p.M <= 2 * kAmxRows;
    const int64_t piece = few ? kVectorCodes : amx_piece(kParts);
    bool finite = true;
    for_amx_activations<kParts, kVectorCodes, kMostAmxRows>(
        p.A, p.M, p.K, piece, threads, pack_amx_codes, [&](const AmxActivations<kParts>& a, int64_t m, int64_t rows) {
            const Output<T> output{p.out + m * p.N, p.bias, p.N};
            const int64_t share = p.N / kTasksOfThread / (threads > 0 ? threads : 1);
            const int64_t most = (share < kAmxColumns ? share : kAmxColumns) / kPanelRows;
            const int64_t least = kTaskProducts / a.depth / a.rows / kPanelRows + 1;
            const int64_t panels = least < most ? most : least;
            const int64_t grain = few || a.depth <= span_of(a) ? panels * kPanelRows : kAmxColumns;
            parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
                const AmxRegisters registers;
                const TiledRows weight(source, first, last);
                const int64_t columns = (last - first + kPanelRows - 1) / kPanelRows * kPanelRows;
                const int64_t panel_values = few ? 2 * kFewRows * kVectorCodes : kManyRows * piece;
                const Scratch panel(static_cast<size_t>(kParts * panel_values) * sizeof(BFloat16));
                const Scratch memory(static_cast<size_t>(columns * a.rows) * sizeof(float));
                float* const sums = memory.as<float>();
                if (few && a.rows == kAmxRows) {
                    multiply_columns<kTiles, 1>(weight, table, a, first, last, panel.as<uint32_t>(), sums);
                } else if (few) {
                    multiply_columns<kTilesOfTwo, 2>(weight, table, a, first, last, panel.as<uint32_t>(), sums);
                } else {
                    memset(sums, 0, static_cast<size_t>(columns * a.rows) * sizeof(float));
                    multiply_columns(weight, table, a, first, last, panel.as<uint32_t>(), sums);
                }
                if (!write_tiles(sums, a.groups(), output, rows, first, last)) {
                    __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
                }
            });
        });
    return finite;
}

BNB_NAMESPACE_END

#endif
