// Products with a 4-bit weight in tiles of bfloat16 (AMX), for blocks that hold a multiple of 64 codes of a row, and
// with its transpose.
//
// Values that bfloat16 does not hold are sums of two or three that it does, and products of float16 and float32 are
// those of such parts, the smallest left out: 16 and 24 bits of a value count. The instruction takes what is below
// 2^-126 for zero, parts too. A part of something infinite is NaN, so where a sum is not finite the caller starts again
// without tiles.
//
// A tile is 16 rows of 16 pairs; one instruction adds the products of two. Activations are packed into tiles once, and
// panels of weights are decoded into them, already times the absmax, as in gemm_4bit_pairs.inl. In the product with the
// weight its rows are the first operand, because codes are decoded in the order they lie in; the sum is the transpose.
// In the product with the transpose two weight rows make the pairs of the second operand, and the sum's columns come
// out in the order of decoded codes.
//
// Up to 32 activations the sums stay in registers and a vector of codes is decoded while another is multiplied. More
// meet panels that lie in the first-level cache, beside the sums, piece by piece of the depth.
#pragma once

#include "fetch_lines.inl"
#include "gemm_4bit_pairs.inl"

#ifdef BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int64_t kAmxDepth = 2 * kAmxRows;                    // values of a tile's row
constexpr int64_t kAmxVectorTiles = kVectorCodes / kAmxDepth;  // tiles that a vector of 16 rows' codes becomes
constexpr int64_t kMostAmxRows = 256;                          // activations of a pass
constexpr int64_t kAmxSpan = 2048;    // depth over which so many stay in the second-level cache
constexpr int64_t kAmxColumns = 256;  // columns that take turns at the spans

// The same of the transpose, whose panels are wider: they lie in the second-level cache.
constexpr int64_t kMostTransposedRows = 512, kTransposedColumns = 256;

// Depth of a panel, by the parts of its values: with two tiles of rows a third of the first-level cache; with three
// parts there are so many products that those of the second are as fast, and sums are needed less often. The panels of
// the transpose fill as much of the second, whatever the parts.
constexpr int64_t amx_piece(int parts) { return parts == 3 ? 1024 : 256; }
constexpr int64_t transposed_piece(int parts) { return 512 / parts / kAmxDepth * kAmxDepth; }

// Parts that values of a dtype are sums of: all that float16 has, and those that make a sum as good as one in float32.
template <class T>
constexpr int kPartsOf = 3;
template <>
constexpr int kPartsOf<Half> = 2;
template <>
constexpr int kPartsOf<BFloat16> = 1;

// Activations from which on tiles are faster than what streams or multiplies in float32, in the product and its
// transpose.
constexpr int64_t least_amx_rows(int parts) { return parts == 1 ? 2 : parts == 2 ? 5 : 10; }
constexpr int64_t least_transposed_rows(int parts) { return parts == 1 ? 1 : 9; }

// Which parts of two values are multiplied, one after the other: never both parts change, so that one stays loaded.
struct PartProducts {
    int count;
    int first[6], second[6];
};
constexpr PartProducts part_products(int parts) {
    return parts == 1   ? PartProducts{1, {0}, {0}}
           : parts == 2 ? PartProducts{3, {1, 0, 0}, {0, 0, 1}}
                        : PartProducts{6, {2, 1, 1, 0, 0, 0}, {0, 0, 1, 1, 2, 0}};
}

// Rows in tiles: [piece of the depth][16 rows][part][tile of the piece]. Rows and depth are padded with zeros.
template <int kParts>
struct AmxActivations {
    const uint32_t* words;
    int64_t rows, depth, piece;  // rows and depth are multiples of a tile's

    int64_t groups() const { return rows / kAmxRows; }
    int64_t span() const {
        const int64_t pieces = kMostAmxRows * kAmxSpan / kParts / rows / piece;
        return pieces > 1 ? pieces * piece : piece;
    }
    int64_t piece_at(int64_t k) const { return depth - k < piece ? depth - k : piece; }
    int64_t part_size(int64_t k) const { return piece_at(k) / kAmxDepth * kAmxTile; }
    int64_t offset(int64_t k, int64_t group) const {
        return (k * rows / PairEngine::kDepth + part_size(k) * group) * kParts;
    }
    const uint32_t* at(int64_t k, int64_t group) const { return words + offset(k, group); }
};

// One step of a product of kFirst by kSecond tiles, whose sums are registers from kSum on, of 0 to 3. Parts of an
// operand's tile are `part` words apart, and so many parts are a tile.
template <int kParts, int kFirst, int kSecond, int kSum = 0>
BNB_INLINE void add_tile_step(const uint32_t* first, const uint32_t* second, int64_t part) {
    constexpr PartProducts kProducts = part_products(kParts);
    unrolled<kProducts.count>([&](auto product) {
        constexpr int p = product.number;
        constexpr int kFirstPart = kProducts.first[p], kSecondPart = kProducts.second[p];
        constexpr bool kNewFirst = p == 0 || kProducts.first[p ? p - 1 : 0] != kFirstPart;
        constexpr bool kNewSecond = p == 0 || kProducts.second[p ? p - 1 : 0] != kSecondPart;
        static_assert(p == 0 || kNewFirst != kNewSecond);
        const uint32_t* const left = first + kFirstPart * part;
        const uint32_t* const right = second + kSecondPart * part;
        if constexpr (kFirst == 2 && kSecond == 2) {
            if constexpr (kNewFirst) amx_load<4>(left);
            if constexpr (kNewSecond) amx_load<6>(right);
            amx_add_products<0, 4, 6>();
            if constexpr (kNewSecond) amx_load<7>(right + kParts * part);
            amx_add_products<1, 4, 7>();
            if constexpr (kNewFirst) amx_load<5>(left + kParts * part);
            amx_add_products<2, 5, 6>();
            amx_add_products<3, 5, 7>();
        } else if constexpr (kFirst == 1 && kSecond == 1) {
            constexpr int kRegister = 4 + kSecondPart;
            if constexpr (kNewFirst) amx_load<7>(left);
            if constexpr (kNewSecond && p + 1 < 6) amx_load<kRegister>(right);  // the last one is the first again
            amx_add_products<kSum, 7, kRegister>();
        } else if constexpr (kSecond == 1) {
            if constexpr (kNewSecond) amx_load<7>(right);
            unrolled<kFirst>([&](auto i) {
                constexpr int kRegister = 4 + i.number % 3;
                if constexpr (kNewFirst || kFirst > 3) amx_load<kRegister>(left + i.number * kParts * part);
                amx_add_products<kSum + i.number, kRegister, 7>();
            });
        } else {
            static_assert(kFirst == 1);
            if constexpr (kNewFirst) amx_load<7>(left);
            unrolled<kSecond>([&](auto i) {
                constexpr int kRegister = 4 + i.number % 3;
                if constexpr (kNewSecond || kSecond > 3) amx_load<kRegister>(right + i.number * kParts * part);
                amx_add_products<kSum + i.number, 7, kRegister>();
            });
        }
    });
}

struct FetchNothing {
    BNB_INLINE void operator()() const {}
};

// sums [kFirst][kSecond] tiles, `stride` tiles from row to row, += products of tiles over `count` steps. Parts of each
// operand's rows of tiles are `count` tiles apart. fetch() is called once a step.
template <int kParts, int kFirst, int kSecond, class Fetch>
void add_tile_products(
    const uint32_t* first, const uint32_t* second, int64_t count, float* sums, int64_t stride, Fetch&& fetch) {
    const auto for_sums = [&](const auto& body) {
        unrolled<kFirst * kSecond>(
            [&](auto i) { body(i, sums + (i.number / kSecond * stride + i.number % kSecond) * kAmxTile); });
    };
    for_sums([](auto i, float* tile) { amx_load<i.number>(tile); });
    for (int64_t step = 0; step < count; ++step, first += kAmxTile, second += kAmxTile) {
        add_tile_step<kParts, kFirst, kSecond>(first, second, count * kAmxTile);
        fetch();
    }
    for_sums([](auto i, float* tile) { amx_store<i.number>(tile); });
}

// `count` values as parts, each rounded from what those before it leave, `stride` apart.
template <int kParts, class T>
BNB_INLINE void split_values(const T* source, int64_t count, BFloat16* target, int64_t stride) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t rest = count - i < kWidth ? count - i : kWidth;
        F32 value = rest < kWidth ? load_partial(source + i, rest) : load(source + i);
        for (int part = 0; part < kParts; ++part) {
            BFloat16* const to = target + part * stride + i;
            if (rest < kWidth) {
                store_partial(to, value, rest);
                if (part + 1 < kParts) value = value - load_partial(to, rest);
            } else {
                store(to, value);
                if (part + 1 < kParts) value = value - load(to);
            }
        }
    }
}

// Pack rows of A [M, depth] and call body(activations, first row, rows) for up to kMost of them at a time. Depth is
// padded to whole units of kUnit values; pack(a part of 16 rows' values of a unit, target) writes its tiles.
template <int kParts, int64_t kUnit, int64_t kMost, class T, class Pack, class Body>
void for_amx_activations(
    const T* A, int64_t M, int64_t depth, int64_t piece, int32_t threads, const Pack& pack, const Body& body) {
    const int64_t passes = (M + kMost - 1) / kMost;
    const int64_t most = ((M + passes - 1) / passes + kAmxRows - 1) / kAmxRows * kAmxRows;
    const int64_t padded = (depth + kUnit - 1) / kUnit * kUnit;
    const Scratch memory(static_cast<size_t>(kParts * most * padded) * sizeof(BFloat16));
    uint32_t* const words = memory.as<uint32_t>();
    for (int64_t m = 0; m < M; m += most) {
        const int64_t rows = M - m < most ? M - m : most;
        const AmxActivations<kParts> a{words, (rows + kAmxRows - 1) / kAmxRows * kAmxRows, padded, piece};
        parallel_for(a.groups(), kTaskProducts / 8 / padded / kAmxRows + 1, threads, [&](int64_t first, int64_t last) {
            BFloat16 copies[kParts][kAmxRows][kUnit];
            const BFloat16* values[kParts][kAmxRows];
            for (int64_t g = first; g < last; ++g) {
                for (int64_t k = 0; k < padded; k += kUnit) {
                    const int64_t inside = depth - k < kUnit ? depth - k : kUnit;
                    for (int64_t i = 0; i < kAmxRows; ++i) {
                        const int64_t row = g * kAmxRows + i, count = row < rows ? inside : 0;
                        const T* const source = A + (m + row) * depth + k;
                        for (int part = 0; part < kParts; ++part) {
                            values[part][i] = copies[part][i];
                            if (count < kUnit) memset(copies[part][i], 0, sizeof(copies[part][i]));
                        }
                        if constexpr (kParts > 1) {
                            split_values<kParts>(source, count, copies[0][i], kAmxRows * kUnit);
                        } else if (count == kUnit) {
                            values[0][i] = source;
                        } else if (count > 0) {
                            memcpy(copies[0][i], source, static_cast<size_t>(count) * sizeof(BFloat16));
                        }
                    }
                    const int64_t inside_piece = k % piece, begin = k - inside_piece;
                    uint32_t* const target = words + a.offset(begin, g) + inside_piece / kAmxDepth * kAmxTile;
                    for (int part = 0; part < kParts; ++part) pack(values[part], target + part * a.part_size(begin));
                }
            }
        });
        body(a, m, rows);
    }
}

// Whether sums are finite, found out vector by vector.
template <int kParts>
class FiniteSums {
  public:
    BNB_INLINE void look_at(F32 sums) {
        if constexpr (kParts > 1) differences_ = differences_ + (sums - sums);
    }
    bool all() const { return kParts == 1 || reduce_add(differences_) == 0.0f; }

  private:
    F32 differences_ = broadcast(0.0f);  // NaN of those that are not
};

// Whether no part of a codebook's values is taken for zero or infinite, as long as absmax is not extreme.
inline bool splits(const float* code) {
    constexpr float kLeast = 0x1p-64f, kMost = 0x1p64f;
    for (int i = 0; i < 16; ++i) {
        const float magnitude = code[i] < 0.0f ? -code[i] : code[i];
        if (!(code[i] == 0.0f || (magnitude >= kLeast && magnitude <= kMost))) return false;
    }
    return true;
}

// --- the weight ------------------------------------------------------------------------------------------------------

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
    const int64_t depth = weight.source().depth, span = a.span();
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
    constexpr int64_t kFewRows = tiles_together(4, kParts) * kAmxRows, kManyRows = 2 * kAmxRows;
    if (kParts > 1 && !splits(p.code)) return false;
    const WordPanels<PairEngine> source{p.packed, p.scales, PairTable(p.code), p.N, p.K, p.blocksize, kScaledCodes};
    const Table16 table(p.code);
    const bool few = p.M <= 2 * kAmxRows;
    const int64_t piece = few ? kVectorCodes : amx_piece(kParts);
    bool finite = true;
    for_amx_activations<kParts, kVectorCodes, kMostAmxRows>(
        p.A, p.M, p.K, piece, threads, pack_amx_codes, [&](const AmxActivations<kParts>& a, int64_t m, int64_t rows) {
            const Output<T> output{p.out + m * p.N, p.bias, p.N};
            const int64_t panels = kTaskProducts / a.depth / a.rows / kPanelRows + 1;
            const int64_t grain = few || a.depth <= a.span() ? panels * kPanelRows : kAmxColumns;
            parallel_for(p.N, grain, threads, [&](int64_t first, int64_t last) {
                const AmxRegisters registers;
                const TiledRows weight(source, first, last);
                const int64_t columns = (last - first + kPanelRows - 1) / kPanelRows * kPanelRows;
                const int64_t panel_values = few ? 2 * kFewRows * kVectorCodes : kManyRows * piece;
                const Scratch panel(static_cast<size_t>(kParts * panel_values) * sizeof(BFloat16));
                const Scratch memory(static_cast<size_t>(columns * a.rows) * sizeof(float));
                float* const sums = memory.as<float>();
                if (few && a.rows == kAmxRows) {
                    multiply_columns<4, 1>(weight, table, a, first, last, panel.as<uint32_t>(), sums);
                } else if (few) {
                    multiply_columns<2, 2>(weight, table, a, first, last, panel.as<uint32_t>(), sums);
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

// --- its transpose ---------------------------------------------------------------------------------------------------

constexpr int kTransposedTiles = kVectorCodes / kAmxRows;  // tiles side by side that a vector of codes becomes

// 32 values of 16 activations into a tile.
BNB_INLINE void pack_amx_rows(const BFloat16* const (&values)[kAmxRows], uint32_t* target) {
    for (int i = 0; i < kAmxRows; ++i) memcpy(target + i * kAmxRows, values[i], kAmxDepth * sizeof(BFloat16));
}

// Tiles [kTransposedTiles][part][steps] of the columns from k on, as many as a vector has, and weight rows from n on.
struct TransposedWeight {
    const uint8_t* packed;
    const float* absmax;
    Table16 table;
    int64_t N, K, blocksize;

    template <int kParts>
    void decode(int64_t n, int64_t k, int64_t steps, uint32_t* target) const {
        const Table16 local = table;
        Block block{(n * K + k) / blocksize, (n * K + k) % blocksize, K / blocksize, K % blocksize};
        for (int64_t pair = 0; pair < steps * kAmxRows; ++pair) {
            const auto even = row<kParts>(local, n + 2 * pair, k, block);
            const auto odd = row<kParts>(local, n + 2 * pair + 1, k, block);
            unrolled<kParts>([&](auto part) {
                constexpr int p = part.number;
                uint32_t* const line = target + p * steps * kAmxTile + pair * kAmxRows;
                unrolled<kStepsOfVector>([&](auto s) {
                    I32 low, high;
                    interleave(scaled_pairs<s.number, p>(even), scaled_pairs<s.number, p>(odd), low, high);
                    store_words(line + (2 * s.number) * kParts * steps * kAmxTile, low);
                    store_words(line + (2 * s.number + 1) * kParts * steps * kAmxTile, high);
                });
            });
        }
    }

  private:
    static constexpr int64_t kAhead = 16;  // rows

    // The block that a row's vector begins in, the values of it before that, and how far on those of the next row are.
    struct Block {
        int64_t number, before, step, rest;
    };

    // Row n; its block becomes that of row n + 1.
    template <int kParts>
    BNB_INLINE ScaledCodes<kParts> row(const Table16& local, int64_t n, int64_t k, Block& block) const {
        float scales[2] = {};
        if (n >= N) return ScaledCodes<kParts>(local, broadcast(int32_t(0)), scales);
        const uint8_t* const source = packed + (n * K + k) / 2;
        BNB_PREFETCH(source + kAhead * K / 2);
        scales[0] = absmax[block.number];
        const int64_t second = block.before + kScaledCodes < blocksize ? block.number : block.number + 1;
        block.number += block.step;
        block.before += block.rest;
        if (block.before >= blocksize) block.before -= blocksize, ++block.number;
        if (K - k < kVectorCodes) {
            uint8_t half[kVectorBytes] = {};
            memcpy(half, source, kVectorBytes / 2);
            return ScaledCodes<kParts>(local, load_words(half), scales);
        }
        scales[1] = absmax[second];
        return ScaledCodes<kParts>(local, load_words(source), scales);
    }
};

// sums [groups][kTransposedTiles] of `stride` tiles a row += activations times a panel of the depth from n on.
template <int kParts>
void multiply_transposed_panel(
    const AmxActivations<kParts>& a, int64_t n, int64_t steps, const uint32_t* panel, float* sums, int64_t stride) {
    const int64_t groups = a.groups(), size = kParts * steps * kAmxTile;
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2) {
        for (int tile = 0; tile < kTransposedTiles; tile += 2) {
            add_tile_products<kParts, 2, 2>(
                a.at(n, g), panel + tile * size, steps, sums + (g * stride + tile) * kAmxTile, stride, FetchNothing());
        }
    }
    for (int tile = 0; tile < kTransposedTiles && g < groups; tile += 4) {
        add_tile_products<kParts, 1, 4>(
            a.at(n, g), panel + tile * size, steps, sums + (g * stride + tile) * kAmxTile, stride, FetchNothing());
    }
}

// Returns false where the product has to be computed another way.
template <class T>
bool multiply_amx_transposed(const GemmProblem<T>& p, int32_t threads) {
    constexpr int kParts = kPartsOf<T>;
    constexpr int64_t kTiles = kTransposedColumns / kAmxRows, kPiece = transposed_piece(kParts);
    if (kParts > 1 && !splits(p.code)) return false;
    const ExpandedScales scales(p, threads);
    const TransposedWeight weight{p.packed, scales.absmax, Table16(p.code), p.N, p.K, p.blocksize};
    bool all_finite = true;
    for_amx_activations<kParts, kAmxDepth, kMostTransposedRows>(
        p.A, p.M, p.N, kPiece, threads, pack_amx_rows, [&](const AmxActivations<kParts>& a, int64_t m, int64_t rows) {
            const Output<T> output{p.out + m * p.K, p.bias, p.K};
            parallel_for(p.K, kTransposedColumns, threads, [&](int64_t first, int64_t last) {
                const AmxRegisters registers;
                const Scratch panel(static_cast<size_t>(kParts * kPiece * kVectorCodes) * sizeof(BFloat16));
                const Scratch memory(static_cast<size_t>(kTransposedColumns * a.rows) * sizeof(float));
                float* const sums = memory.as<float>();
                memset(sums, 0, static_cast<size_t>(kTransposedColumns * a.rows) * sizeof(float));
                for (int64_t n = 0; n < a.depth; n += kPiece) {
                    const int64_t steps = a.piece_at(n) / kAmxDepth;
                    for (int64_t k = first; k < last; k += kVectorCodes) {
                        weight.template decode<kParts>(n, k, steps, panel.as<uint32_t>());
                        multiply_transposed_panel(
                            a, n, steps, panel.as<uint32_t>(), sums + (k - first) / kAmxRows * kAmxTile, kTiles);
                    }
                }
                FiniteSums<kParts> finite;
                for (int64_t r = 0; r < rows; ++r) {
                    const float* const row = sums + r / kAmxRows * kTiles * kAmxTile + r % kAmxRows * kAmxRows;
                    for (int64_t k = first; k < last; k += kVectorCodes) {
                        F32 lanes[kTransposedTiles];
                        for (int i = 0; i < kTransposedTiles; ++i) {
                            lanes[i] = load(row + ((k - first) / kAmxRows + i) * kAmxTile);
                            finite.look_at(lanes[i]);
                        }
                        float line[kVectorCodes];
                        store_columns(lanes, line);
                        output.write(r, k, last - k < kVectorCodes ? last - k : kVectorCodes, line);
                    }
                }
                if (!finite.all()) __atomic_store_n(&all_finite, false, __ATOMIC_RELAXED);
            });
        });
    return all_finite;
}

BNB_NAMESPACE_END

#endif
