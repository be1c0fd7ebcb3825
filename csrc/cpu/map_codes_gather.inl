// Maps without byte permutations (map_codes.inl).
//
// Where permutations of whole tables are not cheap either, the leading bits of the float (sign, 32 binades, 7 bits of
// mantissa) pick a cell that knows the count at its lower end, and a linear probe finishes it. The maps in use put at
// most one or two midpoints into a cell; a map that crowds more falls back to the search, as do inputs too small to
// pay for the table.

BNB_NAMESPACE_BEGIN

class MapDecoder {
  public:
    explicit MapDecoder(const float* map) { memcpy(values_, map, sizeof(values_)); }

    BNB_INLINE Chunk decode(const uint8_t* codes) const { return {{lookup_many<256>(values_, load_u8(codes))}}; }

  private:
    float values_[256];
};

class MapEncoder {
  public:
    MapEncoder(const Midpoints& midpoints, int64_t amount) : midpoints_(midpoints), tree_(midpoints) {
        probes_ = kPermutesTables || amount < kWorthATable ? kMaxProbes + 1 : fill_cells();
    }

    template <bool, class Values>
    BNB_INLINE void encode(const Values& values, int64_t n, uint8_t* codes) const {
        for (int64_t i = 0; i < n; i += kChunk) {
            const F32 x = values(i).part[0];
            store_u8(codes + i, probes_ <= kMaxProbes ? encode_by_cell(x) : tree_.encode(x));
        }
    }

  private:
    static constexpr int kMaxProbes = 3;
    static constexpr int64_t kWorthATable = 16384;
    static constexpr int kShift = 16;                   // keeps 7 bits of mantissa
    static constexpr int32_t kFirst = (127 - 31) << 7;  // magnitudes below 2^-31 share the cell next to zero
    static constexpr int32_t kSide = 32 << 7;

    BNB_INLINE I32 encode_by_cell(F32 x) const {
        I32 cell = shift_right<kShift>(magnitude_bits(x)) - broadcast(kFirst);
        cell = min(max(cell, broadcast(int32_t(0))), broadcast(kSide - 1));
        // Negative values count down from the middle: kSide - 1 - cell.
        const I32 sign = shift_right<31>(bits(x));
        const I32 flip = broadcast(int32_t(0)) - sign;
        const I32 mirrored = broadcast(kSide) + cell - (flip & (cell + cell + broadcast(int32_t(1))));
        I32 index = gather_u8(cells_, mirrored);
        for (int probe = 0; probe < probes_; ++probe) {
            const F32 threshold = gather(midpoints_.value, min(index, broadcast(int32_t(255))));
            index = index + descend(broadcast(int32_t(0)), x, threshold);
        }
        return min(index | nan_mask(x), broadcast(int32_t(255))) & broadcast(int32_t(255));
    }

    int below(float value, int from) const {
        while (from < 255 && is_above(value, midpoints_.value[from])) ++from;
        return from;
    }

    // Count midpoints at both ends of every cell, ascending; returns the largest number of probes a cell needs.
    int fill_cells() {
        int count = 0, probes = 0;
        for (int cell = 0; cell < 2 * kSide; ++cell) {
            const bool negative = cell < kSide;
            const int32_t step = negative ? kSide - 1 - cell : cell - kSide;
            const uint32_t nearest = step == 0 ? 0u : uint32_t(step + kFirst) << kShift;
            const uint32_t farthest = (uint32_t(step + 1 + kFirst) << kShift) - 1u;
            const uint32_t sign = negative ? 0x80000000u : 0u;
            const int low = below(bits_float(sign | (negative ? farthest : nearest)), count);
            const int high = below(bits_float(sign | (negative ? nearest : farthest)), low);
            cells_[cell] = static_cast<uint8_t>(low);
            probes = probes < high - low ? high - low : probes;
            count = low;
        }
        for (int i = 0; i < 4; ++i) cells_[2 * kSide + i] = 0;
        return probes;
    }

    Midpoints midpoints_;
    MidpointTree tree_;
    uint8_t cells_[2 * kSide + 4];  // gather_u8 reads up to three bytes further
    int probes_;
};

BNB_NAMESPACE_END
