// Maps by permutations of bytes (map_codes.inl): one instruction looks up 64 bytes in a table of 128.
//
// A float of the map is four look-ups, one for each byte, that are then interleaved. To encode, the upper half of a
// value (sign, exponent, 7 bits of mantissa) names a cell of floats; every binade has as many cells as keep its
// midpoints apart, at most 512 in all. The cell knows how many midpoints lie below it, and one comparison with the
// midpoint of that number, the only one that can lie inside, gives the code. Maps that cannot be told apart like that
// are searched.

BNB_NAMESPACE_BEGIN

// Element 16 * j + 4 * l + k of a chunk <-> byte 16 * l + 4 * j + k: there, unpacking bytes within the four lanes of a
// register leaves the elements in order. Its own inverse.
struct ByteOrders {
    uint8_t transposed[64];
    uint8_t even[64];       // the lower byte of every word
    uint16_t odd_word[32];  // the upper word of every float
};

constexpr ByteOrders make_byte_orders() {
    ByteOrders orders{};
    for (int i = 0; i < 64; ++i) {
        orders.transposed[i] = static_cast<uint8_t>((i & 3) | (i >> 2 & 3) << 4 | (i >> 4) << 2);
        orders.even[i] = static_cast<uint8_t>(2 * i);
    }
    for (int i = 0; i < 32; ++i) orders.odd_word[i] = static_cast<uint16_t>(2 * i + 1);
    return orders;
}

alignas(64) constexpr ByteOrders kByteOrders = make_byte_orders();

BNB_INLINE __mmask64 joined(__mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) {
    return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
}

// 256 floats as four planes of bytes.
class BytePlanes {
  public:
    explicit BytePlanes(const float* values) {
        for (int i = 0; i < 256; ++i) {
            const uint32_t raw = float_bits(values[i]);
            for (int k = 0; k < 4; ++k) planes_[k][i] = static_cast<uint8_t>(raw >> (8 * k));
        }
    }

    // The planes in registers; loops that store codes would load them again and again from memory.
    struct Registers {
        __m512i table[4][4];

        BNB_INLINE explicit Registers(const BytePlanes& planes) {
            for (int k = 0; k < 4; ++k) {
                for (int i = 0; i < 4; ++i) table[k][i] = _mm512_load_si512(planes.planes_[k] + 64 * i);
            }
        }

        BNB_INLINE Chunk lookup(__m512i codes) const {
            const __m512i index = _mm512_permutexvar_epi8(_mm512_load_si512(kByteOrders.transposed), codes);
            const __mmask64 upper = _mm512_movepi8_mask(index);
            __m512i bytes[4];
            for (int k = 0; k < 4; ++k) {
                const __m512i low = _mm512_permutex2var_epi8(table[k][0], index, table[k][1]);
                const __m512i high = _mm512_permutex2var_epi8(table[k][2], index, table[k][3]);
                bytes[k] = _mm512_mask_blend_epi8(upper, low, high);
            }
            const __m512i front_low = _mm512_unpacklo_epi8(bytes[0], bytes[1]);
            const __m512i front_high = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
            const __m512i back_low = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
            const __m512i back_high = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
            return {{
                from_bits(I32{_mm512_unpacklo_epi16(front_low, back_low)}),
                from_bits(I32{_mm512_unpackhi_epi16(front_low, back_low)}),
                from_bits(I32{_mm512_unpacklo_epi16(front_high, back_high)}),
                from_bits(I32{_mm512_unpackhi_epi16(front_high, back_high)}),
            }};
        }
    };

  private:
    alignas(64) uint8_t planes_[4][256];
};

class MapDecoder {
  public:
    explicit MapDecoder(const float* map) : planes_(map) {}

    BNB_INLINE Chunk decode(const uint8_t* codes) const {
        return BytePlanes::Registers(planes_).lookup(_mm512_loadu_si512(codes));
    }

  private:
    BytePlanes planes_;
};

class MapEncoder {
  public:
    MapEncoder(const Midpoints& midpoints, int64_t) : midpoints_(midpoints.value), tree_(midpoints) {
        separable_ = fill_cells(midpoints.value);
    }

    template <bool kMayBeNaN, class Values>
    BNB_INLINE void encode(const Values& values, int64_t n, uint8_t* codes) const {
        if (!separable_) {
            for (int64_t i = 0; i < n; i += kChunk) search(values(i), codes + i);
        } else if (one_sided_) {
            encode_by_cell<kMayBeNaN, true>(values, n, codes);
        } else {
            encode_by_cell<kMayBeNaN, false>(values, n, codes);
        }
    }

  private:
    static constexpr int kCells = 512;       // of both signs; all of them positive if no midpoint is negative
    static constexpr int kFirstBinade = 96;  // smaller magnitudes join it
    static constexpr int kLastBinade = 127;  // that of 1
    static constexpr uint16_t kFirst = kFirstBinade << 7;

    BNB_INLINE void search(const Chunk& x, uint8_t* codes) const {
        for (int i = 0; i < kChunkVectors; ++i) store_u8(codes + i * kWidth, tree_.encode(x.part[i]));
    }

    static BNB_INLINE __mmask64 nan_lanes(const Chunk& x) {
        __mmask16 nan[4];
        for (int i = 0; i < 4; ++i) nan[i] = _mm512_cmp_ps_mask(x.part[i].v, x.part[i].v, _CMP_UNORD_Q);
        return joined(nan[0], nan[1], nan[2], nan[3]);
    }

    // Two short loops: one long chain of operations for each chunk would leave the machine waiting.
    template <bool kMayBeNaN, bool kOneSided, class Values>
    BNB_INLINE void encode_by_cell(const Values& values, int64_t n, uint8_t* codes) const {
        constexpr int64_t kStretch = 256;
        alignas(64) float kept[kStretch];
        for (int64_t begin = 0; begin < n; begin += kStretch) {
            const int64_t count = n - begin < kStretch ? n - begin : kStretch;
            const Cells cells(*this);
            for (int64_t i = 0; i < count; i += kChunk) {
                const Chunk x = values(begin + i);
                store_chunk(kept + i, x);
                _mm512_storeu_si512(codes + begin + i, cells.template count_below<kOneSided>(x));
            }
            const BytePlanes::Registers midpoints(midpoints_);
            for (int64_t i = 0; i < count; i += kChunk) {
                const Chunk x = load_chunk(kept + i);
                __m512i found = settled(x, midpoints, _mm512_loadu_si512(codes + begin + i));
                if (kMayBeNaN) found = _mm512_mask_blend_epi8(nan_lanes(x), found, _mm512_set1_epi8(-1));
                _mm512_storeu_si512(codes + begin + i, found);
            }
        }
    }

    // The tables of the cells in registers.
    struct Cells {
        __m512i below[8], shift, offset;

        BNB_INLINE explicit Cells(const MapEncoder& map)
            : shift(_mm512_load_si512(map.shift_)),
              offset(_mm512_load_si512(map.offset_)) {
            for (int i = 0; i < 8; ++i) below[i] = _mm512_load_si512(map.below_ + 64 * i);
        }

        // How many midpoints lie below the cells of the values.
        template <bool kOneSided>
        BNB_INLINE __m512i count_below(const Chunk& x) const {
            const __m512i upper0 = upper_words(x.part[0], x.part[1]), upper1 = upper_words(x.part[2], x.part[3]);
            const __m512i cell0 = cells_of<kOneSided>(upper0), cell1 = cells_of<kOneSided>(upper1);
            const __m512i low = _mm512_permutex2var_epi8(cell0, _mm512_load_si512(kByteOrders.even), cell1);
            const __mmask64 odd = _mm512_movepi8_mask(low);
            const __mmask64 second =
                _mm512_kunpackd(in_second_half<kOneSided>(upper1, cell1), in_second_half<kOneSided>(upper0, cell0));
            const __m512i first_half = _mm512_mask_blend_epi8(odd, pick(0, low), pick(1, low));
            const __m512i second_half = _mm512_mask_blend_epi8(odd, pick(2, low), pick(3, low));
            return _mm512_mask_blend_epi8(second, first_half, second_half);
        }

        BNB_INLINE __m512i pick(int quarter, __m512i index) const {
            return _mm512_permutex2var_epi8(below[2 * quarter], index, below[2 * quarter + 1]);
        }

        static BNB_INLINE __m512i upper_words(F32 a, F32 b) {
            return _mm512_permutex2var_epi16(
                _mm512_castps_si512(a.v), _mm512_load_si512(kByteOrders.odd_word), _mm512_castps_si512(b.v));
        }

        // Negative values have the second half of the table, or no cell but the lowest.
        template <bool kOneSided>
        static BNB_INLINE __mmask32 in_second_half(__m512i upper, __m512i cell) {
            return kOneSided ? _mm512_test_epi16_mask(cell, _mm512_set1_epi16(0x100)) : _mm512_movepi16_mask(upper);
        }

        template <bool kOneSided>
        BNB_INLINE __m512i cells_of(__m512i upper) const {
            const __m512i kept = kOneSided ? upper : _mm512_and_si512(upper, _mm512_set1_epi16(0x7fff));
            const __m512i magnitude = _mm512_max_epi16(kept, _mm512_set1_epi16(kFirst));
            const __m512i binade = _mm512_srli_epi16(magnitude, 7);  // permutations look at its lower five bits
            const __m512i kept_bits = _mm512_srlv_epi16(magnitude, _mm512_permutexvar_epi16(binade, shift));
            return _mm512_add_epi16(kept_bits, _mm512_permutexvar_epi16(binade, offset));
        }
    };

    // One more where the value is above the midpoint in its cell.
    static BNB_INLINE __m512i settled(const Chunk& x, const BytePlanes::Registers& midpoints, __m512i below) {
        const Chunk inside = midpoints.lookup(below);
        __mmask16 above[4];
        for (int i = 0; i < 4; ++i) above[i] = _mm512_cmp_ps_mask(x.part[i].v, inside.part[i].v, _CMP_NLE_UQ);
        const __mmask64 all = joined(above[0], above[1], above[2], above[3]);
        return _mm512_mask_sub_epi8(below, all, below, _mm512_set1_epi8(-1));
    }

    static int binade_of(float value) {
        const int binade = static_cast<int>(float_bits(value) >> 23 & 255);
        return binade < kFirstBinade ? kFirstBinade : binade;
    }

    static bool is_negative(float value) { return value < 0.0f; }

    // Both signs share the cells of a binade, so it has as many as the more crowded of them needs.
    bool fill_cells(const float* midpoints) {
        int depth[kLastBinade - kFirstBinade + 1] = {};  // a binade has 2^depth cells
        for (int i = 0; i < 255; ++i) {
            if (!(midpoints[i] <= midpoints[i + 1])) return false;
            const int binade = binade_of(midpoints[i]);
            const bool together = i < 254 && is_negative(midpoints[i]) == is_negative(midpoints[i + 1]) &&
                                  binade == binade_of(midpoints[i + 1]) && binade <= kLastBinade;
            if (!together) continue;
            uint32_t apart = (float_bits(midpoints[i]) ^ float_bits(midpoints[i + 1])) >> 16 & 127;
            if (apart == 0 || binade == kFirstBinade || binade == kLastBinade) return false;
            int needed = 7;
            for (; apart > 1; apart /= 2) --needed;
            int& deepest = depth[binade - kFirstBinade];
            deepest = deepest < needed ? needed : deepest;
        }
        one_sided_ = !is_negative(midpoints[0]);
        int cells = 0;
        for (int binade = kFirstBinade; binade <= kLastBinade; ++binade) {
            const int deep = depth[binade - kFirstBinade];
            shift_[binade & 31] = static_cast<uint16_t>(7 - deep);
            offset_[binade & 31] = static_cast<uint16_t>(cells - (binade << deep));
            cells += 1 << deep;
        }
        if (cells > (one_sided_ ? kCells : kCells / 2)) return false;
        count_below(midpoints, one_sided_ ? kCells : kCells / 2);
        return true;
    }

    int cell_of(float value) const {
        const int binade = binade_of(value);
        const int magnitude = static_cast<int>(float_bits(value) >> 16 & 0x7fff);
        const int kept = magnitude < kFirst ? kFirst : magnitude;
        return (offset_[binade & 31] + (kept >> shift_[binade & 31])) & 0xffff;
    }

    // Midpoints stand in cells; those of 2 and more are beyond all values.
    void count_below(const float* midpoints, int side) {
        uint8_t inside[kCells] = {};
        int below = 0;
        for (int i = 0; i < 255; ++i) {
            const bool negative = is_negative(midpoints[i]);
            if (binade_of(midpoints[i]) > kLastBinade) {
                below += negative;
            } else {
                ++inside[cell_of(midpoints[i]) + (negative ? side : 0)];
            }
        }
        for (int cell = kCells - 1; cell >= side; --cell) {
            below_[cell] = static_cast<uint8_t>(below);
            below += inside[cell];
        }
        for (int cell = 0; cell < side; ++cell) {
            below_[cell] = static_cast<uint8_t>(below);
            below += inside[cell];
        }
    }

    BytePlanes midpoints_;
    alignas(64) uint8_t below_[kCells];
    alignas(64) uint16_t shift_[32];
    alignas(64) uint16_t offset_[32];
    MidpointTree tree_;
    bool separable_ = false;
    bool one_sided_ = false;
};

BNB_NAMESPACE_END
