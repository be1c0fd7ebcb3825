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

// sum + a.even * b.even + a.odd * b.odd, b the same pair for all lanes.
BNB_INLINE F32 add_pair_products(F32 sum, I32 a, I32 b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}

BNB_NAMESPACE_END
