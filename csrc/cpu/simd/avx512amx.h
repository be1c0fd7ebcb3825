// What AMX adds to avx512bf16.h: eight tile registers of 16 rows of 16 words, and products of them in bfloat16 pairs
// and in int8.
//
// The registers have numbers, which are template arguments. Denormals are taken as zero.
#pragma once

#include "avx512bf16.h"

#define BNB_HAVE_AMX

BNB_NAMESPACE_BEGIN

constexpr int kAmxRows = 16;                       // rows of a register, and words of a row
constexpr int64_t kAmxBytes = 4 * kAmxRows;        // of a row
constexpr int64_t kAmxTile = kAmxRows * kAmxRows;  // words of a register

// Pairs from two rows' decoded steps: those of codes that store_columns puts into order again.
BNB_INLINE void interleave(I32 even, I32 odd, I32& low, I32& high) {
    low = {_mm512_unpacklo_epi16(even.v, odd.v)};
    high = {_mm512_unpackhi_epi16(even.v, odd.v)};
}

// 128 columns in order, from one row of the tiles that the steps of a vector of codes were interleaved to.
BNB_INLINE void store_columns(const F32 (&tiles)[8], float* target) {
    for (int half = 0; half < 2; ++half) {
        // Lane 4 * i + j of step s is column 32 * i + 16 * half + 4 * j + kStepCode[s].
        const __m512 code[4] = {tiles[2 + half].v, tiles[half].v, tiles[6 + half].v, tiles[4 + half].v};
        const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(code[0], code[1]));
        const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(code[0], code[1]));
        const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(code[2], code[3]));
        const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(code[2], code[3]));
        const __m512 quad[4] = {
            // quad j: the four codes of each i
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high))};
        const __m512 even_low = _mm512_shuffle_f32x4(quad[0], quad[1], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd);
        const __m512 even_high = _mm512_shuffle_f32x4(quad[2], quad[3], 0x88);
        const __m512 odd_high = _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd);
        _mm512_storeu_ps(target + 16 * half, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        _mm512_storeu_ps(target + 16 * half + 32, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_ps(target + 16 * half + 64, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
        _mm512_storeu_ps(target + 16 * half + 96, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
}

BNB_NAMESPACE_END

#ifdef BNB_EMULATE_AMX
#include "emulated_amx.h"
#else

BNB_NAMESPACE_BEGIN

// The tile registers of this thread, all of full size, until the end of the scope.
class AmxRegisters {
  public:
    AmxRegisters() {
        struct Config {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = 4 * kAmxRows, config.rows[i] = kAmxRows;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~AmxRegisters() { asm volatile("tilerelease"); }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// A register from rows `pitch` bytes apart; from and to 256 words in a row.
template <int number>
BNB_INLINE void amx_load(const void* source, int64_t pitch = kAmxBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(pitch), "i"(number) : "memory");
}
template <int number>
BNB_INLINE void amx_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(number));
}
template <int number>
BNB_INLINE void amx_store(void* target) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(kAmxBytes), "i"(number) : "memory");
}

// sum [i][j] += over words k and their halves: first [i][k] * second [k][j].
template <int sum, int first, int second>
BNB_INLINE void amx_add_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(first), "i"(second));
}

// The same of int8 and int32: over words k and their bytes.
template <int sum, int first, int second>
BNB_INLINE void amx_add_int8_products() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(first), "i"(second));
}

BNB_NAMESPACE_END

#endif
