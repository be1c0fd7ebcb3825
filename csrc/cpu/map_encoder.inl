// Nearest entry of an ascending 256-entry map, exactly, a tie to the lower index.
//
// A code is the number of midpoints below the value. A binary search would need eight dependent gathers; instead the
// leading bits of the float (sign, 32 binades, 6 bits of mantissa) pick a cell that knows the count at its lower end
// and a linear probe finishes it. The maps in use put at most one or two midpoints into a cell; a map that crowds
// more falls back to the search, as do inputs too small to pay for the table.

BNB_NAMESPACE_BEGIN

class MapEncoder {
  public:
    // `amount` is how many values will be encoded.
    MapEncoder(const float* code, int64_t amount) {
        for (int i = 0; i < 255; ++i) midpoints_[i] = midpoint(code[i], code[i + 1]);
        midpoints_[255] = bits_float(0x7f800000u);  // nothing lies above: a probe stops here
        probes_ = amount < kWorthATable ? kMaxProbes + 1 : fill_cells();
    }

    // x in [-1, 1] or NaN, which takes 255.
    BNB_INLINE I32 encode(F32 x) const { return probes_ <= kMaxProbes ? encode_by_cell(x) : encode_by_search(x); }

    // For a single value.
    int encode_one(float x) const { return bucket_of(x, midpoints_, 255); }

  private:
    static constexpr int kMaxProbes = 3;
    static constexpr int64_t kWorthATable = 8192;
    static constexpr int kShift = 17;                   // keeps 6 bits of mantissa
    static constexpr int32_t kFirst = (127 - 31) << 6;  // magnitudes below 2^-31 share the cell next to zero
    static constexpr int32_t kSide = 32 << 6;

    BNB_INLINE I32 encode_by_cell(F32 x) const {
        I32 cell = shift_right<kShift>(magnitude_bits(x)) - broadcast(kFirst);
        cell = min(max(cell, broadcast(int32_t(0))), broadcast(kSide - 1));
        // Negative values count down from the middle: kSide - 1 - cell.
        const I32 sign = shift_right<31>(bits(x));
        const I32 flip = broadcast(int32_t(0)) - sign;
        const I32 mirrored = broadcast(kSide) + cell - (flip & (cell + cell + broadcast(int32_t(1))));
        I32 index = gather_u8(cells_, mirrored);
        for (int probe = 0; probe < probes_; ++probe) {
            index = index + is_above_lane(x, gather(midpoints_, min(index, broadcast(int32_t(255)))));
        }
        return min(index | nan_mask(x), broadcast(int32_t(255))) & broadcast(int32_t(255));
    }

    BNB_INLINE I32 encode_by_search(F32 x) const {
        I32 index = broadcast(int32_t(0));
        for (int half = 128; half >= 1; half /= 2) {
            const I32 node = index + broadcast(int32_t(half - 1));
            const I32 above = is_above_lane(x, gather(midpoints_, node));
            index = index + (broadcast(int32_t(half)) & (broadcast(int32_t(0)) - above));
        }
        return index;
    }

    // 1 where x lies above the threshold.
    static BNB_INLINE I32 is_above_lane(F32 x, F32 threshold) { return descend(broadcast(int32_t(0)), x, threshold); }

    int below(float value, int from) const {
        while (from < 255 && is_above(value, midpoints_[from])) ++from;
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
        return probes;
    }

    float midpoints_[256];
    uint8_t cells_[2 * kSide + 4] = {};  // gather_u8 reads up to three bytes further
    int probes_;
};

BNB_NAMESPACE_END
