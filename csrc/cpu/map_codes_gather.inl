// Maps without byte permutations (map_codes.inl).
//
// Where permutations of whole tables are not cheap either, the upper half of a float (sign, exponent, 7 bits of
// mantissa) names a cell that knows how many midpoints lie below its lowest value, and one comparison finishes it. The
// maps in use put at most one midpoint into a cell; others fall back to the search, as do inputs too small to pay for
// the table.

BNB_NAMESPACE_BEGIN

#ifndef BNB_HAVE_CELLS
// One more than cells has for the upper half of a value where it is above the midpoint of that number.
BNB_INLINE void encode_by_cell(const uint8_t* cells, const float* midpoints, F32 x, uint8_t* codes) {
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; ++i) {
        const uint8_t below = cells[float_bits(lanes[i]) >> 16];
        codes[i] = static_cast<uint8_t>(below + is_above(lanes[i], midpoints[below]));
    }
}
#endif

class MapDecoder {
  public:
    explicit MapDecoder(const float* map) { memcpy(values_, map, sizeof(values_)); }

    BNB_INLINE Chunk decode(const uint8_t* codes) const { return {{lookup_codes(values_, codes)}}; }

  private:
    float values_[256];
};

class MapEncoder {
  public:
    MapEncoder(const Midpoints& midpoints, int64_t amount)
        : midpoints_(midpoints),
          tree_(midpoints),
          use_cells_(!kPermutesTables && amount >= kWorthATable),
          cells_(use_cells_ ? kCells : 0) {
        if (use_cells_) use_cells_ = fill_cells();
    }

    template <bool, class Values>
    BNB_INLINE void encode(const Values& values, int64_t n, uint8_t* codes) const {
        const uint8_t* const cells = use_cells_ ? cells_.as<uint8_t>() : nullptr;
        for (int64_t i = 0; i < n; i += kChunk) {
            const F32 x = values(i).part[0];
            if (cells != nullptr) {
                encode_by_cell(cells, midpoints_.value, x, codes + i);
            } else {
                store_u8(codes + i, tree_.encode(x));
            }
        }
    }

  private:
    static constexpr int64_t kWorthATable = 16384;
    static constexpr int kCells = 1 << 16, kSide = kCells / 2;
    static constexpr int kNotFinite = 0x7f80;  // from this cell on, on either side

    // The cell of a midpoint's magnitude.
    int cell_of(int midpoint) const {
        return static_cast<int>((float_bits(midpoints_.value[midpoint]) & 0x7fffffffu) >> 16);
    }

    // Give the cells [from, to) of a side `count` midpoints below their lowest value.
    void fill(bool negative, int from, int to, int count) {
        memset(cells_.as<uint8_t>() + negative * kSide + from, count, static_cast<size_t>(to - from));
    }

    // Fill every cell, if no two midpoints share one. NaN takes 255 by its comparison.
    bool fill_cells() {
        int negatives = 0;
        while (negatives < 255 && midpoints_.value[negatives] < 0.0f) ++negatives;
        for (int m = 1; m < 255; ++m) {
            const bool same_side = (m < negatives) == (m - 1 < negatives);
            if (same_side && (m < negatives ? cell_of(m - 1) <= cell_of(m) : cell_of(m - 1) >= cell_of(m)))
                return false;
        }
        int end = kSide;  // of the cells that are filled next, of the negative side from the farthest on
        for (int m = 0; m < negatives; end = cell_of(m++)) fill(true, cell_of(m), end, m);
        fill(true, 0, end, negatives);
        int begin = 0;
        for (int m = negatives; m < 255; begin = cell_of(m++) + 1) fill(false, begin, cell_of(m) + 1, m);
        fill(false, begin, kSide, 255);
        for (int side = 0; side < 2; ++side) fill(side, kNotFinite, kSide, 254);
        return true;
    }

    Midpoints midpoints_;
    MidpointTree tree_;
    bool use_cells_;
    Scratch cells_;
};

BNB_NAMESPACE_END
