// AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

BNB_NAMESPACE_BEGIN

constexpr int kWidth = 8;

struct F32 {
    __m256 v;
};

struct I32 {
    __m256i v;
};

BNB_INLINE F32 broadcast(float value) { return {_mm256_set1_ps(value)}; }
BNB_INLINE I32 broadcast(int32_t value) { return {_mm256_set1_epi32(value)}; }

BNB_INLINE F32 load(const float* source) { return {_mm256_loadu_ps(source)}; }

BNB_INLINE F32 load(const Half* source) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}

BNB_INLINE F32 load(const BFloat16* source) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}

BNB_INLINE void store(float* target, F32 x) { _mm256_storeu_ps(target, x.v); }

// Halves of eight 32-bit lanes, narrowed without saturation taking effect.
BNB_INLINE __m128i narrow_u16(__m256i x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

// Eight values rounded to 16 bits.
template <class T>
__m128i rounded(F32 x);

template <>
BNB_INLINE __m128i rounded<Half>(F32 x) {
    return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <>
BNB_INLINE __m128i rounded<BFloat16>(F32 x) {
    const __m256i raw = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    return narrow_u16(_mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan));
}

template <class T>
BNB_INLINE void store(T* target, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), rounded<T>(x));
}

BNB_INLINE I32 load_u8(const uint8_t* source) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)))};
}

BNB_INLINE __m128i narrow_u8(I32 x) {
    const __m128i halves = narrow_u16(x.v);
    return _mm_packus_epi16(halves, halves);
}

BNB_INLINE void store_u8(uint8_t* target, I32 x) { _mm_storel_epi64(reinterpret_cast<__m128i*>(target), narrow_u8(x)); }

BNB_INLINE void store_i8(int8_t* target, I32 x) {
    const __m256i low = _mm256_and_si256(x.v, _mm256_set1_epi32(255));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(target), narrow_u8({low}));
}

BNB_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
BNB_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
BNB_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
BNB_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// min and max return their second operand when either is NaN.
BNB_INLINE F32 clamp(F32 x, F32 low, F32 high) { return {_mm256_max_ps(low.v, _mm256_min_ps(high.v, x.v))}; }

BNB_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
BNB_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
BNB_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
BNB_INLINE I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
BNB_INLINE I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
BNB_INLINE I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }

template <int k>
BNB_INLINE I32 shift_left(I32 a) {
    return {_mm256_slli_epi32(a.v, k)};
}

template <int k>
BNB_INLINE I32 shift_right(I32 a) {
    return {_mm256_srli_epi32(a.v, k)};
}

BNB_INLINE I32 bits(F32 x) { return {_mm256_castps_si256(x.v)}; }
BNB_INLINE F32 from_bits(I32 x) { return {_mm256_castsi256_ps(x.v)}; }

BNB_INLINE I32 nan_mask(F32 x) { return {_mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))}; }
BNB_INLINE I32 at_least_mask(F32 a, F32 b) { return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))}; }

BNB_INLINE F32 select(I32 mask, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(mask.v))};
}

BNB_INLINE I32 select(I32 mask, I32 yes, I32 no) { return {_mm256_blendv_epi8(no.v, yes.v, mask.v)}; }

BNB_INLINE I32 round_to_int(F32 x) { return {_mm256_cvtps_epi32(x.v)}; }

BNB_INLINE I32 descend(I32 index, F32 x, F32 threshold) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x.v, threshold.v, _CMP_NLE_UQ));
    return {_mm256_sub_epi32(_mm256_add_epi32(index.v, index.v), above)};
}

struct Table4 {
    __m256 v;  // twice, since permutations within 16 bytes are the fastest
    explicit Table4(const float* values) : v(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(values))) {}
};

struct Table8 {
    __m256 v;
    explicit Table8(const float* values) : v(_mm256_loadu_ps(values)) {}
};

struct Table16 {
    __m256 low, high;
    explicit Table16(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}
};

BNB_INLINE F32 lookup(const Table4& table, I32 index) { return {_mm256_permutevar_ps(table.v, index.v)}; }
BNB_INLINE F32 lookup(const Table8& table, I32 index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }

BNB_INLINE F32 lookup(const Table16& table, I32 index) {
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index.v);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index.v);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
}

// table[index[i]] in lane i. To load and insert is one operation where compilers know the lane as an element, and all
// take half the time of a gather where that is microcode.
template <class Index>
BNB_INLINE F32 load_lanes(const float* table, const Index* index) {
    __m128 half[2];
    for (int h = 0; h < 2; ++h) {
        half[h] = _mm_load_ss(table + index[4 * h]);
        for (int i = 1; i < 4; ++i) half[h][i] = table[index[4 * h + i]];
    }
    return {_mm256_set_m128(half[1], half[0])};
}

BNB_INLINE F32 gather(const float* table, I32 index) {
    alignas(32) uint32_t lanes[kWidth];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), index.v);
    return load_lanes(table, lanes);
}

// Eight codes as indices. Loads are what decoding has too many of, so all but the last `loaded` come from one word.
template <int loaded>
BNB_INLINE void spread(const uint8_t* codes, uint32_t* index) {
    uint64_t word;
    memcpy(&word, codes, sizeof(word));
    for (int i = 0; i < kWidth; i += 2) {
        const bool split = i < kWidth - loaded;
        index[i] = split ? word & 255 : codes[i];
        index[i + 1] = split ? word >> 8 & 255 : codes[i + 1];
        word >>= 16;
        BNB_OPAQUE(word);  // two bytes of one register need no shifts
    }
}

#define BNB_HAVE_SCALED_CODES
constexpr int kCodesScaled = 16;

template <class T>
constexpr bool kScalesCodes = false;
template <>
inline constexpr bool kScalesCodes<BFloat16> = true;

// Without NaN, bfloat16 of even codes and of odd ones become pairs in one blend.

BNB_INLINE void scale_codes(const float* table, const uint8_t* codes, F32 scale, BFloat16* target) {
    __m128 even[2], odd[2];
    for (int h = 0; h < 2; ++h) {
        uint32_t index[kWidth];
        spread<4>(codes + h * kWidth, index);
        even[h] = _mm_load_ss(table + index[0]);
        odd[h] = _mm_load_ss(table + index[1]);
        for (int i = 1; i < 4; ++i) {
            even[h][i] = table[index[2 * i]];
            odd[h][i] = table[index[2 * i + 1]];
        }
    }
    const auto rounded_up = [&](const __m128(&half)[2]) {
        const __m256i raw = _mm256_castps_si256(_mm256_mul_ps(_mm256_set_m128(half[1], half[0]), scale.v));
        const __m256i last = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(raw, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    };
    const __m256i lower = _mm256_srli_epi32(rounded_up(even), 16), upper = rounded_up(odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_blend_epi16(lower, upper, 0xaa));
}

#define BNB_HAVE_CELLS
constexpr int kEncodedTogether = 32;

// Indices leave vector registers through memory, some time after they went there, and share loads.
BNB_INLINE void encode_by_cell(const uint32_t* cells, const float* values, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < n; i += kEncodedTogether) {
        __m256i counts[4];
        for (int k = 0; k < 4; ++k) {
            const float* const from = values + i + k * kWidth;
            uint32_t index[kWidth];
            for (int j = 0; j < kWidth; j += 2) {
                uint64_t pair;
                memcpy(&pair, from + j, sizeof(pair));
                BNB_OPAQUE(pair);
                index[j] = static_cast<uint32_t>(pair) >> 16;
                index[j + 1] = static_cast<uint32_t>(pair >> 48);
            }
            const __m256i cell = _mm256_castps_si256(load_lanes(reinterpret_cast<const float*>(cells), index).v);
            const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            const __m256i lower = _mm256_sign_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0xffff)), raw);
            counts[k] = _mm256_srli_epi32(_mm256_add_epi32(cell, lower), 16);
        }
        const __m256i front = _mm256_packus_epi32(counts[0], counts[1]);
        const __m256i back = _mm256_packus_epi32(counts[2], counts[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(front, back), order);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
    }
}

#define BNB_HAVE_HALF_TABLES

// Two tables of bytes, of which one shuffle each looks 32 codes up.
template <class T>
class HalfTable {
  public:
    static constexpr int64_t kCodes = 32;

    BNB_INLINE HalfTable(const Table16& table, F32 scale) {
        const __m128i first = rounded<T>(F32{table.low} * scale), second = rounded<T>(F32{table.high} * scale);
        const __m128i low_byte = _mm_set1_epi16(255);
        const __m128i lower = _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte));
        const __m128i upper = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        lower_ = _mm256_broadcastsi128_si256(lower);
        upper_ = _mm256_broadcastsi128_si256(upper);
    }

    BNB_INLINE void look_up(const uint8_t* packed, T* target) const {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const __m256i second = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(0x0f00));
        const __m256i codes = _mm256_or_si256(_mm256_srli_epi16(wide, 4), second);
        const __m256i lower = _mm256_shuffle_epi8(lower_, codes), upper = _mm256_shuffle_epi8(upper_, codes);
        const __m256i a = _mm256_unpacklo_epi8(lower, upper), b = _mm256_unpackhi_epi8(lower, upper);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target) + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }

  private:
    __m256i lower_, upper_;
};

// Each byte lands in two neighbouring lanes; the even one shifts its high nibble down.
BNB_INLINE I32 unpack_4bit(const uint8_t* packed) {
    int32_t raw;
    memcpy(&raw, packed, sizeof(raw));
    const __m128i bytes = _mm_cvtsi32_si128(raw);
    const __m256i twice = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    return {_mm256_and_si256(_mm256_srlv_epi32(twice, _mm256_set1_epi64x(4)), _mm256_set1_epi32(15))};
}

BNB_INLINE void pack_4bit(uint8_t* packed, I32 codes) {
    const __m128i pairs = _mm_maddubs_epi16(narrow_u8(codes), _mm_set1_epi16(0x0110));  // 16 * even + odd
    const int32_t raw = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
    memcpy(packed, &raw, sizeof(raw));
}

#define BNB_HAVE_JOINT_PACK
constexpr int kPackedTogether = 4;

// Until the last step the two halves of a register have the halves of each vector.
BNB_INLINE void pack_4bit(uint8_t* packed, const I32 (&codes)[kPackedTogether]) {
    const __m256i front = _mm256_packus_epi32(codes[0].v, codes[1].v);
    const __m256i back = _mm256_packus_epi32(codes[2].v, codes[3].v);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(front, back), _mm256_set1_epi16(0x0110));
    const __m256i bytes = _mm256_packus_epi16(pairs, pairs);
    const __m128i joined = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), joined);
}

BNB_INLINE I32 load_words(const void* source) { return {_mm256_loadu_si256(static_cast<const __m256i*>(source))}; }

BNB_INLINE void store_words(void* target, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(target), x.v); }

#define BNB_HAVE_BYTE_TABLES

// Sixteen floats as tables of bytes, the lowest first, in each of which one shuffle looks 32 codes up: all four bytes
// of a float, or the two of a bfloat16.
template <int kBytes>
struct ByteTable {
    static_assert(kBytes == 2 || kBytes == 4);
    __m256i bytes[kBytes];

    explicit ByteTable(const float* values) {
        for (int b = 0; b < kBytes; ++b) {
            uint8_t column[16];
            for (int i = 0; i < 16; ++i) {
                const uint32_t value =
                    kBytes == 2 ? uint32_t(from_float<BFloat16>(values[i]).bits) : float_bits(values[i]);
                column[i] = static_cast<uint8_t>(value >> 8 * b);
            }
            bytes[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(column)));
        }
    }
};

// The codes in the upper or lower halves of all bytes. What shifts is what shuffles, of which there is too little here;
// a multiplication goes elsewhere.
template <bool upper>
BNB_INLINE __m256i nibbles(I32 words) {
    const __m256i low = upper ? _mm256_mulhi_epu16(words.v, _mm256_set1_epi16(1 << 12)) : words.v;
    return _mm256_and_si256(low, _mm256_set1_epi8(15));
}

// Elements of so many bytes of a and b in turn: of the lower half of each 16 bytes, or of the upper.
template <int bytes, bool upper>
BNB_INLINE __m256i interleave(__m256i a, __m256i b) {
    if constexpr (bytes == 1) return upper ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
    if constexpr (bytes == 2) return upper ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
    if constexpr (bytes == 4) return upper ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
    if constexpr (bytes == 8) return upper ? _mm256_unpackhi_epi64(a, b) : _mm256_unpacklo_epi64(a, b);
}

// Step s of eight for the 64 codes of eight words: lane i holds code byte_step_code(s, i). What steps share is computed
// once, since the compiler sees all eight.
template <int step>
BNB_INLINE F32 lookup_bytes(const ByteTable<2>& table, I32 words) {
    const __m256i codes = nibbles<step / 4 == 0>(words);
    const __m256i pairs = interleave<1, (step & 2) != 0>(
        _mm256_shuffle_epi8(table.bytes[0], codes), _mm256_shuffle_epi8(table.bytes[1], codes));
    return {_mm256_castsi256_ps(
        step & 1 ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
                 : _mm256_slli_epi32(pairs, 16))};
}

template <int step>
BNB_INLINE F32 lookup_bytes(const ByteTable<4>& table, I32 words) {
    const __m256i codes = nibbles<step / 4 == 0>(words);
    const __m256i lower = interleave<1, (step & 2) != 0>(
        _mm256_shuffle_epi8(table.bytes[0], codes), _mm256_shuffle_epi8(table.bytes[1], codes));
    const __m256i upper = interleave<1, (step & 2) != 0>(
        _mm256_shuffle_epi8(table.bytes[2], codes), _mm256_shuffle_epi8(table.bytes[3], codes));
    return {_mm256_castsi256_ps(interleave<2, (step & 1) != 0>(lower, upper))};
}

// Sixteen integers of 16 bits as tables of their bytes.
struct IntegerTable {
    __m256i bytes[2];

    explicit IntegerTable(const int16_t* values) {
        for (int b = 0; b < 2; ++b) {
            uint8_t column[16];
            for (int i = 0; i < 16; ++i) column[i] = static_cast<uint8_t>(uint32_t(values[i]) >> 8 * b);
            bytes[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(column)));
        }
    }
};

// Step s of four for the 64 codes of eight words: the i-th of sixteen is that of code integer_step_code(s, i).
template <int step>
BNB_INLINE I32 lookup_integers(const IntegerTable& table, I32 words) {
    const __m256i codes = nibbles<step / 2 == 0>(words);
    return {interleave<1, step % 2 != 0>(
        _mm256_shuffle_epi8(table.bytes[0], codes), _mm256_shuffle_epi8(table.bytes[1], codes))};
}

constexpr int integer_step_code(int step, int i) { return 2 * (16 * (i / 8) + 8 * (step % 2) + i % 8) + step / 2; }

// Of two neighbouring integers each, the sum of the products.
BNB_INLINE I32 integer_products(I32 a, I32 b) { return {_mm256_madd_epi16(a.v, b.v)}; }

BNB_INLINE F32 to_floats(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }

template <int kBytes>
constexpr int byte_step_code(int step, int lane) {
    if (kBytes == 4) return 8 * (lane / 4 * 4 + step % 4) + 2 * (lane % 4) + step / 4;
    const int word = lane / 4 * 4 + (step & 2) + lane % 4 / 2, byte = lane % 2 * 2 + (step & 1);
    return 8 * word + 2 * byte + step / 4;
}

// Codes of rows in lanes: byte b of a word is step b of a table of bytes if that byte of four rows lies together, so
// bytes are transposed where other sets transpose words.
using NibbleTable = ByteTable<4>;

template <int i>
BNB_INLINE F32 lookup_code(const NibbleTable& table, I32 codes) {
    return lookup_bytes<i / 2 + 4 * (i % 2)>(table, codes);
}

// Half a vector of row i, and of the row four further on in the other lane.
BNB_INLINE __m256i load_halves(const void* const (&row)[kWidth], int i, int64_t offset) {
    const auto half = [&](int r) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(row[r]) + offset));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half(i)), half(i + 4), 1);
}

// Elements of so many bytes, for each place those of four rows side by side: rows 0 to 3 in the lower lane.
template <int bytes>
BNB_INLINE void load_transposed_in_lanes(const void* const (&row)[kWidth], int64_t offset, I32 (&words)[kWidth]) {
    for (int h = 0; h < 2; ++h) {
        const __m256i a = load_halves(row, 0, offset + 16 * h), b = load_halves(row, 1, offset + 16 * h);
        const __m256i c = load_halves(row, 2, offset + 16 * h), d = load_halves(row, 3, offset + 16 * h);
        const __m256i ab_low = interleave<bytes, false>(a, b), ab_high = interleave<bytes, true>(a, b);
        const __m256i cd_low = interleave<bytes, false>(c, d), cd_high = interleave<bytes, true>(c, d);
        words[4 * h].v = interleave<2 * bytes, false>(ab_low, cd_low);
        words[4 * h + 1].v = interleave<2 * bytes, true>(ab_low, cd_low);
        words[4 * h + 2].v = interleave<2 * bytes, false>(ab_high, cd_high);
        words[4 * h + 3].v = interleave<2 * bytes, true>(ab_high, cd_high);
    }
}

BNB_INLINE void load_codes(const void* const (&row)[kWidth], int64_t offset, I32 (&codes)[kWidth]) {
    load_transposed_in_lanes<1>(row, offset, codes);
}

BNB_INLINE void load_transposed(const void* const (&row)[kWidth], int64_t offset, I32 (&words)[kWidth]) {
    load_transposed_in_lanes<4>(row, offset, words);
}

template <int count>
BNB_INLINE F32 repeat(const float* values) {
    if constexpr (count == 1) return broadcast(*values);
    return {_mm256_set_m128(_mm_set1_ps(values[1]), _mm_set1_ps(values[0]))};
}

BNB_INLINE float reduce_add(F32 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

BNB_INLINE int32_t reduce_max(I32 x) {
    __m128i best = _mm_max_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(best, _mm_shuffle_epi32(best, 0xb1)));
}

constexpr bool kPermutesTables = false;
constexpr bool kLooksUpInTiles = false;

template <int n>
BNB_INLINE F32 lookup_many(const float* table, I32 index) {
    return gather(table, index);
}

BNB_INLINE F32 lookup_codes(const float* table, const uint8_t* codes) {
    uint32_t index[kWidth];
    spread<2>(codes, index);
    return load_lanes(table, index);
}

BNB_INLINE bool any_above(I32 a, I32 b) { return _mm256_movemask_epi8(_mm256_cmpgt_epi32(a.v, b.v)) != 0; }

BNB_NAMESPACE_END
