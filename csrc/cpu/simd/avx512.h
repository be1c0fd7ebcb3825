// AVX-512 F, BW, DQ, VL: sixteen lanes.
#pragma once

#include <immintrin.h>

BNB_NAMESPACE_BEGIN

constexpr int kWidth = 16;

struct F32 {
    __m512 v;
};

struct I32 {
    __m512i v;
};

BNB_INLINE F32 broadcast(float value) { return {_mm512_set1_ps(value)}; }
BNB_INLINE I32 broadcast(int32_t value) { return {_mm512_set1_epi32(value)}; }

BNB_INLINE F32 load(const float* source) { return {_mm512_loadu_ps(source)}; }

BNB_INLINE F32 load(const Half* source) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}

BNB_INLINE F32 load(const BFloat16* source) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}

BNB_INLINE void store(float* target, F32 x) { _mm512_storeu_ps(target, x.v); }

BNB_INLINE void store(Half* target, F32 x) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The instruction of AVX512-BF16 flushes denormals and keeps a NaN's payload, so it takes what has neither.
BNB_INLINE void store(BFloat16* target, F32 x) {
#if defined(__AVX512BF16__)
    constexpr int kNaN = 0x81, kDenormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(x.v, kNaN | kDenormal) == 0, 1)) {
        const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
        memcpy(target, &rounded, sizeof(rounded));
        return;
    }
#endif
    const __m512i raw = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i upper = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(upper));
}

BNB_INLINE I32 load_u8(const uint8_t* source) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
}

BNB_INLINE void store_u8(uint8_t* target, I32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(x.v));
}

BNB_INLINE void store_i8(int8_t* target, I32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(x.v));
}

BNB_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
BNB_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BNB_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BNB_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
BNB_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
BNB_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// min and max return their second operand when either is NaN.
BNB_INLINE F32 clamp(F32 x, F32 low, F32 high) { return {_mm512_max_ps(low.v, _mm512_min_ps(high.v, x.v))}; }

BNB_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BNB_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BNB_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
BNB_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
BNB_INLINE I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
BNB_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }

template <int k>
BNB_INLINE I32 shift_left(I32 a) {
    return {_mm512_slli_epi32(a.v, k)};
}

template <int k>
BNB_INLINE I32 shift_right(I32 a) {
    return {_mm512_srli_epi32(a.v, k)};
}

BNB_INLINE I32 bits(F32 x) { return {_mm512_castps_si512(x.v)}; }
BNB_INLINE F32 from_bits(I32 x) { return {_mm512_castsi512_ps(x.v)}; }

BNB_INLINE I32 nan_mask(F32 x) { return {_mm512_movm_epi32(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q))}; }
BNB_INLINE I32 at_least_mask(F32 a, F32 b) { return {_mm512_movm_epi32(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ))}; }

BNB_INLINE F32 select(I32 mask, F32 yes, F32 no) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(mask.v), no.v, yes.v)};
}

BNB_INLINE I32 select(I32 mask, I32 yes, I32 no) {
    return {_mm512_mask_blend_epi32(_mm512_movepi32_mask(mask.v), no.v, yes.v)};
}

BNB_INLINE I32 round_to_int(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }

BNB_INLINE I32 descend(I32 index, F32 x, F32 threshold) {
    const __mmask16 above = _mm512_cmp_ps_mask(x.v, threshold.v, _CMP_NLE_UQ);
    const __m512i doubled = _mm512_add_epi32(index.v, index.v);
    return {_mm512_mask_add_epi32(doubled, above, doubled, _mm512_set1_epi32(1))};
}

struct Table8 {
    __m512 v;
    explicit Table8(const float* values) : v(_mm512_broadcast_f32x8(_mm256_loadu_ps(values))) {}
};

using Table4 = Table8;

struct Table16 {
    __m512 v;
    explicit Table16(const float* values) : v(_mm512_loadu_ps(values)) {}
};

BNB_INLINE F32 lookup(const Table8& table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
BNB_INLINE F32 lookup(const Table16& table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
BNB_INLINE F32 gather(const float* table, I32 index) { return {_mm512_i32gather_ps(index.v, table, 4)}; }

// Each byte lands in two neighbouring lanes; the even one shifts its high nibble down.
BNB_INLINE I32 unpack_4bit(const uint8_t* packed) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(raw, raw));
    const __m512i shifts = _mm512_set1_epi64(4);
    return {_mm512_and_si512(_mm512_srlv_epi32(twice, shifts), _mm512_set1_epi32(15))};
}

BNB_INLINE void pack_4bit(uint8_t* packed, I32 codes) {
    const __m128i bytes = _mm512_cvtepi32_epi8(codes.v);
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));  // 16 * even + odd
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(pairs, pairs));
}

BNB_INLINE I32 load_words(const void* source) { return {_mm512_loadu_si512(source)}; }
BNB_INLINE void store_words(void* target, I32 x) { _mm512_storeu_si512(target, x.v); }

// The permutation looks at four bits of each index, whatever is above them.
template <int k>
BNB_INLINE F32 lookup_nibble(const Table16& table, I32 words) {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(words.v, k), table.v)};
}

// Four rows at a time, so that what is in flight stays in registers.
BNB_INLINE void load_transposed(const void* const (&row)[kWidth], int64_t offset, I32 (&words)[kWidth]) {
    const auto at = [&](int i) { return load_words(static_cast<const uint8_t*>(row[i]) + offset).v; };
    __m512i quad[16];
#define BNB_QUAD(i)                                                                                           \
    {                                                                                                         \
        const __m512i a = at(i), b = at(i + 1), c = at(i + 2), d = at(i + 3);                                 \
        const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);            \
        const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);            \
        quad[i] = _mm512_unpacklo_epi64(ab_low, cd_low), quad[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low); \
        quad[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);                                                \
        quad[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);                                                \
    }
    BNB_QUAD(0);
    BNB_QUAD(4);
    BNB_QUAD(8);
    BNB_QUAD(12);
#undef BNB_QUAD
#define BNB_COLUMNS(i)                                                                   \
    {                                                                                    \
        const __m512i even_low = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88);       \
        const __m512i odd_low = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xdd);        \
        const __m512i even_high = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0x88); \
        const __m512i odd_high = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0xdd);  \
        words[i].v = _mm512_shuffle_i32x4(even_low, even_high, 0x88);                    \
        words[i + 4].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);                  \
        words[i + 8].v = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);                \
        words[i + 12].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);                 \
    }
    BNB_COLUMNS(0);
    BNB_COLUMNS(1);
    BNB_COLUMNS(2);
    BNB_COLUMNS(3);
#undef BNB_COLUMNS
}

template <int count>
BNB_INLINE F32 repeat(const float* values) {
    if constexpr (count == 1) return broadcast(*values);
    const __m128i few = count == 2 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))
                                   : _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_srli_epi32(lane, count == 2 ? 3 : 2);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(index, _mm512_castsi128_si512(few)))};
}

BNB_INLINE float reduce_add(F32 x) { return _mm512_reduce_add_ps(x.v); }
BNB_INLINE int32_t reduce_max(I32 x) { return _mm512_reduce_max_epi32(x.v); }

// Tables by permutations of two registers: on many machines a gather costs a load for each lane.
constexpr bool kPermutesTables = true;
constexpr bool kLooksUpInTiles = true;

template <int n>
BNB_INLINE F32 lookup_many(const float* table, I32 index) {
    static_assert(n <= 256 && (n & (n - 1)) == 0);
    if constexpr (n <= 16) {
        return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))};
    } else if constexpr (n == 32) {
        return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), index.v, _mm512_loadu_ps(table + 16))};
    } else {
        const __mmask16 upper = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(n / 2));
        const F32 low = lookup_many<n / 2>(table, index), high = lookup_many<n / 2>(table + n / 2, index);
        return {_mm512_mask_blend_ps(upper, low.v, high.v)};
    }
}

BNB_INLINE F32 lookup_codes(const float* table, const uint8_t* codes) {
    return lookup_many<256>(table, load_u8(codes));
}

BNB_INLINE bool any_above(I32 a, I32 b) { return _mm512_cmpgt_epi32_mask(a.v, b.v) != 0; }

BNB_NAMESPACE_END
