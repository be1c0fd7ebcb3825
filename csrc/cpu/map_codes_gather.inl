// Maps without byte permutations (map_codes.inl).
//
// Where permutations of whole tables are not cheap either, the upper half of a float (sign, exponent, 7 bits of
// mantissa) names a cell. A cell holds, in its upper half, how many midpoints lie below its lowest value, and in its
// lower half what carries into the upper one when the lower half of a value above the cell's midpoint is added; the
// lower half of a negative value, whose magnitude grows downwards, is subtracted. The maps in use put at most one
// midpoint into a cell; others fall back to the search, as do inputs too small to pay for the table.

BNB_NAMESPACE_BEGIN

#ifndef BNB_HAVE_CELLS
// n whole chunks.
BNB_INLINE void encode_by_cell(const uint32_t* cells, const float* values, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t raw = float_bits(values[i]), cell = cells[raw >> 16], lower = raw & 0xffffu;
        codes[i] = static_cast<uint8_t>((raw >> 31 ? cell - lower : cell + lower) >> 16);
    }
}
#endif

class MapDecoder {
  public:
    explicit MapDecoder(const float* map) {
        memcpy(values_, map, sizeof(values_));
        for (const float value : values_) finite_ = finite_ && is_finite(value);
    }

    BNB_INLINE Chunk decode(const uint8_t* codes) const {
        Chunk chunk;
        for (int k = 0; k < kChunkVectors; ++k) chunk.part[k] = lookup_codes(values_, codes + k * kWidth);
        return chunk;
    }

#ifdef BNB_HAVE_SCALED_CODES
    // Whether no product with this scale is NaN, as scale_codes wants it; a product that overflows is infinite.
    bool may_scale(float scale) const { return finite_ && is_finite(scale); }

    template <class T>
    BNB_INLINE void scale(const uint8_t* codes, F32 scale, T* target) const {
        scale_codes(values_, codes, scale, target);
    }
#endif

  private:
    static bool is_finite(float x) { return (float_bits(x) & 0x7fffffffu) < 0x7f800000u; }

    bool finite_ = true;
    float values_[256];
};

class MapEncoder {
  public:
    MapEncoder(const Midpoints& midpoints, int64_t amount)
        : midpoints_(midpoints),
          tree_(midpoints),
          use_cells_(!kPermutesTables && amount >= kWorthATable),
          cells_(use_cells_ ? kCells * sizeof(uint32_t) : 0) {
        if (use_cells_) use_cells_ = fill_cells();
    }

    template <bool, class Values>
    BNB_INLINE void encode(const Values& values, int64_t n, uint8_t* codes) const {
        if (!use_cells_) {
            for (int64_t i = 0; i < n; i += kChunk) search(values(i), codes + i);
            return;
        }
        alignas(64) float piece[kPiece];
        for (int64_t begin = 0; begin < n; begin += kPiece) {
            const int64_t count = n - begin < kPiece ? n - begin : kPiece;
            for (int64_t i = 0; i < count; i += kChunk) store_chunk(piece + i, values(begin + i));
            encode_by_cell(cells_.as<uint32_t>(), piece, count, codes + begin);
        }
    }

  private:
    static constexpr int64_t kWorthATable = 2048;  // searching that many takes longer than to fill the table
    static constexpr int64_t kPiece = 256;  // values between whose storing and loading again there is enough to do
    static constexpr int kCells = 1 << 16, kSide = kCells / 2;
    static constexpr int kBeyondOne = 0x3f81;  // from this cell on, on either side, there is no value to encode but NaN
    static constexpr int kNotFinite = 0x7f80;  // from this cell on, on either side

    // A function of its own: written out in the loop of encode, GCC 12 vectorizes the scalar set's search wrongly where
    // the optimizer calls it (tests/native/test_isa_maps.py sees that).
    void search(const Chunk& chunk, uint8_t* codes) const {
        for (int k = 0; k < kChunkVectors; ++k) store_u8(codes + k * kWidth, tree_.encode(chunk.part[k]));
    }

    // The cell of a midpoint's magnitude.
    int cell_of(int midpoint) const {
        return static_cast<int>((float_bits(midpoints_.value[midpoint]) & 0x7fffffffu) >> 16);
    }

    // Give the cells [from, to) of a side `count` midpoints below their lowest value, and none inside.
    void fill(bool negative, int from, int to, int count) {
        const uint32_t cell = static_cast<uint32_t>(count) << 16 | (negative ? 0xffffu : 0u);
        uint32_t* const side = cells_.as<uint32_t>() + negative * kSide;
        for (int i = from; i < to; ++i) side[i] = cell;
    }

    // The same up to the cell of midpoint `count`, which that splits.
    void fill_split(bool negative, int from, int to, int count) {
        fill(negative, from, to < kBeyondOne ? to : kBeyondOne, count);
        const uint32_t lower = float_bits(midpoints_.value[count]) & 0xffffu;
        const int split = cell_of(count);
        if (split < kBeyondOne) cells_.as<uint32_t>()[negative * kSide + split] += negative ? lower : 0xffffu - lower;
    }

    // Fill every cell, if no two midpoints share one.
    bool fill_cells() {
        int negatives = 0;
        while (negatives < 255 && midpoints_.value[negatives] < 0.0f) ++negatives;
        for (int m = 1; m < 255; ++m) {
            const bool same_side = (m < negatives) == (m - 1 < negatives);
            if (same_side && (m < negatives ? cell_of(m - 1) <= cell_of(m) : cell_of(m - 1) >= cell_of(m)))
                return false;
        }
        int end = kBeyondOne;  // of the cells that are filled next, of the negative side from the farthest on
        for (int m = 0; m < negatives; end = cell_of(m++)) fill_split(true, cell_of(m), end, m);
        fill(true, 0, end < kBeyondOne ? end : kBeyondOne, negatives);
        int begin = 0;
        for (int m = negatives; m < 255; begin = cell_of(m++) + 1) fill_split(false, begin, cell_of(m) + 1, m);
        fill(false, begin, kBeyondOne, 255);
        for (int side = 0; side < 2; ++side) fill(side, kNotFinite, kSide, 255);
        return true;
    }

    Midpoints midpoints_;
    MidpointTree tree_;
    bool use_cells_;
    Scratch cells_;
};

BNB_NAMESPACE_END
