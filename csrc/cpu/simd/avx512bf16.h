// What AVX512-BF16 with VBMI adds to avx512.h: products of bfloat16 pairs, two multiplications a lane and instruction.
//
// A 32-bit lane holds a pair, the value of the even index in its low half. The instructions take denormals as zero.
#pragma once

#define BNB_HAVE_PAIRS

BNB_NAMESPACE_BEGIN

// Sixteen values in bfloat16, twice, so that the fifth bit of an index does not count; and for each byte of a word,
// which of its bits become the two indices.
struct PairTable {
    __m512i values;
    __m512i position[4];

    explicit PairTable(const float* source) {
        uint16_t rounded[32];
        for (int i = 0; i < 32; ++i) rounded[i] = from_float<BFloat16>(source[i % 16]).bits;
        values = _mm512_loadu_si512(rounded);
        for (int byte = 0; byte < 4; ++byte) {  // the high nibble is the first value
            position[byte] =
                _mm512_set1_epi64((int64_t(0x0020'0024'0000'0004) + int64_t(0x0008'0008'0008'0008) * byte));
        }
    }
};

// The two values that byte `byte` of each word names.
template <int byte>
BNB_INLINE I32 lookup_pair(const PairTable& table, I32 words) {
    return {_mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(table.position[byte], words.v), table.values)};
}

BNB_INLINE I32 round_to_pairs(F32 even, F32 odd) {
    static const struct Order {
        uint16_t lane[32];
        constexpr Order() : lane() {
            for (int i = 0; i < 16; ++i) lane[2 * i] = uint16_t(i), lane[2 * i + 1] = uint16_t(16 + i);
        }
    } order;
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    return {_mm512_permutexvar_epi16(_mm512_loadu_si512(order.lane), halves)};
}

// The codes of a vector of packed words, decoded in four steps of a pair a lane. Its halves belong to two blocks, whose
// absmax the sixteen values are multiplied with: a table of 32, one bit of whose index says which half a code is in.
//
// In parts, a value is their sum, each the leading eight bits of what those before it leave.
template <int kParts = 1>
struct ScaledCodes {
    __m512i values[kParts];
    __m512i low, high;  // the index of each byte's low and high nibble

    BNB_INLINE ScaledCodes(const Table16& table, I32 words, const float* scales) {
        __m512 first = _mm512_mul_ps(table.v, _mm512_set1_ps(scales[0]));
        __m512 second = _mm512_mul_ps(table.v, _mm512_set1_ps(scales[1]));
        constexpr int kAndOr = 0xea;  // (first & second) | third
        if constexpr (kParts == 1) {  // one block's values after the other's
            const __m512i nibble = _mm512_set1_epi8(15);
            const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
            values[0] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            low = _mm512_ternarylogic_epi64(words.v, nibble, half, kAndOr);
            high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(words.v, 4), nibble, half, kAndOr);
        } else {  // value by value of both
            const __m512i leading = _mm512_set1_epi32(int32_t(0xffff0000));
            const __m512i nibble = _mm512_set1_epi8(30);
            const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(1), 1);
            const auto part_of = [&](__m512& value) BNB_INLINE_BODY {
                const __m512i part = _mm512_and_si512(_mm512_castps_si512(value), leading);
                value = _mm512_sub_ps(value, _mm512_castsi512_ps(part));
                return part;
            };
            for (int part = 0; part < kParts; ++part) {
                const __m512i low_half = _mm512_srli_epi32(part_of(first), 16);
                values[part] = _mm512_or_si512(low_half, part_of(second));
            }
            low = _mm512_ternarylogic_epi64(_mm512_slli_epi16(words.v, 1), nibble, half, kAndOr);
            high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(words.v, 3), nibble, half, kAndOr);
        }
    }
};

constexpr int kStepCode[4] = {1, 0, 3, 2};  // 16-bit lane i holds code 4 * i + kStepCode[step]

template <int step, int part = 0, int kParts>
BNB_INLINE I32 scaled_pairs(const ScaledCodes<kParts>& codes) {
    const __m512i bytes = step % 2 ? codes.high : codes.low;
    return {_mm512_permutexvar_epi16(step < 2 ? bytes : _mm512_srli_epi16(bytes, 8), codes.values[part])};
}

// Activations of 128 codes in that order: step s at target + s * stride.
BNB_INLINE void store_steps(const BFloat16* values, uint32_t* target, int64_t stride) {
    static const struct Order {
        uint16_t lane[2][32];
        constexpr Order() : lane() {
            for (int step = 0; step < 4; ++step) {
                for (int i = 0; i < 16; ++i)
                    lane[step / 2][step % 2 * 16 + i] = static_cast<uint16_t>(4 * i + kStepCode[step]);
            }
        }
    } order;
    __m512i quarter[4];
    for (int i = 0; i < 4; ++i) quarter[i] = _mm512_loadu_si512(values + 32 * i);
    for (int pair = 0; pair < 2; ++pair) {
        const __m512i lane = _mm512_loadu_si512(order.lane[pair]);
        const __m512i first = _mm512_permutex2var_epi16(quarter[0], lane, quarter[1]);
        const __m512i second = _mm512_permutex2var_epi16(quarter[2], lane, quarter[3]);
        _mm512_storeu_si512(target + (2 * pair) * stride, _mm512_shuffle_i64x2(first, second, 0x44));
        _mm512_storeu_si512(target + (2 * pair + 1) * stride, _mm512_shuffle_i64x2(first, second, 0xee));
    }
}

// Lane i is the sum of the lanes of sums[i].
BNB_INLINE F32 sums_of_lanes(const F32 (&sums)[kWidth]) {
    const auto words = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const auto four = [&](const F32* s) {
        const __m512d a = _mm512_castps_pd(words(s[0].v, s[1].v)), b = _mm512_castps_pd(words(s[2].v, s[3].v));
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    };
    const auto quarters = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return {quarters(quarters(four(sums), four(sums + 4)), quarters(four(sums + 8), four(sums + 12)))};
}

// sum + a.even * b.even + a.odd * b.odd, b the same pair for all lanes.
BNB_INLINE F32 add_pair_products(F32 sum, I32 a, I32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

BNB_NAMESPACE_END
